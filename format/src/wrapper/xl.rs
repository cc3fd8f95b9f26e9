//! Header of a file saved by `xl save`, before the libxl stream: flags and the domain's
//! configuration.
//!
//! A specification does not exist; this follows what xl reads and writes. C implementation: `struct
//! save_file_header` in `tools/xl/xl.h`, `save_domain_core_writeconfig` in
//! `tools/xl/xl_saverestore.c`, `create_domain` in `tools/xl/xl_vmcontrol.c`.
//!
//! xl reads and writes only the machine's own byte order; this module reads either. The JSON is not
//! parsed here: that requires libxl's types.

use std::io::{Read, Write};
use std::iter;

use thiserror::Error;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WrapperWriteError;
use crate::byte_order::ByteOrder;
use crate::error::{Place, ReadError, ReadErrorCause};
use crate::layout::Room;
use crate::layout::index::{FOOTER_MAGIC, Footer};
use crate::read::ReadOptions;
use crate::source::{fill, fill_behind, fill_growing};
use crate::wire::U32;

/// The magic at the start of a file that xl wrote.
pub const MAGIC: [u8; 32] = *b"Xen saved domain, xl format\n \0 \r";

/// The value of the byte order field.
pub(crate) const BYTE_ORDER_MARK: u32 = 0x0102_0304;

/// Maximum size of the optional data that is read or written. xl has no limit of its own; a
/// configuration has some hundreds of bytes for each device and vcpu.
pub const MAX_OPTIONAL_DATA: u32 = 16 << 20;

/// Maximum size of a configuration that is read or written, without the NUL. xl has no limit of its
/// own, but a parsed configuration takes much more memory than its text.
pub const MAX_CONFIG: u32 = 1 << 20;

/// Mandatory flag: the configuration is JSON (libxl's), not an xl configuration file.
pub const FLAG_JSON: u32 = 1 << 0;
/// Mandatory flag: a libxl stream version 2 follows, not a legacy stream.
pub const FLAG_STREAM_V2: u32 = 1 << 1;
const KNOWN_FLAGS: u32 = FLAG_JSON | FLAG_STREAM_V2;

/// The fixed part of the header after the magic, encoded as in the file.
///
/// | bytes | field |
/// |---|---|
/// | 0–31 | magic, `Xen saved domain, xl format`, LF, SP, NUL, SP, CR |
/// | 32–35 | byte order mark, 0x01020304 in the order of this header's fields |
/// | 36–39 | mandatory flags: bit 0 JSON, bit 1 stream v2, others unknown |
/// | 40–43 | optional flags, none defined |
/// | 44–47 | length of the optional data that follow |
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct WireXlFields {
    byte_order: U32,
    mandatory_flags: U32,
    optional_flags: U32,
    optional_data_length: U32,
}

const _: () = assert!(MAGIC.len() + size_of::<WireXlFields>() == XlHeader::FIXED_BYTES);

/// Size of the length field at the start of the configuration.
const CONFIG_LENGTH_BYTES: usize = 4;

/// A broken rule of the xl header.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum XlError {
    /// The first 32 bytes are not xl's.
    #[error("magic is {:?}, expected {:?}", got.escape_ascii().to_string(), MAGIC.escape_ascii().to_string())]
    Magic {
        /// The value found.
        got: [u8; 32],
    },
    /// A byte order mark that matches neither order.
    #[error("byte order mark is {got:02x?}, expected [04, 03, 02, 01] or [01, 02, 03, 04]")]
    ByteOrderMark {
        /// The value found.
        got: [u8; 4],
    },
    /// Unknown mandatory flags.
    #[error(
        "mandatory flag bit {bit} is set (flags {got:#010x}), expected only bits 0 (JSON) and 1 (stream v2); a newer xl made this file, or it is damaged"
    )]
    UnknownMandatoryFlag {
        /// The lowest unknown bit.
        bit: u32,
        /// All the flags.
        got: u32,
    },
    /// Optional flags; none is defined.
    #[error("optional flags are {got:#010x}, expected 0 since none is defined")]
    OptionalFlags {
        /// The value found.
        got: u32,
    },
    /// An implausible amount of optional data.
    #[error("optional data has {got} bytes, expected at most {max}")]
    OptionalDataTooLong {
        /// The value found.
        got: u64,
        /// The limit.
        max: u32,
    },
    /// Optional data that end inside a field.
    #[error("optional data has {got} bytes, expected none or at least {expected} for the {what}")]
    OptionalDataTooShort {
        /// The field that does not fit.
        what: &'static str,
        /// The bytes it needs.
        expected: u64,
        /// The value found.
        got: u64,
    },
    /// A JSON configuration without a NUL at its end, or with one inside.
    #[error(
        "JSON configuration of {length} bytes must have its only NUL at the end, {}",
        match first_nul { Some(at) => format!("but has one at byte {at}"), None => "but has none".into() }
    )]
    ConfigNul {
        /// Its length.
        length: u64,
        /// Offset of the first NUL.
        first_nul: Option<u64>,
    },
    /// A configuration that is too long.
    #[error("the domain's configuration has {got} bytes, expected at most {max}")]
    ConfigTooLong {
        /// Its length.
        got: u64,
        /// The limit.
        max: u32,
    },
    /// A JSON configuration that is not UTF-8.
    #[error("JSON configuration is not UTF-8 from byte {valid_up_to} on")]
    ConfigNotUtf8 {
        /// How far it is valid UTF-8, in bytes.
        valid_up_to: u64,
    },
}

/// Whether a file that begins with these bytes (40 suffice) has xl's header and a legacy stream
/// after it, which [`Walk`](crate::walk::Walk) does not read. A header that ends before its flags
/// does not count.
pub fn begins_legacy(prefix: &[u8]) -> bool {
    let fields = prefix
        .strip_prefix(&MAGIC)
        .and_then(|rest| rest.first_chunk::<8>());
    let Some(fields) = fields else {
        return false;
    };
    let [mark, flags]: [U32; 2] = zerocopy::transmute!(*fields);
    let order = match mark.get(ByteOrder::Big) {
        BYTE_ORDER_MARK => ByteOrder::Big,
        _ => ByteOrder::Little,
    };
    flags.get(order) & FLAG_STREAM_V2 == 0
}

/// The xl file header.
///
/// ```
/// use xsr_format::{ReadOptions, XlHeader};
///
/// let header = XlHeader::new("{}")?;
/// let mut file = header.encode();
/// file.extend(b"LibxlFmt, the stream");
/// let mut source = &file[..];
/// let read = XlHeader::read(&mut source, ReadOptions::default())?;
/// assert_eq!(read.json()?, Some("{}"));
/// // The source is at the first byte of the stream.
/// assert!(source.starts_with(b"LibxlFmt"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XlHeader {
    order: ByteOrder,
    mandatory_flags: u32,
    optional_flags: u32,
    /// As in the file; checked to contain the configuration that it announces.
    optional_data: Vec<u8>,
    /// Length of the optional data: at most [`MAX_OPTIONAL_DATA`].
    optional_length: u32,
}

impl XlHeader {
    /// Length of the part before the optional data.
    pub const FIXED_BYTES: usize = 48;

    /// The header that xl writes for a domain with this configuration (`json` without NUL) and a
    /// version 2 stream.
    ///
    /// # Errors
    ///
    /// A configuration with a NUL in it, or longer than [`MAX_CONFIG`].
    pub fn new(json: &str) -> Result<Self, XlError> {
        check_config_length(json.len())?;
        let config_length = optional_length(json.len().saturating_add(1))?;
        let config_field = U32::new(config_length, ByteOrder::Little);
        let optional_data = [config_field.as_bytes(), json.as_bytes(), &[0]].concat();
        let header = Self {
            order: ByteOrder::Little,
            mandatory_flags: KNOWN_FLAGS,
            optional_flags: 0,
            optional_length: optional_length(optional_data.len())?,
            optional_data,
        };
        header.check_optional_data()?;
        Ok(header)
    }

    /// Reads the header from the start of a file: exactly its bytes.
    ///
    /// # Errors
    ///
    /// The source failed or ended, or a rule is broken.
    pub fn read(mut source: impl Read, options: ReadOptions) -> Result<Self, ReadError> {
        Self::read_behind(&[], &mut source, options)
    }

    /// Like [`XlHeader::read`], if the first bytes (`known`) have already been read to detect the
    /// format. The offset in `options` is that of the header.
    pub(crate) fn read_behind(
        known: &[u8],
        source: &mut impl Read,
        options: ReadOptions,
    ) -> Result<Self, ReadError> {
        let (order, mandatory_flags, optional_flags, length) =
            read_fixed(known, source, options.lenient)
                .map_err(|cause| ReadError::at(Place::XlHeader, options.offset, cause))?;
        let offset = options.offset.saturating_add(Self::FIXED_BYTES as u64);
        let mut header = Self {
            order,
            mandatory_flags,
            optional_flags,
            optional_data: Vec::new(),
            optional_length: length,
        };
        fill_growing(source, &mut header.optional_data, u64::from(length))
            .and_then(|()| Ok(header.check_optional_data()?))
            .map_err(|cause| ReadError::at(Place::XlOptionalData, offset, cause))?;
        Ok(header)
    }

    /// Writes the header unchanged, byte for byte.
    ///
    /// # Errors
    ///
    /// The sink's error.
    pub fn write(&self, mut sink: impl Write) -> Result<(), WrapperWriteError> {
        // A single write, for readable traces of system calls.
        Ok(sink.write_all(&self.encode())?)
    }

    /// The bytes of the header.
    pub fn encode(&self) -> Vec<u8> {
        let fields = WireXlFields {
            byte_order: U32::new(BYTE_ORDER_MARK, self.order),
            mandatory_flags: U32::new(self.mandatory_flags, self.order),
            optional_flags: U32::new(self.optional_flags, self.order),
            optional_data_length: U32::new(self.optional_length, self.order),
        };
        [&MAGIC, fields.as_bytes(), &self.optional_data].concat()
    }

    /// This header with another configuration (`json` without NUL). Everything else is kept.
    ///
    /// # Errors
    ///
    /// Same as [`XlHeader::new`], or more than [`MAX_OPTIONAL_DATA`] in total.
    pub fn with_json(&self, json: &str) -> Result<Self, XlError> {
        let mut header = Self::new(json)?;
        header.optional_data.extend_from_slice(self.optional_tail());
        header.optional_flags = self.optional_flags;
        header.optional_length = optional_length(header.optional_data.len())?;
        Ok(header)
    }

    /// This header with the text of an xl configuration file as its configuration, which xl of
    /// every version can read. Everything else is kept.
    ///
    /// # Errors
    ///
    /// A text longer than [`MAX_CONFIG`], or more than [`MAX_OPTIONAL_DATA`] in total.
    pub fn with_text(&self, text: &str) -> Result<Self, XlError> {
        check_config_length(text.len())?;
        let tail = self.optional_tail();
        let config_field = U32::new(optional_length(text.len())?, self.order);
        let optional_data = [config_field.as_bytes(), text.as_bytes(), tail].concat();
        Ok(Self {
            mandatory_flags: self.mandatory_flags & !FLAG_JSON,
            optional_length: optional_length(optional_data.len())?,
            optional_data,
            ..*self
        })
    }

    /// This header for a libxl stream of version 2, with little-endian fields, as xl writes it
    /// today.
    pub fn for_version_2(&self) -> Self {
        let mut header = self.clone();
        header.mandatory_flags |= FLAG_STREAM_V2;
        header.in_little_endian()
    }

    /// This header with blanks at the end of its configuration (before the NUL of JSON) that make
    /// its length a multiple of 8, and the number of blanks. Without a configuration it is
    /// unchanged.
    ///
    /// # Errors
    ///
    /// There is no room for the blanks.
    pub fn aligned(&self) -> Result<(Self, u32), XlError> {
        let blanks = match self.config() {
            Some(_) => (self.bytes().wrapping_neg() & 7) as u8,
            None => 0,
        };
        let header = self.with_changed(|text| text.extend(iter::repeat_n(b' ', blanks.into())))?;
        Ok((header, blanks.into()))
    }

    /// This header with this number of blanks removed from the end of its configuration, or as many
    /// as there are.
    ///
    /// # Errors
    ///
    /// The optional data is too long.
    pub fn without_blanks(&self, blanks: u32) -> Result<Self, XlError> {
        self.with_changed(|text| {
            for _ in 0..blanks {
                if text.pop_if(|last| *last == b' ').is_none() {
                    break;
                }
            }
        })
    }

    /// This header with `bytes` zero bytes after its configuration, from a multiple of 8 on, in place
    /// of what is there; and where they are. The stream then begins at a multiple of 8. `None`
    /// without a configuration, or if there are too few bytes for a footer.
    ///
    /// # Errors
    ///
    /// More than [`MAX_OPTIONAL_DATA`] in total.
    pub fn with_room(&self, bytes: u64) -> Result<Option<(Self, Room)>, XlError> {
        let mut header = self.without_tail()?;
        if header.config().is_none() {
            return Ok(None);
        }
        let config_end = header.bytes();
        let to = config_end.checked_next_multiple_of(8);
        let to = to.and_then(|from| from.checked_add(bytes.checked_next_multiple_of(8)?));
        let length = to
            .unwrap_or(u64::MAX)
            .saturating_sub(Self::FIXED_BYTES as u64);
        header.optional_length = optional_length(usize::try_from(length).unwrap_or(usize::MAX))?;
        header
            .optional_data
            .resize(header.optional_length as usize, 0);
        Ok(Room::between(config_end, header.bytes()).map(|room| (header, room)))
    }

    /// This header with nothing after its configuration.
    ///
    /// # Errors
    ///
    /// The optional data is too long.
    pub fn without_tail(&self) -> Result<Self, XlError> {
        let mut header = self.clone();
        let tail = self.optional_tail().len();
        let kept = header.optional_data.len().saturating_sub(tail);
        header.optional_data.truncate(kept);
        header.optional_length = optional_length(kept)?;
        Ok(header)
    }

    /// This header with the text of its configuration changed, which is what comes before the NUL
    /// of JSON.
    fn with_changed(&self, change: impl FnOnce(&mut Vec<u8>)) -> Result<Self, XlError> {
        let Some(config) = self.config() else {
            return Ok(self.clone());
        };
        let text = config.strip_suffix(&[0]);
        let mut changed = text.unwrap_or(config).to_vec();
        change(&mut changed);
        if text.is_some() {
            changed.push(0);
        }
        let config = changed;
        let field = U32::new(optional_length(config.len())?, self.order);
        let optional_data = [field.as_bytes(), &config, self.optional_tail()].concat();
        Ok(Self {
            optional_length: optional_length(optional_data.len())?,
            optional_data,
            ..*self
        })
    }

    /// This header with little-endian fields.
    fn in_little_endian(mut self) -> Self {
        if let Ok((length, _)) = U32::mut_from_prefix(&mut self.optional_data) {
            *length = U32::new(length.get(self.order), ByteOrder::Little);
        }
        self.order = ByteOrder::Little;
        self
    }

    /// Length of the header with its optional data, which is the offset of the stream.
    pub fn bytes(&self) -> u64 {
        (self.optional_data.len() as u64).saturating_add(Self::FIXED_BYTES as u64)
    }

    /// The byte order of the header's own fields; the streams that follow have their own.
    pub fn byte_order(&self) -> ByteOrder {
        self.order
    }

    /// The mandatory flags: [`FLAG_JSON`], [`FLAG_STREAM_V2`].
    pub fn mandatory_flags(&self) -> u32 {
        self.mandatory_flags
    }

    /// The optional flags: zero, unless read leniently.
    pub fn optional_flags(&self) -> u32 {
        self.optional_flags
    }

    /// Whether a libxl stream version 2 follows; if not, a legacy stream does.
    pub fn is_stream_v2(&self) -> bool {
        self.mandatory_flags & FLAG_STREAM_V2 != 0
    }

    /// The configuration's bytes, including the NUL at the end of JSON; `None` if the file has
    /// none.
    pub fn config(&self) -> Option<&[u8]> {
        let (length, rest) = U32::read_from_prefix(&self.optional_data).ok()?;
        let config = rest.get(..length.get(self.order) as usize)?;
        (!config.is_empty()).then_some(config)
    }

    /// Optional data after the configuration. Nothing is defined there today; it is kept and
    /// written again.
    pub fn optional_tail(&self) -> &[u8] {
        let config = self.config().map_or(0, <[u8]>::len);
        self.optional_data
            .get(config.saturating_add(CONFIG_LENGTH_BYTES)..)
            .unwrap_or_default()
    }

    /// Optional data after the configuration, unless it is the index of a mapped image.
    pub fn unknown_tail(&self) -> &[u8] {
        let tail = self.optional_tail();
        let footer = tail.last_chunk::<{ Footer::BYTES }>();
        match footer.is_some_and(|footer| footer.starts_with(&FOOTER_MAGIC)) {
            true => &[],
            false => tail,
        }
    }

    /// The configuration as JSON, without the NUL. `None` if the file has no configuration, or an
    /// xl configuration file instead ([`FLAG_JSON`] not set).
    ///
    /// # Errors
    ///
    /// It is longer than [`MAX_CONFIG`], in either format, or it is JSON but not UTF-8.
    pub fn json(&self) -> Result<Option<&str>, XlError> {
        let Some(config) = self.config() else {
            return Ok(None);
        };
        let text = config.strip_suffix(&[0]).unwrap_or(config);
        check_config_length(text.len())?;
        if self.mandatory_flags & FLAG_JSON == 0 {
            return Ok(None);
        }
        match std::str::from_utf8(text) {
            Ok(json) => Ok(Some(json)),
            Err(e) => Err(XlError::ConfigNotUtf8 {
                valid_up_to: e.valid_up_to() as u64,
            }),
        }
    }

    fn check_optional_data(&self) -> Result<(), XlError> {
        if self.optional_data.is_empty() {
            return Ok(());
        }
        let got = self.optional_data.len() as u64;
        let short = |what, expected| XlError::OptionalDataTooShort {
            what,
            expected,
            got,
        };
        let Ok((length, rest)) = U32::read_from_prefix(&self.optional_data) else {
            return Err(short(
                "length of the configuration",
                CONFIG_LENGTH_BYTES as u64,
            ));
        };
        let length = length.get(self.order);
        let Some(config) = rest.get(..length as usize) else {
            let expected = u64::from(length).saturating_add(CONFIG_LENGTH_BYTES as u64);
            return Err(short("configuration", expected));
        };
        // xl passes the JSON to its parser as a C string.
        let first_nul = config.iter().position(|byte| *byte == 0);
        let is_c_string = first_nul == config.len().checked_sub(1);
        if self.mandatory_flags & FLAG_JSON != 0 && !config.is_empty() && !is_c_string {
            return Err(XlError::ConfigNul {
                length: u64::from(length),
                first_nul: first_nul.map(|at| at as u64),
            });
        }
        Ok(())
    }
}

/// Checks that a configuration of this length, without the NUL, is not too long.
///
/// # Errors
///
/// It is longer than [`MAX_CONFIG`].
pub(crate) fn check_config_length(bytes: usize) -> Result<(), XlError> {
    match bytes <= MAX_CONFIG as usize {
        true => Ok(()),
        false => Err(XlError::ConfigTooLong {
            got: bytes as u64,
            max: MAX_CONFIG,
        }),
    }
}

/// The length of optional data, or a part of it, for the header's field.
fn optional_length(bytes: usize) -> Result<u32, XlError> {
    let length = u32::try_from(bytes).ok();
    let length = length.filter(|length| *length <= MAX_OPTIONAL_DATA);
    length.ok_or_else(|| too_long(bytes as u64))
}

fn too_long(got: u64) -> XlError {
    XlError::OptionalDataTooLong {
        got,
        max: MAX_OPTIONAL_DATA,
    }
}

/// Reads and checks the fixed part: byte order, mandatory and optional flags, length of the
/// optional data.
fn read_fixed(
    known: &[u8],
    source: &mut impl Read,
    lenient: bool,
) -> Result<(ByteOrder, u32, u32, u32), ReadErrorCause> {
    // Refuse other files before waiting for more bytes.
    let mut magic = [0; 32];
    fill_behind(known, source, &mut magic)?;
    if magic != MAGIC {
        return Err(XlError::Magic { got: magic }.into());
    }
    let mut wire = WireXlFields::new_zeroed();
    fill(source, wire.as_mut_bytes())?;
    let order = [ByteOrder::Little, ByteOrder::Big]
        .into_iter()
        .find(|order| wire.byte_order.get(*order) == BYTE_ORDER_MARK)
        .ok_or_else(|| XlError::ByteOrderMark {
            got: wire.byte_order.get(ByteOrder::Big).to_be_bytes(),
        })?;
    let mandatory_flags = wire.mandatory_flags.get(order);
    let unknown = mandatory_flags & !KNOWN_FLAGS;
    if unknown != 0 {
        return Err(XlError::UnknownMandatoryFlag {
            bit: unknown.trailing_zeros(),
            got: mandatory_flags,
        }
        .into());
    }
    let optional_flags = wire.optional_flags.get(order);
    if optional_flags != 0 && !lenient {
        return Err(XlError::OptionalFlags {
            got: optional_flags,
        }
        .into());
    }
    let length = wire.optional_data_length.get(order);
    if length > MAX_OPTIONAL_DATA {
        return Err(too_long(u64::from(length)).into());
    }
    Ok((order, mandatory_flags, optional_flags, length))
}
