//! Results on stdout, as text or JSON. A reader that closes the pipe (`| head`) is not a failure,
//! and changes neither the work nor the exit code: the rest is not written.
//!
//! No control characters leave this file: text is escaped as it is written (except its line ends),
//! and JSON has such characters as `\u` sequences, so that it stays complete. Where the locale has
//! no UTF-8, the same holds for all characters beyond ASCII.

use std::io::{self, BufWriter, IsTerminal as _, StdoutLock, Write};

use nix::errno::Errno;
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter, Serializer};

use crate::exit::{self, Stdout};
use crate::terminal::{self, Terminal};
use crate::text::{ascii_only, escaped, for_locale, is_unfit};

/// A JSON document with the version of its fields (docs/json.md). Every document that a command
/// writes, on stdout or on the descriptor of `--progress-fd`, is an object that begins with it.
#[derive(Debug, Serialize)]
pub(crate) struct Versioned<'a, T> {
    version: u32,
    #[serde(flatten)]
    document: &'a T,
}

/// The version of the fields that docs/json.md describes.
pub(crate) const CURRENT: u32 = 2;

impl<'a, T: Serialize> Versioned<'a, T> {
    /// The document, which must be a struct or a map.
    pub(crate) fn new(document: &'a T) -> Self {
        Self {
            version: CURRENT,
            document,
        }
    }
}

/// Results on their way to stdout.
#[derive(Debug)]
pub(crate) struct Results {
    out: BufWriter<Reader>,
}

/// Stdout, until its reader closes the pipe.
#[derive(Debug)]
struct Reader {
    out: StdoutLock<'static>,
    gone: bool,
}

impl Reader {
    /// The result, unless it is that the reader has closed the pipe.
    fn unless_gone<T>(&mut self, result: io::Result<T>, instead: T) -> io::Result<T> {
        match result {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(instead)
            }
            // Names stdout, because the error may surface far from here.
            Err(e) => Err(io::Error::new(e.kind(), Stdout(e))),
            Ok(value) => Ok(value),
        }
    }
}

impl Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.gone {
            return Ok(bytes.len());
        }
        if xsr_stdio::stdout_was_closed() {
            // The descriptor is now Rust's runtime's /dev/null.
            return self.unless_gone(Err(Errno::EBADF.into()), bytes.len());
        }
        let result = self.out.write(bytes);
        self.unless_gone(result, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.gone {
            return Ok(());
        }
        let result = self.out.flush();
        self.unless_gone(result, ())
    }
}

impl Results {
    /// Lock stdout.
    pub(crate) fn new() -> Self {
        Self {
            out: BufWriter::with_capacity(
                1 << 16,
                Reader {
                    out: io::stdout().lock(),
                    gone: false,
                },
            ),
        }
    }

    /// One JSON document, over several lines.
    pub(crate) fn json(&mut self, document: &impl Serialize) -> anyhow::Result<()> {
        self.document(document, Escaping::new(PrettyFormatter::new()))
    }

    /// One JSON document on one line.
    pub(crate) fn json_line(&mut self, document: &impl Serialize) -> anyhow::Result<()> {
        self.document(document, Escaping::new(CompactFormatter))
    }

    /// Written as it is serialised, because a document may be as large as an image allows.
    fn document(
        &mut self,
        document: &impl Serialize,
        formatter: impl Formatter,
    ) -> anyhow::Result<()> {
        let mut serializer = Serializer::with_formatter(&mut self.out, formatter);
        Versioned::new(document)
            .serialize(&mut serializer)
            // An error of stdout is returned as such, not as one of JSON.
            .map_err(io::Error::from)?;
        self.out.write_all(b"\n")?;
        Ok(())
    }

    /// The columns that a line should have at most: those of the terminal, or 80.
    pub(crate) fn width(&self) -> usize {
        let out = &self.out.get_ref().out;
        match terminal::columns(out) {
            Some(columns) if out.is_terminal() => columns,
            _ => 80,
        }
    }

    /// Flush everything.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.flush()?;
        Ok(())
    }
}

/// Text. Each call has whole characters, as from `write!`.
impl Write for Results {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let plain = |byte: &u8| matches!(byte, b' '..=b'~' | b'\n');
        if bytes.iter().all(plain) {
            return self.out.write_all(bytes);
        }
        let text = String::from_utf8_lossy(bytes);
        let text = escaped(&text, |c| c != '\n' && is_unfit(c));
        self.out.write_all(for_locale(&text).as_bytes())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Report finished work whose result is not the report itself. The work may have changed a domain
/// or a host, so an unwritable stdout does not make it fail: that is reported on stderr, with
/// `done`.
pub(crate) fn report(terminal: &Terminal, done: &str, document: &impl Serialize) {
    let mut out = Results::new();
    if let Err(error) = out.json(document).and_then(|()| out.finish()) {
        unreported(terminal, done, &error);
    }
}

/// The `--json` document of a failed command that has no document of its own (docs/json.md).
#[derive(Debug, Serialize)]
struct Failure {
    error: String,
    exit_code: u8,
}

/// Print the document of a failure. A wrong command line gets none.
pub(crate) fn failure(error: &anyhow::Error) {
    let code = exit::code_of(error);
    if code == exit::Code::Usage {
        return;
    }
    let mut out = Results::new();
    let document = Failure {
        error: exit::words(error.chain()),
        exit_code: code.number(),
    };
    if let Err(error) = out.json(&document).and_then(|()| out.finish()) {
        tracing::debug!("{error}");
    }
}

/// The work is done, but its report could not be written.
pub(crate) fn unreported(terminal: &Terminal, done: &str, error: &anyhow::Error) {
    let why = exit::words(error.chain());
    terminal.always(&format!(
        "xsr: {done}; the report could not be written: {why}"
    ));
}

/// A formatter whose strings have no control characters.
struct Escaping<F> {
    formatter: F,
    /// Whether the document has to be ASCII.
    ascii: bool,
}

impl<F> Escaping<F> {
    fn new(formatter: F) -> Self {
        Self {
            formatter,
            ascii: ascii_only(),
        }
    }
}

/// Forwards the methods that the two formatters implement themselves.
macro_rules! pass_on {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        $(fn $name<W: ?Sized + Write>(&mut self, out: &mut W $(, $argument: $kind)*) -> io::Result<()> {
            self.formatter.$name(out $(, $argument)*)
        })*
    };
}

impl<F: Formatter> Formatter for Escaping<F> {
    pass_on! {
        begin_array();
        end_array();
        begin_array_value(first: bool);
        end_array_value();
        begin_object();
        end_object();
        begin_object_key(first: bool);
        end_object_key();
        begin_object_value();
        end_object_value();
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        out: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        let escapes = |c: char| is_unfit(c) || (self.ascii && !c.is_ascii());
        let mut rest = fragment;
        while let Some((at, c)) = rest.char_indices().find(|(_, c)| escapes(*c)) {
            let (head, tail) = rest.split_at(at);
            out.write_all(head.as_bytes())?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
            rest = &tail[c.len_utf8()..];
        }
        out.write_all(rest.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_complete_and_fit_for_a_terminal() {
        let name = "a\u{1b}\n\u{7f}\u{9b}\u{202e}é😀\"\\";
        let document = serde_json::json!({ name: [name, 1, {}], "empty": [] });
        for (pretty, ascii) in [(true, false), (false, false), (true, true), (false, true)] {
            let mut out = Vec::new();
            let written = match pretty {
                true => document.serialize(&mut Serializer::with_formatter(
                    &mut out,
                    Escaping {
                        formatter: PrettyFormatter::new(),
                        ascii,
                    },
                )),
                false => document.serialize(&mut Serializer::with_formatter(
                    &mut out,
                    Escaping {
                        formatter: CompactFormatter,
                        ascii,
                    },
                )),
            };
            written.unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(!text.chars().any(|c| c != '\n' && is_unfit(c)), "{text:?}");
            let beyond = match ascii {
                true => r"\u00e9\ud83d\ude00",
                false => "é😀",
            };
            let escaped = format!(r"\u001b\n\u007f\u009b\u202e{beyond}");
            assert!(text.contains(&escaped), "{text}");
            assert!(!ascii || text.is_ascii(), "{text}");
            let plain = match pretty {
                true => serde_json::to_string_pretty(&document).unwrap(),
                false => document.to_string(),
            };
            assert_eq!(text.lines().count(), plain.lines().count());
            let back: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert_eq!(back, document);
        }
    }
}
