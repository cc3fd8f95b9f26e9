//! Throughput of saves and restores: Xen's engine, ours, and `cat` with the same bytes.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::Deserialize;

use super::bench::{CONTENDERS, Contender, Runner};
use super::plot::Group;
use crate::command::Invocation;
use crate::spread::Spread;

/// The costs of one run, as `xsr-peer-run` prints them.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Took {
    seconds: f64,
    user_seconds: f64,
    system_seconds: f64,
    peak_kib: u32,
    hypercalls: u32,
    maps: u32,
}

const STOCK: usize = 0;
const OURS: usize = 2;
const CAT: usize = 3;

/// One task in one way: the costs for each contender in each round.
#[derive(Debug, Default)]
struct Row {
    what: String,
    took: [Vec<Took>; CONTENDERS.len()],
    /// System calls of stock and ours.
    system_calls: [Option<u64>; 2],
}

impl Row {
    fn median(&self, contender: usize, figure: impl Fn(&Took) -> f64) -> f64 {
        Spread::of(self.took[contender].iter().map(figure)).median
    }

    fn seconds(&self, contender: usize) -> Spread {
        Spread::of(self.took[contender].iter().map(|took| took.seconds))
    }

    /// The row as GiB/s, for a plot.
    fn group(&self, kind: &str, gib: f64) -> Group {
        let rates = |n: usize| Spread::of(self.took[n].iter().map(|took| gib / took.seconds));
        let contenders = CONTENDERS.iter().enumerate();
        Group {
            name: format!("{kind}: {}", self.what),
            bars: contenders.map(|(n, c)| (c.name, rates(n))).collect(),
        }
    }
}

/// All measurements of one kind of guest.
#[derive(Debug)]
pub(super) struct Report {
    kind: String,
    /// Size of its image.
    gib: f64,
    rows: Vec<Row>,
}

impl Report {
    /// Its rows, for a plot.
    pub(super) fn groups(&self) -> impl Iterator<Item = Group> {
        let rows = self.rows.iter();
        rows.map(|row| row.group(&self.kind, self.gib))
    }
}

/// Saves and restores guests of `mib` MiB of one kind, in every way.
///
/// # Errors
///
/// A run fails.
pub(super) fn run(runner: &Runner<'_>, kind: &str, mib: u64, pairs: u32) -> Result<Report> {
    let bench = Bench {
        runner,
        memory: mib.to_string(),
        kind: kind.to_owned(),
    };
    bench.run(pairs)
}

/// One kind of guest.
struct Bench<'a> {
    runner: &'a Runner<'a>,
    memory: String,
    kind: String,
}

impl Bench<'_> {
    fn guest(&self) -> PathBuf {
        self.runner.dir.join("guest")
    }

    fn image(&self) -> PathBuf {
        self.runner.dir.join("guest.image")
    }

    /// A single run; `under` is a command that wraps it.
    fn one(&self, what: What, way: &str, contender: Contender, under: &[&OsStr]) -> Result<Took> {
        let (guest, new) = (self.guest(), self.runner.dir.join("new"));
        let (place, file) = match what {
            What::Save => (&guest, new.clone()),
            What::Restore => (&new, self.image()),
        };
        if what == What::Save && contender.whose != "cat" {
            let state = match contender.whose {
                "stock" => "suspend",
                _ => "resume",
            };
            self.runner
                .task("1", [OsStr::new(state), guest.as_os_str()])?;
        }
        let mut words = vec![
            OsStr::new(what.name()),
            OsStr::new(contender.whose),
            place.as_os_str(),
            OsStr::new(&self.kind),
            OsStr::new(&self.memory),
            OsStr::new(way),
            file.as_os_str(),
        ];
        if !under.is_empty() {
            words.push(OsStr::new("--"));
            words.extend(under);
        }
        let said = self.runner.task(contender.threads, words)?;
        if new.is_dir() {
            fs::remove_dir_all(&new)?;
        } else if new.exists() {
            fs::remove_file(&new)?;
        }
        serde_json::from_str(&said).with_context(|| format!("not understood: {said}"))
    }

    /// System calls of a run, if strace is available and permitted.
    fn system_calls(&self, what: What, way: &str, contender: Contender) -> Result<Option<u64>> {
        if !Invocation::new("strace").args(["-c", "true"]).succeeds() {
            return Ok(None);
        }
        let counts = self.runner.dir.join("strace");
        let under = ["strace", "-f", "-c", "-o"].map(OsStr::new);
        let under: Vec<&OsStr> = under.into_iter().chain([counts.as_os_str()]).collect();
        self.one(what, way, contender, &under)?;
        let text = fs::read_to_string(&counts)?;
        Ok(total_of(&text))
    }

    fn run(&self, pairs: u32) -> Result<Report> {
        let guest = self.guest();
        let words = [
            "make".as_ref(),
            guest.as_os_str(),
            self.kind.as_ref(),
            self.memory.as_ref(),
        ];
        self.runner.task("1", words)?;
        self.runner
            .task("1", ["suspend".as_ref(), guest.as_os_str()])?;
        let image = self.image();
        let mut words = vec!["save", "stock"]
            .into_iter()
            .map(OsStr::new)
            .collect::<Vec<_>>();
        words.extend([guest.as_os_str(), self.kind.as_ref(), self.memory.as_ref()]);
        words.extend(["file".as_ref(), image.as_os_str()]);
        self.runner.task("1", words)?;
        let mib = u32::try_from(fs::metadata(&image)?.len() >> 20)?;

        let mut rows = Vec::new();
        for (what, way) in WAYS {
            let mut row = Row {
                what: format!("{} {}", what.name(), what.place(way)),
                ..Row::default()
            };
            for round in 0..pairs {
                eprintln!("{} {}: round {} of {pairs}", self.kind, row.what, round + 1);
                let mut turns: Vec<usize> = (0..CONTENDERS.len()).collect();
                if round % 2 == 1 {
                    turns.reverse();
                }
                for turn in turns {
                    row.took[turn].push(self.one(what, way, CONTENDERS[turn], &[])?);
                }
            }
            for (calls, contender) in row.system_calls.iter_mut().zip([STOCK, OURS]) {
                *calls = self.system_calls(what, way, CONTENDERS[contender])?;
            }
            rows.push(row);
        }
        fs::remove_dir_all(&guest)?;
        fs::remove_file(&image)?;
        Ok(Report {
            kind: self.kind.clone(),
            gib: f64::from(mib) / 1024.0,
            rows,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Save,
    Restore,
}

const WAYS: [(What, &str); 7] = [
    (What::Save, "null"),
    (What::Save, "pipe"),
    (What::Save, "file"),
    (What::Save, "tcp"),
    (What::Restore, "pipe"),
    (What::Restore, "file"),
    (What::Restore, "tcp"),
];

impl What {
    fn name(self) -> &'static str {
        match self {
            Self::Save => "save",
            Self::Restore => "restore",
        }
    }

    fn place(self, way: &str) -> String {
        let place = match way {
            "null" => "/dev/null",
            "tcp" => "TCP",
            way => way,
        };
        match self {
            Self::Save => format!("to {place}"),
            Self::Restore => format!("from {place}"),
        }
    }
}

/// The number of calls in the last line of strace's summary.
fn total_of(summary: &str) -> Option<u64> {
    let line = summary.lines().find(|line| line.ends_with(" total"))?;
    line.split_whitespace().nth(3)?.parse().ok()
}

/// The tables.
pub(super) fn table(out: &mut String, report: &Report) -> Result<()> {
    let Report { kind, gib, rows } = report;
    writeln!(out, "\n### {kind}: image of {gib:.2} GiB\n")?;
    let names = CONTENDERS.map(|contender| format!("{}, s", contender.name));
    writeln!(
        out,
        "| what | {} | ours (2): stock | ours (1): stock | of the limit |",
        names.join(" | ")
    )?;
    writeln!(out, "|---|---|---|---|---|---|---|---|")?;
    for row in rows {
        write!(out, "| {} |", row.what)?;
        for contender in 0..CONTENDERS.len() {
            let Spread {
                least,
                median,
                most,
            } = row.seconds(contender);
            write!(out, " {median:.3} ({least:.3}–{most:.3}) |")?;
        }
        let [stock, one, two, cat] = [0, 1, 2, 3].map(|n| row.seconds(n).median);
        writeln!(
            out,
            " {:.2} × | {:.2} × | {:.0} % |",
            stock / two,
            stock / one,
            100.0 * cat / two
        )?;
    }
    writeln!(
        out,
        "\n| what | processor s: stock, ours (1), ours (2), cat | peak MiB: stock, ours (2) | hypercalls | mappings | system calls |"
    )?;
    writeln!(out, "|---|---|---|---|---|---|")?;
    for row in rows {
        let used = |n| row.median(n, |took| took.user_seconds + took.system_seconds);
        let figure = |n, of: fn(&Took) -> u32| row.median(n, |took| f64::from(of(took)));
        let calls = row.system_calls.map(|calls| match calls {
            Some(calls) => calls.to_string(),
            None => "not counted".to_owned(),
        });
        writeln!(
            out,
            "| {} | {:.3}, {:.3}, {:.3}, {:.3} | {:.0}, {:.0} | {}, {} | {}, {} | {} |",
            row.what,
            used(STOCK),
            used(1),
            used(OURS),
            used(CAT),
            figure(STOCK, |took| took.peak_kib) / 1024.0,
            figure(OURS, |took| took.peak_kib) / 1024.0,
            figure(STOCK, |took| took.hypercalls),
            figure(OURS, |took| took.hypercalls),
            figure(STOCK, |took| took.maps),
            figure(OURS, |took| took.maps),
            calls.join(", "),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn took(seconds: f64) -> Took {
        Took {
            seconds,
            user_seconds: 0.25,
            system_seconds: 0.5,
            peak_kib: 3 << 10,
            hypercalls: 280,
            maps: 17,
        }
    }

    #[test]
    fn a_row_has_medians_ranges_and_shares() {
        let row = Row {
            what: "save to pipe".to_owned(),
            took: [[4.0, 9.0, 5.0], [4.0; 3], [2.5, 1.0, 9.0], [2.0, 2.0, 7.0]]
                .map(|seconds| seconds.map(took).to_vec()),
            system_calls: [Some(12), None],
        };
        let Group { name, bars } = row.group("pv", 10.0);
        assert_eq!(name, "pv: save to pipe");
        let spread = Spread::of([10.0 / 9.0, 4.0, 10.0]);
        assert_eq!(bars[2], ("ours, 2 threads", spread));
        let report = Report {
            kind: "pv".to_owned(),
            gib: 10.0,
            rows: vec![row],
        };
        let mut text = String::new();
        table(&mut text, &report).unwrap();
        let times = "| save to pipe | 5.000 (4.000–9.000) | 4.000 (4.000–4.000) | 2.500 (1.000–9.000) | 2.000 (2.000–7.000) | 2.00 × | 1.25 × | 80 % |";
        assert!(text.contains(times), "{text}");
        let rest = "| save to pipe | 0.750, 0.750, 0.750, 0.750 | 3, 3 | 280, 280 | 17, 17 | 12, not counted |";
        assert!(text.contains(rest), "{text}");
    }

    #[test]
    fn straces_summary_has_a_total() {
        let summary = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 63.50    0.001000           2       401         3 writev
------ ----------- ----------- --------- --------- ----------------
100.00    0.001575           2       639         5 total
";
        assert_eq!(total_of(summary), Some(639));
        assert_eq!(total_of("nothing"), None);
    }
}
