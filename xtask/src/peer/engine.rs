//! Xen's own save and restore engine, for comparison with ours: Debian's packages, with the
//! libraries below them replaced by a mock machine from the package `xsr-peer`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::command::Invocation;
use crate::workspace;

/// The packages with the engine, and with libraries of Xen that are used unchanged.
const PACKAGES: [&str; 4] = [
    "xen-utils-4.17",
    "libxenmisc4.17",
    "libxentoollog1",
    "libxentoolcore1",
];
const HELPER: &str = "usr/lib/xen-4.17/bin/libxl-save-helper";
/// Our helper for the mock machine.
const HELPER_ON_MOCK: &str = "xsr-save-helper-mock";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const ENGINE: &str = "usr/lib/x86_64-linux-gnu/libxenguest.so.4.17";

/// The libraries that `xsr-peer` replaces.
const STOOD_IN: [&str; 5] = [
    "libxencall.so.1",
    "libxenforeignmemory.so.1",
    "libxendevicemodel.so.1",
    "libxenevtchn.so.1",
    "libxengnttab.so.1",
];

/// Downloads, builds and compares.
///
/// # Errors
///
/// The packages cannot be downloaded, or the engines differ.
pub(super) fn test() -> Result<()> {
    compare(&fetch()?)
}

/// Downloads and unpacks the packages. Returns their directory.
///
/// # Errors
///
/// apt does not have the packages, or their contents are unexpected.
pub(super) fn fetch() -> Result<PathBuf> {
    let dir = workspace::root().join("target/peer-engine");
    let whole = || dir.join(HELPER).is_file() && dir.join(ENGINE).exists();
    if !whole() {
        super::unpack(&PACKAGES, &dir)?;
    }
    ensure!(
        whole(),
        "the packages have no {HELPER} or no {ENGINE}: has Debian moved them?"
    );
    Ok(dir)
}

/// Builds both engines and runs the tests that compare them.
///
/// # Errors
///
/// Something does not build, or the engines differ.
pub(super) fn compare(packages: &Path) -> Result<()> {
    let helpers = build(packages)?;
    let mut tests = Invocation::cargo();
    tests = tests.args(["test", "--release", "-p", "xsr-peer", "--test", "equality"]);
    for (name, value) in helpers {
        tests = tests.env(name, value);
    }
    tests.run()
}

/// Builds both engines. Returns the variables that give their paths.
///
/// # Errors
///
/// Something does not build.
pub(super) fn build(packages: &Path) -> Result<[(&'static str, OsString); 3]> {
    let mut path = OsString::from(stand_ins()?);
    path.push(":");
    path.push(packages.join(LIBRARIES));
    Invocation::cargo()
        .args([
            "build",
            "--release",
            "-p",
            "xsr-save-helper",
            "--features",
            "test-backend",
            "--bin",
            HELPER_ON_MOCK,
        ])
        .run()?;
    Ok([
        ("XSR_PEER_HELPER", packages.join(HELPER).into()),
        ("XSR_PEER_LIBRARIES", path),
        ("XSR_PEER_OURS", release().join(HELPER_ON_MOCK).into()),
    ])
}

/// Builds the program that acts as libxl once.
///
/// # Errors
///
/// It does not build.
pub(super) fn runner() -> Result<PathBuf> {
    Invocation::cargo()
        .args([
            "build",
            "--release",
            "-p",
            "xsr-peer",
            "--bin",
            "xsr-peer-run",
        ])
        .run()?;
    Ok(release().join("xsr-peer-run"))
}

fn release() -> PathBuf {
    workspace::target().join("release")
}

/// Builds the replacements of Xen's libraries. Returns their directory.
fn stand_ins() -> Result<PathBuf> {
    Invocation::cargo()
        .args(["build", "--release", "-p", "xsr-peer", "--lib"])
        .run()?;
    let dir = workspace::root().join("target/peer-libraries");
    if dir.exists() {
        std::fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let script = workspace::root().join("xen-backend/peer/symbols.map");
    let mut versions = OsString::from("-Wl,--version-script=");
    versions.push(script);
    // One library with all names: the loader recognises it as a single file.
    Invocation::new("cc")
        .args(["-shared", "-o"])
        .arg(dir.join("libxsr-peer.so"))
        .arg("-Wl,--whole-archive")
        .arg(release().join("libxsr_peer.a"))
        .args(["-Wl,--no-whole-archive", "-Wl,--no-undefined"])
        .arg(versions)
        .args(["-lpthread", "-ldl", "-lm"])
        .run()?;
    for name in STOOD_IN {
        std::os::unix::fs::symlink("libxsr-peer.so", dir.join(name))
            .with_context(|| format!("cannot link {name} in {}", dir.display()))?;
    }
    Ok(dir)
}
