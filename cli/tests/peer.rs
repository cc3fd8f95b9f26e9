//! Xen's own `verify-stream-v2` accepts what `xsr save` writes for domains of every
//! kind, and so does `xsr verify`.
//!
//! Needs the unpacked package `xen-utils-4.17` (`cargo xtask peer-tools`), whose folder
//! `XSR_PEER_TOOLS` names, and python3.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

fn xsr(args: &[&str]) {
    let output = Command::new(env!("CARGO_BIN_EXE_xsr"))
        .args(args)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "xsr {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// What Xen's script prints of an image that it accepts.
fn xen_verifies(tools: &Path, image: &Path) -> String {
    let output = Command::new("python3")
        .arg(tools.join("usr/lib/xen-4.17/bin/verify-stream-v2"))
        .args(["-v", "-f", "xl", "-i"])
        .arg(image)
        .env("PYTHONPATH", tools.join("usr/lib/xen-4.17/lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}: {said}{}",
        image.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

#[test]
fn xens_script_accepts_what_the_mock_machine_saved() {
    let Some(tools) = std::env::var_os("XSR_PEER_TOOLS").map(PathBuf::from) else {
        eprintln!(
            "SKIPPED: XSR_PEER_TOOLS is not set, so nothing was compared with Xen's \
             verify-stream-v2; `cargo xtask peer-tools` fetches it"
        );
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let host = scratch.path().join("host");
    let backend = format!("mock:{}", host.display());
    for (kind, type_name, is_pv) in [
        ("pv", "x86 PV", true),
        ("pv32", "x86 PV", true),
        ("hvm", "x86 HVM", false),
        ("pvh", "x86 HVM", false),
    ] {
        for vcpus in [1, 3] {
            let name = format!("{kind}-{vcpus}");
            let image = scratch.path().join(format!("{name}.save"));
            let (host, file) = (host.to_str().unwrap(), image.to_str().unwrap());
            let count = vcpus.to_string();
            xsr(&[
                "mock", "create", &name, "--host", host, "--type", kind, "--memory", "12M",
                "--vcpus", &count,
            ]);
            xsr(&["save", "--backend", &backend, &name, file]);
            xsr(&["verify", file]);
            let said = xen_verifies(&tools, &image);
            assert!(
                said.contains(&format!("Domain Header: {type_name} from Xen 4.17")),
                "{said}"
            );
            assert!(said.contains("Libxl Record: End"), "{said}");
            let contexts = said.matches("Libxc Record: x86 PV vcpu basic").count();
            assert_eq!(contexts, if is_pv { vcpus } else { 0 }, "{said}");
        }
    }
}
