//! Builds a hypervisor with features that Debian's lacks: shadow paging (required by the dirty log
//! of PV guests, and so by live migration) and 32-bit PV guests. It is built from the newest source
//! package of the suite in the archive, or from a given source, with another configuration. The
//! tools remain Debian's.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::apt::Apt;
use super::build::{Lab, clear};
use super::host;
use crate::command::Invocation;

/// Programs needed to build it, besides the lab's.
pub(super) const PROGRAMS: &[(&str, &str)] = &[
    ("make", "make"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("python3", "python3"),
];

/// The configuration; all else is upstream's default.
const CONFIG: &str = "CONFIG_DEBUG=n\nCONFIG_SHADOW_PAGING=y\nCONFIG_PV32=y\n";

/// Time limit for building a hypervisor, in seconds.
const BUILDING: u32 = 3600;

/// The lab's file with the version of the source.
const VERSION: &str = "xen-shadow.version";

/// The source's version, if the hypervisor has been built.
pub(super) fn built(lab: &Lab) -> Option<String> {
    std::fs::read_to_string(lab.file(VERSION)).ok()
}

/// The version `4.17.5` in `xen_4.17.5.orig.tar.xz`.
fn version(archive: &str) -> &str {
    let version = archive.strip_prefix("xen_").unwrap_or(archive);
    version.split(".orig.").next().unwrap_or(version)
}

/// The hypervisor, built if it does not exist yet, which takes some minutes.
///
/// # Errors
///
/// A program is missing, the source cannot be downloaded, or it does not compile.
pub(super) fn build(lab: &Lab, suite: &str) -> Result<PathBuf> {
    let hypervisor = lab.file("xen-shadow");
    if hypervisor.exists() {
        return Ok(hypervisor);
    }
    host::need(PROGRAMS)?;
    let apt = Apt::open(&lab.file("apt-source"), "deb-src", suite)?;
    let archive = apt.source("xen").context(
        "no hypervisor with shadow paging and 32-bit PV, then; `lab build --shadow --source FILE` \
         builds it of another xen_VERSION.orig.tar.*",
    )?;
    build_of(lab, &archive)
}

/// The hypervisor, rebuilt from the source in `archive`, packed like Debian's
/// (`xen_VERSION.orig.tar.*`). An existing one is replaced only after the build.
///
/// # Errors
///
/// Same as [`build`].
pub(super) fn build_of(lab: &Lab, archive: &Path) -> Result<PathBuf> {
    host::need(PROGRAMS)?;
    // tar runs in the root of the workspace.
    let archive = std::path::absolute(archive)?;
    ensure!(archive.is_file(), "there is no {}", archive.display());
    let hypervisor = lab.file("xen-shadow");
    let tree = lab.file("source");
    clear(&tree)?;
    std::fs::create_dir_all(&tree)?;
    Invocation::new("tar")
        .args(["--strip-components=1", "-C"])
        .arg(&tree)
        .arg("-xf")
        .arg(&archive)
        .run()?;
    std::fs::write(tree.join("xen/.config"), CONFIG)?;
    let log = lab.file("shadow.log");
    for target in ["olddefconfig", "build"] {
        make(&tree, target, &log)?;
    }
    let config = std::fs::read_to_string(tree.join("xen/.config"))?;
    for wanted in CONFIG.lines().filter(|line| line.ends_with("=y")) {
        ensure!(
            config.lines().any(|line| line == wanted),
            "this Xen cannot be built with {wanted}"
        );
    }
    // The archive may have only a source that is older than its packages.
    let name = archive.file_name().unwrap_or_default().to_string_lossy();
    std::fs::write(lab.file(VERSION), version(&name))?;
    std::fs::rename(tree.join("xen/xen"), &hypervisor).context("make left no hypervisor")?;
    clear(&tree)?;
    clear(&lab.file("apt-source"))?;
    Ok(hypervisor)
}

/// Runs make for a target of Xen, with its output in `log`.
fn make(tree: &Path, target: &str, log: &Path) -> Result<()> {
    let file = std::fs::File::create(log)?;
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let status = Invocation::limited(BUILDING, "make")
        .arg(format!("-j{jobs}"))
        .arg("-C")
        .arg(tree.join("xen"))
        .arg(target)
        .into_command()
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .context("cannot start make")?;
    if !status.success() {
        bail!(
            "make {target} of Xen failed ({status}): see {}",
            log.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn an_archive_is_named_after_its_version() {
        let name = "xen_4.17.5+72-g01140da4e8.orig.tar.xz";
        assert_eq!(super::version(name), "4.17.5+72-g01140da4e8");
    }
}
