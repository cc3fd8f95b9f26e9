//! Text for the user's locale: where it has no UTF-8, only ASCII is written.

use std::borrow::Cow;
use std::ffi::OsString;
use std::sync::LazyLock;

/// The variables that name the locale's character set. The first that is not empty decides.
const VARIABLES: [&str; 3] = ["LC_ALL", "LC_CTYPE", "LANG"];

static ASCII_ONLY: LazyLock<bool> = LazyLock::new(|| is_ascii_only(|name| std::env::var_os(name)));

/// Whether the user has chosen a locale without UTF-8, such as `C` or `de_DE.ISO-8859-1`. If none
/// is chosen, UTF-8 is assumed: a service and a container have no such variables, and their output
/// is read elsewhere.
fn is_ascii_only(variable: impl Fn(&str) -> Option<OsString>) -> bool {
    let chosen = VARIABLES.iter().filter_map(|name| variable(name));
    let mut chosen = chosen.filter(|value| !value.is_empty());
    chosen.next().is_some_and(|locale| {
        let locale = locale.to_string_lossy().to_ascii_lowercase();
        !locale.contains("utf-8") && !locale.contains("utf8")
    })
}

/// Whether only ASCII is written.
pub(crate) fn ascii_only() -> bool {
    *ASCII_ONLY
}

/// Text that the locale can show: our own signs become what ASCII has for them, and other
/// characters are escaped.
pub(crate) fn for_locale(text: &str) -> Cow<'_, str> {
    match text.is_ascii() || !ascii_only() {
        true => Cow::Borrowed(text),
        false => Cow::Owned(in_ascii(text)),
    }
}

fn in_ascii(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '–' => out.push('-'),
            '→' => out.push_str("->"),
            '×' => out.push('x'),
            '…' => out.push_str("..."),
            c if c.is_ascii() => out.push(c),
            c => out.extend(c.escape_default()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_variable_that_is_set_decides() {
        let ascii = |set: &[(&str, &str)]| {
            is_ascii_only(|name| {
                let (_, value) = set.iter().find(|(other, _)| *other == name)?;
                Some(value.into())
            })
        };
        assert!(!ascii(&[]));
        assert!(!ascii(&[("LC_ALL", ""), ("LANG", "")]));
        assert!(ascii(&[("LC_ALL", "C"), ("LANG", "en_GB.UTF-8")]));
        assert!(ascii(&[("LC_ALL", ""), ("LC_CTYPE", "POSIX")]));
        assert!(ascii(&[("LANG", "de_DE.ISO-8859-1")]));
        assert!(!ascii(&[("LANG", "C.UTF-8")]));
        assert!(!ascii(&[("LC_CTYPE", "en_US.utf8"), ("LANG", "C")]));
    }

    #[test]
    fn signs_become_ascii_and_other_characters_are_escaped() {
        let text = "0x0–0x3ff, 2 × a → b… é 日\n";
        assert_eq!(
            in_ascii(text),
            "0x0-0x3ff, 2 x a -> b... \\u{e9} \\u{65e5}\n"
        );
    }
}
