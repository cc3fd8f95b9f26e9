//! Results, which go to stdout. Whoever reads them may stop reading (`| head`): that
//! is no failure, and told apart here from a pipe that breaks under an image.

use std::fmt;
use std::io::{self, BufWriter, StdoutLock, Write};

use anyhow::Context as _;
use serde::Serialize;

/// Results on their way to stdout.
#[derive(Debug)]
pub(crate) struct Results {
    out: BufWriter<StdoutLock<'static>>,
}

impl Results {
    /// Take stdout.
    pub(crate) fn new() -> Self {
        Self {
            out: BufWriter::new(io::stdout().lock()),
        }
    }

    /// One JSON document, over several lines.
    pub(crate) fn json(&mut self, document: &impl Serialize) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(document).context("making JSON")?;
        writeln!(self, "{text}")?;
        Ok(())
    }

    /// One JSON document on one line.
    pub(crate) fn json_line(&mut self, document: &impl Serialize) -> anyhow::Result<()> {
        let text = serde_json::to_string(document).context("making JSON")?;
        writeln!(self, "{text}")?;
        Ok(())
    }

    /// Everything has been said.
    pub(crate) fn finish(mut self) -> anyhow::Result<()> {
        self.flush()?;
        Ok(())
    }
}

impl Write for Results {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        self.out.write(octets).map_err(mark_closed)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush().map_err(mark_closed)
    }
}

/// Nobody reads stdout any more.
#[derive(Debug)]
struct Closed;

impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("stdout was closed")
    }
}

impl std::error::Error for Closed {}

fn mark_closed(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe => io::Error::new(io::ErrorKind::BrokenPipe, Closed),
        _ => error,
    }
}

/// Whether all that went wrong is that nobody reads stdout any more.
pub(crate) fn is_closed(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .and_then(io::Error::get_ref)
        .is_some_and(|inner| inner.is::<Closed>())
}
