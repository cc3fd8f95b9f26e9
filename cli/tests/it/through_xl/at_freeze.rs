//! `--at-freeze` through xl: the helper runs the program at the freeze, and xsr tells it how the
//! save ended.

use super::*;

/// xl, and the helper that it starts: the program is run, and the image is written or not.
fn plays(does: &str) -> String {
    format!(
        "#!/bin/sh\nfor file; do true; done\n\
         echo \"program=$XSR_AT_FREEZE limit=${{XSR_AT_FREEZE_LIMIT-none}} file=$XSR_HELPER_FILE\"\n\
         printf '7\\0web\\0uuid-7\\0%s' \"$XSR_HELPER_FILE\" > \"$XSR_HELPER_FROZEN\"\n{does}\n"
    )
}

fn program(dir: &Path) -> PathBuf {
    let path = dir.join("program");
    let told = dir.join("told");
    let script = format!(
        "#!/bin/sh\necho $XSR_PHASE $XSR_DOMID $XSR_NAME $XSR_UUID $XSR_FILE >> {}\n\
         test -e $XSR_FILE && echo there >> {}\nexit 0\n",
        told.display(),
        told.display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn the_program_learns_whether_the_image_has_its_name() {
    let _alone = alone();
    let dir = scratch();
    let program = program(dir.path());
    let [file, told] = ["web.save", "told"].map(|name| dir.path().join(name));
    let (at, path) = (file.to_str().unwrap(), program.to_str().unwrap());
    let image = crate::common::image("tpv");
    let all = format!("cat {} > \"$file\"", image.display());
    let saved = format!("saved 7 web uuid-7 {at}\nthere\n");
    let failed = format!("failed 7 web uuid-7 {at}\n");
    for (does, code, expected) in [
        (all.clone(), 0, &saved),
        ("echo half > \"$file\"; exit 1".to_owned(), 1, &failed),
        ("exit 0".to_owned(), 1, &failed),
    ] {
        script(dir.path(), &plays(&does));
        let line = [
            "save",
            "--at-freeze",
            path,
            "--at-freeze-limit=7",
            "web",
            at,
        ];
        ran(beside(dir.path(), &line))
            .code(code)
            .stdout_has(&format!("program={path} limit=7 file={at}\n"));
        assert_eq!(fs::read_to_string(&told).unwrap(), *expected, "{does}");
        fs::remove_file(&told).unwrap();
        fs::remove_file(&file).ok();
    }
    // xl was killed after the image was complete: it is kept, and so is the snapshot.
    script(dir.path(), &plays(&format!("{all}; kill -KILL $$")));
    let mut command = beside(dir.path(), &["save", "web", at]);
    command.env("XSR_AT_FREEZE", path);
    ran(command)
        .code(1)
        .stderr_has("xl failed after the image was complete");
    let told = fs::read_to_string(&told).unwrap();
    assert_eq!(told, saved.replace("there\n", ""));
}

/// It is told by this process, after xl has ended, and may take long.
#[test]
fn a_user_who_insists_ends_a_program_that_is_told() {
    let _alone = alone();
    let dir = scratch();
    let program = dir.path().join("program");
    let [at, pid] = ["web.save", "pid"].map(|name| dir.path().join(name));
    let waits = format!("#!/bin/sh\necho $$ > {}\nexec sleep 60\n", pid.display());
    fs::write(&program, waits).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let image = crate::common::image("tpv");
    let saves = format!("cat {} > \"$file\"; echo ready", image.display());
    let saves = plays(&saves).replace("echo \"program", ": \"program");
    script(dir.path(), &saves);
    let limit = ["--at-freeze-limit", "60"];
    let words = ["save", "--at-freeze", program.to_str().unwrap()];
    let words = [&words[..], &limit, &["web", at.to_str().unwrap()]].concat();
    let mut command = hearing(beside(dir.path(), &words));
    command.stderr(Stdio::piped());
    let (mut child, _held, _lines) = ready(command);
    let told = || fs::read_to_string(&pid).is_ok_and(|pid| pid.ends_with('\n'));
    crate::common::migration::until("the program is told", told);
    let asked = Pid::from_raw(child.id().try_into().unwrap());
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    kill(asked, Signal::SIGTERM).unwrap();
    let announced = said.next().unwrap().unwrap();
    assert!(
        announced.contains("is told how the save ended"),
        "{announced}"
    );
    std::thread::sleep(std::time::Duration::from_millis(1100));
    kill(asked, Signal::SIGTERM).unwrap();
    let said: String = said.map(Result::unwrap).collect();
    assert!(said.contains("was not told how the save ended"), "{said}");
    assert_eq!(child.wait().unwrap().code(), Some(130), "{said}");
    let number = fs::read_to_string(&pid).unwrap();
    let gone = || !Path::new(&format!("/proc/{}", number.trim())).exists();
    crate::common::migration::until("the program is killed", gone);
    assert!(at.exists());
}

#[test]
fn a_program_that_was_not_run_is_told_nothing() {
    let _alone = alone();
    let dir = scratch();
    let program = program(dir.path());
    let file = dir.path().join("web.save");
    let (at, path) = (file.to_str().unwrap(), program.to_str().unwrap());
    script(dir.path(), "#!/bin/sh\nexit 1\n");
    let line = ["save", "--at-freeze", path, "web", at];
    ran(beside(dir.path(), &line)).code(1);
    assert!(!dir.path().join("told").exists());
}

#[test]
fn wrong_programs_and_outputs_are_refused_before_xl_is_started() {
    let _alone = alone();
    let dir = scratch();
    let program = program(dir.path());
    let file = dir.path().join("web.save");
    let (at, path) = (file.to_str().unwrap(), program.to_str().unwrap());
    script(dir.path(), "#!/bin/sh\necho started\n");
    for (line, why) in [
        (
            ["--at-freeze=x", "-c", "web", at],
            "--at-freeze x: expected an absolute path",
        ),
        (
            ["--at-freeze-limit=5", "-c", "web", at],
            "--at-freeze-limit is for the program",
        ),
        (
            ["--at-freeze-limit=0", "-c", "web", at],
            "0 is not in 1..=3600",
        ),
        (
            [&format!("--at-freeze={path}"), "-c", "web", "/dev/null"],
            "--at-freeze is for a save to a file",
        ),
    ] {
        let line = [&["save"], &line[..]].concat();
        let ran = ran(beside(dir.path(), &line)).code(64).stderr_has(why);
        assert_eq!(ran.stdout, "");
    }
    assert!(!file.exists());
}
