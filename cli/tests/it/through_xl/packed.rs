//! `--compress` and `--encrypt-to` through xl, which saves into a pipe of ours.

use super::*;

const RECIPIENT: &str = "age1jmjhnyuegaqsu23rx902autsk2vpsla2dgl94ue7zexngljy5eksc4kure";

/// xl, whose last argument is its output.
fn plays(does: &str) -> String {
    format!("#!/bin/sh\nfor file; do true; done\n{does}\n")
}

fn partial(dir: &Path) -> usize {
    let names = fs::read_dir(dir).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().contains("partial"))
        .count()
}

#[test]
fn what_xl_writes_is_packed_and_named_once_xl_has_succeeded() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let plain = fs::read(&image).unwrap();
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    let identity = format!(
        "{}/src/age/testdata/identity.txt",
        env!("CARGO_MANIFEST_DIR")
    );
    script(
        dir.path(),
        &plays(&format!(
            "test -p \"$file\" || exit 9; cat {} > \"$file\"",
            image.display()
        )),
    );
    for how in [
        &["--compress", "zstd"][..],
        &["--encrypt-to", RECIPIENT],
        &["--compress=zstd", &format!("--encrypt-to={RECIPIENT}")],
    ] {
        let line = [&["save"], how, &["-c", "web", at]].concat();
        ran(beside(dir.path(), &line)).code(0);
        let mode = fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!((mode & 0o777, partial(dir.path())), (0o600, 0));
        assert!(fs::read(&file).unwrap() != plain);
        let cat = ["cat", "--layer", "xl", "--identity", &identity, at];
        let mut command = xsr(&cat);
        let out = command.stdout(Stdio::piped()).output().unwrap();
        assert!(out.status.success() && out.stdout == plain, "{how:?}");
    }
    // Nothing that was reserved stays in the file.
    use std::os::unix::fs::MetadataExt as _;
    let found = fs::metadata(&file).unwrap();
    assert!(found.blocks() * 512 < found.len() + (1 << 20), "{found:?}");
}

#[test]
fn an_xl_that_fails_leaves_the_file_as_it_was_and_a_whole_image_is_kept() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    let save = ["save", "--compress", "zstd", "web", at];
    fs::write(&file, "old").unwrap();
    for does in [
        "exit 1".to_owned(),
        format!("head -c 100000 {} > \"$file\"; exit 1", image.display()),
    ] {
        script(dir.path(), &plays(&does));
        ran(beside(dir.path(), &save))
            .code(1)
            .stderr_has("web.save is as it was before");
        assert_eq!(fs::read(&file).unwrap(), b"old");
        assert_eq!(partial(dir.path()), 0);
    }
    // It may have destroyed the domain.
    let all = format!("cat {} > \"$file\"; kill -KILL $$", image.display());
    script(dir.path(), &plays(&all));
    ran(beside(dir.path(), &save))
        .code(1)
        .stderr_has("xl failed after the image was complete: it is ");
    assert_eq!(fs::read(&file).unwrap(), b"old");
    assert_eq!(partial(dir.path()), 1);
}

#[test]
fn an_output_that_fails_ends_xl() {
    let _alone = alone();
    let dir = scratch();
    let image = crate::common::image("tpv");
    script(
        dir.path(),
        &plays(&format!("cat {} > \"$file\"", image.display())),
    );
    let line = ["save", "-c", "--encrypt-to", RECIPIENT, "web", "/dev/full"];
    ran(beside(dir.path(), &line))
        .code(1)
        .stderr_has("writing /dev/full: No space left on device");
}

#[test]
fn what_does_not_go_together_is_refused_before_xl_is_started() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\necho started\n");
    let file = dir.path().join("web.save");
    let at = file.to_str().unwrap();
    for (how, why) in [
        (
            &["--compress", "zstd", "--layout", "mapped"][..],
            "does not go with --layout mapped",
        ),
        (&["--compress", "gzip"], "--compress: expected zstd"),
        (&["--encrypt-to", "age1x"], "expected a recipient"),
    ] {
        let line = [&["save", "-c"], how, &["web", at]].concat();
        let ran = ran(beside(dir.path(), &line)).code(64).stderr_has(why);
        assert_eq!((ran.stdout.as_str(), file.exists()), ("", false));
    }
}
