//! The emulators of a domain that is protected: what each checkpoint has of them.

use xsr_format::wrapper::libxl::{EmulatorId, EmulatorInstance, LibxlRecord};
use xsr_save_restore::migrate::checkpoints::Emulators;
use xsr_xen_backend::GuestKind;

/// What the device model of a domain has in each checkpoint.
#[derive(Debug)]
pub(super) struct DeviceModel {
    records: Vec<LibxlRecord>,
    /// Whether it is one of the mock machine's, which counts how often it was saved. What is
    /// kept of a real one is what it had when the domain was made.
    counts: bool,
    saves: u64,
}

/// What the state of a mock device model begins with. The count follows, of 8 bytes.
const COUNTS: &[u8] = b"xsr mock device model: ";

impl DeviceModel {
    /// With what is kept of it; an HVM guest that has none gets one of the mock machine's.
    pub(super) fn of(kind: GuestKind, records: Vec<LibxlRecord>) -> Self {
        let mut model = Self {
            records,
            counts: false,
            saves: 0,
        };
        if kind == GuestKind::Hvm && model.records.is_empty() {
            model.records.push(LibxlRecord::EmulatorContext {
                emulator: EmulatorInstance {
                    id: EmulatorId::QemuUpstream,
                    index: 0,
                },
                state: COUNTS.to_vec(),
            });
        }
        if let [LibxlRecord::EmulatorContext { state, .. }] = model.records.as_slice() {
            model.counts = state.starts_with(COUNTS);
        }
        model
    }
}

impl Emulators for DeviceModel {
    fn save(&mut self) -> &[LibxlRecord] {
        self.saves += 1;
        if self.counts
            && let [LibxlRecord::EmulatorContext { state, .. }] = self.records.as_mut_slice()
        {
            state.truncate(COUNTS.len());
            state.extend(self.saves.to_le_bytes());
        }
        &self.records
    }
}
