//! HVM contexts, Xen's own list of device and vcpu state, and names of HVM parameters.
//!
//! | bytes | field of a record |
//! |---|---|
//! | 0–1 | type |
//! | 2–3 | instance: index of the vcpu, interrupt controller … |
//! | 4–7 | length of the body |
//! | 8… | body |
//!
//! Records follow each other without padding. A record with type 0 and length 0 ends the list.
//!
//! C: `struct hvm_save_descriptor` in `xen/include/public/hvm/save.h`,
//! `xen/include/public/arch-x86/hvm/save.h`, `xen/include/public/hvm/params.h`;
//! `hvm_load` in `xen/arch/x86/hvm/save.c`.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt;

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FieldDifference, Layout, diff};
use crate::byte_order::ByteOrder;
use crate::wire::{U16, U32};

mod layouts;
mod params;

pub use params::param_name;

/// The header of each record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireDescriptor {
    kind: U16,
    instance: U16,
    length: U32,
}

const _: () = assert!(size_of::<WireDescriptor>() == 8);

/// A broken rule of the HVM context, or of a record in it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum FieldError {
    /// More entries than any context has.
    #[error(
        "HVM context: another entry at byte {offset:#x}, expected at most {MAX_ENTRIES} entries"
    )]
    TooManyEntries {
        /// Offset of the entry.
        offset: usize,
    },
    /// The context ends without its END record.
    #[error(
        "HVM context: {left} bytes are left at byte {offset:#x}, expected at least 8: the context has no END"
    )]
    NoEnd {
        /// Offset where a record is expected.
        offset: usize,
        /// Bytes from there on.
        left: usize,
    },
    /// A record that is longer than the rest of the context.
    #[error(
        "HVM context: {kind} (instance {instance}) at byte {offset:#x} has a body of {length} bytes, but only {left} are left"
    )]
    BodyTooLong {
        /// The record.
        kind: HvmRecordKind,
        /// Its instance.
        instance: u16,
        /// Its offset.
        offset: usize,
        /// Its length field.
        length: u32,
        /// Bytes that are left.
        left: usize,
    },
    /// An END that is not empty.
    #[error("HVM context: END at byte {offset:#x} has a body of {length} bytes, expected 0")]
    EndNotEmpty {
        /// Its offset.
        offset: usize,
        /// Its length field.
        length: u32,
    },
    /// Bytes after END.
    #[error("HVM context: {bytes} bytes after END (byte {offset:#x}), expected none")]
    AfterEnd {
        /// Their offset.
        offset: usize,
        /// How many there are.
        bytes: usize,
    },
    /// A context that does not begin with HEADER, or whose HEADER Xen refuses.
    #[error("HVM context: it begins with {kind} of {length} bytes, expected HEADER of 24")]
    NoHeader {
        /// The first record.
        kind: HvmRecordKind,
        /// Length of its body.
        length: usize,
    },
    /// A HEADER with another magic number or version.
    #[error(
        "HVM context: HEADER has magic {magic:#010x} and version {version}, expected 0x54381286 and 1"
    )]
    HeaderFields {
        /// The magic number.
        magic: u32,
        /// The version.
        version: u32,
    },
    /// A vcpu that no HVM guest can have.
    #[error(
        "HVM context: {kind} (instance {instance}) at byte {offset:#x}: an HVM guest has vcpus 0 to 127"
    )]
    VcpuNumber {
        /// The record.
        kind: HvmRecordKind,
        /// Its instance.
        instance: u16,
        /// Its offset.
        offset: usize,
    },
    /// State that occurs twice.
    #[error("HVM context: {kind} (instance {instance}) comes twice, again at byte {offset:#x}")]
    Twice {
        /// The record.
        kind: HvmRecordKind,
        /// Its instance.
        instance: u16,
        /// Offset of the second.
        offset: usize,
    },
    /// A CPU record without all registers.
    #[error(
        "HVM context: CPU (instance {instance}) at byte {offset:#x} has {length} bytes, expected at least {CPU_LEAST}"
    )]
    CpuTooShort {
        /// The vcpu.
        instance: u16,
        /// Its offset.
        offset: usize,
        /// Length of its body.
        length: usize,
    },
}

/// Length of a CPU record up to and including EFER, the last register that is read from it. Xen
/// accepts bodies shorter than its own and pads them with zeros, so records of older versions can
/// be read.
pub const CPU_LEAST: usize = 1000;

/// Maximum number of vcpus of an HVM guest: Xen's `HVM_MAX_VCPUS`.
const MAX_VCPUS: u16 = 128;

/// Maximum number of entries in an HVM context. Xen writes about a dozen for each vcpu and a few
/// dozen more.
pub const MAX_ENTRIES: usize = 1 << 16;

/// Facts about an HVM context.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContextFacts {
    /// The vcpus that have a CPU record, in the order of the context.
    pub cpus: Vec<u16>,
    /// Kinds without a name in this crate. A Xen that does not know them either refuses the
    /// context.
    pub unknown: Vec<HvmRecordKind>,
    /// An oddity at its end, where Xen does not look.
    pub odd_end: Option<FieldError>,
}

/// Checks the framing of an HVM context as Xen does before it loads one, and that each vcpu can
/// exist and occurs once.
///
/// # Errors
///
/// The broken rule. Bytes after END, and the length of END, are not errors, as Xen ignores them.
pub fn check_context(context: &[u8]) -> Result<ContextFacts, FieldError> {
    let mut facts = ContextFacts::default();
    let mut seen = HashSet::new();
    for record in HvmContext::new(context) {
        let record = match record {
            Ok(record) => record,
            Err(e @ (FieldError::EndNotEmpty { .. } | FieldError::AfterEnd { .. })) => {
                facts.odd_end = Some(e);
                break;
            }
            Err(e) => return Err(e),
        };
        let HvmRecord {
            kind,
            instance,
            offset,
            body,
        } = record;
        let length = body.len();
        if seen.len() >= MAX_ENTRIES {
            return Err(FieldError::TooManyEntries { offset });
        }
        if offset == 0 {
            check_header(kind, body)?;
        }
        if kind.is_of_vcpu() && instance >= MAX_VCPUS {
            return Err(FieldError::VcpuNumber {
                kind,
                instance,
                offset,
            });
        }
        if !seen.insert((kind, instance)) {
            return Err(FieldError::Twice {
                kind,
                instance,
                offset,
            });
        }
        if kind == HvmRecordKind::CPU {
            if length < CPU_LEAST {
                return Err(FieldError::CpuTooShort {
                    instance,
                    offset,
                    length,
                });
            }
            facts.cpus.push(instance);
        }
        if kind.name().is_none() && facts.unknown.last() != Some(&kind) {
            facts.unknown.push(kind);
        }
    }
    if seen.is_empty() {
        // Only END.
        let (kind, length) = (HvmRecordKind::END, 0);
        return Err(FieldError::NoHeader { kind, length });
    }
    Ok(facts)
}

fn check_header(kind: HvmRecordKind, body: &[u8]) -> Result<(), FieldError> {
    const MAGIC: u32 = 0x5438_1286;
    const VERSION: u32 = 1;
    const LE: ByteOrder = ByteOrder::Little;
    let length = body.len();
    let no_header = FieldError::NoHeader { kind, length };
    if kind != HvmRecordKind::HEADER || length != layouts::HEADER.bytes {
        return Err(no_header);
    }
    let (fields, _) = <[U32; 2]>::ref_from_prefix(body).map_err(|_| no_header)?;
    let [magic, version] = fields.map(|field| field.get(LE));
    if (magic, version) != (MAGIC, VERSION) {
        return Err(FieldError::HeaderFields { magic, version });
    }
    Ok(())
}

/// The type of a record in an HVM context. Open: every value can be represented.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HvmRecordKind(pub u16);

macro_rules! kinds {
    ($($name:ident = $value:literal),* $(,)?) => {
        impl HvmRecordKind {
            $(
                #[doc = concat!("`", stringify!($name), "` of Xen's headers.")]
                pub const $name: Self = Self($value);
            )*

            /// The kinds that have a name.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The name in Xen's headers.
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

kinds! {
    END = 0,
    HEADER = 1,
    CPU = 2,
    PIC = 3,
    IOAPIC = 4,
    LAPIC = 5,
    LAPIC_REGS = 6,
    PCI_IRQ = 7,
    ISA_IRQ = 8,
    PCI_LINK = 9,
    PIT = 10,
    RTC = 11,
    HPET = 12,
    PMTIMER = 13,
    MTRR = 14,
    VIRIDIAN_DOMAIN = 15,
    CPU_XSAVE = 16,
    VIRIDIAN_VCPU = 17,
    VMCE_VCPU = 18,
    TSC_ADJUST = 19,
    CPU_MSR = 20,
}

impl HvmRecordKind {
    /// The layout of such a record with a body of `length` bytes; `None` if it has no fields or is
    /// unknown. The length tells which Xen wrote it.
    pub const fn layout(self, length: usize) -> Option<&'static Layout> {
        Some(match self {
            Self::HEADER => &layouts::HEADER,
            Self::CPU if length == layouts::CPU_COMPAT.bytes => &layouts::CPU_COMPAT,
            Self::CPU => &layouts::CPU,
            Self::PIC => &layouts::PIC,
            Self::IOAPIC => &layouts::IOAPIC,
            Self::LAPIC => &layouts::LAPIC,
            Self::LAPIC_REGS => &layouts::LAPIC_REGS,
            Self::PCI_IRQ => &layouts::PCI_IRQ,
            Self::ISA_IRQ => &layouts::ISA_IRQ,
            Self::PCI_LINK => &layouts::PCI_LINK,
            Self::PIT => &layouts::PIT,
            Self::RTC => &layouts::RTC,
            Self::HPET => &layouts::HPET,
            Self::PMTIMER => &layouts::PMTIMER,
            Self::MTRR => &layouts::MTRR,
            Self::VIRIDIAN_DOMAIN => &layouts::VIRIDIAN_DOMAIN,
            Self::CPU_XSAVE => &layouts::CPU_XSAVE,
            Self::VIRIDIAN_VCPU => &layouts::VIRIDIAN_VCPU,
            Self::VMCE_VCPU => &layouts::VMCE_VCPU,
            Self::TSC_ADJUST => &layouts::TSC_ADJUST,
            Self::CPU_MSR => &layouts::CPU_MSR,
            _ => return None,
        })
    }
}

impl HvmRecordKind {
    /// Whether the instance of such a record is a vcpu number.
    pub const fn is_of_vcpu(self) -> bool {
        matches!(
            self,
            Self::CPU
                | Self::LAPIC
                | Self::LAPIC_REGS
                | Self::MTRR
                | Self::CPU_XSAVE
                | Self::VIRIDIAN_VCPU
                | Self::VMCE_VCPU
                | Self::TSC_ADJUST
                | Self::CPU_MSR
        )
    }
}

impl fmt::Display for HvmRecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "unknown type {}", self.0),
        }
    }
}

impl fmt::Debug for HvmRecordKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HvmRecordKind({}, {self})", self.0)
    }
}

/// One record of an HVM context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HvmRecord<'a> {
    /// Its type.
    pub kind: HvmRecordKind,
    /// Its instance: the vcpu number, for most types.
    pub instance: u16,
    /// Its offset in the context.
    pub offset: usize,
    /// Its body.
    pub body: &'a [u8],
}

/// Iterator over the records of an HVM context, up to END. After an error it ends.
#[derive(Clone, Debug)]
pub struct HvmContext<'a> {
    rest: &'a [u8],
    offset: usize,
    over: bool,
}

impl<'a> HvmContext<'a> {
    /// A context: the body of an HVM_CONTEXT record.
    pub const fn new(context: &'a [u8]) -> Self {
        Self {
            rest: context,
            offset: 0,
            over: false,
        }
    }

    /// All records except END.
    ///
    /// # Errors
    ///
    /// A record does not fit, or END is missing or not the last record.
    pub fn records(context: &'a [u8]) -> Result<Vec<HvmRecord<'a>>, FieldError> {
        Self::new(context).collect()
    }

    fn next_record(&mut self) -> Result<Option<HvmRecord<'a>>, FieldError> {
        const LE: ByteOrder = ByteOrder::Little;
        let offset = self.offset;
        let Ok((wire, rest)) = WireDescriptor::ref_from_prefix(self.rest) else {
            let left = self.rest.len();
            return Err(FieldError::NoEnd { offset, left });
        };
        let kind = HvmRecordKind(wire.kind.get(LE));
        let instance = wire.instance.get(LE);
        let length = wire.length.get(LE);
        self.offset = offset.saturating_add(size_of::<WireDescriptor>());
        if kind == HvmRecordKind::END {
            if length != 0 {
                return Err(FieldError::EndNotEmpty { offset, length });
            }
            return match rest.len() {
                0 => Ok(None),
                bytes => Err(FieldError::AfterEnd {
                    offset: self.offset,
                    bytes,
                }),
            };
        }
        let Some((body, rest)) = rest.split_at_checked(length as usize) else {
            return Err(FieldError::BodyTooLong {
                kind,
                instance,
                offset,
                length,
                left: rest.len(),
            });
        };
        self.rest = rest;
        self.offset = self.offset.saturating_add(body.len());
        Ok(Some(HvmRecord {
            kind,
            instance,
            offset,
            body,
        }))
    }
}

impl<'a> Iterator for HvmContext<'a> {
    type Item = Result<HvmRecord<'a>, FieldError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.over {
            return None;
        }
        let next = self.next_record().transpose();
        self.over = !matches!(next, Some(Ok(_)));
        next
    }
}

/// One difference between two HVM contexts. Records are paired by kind and instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HvmDifference<'a> {
    /// A record that only the first has.
    OnlyInA(HvmRecord<'a>),
    /// A record that only the second has.
    OnlyInB(HvmRecord<'a>),
    /// A record that both have, with other contents.
    Fields {
        /// Its type.
        kind: HvmRecordKind,
        /// Its instance.
        instance: u16,
        /// The fields that differ.
        differences: Vec<FieldDifference<'a>>,
    },
}

/// How context `b` differs from context `a`: first the records of `a`, in its order, then those
/// that only `b` has. The order of the records does not matter.
///
/// # Errors
///
/// Either context cannot be parsed.
pub fn diff_contexts<'a>(a: &'a [u8], b: &'a [u8]) -> Result<Vec<HvmDifference<'a>>, FieldError> {
    /// For unknown kinds: no fields, so differences are reported as bytes.
    const UNKNOWN: Layout = Layout {
        name: "unknown",
        bytes: 0,
        fields: &[],
    };
    let a = HvmContext::records(a)?;
    let b = HvmContext::records(b)?;
    // Records that are not paired yet, by kind and instance, in order.
    let mut unpaired: HashMap<_, VecDeque<_>> = HashMap::new();
    for record in b {
        let key = (record.kind, record.instance);
        unpaired.entry(key).or_default().push_back(record);
    }
    let mut out = Vec::new();
    for a in a {
        let key = (a.kind, a.instance);
        let Some(b) = unpaired.get_mut(&key).and_then(VecDeque::pop_front) else {
            out.push(HvmDifference::OnlyInA(a));
            continue;
        };
        let layout = a.kind.layout(a.body.len()).unwrap_or(&UNKNOWN);
        let differences = diff(layout, a.body, b.body);
        if !differences.is_empty() {
            out.push(HvmDifference::Fields {
                kind: a.kind,
                instance: a.instance,
                differences,
            });
        }
    }
    let mut only_in_b: Vec<_> = unpaired.into_values().flatten().collect();
    only_in_b.sort_by_key(|record| record.offset);
    out.extend(only_in_b.into_iter().map(HvmDifference::OnlyInB));
    Ok(out)
}
