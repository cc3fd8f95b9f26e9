//! Errors of a save or a restore, grouped by their cause.

use std::io;

use thiserror::Error;
use xsr_format::byte_order::ByteOrder;
use xsr_format::error::{ReadError, ReadErrorCause, WriteError};
use xsr_format::frame::{Gfn, Mfn, PageType, Pfn};
use xsr_format::image::GuestType;
use xsr_format::record::RecordKind;
use xsr_xen_backend::{BackendError, GuestKind, MapError, ShutdownReason};

use crate::back_channel::BackChannelError;
use crate::guest::refused::PolicyRefused;
use crate::progress::Cancelled;
use crate::restore::CpuMissing;
use crate::text::chain;
use crate::toolstack::ToolstackError;

/// Why a domain that has `tot` pages of the `max` that it may have gets no more.
fn lack(tot: u64, max: u64) -> String {
    match tot < max {
        true => format!(
            "which has {tot} pages of the {max} that it may have: the host has no memory left, or \
             gives no guest a page at that pfn, and then the image is damaged"
        ),
        false => format!("which has all {max} pages that it may have: give the domain more"),
    }
}

/// An impossible state of a guest, found on a save or on a restore.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GuestError {
    /// The domain shut down for another reason than the save.
    #[error("the domain has not suspended (it shows {state}); is its suspend support working?")]
    NotSuspended {
        /// Its state instead.
        state: String,
    },
    /// The domain is suspended although the toolstack has resumed it after a checkpoint.
    #[error(
        "the domain is still suspended after a checkpoint, although the toolstack says that it runs"
    )]
    StillSuspended,
    /// The domain runs, although it had suspended for this save.
    #[error(
        "the domain was resumed while it was being saved, by another program: what was written is of no use; save it again"
    )]
    ResumedMeanwhile,
    /// The domain was suspended before the save asked it to suspend.
    #[error(
        "the domain is suspended already: by another save or migration of it that is under way, or by one that was killed; after the latter resume it first"
    )]
    AlreadySuspended,
    /// The guest has ended by itself. It is left as it is.
    #[error("the guest has shut down ({reason}) and cannot be saved any more")]
    ShutDown {
        /// The reason, other than a suspend.
        reason: ShutdownReason,
    },
    /// The domain was destroyed by another command.
    #[error("the domain has been destroyed while it was being saved")]
    Destroyed,
    /// A PV guest's word is neither 4 nor 8 bytes.
    #[error("the guest's width is {width} bytes, expected 4 or 8")]
    Width {
        /// Xen's answer.
        width: u8,
    },
    /// A PV guest has not announced where its p2m is, or has announced nonsense.
    #[error("the guest's p2m cannot be followed: {what} is {value:#x}")]
    P2m {
        /// The field or table that is wrong.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// A PV guest suspended while it was changing its p2m.
    #[error(
        "the guest suspended in the midst of changing what maps its p2m (generation {generation} is odd); it runs on, try again"
    )]
    P2mUnsettled {
        /// `p2m_generation`: odd while the guest changes something.
        generation: u64,
    },
    /// A PV guest gave a part of its p2m back while it was being saved.
    #[error(
        "the guest's p2m shrank while it was being saved: it ended at pfn {before} and now ends at {now}, which a stream that has begun cannot say; the guest runs on, save it again"
    )]
    P2mShrank {
        /// The last pfn before.
        before: Pfn,
        /// The last pfn now.
        now: Pfn,
    },
    /// A PV guest's p2m grew while it was being saved into the mapped layout.
    #[error(
        "the guest's p2m grew while it was being saved, and the image has no room for that before its first page; the guest runs on, save it again"
    )]
    P2mOutgrewLayout,
    /// More pages than the index of a mapped image can count.
    #[error("the guest has more pages than the mapped layout can index")]
    TooLargeForLayout,
    /// Xen reports a page type that the format cannot express.
    #[error("pfn {pfn} (frame {gfn}) has page type {:#x}, which the format does not know", page_type.nibble())]
    PageType {
        /// The page.
        pfn: Pfn,
        /// Its frame.
        gfn: Gfn,
        /// The type that Xen reports.
        page_type: PageType,
    },
    /// A page-table entry to a frame that is not the guest's.
    #[error(
        "page table at pfn {pfn}: level-{level} entry {index} ({pte:#018x}) points to frame {frame:#x}, which is not in the guest's p2m"
    )]
    Pte {
        /// The page table.
        pfn: Pfn,
        /// Its level, 1–4.
        level: u8,
        /// The entry, 0–511.
        index: usize,
        /// The entry's value.
        pte: u64,
        /// The frame it names (an mfn on save, a pfn on restore).
        frame: u64,
    },
    /// A page table with a superpage; PV guests with superpages cannot be migrated.
    #[error(
        "page table at pfn {pfn}: level-{level} entry {index} ({pte:#018x}) maps a superpage; a PV guest with superpages cannot be saved"
    )]
    Superpage {
        /// The page table.
        pfn: Pfn,
        /// Its level, 2–4.
        level: u8,
        /// The entry, 0–511.
        index: usize,
        /// The entry's value.
        pte: u64,
    },
    /// A level-4 table in a guest that has three levels.
    #[error("page table at pfn {pfn}: level {level} in a guest that has {levels} levels")]
    TableLevel {
        /// The page table.
        pfn: Pfn,
        /// Its level.
        level: u8,
        /// How many levels the guest has.
        levels: u8,
    },
    /// A page table of the image that no hypervisor accepts.
    #[error(
        "vcpu {vcpu}: level-{level} entry {index} of the page table at pfn {pfn} refers to {target}"
    )]
    Table {
        /// The vcpu whose tables these are.
        vcpu: u32,
        /// The page table.
        pfn: Pfn,
        /// Its level, 1–4.
        level: u8,
        /// The entry, 0–511.
        index: usize,
        /// What the entry refers to, and what is wrong with that.
        target: String,
    },
    /// One leaf of the p2m covers several ranges of pfns, and these contain pages.
    #[error(
        "X86_PV_P2M_FRAMES names pfn {leaf} for entry {entry} and for an earlier one, and the guest has pages in that range: a leaf with pages can stand in one place only"
    )]
    SharedLeaf {
        /// The leaf.
        leaf: Pfn,
        /// The entry of the record.
        entry: usize,
    },
    /// A field names a frame that cannot be what the field uses it for.
    #[error("{field} names frame {frame:#x}: {why}")]
    Frame {
        /// The field.
        field: String,
        /// Its value (an mfn on save, a pfn on restore).
        frame: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// More GDT entries than a PV guest can have.
    #[error("vcpu {vcpu}: {entries} GDT entries, at most 7168 are possible")]
    GdtEntries {
        /// The vcpu.
        vcpu: u32,
        /// Its number of entries.
        entries: u64,
    },
    /// Xen returned a blob of a length that does not fit the guest.
    #[error("vcpu {vcpu}: its context has {got} bytes, expected {expected}")]
    VcpuContext {
        /// The vcpu.
        vcpu: u32,
        /// The length for the guest's word width.
        expected: usize,
        /// The length that Xen returned.
        got: usize,
    },
    /// A parameter that no HVM guest has.
    #[error("HVM_PARAMS: there is no parameter {index:#x}")]
    HvmParam {
        /// Its index.
        index: u64,
    },
    /// More pfns than the format can name.
    #[error("the guest has pfns up to {max_pfn}, more than a stream can name")]
    TooLarge {
        /// The last one.
        max_pfn: Pfn,
    },
}

/// A failed save. The domain continues to run
/// (see [`SaveRequest::write_stream`](crate::SaveRequest::write_stream)).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SaveError {
    /// The stream could not be written.
    #[error("writing the stream failed")]
    Stream(#[source] WriteError),
    /// The hypervisor refused a call.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A frame could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A callback failed.
    #[error(transparent)]
    Toolstack(ToolstackError),
    /// The guest's state cannot be saved.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The precopy policy gave up.
    #[error(
        "the guest writes faster than it can be sent: the precopy policy gave up after {iterations} passes"
    )]
    PolicyAborted {
        /// Passes that were sent.
        iterations: u32,
    },
    /// The secondary's list of pages is invalid or could not be read (COLO).
    #[error(transparent)]
    BackChannel(BackChannelError),
    /// COLO needs a translated guest.
    #[error("a PV guest cannot run under COLO: it is for HVM guests")]
    ColoGuest,
    /// The toolstack ended COLO in the middle of a checkpoint.
    #[error("COLO was ended in the midst of a checkpoint")]
    ColoEnded,
    /// The save was cancelled.
    #[error("the save was aborted")]
    Aborted,
    /// The save failed, and then the guest could not be resumed either.
    #[error(
        "{}; and the domain could not be resumed: {}. {}",
        chain(&**cause),
        chain(resume),
        if *known { "It is still suspended: resume it by hand" }
        else { "Whether it is suspended could not be found out: look at it, and resume it by hand" }
    )]
    NotResumed {
        /// Why the save failed.
        cause: Box<SaveError>,
        /// Why the resume failed.
        resume: ToolstackError,
        /// Whether the hypervisor reports the domain as suspended. False: it does not answer.
        known: bool,
    },
}

impl From<WriteError> for SaveError {
    /// A cancelled sink is not a failed sink.
    fn from(error: WriteError) -> Self {
        match &error {
            WriteError::Io(io) if Cancelled::is(io) => Self::Aborted,
            _ => Self::Stream(error),
        }
    }
}

impl From<BackChannelError> for SaveError {
    /// Cancelled as a sink is.
    fn from(error: BackChannelError) -> Self {
        match &error {
            BackChannelError::Io(io) if Cancelled::is(io) => Self::Aborted,
            _ => Self::BackChannel(error),
        }
    }
}

impl From<ToolstackError> for SaveError {
    /// A callback that waits for the other end is cancelled as a sink is.
    fn from(error: ToolstackError) -> Self {
        match error.cause.downcast_ref::<io::Error>() {
            Some(cause) if Cancelled::is(cause) => Self::Aborted,
            _ => Self::Toolstack(error),
        }
    }
}

impl From<io::Error> for SaveError {
    fn from(error: io::Error) -> Self {
        WriteError::Io(error).into()
    }
}

/// A failed restore. The domain is left as built so far, paused: its creator has to destroy it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RestoreError {
    /// The stream is invalid, or could not be read.
    #[error(transparent)]
    Stream(ReadError),
    /// The stream is well formed, but its contents do not describe a possible guest.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// The image is of another type of guest than the domain.
    #[error("the image holds an {image} guest, the domain is {domain:?}")]
    GuestType {
        /// The type in the image.
        image: GuestType,
        /// The type of the domain.
        domain: GuestKind,
    },
    /// A stream in a byte order that x86 guests do not have.
    #[error("the stream is {order}; x86 domains can be restored from little-endian streams only")]
    ByteOrder {
        /// The order in the image header.
        order: ByteOrder,
    },
    /// A page table was placed where a 32-bit guest cannot name it.
    #[error(
        "vcpu {vcpu}'s top page table is in frame {frame}, which the cr3 of a 32-bit guest cannot hold: this host has too much memory for it"
    )]
    FrameTooHigh {
        /// The vcpu.
        vcpu: u32,
        /// Where the table is.
        frame: Mfn,
    },
    /// A vcpu that the domain does not have.
    #[error("{kind} is for vcpu {vcpu}, the domain's last is {max}")]
    Vcpu {
        /// The record.
        kind: RecordKind,
        /// The vcpu.
        vcpu: u32,
        /// The domain's last vcpu.
        max: u32,
    },
    /// A pfn beyond what the domain could ever have.
    #[error("pfn {pfn} is beyond {max}, the last that any x86 guest can have")]
    PfnRange {
        /// The page.
        pfn: Pfn,
        /// The last possible pfn.
        max: Pfn,
    },
    /// There was no memory for the guest.
    #[error("no memory for pfn {pfn} of the guest, {}", lack(*tot_pages, *max_pages))]
    NoMemory {
        /// The first page without memory.
        pfn: Pfn,
        /// The pages that the domain has.
        tot_pages: u64,
        /// The pages that the domain may have.
        max_pages: u64,
    },
    /// A page that the guest had given back while it was being saved could not be given back here.
    #[error(
        "pfn {pfn} (frame {gfn}), which the guest gave back while it was being saved, could not be given back on this host"
    )]
    NotReleased {
        /// The page.
        pfn: Pfn,
        /// Its frame.
        gfn: Gfn,
    },
    /// The host lacks CPU features that the guest has seen
    /// ([`CpuCheck::Refuse`](crate::CpuCheck)). The domain has no memory yet.
    #[error(transparent)]
    CpuFeatures(Box<CpuMissing>),
    /// The hypervisor refused the CPU policy of the image.
    #[error(transparent)]
    CpuPolicy(Box<PolicyRefused>),
    /// The hypervisor refused the state of a vcpu.
    #[error("{kind} of vcpu {vcpu} ({bytes} bytes) was refused{}: {cause}", if reason.is_empty() { String::new() } else { format!(" ({reason})") })]
    VcpuState {
        /// The vcpu.
        vcpu: u32,
        /// The record.
        kind: RecordKind,
        /// The size of the state.
        bytes: usize,
        /// A possible reason; empty if none is known.
        reason: String,
        /// The hypervisor's answer.
        cause: BackendError,
    },
    /// The hypervisor refused a parameter of an HVM guest.
    #[error(
        "HVM_PARAMS: parameter {index:#x} ({name}) was refused with the value {value:#x}: {cause}"
    )]
    HvmParam {
        /// Its index, `HVM_PARAM_*` of `xen/include/public/hvm/params.h`.
        index: u32,
        /// Its name there, or that this version of xsr has no name for it.
        name: &'static str,
        /// The value in the image.
        value: u64,
        /// The hypervisor's answer.
        cause: BackendError,
    },
    /// The hypervisor refused the guest's time stamp counter.
    #[error("X86_TSC_INFO: mode {mode}, {khz} kHz was refused: {cause}")]
    TscInfo {
        /// The image's TSC mode.
        mode: u32,
        /// The image's frequency.
        khz: u32,
        /// The hypervisor's answer.
        cause: BackendError,
    },
    /// The hypervisor refused the state of an HVM guest's vcpus and devices.
    #[error("HVM_CONTEXT ({bytes} bytes) was refused: {reason}: {cause}")]
    HvmContext {
        /// Its size.
        bytes: usize,
        /// The record that may be the reason.
        reason: String,
        /// The hypervisor's answer.
        cause: BackendError,
    },
    /// The hypervisor refused the call.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A frame could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// A callback failed.
    #[error(transparent)]
    Toolstack(#[from] ToolstackError),
    /// A checkpoint in a stream that should have none.
    #[error("the stream is checkpointed (Remus or COLO); this restore takes plain streams")]
    Checkpointed,
    /// The toolstack lost the other side during the first checkpoint.
    #[error("the connection broke before the first checkpoint was complete")]
    NoCheckpoint,
    /// A checkpoint could not be kept until it was complete. The sender may still be alive, so this
    /// is not a reason to take over.
    #[error(
        "a checkpoint could not be kept until it was complete, in a temporary file in {directory}: {cause}"
    )]
    Spill {
        /// Where the file is.
        directory: String,
        /// Why it failed.
        cause: io::Error,
    },
    /// A complete checkpoint could not be applied. The domain holds a part of it and a part of the
    /// one before, and must never run. The sender may still be alive.
    #[error("checkpoint {checkpoint} was complete and could not be applied")]
    NotApplied {
        /// Its number, from 1.
        checkpoint: u64,
        /// Why.
        #[source]
        cause: Box<RestoreError>,
    },
    /// The list of the guest's dirty pages could not be sent to the primary (COLO).
    #[error("making the list of dirty pages for the primary failed")]
    BackChannel(#[source] io::Error),
    /// COLO needs a translated guest.
    #[error("a PV guest cannot run under COLO: it is for HVM guests")]
    ColoGuest,
    /// The restore was cancelled.
    #[error("the restore was aborted")]
    Aborted,
}

impl From<ReadError> for RestoreError {
    /// A cancelled source is not a failed source.
    fn from(error: ReadError) -> Self {
        match &error.cause {
            ReadErrorCause::Io(io) if Cancelled::is(io) => Self::Aborted,
            _ => Self::Stream(error),
        }
    }
}

impl RestoreError {
    /// Checkpoint `checkpoint` could not be applied because of `cause`.
    pub(crate) fn not_applied(checkpoint: u64, cause: Self) -> Self {
        match cause {
            Self::Aborted => cause,
            cause => Self::NotApplied {
                checkpoint,
                cause: Box::new(cause),
            },
        }
    }

    /// Whether the image is to blame, so that another attempt with the same image fails the same
    /// way.
    pub fn is_bad_image(&self) -> bool {
        match self {
            Self::Stream(e) => e.is_bad_image(),
            Self::NotApplied { cause, .. } => cause.is_bad_image(),
            // The width comes from the hypervisor, not from the image.
            Self::Guest(GuestError::Width { .. }) => false,
            Self::Guest(_)
            | Self::ByteOrder { .. }
            | Self::PfnRange { .. }
            | Self::Vcpu { .. }
            | Self::Checkpointed => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_callback_that_was_told_to_stop_aborts_and_another_has_failed() {
        let failed = |cause| SaveError::from(ToolstackError::new("waiting", cause));
        let told = failed(io::Error::other(Cancelled));
        assert!(matches!(told, SaveError::Aborted), "{told:?}");
        let broken = failed(io::ErrorKind::BrokenPipe.into());
        assert!(matches!(broken, SaveError::Toolstack(_)), "{broken:?}");
    }

    fn io_error() -> io::Error {
        io::Error::other("the disk is on fire")
    }

    fn read_error(cause: ReadErrorCause) -> ReadError {
        let place = xsr_format::error::Place::End;
        let position = xsr_format::error::Position { place, offset: 7 };
        ReadError { position, cause }
    }

    fn broken_rule() -> ReadError {
        read_error(xsr_format::error::DecodeError::PageCountZero.into())
    }

    fn encode() -> WriteError {
        WriteError::Encode {
            kind: RecordKind::PAGE_DATA,
            cause: xsr_format::error::DecodeError::PageCountZero,
        }
    }

    fn told() -> ToolstackError {
        ToolstackError::new("suspending the guest", io_error())
    }

    /// Each kind of error of a save that has a cause.
    fn failed_saves() -> Vec<SaveError> {
        vec![
            SaveError::Stream(WriteError::Io(io_error())),
            SaveError::Stream(encode()),
            BackendError::host("getdomaininfo", xsr_xen_backend::Errno::EPERM).into(),
            SaveError::Toolstack(told()),
            SaveError::Guest(GuestError::P2mOutgrewLayout),
            SaveError::BackChannel(BackChannelError::Io(io_error())),
            SaveError::NotResumed {
                cause: Box::new(SaveError::Stream(WriteError::Io(io_error()))),
                resume: ToolstackError::new("resuming the guest", "it is gone"),
                known: true,
            },
        ]
    }

    /// Each kind of error of a restore that has a cause.
    fn failed_restores() -> Vec<RestoreError> {
        let refused = || BackendError::host("setvcpucontext", xsr_xen_backend::Errno::EINVAL);
        vec![
            RestoreError::Stream(read_error(ReadErrorCause::Io(io_error()))),
            RestoreError::Stream(broken_rule()),
            RestoreError::Stream(read_error(ReadErrorCause::Io(io::Error::other(
                broken_rule(),
            )))),
            refused().into(),
            RestoreError::Toolstack(told()),
            RestoreError::TscInfo {
                mode: 1,
                khz: 2,
                cause: refused(),
            },
            RestoreError::Spill {
                directory: "/tmp".to_owned(),
                cause: io_error(),
            },
            RestoreError::not_applied(3, RestoreError::Stream(broken_rule())),
            RestoreError::BackChannel(io_error()),
        ]
    }

    #[test]
    fn each_cause_is_printed_once() {
        let saves = failed_saves()
            .into_iter()
            .map(Box::<dyn std::error::Error>::from);
        let restores = failed_restores()
            .into_iter()
            .map(Box::<dyn std::error::Error>::from);
        for error in saves.chain(restores) {
            let text = chain(&*error);
            for cause in [
                "the disk is on fire",
                "count is 0",
                "Invalid argument",
                "suspending the guest",
                "it is gone",
                "writing failed",
            ] {
                assert!(text.matches(cause).count() <= 1, "{text}");
            }
            let own = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                assert!(!own.contains(&error.to_string()), "{own}: {error}");
                cause = error.source();
            }
        }
        let shown = |error: &RestoreError| chain(error);
        let lost = RestoreError::Stream(read_error(ReadErrorCause::Io(io_error())));
        let said = "end of the file at byte 0x7: reading failed: the disk is on fire";
        assert_eq!(shown(&lost), said);
    }
}
