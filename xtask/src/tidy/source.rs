//! Rules for Rust source files.

use std::path::Path;

use super::Findings;
use super::lexer::code_only;

/// Where unsafe code is allowed: files, and directories with a trailing slash.
const UNSAFE_ROOMS: [&str; 7] = [
    "xen-backend/src/pages.rs",
    "xen-backend/src/pages/",
    "xen-backend/src/privcmd/",
    "xen-backend/src/mock/memory.rs",
    "xen-backend/peer/src/",
    "cli/stdio/src/",
    "cli/tun/src/",
];

/// Generated bindings, one file per interface version, may have any length.
const GENERATED: &str = "xen-backend/src/sys/";

/// Number of lines at which a file is long, and at which it is too long.
const LONG: usize = 500;
const TOO_LONG: usize = 700;

/// Macros that mark work as unfinished.
const UNFINISHED: [&str; 3] = ["todo", "unimplemented", "dbg"];

/// Checks the file at `path`, relative to the root.
pub(super) fn check(path: &Path, contents: &str, findings: &mut Findings) {
    let shown = path.display();
    if !contents.starts_with("//!") {
        findings.errors.push(format!(
            "{shown}:1: begin with `//!` and what the file is for"
        ));
    }

    let name = path.to_string_lossy();
    let generated = name.starts_with(GENERATED);
    let lines = contents.lines().count();
    if !generated && lines > TOO_LONG {
        findings.errors.push(format!(
            "{shown}: {lines} lines, and {TOO_LONG} is the limit: split it at a natural seam"
        ));
    } else if !generated && lines > LONG {
        findings.warnings.push(format!(
            "{shown}: {lines} lines: at {TOO_LONG} it has to be split"
        ));
    }

    let unsafe_allowed = UNSAFE_ROOMS.iter().any(|room| match room.ends_with('/') {
        true => name.starts_with(room),
        false => name == *room,
    });
    for (number, line) in (1..).zip(code_only(contents).lines()) {
        if !unsafe_allowed && words(line).any(|(word, _)| word == "unsafe") {
            findings.errors.push(format!(
                "{shown}:{number}: unsafe code has its rooms, and this file is not one of them: {}",
                UNSAFE_ROOMS.join(", ")
            ));
        }
        for (word, behind) in words(line) {
            if UNFINISHED.contains(&word) && behind.starts_with('!') {
                findings
                    .errors
                    .push(format!("{shown}:{number}: `{word}!` is left over"));
            }
        }
    }
}

/// The words in a line of code, each with the text after it.
fn words(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut rest = line;
    std::iter::from_fn(move || {
        let word = rest.trim_start_matches(|c| !part_of_word(c));
        let end = word.find(|c| !part_of_word(c)).unwrap_or(word.len());
        let (word, behind) = word.split_at(end);
        rest = behind;
        (!word.is_empty()).then_some((word, behind))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, contents: &str) -> Findings {
        let mut findings = Findings::default();
        super::check(Path::new(path), contents, &mut findings);
        findings
    }

    #[test]
    fn a_file_says_what_it_is_for() {
        assert_eq!(check("cli/src/a.rs", "//! A.\n"), Findings::default());
        let findings = check("cli/src/a.rs", "use std::fmt;\n");
        assert_eq!(findings.errors.len(), 1);
        assert!(findings.errors[0].starts_with("cli/src/a.rs:1: "));
    }

    #[test]
    fn unsafe_code_stays_in_its_rooms() {
        let block = "//! A.\nfn f() { unsafe { g() } }\n";
        assert!(check("format/src/a.rs", block).errors[0].starts_with("format/src/a.rs:2: "));
        assert_eq!(
            check("xen-backend/src/mock/machine.rs", block).errors.len(),
            1
        );
        assert_eq!(
            check("xen-backend/src/pages.rs", block),
            Findings::default()
        );
        assert_eq!(
            check("xen-backend/src/privcmd/ioctl.rs", block),
            Findings::default()
        );
        let talk = "//! A.\n#![forbid(unsafe_code)]\n// unsafe\nconst A: &str = \"unsafe\";\n";
        assert_eq!(check("format/src/a.rs", talk), Findings::default());
    }

    #[test]
    fn nothing_unfinished_is_left() {
        let findings = check("cli/src/a.rs", "//! A.\nfn f() { todo!() }\nfn dbg() {}\n");
        assert_eq!(findings.errors, ["cli/src/a.rs:2: `todo!` is left over"]);
    }

    #[test]
    fn long_files_are_split_but_for_generated_ones() {
        let lines = |n: usize| format!("//! A.\n{}", "\n".repeat(n - 1));
        assert_eq!(check("cli/src/a.rs", &lines(500)), Findings::default());
        let long = check("cli/src/a.rs", &lines(501));
        assert_eq!((long.errors.len(), long.warnings.len()), (0, 1));
        assert_eq!(check("cli/src/a.rs", &lines(701)).errors.len(), 1);
        assert_eq!(
            check("xen-backend/src/sys/v15.rs", &lines(9000)),
            Findings::default()
        );
    }
}
