//! What is kept of an image of xapi that is to become one again: the records that have no place in a
//! libxl stream.

use std::fs::File;
use std::io::{self, Seek as _, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use xsr_format::wrapper::xapi::{XapiKind, XapiRecord};

/// The type of a record, and the length of its body in bytes.
type KindAndLength = (XapiKind, u64);

/// The records. Complete once the image has been read to its end.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kept(Arc<Mutex<Parts>>);

#[derive(Debug, Default)]
struct Parts {
    /// The body of the Xenops record.
    description: Option<Vec<u8>>,
    records: Vec<(XapiKind, u64)>,
    /// Their bodies, in an unnamed file, because they may be long.
    spool: Option<File>,
}

impl Kept {
    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_description(&self, body: &[u8]) {
        self.parts().description = Some(body.to_vec());
    }

    /// Called for each record, in their order, whose body is written to this.
    pub(super) fn add(&self, record: &XapiRecord) {
        self.parts().records.push((record.kind, record.length));
    }

    /// The body of the Xenops record, if there is one at the start of the image.
    pub(crate) fn description(&self) -> Option<Vec<u8>> {
        self.parts().description.clone()
    }

    /// The types and lengths of the other records, and a reader of their bodies.
    ///
    /// # Errors
    ///
    /// The temporary file could not be used.
    pub(crate) fn records(&self) -> io::Result<(Vec<KindAndLength>, Box<dyn io::Read>)> {
        let parts = self.parts();
        let bodies: Box<dyn io::Read> = match &parts.spool {
            Some(spool) => {
                let mut spool = spool.try_clone()?;
                spool.rewind()?;
                Box::new(spool)
            }
            None => Box::new(io::empty()),
        };
        Ok((parts.records.clone(), bodies))
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut parts = self.parts();
        let named = |error: io::Error| {
            let place = std::env::temp_dir();
            let words = format!(
                "writing a temporary file in {} for records of the image (TMPDIR names another \
                 directory): {error}",
                place.display()
            );
            io::Error::new(error.kind(), words)
        };
        if parts.spool.is_none() {
            parts.spool = Some(tempfile::tempfile().map_err(named)?);
        }
        match &mut parts.spool {
            Some(spool) => spool.write(bytes).map_err(named),
            None => Ok(0),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
