//! The facts of one record, for the text and JSON outputs.

use std::fmt;

use serde::Serialize;
use xsr_format::fields::{self, pv};
use xsr_format::record::page_data::Entries;
use xsr_format::record::{Body, Record, RecordKind};
use xsr_format::wrapper::libxl::LibxlRecord;

use crate::page_map::{TypeCounts, runs_of};
use crate::text::{Count, hex, pfn_range};

/// The facts of one record. In JSON only the fields appear, because the record's kind says which
/// they are.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum RecordFacts {
    /// PAGE_DATA: one record, or several consecutive ones.
    Pages(PageFacts),
    /// X86_PV_INFO.
    PvInfo { guest_bits: u8, levels: u8 },
    /// X86_PV_P2M_FRAMES.
    P2mFrames {
        first_pfn: u64,
        last_pfn: u64,
        frames: usize,
    },
    /// X86_PV_VCPU_*.
    Vcpu {
        vcpu: u32,
        state_bytes: usize,
        /// The vcpu's position, in X86_PV_VCPU_BASIC only.
        #[serde(skip_serializing_if = "Option::is_none")]
        instruction_pointer: Option<u64>,
    },
    /// X86_TSC_INFO.
    Tsc {
        mode: u32,
        khz: u32,
        nsec: u64,
        incarnation: u32,
    },
    /// X86_CPUID_POLICY.
    Cpuid { leaves: usize },
    /// X86_MSR_POLICY.
    Msrs { msrs: usize },
    /// HVM_CONTEXT.
    HvmContext { entries: usize },
    /// HVM_PARAMS.
    HvmParams { params: usize },
    /// EMULATOR_XENSTORE_DATA, EMULATOR_CONTEXT.
    Emulator {
        emulator: String,
        index: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        keys: Option<usize>,
        data_bytes: usize,
    },
    /// CHECKPOINT_STATE.
    CheckpointState { state: u32 },
    /// A record without contents.
    None {},
}

/// The facts of consecutive PAGE_DATA records.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PageFacts {
    /// How many records.
    records: u64,
    /// Entries in them.
    entries: u64,
    /// Lowest pfn.
    first_pfn: u64,
    /// Highest pfn.
    last_pfn: u64,
    /// Entries of each type.
    types: Vec<TypeFact>,
    /// Every entry, if requested.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) runs: Option<Vec<RunFact>>,
    #[serde(skip)]
    counts: TypeCounts,
}

/// The number of entries of a type.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct TypeFact {
    #[serde(rename = "type")]
    pub(crate) name: &'static str,
    pub(crate) pages: u64,
}

/// Neighbouring pfns of one type.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct RunFact {
    pub(crate) first_pfn: u64,
    pub(crate) last_pfn: u64,
    #[serde(rename = "type")]
    pub(crate) name: &'static str,
}

/// The counts, as JSON has them.
pub(crate) fn type_facts(counts: &TypeCounts) -> Vec<TypeFact> {
    counts
        .iter()
        .map(|(page_type, pages)| TypeFact {
            name: page_type.name(),
            pages,
        })
        .collect()
}

impl PageFacts {
    /// The facts of one record. With `list`, they include its entries.
    pub(crate) fn new(entries: Entries<'_>, list: bool) -> Self {
        let mut counts = TypeCounts::default();
        let (mut first_pfn, mut last_pfn) = (u64::MAX, 0);
        for entry in entries.iter() {
            counts.add(entry.page_type, 1);
            first_pfn = first_pfn.min(entry.pfn.0);
            last_pfn = last_pfn.max(entry.pfn.0);
        }
        let runs = list.then(|| {
            runs_of(entries.iter(), 0)
                .map(|run| RunFact {
                    first_pfn: run.first,
                    last_pfn: run.last,
                    name: run.page_type.name(),
                })
                .collect()
        });
        Self {
            records: 1,
            entries: counts.total(),
            first_pfn,
            last_pfn,
            types: type_facts(&counts),
            runs,
            counts,
        }
    }

    /// Add the facts of the next record.
    pub(crate) fn join(&mut self, next: &Self) {
        self.records += next.records;
        self.first_pfn = self.first_pfn.min(next.first_pfn);
        self.last_pfn = self.last_pfn.max(next.last_pfn);
        for (page_type, pages) in next.counts.iter() {
            self.counts.add(page_type, pages);
        }
        self.entries = self.counts.total();
        self.types = type_facts(&self.counts);
    }

    /// The number of records.
    pub(crate) fn records(&self) -> u64 {
        self.records
    }
}

impl RecordFacts {
    /// The facts of any record except PAGE_DATA.
    pub(crate) fn of(record: &Record<'_>) -> Self {
        match record.body {
            Body::PvInfo(info) => Self::PvInfo {
                guest_bits: info.width() * 8,
                levels: info.levels(),
            },
            Body::P2mFrames(p2m) => Self::P2mFrames {
                first_pfn: p2m.start.0,
                last_pfn: p2m.end.0,
                frames: p2m.frames().len(),
            },
            Body::Vcpu(vcpu) => Self::Vcpu {
                vcpu: vcpu.vcpu,
                state_bytes: vcpu.state.len(),
                instruction_pointer: instruction_pointer(record.kind, vcpu.state),
            },
            Body::TscInfo(tsc) => Self::Tsc {
                mode: tsc.mode,
                khz: tsc.khz,
                nsec: tsc.nsec,
                incarnation: tsc.incarnation,
            },
            Body::CpuidPolicy(policy) => Self::Cpuid {
                leaves: policy.iter().len(),
            },
            Body::MsrPolicy(policy) => Self::Msrs {
                msrs: policy.iter().len(),
            },
            Body::HvmParams(params) => Self::HvmParams {
                params: params.iter().len(),
            },
            // The entries of a context are counted when they are listed.
            Body::HvmContext(_)
            | Body::End
            | Body::SharedInfo(_)
            | Body::Verify
            | Body::Checkpoint
            | Body::StaticDataEnd
            | Body::Optional(_) => Self::None {},
        }
    }
}

impl RecordFacts {
    /// The facts of a record of the libxl stream.
    pub(crate) fn of_libxl(record: &LibxlRecord) -> Self {
        match record {
            LibxlRecord::EmulatorXenstoreData { emulator, data } => Self::Emulator {
                emulator: emulator.id.to_string(),
                index: emulator.index,
                keys: Some(data.iter().count()),
                data_bytes: data.as_bytes().len(),
            },
            LibxlRecord::EmulatorContext { emulator, state } => Self::Emulator {
                emulator: emulator.id.to_string(),
                index: emulator.index,
                keys: None,
                data_bytes: state.len(),
            },
            LibxlRecord::CheckpointState(state) => Self::CheckpointState {
                state: state.value(),
            },
            _ => Self::None {},
        }
    }
}

impl fmt::Display for RecordFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pages(pages) => pages.fmt(f),
            Self::PvInfo { guest_bits, levels } => {
                write!(f, "{guest_bits}-bit guest, {levels} levels of page tables")
            }
            Self::P2mFrames {
                first_pfn,
                last_pfn,
                frames,
            } => write!(
                f,
                "pfns {}, in {}",
                pfn_range(*first_pfn, *last_pfn),
                Count(*frames, "frame")
            ),
            Self::Vcpu {
                vcpu,
                state_bytes,
                instruction_pointer,
            } => {
                write!(f, "vcpu {vcpu}, {}", Count(*state_bytes, "byte"))?;
                match instruction_pointer {
                    Some(at) => write!(f, ", at {at:#x}"),
                    None => Ok(()),
                }
            }
            Self::Tsc {
                mode,
                khz,
                nsec,
                incarnation,
            } => write!(
                f,
                "mode {mode} ({}), {}.{:03} MHz, {}.{:09} s, incarnation {incarnation}",
                tsc_mode(*mode),
                khz / 1000,
                khz % 1000,
                nsec / 1_000_000_000,
                nsec % 1_000_000_000
            ),
            Self::Cpuid { leaves } => write!(f, "{}", Count(*leaves, "leaf")),
            Self::Msrs { msrs } => write!(f, "{}", Count(*msrs, "MSR")),
            Self::HvmContext { entries } => write!(f, "{}", Count(*entries, "entry")),
            Self::HvmParams { params } => write!(f, "{}", Count(*params, "parameter")),
            Self::Emulator {
                emulator,
                index,
                keys,
                data_bytes,
            } => {
                write!(f, "{emulator}, index {index}, ")?;
                match keys {
                    Some(keys) => write!(f, "{}", Count(*keys, "key")),
                    None => write!(f, "{}", Count(*data_bytes, "byte")),
                }
            }
            Self::CheckpointState { state } => write!(f, "state {state}"),
            Self::None {} => Ok(()),
        }
    }
}

impl fmt::Display for PageFacts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfns {}:", pfn_range(self.first_pfn, self.last_pfn))?;
        for (i, (page_type, pages)) in self.counts.iter().enumerate() {
            let separator = if i == 0 { "" } else { "," };
            write!(f, "{separator} {pages} {page_type}")?;
        }
        Ok(())
    }
}

/// Where a PV vcpu was, if the blob is its basic context.
fn instruction_pointer(kind: RecordKind, state: &[u8]) -> Option<u64> {
    if kind != RecordKind::X86_PV_VCPU_BASIC {
        return None;
    }
    let (layout, name) = match state.len() == pv::VCPU_CONTEXT_32.bytes {
        true => (&pv::VCPU_CONTEXT_32, "user_regs.eip"),
        false => (&pv::VCPU_CONTEXT_64, "user_regs.rip"),
    };
    match fields::fields(layout, state)
        .find(|field| field.name == name)?
        .value
    {
        fields::Value::Hex(at) => Some(at),
        _ => None,
    }
}

/// The name of a TSC mode.
fn tsc_mode(mode: u32) -> &'static str {
    match mode {
        0 => "default",
        1 => "always emulated",
        2 => "native",
        3 => "rdtscp",
        _ => "unknown",
    }
}

/// A record kind in JSON: its name, or its number if it has none.
pub(crate) fn kind_name(kind: RecordKind) -> String {
    kind.name()
        .map_or_else(|| hex(u64::from(kind.0)), str::to_owned)
}
