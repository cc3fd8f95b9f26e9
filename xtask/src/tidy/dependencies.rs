//! Rules for dependencies: the allowed direction between packages, and crates that only the
//! binaries may use.

use crate::workspace::Package;

use super::Findings;

/// Each package, and which of ours it may depend on.
const ALLOWED: [(&str, &[&str]); 10] = [
    ("xsr-format", &[]),
    ("xsr-xen-backend", &["xsr-format"]),
    ("xsr-peer", &["xsr-format", "xsr-xen-backend"]),
    ("xsr-save-restore", &["xsr-format", "xsr-xen-backend"]),
    ("xsr-stdio", &[]),
    ("xsr-tun", &[]),
    (
        "xsr",
        &[
            "xsr-format",
            "xsr-xen-backend",
            "xsr-save-restore",
            "xsr-stdio",
            "xsr-tun",
        ],
    ),
    (
        "xsr-save-helper",
        &[
            "xsr-format",
            "xsr-xen-backend",
            "xsr-save-restore",
            "xsr-stdio",
        ],
    ),
    (
        "xsr-emu-manager",
        &["xsr-format", "xsr-xen-backend", "xsr-save-restore"],
    ),
    (
        "xtask",
        &["xsr-format", "xsr-xen-backend", "xsr-save-restore"],
    ),
];

/// Crates that only some packages may use: a library's errors are typed, and it does not draw on a
/// terminal.
const RESERVED: [(&str, &[&str]); 2] = [
    (
        "anyhow",
        &["xsr", "xsr-save-helper", "xsr-emu-manager", "xtask"],
    ),
    ("indicatif", &["xsr"]),
];

/// Checks the packages of the workspace, including dependencies for tests.
pub(super) fn check(packages: &[Package], findings: &mut Findings) {
    for package in packages {
        let name = package.name.as_str();
        let Some((_, allowed)) = ALLOWED.iter().find(|(known, _)| *known == name) else {
            findings.errors.push(format!(
                "package {name}: say in ARCHITECTURE.md and in xtask's tidy what it may depend on"
            ));
            continue;
        };
        for dependency in package.dependencies.iter().map(|d| d.name.as_str()) {
            let ours = ALLOWED.iter().any(|(known, _)| *known == dependency);
            let reserved = RESERVED.iter().find(|(known, _)| *known == dependency);
            // A package may enable its own features in its tests.
            if ours && dependency != name && !allowed.contains(&dependency) {
                findings.errors.push(format!(
                    "{name} depends on {dependency}, against the direction of the rooms"
                ));
            }
            if let Some((_, users)) = reserved.filter(|(_, users)| !users.contains(&name)) {
                findings.errors.push(format!(
                    "{name} depends on {dependency}, which is for {} alone",
                    users.join(" and ")
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::workspace::Dependency;

    use super::*;

    fn errors(package: &str, dependency: &str) -> Vec<String> {
        let package = Package {
            name: package.to_owned(),
            dependencies: vec![Dependency {
                name: dependency.to_owned(),
            }],
            targets: Vec::new(),
        };
        let mut findings = Findings::default();
        check(&[package], &mut findings);
        findings.errors
    }

    #[test]
    fn dependencies_go_one_way() {
        assert!(errors("xsr-save-restore", "xsr-format").is_empty());
        assert!(errors("xsr", "xsr-save-restore").is_empty());
        assert_eq!(errors("xsr-format", "xsr-xen-backend").len(), 1);
        assert_eq!(errors("xsr-xen-backend", "xsr-save-restore").len(), 1);
        assert_eq!(errors("xsr", "xtask").len(), 1);
    }

    #[test]
    fn some_crates_are_for_binaries() {
        assert!(errors("xsr", "anyhow").is_empty());
        assert!(errors("xtask", "anyhow").is_empty());
        assert_eq!(errors("xsr-format", "anyhow").len(), 1);
        assert_eq!(errors("xtask", "indicatif").len(), 1);
    }

    #[test]
    fn a_new_package_has_to_be_placed() {
        assert_eq!(errors("xsr-new", "serde").len(), 1);
    }
}
