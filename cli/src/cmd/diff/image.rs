//! One image, as far as a comparison needs it: everything but page contents, which
//! stay in the file.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use xsr_format::frame::{PAGE_SIZE, Page, Pfn};
use xsr_format::image::{DomainHeader, ImageHeader};
use xsr_format::record::pv::PvInfo;
use xsr_format::record::x86::{CpuidLeaf, TscInfo};
use xsr_format::record::{Body, Record, RecordKind};
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord};
use xsr_format::wrapper::xl::XlHeader;

use super::pages::Pages;
use crate::file::Input;
use crate::image::{self, Event, Reading};
use crate::page_map::{PageMap, runs_of};

/// An image. Of what comes more than once in a stream, the last counts.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) input: Input,
    pub(crate) xl: Option<XlHeader>,
    pub(crate) libxl: Option<LibxlHeader>,
    pub(crate) libxc: Option<(ImageHeader, DomainHeader)>,
    /// What records there are, in order; PAGE_DATA in a row is one.
    pub(crate) sequence: Vec<String>,
    pub(crate) map: PageMap,
    pub(crate) pv: Option<PvInfo>,
    pub(crate) p2m: Option<P2m>,
    pub(crate) shared_info: Option<Box<Page>>,
    /// By kind and vcpu.
    pub(crate) vcpus: BTreeMap<(u32, RecordKind), Vec<u8>>,
    pub(crate) tsc: Option<TscInfo>,
    /// By leaf and subleaf.
    pub(crate) cpuid: BTreeMap<(u32, u32), CpuidLeaf>,
    /// Values by index.
    /// Flags and value by index.
    pub(crate) msrs: BTreeMap<u32, (u32, u64)>,
    pub(crate) hvm_context: Option<Vec<u8>>,
    /// Values by index.
    pub(crate) hvm_params: BTreeMap<u64, u64>,
    /// Records whose body has no fields: optional ones, by name.
    pub(crate) other: Vec<(String, Vec<u8>)>,
    pub(crate) emulators: Vec<LibxlRecord>,
}

/// X86_PV_P2M_FRAMES: the last pfn, and where the guest keeps the table.
#[derive(Debug)]
pub(crate) struct P2m {
    pub(crate) first: Pfn,
    pub(crate) last: Pfn,
    pub(crate) frames: Vec<Pfn>,
}

impl Image {
    /// Read all of an image but its page contents.
    pub(crate) fn read(input: Input, reading: Reading) -> Result<Self> {
        input.seekable("diff reads an image more than once")?;
        let mut image = Self {
            input,
            xl: None,
            libxl: None,
            libxc: None,
            sequence: Vec::new(),
            map: PageMap::default(),
            pv: None,
            p2m: None,
            shared_info: None,
            vcpus: BTreeMap::new(),
            tsc: None,
            cpuid: BTreeMap::new(),
            msrs: BTreeMap::new(),
            hvm_context: None,
            hvm_params: BTreeMap::new(),
            other: Vec::new(),
            emulators: Vec::new(),
        };
        let input = image.input.again()?;
        reading.over(&input, &mut |event| {
            image.event(event);
            Ok(())
        })?;
        Ok(image)
    }

    fn event(&mut self, event: Event<'_>) {
        match event {
            Event::Xl(header) => self.xl = Some(header.clone()),
            Event::Libxl(header) => self.libxl = Some(header),
            Event::Libxc(image, domain) => self.libxc = Some((image, domain)),
            Event::LibxlRecord(_, record) => {
                self.sequence.push(format!("libxl {}", record.kind()));
                let is_state = matches!(
                    record,
                    LibxlRecord::EmulatorXenstoreData { .. }
                        | LibxlRecord::EmulatorContext { .. }
                        | LibxlRecord::Optional { .. }
                );
                if is_state {
                    self.emulators.push(record.clone());
                }
            }
            Event::Pages(at, entries) => {
                let name = RecordKind::PAGE_DATA.to_string();
                if self.sequence.last() != Some(&name) {
                    self.sequence.push(name);
                }
                for run in runs_of(entries.iter(), at.page_data(entries)) {
                    self.map.insert(run);
                }
            }
            Event::Record(_, record) => self.record(record),
        }
    }

    fn record(&mut self, record: &Record<'_>) {
        let mut name = record.kind.to_string();
        match record.body {
            Body::PvInfo(info) => self.pv = Some(info),
            Body::P2mFrames(p2m) => {
                let (first, frames) = match self.p2m.take() {
                    // A guest that grew sends the frames of the new part alone.
                    Some(before) => {
                        let frames = before.frames.into_iter().chain(p2m.frames());
                        (before.first, frames.collect())
                    }
                    None => (p2m.start, p2m.frames().collect()),
                };
                self.p2m = Some(P2m {
                    first,
                    last: p2m.end,
                    frames,
                });
            }
            Body::Vcpu(vcpu) => {
                name = format!("{name} of vcpu {}", vcpu.vcpu);
                let key = (vcpu.vcpu, record.kind);
                self.vcpus.insert(key, vcpu.state.to_vec());
            }
            Body::SharedInfo(page) => self.shared_info = Some(Box::new(*page)),
            Body::TscInfo(tsc) => self.tsc = Some(tsc),
            Body::HvmContext(context) => self.hvm_context = Some(context.to_vec()),
            Body::HvmParams(params) => {
                self.hvm_params = params.iter().map(|p| (p.index, p.value)).collect();
            }
            Body::CpuidPolicy(policy) => {
                let leaves = policy.iter().map(|leaf| ((leaf.leaf, leaf.subleaf), leaf));
                self.cpuid = leaves.collect();
            }
            Body::MsrPolicy(policy) => {
                self.msrs = policy
                    .iter()
                    .map(|msr| (msr.index, (msr.flags, msr.value)))
                    .collect();
            }
            Body::Optional(body) | Body::Toolstack(body) => {
                self.other.push((name.clone(), body.to_vec()));
            }
            _ => {}
        }
        self.sequence.push(name);
    }

    /// The pages, for [`super::pages::compare`].
    pub(crate) fn pages(&self) -> Pages<'_> {
        Pages {
            map: &self.map,
            file: &self.input.file,
        }
    }

    /// The page of start_info: vcpu 0 of a suspended PV guest holds its pfn in edx.
    pub(crate) fn start_info(&self) -> Option<Pfn> {
        let context = self.vcpus.get(&(0, RecordKind::X86_PV_VCPU_BASIC))?;
        image::start_info(context, self.pv?)
    }

    /// The contents of a page, if the image has any.
    pub(crate) fn page(&self, pfn: Pfn) -> Result<Option<Box<Page>>> {
        use std::os::unix::fs::FileExt as _;
        let Some((_, Some(offset))) = self.map.get(pfn) else {
            return Ok(None);
        };
        let mut page = Box::new([0; PAGE_SIZE]);
        let file = &self.input.file;
        file.read_exact_at(page.as_mut_slice(), offset)
            .with_context(|| format!("{}: pfn {pfn}", self.input.name))?;
        Ok(Some(page))
    }
}
