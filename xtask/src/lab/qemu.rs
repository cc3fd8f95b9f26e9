//! Booting a lab: qemu with the hypervisor as its kernel, until dom0 powers off.

use std::io::{Read as _, Seek as _, SeekFrom};
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

/// Boot the lab, show what becomes of the scenarios, wait until it powers off.
///
/// # Errors
///
/// qemu fails, dom0 does not come up, or it takes longer than `limit` seconds. The
/// console is in the share's output.
pub(super) fn boot(lab: &Lab, share: &Share, limit: u64) -> Result<()> {
    let console = share.output.join(CONSOLE);
    let child = qemu(lab, share)
        .into_command()
        .spawn()
        .context("cannot start qemu")?;
    let mut machine = Machine(child);
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

/// Print the results from octet `from` on; up to where.
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

fn qemu(lab: &Lab, share: &Share) -> Invocation {
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
    Invocation::new("qemu-system-x86_64")
        .args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=single",
            "-cpu",
            PROCESSOR,
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
        .arg(given(&share.output, "out"))
}
