//! Building a lab: turns packages of one Debian suite into a hypervisor, a dom0 kernel with its
//! modules, an initial ramdisk and a root disk.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::apt::Apt;
use super::host;
use super::kernel;
use crate::command::Invocation;
use crate::workspace;

/// Increased when the build changes, so that a lab of an older recipe is not used.
const RECIPE: &str = "2";

/// Programs of this machine that are needed to build and boot, and the Debian packages that have
/// them.
pub(super) const PROGRAMS: &[(&str, &str)] = &[
    ("apt-get", "apt"),
    ("dpkg-deb", "dpkg"),
    ("tar", "tar"),
    ("gzip", "gzip"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("cpio", "cpio"),
    ("depmod", "kmod"),
    ("mke2fs", "e2fsprogs"),
    ("gcc", "gcc"),
    ("qemu-system-x86_64", "qemu-system-x86"),
];

/// Modules that dom0 loads; their dependencies are included.
const MODULES: [&str; 17] = [
    "virtio_pci",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "9p",
    "9pnet_virtio",
    "loop",
    "tun",
    "xen-evtchn",
    "xen-gntdev",
    "xen-gntalloc",
    "xen-privcmd",
    "xenfs",
    "xen-blkback",
    "virtio_console",
    "virtio_net",
    "nbd",
];

/// A lab that can be booted.
#[derive(Debug)]
pub(super) struct Lab {
    dir: PathBuf,
}

impl Lab {
    /// The lab of a suite, built if it does not exist yet.
    ///
    /// # Errors
    ///
    /// A program is missing, or the packages cannot be downloaded.
    pub(super) fn build(suite: &str) -> Result<Self> {
        if suite.is_empty() || !suite.chars().all(|c| c.is_ascii_lowercase()) {
            bail!("{suite:?} is not the name of a Debian suite");
        }
        let lab = Self {
            dir: workspace::root().join("target/lab").join(suite),
        };
        host::need(PROGRAMS)?;
        if lab.is_whole() {
            return Ok(lab);
        }
        lab.make(suite)
            .with_context(|| format!("the lab of {suite} cannot be built"))?;
        std::fs::write(lab.file("recipe"), RECIPE)?;
        Ok(lab)
    }

    /// The lab of a suite, if it has been built.
    pub(super) fn built(suite: &str) -> Option<Self> {
        let lab = Self {
            dir: workspace::root().join("target/lab").join(suite),
        };
        lab.is_whole().then_some(lab)
    }

    /// The suites whose labs have been built.
    pub(super) fn suites() -> Result<Vec<String>> {
        let mut suites = Vec::new();
        let labs = match std::fs::read_dir(workspace::root().join("target/lab")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(suites),
            labs => labs?,
        };
        for entry in labs {
            suites.push(entry?.file_name().to_string_lossy().into_owned());
        }
        suites.sort();
        Ok(suites)
    }

    fn is_whole(&self) -> bool {
        std::fs::read_to_string(self.file("recipe")).is_ok_and(|r| r == RECIPE)
    }

    /// A file of the lab: `xen`, `vmlinux`, `initrd.img`, `root.ext4` or `VERSIONS`.
    pub(super) fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Packages and versions that matter, for display.
    pub(super) fn describe(&self) -> Result<String> {
        let versions = std::fs::read_to_string(self.file("VERSIONS"))?;
        let mut text = format!("{}\n", self.dir.display());
        for line in versions.lines() {
            let matters = [
                "xen-hypervisor-",
                "xen-utils-",
                "linux-image-",
                "qemu-system-",
            ];
            if matters.iter().any(|prefix| line.starts_with(prefix)) {
                writeln!(text, "  {line}")?;
            }
        }
        Ok(text.trim_end().to_owned())
    }

    /// The hypervisor's version, from its package's name: `4.17`.
    pub(super) fn xen_version(&self) -> Result<String> {
        let versions = std::fs::read_to_string(self.file("VERSIONS"))?;
        let names: Vec<String> = versions
            .lines()
            .filter_map(|line| line.split(' ').next())
            .map(str::to_owned)
            .collect();
        newest_xen(&names).context("VERSIONS names no hypervisor")
    }

    fn make(&self, suite: &str) -> Result<()> {
        std::fs::create_dir_all(&self.dir)?;
        let apt = Apt::open(&self.file("apt"), "deb", suite)?;
        let xen = newest_xen(&apt.names("xen-hypervisor-")?)
            .with_context(|| format!("{suite} has no Xen for amd64"))?;
        let packages = [
            &format!("xen-hypervisor-{xen}-amd64"),
            &format!("xen-utils-{xen}"),
            "xen-utils-common",
            "xenstore-utils",
            "qemu-system-xen",
            "seabios",
            "ipxe-qemu",
            "linux-image-amd64",
            "busybox-static",
            "bash",
            "coreutils",
            "diffutils",
            "util-linux",
            "kmod",
            "zstd",
            // For connections between two hosts.
            "openssh-client",
            "openssh-server",
            "nbd-client",
            "nbd-server",
        ];
        let archives = apt.download(&packages.map(str::to_owned))?;

        let root = self.file("root");
        clear(&root)?;
        self.unpack(&archives, &root)?;
        gunzip(
            &root.join(format!("boot/xen-{xen}-amd64.gz")),
            &self.file("xen"),
        )?;
        let linux = kernel_release(&root)?;
        kernel::unpack(
            &root.join(format!("boot/vmlinuz-{linux}")),
            &self.file("vmlinux"),
        )?;
        let modules = self.modules(&root, &linux)?;
        self.ramdisk(&root, &modules)?;
        self.disk(&root, &modules)?;
        clear(&root)?;
        clear(&modules)?;
        // The image contains them now, and apt would fetch newer ones anyway.
        clear(&self.file("apt"))
    }

    /// Unpacks archives, as on a system where /bin is /usr/bin, and records their versions.
    fn unpack(&self, archives: &[PathBuf], root: &Path) -> Result<()> {
        for dir in ["bin", "sbin", "lib", "lib64"] {
            std::fs::create_dir_all(root.join("usr").join(dir))?;
            symlink(format!("usr/{dir}"), root.join(dir))?;
        }
        eprintln!("unpacking {} packages", archives.len());
        let mut versions = BTreeSet::new();
        for archive in archives {
            let pipe = "dpkg-deb --fsys-tarfile \"$1\" | tar -x --keep-directory-symlink -C \"$2\"";
            let status = std::process::Command::new("sh")
                .args(["-c", pipe, "sh"])
                .args([archive.as_path(), root])
                .status()?;
            if !status.success() {
                bail!("{} cannot be unpacked: {status}", archive.display());
            }
            let fields = std::process::Command::new("dpkg-deb")
                .arg("-W")
                .arg(archive)
                .output()?;
            versions.insert(String::from_utf8(fields.stdout)?.trim().replace('\t', " "));
        }
        let mut text = String::new();
        for version in versions {
            writeln!(text, "{version}")?;
        }
        std::fs::write(self.file("VERSIONS"), text)?;
        Ok(())
    }

    /// The modules that dom0 loads, with their dependencies, as a tree that `modprobe` understands.
    fn modules(&self, root: &Path, linux: &str) -> Result<PathBuf> {
        let tree = self.file("modules");
        clear(&tree)?;
        admin("depmod").arg("-b").arg(root).arg(linux).run()?;
        let shown = admin("modprobe")
            .arg("-d")
            .arg(root)
            .args(["-S", linux, "--show-depends", "-a"])
            .args(MODULES)
            .capture()?;
        let wanted: BTreeSet<PathBuf> = shown
            .lines()
            .filter_map(|line| line.strip_prefix("insmod "))
            .map(|file| PathBuf::from(file.trim()))
            .collect();
        for file in &wanted {
            let inside = file
                .strip_prefix(root)
                .context("a module outside the root")?;
            let inside = inside.strip_prefix("usr").unwrap_or(inside);
            let to = tree.join(inside);
            std::fs::create_dir_all(to.parent().context("a module without directory")?)?;
            std::fs::copy(file, &to).with_context(|| format!("no {}", file.display()))?;
        }
        for list in [
            "modules.order",
            "modules.builtin",
            "modules.builtin.modinfo",
        ] {
            let inside = Path::new("lib/modules").join(linux).join(list);
            std::fs::copy(root.join(&inside), tree.join(&inside))?;
        }
        admin("depmod").arg("-b").arg(&tree).arg(linux).run()?;
        Ok(tree)
    }

    /// Builds the initial ramdisk: busybox, modules, a script that finds the root disk.
    fn ramdisk(&self, root: &Path, modules: &Path) -> Result<()> {
        let tree = self.file("ramdisk");
        clear(&tree)?;
        for dir in ["bin", "dev", "proc", "sys", "root"] {
            std::fs::create_dir_all(tree.join(dir))?;
        }
        copy(&root.join("bin/busybox"), &tree.join("bin/busybox"))?;
        copy(&modules.join("lib"), &tree.join("lib"))?;
        copy(&source("dom0/init"), &tree.join("init"))?;
        executable(&tree.join("init"))?;
        let pipe = "cd \"$1\" && find . | LC_ALL=C sort | cpio --quiet -R 0:0 -o -H newc >\"$2\"";
        Invocation::new("sh")
            .args(["-c", pipe, "sh"])
            .arg(&tree)
            .arg(self.file("initrd.img"))
            .run()?;
        clear(&tree)
    }

    /// Builds the root disk: the packages without files that dom0 does not need.
    fn disk(&self, root: &Path, modules: &Path) -> Result<()> {
        for superfluous in [
            "boot",
            "usr/lib/modules",
            "usr/share/doc",
            "usr/share/man",
            "usr/share/info",
            "usr/share/locale",
            "usr/share/i18n",
            "usr/share/perl",
            "usr/share/perl5",
            "usr/share/zoneinfo",
            "usr/lib/x86_64-linux-gnu/perl",
            "usr/lib/x86_64-linux-gnu/perl-base",
            "usr/lib/x86_64-linux-gnu/gconv",
            "var/run",
        ] {
            let path = root.join(superfluous);
            if path.symlink_metadata().is_ok_and(|m| m.is_symlink()) {
                std::fs::remove_file(path)?;
            } else {
                clear(&path)?;
            }
        }
        copy(&modules.join("lib/modules"), &root.join("usr/lib/modules"))?;
        for dir in [
            "proc",
            "sys",
            "dev",
            "run",
            "tmp",
            "mnt/in",
            "mnt/out",
            "mnt/common",
            "root",
            "var/log/xen",
            "var/lib/xen",
            "etc",
        ] {
            std::fs::create_dir_all(root.join(dir))?;
        }
        symlink("../run", root.join("var/run"))?;
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0:root:/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/bin/false\n",
        )?;
        std::fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n")?;
        std::fs::write(
            root.join("etc/hosts"),
            "127.0.0.1 localhost\n192.0.2.1 near\n192.0.2.2 far\n",
        )?;
        let shell = root.join("usr/bin/sh");
        if shell.symlink_metadata().is_err() {
            symlink("bash", shell)?;
        }
        // Programs that no package provides separately.
        let applets = Invocation::new(root.join("bin/busybox"))
            .arg("--list")
            .capture()?;
        for applet in applets.lines() {
            let taken = ["usr/bin", "usr/sbin"]
                .iter()
                .any(|dir| root.join(dir).join(applet).symlink_metadata().is_ok());
            if !taken {
                symlink("busybox", root.join("usr/bin").join(applet))?;
            }
        }
        admin("ldconfig").arg("-r").arg(root).run()?;
        let disk = self.file("root.ext4");
        if disk.exists() {
            std::fs::remove_file(&disk)?;
        }
        admin("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
            .arg(root)
            .arg(&disk)
            // Sparse: room for images, allocated when used.
            .arg("2G")
            .run()
    }
}

/// A file of `xtask/lab`.
pub(super) fn source(name: &str) -> PathBuf {
    workspace::root().join("xtask/lab").join(name)
}

/// Finds a program that may be in a directory for administrators only.
fn admin(program: &str) -> Invocation {
    let found = ["/usr/sbin", "/sbin"]
        .iter()
        .map(|dir| Path::new(dir).join(program))
        .find(|path| path.is_file());
    Invocation::new(found.unwrap_or_else(|| program.into()))
}

/// The newest version among names like `xen-hypervisor-4.17-amd64`.
fn newest_xen(names: &[String]) -> Option<String> {
    let versions = names.iter().filter_map(|name| {
        let version = name
            .strip_prefix("xen-hypervisor-")?
            .strip_suffix("-amd64")?;
        let (major, minor) = version.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    });
    versions
        .max()
        .map(|(major, minor)| format!("{major}.{minor}"))
}

/// The release of the one kernel in `root`.
fn kernel_release(root: &Path) -> Result<String> {
    for entry in std::fs::read_dir(root.join("boot"))? {
        if let Some(release) = entry?
            .file_name()
            .to_str()
            .and_then(|n| n.strip_prefix("vmlinuz-"))
        {
            return Ok(release.to_owned());
        }
    }
    bail!("linux-image-amd64 brought no kernel")
}

fn gunzip(from: &Path, to: &Path) -> Result<()> {
    let status = Invocation::new("gzip")
        .arg("-dc")
        .arg(from)
        .into_command()
        .stdout(std::fs::File::create(to)?)
        .status()?;
    if !status.success() {
        bail!("gzip failed: {status}");
    }
    Ok(())
}

/// Copies a file or a tree, preserving links.
fn copy(from: &Path, to: &Path) -> Result<()> {
    Invocation::new("cp").arg("-a").arg(from).arg(to).run()
}

/// Makes a file executable.
pub(super) fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::set_permissions(
        path,
        std::fs::Permissions::from_mode(0o755),
    )?)
}

/// Removes a tree, if it exists.
pub(super) fn clear(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_xen_is_found_by_number() {
        let names = [
            "xen-hypervisor-4.9-amd64",
            "xen-hypervisor-4.17-amd64",
            "xen-hypervisor-4.17-amd64-dbg",
            "xen-hypervisor-common",
            "xen-hypervisor-4.17-arm64",
        ]
        .map(str::to_owned);
        assert_eq!(newest_xen(&names).as_deref(), Some("4.17"));
        assert_eq!(newest_xen(&[]), None);
    }

    #[test]
    fn only_names_of_suites_become_directories() {
        assert!(Lab::build("../x").is_err());
        assert!(Lab::build("").is_err());
    }
}
