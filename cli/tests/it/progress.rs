//! `--progress-fd`: lines of JSON for a program that follows a save or restore.

use std::fs;
use std::process::{Command, Stdio};

use crate::common::{arg, backend, host_with, run, scratch, state};

#[test]
fn progress_goes_to_a_descriptor() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let lines = dir.path().join("lines");
    fs::write(&lines, "before\n").unwrap();
    let image = dir.path().join("a.save");
    let sh = |command: &str| {
        let script = format!(
            "exec {} \"$@\" --progress-fd 7 7>>\"$0\"",
            env!("CARGO_BIN_EXE_xsr")
        );
        let output = Command::new("sh")
            .args(["-c", &script, arg(&lines)])
            .args(command.split(' '))
            .output()
            .unwrap();
        let text = fs::read_to_string(&lines).unwrap();
        fs::write(&lines, "before\n").unwrap();
        let mut said = text.lines();
        assert_eq!(said.next(), Some("before"), "what was there stays");
        let said: Vec<serde_json::Value> = said
            .map(|line| serde_json::from_str(line).unwrap())
            .inspect(|line: &serde_json::Value| assert_eq!(line["version"], 2))
            .collect();
        (output.status.code(), said)
    };
    let last = |lines: &[serde_json::Value]| lines.last().unwrap().clone();
    let phases = |lines: &[serde_json::Value]| {
        let mut phases: Vec<String> = lines
            .iter()
            .filter(|line| line["event"] == "progress")
            .map(|line| line["phase"].as_str().unwrap().to_owned())
            .collect();
        phases.dedup();
        phases
    };
    let at = backend(&host);
    let (code, said) = sh(&format!("save --live {at} web {}", arg(&image)));
    assert_eq!(code, Some(0));
    let expected = ["setup", "precopy", "suspend", "stop_and_copy", "tail"];
    assert_eq!(phases(&said), expected);
    assert_eq!(
        (&last(&said)["event"], &last(&said)["code"]),
        (&"end".into(), &0.into())
    );
    let pages = said
        .iter()
        .rev()
        .find(|line| line["phase"] == "precopy")
        .unwrap();
    assert_eq!(pages["pages_done"], pages["pages_total"]);
    let (code, said) = sh(&format!("restore {at} {}", arg(&image)));
    assert_eq!(
        (code, phases(&said)),
        (
            Some(0),
            ["setup", "pages", "tail"].map(str::to_owned).to_vec()
        )
    );
    let (code, said) = sh(&format!("save {at} absent {}", arg(&image)));
    assert_eq!((code, &last(&said)["code"]), (Some(1), &1.into()));
    assert!(last(&said)["error"].as_str().unwrap().contains("absent"));
    // This descriptor is not open.
    run(["save", "--progress-fd", "77", &at, "web", arg(&image)])
        .code(64)
        .stderr_has("--progress-fd 77");
    assert_eq!(state(&host, "web").as_deref(), Some("running"));
}

#[test]
fn whoever_does_not_read_the_progress_holds_nothing_up() {
    let dir = scratch();
    let host = host_with("pv", dir.path());
    let workload = [
        "mock",
        "workload",
        "web",
        "--dirty-rate",
        "100000",
        "--host",
    ];
    run(workload.iter().chain(&[arg(&host)])).code(0);
    let image = dir.path().join("a.save");
    let (reader, writer) = nix::unistd::pipe().unwrap();
    // Room for one page of lines, which are never read.
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
    let status = Command::new("sh")
        .args([
            "-c",
            &format!(
                "exec {} save --live {} web {} --progress-fd 1",
                env!("CARGO_BIN_EXE_xsr"),
                backend(&host),
                arg(&image)
            ),
        ])
        .stdout(Stdio::from(writer))
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0));
    let mut bytes = vec![0; 8192];
    let n = nix::unistd::read(&reader, &mut bytes).unwrap();
    let text = String::from_utf8(bytes[..n].to_vec()).unwrap();
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).unwrap();
    }
}
