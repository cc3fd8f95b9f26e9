//! How command lines are passed on.

use super::*;

fn call(words: &[&str]) -> Option<Call> {
    let words: Vec<OsString> = words.iter().map(OsString::from).collect();
    Call::of(&words, None)
}

fn passed(words: &[&str]) -> Vec<String> {
    let call = call(words).unwrap();
    assert!(call.refused.is_empty(), "{call:?}");
    let arguments = call.arguments.into_iter();
    arguments.map(|a| a.into_string().unwrap()).collect()
}

#[test]
fn xls_flags_pass() {
    for words in [
        ["save", "-c", "-p", "web", "web.save"].as_slice(),
        &["restore", "-p", "-e", "-d", "-V", "web.cfg", "web.save"],
        &["migrate", "-s", "ssh -v", "-C", "x.cfg", "-D", "web", "h"],
        &["migrate", "--live", "--debug", "web", "h"],
        &["migrate-receive", "-e", "-d", "-p", "--colo"],
        &["migrate-receive", "-r", "-e"],
        &[
            "remus", "-F", "-b", "-u", "-n", "-d", "-i", "50", "web", "h",
        ],
        &[
            "remus", "-s", "ssh -v", "-N", "x", "-e", "-c", "-p", "web", "h",
        ],
        &["-t", "-f", "save", "web", "web.save"],
        &["save", "--of-a-newer-xl=3", "web", "web.save"],
    ] {
        assert_eq!(passed(words), words);
    }
}

/// The domain is locked by its name, which must not be confused with an option's value.
#[test]
fn the_domain_is_found_among_the_options() {
    for words in [
        ["save", "-c", "web", "f"].as_slice(),
        &[
            "-v", "migrate", "-s", "ssh -v", "-C", "x.cfg", "-D", "web", "h",
        ],
        &["migrate", "-s", "", "--live", "web", "h"],
        &["migrate", "-eC", "x", "-sssh", "web", "h"],
        &["remus", "-Fi", "50", "-N", "x", "-s", "ssh", "web", "h"],
        &["remus", "-i50", "-ub", "--", "web", "h"],
    ] {
        let call = call(words).unwrap();
        let positions = call.words.unwrap().positions;
        let domain = call.arguments[positions[0]].to_str();
        assert_eq!(domain, Some("web"), "{words:?}");
    }
    assert_eq!(call(&["restore", "f"]).unwrap().words, None);
}

#[test]
fn what_is_for_xsr_is_taken_out() {
    let plain = ["save", "-c", "web", "f"];
    for words in [
        ["save", "--backend", "xen", "-c", "web", "f"].as_slice(),
        &["save", "-c", "--backend=xen", "web", "f"],
        &["-q", "save", "--checkpoint", "web", "f"],
        &["save", "--", "-c", "web", "f"],
        &["save", "-c", "--", "web", "f"],
        &["save", "-q", "-c", "web", "f"],
    ] {
        assert_eq!(passed(words), plain, "{words:?}");
    }
    let literal = passed(&["save", "--", "--", "--backend", "xen"]);
    assert_eq!(literal, ["save", "--", "--backend", "xen"]);
    let loud = passed(&["-v", "save", "-vv", "web", "f"]);
    assert_eq!(loud, ["-v", "-v", "-v", "save", "web", "f"]);
    let paused = passed(&["restore", "--paused", "f"]);
    assert_eq!(paused, ["restore", "-p", "f"]);
}

#[test]
fn what_is_for_the_helper_is_set() {
    let set = |words: &[&str]| {
        let call = call(words).unwrap();
        assert!(call.refused.is_empty(), "{call:?}");
        let good = call.settings.iter().all(|setting| setting.check().is_ok());
        let settings = call.settings.into_iter().map(Setting::variable);
        let settings: Vec<_> = settings
            .map(|(name, value)| format!("{name}={}", value.to_str().unwrap()))
            .collect();
        (settings.join(" "), good)
    };
    for words in [
        ["migrate", "--max-downtime", "50", "--threads=3", "web", "h"].as_slice(),
        &["migrate", "web", "h", "--max-downtime=50", "--threads", "3"],
    ] {
        assert_eq!(passed(words), ["migrate", "web", "h"]);
        let expected = "XSR_MAX_DOWNTIME=50 XSR_THREADS=3".to_owned();
        assert_eq!(set(words), (expected, true));
    }
    let words = ["migrate", "--timeout=9", "--on-timeout=cancel", "web", "h"];
    let expected = "XSR_TIMEOUT=9 XSR_ON_TIMEOUT=cancel".to_owned();
    assert_eq!(set(&words), (expected, true));
    for command in COMMANDS {
        let (settings, good) = set(&[command, "--threads=1", "x"]);
        assert_eq!(
            (settings.as_str(), good),
            ("XSR_THREADS=1", true),
            "{command}"
        );
    }
    for bad in ["--threads=0", "--max-downtime=soon", "--on-timeout=wait"] {
        assert!(!set(&["migrate", bad, "web", "h"]).1, "{bad}");
    }
}

#[test]
fn the_layout_of_a_save_is_for_the_helper() {
    let words = ["save", "--layout=mapped", "--page-digests", "web", "f"];
    assert_eq!(passed(&words), ["save", "web", "f"]);
    let call = call(&words).unwrap();
    assert!(call.page_digests && call.settings.iter().all(Setting::is_mapped));
    assert!(!call.settings.iter().any(Setting::is_for_live));
    // A migration has no file.
    let refused = self::call(&["migrate", "--layout", "mapped", "web", "h"]);
    assert!(refused.unwrap().settings.is_empty());
}

#[test]
fn a_live_save_is_for_the_helper() {
    let words = ["save", "--live", "-c", "--max-downtime", "50", "web", "f"];
    assert_eq!(passed(&words), ["save", "-c", "web", "f"]);
    let live = call(&words).unwrap();
    assert!(live.live && live.refused.is_empty());
    let settings: Vec<_> = (live.settings.into_iter()).map(Setting::variable).collect();
    assert_eq!(settings, [("XSR_MAX_DOWNTIME", "50".into())]);
    // It is xl's own option of a migration.
    assert!(!call(&["migrate", "--live", "web", "h"]).unwrap().live);
    assert!(!call(&["save", "web", "f"]).unwrap().live);
}

#[test]
fn what_xl_has_not_is_refused() {
    for (words, refused) in [
        (["restore", "--json", "f"].as_slice(), "--json"),
        (&["migrate", "--no-live", "web", "h"], "--no-live"),
        (&["migrate", "--receiver=x", "web", "h"], "--receiver"),
        (&["remus", "--stats", "web", "h"], "--stats"),
        (&["migrate-receive", "--listen=unix:/x"], "--listen"),
    ] {
        assert_eq!(call(words).unwrap().refused, [refused]);
    }
}

#[test]
fn the_rest_is_for_xsr() {
    for words in [
        [].as_slice(),
        &["-h"],
        &["inspect", "f"],
        &["--help", "save"],
        &["save", "--help"],
        &["save", "--direct", "web", "f"],
        &["save", "--backend"],
        &["save", "--backend", "kvm", "web", "f"],
    ] {
        assert_eq!(call(words), None, "{words:?}");
    }
    let mock = call(&["save", "--backend", "mock:/a", "web", "f"]).unwrap();
    assert_eq!(mock.backend, Backend::Mock("/a".into()));
    let words = ["save", "web", "f"].map(OsString::from);
    let environment = Call::of(&words, Some(OsStr::new("xen"))).unwrap();
    assert_eq!(environment.backend, Backend::Xen);
    assert_eq!(Call::of(&words, None).unwrap().backend, Backend::Auto);
}

#[test]
fn exit_codes_of_xl() {
    use std::os::unix::process::ExitStatusExt as _;
    let code = |status| code_of(ExitStatus::from_raw(status)).ok();
    assert_eq!(code(0), Some(Code::Fine));
    for (xls, ours) in [(1, Code::Failed), (2, Code::Usage), (255, Code::Failed)] {
        assert_eq!(code(xls << 8), Some(ours));
    }
    assert_eq!(code(15), None, "a signal");
}

/// xl runs the tunnel in place of ssh.
#[test]
fn the_options_of_a_session_make_xl_run_the_tunnel() {
    let words = [
        "-t",
        "migrate",
        "--connections",
        "4",
        "--live",
        "--compress=auto",
        "web",
        "h",
    ];
    let passed = passed(&words);
    let [t, migrate, s, tunnel, rest @ ..] = &passed[..] else {
        panic!("{passed:?}")
    };
    assert_eq!([t.as_str(), migrate, s], ["-t", "migrate", "-s"]);
    let options = "'tunnel' '--connections' '4' '--compress' 'auto'";
    assert!(tunnel.ends_with(options), "{tunnel}");
    assert_eq!(rest, ["--live", "web", "h"]);
    let call = call(&words).unwrap();
    call.check_tunnel().unwrap();
    let positions = call.words.unwrap().positions;
    assert_eq!(call.arguments[positions[0]], "web");
    // Other commands of xl do not get it.
    let remus = self::call(&["remus", "--compress", "auto", "web", "h"]).unwrap();
    assert!(remus.tunnel.is_empty());
}

#[test]
fn what_the_tunnel_would_refuse_is_refused_before_xl_runs() {
    for (words, why) in [
        (["--connections", "17"].as_slice(), "17"),
        (&["--compress", "lz4"], "zstd"),
        (&["--tls", "/keys"], "--tls DIR"),
        (&["--tls", "off", "--connections", "2"], "--tls off"),
        (&["--reconnect", "3", "-s", "ssh"], "-s is taken"),
        (&["--reconnect", "3", "-esssh"], "-s is taken"),
    ] {
        let words = ["migrate"].iter().chain(words).chain(&["web", "h"]);
        let call = call(&words.copied().collect::<Vec<_>>()).unwrap();
        let error = call.check_tunnel().unwrap_err();
        assert!(error.is::<BadUsage>(), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    let with_ssh = call(&["migrate", "-s", "ssh -v", "web", "h"]).unwrap();
    with_ssh.check_tunnel().unwrap();
}
