//! Signals at each phase of the commands that work on files, and of the demo: a table of commands
//! and of patterns of signals, in which each command meets each pattern.

use std::time::Instant;

use super::*;
use crate::bounds::inputs::{Guest, Image, NOTAB, config};

/// The patterns: two signals 0, 5 and 50 ms apart, to the process and to its group, and the two of
/// a terminal that is closed, the second late.
fn patterns() -> Vec<Pair> {
    let [hangup, interrupt, terminate] = ASK;
    let mut patterns = vec![LATE_HANGUP];
    for (milliseconds, pair) in [
        (0, (hangup, hangup)),
        (0, (terminate, interrupt)),
        (5, (interrupt, hangup)),
        (5, (hangup, terminate)),
        (50, (terminate, hangup)),
        (50, (interrupt, interrupt)),
    ] {
        for group in [false, true] {
            patterns.push(Pair {
                first: pair.0,
                second: pair.1,
                gap: Duration::from_millis(milliseconds),
                group,
            });
        }
    }
    patterns
}

/// A command, and what must be so after signals at a phase of it.
struct Row<'r> {
    args: Vec<&'r str>,
    /// The exit code of a whole run.
    fine: i32,
    check: &'r (dyn Fn(&str, &Ran, &str) + Sync),
    /// Makes the next run possible.
    clear: &'r (dyn Fn() + Sync),
}

impl Row<'_> {
    /// Each phase meets a pattern, and each pattern a phase.
    fn run(&self, dir: &Path) {
        let (ran, passed) = staged_in(dir, &self.args).end();
        ran.code(self.fine);
        (self.clear)();
        let (phases, patterns) = (phases(&passed), patterns());
        assert!(!phases.is_empty(), "{:?}", self.args);
        let runs = phases.len().max(patterns.len());
        let phases = phases.iter().cycle().take(runs);
        for ((phase, nth), pair) in phases.zip(patterns.iter().cycle()) {
            let at = format!("{:?}, {phase} {nth}, {pair:?}", self.args);
            let mut command = staged_in(dir, &self.args);
            assert!(command.hold(phase, *nth), "{at}");
            // It says so, or ends without a word: it is not let go before.
            ask(&mut command, *pair, true);
            let (ran, _) = command.end();
            no_force(&ran, &at);
            (self.check)(phase, &ran, &at);
            assert!(partial_files(dir).is_empty(), "{at}");
            (self.clear)();
        }
    }
}

/// A staged command whose temporary files are in `dir`.
fn staged_in(dir: &Path, args: &[&str]) -> Staged {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_xsr"));
    command.args(args).env("TMPDIR", dir);
    staged_command(dir, command)
}

/// An image and a mapped one, in a directory.
fn inputs(kind: &str) -> (Hosts, PathBuf, PathBuf) {
    let hosts = Hosts::with(kind, &[]);
    let [image, mapped] = ["web.save", "mapped.save"].map(|name| hosts.path(name));
    fs::write(&image, hosts.image()).unwrap();
    let line = ["convert", "--layout", "mapped", "--page-digests"];
    run(line.iter().chain(&[arg(&image), "-o", arg(&mapped)])).code(0);
    (hosts, image, mapped)
}

/// Nothing is written, unless it is complete and has its name.
fn writer(kind: &str, line: &[&str]) {
    let (hosts, image, mapped) = inputs(kind);
    let out = hosts.path("out");
    let args = line.iter().map(|word| match *word {
        "IMAGE" => arg(&image),
        "MAPPED" => arg(&mapped),
        "OUT" => arg(&out),
        word => word,
    });
    let row = Row {
        args: args.collect(),
        fine: 0,
        check: &|phase, ran, at| {
            let whole = phase == "output-named";
            assert_eq!(out.exists(), whole, "{at}: {ran:?}");
            let said = match (phase, whole) {
                // Before there is an output, nothing is to be said about it.
                ("image-open", _) => return assert!(matches!(ran.code, 1 | -1), "{at}: {ran:?}"),
                (_, true) => "out is complete",
                (_, false) => "out was not written",
            };
            assert_eq!(ran.code, 1, "{at}: {ran:?}");
            assert!(ran.stderr.contains(said), "{at}: {ran:?}");
        },
        clear: &|| fs::remove_file(&out).unwrap_or_default(),
    };
    row.run(hosts.dir.path());
}

#[test]
fn convert() {
    writer("pv", &["convert", "--to", "libxc", "IMAGE", "-o", "OUT"]);
}

#[test]
fn convert_with_an_index() {
    let line = ["convert", "--layout", "mapped", "IMAGE", "-o", "OUT"];
    writer("pvh", &line);
}

#[test]
fn convert_of_a_mapped_image() {
    writer(
        "hvm",
        &["convert", "--layout", "stream", "MAPPED", "-o", "OUT"],
    );
}

#[test]
fn edit() {
    writer("pvh", &["edit", "--name", "mail", "IMAGE", "-o", "OUT"]);
}

#[test]
fn export() {
    writer("pvh", &["export", "IMAGE", "OUT"]);
}

#[test]
fn export_raw() {
    writer("pv", &["export", "--format", "raw", "IMAGE", "OUT"]);
}

#[test]
fn export_for_gdb() {
    writer("hvm", &["export", "--format", "gdb", "IMAGE", "OUT"]);
}

#[test]
fn cat() {
    writer("pv", &["cat", "IMAGE", "-o", "OUT"]);
}

/// A command that writes no file ends by the first signal.
fn reader(kind: &str, line: &[&str]) {
    let (hosts, image, mapped) = inputs(kind);
    let args = line.iter().map(|word| match *word {
        "IMAGE" => arg(&image),
        "MAPPED" => arg(&mapped),
        word => word,
    });
    let row = Row {
        args: args.collect(),
        fine: 0,
        check: &|_, ran, at| assert_eq!(ran.code, -1, "{at}: {ran:?}"),
        clear: &|| {},
    };
    row.run(hosts.dir.path());
}

#[test]
fn verify() {
    reader("pv", &["verify", "IMAGE"]);
}

#[test]
fn verify_of_digests() {
    reader("pvh", &["verify", "--deep", "MAPPED"]);
}

#[test]
fn inspect() {
    reader("hvm", &["inspect", "--json", "IMAGE"]);
}

#[test]
fn diff() {
    reader("pvh", &["diff", "IMAGE", "MAPPED"]);
}

/// The demo has guests in a directory, which it removes.
#[test]
fn demo() {
    let dir = scratch();
    // Other tests run demos at the same time.
    let left = |pid: u32| {
        let own = format!("xsr-demo-{pid}-");
        let places = [Path::new("/dev/shm"), dir.path()];
        let entries = places
            .into_iter()
            .flat_map(|place| fs::read_dir(place).into_iter().flatten());
        let names = entries.map(|entry| entry.unwrap().path());
        let names = names.filter(|path| path.to_string_lossy().contains(&own));
        names.collect::<Vec<_>>()
    };
    let phases = [
        "created",
        "populate",
        "userdata",
        "output-made",
        "suspended",
        "image-step",
    ];
    for (phase, pair) in phases.iter().cycle().zip(patterns()) {
        let at = format!("{phase}, {pair:?}");
        let mut command = staged_in(dir.path(), &["demo"]);
        assert!(command.hold(phase, 1), "{at}");
        let pid = command.pid();
        assert_eq!(left(pid).len(), 1, "{at}");
        ask(&mut command, pair, true);
        let (ran, _) = command.end();
        no_force(&ran, &at);
        assert_eq!(ran.code, 1, "{at}: {ran:?}");
        assert!(ran.stderr.contains("interrupted"), "{at}: {ran:?}");
        let new = left(pid);
        assert!(new.is_empty(), "{at}: {new:?}");
    }
}

/// The members of a gzip file of an image with many pages: what comes first, and a record of it.
fn many_pages(path: &Path, records: usize) {
    let json = config("hvm", 1) + "}";
    let mut image = Image::wrapped(path, Guest::Hvm, json.as_bytes(), |_| {});
    let entries: Vec<u64> = (0..1024).map(|pfn| pfn | NOTAB).collect();
    for _ in 0..records {
        image.pages(&entries);
    }
    image.end(|_| {});
}

fn gzip_of(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

/// A suspend image of xapi with many pages in an archive; `None` without `python3`.
fn archive(image: &Path, to: &Path) -> Option<()> {
    let libxc = to.with_extension("libxc");
    let suspend = to.with_extension("suspend");
    run(["cat", arg(image), "-o", arg(&libxc)]).code(0);
    crate::foreign::tool("foreign_image.py", &["xapi", arg(&libxc)], &suspend)?;
    crate::foreign::tool("foreign_image.py", &["xva", arg(&suspend)], to)
}

/// Whichever loop over an image's contents it is in, a command does not finish it first. The image
/// has 16 GiB, which are holes in a file, or 15 MiB compressed.
#[test]
fn every_loop_over_an_image_hears() {
    const RECORDS: usize = 4096;
    const RECORD: usize = 4 << 20;
    /// The most phases that a command passes between two looks.
    const FEW: usize = 8;
    let dir = scratch();
    let names = [
        "sparse.save",
        "small.save",
        "packed.gz",
        "out",
        "some.save",
        "vm.xva",
    ];
    let [sparse, small, packed, out, some, xva] = names.map(|name| dir.path().join(name));
    many_pages(&sparse, RECORDS);
    many_pages(&small, 2);
    many_pages(&some, 16);
    // One member for all before the second record, and one for that record, again and again.
    let two = fs::read(&small).unwrap();
    let record = 16 + 1024 * 8 + RECORD;
    let first = two
        .windows(16)
        .position(|window| window[..4] == [1, 0, 0, 0] && window[8..] == 1024_u64.to_le_bytes());
    let second = first.unwrap() + record;
    let mut bytes = gzip_of(&two[..second]);
    let member = gzip_of(&two[second..second + record]);
    for _ in 0..RECORDS {
        bytes.extend(&member);
    }
    fs::write(&packed, bytes).unwrap();
    let has_archive = archive(&some, &xva).is_some();
    let host = dir.path().join("host");
    crate::common::create(&host, "x", "pv");
    let to = backend(&host);
    let [sparse, packed, out, xva] = [&sparse, &packed, &out, &xva].map(|path| arg(path));
    for args in [
        vec!["verify", sparse],
        vec!["inspect", sparse],
        vec!["diff", sparse, sparse],
        vec!["verify", packed],
        vec!["inspect", packed],
        vec!["diff", packed, packed],
        vec!["verify", xva],
        vec!["cat", sparse, "-o", out],
        vec!["convert", "--to", "libxc", sparse, "-o", out],
        vec!["convert", "--to", "xapi", sparse, "-o", out],
        vec!["convert", "--to", "xapi", packed, "-o", out],
        vec!["convert", "--to", "xapi", xva, "-o", out],
        vec!["convert", "--to", "libxc", xva, "-o", out],
        vec!["convert", "--layout", "mapped", packed, "-o", out],
        vec!["edit", "--name", "mail", packed, "-o", out],
        vec!["export", packed, out],
        vec!["export", sparse, out],
        vec!["restore", &to, sparse],
        vec!["restore", &to, packed],
    ] {
        if !has_archive && args.contains(&xva) {
            continue;
        }
        let phase = match args[0] {
            "restore" => "populate",
            // These unpack the image first.
            "export" | "diff" if args[1] == packed => "image-open",
            "verify" | "inspect" | "diff" => "image-step",
            _ => "output-written",
        };
        let mut command = staged_in(dir.path(), &args);
        assert!(command.hold(phase, 1), "{args:?}");
        let asked = Instant::now();
        command.signal(Signal::SIGTERM, false);
        // Most commands are ended by the signal, wherever they are.
        let goes_on = command.until_said("interrupting").is_some();
        assert_eq!(goes_on, args[0] == "restore", "{args:?}");
        let (ran, passed) = command.end();
        let took = asked.elapsed();
        let code = match args[0] {
            "verify" | "inspect" | "diff" => -1,
            _ => 1,
        };
        assert_eq!(ran.code, code, "{args:?}: {ran:?}");
        no_force(&ran, &format!("{args:?}"));
        let held = passed.iter().position(|name| name == phase).unwrap() + 1;
        let after = passed.len() - held;
        assert!(after <= FEW, "{args:?}: {after} phases");
        // A whole run takes minutes in such a build.
        assert!(took < Duration::from_secs(10), "{args:?}: {took:?}");
        assert!(!Path::new(out).exists() && partial_files(dir.path()).is_empty());
        assert!(has(&domains(&host), "x running"), "{args:?}: {ran:?}");
    }
}
