//! The configuration in an xl header is part of the verdict.

use super::*;

/// An image with one text in its configuration replaced.
fn with_config(to: &Path, from: &str, text: &str) {
    let bytes = fs::read(image("tpv")).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    // The length of the optional data, then inside them that of the configuration.
    let end = 52 + word(48) as usize;
    let config = String::from_utf8_lossy(&bytes[52..end]).into_owned();
    assert!(config.contains(from), "{config}");
    let config = config.replacen(from, text, 1);
    let length = u32::try_from(config.len()).unwrap();
    let mut out = bytes[..44].to_vec();
    out.extend((word(44) - word(48) + length).to_le_bytes());
    out.extend(length.to_le_bytes());
    out.extend(config.as_bytes());
    out.extend(&bytes[end..]);
    fs::write(to, out).unwrap();
}

#[test]
fn a_configuration_that_makes_no_domain_is_bad() {
    let dir = scratch();
    let file = path(dir.path(), "config");
    for (from, to, words) in [
        ("{", "(", "JSON"),
        (
            r#""type": "pv""#,
            r#""type": "xx""#,
            "expected pv, hvm or pvh",
        ),
        (
            r#""type": "pv""#,
            r#""type": "pvh""#,
            "stream is that of an x86 PV guest",
        ),
        (r#""name": "#, r#""nome": "#, "has no c_info.name"),
        (
            r#""max_vcpus": 1"#,
            r#""max_vcpus": 9000"#,
            "expected 1 to 8192",
        ),
        (
            r#""max_memkb": "#,
            r#""mox_memkb": "#,
            "has no b_info.max_memkb",
        ),
    ] {
        with_config(&file, from, to);
        both_say(&file, words);
        // `inspect` shows the image nevertheless, and reports that it is bad.
        run(["inspect", arg(&file)])
            .code(2)
            .stdout_has("BAD")
            .stdout_has(words)
            .stdout_has("X86_PV_VCPU_BASIC");
    }
    // Not UTF-8.
    let mut bytes = fs::read(image("tpv")).unwrap();
    bytes[60] = 0xff;
    fs::write(&file, bytes).unwrap();
    both_say(&file, "UTF-8");
}

#[test]
fn an_uuid_that_no_domain_can_have_is_bad() {
    let dir = scratch();
    let (file, good) = (path(dir.path(), "uuid"), image("tpv"));
    let config = run(["cat", "--layer", "config", arg(&good)]).code(0).stdout;
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    let uuid = config["c_info"]["uuid"].as_str().unwrap();
    let cases = [
        (
            "zzzzzzzz-849d-4334-8633-5976cbcde14c",
            "8, 4, 4, 4 and 12 hexadecimal digits",
        ),
        (
            "00000000-0000-0000-0000-000000000000",
            "it is the UUID of the control domain",
        ),
        ("", "8, 4, 4, 4 and 12 hexadecimal digits"),
    ];
    for (n, (wrong, words)) in cases.into_iter().enumerate() {
        with_config(&file, uuid, wrong);
        both_say(&file, words);
        both_say(&file, "xsr edit --uuid");
        // A clone gets a new one.
        let host = backend(&dir.path().join("host"));
        run(["restore", "--name", &format!("clone{n}"), &host, arg(&file)]).code(0);
        let config = dir.path().join("config.json");
        let text = run(["cat", "--layer", "config", arg(&file)]).code(0).stdout;
        fs::write(&config, text).unwrap();
        let line = ["restore", &host, arg(&config), arg(&good)];
        let ran = run(line).code(64).stderr_has(words);
        let ran = ran.stderr_has("correct c_info.uuid in that file");
        assert!(!ran.stderr.contains("xsr edit"), "{ran:?}");
    }
}

/// A configuration longer than 1 MiB is bad for each command that uses it, and takes no additional
/// memory. `edit --config` repairs the image.
#[test]
fn a_configuration_longer_than_any_is_bad_and_takes_no_memory() {
    let dir = scratch();
    let (file, out, json) = (
        path(dir.path(), "long"),
        path(dir.path(), "out"),
        dir.path().join("json"),
    );
    let bytes = fs::read(image("tpvh")).unwrap();
    let (libxl, ..) = layers(&bytes);
    let good = bytes[52..libxl].strip_suffix(&[0]).unwrap();
    fs::write(&json, good).unwrap();
    let with = |config: &[u8]| {
        let length = u32::try_from(config.len()).unwrap();
        let mut out = bytes[..44].to_vec();
        out.extend((length + 4).to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(config);
        out.extend(&bytes[libxl..]);
        fs::write(&file, out).unwrap();
    };
    let padded = |length: usize, item: &str| {
        let text = std::str::from_utf8(good).unwrap().trim_end();
        let mut config = text.strip_suffix('}').unwrap().as_bytes().to_vec();
        config.extend(br#","x":["#);
        while config.len() + item.len() + 3 < length {
            config.extend(item.as_bytes());
            config.push(b',');
        }
        config.extend(b"0]");
        config.resize(length - 1, b' ');
        config.extend(b"}\0");
        config
    };
    // The longest configuration, with contents that take the most memory for their length.
    with(&padded(1 << 20, r#"{"":0}"#));
    let limited = |args: &[&str]| {
        let output = std::process::Command::new("sh")
            .args(["-c", r#"ulimit -v 524288; exec "$@""#, "sh"])
            .arg(env!("CARGO_BIN_EXE_xsr"))
            .args(args)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        (output.status.code(), text)
    };
    let (code, text) = limited(&["verify", arg(&file)]);
    assert_eq!(code, Some(0), "{text}");
    // (Another name might be longer.)
    let uuid = "6f18a89f-849d-4334-8633-5976cbcde14c";
    let (code, text) = limited(&["edit", "--uuid", uuid, arg(&file), "-o", arg(&out)]);
    assert_eq!(code, Some(0), "{text}");

    let words = "configuration has 1048577 bytes, expected at most 1048576";
    with(&padded((1 << 20) + 1, "0"));
    both_say(&file, words);
    with(&padded(15 << 20, "[0]"));
    let host = backend(&dir.path().join("host"));
    let words = "bytes, expected at most 1048576";
    for args in [
        &["verify", arg(&file)][..],
        &["inspect", arg(&file)],
        &["inspect", "--json", arg(&file)],
        &["restore", &host, arg(&file)],
        &[
            "edit",
            "--force",
            "--name",
            "other",
            arg(&file),
            "-o",
            arg(&out),
        ],
    ] {
        let (code, text) = limited(args);
        assert_eq!(code, Some(2), "{args:?}: {text}");
        assert!(text.contains(words), "{args:?}: {text}");
        assert!(text.len() < 100_000, "{args:?}");
    }
    let (_, text) = limited(&["diff", arg(&image("tpvh")), arg(&file)]);
    assert!(!text.contains("alloc"), "{text}");
    let edited = [
        "edit",
        "--force",
        "--config",
        arg(&json),
        arg(&file),
        "-o",
        arg(&out),
    ];
    run(edited).code(0);
    assert_eq!(fs::read(&out).unwrap().len(), bytes.len());
    run(["verify", arg(&out)]).code(0);
}
