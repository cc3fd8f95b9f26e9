//! XVA archives and VHDs with the memory of a suspended VM, as xapi exports them.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::{UUID, kept_uuid, layer, tool};
use crate::common::{arg, backend, ran, run, scratch, xsr};

/// A suspend image of xapi with UEFI variables, in `suspend`; `None` without `python3`.
fn suspend_image(dir: &TempDir) -> Option<PathBuf> {
    let to = dir.path().join("suspend");
    let libxc = layer(dir, "tpv", "libxc");
    let options = ["xapi", arg(&libxc), "--name", "my-vm", "--varstored", "v"];
    tool("foreign_image.py", &options, &to).map(|()| to)
}

/// The libxl stream in an image.
fn inside(image: &Path) -> Vec<u8> {
    let out = image.with_extension("inside");
    let args = ["cat", "--layer", "libxl", "--force", arg(image), "-o"];
    run(args.into_iter().chain([arg(&out)])).code(0);
    fs::read(out).unwrap()
}

/// The member of a tar archive: its header, its contents and their padding.
pub(crate) fn member(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut out = header(name, contents.len() as u64);
    out.extend(contents);
    out.resize(out.len().next_multiple_of(512), 0);
    out
}

fn header(name: &str, bytes: u64) -> Vec<u8> {
    let mut out = vec![0; 512];
    out[..name.len()].copy_from_slice(name.as_bytes());
    out[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
    out[148..156].fill(b' ');
    out[156] = b'0';
    out[257..265].copy_from_slice(b"ustar\x0000");
    let sum: u32 = out.iter().map(|byte| u32::from(*byte)).sum();
    out[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    out
}

/// `ova.xml` of a VM whose memory is on the disk `Ref:4`.
pub(crate) const VM: &str = "<value><struct><member><name>objects</name><value><array><data><value><struct>\
    <member><name>class</name><value>VM</value></member><member><name>snapshot</name><value>\
    <struct><member><name>suspend_VDI</name><value>Ref:4</value></member></struct></value>\
    </member></struct></value></data></array></value></member></struct></value>";

#[test]
fn the_memory_in_an_xva_is_read() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let Some(suspend) = suspend_image(&dir) else {
        return;
    };
    let expected = inside(&suspend);
    for (n, options) in [
        "--checksums xxhash",
        "--checksums sha1",
        "--checksums none",
        "--checksums none --keep-alive",
    ]
    .into_iter()
    .enumerate()
    {
        let archive = at(&format!("{n}.xva"));
        let mut args = vec!["xva", arg(&suspend), "--name", "my-vm"];
        args.extend(options.split(' '));
        tool("foreign_image.py", &args, &archive).unwrap();
        let verified = run(["verify", arg(&archive)])
            .code(0)
            .stdout_has("inside: XVA, xapi");
        let unchecked = verified
            .stdout
            .contains("no checksum that is known here for block Ref:41/00000000");
        assert_eq!(unchecked, options.contains("none"), "{verified:?}");
        assert!(inside(&archive) == expected, "{options}");
        run(["inspect", arg(&archive)])
            .code(0)
            .stdout_has("Varstored");
        let out = at(&format!("{n}.out"));
        run(["convert", "--to", "xl", arg(&archive), "-o", arg(&out)])
            .code(0)
            .stderr_has("Varstored");
        let core = at(&format!("{n}.core"));
        run(["export", arg(&archive), arg(&core)]).code(0);
    }
    // Compressed, as `xe vm-export compress=true` does; and through a pipe.
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&fs::read(at("0.xva")).unwrap()).unwrap();
    fs::write(at("gz"), packed.finish().unwrap()).unwrap();
    run(["verify", arg(&at("gz"))])
        .code(0)
        .stdout_has("inside: gzip, XVA, xapi");
    assert!(inside(&at("gz")) == expected);
    let mut piped = xsr(["verify", "-"]);
    piped.write_stdin(fs::read(at("1.xva")).unwrap());
    ran(piped).code(0).stdout_has("inside: XVA");
    let host = at("host");
    run(["restore", &backend(&host), arg(&at("gz"))]).code(0);
    assert_eq!(kept_uuid(&host, "my-vm"), UUID);
}

#[test]
fn a_vm_that_was_not_suspended_has_no_memory() {
    let dir = scratch();
    let Some(suspend) = suspend_image(&dir) else {
        return;
    };
    let archive = dir.path().join("off.xva");
    let options = ["xva", arg(&suspend), "--name", "web", "--not-suspended"];
    tool("foreign_image.py", &options, &archive).unwrap();
    run(["verify", arg(&archive)])
        .code(2)
        .stdout_has("\"web\" (1f2e3d4c-0000-1111-2222-333344445555), which was not suspended")
        .stdout_has("preserve-power-state=true");
}

/// Each kind of checksum is compared before a byte of the block is used, and a truncated archive is
/// reported as such wherever it ends.
#[test]
fn a_damaged_xva_is_refused() {
    let dir = scratch();
    let at = |name: &str| dir.path().join(name);
    let Some(suspend) = suspend_image(&dir) else {
        return;
    };
    let archive = at("archive");
    for (checksums, name) in [("xxhash", "XXH64"), ("sha1", "SHA-1")] {
        let options = ["xva", arg(&suspend), "--checksums", checksums];
        tool("foreign_image.py", &options, &archive).unwrap();
        let whole = fs::read(&archive).unwrap();
        let block = position(&whole, b"Ref:41/00000001\0");
        let mut bytes = whole.clone();
        bytes[block + 5000] ^= 1;
        fs::write(at("bad"), &bytes).unwrap();
        let out = at("out");
        run(["cat", arg(&at("bad")), "-o", arg(&out)])
            .code(2)
            .stderr_has(&format!("block Ref:41/00000001 has the {name} "))
            .stderr_has("XVA archive is damaged at byte");
        assert!(!out.exists());
        for end in [
            600,
            block + 100,
            block + 512,
            block + 700,
            block + (1 << 20),
        ] {
            fs::write(at("cut"), &whole[..end]).unwrap();
            run(["verify", arg(&at("cut"))])
                .code(2)
                .stdout_has("it ends inside a member; the file is truncated");
        }
        let mut bytes = whole;
        bytes[block + 1] ^= 1;
        fs::write(at("bad"), &bytes).unwrap();
        run(["verify", arg(&at("bad"))])
            .code(2)
            .stdout_has("the checksum of a member's header is wrong");
    }
}

fn position(bytes: &[u8], wanted: &[u8]) -> usize {
    let found = bytes.windows(wanted.len()).position(|here| here == wanted);
    found.expect("it is there")
}

#[test]
fn what_no_xapi_writes_is_refused() {
    let dir = scratch();
    let path = dir.path().join("hostile");
    let xml = member("ova.xml", VM.as_bytes());
    let with = |rest: &[Vec<u8>]| [xml.clone(), rest.concat()].concat();
    let block = |number: u64, contents: &[u8]| member(&format!("Ref:4/{number:08}"), contents);
    for (bytes, expected) in [
        (with(&[]), "no block of Ref:4, which holds the memory"),
        (
            with(&[member("Ref:40/00000000", b"x")]),
            "no block of Ref:4",
        ),
        (
            with(&[block(0, b""), block(2, b"a"), block(2, b"b")]),
            "block 2 comes after block 3 or a later one",
        ),
        (
            with(&[header("Ref:4/00000000", (8 << 30) - 1)]),
            "Ref:4/00000000 has 8589934591 bytes, expected at most 16777216",
        ),
        (
            with(&[block(0, &[0; 4096]), block(1 << 60, b"a")]),
            "beyond the end of the largest disk",
        ),
        (
            with(&[block(0, b"a"), header("Ref:4/00000000.xxhash", 1 << 20)]),
            "Ref:4/00000000.xxhash has 1048576 bytes, expected at most 64",
        ),
        (
            with(&[block(0, b"hello, hello")]),
            "inside its XVA data: not a saved Xen domain",
        ),
        (header("ova.xml", 1 << 30), "ova.xml has 1073741824 bytes"),
        (
            member("ova.xml", b"<value>"),
            "ova.xml in the XVA archive ends inside <value>",
        ),
        (
            member("ova.xml", b""),
            "ova.xml in the XVA archive is empty",
        ),
    ] {
        fs::write(&path, bytes).unwrap();
        run(["verify", arg(&path)]).code(2).stdout_has(expected);
    }
}

/// A fixed VHD begins with the image, and ends with a footer.
#[test]
fn the_memory_on_a_fixed_vhd_is_read() {
    let dir = scratch();
    let Some(suspend) = suspend_image(&dir) else {
        return;
    };
    let disk = dir.path().join("disk");
    tool(
        "foreign_image.py",
        &["vhd", "--fixed", arg(&suspend)],
        &disk,
    )
    .unwrap();
    run(["verify", arg(&disk)])
        .code(0)
        .stdout_has("inside: xapi");
    assert!(inside(&disk) == inside(&suspend));
}
