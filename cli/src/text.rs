//! Wording shared by commands: numbers, sizes, ranges, and escaped text from outside.

// Named, because a fuzz target includes this file from another place.
#[path = "text/locale.rs"]
mod locale;

use std::fmt;

pub(crate) use self::locale::{ascii_only, for_locale};
pub(crate) use xsr_save_restore::text::{escaped, is_unfit, shown, shown_path};

/// The longest name of a domain, in characters, that a message shows in full.
const LONGEST_NAME: usize = 100;
/// The same of a value in a report.
const LONGEST_VALUE: usize = 200;

/// A number with its noun, in singular or plural: `1 leaf`, `59 leaves`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count<N>(pub(crate) N, pub(crate) &'static str);

impl<N: fmt::Display + TryInto<u64> + Copy> fmt::Display for Count<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, noun) = *self;
        let one = number.try_into().is_ok_and(|n| n == 1);
        match (one, noun) {
            (true, _) => write!(f, "{number} {noun}"),
            (false, "leaf") => write!(f, "{number} leaves"),
            (false, "entry") => write!(f, "{number} entries"),
            (false, "pass") => write!(f, "{number} passes"),
            (false, _) => write!(f, "{number} {noun}s"),
        }
    }
}

/// `0x1f`.
pub(crate) fn hex(number: u64) -> String {
    format!("{number:#x}")
}

/// `0x0–0x3ff`, or `0x5` for a single one.
pub(crate) fn pfn_range(first: u64, last: u64) -> String {
    match first == last {
        true => hex(first),
        false => format!("{first:#x}–{last:#x}"),
    }
}

/// A size for the user: `4.0 MiB`. Exact bytes below 1 KiB.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in UNITS {
        if bytes >> shift > 0 {
            // In tenths, without floating point, which could round.
            let tenths = (u128::from(bytes) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    Count(bytes, "byte").to_string()
}

/// `head` and `words` on one line if that has at most `width` columns. Otherwise the words are
/// wrapped where they have `separator`, which ends in a space: further lines begin after `indent`
/// columns. There is no line end after the last.
pub(crate) fn wrapped(
    head: &str,
    words: &str,
    separator: &str,
    indent: usize,
    width: usize,
) -> String {
    let mut out = head.to_owned();
    let mut column = head.chars().count();
    let mut words = words.split(separator).peekable();
    let mut before = "";
    while let Some(word) = words.next() {
        let mut length = before.len() + word.chars().count();
        // What remains of the separator at the end of a line.
        if words.peek().is_some() {
            length += separator.trim_end().len();
        }
        if column + length > width && column > indent {
            out.push_str(before);
            // No spaces before the end of a line.
            out.truncate(out.trim_end_matches(' ').len());
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent));
            column = indent;
        } else {
            out.push_str(before);
            column += before.len();
        }
        out.push_str(word);
        column += word.chars().count();
        before = separator;
    }
    out
}

/// The name of a domain, from an image or a peer, for a message: escaped, and truncated if it is
/// long.
pub(crate) fn shown_name(name: &str) -> String {
    cut(name, LONGEST_NAME)
}

fn cut(text: &str, longest: usize) -> String {
    match text.char_indices().nth(longest) {
        None => shown(text),
        Some((at, _)) => {
            let (head, tail) = text.split_at(at);
            format!("{}… ({} more bytes)", shown(head), tail.len())
        }
    }
}

/// A value from an image, for a line of a report: escaped, and truncated if it is long.
pub(crate) fn shown_value(value: &str) -> String {
    cut(value, LONGEST_VALUE)
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt as _;
    use std::path::Path;

    use super::*;

    #[test]
    fn sizes_and_counts_read_well() {
        assert_eq!(size(0), "0 bytes");
        assert_eq!(size(1), "1 byte");
        assert_eq!(size(4096), "4.0 KiB");
        assert_eq!(size(4_214_183), "4.0 MiB");
        assert_eq!(size(u64::MAX), "16777215.9 TiB");
        assert_eq!(Count(52_usize, "leaf").to_string(), "52 leaves");
        assert_eq!(Count(3, "pass").to_string(), "3 passes");
        assert_eq!(pfn_range(5, 5), "0x5");
    }

    #[test]
    fn words_are_wrapped_at_separators_alone() {
        let pfns = |words, width| wrapped("  pfns    ", words, ", ", 10, width);
        assert_eq!(pfns("1 a, 2 b", 18), "  pfns    1 a, 2 b");
        assert_eq!(
            pfns("1 a, 2 b, 3 c", 18),
            "  pfns    1 a,\n          2 b, 3 c"
        );
        assert_eq!(
            pfns("1 a, 2 b, 3 c", 19),
            "  pfns    1 a, 2 b,\n          3 c"
        );
        // A long head has all words on further lines, and a long word a line of its own.
        assert_eq!(
            wrapped("0x367 libxc  ", "abcdefghijkl m", " ", 4, 14),
            "0x367 libxc\n    abcdefghijkl\n    m"
        );
        assert_eq!(wrapped("head  ", "", " ", 4, 10), "head  ");
    }

    #[test]
    fn nothing_from_outside_is_obeyed_by_a_terminal() {
        assert_eq!(shown("web-1 é ž 日本 \\"), "web-1 é ž 日本 \\");
        let hostile = "a\u{1b}[31m\n\r\t\u{7f}\u{9b}2J\u{202e}\u{2066}\u{200f}";
        assert_eq!(
            shown(hostile),
            r"a\u{1b}[31m\n\r\t\u{7f}\u{9b}2J\u{202e}\u{2066}\u{200f}"
        );
        let path = Path::new(OsStr::from_bytes(b"a\xff\n\x9bb.save"));
        assert_eq!(shown_path(path), r"a\xff\n\x9bb.save");
    }

    #[test]
    fn a_long_name_is_cut() {
        assert_eq!(shown_name(&"é".repeat(100)), "é".repeat(100));
        let long = "\n".repeat(1 << 20);
        let shown = shown_name(&long);
        assert_eq!(
            shown,
            format!("{}… (1048476 more bytes)", r"\n".repeat(100))
        );
    }
}
