//! docs/json.md names every field that `--json` prints.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use crate::common::{arg, backend, host_with, image, run, scratch};
use serde_json::Value;

/// Keys of all objects in a document, except objects whose keys are data.
fn keys(value: &Value, out: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let is_new = out.insert(key.clone());
                let is_map = ["config", "page_types", "blobs", "userdata"].contains(&key.as_str())
                    || (key == "hvm_params" && value.is_object());
                if !is_map || (is_new && value.is_array()) {
                    keys(value, out);
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| keys(value, out)),
        _ => {}
    }
}

#[test]
fn every_field_is_documented() {
    let dir = scratch();
    let host = host_with("hvm", dir.path());
    let (saved, bad) = (dir.path().join("web.save"), dir.path().join("bad.save"));
    fs::write(&bad, &fs::read(image("tpv")).unwrap()[..5000]).unwrap();
    let backend = backend(&host);
    let (pv, live, pvh) = (image("tpv"), image("tpv-live"), image("tpvh"));
    let commands: [&[&str]; 10] = [
        &["mock", "list", "--json", "--host", arg(&host)],
        &["mock", "show", "--json", "--host", arg(&host), "web"],
        &["save", "--json", &backend, "web", arg(&saved)],
        &["restore", "--json", &backend, arg(&saved)],
        &["inspect", "--json", "--pages", arg(&pv)],
        &["inspect", "--json", arg(&pvh)],
        &["inspect", "--json", arg(&bad)],
        &["verify", "--json", arg(&live)],
        &["verify", "--json", arg(&bad)],
        &["diff", "--json", "--after-restore", arg(&pv), arg(&live)],
    ];
    let mut found = BTreeSet::new();
    for command in commands {
        keys(&run(command).json(), &mut found);
    }
    assert!(found.len() > 60, "{found:?}");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/json.md");
    let page = fs::read_to_string(page).unwrap();
    let words: BTreeSet<&str> = page
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .collect();
    let missing: Vec<_> = found
        .iter()
        .filter(|key| !words.contains(key.as_str()))
        .collect();
    assert!(missing.is_empty(), "not in docs/json.md: {missing:?}");
}

/// Commands that change a domain of a mock machine print its new state.
#[test]
fn mock_says_what_was_done() {
    let dir = scratch();
    let host = dir.path().join("host");
    let mock = |what: &[&str]| {
        let args = [&["mock"], what, &["--json", "--host", arg(&host)]].concat();
        run(args).code(0).json()
    };
    let expected = |name: &str, state: &str| serde_json::json!({ "version": 2, "name": name, "domid": 1, "state": state });
    let made = mock(&["create", "web", "--memory", "8M"]);
    assert_eq!(made, expected("web", "running"));
    assert_eq!(mock(&["pause", "1"]), expected("web", "paused"));
    assert_eq!(mock(&["unpause", "web"]), expected("web", "running"));
    let renamed = mock(&["rename", "web", "www"]);
    assert_eq!(renamed, expected("www", "running"));
    let busy = mock(&["workload", "www", "--dirty-rate", "5"]);
    assert_eq!(busy, expected("www", "running"));
    assert_eq!(mock(&["destroy", "www"]), expected("www", "destroyed"));
    let gone = ["mock", "destroy", "www", "--json", "--host", arg(&host)];
    let failed = run(gone).code(1).json();
    assert_eq!(failed["exit_code"], 1, "{failed}");
}

/// `-V` is one line; `--version` also lists the supported Xen versions.
#[test]
fn the_version_says_what_it_works_on() {
    let short = run(["-V"]).code(0).stdout;
    assert_eq!(short, format!("xsr {}\n", env!("CARGO_PKG_VERSION")));
    let long = run(["--version"]).code(0);
    assert!(long.stdout.starts_with(short.trim_end()), "{long:?}");
    long.stdout_has("\nworks on Xen 4.14 to 4.22, and on mock machines\n");
}
