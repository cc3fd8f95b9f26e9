//! Limits of an image's cost: 256 MiB of memory, 8 bytes for each page that it really holds, and a
//! decompressor's window. Every command that reads images runs on the worst images, under that
//! limit (`RLIMIT_DATA`, which counts all private writable memory; a mock guest's memory is shared,
//! and not an image's cost).
//!
//! `XSR_BOUNDS=measure cargo nextest run -p xsr --test it bounds:: --no-capture` prints the least
//! memory that each command needs. `XSR_BOUNDS=all` runs every command on every image, even where
//! one of its kind would do.

pub(crate) mod inputs;
mod wrapped;

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use self::inputs::{
    CHECKPOINT, CHECKPOINT_END, CPUID_POLICY, EMULATOR_CONTEXT, Guest, HVM_PARAMS, Image,
    MSR_POLICY, NOTAB, OPTIONAL, VCPU_BASIC, VCPU_EXTENDED, VCPU_XSAVE, XALLOC, XENSTORE_DATA,
    XTAB, config, context_record, cpu, gzip, lz4, xz, zstd,
};
use crate::common::{arg, scratch};

const MIB: u64 = 1 << 20;
/// The limit for everything except pages and window.
const REST: u64 = 256 * MIB;
/// Longer than any command takes, whatever else the machine does.
const LATE: Duration = Duration::from_secs(120);

/// The mode of the tests.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Few,
    All,
    Measure,
}

fn how() -> How {
    match std::env::var("XSR_BOUNDS").as_deref() {
        Ok("all") => How::All,
        Ok("measure") => How::Measure,
        _ => How::Few,
    }
}

/// An image that is designed to cost much.
struct Hostile {
    path: PathBuf,
    /// The number of pages that it holds.
    pages: u64,
    /// The decompressor's window.
    window: u64,
    /// The exit code of `verify`.
    verdict: i32,
}

impl Hostile {
    fn limit(&self) -> u64 {
        REST + 8 * self.pages + self.window
    }
}

/// The commands to run on an image.
#[derive(Clone, Copy)]
enum Commands {
    /// All of them.
    All,
    /// One of each kind: for wrappers, which all commands remove in the same way.
    Few,
}

/// Each command as its name and arguments; outputs go to `directory`.
fn commands(image: &Path, directory: &Path, which: Commands) -> Vec<(&'static str, Vec<String>)> {
    let image = arg(image);
    let out = directory.join("out");
    let out = arg(&out);
    let host = format!("--backend=mock:{}", directory.join("host").display());
    let few: &[(&'static str, &[&str])] = &[
        ("verify", &["verify", image]),
        ("inspect", &["inspect", image]),
        ("cat", &["cat", image, "-f", "-o", out]),
        ("convert", &["convert", image, "-f", "-o", out]),
        ("restore", &["restore", "-p", &host, image]),
    ];
    let all: &[(&'static str, &[&str])] = &[
        ("verify --deep", &["verify", "--deep", "--json", image]),
        (
            "inspect --json",
            &["inspect", "--json", "--pages", "--fields", image],
        ),
        (
            "inspect --pages",
            &["inspect", "--pages", "--fields", image],
        ),
        ("cat xl", &["cat", "--layer", "xl", image, "-f", "-o", out]),
        (
            "cat config",
            &["cat", "--layer", "config", image, "-f", "-o", out],
        ),
        (
            "convert libxc",
            &["convert", "--to", "libxc", image, "-f", "-o", out],
        ),
        (
            "convert libxl",
            &["convert", "--to", "libxl", image, "-f", "-o", out],
        ),
        (
            "convert xl",
            &["convert", "--to", "xl", image, "-f", "-o", out],
        ),
        (
            "convert mapped",
            &[
                "convert",
                "--layout",
                "mapped",
                "--page-digests",
                image,
                "-f",
                "-o",
                out,
            ],
        ),
        ("export elf", &["export", image, "-f", "-o", out]),
        (
            "export raw",
            &["export", "--format", "raw", image, "-f", "-o", out],
        ),
        (
            "export gdb",
            &["export", "--format", "gdb", image, "-f", "-o", out],
        ),
        ("diff", &["diff", image, image]),
        ("diff --json", &["diff", "--json", image, image]),
        ("edit", &["edit", "--name", "good", image, "-f", "-o", out]),
    ];
    let chosen = match which {
        Commands::Few if how() == How::Few => &all[..0],
        _ => all,
    };
    let chosen = few.iter().chain(chosen);
    chosen
        .map(|(name, args)| (*name, args.iter().map(|arg| (*arg).to_owned()).collect()))
        .collect()
}

/// The outcome of a run.
struct Came {
    /// `None` if a signal ended it, for example because memory ran out.
    code: Option<i32>,
    stderr: String,
}

impl Came {
    fn ran_out(&self) -> bool {
        self.code.is_none() || self.stderr.contains("memory allocation of")
    }
}

/// Run a command with limited memory, and `input` through a pipe.
#[track_caller]
fn run_with(limit: u64, args: &[String], input: Option<&Path>) -> Came {
    let before = Instant::now();
    let mut feeder = input.map(|path| {
        let cat = Command::new("cat").arg(path).stdout(Stdio::piped()).spawn();
        cat.unwrap()
    });
    let stdin = match &mut feeder {
        Some(cat) => Stdio::from(cat.stdout.take().unwrap()),
        None => Stdio::null(),
    };
    let out = Command::new("sh")
        .args(["-c", "ulimit -d $0 && ulimit -c 0 && exec \"$@\""])
        .arg((limit >> 10).to_string())
        .arg(env!("CARGO_BIN_EXE_xsr"))
        .args(args)
        .env_remove("XSR_BACKEND")
        .env_remove("XSR_LOG")
        .env_remove("RUST_BACKTRACE")
        .stdin(stdin)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    if let Some(mut cat) = feeder {
        // It may end before everything is read.
        cat.wait().unwrap();
    }
    assert!(before.elapsed() < LATE, "{args:?}");
    Came {
        code: out.status.code().filter(|_| out.status.signal().is_none()),
        stderr: String::from_utf8_lossy(&out.stderr).into_owned(),
    }
}

/// The least memory, in MiB, that a command needs.
fn least(limit: u64, args: &[String], prepare: &dyn Fn()) -> u64 {
    let (mut low, mut high) = (0, 4 * limit / MIB);
    while high - low > 4 {
        let middle = u64::midpoint(low, high);
        prepare();
        match run_with(middle * MIB, args, None).ran_out() {
            true => low = middle,
            false => high = middle,
        }
    }
    high
}

/// Run all commands on an image.
#[track_caller]
fn check(directory: &TempDir, hostile: &Hostile, which: Commands) {
    let directory = directory.path();
    let image = &hostile.path;
    let name = image.file_name().unwrap().to_string_lossy();
    let limit = hostile.limit();
    let clean = || {
        fs::remove_dir_all(directory.join("host")).unwrap_or_default();
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let name = entry.file_name();
            if name.to_string_lossy().contains("out") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    };
    let mut failed: Vec<String> = Vec::new();
    for (command, args) in commands(image, directory, which) {
        clean();
        let before = Instant::now();
        let came = run_with(limit, &args, None);
        if how() == How::Measure {
            let took = before.elapsed().as_secs_f64();
            let needs = least(limit, &args, &clean);
            let limit = limit / MIB;
            let code = came.code;
            eprintln!("{name:28} {command:18} {needs:5} of {limit} MiB {took:6.2} s {code:?}");
            continue;
        }
        let stderr: String = came.stderr.chars().take(1000).collect();
        let good = match came.code {
            _ if came.ran_out() || came.stderr.contains("panicked") => false,
            Some(code) if command == "verify" => code == hostile.verdict,
            Some(code) => (0..=2).contains(&code),
            None => false,
        };
        let entries = fs::read_dir(directory).unwrap();
        let mut names = entries.map(|entry| entry.unwrap().file_name());
        let good = good && !names.any(|name| name.to_string_lossy().ends_with(".partial"));
        // A command's messages must be short.
        if !good || came.stderr.len() > 16 << 10 {
            let (limit, code) = (limit / MIB, came.code);
            failed.push(format!(
                "{name}: {command} with {limit} MiB: {code:?} {stderr}"
            ));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}

/// Make an image and run all commands on it.
#[track_caller]
fn each(name: &str, verdict: i32, pages: u64, make: impl FnOnce(&Path)) {
    let directory = scratch();
    let path = directory.path().join(name);
    make(&path);
    let hostile = Hostile {
        path,
        pages,
        window: 0,
        verdict,
    };
    check(&directory, &hostile, Commands::All);
}

fn hvm(path: &Path) -> Image {
    hvm_with(path, 1, "")
}

/// An HVM guest with `more` in its configuration.
fn hvm_with(path: &Path, vcpus: u32, more: &str) -> Image {
    let config = format!("{}{more}}}", config("hvm", vcpus));
    Image::wrapped(path, Guest::Hvm, config.as_bytes(), |_| {})
}

fn pv(path: &Path, vcpus: u32) -> Image {
    let config = format!("{}}}", config("pv", vcpus));
    Image::wrapped(path, Guest::Pv, config.as_bytes(), |_| {})
}

#[test]
fn an_optional_record_of_libxc() {
    each("optional-libxc", 0, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        image.zeros(OPTIONAL, 128 << 20);
        image.end(|_| {});
    });
}

#[test]
fn an_optional_record_of_libxl() {
    each("optional-libxl", 0, 1, |path| {
        let before = |image: &mut Image| image.zeros(OPTIONAL, 120 << 20);
        let config = format!("{}}}", config("hvm", 1));
        let mut image = Image::wrapped(path, Guest::Hvm, config.as_bytes(), before);
        image.pages(&[NOTAB]);
        image.end(|_| {});
    });
}

/// A record with the state of an emulator.
fn emulator(image: &mut Image, bytes: u32) {
    image.word(EMULATOR_CONTEXT);
    image.word(bytes);
    image.long(2);
    image.hole(u64::from(bytes) - 8);
}

#[test]
fn state_of_an_emulator() {
    each("emulator", 0, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        image.end(|image| emulator(image, 120 << 20));
    });
}

#[test]
fn state_of_an_emulator_before_the_memory() {
    each("emulator-before", 0, 1, |path| {
        let config = format!("{}}}", config("hvm", 1));
        let before = |image: &mut Image| emulator(image, 120 << 20);
        let mut image = Image::wrapped(path, Guest::Hvm, config.as_bytes(), before);
        image.pages(&[NOTAB]);
        image.end(|_| {});
    });
}

#[test]
fn many_keys_of_an_emulator() {
    each("xenstore", 0, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        image.end(|image| {
            let keys = b"a\0\0".repeat(16 << 20);
            let mut body = vec![2, 0, 0, 0, 0, 0, 0, 0];
            body.extend(keys);
            image.record(XENSTORE_DATA, &body);
        });
    });
}

#[test]
fn many_records_of_emulators() {
    each("emulators", 2, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        image.end(|image| {
            for index in 0..1_500_000_u64 {
                image.word(EMULATOR_CONTEXT);
                image.word(8);
                image.long(2 | index << 32);
            }
        });
    });
}

#[test]
fn scattered_pages_without_contents() {
    each("scattered-xtab", 0, 0, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        for batch in 0..2000 {
            let entries = (0..1000).map(|n| XTAB | ((batch * 1000 + n) * 4096 + 7));
            image.pages(&entries.collect::<Vec<_>>());
        }
        image.end(|_| {});
    });
}

#[test]
fn alternating_pages_without_contents() {
    each("alternating", 0, 0, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        let entries = (1..2_000_000).map(|n| if n % 2 == 0 { XTAB | n } else { XALLOC | n });
        image.pages(&entries.collect::<Vec<_>>());
        image.end(|_| {});
    });
}

/// More than their map may take.
#[test]
fn too_many_scattered_pages_without_contents() {
    // An image of 120 MiB, which takes a while to write.
    if how() == How::Few {
        return;
    }
    each("too-scattered", 0, 0, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        let entries = (1..16_000_000).map(|n| XTAB | (n * 50_000 % (1 << 40)));
        image.pages(&entries.collect::<Vec<_>>());
        image.end(|_| {});
    });
}

#[test]
fn scattered_pages() {
    const PAGES: u64 = 60_000;
    each("scattered", 0, PAGES, |path| {
        let mut image = hvm(path);
        for n in 0..PAGES {
            image.pages(&[n * 7919 % PAGES * 33_000]);
        }
        image.end(|_| {});
    });
}

// Most frames of the p2m of these PV guests are not in the image, which a restore finds at the end.

#[test]
fn scattered_pages_of_a_pv_guest() {
    const PAGES: u64 = 60_000;
    each("scattered-pv", 2, PAGES, |path| {
        let mut image = pv(path, 1);
        image.p2m(u32::MAX, |leaf| leaf * 511 % (1 << 32));
        for n in 0..PAGES {
            image.pages(&[n * 7919 % PAGES * 70_000 % (1 << 32)]);
        }
        image.end(|_| {});
    });
}

#[test]
fn many_leaves_of_a_p2m() {
    each("p2m", 2, 1, |path| {
        let mut image = pv(path, 1);
        for time in 0..3 {
            image.p2m(u32::MAX, |leaf| leaf + time);
        }
        image.pages(&[NOTAB]);
        image.end(|_| {});
    });
}

#[test]
fn many_vcpus() {
    each("vcpus", 0, 1, |path| {
        let mut image = pv(path, 8192);
        image.p2m(511, |_| 0);
        image.pages(&[NOTAB]);
        for vcpu in 0..8192 {
            image.vcpu(VCPU_BASIC, vcpu, 0x1430);
            image.vcpu(VCPU_EXTENDED, vcpu, 128);
            image.vcpu(VCPU_XSAVE, vcpu, 2696);
        }
        image.end(|_| {});
    });
}

#[test]
fn a_context_of_many_records() {
    each("context", 0, 1, |path| {
        let mut image = hvm_with(path, 128, "");
        image.pages(&[NOTAB]);
        image.context(60_000, |n| match n {
            0..128 => cpu(n as u16),
            n => {
                let mut out = Vec::new();
                context_record(
                    &mut out,
                    200 + (n >> 8) as u16,
                    (n & 0xff) as u16,
                    &[1; 200],
                );
                out
            }
        });
        image.end(|_| {});
    });
}

#[test]
fn a_context_of_many_vcpus() {
    each("context-cpus", 2, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        image.context(1_900_000, |_| {
            let mut out = Vec::new();
            context_record(&mut out, 2, 0, &[]);
            out
        });
        image.end(|_| {});
    });
}

#[test]
fn many_leaves_of_a_cpu_policy() {
    each("policy", 0, 1, |path| {
        let config = format!("{}}}", config("hvm", 1));
        let mut image = Image::policies(path, config.as_bytes(), |image| {
            let leaves = (0..40_000_u32).flat_map(|leaf| [leaf, leaf, 1, 2, 3, 4]);
            let body: Vec<u8> = leaves.flat_map(u32::to_le_bytes).collect();
            image.record(CPUID_POLICY, &body);
            let msrs = (0..60_000_u32).flat_map(|msr| [msr, 0, 1, 2]);
            let body: Vec<u8> = msrs.flat_map(u32::to_le_bytes).collect();
            image.record(MSR_POLICY, &body);
        });
        image.pages(&[NOTAB]);
        let params = (0..65_000_u64).flat_map(|n| [n % 2, n]);
        let head = 65_000_u64.to_le_bytes();
        let body: Vec<u8> = head
            .into_iter()
            .chain(params.flat_map(u64::to_le_bytes))
            .collect();
        image.record(HVM_PARAMS, &body);
        image.end(|_| {});
    });
}

#[test]
fn many_optional_records() {
    each("optionals", 0, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        for n in 0..1 << 16 {
            image.record(OPTIONAL + n, &[1; 200]);
        }
        image.end(|_| {});
    });
}

#[test]
fn many_checkpoints() {
    each("checkpoints", 2, 1, |path| {
        let mut image = hvm(path);
        image.pages(&[NOTAB]);
        image.state();
        for n in 0..300_000_u64 {
            image.record(OPTIONAL, &[]);
            image.record(CHECKPOINT, &[]);
            image.word(EMULATOR_CONTEXT);
            image.word(8);
            image.long(2 | n << 32);
            image.record(CHECKPOINT_END, &[]);
        }
        image.end(|_| {});
    });
}

/// Each checkpoint may change the table against which all leaves are compared.
#[test]
fn many_checkpoints_of_many_leaves() {
    each("checkpoints-p2m", 2, 1, |path| {
        let mut image = pv(path, 1);
        image.p2m(u32::MAX, |leaf| leaf);
        image.pages(&[NOTAB]);
        image.state();
        for n in 0..2000 {
            image.pages(&[XALLOC | (n * 512)]);
            image.record(CHECKPOINT, &[]);
            image.record(CHECKPOINT_END, &[]);
        }
        image.end(|_| {});
    });
}

#[test]
fn a_configuration_that_is_deep() {
    for (name, depth, values) in [("json-deep", 120, 400_000), ("json-wide", 1, 500_000)] {
        each(name, 0, 1, |path| {
            let (open, close) = ("[".repeat(depth), "]".repeat(depth));
            let values = vec!["0"; values].join(",");
            let mut image = hvm_with(path, 1, &format!(r#","x":{open}{values}{close}"#));
            image.pages(&[NOTAB]);
            image.end(|_| {});
        });
    }
}

#[test]
fn a_configuration_that_is_too_long() {
    each("json-long", 2, 1, |path| {
        let config = format!(r#"{{"a":"{}"}}"#, "x".repeat(15 << 20));
        let mut image = Image::wrapped(path, Guest::Hvm, config.as_bytes(), |_| {});
        image.pages(&[NOTAB]);
        image.end(|_| {});
    });
}

/// An image that is large after decompression.
fn large(path: &Path) {
    let mut image = hvm(path);
    image.pages(&[NOTAB]);
    image.zeros(OPTIONAL, 128 << 20);
    image.end(|_| {});
}

#[test]
fn compressed() {
    let directory = scratch();
    let plain = directory.path().join("plain");
    large(&plain);
    type Pack<'p> = &'p dyn Fn(&Path, &Path);
    let kinds: [(&str, u64, Pack<'_>); 4] = [
        ("gz", 1, &gzip),
        ("zst", 128, &|from, to| zstd(from, to, 27)),
        ("lz4", 8, &lz4),
        ("xz", 128, &xz),
    ];
    for (name, window, pack) in kinds {
        let path = directory.path().join(name);
        pack(&plain, &path);
        let hostile = Hostile {
            path,
            pages: 1,
            window: window * MIB,
            verdict: 0,
        };
        check(&directory, &hostile, Commands::Few);
    }
}

/// Compressed repeatedly: the windows of all layers together must not exceed the limit for one.
#[test]
fn compressed_in_layers() {
    let directory = scratch();
    let path = |n: usize| directory.path().join(format!("zst{n}"));
    large(&path(0));
    for n in 1..=4 {
        zstd(&path(n - 1), &path(n), 27);
    }
    let hostile = Hostile {
        path: path(4),
        pages: 1,
        window: 128 * MIB,
        verdict: 2,
    };
    check(&directory, &hostile, Commands::Few);
}
