//! One batch of pages on its way into the stream: types, mapping, normalising.
//!
//! C implementation: `xg_sr_save.c:write_batch`.

use xsr_format::frame::{Gfn, Page, PageEntry, PageType, Pfn};
use xsr_format::write::page_data_head;
use xsr_xen_backend::{Access, Domain, ForeignPages, Gather};

use crate::error::{GuestError, SaveError};
use crate::guest::{GuestSave, Normalised};
use crate::sink::PageSink;

/// A PAGE_DATA record, ready to be written.
pub(super) struct Batch {
    head: Vec<u8>,
    pfns: u64,
    /// The pages that have data, mapped; `None` where no page has.
    mapped: Option<ForeignPages>,
    /// Pages that are sent in another form than they are mapped: index among the
    /// mapped ones, ascending.
    local: Vec<(usize, Box<Page>)>,
}

impl Batch {
    /// Look up, map and normalise `pfns`, at most 1024 of them.
    ///
    /// # Errors
    ///
    /// A frame that cannot be mapped, named; a page type the format does not know; a
    /// page table that cannot be normalised. Nothing stays mapped.
    pub(super) fn prepare(
        domain: &dyn Domain,
        guest: &dyn GuestSave,
        pfns: impl Iterator<Item = Pfn>,
    ) -> Result<Self, SaveError> {
        let pfns: Vec<Pfn> = pfns.collect();
        // A pfn without a frame is asked about all the same, as Xen does: the answer
        // for "no frame" is XTAB.
        let gfns: Vec<Gfn> = pfns
            .iter()
            .map(|pfn| guest.pfn_to_gfn(*pfn).unwrap_or(Gfn::INVALID))
            .collect();
        let mut types = vec![PageType::XTAB; gfns.len()];
        domain.page_types(&gfns, &mut types)?;

        let mut entries = Vec::with_capacity(pfns.len());
        let mut with_data = Vec::with_capacity(pfns.len());
        for ((&pfn, &gfn), &page_type) in pfns.iter().zip(&gfns).zip(&types) {
            if !page_type.is_known() {
                return Err(GuestError::PageType {
                    pfn,
                    gfn,
                    page_type,
                }
                .into());
            }
            entries.push(PageEntry { pfn, page_type });
            if page_type.has_data() {
                with_data.push(gfn);
            }
        }
        let mapped = match with_data.is_empty() {
            true => None,
            false => Some(domain.map(&with_data, Access::Read)?.all_mapped()?),
        };
        let local = match &mapped {
            Some(pages) => normalise(guest, &entries, pages)?,
            None => Vec::new(),
        };
        Ok(Self {
            head: page_data_head(&entries)?,
            pfns: entries.len() as u64,
            mapped,
            local,
        })
    }

    /// pfns in the batch.
    pub(super) fn pfns(&self) -> u64 {
        self.pfns
    }

    /// Pages in the batch that have data.
    pub(super) fn pages(&self) -> u64 {
        self.mapped.as_ref().map_or(0, |pages| pages.len() as u64)
    }

    /// Write the record: pages that need no other form straight from the guest.
    pub(super) fn write(&self, sink: &mut dyn PageSink) -> Result<(), SaveError> {
        let mut list = Gather::new();
        list.push(&self.head);
        if let Some(pages) = &self.mapped {
            let mut local = self.local.iter().peekable();
            for (index, page) in pages.iter() {
                match local.next_if(|(at, _)| *at == index) {
                    Some((_, contents)) => list.push(contents.as_slice()),
                    None => list.push_page(page),
                }
            }
        }
        Ok(sink.write_gather(&list)?)
    }
}

fn normalise(
    guest: &dyn GuestSave,
    entries: &[PageEntry],
    pages: &ForeignPages,
) -> Result<Vec<(usize, Box<Page>)>, SaveError> {
    let mut local = Vec::new();
    let with_data = entries.iter().filter(|entry| entry.page_type.has_data());
    for (entry, (index, page)) in with_data.zip(pages.iter()) {
        if let Normalised::Local(contents) = guest.normalise(*entry, page)? {
            local.push((index, contents));
        }
    }
    Ok(local)
}
