//! Rules for all text files: nothing in them belongs to one machine or one
//! network.

use std::path::Path;

use super::Findings;

/// Directories that are somebody's own.
const PRIVATE_DIRECTORIES: [&str; 2] = [concat!("/wo", "rk/"), concat!("/ho", "me/")];

/// Ends of host names that mean something on one network only.
const PRIVATE_DOMAINS: [&str; 6] = [
    ".internal",
    ".local",
    ".lan",
    ".corp",
    ".intranet",
    ".localdomain",
];

/// Check the file at `path`, relative to the root.
pub(super) fn check(path: &Path, contents: &str, findings: &mut Findings) {
    let shown = path.display();
    // Made by cargo; cargo-deny looks at the sources in it.
    if path.file_name().is_some_and(|name| name == "Cargo.lock") {
        return;
    }
    for (number, line) in (1..).zip(contents.lines()) {
        for directory in PRIVATE_DIRECTORIES {
            if starts_a_path(line, directory) {
                findings.errors.push(format!(
                    "{shown}:{number}: {directory} is a directory of one machine: \
                     use a relative path or a variable"
                ));
            }
        }
        for host in hosts(line).filter(|host| is_private(host)) {
            findings.errors.push(format!(
                "{shown}:{number}: nobody outside one network can reach {host}"
            ));
        }
    }
}

/// Whether `directory` is in `line` as the start of an absolute path, not as the
/// middle of another one.
fn starts_a_path(line: &str, directory: &str) -> bool {
    line.match_indices(directory).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        !before.is_some_and(|c| c.is_alphanumeric() || "_-.~/*}".contains(c))
    })
}

/// The hosts of the URLs in a line, without user and port.
fn hosts(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("://").map(|(at, separator)| {
        let rest = &line[at + separator.len()..];
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || ".-_@:".contains(c)));
        let authority = &rest[..end.unwrap_or(rest.len())];
        let host = authority.rsplit('@').next().unwrap_or(authority);
        host.split(':').next().unwrap_or(host)
    })
}

fn is_private(host: &str) -> bool {
    let address = host.split('.').count() == 4 && host.split('.').all(|n| n.parse::<u8>().is_ok());
    address || PRIVATE_DOMAINS.iter().any(|domain| host.ends_with(domain))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors(name: &str, contents: &str) -> usize {
        let mut findings = Findings::default();
        check(Path::new(name), contents, &mut findings);
        assert!(findings.warnings.is_empty());
        findings.errors.len()
    }

    #[test]
    fn directories_of_one_machine_are_found() {
        for directory in PRIVATE_DIRECTORIES {
            assert_eq!(errors("README.md", &format!("see `{directory}x`")), 1);
            assert_eq!(errors("README.md", &format!("{directory}x")), 1);
            assert_eq!(errors("README.md", &format!("../shared{directory}x")), 0);
            assert_eq!(errors("README.md", &format!("$DIR{directory}x")), 0);
        }
    }

    #[test]
    fn hosts_of_one_network_are_found() {
        let url = |host: &str| format!("url = \"https://{host}/index\"");
        for host in ["10.0.0.7", "user@crates.corp:8080", "mirror.internal"] {
            assert_eq!(errors("deny.toml", &url(host)), 1, "{host}");
            assert_eq!(errors("Cargo.lock", &url(host)), 0, "{host}");
        }
        for host in [
            "crates.io",
            "github.com",
            "xenbits.xen.org",
            "1.2.example.org",
        ] {
            assert_eq!(errors("deny.toml", &url(host)), 0, "{host}");
        }
    }
}
