//! Xen's own `verify-stream-v2` accepts what we write: saves of mock domains of every
//! kind, and real images that went through the mock machine.
//!
//! Needs the unpacked package `xen-utils-4.17` (`cargo xtask peer-tools`); its folder
//! is named by `XSR_PEER_TOOLS`. What the script and we say of damaged images is
//! compared in `format/tests/peer_verify.rs`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{arg, backend, create, image, run, scratch};

/// Where the script's package is, if it is; says why if not.
fn tools() -> Option<PathBuf> {
    let tools = std::env::var_os("XSR_PEER_TOOLS").map(PathBuf::from);
    if tools.is_none() {
        eprintln!(
            "SKIPPED: XSR_PEER_TOOLS is not set, so Xen's verify-stream-v2 has not seen \
             what we write; `cargo xtask peer-tools` fetches it"
        );
    }
    tools
}

/// Both accept the image.
#[track_caller]
fn accepted(tools: &Path, image: &Path) {
    run(["verify", arg(image)]).code(0);
    let output = Command::new("python3")
        .arg(tools.join("usr/lib/xen-4.17/bin/verify-stream-v2"))
        .args(["-v", "-f", "xl", "-i", arg(image)])
        .env("PYTHONPATH", tools.join("usr/lib/xen-4.17/lib/python"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("Libxl Record: End"), "{said}");
}

#[test]
fn saves_of_mock_domains() {
    let Some(tools) = tools() else {
        return;
    };
    for kind in ["pv", "pv32", "hvm", "pvh"] {
        let dir = scratch();
        let host = dir.path().join("host");
        create(&host, "web", kind);
        let image = dir.path().join("web.save");
        run(["save", &backend(&host), "web", arg(&image)]).code(0);
        accepted(&tools, &image);
        run(["restore", &backend(&host), arg(&image)]).code(0);
        let again = dir.path().join("again.save");
        run(["save", "-c", &backend(&host), "web", arg(&again)]).code(0);
        accepted(&tools, &again);
    }
}

#[test]
fn real_images_that_went_through_the_mock() {
    let Some(tools) = tools() else {
        return;
    };
    for name in ["tpv", "tpv-live", "tpvh", "tpvh-live"] {
        let dir = scratch();
        let host = dir.path().join("host");
        let restored = run(["restore", &backend(&host), arg(&image(name))]).code(0);
        let domains = run(["mock", "list", "--json", "--host", arg(&host)])
            .code(0)
            .json();
        let domain = domains[0]["name"].as_str().unwrap_or_else(|| {
            panic!("no name in {domains} after {restored:?}");
        });
        let again = dir.path().join("again.save");
        run(["save", &backend(&host), domain, arg(&again)]).code(0);
        accepted(&tools, &again);
    }
}
