//! Wording that several commands share: numbers, sizes, ranges.

use std::fmt;

/// A number with its noun, in the right number: `1 leaf`, `59 leaves`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Count<N>(pub(crate) N, pub(crate) &'static str);

impl<N: fmt::Display + TryInto<u64> + Copy> fmt::Display for Count<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(number, noun) = *self;
        let one = number.try_into().is_ok_and(|n| n == 1);
        match (one, noun) {
            (true, _) => write!(f, "{number} {noun}"),
            (false, "leaf") => write!(f, "{number} leaves"),
            (false, "entry") => write!(f, "{number} entries"),
            (false, "pass") => write!(f, "{number} passes"),
            (false, _) => write!(f, "{number} {noun}s"),
        }
    }
}

/// `0x1f`.
pub(crate) fn hex(number: u64) -> String {
    format!("{number:#x}")
}

/// `0x0–0x3ff`, or `0x5` for a single one.
pub(crate) fn pfn_range(first: u64, last: u64) -> String {
    match first == last {
        true => hex(first),
        false => format!("{first:#x}–{last:#x}"),
    }
}

/// A size as a person reads it: `4.0 MiB`. Exact octets below 1 KiB.
pub(crate) fn size(octets: u64) -> String {
    const UNITS: [(u32, &str); 4] = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in UNITS {
        if octets >> shift > 0 {
            // In tenths, so that no floating point rounds a size.
            let tenths = (u128::from(octets) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    Count(octets, "octet").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_counts_read_well() {
        assert_eq!(size(0), "0 octets");
        assert_eq!(size(1), "1 octet");
        assert_eq!(size(4096), "4.0 KiB");
        assert_eq!(size(4_214_183), "4.0 MiB");
        assert_eq!(size(u64::MAX), "16777215.9 TiB");
        assert_eq!(Count(52_usize, "leaf").to_string(), "52 leaves");
        assert_eq!(Count(3, "pass").to_string(), "3 passes");
        assert_eq!(pfn_range(5, 5), "0x5");
    }
}
