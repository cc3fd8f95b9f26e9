//! UUIDs of domains: 16 bytes that Xen keeps for the toolstack (`handle`).
//!
//! C implementation: `xen_domain_handle_t` in `xen/include/public/xen.h`; libxl's text
//! form is `LIBXL_UUID_FMT`.

use std::fmt;
use std::str::FromStr;

#[cfg(feature = "mock")]
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// A domain's UUID.
///
/// Xen attaches no meaning to it. A toolstack gives every domain its own and keeps it across a
/// save, restore or migration.
///
/// ```
/// use xsr_xen_backend::Uuid;
///
/// let uuid: Uuid = "6bd7b1a7-2d4a-4a0c-9c11-5e1f8f4f9a77".parse()?;
/// assert_eq!(uuid.to_string(), "6bd7b1a7-2d4a-4a0c-9c11-5e1f8f4f9a77");
/// assert!(!uuid.is_nil());
/// # Ok::<(), xsr_xen_backend::BadUuid>(())
/// ```
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "mock",
    derive(Serialize, Deserialize),
    serde(into = "String", try_from = "String")
)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// All zeros: the UUID of a domain that was never given one, and of the control domain.
    pub const NIL: Self = Self([0; 16]);

    /// Whether it is [`Uuid::NIL`].
    pub fn is_nil(self) -> bool {
        self == Self::NIL
    }
}

/// Positions of the hyphens in the text form.
const HYPHENS: [usize; 4] = [8, 13, 18, 23];
/// Characters in the text form.
const TEXT_LENGTH: usize = 36;

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uuid({self})")
    }
}

/// Text that is not a UUID.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "not a UUID: expected 32 hexadecimal digits with hyphens, as in \
     6bd7b1a7-2d4a-4a0c-9c11-5e1f8f4f9a77"
)]
pub struct BadUuid;

impl FromStr for Uuid {
    type Err = BadUuid;

    fn from_str(text: &str) -> Result<Self, BadUuid> {
        let text = text.as_bytes();
        if text.len() != TEXT_LENGTH || HYPHENS.iter().any(|at| text[*at] != b'-') {
            return Err(BadUuid);
        }
        let mut digits = text
            .iter()
            .enumerate()
            .filter(|(at, _)| !HYPHENS.contains(at))
            .map(|(_, byte)| char::from(*byte).to_digit(16));
        let mut bytes = [0; 16];
        for byte in &mut bytes {
            let mut next = || {
                let digit = digits.next().flatten();
                digit.and_then(|digit| u8::try_from(digit).ok())
            };
            let (Some(high), Some(low)) = (next(), next()) else {
                return Err(BadUuid);
            };
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> Self {
        uuid.to_string()
    }
}

impl TryFrom<String> for Uuid {
    type Error = BadUuid;

    fn try_from(text: String) -> Result<Self, BadUuid> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn either_case_is_read_and_lower_case_is_written() {
        let uuid: Uuid = "00FF10a7-2d4a-4A0c-9c11-5e1f8f4f9a77".parse().unwrap();
        assert_eq!(uuid.0[..4], [0, 0xff, 0x10, 0xa7]);
        assert_eq!(uuid.to_string(), "00ff10a7-2d4a-4a0c-9c11-5e1f8f4f9a77");
    }

    #[test]
    fn other_forms_are_refused() {
        for bad in [
            "",
            "00ff10a72d4a4a0c9c115e1f8f4f9a77",
            "00ff10a7-2d4a-4a0c-9c11-5e1f8f4f9a7",
            "00ff10a7-2d4a-4a0c-9c11-5e1f8f4f9a777",
            "00ff10a7-2d4a-4a0c-9c11-5e1f8f4f9a7g",
            "00ff10a72-d4a-4a0c-9c11-5e1f8f4f9a77",
            "{0ff10a7-2d4a-4a0c-9c11-5e1f8f4f9a7}",
            "+0ff10a7-2d4a-4a0c-9c11-5e1f8f4f9a77",
            "00ff10a7-2d4a-4a0c-9c11-5e1f8f4f9aé",
        ] {
            assert_eq!(bad.parse::<Uuid>(), Err(BadUuid), "{bad:?}");
        }
    }

    #[test]
    fn nil_is_all_zeros() {
        assert!(Uuid::default().is_nil());
        assert_eq!(
            Uuid::NIL.to_string(),
            "00000000-0000-0000-0000-000000000000"
        );
    }
}
