//! Output on stderr: errors, notes, the log, and progress bars on a terminal.

use std::cmp::Ordering;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use tracing_subscriber::EnvFilter;
use xsr_save_restore::progress::{Phase, Progress};

use crate::exit;
use crate::text::{escaped, for_locale, is_unfit, shown, size};
use crate::watch::SessionProgress;

/// Stderr, and what may be printed on it.
#[derive(Clone, Debug)]
pub(crate) struct Terminal {
    /// Stderr is a terminal, and `--quiet` was not given.
    watched: bool,
    quiet: bool,
}

impl Terminal {
    /// Set up the log: warnings by default, more with each `verbose`, only errors if `quiet`.
    /// `XSR_LOG` overrides that (tracing's filter syntax).
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
            // It would report them with eprintln!, which panics if stderr is closed, as it is for a
            // receiver whose sender is lost: the guest that takes over would be lost with it.
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

    /// One for a test: only what is always printed.
    #[cfg(test)]
    pub(crate) fn silent() -> Self {
        Self {
            watched: false,
            quiet: true,
        }
    }

    /// The same without progress, which another process shows.
    pub(crate) fn without_progress(&self) -> Self {
        Self {
            watched: false,
            ..*self
        }
    }

    /// Print why the command failed.
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

    /// Print a note, if stderr is a terminal.
    pub(crate) fn note(&self, text: &str) {
        if self.watched {
            line(&shown(text));
        }
    }

    /// Print a message even if stderr is not a terminal, because its reader is at the other end of
    /// a connection.
    pub(crate) fn say(&self, text: &str) {
        if !self.quiet {
            line(&shown(text));
        }
    }

    /// Print a message even with `--quiet`.
    pub(crate) fn always(&self, text: &str) {
        line(&shown(text));
    }

    /// Whether stderr is a terminal without `--quiet`.
    pub(crate) fn is_watched(&self) -> bool {
        self.watched
    }

    /// A progress bar. It is hidden unless stderr is watched, and disappears on drop.
    pub(crate) fn progress(&self, what: &'static str) -> Bar {
        let bar = match self.watched {
            true => ProgressBar::no_length(),
            false => ProgressBar::hidden(),
        };
        let bar = bar.with_finish(ProgressFinish::AndClear);
        // The template is a constant, which a test tries.
        if let Ok(style) = ProgressStyle::with_template("{msg}") {
            bar.set_style(style);
        }
        Bar {
            bar,
            what,
            started: Instant::now(),
        }
    }
}

/// A progress bar: one line that is never wider than the terminal.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: ProgressBar,
    what: &'static str,
    started: Instant,
}

impl Bar {
    /// The same for work that began before it had a bar.
    pub(crate) fn since(self, started: Instant) -> Self {
        Self { started, ..self }
    }

    /// Show `done` of `total` steps.
    pub(crate) fn steps(&self, done: u64, total: u64) {
        self.draw(done, Some(total), &[]);
    }

    /// Show `done` of `total` bytes.
    pub(crate) fn bytes(&self, done: u64, total: Option<u64>) {
        let milliseconds = self.started.elapsed().as_millis().max(1);
        let average = u128::from(done) * 1000 / milliseconds;
        let average = u64::try_from(average).unwrap_or(u64::MAX);
        let left = total.and_then(|total| total.saturating_sub(done).checked_div(average));
        let left = left.map(Duration::from_secs);
        self.draw(done, total, &volume("", done, average, left));
    }

    /// Show the engine's progress. `bytes_total`: the size of an image that is read, which its
    /// stream does not say.
    pub(crate) fn progress(
        &self,
        progress: &Progress,
        bytes_total: Option<u64>,
        session: Option<&SessionProgress>,
    ) {
        let (done, total) = match progress.bytes_total {
            Some(total) => (progress.bytes_done, Some(total)),
            // All memory is done, and a pass that ends this quickly may not have been drawn.
            None if progress.phase == Phase::Tail && bytes_total.is_none() => {
                (progress.bytes, Some(progress.bytes))
            }
            None => (progress.bytes, bytes_total),
        };
        // A pass is complete when all its pages are done, however few of them had contents.
        let done = match (progress.pass_is_complete(), total) {
            (true, Some(total)) => total,
            _ => done,
        };
        let mut words = words(progress, bytes_total);
        words.extend(session.into_iter().flat_map(SessionProgress::words));
        self.draw(done, total, &words);
    }

    fn draw(&self, done: u64, total: Option<u64>, words: &[String]) {
        if !self.bar.is_hidden() {
            let line = compose(width(), self.what, done, total, words);
            self.bar.set_message(line);
        }
    }
}

/// Columns of the terminal; 80 if unknown.
fn width() -> usize {
    columns(io::stderr()).unwrap_or(80)
}

/// Columns of the terminal behind a descriptor, if it is one that says so.
pub(crate) fn columns(descriptor: impl AsFd) -> Option<usize> {
    let size = rustix::termios::tcgetwinsize(descriptor).ok()?;
    (size.ws_col > 0).then(|| size.ws_col.into())
}

/// The volume done, the rate, and the time left. The first has `label` before it.
fn volume(label: &str, bytes: u64, per_second: u64, left: Option<Duration>) -> Vec<String> {
    let mut words = vec![format!("{label}{}", size(bytes))];
    if per_second > 0 {
        words.push(format!("{}/s", size(per_second)));
        words.extend(left.map(|left| match left.as_secs() {
            seconds @ 0..60 => format!("{} s left", seconds.max(1)),
            seconds @ 60..3600 => format!("{} min left", seconds.div_ceil(60)),
            seconds => format!("{} h {} min left", seconds / 3600, seconds % 3600 / 60),
        }));
    }
    words
}

fn words(progress: &Progress, bytes_total: Option<u64>) -> Vec<String> {
    let label = match progress.phase {
        Phase::Precopy => format!("pass {}: ", progress.iteration + 1),
        Phase::StopAndCopy => "suspended: ".to_owned(),
        Phase::Verify => "sent again: ".to_owned(),
        _ => String::new(),
    };
    // A rate needs no fraction.
    let rate = Duration::try_from_secs_f64(progress.bytes_per_second);
    let rate = rate.map_or(0, |rate| rate.as_secs());
    let left = progress.estimated_time.or_else(|| {
        let left = bytes_total?.saturating_sub(progress.bytes);
        left.checked_div(rate).map(Duration::from_secs)
    });
    let mut words = volume(&label, progress.bytes, rate, left);
    if progress.phase == Phase::Precopy {
        if let Some(downtime) = progress.estimated_downtime {
            words.push(format!("pause {} ms", downtime.as_millis()));
        }
        if progress.dirty_count.is_some() {
            words.push(format!(
                "{:.0} pages/s written",
                progress.dirty_pages_per_second
            ));
        }
    }
    words
}

/// One line with fewer columns than the terminal: as many of `words` as fit, from the first on.
fn compose(width: usize, what: &str, done: u64, total: Option<u64>, words: &[String]) -> String {
    let room = width.saturating_sub(1);
    let mut line = match width {
        60.. => format!("{what:>10}"),
        _ => what.to_owned(),
    };
    if let Some(total) = total.filter(|total| *total > 0) {
        let cells = match width {
            100.. => 32,
            70.. => 16,
            60.. => 10,
            _ => 0,
        };
        if cells > 0 {
            let full = u128::from(done.min(total)) * cells / u128::from(total);
            let full = usize::try_from(full).unwrap_or_default();
            let cells = usize::try_from(cells).unwrap_or_default();
            let bar: String = (0..cells)
                .map(|cell| match cell.cmp(&full) {
                    Ordering::Less => '=',
                    Ordering::Equal => '>',
                    Ordering::Greater => ' ',
                })
                .collect();
            line.push_str(&format!(" [{bar}]"));
        }
        let percent = u128::from(done.min(total)) * 100 / u128::from(total);
        line.push_str(&format!(" {percent:>3}%"));
    }
    for (index, word) in words.iter().enumerate() {
        let separator = if index == 0 { " " } else { ", " };
        if line.chars().count() + separator.len() + word.chars().count() > room {
            break;
        }
        line.push_str(separator);
        line.push_str(word);
    }
    line.chars().take(room).collect()
}

/// The longest message, in bytes. A longer one contains text from outside that is of no use.
const LONGEST: usize = 16 << 10;

/// Print a message of one or more lines on stderr. If that fails, it cannot be reported anywhere.
fn line(text: &str) {
    let mut end = text.len().min(LONGEST);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let (text, cut) = text.split_at(end);
    let mut text = fit(text);
    if !cut.is_empty() {
        let more = format!("… ({} more bytes)", cut.len());
        text.push_str(&for_locale(&more));
    }
    if let Err(e) = writeln!(io::stderr(), "{text}") {
        tracing::debug!(error = %e, "stderr was closed");
    }
}

/// Text with its control characters escaped, except line ends.
fn fit(text: &str) -> String {
    let text = escaped(text, |c| c != '\n' && is_unfit(c));
    for_locale(&text).into_owned()
}

/// A writer of whole log lines.
#[derive(Debug)]
struct Escaping<W>(W);

impl<W: Write> Write for Escaping<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(bytes);
        let text = shown(text.strip_suffix('\n').unwrap_or(&text));
        self.0
            .write_all(format!("{}\n", for_locale(&text)).as_bytes())?;
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
    fn a_line_of_progress_fits_every_terminal_and_says_the_most_important_first() {
        let left = Some(Duration::from_secs(725));
        let mut words = volume("pass 12: ", 3 << 40, 900 << 20, left);
        words.extend(["pause 123456 ms", "1234567 pages/s written"].map(str::to_owned));
        for width in 0..=140 {
            let line = compose(width, "restoring", 45, Some(100), &words);
            assert!(line.chars().count() < width.max(1), "{width}: {line:?}");
        }
        let at = |width| compose(width, "saving", 45, Some(100), &words);
        assert_eq!(at(40), "saving  45% pass 12: 3.0 TiB");
        assert_eq!(
            at(60),
            "    saving [====>     ]  45% pass 12: 3.0 TiB, 900.0 MiB/s"
        );
        assert_eq!(
            at(80),
            "    saving [=======>        ]  45% pass 12: 3.0 TiB, 900.0 MiB/s, 13 min left"
        );
        assert!(at(120).contains("900.0 MiB/s, 13 min left, pause 123456 ms"));
        assert_eq!(compose(80, "x", 7, None, &[]), "         x");
        let full = compose(80, "saving", 100, Some(100), &[]);
        assert_eq!(full, "    saving [================] 100%");
    }

    #[test]
    fn a_log_has_nothing_that_a_terminal_obeys() {
        let mut out = Escaping(Vec::new());
        out.write_all("WARN web\u{1b}]0;x\u{7}\nERROR\u{9b}\n".as_bytes())
            .unwrap();
        let text = String::from_utf8(out.0).unwrap();
        assert_eq!(text, "WARN web\\u{1b}]0;x\\u{7}\\nERROR\\u{9b}\n");
    }
}
