//! Tail of a checkpoint, kept until it is known to belong to the last complete one.

use super::{
    EmulatorId, EmulatorInstance, HvmParam, LegacyError, LibxlRecord, QemuRecord, ReadErrorCause,
    RecordWriter, XenstoreData,
};
use crate::frame::Page;
use crate::legacy::items::Vcpu;
use crate::record::RecordKind;
use crate::record::pv::PvInfo;

/// It is unknown which emulator wrote the state in a legacy stream.
const EMULATOR: EmulatorInstance = EmulatorInstance {
    id: EmulatorId::Unknown,
    index: 0,
};

/// What follows the pages in a stream of version 3.
#[derive(Clone, Debug, Default)]
pub(super) struct Tail {
    pub(super) params: Vec<HvmParam>,
    pub(super) magic: Option<[HvmParam; 3]>,
    pub(super) context: Vec<u8>,
    pub(super) vcpus: Vec<Vcpu>,
    pub(super) shared_info: Option<Box<Page>>,
    pub(super) xenstore: Vec<u8>,
    pub(super) qemu: Option<QemuRecord>,
    /// Pages of the next checkpoint are sent as differences.
    pub(super) compress_next: bool,
}

impl Tail {
    /// Writes it, up to END.
    pub(super) fn write(
        &self,
        writer: &mut RecordWriter<Vec<u8>>,
        info: PvInfo,
    ) -> Result<(), LegacyError> {
        writer.hvm_params(&self.params)?;
        for vcpu in &self.vcpus {
            for (kind, state) in [
                (RecordKind::X86_PV_VCPU_BASIC, &vcpu.basic),
                (RecordKind::X86_PV_VCPU_EXTENDED, &vcpu.extended),
                (RecordKind::X86_PV_VCPU_XSAVE, &vcpu.xsave),
            ] {
                writer.vcpu_state(kind, info, vcpu.vcpu, state)?;
            }
        }
        if let Some(page) = &self.shared_info {
            writer.shared_info(page)?;
        }
        if let Some(params) = &self.magic {
            writer.hvm_params(params)?;
            writer.hvm_context(&self.context)?;
        }
        writer.end()?;
        Ok(())
    }

    /// The records that follow in a libxl stream.
    pub(super) fn libxl_records(self) -> Result<Vec<LibxlRecord>, ReadErrorCause> {
        let mut records = Vec::new();
        if !self.xenstore.is_empty() {
            records.push(LibxlRecord::EmulatorXenstoreData {
                emulator: EMULATOR,
                data: XenstoreData::parse(self.xenstore)?,
            });
        }
        if let Some(record) = self.qemu {
            records.push(LibxlRecord::EmulatorContext {
                emulator: EMULATOR,
                state: record.state,
            });
        }
        records.push(LibxlRecord::End);
        Ok(records)
    }
}

impl QemuRecord {
    /// Encodes the record for a stream that does not end with the file.
    pub(super) fn write(&self, out: &mut Vec<u8>) -> Result<(), ReadErrorCause> {
        let length = u32::try_from(self.state.len());
        let length = length.map_err(|_| {
            ReadErrorCause::Bug("the reader has taken more than 4 GiB of a device model's state")
        })?;
        out.extend_from_slice(&Self::WITH_LENGTH);
        out.extend_from_slice(&length.to_le_bytes());
        out.extend_from_slice(&self.state);
        Ok(())
    }
}
