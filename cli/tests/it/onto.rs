//! `save --onto`: an image that shares pages with another one.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::migration::domains;
use crate::common::{arg, backend, host_with, run, scratch};

/// A mounted file system; unmounted on drop.
struct Mounted {
    point: PathBuf,
    _directory: tempfile::TempDir,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg(&self.point).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

fn ran(program: &str, arguments: &[&str]) -> Result<(), String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}

/// A new file system in a file, over a loop device. Needs root and its tools.
fn mount(make: &str) -> Result<Mounted, String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("only root can mount".to_owned());
    }
    let directory = scratch();
    let [device, point] = ["device", "point"].map(|name| directory.path().join(name));
    fs::create_dir(&point).unwrap();
    File::create(&device).unwrap().set_len(320 << 20).unwrap();
    ran(make, &["-q", arg(&device)])?;
    ran("mount", &["-o", "loop", arg(&device), arg(&point)])?;
    Ok(Mounted {
        point,
        _directory: directory,
    })
}

/// Bytes in use, after everything has been written.
fn used(point: &Path) -> u64 {
    let root = File::open(point).unwrap();
    rustix::fs::syncfs(&root).unwrap();
    let room = rustix::fs::fstatvfs(&root).unwrap();
    (room.f_blocks - room.f_bfree) * room.f_frsize
}

/// Saves onto a base with and without page digests, on this file system.
fn shares(make: &str) {
    let mounted = match mount(make) {
        Ok(mounted) => mounted,
        Err(why) => {
            eprintln!("SKIPPED: --onto was not tried with {make}: {why}");
            return;
        }
    };
    for (kind, digests) in [("pv", true), ("pvh", true), ("pvh", false)] {
        let dir = scratch();
        let host = host_with(kind, dir.path());
        let to = backend(&host);
        let [base, new, whole] = ["base", "new", "whole"].map(|name| mounted.point.join(name));
        let save = ["save", &to, "-c", "--layout", "mapped", "web", arg(&base)];
        let with = match digests {
            true => &["--page-digests"][..],
            false => &[],
        };
        run([&save[..], with].concat()).code(0);
        // The guest changes a few pages while the next save runs.
        let work = ["mock", "workload", "web", "--host", arg(&host)];
        let writes = ["--dirty-rate", "50000", "--working-set", "1M"];
        run([&work[..], &writes].concat()).code(0);
        run(["save", &to, "-c", "--live", "web", "/dev/null"]).code(0);
        run(work).code(0);
        let before = used(&mounted.point);
        let line = [
            "save",
            &to,
            "-c",
            "--onto",
            arg(&base),
            "--json",
            "web",
            arg(&new),
        ];
        let report = run(line).code(0).json();
        let taken = used(&mounted.point).saturating_sub(before);
        let [shared, written] = ["shared_pages", "written_pages"].map(|key| &report[key]);
        let [shared, written] = [shared, written].map(|pages| pages.as_u64().unwrap());
        assert!(written > 0 && shared > 5 * written, "{kind}: {report}");
        run(["verify", "--deep", arg(&new)]).code(0);
        // It is what a save without a base writes, and does not need the base.
        let line = [
            "save",
            &to,
            "-c",
            "--layout",
            "mapped",
            "--page-digests",
            "web",
        ];
        run([&line[..], &[arg(&whole)]].concat()).code(0);
        let whole_taken = used(&mounted.point) - before - taken;
        assert!(
            taken + (10 << 20) < whole_taken,
            "{make}, {kind}: {taken} of {whole_taken} bytes"
        );
        fs::remove_file(&base).unwrap();
        assert!(
            fs::read(&new).unwrap() == fs::read(&whole).unwrap(),
            "{kind}"
        );
        // A live one, too, is what its index says.
        let line = [
            "save",
            &to,
            "-c",
            "--live",
            "--onto",
            arg(&new),
            "web",
            arg(&base),
        ];
        run(line).code(0);
        run(["verify", "--deep", arg(&base)]).code(0);
        run(["diff", arg(&new), arg(&base)]).code(0);
        [base, new, whole]
            .iter()
            .for_each(|file| fs::remove_file(file).unwrap());
    }
}

#[test]
fn an_image_shares_what_has_not_changed_on_xfs() {
    shares("mkfs.xfs");
}

#[test]
fn an_image_shares_what_has_not_changed_on_btrfs() {
    shares("mkfs.btrfs");
}

#[test]
fn a_base_that_cannot_be_shared_is_refused_before_the_domain_is_touched() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let to = backend(&host);
    let [base, plain, new] = ["base", "plain", "new"].map(|name| dir.path().join(name));
    let save = ["save", &to, "-c", "--layout"];
    run([&save[..], &["mapped", "web", arg(&base)]].concat()).code(0);
    run([&save[..], &["stream", "web", arg(&plain)]].concat()).code(0);
    let onto = |base: &str, options: &[&str], new: &Path| {
        let line = ["save", &to, "-c", "--onto", base];
        let ran = run([&line[..], options, &["web", arg(new)]].concat());
        assert_eq!(domains(&host), ["web running"]);
        ran
    };
    // /proc is on no file system that this directory is on.
    let refused = onto("/proc/version", &[], &new);
    assert_ne!(refused.code, 0, "{}", refused.stderr);
    onto(arg(&plain), &[], &new)
        .code(64)
        .stderr_has("not a mapped image, whose pages have places");
    onto(arg(&base), &["--layout", "stream"], &new)
        .code(64)
        .stderr_has("--onto is for --layout mapped");
    onto(arg(&base), &["--compress", "zstd"], &new)
        .code(64)
        .stderr_has("nor with --onto, which implies it");
    onto(arg(&base), &[], &base).code(64).stderr_has("base");
    onto(arg(&dir.path().join("none")), &[], &new).code(1);
    let mut damaged = fs::read(&base).unwrap();
    let at = damaged.len() - 200;
    damaged[at] ^= 1;
    fs::write(&plain, damaged).unwrap();
    onto(arg(&plain), &[], &new).code(2);
    assert!(!new.exists());
    // Another file system than the base's never shares.
    let elsewhere = Path::new("/dev/shm").join(format!("xsr-onto-{}", std::process::id()));
    let ran = onto(arg(&base), &[], &elsewhere);
    ran.code(64)
        .stderr_has("put both images on the same XFS or Btrfs");
    assert!(!elsewhere.exists());
}
