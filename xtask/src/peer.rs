//! Xen's own stream tools, with which the conformance tests compare: downloaded from Debian,
//! unpacked below `target/peer`, never installed. Also Xen's own engine, compared with ours on mock
//! machines.

mod bench;
mod downtime;
mod engine;
mod plot;
mod throughput;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::command::Invocation;
use crate::stages::Outcome;
use crate::workspace;

/// The variable that gives the tests the directory of the unpacked package: the tools are
/// `usr/lib/xen-4.17/bin/*` below it, their Python modules `usr/lib/xen-4.17/lib/python`.
pub(crate) const VARIABLE: &str = "XSR_PEER_TOOLS";

const PACKAGE: &str = "xen-utils-4.17";
const VERIFY: &str = "usr/lib/xen-4.17/bin/verify-stream-v2";
const PYTHON: &str = "usr/lib/xen-4.17/lib/python";

fn directory() -> PathBuf {
    workspace::root().join("target/peer")
}

/// Compare our engine with Xen's, on mock machines
///
/// Runs Debian's unmodified libxl-save-helper and ours on equal mock machines; no Xen is needed. Its packages are
/// downloaded and unpacked below target/peer-engine; nothing is installed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  cargo xtask peer test      compare the bytes, and the restored machines
  cargo xtask peer bench     compare the speed: 1 GiB domains, 7 pairs, about ten minutes
  cargo xtask peer bench --kind pv --kind hvm --memory 4096 --pairs 3
  cargo xtask peer bench --downtime    live migrations at three dirty rates
  cargo xtask peer bench --plot docs/peer.svg")]
pub(crate) struct PeerArgs {
    #[command(subcommand)]
    task: PeerTask,
}

#[derive(Debug, clap::Subcommand)]
enum PeerTask {
    /// Save and restore each type of guest with both engines, and compare the results
    Test,
    /// Time saves and restores of both, in pairs
    ///
    /// Each round runs all contenders once, in turn: Xen's helper, ours with one
    /// thread and with two, and cat with the same bytes, which is the limit. Prints tables in
    /// Markdown with medians and ranges; docs/performance.md explains them.
    Bench(bench::BenchArgs),
}

/// Runs the task.
///
/// # Errors
///
/// The packages cannot be downloaded, or the engines differ.
pub(crate) fn side_by_side(args: &PeerArgs) -> Result<()> {
    match &args.task {
        PeerTask::Test => engine::test(),
        PeerTask::Bench(args) => bench::run(args, &engine::fetch()?),
    }
}

/// Stage for `peer test`, on a machine that may not have a Debian archive.
pub(crate) fn engine_stage() -> Result<Outcome> {
    let packages = match engine::fetch() {
        Ok(packages) => packages,
        Err(error) => {
            return Ok(Outcome::Skipped(format!(
                "comparison with Xen's own engine, which cannot be had: {error:#}"
            )));
        }
    };
    engine::compare(&packages)?;
    for downtime in [false, true] {
        bench::run(&bench::BenchArgs::smoke(downtime), &packages)?;
    }
    Ok(Outcome::Done)
}

/// The directory of the unpacked package, if it exists.
pub(crate) fn unpacked() -> Option<PathBuf> {
    Some(directory()).filter(|dir| dir.join(VERIFY).is_file())
}

/// Downloads the tools and prints their location.
///
/// # Errors
///
/// The package cannot be downloaded, or does not work here.
pub(crate) fn run() -> Result<()> {
    let dir = fetch()?;
    println!("verify-stream-v2: {}", dir.join(VERIFY).display());
    println!("{VARIABLE}={}", dir.display());
    Ok(())
}

/// Like [`run`], for a machine that may not have a Debian archive: tests that need the tools then
/// skip themselves, and say so.
pub(crate) fn stage() -> Result<Outcome> {
    Ok(match run() {
        Ok(()) => Outcome::Done,
        Err(error) => Outcome::Skipped(format!(
            "conformance with Xen's own tools, which cannot be had: {error:#}"
        )),
    })
}

fn fetch() -> Result<PathBuf> {
    let dir = directory();
    if unpacked().is_none() {
        unpack(&[PACKAGE], &dir)?;
    }
    ensure!(
        unpacked().is_some(),
        "{PACKAGE} has no {VERIFY}: has Debian moved it?"
    );
    let works = Invocation::new("python3")
        .env("PYTHONPATH", dir.join(PYTHON))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .args(["-c", "import xen.migration.libxl"])
        .succeeds();
    ensure!(works, "Xen's tools need a python3 that can import them");
    Ok(dir)
}

/// Downloads packages with apt, next to `dir`, and unpacks them there.
fn unpack(packages: &[&str], dir: &Path) -> Result<()> {
    let mut download = dir.as_os_str().to_owned();
    download.push("-download");
    for archive in download_to(Path::new(&download), packages)? {
        Invocation::new("dpkg-deb")
            .arg("-x")
            .arg(&archive)
            .arg(dir)
            .run()?;
    }
    Ok(())
}

/// Downloads packages with apt to `dir`, which is emptied first. Returns the paths of the archives.
fn download_to(dir: &Path, packages: &[&str]) -> Result<Vec<PathBuf>> {
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let attempt = || {
        Invocation::new("apt-get")
            .args(["-o", "APT::Sandbox::User=root", "download"])
            .args(packages)
            .current_dir(dir)
            .run()
    };
    if attempt().is_err() {
        // The package lists may be missing or outdated.
        Invocation::new("apt-get").args(["update", "-qq"]).run()?;
        attempt()?;
    }
    let found = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    let mut archives: Vec<PathBuf> = found.iter().map(std::fs::DirEntry::path).collect();
    archives.retain(|path| path.extension().is_some_and(|e| e == "deb"));
    archives.sort();
    Ok(archives)
}
