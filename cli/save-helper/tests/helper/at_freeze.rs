//! `XSR_AT_FREEZE`: a program that runs while libxl has the domain suspended.

use std::os::unix::fs::PermissionsExt as _;

use xsr_save_restore::at_freeze::FrozenGuest;

use super::*;

/// A program that appends what it is told to the file `told`, prints a line, and then does this.
fn program(dir: &Path, does: &str) -> PathBuf {
    let path = dir.join("program");
    let script = format!(
        "#!/bin/sh\n{{ env | sort | grep ^XSR_; ls /proc/$$/fd; echo; }} >> {}\necho said\n{does}\n",
        dir.join("told").display()
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// What the program was told.
fn told(dir: &Path) -> String {
    fs::read_to_string(dir.join("told")).unwrap_or_default()
}

/// A save by the helper into this stream, with the program and further variables.
fn saved(
    dir: &Path,
    (host, args): (&Path, &str),
    stream: impl Into<Stdio>,
    variables: &[(&str, &str)],
) -> Run {
    let mut command = command(host, args, stream, "8</dev/null");
    command.env("XSR_AT_FREEZE", dir.join("program"));
    command.envs(variables.iter().copied());
    play(command.spawn().unwrap(), |number| match number {
        POSTCOPY => Some(1),
        other => fine(other),
    })
}

#[test]
fn it_runs_while_the_domain_is_suspended_and_learns_that_the_image_is_there() {
    for kind in [GuestKind::Pv, GuestKind::Pvh] {
        let scratch = scratch();
        let dir = scratch.path();
        let (path, domid) = host(dir, kind, 8);
        program(dir, "");
        let file = dir.join("s");
        let stream = File::create(&file).unwrap();
        let run = saved(dir, (&path, &save_args(domid, 0)), stream, &[]);
        assert_eq!(run.completed(), (0, Errno::from_raw(0)), "{run:?}");
        run.logged(5, "at the freeze, stdout: said");
        run.logged(5, "XSR_AT_FREEZE: the program ran for ");
        let told = told(dir);
        for line in [
            "XSR_NAME=web\n".to_owned(),
            format!("XSR_FILE={}\n", file.display()),
        ] {
            assert_eq!(told.matches(&line).count(), 2, "{line} {told}");
        }
        assert_eq!(told.matches(&format!("XSR_DOMID={}\n", domid.0)).count(), 2);
        assert_eq!(told.matches("XSR_UUID=").count(), 2);
        let [frozen, saved] = ["XSR_PHASE=frozen", "XSR_PHASE=saved"].map(|at| told.find(at));
        assert!(frozen.unwrap() < saved.unwrap(), "{told}");
        // The helper's settings are not its environment, and it has no descriptor of libxl's.
        assert!(!told.contains("XSR_AT_FREEZE"), "{told}");
        assert!(!told.contains("\n7\n") && !told.contains("\n8\n"), "{told}");
        assert!(fs::read(&file).unwrap() == by_the_engine(kind, 8));
    }
}

#[test]
fn if_it_fails_or_hangs_the_save_fails_and_it_is_told_so() {
    let scratch = scratch();
    let dir = scratch.path();
    let (path, domid) = host(dir, GuestKind::Pvh, 8);
    for (does, why) in [
        ("[ $XSR_PHASE = failed ]", "it failed (exit status: 1)"),
        (
            "[ $XSR_PHASE = failed ] || sleep 60",
            "has not ended within 1 s, and was killed",
        ),
    ] {
        program(dir, does);
        let stream = File::create(dir.join("s")).unwrap();
        let variables = [("XSR_AT_FREEZE_LIMIT", "1")];
        let run = saved(dir, (&path, &save_args(domid, 0)), stream, &variables);
        assert_eq!(run.completed().0, -1, "{run:?}");
        run.logged(8, why);
        let told = told(dir);
        assert_eq!(told.matches("XSR_PHASE=failed").count(), 1, "{told}");
        assert!(!told.contains("XSR_PHASE=saved"), "{told}");
        fs::remove_file(dir.join("told")).unwrap();
        // libxl resumes it.
        MockHost::open(&path)
            .unwrap()
            .domain(domid)
            .unwrap()
            .resume()
            .unwrap();
    }
}

#[test]
fn it_never_runs_in_a_migration_or_under_remus() {
    let scratch = scratch();
    let dir = scratch.path();
    let (path, domid) = host(dir, GuestKind::Pvh, 8);
    program(dir, "");
    // A pipe, as `xl migrate` gives it; a file whose pages are all sent twice; Remus into a file.
    let remus = format!("--save-domain 7 -1 {} 1 184 1", domid.0);
    let file = || Stdio::from(File::create(dir.join("s")).unwrap());
    let (mut reader, writer) = std::io::pipe().unwrap();
    let reading = std::thread::spawn(move || std::io::copy(&mut reader, &mut std::io::sink()));
    for (args, stream) in [
        (save_args(domid, 1), Stdio::from(writer)),
        (save_args(domid, 3), file()),
        (remus, file()),
    ] {
        let run = saved(dir, (&path, &args), stream, &[]);
        run.logged(7, "XSR_AT_FREEZE is for a save to a file: ");
        assert_eq!((run.completed().0, told(dir).as_str()), (0, ""), "{run:?}");
        let host = MockHost::open(&path).unwrap();
        let domain = host.domain(domid).unwrap();
        if domain.info().unwrap().shutdown.is_some() {
            domain.resume().unwrap();
        }
    }
    assert!(reading.join().unwrap().unwrap() > 0);
}

#[test]
fn a_wrong_setting_fails_the_save_before_the_domain_is_touched() {
    let scratch = scratch();
    let dir = scratch.path();
    let (path, domid) = host(dir, GuestKind::Pvh, 8);
    let program = program(dir, "");
    for (variable, value, why) in [
        (
            "XSR_AT_FREEZE",
            "program",
            "program: expected an absolute path",
        ),
        (
            "XSR_AT_FREEZE",
            "/none",
            "XSR_AT_FREEZE: /none: No such file",
        ),
        (
            "XSR_AT_FREEZE_LIMIT",
            "0",
            "XSR_AT_FREEZE_LIMIT is 0, expected 1 to 3600 seconds",
        ),
        ("XSR_AT_FREEZE_LIMIT", "x", "expected a number of seconds"),
    ] {
        let stream = File::create(dir.join("s")).unwrap();
        let variables = [(variable, value)];
        let run = saved(dir, (&path, &save_args(domid, 0)), stream, &variables);
        assert_eq!((run.completed().0, run.numbers()), (-1, vec![COMPLETE]));
        run.logged(8, why);
    }
    fs::set_permissions(&program, fs::Permissions::from_mode(0o777)).unwrap();
    let stream = File::create(dir.join("s")).unwrap();
    let run = saved(dir, (&path, &save_args(domid, 0)), stream, &[]);
    assert_eq!((run.completed().0, run.numbers()), (-1, vec![COMPLETE]));
    run.logged(8, "can be written by other users");
    assert_eq!(told(dir), "");
}

/// `xsr save` knows when the image has its final name, and tells the program itself.
#[test]
fn under_xsr_save_it_is_only_run_for_the_freeze() {
    let scratch = scratch();
    let dir = scratch.path();
    let (path, domid) = host(dir, GuestKind::Pvh, 8);
    let frozen = dir.join("frozen");
    for (does, retval) in [("", 0), ("exit 1", -1)] {
        program(dir, does);
        let variables = [
            ("XSR_HELPER_FROZEN", frozen.to_str().unwrap()),
            ("XSR_HELPER_FILE", "/srv/web.save"),
        ];
        let stream = File::create(dir.join("s")).unwrap();
        let run = saved(dir, (&path, &save_args(domid, 0)), stream, &variables);
        assert_eq!(run.completed().0, retval, "{run:?}");
        let told = told(dir);
        assert_eq!(told.matches("XSR_PHASE=").count(), 1, "{told}");
        assert!(told.contains("XSR_FILE=/srv/web.save\n"), "{told}");
        let about = FrozenGuest::from_bytes(&fs::read(&frozen).unwrap()).unwrap();
        assert_eq!((about.domid, about.name.as_str()), (domid, "web"));
        assert_eq!(about.file, Path::new("/srv/web.save"));
        fs::remove_file(dir.join("told")).unwrap();
        MockHost::open(&path)
            .unwrap()
            .domain(domid)
            .unwrap()
            .resume()
            .unwrap();
    }
}
