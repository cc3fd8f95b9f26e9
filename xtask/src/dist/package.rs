//! The installed tree, packed as a tarball and as a Debian package.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::command::Invocation;
use crate::workspace;

/// Directory of the documents below the root.
pub(super) const DOC: &str = "usr/share/doc/xsr";

/// The version of all packages of the workspace.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Puts man pages, completions and documents where Debian has them. The binaries are already there.
pub(super) fn lay_out(root: &Path, man: &Path, completions: &Path) -> Result<()> {
    let section = root.join("usr/share/man/man1");
    copy_all(man, &section)?;
    for page in listed(&section)? {
        // -n: no time stamp, so that the same source gives the same package.
        Invocation::new("gzip").arg("-9n").arg(&page).run()?;
    }
    for (from, to) in [
        ("xsr.bash", "usr/share/bash-completion/completions/xsr"),
        ("_xsr", "usr/share/zsh/vendor-completions/_xsr"),
        ("xsr.fish", "usr/share/fish/vendor_completions.d/xsr.fish"),
    ] {
        copy(&completions.join(from), &root.join(to))?;
    }
    let source = workspace::root();
    let doc = root.join(DOC);
    for document in listed(&source.join("docs"))? {
        if document.extension().is_some_and(|e| e == "md") {
            let name = document.file_name().unwrap_or_default();
            copy(&document, &doc.join("docs").join(name))?;
        }
    }
    for name in ["README.md", "CHANGELOG.md", "LICENSE-MIT", "LICENSE-APACHE"] {
        copy(&source.join(name), &doc.join(name))?;
    }
    fs::write(doc.join("copyright"), COPYRIGHT)?;
    modes(root)
}

/// Where xenopsd looks for the emu-manager that a VM's `platform:emu-manager=xsr` names.
const FOR_XAPI: &str = "usr/lib/xapi/alternatives/emu-manager/xsr";

/// Let xenopsd find the emu-manager.
pub(super) fn link_for_xapi(root: &Path) -> Result<()> {
    let link = root.join(FOR_XAPI);
    if let Some(directory) = link.parent() {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    std::os::unix::fs::symlink("../../../../bin/xsr-emu-manager", &link)
        .with_context(|| format!("cannot make {}", link.display()))
}

/// In the form that Debian reads.
const COPYRIGHT: &str = "\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: xsr

Files: *
Copyright: the authors of xsr
License: Expat or Apache-2.0
 The texts are in LICENSE-MIT and LICENSE-APACHE beside this file (Apache-2.0 also in
 /usr/share/common-licenses/Apache-2.0). The crates that are linked into the binaries, with
 their licences, are in third-party-licences.txt.
";

/// Packs the tree as a tarball that unpacks over `/`, reproducible for a commit. `/` itself is not in
/// it: tar would change its mode and owner.
pub(super) fn tarball(dist: &Path, root: &Path) -> Result<PathBuf> {
    let to = dist.join(format!("xsr-{VERSION}-x86_64-linux.tar.gz"));
    let entries = listed(root)?;
    let entries = entries.iter().filter_map(|entry| entry.file_name());
    Invocation::new("tar")
        .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg(format!("--mtime=@{}", date()))
        .arg("--use-compress-program=gzip -9n")
        .arg("--directory")
        .arg(root)
        .arg("--create")
        .arg("--file")
        .arg(&to)
        .args(entries)
        .run()?;
    Ok(to)
}

/// Packs the tree as a Debian package; `None` if dpkg-deb is missing.
pub(super) fn deb(dist: &Path, root: &Path) -> Result<Option<PathBuf>> {
    if !Invocation::new("dpkg-deb").arg("--version").succeeds() {
        return Ok(None);
    }
    let tree = super::empty(dist.join("deb"))?;
    Invocation::new("cp")
        .arg("--archive")
        .arg(root.join("usr"))
        .arg(&tree)
        .run()?;
    let doc = tree.join(DOC);
    Invocation::new("gzip")
        .arg("-9n")
        .arg(doc.join("CHANGELOG.md"))
        .run()?;
    fs::rename(doc.join("CHANGELOG.md.gz"), doc.join("changelog.gz"))?;
    let installed_kib = size(&tree)?.div_ceil(1024);
    let control = tree.join("DEBIAN/control");
    fs::create_dir_all(tree.join("DEBIAN"))?;
    fs::write(&control, control_file(installed_kib))
        .with_context(|| control.display().to_string())?;
    modes(&tree)?;
    let to = dist.join(format!("xsr_{VERSION}_amd64.deb"));
    Invocation::new("dpkg-deb")
        .args(["--build", "--root-owner-group", "-Zxz"])
        .env("SOURCE_DATE_EPOCH", date())
        .arg(&tree)
        .arg(&to)
        .run()?;
    Ok(Some(to))
}

fn control_file(installed_kib: u64) -> String {
    format!(
        "\
Package: xsr
Version: {VERSION}
Architecture: amd64
Maintainer: the authors of xsr <xsr@invalid>
Installed-Size: {installed_kib}
Section: admin
Priority: optional
Suggests: xen-utils
Description: save, restore, migrate and inspect Xen domains and their images
 xsr reads and writes the images of saved Xen domains (xl, libvirt, xapi, legacy),
 verifies, compares, converts and exports them, and saves, restores and migrates
 domains. xsr-save-helper stands in for libxl-save-helper under an unmodified xl,
 xsr-emu-manager for the emu-manager of xapi.
 The binaries are static and need no library of the host.
"
    )
}

/// The time of the current commit, in seconds since 1970; 0 outside a checkout.
fn date() -> String {
    let said = Invocation::new("git").args(["log", "-1", "--format=%ct"]);
    said.capture()
        .map_or_else(|_| "0".to_owned(), |date| date.trim().to_owned())
}

/// Sets modes: directories and programs 0755, other files 0644, whatever the umask was.
fn modes(root: &Path) -> Result<()> {
    // A link has no mode, and nothing of its own to be counted.
    for path in listed(root)?.into_iter().filter(|path| !path.is_symlink()) {
        let runs = path.parent().is_some_and(|dir| dir.ends_with("usr/bin"));
        let mode = if path.is_dir() || runs { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        if path.is_dir() {
            modes(&path)?;
        }
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Total size of the files below `root`.
fn size(root: &Path) -> Result<u64> {
    let mut bytes = 0;
    for path in listed(root)?.into_iter().filter(|path| !path.is_symlink()) {
        bytes += if path.is_dir() {
            size(&path)?
        } else {
            fs::metadata(&path)?.len()
        };
    }
    Ok(bytes)
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    for file in listed(from)? {
        copy(&file, &to.join(file.file_name().unwrap_or_default()))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::copy(from, to)
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
    Ok(())
}

fn listed(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
    let mut paths = Vec::new();
    for entry in entries {
        paths.push(entry?.path());
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_tarball_does_not_touch_the_root_directory() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/xsr"), "").unwrap();
        let tarball = tarball(dir.path(), &root).unwrap();
        let listed = Invocation::new("tar")
            .arg("--list")
            .arg("--file")
            .arg(tarball);
        assert_eq!(listed.capture().unwrap(), "usr/\nusr/bin/\nusr/bin/xsr\n");
    }
}
