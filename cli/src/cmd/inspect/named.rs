//! The fields of the blobs in an image, for `xsr inspect --fields`.

use serde::Serialize;
use xsr_format::cpu_policy::CpuPolicy;
use xsr_format::fields::hvm::{HvmContext, param_name};
use xsr_format::fields::x86::{Register, arch_capabilities, features, leaf_name, msr_name};
use xsr_format::fields::{self, Layout, Value, pv};
use xsr_format::record::pv::PvInfo;
use xsr_format::record::{Body, Record, RecordKind};
use xsr_format::wrapper::libxl::LibxlRecord;

/// The MSR whose bits are features.
const ARCH_CAPABILITIES: u32 = 0x10a;

/// A blob, or an entry of one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Named {
    /// The record, and the entry in it.
    pub(crate) of: String,
    /// Its meaning, if it has more than a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) about: Option<&'static str>,
    pub(crate) fields: Vec<NamedField>,
}

/// A non-zero field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct NamedField {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl Named {
    fn new(of: String, about: Option<&'static str>, fields: Vec<NamedField>) -> Self {
        Self { of, about, fields }
    }

    fn laid_out(of: String, layout: &Layout, blob: &[u8]) -> Self {
        let fields = fields::fields(layout, blob)
            .filter(|field| !is_zero(&field.value))
            .map(|field| NamedField {
                name: field.name,
                value: field.value.to_string(),
            })
            .collect();
        Self::new(of, None, fields)
    }
}

fn is_zero(value: &Value<'_>) -> bool {
    match value {
        Value::Hex(n) | Value::Dec(n) => *n == 0,
        Value::Signed(n) => *n == 0,
        Value::Bytes(bytes) => bytes.iter().all(|byte| *byte == 0),
        Value::Text(text, _) => text.is_empty(),
    }
}

fn field(name: &str, value: String) -> NamedField {
    let name = name.to_owned();
    NamedField { name, value }
}

/// A field whose value is a list of names.
fn list(name: &str, names: impl Iterator<Item = String>) -> NamedField {
    field(name, names.collect::<Vec<_>>().join(", "))
}

/// The fields of a PV guest's start_info.
pub(super) fn of_start_info(page: &[u8], info: PvInfo) -> Named {
    let layout = match info {
        PvInfo::Bits64 => &pv::START_INFO_64,
        PvInfo::Bits32 => &pv::START_INFO_32,
    };
    Named::laid_out("start_info".to_owned(), layout, page)
}

/// The fields of a record of the libxc stream. `info` is the PV guest's.
pub(super) fn of_record(record: &Record<'_>, info: PvInfo) -> Vec<Named> {
    let kind = record.kind;
    match record.body {
        Body::Vcpu(vcpu) => {
            let layout = match (kind, info) {
                (RecordKind::X86_PV_VCPU_BASIC, PvInfo::Bits64) => &pv::VCPU_CONTEXT_64,
                (RecordKind::X86_PV_VCPU_BASIC, PvInfo::Bits32) => &pv::VCPU_CONTEXT_32,
                (RecordKind::X86_PV_VCPU_EXTENDED, _) => &pv::VCPU_EXTENDED,
                (RecordKind::X86_PV_VCPU_XSAVE, _) => &pv::VCPU_XSAVE,
                _ => &pv::VCPU_MSRS,
            };
            let of = format!("{kind} vcpu {}", vcpu.vcpu);
            vec![Named::laid_out(of, layout, vcpu.state)]
        }
        Body::SharedInfo(page) => {
            let layout = match info {
                PvInfo::Bits64 => &pv::SHARED_INFO_64,
                PvInfo::Bits32 => &pv::SHARED_INFO_32,
            };
            vec![Named::laid_out(kind.to_string(), layout, page.as_slice())]
        }
        Body::CpuidPolicy(policy) => policy
            .iter()
            .map(|leaf| {
                let of = match leaf.subleaf {
                    CpuPolicy::NO_SUBLEAF => format!("{kind} {:#x}", leaf.leaf),
                    subleaf => format!("{kind} {:#x}:{subleaf:#x}", leaf.leaf),
                };
                let registers = [
                    ("eax", Register::Eax, leaf.eax),
                    ("ebx", Register::Ebx, leaf.ebx),
                    ("ecx", Register::Ecx, leaf.ecx),
                    ("edx", Register::Edx, leaf.edx),
                ];
                let subleaf = match leaf.subleaf {
                    CpuPolicy::NO_SUBLEAF => 0,
                    subleaf => subleaf,
                };
                let mut fields = Vec::new();
                for (name, register, value) in registers {
                    if value == 0 {
                        continue;
                    }
                    fields.push(field(name, format!("{value:#010x}")));
                    let features = features(leaf.leaf, subleaf, register, value);
                    fields.extend(features.map(|f| list(&format!("{name} features"), f)));
                }
                fields.extend(text_of(leaf.leaf, registers.map(|(_, _, value)| value)));
                Named::new(of, leaf_name(leaf.leaf), fields)
            })
            .collect(),
        Body::MsrPolicy(policy) => policy
            .iter()
            .map(|msr| {
                let of = format!("{kind} {:#x}", msr.index);
                let mut fields = Vec::new();
                if msr.value != 0 {
                    fields.push(field("value", format!("{:#x}", msr.value)));
                    if msr.index == ARCH_CAPABILITIES {
                        fields.push(list("features", arch_capabilities(msr.value)));
                    }
                }
                Named::new(of, msr_name(msr.index), fields)
            })
            .collect(),
        Body::HvmContext(context) => HvmContext::new(context)
            .filter_map(Result::ok)
            .filter_map(|entry| {
                let layout = entry.kind.layout(entry.body.len())?;
                let of = format!("{kind} {} {}", entry.kind, entry.instance);
                Some(Named::laid_out(of, layout, entry.body))
            })
            .collect(),
        Body::HvmParams(params) => {
            let fields = params
                .iter()
                .filter(|param| param.value != 0)
                .map(|param| {
                    let name = match param_name(param.index) {
                        Some(name) => name.to_owned(),
                        None => format!("unknown parameter {}", param.index),
                    };
                    field(&name, format!("{:#x}", param.value))
                })
                .collect();
            vec![Named::new(kind.to_string(), None, fields)]
        }
        // Their row shows everything.
        Body::End
        | Body::PvInfo(_)
        | Body::P2mFrames(_)
        | Body::TscInfo(_)
        | Body::Verify
        | Body::Checkpoint
        | Body::StaticDataEnd
        | Body::Optional(_) => Vec::new(),
    }
}

/// The name of the vendor, the hypervisor or the processor, if the leaf spells one.
fn text_of(leaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Option<NamedField> {
    let registers = match leaf {
        0 | 0x8000_0000 => vec![ebx, edx, ecx],
        0x4000_0000 => vec![ebx, ecx, edx],
        0x8000_0002..=0x8000_0004 => vec![eax, ebx, ecx, edx],
        _ => return None,
    };
    let bytes: Vec<u8> = registers.iter().flat_map(|r| r.to_le_bytes()).collect();
    let text = bytes.trim_ascii_end();
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    (!text.is_empty()).then(|| field("text", format!("\"{}\"", text.escape_ascii())))
}

/// The fields of a record of the libxl stream, at most `most`.
pub(super) fn of_libxl(record: &LibxlRecord, most: usize) -> Vec<Named> {
    let LibxlRecord::EmulatorXenstoreData { emulator, data } = record else {
        return Vec::new();
    };
    let of = format!("{} {} {}", record.kind(), emulator.id, emulator.index);
    let shown = |bytes: &[u8]| bytes.escape_ascii().to_string();
    let mut pairs = data.iter();
    let named = pairs.by_ref().take(most);
    let mut fields: Vec<NamedField> = named
        .map(|(key, value)| field(&shown(key), format!("\"{}\"", shown(value))))
        .collect();
    let more = pairs.count();
    if more > 0 {
        fields.push(field("…", format!("{more} more")));
    }
    vec![Named::new(of, None, fields)]
}
