//! Preparing one batch of pages for the stream: types, mapping, normalising.
//!
//! C implementation: `xg_sr_save.c:write_batch`.

use xsr_format::frame::{Gfn, PAGE_SIZE, Page, PageEntry, PageType, Pfn};
use xsr_format::write::page_data_head;
use xsr_xen_backend::{Access, Domain, ForeignPages, Gather};

use crate::error::{GuestError, SaveError};
use crate::guest::GuestSave;
use crate::sink::PageSink;

/// A PAGE_DATA record, ready to be written.
pub(super) struct Batch {
    head: Vec<u8>,
    entries: Vec<PageEntry>,
    /// The pages with contents, mapped; `None` if no page has any.
    mapped: Option<ForeignPages>,
    /// Pages that are not sent as they are mapped: index among the mapped ones, ascending.
    special: Vec<(usize, Special)>,
    /// pfns to be sent again once the guest is suspended, and whether each will most likely have a
    /// page then.
    deferred: Vec<(Pfn, bool)>,
    pages: u64,
}

/// How to send a page that is not sent as it is mapped.
enum Special {
    /// Normalised.
    Local(Box<Page>),
    /// Not at all.
    Not,
}

impl Batch {
    /// Looks up, maps and normalises `pfns`, at most 1024 of them.
    ///
    /// While the guest is `running`, these are listed as absent (XTAB) and deferred: a pfn without
    /// a frame, a frame that according to Xen is no longer or not yet this pfn's, a frame that has
    /// disappeared before it is mapped, and a page table that changes while it is read.
    ///
    /// # Errors
    ///
    /// A frame of a suspended guest that cannot be mapped, with its number; a page type that the
    /// format does not know; a page table that cannot be normalised. No page stays mapped.
    pub(super) fn prepare(
        domain: &dyn Domain,
        guest: &dyn GuestSave,
        pfns: &[Pfn],
        running: bool,
    ) -> Result<Self, SaveError> {
        // A pfn without a frame is queried all the same, as Xen does: the answer for "no frame" is
        // XTAB.
        let gfn = |pfn: &Pfn| guest.pfn_to_gfn(*pfn).unwrap_or(Gfn::INVALID);
        let gfns: Vec<Gfn> = pfns.iter().map(gfn).collect();
        let mut types = vec![PageType::XTAB; gfns.len()];
        domain.page_types(&gfns, &mut types)?;

        let mut entries = Vec::with_capacity(pfns.len());
        let mut with_data = Vec::with_capacity(pfns.len());
        let mut deferred = Vec::new();
        for ((&pfn, &gfn), &page_type) in pfns.iter().zip(&gfns).zip(&types) {
            if !page_type.is_known() {
                return Err(GuestError::PageType {
                    pfn,
                    gfn,
                    page_type,
                }
                .into());
            }
            // Most likely looked up in a table that was just moving; or ballooned out, and it may
            // be back before the guest is suspended.
            let page_type = match running && !guest.confirms(pfn, gfn) {
                true => {
                    deferred.push((pfn, page_type.has_data()));
                    PageType::XTAB
                }
                false => page_type,
            };
            if page_type.has_data() {
                with_data.push((entries.len(), gfn));
            }
            entries.push(PageEntry { pfn, page_type });
        }
        let mut batch = Self {
            head: Vec::new(),
            entries: Vec::new(),
            mapped: None,
            special: Vec::new(),
            deferred,
            pages: 0,
        };
        if !with_data.is_empty() {
            batch.map(domain, guest, &mut entries, &with_data, running)?;
        }
        batch.head = page_data_head(&entries)?;
        batch.entries = entries;
        Ok(batch)
    }

    /// Maps those of `entries` that have contents (their indices and frames), and normalises the
    /// pages that need it.
    fn map(
        &mut self,
        domain: &dyn Domain,
        guest: &dyn GuestSave,
        entries: &mut [PageEntry],
        with_data: &[(usize, Gfn)],
        running: bool,
    ) -> Result<(), SaveError> {
        let gfns: Vec<Gfn> = with_data.iter().map(|(_, gfn)| *gfn).collect();
        let pages = domain.map(&gfns, Access::Read)?;
        if !running && let Some(error) = pages.failed().first() {
            return Err((*error).into());
        }
        self.pages = with_data.len() as u64;
        for (at, (index, _)) in with_data.iter().enumerate() {
            let entry = entries[*index];
            let normalised = match pages.page(at) {
                Some(_) if !guest.normalises(entry.page_type) => continue,
                Some(page) => guest.normalise(entry, page).map(Some),
                None => Ok(None),
            };
            let normalised = match normalised {
                // Most likely caught in the middle of a change, which will be complete when the
                // guest is suspended.
                Err(
                    GuestError::Pte { .. }
                    | GuestError::Superpage { .. }
                    | GuestError::TableLevel { .. },
                ) if running => None,
                other => other?,
            };
            let special = match normalised {
                Some(contents) => Special::Local(contents),
                None => {
                    self.pages -= 1;
                    self.deferred.push((entry.pfn, true));
                    entries[*index].page_type = PageType::XTAB;
                    Special::Not
                }
            };
            self.special.push((at, special));
        }
        self.mapped = Some(pages);
        Ok(())
    }

    /// pfns in the batch.
    pub(super) fn pfns(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Their entries in the stream.
    pub(super) fn entries(&self) -> &[PageEntry] {
        &self.entries
    }

    /// Pages in the batch that have contents.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// pfns that must be sent again once the guest is suspended, and whether each will most likely
    /// have a page then.
    pub(super) fn deferred(&self) -> &[(Pfn, bool)] {
        &self.deferred
    }

    /// Copies the contents of all pages that have any into `out`, in the order of the entries.
    pub(super) fn copy_pages(&self, out: &mut Vec<u8>) {
        out.clear();
        let Some(pages) = &self.mapped else {
            return;
        };
        out.reserve(pages.len() * PAGE_SIZE);
        let mut special = self.special.iter().peekable();
        for at in 0..pages.len() {
            match special.next_if(|(special_at, _)| *special_at == at) {
                Some((_, Special::Local(contents))) => out.extend_from_slice(contents.as_slice()),
                Some((_, Special::Not)) => {}
                None => {
                    // All other pages are known to be mapped.
                    if let Some(page) = pages.page(at) {
                        let mut copy = [0; PAGE_SIZE];
                        page.copy_to(&mut copy);
                        out.extend_from_slice(&copy);
                    }
                }
            }
        }
    }

    /// Writes the record: pages that are not normalised straight from the guest.
    pub(super) fn write(&self, sink: &mut dyn PageSink) -> Result<(), SaveError> {
        let mut list = Gather::new();
        list.push(&self.head);
        if let Some(pages) = &self.mapped {
            let mut at = 0;
            for (special_at, special) in &self.special {
                list.push_pages(pages, at..*special_at);
                if let Special::Local(contents) = special {
                    list.push(contents.as_slice());
                }
                at = special_at + 1;
            }
            list.push_pages(pages, at..pages.len());
        }
        Ok(sink.write_gather(&list)?)
    }
}
