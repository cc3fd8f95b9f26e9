//! `xsr tunnel`, with a script in place of ssh that runs the other end on this machine, and `xsr
//! migrate` in place of xl: it runs the command that `-s` names as xl does, and says the same.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::migration::{Hosts, until};
use crate::common::{backend, run, scratch};
use crate::session::{Holds, Relay};

/// A script in place of ssh, and what it is given.
struct Network {
    dir: TempDir,
    ssh: PathBuf,
}

impl Network {
    /// Everything is direct.
    fn new() -> Self {
        Self::with("exec sh -c \"$*\"")
    }

    /// The tunnel connects to a relay, which cuts after so many bytes.
    fn relayed(after: u64, cuts: u64, ends: bool) -> (Self, Arc<Relay>) {
        Self::relay(after, cuts, ends, None)
    }

    fn relay(after: u64, cuts: u64, ends: bool, holds: Option<Holds>) -> (Self, Arc<Relay>) {
        let dir = scratch();
        let port = dir.path().join("port");
        let at = port.clone();
        let to = move || fs::read_to_string(&at).unwrap().trim().parse().unwrap();
        let relay = Relay::made(to, after, cuts, ends, holds);
        // The address in the receiver's line becomes the relay's.
        let replace = format!(
            "sh -c \"$*\" | sed -u -e '1h' -e '1s/.* 127.0.0.1:\\([0-9]*\\)$/\\1/w {}' -e '1g' \
             -e '1s/:[0-9]*$/:{}/'",
            port.display(),
            relay.port
        );
        (Self::at(dir, &replace), relay)
    }

    fn with(script: &str) -> Self {
        Self::at(scratch(), script)
    }

    fn at(dir: TempDir, script: &str) -> Self {
        let ssh = dir.path().join("ssh");
        let text = format!("#!/bin/sh\n[ \"$1\" = other ] || exit 9\nshift\n{script}\n");
        fs::write(&ssh, text).unwrap();
        fs::set_permissions(&ssh, fs::Permissions::from_mode(0o755)).unwrap();
        Self { dir, ssh }
    }

    /// The words of a tunnel, up to HOST.
    fn words(&self, options: &[&str]) -> Vec<String> {
        let remote = format!(
            "{} tunnel --listen-address 127.0.0.1",
            env!("CARGO_BIN_EXE_xsr")
        );
        let ssh = self.ssh.to_str().unwrap();
        let words = ["tunnel", "-s", ssh, "--remote", &remote];
        let words = words.iter().chain(options).chain(&["other"]);
        words.map(ToString::to_string).collect()
    }

    fn start(&self, options: &[&str], command: &str) -> Child {
        self.tunnel(options, command).spawn().unwrap()
    }

    /// A tunnel that is not started yet.
    fn tunnel(&self, options: &[&str], command: &str) -> Command {
        let mut tunnel = Command::new(env!("CARGO_BIN_EXE_xsr"));
        tunnel
            .args(self.words(options))
            .arg(command)
            .env_remove("XSR_LOG")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        tunnel
    }

    /// A FIFO for a command that waits.
    fn fifo(&self) -> PathBuf {
        let fifo = self.path("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        fifo
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..=250_u8).cycle().take(bytes).collect()
}

/// Writes all of it to the tunnel and closes it; returns the output, and the exit code.
fn through(mut tunnel: Child, bytes: &[u8]) -> (Vec<u8>, String, Option<i32>) {
    let mut stdin = tunnel.stdin.take().unwrap();
    let output = thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(bytes).unwrap());
        tunnel.wait_with_output().unwrap()
    });
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    (output.stdout, errors, output.status.code())
}

#[test]
fn all_three_streams_and_the_exit_code_pass() {
    let network = Network::new();
    let bytes = pattern(3 << 20);
    for options in [
        [].as_slice(),
        &["--connections", "3", "--compress", "auto"],
        &["--reconnect", "0"],
        &["--tls", "off", "--compress", "zstd"],
    ] {
        let tunnel = network.start(options, "cat; echo 'it is over' >&2; exit 7");
        let (stdout, stderr, code) = through(tunnel, &bytes);
        assert!(stdout == bytes, "{options:?}: {} bytes", stdout.len());
        assert_eq!(
            (stderr.as_str(), code),
            ("it is over\n", Some(7)),
            "{options:?}"
        );
    }
}

/// All words after HOST are COMMAND's, and a shell reads them there, as ssh's.
#[test]
fn words_after_the_host_belong_to_the_command() {
    let network = Network::new();
    let mut words = network.words(&["-q"]);
    words.extend(["printf", "%s.", "--reconnect", "'a b'", "$((1+1))"].map(str::to_owned));
    assert_eq!(run(words).code(0).stdout, "--reconnect.a b.2.");
}

#[test]
fn a_tunnel_that_fails_itself_exits_with_255() {
    let network = Network::with("echo hello; exit 3");
    let mut words = network.words(&[]);
    words.push("true".to_owned());
    run(words).code(255).stderr_has("offers no session");
    for (options, why) in [
        (["--tls", "/keys"], "--tls DIR is for"),
        (["--connections", "17"], "17"),
    ] {
        let mut words = network.words(&options);
        words.push("true".to_owned());
        run(words).code(64).stderr_has(why);
    }
    run(["tunnel", "-s", "", "--", "-o", "true"])
        .code(64)
        .stderr_has("would be an option");
    run(["tunnel", "other"]).code(64);
    // The command is not there.
    let network = Network::new();
    let mut words = network.words(&[]);
    words.push("/no/such/command".to_owned());
    run(words).code(127).stderr_has("no/such/command");
}

/// Either direction can end before the other one, and the end is noticed at once.
#[test]
fn each_direction_ends_by_itself() {
    let network = Network::new();
    let fifo = network.fifo();
    // The command's stdout ends, and it goes on to read.
    let command = format!("exec >&-; cat >{}", fifo.display());
    let mut tunnel = network.start(&[], &command);
    let mut none = Vec::new();
    tunnel
        .stdout
        .take()
        .unwrap()
        .read_to_end(&mut none)
        .unwrap();
    assert!(none.is_empty());
    let mut stdin = tunnel.stdin.take().unwrap();
    stdin.write_all(b"still read").unwrap();
    drop(stdin);
    assert_eq!(fs::read(&fifo).unwrap(), b"still read");
    assert_eq!(tunnel.wait().unwrap().code(), Some(0));
    // Its stdin ends, and it goes on to write.
    let command = format!("exec <&-; echo begun; cat {}", fifo.display());
    let mut tunnel = network.start(&[], &command);
    let mut stdin = tunnel.stdin.take().unwrap();
    let bytes = pattern(1 << 16);
    let refused = loop {
        if let Err(error) = stdin.write_all(&bytes) {
            break error;
        }
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::BrokenPipe);
    fs::write(&fifo, "more").unwrap();
    let output = tunnel.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"begun\nmore");
    assert_eq!(output.status.code(), Some(0));
    // Its stdout is not read here.
    let mut tunnel = network.start(&[], "trap '' PIPE; yes >/dev/stdout; echo $? >&2; exit 4");
    drop(tunnel.stdout.take());
    let output = tunnel.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(4));
}

/// What cannot be passed on is a failure of the tunnel, although the command may have succeeded.
#[test]
fn a_stdin_or_stdout_that_fails_ends_the_tunnel() {
    let network = Network::new();
    let done = network.path("done");
    // The disk is full.
    let command = format!("echo lost; cat >/dev/null; echo over >{}", done.display());
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut tunnel = network.tunnel(&["--reconnect", "3600"], &command);
    let tunnel = tunnel.stdout(full).spawn().unwrap();
    let ended = tunnel.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(255), "{said}");
    assert!(said.contains("writing stdout: No space left"), "{said}");
    until("the command's stdin ends", || done.exists());
    // The end of what was read is not the end of stdin.
    let directory = File::open(network.dir.path()).unwrap();
    let mut tunnel = network.tunnel(&[], "cat");
    let tunnel = tunnel.stdin(directory).spawn().unwrap();
    let ended = tunnel.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(255), "{said}");
    assert!(said.contains("reading stdin: Is a directory"), "{said}");
}

/// Another process that shares it may have set O_NONBLOCK.
#[test]
fn a_stdout_that_does_not_block_is_waited_for() {
    let network = Network::new();
    let bytes = pattern(3 << 20);
    let (mut from, to) = UnixStream::pair().unwrap();
    to.set_nonblocking(true).unwrap();
    let mut command = network.tunnel(&[], "cat");
    command.stdout(OwnedFd::from(to.try_clone().unwrap()));
    let mut tunnel = command.spawn().unwrap();
    // It has the descriptor, too.
    drop(command);
    let mut stdin = tunnel.stdin.take().unwrap();
    let mut passed = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            stdin.write_all(&bytes).unwrap();
            drop(stdin);
        });
        until("the socket is full", || {
            let mut room = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
            poll(&mut room, 0_u8).unwrap() == 0
        });
        drop(to);
        from.read_to_end(&mut passed).unwrap();
    });
    assert!(passed == bytes, "{} bytes", passed.len());
    assert_eq!(tunnel.wait().unwrap().code(), Some(0));
}

/// The same for stderr. What the command says on stdout does not wait for it.
#[test]
fn a_stderr_that_does_not_block_is_waited_for() {
    let network = Network::new();
    let (mut from, to) = UnixStream::pair().unwrap();
    to.set_nonblocking(true).unwrap();
    let fifo = network.fifo();
    let does = format!(
        "head -c 1000000 /dev/zero >&2; echo said; cat {}",
        fifo.display()
    );
    let mut command = network.tunnel(&[], &does);
    command.stderr(OwnedFd::from(to.try_clone().unwrap()));
    let mut tunnel = command.spawn().unwrap();
    drop(command);
    until("the socket is full", || {
        let mut room = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
        poll(&mut room, 0_u8).unwrap() == 0
    });
    drop(to);
    let mut said = String::new();
    let mut stdout = BufReader::new(tunnel.stdout.take().unwrap());
    stdout.read_line(&mut said).unwrap();
    assert_eq!(said, "said\n");
    from.read_exact(&mut vec![0; 1_000_000]).unwrap();
    fs::write(&fifo, "").unwrap();
    assert_eq!(tunnel.wait().unwrap().code(), Some(0));
}

/// Signals that are sent to process groups are ignored by an end that a command here has started.
fn interrupt(process: u32) {
    let process = Pid::from_raw(i32::try_from(process).unwrap());
    signal::kill(process, Signal::SIGALRM).unwrap();
}

/// Neither end waits for a link that the other one does not make again.
#[test]
fn a_signal_at_one_end_is_noticed_at_the_other() {
    let network = Network::new();
    let (done, far) = (network.path("done"), network.path("far"));
    let command = format!("echo $PPID >{}; {}", far.display(), reads_all(&done));
    for here in [true, false] {
        let mut tunnel = network.start(&["--reconnect", "3600"], &command);
        // Its stdin stays open.
        let stdin = tunnel.stdin.take();
        until_it_begins(&mut tunnel);
        match here {
            true => interrupt(tunnel.id()),
            false => {
                let far = fs::read_to_string(&far).unwrap();
                interrupt(far.trim().parse().unwrap());
            }
        }
        until("the command's stdin ends", || done.exists());
        until("the tunnel ends", || tunnel.try_wait().unwrap().is_some());
        let ended = tunnel.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert_eq!(ended.status.code(), Some(255), "{said}");
        let why = if here { "interrupted" } else { "is lost" };
        assert!(said.contains(why), "{said}");
        drop(stdin);
        fs::remove_file(&done).unwrap();
    }
}

/// A process that the command leaves running keeps its stdout open, and not the tunnel.
#[test]
fn the_tunnel_ends_with_the_command() {
    let network = Network::new();
    let fifo = network.fifo();
    let command = format!("cat {} & exit 5", fifo.display());
    let mut tunnel = network.start(&[], &command);
    assert_eq!(tunnel.wait().unwrap().code(), Some(5));
    // The process still waits.
    fs::write(&fifo, "").unwrap();
}

#[test]
fn bytes_pass_whole_though_the_links_are_cut() {
    let bytes = pattern(12 << 20);
    for links in ["1", "3"] {
        let (network, relay) = Network::relayed(1_234_567, 6, false);
        let tunnel = network.start(&["--connections", links, "--reconnect", "30"], "cat");
        let (stdout, stderr, code) = through(tunnel, &bytes);
        assert_eq!(code, Some(0), "{stderr}");
        assert!(stdout == bytes, "{} bytes", stdout.len());
        assert!(relay.over.load(Ordering::Relaxed), "it was cut");
    }
}

/// Waits until the command, which says that it has begun, is connected.
fn until_it_begins(tunnel: &mut Child) {
    let mut begun = [0; 6];
    let stdout = tunnel.stdout.as_mut().unwrap();
    stdout.read_exact(&mut begun).unwrap();
    assert_eq!(&begun, b"begun\n");
}

/// A command that says that it has begun, reads its stdin to the end, and leaves a file then.
fn reads_all(done: &Path) -> String {
    format!("echo begun; cat >/dev/null; echo over >{}", done.display())
}

#[test]
fn a_link_that_does_not_return_ends_both_ends() {
    let (network, relay) = Network::relayed(u64::MAX, 1, true);
    let done = network.path("done");
    let mut tunnel = network.start(&["--reconnect", "1"], &reads_all(&done));
    until_it_begins(&mut tunnel);
    relay.cut();
    let output = tunnel.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(255), "{said}");
    assert!(said.contains("the tunnel is lost"), "{said}");
    until("the command's stdin ends", || done.exists());
}

/// A receiver that takes over learns of a loss at once, although links could return.
#[test]
fn no_link_returns_under_remus() {
    for word in ["-r", "--colo"] {
        let (network, relay) = Network::relayed(u64::MAX, 1, false);
        let done = network.path("done");
        let script = network.path("receiver");
        fs::write(&script, reads_all(&done)).unwrap();
        let command = format!("sh {} migrate-receive -e {word}", script.display());
        let mut tunnel = network.start(&["--reconnect", "3600"], &command);
        until_it_begins(&mut tunnel);
        relay.cut();
        assert_eq!(tunnel.wait().unwrap().code(), Some(255));
        until("the command's stdin ends", || done.exists());
    }
}

/// How much the tunnel takes while the command, which waits for the FIFO, reads nothing.
fn taken(network: &Network, fifo: &Path, command: &str) -> usize {
    let mut tunnel = network.start(&[], command);
    let mut stdin = tunnel.stdin.take().unwrap();
    until_it_begins(&mut tunnel);
    let (done, ended) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let block = [7; 4096];
        while stdin.write_all(&block).is_ok() {
            if done.send(block.len()).is_err() {
                break;
            }
        }
    });
    let mut all = 0;
    while let Ok(n) = ended.recv_timeout(Duration::from_secs(2)) {
        all += n;
    }
    // The command ends, and both ends of the tunnel with it.
    fs::write(fifo, "").unwrap();
    assert_eq!(tunnel.wait().unwrap().code(), Some(0));
    all
}

/// libxl lets the guest's output go once a checkpoint is written.
#[test]
fn little_is_in_transit_under_remus() {
    let network = Network::new();
    let fifo = network.fifo();
    let script = network.path("receiver");
    fs::write(&script, format!("echo begun; exec cat {}", fifo.display())).unwrap();
    let script = script.display();
    let remus = taken(&network, &fifo, &format!("sh {script} migrate-receive -r"));
    // 256 KiB at this end and on the way; a buffer and a pipe at the other.
    assert!(remus <= (256 + 128) << 10, "{remus} bytes");
    let usual = taken(&network, &fifo, &format!("sh {script} migrate-receive"));
    assert!(usual > 1 << 20, "{usual} bytes");
}

/// The near end is killed: nothing it leaves holds the receiver up.
#[test]
fn a_near_end_that_is_killed_ends_the_command_s_stdin() {
    let network = Network::new();
    let done = network.path("done");
    let mut tunnel = network.start(&["--reconnect", "0"], &reads_all(&done));
    until_it_begins(&mut tunnel);
    tunnel.kill().unwrap();
    tunnel.wait().unwrap();
    until("the command's stdin ends", || done.exists());
}

/// The options of xl, whose command in place of ssh is the tunnel.
fn migrate(hosts: &Hosts, network: &Network, options: &[&str]) -> Vec<String> {
    let words = network.words(options);
    let tunnel: Vec<String> = words[..words.len() - 1]
        .iter()
        .map(|word| format!("'{word}'"))
        .collect();
    let tunnel = format!("{} {}", env!("CARGO_BIN_EXE_xsr"), tunnel.join(" "));
    let receiver = format!(
        "{} migrate-receive {}",
        env!("CARGO_BIN_EXE_xsr"),
        backend(&hosts.there)
    );
    let backend = backend(&hosts.here);
    let words = [
        "--quiet",
        "migrate",
        &backend,
        "-s",
        &tunnel,
        "--receiver",
        &receiver,
    ];
    let words = words.iter().chain(&["web", "other"]);
    words.map(ToString::to_string).collect()
}

#[test]
fn a_domain_moves_through_a_tunnel_whose_links_are_cut() {
    let writes = ["--dirty-rate", "20000", "--working-set", "4M"];
    for options in [
        ["--connections", "1"].as_slice(),
        &["--connections", "3", "--compress", "auto"],
    ] {
        let hosts = Hosts::with("pvh", &writes);
        let (network, relay) = Network::relayed(1_234_567, 4, false);
        let begun = Instant::now();
        run(migrate(&hosts, &network, options)).code(0);
        assert_eq!(hosts.domains(), [&[][..], &["web running"]], "{options:?}");
        assert!(relay.over.load(Ordering::Relaxed), "it was cut");
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}

/// Cuts for good in the image: the domain is at one end.
#[test]
fn a_domain_whose_tunnel_is_lost_is_at_one_end() {
    for after in [100_000, 1 << 20, 5 << 20] {
        let hosts = Hosts::with("pvh", &[]);
        let (network, _relay) = Network::relayed(after, 1, true);
        let ran = run(migrate(&hosts, &network, &["--reconnect", "1"])).code(1);
        assert_eq!(
            hosts.domains()[0],
            ["web running"],
            "{after}: {}",
            ran.stderr
        );
        until("the receiver gives up", || hosts.domains()[1].is_empty());
    }
}

/// Where a domain is when the relay cuts: here, and there.
#[derive(Clone, Copy, Debug)]
struct Moment {
    here: &'static str,
    /// Waits for that before it cuts.
    there: Option<&'static str>,
}

/// From the last pass on: the image, "ready", "go", the report.
const MOMENTS: [Moment; 4] = [
    Moment {
        here: "web suspended",
        there: None,
    },
    // "Ready" is on its way, or has arrived.
    Moment {
        here: "web suspended",
        there: Some("web--incoming paused"),
    },
    // "Go" is about to be sent, or is on its way.
    Moment {
        here: "web--migratedaway suspended",
        there: None,
    },
    // The report is on its way.
    Moment {
        here: "web--migratedaway suspended",
        there: Some("web running"),
    },
];

/// A network that is cut at a moment, before anything else goes back.
fn cut_at(hosts: &Arc<Hosts>, moment: Moment, for_good: bool) -> (Network, Arc<Relay>) {
    let hosts = Arc::clone(hosts);
    let holds = move || {
        let now = hosts.domains()[0] == [moment.here];
        if now && let Some(there) = moment.there {
            until("the domain there", || hosts.domains()[1] == [there]);
        }
        now
    };
    Network::relay(u64::MAX, 1, for_good, Some(Box::new(holds)))
}

/// Exactly one end has the domain, or the exit code and the message say that it is unknown.
#[test]
fn a_tunnel_that_is_lost_after_the_image_leaves_the_domain_at_one_end() {
    let mut codes = Vec::new();
    for moment in MOMENTS {
        let hosts = Arc::new(Hosts::with("pvh", &[]));
        let (network, relay) = cut_at(&hosts, moment, true);
        // On a busy machine the other end may be silent for long before the cut.
        let options = ["--reconnect", "8"];
        let ran = run(migrate(&hosts, &network, &options));
        let what = format!("{moment:?}: {}", ran.stderr);
        assert!(relay.over.load(Ordering::Relaxed), "it was cut: {what}");
        let there = || hosts.domains()[1].clone();
        match ran.code {
            1 => {
                assert_eq!(hosts.domains()[0], ["web running"], "{what}");
                until("the receiver gives up", || there().is_empty());
            }
            3 => {
                assert_eq!(
                    hosts.domains()[0],
                    ["web--migratedaway suspended"],
                    "{what}"
                );
                assert!(what.contains("It must never run at both ends"), "{what}");
                assert!(
                    what.contains("it has moved. Destroy what is here"),
                    "{what}"
                );
                until("the receiver decides", || {
                    let there = there();
                    there.is_empty() || there == ["web running"]
                });
                if moment.there.is_some() {
                    assert_eq!(there(), ["web running"], "{what}");
                }
            }
            other => panic!("exit code {other}: {what}"),
        }
        codes.push(ran.code);
    }
    // The third cut may come before "go" is sent.
    assert!(matches!(codes[..], [1, 1, 1 | 3, 3]), "{codes:?}");
}

/// The same cuts, and the links return: "go" and the report arrive.
#[test]
fn a_tunnel_whose_links_return_after_the_image_completes_the_migration() {
    for moment in MOMENTS {
        let hosts = Arc::new(Hosts::with("pvh", &[]));
        let (network, relay) = cut_at(&hosts, moment, false);
        let options = ["--reconnect", "30"];
        let ran = run(migrate(&hosts, &network, &options)).code(0);
        assert!(relay.over.load(Ordering::Relaxed), "{moment:?}");
        let moved = [&[][..], &["web running"]];
        assert_eq!(hosts.domains(), moved, "{moment:?}: {}", ran.stderr);
    }
}
