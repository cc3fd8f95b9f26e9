//! Placing one piece of a guest's memory: reads its pages, localises them, and writes them into
//! their frames.
//!
//! C implementation: `xg_sr_restore.c:process_page_data`,
//! `xg_sr_restore_x86_pv.c:x86_pv_localise_page`.

use std::io;

use xsr_format::error::{Position, ReadError, ReadErrorCause};
use xsr_format::frame::{Gfn, PAGE_SIZE, Page, PageEntry};
use xsr_xen_backend::{Access, Domain, ForeignPages};

use crate::error::{GuestError, RestoreError};
use crate::guest::pv::p2m::SharedP2m;
use crate::guest::pv::pagetable;
use crate::source::Extent;

/// Where the contents of a piece are.
#[derive(Debug)]
pub(super) enum Contents {
    /// In memory: they have been read.
    Bytes(Vec<u8>),
    /// In a file, to be read when the piece is placed.
    Extent(Extent),
}

impl Contents {
    /// Copies the page at `index`.
    pub(super) fn page(&self, index: usize) -> io::Result<Box<Page>> {
        let mut page = Box::new([0; PAGE_SIZE]);
        let at = index * PAGE_SIZE;
        match self {
            Self::Bytes(bytes) => page.copy_from_slice(&bytes[at..at + PAGE_SIZE]),
            Self::Extent(extent) => extent.read_exact_at(at, page.as_mut_slice())?,
        }
        Ok(page)
    }
}

/// Pages with contents, in the order of the stream. Their frames are populated, and so are those
/// that page tables among them name.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) entries: Vec<PageEntry>,
    pub(super) gfns: Vec<Gfn>,
    pub(super) contents: Contents,
    /// The record that holds them.
    pub(super) position: Position,
}

impl Piece {
    /// An error of the stream, as the reader would report it.
    fn failed(&self, error: io::Error) -> RestoreError {
        read_failed(self.position, self.gfns.len(), error)
    }
}

/// Reading `pages` pages of the record at `position` failed.
pub(super) fn read_failed(position: Position, pages: usize, error: io::Error) -> RestoreError {
    let cause = match error.kind() {
        io::ErrorKind::UnexpectedEof => ReadErrorCause::Truncated {
            needed: (pages * PAGE_SIZE) as u64,
        },
        _ => ReadErrorCause::Io(error),
    };
    ReadError { position, cause }.into()
}

/// Writes pieces into guest memory. Any number of threads may do so at a time, with pieces that
/// share no page.
#[derive(Clone)]
pub(super) struct Placer<'r> {
    domain: &'r dyn Domain,
    /// For a PV guest, whose page tables name its frames.
    p2m: Option<SharedP2m>,
    /// Pages are written rather than mapped.
    writing: bool,
}

impl<'r> Placer<'r> {
    pub(super) fn new(domain: &'r dyn Domain, p2m: Option<SharedP2m>) -> Self {
        Self {
            domain,
            p2m,
            writing: domain.writing_is_cheaper(),
        }
    }

    /// Whether pages are written rather than mapped.
    pub(super) fn writes(&self) -> bool {
        self.writing
    }

    /// Whether the page's contents differ between machines.
    pub(super) fn localises(&self, entry: &PageEntry) -> bool {
        self.p2m.is_some() && entry.page_type.table_level().is_some()
    }

    /// Localises a page of the stream, if its contents differ between machines.
    pub(super) fn localise(&self, entry: &PageEntry, page: &mut Page) -> Result<(), GuestError> {
        match (&self.p2m, entry.page_type.table_level()) {
            (Some(p2m), Some(level)) => {
                let p2m = p2m.read();
                pagetable::localise(entry.pfn, level, page, |pfn| p2m.mfn(pfn))
            }
            _ => Ok(()),
        }
    }

    /// Reads a piece if necessary (into `buffer`), and writes it into the guest's memory.
    ///
    /// # Errors
    ///
    /// An error of the file; a page table that names a pfn without a frame; an error of the
    /// hypervisor. An unknown part of the piece has been written then.
    pub(super) fn place(
        &self,
        piece: &mut Piece,
        buffer: &mut Vec<u8>,
    ) -> Result<(), RestoreError> {
        match self.writing {
            true => self.write(piece, buffer),
            false => self.map(piece),
        }
    }

    fn write(&self, piece: &mut Piece, buffer: &mut Vec<u8>) -> Result<(), RestoreError> {
        let bytes = match &mut piece.contents {
            Contents::Bytes(bytes) => bytes,
            Contents::Extent(extent) => {
                buffer.resize(piece.gfns.len() * PAGE_SIZE, 0);
                if let Err(error) = extent.read_exact_at(0, buffer) {
                    return Err(piece.failed(error));
                }
                buffer
            }
        };
        let (pages, _) = bytes.as_chunks_mut();
        for (entry, page) in piece.entries.iter().zip(pages) {
            self.localise(entry, page)?;
        }
        let failed = self.domain.write_pages(&piece.gfns, bytes)?;
        match failed.first() {
            Some(error) => Err((*error).into()),
            None => Ok(()),
        }
    }

    fn map(&self, piece: &Piece) -> Result<(), RestoreError> {
        let pages = self.domain.map(&piece.gfns, Access::Write)?.all_mapped()?;
        let mut at = 0;
        while let Some(entry) = piece.entries.get(at) {
            let plain = piece.entries[at..]
                .iter()
                .take_while(|entry| !self.localises(entry));
            match (plain.count(), &piece.contents) {
                (0, contents) => {
                    let mut page = contents.page(at).map_err(|e| piece.failed(e))?;
                    self.localise(entry, &mut page)?;
                    copy(&page, &pages, at);
                    at += 1;
                }
                (run, Contents::Extent(extent)) => {
                    extent
                        .read_pages(&pages, at..at + run)
                        .map_err(|e| piece.failed(e))?;
                    at += run;
                }
                (run, Contents::Bytes(bytes)) => {
                    let (contents, _) = bytes.as_chunks();
                    for (index, contents) in contents.iter().enumerate().skip(at).take(run) {
                        copy(contents, &pages, index);
                    }
                    at += run;
                }
            }
        }
        Ok(())
    }
}

fn copy(contents: &Page, pages: &ForeignPages, index: usize) {
    pages.page(index).expect("mapped").copy_from(contents);
}
