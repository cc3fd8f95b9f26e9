//! Statistics in libFuzzer's output.

use std::fmt;

/// The figures of one run, or the sum of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Stats {
    /// Inputs that were run.
    executions: u64,
    executions_per_second: u64,
    /// Edges of the control flow graph that were taken.
    coverage: u64,
    /// Inputs in the corpus that each reach something new.
    corpus: u64,
    peak_rss_mib: u64,
}

impl Stats {
    /// The figures at the end of a run with `-print_final_stats=1`, or `None` if the run did not
    /// complete.
    pub(super) fn parse(said: &str) -> Option<Self> {
        let figure = |name: &str| -> Option<u64> {
            let line = said.lines().rev().find(|line| line.starts_with(name))?;
            line[name.len()..].trim().parse().ok()
        };
        let last = said.lines().rev().find(|line| is_pulse(line))?;
        Some(Self {
            executions: figure("stat::number_of_executed_units:")?,
            executions_per_second: figure("stat::average_exec_per_sec:")?,
            coverage: behind(last, "cov:").unwrap_or_default(),
            corpus: behind(last, "corp:").unwrap_or_default(),
            peak_rss_mib: figure("stat::peak_rss_mb:")?,
        })
    }

    /// Adds the figures of a process that ran at the same time.
    pub(super) fn add(&mut self, other: &Self) {
        self.executions += other.executions;
        self.executions_per_second += other.executions_per_second;
        self.coverage = self.coverage.max(other.coverage);
        self.corpus = self.corpus.max(other.corpus);
        self.peak_rss_mib = self.peak_rss_mib.max(other.peak_rss_mib);
    }
}

/// Whether the line is one of the few that report progress.
pub(super) fn is_pulse(line: &str) -> bool {
    line.starts_with('#')
        && ["INITED", "pulse", "DONE"]
            .iter()
            .any(|event| line.split_whitespace().nth(1) == Some(event))
}

/// The number after `word`.
fn behind(line: &str, word: &str) -> Option<u64> {
    let (_, rest) = line.split_once(word)?;
    let rest = rest.trim_start();
    let end = rest.find(|c: char| !c.is_ascii_digit());
    rest[..end.unwrap_or(rest.len())].parse().ok()
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} executions, {}/s, {} edges covered, {} inputs in the corpus, peak RSS {} MiB",
            self.executions,
            self.executions_per_second,
            self.coverage,
            self.corpus,
            self.peak_rss_mib
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    /// Example of libFuzzer's output at the end of a run.
    const SAID: &str = "\
INFO: Running with entropic power schedule (0xFF, 100).
#5\tINITED cov: 271 ft: 398 corp: 4/61Kb exec/s: 0 rss: 47Mb
#1048576\tpulse  cov: 611 ft: 1401 corp: 120/190Kb lim: 17912 exec/s: 174762 rss: 311Mb
#1204311\tNEW    cov: 612 ft: 1402 corp: 121/191Kb lim: 17912 exec/s: 172044 rss: 312Mb L: 9/9
#1239054\tDONE   cov: 612 ft: 1402 corp: 121/191Kb lim: 17912 exec/s: 154881 rss: 312Mb
Done 1239054 runs in 8 second(s)
stat::number_of_executed_units: 1239054
stat::average_exec_per_sec:     137672
stat::new_units_added:          117
stat::slowest_unit_time_sec:    0
stat::peak_rss_mb:              312
";

    #[test]
    fn the_figures_are_read_from_what_libfuzzer_says() {
        let mut stats = Stats::parse(SAID).unwrap();
        let once = Stats {
            executions: 1_239_054,
            executions_per_second: 137_672,
            coverage: 612,
            corpus: 121,
            peak_rss_mib: 312,
        };
        assert_eq!(stats, once);
        stats.add(&once);
        assert_eq!(stats.executions, 2 * once.executions);
        assert_eq!(stats.coverage, once.coverage);
    }

    #[test]
    fn a_run_that_broke_off_has_no_figures() {
        let broken = SAID.split("stat::").next().unwrap();
        assert_eq!(Stats::parse(broken), None);
    }
}
