//! `xsr verify`: checks whether a restore would accept an image. Prints one line for each file, and
//! one for each warning.
//!
//! There are no rules for page contents, so those of a file are skipped, unless a mapped image has
//! digests of them and `--deep` is given.

use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::error::ReadError;
use xsr_format::image::ImageHeader;
use xsr_format::layout::check::check;
use xsr_format::layout::{LayoutError, Mapped};
use xsr_format::record::Body;
use xsr_format::walk::Content;

use crate::args::VerifyArgs;
use crate::backend::phase;
use crate::config::Config;
use crate::exit::{self, BadImage, Code};
use crate::file::Input;
use crate::image::{FileStep, Reading};
use crate::mapped::{self, Compared, own_position};
use crate::origin::{self, Origin};
use crate::page_map::{PageMap, runs_of};
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::{Count, shown, size};
use crate::verdict;

/// Verify each file. The worst exit code counts.
pub(crate) fn run(args: &VerifyArgs, terminal: &Terminal) -> Result<Code> {
    let mut out = Results::new();
    let mut worst = Code::Fine;
    for path in &args.files {
        let mut verdict = Verdict::new(path);
        let code = match verify(path, args, &mut verdict, terminal) {
            Ok(()) => Code::Fine,
            Err(e) => {
                let code = exit::code_of(&e);
                verdict.failed(&e, code);
                if code == Code::Usage || (!args.json && code != Code::BadImage) {
                    terminal.error(&e);
                }
                code
            }
        };
        if code == Code::Usage {
            return Ok(code);
        }
        match (args.json, code) {
            (true, _) => out.json_line(&verdict)?,
            (false, Code::Fine | Code::BadImage) => verdict.print(&mut out)?,
            // Neither good nor bad: the error is on stderr.
            (false, _) => {}
        }
        // Flushed so that the user can read this line while the next file is checked.
        out.flush()?;
        worst = worst.max(code);
    }
    out.finish()?;
    Ok(worst)
}

/// The verdict on one file. `--json` prints it as it is (docs/json.md).
#[derive(Debug, Default, Serialize)]
struct Verdict {
    /// The path as given, or `stdin`.
    file: String,
    /// `good`, `bad`, or `unreadable`.
    verdict: &'static str,
    /// The wrappers that were removed, outermost first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    layers: Vec<String>,
    /// The outermost layer of the image itself: `xl`, `libxl` or `libxc`.
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_type: Option<String>,
    /// The Xen version that saved it.
    #[serde(skip_serializing_if = "Option::is_none")]
    xen: Option<String>,
    /// The number of records in all streams.
    records: u64,
    /// Entries of PAGE_DATA.
    page_entries: u64,
    /// Bytes of the image.
    bytes: u64,
    /// Bytes after the image in the file, which are never read.
    #[serde(skip_serializing_if = "is_zero")]
    trailing_bytes: u64,
    /// The index of a mapped image.
    #[serde(skip_serializing_if = "Option::is_none")]
    mapped: Option<mapped::MappedFacts>,
    /// The same in words.
    #[serde(skip)]
    layout: Option<String>,
    /// Whether every digest was checked.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    digests_checked: bool,
    /// What does not match its digest. The first one is the error.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    damage: Vec<String>,
    /// Anomalies of a good image.
    warnings: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// The offset of the structure that is bad.
    #[serde(skip_serializing_if = "Option::is_none")]
    error_offset: Option<u64>,
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

fn verify(
    path: &Path,
    args: &VerifyArgs,
    verdict: &mut Verdict,
    terminal: &Terminal,
) -> Result<()> {
    let reading = Reading {
        lenient: args.lenient,
    };
    let input = Input::open(path, reading.lenient)?;
    verdict.file.clone_from(&input.name);
    let _bar = input.follow(terminal, "verifying");
    let index = match args.ignore_index {
        true => None,
        false => mapped::uncompared_index_of(&input, reading.lenient)?,
    };
    if args.deep {
        // First, so that damage is reported by its digest before a reader stumbles over it.
        deep(&input, index.as_ref(), verdict).with_context(|| input.name.clone())?;
    }
    let mut facts = Totals {
        origin: input.origin().cloned(),
        ..Totals::default()
    };
    let mut compared = index.as_ref().map(Compared::new);
    let walked = reading.over(&input, &mut |step| {
        facts.step(&step)?;
        verdict.step(&step);
        if let Some(compared) = &mut compared {
            compared.step(&step)?;
        }
        Ok(())
    })?;
    let bytes = walked.bytes;
    if let Some(compared) = compared {
        (compared.end(bytes)).with_context(|| input.name.clone())?;
    }
    verdict.layout = index.as_ref().map(mapped::words);
    verdict.mapped = index.as_ref().map(mapped::MappedFacts::of);
    verdict.bytes = bytes;
    verdict.layers = input.layers().to_vec();
    let behind = input.finish(bytes).with_context(|| input.name.clone())?;
    // The bytes after a mapped image are its index, unless that is in the xl header.
    let is_index = |index: &Mapped| index.footer().room.is_none();
    let behind = behind.filter(|_| !index.as_ref().is_some_and(is_index));
    let behind = behind.unwrap_or_default();
    verdict.trailing_bytes = behind.bytes;
    verdict.warnings.extend(input.notes());
    verdict.warnings.extend(origin::left_out(&input, true));
    let problems = facts.origin.iter().flat_map(Origin::problems_in_words);
    verdict.warnings.extend(problems);
    let Totals {
        config,
        origin: _,
        image,
        pages,
    } = facts;
    if let (Some(image), Some(guest)) = (image, &walked.guest) {
        let page = |pfn| pages.get(pfn).map(|(page_type, _)| page_type);
        verdict::check_guest(guest, pages.populated(), config.as_ref())
            .and_then(|()| verdict::check_p2m(guest, page))
            .with_context(|| input.name.clone())?;
        let warnings = verdict::warnings(image, guest).into_iter();
        verdict.warnings.extend(warnings.map(|warning| warning.0));
    }
    let trailing = verdict::trailing(bytes, &behind);
    verdict.warnings.extend(trailing.map(|warning| warning.0));
    Ok(())
}

/// The most damages that are listed. Further ones are only counted.
const MOST_DAMAGES: usize = 64;

/// Check every digest of an image, if it has any.
fn deep(input: &Input, index: Option<&Mapped>, verdict: &mut Verdict) -> Result<()> {
    let Some(index) = index else {
        let why = match input.length {
            Some(_) => "xsr convert --layout mapped makes one that has them",
            None => "those of a mapped image are found in a plain file only",
        };
        let text = format!("the image has no digests, so --deep had nothing more to check; {why}");
        verdict.warnings.push(text);
        return Ok(());
    };
    let mut count = 0_u64;
    phase("digests");
    check(index, &mut own_position(&input.image)?, |damage| {
        count += 1;
        if verdict.damage.len() < MOST_DAMAGES {
            verdict.damage.push(damage.to_string());
        }
        Ok::<(), LayoutError>(())
    })?;
    verdict.digests_checked = true;
    match &verdict.damage[..] {
        [] => Ok(()),
        [only] => Err(Error::new(BadImage(only.clone()))),
        [first, ..] => {
            let more = Count(count - 1, "more");
            Err(Error::new(BadImage(format!("{first} ({more})"))))
        }
    }
}

/// What the verdict depends on apart from the rules of the format.
#[derive(Debug, Default)]
struct Totals {
    config: Option<Config>,
    /// What another toolstack, or an older xl, says about the domain.
    origin: Option<Origin>,
    image: Option<ImageHeader>,
    pages: PageMap,
}

impl Totals {
    /// Take note of a step. What makes the image bad is an error.
    fn step(&mut self, step: &FileStep<'_, '_>) -> Result<()> {
        match &step.content {
            Content::XlHeader(header) => {
                self.config = verdict::config_of(header)?.map(|(_, config)| config);
                self.origin = Origin::of_xl(header);
            }
            Content::Headers(image, domain) => {
                let kind = self.config.as_ref().map(|config| config.kind);
                verdict::check_headers(*image, *domain, kind)?;
                if let (Some(origin), None) = (&self.origin, &self.config) {
                    verdict::check_origin(origin, domain.guest_type)?;
                }
                self.image = Some(*image);
            }
            Content::PageData(body) => {
                for run in runs_of(body.entries().iter(), body.pages_offset()) {
                    self.pages.insert_populated(run)?;
                }
            }
            Content::Record(record) => {
                if let (Body::Vcpu(vcpu), Some(config)) = (&record.body, &self.config) {
                    verdict::check_vcpu(record.kind, vcpu.vcpu, config)?;
                }
            }
            Content::LibxlHeader(_) | Content::LibxlRecord(_) => {}
        }
        Ok(())
    }
}

impl Verdict {
    fn new(path: &Path) -> Self {
        Self {
            file: path.display().to_string(),
            verdict: "good",
            ..Self::default()
        }
    }

    fn step(&mut self, step: &FileStep<'_, '_>) {
        let layer = match step.content {
            Content::XlHeader(_) => "xl",
            Content::LibxlHeader(_) => "libxl",
            _ => "libxc",
        };
        self.layer.get_or_insert(layer);
        match &step.content {
            Content::Headers(_, domain) => {
                self.guest_type = Some(domain.guest_type.to_string());
                if !domain.is_converted() {
                    self.xen = Some(format!("{}.{}", domain.xen_major, domain.xen_minor));
                }
            }
            Content::LibxlRecord(_) | Content::Record(_) => self.records += 1,
            Content::PageData(body) => {
                self.records += 1;
                self.page_entries += body.entries().len() as u64;
            }
            Content::XlHeader(_) | Content::LibxlHeader(_) => {}
        }
    }

    fn failed(&mut self, error: &Error, code: Code) {
        self.verdict = match code {
            Code::BadImage => "bad",
            _ => "unreadable",
        };
        // The chain begins with the file's name, which the line already has. If the chain is a
        // single error, it is printed whole.
        let skipped = usize::from(error.chain().nth(1).is_some());
        let mut text = exit::words(error.chain().skip(skipped));
        if let Some(advice) = exit::advice(error) {
            text = format!("{text}; {advice}");
        }
        self.error = Some(text);
        let mut chain = error.chain();
        let cause = chain.find_map(|cause| cause.downcast_ref::<ReadError>());
        self.error_offset = cause.map(|e| e.position.offset);
    }

    fn print(&self, out: &mut dyn Write) -> Result<()> {
        if let Some(error) = &self.error {
            writeln!(out, "{}: BAD: {error}", shown(&self.file))?;
            for damage in self.damage.iter().skip(1) {
                writeln!(out, "  damaged: {damage}")?;
            }
            return Ok(());
        }
        write!(out, "{}: good", shown(&self.file))?;
        if let (Some(layer), Some(guest)) = (self.layer, &self.guest_type) {
            write!(out, ", {layer} image of an {guest} guest")?;
        }
        match &self.xen {
            Some(xen) => write!(out, " from Xen {xen}")?,
            None => write!(out, " from a converter")?,
        }
        let (records, bytes) = (Count(self.records, "record"), size(self.bytes));
        write!(out, ", {records}, {bytes}")?;
        if let Some(layout) = &self.layout {
            write!(out, ", {layout}")?;
            if self.digests_checked {
                write!(out, ", all of them fit")?;
            }
        }
        if !self.layers.is_empty() {
            write!(out, ", inside: {}", self.layers.join(", "))?;
        }
        writeln!(out)?;
        for warning in &self.warnings {
            writeln!(out, "  warning: {warning}")?;
        }
        Ok(())
    }
}
