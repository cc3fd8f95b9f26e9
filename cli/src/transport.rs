//! The connection between the two ends of a migration: a command (usually ssh), a socket, or the
//! stdin and stdout of a process that such a command has started. `transport/session.rs` makes a
//! session over several of them.
//!
//! C implementation: `create_migration_child`, `migration_child_report` in `tools/xl/xl_migrate.c`.

mod session;
mod tunnel;

use std::fs::{self, File};
use std::io::{self, IsTerminal as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, bail};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;
use xsr_save_restore::migrate::connection::{
    Connection, ConnectionReader, Peer, PipeConnection, TcpConnection, UnixConnection, Wait,
};
use xsr_save_restore::migrate::messages::Reason;
use xsr_save_restore::migrate::session::{
    KeyDirectory, ServerTls, SessionListener, SessionMonitor,
};

use crate::args::{ConnectionArgs, Endpoint, MigrateArgs, OfferArgs, TlsArg};
use crate::exit::BadUsage;
use crate::file;
use crate::interrupt::Interrupt;
use crate::terminal::Terminal;
use crate::xl::child;

pub(crate) use self::session::check_through_ssh;
pub(crate) use self::tunnel::{Served, Tunnel, quoted};

/// How long to wait for a command to end after hanging up. As in xl.
const CHILD_PATIENCE: Duration = Duration::from_secs(2);

/// Checks that the process listening on a socket may receive a domain. If others can write to the
/// socket's directory, another user's process may be listening.
fn check_listener(peer: &Peer) -> Result<()> {
    match peer {
        Peer::Process { pid, uid, .. } if *uid != 0 && *uid != geteuid().as_raw() => bail!(
            "a process of another user listens there (uid {uid}, process {pid}), and is given no \
             domain: put the socket into a directory of your own"
        ),
        _ => Ok(()),
    }
}

/// Takes stdin and stdout away from this process, so that it neither reads what is for the other end
/// nor prints among it: from now on its stdin is /dev/null, and its stdout goes to stderr.
///
/// Dropping the two files closes them, which the other end of a pipe notices.
pub(crate) fn take_stdio() -> Result<(File, File)> {
    let (stdin, stdout) = (io::stdin(), io::stdout());
    let from = stdin.as_fd().try_clone_to_owned().context("stdin")?;
    let to = stdout.as_fd().try_clone_to_owned().context("stdout")?;
    nix::unistd::dup2_stdout(io::stderr()).context("stdout")?;
    let nothing = File::open("/dev/null").context("/dev/null")?;
    nix::unistd::dup2_stdin(nothing).context("stdin")?;
    Ok((from.into(), to.into()))
}

/// A connection to the other end.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) connection: Box<dyn Connection>,
    /// The name of the other end.
    pub(crate) name: String,
    child: Option<Child>,
    /// The connection through ssh, if the session has others: it stays open as long as the session.
    pub(crate) beside: Option<Box<dyn Connection>>,
    /// Tells what the session of a sender carries.
    pub(crate) monitor: Option<SessionMonitor>,
}

/// The error for a host whose name the program that reaches it would take as an option.
pub(crate) fn option_of(host: &str, ssh: &str) -> Error {
    let why = format!("HOST {host:?} would be an option of {ssh}");
    Error::new(BadUsage(why))
}

impl Link {
    /// Connect to the receiver of a migration, with a session if the command line asks for one.
    pub(crate) fn for_migration(
        args: &MigrateArgs,
        options: &[&str],
        terminal: &Terminal,
        interrupt: &Interrupt,
        limit: Duration,
    ) -> Result<Self> {
        session::check(args)?;
        let (through, host) = (&args.connection, &args.host);
        if let Some(TlsArg::Directory(directory)) = &args.session.tls {
            let endpoint = host.strip_prefix("tls:").unwrap_or(host);
            let request = session::request_of_migration(args);
            let made = session::connect(&request, endpoint, directory, limit, interrupt);
            let session = made.with_context(|| host.clone())?;
            return Ok(Self {
                monitor: Some(session.monitor()),
                ..Self::socket(Box::new(session), host.clone())
            });
        }
        if !args.session.is_given() {
            return Self::to_receiver(through, host, options, interrupt, limit);
        }
        let options = [options, &[session::OPTION]].concat();
        let link = Self::to_receiver(through, host, &options, interrupt, limit)?;
        let wanted = session::Wanted {
            request: session::request_of_migration(args),
            session: &args.session,
            name: "migrate",
            ssh: &through.ssh,
        };
        let agreed = session::agree(&wanted, link.connection, limit, terminal, interrupt)?;
        Ok(Self {
            monitor: Some(agreed.session.monitor()),
            connection: Box::new(agreed.session),
            beside: agreed.beside,
            ..link
        })
    }

    /// Connect to the receiver that the command line names. A command also gets `options`.
    pub(crate) fn to_receiver(
        args: &ConnectionArgs,
        host: &str,
        options: &[&str],
        interrupt: &Interrupt,
        limit: Duration,
    ) -> Result<Self> {
        if args.ssh == "ssh"
            && ["unix:", "tcp:", "tls:"]
                .iter()
                .any(|p| host.starts_with(p))
        {
            let endpoint: Endpoint = host
                .parse()
                .map_err(|e| Error::new(BadUsage(format!("{host}: {e}"))))?;
            let link = Self::connect(&endpoint, interrupt, limit).with_context(|| {
                let all: String = options.iter().map(|option| format!(" {option}")).collect();
                format!("{host}: is `xsr migrate-receive{all} --listen` running?")
            })?;
            check_listener(&link.connection.peer()).with_context(|| host.to_owned())?;
            return Ok(link);
        }
        if host.starts_with('-') && !args.ssh.is_empty() {
            return Err(option_of(host, &args.ssh));
        }
        Self::run(&rune(args, host, options))
    }

    /// Run a command through sh, as xl does, and connect to it.
    fn run(rune: &str) -> Result<Self> {
        // A signal that interrupts this program, from the keyboard or sent to its process group,
        // must not cut its connection, because things end in a certain order. (None is blocked in
        // the child: cli/tests/it/migrate.rs checks that.)
        let mut child = child::deaf(rune, false)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting sh")?;
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (to, from) = pipes.context("the pipes to sh")?;
        let to = File::from(OwnedFd::from(to));
        file::widen(&to);
        let connection = PipeConnection::new(from.into(), to.into(), rune);
        Ok(Self {
            connection: Box::new(connection.context("the pipes to sh")?),
            name: rune.to_owned(),
            child: Some(child),
            beside: None,
            monitor: None,
        })
    }

    fn connect(endpoint: &Endpoint, interrupt: &Interrupt, limit: Duration) -> Result<Self> {
        Ok(match endpoint.clone() {
            Endpoint::Unix(path) => {
                let name = format!("unix:{}", path.display());
                let stream = interrupt.wait_for(limit, move || UnixStream::connect(path))?;
                Self::unix(stream, name)?
            }
            Endpoint::Tcp(address) => {
                let name = format!("tcp:{address}");
                let stream = interrupt.wait_for(limit, move || TcpStream::connect(address))?;
                Self::tcp(stream, name)?
            }
            Endpoint::Tls(_) => {
                let why = "tls: is for `xsr migrate`, with --tls DIR";
                return Err(Error::new(BadUsage(why.to_owned())));
            }
        })
    }

    fn unix(stream: UnixStream, name: String) -> Result<Self> {
        let connection = UnixConnection::new(stream).context("the socket")?;
        Ok(Self::socket(Box::new(connection), name))
    }

    fn tcp(stream: TcpStream, name: String) -> Result<Self> {
        let connection = TcpConnection::new(stream).context("the socket")?;
        Ok(Self::socket(Box::new(connection), name))
    }

    fn socket(connection: Box<dyn Connection>, name: String) -> Self {
        Self {
            connection,
            name,
            child: None,
            beside: None,
            monitor: None,
        }
    }

    /// The stdin and stdout of this process. After this, other output to stdout goes to stderr.
    pub(crate) fn stdio() -> Result<Self> {
        let (stdin, stdout) = (io::stdin(), io::stdout());
        if stdin.is_terminal() || stdout.is_terminal() {
            let why = "stdin or stdout is a terminal: `xsr migrate` starts this through ssh; to \
                       wait for it on a socket, say --listen unix:PATH or --listen \
                       tcp:ADDRESS:PORT";
            return Err(Error::new(BadUsage(why.to_owned())));
        }
        let (from, to) = take_stdio()?;
        file::widen(&from);
        let connection = PipeConnection::new(from.into(), to.into(), "stdin");
        Ok(Self {
            connection: Box::new(connection.context("stdin and stdout")?),
            name: "stdin".to_owned(),
            child: None,
            beside: None,
            monitor: None,
        })
    }

    /// A session that the sender and this process, which it has started, agree on.
    pub(crate) fn offered(
        args: &OfferArgs,
        answer: Duration,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let stdio = Self::stdio()?;
        let offer = session::Offer::of_receiver(args, answer);
        let agreed = session::offered(&offer, stdio.connection, answer, interrupt)?;
        Ok(Self {
            connection: Box::new(agreed.session),
            beside: agreed.beside,
            ..stdio
        })
    }

    /// The other end's last message about why it failed, if there is one. A process started by a
    /// command has no such message: it prints the reason on the stderr that both ends share.
    pub(crate) fn reason(&self) -> Option<String> {
        /// How long to wait for it: the other end hangs up after it.
        const WAIT: Duration = Duration::from_secs(1);
        if self.child.is_some() {
            return None;
        }
        let reader = ConnectionReader::new(&*self.connection, Wait::forever()).ok()?;
        Reason::read(&[], reader.within(WAIT))
    }

    /// Hang up. If the command at the other end failed, returns how, in words to append to others.
    /// Waits only a moment for it.
    pub(crate) fn hang_up(self) -> String {
        drop(self.connection);
        drop(self.beside);
        let ended = self.child.map_or(Ok(None), Self::outlive);
        let ended = ended.unwrap_or_else(|error| Some(error.to_string()));
        ended.map_or_else(String::new, |ended| format!(" (`{}` {ended})", self.name))
    }

    fn outlive(mut child: Child) -> Result<Option<String>> {
        let until = Instant::now() + CHILD_PATIENCE;
        loop {
            match child.try_wait().context("waiting for the command")? {
                Some(status) => return Ok((!status.success()).then(|| ended(status))),
                None if Instant::now() >= until => {
                    return Ok(Some("has not ended yet".to_owned()));
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// How a command ended, in words.
pub(crate) fn ended(status: ExitStatus) -> String {
    match status.code() {
        Some(code) => format!("ended with exit code {code}"),
        None => format!("ended: {status}"),
    }
}

/// The command that reaches the receiver.
fn rune(args: &ConnectionArgs, host: &str, options: &[&str]) -> String {
    if args.ssh.is_empty() {
        return host.to_owned();
    }
    let mut rune = format!("exec {} {host} {}", args.ssh, args.receiver());
    for option in options {
        rune.push(' ');
        rune.push_str(option);
    }
    rune
}

/// A socket that waits for one migration.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: Socket,
    name: String,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener, SocketFile),
    Tcp(TcpListener),
    Tls(SessionListener, ServerTls),
}

/// The path of a socket, removed on drop.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "the socket could not be removed");
        }
    }
}

impl Listener {
    /// Listen on the endpoint. Only its owner can connect to a Unix socket; only a sender that the
    /// directory allows to a session.
    pub(crate) fn bind(endpoint: &Endpoint, directory: Option<&Path>) -> Result<Self> {
        if directory.is_some() && !matches!(endpoint, Endpoint::Tls(_)) {
            let why = "--tls DIR needs --listen tls:ADDRESS:PORT: every other endpoint is not \
                       encrypted, and lets in senders that DIR/allow does not name";
            return Err(Error::new(BadUsage(why.to_owned())));
        }
        match endpoint {
            Endpoint::Unix(path) => {
                let before = umask(Mode::from_bits_truncate(0o077));
                let bound = UnixListener::bind(path);
                umask(before);
                let listener = match bound {
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse => bail!(
                        "{} exists already; if no process listens on it, remove it",
                        path.display()
                    ),
                    other => other.with_context(|| path.display().to_string())?,
                };
                Ok(Self {
                    socket: Socket::Unix(listener, SocketFile(path.clone())),
                    name: format!("unix:{}", path.display()),
                })
            }
            Endpoint::Tcp(address) => {
                let listener = TcpListener::bind(address).with_context(|| address.clone())?;
                let name = format!("tcp:{}", listener.local_addr()?);
                Ok(Self {
                    socket: Socket::Tcp(listener),
                    name,
                })
            }
            Endpoint::Tls(address) => {
                let directory = directory.ok_or_else(|| {
                    let why = "--listen tls: needs --tls DIR, a directory with ca.pem, cert.pem, \
                               key.pem and allow";
                    Error::new(BadUsage(why.to_owned()))
                })?;
                let tls = KeyDirectory::open(directory)?.server()?;
                let listener = session::listen(address)?;
                let name = format!("tls:{}", listener.address()?);
                Ok(Self {
                    socket: Socket::Tls(listener, tls),
                    name,
                })
            }
        }
    }

    /// The endpoint's name for the user.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Wait for a sender. No further sender is accepted. A session that has lost its connections is
    /// kept for `answer` at most.
    pub(crate) fn accept(self, answer: Duration, interrupt: &Interrupt) -> Result<Link> {
        match self.socket {
            Socket::Unix(listener, _file) => {
                interrupt.wait_readable(&listener)?;
                let (stream, _) = listener.accept()?;
                Link::unix(stream, self.name)
            }
            Socket::Tcp(listener) => {
                interrupt.wait_readable(&listener)?;
                let (stream, peer) = listener.accept()?;
                Link::tcp(stream, format!("tcp:{peer}"))
            }
            Socket::Tls(listener, tls) => {
                let connection = session::accept(listener, tls, answer, interrupt)?;
                let name = connection.peer().to_string();
                Ok(Link::socket(connection, name))
            }
        }
    }
}
