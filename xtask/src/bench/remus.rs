//! The pause per checkpoint of `xsr remus`, and what it costs, against the dirty rate: to a
//! receiver on the same machine, over a socket as it is and over one that is as slow as a
//! network, with the checkpoint buffer and without; and the same of COLO, whose secondary
//! writes as much.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use crate::command::Invocation;
use crate::spread::Spread;

/// Pages that the guest writes, a second.
const RATES: [u32; 4] = [1_000, 10_000, 50_000, 200_000];
/// What it writes to.
const WORKING_SET: &str = "64M";
/// Milliseconds that it runs between two checkpoints.
const INTERVAL: u32 = 100;
/// Checkpoints of each run; the first, which has the rest of the first copy, does not count.
const CHECKPOINTS: u32 = 16;
/// A network: 1 Gbit/s.
const NETWORK: u32 = 125_000_000;

/// A checkpoint, as the command prints it.
#[derive(Debug, Deserialize)]
struct Checkpoint {
    dirty_pages: f64,
    pause_seconds: f64,
    checkpoint_seconds: f64,
}

/// What a domain is protected by.
#[derive(Clone, Copy, Debug)]
enum By {
    /// Remus, with the checkpoint buffer or without.
    Remus { buffer: bool },
    /// COLO; so many pages a second are written by the secondary.
    Colo { rate: u32 },
}

/// Measure; the tables in Markdown.
///
/// # Errors
///
/// A command fails.
pub(super) fn run(xsr: &Path, scratch: &Path, memory: u64) -> Result<String> {
    let host = scratch.join("a");
    let mut report = format!(
        "PVH domain of {memory} MiB that writes to {WORKING_SET}, -i {INTERVAL}, {CHECKPOINTS} \
         checkpoints each, the first not counted\n\n\
         | connection | dirty rate, pages/s | buffer | dirty pages | pause ms, median | most | \
         complete after ms, median | paused |\n|---|---|---|---|---|---|---|---|\n"
    );
    for network in [None, Some(NETWORK)] {
        for rate in RATES {
            for buffer in [true, false] {
                eprintln!("network {network:?}, {rate} pages/s, buffer {buffer}");
                make(xsr, &host, memory, rate)?;
                let checkpoints = protect(xsr, scratch, network, By::Remus { buffer })?;
                let connection = connection(network);
                let buffer = if buffer { "64 MiB" } else { "none" };
                let figures = figures(&checkpoints);
                writeln!(report, "| {connection} | {rate} | {buffer} | {figures} |")?;
            }
        }
    }
    report.push_str(
        "\nCOLO, the secondary at the same dirty rate, in 16 MiB\n\n\
         | connection | dirty rate, pages/s | dirty pages of both | pause ms, median | most | \
         both run after ms, median | paused |\n|---|---|---|---|---|---|---|\n",
    );
    for network in [None, Some(NETWORK)] {
        for rate in RATES {
            eprintln!("COLO, network {network:?}, {rate} pages/s");
            make(xsr, &host, memory, rate)?;
            let checkpoints = protect(xsr, scratch, network, By::Colo { rate })?;
            let (connection, figures) = (connection(network), figures(&checkpoints));
            writeln!(report, "| {connection} | {rate} | {figures} |")?;
        }
    }
    Ok(report)
}

fn connection(network: Option<u32>) -> &'static str {
    match network {
        Some(_) => "1 Gbit/s",
        None => "socket",
    }
}

/// The last columns of either table.
fn figures(checkpoints: &[Checkpoint]) -> String {
    let of = |figure: fn(&Checkpoint) -> f64| Spread::of(checkpoints.iter().map(figure));
    let pause = of(|c| c.pause_seconds * 1000.0);
    let complete = of(|c| c.checkpoint_seconds * 1000.0).median;
    let dirty = of(|c| c.dirty_pages).median;
    let paused: f64 = checkpoints.iter().map(|c| c.pause_seconds).sum();
    let all: f64 = checkpoints
        .iter()
        .map(|c| c.checkpoint_seconds + f64::from(INTERVAL) / 1000.0)
        .sum();
    format!(
        "{dirty:.0} | {:.1} | {:.1} | {complete:.1} | {:.1} %",
        pause.median,
        pause.most,
        100.0 * paused / all,
    )
}

/// A fresh domain that writes so many pages a second.
fn make(xsr: &Path, host: &Path, memory: u64, rate: u32) -> Result<()> {
    remove(host)?;
    Invocation::new(xsr)
        .args(["mock", "create", "guest", "--type", "pvh", "--host"])
        .arg(host)
        .args(["--memory", &format!("{memory}M")])
        .args(["--dirty-rate", &rate.to_string()])
        .args(["--working-set", WORKING_SET])
        .run()
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot clear {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// One run; its checkpoints but the first.
fn protect(xsr: &Path, scratch: &Path, network: Option<u32>, by: By) -> Result<Vec<Checkpoint>> {
    let (there, socket, near) = (
        scratch.join("b"),
        scratch.join("socket"),
        scratch.join("near"),
    );
    remove(&there)?;
    let backend = |dir: &Path| format!("mock:{}", dir.display());
    let at = |socket: &Path| format!("unix:{}", socket.display());
    let mut receiver = Command::new(xsr)
        .args(["--quiet", "migrate-receive"])
        .args(match by {
            By::Remus { .. } => vec!["-r".to_owned()],
            By::Colo { rate } => vec!["--colo".to_owned(), format!("--dirty-rate={rate}")],
        })
        .arg("--backend")
        .args([backend(&there), "--listen".to_owned(), at(&socket)])
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start the receiver")?;
    while !socket.exists() {
        ensure!(
            receiver.try_wait()?.is_none(),
            "the receiver ended before it was asked"
        );
        thread::sleep(Duration::from_millis(5));
    }
    let (to, slow) = match network {
        None => (&socket, None),
        Some(rate) => {
            let listener = UnixListener::bind(&near)?;
            let far = socket.clone();
            (
                &near,
                Some(thread::spawn(move || slowly(&listener, &far, rate))),
            )
        }
    };
    let sent = Command::new(xsr)
        .args(["--quiet", "remus", "--stats", "--json", "--backend"])
        .arg(backend(&scratch.join("a")))
        .args(["-i", &INTERVAL.to_string()])
        .args(["--epochs", &CHECKPOINTS.to_string()])
        .args(match by {
            By::Remus { buffer: true } => None,
            By::Remus { buffer: false } => Some("--no-buffer"),
            By::Colo { .. } => Some("-c"),
        })
        .args(["guest", &at(to)])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start the sender")?;
    receiver.wait()?;
    if let Some(slow) = slow {
        slow.join()
            .map_err(|_| anyhow::anyhow!("the slow connection"))??;
        fs::remove_file(&near)?;
    }
    ensure!(sent.status.success(), "the sender failed: {}", sent.status);
    let text = String::from_utf8(sent.stdout).context("the sender wrote no UTF-8")?;
    text.lines()
        .skip(1)
        .filter(|line| line.starts_with("{\"checkpoint\""))
        .map(|line| serde_json::from_str(line).with_context(|| format!("not understood: {line}")))
        .collect()
}

/// Forward what comes, no faster than so many bytes a second; what comes back, as it is.
fn slowly(listener: &UnixListener, far: &Path, bytes_per_second: u32) -> Result<()> {
    let (mut from, _) = listener.accept()?;
    let mut to = UnixStream::connect(far)?;
    let (mut back_from, mut back_to) = (to.try_clone()?, from.try_clone()?);
    let back = thread::spawn(move || io::copy(&mut back_from, &mut back_to));
    let mut room = vec![0; 64 << 10];
    let mut due = Instant::now();
    loop {
        let n = from.read(&mut room)?;
        if n == 0 {
            break;
        }
        // What was not used before is not made up for.
        let bytes = u32::try_from(n).unwrap_or(u32::MAX);
        let takes = Duration::from_secs(1) * bytes / bytes_per_second;
        due = due.max(Instant::now()) + takes;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        to.write_all(&room[..n])?;
    }
    // At the end the receiver hangs up over what it has no use for.
    for ended in [
        to.shutdown(Shutdown::Write),
        back.join()
            .map_err(|_| anyhow::anyhow!("the way back"))?
            .map(drop),
    ] {
        match ended {
            Err(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
                ) =>
            {
                return Err(error).context("the slow connection");
            }
            _ => {}
        }
    }
    Ok(())
}
