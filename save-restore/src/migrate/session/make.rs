//! How the two ends make a session, add links to it, and take up a lost link again.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom as _, SystemRandom};
use thiserror::Error;

use super::compress::{Compression, Policy};
use super::figures::Carried;
use super::frame::{Answer, Hello, Malformed, Purpose, SLOTS, Token, WINDOW, Welcome};
use super::link;
use super::state::{Limits, SILENCE_FOR_GOOD, State};
use super::wire::{Inbox, Wire};
use super::{Session, Shared};
use crate::migrate::connection::{ConnectionError, Wait};
use crate::progress::Cancel;

/// How long making one link may take, from the connection to the welcome.
pub(super) const HANDSHAKE: Duration = Duration::from_secs(5);

/// A link on which nothing arrives for so long is lost, if lost links are taken up again.
const SILENCE: Duration = Duration::from_secs(4);

/// How much longer than the client the server waits for a link.
const LONGER: Duration = Duration::from_secs(2);

/// How often a session looks whether something has lasted too long.
const TICK: Duration = Duration::from_millis(50);

/// The longest pause between two attempts to connect.
const RETRY: Duration = Duration::from_secs(1);

/// Why no session, or no link of one, was made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The other end could not be reached.
    #[error("connecting")]
    Connecting(#[source] io::Error),
    /// The connection failed before the session was made.
    #[error("beginning the session")]
    Beginning(#[source] ConnectionError),
    /// The other end refuses.
    #[error("the other end refuses: {0}")]
    Refused(&'static str),
    /// The other end does not speak the protocol.
    #[error("beginning the session: {0}")]
    Protocol(String),
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
}

impl From<ConnectionError> for SessionError {
    fn from(error: ConnectionError) -> Self {
        Self::Beginning(error)
    }
}

impl From<Malformed> for SessionError {
    fn from(malformed: Malformed) -> Self {
        Self::Protocol(malformed.to_string())
    }
}

/// Connects to the server of a session.
pub trait Dial: fmt::Debug + Send + Sync {
    /// Makes one connection, and authenticates the server.
    ///
    /// # Errors
    ///
    /// The server cannot be reached and authenticated within the limit, it is not the right one, or
    /// `cancel` was set.
    fn dial(&self, limit: Duration, cancel: &Cancel) -> io::Result<Wire>;
}

/// What a session should be like.
#[derive(Clone, Debug)]
pub struct SessionRequest {
    pub(super) links: u8,
    reconnect: Duration,
    suspended: Duration,
    token: Option<Token>,
    compression: Compression,
    most: u64,
    rate: Option<u64>,
}

impl Default for SessionRequest {
    fn default() -> Self {
        Self::new()
    }
}

impl SessionRequest {
    /// The most links that a session can have.
    pub const MOST_LINKS: u8 = SLOTS;

    /// The length of a token in bytes.
    pub const TOKEN: usize = 32;

    /// One link, which is not taken up again.
    pub const fn new() -> Self {
        Self {
            links: 1,
            reconnect: Duration::ZERO,
            suspended: Duration::from_secs(2),
            token: None,
            compression: Compression::None,
            most: WINDOW,
            rate: None,
        }
    }

    /// Sends no more than so many bytes a second, over all links together. A peer that hears too
    /// little takes the session for lost, so this is at least 1 MiB.
    #[must_use]
    pub fn bandwidth(mut self, bytes_per_second: u64) -> Self {
        self.rate = Some(bytes_per_second.max(1 << 20));
        self
    }

    /// Compresses what this end sends.
    #[must_use]
    pub const fn compression(mut self, how: Compression) -> Self {
        self.compression = how;
        self
    }

    /// Has at most so many bytes in transit that the peer's process has not read: at least 128 KiB,
    /// at most 16 MiB.
    #[must_use]
    pub const fn in_transit(mut self, bytes: u64) -> Self {
        self.most = bytes;
        self
    }

    /// So many links, at least 1 and at most [`Self::MOST_LINKS`].
    #[must_use]
    pub fn links(mut self, links: u8) -> Self {
        self.links = links.clamp(1, SLOTS);
        self
    }

    /// Takes up a lost link again, as long as the session has been without a link for less than
    /// this. Zero: does not. A server takes the client's limit, if that is shorter.
    #[must_use]
    pub const fn reconnect(mut self, limit: Duration) -> Self {
        self.reconnect = limit;
        self
    }

    /// The same, while the domain is suspended.
    #[must_use]
    pub const fn reconnect_suspended(mut self, limit: Duration) -> Self {
        self.suspended = limit;
        self
    }

    /// The token of the session, if both ends know it already. Otherwise the client makes one.
    #[must_use]
    pub const fn token(mut self, token: [u8; Self::TOKEN]) -> Self {
        self.token = Some(Token(token));
        self
    }

    /// A new token.
    ///
    /// # Errors
    ///
    /// [`SessionError::Random`].
    pub fn new_token() -> Result<[u8; Self::TOKEN], SessionError> {
        let mut token = [0; Self::TOKEN];
        let filled = SystemRandom::new().fill(&mut token);
        filled.map_err(|_| SessionError::Random)?;
        Ok(token)
    }

    fn limits(&self) -> Limits {
        Limits {
            reconnect: self.reconnect,
            suspended: self.suspended,
            silence: match self.reconnect.is_zero() {
                true => SILENCE_FOR_GOOD,
                false => SILENCE,
            },
        }
    }

    /// Makes a session, as its client. Further links are made afterwards, while it is used.
    ///
    /// # Errors
    ///
    /// A [`SessionError`]; the limit is for the first connection and its authentication.
    pub fn connect(
        &self,
        dial: Arc<dyn Dial>,
        limit: Duration,
        cancel: &Cancel,
    ) -> Result<Session, SessionError> {
        let token = match self.token {
            Some(token) => token,
            None => Token(Self::new_token()?),
        };
        let wire = dial.dial(limit, cancel).map_err(SessionError::Connecting)?;
        let shared = Shared::new(self);
        let client = Client {
            request: self.clone(),
            token,
            shared: Arc::clone(&shared),
            dial,
        };
        let peer = wire.peer();
        client.add(wire, Purpose::New, 0, HANDSHAKE, cancel)?;
        watch(&shared);
        if self.links > 1 || !self.reconnect.is_zero() {
            spawn("session-dial", move || client.keep_links());
        }
        Ok(Session { shared, peer })
    }
}

impl Shared {
    fn new(request: &SessionRequest) -> Arc<Self> {
        let mut state = State::new(request.limits(), request.most, Instant::now());
        if let Some(rate) = request.rate {
            state.limit_rate(rate, Instant::now());
        }
        Arc::new(Self {
            state: Mutex::new(state),
            policy: Policy::new(request.compression),
            carried: Carried::default(),
            process: Condvar::new(),
            links: Condvar::new(),
            dropped: false.into(),
            closed: Cancel::new(),
            made: Instant::now(),
        })
    }
}

/// Starts a thread that ends by itself.
fn spawn(name: &str, run: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name(name.to_owned()).spawn(run) {
        tracing::warn!(%error, name, "a thread of the session could not be started");
    }
}

/// Ends what has lasted too long, until the session is dropped.
fn watch(shared: &Arc<Shared>) {
    let shared = Arc::clone(shared);
    spawn("session-watch", move || {
        while !shared.is_dropped() {
            let mut state = shared.lock();
            let changed = state.tick(Instant::now());
            if !state.is_open() {
                shared.closed.cancel();
            }
            drop(state);
            if changed {
                shared.wake();
            }
            thread::park_timeout(TICK);
        }
        shared.closed.cancel();
    });
}

/// The client's part in making links.
#[derive(Debug)]
struct Client {
    request: SessionRequest,
    token: Token,
    shared: Arc<Shared>,
    dial: Arc<dyn Dial>,
}

impl Client {
    /// Makes a link of a connection.
    fn add(
        &self,
        wire: Wire,
        purpose: Purpose,
        slot: u8,
        limit: Duration,
        cancel: &Cancel,
    ) -> Result<(), SessionError> {
        let (received, _) = self.shared.lock().incoming.acknowledgement();
        let hello = Hello {
            purpose,
            slot,
            limit: self.request.reconnect,
            token: self.token,
            received,
            window: WINDOW,
        };
        let wait = Wait::forever().at_most(limit).unless(cancel);
        wire.write(&hello.bytes(), &wait)?;
        let mut inbox = Inbox::new();
        wire.read_whole(&mut inbox, Welcome::LENGTH, &wait)?;
        let welcome = match inbox.bytes().first_chunk() {
            Some(bytes) => Welcome::read(bytes)?,
            None => return Err(Malformed::Magic.into()),
        };
        inbox.consume(Welcome::LENGTH);
        if let Some(why) = refusal(welcome.answer) {
            return Err(SessionError::Refused(why));
        }
        let mut state = self.shared.lock();
        let attached = state.attach(slot, welcome.received, welcome.window, Instant::now());
        drop(state);
        self.shared.wake();
        let (id, cancel) = attached.map_err(|_| SessionError::Refused("the session is over"))?;
        link::start(&self.shared, wire, id, cancel, inbox);
        Ok(())
    }

    /// Makes the links that are missing, until the session takes no more.
    fn keep_links(&self) {
        let mut pause = Duration::ZERO;
        let mut tried = 1_u8;
        let mut recent = Vec::new();
        loop {
            let slot = {
                let mut state = self.shared.lock();
                loop {
                    if self.shared.is_dropped() || !state.is_open() {
                        return;
                    }
                    let free = match state.reconnects() {
                        true => state.free_slot(self.request.links),
                        // Each once.
                        false if tried < self.request.links => Some(tried),
                        false => return,
                    };
                    match free {
                        Some(slot) => break slot,
                        None => state = self.shared.wait(&self.shared.process, state, TICK),
                    }
                }
            };
            tried = tried.saturating_add(1);
            // Links that end as soon as they are made are not made again at once for ever.
            recent.retain(|at: &Instant| at.elapsed() < RETRY);
            recent.push(Instant::now());
            let many = recent.len() > 4 * usize::from(self.request.links);
            let least = if many { RETRY / 10 } else { Duration::ZERO };
            if !self.sleep(pause.max(least)) {
                return;
            }
            let limit = self.shared.lock().attempt(Instant::now(), HANDSHAKE);
            let begun = Instant::now();
            let cancel = &self.shared.closed;
            let made = self
                .dial
                .dial(limit, cancel)
                .map_err(SessionError::Connecting)
                .and_then(|wire| {
                    let left = limit.saturating_sub(begun.elapsed());
                    self.add(wire, Purpose::Join, slot, left, cancel)
                });
            pause = match made {
                Ok(()) => {
                    tracing::debug!(slot, "a link of the session was made");
                    Duration::ZERO
                }
                Err(error) => {
                    tracing::debug!(slot, %error, "no link of the session was made");
                    RETRY.min(pause * 2).max(RETRY / 10)
                }
            };
        }
    }

    /// Waits. Returns whether the session still takes links.
    fn sleep(&self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut state = self.shared.lock();
        loop {
            if self.shared.is_dropped() || !state.is_open() {
                return false;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            state = self
                .shared
                .wait(&self.shared.process, state, left.min(TICK));
        }
    }
}

/// Why a server refuses.
const fn refusal(answer: Answer) -> Option<&'static str> {
    match answer {
        Answer::Accepted => None,
        Answer::UnknownVersion => Some("it speaks another version of the session"),
        Answer::NoSuchSession => Some("it does not know this session"),
        Answer::AlreadyThere => Some("it has a session already"),
        Answer::TooLate => Some("the session takes no more links"),
    }
}

/// The server of one session.
///
/// A listener gives it connections, whose clients have authenticated; it makes a session of the
/// first one and links of the others.
#[derive(Debug)]
pub struct Server {
    request: SessionRequest,
    session: Mutex<Option<(Token, Arc<Shared>)>>,
}

impl Server {
    /// A server that has no session yet.
    pub const fn new(request: SessionRequest) -> Self {
        Self {
            request,
            session: Mutex::new(None),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Token, Arc<Shared>)>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a connection can still be of use: there is no session yet, or it takes links.
    pub fn is_open(&self) -> bool {
        match &*self.lock() {
            None => true,
            Some((_, shared)) => !shared.is_dropped() && shared.lock().is_open(),
        }
    }

    /// Lets a connection in. Returns the session if this connection is its first link. Waits 5 s at
    /// most, and may be called by several threads.
    ///
    /// # Errors
    ///
    /// A [`SessionError`]; the connection is closed. A session that exists is not affected.
    pub fn admit(&self, wire: Wire, cancel: &Cancel) -> Result<Option<Session>, SessionError> {
        let wait = Wait::forever().at_most(HANDSHAKE).unless(cancel);
        let mut inbox = Inbox::new();
        wire.read_whole(&mut inbox, Hello::LENGTH, &wait)?;
        let hello = match inbox.bytes().first_chunk() {
            Some(bytes) => Hello::read(bytes),
            None => Err(Malformed::Magic),
        };
        let refuse = |answer: Answer| {
            wire.write(&Welcome::refusal(answer).bytes(), &wait)?;
            Err(SessionError::Refused(refusal(answer).unwrap_or("")))
        };
        let hello = match hello {
            Ok(hello) => hello,
            Err(Malformed::Version(_)) => return refuse(Answer::UnknownVersion),
            Err(malformed) => return Err(malformed.into()),
        };
        inbox.consume(Hello::LENGTH);
        let (shared, is_new) = match self.find(&hello) {
            Ok(found) => found,
            Err(answer) => return refuse(answer),
        };
        let mut state = shared.lock();
        let attached = state.attach(hello.slot, hello.received, hello.window, Instant::now());
        let (received, _) = state.incoming.acknowledgement();
        drop(state);
        shared.wake();
        let (id, link_cancel) = match attached {
            Ok(attached) => attached,
            Err(answer) => {
                self.forget(is_new);
                return refuse(answer);
            }
        };
        let welcome = Welcome {
            answer: Answer::Accepted,
            received,
            window: WINDOW,
        };
        if let Err(error) = wire.write(&welcome.bytes(), &wait) {
            shared.lock().lose(id, "it ended at once", Instant::now());
            shared.wake();
            self.forget(is_new);
            return Err(error.into());
        }
        let peer = wire.peer();
        link::start(&shared, wire, id, link_cancel, inbox);
        Ok(is_new.then(|| {
            watch(&shared);
            Session { shared, peer }
        }))
    }

    /// A session that was just made has not begun: another client may begin one.
    fn forget(&self, is_new: bool) {
        if is_new {
            *self.lock() = None;
        }
    }

    /// The session that a hello is for, and whether it is new.
    fn find(&self, hello: &Hello) -> Result<(Arc<Shared>, bool), Answer> {
        let mut session = self.lock();
        match (&*session, hello.purpose) {
            (Some((token, shared)), Purpose::Join) if token.is(&hello.token) => {
                match shared.is_dropped() {
                    true => Err(Answer::TooLate),
                    false => Ok((Arc::clone(shared), false)),
                }
            }
            (_, Purpose::Join) => Err(Answer::NoSuchSession),
            (Some(_), Purpose::New) => Err(Answer::AlreadyThere),
            (None, Purpose::New) => {
                let known = self.request.token;
                if known.is_some_and(|token| !token.is(&hello.token)) {
                    return Err(Answer::NoSuchSession);
                }
                let request = SessionRequest {
                    reconnect: match self.request.reconnect.min(hello.limit) {
                        Duration::ZERO => Duration::ZERO,
                        limit => limit + LONGER,
                    },
                    ..self.request.clone()
                };
                let shared = Shared::new(&request);
                *session = Some((hello.token, Arc::clone(&shared)));
                Ok((shared, true))
            }
        }
    }
}

impl Session {
    /// The number of links that it has now.
    pub fn links(&self) -> usize {
        self.shared.lock().links()
    }
}
