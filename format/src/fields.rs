//! Named fields of the blobs that a stream carries for Xen and the guest, for showing and comparing
//! images.
//!
//! A [`Layout`] gives the location of a structure's fields; [`fields`] reads a blob with it,
//! [`diff`] compares two. No field is read beyond the end of a blob: one that does not fit is left
//! out, since older Xens wrote shorter structures. The blobs are memory of an x86 machine, so they
//! are little endian whatever the stream's byte order.
//!
//! | blob | layout |
//! |---|---|
//! | start_info page | [`pv::START_INFO_64`], [`pv::START_INFO_32`] |
//! | SHARED_INFO | [`pv::SHARED_INFO_64`], [`pv::SHARED_INFO_32`] |
//! | X86_PV_VCPU_BASIC | [`pv::VCPU_CONTEXT_64`], [`pv::VCPU_CONTEXT_32`] |
//! | X86_PV_VCPU_EXTENDED, _XSAVE, _MSRS | [`pv::VCPU_EXTENDED`], `VCPU_XSAVE`, `VCPU_MSRS` |
//! | X86_TSC_INFO | [`x86::TSC_INFO`] |
//! | an entry of X86_CPUID_POLICY, X86_MSR_POLICY | [`x86::CPUID_LEAF`], [`x86::MSR_ENTRY`] |
//! | a register or MSR that holds features | [`x86::features`] |
//! | HVM_CONTEXT | [`hvm::HvmContext`], and a layout for each kind of record in it |
//! | HVM_PARAMS | [`hvm::param_name`] |
//!
//! Specification: Xen's public headers (`xen/include/public`), which define all of these
//! interfaces.

use std::fmt;
use std::ops::Range;

mod diff;
pub mod hvm;
pub mod pv;
pub mod x86;

pub use diff::{FieldDifference, diff};

/// A structure: its name, its length, and its fields in ascending order.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The name in Xen's headers.
    pub name: &'static str,
    /// Its length in bytes; a blob may be shorter or longer.
    pub bytes: usize,
    /// The fields. They do not cover padding and reserved bytes.
    pub fields: &'static [FieldSpec],
}

/// A field of a structure.
#[derive(Clone, Copy, Debug)]
pub struct FieldSpec {
    /// Its name in Xen's headers.
    pub name: &'static str,
    /// Offset in the structure.
    pub offset: usize,
    /// The field's type.
    pub shape: Shape,
}

/// The type of a field.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A number of `width` bytes, 1 to 8.
    Number {
        /// Bytes.
        width: usize,
        /// How to show it.
        format: Format,
    },
    /// Opaque bytes.
    Bytes {
        /// How many.
        length: usize,
    },
    /// Text, up to the first NUL.
    Text {
        /// Size of its buffer in bytes.
        length: usize,
    },
    /// A nested structure; names are joined with a dot.
    Struct(&'static [FieldSpec]),
    /// An array of `count` elements; names get an index in brackets.
    Array {
        /// Number of elements, or [`TO_END`].
        count: usize,
        /// Bytes from one element to the next.
        stride: usize,
        /// Type of an element.
        element: &'static Shape,
    },
}

/// As many elements as the blob has room for.
pub const TO_END: usize = usize::MAX;

/// How to show a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Hexadecimal: addresses, frames, registers, flags.
    Hex,
    /// Decimal: counts, times, event channels.
    Dec,
    /// Decimal, in two's complement.
    Signed,
}

/// A field of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field<'a> {
    /// Its full name, with those of enclosing structures and indices: `vcpu_info[0].time.version`.
    pub name: String,
    /// Offset in the blob.
    pub offset: usize,
    /// Its value.
    pub value: Value<'a>,
}

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// A number to be shown in hexadecimal.
    Hex(u64),
    /// A number to be shown in decimal.
    Dec(u64),
    /// A number with a sign.
    Signed(i64),
    /// Bytes.
    Bytes(&'a [u8]),
    /// The bytes before the first NUL, which should be ASCII, and the bytes from the NUL on.
    Text(&'a [u8], &'a [u8]),
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hex(value) => write!(f, "{value:#x}"),
            Self::Dec(value) => write!(f, "{value}"),
            Self::Signed(value) => write!(f, "{value}"),
            Self::Bytes(bytes) => write_bytes(f, bytes),
            Self::Text(text, _) => write!(f, "\"{}\"", text.escape_ascii()),
        }
    }
}

/// Writes bytes in hexadecimal; if there are many, the first few and the total.
fn write_bytes(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    const SHOWN: usize = 16;
    for byte in bytes.iter().take(SHOWN) {
        write!(f, "{byte:02x}")?;
    }
    match bytes.len() > SHOWN {
        true => write!(f, "… ({} bytes)", bytes.len()),
        false => Ok(()),
    }
}

/// The fields of a blob, in the order of the layout. Fields that do not fit into it are left out.
pub fn fields<'a>(layout: &Layout, blob: &'a [u8]) -> impl Iterator<Item = Field<'a>> + use<'a> {
    with_ranges(layout, blob)
        .into_iter()
        .map(|(field, _)| field)
}

/// Like [`fields`], each with its range of bytes in the blob.
fn with_ranges<'a>(layout: &Layout, blob: &'a [u8]) -> Vec<(Field<'a>, Range<usize>)> {
    let mut out = Vec::new();
    for spec in layout.fields {
        let name = spec.name.to_owned();
        collect(name, spec.offset, &spec.shape, blob, &mut out);
    }
    out
}

fn collect<'a>(
    name: String,
    offset: usize,
    shape: &Shape,
    blob: &'a [u8],
    out: &mut Vec<(Field<'a>, Range<usize>)>,
) {
    let mut leaf = |length: usize, value: &dyn Fn(&'a [u8]) -> Value<'a>| {
        let range = offset..offset.saturating_add(length);
        if let Some(bytes) = blob.get(range.clone()) {
            let value = value(bytes);
            let field = Field {
                name: name.clone(),
                offset,
                value,
            };
            out.push((field, range));
        }
    };
    match *shape {
        Shape::Number { width, format } => leaf(width, &|bytes| number(bytes, format)),
        Shape::Bytes { length } => leaf(length, &Value::Bytes),
        Shape::Text { length } => leaf(length, &|bytes| {
            let end = bytes.iter().position(|byte| *byte == 0);
            let (text, rest) = bytes
                .split_at_checked(end.unwrap_or(bytes.len()))
                .unwrap_or((bytes, &[]));
            Value::Text(text, rest)
        }),
        Shape::Struct(fields) => {
            for spec in fields {
                let name = format!("{name}.{}", spec.name);
                let offset = offset.saturating_add(spec.offset);
                collect(name, offset, &spec.shape, blob, out);
            }
        }
        Shape::Array {
            count,
            stride,
            element,
        } => {
            // Both bounds matter: no element begins beyond the blob, so a count of TO_END stops
            // there.
            let begins = (offset..blob.len()).step_by(stride.max(1));
            for (index, offset) in begins.take(count).enumerate() {
                collect(format!("{name}[{index}]"), offset, element, blob, out);
            }
        }
    }
}

fn number<'a>(bytes: &[u8], format: Format) -> Value<'a> {
    let mut wide = [0; 8];
    for (to, from) in wide.iter_mut().zip(bytes) {
        *to = *from;
    }
    match format {
        Format::Hex => Value::Hex(u64::from_le_bytes(wide)),
        Format::Dec => Value::Dec(u64::from_le_bytes(wide)),
        Format::Signed => {
            let negative = bytes.last().is_some_and(|top| top >> 7 != 0);
            for byte in wide.iter_mut().skip(bytes.len()) {
                *byte = if negative { 0xff } else { 0 };
            }
            Value::Signed(i64::from_le_bytes(wide))
        }
    }
}

const fn number_spec(name: &'static str, offset: usize, width: usize, format: Format) -> FieldSpec {
    assert!(width >= 1 && width <= 8);
    FieldSpec {
        name,
        offset,
        shape: Shape::Number { width, format },
    }
}

const fn hex(name: &'static str, offset: usize, width: usize) -> FieldSpec {
    number_spec(name, offset, width, Format::Hex)
}

const fn dec(name: &'static str, offset: usize, width: usize) -> FieldSpec {
    number_spec(name, offset, width, Format::Dec)
}

const fn signed(name: &'static str, offset: usize, width: usize) -> FieldSpec {
    number_spec(name, offset, width, Format::Signed)
}

const fn bytes(name: &'static str, offset: usize, length: usize) -> FieldSpec {
    FieldSpec {
        name,
        offset,
        shape: Shape::Bytes { length },
    }
}

const fn text(name: &'static str, offset: usize, length: usize) -> FieldSpec {
    FieldSpec {
        name,
        offset,
        shape: Shape::Text { length },
    }
}

const fn array(
    name: &'static str,
    offset: usize,
    count: usize,
    stride: usize,
    element: &'static Shape,
) -> FieldSpec {
    assert!(stride >= 1);
    FieldSpec {
        name,
        offset,
        shape: Shape::Array {
            count,
            stride,
            element,
        },
    }
}

const HEX_64: &Shape = &Shape::Number {
    width: 8,
    format: Format::Hex,
};

const HEX_32: &Shape = &Shape::Number {
    width: 4,
    format: Format::Hex,
};
