//! Exit codes, and which failure gets which. Only this file decides that.

mod remedy;

use std::process::ExitCode;
use std::{fmt, io};

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use nix::errno::Errno;
use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_save_restore::RestoreError;
use xsr_save_restore::migrate::BoxError;

use crate::text::shown;

pub(crate) use self::remedy::{decompressor, described};

/// The exit code of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Code {
    /// 0: fine; for diff: no difference.
    Fine,
    /// 1: the operation failed; for diff: there are differences.
    Failed,
    /// 2: the image is bad.
    BadImage,
    /// 3: after a migration, it is unknown at this end which host has the domain.
    Undecided,
    /// 64: the command line is wrong (`EX_USAGE` of sysexits).
    Usage,
    /// 130: a signal ended the process at once, without any cleanup.
    EndedAtOnce,
    /// That of the command that a tunnel runs.
    OfCommand(u8),
}

impl Code {
    /// The process's exit code.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Fine => 0,
            Self::Failed => 1,
            Self::BadImage => 2,
            Self::Undecided => 3,
            Self::Usage => 64,
            // What a shell shows for a process that SIGINT has ended.
            Self::EndedAtOnce => 128 + 2,
            Self::OfCommand(code) => code,
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code.number())
    }
}

/// A migration that failed. A truncated stream on a connection is not an image that the user could
/// copy again.
#[derive(Debug)]
pub(crate) struct Migration {
    /// What failed, and who has the domain now.
    pub(crate) words: String,
    /// Whether that is unknown at this end.
    pub(crate) undecided: bool,
}

impl fmt::Display for Migration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.words)
    }
}

impl std::error::Error for Migration {}

/// The sender of checkpoints has ended the protection of its domain, and keeps the domain.
#[derive(Debug)]
pub(crate) struct Withdrawn;

impl fmt::Display for Withdrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the sender has ended the protection")
    }
}

impl std::error::Error for Withdrawn {}

/// A domain that should not have remained, and could not be destroyed. The reason why it should not
/// follows in the chain.
#[derive(Debug)]
pub(crate) struct LeftBehind(pub(crate) String);

impl fmt::Display for LeftBehind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An image that is bad although no library error says so: for example, a configuration without
/// guest type.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadImage(pub(crate) String);

impl fmt::Display for BadImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadImage {}

/// A command line that clap accepts but that makes no sense.
#[derive(Debug)]
pub(crate) struct BadUsage(pub(crate) String);

impl fmt::Display for BadUsage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for BadUsage {}

/// An error while writing stdout. It is inside an [`io::Error`], which may surface anywhere.
#[derive(Debug)]
pub(crate) struct Stdout(pub(crate) io::Error);

impl fmt::Display for Stdout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.raw_os_error() {
            Some(errno) if errno == Errno::EBADF as i32 => f.write_str("stdout is closed"),
            _ => write!(f, "stdout: {}", self.0),
        }
    }
}

impl std::error::Error for Stdout {}

/// An error while writing an output: the input is not to blame.
#[derive(Debug)]
pub(crate) struct WriteFailed {
    /// The output's name for the user.
    pub(crate) output: String,
    pub(crate) error: io::Error,
}

impl fmt::Display for WriteFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writing {}: {}", self.output, self.error)
    }
}

impl std::error::Error for WriteFailed {}

/// An output that is complete and has its name, but may not survive a power cut.
#[derive(Debug)]
pub(crate) struct NotDurable {
    /// The output's name for the user.
    pub(crate) output: String,
    pub(crate) error: io::Error,
}

impl fmt::Display for NotDurable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { output, error } = self;
        write!(
            f,
            "{output} is complete, but a power cut might undo that: syncing its directory: {error}"
        )
    }
}

impl std::error::Error for NotDurable {}

/// A failure, with what has become of the guest and of the output file.
#[derive(Debug)]
pub(crate) struct Aftermath {
    error: anyhow::Error,
    /// `web runs on, no file was written`
    after: String,
    /// Whether the user must read it in any case.
    is_about_guest: bool,
}

impl Aftermath {
    /// Add that to a failure.
    pub(crate) fn of(error: anyhow::Error, after: String) -> anyhow::Error {
        match after.is_empty() {
            true => error,
            false => anyhow::Error::new(Self {
                error,
                after,
                is_about_guest: false,
            }),
        }
    }

    /// The same about a guest, which is said even if the reader of the output is gone.
    pub(crate) fn of_guest(error: anyhow::Error, after: String) -> anyhow::Error {
        anyhow::Error::new(Self {
            error,
            after,
            is_about_guest: true,
        })
    }
}

impl fmt::Display for Aftermath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", words(self.error.chain()), self.after)
    }
}

// No source: its text contains all causes.
impl std::error::Error for Aftermath {}

/// The failure alone, without what has become of the guest and of the file.
fn failure(error: &anyhow::Error) -> &anyhow::Error {
    match error.downcast_ref::<Aftermath>() {
        Some(after) => failure(&after.error),
        None => error,
    }
}

/// Whether the failure is that the pipe to which an image was written was closed: its reader
/// (`| head`) has what it wanted, or reports itself why it ended. Then nothing is printed.
pub(crate) fn is_silent(error: &anyhow::Error) -> bool {
    let after = error.downcast_ref::<Aftermath>();
    if after.is_some_and(|after| after.is_about_guest) {
        return false;
    }
    let failed = failure(error).downcast_ref::<WriteFailed>();
    failed.is_some_and(|failed| failed.error.kind() == io::ErrorKind::BrokenPipe)
}

/// The exit code for a failure, depending on what is to blame.
pub(crate) fn code_of(error: &anyhow::Error) -> Code {
    let error = failure(error);
    for cause in error.chain() {
        if cause.is::<BadUsage>() {
            return Code::Usage;
        }
        if let Some(migration) = cause.downcast_ref::<Migration>() {
            return match migration.undecided {
                true => Code::Undecided,
                false => Code::Failed,
            };
        }
        let bad_image = cause.is::<BadImage>()
            || cause
                .downcast_ref::<ReadError>()
                .is_some_and(ReadError::is_bad_image)
            || cause
                .downcast_ref::<RestoreError>()
                .is_some_and(RestoreError::is_bad_image);
        if bad_image {
            return Code::BadImage;
        }
    }
    Code::Failed
}

/// The text of a failure, from the operation down to its cause, with advice. Names and texts from outside are escaped, so that a terminal
/// does not interpret them.
pub(crate) fn words<'e>(
    causes: impl Iterator<Item = &'e (dyn std::error::Error + 'static)>,
) -> String {
    let mut words = String::new();
    for cause in causes {
        let said = match cause.is::<Migration>() {
            // It contains commands to type, each on a line.
            true => cause.to_string(),
            false => shown(&cause.to_string()),
        };
        if !words.is_empty() {
            words.push_str(": ");
        }
        words.push_str(&said);
        words.push_str(&remedy::remedy(cause));
    }
    words
}

/// The same for a library's error.
pub(crate) fn words_of(error: &(dyn std::error::Error + 'static)) -> String {
    words(causes(error))
}

fn causes<'e>(
    error: &'e (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'e (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

/// A failure to hand back to a library, with its causes intact.
pub(crate) fn boxed(error: anyhow::Error) -> BoxError {
    error.reallocate_into_boxed_dyn_error_without_backtrace()
}

/// Advice about a failure, if its text does not have it already.
pub(crate) fn advice(error: &anyhow::Error) -> Option<&'static str> {
    ends_early(error).then_some(
        "the file is truncated: copy it again from where it came, or save the domain again",
    )
}

/// Whether the input was truncated.
pub(crate) fn ends_early(error: &anyhow::Error) -> bool {
    any_ends_early(failure(error).chain())
}

/// The same for a library's error.
pub(crate) fn ends_early_of(error: &(dyn std::error::Error + 'static)) -> bool {
    any_ends_early(causes(error))
}

fn any_ends_early<'e>(
    mut causes: impl Iterator<Item = &'e (dyn std::error::Error + 'static)>,
) -> bool {
    let found = causes.find_map(|cause| {
        cause
            .downcast_ref::<ReadError>()
            .or_else(|| match cause.downcast_ref() {
                Some(RestoreError::Stream(error)) => Some(error),
                _ => None,
            })
    });
    found.is_some_and(|error| matches!(error.cause, ReadErrorCause::Truncated { .. }))
}

/// Words of xl and other tools, and the commands of xsr for them, which are not similar words.
const OTHER_WORDS: [(&str, &str); 6] = [
    ("check", "verify"),
    ("destroy", "mock destroy"),
    ("info", "inspect"),
    ("list", "mock list"),
    ("ls", "mock list"),
    ("show", "inspect"),
];

/// Adds a tip to the error for a command that xsr does not have.
fn suggest(error: &mut clap::Error) {
    if error.kind() != ErrorKind::InvalidSubcommand {
        return;
    }
    let Some(ContextValue::String(word)) = error.get(ContextKind::InvalidSubcommand) else {
        return;
    };
    let known = OTHER_WORDS.iter().find(|(other, _)| other == word);
    if let Some((_, ours)) = known {
        let tip = StyledStr::from(format!("the command for that is 'xsr {ours}'"));
        error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip]));
    }
}

/// Print clap's output (help and version are not failures).
pub(crate) fn command_line(mut error: clap::Error) -> Code {
    suggest(&mut error);
    let code = match error.use_stderr() {
        true => Code::Usage,
        false => Code::Fine,
    };
    match error.print() {
        Ok(()) => code,
        // Help whose reader closes the pipe is not a failure either.
        Err(_) => code,
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_word_of_another_tool_leads_to_the_command() {
        use clap::CommandFactory as _;

        for (word, ours) in OTHER_WORDS {
            let cli = crate::args::Cli::command();
            let mut error = cli
                .clone()
                .try_get_matches_from(["xsr", word])
                .expect_err("there is no such command");
            suggest(&mut error);
            let said = error.to_string();
            assert!(said.contains(&format!("'xsr {ours}'")), "{said}");
            let mut command = &cli;
            for name in ours.split(' ') {
                let found = command.find_subcommand(name);
                command = found.expect("a command of xsr");
            }
        }
    }

    #[test]
    fn a_name_in_a_failure_makes_no_line_of_its_own() {
        let error = anyhow::Error::msg("gone\u{1b}[2J").context("a\nb.save: good");
        assert_eq!(words(error.chain()), r"a\nb.save: good: gone\u{1b}[2J");
    }

    #[test]
    fn who_is_to_blame_decides() {
        let io: anyhow::Result<()> = Err(io::Error::other("gone").into());
        assert_eq!(code_of(&io.context("x").unwrap_err()), Code::Failed);
        let bad = anyhow::Error::new(BadImage("odd".to_owned())).context("restoring");
        assert_eq!(code_of(&bad), Code::BadImage);
        let usage = anyhow::Error::new(BadUsage("no".to_owned())).context("x");
        assert_eq!(code_of(&usage), Code::Usage);
    }

    #[test]
    fn what_became_of_the_file_is_said_last_and_changes_no_code() {
        let bad = anyhow::Error::new(BadImage("odd".to_owned())).context("converting a");
        let error = Aftermath::of(bad, "no file was written".to_owned());
        let error = error.context("outermost");
        assert_eq!(code_of(&error), Code::BadImage);
        assert_eq!(
            words(error.chain()),
            "outermost: converting a: odd; no file was written"
        );
        assert!(!is_silent(&error));
    }

    #[test]
    fn a_pipe_that_is_no_longer_read_needs_no_words() {
        let failed = |kind: io::ErrorKind| {
            let output = "stdout".to_owned();
            let error = kind.into();
            let failed = anyhow::Error::new(WriteFailed { output, error });
            Aftermath::of(failed, "the image there is incomplete".to_owned())
        };
        assert!(is_silent(&failed(io::ErrorKind::BrokenPipe)));
        assert!(!is_silent(&failed(io::ErrorKind::StorageFull)));
    }
}
