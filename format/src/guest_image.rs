//! The meaning of a libxc stream: one fold of its records into what they say of a guest.
//!
//! A stream may repeat records. What a repetition means is decided here, for the restorer and
//! for every command that shows, compares or converts an image:
//!
//! | record | a later one |
//! |---|---|
//! | X86_PV_P2M_FRAMES | overwrites, from its first frame on; the table never shrinks |
//! | HVM_PARAMS | overrides parameter by parameter |
//! | X86_PV_VCPU_* | replaces the blob of that vcpu and kind; an empty one changes nothing (erratum 1) |
//! | all others | replaces the earlier one |
//!
//! [`GuestImage::apply`] also checks the rules that need more than one record's length fields:
//! how many vcpus there may be, which frames, the framing of the HVM context, and how much of a
//! stream has to be kept. Page contents are never kept.
//!
//! Specification: libxc migration stream, "Records". C implementation: the handlers of
//! `xg_sr_restore_x86_pv.c` and `xg_sr_restore_x86_hvm.c`.

use std::collections::BTreeMap;

use crate::error::DecodeError;
use crate::fields::hvm::{ContextFacts, check_context};
use crate::frame::{PAGE_SIZE, Page, PageEntry, Pfn};
use crate::image::GuestType;
use crate::record::hvm::{HvmParam, HvmParams};
use crate::record::pv::{P2mFrames, PvInfo, VcpuState};
use crate::record::x86::{CpuidLeaf, MsrEntry, TscInfo};
use crate::record::{Body, Record, RecordKind};

/// Most vcpus of a PV guest: Xen's `MAX_VIRT_CPUS`.
pub const MAX_PV_VCPUS: u32 = 8192;
/// Most vcpus of an HVM or PVH guest: Xen's `HVM_MAX_VCPUS`.
pub const MAX_HVM_VCPUS: u32 = 128;
/// The last pfn that an x86 guest can have: 52 bits of address.
pub const MAX_X86_PFN: Pfn = Pfn((1 << 40) - 1);
/// No HVM parameter has an index this high, in any Xen so far (4.22 has 39).
pub const HVM_PARAM_LIMIT: u64 = 256;
/// Most bytes of state of all vcpus, which a restorer has to keep until END: 8 KiB for each of
/// [`MAX_PV_VCPUS`].
pub const MAX_STATE: u64 = 64 << 20;
/// Most optional records between two checkpoints. Xen writes none.
pub const MAX_OPTIONAL: u32 = 1 << 16;
/// Most records between two checkpoints, those with pages excepted. A guest of 8192 vcpus has
/// some 32 thousand.
pub const MAX_RECORDS: u32 = 1 << 17;

/// The blobs of one PV vcpu; empty where none has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PvVcpu {
    /// X86_PV_VCPU_BASIC: `vcpu_guest_context_t` in the guest's width.
    pub basic: Vec<u8>,
    /// X86_PV_VCPU_EXTENDED.
    pub extended: Vec<u8>,
    /// X86_PV_VCPU_XSAVE.
    pub xsave: Vec<u8>,
    /// X86_PV_VCPU_MSRS.
    pub msrs: Vec<u8>,
}

impl PvVcpu {
    /// The blob of a kind of record; `None` for a kind that is not of a vcpu.
    pub fn blob(&self, kind: RecordKind) -> Option<&[u8]> {
        Some(match kind {
            RecordKind::X86_PV_VCPU_BASIC => &self.basic,
            RecordKind::X86_PV_VCPU_EXTENDED => &self.extended,
            RecordKind::X86_PV_VCPU_XSAVE => &self.xsave,
            RecordKind::X86_PV_VCPU_MSRS => &self.msrs,
            _ => return None,
        })
    }

    fn blob_mut(&mut self, kind: RecordKind) -> Option<&mut Vec<u8>> {
        Some(match kind {
            RecordKind::X86_PV_VCPU_BASIC => &mut self.basic,
            RecordKind::X86_PV_VCPU_EXTENDED => &mut self.extended,
            RecordKind::X86_PV_VCPU_XSAVE => &mut self.xsave,
            RecordKind::X86_PV_VCPU_MSRS => &mut self.msrs,
            _ => return None,
        })
    }

    /// The blobs that have come, with the kind of their record, in the order in which Xen
    /// applies them.
    pub fn blobs(&self) -> impl Iterator<Item = (RecordKind, &[u8])> {
        [
            (RecordKind::X86_PV_VCPU_BASIC, &self.basic),
            (RecordKind::X86_PV_VCPU_EXTENDED, &self.extended),
            (RecordKind::X86_PV_VCPU_XSAVE, &self.xsave),
            (RecordKind::X86_PV_VCPU_MSRS, &self.msrs),
        ]
        .into_iter()
        .filter(|(_, blob)| !blob.is_empty())
        .map(|(kind, blob)| (kind, blob.as_slice()))
    }
}

/// Where a PV guest keeps its p2m.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct P2mTable {
    /// The first pfn of the first X86_PV_P2M_FRAMES.
    pub first_pfn: Pfn,
    /// The last pfn that any of them announced.
    pub max_pfn: Pfn,
    /// pfns of the leaves, from that of pfn 0 on.
    pub frames: Vec<Pfn>,
}

/// What a libxc stream says of a guest, page contents excepted.
#[derive(Clone, Debug)]
pub struct GuestImage {
    guest_type: GuestType,
    pv_info: Option<PvInfo>,
    p2m: Option<P2mTable>,
    shared_info: Option<Box<Page>>,
    vcpus: BTreeMap<u32, PvVcpu>,
    /// Bytes in all blobs of `vcpus`.
    vcpu_bytes: u64,
    tsc: Option<TscInfo>,
    cpuid: Vec<CpuidLeaf>,
    msrs: Vec<MsrEntry>,
    hvm_context: Vec<u8>,
    context_facts: ContextFacts,
    hvm_params: Vec<HvmParam>,
    static_data_ended: bool,
    verifying: bool,
    checkpoints: u64,
    /// Optional records since the last checkpoint.
    optional: u32,
    optional_in_all: u64,
    /// Records since the last checkpoint, those with pages excepted.
    records: u32,
    /// Bit n: a page of the range that p2m leaf n translates has had memory.
    populated_leaves: Vec<u64>,
}

impl GuestImage {
    /// Before the first record of the stream of a guest of this type.
    pub fn new(guest_type: GuestType) -> Self {
        Self {
            guest_type,
            pv_info: None,
            p2m: None,
            shared_info: None,
            vcpus: BTreeMap::new(),
            vcpu_bytes: 0,
            tsc: None,
            cpuid: Vec::new(),
            msrs: Vec::new(),
            hvm_context: Vec::new(),
            context_facts: ContextFacts::default(),
            hvm_params: Vec::new(),
            static_data_ended: false,
            verifying: false,
            checkpoints: 0,
            optional: 0,
            optional_in_all: 0,
            records: 0,
            populated_leaves: Vec::new(),
        }
    }

    /// Take in a record. Those whose length the reader has checked are not checked again.
    ///
    /// # Errors
    ///
    /// The rule that the record breaks together with those before it. The image is as it was
    /// then, or has part of the record.
    pub fn apply(&mut self, record: &Record<'_>) -> Result<(), DecodeError> {
        self.records = self.records.saturating_add(1);
        if self.records > MAX_RECORDS {
            return Err(DecodeError::TooManyRecords { max: MAX_RECORDS });
        }
        // No `_`: whoever adds a record decides here what it means.
        match record.body {
            Body::End => self.complete()?,
            Body::Checkpoint => {
                self.complete()?;
                self.checkpoints = self.checkpoints.saturating_add(1);
                self.optional = 0;
                self.records = 0;
            }
            Body::PvInfo(info) => self.pv_info = Some(info),
            Body::P2mFrames(frames) => self.p2m_frames(&frames)?,
            Body::Vcpu(state) => self.vcpu(record.kind, &state)?,
            Body::SharedInfo(page) => self.shared_info = Some(Box::new(*page)),
            Body::TscInfo(tsc) => self.tsc = Some(tsc),
            Body::HvmContext(context) => {
                self.context_facts = check_context(context)?;
                self.hvm_context.clear();
                self.hvm_context.extend_from_slice(context);
            }
            Body::HvmParams(params) => self.params(&params)?,
            Body::StaticDataEnd => self.static_data_ended = true,
            Body::CpuidPolicy(policy) => self.cpuid = policy.iter().collect(),
            Body::MsrPolicy(policy) => self.msrs = policy.iter().collect(),
            Body::Verify => self.verifying = true,
            Body::Optional(_) => {
                self.optional = self.optional.saturating_add(1);
                self.optional_in_all = self.optional_in_all.saturating_add(1);
                if self.optional > MAX_OPTIONAL {
                    return Err(DecodeError::TooManyOptional { max: MAX_OPTIONAL });
                }
            }
            // The reader refuses both: one is deprecated, the other travels the other way.
            Body::Toolstack(_) | Body::DirtyPfns(_) => {}
        }
        Ok(())
    }

    /// Take in the entries of a PAGE_DATA record.
    ///
    /// # Errors
    ///
    /// [`DecodeError::PfnRange`] for a pfn that no x86 guest can have.
    pub fn apply_pages(
        &mut self,
        entries: impl Iterator<Item = PageEntry>,
    ) -> Result<(), DecodeError> {
        let x86 = self.is_x86();
        let shift = self.pv_info.map(leaf_shift);
        for (index, entry) in (0_u64..).zip(entries) {
            if x86 && entry.pfn > MAX_X86_PFN {
                let pfn = entry.pfn;
                return Err(DecodeError::PfnRange { index, pfn });
            }
            if let Some(shift) = shift
                && entry.page_type.is_populated()
            {
                self.populate(entry.pfn.0 >> shift);
            }
        }
        Ok(())
    }

    fn is_x86(&self) -> bool {
        matches!(self.guest_type, GuestType::X86_PV | GuestType::X86_HVM)
    }

    /// Note that a page of the range of p2m leaf `leaf` has memory. The reader lets no page
    /// beyond the p2m through, so this takes 1 MiB at most.
    fn populate(&mut self, leaf: u64) {
        let Ok(word) = usize::try_from(leaf >> 6) else {
            return;
        };
        if word >= self.populated_leaves.len() {
            self.populated_leaves.resize(word.saturating_add(1), 0);
        }
        if let Some(word) = self.populated_leaves.get_mut(word) {
            *word |= 1 << (leaf & 63);
        }
    }

    fn is_populated(&self, leaf: u64) -> bool {
        let word = usize::try_from(leaf >> 6).ok();
        // Beyond what has been noted, no page has memory.
        let word = word.and_then(|word| self.populated_leaves.get(word));
        word.is_some_and(|word| word >> (leaf & 63) & 1 == 1)
    }

    fn p2m_frames(&mut self, record: &P2mFrames<'_>) -> Result<(), DecodeError> {
        let table = self.p2m.get_or_insert_with(|| P2mTable {
            first_pfn: record.start,
            ..P2mTable::default()
        });
        let known = table.frames.len();
        // A gap would be a part of the p2m that has no leaves.
        let gap = DecodeError::P2mGap {
            start: record.start,
            known: known as u64,
        };
        let first = match usize::try_from(record.first_frame) {
            Ok(first) if first <= known => first,
            _ => return Err(gap),
        };
        table.max_pfn = table.max_pfn.max(record.end);
        let end = first.saturating_add(record.frames().len());
        if known < end {
            table.frames.resize(end, Pfn::INVALID);
        }
        for (slot, pfn) in table.frames.iter_mut().skip(first).zip(record.frames()) {
            *slot = pfn;
        }
        Ok(())
    }

    fn vcpu(&mut self, kind: RecordKind, record: &VcpuState<'_>) -> Result<(), DecodeError> {
        let vcpu = record.vcpu;
        if vcpu >= MAX_PV_VCPUS {
            let max = MAX_PV_VCPUS.saturating_sub(1);
            return Err(DecodeError::VcpuNumber { kind, vcpu, max });
        }
        if record.state.is_empty() {
            return Ok(());
        }
        if let Some(blob) = self.vcpus.entry(vcpu).or_default().blob_mut(kind) {
            let before = blob.len() as u64;
            let bytes = self.vcpu_bytes.saturating_sub(before);
            let bytes = bytes.saturating_add(record.state.len() as u64);
            if bytes > MAX_STATE {
                return Err(DecodeError::StateTooLong { max: MAX_STATE });
            }
            self.vcpu_bytes = bytes;
            blob.clear();
            blob.extend_from_slice(record.state);
        }
        Ok(())
    }

    fn params(&mut self, params: &HvmParams<'_>) -> Result<(), DecodeError> {
        for param in params.iter() {
            if param.index >= HVM_PARAM_LIMIT {
                let index = param.index;
                return Err(DecodeError::HvmParamIndex { index });
            }
            match self.hvm_params.iter_mut().find(|p| p.index == param.index) {
                Some(known) => known.value = param.value,
                None => self.hvm_params.push(param),
            }
        }
        Ok(())
    }

    /// What holds only for all records together, at END and CHECKPOINT.
    ///
    /// One leaf may stand for several ranges: Linux has one page of invalid entries for all
    /// ranges in which it has no memory. If a page of such a range had memory, a restorer would
    /// have to write two contents into one leaf.
    fn complete(&self) -> Result<(), DecodeError> {
        let Some(table) = &self.p2m else {
            return Ok(());
        };
        // pfns of leaves that are named for a range with memory, and for which: eight bytes for
        // each, since there may be as many as pages.
        const LEAF_BITS: u32 = 24;
        const LEAVES: u64 = 1 << LEAF_BITS;
        let mut used: Vec<u64> = Vec::new();
        for (leaf, pfn) in (0_u64..).zip(&table.frames) {
            if self.is_populated(leaf) {
                if *pfn > MAX_X86_PFN || leaf >= LEAVES {
                    let index = leaf;
                    return Err(DecodeError::P2mFrameRange { index, pfn: *pfn });
                }
                used.push(pfn.0 << LEAF_BITS | leaf);
            }
        }
        used.sort_unstable();
        let unpacked = |used: u64| (Pfn(used >> LEAF_BITS), used & (LEAVES.wrapping_sub(1)));
        let shared = |pfn: Pfn, first: u64, second: u64| DecodeError::P2mLeafShared {
            pfn,
            first: first.min(second),
            second: first.max(second),
        };
        for (before, after) in used.iter().zip(used.iter().skip(1)) {
            let ((pfn, first), (other, second)) = (unpacked(*before), unpacked(*after));
            if pfn == other {
                return Err(shared(pfn, first, second));
            }
        }
        for (leaf, pfn) in (0_u64..).zip(&table.frames) {
            if !self.is_populated(leaf)
                && let Ok(at) = used.binary_search_by_key(pfn, |used| unpacked(*used).0)
                && let Some(used) = used.get(at)
            {
                return Err(shared(*pfn, leaf, unpacked(*used).1));
            }
        }
        Ok(())
    }

    /// The type of the guest, as the domain header has it.
    pub fn guest_type(&self) -> GuestType {
        self.guest_type
    }

    /// X86_PV_INFO: the width of a PV guest.
    pub fn pv_info(&self) -> Option<PvInfo> {
        self.pv_info
    }

    /// X86_PV_P2M_FRAMES.
    pub fn p2m(&self) -> Option<&P2mTable> {
        self.p2m.as_ref()
    }

    /// SHARED_INFO.
    pub fn shared_info(&self) -> Option<&Page> {
        self.shared_info.as_deref()
    }

    /// X86_PV_VCPU_*, by vcpu, ascending.
    pub fn vcpus(&self) -> &BTreeMap<u32, PvVcpu> {
        &self.vcpus
    }

    /// X86_TSC_INFO.
    pub fn tsc(&self) -> Option<TscInfo> {
        self.tsc
    }

    /// X86_CPUID_POLICY: the leaves, in the order of the stream; none in a version 2 stream.
    pub fn cpuid(&self) -> &[CpuidLeaf] {
        &self.cpuid
    }

    /// X86_MSR_POLICY: the MSRs, in the order of the stream.
    pub fn msrs(&self) -> &[MsrEntry] {
        &self.msrs
    }

    /// HVM_CONTEXT; empty if none has come.
    pub fn hvm_context(&self) -> &[u8] {
        &self.hvm_context
    }

    /// What is in that context.
    pub fn context_facts(&self) -> &ContextFacts {
        &self.context_facts
    }

    /// HVM_PARAMS: each parameter with the value that came last, in the order in which the
    /// parameters first came.
    pub fn hvm_params(&self) -> &[HvmParam] {
        &self.hvm_params
    }

    /// Whether STATIC_DATA_END has come. (In a version 2 stream static data ends without it.)
    pub fn static_data_ended(&self) -> bool {
        self.static_data_ended
    }

    /// Whether VERIFY has come: from there on pages are sent again, to be compared.
    pub fn verifying(&self) -> bool {
        self.verifying
    }

    /// How many checkpoints have come.
    pub fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    /// How many optional records have come.
    pub fn optional_records(&self) -> u64 {
        self.optional_in_all
    }

    /// The vcpus that the image has state of, ascending.
    pub fn vcpu_numbers(&self) -> impl Iterator<Item = u32> {
        let pv = self.vcpus.iter();
        let pv = pv.filter(|(_, vcpu)| !vcpu.basic.is_empty());
        let hvm = self.context_facts.cpus.iter().map(|cpu| u32::from(*cpu));
        pv.map(|(number, _)| *number).chain(hvm)
    }

    /// How many vcpus a domain needs to take the image: vcpus that were offline are not in it,
    /// so that there may be gaps.
    pub fn vcpus_needed(&self) -> u32 {
        self.vcpu_numbers()
            .max()
            .map_or(0, |last| last.saturating_add(1))
    }
}

/// log2 of the entries in one leaf of the p2m.
const fn leaf_shift(info: PvInfo) -> u32 {
    match info {
        PvInfo::Bits32 => 10,
        PvInfo::Bits64 => 9,
    }
}

const _: () = assert!(PAGE_SIZE == 4 << leaf_shift(PvInfo::Bits32));
const _: () = assert!(PAGE_SIZE == 8 << leaf_shift(PvInfo::Bits64));
