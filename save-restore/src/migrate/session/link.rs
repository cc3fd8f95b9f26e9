//! The two threads of a link: one reads frames, and one writes what the state says.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use super::Shared;
use super::compress::{Compressor, Decompressor};
use super::frame::{CHUNK, Contents, Frame, Malformed};
use super::outgoing::{LinkId, Piece};
use super::state::Job;
use super::wire::{Inbox, Wire};
use crate::migrate::connection::{ConnectionError, Wait};
use crate::progress::Cancel;

/// Starts the threads of a link. `inbox` holds what has arrived on it already.
///
/// If they cannot be started, the link is lost.
pub(super) fn start(shared: &Arc<Shared>, wire: Wire, id: LinkId, cancel: Cancel, inbox: Inbox) {
    let link = Arc::new(Link {
        shared: Arc::clone(shared),
        wire,
        id,
        cancel,
    });
    let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name.to_owned()).spawn(run)
    };
    let (reads, writes) = (Arc::clone(&link), Arc::clone(&link));
    let started = spawn("session-read", Box::new(move || reads.read_all(inbox)))
        .and_then(|_| spawn("session-write", Box::new(move || writes.write_all())));
    if let Err(error) = started {
        link.lose(&format!("no thread could be started: {error}"));
    }
}

/// A link, as its threads see it.
#[derive(Debug)]
struct Link {
    shared: Arc<Shared>,
    wire: Wire,
    id: LinkId,
    cancel: Cancel,
}

impl Link {
    fn lose(&self, why: &str) {
        let mut state = self.shared.lock();
        state.lose(self.id, why, Instant::now());
        drop(state);
        self.cancel.cancel();
        self.shared.wake();
    }

    /// Reads frames until the link ends.
    fn read_all(&self, mut inbox: Inbox) {
        let wait = Wait::forever().unless(&self.cancel);
        let mut decompressor = Decompressor::new();
        let why = loop {
            match self.frames(&mut inbox, &mut decompressor) {
                Ok(true) => {}
                Ok(false) => break "the other end has closed it".to_owned(),
                Err(malformed) => {
                    self.shared.lock().violated(malformed, self.id);
                    break malformed.to_string();
                }
            }
            match self.wire.read(&mut inbox, &wait) {
                Ok(true) => self.shared.lock().heard(self.id, Instant::now()),
                Ok(false) => break "the other end has closed it".to_owned(),
                Err(error) => break words(&error),
            }
        };
        self.lose(&why);
    }

    /// Handles the frames that are here. Returns whether the link goes on.
    fn frames(
        &self,
        inbox: &mut Inbox,
        decompressor: &mut Decompressor,
    ) -> Result<bool, Malformed> {
        while let Some((frame, length)) = Frame::read(inbox.bytes())? {
            let goes_on = !matches!(frame, Frame::Bye | Frame::Abort);
            match frame {
                Frame::Chunk { number, contents } => {
                    let piece = unpack(number, contents, decompressor)?;
                    let mut state = self.shared.lock();
                    let more = state.arrived(number, piece, self.id, Instant::now());
                    drop(state);
                    if more {
                        self.shared.process.notify_all();
                    }
                    self.shared.links.notify_all();
                }
                Frame::Acknowledged { received, read } => {
                    let mut state = self.shared.lock();
                    state.acknowledged(received, read, self.id);
                    drop(state);
                    self.shared.process.notify_all();
                }
                Frame::Alive => {}
                Frame::Bye | Frame::Abort => {
                    let aborts = frame == Frame::Abort;
                    self.shared.lock().peer_leaves(self.id, aborts);
                    self.shared.wake();
                }
            }
            inbox.consume(length);
            if !goes_on {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes what the state says until the link ends.
    fn write_all(&self) {
        let wait = Wait::forever().unless(&self.cancel);
        let mut bytes = Vec::new();
        let mut compressor = Compressor::new();
        loop {
            let mut state = self.shared.lock();
            let job = loop {
                if !state.has(self.id) {
                    return;
                }
                let now = Instant::now();
                match state.job(self.id, now) {
                    Some(job) => break job,
                    None => {
                        let pause = state.pause(now);
                        state = self.shared.wait(&self.shared.links, state, pause);
                    }
                }
            };
            let over = state.over().is_some();
            drop(state);
            bytes.clear();
            let packed = Instant::now();
            self.frame_of(&job, &mut compressor).write(&mut bytes);
            let aborts = matches!(job, Job::Abort);
            let begun = Instant::now();
            if let Err(error) = self.wire.write(&bytes, &wait) {
                return self.lose(&words(&error));
            }
            if let Job::Chunk(_, piece) = &job {
                let writing = begun.elapsed();
                self.shared.policy.written(bytes.len(), writing);
                let carried = &self.shared.carried;
                carried.chunk(piece.len(), begun - packed, writing);
                self.shared.lock().sent(bytes.len(), Instant::now());
            }
            self.shared.carried.wrote(bytes.len());
            // After an abort the peer closes the link; what it has sent may still be read, unless
            // the session is over.
            if aborts && over {
                return self.lose("the session is over");
            }
        }
    }
}

/// What a chunk holds.
fn unpack(
    number: u64,
    contents: Contents<'_>,
    decompressor: &mut Decompressor,
) -> Result<Piece, Malformed> {
    Ok(match contents {
        Contents::Plain(bytes) => Piece::Bytes(bytes.to_vec()),
        Contents::Zeroes(length) => Piece::Bytes(vec![0; length.min(CHUNK)]),
        Contents::Zstd { length, frame } => {
            Piece::Bytes(decompressor.unpack(number, length, frame)?)
        }
        Contents::End => Piece::End,
    })
}

impl Link {
    /// The frame that carries what a link sends.
    fn frame_of<'a>(&self, job: &'a Job, compressor: &'a mut Compressor) -> Frame<'a> {
        match job {
            Job::Chunk(number, piece) => Frame::Chunk {
                number: *number,
                contents: match &**piece {
                    Piece::Bytes(bytes) => compressor.pack(bytes, &self.shared.policy),
                    Piece::End => Contents::End,
                },
            },
            Job::Acknowledge { received, read } => Frame::Acknowledged {
                received: *received,
                read: *read,
            },
            Job::Alive => Frame::Alive,
            Job::Bye => Frame::Bye,
            Job::Abort => Frame::Abort,
        }
    }
}

/// Why a link has ended, in words.
fn words(error: &ConnectionError) -> String {
    match error {
        ConnectionError::Lost(cause)
        | ConnectionError::NotRead(cause)
        | ConnectionError::Local(cause) => io::Error::to_string(cause),
        other => other.to_string(),
    }
}
