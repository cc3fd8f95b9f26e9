//! Results, which go to stdout. Whoever reads them may stop reading (`| head`): that
//! is no failure, and changes neither what is done nor the exit code. What is left to
//! say is not said.

use std::io::{self, BufWriter, StdoutLock, Write};

use anyhow::Context as _;
use serde::Serialize;

/// Results on their way to stdout.
#[derive(Debug)]
pub(crate) struct Results {
    out: BufWriter<Reader>,
}

/// Stdout, for as long as somebody reads it.
#[derive(Debug)]
struct Reader {
    out: StdoutLock<'static>,
    gone: bool,
}

impl Reader {
    /// The result, but that nobody reads any more.
    fn unless_gone<T>(&mut self, result: io::Result<T>, instead: T) -> io::Result<T> {
        match result {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(instead)
            }
            result => result,
        }
    }
}

impl Write for Reader {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        if self.gone {
            return Ok(octets.len());
        }
        let result = self.out.write(octets);
        self.unless_gone(result, octets.len())
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
    /// Take stdout.
    pub(crate) fn new() -> Self {
        Self {
            out: BufWriter::new(Reader {
                out: io::stdout().lock(),
                gone: false,
            }),
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
        self.out.write(octets)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
