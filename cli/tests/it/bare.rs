//! Images without configuration: bare libxl and libxc streams, for which the command line supplies
//! what the image lacks.

use std::fs;
use std::path::{Path, PathBuf};

use crate::common::{arg, backend, image, layers, ran, run, scratch, xsr};

/// The layers of an xl image, each as an image of its own.
fn bare(directory: &Path, name: &str) -> [PathBuf; 2] {
    let bytes = fs::read(image(name)).unwrap();
    let (libxl, libxc, end) = layers(&bytes);
    let paths = ["bare.libxl", "bare.libxc"].map(|name| directory.join(name));
    fs::write(&paths[0], &bytes[libxl..]).unwrap();
    fs::write(&paths[1], &bytes[libxc..end]).unwrap();
    paths
}

#[test]
fn bare_streams_are_restored_too() {
    for name in ["tpv", "tpvh"] {
        let dir = scratch();
        for stream in bare(dir.path(), name) {
            let host = dir.path().join("host");
            let backend = backend(&host);
            run(["verify", arg(&stream)]).code(0);
            // Everything is found in the image except the name, which is the file's.
            run(["restore", &backend, arg(&stream)]).code(0);
            let again = dir.path().join("again.save");
            run(["save", &backend, "bare", arg(&again)]).code(0);
            let diff = run([
                "diff",
                "--json",
                "--after-restore",
                arg(&stream),
                arg(&again),
            ]);
            let sections: Vec<_> = diff.json()["differences"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|d| d.get("expected").is_none())
                .map(|d| d["section"].as_str().unwrap().to_owned())
                .filter(|section| section != "headers" && section != "records")
                .collect();
            assert_eq!(sections, Vec::<String>::new(), "{diff:?}");
            // Or it is given as options.
            let said = ["--name", "said", "--vcpus", "3", "--memory", "8M"];
            let args = ["restore", &backend].into_iter().chain(said);
            run(args.chain([arg(&stream)])).code(0);
            let shown = run(["mock", "show", "--json", "said", "--host", arg(&host)]).json();
            assert_eq!(shown["vcpus"], 3);
            assert_eq!(shown["max_pages"], (8 << 8) + 256);
            run(["mock", "destroy", "said", "--host", arg(&host)]).code(0);
        }
    }
}

#[test]
fn a_bare_stream_from_a_pipe_needs_to_be_told_what_it_is() {
    for (name, kind, other) in [("tpv", "pv", "hvm"), ("tpvh", "pvh", "pv")] {
        let dir = scratch();
        let host = dir.path().join("host");
        let backend = backend(&host);
        let [_, stream] = bare(dir.path(), name);
        let restore = |options: &[&str]| {
            let args = ["restore", &backend, "--name", "said", "--vcpus", "1"];
            let mut restore = xsr(args.iter().chain(options).chain(&["-"]));
            restore.write_stdin(fs::read(&stream).unwrap());
            ran(restore)
        };
        // A pipe cannot be read twice.
        restore(&[]).code(64).stderr_has("--type");
        restore(&["--type", kind]).code(64).stderr_has("--memory");
        restore(&["--type", other, "--memory", "8M"])
            .code(64)
            .stderr_has("the image is of");
        assert!(!host.exists(), "a host was made for nothing");
        restore(&["--type", kind, "--memory", "8M"]).code(0);
        let shown = run(["mock", "show", "--json", "said", "--host", arg(&host)]).json();
        assert_eq!((&shown["kind"], &shown["vcpus"]), (&kind.into(), &1.into()));
    }
}

#[test]
fn a_name_that_the_file_does_not_give_is_asked_for() {
    let dir = scratch();
    let host = dir.path().join("host");
    let [_, stream] = bare(dir.path(), "tpv");
    let odd = dir.path().join("no good name!.libxc");
    fs::rename(&stream, &odd).unwrap();
    run(["restore", &backend(&host), arg(&odd)])
        .code(1)
        .stderr_has("--name");
    run(["restore", &backend(&host), "--name", "good", arg(&odd)]).code(0);
    run(["restore", &backend(&host), "--name", "good", arg(&odd)])
        .code(1)
        .stderr_has("another with --name");
}
