//! A client of xenstored, over its socket, or over the kernel's device if the store runs in another
//! domain.
//!
//! C implementation: `tools/libs/store/xs.c`.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use crate::Errno;
use xsr_format::frame::Gfn;

use super::wire::{Message, errno_of, kind};
use super::{Nodes, StoreError, Work, Xenstore};
use crate::DomId;

/// Sockets that xenstored listens on.
const SOCKETS: [&str; 2] = ["/run/xenstored/socket", "/var/run/xenstored/socket"];
/// Devices through which the kernel passes messages on.
const DEVICES: [&str; 2] = ["/dev/xen/xenbus", "/proc/xen/xenbus"];

/// The number of attempts at a transaction that conflicts with others.
const ATTEMPTS: usize = 100;

/// A byte stream that carries messages.
pub(super) trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// This machine's xenstore; connects on first use.
#[derive(Default)]
pub(crate) struct Sockets {
    connection: Mutex<Option<Connection>>,
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets").finish_non_exhaustive()
    }
}

fn connect() -> Result<Box<dyn Stream>, StoreError> {
    let mut last = None;
    for path in SOCKETS {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(Box::new(stream)),
            Err(error) => last = last.or(Some(error)),
        }
    }
    for path in DEVICES {
        if let Ok(device) = OpenOptions::new().read(true).write(true).open(path) {
            return Ok(Box::new(device));
        }
    }
    Err(StoreError::Absent(
        last.unwrap_or_else(|| io::ErrorKind::NotFound.into()),
    ))
}

impl Sockets {
    /// The store at the other end of `stream`.
    #[cfg(test)]
    pub(super) fn over(stream: Box<dyn Stream>) -> Self {
        Self {
            connection: Mutex::new(Some(Connection::new(stream))),
        }
    }

    /// Runs `work` on the connection; a broken connection is not reused.
    fn with<T>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut place = self
            .connection
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut connection = match place.take() {
            Some(connection) => connection,
            None => Connection::new(connect()?),
        };
        let result = work(&mut connection);
        if !matches!(result, Err(StoreError::Connection(_))) {
            *place = Some(connection);
        }
        result
    }
}

impl Xenstore for Sockets {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(|connection| connection.read(0, path))
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.with(|connection| connection.write(0, path, value))
    }

    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        self.with(|connection| connection.exchange(path, old, new))
    }

    fn list(&self, path: &str) -> Result<Vec<String>, StoreError> {
        self.with(|connection| connection.list(0, path))
    }

    fn transaction(&self, work: &mut Work<'_>) -> Result<(), StoreError> {
        self.with(|connection| connection.transaction(work))
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        self.with(|connection| connection.remove(0, path))
    }

    fn let_have(&self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError> {
        self.with(|connection| connection.let_have(0, path, domid, owner))
    }

    fn resumed(&self, domid: DomId) -> Result<(), StoreError> {
        let domid = domid.0.to_string();
        self.with(|connection| connection.order(0, "resume", &domid, kind::RESUME, &[]))
    }

    fn introduce(&self, domid: DomId, frame: Gfn, port: u32) -> Result<(), StoreError> {
        let more = [frame.0.to_string(), port.to_string()];
        let domid = domid.0.to_string();
        self.with(|connection| connection.order(0, "introduce", &domid, kind::INTRODUCE, &more))
    }
}

/// A connection with one request at a time.
struct Connection {
    stream: Box<dyn Stream>,
    last_request: u32,
}

impl Connection {
    fn new(stream: Box<dyn Stream>) -> Self {
        Self {
            stream,
            last_request: 0,
        }
    }

    /// Send a request and wait for the answer; the store's errno if it refuses.
    fn ask(
        &mut self,
        kind: u32,
        transaction: u32,
        payload: Vec<u8>,
    ) -> Result<Result<Vec<u8>, Errno>, StoreError> {
        self.last_request = self.last_request.wrapping_add(1);
        let question = Message {
            kind,
            request: self.last_request,
            transaction,
            payload,
        };
        question.send(&mut self.stream)?;
        loop {
            let answer = Message::receive(&mut self.stream)?;
            if answer.is_event() {
                continue;
            }
            if answer.request != question.request {
                let text = format!(
                    "an answer to request {} where {} was asked",
                    answer.request, question.request
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, text).into());
            }
            return Ok(match answer.kind {
                kind::ERROR => Err(errno_of(&answer.payload)),
                _ => Ok(answer.payload),
            });
        }
    }

    fn read(&mut self, transaction: u32, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        match self.ask(kind::READ, transaction, terminated(path))? {
            Ok(value) => Ok(Some(value)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(refused("read", path, errno)),
        }
    }

    fn list(&mut self, transaction: u32, path: &str) -> Result<Vec<String>, StoreError> {
        let names = match self.ask(kind::DIRECTORY, transaction, terminated(path))? {
            Ok(names) => names,
            Err(Errno::ENOENT) => return Ok(Vec::new()),
            Err(errno) => return Err(refused("list", path, errno)),
        };
        let names = names
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty());
        Ok(names
            .map(|name| String::from_utf8_lossy(name).into_owned())
            .collect())
    }

    fn write(&mut self, transaction: u32, path: &str, value: &[u8]) -> Result<(), StoreError> {
        let mut payload = terminated(path);
        payload.extend_from_slice(value);
        match self.ask(kind::WRITE, transaction, payload)? {
            Ok(_) => Ok(()),
            Err(errno) => Err(refused("write", path, errno)),
        }
    }

    /// A request that the store carries out or refuses: the strings `what` and `more`.
    fn order(
        &mut self,
        transaction: u32,
        op: &'static str,
        what: &str,
        kind: u32,
        more: &[String],
    ) -> Result<(), StoreError> {
        let mut payload = terminated(what);
        for word in more {
            payload.extend(terminated(word));
        }
        match self.ask(kind, transaction, payload)? {
            Ok(_) => Ok(()),
            Err(errno) => Err(refused(op, what, errno)),
        }
    }

    fn remove(&mut self, transaction: u32, path: &str) -> Result<(), StoreError> {
        match self.order(transaction, "rm", path, kind::RM, &[]) {
            Err(StoreError::Refused {
                errno: Errno::ENOENT,
                ..
            }) => Ok(()),
            result => result,
        }
    }

    fn let_have(
        &mut self,
        transaction: u32,
        path: &str,
        domid: DomId,
        owner: bool,
    ) -> Result<(), StoreError> {
        // The first entry is the owner, with the permissions of all other domains.
        let permissions = match owner {
            true => vec![format!("n{}", domid.0)],
            false => vec!["n0".to_owned(), format!("r{}", domid.0)],
        };
        self.order(
            transaction,
            "set_perms",
            path,
            kind::SET_PERMS,
            &permissions,
        )
    }

    fn exchange(&mut self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        let mut exchanged = false;
        self.transaction(&mut |nodes| {
            exchanged = nodes.read(path)?.as_deref() == Some(old);
            if exchanged {
                nodes.write(path, new)?;
            }
            Ok(exchanged)
        })?;
        Ok(exchanged)
    }

    fn transaction(&mut self, work: &mut Work<'_>) -> Result<(), StoreError> {
        /// The description of a transaction in messages.
        const WHAT: &str = "a transaction";
        for _ in 0..ATTEMPTS {
            let number = self.start(WHAT)?;
            let commit = match work(&mut Transaction {
                connection: self,
                number,
            }) {
                Ok(commit) => commit,
                Err(error) => return Err(self.give_up(number, WHAT, error)),
            };
            if self.end(number, WHAT, commit)? {
                return Ok(());
            }
        }
        Err(refused("commit", WHAT, Errno::EAGAIN))
    }

    fn start(&mut self, path: &str) -> Result<u32, StoreError> {
        match self.ask(kind::TRANSACTION_START, 0, terminated(""))? {
            Ok(number) => std::str::from_utf8(&number)
                .ok()
                .and_then(|number| number.trim_end_matches('\0').parse().ok())
                .ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidData, "a transaction without a number")
                        .into()
                }),
            Err(errno) => Err(refused("transaction", path, errno)),
        }
    }

    /// End a transaction; false if it conflicted with another and has to be repeated.
    fn end(&mut self, transaction: u32, path: &str, commit: bool) -> Result<bool, StoreError> {
        let how = terminated(if commit { "T" } else { "F" });
        match self.ask(kind::TRANSACTION_END, transaction, how)? {
            Ok(_) => Ok(true),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(refused("transaction", path, errno)),
        }
    }

    /// Abort a transaction; returns the error to report.
    fn give_up(&mut self, transaction: u32, path: &str, error: StoreError) -> StoreError {
        match self.end(transaction, path, false) {
            Ok(_) => error,
            Err(StoreError::Connection(broken)) => StoreError::Connection(broken),
            Err(_) => error,
        }
    }
}

/// A transaction under way.
struct Transaction<'c> {
    connection: &'c mut Connection,
    number: u32,
}

impl Nodes for Transaction<'_> {
    fn read(&mut self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        self.connection.read(self.number, path)
    }

    fn write(&mut self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.connection.write(self.number, path, value)
    }

    fn list(&mut self, path: &str) -> Result<Vec<String>, StoreError> {
        self.connection.list(self.number, path)
    }

    fn remove(&mut self, path: &str) -> Result<(), StoreError> {
        self.connection.remove(self.number, path)
    }

    fn let_have(&mut self, path: &str, domid: DomId, owner: bool) -> Result<(), StoreError> {
        self.connection.let_have(self.number, path, domid, owner)
    }
}

fn terminated(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn refused(op: &'static str, path: &str, errno: Errno) -> StoreError {
    StoreError::Refused {
        op,
        path: path.to_owned(),
        errno,
    }
}
