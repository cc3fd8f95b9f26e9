//! One image, as far as a comparison needs it: everything except page contents, which stay in the
//! file.

use std::path::Path;

use anyhow::{Context as _, Error, Result};
use xsr_format::frame::{PAGE_SIZE, Page, Pfn};
use xsr_format::guest_image::GuestImage;
use xsr_format::image::{DomainHeader, GuestType, ImageHeader};
use xsr_format::record::{Body, Record, RecordKind};
use xsr_format::walk::Content;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord};
use xsr_format::wrapper::xl::XlHeader;

use super::pages::Pages;
use crate::exit::BadImage;
use crate::file::Input;
use crate::image::{self, FileStep, Reading};
use crate::page_map::{PageMap, runs_of};
use crate::terminal::Terminal;

/// The most records of an image to compare. Consecutive PAGE_DATA records count as one.
const MOST_RECORDS: usize = 1 << 19;
/// The most bytes in its optional records.
const MOST_OTHER: usize = 32 << 20;
/// The most bytes in its emulator records, because two images are held at once. QEMU's records take
/// less than 1 MiB.
const MOST_EMULATORS: u64 = 32 << 20;

/// An image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) input: Input,
    pub(crate) xl: Option<XlHeader>,
    pub(crate) libxl: Option<LibxlHeader>,
    pub(crate) libxc: Option<(ImageHeader, DomainHeader)>,
    /// The kinds of its records, in order. Consecutive PAGE_DATA records count as one.
    pub(crate) sequence: Vec<String>,
    pub(crate) map: PageMap,
    /// What the records say about the guest.
    pub(crate) guest: GuestImage,
    /// Optional records, by name. Their bodies have no known fields.
    pub(crate) other: Vec<(String, Vec<u8>)>,
    /// Their total length.
    other_bytes: usize,
    pub(crate) emulators: Vec<LibxlRecord>,
    /// Their total length.
    emulator_bytes: u64,
}

impl Image {
    /// Read all of an image except its page contents.
    pub(crate) fn read(path: &Path, reading: Reading, terminal: &Terminal) -> Result<Self> {
        let input = Input::open_seekable(path, reading.lenient, terminal)?;
        input.seekable("diff reads an image more than once")?;
        let mut image = Self {
            input,
            xl: None,
            libxl: None,
            libxc: None,
            sequence: Vec::new(),
            map: PageMap::default(),
            // Replaced by the stream's guest, which every good image has.
            guest: GuestImage::new(GuestType(0)),
            other: Vec::new(),
            other_bytes: 0,
            emulators: Vec::new(),
            emulator_bytes: 0,
        };
        let input = image.input.again()?;
        let bar = input.follow(terminal, "reading");
        let walked = reading.over(&input, &mut |step| {
            image.step(&step)?;
            image.check_size()
        })?;
        if let Some(guest) = walked.guest {
            image.guest = guest;
        }
        drop(bar);
        Ok(image)
    }

    /// Checks that what is held of the image is small enough. It is for any image that can be
    /// restored, unless it has many bytes of optional records or very many checkpoints.
    fn check_size(&self) -> Result<()> {
        let what = match () {
            () if self.sequence.len() > MOST_RECORDS => "records",
            () if self.emulator_bytes > MOST_EMULATORS => "bytes in emulators' records",
            () if self.other_bytes > MOST_OTHER => "bytes in optional records",
            () => return Ok(()),
        };
        let name = &self.input.name;
        Err(Error::msg(format!(
            "{name}: too many {what} to be compared"
        )))
    }

    fn step(&mut self, step: &FileStep<'_, '_>) -> Result<(), BadImage> {
        match &step.content {
            Content::XlHeader(header) => self.xl = Some((*header).clone()),
            Content::LibxlHeader(header) => self.libxl = Some(*header),
            Content::Headers(image, domain) => self.libxc = Some((*image, *domain)),
            Content::LibxlRecord(record) => {
                self.sequence.push(format!("libxl {}", record.kind()));
                let is_state = matches!(
                    record,
                    LibxlRecord::EmulatorXenstoreData { .. }
                        | LibxlRecord::EmulatorContext { .. }
                        | LibxlRecord::Optional { .. }
                );
                if is_state {
                    self.emulator_bytes += step.length;
                    if self.emulator_bytes <= MOST_EMULATORS {
                        self.emulators.push(record.clone());
                    }
                }
            }
            Content::PageData(body) => {
                let name = RecordKind::PAGE_DATA.to_string();
                if self.sequence.last() != Some(&name) {
                    self.sequence.push(name);
                }
                for run in runs_of(body.entries().iter(), body.pages_offset()) {
                    self.map.insert(run)?;
                }
            }
            Content::Record(record) => self.record(record),
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>) {
        let mut name = record.kind.to_string();
        match record.body {
            Body::Vcpu(vcpu) => name = format!("{name} of vcpu {}", vcpu.vcpu),
            Body::Optional(body) => {
                self.other_bytes += body.len();
                if self.other_bytes <= MOST_OTHER {
                    self.other.push((name.clone(), body.to_vec()));
                }
            }
            // `guest` holds their contents.
            Body::PvInfo(_)
            | Body::P2mFrames(_)
            | Body::SharedInfo(_)
            | Body::TscInfo(_)
            | Body::HvmContext(_)
            | Body::HvmParams(_)
            | Body::CpuidPolicy(_)
            | Body::MsrPolicy(_) => {}
            // These have no contents.
            Body::End | Body::Verify | Body::Checkpoint | Body::StaticDataEnd => {}
        }
        self.sequence.push(name);
    }

    /// The pages, for [`super::pages::compare`].
    pub(crate) fn pages(&self) -> Pages<'_> {
        Pages {
            map: &self.map,
            image: &self.input.image,
        }
    }

    /// The start_info page of a PV guest.
    pub(crate) fn start_info(&self) -> Option<Pfn> {
        image::start_info(&self.guest)
    }

    /// The contents of a page, if the image has any.
    pub(crate) fn page(&self, pfn: Pfn) -> Result<Option<Box<Page>>> {
        let Some((_, Some(offset))) = self.map.get(pfn) else {
            return Ok(None);
        };
        let mut page = Box::new([0; PAGE_SIZE]);
        let image = &self.input.image;
        image
            .read_exact_at(page.as_mut_slice(), offset)
            .with_context(|| format!("{}: pfn {pfn}", self.input.name))?;
        Ok(Some(page))
    }
}
