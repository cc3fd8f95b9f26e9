//! Rules for prose: the idioms that make comments, messages and documents hard to read.

use std::path::Path;

use super::Findings;
use super::lexer::code_only;

/// Words and phrases, in lower case, and what to write instead.
const IDIOMS: [(&str, &str); 7] = [
    ("nobody", "name the actor"),
    ("somebody", "name the actor"),
    ("whoever", "name the actor"),
    (
        concat!("but", " for"),
        "except, or a sentence with its own verb",
    ),
    (concat!("is", " none that"), "is not a …, or there is no …"),
    ("octet", "byte"),
    ("octets", "bytes"),
];

/// Checks the file at `path`, relative to the root: all of a document, and the comments and strings
/// of a Rust file. Rows of tables are left out, because they may quote the specification.
pub(super) fn check(path: &Path, contents: &str, findings: &mut Findings) {
    let code = match path.extension().and_then(|extension| extension.to_str()) {
        Some("rs") => code_only(contents),
        Some("md") => String::new(),
        _ => return,
    };
    // This file has to name them.
    if path.ends_with(file!()) || path.ends_with("CHANGELOG.md") {
        return;
    }
    let mut code = code.lines();
    for (number, line) in (1..).zip(contents.lines()) {
        let code = code.next().unwrap_or_default();
        if is_row(line) {
            continue;
        }
        for (idiom, instead) in IDIOMS {
            if occurrences(line, idiom) > occurrences(code, idiom) {
                findings.errors.push(format!(
                    "{}:{number}: \"{idiom}\": write {instead}",
                    path.display()
                ));
            }
        }
    }
}

/// Whether the line is a row of a Markdown table, in a document or a doc comment.
fn is_row(line: &str) -> bool {
    let text = line.trim_start();
    let text = text
        .strip_prefix("///")
        .or(text.strip_prefix("//!"))
        .unwrap_or(text);
    text.trim_start().starts_with('|')
}

/// How often `idiom` occurs in `line` as whole words, in any case.
fn occurrences(line: &str, idiom: &str) -> usize {
    let line = line.to_ascii_lowercase();
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(idiom)
        .filter(|(at, found)| {
            let before = line[..*at].chars().next_back();
            let after = line[at + found.len()..].chars().next();
            !before.is_some_and(part_of_word) && !after.is_some_and(part_of_word)
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(name: &str, contents: &str) -> usize {
        let mut findings = Findings::default();
        check(Path::new(name), contents, &mut findings);
        findings.errors.len()
    }

    #[test]
    fn idioms_are_found_in_comments_strings_and_documents() {
        for (idiom, _) in IDIOMS {
            assert_eq!(errors("a.md", &format!("so {idiom} it")), 1, "{idiom}");
            assert_eq!(errors("a.rs", &format!("// so {idiom} it")), 1, "{idiom}");
            assert_eq!(errors("a.rs", &format!("let a = \"{idiom}\";")), 1);
            assert_eq!(errors("a.rs", &format!("//! | {idiom} | quoted |")), 0);
            assert_eq!(errors("a.md", &format!("| {idiom} | quoted |")), 0);
            assert_eq!(errors("a.sh", &format!("# so {idiom} it")), 0);
        }
    }

    #[test]
    fn names_in_code_and_parts_of_words_are_not_idioms() {
        assert_eq!(errors("a.rs", "let octets = nobody(); // counted"), 0);
        assert_eq!(errors("a.rs", "let octets = 0; // octets"), 1);
        assert_eq!(errors("a.md", "an octetwise `nobody_is`"), 0);
    }
}
