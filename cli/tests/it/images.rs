//! inspect, verify and diff on good, bad and missing images, from files and pipes: exit codes,
//! messages, and never a panic.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::{arg, image, layers, ran, run, scratch, xsr};

/// A modified copy of an image.
fn mutant(directory: &Path, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
    let mut bytes = fs::read(image(name)).unwrap();
    change(&mut bytes);
    let path = directory.join("mutant.save");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn a_truncated_image_is_bad_and_says_where() {
    let dir = scratch();
    let path = mutant(dir.path(), "tpv", |bytes| bytes.truncate(100_000));
    for command in ["verify", "inspect"] {
        let ran = run([command, arg(&path)]).code(2);
        let all = format!("{}{}", ran.stdout, ran.stderr);
        for word in ["libxc record 5 (PAGE_DATA) at byte 0x8af", "truncated"] {
            assert!(all.contains(word), "no {word} in {ran:?}");
        }
    }
    let good = image("tpv");
    run(["diff", arg(&good), arg(&path)])
        .code(2)
        .stderr_has("truncated");
}

#[test]
fn a_flipped_bit_is_named() {
    let dir = scratch();
    let path = mutant(dir.path(), "tpv", |bytes| {
        // The reserved field of the domain header.
        let (_, libxc, _) = layers(bytes);
        bytes[libxc + 24 + 6] ^= 1;
    });
    run(["verify", arg(&path)])
        .code(2)
        .stdout_has("libxc domain header")
        .stdout_has("reserved")
        .stdout_has("--lenient");
    run(["verify", "--lenient", arg(&path)]).code(0);
    run(["inspect", arg(&path)]).code(2);
    run(["inspect", "--lenient", arg(&path)]).code(0);
    let good = image("tpv");
    run(["diff", arg(&good), arg(&path)]).code(2);
    run(["diff", "--lenient", arg(&good), arg(&path)]).code(0);
}

#[test]
fn what_could_be_read_of_a_bad_image_is_shown() {
    let dir = scratch();
    let path = mutant(dir.path(), "tpvh", |bytes| {
        let end = bytes.len() - 20;
        bytes.truncate(end);
    });
    let ran = run(["inspect", "--json", arg(&path)]).code(2);
    let report = ran.json();
    assert!(report["error"].as_str().unwrap().contains("ends inside it"));
    assert_eq!(report["guest"]["name"], "tpvh");
    assert_eq!(report["pages"]["populated"], 1040);
    run(["inspect", arg(&path)])
        .code(2)
        .stdout_has("BAD")
        .stdout_has("HVM_CONTEXT")
        .stderr_has("truncated");
}

#[test]
fn what_is_no_image_says_what_it_is() {
    let dir = scratch();
    let text = dir.path().join("text");
    fs::write(&text, "not an image at all, but text").unwrap();
    run(["verify", arg(&text)])
        .code(2)
        .stdout_has("BAD")
        .stdout_has("not a saved Xen domain: it is text");
    // Zstd's magic in front of other data.
    let magic = dir.path().join("magic");
    fs::write(
        &magic,
        b"\x28\xb5\x2f\xfdnot a frame of zstd, for all that, but text",
    )
    .unwrap();
    run(["inspect", arg(&magic)]).code(2).stderr_has("zstd");
    let empty = dir.path().join("empty");
    fs::write(&empty, "").unwrap();
    run(["verify", arg(&empty)]).code(2).stdout_has("empty");
}

#[test]
fn a_missing_file_is_a_failure_and_the_others_are_still_looked_at() {
    let good = image("tpv");
    run(["verify", "/nonexistent.save", arg(&good)])
        .code(1)
        .stdout_has("good")
        .stderr_has("/nonexistent.save");
    let dir = scratch();
    let bad = mutant(dir.path(), "tpv", |bytes| bytes.truncate(10));
    run(["verify", "/nonexistent.save", arg(&bad)]).code(2);
    run(["inspect", "/nonexistent.save"]).code(1);
    run(["diff", arg(&good), "/nonexistent.save"]).code(1);
    run(["inspect", arg(dir.path())])
        .code(1)
        .stderr_has("directory");
}

#[test]
fn a_pipe_is_read_as_a_file_is() {
    let bytes = fs::read(image("tpvh-live")).unwrap();
    for command in ["verify", "inspect"] {
        let mut from_pipe = xsr([command, "--json", "-"]);
        from_pipe.write_stdin(bytes.clone());
        let mut piped = ran(from_pipe).code(0).json();
        let mut file = run([command, "--json", arg(&image("tpvh-live"))])
            .code(0)
            .json();
        // A pipe is read only to the image's end: what follows belongs to another reader.
        for report in [&mut piped, &mut file] {
            let report = report.as_object_mut().unwrap();
            report.remove("file");
            report.remove("trailing_bytes");
            report.remove("warnings");
        }
        assert_eq!(piped, file);
    }
    let mut truncated = xsr(["verify", "-"]);
    truncated.write_stdin(&bytes[..bytes.len() / 2]);
    ran(truncated).code(2).stdout_has("stdin: BAD");
}

#[test]
fn diff_wants_files() {
    let mut command = xsr(["diff", "-", arg(&image("tpv"))]);
    command.write_stdin(fs::read(image("tpv")).unwrap());
    ran(command).code(64).stderr_has("give it as a file");
}

#[test]
fn diff_finds_one_byte_of_one_page() {
    let dir = scratch();
    let path = mutant(dir.path(), "tpv", |bytes| {
        // Page 0x42 of the only batch: record header, head and 1024 entries precede it.
        bytes[0x8af + 8 + 8 + 8 * 1024 + 0x42 * 4096 + 77] ^= 0x80;
    });
    let ran = run(["diff", "--json", arg(&image("tpv")), arg(&path)]).code(1);
    let report = ran.json();
    assert_eq!(report["differ"], true);
    let differences = report["differences"].as_array().unwrap();
    assert_eq!(differences.len(), 1, "{differences:?}");
    assert_eq!(differences[0]["section"], "page_contents");
    assert_eq!(differences[0]["first_pfn"], 0x42);
    assert_eq!(differences[0]["last_pfn"], 0x42);
    run(["diff", "--after-restore", arg(&image("tpv")), arg(&path)])
        .code(1)
        .stdout_has("0x42");
}

#[test]
fn nobody_reads_on_and_nothing_breaks() {
    for args in [
        vec!["inspect", "--pages"],
        vec!["inspect", "--json", "--pages"],
    ] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_xsr"))
            .args(args)
            .arg(image("tpvh"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // Read one byte, then hang up.
        let mut stdout = child.stdout.take().unwrap();
        stdout.read_exact(&mut [0]).unwrap();
        drop(stdout);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{stderr}");
        assert_eq!(stderr, "");
    }
}

/// The exit code if stdout has no reader.
fn unread(args: &[&str]) -> Option<i32> {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_xsr"));
    let status = command.args(args).stdout(writer).status();
    status.unwrap().code()
}

#[test]
fn a_closed_stdout_changes_no_exit_code() {
    let dir = scratch();
    let bad = mutant(dir.path(), "tpv", |bytes| bytes.truncate(100_000));
    let (good, other, bad) = (image("tpv"), image("tpv-live"), arg(&bad));
    assert_eq!(unread(&["verify", arg(&good)]), Some(0));
    assert_eq!(unread(&["verify", bad, arg(&good)]), Some(2));
    assert_eq!(unread(&["verify", "--json", bad]), Some(2));
    assert_eq!(unread(&["inspect", bad]), Some(2));
    assert_eq!(unread(&["diff", arg(&good), arg(&other)]), Some(1));
}

#[test]
fn diff_compares_every_byte_of_what_it_does_not_understand() {
    let dir = scratch();
    let with_records = |name: &str, bodies: [u8; 2]| {
        let mut bytes = fs::read(image("tpv")).unwrap();
        let (_, libxc, _) = layers(&bytes);
        // After the two headers, before the first record.
        let at = libxc + 40;
        for last in bodies {
            let mut record = vec![0x55_u8; 8 + 4096];
            record[..8].copy_from_slice(&[0x77, 0, 0, 0x80, 0, 0x10, 0, 0]);
            record[8 + 4000] = last;
            bytes.splice(at..at, record);
        }
        let path = dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let (a, b) = (with_records("a", [1, 2]), with_records("b", [1, 3]));
    run(["diff", arg(&a), arg(&a)]).code(0);
    run(["diff", arg(&a), arg(&b)])
        .code(1)
        .stdout_has("from byte 0xfa0 on");
}

/// docs/security.md: what an image would have its host run is said before it is restored.
#[test]
fn inspect_lists_what_the_configuration_has_the_host_run() {
    let dir = scratch();
    let image = image("tpvh");
    let config = run(["cat", "--layer", "config", arg(&image)])
        .code(0)
        .stdout;
    let new = dir.path().join("new.json");
    let added = r#""b_info": { "device_model": "/tmp/evil", "#;
    let with = config.replacen(r#""b_info": {"#, added, 1);
    assert_ne!(with, config);
    fs::write(&new, with).unwrap();
    let edited = dir.path().join("edited.save");
    run([
        "edit",
        "--config",
        arg(&new),
        arg(&image),
        "-o",
        arg(&edited),
    ])
    .code(0);
    run(["inspect", arg(&edited)])
        .code(0)
        .stdout_has("What a restore has the host do, as root")
        .stdout_has("runs /tmp/evil (b_info.device_model)");
    let json = run(["inspect", "--json", arg(&edited)]).code(0).json();
    let uses = json["xl"]["host_uses"].as_array().unwrap();
    assert!(
        uses.iter()
            .any(|one| one["use"] == "runs" && one["value"] == "/tmp/evil")
    );
}
