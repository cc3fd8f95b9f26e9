//! Errors: each prints its cause or returns it as its source, never both, so that `{:#}` prints
//! each cause once.

use std::path::Path;

use super::Findings;

/// Checks the messages of a file's `thiserror` types.
pub(super) fn check(file: &Path, contents: &str, findings: &mut Findings) {
    for (at, _) in contents
        .match_indices("#[error(\"")
        .chain(contents.match_indices("#[error(\n"))
    {
        let (message, after) = message_of(&contents[at + "#[error(".len()..]);
        let Some(field) = sources(fields_of(after)).find(|field| shows(message, field)) else {
            continue;
        };
        let line = contents[..at].matches('\n').count() + 1;
        findings.errors.push(format!(
            "{}:{line}: the message shows {{{field}}}, which is also the source of the error: \
             show it or return it, not both",
            file.display()
        ));
    }
}

/// The first string literal of an attribute, and what follows the attribute.
fn message_of(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    let mut escaped = false;
    let end = text.char_indices().skip(1).find(|(_, c)| {
        let ends = *c == '"' && !escaped;
        escaped = *c == '\\' && !escaped;
        ends
    });
    let (message, rest) = text.split_at(end.map_or(text.len(), |(at, _)| at));
    let after = rest.find(")]").map_or("", |at| &rest[at..]);
    (message, after)
}

/// The fields of the variant or struct that follows: up to the next attribute of this kind, or the
/// end of the item.
fn fields_of(after: &str) -> &str {
    let next = after.find("#[error(").unwrap_or(after.len());
    let end = after.find("\n}").unwrap_or(after.len());
    &after[..next.min(end)]
}

/// The fields that the derived `source()` returns.
fn sources(fields: &str) -> impl Iterator<Item = &str> {
    let marked = ["#[source]", "#[from]"].into_iter().flat_map(move |mark| {
        fields.match_indices(mark).map(move |(at, _)| {
            let field = fields[at + mark.len()..].trim_start();
            let field = field.strip_prefix("pub ").unwrap_or(field);
            match field.split_once(':') {
                Some((name, rest)) if !rest.starts_with(':') && is_name(name) => name,
                _ => "0",
            }
        })
    });
    let named = fields.lines().filter_map(|line| {
        let line = line.trim_start();
        let line = line.strip_prefix("pub ").unwrap_or(line);
        line.starts_with("source: ").then_some("source")
    });
    marked.chain(named)
}

fn is_name(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

fn shows(message: &str, field: &str) -> bool {
    let found = |end| message.contains(&format!("{{{field}{end}"));
    found("}") || found(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(contents: &str) -> Vec<String> {
        let mut findings = Findings::default();
        check(Path::new("a.rs"), contents, &mut findings);
        findings.errors
    }

    #[test]
    fn an_error_that_shows_its_source_is_found() {
        let both = [
            "enum E {\n    #[error(\"failed: {0}\")]\n    A(#[source] io::Error),\n}\n",
            "enum E {\n    #[error(\"{0}\")]\n    A(#[from] io::Error),\n}\n",
            "enum E {\n    #[error(\n        \"{n} \\\"failed\\\": {cause:?}\"\n    )]\n    A {\n        \
             n: u8,\n        #[source]\n        cause: io::Error,\n    },\n}\n",
            "#[error(\"{source}\")]\nstruct E {\n    pub source: io::Error,\n}\n",
        ];
        for contents in both {
            let found = found(contents);
            assert_eq!(found.len(), 1, "{contents}: {found:?}");
            assert!(found[0].starts_with("a.rs:"), "{found:?}");
        }
        assert!(found(both[0])[0].starts_with("a.rs:2: "));
    }

    #[test]
    fn an_error_that_shows_or_returns_it_is_not() {
        let one = [
            "enum E {\n    #[error(\"failed\")]\n    A(#[source] io::Error),\n    #[error(\"{0}\")]\n    \
             B(String),\n}\n",
            "enum E {\n    #[error(transparent)]\n    A(#[from] io::Error),\n}\n",
            "enum E {\n    #[error(\"{n}: {cause}\")]\n    A {\n        n: u8,\n        cause: \
             io::Error,\n    },\n}\n",
            "#[error(\"{cause}\")]\nstruct E {\n    cause: u8,\n}\nstruct F {\n    #[source]\n    \
             cause: u8,\n}\n",
        ];
        for contents in one {
            assert_eq!(found(contents), [""; 0], "{contents}");
        }
    }
}
