//! The arguments with which libxl starts its save helper: all positional, all
//! numbers.
//!
//! C implementation: `libxl_save_callout.c:run_helper`.

use std::str::FromStr;

use xsr_xen_backend::DomId;

/// The command line that libxl uses.
pub(crate) const USAGE: &str = "\
usage: xsr-save-helper --save-domain IO_FD RECV_FD DOMID FLAGS CBFLAGS STREAM_TYPE
       xsr-save-helper --restore-domain IO_FD SEND_BACK_FD DOMID STORE_PORT STORE_DOMID
                       CONSOLE_PORT CONSOLE_DOMID CBFLAGS STREAM_TYPE
       xsr-save-helper --help | --version
libxl starts it where LIBXL_SAVE_HELPER is set to its path.";

/// The environment, for `--help`.
const ENVIRONMENT: &str = "\
A replacement for Xen's libxl-save-helper, with which xl and libvirt save, restore and migrate
domains by xsr's engine. For example:

  LIBXL_SAVE_HELPER=/usr/bin/xsr-save-helper xl save web web.save

Environment:
  XSR_THREADS       number of threads (default: one per processor)
  XSR_MAX_DOWNTIME  live: suspend the domain once the rest can be sent within this many
                    milliseconds
  XSR_TIMEOUT       live: begin no further pass over its memory after this many seconds
  XSR_ON_TIMEOUT    what to do when XSR_TIMEOUT has passed: stop-copy (default) or cancel
  XSR_LIVE          1: save while the domain runs, which `xl save` does not ask for
  XSR_LAYOUT        of a save to a file by xl: stream (default) or mapped, with an index and digests
                    in the xl header, so that each page is found without reading the rest
  XSR_PAGE_DIGESTS  1: a mapped image also contains the digest of each page";

/// A parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// A save or a restore.
    Of(Args),
    /// Text to print for the user.
    Say(String),
}

/// A job for libxl.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Args {
    /// `--save-domain`
    Save(SaveArgs),
    /// `--restore-domain`
    Restore(RestoreArgs),
}

/// A save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SaveArgs {
    /// The descriptor to write the stream to.
    pub(crate) io_fd: i32,
    /// COLO: the descriptor of the back channel from the secondary; -1 without one.
    pub(crate) recv_fd: i32,
    /// The domain to save.
    pub(crate) domid: DomId,
    /// Whether the guest runs during the save (`XCFLAGS_LIVE`).
    pub(crate) live: bool,
    /// Whether to send everything twice (`XCFLAGS_DEBUG`), in a live save.
    pub(crate) debug: bool,
    /// The callbacks that libxl has.
    pub(crate) callbacks: Callbacks,
    /// The kind of stream.
    pub(crate) stream: StreamType,
}

/// A restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RestoreArgs {
    /// The descriptor to read the stream from.
    pub(crate) io_fd: i32,
    /// COLO: the descriptor of the back channel to the primary; -1 without one.
    pub(crate) send_back_fd: i32,
    /// The domain, created by libxl.
    pub(crate) domid: DomId,
    /// The guest's event channel of the xenstore ring.
    pub(crate) store_port: u32,
    /// The domain at the other end of the xenstore ring.
    pub(crate) store_domid: DomId,
    /// The guest's event channel of the console ring.
    pub(crate) console_port: u32,
    /// The domain at the other end of the console ring.
    pub(crate) console_domid: DomId,
    /// The callbacks that libxl has.
    pub(crate) callbacks: Callbacks,
    /// The kind of stream.
    pub(crate) stream: StreamType,
}

/// The callbacks that libxl has: bit N for message number N.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Callbacks(pub(crate) u32);

impl Callbacks {
    /// Whether libxl wants message `number`.
    pub(crate) fn has(self, number: u16) -> bool {
        1_u32
            .checked_shl(number.into())
            .is_some_and(|bit| self.0 & bit != 0)
    }
}

/// `xc_stream_type_t`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamType {
    /// 0
    Plain,
    /// 1
    Remus,
    /// 2
    Colo,
}

const LIVE: u32 = 1;
const DEBUG: u32 = 2;

impl Args {
    /// A description for the log.
    pub(crate) fn what(&self) -> &'static str {
        match self {
            Self::Save(_) => "save",
            Self::Restore(_) => "restore",
        }
    }

    /// Parse the arguments, without the program's name.
    ///
    /// # Errors
    ///
    /// What is wrong with them, in words.
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Asked, String> {
        let words: Vec<String> = words.collect();
        let Some((mode, numbers)) = words.split_first() else {
            return Err("--save-domain or --restore-domain is missing".to_owned());
        };
        let args = match (mode.as_str(), numbers) {
            ("--help" | "-h", []) => {
                return Ok(Asked::Say(format!("{USAGE}\n\n{ENVIRONMENT}")));
            }
            ("--version" | "-V", []) => {
                let version = env!("CARGO_PKG_VERSION");
                return Ok(Asked::Say(format!("xsr-save-helper {version}")));
            }
            ("--save-domain", [io, recv, domid, flags, callbacks, stream]) => {
                let flags: u32 = number("FLAGS", flags)?;
                Self::Save(SaveArgs {
                    io_fd: number("IO_FD", io)?,
                    recv_fd: number("RECV_FD", recv)?,
                    domid: DomId(number("DOMID", domid)?),
                    live: flags & LIVE != 0,
                    debug: flags & DEBUG != 0,
                    callbacks: Callbacks(number("CBFLAGS", callbacks)?),
                    stream: stream_type(stream)?,
                })
            }
            (
                "--restore-domain",
                [
                    io,
                    back,
                    domid,
                    store,
                    store_domid,
                    console,
                    console_domid,
                    callbacks,
                    stream,
                ],
            ) => Self::Restore(RestoreArgs {
                io_fd: number("IO_FD", io)?,
                send_back_fd: number("SEND_BACK_FD", back)?,
                domid: DomId(number("DOMID", domid)?),
                store_port: number("STORE_PORT", store)?,
                store_domid: DomId(number("STORE_DOMID", store_domid)?),
                console_port: number("CONSOLE_PORT", console)?,
                console_domid: DomId(number("CONSOLE_DOMID", console_domid)?),
                callbacks: Callbacks(number("CBFLAGS", callbacks)?),
                stream: stream_type(stream)?,
            }),
            ("--save-domain" | "--restore-domain", _) => {
                return Err(format!("{} arguments after {mode}", numbers.len()));
            }
            _ => return Err(format!("{mode}: no such mode")),
        };
        Ok(Asked::Of(args))
    }
}

fn number<N: FromStr>(what: &str, word: &str) -> Result<N, String> {
    word.parse()
        .map_err(|_| format!("{what} is {word:?}, expected a number in range"))
}

fn stream_type(word: &str) -> Result<StreamType, String> {
    match word {
        "0" => Ok(StreamType::Plain),
        "1" => Ok(StreamType::Remus),
        "2" => Ok(StreamType::Colo),
        _ => Err(format!(
            "STREAM_TYPE is {word:?}, expected 0 (plain), 1 (Remus) or 2 (COLO)"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Asked, String> {
        Args::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn a_save_is_understood() {
        let expected = SaveArgs {
            io_fd: 7,
            recv_fd: -1,
            domid: DomId(12),
            live: true,
            debug: false,
            callbacks: Callbacks(0x88),
            stream: StreamType::Plain,
        };
        let parsed = parse("--save-domain 7 -1 12 1 136 0");
        assert_eq!(parsed, Ok(Asked::Of(Args::Save(expected))));
    }

    #[test]
    fn a_restore_is_understood() {
        let expected = RestoreArgs {
            io_fd: 8,
            send_back_fd: 9,
            domid: DomId(3),
            store_port: 1,
            store_domid: DomId(0),
            console_port: 2,
            console_domid: DomId(5),
            callbacks: Callbacks(800),
            stream: StreamType::Remus,
        };
        let parsed = parse("--restore-domain 8 9 3 1 0 2 5 800 1");
        assert_eq!(parsed, Ok(Asked::Of(Args::Restore(expected))));
    }

    #[test]
    fn what_libxl_never_says_is_refused() {
        for line in [
            "",
            "--help 7",
            "--version --help",
            "--save-domain",
            "--save-domain 7 -1 12 1 136",
            "--save-domain 7 -1 12 1 136 0 0",
            "--save-domain 7 -1 70000 1 136 0",
            "--save-domain seven -1 12 1 136 0",
            "--save-domain 7 -1 12 1 136 3",
            "--restore-domain 7 -1 12 1 136 0",
        ] {
            assert!(parse(line).is_err(), "{line} was taken");
        }
    }

    #[test]
    fn a_person_gets_an_answer() {
        for (word, text) in [
            ("--help", "XSR_THREADS"),
            ("-h", "usage: xsr-save-helper --save-domain"),
            (
                "--version",
                concat!("xsr-save-helper ", env!("CARGO_PKG_VERSION")),
            ),
            ("-V", "xsr-save-helper"),
        ] {
            let said = parse(word);
            assert!(
                matches!(&said, Ok(Asked::Say(said)) if said.contains(text)),
                "{word}: {said:?}"
            );
        }
    }

    #[test]
    fn callbacks_are_bits() {
        let callbacks = Callbacks(1 << 3 | 1 << 8);
        assert!(callbacks.has(3) && callbacks.has(8));
        assert!(!callbacks.has(0) && !callbacks.has(7) && !callbacks.has(40));
    }
}
