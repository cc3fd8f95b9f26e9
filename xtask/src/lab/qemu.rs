//! Booting a lab: runs qemu with the hypervisor as its kernel, until dom0 powers off.

use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::build::Lab;
use super::share::Share;
use crate::command::Invocation;

/// Memory of the machine and of dom0, in MiB.
const MACHINE_MIB: u32 = 1536;
const DOM0_MIB: u32 = 512;

/// The emulated processor: everything that qemu can emulate, including SVM and nested paging for
/// HVM and PVH, except features that fail or are not needed:
/// - `smap`: before qemu 9.1, an IRET from ring 3 (the kernel of every PV guest) reads its stack
///   with the rights of the hypervisor, and dom0 dies of a page fault;
/// - `rdtscp`: when intercepted, it is reported as RDTSC, and guests die of it;
/// - `la57`: nothing here has five levels of page tables;
/// - `avx`, `avx2`: nothing here needs them, and they are suspected of a bug: in a dom0 that used
///   them, programs occasionally died of corrupted memory.
const PROCESSOR: &str = "max,la57=off,smap=off,rdtscp=off,avx=off,avx2=off";

/// Restores the vector registers of a PV guest (which dom0 is) when switching to it, not at its
/// first use of them. Without this, programs of dom0 died while an HVM guest ran. A busybox's core
/// shows zeros where malloc's first list is created: the first store to a page, from a vector
/// register just filled, is repeated after its page fault. The core of an xl has a zero in such a
/// list, too. It happened twice in 15 scenarios on Xen 4.17 without this option, and never in 28
/// scenarios of HVM guests with it, most of them on 4.20. Whether the cause is in qemu or Xen is
/// unknown.
const XEN_OPTIONS: &str = "spec-ctrl=eager-fpu";

/// One processor. With two, each a thread of qemu, memory of guests and dom0 was corrupted on a
/// loaded machine.
const PROCESSORS: &str = "1";

/// The console of hypervisor and dom0, in the share's output.
pub(super) const CONSOLE: &str = "console.log";

/// A qemu that is killed when dropped.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails if it has already ended, which is fine.
        if self.0.kill().is_ok()
            && let Err(error) = self.0.wait()
        {
            eprintln!("warning: qemu: {error}");
        }
    }
}

impl Machine {
    fn start(qemu: Invocation) -> Result<Self> {
        let child = qemu.into_command().spawn().context("cannot start qemu")?;
        Ok(Self(child))
    }
}

/// The second host, which does not run the scenarios itself.
#[derive(Debug)]
pub(super) struct Far<'a> {
    pub(super) lab: &'a Lab,
    pub(super) share: &'a Share,
    /// Suffix for its processor's name, such as features to remove.
    pub(super) processor: &'a str,
}

/// The network link between two hosts: a socket, removed at the end.
struct Wire(PathBuf);

impl Wire {
    /// Creates a unique path. It is short, as required for a socket.
    fn new() -> Self {
        let name = format!("xsr-lab-{}.net", std::process::id());
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            eprintln!("warning: {}: {error}", self.0.display());
        }
    }
}

/// One end of the wire.
#[derive(Clone, Copy)]
struct Socket<'a> {
    path: &'a Path,
    /// Whether this end creates the socket.
    listens: bool,
}

/// Boots the lab, prints the results of the scenarios, and waits until it powers off. With `far`, a
/// second machine runs meanwhile, and the two have a network between them.
///
/// # Errors
///
/// qemu fails, dom0 does not come up, or it takes longer than `limit` seconds. The console is in
/// the share's output.
pub(super) fn boot(lab: &Lab, share: &Share, far: Option<&Far<'_>>, limit: u64) -> Result<()> {
    let console = share.output.join(CONSOLE);
    let wire = Wire::new();
    let near = far.map(|_| Socket {
        path: &wire.0,
        listens: true,
    });
    let mut machine = Machine::start(qemu(lab, share, PROCESSOR, near))?;
    let mut other = match far {
        None => None,
        Some(far) => Some(start_far(far, &wire.0, &mut machine)?),
    };
    let end = Instant::now() + Duration::from_secs(limit);
    let mut shown = 0;
    let status = loop {
        if let Some(status) = machine.0.try_wait()? {
            break status;
        }
        ensure!(
            Instant::now() < end,
            "the lab did not end within {limit} s: see {}",
            console.display()
        );
        shown = show_results(share, shown)?;
        thread::sleep(Duration::from_millis(200));
    };
    show_results(share, shown)?;
    ensure!(status.success(), "qemu failed: {status}");
    if let Some(other) = &mut other {
        wait_for_far(other)?;
    }
    if !share.output.join("status").exists() {
        let said = std::fs::read(&console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        let tail: Vec<&str> = said.lines().rev().take(15).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!(
            "dom0 did not get to the end of its scenarios; the end of {}:\n{}",
            console.display(),
            tail.join("\n")
        );
    }
    Ok(())
}

/// Converts processor features to qemu's syntax after a model: `-aes,+avx` becomes
/// `aes=off,avx=on`.
///
/// # Errors
///
/// A feature begins with neither `+` nor `-`, or has an implausible name.
pub(super) fn features(text: &str) -> Result<String> {
    let one = |feature: &str| {
        let (name, state) = match feature.split_at_checked(1) {
            Some(("+", name)) => (name, "on"),
            Some(("-", name)) => (name, "off"),
            _ => bail!("{feature:?}: expected +NAME or -NAME"),
        };
        let plausible = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        ensure!(
            !name.is_empty() && name.chars().all(plausible),
            "{feature:?} names no feature of a processor"
        );
        Ok(format!("{name}={state}"))
    };
    let all: Vec<String> = text.split(',').map(one).collect::<Result<_>>()?;
    Ok(all.join(","))
}

/// Starts the second machine after the first has created the socket.
fn start_far(far: &Far<'_>, wire: &Path, first: &mut Machine) -> Result<Machine> {
    let end = Instant::now() + Duration::from_secs(10);
    while !wire.exists() {
        if let Some(status) = first.0.try_wait()? {
            bail!("qemu failed: {status}");
        }
        ensure!(Instant::now() < end, "qemu made no {}", wire.display());
        thread::sleep(Duration::from_millis(20));
    }
    let socket = Socket {
        path: wire,
        listens: false,
    };
    let processor = format!("{PROCESSOR}{}", far.processor);
    Machine::start(qemu(far.lab, far.share, &processor, Some(socket)))
}

/// Waits for the second machine, which powers off by itself soon after the first.
fn wait_for_far(other: &mut Machine) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(60);
    while Instant::now() < end {
        if let Some(status) = other.0.try_wait()? {
            ensure!(status.success(), "the second qemu failed: {status}");
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    eprintln!("warning: the second host does not power off, and is stopped");
    Ok(())
}

/// Prints the results from byte `from` on. Returns the end of what was printed.
fn show_results(share: &Share, from: u64) -> Result<u64> {
    let Ok(mut file) = std::fs::File::open(share.output.join("results")) else {
        return Ok(from);
    };
    file.seek(SeekFrom::Start(from))?;
    let mut new = String::new();
    file.read_to_string(&mut new)?;
    eprint!("{new}");
    Ok(from + new.len() as u64)
}

fn qemu(lab: &Lab, share: &Share, processor: &str, socket: Option<Socket<'_>>) -> Invocation {
    let xen = format!(
        "console=com1 com1=115200,8n1 loglvl=info guest_loglvl=warning \
         dom0_mem={DOM0_MIB}M,max:{DOM0_MIB}M dom0_max_vcpus=1 {XEN_OPTIONS}"
    );
    let dom0 = format!(
        "{} console=hvc0 panic=1 quiet,{}",
        lab.file("vmlinux").display(),
        lab.file("initrd.img").display()
    );
    let disk = format!(
        "if=none,id=root,file={},format=raw,snapshot=on",
        lab.file("root.ext4").display()
    );
    let given = |path: &std::path::Path, tag: &str| {
        format!(
            "local,path={},mount_tag={tag},security_model=none",
            path.display()
        )
    };
    let machine = Invocation::new("qemu-system-x86_64")
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=single",
            "-cpu",
            processor,
        ])
        .args(["-smp", PROCESSORS, "-m", &MACHINE_MIB.to_string()])
        .args(["-display", "none", "-monitor", "none", "-nic", "none"])
        // A crash of Xen or dom0 ends the run instead of rebooting.
        .arg("-no-reboot")
        .arg("-serial")
        .arg(format!("file:{}", share.output.join(CONSOLE).display()))
        .arg("-kernel")
        .arg(&share.hypervisor)
        .args(["-append", &xen, "-initrd", &dom0, "-drive", &disk])
        .args(["-device", "virtio-blk-pci,drive=root"])
        .arg("-virtfs")
        .arg(format!("{},readonly=on", given(&share.input, "in")))
        .arg("-virtfs")
        .arg(given(&share.output, "out"));
    let (Some(socket), Some(common)) = (socket, &share.common) else {
        return machine;
    };
    let (end, host) = match socket.listens {
        true => ("on", 1),
        false => ("off", 2),
    };
    let path = socket.path.display();
    machine
        .arg("-netdev")
        .arg(format!(
            "stream,id=net,server={end},addr.type=unix,addr.path={path}"
        ))
        .arg("-device")
        .arg(format!(
            "virtio-net-pci,netdev=net,mac=52:54:00:00:00:0{host},romfile="
        ))
        .arg("-virtfs")
        .arg(given(common, "common"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::features;

    #[test]
    fn features_become_properties_and_nothing_else_does() {
        assert_eq!(features("-aes,+sse4.2").unwrap(), "aes=off,sse4.2=on");
        for bad in ["", "aes", "-", "-aes,", "-aes,,+x", "-x=on,y"] {
            assert!(features(bad).is_err(), "{bad}");
        }
    }
}
