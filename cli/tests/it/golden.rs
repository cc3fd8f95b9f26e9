//! Output for users, word for word: help texts and failures (trycmd, `cmd/*.trycmd`), and what
//! inspect, verify and diff print about images of a real Xen (`golden/`).
//!
//! After an intended change: `TRYCMD=overwrite` and `XSR_BLESS=1`, then read the difference.

use std::fs;
use std::path::Path;

use crate::common::{images, xsr};

#[test]
fn help_and_usage() {
    trycmd::TestCases::new()
        .default_bin_path(env!("CARGO_BIN_EXE_xsr"))
        .env("COLUMNS", "100")
        .env("LC_ALL", "C.UTF-8")
        .case("tests/cmd/*.trycmd");
}

/// Run with the images as working directory, and compare stdout with the file.
#[track_caller]
fn golden(name: &str, code: i32, args: &[&str]) {
    let output = xsr(args).current_dir(images()).output().unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stdout}");
    assert!(
        output.stderr.is_empty(),
        "stderr is not a terminal, so it stays quiet"
    );
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.txt"));
    if std::env::var_os("XSR_BLESS").is_some() {
        fs::write(&path, &stdout).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        stdout == expected,
        "{} is not what came (XSR_BLESS=1 takes it over):\n{stdout}",
        path.display()
    );
}

#[test]
fn inspect_pv() {
    golden("inspect-tpv", 0, &["inspect", "4.17-tpv.save"]);
}

#[test]
fn inspect_pvh() {
    golden("inspect-tpvh", 0, &["inspect", "4.17-tpvh.save"]);
}

#[test]
fn inspect_json() {
    golden(
        "inspect-tpv.json",
        0,
        &["inspect", "--json", "4.17-tpv.save"],
    );
}

#[test]
fn inspect_pages_of_a_live_save() {
    let args = ["inspect", "--pages", "4.17-tpv-live.save"];
    golden("inspect-pages-tpv-live", 0, &args);
}

#[test]
fn verify_all() {
    let args = [
        "verify",
        "4.17-tpv.save",
        "4.17-tpv-live.save",
        "4.17-tpvh.save",
        "4.17-tpvh-live.save",
    ];
    golden("verify", 0, &args);
    let mut json = args.to_vec();
    json.insert(1, "--json");
    golden("verify.json", 0, &json);
}

#[test]
fn diff_of_two_guests() {
    let args = ["diff", "4.17-tpv.save", "4.17-tpv-live.save"];
    golden("diff-tpv-tpv-live", 1, &args);
    let args = [
        "diff",
        "--after-restore",
        "4.17-tpvh.save",
        "4.17-tpvh-live.save",
    ];
    golden("diff-tpvh-tpvh-live", 1, &args);
    let args = ["diff", "--json", "4.17-tpvh.save", "4.17-tpvh-live.save"];
    golden("diff-tpvh-tpvh-live.json", 1, &args);
}

#[test]
fn diff_of_one_guest_with_itself() {
    let args = ["diff", "4.17-tpv.save", "4.17-tpv.save"];
    golden("diff-same", 0, &args);
}
