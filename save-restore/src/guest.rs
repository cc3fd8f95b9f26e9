//! What differs by guest type: PV on one side, HVM and PVH on the other.

pub(crate) mod hvm;
pub(crate) mod older_policy;
pub(crate) mod pv;
pub(crate) mod refused;
pub(crate) mod x86;

use xsr_format::frame::{Gfn, Page, PageEntry, PageType, Pfn};
use xsr_format::image::GuestType;
use xsr_format::write::RecordWriter;
use xsr_xen_backend::ForeignPage;

use crate::error::{GuestError, SaveError};
use crate::sink::PageSink;

/// Where the records of a save go.
pub(crate) type Out<'s> = RecordWriter<&'s mut dyn PageSink>;

/// Asked again and again in work that goes over a guest's tables: an error ends it.
pub(crate) type GoOn<'g> = dyn FnMut() -> Result<(), SaveError> + 'g;

/// The guest's side of a save (C: `struct xc_sr_save_ops`).
pub(crate) trait GuestSave: Sync {
    /// What the domain header says.
    fn guest_type(&self) -> GuestType;

    /// The last pfn there may be.
    fn max_pfn(&self) -> Pfn;

    /// The frame of a pfn; `None` where there is none.
    fn pfn_to_gfn(&self, pfn: Pfn) -> Option<Gfn>;

    /// Whether the machine agrees that `gfn` is the frame of `pfn`. A guest that runs may
    /// be moving the tables in which that was looked up.
    fn confirms(&self, pfn: Pfn, gfn: Gfn) -> bool;

    /// Whether the contents of pages of this type are not the same on every machine.
    fn normalises(&self, page_type: PageType) -> bool;

    /// Turn the contents of such a page into what they are on any machine.
    fn normalise(&self, entry: PageEntry, page: ForeignPage<'_>) -> Result<Box<Page>, GuestError>;

    /// Records that never change, before STATIC_DATA_END.
    fn static_data(&self, out: &mut Out<'_>) -> Result<(), SaveError>;

    /// Records between STATIC_DATA_END and memory.
    fn start_of_stream(&self, out: &mut Out<'_>) -> Result<(), SaveError>;

    /// Look whether the guest has moved what says where its memory is, and follow it;
    /// asked after each pass, and again when the guest is suspended. `true`: what
    /// [`GuestSave::start_of_stream`] writes has changed and must be written again, and
    /// [`GuestSave::max_pfn`] may be larger. While the guest is `running`, one that is
    /// caught in the midst of it is let go on: it will have settled at the next look. `go_on` is
    /// asked after each batch of what is looked at.
    ///
    /// # Errors
    ///
    /// It cannot be followed: it has fewer leaves of p2m than before, which a stream has
    /// no way to say; or it has suspended in the midst of changing them.
    fn check_vm_state(&mut self, running: bool, go_on: &mut GoOn<'_>) -> Result<bool, SaveError>;

    /// Records after memory, of a guest that has suspended.
    fn end_of_checkpoint(&self, out: &mut Out<'_>) -> Result<(), SaveError>;
}
