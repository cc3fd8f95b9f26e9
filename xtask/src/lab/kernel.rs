//! Extraction of the ELF kernel from a Linux bzImage. Xen can unpack a bzImage itself, but slowly
//! under emulation, and its dom0 builder also accepts a bare ELF.
//!
//! Layout: `Documentation/arch/x86/boot.rst` of Linux.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail, ensure};

use crate::command::Invocation;

/// Writes the ELF kernel of the bzImage at `image` to `out`.
///
/// # Errors
///
/// It is not a bzImage, or is packed with a program that is missing here.
pub(super) fn unpack(image: &Path, out: &Path) -> Result<()> {
    let bytes = std::fs::read(image).with_context(|| format!("cannot read {}", image.display()))?;
    let payload = payload(&bytes).with_context(|| format!("{}", image.display()))?;
    let (program, args): (_, &[&str]) = match payload {
        [0x1f, 0x8b, ..] => ("gzip", &["-dc"]),
        [0xfd, b'7', b'z', ..] => ("xz", &["-dc"]),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", &["-dcq"]),
        [0x02, 0x21, 0x4c, 0x18, ..] => ("lz4", &["-dc"]),
        _ => bail!("{}: packed with an unknown program", image.display()),
    };
    // All except gzip have the unpacked length after their data.
    let packed = match program {
        "gzip" => payload,
        _ => &payload[..payload.len().saturating_sub(4)],
    };
    let mut child = Invocation::new(program)
        .args(args)
        .into_command()
        .stdin(Stdio::piped())
        .stdout(File::create(out)?)
        .spawn()
        .with_context(|| format!("cannot start {program}: install it"))?;
    let mut stdin = child.stdin.take().context("no pipe to the program")?;
    stdin.write_all(packed)?;
    drop(stdin);
    let status = child.wait()?;
    ensure!(status.success(), "{program} failed: {status}");
    let head = std::fs::read(out)?;
    ensure!(
        head.starts_with(b"\x7fELF"),
        "{}: no ELF in it",
        image.display()
    );
    Ok(())
}

/// The packed kernel in a bzImage.
fn payload(image: &[u8]) -> Result<&[u8]> {
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "no bzImage");
    let setup_sectors = match image[0x1f1] {
        0 => 4,
        n => usize::from(n),
    };
    let field = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the header is cut off")?;
        Ok(u32::from_le_bytes(bytes.try_into()?).try_into()?)
    };
    let start = (setup_sectors + 1) * 512 + field(0x248)?;
    let length = field(0x24c)?;
    image
        .get(start..start.saturating_add(length))
        .context("the kernel is cut off")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn the_payload_is_where_the_header_says() {
        let mut image = vec![0_u8; 2 * 512 + 0x30];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 0x10;
        image[0x24c] = 0x20;
        image[2 * 512 + 0x10] = 7;
        let found = payload(&image).unwrap();
        assert_eq!((found.len(), found[0]), (0x20, 7));
        image.pop();
        assert!(payload(&image).is_err());
        assert!(payload(b"\x7fELF").is_err());
    }
}
