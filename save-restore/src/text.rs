//! Text from outside that a terminal may show.

/// Whether a terminal would obey this character, or show the text around it in another order:
/// C0 and C1 controls, DEL, line separators, bidirectional controls.
pub fn is_unfit(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}')
}

/// Text from outside (a name, a key, a value), with everything escaped that a terminal would
/// obey.
///
/// ```
/// use xsr_save_restore::text::shown;
///
/// assert_eq!(shown("web\u{1b}[2J\u{202e}"), r"web\u{1b}[2J\u{202e}");
/// ```
pub fn shown(text: &str) -> String {
    escaped(text, is_unfit)
}

/// The same, with those characters escaped that `unfit` says.
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
