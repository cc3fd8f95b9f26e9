//! `convert --to xapi`: suspend images, read here record by record without xsr's own reader.

use std::fs;
use std::path::Path;

use super::{layer, tool};
use crate::common::{arg, backend, create, image, ran, run, scratch, xsr};

const XENOPS: u64 = 0xf;
const LIBXC: u64 = 0xf0;
const QEMU_TRAD: u64 = 0xf00;
const VARSTORED: u64 = 0xf11;
const SWTPM: u64 = 0xf13;
const END: u64 = 0xffff;

/// The records of a suspend image whose libxc stream has this length.
fn records(image: &[u8], libxc: usize) -> Vec<(u64, Vec<u8>)> {
    let mut rest = image.strip_prefix(b"XenSavedDomv2-\n").expect("the magic");
    let mut records = Vec::new();
    while let Some((head, behind)) = rest.split_first_chunk::<16>() {
        let word = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().unwrap());
        let (kind, told) = (word(0), word(8));
        let bytes = match kind {
            LIBXC => {
                assert_eq!(told, 0);
                libxc
            }
            _ => usize::try_from(told).unwrap(),
        };
        let (body, behind) = behind.split_at(bytes);
        records.push((kind, body.to_vec()));
        rest = behind;
    }
    assert!(rest.is_empty());
    records
}

fn kinds(records: &[(u64, Vec<u8>)]) -> Vec<u64> {
    records.iter().map(|(kind, _)| *kind).collect()
}

fn to_xapi(from: &Path, to: &Path) -> crate::common::Ran {
    run(["convert", "-f", "--to", "xapi", arg(from), "-o", arg(to)])
}

/// Every record of xapi's own image is kept, whatever is around it.
#[test]
fn a_suspend_image_of_xapi_is_written_with_every_record() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let libxc = layer(&dir, "tpvh", "libxc");
    let (suspend, archive, out) = (at("suspend"), at("archive"), at("out"));
    let options = "--kind hvm --varstored 1234 --swtpm 12 --qemu QEVM";
    let mut args = vec!["xapi", arg(&libxc)];
    args.extend(options.split(' '));
    if tool("foreign_image.py", &args, &suspend).is_none() {
        return;
    }
    tool("foreign_image.py", &["xva", arg(&suspend)], &archive).unwrap();
    let stream = fs::read(&libxc).unwrap();
    let before = records(&fs::read(&suspend).unwrap(), stream.len());
    for from in [&suspend, &archive] {
        let ran = to_xapi(from, &out).code(0);
        assert!(!ran.stderr.contains("left out"), "{}", ran.stderr);
        assert!(!ran.stderr.contains("not carried over"), "{}", ran.stderr);
        let after = records(&fs::read(&out).unwrap(), stream.len());
        // xenopsd refuses Qemu_xen, and has the state of upstream qemu in Qemu_trad.
        assert_eq!(
            kinds(&after),
            [XENOPS, LIBXC, QEMU_TRAD, VARSTORED, SWTPM, END]
        );
        assert!(after[0] == before[0], "another Xenops record");
        assert!(after[1].1 == stream, "another libxc stream");
        let bodies: Vec<&[u8]> = after[2..5].iter().map(|(_, body)| &body[..]).collect();
        assert_eq!(bodies, [b"QEVM".as_slice(), b"1234", b"12"]);
    }
    let report = run([
        "convert",
        "-f",
        "--json",
        "--to",
        "xapi",
        arg(&suspend),
        "-o",
        arg(&out),
    ])
    .code(0)
    .json();
    assert_eq!(report["to"], "xapi");
    assert!(report.get("left_out").is_none(), "{report}");
    // As a filter.
    let mut filter = xsr(["convert", "--to", "xapi", "-", "-o", "-"]);
    filter.write_stdin(fs::read(&archive).unwrap());
    let filtered = filter.output().unwrap();
    assert!(filtered.status.success());
    assert!(filtered.stdout == fs::read(&out).unwrap());
}

/// The records that are kept meanwhile need room in a temporary file: the image is not to blame if
/// there is none.
#[test]
fn a_directory_for_temporary_files_without_room_is_named() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let libxc = layer(&dir, "tpv", "libxc");
    let mut image = b"XenSavedDomv2-\n".to_vec();
    for (kind, body) in [
        (LIBXC, fs::read(libxc).unwrap()),
        (VARSTORED, vec![0; 24 << 20]),
        (END, Vec::new()),
    ] {
        let told = if kind == LIBXC { 0 } else { body.len() as u64 };
        image.extend([kind.to_le_bytes(), told.to_le_bytes()].concat());
        image.extend(body);
    }
    fs::write(at("suspend"), image).unwrap();
    let mut limited = std::process::Command::new("bash");
    // In units of 1024 bytes.
    let script = "ulimit -f 16384; exec \"$0\" convert --to xapi suspend -o out";
    limited
        .args(["-c", script, env!("CARGO_BIN_EXE_xsr")])
        .env("TMPDIR", dir.path())
        .current_dir(dir.path());
    let ended = limited.output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    let place = format!("writing a temporary file in {}", dir.path().display());
    assert_eq!(ended.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&place) && said.contains("TMPDIR names another"),
        "{said}"
    );
    assert!(said.contains("File too large"), "{said}");
    assert!(!at("out").exists());
}

/// Adds the records of an emulator, as libxl writes them, before the END of an xl image.
fn with_emulator(image: &Path) {
    let mut bytes = fs::read(image).unwrap();
    assert_eq!(bytes.split_off(bytes.len() - 8), [0; 8], "END");
    for (kind, state) in [(2_u32, b"a/b\0c\0".as_slice()), (3, b"QEVM12345")] {
        let length = u32::try_from(8 + state.len()).unwrap();
        for word in [kind, length, 2, 0] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(state);
        bytes.extend(vec![0; (8 - state.len() % 8) % 8]);
    }
    bytes.extend([0; 8]);
    fs::write(image, bytes).unwrap();
}

/// An image of xl becomes one; what is lost is named.
#[test]
fn an_image_of_xl_becomes_a_suspend_image() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (host, saved, mapped, out) = (at("host"), at("saved"), at("mapped"), at("out"));
    create(&host, "web", "hvm");
    run(["save", &backend(&host), "web", arg(&saved)]).code(0);
    with_emulator(&saved);
    let stream = at("stream");
    run(["cat", "--layer", "libxc", arg(&saved), "-o", arg(&stream)]).code(0);
    let stream = fs::read(stream).unwrap();
    to_xapi(&saved, &out)
        .code(0)
        .stderr_has("EMULATOR_XENSTORE_DATA (xenstore keys of an emulator")
        .stderr_has("a suspend image of xapi has no place")
        .stderr_has("not carried over: xl's configuration");
    let plain = fs::read(&out).unwrap();
    let made = records(&plain, stream.len());
    assert_eq!(kinds(&made), [XENOPS, LIBXC, QEMU_TRAD, END]);
    assert_eq!(made[0].1, b"((time 19700101T00:00:00Z)(word_size 64))");
    assert!(made[1].1 == stream);
    assert_eq!(made[2].1, b"QEVM12345");
    run(["verify", arg(&out)])
        .code(0)
        .stdout_has("inside: xapi");
    run([
        "convert",
        "--layout",
        "mapped",
        arg(&saved),
        "-o",
        arg(&mapped),
    ])
    .code(0);
    to_xapi(&mapped, &out).code(0);
    assert!(
        fs::read(&out).unwrap() == plain,
        "a mapped image gives another one"
    );
}

/// Legacy streams are converted on the way.
#[test]
fn a_legacy_image_becomes_a_suspend_image() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (old, libxc, out) = (at("old"), at("libxc"), at("out"));
    let from = image("tpv");
    let options = ["--from", arg(&from), "--qemu", "none"];
    if tool("legacy_image.py", &options, &old).is_none() {
        return;
    }
    run(["convert", "--to", "libxc", arg(&old), "-o", arg(&libxc)]).code(0);
    to_xapi(&old, &out).code(0);
    let stream = fs::read(libxc).unwrap();
    let made = records(&fs::read(&out).unwrap(), stream.len());
    assert_eq!(kinds(&made), [XENOPS, LIBXC, END]);
    assert!(made[1].1 == stream);
    run([
        "convert",
        "-f",
        "--to",
        "xapi",
        "--guest",
        "pv",
        arg(&old),
        "-o",
        arg(&out),
    ])
    .code(64)
    .stderr_has("nor with --to xapi");
}

#[test]
fn what_a_suspend_image_cannot_have_is_refused() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let (suspend, state, out) = (at("suspend"), at("state"), at("out"));
    let from = image("tpv");
    for (options, expected) in [
        (["--layout", "mapped"], "has no mapped layout"),
        (["--config", arg(&from)], "has no place for --config"),
    ] {
        let args = ["convert", "--to", "xapi", arg(&from), "-o", arg(&out)];
        ran(xsr(args.into_iter().chain(options)))
            .code(64)
            .stderr_has(expected);
    }
    // A state of the device model that xenopsd would refuse.
    let libxc = layer(&dir, "tpvh", "libxc");
    let options = ["xapi", arg(&libxc), "--kind", "hvm", "--qemu", "QEVM"];
    if tool("foreign_image.py", &options, &suspend).is_none() {
        return;
    }
    let mut bytes = fs::read(&suspend).unwrap();
    let at_state = bytes.len() - 16 - 4;
    let long: Vec<u8> = vec![7; (1 << 20) + 1];
    bytes.splice(at_state..at_state + 4, long.iter().copied());
    bytes[at_state - 8..at_state].copy_from_slice(&(long.len() as u64).to_le_bytes());
    fs::write(&state, bytes).unwrap();
    run(["verify", arg(&state)]).code(0);
    to_xapi(&state, &out)
        .code(1)
        .stderr_has("has 1048577 bytes, and xenopsd refuses more than 1048576");
    assert!(!out.exists());
}
