//! The guest that a libxc stream describes: the state that its records add up to.
//!
//! A stream may repeat records. The meaning of a repetition is defined here, for the restorer and
//! for every command that shows, compares or converts an image:
//!
//! | record | a later one |
//! |---|---|
//! | X86_PV_P2M_FRAMES | overwrites, from its first frame on; the table never shrinks |
//! | HVM_PARAMS | overrides parameter by parameter |
//! | X86_PV_VCPU_* | replaces the vcpu's blob of that kind; an empty one is ignored (erratum 1) |
//! | all others | replaces the earlier one |
//!
//! [`GuestImage::apply`] also checks the rules that need more than one record's length fields:
//! number of vcpus, frames, framing of the HVM context, and the amount of state that must be kept.
//! Page contents are never kept.
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

/// Maximum number of vcpus of a PV guest: Xen's `MAX_VIRT_CPUS`.
pub const MAX_PV_VCPUS: u32 = 8192;
/// Maximum number of vcpus of an HVM or PVH guest: Xen's `HVM_MAX_VCPUS`.
pub const MAX_HVM_VCPUS: u32 = 128;
/// The last pfn that an x86 guest can have: 52 bits of address.
pub const MAX_X86_PFN: Pfn = Pfn((1 << 40) - 1);

/// The largest pfn of a PV guest: X86_PV_P2M_FRAMES names the range of its p2m in 32 bits.
pub const MAX_PV_PFN: Pfn = Pfn(u32::MAX as u64);
/// The index of every HVM parameter is below this, in all Xens so far (4.22 has 39).
pub const HVM_PARAM_LIMIT: u64 = 256;
/// Maximum size of the state of all vcpus, which a restorer keeps until END: 8 KiB for each of
/// [`MAX_PV_VCPUS`].
pub const MAX_STATE: u64 = 64 << 20;
/// Maximum number of optional records between two checkpoints. Xen writes none.
pub const MAX_OPTIONAL: u32 = 1 << 16;
/// Maximum number of records between two checkpoints, except those with pages. A guest of 8192
/// vcpus has about 32 thousand.
pub const MAX_RECORDS: u32 = 1 << 17;

/// The blobs of one PV vcpu; empty if the record has not come.
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
    /// The blob for a kind of record; `None` if the kind does not belong to a vcpu.
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

    /// The blobs that have come, with the kind of their record, in the order in which Xen applies
    /// them.
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

/// Location of a PV guest's p2m.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct P2mTable {
    /// The first pfn of the first X86_PV_P2M_FRAMES.
    pub first_pfn: Pfn,
    /// The last pfn that any of the records announced.
    pub max_pfn: Pfn,
    /// pfns of the leaves, starting with the leaf for pfn 0.
    pub frames: Vec<Pfn>,
}

/// The guest as described by a libxc stream, without page contents.
///
/// ```
/// use xsr_format::{ReadOptions, Walk};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// let mut walk = Walk::open(&image[..], ReadOptions::default())?;
/// while walk.next_step()?.is_some() {}
/// let guest = walk.guest().expect("the stream has headers");
/// assert_eq!((guest.vcpus_needed(), guest.checkpoints()), (0, 0));
/// # Ok::<(), xsr_format::ReadError>(())
/// ```
#[derive(Clone, Debug)]
pub struct GuestImage {
    guest_type: GuestType,
    pv_info: Option<PvInfo>,
    p2m: Option<P2mTable>,
    shared_info: Option<Box<Page>>,
    vcpus: BTreeMap<u32, PvVcpu>,
    /// Total size of the blobs in `vcpus`.
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
    /// Records since the last checkpoint, except those with pages.
    records: u32,
    /// Bit n: a page in the range of p2m leaf n has had memory.
    populated_leaves: Vec<u64>,
    /// Whether the leaves or their use have changed since they were checked.
    leaves_changed: bool,
    /// Records, entries and leaves that have come since then.
    since_check: u64,
    #[cfg(test)]
    leaves_checked: u64,
}

impl GuestImage {
    /// A guest of this type before the first record.
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
            leaves_changed: false,
            // The first check is due however little has come.
            since_check: u64::MAX,
            #[cfg(test)]
            leaves_checked: 0,
        }
    }

    /// Applies a record. Lengths that the reader has checked are not checked again.
    ///
    /// # Errors
    ///
    /// The rule that the record breaks, alone or together with earlier ones. The image may then
    /// contain a part of the record.
    pub fn apply(&mut self, record: &Record<'_>) -> Result<(), DecodeError> {
        self.records = self.records.saturating_add(1);
        self.since_check = self.since_check.saturating_add(1);
        if self.records > MAX_RECORDS {
            return Err(DecodeError::TooManyRecords { max: MAX_RECORDS });
        }
        // No `_`: a new kind of record must be decided on here.
        match record.body {
            Body::End => self.check_leaves()?,
            Body::Checkpoint => {
                if self.is_check_due() {
                    self.check_leaves()?;
                }
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
        }
        Ok(())
    }

    /// Applies the entries of a PAGE_DATA record.
    ///
    /// # Errors
    ///
    /// [`DecodeError::PfnRange`] for a pfn that no guest of this type can have.
    pub fn apply_pages(
        &mut self,
        entries: impl Iterator<Item = PageEntry>,
    ) -> Result<(), DecodeError> {
        let x86 = self.is_x86();
        let shift = self.pv_info.map(leaf_shift);
        for (index, entry) in (0_u64..).zip(entries) {
            self.since_check = self.since_check.saturating_add(1);
            if x86 && entry.pfn > MAX_X86_PFN {
                let (pfn, max) = (entry.pfn, MAX_X86_PFN);
                return Err(DecodeError::PfnRange { index, pfn, max });
            }
            if let Some(shift) = shift {
                // Also before X86_PV_P2M_FRAMES, which a lenient reader lets come later.
                if entry.pfn > MAX_PV_PFN {
                    let (pfn, max) = (entry.pfn, MAX_PV_PFN);
                    return Err(DecodeError::PfnRange { index, pfn, max });
                }
                if entry.page_type.is_populated() {
                    self.populate(entry.pfn.0 >> shift);
                }
            }
        }
        Ok(())
    }

    fn is_x86(&self) -> bool {
        matches!(self.guest_type, GuestType::X86_PV | GuestType::X86_HVM)
    }

    /// Notes that a page in the range of p2m leaf `leaf` has memory. No pfn is beyond
    /// [`MAX_PV_PFN`], so this takes 1 MiB at most.
    fn populate(&mut self, leaf: u64) {
        let Ok(word) = usize::try_from(leaf >> 6) else {
            return;
        };
        if word >= self.populated_leaves.len() {
            self.populated_leaves.resize(word.saturating_add(1), 0);
        }
        if let Some(word) = self.populated_leaves.get_mut(word) {
            let with_leaf = *word | 1 << (leaf & 63);
            self.leaves_changed |= with_leaf != *word;
            *word = with_leaf;
        }
    }

    fn is_populated(&self, leaf: u64) -> bool {
        let word = usize::try_from(leaf >> 6).ok();
        // Beyond the end of the bitmap, no page has memory.
        let word = word.and_then(|word| self.populated_leaves.get(word));
        word.is_some_and(|word| word >> (leaf & 63) & 1 == 1)
    }

    fn p2m_frames(&mut self, record: &P2mFrames<'_>) -> Result<(), DecodeError> {
        let table = self.p2m.get_or_insert_with(|| P2mTable {
            first_pfn: record.start,
            ..P2mTable::default()
        });
        let known = table.frames.len();
        // A gap would leave a part of the p2m without leaves.
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
            // Twice the room of a table of 64 MiB would be much.
            let more = end.saturating_sub(known).max(known >> 3);
            if table.frames.capacity() < end {
                table.frames.reserve_exact(more);
            }
            table.frames.resize(end, Pfn::INVALID);
        }
        for (slot, pfn) in table.frames.iter_mut().skip(first).zip(record.frames()) {
            self.leaves_changed |= *slot != pfn;
            *slot = pfn;
        }
        let leaves = record.frames().len() as u64;
        self.since_check = self.since_check.saturating_add(leaves);
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

    /// Whether a checkpoint checks the leaves. Otherwise a later checkpoint or END does. A check
    /// looks at all leaves: if each of many small checkpoints made one, they would take quadratic
    /// time. So as many records, entries and leaves must have come since the last check.
    fn is_check_due(&self) -> bool {
        let leaves = self.p2m.as_ref().map_or(0, |table| table.frames.len());
        self.leaves_changed && self.since_check >= leaves as u64
    }

    /// Checks the rules for all records together, at END and CHECKPOINT.
    ///
    /// Several ranges may share a leaf: Linux has one page of invalid entries for all ranges
    /// without memory. If a page of such a range had memory, a restorer would have to write two
    /// different contents into one leaf.
    fn check_leaves(&mut self) -> Result<(), DecodeError> {
        self.leaves_changed = false;
        self.since_check = 0;
        let Some(table) = &self.p2m else {
            return Ok(());
        };
        #[cfg(test)]
        {
            self.leaves_checked = self
                .leaves_checked
                .saturating_add(table.frames.len() as u64);
        }
        // pfns of leaves for ranges with memory, each with the index of its range: eight bytes
        // for each, since there may be as many as pages.
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

    /// The type of the guest, from the domain header.
    pub fn guest_type(&self) -> GuestType {
        self.guest_type
    }

    /// X86_PV_INFO: a PV guest's width.
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

    /// As [`GuestImage::vcpus`], for callers that keep the state.
    pub fn into_vcpus(self) -> BTreeMap<u32, PvVcpu> {
        self.vcpus
    }

    /// X86_TSC_INFO.
    pub fn tsc(&self) -> Option<TscInfo> {
        self.tsc
    }

    /// X86_CPUID_POLICY: the leaves, in the order of the stream; empty for a version 2 stream.
    pub fn cpuid(&self) -> &[CpuidLeaf] {
        &self.cpuid
    }

    /// X86_MSR_POLICY: the MSRs, in the order of the stream.
    pub fn msrs(&self) -> &[MsrEntry] {
        &self.msrs
    }

    /// HVM_CONTEXT; empty if it has not come.
    pub fn hvm_context(&self) -> &[u8] {
        &self.hvm_context
    }

    /// Facts about that context.
    pub fn context_facts(&self) -> &ContextFacts {
        &self.context_facts
    }

    /// HVM_PARAMS: each parameter with its latest value, in the order of first occurrence.
    pub fn hvm_params(&self) -> &[HvmParam] {
        &self.hvm_params
    }

    /// Whether STATIC_DATA_END has come. (A version 2 stream has no such record.)
    pub fn static_data_ended(&self) -> bool {
        self.static_data_ended
    }

    /// Whether VERIFY has come: after it, pages are sent again for comparison.
    pub fn verifying(&self) -> bool {
        self.verifying
    }

    /// Number of checkpoints that have come.
    pub fn checkpoints(&self) -> u64 {
        self.checkpoints
    }

    /// Number of optional records that have come.
    pub fn optional_records(&self) -> u64 {
        self.optional_in_all
    }

    /// The vcpus with state in the image, ascending.
    pub fn vcpu_numbers(&self) -> impl Iterator<Item = u32> {
        let pv = self.vcpus.iter();
        let pv = pv.filter(|(_, vcpu)| !vcpu.basic.is_empty());
        let hvm = self.context_facts.cpus.iter().map(|cpu| u32::from(*cpu));
        pv.map(|(number, _)| *number).chain(hvm)
    }

    /// Number of vcpus that a domain needs for the image. Vcpus that were offline are not in the
    /// image, so there may be gaps.
    pub fn vcpus_needed(&self) -> u32 {
        self.vcpu_numbers()
            .max()
            .map_or(0, |last| last.saturating_add(1))
    }
}

/// log2 of the number of entries in a p2m leaf.
const fn leaf_shift(info: PvInfo) -> u32 {
    match info {
        PvInfo::Bits32 => 10,
        PvInfo::Bits64 => 9,
    }
}

const _: () = assert!(PAGE_SIZE == 4 << leaf_shift(PvInfo::Bits32));
const _: () = assert!(PAGE_SIZE == 8 << leaf_shift(PvInfo::Bits64));

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::arithmetic_side_effects,
        reason = "a test fails by panicking"
    )]

    use super::*;
    use crate::byte_order::ByteOrder;
    use crate::frame::PageType;
    use crate::record::Context;

    fn apply(image: &mut GuestImage, kind: RecordKind, raw: &[u8]) -> Result<(), DecodeError> {
        let context = Context {
            order: ByteOrder::Little,
            guest_width: Some(8),
            lenient: false,
        };
        let body = Body::decode(kind, raw, context).unwrap();
        image.apply(&Record { kind, raw, body })
    }

    /// A PV guest whose p2m has so many leaves: the pfns of the first `named` of them, as said.
    fn with_leaves(leaves: u32, leaf: impl Fn(u32) -> u64) -> GuestImage {
        let mut image = GuestImage::new(GuestType::X86_PV);
        let info = [8, 4, 0, 0, 0, 0, 0, 0];
        apply(&mut image, RecordKind::X86_PV_INFO, &info).unwrap();
        let mut raw = vec![0; 4];
        raw.extend((leaves * 512 - 1).to_le_bytes());
        raw.extend((0..leaves).flat_map(|n| leaf(n).to_le_bytes()));
        apply(&mut image, RecordKind::X86_PV_P2M_FRAMES, &raw).unwrap();
        image
    }

    fn page(image: &mut GuestImage, pfn: u64) {
        let entry = PageEntry {
            pfn: Pfn(pfn),
            page_type: PageType::XALLOC,
        };
        image.apply_pages([entry].into_iter()).unwrap();
    }

    /// So many leaves, and as many checkpoints, each behind a page in a range of its own: how many
    /// leaves have been looked at.
    fn looked_at(n: u32) -> u64 {
        let mut image = with_leaves(n, u64::from);
        for leaf in 0..n {
            page(&mut image, u64::from(leaf) * 512);
            apply(&mut image, RecordKind::CHECKPOINT, &[]).unwrap();
        }
        apply(&mut image, RecordKind::END, &[]).unwrap();
        image.leaves_checked
    }

    #[test]
    fn checkpoints_take_time_in_their_number() {
        let (few, many) = (looked_at(500), looked_at(2000));
        assert!(many <= few * 5, "{few} leaves, then {many}");
        // What has not changed is checked again only at END.
        let mut image = with_leaves(8, u64::from);
        page(&mut image, 0);
        for _ in 0..1000 {
            apply(&mut image, RecordKind::CHECKPOINT, &[]).unwrap();
        }
        assert_eq!(image.leaves_checked, 8);
    }

    /// A lenient reader takes pages before X86_PV_P2M_FRAMES, which would refuse this one.
    #[test]
    fn a_pfn_beyond_any_p2m_takes_no_memory() {
        let mut image = GuestImage::new(GuestType::X86_PV);
        let info = [8, 4, 0, 0, 0, 0, 0, 0];
        apply(&mut image, RecordKind::X86_PV_INFO, &info).unwrap();
        page(&mut image, MAX_PV_PFN.0);
        assert_eq!(image.populated_leaves.len() * 8, 1 << 20);
        let entry = PageEntry {
            pfn: Pfn(MAX_PV_PFN.0 + 1),
            page_type: PageType::XALLOC,
        };
        let range = DecodeError::PfnRange {
            index: 0,
            pfn: entry.pfn,
            max: MAX_PV_PFN,
        };
        assert_eq!(image.apply_pages([entry].into_iter()), Err(range));
        assert_eq!(image.populated_leaves.len() * 8, 1 << 20);
    }

    /// A leaf that two ranges with memory share is found at END, if no checkpoint was due to.
    #[test]
    fn a_check_that_was_put_off_is_made_at_the_end() {
        let mut image = with_leaves(100, |n| u64::from(if n == 7 { 3 } else { n }));
        apply(&mut image, RecordKind::CHECKPOINT, &[]).unwrap();
        page(&mut image, 3 * 512);
        page(&mut image, 7 * 512);
        apply(&mut image, RecordKind::CHECKPOINT, &[]).unwrap();
        let error = apply(&mut image, RecordKind::END, &[]).unwrap_err();
        let shared = DecodeError::P2mLeafShared {
            pfn: Pfn(3),
            first: 3,
            second: 7,
        };
        assert_eq!(error, shared);
    }
}
