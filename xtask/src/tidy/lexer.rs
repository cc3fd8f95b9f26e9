//! A minimal lexer for Rust, to tell code from comments and strings.

/// Replaces comments, strings and character literals in `source` by blanks, keeping the lines.
pub(super) fn code_only(source: &str) -> String {
    let mut code = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(first) = rest.chars().next() {
        let in_word = code
            .chars()
            .next_back()
            .is_some_and(|c| c.is_alphanumeric() || c == '_');
        let blank = blank_length(rest, in_word);
        let taken = match blank {
            0 => {
                code.push(first);
                first.len_utf8()
            }
            n => {
                let blanks = rest[..n].chars().map(|c| if c == '\n' { c } else { ' ' });
                code.extend(blanks);
                n
            }
        };
        rest = &rest[taken..];
    }
    code
}

/// Length in bytes of the comment, string or character literal at the start of `rest`. `in_word`:
/// an identifier ends directly before it, so `r"` is not a prefix.
fn blank_length(rest: &str, in_word: bool) -> usize {
    if rest.starts_with("//") {
        return rest.find('\n').unwrap_or(rest.len());
    }
    if rest.starts_with("/*") {
        return block_comment(rest);
    }
    if rest.starts_with('"') {
        return quoted(rest, '"');
    }
    if rest.starts_with('\'') {
        return character(rest);
    }
    if rest.starts_with('r') && !in_word {
        return raw_string(rest);
    }
    // `b"…"` and `c"…"`: keep the prefix and handle the string in the next step. For `br"…"`,
    // keeping only the `b` would make `r` the tail of a word.
    if (rest.starts_with("br") || rest.starts_with("cr")) && !in_word {
        return match raw_string(&rest[1..]) {
            0 => 0,
            n => n.saturating_add(1),
        };
    }
    0
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Length of a character literal, or 0 for a lifetime.
fn character(rest: &str) -> usize {
    let mut chars = rest.chars().skip(1);
    match (chars.next(), chars.next()) {
        (Some('\\'), _) => quoted(rest, '\''),
        (Some(c), Some('\'')) => c.len_utf8() + 2,
        _ => 0,
    }
}

/// Length of `r"…"`, `r#"…"#` and so on, or 0 for a word that begins with `r`.
fn raw_string(rest: &str) -> usize {
    let hashes = rest[1..].chars().take_while(|c| *c == '#').count();
    let Some(body) = rest[1 + hashes..].strip_prefix('"') else {
        return 0;
    };
    let end = format!("\"{}", "#".repeat(hashes));
    match body.find(&end) {
        Some(at) => 2 + hashes + at + end.len(),
        None => rest.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(source: &str) -> Vec<String> {
        let code = code_only(source);
        assert_eq!(code.lines().count(), source.lines().count());
        code.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn comments_go_and_code_stays() {
        assert_eq!(words("a // unsafe\nb"), ["a", "b"]);
        assert_eq!(words("a /* x /* unsafe */ y\n */ b"), ["a", "b"]);
        assert_eq!(words("/// it's \"odd\nfn a"), ["fn", "a"]);
    }

    #[test]
    fn strings_go_and_code_stays() {
        assert_eq!(words(r#"a "unsafe \" // x" b"#), ["a", "b"]);
        assert_eq!(words("a \"one\n\ntwo\" b"), ["a", "b"]);
        assert_eq!(words(r##"a r#"un"safe"# b"##), ["a", "b"]);
        assert_eq!(words(r##"a br#"un"safe"# b"##), ["a", "b"]);
        assert_eq!(words(r#"a r"\" b"#), ["a", "b"]);
        assert_eq!(words(r#"car("x") b"#), ["car(", ")", "b"]);
    }

    #[test]
    fn lifetimes_and_raw_identifiers_are_code() {
        assert_eq!(
            words("fn a<'x>(r: &'x str)"),
            ["fn", "a<'x>(r:", "&'x", "str)"]
        );
        assert_eq!(words("r#type unsafe"), ["r#type", "unsafe"]);
    }

    #[test]
    fn character_literals_are_no_code() {
        assert_eq!(
            words(r#"a '"' b '\'' c '\\' d 'é' e"#),
            ["a", "b", "c", "d", "e"]
        );
    }
}
