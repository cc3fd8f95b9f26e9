//! Stages of a task: announced, timed, and summarised in a table at the end.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The outcome of a stage that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was done completely.
    Done,
    /// It was skipped, completely or in part; with the reason.
    Skipped(String),
}

#[derive(Debug)]
struct Row {
    name: String,
    took: Duration,
    result: Result<Outcome, String>,
}

/// The stages that have run so far.
#[derive(Debug)]
pub(crate) struct Stages {
    rows: Vec<Row>,
    begun: Instant,
}

impl Stages {
    pub(crate) fn new() -> Self {
        Self {
            rows: Vec::new(),
            begun: Instant::now(),
        }
    }

    /// Runs a stage. A failure is shown and remembered: later stages still run, and
    /// [`Stages::finish`] fails.
    pub(crate) fn run(&mut self, name: &str, stage: impl FnOnce() -> Result<Outcome>) {
        eprintln!("\n=== {name}");
        let begun = Instant::now();
        let result = stage().map_err(|error| format!("{error:#}"));
        let took = begun.elapsed();
        match &result {
            Ok(Outcome::Done) => eprintln!("=== {name}: done in {:.1} s", took.as_secs_f64()),
            Ok(Outcome::Skipped(why)) => {
                let bar = "!".repeat(72);
                eprintln!("{bar}\n!!! {name}: NOT CHECKED: {why}\n{bar}");
            }
            Err(error) => eprintln!("=== {name}: FAILED: {error}"),
        }
        self.rows.push(Row {
            name: name.to_owned(),
            took,
            result,
        });
    }

    /// Prints the table.
    ///
    /// # Errors
    ///
    /// A stage failed.
    pub(crate) fn finish(self) -> Result<()> {
        println!("\n{}", self.table());
        let failed: Vec<&str> = self
            .rows
            .iter()
            .filter(|row| row.result.is_err())
            .map(|row| row.name.as_str())
            .collect();
        if !failed.is_empty() {
            bail!("failed: {}", failed.join(", "));
        }
        Ok(())
    }

    fn table(&self) -> String {
        let width = self.rows.iter().map(|row| row.name.len()).max();
        let width = width.unwrap_or_default().max("total".len());
        let mut table = String::new();
        let mut line = |name: &str, took: Duration, word: &str| {
            let seconds = took.as_secs_f64();
            writeln!(table, "{name:width$}  {seconds:7.1} s  {word}").is_ok()
        };
        for row in &self.rows {
            let word = match &row.result {
                Ok(Outcome::Done) => "ok".to_owned(),
                Ok(Outcome::Skipped(why)) => format!("NOT CHECKED: {why}"),
                Err(error) => format!("FAILED: {}", error.lines().next().unwrap_or_default()),
            };
            line(&row.name, row.took, &word);
        }
        line("total", self.begun.elapsed(), "");
        table.trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_failed_stage_does_not_hide_the_ones_behind_it() {
        let mut stages = Stages::new();
        stages.run("first", || bail!("no luck\nat all"));
        stages.run("second", || Ok(Outcome::Done));
        stages.run("third", || Ok(Outcome::Skipped("no network".to_owned())));
        let table = stages.table();
        let lines: Vec<&str> = table.lines().collect();
        assert!(lines[0].starts_with("first") && lines[0].ends_with("FAILED: no luck"));
        assert!(lines[1].starts_with("second") && lines[1].ends_with("ok"));
        assert!(lines[2].ends_with("NOT CHECKED: no network"));
        assert!(lines[3].starts_with("total"));
        let error = stages.finish().unwrap_err().to_string();
        assert_eq!(error, "failed: first");
    }

    #[test]
    fn a_skipped_stage_is_no_failure() {
        let mut stages = Stages::new();
        stages.run("only", || Ok(Outcome::Skipped("why not".to_owned())));
        stages.finish().unwrap();
    }
}
