//! Escaping of text from outside for a terminal.

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
