//! Head of a legacy stream: sizes, a PV guest's extended info and the frames of its p2m.
//!
//! C implementation: `load_p2m_frame_list` in `tools/libxc/xc_domain_restore.c` (Xen 4.5).

use super::{
    BYTES, ExtendedInfo, Item, LegacyError, LegacyGuest, LegacyOptions, LegacyReader, LegacyStart,
    MAX_P2M_SIZE, Place, Position, Read, ReadError, ReadErrorCause, Skip, State, ToolstackWidth,
    detect,
};
use crate::frame::{PAGE_SIZE, Pfn};
use crate::source::fill_behind;

/// Maximum size of an XSAVE record. Real ones of that time had from some hundred bytes to a few
/// thousand; today's have eleven thousand.
const MAX_XSAVE: u32 = 1 << 20;

const BASIC_32: u32 = 0xaf0;
const BASIC_64: u32 = 0x1430;

impl<R: Read> LegacyReader<R> {
    pub(super) fn with_skip(
        known: &[u8],
        mut source: R,
        options: LegacyOptions,
        skip: Skip<R>,
    ) -> Result<Self, ReadError> {
        let mut first = [0; BYTES];
        let offset = options.offset;
        let start = fill_behind(known, &mut source, &mut first)
            .and_then(|()| Ok(start(first, options.width)?))
            .map_err(|cause| ReadError::at(Place::LegacyHead, offset, cause))?;
        let width_bytes = match start.width {
            ToolstackWidth::Bits32 => 4,
            ToolstackWidth::Bits64 => 8,
        };
        let position = Position {
            place: Place::LegacyHead,
            offset,
        };
        let mut reader = Self {
            source,
            skip,
            options,
            known: first.into_iter().skip(width_bytes).collect(),
            offset: offset.saturating_add(width_bytes as u64),
            start,
            guest: LegacyGuest::Hvm,
            extended_info: false,
            extended: ExtendedInfo::default(),
            vcpus: vec![0],
            index: 0,
            current: position,
            left: 0,
            any_entry: false,
            compressed: false,
            compress_next: false,
            last: false,
            complete: 0,
            state: State::Body,
            scratch: Vec::new(),
        };
        match reader.find_guest() {
            Ok(()) => Ok(reader),
            Err(cause) => Err(reader.failed(cause)),
        }
    }

    /// Detects the type of guest from the next four bytes, which are put back.
    fn find_guest(&mut self) -> Result<(), ReadErrorCause> {
        let at = self.offset;
        let word: [u8; 4] = self.take()?;
        self.known = word.to_vec();
        self.offset = at;
        let got = u32::from_le_bytes(word);
        let marker = i32::from_le_bytes(word);
        self.extended_info = got == u32::MAX;
        self.guest = match self.options.guest {
            Some(guest) => guest,
            None if self.extended_info => LegacyGuest::Pv,
            None if (-20..=1024).contains(&marker) && marker != 0 => LegacyGuest::Hvm,
            None if got != 0 && got < self.start.p2m_size => LegacyGuest::Pv,
            None => return Err(LegacyError::GuestUnclear { got }.into()),
        };
        self.state = match (self.guest, self.extended_info) {
            (LegacyGuest::Hvm, _) => State::Body,
            (LegacyGuest::Pv, true) => State::ExtendedInfo,
            (LegacyGuest::Pv, false) => State::P2mFrames,
        };
        Ok(())
    }

    pub(super) fn extended_info(&mut self) -> Result<Item, ReadErrorCause> {
        let got = self.long()?;
        let ones = match self.start.width {
            ToolstackWidth::Bits32 => u64::from(u32::MAX),
            ToolstackWidth::Bits64 => u64::MAX,
        };
        if got != ones {
            return Err(LegacyError::ExtendedInfoMark { got }.into());
        }
        let mut left = self.u32()?;
        let mut info = ExtendedInfo::default();
        let (mut extended, mut xsave) = (false, false);
        while left > 0 {
            if left < 8 {
                return Err(LegacyError::BlockCut { left }.into());
            }
            left = left.saturating_sub(8);
            let name = self.take::<4>()?;
            let length = self.u32()?;
            if length > left {
                return Err(LegacyError::BlockTooLong { name, length, left }.into());
            }
            left = left.saturating_sub(length);
            let mut rest = u64::from(length);
            let repeated = match &name {
                b"vcpu" => info.guest_width.is_some(),
                b"extv" => extended,
                b"xcnt" => xsave,
                _ => false,
            };
            if repeated {
                return Err(LegacyError::BlockRepeated { name }.into());
            }
            match &name {
                b"vcpu" => {
                    info.guest_width = Some(match length {
                        BASIC_32 => 4,
                        BASIC_64 => 8,
                        got => return Err(LegacyError::VcpuContext { got }.into()),
                    });
                }
                b"extv" => extended = true,
                b"xcnt" => {
                    xsave = true;
                    Self::range("length of block xcnt", rest, 4, u64::from(u32::MAX))?;
                    info.xsave = self.u32()?;
                    rest = rest.saturating_sub(4);
                    let (got, max) = (info.xsave, MAX_XSAVE);
                    if got != 0 && !(16..=max).contains(&got) {
                        return Err(LegacyError::XsaveSize { got, max }.into());
                    }
                }
                _ => info.unknown_blocks = info.unknown_blocks.saturating_add(1),
            }
            // The tail contains the vcpu contexts again, in their final state.
            self.pass_over(rest)?;
        }
        info.extended = extended;
        self.extended = info;
        self.state = State::P2mFrames;
        Ok(Item::ExtendedInfo(info))
    }

    pub(super) fn p2m_frames(&mut self) -> Result<Item, ReadErrorCause> {
        let entries_per_frame = (PAGE_SIZE as u64).div_euclid(u64::from(self.pv_info().width()));
        let frames = u64::from(self.start.p2m_size).div_ceil(entries_per_frame);
        let pfns = self.longs(frames)?;
        self.state = State::Body;
        Ok(Item::P2mFrames(pfns.into_iter().map(Pfn).collect()))
    }
}

/// The width of the toolstack, from the stream or from the caller.
fn start(first: [u8; BYTES], width: Option<ToolstackWidth>) -> Result<LegacyStart, LegacyError> {
    let as_64 = u64::from_le_bytes(first);
    let (width, got) = match width {
        None => return Ok(detect(first)?),
        Some(ToolstackWidth::Bits64) => (ToolstackWidth::Bits64, as_64),
        Some(ToolstackWidth::Bits32) => (ToolstackWidth::Bits32, as_64 & u64::from(u32::MAX)),
    };
    match u32::try_from(got) {
        Ok(p2m_size) if (1..=MAX_P2M_SIZE).contains(&p2m_size) => {
            Ok(LegacyStart { width, p2m_size })
        }
        _ => Err(LegacyError::P2mSize { got }),
    }
}
