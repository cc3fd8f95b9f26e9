//! What goes to stderr: errors, notes, the log, and progress bars where a person
//! watches.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use tracing_subscriber::EnvFilter;
use xsr_save_restore::progress::{Phase, Progress};

use crate::exit;
use crate::text::{escaped, is_unfit, shown, size};

/// Stderr, and how much it may carry.
#[derive(Clone, Debug)]
pub(crate) struct Terminal {
    /// A person watches, and has not asked for quiet.
    watched: bool,
    quiet: bool,
}

impl Terminal {
    /// Set up the log: warnings by default, as many more as `verbose` says, errors
    /// alone when `quiet`; `XSR_LOG` overrides (tracing's filter syntax).
    pub(crate) fn new(verbose: u8, quiet: bool) -> Self {
        let level = match (quiet, verbose) {
            (true, _) => "error",
            (false, 0) => "warn",
            (false, 1) => "info",
            (false, 2) => "debug",
            (false, _) => "trace",
        };
        let asked = std::env::var_os("XSR_LOG").filter(|asked| !asked.is_empty());
        let asked = asked.map(|asked| {
            let asked = asked.to_string_lossy();
            EnvFilter::try_new(&*asked).map_err(|error| format!("{asked:?}: {error}"))
        });
        let (filter, wrong) = match asked {
            Some(Ok(filter)) => (filter, None),
            Some(Err(wrong)) => (EnvFilter::new(level), Some(wrong)),
            None => (EnvFilter::new(level), None),
        };
        let is_terminal = io::stderr().is_terminal();
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(|| Escaping(io::stderr()))
            .with_ansi(false)
            .with_target(false)
            .without_time()
            // It would say so with eprintln!, which panics where stderr is closed, as it is
            // for a receiver whose sender is lost: the guest that takes over would go with it.
            .log_internal_errors(false)
            .init();
        let terminal = Self {
            watched: is_terminal && !quiet,
            quiet,
        };
        if let Some(wrong) = wrong {
            terminal.always(&format!("xsr: XSR_LOG is ignored: {wrong}"));
        }
        terminal
    }

    /// The same, but without progress: somebody else shows it there.
    pub(crate) fn without_progress(&self) -> Self {
        Self {
            watched: false,
            ..*self
        }
    }

    /// Say why the command failed.
    pub(crate) fn error(&self, error: &anyhow::Error) {
        if exit::is_silent(error) {
            return;
        }
        let words = exit::words(error.chain());
        match exit::advice(error) {
            Some(advice) => line(&format!("xsr: {words}; {advice}")),
            None => line(&format!("xsr: {words}")),
        }
    }

    /// Say something to the person who watches; nothing where nobody does.
    pub(crate) fn note(&self, text: &str) {
        if self.watched {
            line(text);
        }
    }

    /// Say something also where stderr is no terminal, because whoever reads it is at
    /// the other end of a connection.
    pub(crate) fn say(&self, text: &str) {
        if !self.quiet {
            line(text);
        }
    }

    /// Say something that must be heard even by who has asked for quiet.
    pub(crate) fn always(&self, text: &str) {
        line(text);
    }

    /// Whether a person watches.
    pub(crate) fn is_watched(&self) -> bool {
        self.watched
    }

    /// A progress bar; hidden where nobody watches, gone when dropped.
    pub(crate) fn progress(&self, what: &'static str) -> Bar {
        let bar = match self.watched {
            true => ProgressBar::no_length(),
            false => ProgressBar::hidden(),
        };
        let bar = bar.with_prefix(what).with_finish(ProgressFinish::AndClear);
        set_template(&bar, "{prefix:>10} {msg}");
        Bar {
            bar,
            started: Instant::now(),
        }
    }
}

/// A progress bar.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    started: Instant,
}

impl Bar {
    /// So much is done of `total` (0 if that is not known).
    pub(crate) fn show(&self, done: u64, total: u64) {
        if self.bar.is_hidden() || done == 0 {
            return;
        }
        if total > 0 && self.bar.length() != Some(total) {
            self.bar.set_length(total);
            set_template(&self.bar, "{prefix:>10} [{bar:32}] {percent:>3}% {msg}");
        }
        self.bar.set_position(done);
    }

    /// So many octets are done of `total`.
    pub(crate) fn octets(&self, done: u64, total: u64) {
        self.show(done, total);
        self.bar.set_message(self.volume(done));
    }

    /// So many octets, and how quickly they came.
    fn volume(&self, octets: u64) -> String {
        let milliseconds = self.started.elapsed().as_millis().max(1);
        let average = u128::from(octets) * 1000 / milliseconds;
        let average = u64::try_from(average).unwrap_or(u64::MAX);
        format!("{}, {}/s", size(octets), size(average))
    }

    /// So far is the engine. `octets_total`: of an image that is read, since its stream
    /// does not say how much there is.
    pub(crate) fn progress(&self, progress: &Progress, octets_total: Option<u64>) {
        if self.bar.is_hidden() {
            return;
        }
        match (progress.pages_total, octets_total) {
            (Some(total), _) => self.show(progress.pages_done, total),
            (None, Some(total)) => self.show(progress.octets, total),
            (None, None) => self.show(progress.octets, 0),
        }
        self.bar.set_message(self.words(progress));
    }

    fn words(&self, progress: &Progress) -> String {
        let mut words = self.volume(progress.octets);
        match progress.phase {
            Phase::Precopy => {
                words = format!("pass {}: {words}", progress.iteration + 1);
                if progress.dirty_count.is_some() {
                    let rate = progress.dirty_pages_per_second;
                    words = format!("{words}, writes {rate:.0} pages/s");
                }
                if let Some(downtime) = progress.estimated_downtime {
                    words = format!("{words}, would stand {} ms", downtime.as_millis());
                }
            }
            Phase::StopAndCopy => words = format!("suspended: {words}"),
            Phase::Verify => words = format!("sent again: {words}"),
            _ => {}
        }
        words
    }
}

fn set_template(bar: &ProgressBar, template: &str) {
    // The templates are written here, and tried by a test.
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
}

/// The longest message, in bytes: what is longer has text from outside in it that nobody wants
/// to read.
const LONGEST: usize = 16 << 10;

/// A message on stderr, which may have several lines. Where even that fails there is nobody
/// left to tell.
fn line(text: &str) {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let (text, cut) = text.split_at(end);
    let mut text = fit(text);
    if !cut.is_empty() {
        text.push_str(&format!("… ({} more bytes)", cut.len()));
    }
    if let Err(e) = writeln!(io::stderr(), "{text}") {
        tracing::debug!(error = %e, "stderr was closed");
    }
}

/// Text with all escaped that a terminal would obey, except line ends.
fn fit(text: &str) -> String {
    escaped(text, |c| c != '\n' && is_unfit(c))
}

/// A writer of lines of a log, each whole.
#[derive(Debug)]
struct Escaping<W>(W);

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let text = shown(text.strip_suffix('\n').unwrap_or(&text));
        self.0.write_all(format!("{text}\n").as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_nothing_that_a_terminal_obeys() {
        let mut out = Escaping(Vec::new());
        out.write_all("WARN web\u{1b}]0;x\u{7}\nERROR\u{9b}\n".as_bytes())
            .unwrap();
        let text = String::from_utf8(out.0).unwrap();
        assert_eq!(text, "WARN web\\u{1b}]0;x\\u{7}\\nERROR\\u{9b}\n");
    }
}
