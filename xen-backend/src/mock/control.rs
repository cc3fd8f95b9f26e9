//! A mock host beside the command that has it open: that process answers at a socket in the
//! host's directory, so that a domain can be looked at, paused or destroyed meanwhile.
//!
//! One request and one answer for each connection, a line of JSON each. The directory is its
//! owner's alone, and with it the socket.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;
use std::{fs, io::ErrorKind};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::error::MockError;
use super::machine::Machine;
use super::phases;
use super::place::Place;
use super::{DomainReport, DomainSummary, MockHost};
use crate::Host as _;

/// The socket, in the host's directory.
const SOCKET: &str = "control";
/// Longest request: user data is the longest part of one.
const MOST: u64 = 64 << 20;
/// How long a client may keep the host waiting, and the other way round.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
/// How often a client tries to find the host open or free, and how long it waits in between.
const TRIES: u32 = 50;
const BETWEEN_TRIES: Duration = Duration::from_millis(10);

/// What can be asked. A domain is named or numbered.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    List,
    Show(String),
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
    Done,
    Failed(String),
}

/// The host answers for as long as this is there.
#[derive(Debug)]
pub(super) struct Control {
    /// Dropped, it ends the thread.
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
    /// Answer for `machine`, whose directory is open as `place`.
    pub(super) fn start(machine: &Arc<Machine>, place: Place) -> Result<Self, MockError> {
        let path = place.path().join(SOCKET);
        // Of a process that was killed: this one has the lock.
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
        let Some(machine) = machine.upgrade() else {
            return Ok(());
        };
        // One that asks nothing, or reads nothing, holds up the others, but not for long.
        if let Err(error) = attend(&client, &MockHost { machine }) {
            tracing::debug!(%error, "a request to the mock host");
        }
    }
}

fn attend(client: &UnixStream, host: &MockHost) -> io::Result<()> {
    client.set_read_timeout(Some(ANSWER_WAIT))?;
    client.set_write_timeout(Some(ANSWER_WAIT))?;
    let mut line = Vec::new();
    BufReader::new(client.take(MOST)).read_until(b'\n', &mut line)?;
    let answer = match serde_json::from_slice(&line) {
        Ok(request) => {
            answer(host, request).unwrap_or_else(|error| Answer::Failed(error.to_string()))
        }
        Err(error) => Answer::Failed(error.to_string()),
    };
    send(client, &answer)
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
        Request::Destroy(name) => domain(&name)?.destroy()?,
        Request::Pause(name) => domain(&name)?.pause()?,
        Request::Unpause(name) => domain(&name)?.unpause()?,
        Request::Resume(name) => domain(&name)?.resume()?,
        Request::Rename(name, to) => host.rename(host.find(&name)?, &to)?,
    }
    Ok(Answer::Done)
}

/// A host that this process has open, or that another one works on and answers for.
#[derive(Debug)]
pub struct Reached(Whose);

#[derive(Debug)]
enum Whose {
    /// It is open here.
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
                    // It is opening the host, or ending.
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

/// A connection to whoever answers; `None` where nobody does at this moment.
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

/// Ask the process that has the host in `dir` open.
fn ask(dir: &Path, request: &Request) -> Result<Answer, MockError> {
    let path = dir.join(SOCKET);
    let Some(socket) = connect(dir)? else {
        let ended = io::Error::from(ErrorKind::ConnectionRefused);
        return Err(MockError::io("connect to", path)(ended));
    };
    let answer = (|| {
        socket.set_read_timeout(Some(ANSWER_WAIT))?;
        socket.set_write_timeout(Some(ANSWER_WAIT))?;
        send(&socket, request)?;
        let mut line = Vec::new();
        BufReader::new(&socket).read_until(b'\n', &mut line)?;
        Ok(serde_json::from_slice(&line)?)
    })();
    match answer.map_err(MockError::io("ask", path))? {
        Answer::Failed(why) => Err(MockError::Answered(why)),
        answer => Ok(answer),
    }
}

impl Reached {
    /// Whether another process has the host open.
    pub fn is_beside(&self) -> bool {
        matches!(self.0, Whose::Beside(_))
    }

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

    /// Every domain, ascending.
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

    /// All there is to tell of one domain.
    ///
    /// # Errors
    ///
    /// There is no such domain; the other process does not answer.
    pub fn show(&self, domain: &str) -> Result<DomainReport, MockError> {
        match self.ask(Request::Show(domain.to_owned()))? {
            Answer::Report(report) => Ok(*report),
            other => Err(unexpected(&other)),
        }
    }

    /// What is kept with a domain under `key`.
    ///
    /// # Errors
    ///
    /// There is no such domain; the other process does not answer.
    pub fn userdata_get(&self, domain: &str, key: &str) -> Result<Option<Vec<u8>>, MockError> {
        match self.ask(Request::Userdata(domain.to_owned(), key.to_owned()))? {
            Answer::Userdata(data) => Ok(data),
            other => Err(unexpected(&other)),
        }
    }

    /// Keep `data` with a domain under `key`.
    ///
    /// # Errors
    ///
    /// As [`MockHost::userdata_store`]; the other process does not answer.
    pub fn userdata_store(&self, domain: &str, key: &str, data: &[u8]) -> Result<(), MockError> {
        let (domain, key) = (domain.to_owned(), key.to_owned());
        self.order(Request::StoreUserdata(domain, key, data.to_vec()))
    }

    /// Destroy a domain. Whoever works on it finds that it is gone.
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

    /// Give a domain another name.
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
mod tests {
    use super::super::{DomainState, GuestSpec, HostConfig};
    use super::*;
    use crate::GuestKind;

    #[test]
    fn a_host_that_is_open_elsewhere_answers() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("a".repeat(100));
        let config = HostConfig {
            memory_pages: 1 << 13,
            ..HostConfig::default()
        };
        let host = MockHost::create(&dir, &config).expect("a host");
        let domid = host
            .create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))
            .expect("a guest");
        let domain = host.domain(domid).expect("the domain");
        // The lock belongs to the open file: this is another process to it.
        let beside = MockHost::reach(&dir).expect("reached");
        assert!(beside.is_beside());
        assert_eq!(beside.list().expect("a list"), host.list());
        assert_eq!(beside.show("web").expect("a report").summary.domid, domid);
        beside.pause("1").expect("paused");
        assert!(domain.info().expect("there").paused);
        beside.unpause("web").expect("unpaused");
        beside.userdata_store("web", "k", b"v").expect("kept");
        assert_eq!(
            beside.userdata_get("web", "k").expect("asked"),
            Some(b"v".to_vec())
        );
        domain.suspend().expect("suspended");
        beside.resume("web").expect("resumed");
        beside.rename("web", "www").expect("renamed");
        let refused = beside.resume("www").expect_err("it runs").to_string();
        assert!(refused.contains("EINVAL"), "{refused}");
        let refused = beside.pause("web").expect_err("gone").to_string();
        assert!(refused.contains("no domain"), "{refused}");
        assert_eq!(host.list()[0].state, DomainState::Running);
        beside.destroy("www").expect("destroyed");
        assert_eq!(domain.info().expect_err("gone").errno, Errno::ESRCH);
        drop((host, domain));
        assert!(!dir.join(SOCKET).exists());
        assert!(!MockHost::reach(&dir).expect("opened").is_beside());
    }

    #[test]
    fn a_host_whose_owner_was_killed_is_opened() {
        let scratch = tempfile::tempdir().expect("a directory");
        let dir = scratch.path().join("host");
        let config = HostConfig {
            memory_pages: 1 << 13,
            ..HostConfig::default()
        };
        drop(MockHost::create(&dir, &config).expect("a host"));
        // What a killed process leaves.
        drop(UnixListener::bind(dir.join(SOCKET)).expect("a socket"));
        assert!(!MockHost::reach(&dir).expect("opened").is_beside());
    }
}
