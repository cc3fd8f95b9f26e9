//! The control socket of a mock host: the process that has the host open answers other processes,
//! so that they can show, pause or destroy a domain meanwhile.
//!
//! Each connection carries one request and one answer, a line of JSON each. The directory is
//! private to its owner, and so is the socket.
//!
//! A request that has begun is completed and answered before the process ends ([`finish_answers`]).
//! If a connection is closed without an answer, the request was not handled: the client repeats it,
//! and opens the host itself once no other process has it open.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, TryLockError, Weak};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io::ErrorKind};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::error::MockError;
use super::machine::Machine;
use super::phases;
use super::place::Place;
use super::{DomainReport, DomainSummary, GuestSpec, MockHost, WorkloadSpec};
use crate::{DomId, Host as _};

/// The socket, in the host's directory.
const SOCKET: &str = "control";
/// Largest request: its longest part is user data.
const MOST: u64 = 64 << 20;
/// How long a client may keep the host waiting, and vice versa.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How often a client tries to find the host open or free, and the wait between two tries.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(10);
/// How long a process that is about to end waits for the requests that it has begun.
const FINISH_WAIT: Duration = Duration::from_secs(2);

/// Read-locked while a request is handled and answered; write-locked permanently by a process that
/// is about to end.
static ANSWERING: RwLock<()> = RwLock::new(());
/// Whether this process is about to end.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Wait until begun requests of other processes are answered, and accept no new ones. A process
/// with an open mock host has to call this before it ends: an answer that is cut off tells the
/// other process nothing.
pub fn finish_answers() {
    ENDING.store(true, Ordering::Relaxed);
    let until = Instant::now() + FINISH_WAIT;
    loop {
        match ANSWERING.try_write() {
            Ok(guard) => return std::mem::forget(guard),
            Err(TryLockError::Poisoned(guard)) => return std::mem::forget(guard),
            // A request is stuck, or a client does not read.
            Err(TryLockError::WouldBlock) if Instant::now() >= until => return,
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Whether the process is about to end; the creation of a guest for another process is then
/// abandoned.
pub(super) fn is_ending() -> bool {
    ENDING.load(Ordering::Relaxed)
}

/// A request. A domain is given by its name or number.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Request {
    List,
    Show(String),
    /// Create a guest that can do this work, with these user data.
    Create(Box<GuestSpec>, Option<WorkloadSpec>, Vec<(String, Vec<u8>)>),
    /// Check whether a domain can do this work.
    TryWorkload(String, WorkloadSpec),
    Destroy(String),
    Pause(String),
    Unpause(String),
    Resume(String),
    Rename(String, String),
    Userdata(String, String),
    StoreUserdata(String, String, Vec<u8>),
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Domains(Vec<DomainSummary>),
    Report(Box<DomainReport>),
    Userdata(Option<Vec<u8>>),
    Made(DomId),
    Done,
    Failed(String),
}

/// The host's answering thread, for as long as this exists.
#[derive(Debug)]
pub(super) struct Control {
    /// Dropping it ends the thread.
    _alive: UnixStream,
    place: Place,
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Err(error) = self.place.remove(SOCKET) {
            tracing::debug!(%error, "the socket of the mock host is left");
        }
    }
}

impl Control {
    /// Answer requests for `machine`, whose directory is open as `place`.
    pub(super) fn start(machine: &Arc<Machine>, place: Place) -> Result<Self, MockError> {
        let path = place.path().join(SOCKET);
        // It was left by a process that was killed: this process has the lock.
        place.remove(SOCKET)?;
        let short = place.by_descriptor().join(SOCKET);
        let listener = UnixListener::bind(&short).map_err(MockError::io("bind", &path))?;
        fs::set_permissions(&short, fs::Permissions::from_mode(0o600))
            .map_err(MockError::io("change the mode of", &path))?;
        let (alive, watched) = UnixStream::pair().map_err(MockError::io("bind", &path))?;
        let machine = Arc::downgrade(machine);
        thread::Builder::new()
            .name("mock control".to_owned())
            .spawn(move || {
                phases::not_on_this_thread();
                if let Err(error) = serve(&listener, &watched, &machine) {
                    tracing::warn!(%error, "the mock host answers no other process any more");
                }
            })
            .map_err(MockError::io("start a thread for", &path))?;
        Ok(Self {
            _alive: alive,
            place,
        })
    }
}

fn serve(listener: &UnixListener, watched: &UnixStream, machine: &Weak<Machine>) -> io::Result<()> {
    loop {
        let mut fds =
            [listener.as_fd(), watched.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        if fds[1].any() != Some(false) {
            return Ok(());
        }
        let (client, _) = listener.accept()?;
        // A client that sends nothing, reads nothing or has a large request does not hold up the
        // others.
        let machine = Weak::clone(machine);
        let attending = thread::Builder::new().spawn(move || {
            phases::not_on_this_thread();
            if let Err(error) = attend(&client, &machine) {
                tracing::debug!(%error, "a request to the mock host");
            }
        });
        if let Err(error) = attending {
            tracing::debug!(%error, "no thread for a request to the mock host");
        }
    }
}

fn attend(client: &UnixStream, machine: &Weak<Machine>) -> io::Result<()> {
    client.set_read_timeout(Some(ANSWER_WAIT))?;
    client.set_write_timeout(Some(ANSWER_WAIT))?;
    let mut line = Vec::new();
    BufReader::new(client.take(MOST)).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        // The client only checked whether the host answers.
        return Ok(());
    }
    let _answering = ANSWERING.read().unwrap_or_else(PoisonError::into_inner);
    // The client gets no answer, and repeats the request.
    let Some(machine) = machine.upgrade() else {
        return Ok(());
    };
    let host = MockHost { machine };
    let answer = match serde_json::from_slice(&line) {
        Ok(request) => answer(&host, request),
        Err(error) => Err(MockError::Answered(error.to_string())),
    };
    let answer = match answer {
        // The creation was abandoned: the next process that has the host open does it.
        Err(MockError::Backend(error)) if error.errno == Errno::EINTR && is_ending() => {
            return Ok(());
        }
        answer => answer.unwrap_or_else(|error| Answer::Failed(error.to_string())),
    };
    let sent = send(client, &answer);
    if let (Err(_), Answer::Made(domid)) = (&sent, &answer) {
        // The client was interrupted.
        host.domain(*domid)
            .and_then(|domain| domain.destroy())
            .map_err(io::Error::other)?;
    }
    sent
}

fn send(mut to: &UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    to.write_all(&line)
}

fn answer(host: &MockHost, request: Request) -> Result<Answer, MockError> {
    let domain = |name: &str| Ok::<_, MockError>(host.domain(host.find(name)?)?);
    match request {
        Request::List => return Ok(Answer::Domains(host.list())),
        Request::Show(name) => {
            let report = host.show(host.find(&name)?)?;
            return Ok(Answer::Report(Box::new(report)));
        }
        Request::Userdata(name, key) => {
            return Ok(Answer::Userdata(
                host.userdata_get(host.find(&name)?, &key)?,
            ));
        }
        Request::StoreUserdata(name, key, data) => {
            host.userdata_store(host.find(&name)?, &key, &data)?;
        }
        Request::Create(spec, work, userdata) => {
            return create(host, &spec, work.as_ref(), &userdata).map(Answer::Made);
        }
        Request::TryWorkload(name, spec) => {
            host.workload(host.find(&name)?, &spec)?;
        }
        Request::Destroy(name) => domain(&name)?.destroy()?,
        Request::Pause(name) => domain(&name)?.pause()?,
        Request::Unpause(name) => domain(&name)?.unpause()?,
        Request::Resume(name) => domain(&name)?.resume()?,
        Request::Rename(name, to) => host.rename(host.find(&name)?, &to)?,
    }
    Ok(Answer::Done)
}

/// Create a guest together with its work and user data, or nothing.
fn create(
    host: &MockHost,
    spec: &GuestSpec,
    work: Option<&WorkloadSpec>,
    userdata: &[(String, Vec<u8>)],
) -> Result<DomId, MockError> {
    let domid = host.create_guest(spec)?;
    let finished = (|| {
        if let Some(work) = work {
            host.workload(domid, work)?;
        }
        for (key, data) in userdata {
            host.userdata_store(domid, key, data)?;
        }
        Ok(())
    })();
    if finished.is_err() {
        host.domain(domid)?.destroy()?;
    }
    finished.map(|()| domid)
}

/// A host that this process has open, or that another process has open and answers for.
#[derive(Debug)]
pub struct Reached(Whose);

#[derive(Debug)]
enum Whose {
    /// This process has it open.
    Here(MockHost),
    /// Another process has it open.
    Beside(PathBuf),
}

impl MockHost {
    /// Open the host in `dir`, or reach the process that has it open.
    ///
    /// # Errors
    ///
    /// As [`MockHost::open`]. [`MockError::InUse`]: that process does not answer.
    pub fn reach(dir: &Path) -> Result<Reached, MockError> {
        let mut tries = 0;
        loop {
            match Self::open(dir) {
                Ok(host) => return Ok(Reached(Whose::Here(host))),
                Err(in_use @ MockError::InUse { .. }) => {
                    if connect(dir)?.is_some() {
                        return Ok(Reached(Whose::Beside(dir.to_owned())));
                    }
                    // The other process is opening the host, or ending.
                    tries += 1;
                    if tries == TRIES {
                        return Err(in_use);
                    }
                    thread::sleep(BETWEEN_TRIES);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// A connection to the process that has the host open; `None` if none answers at the moment.
fn connect(dir: &Path) -> Result<Option<UnixStream>, MockError> {
    let Some(place) = Place::open(dir)? else {
        return Ok(None);
    };
    match UnixStream::connect(place.by_descriptor().join(SOCKET)) {
        Ok(socket) => Ok(Some(socket)),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {
            Ok(None)
        }
        Err(e) => Err(MockError::io("connect to", dir.join(SOCKET))(e)),
    }
}

/// Send a request to the process that has the host in `dir` open; `None` if it ends, or has ended,
/// without an answer.
fn ask_once(dir: &Path, request: &Request) -> Result<Option<Answer>, MockError> {
    let Some(socket) = connect(dir)? else {
        return Ok(None);
    };
    let asked: io::Result<_> = (|| {
        // The requested guest may have any size.
        let patience = match request {
            Request::Create(..) => None,
            _ => Some(ANSWER_WAIT),
        };
        socket.set_read_timeout(patience)?;
        socket.set_write_timeout(Some(ANSWER_WAIT))?;
        send(&socket, request)?;
        let mut line = Vec::new();
        BufReader::new(&socket).read_until(b'\n', &mut line)?;
        match line.ends_with(b"\n") {
            true => Ok(Some(serde_json::from_slice(&line)?)),
            false => Ok(None),
        }
    })();
    match asked {
        Ok(Some(Answer::Failed(why))) => Err(MockError::Answered(why)),
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
            ) =>
        {
            Ok(None)
        }
        asked => asked.map_err(MockError::io("ask", dir.join(SOCKET))),
    }
}

/// Send a request to the process that has the host in `dir` open, or answer it here if none has.
fn ask(dir: &Path, request: &Request) -> Result<Answer, MockError> {
    let mut cut_off = 0;
    loop {
        let answer = match MockHost::reach(dir)?.0 {
            Whose::Here(host) => answer(&host, request.clone()).map(Some),
            Whose::Beside(_) => ask_once(dir, request),
        };
        match (request, answer) {
            (_, Ok(Some(answer))) => return Ok(answer),
            // A process that was killed may have destroyed it.
            (Request::Destroy(_), Err(MockError::NoSuchDomain { .. })) if cut_off > 0 => {
                return Ok(Answer::Done);
            }
            (_, Err(error)) => return Err(error),
            (_, Ok(None)) if cut_off < TRIES => cut_off += 1,
            (_, Ok(None)) => {
                let never = io::Error::from(ErrorKind::UnexpectedEof);
                return Err(MockError::io("ask", dir.join(SOCKET))(never));
            }
        }
    }
}

impl From<MockHost> for Reached {
    fn from(host: MockHost) -> Self {
        Self(Whose::Here(host))
    }
}

impl Reached {
    fn ask(&self, request: Request) -> Result<Answer, MockError> {
        match &self.0 {
            Whose::Here(host) => answer(host, request),
            Whose::Beside(dir) => ask(dir, &request),
        }
    }

    fn order(&self, request: Request) -> Result<(), MockError> {
        match self.ask(request)? {
            Answer::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// The host, if this process has it open.
    pub fn here(&self) -> Option<&MockHost> {
        match &self.0 {
            Whose::Here(host) => Some(host),
            Whose::Beside(_) => None,
        }
    }

    /// Create a guest that can do `work`, with these user data (keys and values). If this process
    /// ends before the answer arrives, the process that has the host open destroys the guest.
    ///
    /// # Errors
    ///
    /// As [`MockHost::create_guest`], [`MockHost::workload`] and [`MockHost::userdata_store`]; the
    /// other process does not answer.
    pub fn create_guest(
        &self,
        spec: &GuestSpec,
        work: Option<&WorkloadSpec>,
        userdata: &[(String, Vec<u8>)],
    ) -> Result<DomId, MockError> {
        let spec = Box::new(spec.clone());
        match self.ask(Request::Create(spec, work.cloned(), userdata.to_vec()))? {
            Answer::Made(domid) => Ok(domid),
            other => Err(unexpected(&other)),
        }
    }

    /// Check whether a domain can do this work.
    ///
    /// # Errors
    ///
    /// As [`MockHost::workload`]; the other process does not answer.
    pub fn try_workload(&self, domain: &str, spec: &WorkloadSpec) -> Result<(), MockError> {
        self.order(Request::TryWorkload(domain.to_owned(), spec.clone()))
    }

    /// Every domain, in ascending order.
    ///
    /// # Errors
    ///
    /// The other process does not answer.
    pub fn list(&self) -> Result<Vec<DomainSummary>, MockError> {
        match self.ask(Request::List)? {
            Answer::Domains(domains) => Ok(domains),
            other => Err(unexpected(&other)),
        }
    }

    /// A full report on one domain.
    ///
    /// # Errors
    ///
    /// The domain does not exist; the other process does not answer.
    pub fn show(&self, domain: &str) -> Result<DomainReport, MockError> {
        match self.ask(Request::Show(domain.to_owned()))? {
            Answer::Report(report) => Ok(*report),
            other => Err(unexpected(&other)),
        }
    }

    /// The user data of a domain under `key`.
    ///
    /// # Errors
    ///
    /// The domain does not exist; the other process does not answer.
    pub fn userdata_get(&self, domain: &str, key: &str) -> Result<Option<Vec<u8>>, MockError> {
        match self.ask(Request::Userdata(domain.to_owned(), key.to_owned()))? {
            Answer::Userdata(data) => Ok(data),
            other => Err(unexpected(&other)),
        }
    }

    /// Store `data` as user data of a domain under `key`.
    ///
    /// # Errors
    ///
    /// As [`MockHost::userdata_store`]; the other process does not answer.
    pub fn userdata_store(&self, domain: &str, key: &str, data: &[u8]) -> Result<(), MockError> {
        let (domain, key) = (domain.to_owned(), key.to_owned());
        self.order(Request::StoreUserdata(domain, key, data.to_vec()))
    }

    /// Destroy a domain. Operations on it in other threads or processes then fail, because it is
    /// gone.
    ///
    /// # Errors
    ///
    /// The hypervisor's; the other process does not answer.
    pub fn destroy(&self, domain: &str) -> Result<(), MockError> {
        self.order(Request::Destroy(domain.to_owned()))
    }

    /// Pause a domain.
    ///
    /// # Errors
    ///
    /// As [`Reached::destroy`].
    pub fn pause(&self, domain: &str) -> Result<(), MockError> {
        self.order(Request::Pause(domain.to_owned()))
    }

    /// Undo one pause of a domain.
    ///
    /// # Errors
    ///
    /// As [`Reached::destroy`].
    pub fn unpause(&self, domain: &str) -> Result<(), MockError> {
        self.order(Request::Unpause(domain.to_owned()))
    }

    /// Resume a suspended domain.
    ///
    /// # Errors
    ///
    /// As [`Reached::destroy`].
    pub fn resume(&self, domain: &str) -> Result<(), MockError> {
        self.order(Request::Resume(domain.to_owned()))
    }

    /// Rename a domain.
    ///
    /// # Errors
    ///
    /// As [`MockHost::rename`]; the other process does not answer.
    pub fn rename(&self, domain: &str, name: &str) -> Result<(), MockError> {
        self.order(Request::Rename(domain.to_owned(), name.to_owned()))
    }
}

fn unexpected(answer: &Answer) -> MockError {
    MockError::Answered(format!(
        "the process that has the host open gave another answer than expected: {answer:?}"
    ))
}

#[cfg(test)]
mod tests;
