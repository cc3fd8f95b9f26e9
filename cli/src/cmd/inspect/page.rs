//! `xsr inspect --page`: the contents of one page. Of a mapped image only the index, one record's
//! head and the page are read; any other image is read to its end.

use std::io::{self, Read, Seek, Write};

use anyhow::{Context as _, Error, Result, bail};
use serde::Serialize;
use xsr_format::frame::{PAGE_SIZE, Page, PageType, Pfn};
use xsr_format::layout::Mapped;
use xsr_format::layout::find::read_page;
use xsr_format::walk::Content;

use crate::args::InspectArgs;
use crate::exit::Code;
use crate::file::Input;
use crate::image::Reading;
use crate::mapped::{own_position, uncompared_index_of};
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::{hex, shown};

/// Bytes per line.
const LINE: usize = 16;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct PageReport<'a> {
    file: &'a str,
    pfn: u64,
    #[serde(rename = "type")]
    page_type: &'static str,
    /// `mapped` or `stream`.
    layout: &'static str,
    /// The offset of its record.
    record_offset: u64,
    /// The offset of its contents; null if its type has none.
    offset: Option<u64>,
    /// The contents as hexadecimal digits.
    contents: Option<String>,
}

/// A page in an image.
#[derive(Clone, Copy, Debug)]
struct Found {
    page_type: PageType,
    record: u64,
    data: Option<u64>,
}

/// Show a page.
pub(super) fn run(args: &InspectArgs, pfn: u64, terminal: &Terminal) -> Result<Code> {
    let input = Input::open_seekable(&args.file, args.lenient, terminal)?;
    input.seekable("--page reads at any place of an image")?;
    let index = match args.ignore_index {
        true => None,
        false => uncompared_index_of(&input, args.lenient)?,
    };
    let mut source = own_position(&input.image)?;
    let found = match &index {
        Some(mapped) => by_index(mapped, &mut source, pfn)
            .map_err(|error| match error.is_bad_image() {
                true => crate::mapped::bad_index(&error),
                false => Error::new(error),
            })
            .with_context(|| input.name.clone())?,
        None => by_walking(&input, args, pfn)?,
    };
    let Some(found) = found else {
        let pfn = hex(pfn);
        bail!("{}: the image does not mention pfn {pfn}", input.name);
    };
    let page = match found.data {
        Some(data) => Some(read_page(&mut source, data).with_context(|| input.name.clone())?),
        None => None,
    };
    let mut out = Results::new();
    match args.json {
        true => out.json(&PageReport {
            file: &input.name,
            pfn,
            page_type: found.page_type.name(),
            layout: match index {
                Some(_) => "mapped",
                None => "stream",
            },
            record_offset: found.record,
            offset: found.data,
            contents: page.as_ref().map(digits),
        })?,
        false => {
            let name = shown(&input.name);
            let (pfn, name_of_type) = (hex(pfn), found.page_type.name());
            write!(out, "{name}: pfn {pfn}, {name_of_type}")?;
            match (found.data, &page) {
                (Some(data), Some(page)) => {
                    writeln!(out, ", at byte {}", hex(data))?;
                    dump(page, &mut out)?;
                }
                _ => writeln!(out, ", no contents")?,
            }
        }
    }
    out.finish()?;
    Ok(Code::Fine)
}

fn by_index<R: Read + Seek>(
    mapped: &Mapped,
    source: &mut R,
    pfn: u64,
) -> Result<Option<Found>, xsr_format::layout::LayoutError> {
    let found = mapped.find(source, Pfn(pfn))?;
    Ok(found.map(|place| Found {
        page_type: place.entry.page_type,
        record: place.record,
        data: place.data,
    }))
}

/// The last record that has the page.
fn by_walking(input: &Input, args: &InspectArgs, pfn: u64) -> Result<Option<Found>> {
    let reading = Reading {
        lenient: args.lenient,
    };
    let mut found = None;
    let walked = reading.over(input, &mut |step| {
        let Content::PageData(body) = step.content else {
            return Ok(());
        };
        let mut data = body.pages_offset();
        for entry in body.entries().iter() {
            let has_data = entry.page_type.has_data();
            if entry.pfn.0 == pfn {
                found = Some(Found {
                    page_type: entry.page_type,
                    record: step.position.offset,
                    data: has_data.then_some(data),
                });
            }
            if has_data {
                data += PAGE_SIZE as u64;
            }
        }
        Ok(())
    })?;
    input.finish(walked.bytes)?;
    Ok(found)
}

fn digits(page: &Page) -> String {
    page.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The page as lines of 16 bytes. A star stands for lines equal to the one before.
fn dump(page: &Page, out: &mut dyn Write) -> io::Result<()> {
    let mut before: Option<&[u8]> = None;
    let mut starred = false;
    for (number, line) in page.chunks(LINE).enumerate() {
        if before == Some(line) {
            if !starred {
                writeln!(out, "*")?;
            }
            starred = true;
            continue;
        }
        (before, starred) = (Some(line), false);
        write!(out, "{:03x} ", number * LINE)?;
        for (i, byte) in line.iter().enumerate() {
            let gap = if i == LINE / 2 { "  " } else { " " };
            write!(out, "{gap}{byte:02x}")?;
        }
        let text: String = (line.iter())
            .map(|byte| match byte {
                0x20..=0x7e => char::from(*byte),
                _ => '.',
            })
            .collect();
        writeln!(out, "  |{text}|")?;
    }
    writeln!(out, "{PAGE_SIZE:03x}")
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, SeekFrom};

    use xsr_format::frame::PageEntry;
    use xsr_format::layout::MappedWriter;
    use xsr_format::transcode::ImageSink as _;

    use super::*;

    /// Counts the bytes read from a file.
    struct Counted(Cursor<Vec<u8>>, u64);

    impl Read for Counted {
        fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
            let n = self.0.read(room)?;
            self.1 += n as u64;
            Ok(n)
        }
    }

    impl Seek for Counted {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }

    /// 64 MiB in full batches: a page costs the index and 20 KiB at most.
    #[test]
    fn a_page_of_a_mapped_image_costs_its_index_and_20_kib() {
        const BATCHES: u64 = 16;
        let mut writer = MappedWriter::new(Vec::new(), true);
        // Of the stream's beginning only the length matters here.
        writer.write_all(&[0; 48]).unwrap();
        for batch in 0..BATCHES {
            let entries: Vec<PageEntry> = (batch * 1024..batch * 1024 + 1024)
                .map(|pfn| PageEntry {
                    pfn: Pfn(pfn),
                    page_type: PageType::NOTAB,
                })
                .collect();
            writer.page_data(&entries).unwrap();
            for entry in &entries {
                let mut page = [0; PAGE_SIZE];
                page[..8].copy_from_slice(&entry.pfn.0.to_le_bytes());
                writer.write_all(&page).unwrap();
            }
        }
        writer.write_all(&[0; 8]).unwrap();
        let (file, _) = writer.finish().unwrap();
        for pfn in [0, 1, 1023, 1024, 9999, BATCHES * 1024 - 1] {
            let mut source = Counted(Cursor::new(file.clone()), 0);
            let mapped = Mapped::open(&mut source).unwrap().unwrap();
            let found = by_index(&mapped, &mut source, pfn).unwrap().unwrap();
            let page = read_page(&mut source, found.data.unwrap()).unwrap();
            assert_eq!(page[..8], pfn.to_le_bytes());
            let most = BATCHES * 80 + (20 << 10);
            assert!(source.1 <= most, "{} of {most}", source.1);
        }
    }

    #[test]
    fn a_dump_has_each_line_once() {
        let mut page = [0; PAGE_SIZE];
        page[32..37].copy_from_slice(b"Hello");
        let mut text = Vec::new();
        dump(&page, &mut text).unwrap();
        let text = String::from_utf8(text).unwrap();
        let zeros = format!(" {}  {}", " 00".repeat(8), "00 ".repeat(8).trim_end());
        let lines = [
            format!("000{zeros}  |................|"),
            "*".to_owned(),
            format!(
                "020  48 65 6c 6c 6f 00 00 00  {}  |Hello...........|",
                "00 ".repeat(8).trim_end()
            ),
            format!("030{zeros}  |................|"),
            "*".to_owned(),
            "1000".to_owned(),
        ];
        let got: Vec<&str> = text.lines().collect();
        assert_eq!(got, lines);
    }
}
