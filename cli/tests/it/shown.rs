//! What may be printed: rows that fit a terminal, the character set of the locale, and nothing from
//! an image that a terminal obeys.

use std::fs;
use std::path::Path;

use crate::common::{arg, backend, image, layers, ran, run, scratch, xsr};

#[test]
fn rows_of_a_report_fit_eighty_columns() {
    let dir = scratch();
    let host = dir.path().join("host");
    let [tpv, live, tpvh] = ["tpv", "tpv-live", "tpvh"].map(image);
    run(["restore", &backend(&host), arg(&tpv)]).code(0);
    let reports: [(&[&str], i32); 7] = [
        (&["inspect", arg(&tpv)], 0),
        (&["inspect", "--fields", arg(&tpv)], 0),
        (&["inspect", "--pages", arg(&live)], 0),
        (&["inspect", "--fields", arg(&tpvh)], 0),
        (&["diff", arg(&tpv), arg(&live)], 1),
        (&["diff", "--after-restore", arg(&tpv), arg(&live)], 1),
        (&["mock", "show", "tpv", "--host", arg(&host)], 0),
    ];
    for (args, code) in reports {
        let shown = run(args).code(code).stdout;
        assert!(shown.lines().count() > 5, "{shown}");
        // The first and the last line may have names of files. A warning is a sentence, which a
        // terminal may wrap.
        let rows = shown.lines().filter(|line| !line.contains('/'));
        for line in rows.filter(|line| !line.starts_with("  warning: ")) {
            assert!(line.chars().count() <= 80, "{args:?}: {line:?}");
            assert_eq!(line, line.trim_end());
        }
    }
}

/// An image of xl with another configuration.
fn with_config(path: &Path, config: &[u8]) -> Vec<u8> {
    const LENGTH: usize = 44;
    const CONFIG: usize = 48;
    let whole = fs::read(path).unwrap();
    let length: [u8; 4] = whole[LENGTH..CONFIG].try_into().unwrap();
    let end = CONFIG + usize::try_from(u32::from_le_bytes(length)).unwrap();
    // Its own length, with the NUL, is before it.
    let with_nul = u32::try_from(config.len() + 1).unwrap();
    let [all, with_nul] = [with_nul + 4, with_nul].map(u32::to_le_bytes);
    [
        &whole[..LENGTH],
        &all,
        &with_nul,
        config,
        b"\0",
        &whole[end..],
    ]
    .concat()
}

/// The configuration of an image.
fn config_of(path: &Path) -> String {
    run(["cat", "--layer", "config", arg(path)]).code(0).stdout
}

#[test]
fn a_locale_without_utf_8_gets_ascii() {
    let dir = scratch();
    let named = dir.path().join("é.save");
    let config = config_of(&image("tpv")).replace("\"tpv\"", "\"ž😀\"");
    fs::write(&named, with_config(&image("tpv"), config.as_bytes())).unwrap();
    let in_c = |args: &[&str]| {
        let mut command = xsr(args);
        command.env("LC_ALL", "C");
        let ran = ran(command);
        assert!(ran.stdout.is_ascii() && ran.stderr.is_ascii(), "{ran:?}");
        ran
    };
    let live = image("tpv-live");
    for args in [
        &["inspect", arg(&named)] as &[&str],
        &["verify", arg(&named)],
        &["diff", arg(&named), arg(&live)],
        &["verify", "/nothing/é"],
    ] {
        in_c(args);
    }
    in_c(&["inspect", arg(&named)])
        .code(0)
        .stdout_has("pfns 0x0-0x3ff")
        .stdout_has(r"name    \u{17e}\u{1f600}");
    in_c(&["diff", arg(&named), arg(&live)]).stdout_has("khz   2596120 -> 2596121");
    let nowhere = dir.path().join("é");
    in_c(&["save", &backend(&nowhere), "web", "x"])
        .code(1)
        .stderr_has(r"\u{e9} is not a mock host");
    // The same document, and a locale with UTF-8 has the characters.
    let json = in_c(&["inspect", "--json", arg(&named)]).code(0).json();
    assert_eq!(json["guest"]["name"], "ž😀");
    let utf8 = run(["inspect", "--json", arg(&named)]).code(0);
    assert_eq!(utf8.json(), json);
    assert!(utf8.stdout.contains("ž😀"), "{utf8:?}");
    run(["inspect", arg(&named)])
        .stdout_has("pfns 0x0–0x3ff")
        .stdout_has("ž😀");
}

/// Escape sequences in both forms, a bell, and a change of the direction of text.
const HOSTILE: &str = "\u{1b}[2J\u{9b}31m\u{7}\u{202e}";
/// The same as JSON has it.
const HOSTILE_JSON: &str = r"\u001b[2J\u009b31m\u0007\u202e";

/// Hostile text in every place of an image that has text.
fn hostile_images(directory: &Path) -> Vec<std::path::PathBuf> {
    let tpv = image("tpv");
    let whole = fs::read(&tpv).unwrap();
    let config = config_of(&tpv);
    let (libxl, _, end) = layers(&whole);
    let mut emulator = Vec::new();
    let body = format!("\u{2}\0\0\0\0\0\0\0{HOSTILE}/key\0{HOSTILE}\0");
    emulator.extend_from_slice(&2_u32.to_le_bytes());
    emulator.extend_from_slice(&u32::try_from(body.len()).unwrap().to_le_bytes());
    emulator.extend_from_slice(body.as_bytes());
    emulator.resize(emulator.len().next_multiple_of(8), 0);
    let xml = format!(
        "<domain type='xen'><name>w{HOSTILE}</name><uuid>{HOSTILE}</uuid>\
         <vcpu>1</vcpu><memory unit='KiB'>4096</memory>\
         <on_crash>{HOSTILE}</on_crash><os><type>xen</type><kernel>{HOSTILE}</kernel></os>\
         <devices><disk type='file'><source file='{HOSTILE}'/><target dev='{HOSTILE}'/></disk>\
         <{HOSTILE}/></devices></domain>\0"
    );
    let libvirt = |xml: &str| {
        let length = u32::try_from(xml.len()).unwrap().to_le_bytes();
        let header = [b"libvirt-xml\n \0 \r", &2_u32.to_le_bytes()[..], &length].concat();
        [&header, &[0; 40][..], xml.as_bytes(), &whole[libxl..]].concat()
    };
    let xl_text = format!("name = \"w{HOSTILE}\"\nmemory = 4\n{HOSTILE} = \"{HOSTILE}\"\n");
    let mut text = with_config(&tpv, xl_text.as_bytes());
    // No JSON: the text of an old xl.
    text[36] &= !1;
    let images = [
        (
            "name",
            with_config(
                &tpv,
                config
                    .replace("\"tpv\"", &format!("\"a{HOSTILE_JSON}\""))
                    .as_bytes(),
            ),
        ),
        (
            "values",
            with_config(
                &tpv,
                config
                    .replace(
                        "/lab/guest/tiny",
                        &format!("{HOSTILE_JSON}\", \"{HOSTILE_JSON}\": \"{HOSTILE_JSON}"),
                    )
                    .as_bytes(),
            ),
        ),
        (
            "type",
            with_config(
                &tpv,
                config
                    .replace("\"pv\"", &format!("\"{HOSTILE_JSON}\""))
                    .as_bytes(),
            ),
        ),
        (
            "broken",
            with_config(&tpv, format!("{{\"{HOSTILE}").as_bytes()),
        ),
        ("text", text),
        (
            "emulator",
            [&whole[..end], &emulator, &whole[end..]].concat(),
        ),
        ("libvirt", libvirt(&xml)),
        (
            "entity",
            libvirt(&format!("<domain>&{HOSTILE};</domain>\0")),
        ),
        ("foreign", HOSTILE.repeat(1000).into_bytes()),
    ];
    let mut paths = Vec::new();
    for (name, bytes) in images {
        let path = directory.join(format!("{name}{HOSTILE}.save"));
        fs::write(&path, bytes).unwrap();
        paths.push(path);
    }
    paths
}

#[test]
fn no_text_of_an_image_is_obeyed_by_a_terminal() {
    let dir = scratch();
    let tpv = image("tpv");
    let out = dir.path().join(format!("out{HOSTILE}"));
    let host = dir.path().join(format!("host{HOSTILE}"));
    let host = backend(&host);
    let mut good = 0;
    for path in hostile_images(dir.path()) {
        let image = arg(&path);
        let commands: [&[&str]; 15] = [
            &["inspect", image],
            &["inspect", "--fields", image],
            &["inspect", "--json", "--fields", image],
            &["inspect", "-vv", image],
            &["verify", image],
            &["verify", "--json", image],
            &["diff", arg(&tpv), image],
            &["diff", "--json", image, arg(&tpv)],
            &["convert", "-vvf", "--to", "xl", image, "-o", arg(&out)],
            &["convert", "-f", "--json", image, "-o", arg(&out)],
            &["edit", "-f", "--uuid", "x", image, "-o", arg(&out)],
            &["edit", "-f", "--name", "x", image, "-o", arg(&out)],
            &["export", "-f", image, "-o", arg(&out)],
            &["restore", "-vv", &host, image],
            &["restore", "--json", "--name", "web", &host, image],
        ];
        for args in commands {
            let ran = run(args);
            assert!(!ran.stderr.contains("panicked"), "{ran:?}");
            let unfit = |c: char| c != '\n' && (c.is_control() || c == '\u{202e}');
            for text in [&ran.stdout, &ran.stderr] {
                assert!(!text.contains(unfit), "{args:?}: {ran:?}");
            }
            if args.contains(&"--json") && ran.code != 64 {
                ran.json();
            }
            good += u32::from(args[0] == "verify" && ran.code == 0);
        }
    }
    // The report of a domain that was made of such an image.
    let host = host.replace("--backend=mock:", "--host=");
    for args in [["mock", "list"], ["mock", "show"]] {
        let ran = run(args.iter().copied().chain([host.as_str()]));
        assert!(!ran.stdout.contains('\u{1b}'), "{ran:?}");
    }
    assert!(good >= 4, "{good} verdicts: the images are not as meant");
}
