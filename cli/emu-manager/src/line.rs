//! Lines to xenopsd: each is a prefix, a colon and text.
//!
//! | line | when |
//! |---|---|
//! | `info:\b\b\b\bN` | progress, 0 to 100; the `\b` are a backslash and a b |
//! | `info:TEXT` | for xenopsd's log |
//! | `prepare:xenguest` | before the first byte of the stream; xenopsd answers `done` |
//! | `suspend:` | xenopsd must suspend the guest; it answers `done` |
//! | `result:0 0` | a save is complete |
//! | `result:xenguest STORE CONSOLE` | a restore is complete; the frames of the two rings |
//! | `error:TEXT` | it failed |

use std::borrow::Cow;

/// The most bytes of a line, its end included, that the published programs write.
const LONGEST: usize = 128;

/// A line to xenopsd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// Per cent.
    Progress(u8),
    Info(&'a str),
    Prepare,
    Suspend,
    Saved,
    Restored {
        store: u64,
        console: u64,
    },
    Error(&'a str),
}

impl Line<'_> {
    /// The bytes of the line, line end included.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let (prefix, text) = match self {
            Self::Progress(percent) => ("info", Cow::Owned(format!(r"\b\b\b\b{percent}"))),
            Self::Info(text) => ("info", plain(text)),
            Self::Prepare => ("prepare", Cow::Borrowed("xenguest")),
            Self::Suspend => ("suspend", Cow::Borrowed("")),
            Self::Saved => ("result", Cow::Borrowed("0 0")),
            Self::Restored { store, console } => {
                ("result", Cow::Owned(format!("xenguest {store} {console}")))
            }
            Self::Error(text) => ("error", plain(text)),
        };
        let mut line = format!("{prefix}:{text}");
        let room = LONGEST - 1;
        if line.len() > room {
            // The beginning says what failed, and the end says why.
            const CUT: &str = " ... ";
            let half = (room - CUT.len()) / 2;
            let is_between = |at: &usize| line.is_char_boundary(*at);
            let begin = (0..=half).rev().find(is_between);
            let end = (line.len() - half..=line.len()).find(is_between);
            if let (Some(begin), Some(end)) = (begin, end) {
                line.replace_range(begin..end, CUT);
            }
        }
        line.push('\n');
        line.into_bytes()
    }
}

/// Text of one line that xenopsd does not mistake for progress: it would fail the task over a
/// number that it cannot parse.
fn plain(text: &str) -> Cow<'_, str> {
    let text = text.trim_start_matches('\\');
    match text.contains(char::is_control) {
        true => Cow::Owned(text.replace(char::is_control, " ")),
        false => Cow::Borrowed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_those_that_xenopsd_reads() {
        for (line, bytes) in [
            (Line::Progress(7), r"info:\b\b\b\b7"),
            (Line::Info("a:b"), "info:a:b"),
            (Line::Prepare, "prepare:xenguest"),
            (Line::Suspend, "suspend:"),
            (Line::Saved, "result:0 0"),
            (
                Line::Restored {
                    store: 1_048_572,
                    console: 3,
                },
                "result:xenguest 1048572 3",
            ),
            (Line::Error("no\nluck\u{8}"), "error:no luck "),
            (Line::Info(r"\b\b\b\b42.5"), r"info:b\b\b\b42.5"),
        ] {
            let expected = format!("{bytes}\n");
            assert_eq!(line.encode(), expected.as_bytes(), "{line:?}");
        }
    }

    #[test]
    fn a_long_line_is_cut_in_the_middle_between_characters() {
        for middle in ["x".repeat(500), format!("x{}", "é".repeat(200))] {
            let text = format!("saving domain 7: {middle}: No space left on device");
            let line = Line::Error(&text).encode();
            assert!((LONGEST - 6..=LONGEST).contains(&line.len()), "{line:?}");
            let line = String::from_utf8(line).unwrap();
            assert!(line.starts_with("error:saving domain 7: x"), "{line}");
            assert!(line.ends_with(": No space left on device\n"), "{line}");
            assert!(line.contains(" ... "), "{line}");
        }
    }
}
