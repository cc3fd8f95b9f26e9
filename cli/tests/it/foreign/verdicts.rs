//! What another toolstack says about a domain is part of the verdict: `verify`, `inspect` and
//! `restore` agree, and what a domain gets instead of a missing or impossible value is named.

use super::*;

/// An image of another toolstack around the stream of a PV guest; `None` without `python3`.
fn wrapped(dir: &TempDir, what: &str, options: &[&str]) -> Option<PathBuf> {
    let to = dir.path().join(format!("{what}.sav"));
    let from = image("tpv");
    let stream = match what {
        "xend" => {
            let stream = dir.path().join("legacy");
            let line = ["--from", arg(&from), "--qemu", "none"];
            tool("legacy_image.py", &line, &stream)?;
            stream
        }
        "libvirt" => layer(dir, "tpv", "libxl"),
        _ => layer(dir, "tpv", "libxc"),
    };
    let line = [&[what, arg(&stream)], options].concat();
    tool("foreign_image.py", &line, &to)?;
    Some(to)
}

fn changed(file: &Path, from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let mut bytes = fs::read(file).unwrap();
    let at = bytes
        .windows(from.len())
        .position(|part| part == from.as_bytes());
    bytes[at.unwrap()..][..to.len()].copy_from_slice(to.as_bytes());
    fs::write(file, bytes).unwrap();
}

/// Bad for all commands, in the same words.
#[track_caller]
fn bad(file: &Path, words: &str) {
    let dir = scratch();
    let to = backend(&dir.path().join("host"));
    run(["verify", arg(file)]).code(2).stdout_has(words);
    run(["restore", &to, arg(file)]).code(2).stderr_has(words);
    let ran = run(["inspect", arg(file)]);
    assert!(
        format!("{}{}", ran.stdout, ran.stderr).contains(words),
        "{ran:?}"
    );
}

#[test]
fn a_name_and_a_type_of_another_toolstack_are_part_of_the_verdict() {
    let dir = scratch();
    for what in ["libvirt", "xapi", "xend"] {
        for (options, words) in [
            (["--name", "../../etc"], "no domain can have the name"),
            (
                ["--name", "Domain-0"],
                "it is the name of the control domain",
            ),
            (["--vcpus", "8193"], "a pv guest has at most 8192"),
        ] {
            let Some(file) = wrapped(&dir, what, &options) else {
                return;
            };
            bad(&file, words);
        }
    }
    for what in ["libvirt", "xapi"] {
        let file = wrapped(&dir, what, &["--kind", "hvm"]).unwrap();
        bad(
            &file,
            "says that the guest is hvm, but the image is of an x86 PV guest",
        );
    }
    // Without a type, the stream's counts.
    let file = wrapped(&dir, "libvirt", &["--vcpus", "8193"]).unwrap();
    changed(&file, "<type>xen</type>", "<tipe>xen</tipe>");
    bad(&file, "a pv guest has at most 8192");
    let file = wrapped(&dir, "libvirt", &[]).unwrap();
    changed(&file, "</name>", "<!name>");
    bad(&file, "could not be understood: it ");
    // A text of xl that is cut off is not one of other toolstacks.
    let from = image("tpv");
    let text = dir.path().join("xl.save");
    let line = [
        "--from",
        arg(&from),
        "--qemu",
        "none",
        "--xl",
        "name = \"old\"\n+",
    ];
    tool("legacy_image.py", &line, &text).unwrap();
    bad(
        &text,
        "could not be understood: it is wrong in line 2: '+' is not expected",
    );
}

#[test]
fn a_record_of_xapi_that_is_cut_off_is_bad() {
    let dir = scratch();
    let Some(file) = wrapped(&dir, "xapi", &[]) else {
        return;
    };
    changed(&file, "(vcpus 1))", "(vcpus 1) ");
    bad(&file, "could not be understood: it has a vm_str that ");
}

/// The image is good, and it is said what the domain gets.
#[track_caller]
fn good_but(file: &Path, words: &[&str]) {
    let dir = scratch();
    let (host, out) = (dir.path().join("host"), dir.path().join("out.save"));
    let verify = run(["verify", "--json", arg(file)]).code(0);
    let restore = run(["restore", &backend(&host), arg(file)]).code(0);
    let convert = [
        "convert",
        "--json",
        "--to",
        "xl",
        arg(file),
        "-o",
        arg(&out),
    ];
    let convert = run(convert).code(0);
    let inspect = run(["inspect", "--json", arg(file)]).code(0).json();
    let problems = inspect["origin"]["problems"].to_string();
    for words in words {
        for ran in [&verify, &convert] {
            let warnings = ran.json()["warnings"].to_string();
            assert!(warnings.contains(words), "{words}: {ran:?}");
        }
        assert!(restore.stderr.contains(words), "{words}: {restore:?}");
        assert!(problems.contains(words), "{words}: {problems}");
    }
}

#[test]
fn what_a_domain_gets_instead_of_an_impossible_value_is_named() {
    let dir = scratch();
    let uuid = "no UUID: the domain gets one that is made from its name";
    for what in ["libvirt", "xapi", "xend"] {
        let Some(file) = wrapped(&dir, what, &["--uuid", "nonsense"]) else {
            return;
        };
        good_but(&file, &["nonsense", uuid]);
        let options = ["--vcpus", "4294967297"];
        let file = wrapped(&dir, what, &options).unwrap();
        good_but(&file, &["4294967297"]);
        let file = wrapped(&dir, what, &["--memory", "99999999999999999999"]).unwrap();
        good_but(&file, &["is not taken over: no number for a domain"]);
    }
    let file = wrapped(&dir, "libvirt", &[]).unwrap();
    changed(&file, "<uuid>", "<uuix>");
    changed(&file, "</uuid>", "</uuix>");
    good_but(&file, &[uuid]);
    let file = wrapped(&dir, "xapi", &[]).unwrap();
    changed(&file, "vm_str \"((id", "vm_str \"{(id");
    good_but(
        &file,
        &["is not an s-expression", uuid, "no name: the domain gets"],
    );
}
