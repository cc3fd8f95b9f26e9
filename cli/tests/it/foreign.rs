//! Images of other toolstacks, and files that are not images: what is read, what is taken over
//! about the domain, what is reported of the rest.
//!
//! The images are made by `tools/legacy_image.py` and `tools/foreign_image.py`, which share no code
//! with xsr. They need `python3`.

mod files;
mod suspend;
mod verdicts;
pub(crate) mod xva;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::{arg, backend, image, ran, run, scratch, xsr};
use tempfile::TempDir;
use xsr_xen_backend::mock::MockHost;

const UUID: &str = "1f2e3d4c-0000-1111-2222-333344445555";

/// Run one of the generators; `None`, with a message, if there is no `python3`.
pub(crate) fn tool(name: &str, options: &[&str], to: &Path) -> Option<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tools")
        .join(name);
    let output = Command::new("python3")
        .arg(script)
        .args(options)
        .arg("-o")
        .arg(to)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output();
    match output {
        Ok(output) => {
            assert!(output.status.success(), "{output:?}");
            Some(())
        }
        Err(e) => {
            eprintln!("SKIPPED: images are made by python3, which cannot be run: {e}");
            None
        }
    }
}

/// A layer of a real Xen's image, in a file.
fn layer(dir: &TempDir, name: &str, layer: &str) -> PathBuf {
    let to = dir.path().join(format!("{name}.{layer}"));
    run([
        "cat",
        "--force",
        "--layer",
        layer,
        arg(&image(name)),
        "-o",
        arg(&to),
    ])
    .code(0);
    to
}

/// The UUID in the configuration that is stored with a domain.
fn kept_uuid(host: &Path, name: &str) -> String {
    let host = MockHost::open(host).unwrap();
    let domid = host.find(name).unwrap();
    let config = host.userdata_get(domid, "libxl-json").unwrap().unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    config["c_info"]["uuid"].as_str().unwrap().to_owned()
}

/// Images of `xm save` and of XenServer before 6.5: PV and HVM, of either width, without extended
/// info as in Xen 3.0. The guest is the one in the legacy stream.
#[test]
fn images_of_old_toolstacks_are_read() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (stream, old, out, plain) = (at("stream"), at("old"), at("out"), at("plain"));
    for (what, legacy, options) in [
        ("xend", "--kind pv64 --qemu none", "--kind pv"),
        ("xend", "--kind pv32 --width 32 --qemu none", "--kind pv"),
        (
            "xend",
            "--kind hvm --qemu none",
            "--kind hvm --qemu QEVM123",
        ),
        (
            "xend",
            "--kind pv64 --qemu none --no-extended-info --vcpus 1",
            "--kind pv",
        ),
        ("xenserver", "--kind pv64 --width 32 --qemu none", ""),
        (
            "xenserver",
            "--kind pv32 --width 32 --qemu none --no-last-checkpoint",
            "",
        ),
        (
            "xenserver",
            "--kind hvm --width 32 --qemu none",
            "--qemu QEVM123",
        ),
    ] {
        let legacy: Vec<&str> = legacy.split(' ').collect();
        if tool("legacy_image.py", &legacy, &stream).is_none() {
            return;
        }
        let mut options: Vec<&str> = options.split_whitespace().collect();
        options.extend([what, arg(&stream)]);
        tool("foreign_image.py", &options, &old).unwrap();
        // A suspend VDI is larger than its contents.
        if what == "xenserver" {
            let mut bytes = fs::read(&old).unwrap();
            bytes.resize(bytes.len() + 9000, 0);
            fs::write(&old, bytes).unwrap();
        }
        run(["verify", arg(&old)]).code(0).stdout_has(match what {
            "xend" => "inside: xend, legacy stream",
            _ => "inside: xapi (XenServer before 6.5)",
        });
        run([
            "convert",
            "--force",
            "--to",
            "libxc",
            arg(&old),
            "-o",
            arg(&out),
        ])
        .code(0);
        let guest = match legacy.contains(&"hvm") {
            true => "hvm",
            false => "pv",
        };
        let mut args = vec!["convert", "--force", "--to", "libxc", "--guest", guest];
        let hvm = [
            fs::read(&stream).unwrap(),
            b"QemuDeviceModelRecord".to_vec(),
        ]
        .concat();
        if guest == "hvm" {
            fs::write(&stream, hvm).unwrap();
        }
        args.extend([arg(&stream), "-o", arg(&plain)]);
        run(&args).code(0);
        assert!(
            fs::read(&out).unwrap() == fs::read(&plain).unwrap(),
            "{what} {legacy:?}: another guest"
        );
        // Truncated anywhere, it is reported as truncated, or its signature is.
        let whole = fs::read(&old).unwrap();
        for end in [10, 18, 100, whole.len() / 2] {
            fs::write(at("cut"), &whole[..end]).unwrap();
            run(["verify", arg(&at("cut"))])
                .code(2)
                .stdout_has("truncated");
        }
    }
}

/// Name, UUID, vcpus and memory come from the other toolstack's data, into inspect, into a restored
/// domain and into an xl image. Devices are listed.
#[test]
fn identity_is_taken_over() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (old, out) = (at("named.after.nothing"), at("out.save"));
    let stream = at("stream");
    let from = image("tpv");
    let legacy = ["--from", arg(&from), "--qemu", "none"];
    if tool("legacy_image.py", &legacy, &stream).is_none() {
        return;
    }
    let (libxl, libxc) = (layer(&dir, "tpv", "libxl"), layer(&dir, "tpv", "libxc"));
    for (what, stream, device) in [
        ("xend", &stream, Some("vbd xvda:disk phy:vg/disk")),
        ("libvirt", &libxl, Some("disk file xvda /images/a.img")),
        ("xapi", &libxc, None),
    ] {
        let options = [what, arg(stream), "--name", "my-vm"];
        tool("foreign_image.py", &options, &old).unwrap();
        let report = run(["inspect", "--json", arg(&old)]).code(0).json();
        assert_eq!(report["guest"]["name"], "my-vm", "{what}");
        assert_eq!(report["guest"]["uuid"], UUID, "{what}");
        assert_eq!(report["guest"]["max_memory_kib"], 4096, "{what}");
        assert_eq!(report["origin"]["vcpus"], 1, "{what}");
        let text = run(["inspect", arg(&old)]).code(0).stdout_has("my-vm");
        // The whole text can be extracted.
        let config = run(["cat", "--layer", "config", arg(&old)]).code(0).stdout;
        assert_eq!(
            report["origin"]["text"].as_str().unwrap().trim(),
            config.trim()
        );
        let host = at(what);
        run(["restore", &backend(&host), arg(&old)]).code(0);
        assert_eq!(kept_uuid(&host, "my-vm"), UUID, "{what}");
        let ran = run([
            "convert",
            "--force",
            "--to",
            "xl",
            arg(&old),
            "-o",
            arg(&out),
        ])
        .code(0);
        if let Some(device) = device {
            text.stdout_has(device);
            ran.stderr_has(device).stderr_has("not carried over");
        }
        let made = run(["inspect", "--json", arg(&out)]).code(0).json();
        assert_eq!(made["guest"]["name"], "my-vm", "{what}");
        assert_eq!(made["guest"]["uuid"], UUID, "{what}");
        // From a pipe, too, since nothing is left to specify.
        let mut piped = xsr(["restore", &backend(&at(&format!("{what}-pipe"))), "-"]);
        piped.write_stdin(fs::read(&old).unwrap());
        ran_well(piped);
        // If the target has no place for it, that is reported.
        run([
            "convert",
            "--force",
            "--to",
            "libxl",
            arg(&old),
            "-o",
            arg(&out),
        ])
        .code(0)
        .stderr_has("name and UUID");
    }
}

fn ran_well(command: assert_cmd::Command) {
    ran(command).code(0);
}

/// State that xl's images have no place for is listed by verify, inspect, convert and restore, in
/// text and JSON.
#[test]
fn what_is_left_out_is_named() {
    let dir = scratch();
    let (old, out) = (dir.path().join("old"), dir.path().join("out"));
    let libxc = layer(&dir, "tpvh", "libxc");
    let options = [
        "xapi",
        arg(&libxc),
        "--kind",
        "hvm",
        "--varstored",
        "1234",
        "--swtpm",
        "12",
    ];
    if tool("foreign_image.py", &options, &old).is_none() {
        return;
    }
    let check = |left: &serde_json::Value| {
        assert_eq!(left[0]["record"], "Varstored");
        assert_eq!(left[0]["bytes"], 4);
        assert_eq!(left[1]["record"], "Swtpm");
    };
    run(["verify", arg(&old)])
        .code(0)
        .stdout_has("Varstored (UEFI variables, 4 bytes");
    run(["inspect", arg(&old)])
        .code(0)
        .stdout_has("Swtpm: state of a virtual TPM");
    check(&run(["inspect", "--json", arg(&old)]).code(0).json()["left_out"]);
    let ran = run(["convert", "--json", arg(&old), "-o", arg(&out)]).code(0);
    check(&ran.json()["left_out"]);
    ran.stderr_has("Varstored").stderr_has("Swtpm");
    let host = backend(&dir.path().join("host"));
    run(["restore", &host, "--type", "pvh", arg(&old)])
        .code(0)
        .stderr_has("Varstored");
}

/// The text of xl of Xen 4.1 to 4.4 is a configuration like any other.
#[test]
fn the_text_of_old_xl_is_a_configuration() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let from = image("tpv");
    let text = format!("name = \"old\"\nbuilder='generic'\nmemory = 4\nuuid = '{UUID}'\n");
    let options = ["--from", arg(&from), "--xl", &text, "--qemu", "none"];
    if tool("legacy_image.py", &options, &at("old.save")).is_none() {
        return;
    }
    let (old, new) = (at("old.save"), at("new.save"));
    let host = at("host");
    run(["inspect", arg(&old)]).code(0).stdout_has(UUID);
    run(["restore", &backend(&host), arg(&old)]).code(0);
    assert_eq!(kept_uuid(&host, "old"), UUID);
    // Options take precedence.
    let args = [
        "restore",
        &backend(&host),
        "--name",
        "other",
        "--memory",
        "8M",
        "--vcpus",
        "1",
    ];
    run(args.iter().copied().chain([arg(&old)])).code(0);
    assert_ne!(kept_uuid(&host, "other"), UUID, "a clone is another domain");
    // It stays text when it is edited, and can be read again.
    run(["edit", "--name", "a \"b\"", arg(&old), "-o", arg(&new)]).code(0);
    let report = run(["inspect", "--json", arg(&new)]).code(0).json();
    assert_eq!(report["guest"]["name"], "a \"b\"");
    assert_eq!(report["guest"]["uuid"], UUID);
    run(["verify", arg(&new)]).code(0);
}

/// A sender of Xen 4.5 or before sends the legacy form. It is converted during the migration, and
/// none of the sender's later messages is lost.
#[test]
fn a_domain_of_an_old_sender_is_received() {
    let dir = scratch();
    let (from, old) = (image("tpv"), dir.path().join("old"));
    let text = format!("name = \"old\"\nmemory = 4\nuuid = '{UUID}'\n");
    for (qemu, last) in [("none", "--batch=512"), ("none", "--no-last-checkpoint")] {
        let options = ["--from", arg(&from), "--xl", &text, "--qemu", qemu, last];
        if tool("legacy_image.py", &options, &old).is_none() {
            return;
        }
        let host = dir.path().join(last);
        let mut receive = xsr(["migrate-receive", &backend(&host)]);
        let go = b"domain is yours, you are cleared to unpause\0".to_vec();
        receive.write_stdin([fs::read(&old).unwrap(), go].concat());
        ran(receive).code(0).stdout_has("results are as follows");
        assert_eq!(kept_uuid(&host, "old"), UUID);
        // If it is truncated, the sender keeps the domain.
        let host = dir.path().join(format!("{last}-cut"));
        let mut receive = xsr(["migrate-receive", &backend(&host)]);
        let mut cut = fs::read(&old).unwrap();
        cut.truncate(cut.len() - 100);
        receive.write_stdin(cut);
        ran(receive).code(1).stderr_has("the sender keeps it");
        assert!(
            MockHost::open(&host)
                .unwrap()
                .find("old--incoming")
                .is_err()
        );
    }
}

/// Another name makes a clone. So does xl's way, a configuration before the image. xl's options are
/// accepted.
#[test]
fn a_domain_is_restored_beside_its_original() {
    let dir = scratch();
    let host = dir.path().join("host");
    let (image, backend) = (image("tpv"), backend(&host));
    run(["restore", &backend, "-e", "-d", "-V", arg(&image)]).code(0);
    let uuid = kept_uuid(&host, "tpv");
    run(["restore", &backend, arg(&image)])
        .code(1)
        .stderr_has("--name")
        .stderr_has("xsr edit --name");
    run(["restore", &backend, "-p", "--name", "tpv2", arg(&image)]).code(0);
    assert_ne!(kept_uuid(&host, "tpv2"), uuid);
    let config = dir.path().join("clone.cfg");
    fs::write(&config, "name = 'tpv3'\ntype = 'pv'\nmemory = 8\n").unwrap();
    run(["restore", &backend, arg(&config), arg(&image)]).code(0);
    assert_ne!(kept_uuid(&host, "tpv3"), uuid);
    fs::write(&config, "name = ").unwrap();
    run(["restore", &backend, arg(&config), arg(&image)])
        .code(64)
        .stderr_has("clone.cfg")
        .stderr_has("line 1");
    for bad in ["", "42", "a/b", "a\nb"] {
        run(["restore", &backend, "--name", bad, arg(&image)]).code(64);
    }
}

/// What edit writes can be restored: invalid names and UUIDs are refused, and so is a file that is
/// not a configuration.
#[test]
fn edit_refuses_what_nobody_could_restore() {
    let dir = scratch();
    let (image, out) = (image("tpv"), dir.path().join("out"));
    for (option, value) in [
        ("--uuid", "foo"),
        ("--uuid", "1f2e3d4c00001111222233334444555"),
        ("--uuid", "00000000-0000-0000-0000-000000000000"),
        ("--name", ""),
        ("--name", "Domain-0"),
        ("--name", "42"),
        ("--name", "a/b"),
        ("--name", "esc\u{1b}[31m"),
    ] {
        run(["edit", option, value, arg(&image), "-o", arg(&out)])
            .code(64)
            .stderr_has(option);
        assert!(!out.exists(), "{option} {value:?}");
    }
    run([
        "edit",
        "--name",
        "my web",
        "--uuid",
        UUID,
        arg(&image),
        "-o",
        arg(&out),
    ])
    .code(0);
    let report = run(["inspect", "--json", arg(&out)]).code(0).json();
    assert_eq!(report["guest"]["name"], "my web");
    let config = dir.path().join("new.json");
    for (text, says) in [
        ("name = 'x'\nmemory = 4\n", "xl's own format"),
        ("{}", "c_info.type"),
        ("{", "not valid JSON"),
    ] {
        fs::write(&config, text).unwrap();
        run([
            "edit",
            "--force",
            "--config",
            arg(&config),
            arg(&image),
            "-o",
            arg(&out),
        ])
        .code(64)
        .stderr_has("new.json")
        .stderr_has("xsr cat --layer config")
        .stderr_has(says);
    }
    // What cat extracts, edit accepts.
    let json = run(["cat", "--layer", "config", arg(&image)])
        .code(0)
        .stdout;
    fs::write(&config, json).unwrap();
    run([
        "edit",
        "--force",
        "--config",
        arg(&config),
        arg(&image),
        "-o",
        arg(&out),
    ])
    .code(0);
    run(["restore", &backend(&dir.path().join("host")), arg(&out)]).code(0);
}

/// A suspend VDI as it is exported, in a dynamic VHD. One that cannot be read is reported.
#[test]
fn an_image_in_a_vhd_is_read() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (suspend, disk) = (at("suspend"), at("disk.vhd"));
    let libxc = layer(&dir, "tpv", "libxc");
    let options = ["xapi", arg(&libxc), "--name", "my-vm"];
    if tool("foreign_image.py", &options, &suspend).is_none() {
        return;
    }
    tool("foreign_image.py", &["vhd", arg(&suspend)], &disk).unwrap();
    run(["verify", arg(&disk)])
        .code(0)
        .stdout_has("inside: VHD, xapi");
    let host = at("host");
    run(["restore", &backend(&host), arg(&disk)]).code(0);
    assert_eq!(kept_uuid(&host, "my-vm"), UUID);
    let mut bytes = fs::read(&disk).unwrap();
    bytes[600] ^= 1;
    fs::write(&disk, bytes).unwrap();
    run(["verify", arg(&disk)])
        .code(2)
        .stdout_has("qemu-img convert -f vpc");
}
