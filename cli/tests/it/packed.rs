//! `--compress zstd` and `--encrypt-to`: images that are packed as they are written, and the
//! commands that read them.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::migration::domains;
use crate::common::{arg, backend, host_with, run, scratch};

/// The key in `cli/src/age/testdata`, which Debian's age-keygen has made.
const RECIPIENT: &str = "age1jmjhnyuegaqsu23rx902autsk2vpsla2dgl94ue7zexngljy5eksc4kure";

fn identity() -> String {
    format!(
        "{}/src/age/testdata/identity.txt",
        env!("CARGO_MANIFEST_DIR")
    )
}

const WAYS: [&[&str]; 3] = [
    &["--compress", "zstd"],
    &["--encrypt-to", RECIPIENT],
    &["--compress=zstd", "--encrypt-to", RECIPIENT],
];

/// A plain image of a domain, and its host.
fn saved(kind: &str, dir: &Path) -> (String, PathBuf) {
    let host = backend(&host_with(kind, dir));
    let plain = dir.join("plain");
    run(["save", &host, "-c", "web", arg(&plain)]).code(0);
    (host, plain)
}

#[test]
fn a_packed_image_is_the_plain_one_for_every_reader() {
    for kind in ["pv", "pvh"] {
        let dir = scratch();
        let (host, plain) = saved(kind, dir.path());
        let [packed, unpacked, memory] =
            ["packed", "unpacked", "memory"].map(|name| dir.path().join(name));
        let expected = fs::read(&plain).unwrap();
        for how in WAYS {
            let save = ["save", &host, "-c", "--json", "web", arg(&packed)];
            let report = run([&save[..], how].concat()).code(0).json();
            let bytes = fs::metadata(&packed).unwrap().len();
            assert_eq!(report["file_bytes"], bytes, "{report}");
            assert_eq!(report["stream_bytes"], expected.len());
            if how[0].starts_with("--compress") {
                assert!(bytes < expected.len() as u64, "{bytes}");
            }
            // `convert` packs in the same way.
            let convert = ["convert", "-f", "-o", arg(&unpacked), arg(&plain)];
            let report = run([&convert[..], how, &["--json"]].concat())
                .code(0)
                .json();
            assert_eq!(report["bytes"], fs::metadata(&unpacked).unwrap().len());

            let with = ["--identity", &identity()];
            for image in [arg(&packed), arg(&unpacked)] {
                let read = |line: &[&str]| run([line, &with, &[image]].concat());
                read(&["cat", "--layer", "xl", "-f", "-o", arg(&memory)]).code(0);
                assert!(fs::read(&memory).unwrap() == expected, "{kind} {how:?}");
                read(&["verify"]).code(0);
                read(&["inspect", "--json"]).code(0);
                read(&["diff", arg(&plain)]).code(0);
                read(&["export", "-f", "-o", arg(&memory)]).code(0);
            }
            let edited = dir.path().join("edited");
            let edit = [
                "edit",
                "--name",
                "other",
                "-f",
                "-o",
                arg(&edited),
                arg(&packed),
            ];
            run([&edit[..], &with].concat()).code(0);
            let other = backend(&scratch().path().join("host"));
            run([&["restore", &other, arg(&packed)][..], &with].concat()).code(0);
        }
    }
}

#[test]
fn zstd_itself_reads_what_is_compressed() {
    use std::io::Read as _;
    let dir = scratch();
    let (host, plain) = saved("pvh", dir.path());
    let packed = dir.path().join("packed");
    run([
        "save",
        &host,
        "-c",
        "--live",
        "--compress",
        "zstd",
        "web",
        arg(&packed),
    ])
    .code(0);
    let file = fs::read(&packed).unwrap();
    let mut room = vec![0; fs::read(&plain).unwrap().len() * 2];
    let bytes = zstd_safe::decompress(&mut room[..], &file).unwrap();
    room.truncate(bytes);
    // A live save of a guest that does nothing differs in no page.
    let unpacked = dir.path().join("unpacked");
    fs::write(&unpacked, &room).unwrap();
    run(["diff", arg(&plain), arg(&unpacked)]).code(0);
    // An output that is a pipe.
    let ran = run(["save", &host, "-c", "--compress", "zstd", "web", "-"]).code(0);
    drop(ran);
    let mut cut = fs::File::open(&packed).unwrap().take(bytes as u64 / 100);
    let mut head = Vec::new();
    cut.read_to_end(&mut head).unwrap();
    fs::write(&packed, &head).unwrap();
    run(["verify", arg(&packed)])
        .code(2)
        .stdout_has("truncated");
}

#[test]
fn what_does_not_go_together_is_refused_and_a_secret_is_not_repeated() {
    let dir = scratch();
    let host = host_with("pvh", dir.path());
    let to = backend(&host);
    let file = dir.path().join("web.save");
    let secret = fs::read_to_string(identity()).unwrap();
    let secret = secret.lines().last().unwrap();
    for (how, why) in [
        (
            &["--compress", "zstd", "--layout", "mapped"][..],
            "--compress does not go with --layout mapped",
        ),
        (
            &["--encrypt-to", RECIPIENT, "--layout", "mapped"],
            "--encrypt-to does not go with --layout mapped",
        ),
        (
            &["--encrypt-to", secret],
            "this is an identity, which is a secret",
        ),
        (
            &["--encrypt-to", "ssh-ed25519 AAAA"],
            "expected a recipient that begins with age1",
        ),
        (&["--encrypt-to", ""], "expected a recipient"),
    ] {
        let ran = run([&["save", &to, "-c", "web", arg(&file)], how].concat());
        let ran = ran.code(64).stderr_has(why);
        assert!(!ran.stderr.contains(&secret[16..]), "{}", ran.stderr);
        assert_eq!(domains(&host), ["web running"]);
        assert!(!file.exists());
    }
}

#[test]
fn an_image_that_cannot_be_decrypted_says_why() {
    let dir = scratch();
    let (_, plain) = saved("pvh", dir.path());
    let packed = dir.path().join("packed");
    let to = ["--encrypt-to", RECIPIENT];
    run([&["convert", "-o", arg(&packed), arg(&plain)], &to[..]].concat()).code(0);
    run(["verify", arg(&packed)])
        .code(64)
        .stderr_has("encrypted with age: give the file with an identity for it: --identity FILE");
    // Another key, which is that of the specification's example.
    let other = dir.path().join("other");
    let stranger = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
    fs::write(&other, format!("# a stranger's\n{stranger}\n")).unwrap();
    run(["verify", "--identity", arg(&other), arg(&packed)])
        .code(64)
        .stderr_has("to other recipients than those of the identities");
    // Any of several identities.
    let both = [
        "verify",
        "--identity",
        arg(&other),
        "--identity",
        &identity(),
    ];
    run([&both[..], &[arg(&packed)]].concat()).code(0);
    let long = format!("{}#", "#\n".repeat(1 << 19));
    for (text, why) in [
        ("", "has no identity"),
        // The identity would be beyond what is read.
        (&long, "is longer than 1 MiB"),
        ("\nAGE-SECRET-KEY-1QQQ\n", "line 2 is not an identity"),
    ] {
        fs::write(&other, text).unwrap();
        let ran = run(["verify", "--identity", arg(&other), arg(&packed)]);
        let ran = ran.code(64).stderr_has(why);
        assert!(!ran.stderr.contains("1QQQ"), "{}", ran.stderr);
    }
    run([
        "verify",
        "--identity",
        arg(&dir.path().join("none")),
        arg(&packed),
    ])
    .code(1)
    .stderr_has("No such file");

    let file = fs::read(&packed).unwrap();
    let with = ["verify", "--identity", &identity(), arg(&packed)];
    fs::write(&packed, &file[..file.len() - 1000]).unwrap();
    run(with).code(2).stdout_has("its encrypted data");
    let mut damaged = file.clone();
    damaged[file.len() / 2] ^= 1;
    fs::write(&packed, &damaged).unwrap();
    run(with).code(2).stdout_has("are damaged or cut off");
    // It is named through a compression, too.
    let both = [
        "convert",
        "-f",
        "--compress",
        "zstd",
        "-o",
        arg(&packed),
        arg(&plain),
    ];
    run([&both[..], &to].concat()).code(0);
    let mut damaged = fs::read(&packed).unwrap();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    fs::write(&packed, &damaged).unwrap();
    run(with)
        .code(2)
        .stdout_has("its encrypted data are damaged or cut off");
    // A changed last byte is behind all that the image needs.
    let mut damaged = file;
    *damaged.last_mut().unwrap() ^= 1;
    fs::write(&packed, &damaged).unwrap();
    run(with).code(2).stdout_has("its encrypted data");
}

#[test]
fn an_output_that_fails_leaves_the_domain_running() {
    let dir = scratch();
    let (to, plain) = saved("pvh", dir.path());
    let host = dir.path().join("host");
    for how in WAYS {
        for then in [&["-c"][..], &["-p"], &[]] {
            let line = ["save", &to, "web", "/dev/full"];
            run([&line[..], then, how].concat())
                .code(1)
                .stderr_has("writing /dev/full: No space left on device")
                .stderr_has("web runs on");
            assert_eq!(domains(&host), ["web running"]);
        }
        let line = ["convert", "-f", "-o", "/dev/full", arg(&plain)];
        run([&line[..], how].concat())
            .code(1)
            .stderr_has("No space left on device");
    }
}
