//! The room for index and footer in the optional data of the xl header.
//!
//! Specification: `docs/mapped.md`, "Place 2".

use std::io::{self, Read, Seek, SeekFrom};

use zerocopy::FromBytes;

use super::index::Footer;
use crate::byte_order::ByteOrder;
use crate::wire::U32;
use crate::wrapper::xl::{BYTE_ORDER_MARK, MAGIC, MAX_OPTIONAL_DATA, XlHeader};

const ORDER: ByteOrder = ByteOrder::Little;

/// A range of bytes of a file, in the optional data of its xl header, after the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// The first byte, a multiple of 8.
    pub from: u64,
    /// The first byte after it, where the libxl stream begins.
    pub to: u64,
}

impl Room {
    /// The room after a configuration that ends at `config_end`, in optional data that end at `to`;
    /// `None` if a footer does not fit.
    pub(crate) fn between(config_end: u64, to: u64) -> Option<Self> {
        let from = config_end.checked_next_multiple_of(8)?;
        let least = from.checked_add(Footer::BYTES as u64)?;
        (to >= least).then_some(Self { from, to })
    }

    /// The room of a file, if it begins with an xl header that has one.
    pub(super) fn of<R: Read + Seek>(source: &mut R) -> io::Result<Option<Self>> {
        const CONFIG_LENGTH: usize = 4;
        source.seek(SeekFrom::Start(0))?;
        let mut bytes = [0; XlHeader::FIXED_BYTES + CONFIG_LENGTH];
        match source.read_exact(&mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let field = |at: usize| {
            let bytes = bytes.get(at..).unwrap_or_default();
            U32::read_from_prefix(bytes).map_or(0, |(field, _)| field.get(ORDER))
        };
        let [mark, optional, config] = [32, 44, XlHeader::FIXED_BYTES].map(field);
        if !bytes.starts_with(&MAGIC) || mark != BYTE_ORDER_MARK || optional > MAX_OPTIONAL_DATA {
            return Ok(None);
        }
        let before = XlHeader::FIXED_BYTES as u64;
        let config_end = (bytes.len() as u64).saturating_add(config.into());
        Ok(Self::between(
            config_end,
            before.saturating_add(optional.into()),
        ))
    }

    /// Where the footer begins.
    pub fn footer(self) -> u64 {
        self.to.saturating_sub(Footer::BYTES as u64)
    }
}
