//! Seeds for the fuzzers, extracted from real images.
//!
//! A fuzzer needs small inputs. This keeps all headers, all records except page data (the longest
//! of the libxl stream are shortened), and some entries and very few pages of the page data. Each
//! layer is a seed of its own: the file, the libxl stream in it, and the libxc stream in that.
//!
//! The images are parsed independently of the library, so that seeds do not depend on the code
//! under test. Layout: libxc and libxl migration stream specifications; `tools/xl/xl.h` for the
//! file header.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use ruzstd::decoding::StreamingDecoder;

use crate::workspace;

/// Directories with images, relative to the root: the project's own, and those that may be next to
/// a checkout.
const PLACES: [&str; 2] = ["format/tests/images", "../shared/images"];

const XL_MAGIC: &[u8] = b"Xen saved domain, xl format\n \0 \r";
const XL_FIXED: usize = 48;
const LIBXL_MAGIC: &[u8] = b"LibxlFmt";
const LIBXL_HEADER: usize = 16;
const LIBXL_LIBXC_CONTEXT: u32 = 1;
const LIBXC_HEADERS: usize = 24 + 16;
const LIBXC_PAGE_DATA: u32 = 1;
const END: u32 = 0;
const PAGE: usize = 4096;

/// Maximum size of a body in the libxl stream.
const BODY_LIMIT: usize = 512;
/// Maximum number of entries with data, and of those without, in a batch.
const ENTRY_LIMIT: usize = 2;
/// Maximum number of batches, and of pages, in a stream.
const BATCH_LIMIT: usize = 3;
const PAGE_LIMIT: usize = 2;

/// Writes the seeds of all images to `corpus`, and returns their number. Images whose seeds exist
/// already are skipped.
///
/// # Errors
///
/// An image cannot be read or is invalid, or a seed cannot be written.
pub(super) fn write(corpus: &Path) -> Result<usize> {
    fs::create_dir_all(corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
    let mut count = 0;
    for (name, image) in images()? {
        let done = corpus.join(format!("seed-{name}-libxc"));
        if !done.exists() {
            let bytes = read(&image)?;
            let seeds = cut(&bytes).with_context(|| format!("cannot cut {}", image.display()))?;
            for (layer, seed) in &seeds {
                let path = corpus.join(format!("seed-{name}-{layer}"));
                fs::write(&path, seed)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
        }
        count += ["xl", "libxl", "libxc"]
            .iter()
            .filter(|layer| corpus.join(format!("seed-{name}-{layer}")).exists())
            .count();
    }
    Ok(count)
}

/// The images by name. If a name occurs twice, the project's own image is used.
fn images() -> Result<BTreeMap<String, PathBuf>> {
    let mut images = BTreeMap::new();
    for place in PLACES {
        let place = workspace::root().join(place);
        if !place.is_dir() {
            continue;
        }
        for entry in
            fs::read_dir(&place).with_context(|| format!("cannot list {}", place.display()))?
        {
            let path = entry?.path();
            let file_name = path.file_name().unwrap_or_default().to_string_lossy();
            if let Some(name) = file_name.strip_suffix(".save.zst") {
                images.entry(name.to_owned()).or_insert(path);
            }
        }
    }
    Ok(images)
}

fn read(image: &Path) -> Result<Vec<u8>> {
    let file = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    let mut bytes = Vec::new();
    StreamingDecoder::new(file)
        .with_context(|| format!("{} is not zstd", image.display()))?
        .read_to_end(&mut bytes)
        .with_context(|| format!("cannot decompress {}", image.display()))?;
    Ok(bytes)
}

/// The seeds of an image, innermost layer last, each with the layer's name.
fn cut(image: &[u8]) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let mut rest = Cursor(image);
    let mut seeds = Vec::new();
    let mut file = Vec::new();
    if image.starts_with(XL_MAGIC) {
        let fixed = rest.take(XL_FIXED)?;
        let optional = u32_at(fixed, 44)?;
        file.extend_from_slice(fixed);
        file.extend_from_slice(rest.take(optional as usize)?);
    }
    if rest.0.starts_with(LIBXL_MAGIC) {
        let (libxl, libxc) = cut_libxl(&mut rest)?;
        if !file.is_empty() {
            file.extend_from_slice(&libxl);
            seeds.push(("xl", file));
        }
        seeds.push(("libxl", libxl));
        seeds.push(("libxc", libxc));
    } else {
        ensure!(file.is_empty(), "no libxl stream after the xl header");
        seeds.push(("libxc", cut_libxc(&mut rest)?));
    }
    Ok(seeds)
}

/// Cuts a libxl stream, and the libxc stream in it.
fn cut_libxl(rest: &mut Cursor<'_>) -> Result<(Vec<u8>, Vec<u8>)> {
    let header = rest.take(LIBXL_HEADER)?;
    let options = header.last().copied().unwrap_or_default();
    ensure!(options & 1 == 0, "a big-endian libxl stream");
    let mut out = header.to_vec();
    let mut inner = Vec::new();
    loop {
        let (kind, body) = rest.record()?;
        put(&mut out, kind, &body[..body.len().min(BODY_LIMIT)])?;
        match kind {
            END => return Ok((out, inner)),
            LIBXL_LIBXC_CONTEXT => {
                inner = cut_libxc(rest)?;
                out.extend_from_slice(&inner);
            }
            _ => {}
        }
    }
}

fn cut_libxc(rest: &mut Cursor<'_>) -> Result<Vec<u8>> {
    let headers = rest.take(LIBXC_HEADERS)?;
    ensure!(headers.starts_with(&[0xff; 8]), "no libxc stream");
    // Bit 0 of the big-endian u16 at byte 16.
    ensure!(headers[17] & 1 == 0, "a big-endian libxc stream");
    let mut out = headers.to_vec();
    let (mut batches, mut pages) = (BATCH_LIMIT, PAGE_LIMIT);
    loop {
        let (kind, body) = rest.record()?;
        match kind {
            LIBXC_PAGE_DATA if batches == 0 => {}
            LIBXC_PAGE_DATA => {
                batches -= 1;
                put(&mut out, kind, &cut_batch(body, &mut pages)?)?;
            }
            _ => put(&mut out, kind, body)?,
        }
        if kind == END {
            return Ok(out);
        }
    }
}

/// Cuts a PAGE_DATA body to a few entries and at most `pages` pages.
fn cut_batch(body: &[u8], pages: &mut usize) -> Result<Vec<u8>> {
    let mut rest = Cursor(body);
    let count = u32_at(rest.take(8)?, 0)? as usize;
    let entries = rest.take(count * 8)?;
    let mut kept: Vec<u8> = Vec::new();
    let mut data: Vec<u8> = Vec::new();
    let (mut full, mut empty) = (ENTRY_LIMIT, ENTRY_LIMIT);
    for entry in entries.chunks_exact(8) {
        // The type is in bits 60–63: 13 to 15 have no page.
        if entry[7] >> 4 < 0xd {
            let page = rest.take(PAGE)?;
            if full > 0 && *pages > 0 {
                (full, *pages) = (full - 1, *pages - 1);
                kept.extend_from_slice(entry);
                data.extend_from_slice(page);
            }
        } else if empty > 0 {
            empty -= 1;
            kept.extend_from_slice(entry);
        }
    }
    if kept.is_empty() {
        // A batch needs at least one entry: the first one, as an absent page.
        kept.extend_from_slice(entries.get(..8).context("an empty batch")?);
        kept[7] |= 0xf0;
    }
    let mut out = u32::try_from(kept.len() / 8)?.to_le_bytes().to_vec();
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&kept);
    out.extend_from_slice(&data);
    Ok(out)
}

fn put(out: &mut Vec<u8>, kind: u32, body: &[u8]) -> Result<()> {
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&u32::try_from(body.len())?.to_le_bytes());
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(8), 0);
    Ok(())
}

/// The rest of an image.
struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8]> {
        let Some((head, tail)) = self.0.split_at_checked(bytes) else {
            bail!("{bytes} bytes wanted, {} left", self.0.len());
        };
        self.0 = tail;
        Ok(head)
    }

    /// A record of either stream: its type, and its body without the padding.
    fn record(&mut self) -> Result<(u32, &'a [u8])> {
        let header = self.take(8)?;
        let length = u32_at(header, 4)? as usize;
        let body = self.take(length.next_multiple_of(8))?;
        Ok((u32_at(header, 0)?, &body[..length]))
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32> {
    let field = bytes.get(at..at + 4).context("a field is cut off")?;
    Ok(u32::from_le_bytes(field.try_into()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn libxc(batches: &[&[u64]]) -> Vec<u8> {
        let mut out = vec![0xff; 8];
        out.extend_from_slice(b"XENF\0\0\0\x03");
        out.resize(LIBXC_HEADERS, 0);
        put(&mut out, 0x10, &[]).unwrap();
        for batch in batches {
            let mut body = u32::try_from(batch.len()).unwrap().to_le_bytes().to_vec();
            body.resize(8, 0);
            body.extend(batch.iter().flat_map(|entry| entry.to_le_bytes()));
            let pages = batch.iter().filter(|entry| *entry >> 60 < 0xd).count();
            body.resize(body.len() + pages * PAGE, 0xa5);
            put(&mut out, LIBXC_PAGE_DATA, &body).unwrap();
        }
        put(&mut out, 0x09, &[7; 13]).unwrap();
        put(&mut out, END, &[]).unwrap();
        out
    }

    fn xl(libxc: &[u8], emulator: usize) -> Vec<u8> {
        let mut out = XL_MAGIC.to_vec();
        for field in [0x0102_0304_u32, 3, 0, 5] {
            out.extend_from_slice(&field.to_le_bytes());
        }
        out.extend_from_slice(b"{...}");
        out.extend_from_slice(b"LibxlFmt\0\0\0\x02\0\0\0\0");
        let start = out.len();
        let mut records = Vec::new();
        put(&mut records, LIBXL_LIBXC_CONTEXT, &[]).unwrap();
        records.extend_from_slice(libxc);
        put(&mut records, 3, &vec![1; emulator]).unwrap();
        put(&mut records, END, &[]).unwrap();
        assert_eq!(start, 69);
        out.extend_from_slice(&records);
        out
    }

    const XTAB: u64 = 0xf << 60;

    #[test]
    fn a_small_image_is_its_own_seed() {
        let libxc = libxc(&[&[0, 1, XTAB | 2]]);
        let image = xl(&libxc, 40);
        let seeds = cut(&image).unwrap();
        let layers: Vec<&str> = seeds.iter().map(|(layer, _)| *layer).collect();
        assert_eq!(layers, ["xl", "libxl", "libxc"]);
        assert!(seeds[0].1 == image);
        assert!(seeds[1].1 == image[53..]);
        assert!(seeds[2].1 == libxc);
        assert!(cut(&libxc).unwrap() == [("libxc", libxc)]);
    }

    #[test]
    fn a_large_image_is_cut_and_stays_well_formed() {
        let batch: Vec<u64> = (0..1024)
            .map(|pfn| pfn | if pfn % 3 == 0 { XTAB } else { 0 })
            .collect();
        let image = xl(&libxc(&[batch.as_slice(); 8]), 100_000);
        let seeds = cut(&image).unwrap();
        assert!(seeds[0].1.len() < 3 * PAGE, "{}", seeds[0].1.len());
        // Nothing is left to cut: the seed is a complete, small image.
        assert!(cut(&seeds[0].1).unwrap() == seeds);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let image = xl(&libxc(&[&[0]]), 8);
        assert!(cut(&image[..image.len() - 1]).is_err());
        assert!(cut(b"Xen").is_err());
        let mut big_endian = libxc(&[&[0]]);
        big_endian[17] = 1;
        assert!(cut(&big_endian).is_err());
    }
}
