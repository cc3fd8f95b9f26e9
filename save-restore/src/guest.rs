//! Guest types: what differs between PV on one side and HVM and PVH on the other.

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

/// Called repeatedly in work over a guest's tables; an error ends the work.
pub(crate) type GoOn<'g> = dyn FnMut() -> Result<(), SaveError> + 'g;

/// The guest's side of a save (C: `struct xc_sr_save_ops`).
pub(crate) trait GuestSave: Sync {
    /// The type for the domain header.
    fn guest_type(&self) -> GuestType;

    /// The last possible pfn.
    fn max_pfn(&self) -> Pfn;

    /// The frame of a pfn, if it has one.
    fn pfn_to_gfn(&self, pfn: Pfn) -> Option<Gfn>;

    /// Whether Xen agrees that `gfn` is the frame of `pfn`. A running guest may be moving the
    /// tables in which this was looked up.
    fn confirms(&self, pfn: Pfn, gfn: Gfn) -> bool;

    /// Whether the contents of pages of this type differ between machines.
    fn normalises(&self, page_type: PageType) -> bool;

    /// Normalises the contents of such a page.
    fn normalise(&self, entry: PageEntry, page: ForeignPage<'_>) -> Result<Box<Page>, GuestError>;

    /// Records that never change, before STATIC_DATA_END.
    fn static_data(&self, out: &mut Out<'_>) -> Result<(), SaveError>;

    /// Records between STATIC_DATA_END and memory.
    fn start_of_stream(&self, out: &mut Out<'_>) -> Result<(), SaveError>;

    /// Checks whether the guest has moved the tables that describe its memory, and follows the
    /// move. Called after each pass, and again when the guest is suspended. `true`: what
    /// [`GuestSave::start_of_stream`] writes has changed and must be written again, and
    /// [`GuestSave::max_pfn`] may be larger. If the guest is `running` and is caught in the middle
    /// of a move, it may finish: the next check sees the result. `go_on` is called after each batch
    /// of work.
    ///
    /// # Errors
    ///
    /// The move cannot be followed: the p2m has fewer leaves than before, which a stream cannot
    /// express, or the guest has suspended in the middle of the move.
    fn check_vm_state(&mut self, running: bool, go_on: &mut GoOn<'_>) -> Result<bool, SaveError>;

    /// Records after memory, of a guest that has suspended.
    fn end_of_checkpoint(&self, out: &mut Out<'_>) -> Result<(), SaveError>;
}
