//! Helpers for tests of the command: running it, and images to run it on.

#![allow(
    dead_code,
    unused_imports,
    clippy::unwrap_used,
    reason = "no test uses all of it; a test fails by panicking"
)]

pub(crate) mod images;
pub(crate) mod migration;
pub(crate) mod phases;

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;

pub(crate) use images::{decompress, image, images, layers, scratch};

/// The command, without environment variables that would affect it.
pub(crate) fn xsr<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xsr"));
    command
        .env_remove("XSR_BACKEND")
        .env_remove("XSR_LOG")
        .env("LC_ALL", "C.UTF-8")
        .args(args);
    command
}

/// The outcome of a run of the command.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn run<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    ran(xsr(args))
}

pub(crate) fn ran(mut command: Command) -> Ran {
    let output = command.output().unwrap();
    Ran {
        code: output.status.code().expect("it was not killed"),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Ran {
    /// Asserts this exit code, and no panic.
    #[track_caller]
    pub(crate) fn code(self, code: i32) -> Self {
        assert!(!self.stderr.contains("panicked"), "{self:?}");
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn stdout_has(self, text: &str) -> Self {
        assert!(self.stdout.contains(text), "no {text:?} in {self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn stderr_has(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "no {text:?} in {self:?}");
        self
    }

    /// Stdout as one JSON document, of the version that docs/json.md describes.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        let document: serde_json::Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"));
        assert_eq!(document["version"], 2, "{self:?}");
        document
    }
}

/// Send a process a signal by its number, because real-time signals have no name.
pub(crate) fn signal_number(process: u32, number: u32) {
    let [number, process] = [number, process].map(|n| n.to_string());
    let script = "kill -$0 $1";
    let kill = std::process::Command::new("sh")
        .args(["-c", script, &number, &process])
        .status();
    assert!(kill.unwrap().success(), "signal {number}");
}

/// A path as an argument.
pub(crate) fn arg(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The images in `XSR_IMAGES`, or those beside the workspace, decompressed into `directory`. There
/// may be none.
pub(crate) fn real_images(directory: &Path) -> Vec<PathBuf> {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/images");
    let from = std::env::var_os("XSR_IMAGES").map_or(beside, PathBuf::from);
    let Ok(entries) = fs::read_dir(&from) else {
        eprintln!("SKIPPED: no images of a real Xen in {}", from.display());
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(".save.zst"))
        .map(|path| decompress(&path, directory))
        .collect();
    paths.sort();
    paths
}

/// Create a mock host with one domain, `web`.
pub(crate) fn host_with(kind: &str, directory: &Path) -> PathBuf {
    let host = directory.join("host");
    create(&host, "web", kind);
    host
}

/// Create a small domain on a mock host.
pub(crate) fn create(host: &Path, name: &str, kind: &str) {
    run([
        "mock",
        "create",
        name,
        "--host",
        arg(host),
        "--type",
        kind,
        "--memory",
        "16M",
        "--vcpus",
        "2",
    ])
    .code(0);
}

/// The value of `--backend` for a mock host.
pub(crate) fn backend(host: &Path) -> String {
    format!("--backend=mock:{}", host.display())
}

/// A domain's state in `xsr mock list`; `None` if the domain or even the host does not exist.
pub(crate) fn state(host: &Path, name: &str) -> Option<String> {
    if !host.exists() {
        return None;
    }
    let list = run(["mock", "list", "--json", "--host", arg(host)]).code(0);
    let list = list.json();
    let domain = list["domains"]
        .as_array()
        .unwrap()
        .iter()
        .find(|d| d["name"] == name)?;
    Some(domain["state"].as_str().unwrap().to_owned())
}
