//! Helpers for tests of migration: two mock hosts, both real ends, and ends that the test plays
//! itself.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use tempfile::TempDir;
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;

use super::{Ran, arg, backend, run, scratch, xsr};

/// The messages of `tools/xl/xl.h`, with their NULs, and the status of success. They are written
/// here a second time, so that a mistake in the command is detected.
pub(crate) const BANNER: &[u8] = b"xl migration receiver ready, send binary domain data.\n";
pub(crate) const READY: &[u8] = b"domain received, ready to unpause\0";
pub(crate) const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";
pub(crate) const REPORT: &[u8] = b"my copy unpause results are as follows\0";

/// Two hosts, of which the first has the domain `web`.
#[derive(Debug)]
pub(crate) struct Hosts {
    pub(crate) dir: TempDir,
    pub(crate) here: PathBuf,
    pub(crate) there: PathBuf,
    /// Whether the commands work without libxl, by hypercalls.
    pub(crate) direct: bool,
}

impl Hosts {
    /// The hosts, with a domain of 8 MiB created with these options.
    pub(crate) fn with(kind: &str, options: &[&str]) -> Self {
        Self::of_size("8M", kind, options)
    }

    /// The same with a domain of this size.
    pub(crate) fn of_size(size: &str, kind: &str, options: &[&str]) -> Self {
        let dir = scratch();
        let [here, there] = ["here", "there"].map(|name| dir.path().join(name));
        let what = ["mock", "create", "web", "--memory", size, "--type", kind];
        let host = ["--host", arg(&here)];
        run(what.iter().chain(&host).chain(options)).code(0);
        // The second host exists, without domains.
        let other = [
            "mock",
            "create",
            "x",
            "--memory",
            "8M",
            "--host",
            arg(&there),
        ];
        run(other).code(0);
        run(["mock", "destroy", "x", "--host", arg(&there)]).code(0);
        let direct = false;
        Self {
            dir,
            here,
            there,
            direct,
        }
    }

    /// Twice: for commands as usual and, for guests without a device model, for `--direct`.
    pub(crate) fn each(kind: &str, options: &[&str]) -> Vec<Self> {
        let mut each = vec![Self::with(kind, options)];
        if kind != "hvm" {
            each.push(Self::direct(kind, options));
        }
        each
    }

    /// Hosts on which the commands work without libxl.
    pub(crate) fn direct(kind: &str, options: &[&str]) -> Self {
        let direct = true;
        Self {
            direct,
            ..Self::with(kind, options)
        }
    }

    /// The options for a command that works on this host.
    pub(crate) fn on(&self, host: &Path) -> Vec<String> {
        match self.direct {
            true => vec![
                "--direct".to_owned(),
                format!("--backend=mock-xen:{}", host.display()),
            ],
            false => vec![backend(host)],
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The domains of both hosts, as `name state`.
    pub(crate) fn domains(&self) -> [Vec<String>; 2] {
        [&self.here, &self.there].map(|host| domains(host))
    }

    /// Save `web` of a host.
    pub(crate) fn save(&self, host: &Path, to: &[&str]) {
        let args = [&["save", "web"], to].concat().into_iter();
        let args = args.map(str::to_owned).chain(self.on(host));
        run(args).code(0);
    }

    /// An image of `web`, which continues to run.
    pub(crate) fn image(&self) -> Vec<u8> {
        let saved = xsr(["save", "-c", &backend(&self.here), "web", "-"]).output();
        let saved = saved.unwrap();
        assert_eq!(saved.status.code(), Some(0), "{saved:?}");
        saved.stdout
    }

    /// `xsr migrate`, of `web`, to a socket.
    pub(crate) fn sender(&self, socket: &Path, options: &[&str]) -> Running {
        let to = format!("unix:{}", socket.display());
        let on = self.on(&self.here);
        let args = ["migrate", "web", &to];
        let args = args.into_iter().chain(on.iter().map(String::as_str));
        Running::start(args.chain(options.iter().copied()))
    }

    /// `xsr migrate-receive` on a socket, once it listens.
    pub(crate) fn receiver(&self, socket: &Path, options: &[&str]) -> Running {
        let at = format!("unix:{}", socket.display());
        let on = self.on(&self.there);
        let args = ["migrate-receive", "--threads", "2", "--listen", &at];
        let args = args.into_iter().chain(on.iter().map(String::as_str));
        let mut running = Running::start(args.chain(options.iter().copied()));
        running.line("waiting at");
        running
    }
}

/// Wait for a condition, at most half a minute.
#[track_caller]
pub(crate) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let late = Instant::now() + Duration::from_secs(30);
    while !is() {
        assert!(Instant::now() < late, "waited for: {what}");
        std::thread::yield_now();
    }
}

/// The directory of a host's only domain.
pub(crate) fn domain_dir(host: &Path) -> PathBuf {
    let mut domains = host.join("domains").read_dir().unwrap();
    domains.next().unwrap().unwrap().path()
}

/// The domains of a host, as `name state`.
pub(crate) fn domains(host: &Path) -> Vec<String> {
    let list = run(["mock", "list", "--json", "--host", arg(host)]).code(0);
    let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
    list.json()["domains"]
        .as_array()
        .unwrap()
        .iter()
        .map(|domain| format!("{} {}", text(&domain["name"]), text(&domain["state"])))
        .collect()
}

/// A running command.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// The stderr output so far.
    said: String,
}

impl Running {
    pub(crate) fn start<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xsr"));
        command.args(args).env_remove("XSR_LOG");
        Self::of(command)
    }

    /// Starts this command.
    pub(crate) fn of(mut command: Command) -> Self {
        let mut child = command
            .env_remove("XSR_BACKEND")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            stderr,
            said: String::new(),
        }
    }

    /// Wait for a line that contains `word`.
    #[track_caller]
    pub(crate) fn line(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            let n = self.stderr.read_line(&mut line).unwrap();
            self.said.push_str(&line);
            assert!(n > 0, "it ended without {word:?}: {}", self.said);
            if line.contains(word) {
                return line;
            }
        }
    }

    /// Wait until it has a thread of that name.
    pub(crate) fn until_thread(&self, name: &str) {
        let tasks = format!("/proc/{}/task", self.child.id());
        until(name, || {
            fs::read_dir(&tasks).unwrap().any(|task| {
                fs::read_to_string(task.unwrap().path().join("comm"))
                    .is_ok_and(|comm| comm.trim_end() == name)
            })
        });
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        signal::kill(pid, signal).unwrap();
    }

    /// Stop it, and wait until it does nothing more.
    pub(crate) fn stop(&self) {
        self.signal(Signal::SIGSTOP);
        let stat = format!("/proc/{}/stat", self.child.id());
        until("it stops", || {
            let stat = fs::read_to_string(&stat).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T')
        });
    }

    pub(crate) fn signal_number(&self, number: u32) {
        super::signal_number(self.child.id(), number);
    }

    /// Close its stderr: it cannot write there from now on.
    pub(crate) fn unheard(self) -> Child {
        self.child
    }

    /// Kill it, and wait for it.
    pub(crate) fn kill(mut self) {
        self.signal(Signal::SIGKILL);
        self.child.wait().unwrap();
    }

    /// Wait until it has ended, at most half a minute.
    #[track_caller]
    pub(crate) fn until_its_end(&mut self) {
        until("its end", || self.child.try_wait().unwrap().is_some());
    }

    /// Wait for its end.
    pub(crate) fn end(mut self) -> Ran {
        let mut stdout = String::new();
        let mut pipe = self.child.stdout.take().unwrap();
        pipe.read_to_string(&mut stdout).unwrap();
        self.stderr.read_to_string(&mut self.said).unwrap();
        let status = self.child.wait().unwrap();
        Ran {
            code: status.code().unwrap_or(-1),
            stdout,
            stderr: self.said,
        }
    }
}

/// Read exactly these bytes.
#[track_caller]
pub(crate) fn hear(from: &mut impl Read, expected: &[u8]) {
    let mut got = vec![0; expected.len()];
    from.read_exact(&mut got).unwrap();
    assert_eq!(
        got.escape_ascii().to_string(),
        expected.escape_ascii().to_string()
    );
}

/// Read to the end of an image and not a byte further.
pub(crate) fn hear_image(from: &mut impl Read) {
    let mut walk = Walk::open(from, ReadOptions::default()).unwrap();
    while walk.next_step().unwrap().is_some() {}
}

/// A listening socket on which the test itself plays the receiver.
pub(crate) fn listen(socket: &Path) -> UnixListener {
    UnixListener::bind(socket).unwrap()
}

/// A connection that is cut after a number of bytes in one direction, and forwards everything
/// before.
pub(crate) struct Cut {
    /// The number of bytes from the sender to the receiver.
    pub(crate) forth: u64,
    /// The number of bytes in the other direction.
    pub(crate) back: u64,
}

impl Cut {
    pub(crate) const NEVER: Self = Self {
        forth: u64::MAX,
        back: u64::MAX,
    };

    /// Forward between a connection to `at` and the listener at `to`. The result is the number of
    /// bytes in each direction.
    pub(crate) fn run(self, at: &Path, to: &Path) -> JoinHandle<[u64; 2]> {
        let listener = listen(at);
        let (at, to) = (at.to_owned(), to.to_owned());
        std::thread::spawn(move || {
            let (sender, _) = listener.accept().unwrap();
            fs::remove_file(at).unwrap();
            let receiver = UnixStream::connect(to).unwrap();
            let ends = [&sender, &receiver].map(|end| end.try_clone().unwrap());
            let [sender_too, receiver_too] = ends;
            let back = std::thread::spawn(move || forward(&receiver_too, &sender_too, self.back));
            let forth = forward(&sender, &receiver, self.forth);
            [forth, back.join().unwrap()]
        })
    }
}

/// Forward until `limit` or the end; then cut both connections.
fn forward(mut from: &UnixStream, mut to: &UnixStream, limit: u64) -> u64 {
    let mut passed = 0;
    let mut room = vec![0; 1 << 16];
    while passed < limit {
        let most = room
            .len()
            .min(usize::try_from(limit - passed).unwrap_or(usize::MAX));
        let n = match from.read(&mut room[..most]) {
            Ok(0) | Err(_) => break,
            Ok(n) => n,
        };
        if to.write_all(&room[..n]).is_err() {
            break;
        }
        passed += n as u64;
    }
    if passed == limit {
        for end in [from, to] {
            hang_up(end, Shutdown::Both);
        }
    } else {
        // An end that has sent everything may still receive.
        hang_up(to, Shutdown::Write);
    }
    passed
}

fn hang_up(end: &UnixStream, how: Shutdown) {
    match end.shutdown(how) {
        Err(e) if e.kind() != io::ErrorKind::NotConnected => panic!("{e}"),
        _ => {}
    }
}
