//! What the user can do about an error of a library: an option of xsr, or another program. The
//! libraries do not know either, so the advice is added where the error becomes text.

mod foreign;

use std::io;

use xsr_format::detect::{Compression, Detected};
use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_format::transcode::TranscodeError;
use xsr_save_restore::error::GuestError;
use xsr_save_restore::{RestoreError, SaveError};
use xsr_xen_backend::mock::MockError;

pub(crate) use self::foreign::described;

/// What follows the text of one error of a chain; empty if there is no advice.
pub(super) fn remedy(cause: &(dyn std::error::Error + 'static)) -> String {
    if let Some(error) = read_error(cause) {
        return of_image(error);
    }
    match cause.downcast_ref() {
        Some(RestoreError::HvmContext { .. }) => return " (see `xl dmesg`)".to_owned(),
        Some(RestoreError::Stream(error)) => return of_image(error),
        _ => {}
    }
    if let Some(SaveError::Guest(GuestError::TooLargeForLayout)) = cause.downcast_ref() {
        return ": save it with --layout stream".to_owned();
    }
    match cause.downcast_ref() {
        Some(MockError::NotAHost { .. }) => "; make one with `xsr mock create`".to_owned(),
        Some(MockError::OtherLayout { .. }) => "; make a new one with `xsr mock create`".to_owned(),
        _ => String::new(),
    }
}

/// The failure to read an image that this error is.
fn read_error<'e>(cause: &'e (dyn std::error::Error + 'static)) -> Option<&'e ReadError> {
    if let Some(TranscodeError::Read(error)) = cause.downcast_ref() {
        return Some(error);
    }
    // A reader of another reader passes an error on.
    let inner = || cause.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref();
    cause.downcast_ref().or_else(inner)
}

fn of_image(error: &ReadError) -> String {
    if error.is_tolerable() {
        return " (--lenient tolerates this)".to_owned();
    }
    let ReadErrorCause::Unreadable(detected) = &error.cause else {
        return String::new();
    };
    let remedy = match detected {
        Detected::Libvirt => "virsh restores it; a libxl stream is inside, which xsr cat takes out",
        Detected::Xapi => "xe resumes it; a libxc stream is inside, which xsr cat takes out",
        Detected::Xva => "the memory of a suspended VM may be inside, which xsr cat takes out",
        Detected::XapiLegacy | Detected::Xend => {
            "a legacy stream is inside, which xsr convert reads"
        }
        Detected::Legacy(_) => "xsr convert, or Xen's convert-legacy-stream, makes today's of it",
        Detected::Compressed(compression) => {
            let command = decompressor(*compression);
            return format!(" (decompress it first: {command} FILE | …)");
        }
        Detected::Foreign(foreign) => {
            let advice = foreign::advice(foreign.kind);
            return advice.map_or_else(String::new, |advice| format!(": {advice}"));
        }
        _ => return String::new(),
    };
    format!(" ({remedy})")
}

/// The command that decompresses a file to its standard output.
pub(crate) const fn decompressor(compression: Compression) -> &'static str {
    match compression {
        Compression::Gzip => "gzip -dc",
        Compression::Zstd => "zstd -dc --long=31",
        Compression::Xz => "xz -dc",
        Compression::Lz4 => "lz4 -dc",
        Compression::Bzip2 => "bzip2 -dc",
    }
}

#[cfg(test)]
mod tests {
    use xsr_format::read::{ReadOptions, RecordReader};
    use xsr_format::walk::Walk;

    use super::super::words_of;

    /// An image header with a reserved field, 4 bytes before its end, that is not zero.
    #[test]
    fn the_option_that_tolerates_an_image_is_named_where_the_error_becomes_text() {
        let mut header = Vec::new();
        header.extend([0xff; 8]);
        header.extend(*b"XENF");
        header.extend(3_u32.to_be_bytes());
        header.extend(0_u16.to_be_bytes());
        header.extend([0, 0, 0, 0, 0, 1]);
        let error = RecordReader::new(header.as_slice(), ReadOptions::default())
            .expect_err("a reserved bit");
        assert!(!error.to_string().contains("--"), "{error}");
        let words = words_of(&error);
        assert!(words.ends_with(" (--lenient tolerates this)"), "{words}");
        let passed_on = std::io::Error::other(error);
        assert_eq!(words_of(&passed_on), words);
    }

    #[test]
    fn a_file_that_is_not_read_is_named_with_what_helps() {
        for (bytes, remedy) in [
            (&b""[..], ""),
            (
                b"\x1f\x8b\x08\x00",
                " (decompress it first: gzip -dc FILE | …)",
            ),
            (b"BZh9", " (decompress it first: bzip2 -dc FILE | …)"),
            (
                b"QFI\xfb",
                ": it is a disk, not a saved domain; qemu-img shows and converts it",
            ),
            (b"%PDF-", ""),
            (
                b"\x00\x80\x00\x00\x00\x00\x00\x00",
                " (xsr convert, or Xen's convert-legacy-stream, makes today's of it)",
            ),
        ] {
            let error = Walk::open(bytes, ReadOptions::default()).expect_err("not an image");
            assert!(!error.to_string().contains("xsr"), "{error}");
            assert_eq!(words_of(&error), format!("{error}{remedy}"));
        }
    }
}
