//! `save --onto BASE`: an image that shares the pages which BASE has already, on a file system with
//! reflinks.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Error, Result};
use xsr_format::layout::index::PAGE_DIGEST_BYTES;
use xsr_format::layout::write::digest;
use xsr_format::layout::{LayoutError, Mapped};
use xsr_save_restore::storage::file::FileStorage;
use xsr_save_restore::storage::onto::{BasePages, OntoWriter, Recognise};
use xsr_save_restore::storage::{Opened, Storage as _, StorageCursor, StorageError, StorageReader};

use crate::exit::{self, BadImage, BadUsage};
use crate::output::Output;
use crate::text::shown_path;

/// The image whose pages are shared.
#[derive(Debug)]
pub(super) struct Base {
    reader: Arc<dyn StorageReader>,
    recognise: Recognise,
}

impl Base {
    /// # Errors
    ///
    /// [`BadUsage`]: it is not a mapped image in a file; [`BadImage`]: its index is bad.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let name = shown_path(path);
        Self::opened(path).with_context(|| format!("--onto {name}"))
    }

    fn opened(path: &Path) -> Result<Self> {
        let (storage, name) = FileStorage::at(path)?;
        let Opened::Random(reader) = storage.open(&name)? else {
            return Err(usage("not a file: only files share room"));
        };
        let reader: Arc<dyn StorageReader> = reader.into();
        let index = match Mapped::open(&mut StorageCursor::over(Arc::clone(&reader))) {
            Ok(Some(index)) => index,
            Ok(None) => {
                return Err(usage(
                    "not a mapped image, whose pages have places: make one of it with xsr convert \
                     --layout mapped --page-digests",
                ));
            }
            Err(LayoutError::Io(error)) => return Err(error.into()),
            Err(error) => return Err(Error::new(BadImage(exit::words_of(&error)))),
        };
        let recognise = match index.footer().page_digests {
            Some(at) => Recognise::Digests(pages(&index, &*reader, at)?),
            None => Recognise::Contents,
        };
        Ok(Self { reader, recognise })
    }

    /// A writer to this output that shares the pages of this image.
    ///
    /// # Errors
    ///
    /// [`BadUsage`]: the two cannot share; the output's own error.
    pub(super) fn writer<'w>(&'w mut self, output: &'w Output) -> Result<OntoWriter<'w>> {
        let how = std::mem::replace(&mut self.recognise, Recognise::Contents);
        let writer = OntoWriter::new(output.writer(), &*self.reader, how);
        writer.map_err(|error| match error {
            StorageError::Unsupported { what, .. } => usage(&format!(
                "--onto: {} {what}: put both images on the same XFS or Btrfs, or leave --onto out",
                output.name()
            )),
            other => other.into(),
        })
    }
}

fn usage(why: &str) -> Error {
    Error::new(BadUsage(why.to_owned()))
}

/// What the page digests of an image say about its pages.
fn pages(index: &Mapped, reader: &dyn StorageReader, at: u64) -> Result<BasePages> {
    let bytes = index
        .footer()
        .pages
        .saturating_mul(PAGE_DIGEST_BYTES as u64);
    // The index has been checked: it says no more than the file has.
    let mut digests = vec![0; usize::try_from(bytes)?];
    reader
        .read_exact_at(&mut digests, at)
        .context("reading its page digests")?;
    if digest(&[&digests]) != index.footer().page_digests_digest {
        let why = "its page digests are damaged: xsr verify --deep says what is good of it";
        return Err(Error::new(BadImage(why.to_owned())));
    }
    Ok(BasePages::new(index.entries(), &digests))
}
