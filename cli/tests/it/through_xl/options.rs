//! Options that xl does not have: they reach the helper, or are refused with a reason.

use super::*;

#[test]
fn the_layout_of_a_save_reaches_the_helper() {
    let _alone = alone();
    let dir = scratch();
    script(
        dir.path(),
        "#!/bin/sh\necho \"$1 $XSR_LAYOUT/$XSR_PAGE_DIGESTS/$XSR_LIVE\"\necho x > $4\n",
    );
    let file = dir.path().join("web.save");
    let file = file.to_str().unwrap();
    let save = |words: &[&str]| {
        let words: Vec<&str> = ["save"].into_iter().chain(words.iter().copied()).collect();
        ran(beside(dir.path(), &words))
    };
    let mapped = ["--layout=mapped", "--page-digests", "--live", "-c", "web"];
    save(&[&mapped[..], &[file]].concat())
        .code(0)
        .stdout_has("save mapped/1/1\n");
    save(&["--layout", "stream", "-c", "web", file])
        .code(0)
        .stdout_has("save stream//\n");
    save(&[&mapped[..], &["-"]].concat())
        .code(64)
        .stderr_has("the mapped layout is for a regular file");
    save(&["--page-digests", "-c", "web", file])
        .code(64)
        .stderr_has("--page-digests is for --layout mapped");
    save(&["--layout=slots", "-c", "web", file])
        .code(64)
        .stderr_has("possible values: stream, mapped");
}

/// libxl's own times cannot be changed.
#[test]
fn the_time_for_a_suspend_is_libxls() {
    let _alone = alone();
    let dir = scratch();
    script(dir.path(), "#!/bin/sh\necho \"$*\"\n");
    for words in [["save", "web", "-"], ["migrate", "web", "h"]] {
        let at = |seconds| {
            beside(
                dir.path(),
                &[&words[..], &["--suspend-timeout", seconds]].concat(),
            )
        };
        ran(at("60")).code(0).stdout_has(words[0]);
        let refused = ran(at("30")).code(64);
        refused.stderr_has("libxl gives a domain 60 s to accept the request");
    }
}
