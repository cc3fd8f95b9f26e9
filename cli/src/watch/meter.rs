//! What a session carries, for the progress and the report of a migration: its rate, its
//! compression, its connections, and what limits it.

use std::time::{Duration, Instant};

use serde::Serialize;
use xsr_save_restore::migrate::session::{SessionFigures, SessionLimit, SessionMonitor};
use xsr_save_restore::progress::{Phase, Progress};

use crate::text::size;

/// The figures that are shown are those of at least so much time.
const STRETCH: Duration = Duration::from_secs(1);

/// What a session has carried in a stretch of time (docs/json.md).
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct SessionProgress {
    pub(crate) connections: usize,
    /// From the beginning.
    pub(crate) wire_bytes: u64,
    pub(crate) wire_bytes_per_second: f64,
    /// Bytes of the stream for each byte on the wire; `None` if nothing was sent.
    pub(crate) compression_ratio: Option<f64>,
    pub(crate) limited_by: &'static str,
}

impl SessionProgress {
    fn between(before: &SessionFigures, now: &SessionFigures, elapsed: Duration) -> Self {
        let wire = now.wire_bytes - before.wire_bytes;
        let stream = now.stream_bytes - before.stream_bytes;
        let seconds = elapsed.as_secs_f64();
        Self {
            connections: now.links,
            wire_bytes: now.wire_bytes,
            wire_bytes_per_second: if seconds > 0.0 {
                wire as f64 / seconds
            } else {
                0.0
            },
            compression_ratio: (wire > 0).then(|| stream as f64 / wire as f64),
            limited_by: name(now.limit_since(before, elapsed)),
        }
    }

    /// The words for a bar, the most important first.
    pub(crate) fn words(&self) -> Vec<String> {
        let rate = Duration::try_from_secs_f64(self.wire_bytes_per_second);
        let rate = rate.map_or(0, |rate| rate.as_secs());
        let mut words = vec![
            format!("limit: {}", self.limited_by),
            format!("{}/s on the wire", size(rate)),
        ];
        words.extend(self.compression_ratio.map(|ratio| format!("{ratio:.1}:1")));
        words.push(match self.connections {
            1 => "1 connection".to_owned(),
            n => format!("{n} connections"),
        });
        words
    }
}

fn name(limit: SessionLimit) -> &'static str {
    match limit {
        SessionLimit::Writer => SENDER,
        SessionLimit::Compressor => COMPRESSOR,
        SessionLimit::Link => LINK,
        SessionLimit::Peer => "receiver",
    }
}

const SENDER: &str = "sender";
const COMPRESSOR: &str = "compressor";
const LINK: &str = "link";
const GUEST: &str = "guest";

/// Measures a session.
#[derive(Debug)]
pub(crate) struct Meter {
    monitor: SessionMonitor,
    begun: Instant,
    /// The most connections at a time.
    most: usize,
    /// The beginnings of the last two stretches.
    before: (Instant, SessionFigures),
    this: (Instant, SessionFigures),
}

impl Meter {
    pub(crate) fn new(monitor: SessionMonitor) -> Self {
        let now = (Instant::now(), monitor.figures());
        Self {
            monitor,
            begun: now.0,
            most: now.1.links,
            before: now,
            this: now,
        }
    }

    /// The figures of the last second or two.
    pub(crate) fn look(&mut self, progress: &Progress) -> SessionProgress {
        let now = (Instant::now(), self.monitor.figures());
        self.most = self.most.max(now.1.links);
        if now.0 - self.this.0 >= STRETCH {
            self.before = std::mem::replace(&mut self.this, now);
        }
        let (then, before) = &self.before;
        let mut shown = SessionProgress::between(before, &now.1, now.0 - *then);
        if outrun(progress) {
            shown.limited_by = GUEST;
        }
        shown
    }

    /// The figures from the beginning. The session may be closed by now.
    pub(crate) fn whole(&self) -> SessionProgress {
        let none = SessionFigures::default();
        let whole = SessionProgress::between(&none, &self.monitor.figures(), self.begun.elapsed());
        SessionProgress {
            connections: self.most,
            ..whole
        }
    }
}

/// Whether the guest writes about as fast as its memory is sent, so that passes do not get shorter.
fn outrun(progress: &Progress) -> bool {
    let written = progress.dirty_pages_per_second * 4096.0;
    progress.phase == Phase::Precopy
        && progress.iteration > 0
        && progress.bytes_per_second > 0.0
        && written >= progress.bytes_per_second * 0.9
}

/// What may make a migration faster, in words; `None` if no option of it does.
pub(crate) fn advice(limited_by: &str, compresses: bool, is_bounded: bool) -> Option<&'static str> {
    match (limited_by, is_bounded, compresses) {
        (LINK, true, _) => Some("--bandwidth may have been its limit"),
        (LINK, false, false) => Some("--compress auto may help"),
        (COMPRESSOR, ..) => Some("--compress auto or a lower level may help"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_session_carries_reads_well() {
        let mut session = SessionProgress {
            connections: 1,
            wire_bytes: 10 << 20,
            wire_bytes_per_second: 3e6,
            compression_ratio: None,
            limited_by: LINK,
        };
        let words = |session: &SessionProgress| session.words().join(", ");
        assert_eq!(
            words(&session),
            "limit: link, 2.8 MiB/s on the wire, 1 connection"
        );
        session.connections = 4;
        session.compression_ratio = Some(2.345);
        assert_eq!(
            words(&session),
            "limit: link, 2.8 MiB/s on the wire, 2.3:1, 4 connections"
        );
        assert!(advice(LINK, false, false).is_some_and(|words| words.contains("--compress")));
        assert_eq!(advice(LINK, true, false), None);
        assert_eq!(advice(SENDER, false, false), None);
    }
}
