//! Files shared with a boot of the lab: scripts, guests and our binaries as input, logs and results
//! as output.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::build::{Lab, executable, source};
use super::scenario::Scenario;
use crate::command::Invocation;
use crate::dist;
use crate::helper;
use crate::workspace;

/// How the guests are compiled: freestanding, at fixed addresses, no vector registers.
const GUEST_FLAGS: [&str; 19] = [
    "-O2",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-std=gnu11",
    "-ffreestanding",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-fno-pic",
    "-mgeneral-regs-only",
    "-fno-stack-protector",
    "-fcf-protection=none",
    "-fno-builtin",
    "-fno-asynchronous-unwind-tables",
    "-Wl,--build-id=none",
    "-Wl,-N",
    "-Wl,--no-warn-rwx-segments",
    "-Wl,-z,noexecstack",
];

/// The two directories, and their hypervisor.
#[derive(Debug)]
pub(super) struct Share {
    /// The hypervisor that qemu boots.
    pub(super) hypervisor: PathBuf,
    /// The input, which dom0 sees read-only.
    pub(super) input: PathBuf,
    /// The output, which dom0 writes.
    pub(super) output: PathBuf,
    /// A directory that two hosts both see and write, to find each other, and to tell when all is
    /// done.
    pub(super) common: Option<PathBuf>,
    /// The commit of the code that runs there, from [`workspace::commit`].
    pub(super) commit: Option<String>,
}

/// The role of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The host that runs the scenarios.
    Near,
    /// The host to which guests are moved.
    Far,
}

impl Share {
    /// Builds our binaries and the guests, and lays them out for a boot of the lab's `hypervisor`.
    /// Each hypervisor has its own directory of logs.
    pub(super) fn prepare(lab: &Lab, hypervisor: &Path, profile: &str) -> Result<Self> {
        Self::make(lab, hypervisor, profile, "")
    }

    /// The same for one of two hosts, which share the directory `common`. Each has its own
    /// directories, even if both belong to the same lab.
    pub(super) fn of_two(
        lab: &Lab,
        hypervisor: &Path,
        profile: &str,
        role: Role,
        common: &Path,
    ) -> Result<Self> {
        let name = match role {
            Role::Near => "near",
            Role::Far => "far",
        };
        let mut share = Self::make(lab, hypervisor, profile, &format!("-{name}"))?;
        std::fs::write(share.input.join("role"), name)?;
        share.common = Some(common.to_owned());
        Ok(share)
    }

    fn make(lab: &Lab, hypervisor: &Path, profile: &str, suffix: &str) -> Result<Self> {
        let name = hypervisor.file_name().unwrap_or_default().to_string_lossy();
        let output = format!("{}{suffix}", name.replacen("xen", "out", 1));
        let share = Self {
            hypervisor: hypervisor.to_owned(),
            input: lab.file(&format!("in{suffix}")),
            output: lab.file(&output),
            common: None,
            commit: workspace::commit(),
        };
        for dir in [&share.input, &share.output] {
            if dir.exists() {
                std::fs::remove_dir_all(dir)?;
            }
            std::fs::create_dir_all(dir)?;
        }
        for script in [
            "start",
            "lib",
            "scenarios",
            "findings",
            "commands",
            "two-hosts",
            "play-libxl",
            "measure-helper",
        ] {
            share.put(&source("dom0").join(script), script)?;
            executable(&share.input.join(script))?;
        }
        share.put(&lab.file("VERSIONS"), "VERSIONS")?;
        share.guests()?;
        share.binaries(profile)?;
        Ok(share)
    }

    fn put(&self, from: &Path, name: &str) -> Result<()> {
        std::fs::copy(from, self.input.join(name))
            .with_context(|| format!("cannot copy {}", from.display()))?;
        Ok(())
    }

    fn guests(&self) -> Result<()> {
        let sources = ["start.S", "guest.c"].map(|name| source("guest").join(name));
        let script = format!("-Wl,-T,{}", source("guest/guest.lds").display());
        let wide: [&str; 2] = ["-mno-red-zone", "-mcmodel=small"];
        for (name, flags) in [("guest", &wide[..]), ("guest32", &["-m32"])] {
            Invocation::new("gcc")
                .args(flags)
                .args(GUEST_FLAGS)
                .arg(&script)
                .args(&sources)
                .arg("-o")
                .arg(self.input.join(name))
                .run()?;
        }
        self.firmware()
    }

    /// Builds the 64-bit guest as the firmware of an HVM guest.
    fn firmware(&self) -> Result<()> {
        let (guest, bytes) = (self.input.join("guest"), self.input.join("guest.bytes"));
        Invocation::new("objcopy")
            .args(["-O", "binary"])
            .args([&guest, &bytes])
            .run()?;
        Invocation::new("gcc")
            .args(GUEST_FLAGS)
            .args(["-Wl,-Ttext=0xf0000", "-Wl,--oformat=binary"])
            .arg(format!("-Wl,--just-symbols={}", guest.display()))
            .arg(format!("-DPAYLOAD=\"{}\"", bytes.display()))
            .arg(source("guest").join("bios.S"))
            .arg("-o")
            .arg(self.input.join("guest-bios"))
            .run()
    }

    fn binaries(&self, profile: &str) -> Result<()> {
        for name in ["xsr", helper::NAME] {
            self.put(&dist::build(name, name, profile)?, name)?;
        }
        Ok(())
    }

    /// Requests these scenarios.
    pub(super) fn scenarios(&self, scenarios: &[Scenario]) -> Result<()> {
        let mut wanted = String::new();
        for scenario in scenarios {
            writeln!(wanted, "{} {}", scenario.kind, scenario.guest)?;
        }
        std::fs::write(self.input.join("wanted"), wanted)?;
        Ok(())
    }

    /// Requests that the images in a directory be restored.
    pub(super) fn images(&self, dir: &Path) -> Result<()> {
        let wanted = self.input.join("wanted");
        let mut lines = std::fs::read_to_string(&wanted)?;
        let before = lines.len();
        let entries =
            std::fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter_map(|name| name.strip_suffix(".save.zst").map(str::to_owned))
            .collect();
        names.sort();
        for name in names {
            self.put(
                &dir.join(format!("{name}.save.zst")),
                &format!("{name}.zst"),
            )?;
            writeln!(lines, "image {name}\nimage_ours {name}")?;
        }
        ensure!(
            lines.len() > before,
            "{} has no NAME.save.zst",
            dir.display()
        );
        std::fs::write(wanted, lines)?;
        Ok(())
    }

    /// The requested scenarios: kind and guest.
    pub(super) fn wanted(&self) -> Result<Vec<(String, String)>> {
        let text = std::fs::read_to_string(self.input.join("wanted"))?;
        Ok(text
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(kind, guest)| (kind.to_owned(), guest.to_owned()))
            .collect())
    }
}
