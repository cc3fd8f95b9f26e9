//! Differences between two blobs, by field, and in bytes that belong to no field.

use std::fmt;
use std::ops::Range;

use super::{Field, Layout, with_ranges, write_bytes};

/// One difference between two blobs of the same layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FieldDifference<'a> {
    /// A field that both blobs have.
    Field {
        /// In the first blob.
        a: Field<'a>,
        /// In the second blob, with the same name and offset.
        b: Field<'a>,
    },
    /// A run of bytes outside all fields, of which each differs.
    Bytes {
        /// Offset of the run.
        offset: usize,
        /// In the first blob.
        a: &'a [u8],
        /// In the second blob; the same length.
        b: &'a [u8],
    },
    /// The blobs have different lengths. The excess is not compared.
    Length {
        /// Length of the first blob.
        a: usize,
        /// Length of the second blob.
        b: usize,
    },
}

impl fmt::Display for FieldDifference<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Field { a, b } => write!(f, "{}: {} → {}", a.name, a.value, b.value),
            Self::Bytes { offset, a, b } => {
                let last = offset.saturating_add(a.len()).saturating_sub(1);
                write!(f, "bytes {offset:#x}–{last:#x}: ")?;
                write_bytes(f, a)?;
                f.write_str(" → ")?;
                write_bytes(f, b)
            }
            Self::Length { a, b } => write!(f, "length: {a} → {b}"),
        }
    }
}

/// How `b` differs from `a`; empty if they are equal. In the order of the layout: fields, then
/// bytes outside fields, then the length.
pub fn diff<'a>(layout: &Layout, a: &'a [u8], b: &'a [u8]) -> Vec<FieldDifference<'a>> {
    let common = a.len().min(b.len());
    let (a_common, _) = a.split_at(common);
    let (b_common, _) = b.split_at(common);
    let mut out = Vec::new();
    if a_common != b_common {
        let a_fields = with_ranges(layout, a_common);
        let b_fields = with_ranges(layout, b_common);
        let mut named: Vec<Range<usize>> = Vec::with_capacity(a_fields.len());
        // The same layout over equally many bytes gives the same fields, pair by pair.
        for ((a, range), (b, _)) in a_fields.into_iter().zip(b_fields) {
            if a.value != b.value {
                out.push(FieldDifference::Field { a, b });
            }
            named.push(range);
        }
        unnamed(&mut named, a_common, b_common, &mut out);
    }
    if a.len() != b.len() {
        let (a, b) = (a.len(), b.len());
        out.push(FieldDifference::Length { a, b });
    }
    out
}

/// Differing bytes outside the `named` ranges; `a` and `b` have the same length.
fn unnamed<'a>(
    named: &mut [Range<usize>],
    a: &'a [u8],
    b: &'a [u8],
    out: &mut Vec<FieldDifference<'a>>,
) {
    named.sort_by_key(|range| range.start);
    let mut at = 0;
    let end = a.len()..a.len();
    for range in named.iter().chain([&end]) {
        if at < range.start {
            differing(at..range.start, a, b, out);
        }
        at = at.max(range.end);
    }
}

/// Collects the longest runs of bytes in `gap` that differ.
fn differing<'a>(gap: Range<usize>, a: &'a [u8], b: &'a [u8], out: &mut Vec<FieldDifference<'a>>) {
    let mut run: Option<usize> = None;
    for at in gap.start..=gap.end {
        let differs = at < gap.end && a.get(at) != b.get(at);
        match (differs, run) {
            (true, None) => run = Some(at),
            (false, Some(offset)) => {
                // Both are as long as the gap: the layout covers both.
                if let (Some(a), Some(b)) = (a.get(offset..at), b.get(offset..at)) {
                    out.push(FieldDifference::Bytes { offset, a, b });
                }
                run = None;
            }
            _ => {}
        }
    }
}
