//! One command, run by a process of its own, so that what it used can be told apart
//! from what came before: wall clock, processor time, peak memory.

use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

/// Run one shell command and print what it used, as JSON (for `bench`)
#[derive(Debug, Args)]
#[command(
    hide = true,
    after_help = "\
Example:
  cargo xtask measure 'cat image >/dev/null'"
)]
pub(crate) struct MeasureArgs {
    /// The command, for `sh -c`
    command: String,
}

/// What a command used.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// Wall clock, seconds.
    pub(crate) seconds: f64,
    /// User and system time of all its processes, seconds.
    pub(crate) cpu_seconds: f64,
    /// Peak resident memory of the largest of its processes, KiB.
    pub(crate) peak_kib: i64,
}

/// Run `args.command` and print its [`Usage`].
///
/// # Errors
///
/// The command cannot be started, or fails.
pub(crate) fn run(args: &MeasureArgs) -> Result<()> {
    let begun = Instant::now();
    let status = Command::new("sh")
        .args(["-c", &args.command])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot start sh")?;
    let seconds = begun.elapsed().as_secs_f64();
    if !status.success() {
        bail!("`{}` failed: {status}", args.command);
    }
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let cpu = used.user_time() + used.system_time();
    let microseconds = i32::try_from(cpu.num_microseconds()).context("longer than half an hour")?;
    let usage = Usage {
        seconds,
        cpu_seconds: f64::from(microseconds) / 1e6,
        peak_kib: used.max_rss(),
    };
    println!("{}", serde_json::to_string(&usage)?);
    Ok(())
}

/// Have `command` run and measured.
///
/// # Errors
///
/// It fails.
pub(crate) fn measure(command: &str) -> Result<Usage> {
    let me = std::env::current_exe().context("cannot find this program")?;
    let output = Command::new(me)
        .args(["measure", command])
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("measuring `{command}` failed: {}", output.status);
    }
    serde_json::from_slice(&output.stdout).context("the measurement was not understood")
}
