//! Tail of a legacy stream: what follows the chunks.
//!
//! C implementation: `buffer_tail_pv`, `buffer_tail_hvm` in
//! `tools/libxc/xc_domain_restore.c` (Xen 4.5).

use super::{Item, LegacyError, LegacyReader, Read, ReadErrorCause, State};
use crate::decoder::MAX_HVM_CONTEXT;
use crate::frame::PAGE_SIZE;
use crate::legacy::items::{QemuRecord, Vcpu};
use crate::record::hvm::HvmParam;
use crate::source::fill;

const EXTENDED_BYTES: u64 = 128;
/// Size of the header of each XSAVE area: mask and size.
const XSAVE_HEAD: u64 = 16;
/// The most bytes of a device model's state. It holds the memory of a video card, 16 MiB by default,
/// and little else.
const MAX_DEVICE_MODEL: u64 = 64 << 20;

/// `HVM_PARAM_IOREQ_PFN`, `HVM_PARAM_BUFIOREQ_PFN`, `HVM_PARAM_STORE_PFN`.
const MAGIC: [u64; 3] = [5, 6, 1];

impl<R: Read> LegacyReader<R> {
    pub(super) fn unmapped(&mut self) -> Result<Item, ReadErrorCause> {
        let count = self.u32()?;
        let most = u64::from(self.start.p2m_size);
        Self::range("number of pfns without memory", count.into(), 0, most)?;
        self.pass_over(u64::from(count).saturating_mul(self.long_bytes()))?;
        self.state = State::Vcpu(0);
        Ok(Item::Unmapped { count })
    }

    pub(super) fn vcpu(&mut self, index: usize) -> Result<Item, ReadErrorCause> {
        let Some(vcpu) = self.vcpus.get(index).copied() else {
            return Err(ReadErrorCause::Bug("a vcpu is read that was not announced"));
        };
        let basic = match self.pv_info().width() {
            8 => 0x1430,
            _ => 0xaf0,
        };
        let basic = self.blob(basic)?;
        let extended = self.blob(match self.extended.extended {
            true => EXTENDED_BYTES,
            false => 0,
        })?;
        let mut xsave = Vec::new();
        if self.extended.xsave != 0 {
            self.take::<8>()?;
            let got = self.u64()?;
            let expected = u64::from(self.extended.xsave).saturating_sub(XSAVE_HEAD);
            if got != expected {
                return Err(LegacyError::XsaveLength {
                    vcpu,
                    expected,
                    got,
                }
                .into());
            }
            xsave = self.blob(got)?;
        }
        let next = index.saturating_add(1);
        self.state = match next < self.vcpus.len() {
            true => State::Vcpu(next),
            false => State::SharedInfo,
        };
        Ok(Item::Vcpu(Vcpu {
            vcpu,
            basic,
            extended,
            xsave,
        }))
    }

    pub(super) fn shared_info(&mut self) -> Result<Item, ReadErrorCause> {
        let mut page = Box::new([0; PAGE_SIZE]);
        self.fill(page.as_mut_slice())?;
        self.state = State::CheckpointEnd;
        Ok(Item::SharedInfo(page))
    }

    pub(super) fn magic_pfns(&mut self) -> Result<Item, ReadErrorCause> {
        let values = [self.u64()?, self.u64()?, self.u64()?];
        let [ioreq, bufioreq, store] = MAGIC;
        let [a, b, c] = values;
        self.state = State::HvmContext;
        Ok(Item::MagicPfns(
            [(ioreq, a), (bufioreq, b), (store, c)].map(|(index, value)| HvmParam { index, value }),
        ))
    }

    pub(super) fn hvm_context(&mut self) -> Result<Item, ReadErrorCause> {
        let bytes = u64::from(self.u32()?);
        Self::range("length of the HVM context", bytes, 1, MAX_HVM_CONTEXT)?;
        let context = self.blob(bytes)?;
        self.state = match self.options.device_model {
            true => State::Qemu,
            false => State::CheckpointEnd,
        };
        Ok(Item::HvmContext(context))
    }

    pub(super) fn qemu(&mut self) -> Result<Item, ReadErrorCause> {
        let signature = self.take()?;
        let state = match signature {
            QemuRecord::UP_TO_THE_END => {
                // Nothing can follow a state that ends with the file.
                self.last = true;
                self.up_to_the_end()?
            }
            QemuRecord::WITH_LENGTH | QemuRecord::REMUS => {
                let bytes = u64::from(self.u32()?);
                Self::device_model(bytes)?;
                self.blob(bytes)?
            }
            got => return Err(LegacyError::QemuSignature { got }.into()),
        };
        self.state = State::CheckpointEnd;
        Ok(Item::Qemu(QemuRecord { signature, state }))
    }

    /// Reads the rest of the source.
    fn up_to_the_end(&mut self) -> Result<Vec<u8>, ReadErrorCause> {
        const STEP: usize = 64 << 10;
        let mut state = Vec::new();
        loop {
            let at = state.len();
            if at as u64 >= MAX_DEVICE_MODEL {
                // No room is made for what would be refused.
                return match fill(&mut self.source, &mut [0]) {
                    Ok(()) => Self::device_model(at.saturating_add(1) as u64).map(|()| state),
                    Err(ReadErrorCause::Truncated { .. }) => Ok(state),
                    Err(e) => Err(e),
                };
            }
            state.resize(at.saturating_add(STEP), 0);
            let (_, room) = state.split_at_mut(at);
            let got = match fill(&mut self.source, room) {
                Ok(()) => STEP,
                Err(ReadErrorCause::Truncated { needed }) => {
                    STEP.saturating_sub(usize::try_from(needed).unwrap_or(STEP))
                }
                Err(e) => return Err(e),
            };
            state.truncate(at.saturating_add(got));
            self.offset = self.offset.saturating_add(got as u64);
            if got < STEP {
                return Ok(state);
            }
        }
    }

    /// Checks the length of a device model's state.
    fn device_model(bytes: u64) -> Result<(), ReadErrorCause> {
        Self::range(
            "length of the device model's state",
            bytes,
            0,
            MAX_DEVICE_MODEL,
        )?;
        Ok(())
    }
}
