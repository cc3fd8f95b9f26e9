//! Programs that this machine needs: checks for them, and installs them if permitted.

use std::path::PathBuf;

use anyhow::{Result, bail};

use super::apt;
use crate::command::Invocation;

/// Fails if one of `programs` (each with its Debian package) is missing.
pub(super) fn need(programs: &[(&str, &str)]) -> Result<()> {
    let missing = missing(programs);
    if !missing.is_empty() {
        bail!(
            "the lab needs more programs: apt-get install --no-install-recommends {}",
            missing.join(" ")
        );
    }
    Ok(())
}

/// Installs what is missing, if this is root on a machine with apt; otherwise fails like [`need`].
pub(super) fn install(programs: &[(&str, &str)]) -> Result<()> {
    let missing = missing(programs);
    let root = || Invocation::new("id").arg("-u").capture();
    if missing.is_empty() || missing.contains(&"apt") || root()?.trim() != "0" {
        return need(programs);
    }
    let attempt = || {
        Invocation::limited(apt::PACKAGES, "apt-get")
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "install", "--yes", "--no-install-recommends"])
            .args(&missing)
            .run()
    };
    if attempt().is_err() {
        // The package lists may be missing or outdated.
        Invocation::limited(apt::LISTS, "apt-get")
            .args(["-qq", "update"])
            .run()?;
        attempt()?;
    }
    need(programs)
}

fn missing<'a>(programs: &[(&str, &'a str)]) -> Vec<&'a str> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&path).collect();
    dirs.extend(["/usr/sbin".into(), "/sbin".into()]);
    programs
        .iter()
        .filter(|(program, _)| !dirs.iter().any(|dir| dir.join(program).is_file()))
        .map(|(_, package)| *package)
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn what_is_missing_is_said_with_the_package_that_has_it() {
        let programs = [("sh", "dash"), ("no-such-program-here", "some-package")];
        let error = need(&programs).unwrap_err().to_string();
        assert!(
            error.ends_with("--no-install-recommends some-package"),
            "{error}"
        );
        need(&programs[..1]).unwrap();
    }
}
