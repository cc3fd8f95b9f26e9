//! Checks of project rules that the compiler does not know, from `ARCHITECTURE.md` and
//! `CONTRIBUTING.md`.

mod dependencies;
mod errors;
mod lexer;
mod prose;
mod source;
mod text;

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::stages::Outcome;
use crate::workspace;

/// Violations that were found.
#[derive(Debug, Default, PartialEq, Eq)]
struct Findings {
    /// These fail the task.
    errors: Vec<String>,
    /// These do not fail it yet.
    warnings: Vec<String>,
}

/// Checks everything.
///
/// # Errors
///
/// A rule is broken; all violations are printed.
pub(crate) fn run() -> Result<Outcome> {
    let mut findings = Findings::default();
    let files = workspace::files()?;
    for file in &files {
        let bytes = std::fs::read(workspace::root().join(file))
            .with_context(|| format!("cannot read {}", file.display()))?;
        // Files that are not text are fixtures.
        let Ok(contents) = String::from_utf8(bytes) else {
            continue;
        };
        if file.extension().is_some_and(|extension| extension == "rs") {
            source::check(file, &contents, &mut findings);
            errors::check(file, &contents, &mut findings);
        }
        text::check(file, &contents, &mut findings);
        prose::check(file, &contents, &mut findings);
    }
    code_map(&files, &mut findings)?;
    let packages = workspace::packages(&workspace::root().join("Cargo.toml"))?;
    dependencies::check(&packages, &mut findings);

    for warning in &findings.warnings {
        eprintln!("warning: {warning}");
    }
    for error in &findings.errors {
        eprintln!("error: {error}");
    }
    match findings.errors.len() {
        0 => {
            eprintln!("{} files are tidy", files.len());
            Ok(Outcome::Done)
        }
        n => bail!("{n} breaches of the rules, see above"),
    }
}

/// The packages whose modules `ARCHITECTURE.md` must name.
const MAPPED: [&str; 4] = ["format", "xen-backend", "save-restore", "cli"];

fn code_map(files: &[impl AsRef<Path>], findings: &mut Findings) -> Result<()> {
    let path = workspace::root().join("ARCHITECTURE.md");
    if !path.exists() {
        findings
            .warnings
            .push("ARCHITECTURE.md is missing: its code map is not checked".to_owned());
        return Ok(());
    }
    let map = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let unnamed = unnamed_modules(files, &map);
    findings.errors.extend(unnamed.into_iter().map(|module| {
        format!("ARCHITECTURE.md: the code map does not name {module}: add a line for it")
    }));
    Ok(())
}

/// The modules directly below a package's `src` that the map does not name, as `name.rs` or as
/// `name/`.
fn unnamed_modules(files: &[impl AsRef<Path>], map: &str) -> Vec<String> {
    let mut unnamed: Vec<String> = files
        .iter()
        .filter_map(|file| {
            let mut parts = file.as_ref().iter().filter_map(|part| part.to_str());
            let (package, src, entry) = (parts.next()?, parts.next()?, parts.next()?);
            let name = match (entry.strip_suffix(".rs"), parts.next()) {
                (Some("lib" | "main"), None) => return None,
                (Some(name), None) => name,
                (None, Some(_)) => entry,
                _ => return None,
            };
            let mapped = src == "src" && MAPPED.contains(&package);
            let named = names(map, &format!("{name}.rs")) || names(map, &format!("{name}/"));
            (mapped && !named).then(|| format!("{package}/src/{name}"))
        })
        .collect();
    unnamed.dedup();
    unnamed
}

/// Whether `map` contains `module`, not as the tail of a longer name.
fn names(map: &str, module: &str) -> bool {
    map.match_indices(module).any(|(at, _)| {
        let before = map[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_map_has_to_name_every_module() {
        let map = "format/src/\n  frame.rs  words\n  record/  bodies\n  byte_order.rs\n";
        let files = [
            "format/src/frame.rs",
            "format/src/lib.rs",
            "format/src/order.rs",
            "format/src/record.rs",
            "format/src/record/pv.rs",
            "format/tests/golden.rs",
            "xen-backend/src/mock/guest.rs",
            "xen-backend/src/mock/machine.rs",
            "xtask/src/ci.rs",
        ];
        assert_eq!(
            unnamed_modules(&files, map),
            ["format/src/order", "xen-backend/src/mock"]
        );
    }
}
