//! Booting a lab: qemu with the hypervisor as its kernel, until dom0 powers off.

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

/// The emulated processor: all that qemu can emulate, SVM and nested paging for HVM and
/// PVH included, but for what goes wrong there:
/// - `smap`: before qemu 9.1, an IRET from ring 3 (the kernel of every PV guest) reads
///   its stack with the rights of the hypervisor, and dom0 dies of a page fault;
/// - `rdtscp`: when intercepted, it is reported as RDTSC, and guests die of it;
/// - `la57`: nothing here has five levels of page tables;
/// - `avx`, `avx2`: nothing here needs them, and they are under suspicion: in a dom0 that
///   used them, now and then a program died of memory that nobody had written.
const PROCESSOR: &str = "max,la57=off,smap=off,rdtscp=off,avx=off,avx2=off";

/// Vector registers of a PV guest, dom0 is one, are restored when it is switched to, not when
/// it first uses them. Beside an HVM guest, programs of dom0 died. The core of a busybox shows
/// zeros where malloc's first list is made: the first store to a page, of a vector register just
/// filled, repeated after its page fault; that of an xl has a zero in such a list, too. Twice in
/// 15 scenarios on Xen 4.17 without this; in 28 of HVM guests with it, most of them on 4.20,
/// never. Why, in qemu or in Xen, is not known.
const XEN_OPTIONS: &str = "spec-ctrl=eager-fpu";

/// One processor: with two of them, each a thread of qemu's, memory of guests and of
/// dom0 has been seen to change by itself on a loaded machine.
const PROCESSORS: &str = "1";

/// The console of hypervisor and dom0, in the share's output.
pub(super) const CONSOLE: &str = "console.log";

/// A qemu that does not outlive its task.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // Fails where it has ended, which is what is wanted.
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

/// The host beside the one on which the scenarios run.
#[derive(Debug)]
pub(super) struct Far<'a> {
    pub(super) lab: &'a Lab,
    pub(super) share: &'a Share,
    /// What is put behind its processor's name: features to take away, say.
    pub(super) processor: &'a str,
}

/// The wire between two hosts: a socket, removed in the end.
struct Wire(PathBuf);

impl Wire {
    /// A name for it: short, because that of a socket must be.
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
    /// Whether this end makes the socket.
    listens: bool,
}

/// Boot the lab, show what becomes of the scenarios, wait until it powers off. With `far`, a
/// second machine is up meanwhile, and the two have a network between them.
///
/// # Errors
///
/// qemu fails, dom0 does not come up, or it takes longer than `limit` seconds. The
/// console is in the share's output.
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

/// Features of a processor as qemu takes them behind its model, `-aes,+avx` as `aes=off,avx=on`.
///
/// # Errors
///
/// One begins with neither `+` nor `-`, or has no plausible name.
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

/// Start the second machine once the first has made the socket.
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

/// The first machine is down: the second powers off by itself, soon.
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

/// Print the results from byte `from` on; up to where.
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
        // A crash of Xen or dom0 is the end, not another boot.
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
