//! Text for a terminal: escapes of text from outside, errors with their causes.

use std::error::Error;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Whether this character would control a terminal, or change the order in which text is shown: C0
/// and C1 controls, DEL, line separators, bidirectional controls.
pub fn is_unfit(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}')
}

/// Escapes everything in text from outside (a name, a key, a value) that would control a terminal.
///
/// ```
/// use xsr_save_restore::text::shown;
///
/// assert_eq!(shown("web\u{1b}[2J\u{202e}"), r"web\u{1b}[2J\u{202e}");
/// ```
pub fn shown(text: &str) -> String {
    escaped(text, is_unfit)
}

/// As [`shown`], with `unfit` selecting the characters to escape.
pub fn escaped(text: &str, unfit: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match unfit(c) {
            // `\n`, `\u{1b}`.
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// A path for a message: invalid UTF-8 as `\xff`, control characters escaped.
pub fn shown_path(path: &Path) -> String {
    shown_os(path.as_os_str())
}

fn shown_os(text: &OsStr) -> String {
    let mut out = String::new();
    for chunk in text.as_bytes().utf8_chunks() {
        out.push_str(&shown(chunk.valid()));
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
            write!(out, "\\x{byte:02x}").unwrap_or_default();
        }
    }
    out
}

/// The text of an error and of its causes, the outermost first.
///
/// Each error of these libraries either contains the text of its cause, or returns the cause as its
/// source; this prints each text once, as `{:#}` of `anyhow` does.
///
/// ```
/// use std::io;
/// use xsr_save_restore::text::chain;
/// use xsr_save_restore::toolstack::ToolstackError;
///
/// let error = ToolstackError::new("suspending web", io::Error::other("no answer"));
/// assert_eq!(error.to_string(), "suspending web");
/// assert_eq!(chain(&error), "suspending web: no answer");
/// ```
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
