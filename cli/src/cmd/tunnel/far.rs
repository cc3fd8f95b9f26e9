//! The other end of a tunnel, which ssh has started: it runs COMMAND.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use xsr_save_restore::migrate::connection::{Connection as _, Delivery, Wait};
use xsr_save_restore::migrate::session::Session;
use xsr_save_restore::progress::{Cancel, Cancelled};
use xsr_save_restore::sink::FdSink;

use super::frames::{Carried, Frame, Hearing, Orders, Pump, Speaker};
use super::{ANSWER, FAILED, give_up, is_unread, spawn, suited};
use crate::args::TunnelArgs;
use crate::exit::Code;
use crate::interrupt::Interrupt;
use crate::left::Left;
use crate::terminal::Terminal;
use crate::transport::Served;
use crate::xl::child;

/// How often to look whether the session is lost or a signal has come, while COMMAND runs.
const LOOK: Duration = Duration::from_millis(100);

/// How often to look whether the last of what COMMAND wrote has arrived.
const DELIVERED: Duration = Duration::from_millis(10);

/// How long this end waits for what others do.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// For the end of the output once COMMAND has ended and what it has written is carried: a
    /// process that COMMAND has left running may keep its stdout open.
    output: Duration,
    /// For COMMAND to end once the session is lost. Its output is read and discarded for so long,
    /// so that a receiver that cleans up, or takes over, can say so.
    command: Duration,
}

impl Patience {
    const USUAL: Self = Self {
        output: Duration::from_secs(1),
        command: Duration::from_secs(60),
    };
}

/// Runs COMMAND for the other end.
pub(super) fn run(args: &TunnelArgs, command: &str, terminal: &Terminal) -> Result<Code> {
    // The other end is told when a signal ends this one.
    Left::work().until_the_end();
    // ssh may end before the session does.
    let interrupt = Interrupt::catch_without_hangup()?;
    let served = Served::accept(args, |request| suited(request, command), ANSWER, &interrupt)?;
    let far = Far {
        session: Arc::clone(&served.session),
        speaker: Arc::new(Speaker::new(Arc::clone(&served.session))),
        asked: interrupt.cancel().clone(),
        patience: Patience::USUAL,
    };
    far.run(child::plain(command), terminal)
}

/// What the threads of this end report.
#[derive(Debug)]
enum Happened {
    /// COMMAND has ended.
    Ended(io::Result<ExitStatus>),
    /// Nothing more arrives for COMMAND: the session is lost.
    Lost,
    /// One of the two pumps has got so far.
    Carried(Carried),
    /// One of the two pumps cannot read its pipe.
    Unreadable(io::Error),
}

/// The threads that serve COMMAND.
struct Threads {
    happened: Receiver<Happened>,
    /// The pumps of stdout and stderr.
    orders: [Arc<Orders>; 2],
    /// Ends the thread that writes to COMMAND's stdin, and closes that.
    no_input: Cancel,
}

struct Far {
    session: Arc<Session>,
    speaker: Arc<Speaker>,
    /// A signal has asked this end to stop.
    asked: Cancel,
    patience: Patience,
}

impl Far {
    /// Runs a command. Afterwards the session is closed.
    fn run(&self, command: Command, terminal: &Terminal) -> Result<Code> {
        let ended = match self.start(command) {
            Ok(threads) => self.serve(&threads, terminal),
            Err(error) => {
                terminal.error(&error);
                self.exit(FAILED).map(|()| Code::Failed)
            }
        };
        match &ended {
            Ok(_) => {
                self.wait_for_delivery();
                self.session.close();
            }
            Err(_) => give_up(&self.session),
        }
        ended
    }

    /// Waits until the other end has all that was written. Links that are lost now may return as
    /// they may before, and the session's own limit ends that.
    fn wait_for_delivery(&self) {
        while self.session.delivery() == Delivery::Pending && !self.asked.is_cancelled() {
            std::thread::sleep(DELIVERED);
        }
    }

    fn start(&self, mut command: Command) -> Result<Threads> {
        let started = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = started.context("starting sh")?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), Some(stderr)) = pipes else {
            bail!("the pipes to sh");
        };
        let (tell, happened) = mpsc::channel();
        let orders = [
            self.carry(stdout.into(), false, tell.clone())?,
            self.carry(stderr.into(), true, tell.clone())?,
        ];
        let no_input = Cancel::new();
        let stdin = FdSink::cancellable(OwnedFd::from(stdin), no_input.clone());
        let stdin = stdin.context("the pipe to sh")?;
        spawn("tunnel-in", {
            let (session, tell) = (Arc::clone(&self.session), tell.clone());
            let (orders, no_input) = (Arc::clone(&orders[0]), no_input.clone());
            move || {
                feed(&session, stdin, &orders, &no_input);
                say(&tell, Happened::Lost);
            }
        })?;
        spawn("tunnel-wait", move || {
            say(&tell, Happened::Ended(child.wait()));
        })?;
        Ok(Threads {
            happened,
            orders,
            no_input,
        })
    }

    /// Starts a pump for what COMMAND writes.
    fn carry(&self, from: OwnedFd, errors: bool, tell: Sender<Happened>) -> Result<Arc<Orders>> {
        let orders = Orders::new().context("making a pipe")?;
        let pump = Pump {
            speaker: Arc::clone(&self.speaker),
            orders: Arc::clone(&orders),
            errors,
        };
        spawn("tunnel-out", move || {
            let report = |carried| say(&tell, Happened::Carried(carried));
            if let Err(error) = pump.run(File::from(from), report) {
                say(&tell, Happened::Unreadable(error));
            }
        })?;
        Ok(orders)
    }

    /// Waits for COMMAND, for its output, and tells the other end its exit code.
    fn serve(&self, threads: &Threads, terminal: &Terminal) -> Result<Code> {
        let (mut own, mut all) = (0, 0);
        let mut status = None;
        // When the output of COMMAND itself was carried, and the rest is waited for.
        let mut carried: Option<Instant> = None;
        while all < 2 || status.is_none() {
            let left = carried.map(|since| self.patience.output.saturating_sub(since.elapsed()));
            if left == Some(Duration::ZERO) {
                break;
            }
            match threads
                .happened
                .recv_timeout(left.map_or(LOOK, |left| left.min(LOOK)))
            {
                Ok(Happened::Ended(ended)) => {
                    status = Some(ended.context("waiting for the command")?);
                    threads.orders.iter().for_each(|pump| pump.finish());
                }
                Ok(Happened::Carried(Carried::Own)) => own += 1,
                Ok(Happened::Carried(Carried::All)) => all += 1,
                Ok(Happened::Unreadable(error)) => {
                    return Err(error).context("reading what the command writes");
                }
                Ok(Happened::Lost) => return Ok(self.lost(threads, status.is_some(), terminal)),
                Err(RecvTimeoutError::Timeout) if self.is_over() => {
                    return Ok(self.lost(threads, status.is_some(), terminal));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the threads of the tunnel are gone"),
            }
            if own == 2 {
                carried.get_or_insert_with(Instant::now);
            }
        }
        let code = status.and_then(|status| status.code());
        let code = code.and_then(|code| u8::try_from(code).ok());
        // Behind a frame that a pump is about to write.
        let told = self.exit(code.unwrap_or(FAILED));
        threads.orders.iter().for_each(|pump| pump.end());
        told.map(|()| Code::Fine)
    }

    /// Tells the other end COMMAND's exit code.
    fn exit(&self, code: u8) -> Result<()> {
        let wait = Wait::forever().unless(&self.asked);
        let told = self.speaker.say(&Frame::Exit(code), wait);
        told.context("telling the other end how the command has ended")
    }

    /// Whether nothing can be said to the other end any more, or a signal has come.
    fn is_over(&self) -> bool {
        let none = Wait::forever().unless(&self.asked);
        self.session.write(&[], &none).is_err()
    }

    /// Leaves COMMAND, which may have ended already: no input, and no output after a while.
    fn lost(&self, threads: &Threads, has_ended: bool, terminal: &Terminal) -> Code {
        if self.asked.is_cancelled() {
            threads.no_input.cancel();
        }
        // The other end learns at once.
        give_up(&self.session);
        if !has_ended {
            terminal.say("tunnel: the connection is lost: waiting for the command to end");
            let begun = Instant::now();
            let ended = loop {
                let left = self.patience.command.saturating_sub(begun.elapsed());
                match threads.happened.recv_timeout(left) {
                    Ok(Happened::Ended(_)) => break true,
                    Ok(_) => {}
                    Err(_) => break false,
                }
            };
            if !ended {
                terminal.always(
                    "xsr: tunnel: the command has not ended after the loss of the connection: its \
                     input and output are closed, and it may still run",
                );
            }
        }
        threads.no_input.cancel();
        threads.orders.iter().for_each(|pump| pump.end());
        Code::Failed
    }
}

fn say(tell: &Sender<Happened>, happened: Happened) {
    if let Err(error) = tell.send(happened) {
        tracing::debug!(?error, "the tunnel has ended before");
    }
}

/// Gives COMMAND what arrives for its stdin, until the session ends. Closes its stdin then.
fn feed(session: &Session, stdin: FdSink<OwnedFd>, orders: &Orders, cancel: &Cancel) {
    let mut hearing = Hearing::new(session, Wait::forever().unless(cancel));
    let mut stdin = Some(stdin);
    loop {
        match hearing.next() {
            Ok(Frame::Data(bytes)) => {
                let written = stdin.as_mut().map_or(Ok(()), |to| to.write_all(bytes));
                match written {
                    Ok(()) => {}
                    Err(error) if Cancelled::is(&error) => return,
                    Err(error) => {
                        if !is_unread(&error) {
                            tracing::warn!(%error, "writing to the command");
                        }
                        stdin = None;
                        orders.unread();
                    }
                }
            }
            Ok(Frame::End) => stdin = None,
            Ok(Frame::Unread) => orders.refused(),
            Ok(frame) => {
                tracing::warn!(?frame, "the other end must not send this");
                return;
            }
            Err(error) => {
                tracing::debug!(%error, "nothing more arrives for the command");
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixStream;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;
    use std::thread::{self, JoinHandle};

    use tempfile::TempDir;
    use xsr_save_restore::migrate::connection::{
        ConnectionError, ConnectionWriter, UnixConnection,
    };
    use xsr_save_restore::migrate::session::{Dial, Server, SessionRequest, Wire};

    use super::*;
    use crate::cmd::tunnel::IN_TRANSIT;

    /// The connection to the other end.
    #[derive(Debug)]
    struct Once(Mutex<Option<Wire>>);

    impl Dial for Once {
        fn dial(&self, _: Duration, _: &Cancel) -> io::Result<Wire> {
            let wire = self.0.lock().unwrap().take();
            wire.ok_or_else(|| io::ErrorKind::NotConnected.into())
        }
    }

    /// Both ends of a session with little in transit, the near one first.
    fn session() -> (Arc<Session>, Arc<Session>) {
        let (near, far) = UnixStream::pair().unwrap();
        let [near, far] =
            [near, far].map(|end| Wire::plain(Box::new(UnixConnection::new(end).unwrap())));
        let request = SessionRequest::new().in_transit(IN_TRANSIT);
        thread::scope(|scope| {
            let server = Server::new(request.clone());
            let far = scope.spawn(move || server.admit(far, &Cancel::new()));
            let dial = Arc::new(Once(Mutex::new(Some(near))));
            let near = request.connect(dial, LONG, &Cancel::new()).unwrap();
            let far = far.join().unwrap().unwrap().unwrap();
            (Arc::new(near), Arc::new(far))
        })
    }

    const LONG: Duration = Duration::from_secs(30);

    fn until(what: &str, is: impl Fn() -> bool) {
        let begun = Instant::now();
        while !is() {
            assert!(begun.elapsed() < LONG, "waited for: {what}");
            thread::yield_now();
        }
    }

    /// A command under way: its tunnel, and what ends it.
    struct Running {
        near: Arc<Session>,
        far: JoinHandle<Result<Code>>,
        dir: TempDir,
    }

    impl Running {
        /// `HERE` in the script is a directory with a FIFO.
        fn start(script: &str, patience: Patience) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let fifo = dir.path().join("fifo");
            nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
            let (near, session) = session();
            let mut command = Command::new("sh");
            command.args(["-c", &script.replace("HERE", dir.path().to_str().unwrap())]);
            let far = Far {
                speaker: Arc::new(Speaker::new(Arc::clone(&session))),
                session,
                asked: Cancel::new(),
                patience,
            };
            let far = thread::spawn(move || far.run(command, &Terminal::silent()));
            Self { near, far, dir }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// Writes bytes to the session as they are.
        fn send(&self, bytes: &[u8]) {
            let wait = Wait::forever().at_most(LONG);
            let sent = ConnectionWriter::new(&*self.near, wait).write_all(bytes);
            sent.unwrap();
        }

        /// Waits for the far end, and lets a command that waits for the FIFO end.
        fn end(self) -> Code {
            until("the far end ends", || self.far.is_finished());
            let code = self.far.join().unwrap().unwrap();
            open_fifo(&self.dir.path().join("fifo"));
            code
        }
    }

    /// Lets a reader that waits for the FIFO find its end.
    fn open_fifo(fifo: &Path) {
        fs::write(fifo, "").unwrap();
    }

    /// How long the other end takes to read does not matter.
    #[test]
    fn all_that_a_command_has_written_passes_after_its_end() {
        // More than the session and the pump hold: a part is still in the pipe.
        const BYTES: usize = 190_000;
        let script = format!("head -c {BYTES} /dev/zero; echo over >HERE/over; exit 7");
        let patience = Patience {
            output: Duration::ZERO,
            command: LONG,
        };
        let running = Running::start(&script, patience);
        until("the command ends", || running.path("over").exists());
        let mut hearing = Hearing::new(&running.near, Wait::forever().at_most(LONG));
        let (mut bytes, mut ended) = (0, false);
        let code = loop {
            match hearing.next().unwrap() {
                Frame::Data(some) => bytes += some.len(),
                Frame::End => ended = true,
                Frame::Exit(code) => break code,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!((bytes, code), (BYTES, 7), "the end of stdout: {ended}");
        until("the far end ends", || running.far.is_finished());
    }

    /// Whether it reads its stdin or not.
    #[test]
    fn a_command_that_does_not_end_does_not_hold_the_far_end_up() {
        let patience = Patience {
            output: Duration::ZERO,
            command: Duration::ZERO,
        };
        for bytes in [0, 2 << 16] {
            let running = Running::start("echo begun; exec cat HERE/fifo", patience);
            let mut hearing = Hearing::new(&running.near, Wait::forever().at_most(LONG));
            assert_eq!(hearing.next().unwrap(), Frame::Data(b"begun\n"));
            let speaker = Speaker::new(Arc::clone(&running.near));
            for block in vec![0; bytes].chunks(1 << 16) {
                let wait = Wait::forever().at_most(LONG);
                speaker.say(&Frame::Data(block), wait).unwrap();
            }
            give_up(&running.near);
            assert_eq!(running.end(), Code::Failed, "{bytes}");
        }
    }

    /// The command need not end for that.
    #[test]
    fn a_malformed_frame_ends_the_session_at_once() {
        let patience = Patience {
            output: Duration::ZERO,
            command: LONG * 100,
        };
        let running = Running::start("exec cat HERE/fifo", patience);
        running.send(&[77; 8]);
        let wait = Wait::forever().at_most(LONG);
        let error = running.near.read(&mut [0; 8], &wait).unwrap_err();
        assert!(matches!(error, ConnectionError::Lost(_)), "{error:?}");
        open_fifo(&running.path("fifo"));
        until("the far end ends", || running.far.is_finished());
    }
}
