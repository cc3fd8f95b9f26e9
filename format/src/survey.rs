//! Survey of an image: what domain a restorer must create for it.
//!
//! C implementation: none. xl takes these facts from the configuration, which an image may lack.

use std::collections::BTreeMap;
use std::io::Read;

use thiserror::Error;

use crate::detect::Detected;
use crate::error::ReadError;
use crate::frame::{PageEntry, Pfn};
use crate::guest_image::GuestImage;
use crate::image::{DomainHeader, GuestType, ImageHeader};
use crate::read::ReadOptions;
use crate::record::pv::PvInfo;
use crate::walk::{Content, Walk};
use crate::wrapper::libxl::{EmulatorInstance, LibxlHeader, LibxlRecord};
use crate::wrapper::xl::XlHeader;

/// What an image says about the domain that it needs. Made by [`Survey::of`], which reads the image
/// once, forwards, and skips the contents of pages.
///
/// ```
/// use xsr_format::survey::{DomainKind, Survey};
/// use xsr_format::{Pfn, ReadOptions};
///
/// # mod doc { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/doc/image.rs.in")); }
/// # let image = doc::image();
/// let survey = Survey::of(&image[..], ReadOptions::default())?;
/// assert_eq!(survey.kind(), Some(DomainKind::Hvm { emulated: None }));
/// assert_eq!((survey.populated_pages, survey.last_pfn), (1, Some(Pfn(0x1000))));
/// assert_eq!(survey.xen(), Some((4, 20)));
/// # Ok::<(), xsr_format::survey::SurveyError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Survey {
    /// The outermost layer: xl's header, a libxl stream or a libxc stream.
    pub detected: Detected,
    /// xl's header, with the configuration, if there is one.
    pub xl: Option<XlHeader>,
    /// The header of the libxl stream, if there is one.
    pub libxl: Option<LibxlHeader>,
    /// Version and byte order of the libxc stream.
    pub image: ImageHeader,
    /// The guest's type and the version of the Xen that saved it.
    pub domain: DomainHeader,
    /// The guest's state: vcpus, CPU policy, HVM parameters, checkpoints.
    pub guest: GuestImage,
    /// The emulators whose state is in the image, each with its latest. Empty for a bare libxc
    /// stream, which has no place for them.
    pub emulators: Vec<Emulator>,
    /// Pages that have memory after the last record.
    pub populated_pages: u64,
    /// The highest pfn that any record names. `None` if there is no entry.
    pub last_pfn: Option<Pfn>,
    /// Bytes of the image.
    pub bytes: u64,
}

/// The state of an emulator in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Emulator {
    /// Which one.
    pub instance: EmulatorInstance,
    /// Bytes of its state.
    pub bytes: u64,
}

/// The kind of domain that an image needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DomainKind {
    /// Paravirtualised, of this width.
    Pv(PvInfo),
    /// HVM or PVH, whose streams are alike: HVM domains have an emulator.
    Hvm {
        /// Whether the image has an emulator's state, and so needs an HVM domain. `None` if it is a
        /// bare libxc stream, in which that cannot be seen.
        emulated: Option<bool>,
    },
}

/// Why an image could not be surveyed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SurveyError {
    /// The image is invalid, or the source failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The image ends before its libxc stream.
    #[error("the image has no libxc stream")]
    NoStream,
    /// The image names too many pfns without contents, too far apart.
    #[error(
        "the image names pages without contents in more than {MAX_EMPTY_CHUNKS} ranges of 128 MiB"
    )]
    TooScattered,
}

impl Survey {
    /// Surveys an image that [`Walk`] reads. For a file, [`Survey::of_walk`] with
    /// [`Walk::open_seeking`] is faster.
    ///
    /// # Errors
    ///
    /// See [`SurveyError`].
    pub fn of(source: impl Read, options: ReadOptions) -> Result<Self, SurveyError> {
        Self::of_walk(Walk::open(source, options)?)
    }

    /// Surveys an image with a walk that has taken no step yet.
    ///
    /// # Errors
    ///
    /// See [`SurveyError`].
    pub fn of_walk<R: Read>(mut walk: Walk<R>) -> Result<Self, SurveyError> {
        let start = walk.offset();
        let mut headers = None;
        let mut emulators = BTreeMap::new();
        let mut pages = PfnSet::default();
        while let Some(step) = walk.next_step()? {
            match step.content {
                Content::Headers(image, domain) => headers = Some((image, domain)),
                Content::LibxlRecord(LibxlRecord::EmulatorContext { emulator, state }) => {
                    let bytes = state.len() as u64;
                    let instance = emulator;
                    // Each checkpoint has the state again.
                    let key = (instance.id.value(), instance.index);
                    emulators.insert(key, Emulator { instance, bytes });
                }
                Content::PageData(body) => {
                    for entry in body.entries() {
                        pages.apply(entry)?;
                    }
                }
                Content::XlHeader(_)
                | Content::LibxlHeader(_)
                | Content::LibxlRecord(_)
                | Content::Record(_) => {}
            }
        }
        let ((image, domain), guest) = headers
            .zip(walk.take_guest())
            .ok_or(SurveyError::NoStream)?;
        Ok(Self {
            detected: walk.detected(),
            xl: walk.xl().cloned(),
            libxl: walk.libxl(),
            image,
            domain,
            guest,
            emulators: emulators.into_values().collect(),
            populated_pages: pages.count,
            last_pfn: pages.last,
            bytes: walk.offset().saturating_sub(start),
        })
    }

    /// The kind of domain. `None` for a guest type that this version does not know, or a PV guest
    /// whose width is missing.
    pub fn kind(&self) -> Option<DomainKind> {
        match self.domain.guest_type {
            GuestType::X86_PV => self.guest.pv_info().map(DomainKind::Pv),
            GuestType::X86_HVM => Some(DomainKind::Hvm {
                emulated: self.libxl.map(|_| !self.emulators.is_empty()),
            }),
            _ => None,
        }
    }

    /// Number of vcpus that the domain needs.
    pub fn vcpus(&self) -> u32 {
        self.guest.vcpus_needed()
    }

    /// The version of the Xen that saved the guest. `None` if the stream was converted from a
    /// legacy one, which does not have it.
    pub fn xen(&self) -> Option<(u32, u32)> {
        let domain = self.domain;
        (!domain.is_converted()).then_some((domain.xen_major, domain.xen_minor))
    }

    /// Whether this is a stream of checkpoints (Remus or COLO), which a plain restore refuses.
    pub fn is_checkpointed(&self) -> bool {
        self.guest.checkpoints() > 0
    }

    /// Whether the image holds the guest's CPU policy. Without it, the guest gets that of the
    /// restoring host.
    pub fn has_cpu_policy(&self) -> bool {
        !self.guest.cpuid().is_empty()
    }
}

/// Ranges without contents that an image may name, beyond one for each page with contents. A bitmap
/// for each takes 4 KiB.
const MAX_EMPTY_CHUNKS: u64 = 1 << 14;
/// Words in the bitmap of a range.
const WORDS: usize = 512;

/// A set of pfns: one bitmap of 4 KiB for each range of 128 MiB with memory. A page with contents
/// takes 4 KiB in the image, so the set takes no more memory than the image has, and
/// [`MAX_EMPTY_CHUNKS`] bitmaps.
#[derive(Debug, Default)]
struct PfnSet {
    chunks: BTreeMap<u64, Box<[u64; WORDS]>>,
    count: u64,
    last: Option<Pfn>,
    /// Entries with contents so far.
    with_contents: u64,
}

impl PfnSet {
    fn apply(&mut self, entry: PageEntry) -> Result<(), SurveyError> {
        let Pfn(pfn) = entry.pfn;
        let populated = entry.page_type.is_populated();
        self.last = self.last.max(Some(entry.pfn));
        let has_data = u64::from(entry.page_type.has_data());
        self.with_contents = self.with_contents.saturating_add(has_data);
        let (key, word, bit) = (pfn >> 15, (pfn >> 6) & 0x1ff, 1_u64 << (pfn & 63));
        let chunk = match populated {
            true => {
                let chunk = self.chunks.entry(key);
                Some(chunk.or_insert_with(|| Box::new([0; WORDS])))
            }
            false => self.chunks.get_mut(&key),
        };
        let word = chunk.and_then(|chunk| chunk.get_mut(usize::try_from(word).unwrap_or(0)));
        if let Some(word) = word {
            let had = *word & bit != 0;
            match populated {
                true => *word |= bit,
                false => *word &= !bit,
            }
            self.count = match (had, populated) {
                (false, true) => self.count.saturating_add(1),
                (true, false) => self.count.saturating_sub(1),
                _ => self.count,
            };
        }
        let most = self.with_contents.saturating_add(MAX_EMPTY_CHUNKS);
        match self.chunks.len() as u64 > most {
            true => Err(SurveyError::TooScattered),
            false => Ok(()),
        }
    }
}
