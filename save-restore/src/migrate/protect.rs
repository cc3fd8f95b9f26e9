//! Sending checkpoints, for Remus and COLO: combines a connection, the messages and the state
//! machine of the protector.
//!
//! The caller brings the domain, as a [`Protected`]; [`ProtectRequest::run`] does the rest. The
//! other end is a [`StandbyRequest`](super::standby::StandbyRequest).
//!
//! C implementation: `tools/xl/xl_migrate.c:main_remus`.

use std::time::Duration;

use super::connection::{Connection, ConnectionReader, ConnectionWriter, TcpConnection, Wait};
use super::drive::{BoxError, Cause, Common, Machine, REST, Talk, Trouble, common_settings, drive};
use super::messages::{LastWords, Message, MessageError, Outcome, Withdrawal};
use super::observe::{Event, Step};
use super::ownership::protect::{
    Here, OnLoss, Protector, ProtectorAction, ProtectorEnd, ProtectorEvent, Why,
};
use crate::progress::Cancel;

/// A domain that is protected, from its toolstack's view.
///
/// [`ownership::protect::Protector`](super::ownership::protect::Protector) decides which of these
/// is called, and when.
pub trait Protected {
    /// Sends the image, and then checkpoint after checkpoint until the last one. Must call
    /// `complete` each time that the last byte of a checkpoint has been written.
    fn protect(&mut self, connection: &dyn Connection, complete: &mut dyn FnMut()) -> Ended;

    /// Pauses the domain, once. Does nothing if it was destroyed.
    ///
    /// # Errors
    ///
    /// The domain is not paused.
    fn pause(&mut self) -> Result<(), BoxError>;

    /// Unpauses the domain that was paused. Does nothing if it was destroyed.
    ///
    /// # Errors
    ///
    /// The domain is still paused, and runs nowhere.
    fn unpause(&mut self) -> Result<(), BoxError>;

    /// Pauses the domain, which runs on the other host, and renames it to the name for a domain
    /// that has moved.
    ///
    /// # Errors
    ///
    /// The domain may run on both hosts.
    fn stop(&mut self) -> Result<(), BoxError>;
}

/// How a protection ended.
#[derive(Debug)]
pub struct Ended {
    /// Why.
    pub why: Why,
    /// Whether the other end has only a part of what was sent, or is gone.
    pub lost: bool,
    /// The state of the domain here now.
    pub here: Here,
    /// The withdrawal that takes the domain back at this place of the stream. `None` if none can:
    /// in the middle of the libxl layer's part of a checkpoint, under COLO.
    pub withdrawal: Option<Withdrawal>,
    /// Bytes from the other end that were not understood as another message.
    pub heard: LastWords,
}

/// How to protect a domain.
#[derive(Debug)]
pub struct ProtectRequest<'a> {
    common: Common<'a>,
    on_loss: OnLoss,
    sending: Option<Wait<'a>>,
}

impl<'a> ProtectRequest<'a> {
    /// How long the other end may take to report what becomes of its copy when the connection is
    /// lost: whatever it has sent by then is in transit already.
    pub const LAST_WORDS: Duration = Duration::from_secs(10);

    /// A request with a minute for each answer.
    pub const fn new(on_loss: OnLoss) -> Self {
        Self {
            common: Common::new(Duration::from_secs(60)),
            on_loss,
            sending: None,
        }
    }

    common_settings! {
        answer: answer_timeout,
        "How long the other end may take for its banner, and to say that it has destroyed its \
         copy: it may have a checkpoint to apply before it hears that.";
        cancel: "The token by which another thread asks to stop while the banner is waited for. \
                 After that [`Protected::protect`] comes to its end."
    }

    /// How long each write of the withdrawal may wait, instead of the answer time-out for all of
    /// it.
    #[must_use]
    pub const fn sending(mut self, wait: Wait<'a>) -> Self {
        self.sending = Some(wait);
        self
    }

    /// Protect the domain, until it is clear where it is.
    pub fn run(
        mut self,
        connection: &mut dyn Connection,
        domain: &mut dyn Protected,
    ) -> Protection {
        let how = How {
            answer: self.common.answer,
            cancel: self.common.cancel,
            sending: self.sending,
        };
        let mut machine = Protector::new(self.on_loss);
        let mut protection = Protecting::default();
        let perform = |machine: &mut Protector, common: &mut Common<'_>, action| {
            if action != ProtectorAction::Protect {
                let performed = protection.perform(how, action, connection, domain);
                return match performed {
                    Ok(event) => (event, None),
                    Err((event, error)) => (event, Some(error)),
                };
            }
            let mut complete = || {
                if !machine.is_complete() {
                    common.observe(Event::Done(Step::Protected));
                }
                machine.on(ProtectorEvent::Complete);
            };
            let ended = domain.protect(&*connection, &mut complete);
            protection.withdrawal = ended.withdrawal;
            protection.heard = ended.heard;
            let event = ProtectorEvent::Ended {
                why: ended.why,
                lost: ended.lost,
                here: ended.here,
            };
            (event, None)
        };
        let (end, causes) = drive(&mut machine, &mut self.common, perform, |_| {});
        Protection {
            end,
            outcome: protection.outcome,
            reason: protection.reason,
            causes,
        }
    }
}

impl Machine for Protector {
    type Action = ProtectorAction;
    type Event = ProtectorEvent;
    type End = ProtectorEnd;

    fn action(&self) -> ProtectorAction {
        self.action()
    }

    fn on(&mut self, event: ProtectorEvent) {
        self.on(event);
    }

    fn end(action: ProtectorAction) -> Option<ProtectorEnd> {
        match action {
            ProtectorAction::End(end) => Some(end),
            _ => None,
        }
    }

    fn announced(action: ProtectorAction) -> Event {
        Event::Protecting(action)
    }

    fn step(action: ProtectorAction, event: ProtectorEvent) -> Option<Step> {
        match (action, event) {
            (ProtectorAction::AwaitBanner, ProtectorEvent::Done) => Some(Step::Banner),
            (ProtectorAction::Withdraw, ProtectorEvent::Done) => Some(Step::Withdrawn),
            _ => None,
        }
    }
}

/// How the two ends are waited for.
#[derive(Clone, Copy)]
struct How<'a> {
    answer: Duration,
    cancel: Option<&'a Cancel>,
    sending: Option<Wait<'a>>,
}

impl How<'_> {
    const fn talk<'c>(&'c self, connection: &'c dyn Connection) -> Talk<'c> {
        Talk {
            connection,
            answer: self.answer,
            cancel: self.cancel,
        }
    }

    /// How long to wait for the last message.
    fn last_words(&self, lost: bool) -> Duration {
        if lost {
            self.answer.min(ProtectRequest::LAST_WORDS)
        } else {
            self.answer
        }
    }
}

/// A protection in progress.
#[derive(Default)]
struct Protecting {
    withdrawal: Option<Withdrawal>,
    heard: LastWords,
    outcome: Option<Outcome>,
    reason: Option<String>,
}

impl Protecting {
    /// Performs an action, and returns the result.
    fn perform(
        &mut self,
        how: How<'_>,
        action: ProtectorAction,
        connection: &mut dyn Connection,
        domain: &mut dyn Protected,
    ) -> Result<ProtectorEvent, (ProtectorEvent, BoxError)> {
        let failed = |error: BoxError| (ProtectorEvent::Failed, error);
        match action {
            ProtectorAction::AwaitBanner => {
                let talk = how.talk(&*connection);
                let heard = talk.hear(Message::Banner, talk.asked());
                heard.map_err(|error| {
                    let trouble = match talk.is_asked() {
                        // Whatever else the other end did meanwhile.
                        true => Trouble::Signal,
                        false => Trouble::of_message(&error),
                    };
                    (trouble.into(), error.into())
                })?;
            }
            ProtectorAction::Withdraw => {
                let why = "the other end is in the middle of a checkpoint";
                let withdrawal = self.withdrawal.ok_or_else(|| failed(why.into()))?;
                // Also until the last message is received. Earlier bytes may still be in the
                // kernel, and the receiver reads nothing while it applies a checkpoint: if the
                // connection is given up then, the receiver takes over.
                how.talk(&*connection).bear(TcpConnection::SILENCE_SENDING);
                let writer = match how.sending {
                    Some(wait) => ConnectionWriter::new(&*connection, wait),
                    None => ConnectionWriter::new(&*connection, Wait::forever()).within(how.answer),
                };
                withdrawal
                    .write(writer)
                    .map_err(|error| failed(error.into()))?;
            }
            ProtectorAction::AwaitLastWords { lost } => {
                return match self.last_words(connection, how.last_words(lost)) {
                    Ok(outcome) => {
                        self.outcome = Some(outcome);
                        Ok(match outcome {
                            Outcome::Runs => ProtectorEvent::RunsThere,
                            Outcome::GivenBack { .. } => ProtectorEvent::GivenBack,
                        })
                    }
                    Err(error) => Err((ProtectorEvent::Nothing, error.into())),
                };
            }
            ProtectorAction::Pause => domain.pause().map_err(failed)?,
            ProtectorAction::Unpause => domain.unpause().map_err(failed)?,
            ProtectorAction::Stop => domain.stop().map_err(failed)?,
            ProtectorAction::Protect | ProtectorAction::End(_) => {}
        }
        Ok(ProtectorEvent::Done)
    }

    /// Sends nothing more, and waits to hear what becomes of the copy.
    fn last_words(
        &mut self,
        connection: &mut dyn Connection,
        patience: Duration,
    ) -> Result<Outcome, MessageError> {
        let expected = Message::Report.name();
        let waiting = |cause| MessageError::Waiting { expected, cause };
        connection
            .finish_writing()
            .map_err(|error| waiting(error.into()))?;
        let reader = ConnectionReader::new(&*connection, Wait::forever()).map_err(waiting)?;
        let mut reader = reader.within(patience);
        let outcome = self.heard.hear_out(&mut reader)?;
        if let Outcome::GivenBack { .. } = outcome {
            // It hangs up after that.
            reader.restart(patience.min(REST));
            self.reason = self.heard.reason(reader);
        }
        Ok(outcome)
    }
}

impl From<Trouble> for ProtectorEvent {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::PeerLost | Trouble::TimedOut => Self::Nothing,
            Trouble::Signal => Self::Signal,
            Trouble::Failed => Self::Failed,
        }
    }
}

/// The outcome of protecting a domain.
#[derive(Debug)]
pub struct Protection {
    /// Which host has the domain.
    pub end: ProtectorEnd,
    /// The other end's report about its copy.
    pub outcome: Option<Outcome>,
    /// Why it has failed, in its words, if it says so.
    pub reason: Option<String>,
    /// Failures in order, except those in [`Protected::protect`].
    pub causes: Vec<Cause<ProtectorAction>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_that_lives_is_given_the_time_to_apply_a_checkpoint() {
        let minute = Duration::from_secs(60);
        let how = |answer| How {
            answer,
            cancel: None,
            sending: None,
        };
        assert_eq!(how(minute).last_words(false), minute);
        assert_eq!(how(minute).last_words(true), ProtectRequest::LAST_WORDS);
        let second = Duration::from_secs(1);
        assert_eq!(how(second).last_words(true), second);
    }
}
