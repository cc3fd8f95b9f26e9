//! `xsr convert`: any image to today's format: version 3, little endian, bare or wrapped by libxl
//! or xl.
//!
//! Legacy streams are converted by [`Converted`], all others by [`transcode`]. Legacy streams that
//! become mapped go through the pipe of [`Input::unwrapped`] to `transcode` too. The kernel copies
//! page data from file to file, except for the mapped layout, which has to look at them.
//!
//! C implementation: none; Xen's is `tools/python/scripts/convert-legacy-stream`, which [`script`]
//! replaces.

mod layout;
pub(crate) mod script;
mod xapi;

use std::io::{Seek as _, SeekFrom, Write};
use std::time::Instant;

use anyhow::{Context as _, Error, Result};
use serde::Serialize;
use xsr_format::detect::{Detected, detect};
use xsr_format::layout::MappedWriter;
use xsr_format::layout::index::Footer;
use xsr_format::legacy::convert::{Part, Spool, survey};
use xsr_format::legacy::detect::ToolstackWidth;
use xsr_format::legacy::{
    Checkpoints, Converted, LegacyGuest, LegacyOptions, LegacyReader, Target,
};
use xsr_format::read::ReadOptions;
use xsr_format::transcode::{
    CopyBytes, CopyError, Dropped, ImageSink, Layer, Summary, TranscodeError, transcode,
};
use xsr_format::walk::Walk;
use xsr_format::wrapper::libxl::LibxlRecordKind;
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::progress::Cancel;
use xsr_save_restore::storage::StorageCursor;

use crate::args::images::{ConvertArgs, ConvertTo, LayoutArg, LegacyGuestArg, WidthArg};
use crate::exit::{BadImage, BadUsage, Code};
use crate::feed;
use crate::file::Input;
use crate::mapped::{self, InOrder, Reordered};
use crate::origin;
use crate::output::{Existing, Output, OutputPlan, Sink};
use crate::pack::Packing;
use crate::peel::{self, LeftOut, Wanted};
use crate::stdout::report;
use crate::terminal::Terminal;
use crate::text::{Count, size};

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct ConvertReport<'a> {
    file: &'a str,
    /// `libxc`, `libxl`, `xl` or `xapi`.
    to: &'static str,
    /// Whether it was a legacy stream.
    legacy: bool,
    /// `stream` or `mapped`.
    layout: &'static str,
    /// Zero pages in a mapped image.
    #[serde(skip_serializing_if = "Option::is_none")]
    zero_pages: Option<u64>,
    /// Bytes written.
    bytes: u64,
    seconds: f64,
    /// State that came with the image and is missing from the output.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    left_out: Vec<LeftOut>,
    /// Other warnings.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Convert an image.
pub(crate) fn run(args: &ConvertArgs, terminal: &Terminal) -> Result<Code> {
    let started = Instant::now();
    check_layout(args)?;
    let packing = Packing::of(&args.pack, args.layout)?;
    let input = Input::open_as_it_is(&args.file)?;
    let mut inputs = vec![args.file.as_path()];
    inputs.extend(args.config.as_deref());
    let output = Output::open(&OutputPlan {
        path: &args.output,
        inputs: &inputs,
        existing: Existing::forced(args.overwrite.force),
        only_copy: false,
    })?;
    output.check_json(args.json)?;
    if args.layout == LayoutArg::Mapped && !output.is_new_file() {
        let why = format!(
            "{}: the mapped layout is for a regular file, in which pages have places: give one \
             with -o, or --layout stream",
            output.name()
        );
        return Err(Error::new(BadUsage(why)));
    }
    let config = match &args.config {
        Some(path) => Some(config_header(path)?),
        None => None,
    };
    let from = input.name.clone();
    let bar = match input.follow(terminal, "converting") {
        None => output.follow(terminal, "converting", None),
        bar => bar,
    };
    let converting = || format!("converting {from}");
    let (done, bytes) = match packing {
        None => output
            .fill(|sink| convert(args, input, config.as_ref(), sink).with_context(converting))?,
        Some(packing) => {
            let packer = packing.start(&output, Cancel::new())?;
            let filled = output.fill(|_| {
                let pipe = packer.pipe(from.clone())?;
                let done = pipe.fill(|sink| convert(args, input, config.as_ref(), sink));
                match done {
                    Ok((done, _)) => Ok((done, packer.finish()?.bytes)),
                    Err(error) => Err(packer.blame(error).context(converting())),
                }
            });
            filled?.0
        }
    };
    drop(bar);
    let seconds = started.elapsed().as_secs_f64();
    let (to, what) = match (args.to, done.to) {
        (Some(ConvertTo::Xapi), _) => ("xapi", "a suspend image of xapi"),
        (_, Layer::Libxc) => ("libxc", "a libxc stream"),
        (_, Layer::Libxl) => ("libxl", "a libxl stream"),
        (_, Layer::Xl) => ("xl", "an xl image"),
    };
    let words = match args.layout {
        LayoutArg::Stream => format!("{from} converted to {what}"),
        LayoutArg::Mapped => format!("{from} converted to {what}, mapped"),
    };
    terminal.note(&format!("{words}: {} in {seconds:.1} s", size(bytes)));
    if args.json {
        let document = ConvertReport {
            file: &args.file.display().to_string(),
            to,
            legacy: done.legacy,
            layout: match args.layout {
                LayoutArg::Stream => "stream",
                LayoutArg::Mapped => "mapped",
            },
            zero_pages: done.zero_pages,
            bytes,
            seconds,
            left_out: done.left_out,
            warnings: done.warnings,
        };
        report(terminal, &words, &document);
    }
    Ok(Code::Fine)
}

impl From<WidthArg> for ToolstackWidth {
    fn from(width: WidthArg) -> Self {
        match width {
            WidthArg::Bits32 => Self::Bits32,
            WidthArg::Bits64 => Self::Bits64,
        }
    }
}

impl From<LegacyGuestArg> for LegacyGuest {
    fn from(guest: LegacyGuestArg) -> Self {
        match guest {
            LegacyGuestArg::Pv => Self::Pv,
            LegacyGuestArg::Hvm => Self::Hvm,
        }
    }
}

struct Done {
    to: Layer,
    legacy: bool,
    zero_pages: Option<u64>,
    left_out: Vec<LeftOut>,
    warnings: Vec<String>,
}

/// An xl header with the configuration from a file.
fn config_header(path: &std::path::Path) -> Result<XlHeader> {
    let name = || path.display().to_string();
    let json = std::fs::read_to_string(path).with_context(name)?;
    let parsed = crate::config::Config::parse(json.trim_end_matches('\0'));
    parsed.map_err(|e| crate::config::not_libxls(path, &json, &e))?;
    XlHeader::new(json.trim_end_matches('\0'))
        .map_err(|e| Error::new(BadUsage(e.to_string())))
        .with_context(name)
}

pub(super) fn layer_of(to: ConvertTo) -> Layer {
    match to {
        // A suspend image has a libxc stream in it.
        ConvertTo::Libxc | ConvertTo::Xapi => Layer::Libxc,
        ConvertTo::Libxl => Layer::Libxl,
        ConvertTo::Xl => Layer::Xl,
    }
}

fn convert(
    args: &ConvertArgs,
    mut input: Input,
    config: Option<&XlHeader>,
    sink: &mut Sink<'_>,
) -> Result<Done> {
    let prefix = feed::peek(&input.image)?;
    // A plain legacy stream, or one with an xl header, needs no thread and no pipe.
    let (header, legacy) = match detect(&prefix) {
        Detected::Xl if peel::is_wrapped(&prefix) => {
            let options = ReadOptions {
                lenient: args.lenient,
                offset: 0,
            };
            match is_direct(args) {
                true => (Some(XlHeader::read(&input.image, options)?), true),
                false => (None, true),
            }
        }
        Detected::Legacy(_) => (None, true),
        _ if args.guest.is_some() || args.width.is_some() => (None, !is_modern(&prefix)),
        _ => (None, false),
    };
    if legacy && is_direct(args) {
        return convert_legacy(args, &mut input, header.as_ref().or(config), sink);
    }
    if legacy && (args.guest.is_some() || args.width.is_some()) {
        let why = "--guest and --width go neither with --layout mapped nor with --to xapi: convert \
                   the image to a stream first";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    let input = input.unwrapped(Wanted {
        lenient: args.lenient,
        records: args.to == Some(ConvertTo::Xapi),
    })?;
    let index = match args.ignore_index {
        true => None,
        false => mapped::index_of(&input, args.lenient)?,
    };
    let moved = match &index {
        Some(index) => InOrder::of(&input, index).map_err(|error| mapped::bad_index(&error))?,
        None => None,
    };
    let footer = index.map(|index| *index.footer());
    let done = match args.layout {
        _ if args.to == Some(ConvertTo::Xapi) => to_xapi(args, &input, moved, sink),
        LayoutArg::Stream => {
            let mut sink = layout::Stream { sink, footer };
            match moved {
                None => modern(args, &input, config, &mut sink, layout::copy_to_stream),
                Some(pages) => {
                    let mut sink = Reordered { sink, pages };
                    modern(args, &input, config, &mut sink, mapped::pass_over)
                }
            }
        }
        LayoutArg::Mapped => to_mapped(args, &input, config, (moved, footer), sink),
    };
    done.map(|done| Done { legacy, ..done })
        .map_err(|error| input.blame(error))
}

/// Whether a legacy stream is converted from file to file, without a thread and a pipe.
fn is_direct(args: &ConvertArgs) -> bool {
    args.layout == LayoutArg::Stream && args.to != Some(ConvertTo::Xapi)
}

/// Writes a suspend image of xapi.
fn to_xapi(
    args: &ConvertArgs,
    input: &Input,
    moved: Option<InOrder<'_>>,
    sink: &mut Sink<'_>,
) -> Result<Done> {
    let mut image = xapi::SuspendImage::begin(sink, input.kept())?;
    let (done, image) = match moved {
        None => {
            let done = modern(args, input, None, &mut image, xapi::copy_through)?;
            (done, image)
        }
        Some(pages) => {
            let mut sink = Reordered { sink: image, pages };
            let done = modern(args, input, None, &mut sink, mapped::pass_over)?;
            (done, sink.sink)
        }
    };
    image.finish(input.kept())?;
    Ok(done)
}

/// Checks that the options go together.
fn check_layout(args: &ConvertArgs) -> Result<()> {
    let mapped = args.layout == LayoutArg::Mapped;
    if args.to == Some(ConvertTo::Xapi) {
        xapi::check(mapped, args.config.is_some())?;
    }
    let given = match (args.no_sparse, args.page_digests) {
        (true, _) => "--no-sparse",
        (_, true) => "--page-digests",
        _ => return Ok(()),
    };
    match mapped {
        true => Ok(()),
        false => Err(Error::new(BadUsage(format!(
            "{given} is for --layout mapped: a stream has neither holes nor digests"
        )))),
    }
}

/// Writes an image in the mapped layout.
fn to_mapped(
    args: &ConvertArgs,
    input: &Input,
    config: Option<&XlHeader>,
    (moved, footer): (Option<InOrder<'_>>, Option<Footer>),
    sink: &mut Sink<'_>,
) -> Result<Done> {
    let sparse = !args.no_sparse;
    let slots = layout::Slots { sink, sparse };
    let sink = MappedWriter::new(slots, args.page_digests);
    let mut writer = layout::Remapped { sink, footer };
    let (done, writer) = match moved {
        None => {
            let done = modern(args, input, config, &mut writer, layout::copy_through)?;
            (done, writer)
        }
        Some(pages) => {
            let mut sink = Reordered {
                sink: writer,
                pages,
            };
            let done = modern(args, input, config, &mut sink, mapped::pass_over)?;
            (done, sink.sink)
        }
    };
    let (_, written) = writer.sink.finish()?;
    Ok(Done {
        zero_pages: Some(written.zero_pages),
        ..done
    })
}

/// Whether these bytes are certainly not the start of a legacy stream.
fn is_modern(prefix: &[u8]) -> bool {
    !matches!(
        detect(prefix),
        Detected::Legacy(_) | Detected::Foreign(_) | Detected::Unknown
    )
}

/// Converts an image of version 2 or 3.
fn modern<'i, W: ImageSink>(
    args: &ConvertArgs,
    input: &'i Input,
    config: Option<&XlHeader>,
    sink: &mut W,
    copy: CopyBytes<&'i StorageCursor, W>,
) -> Result<Done> {
    let options = ReadOptions {
        lenient: args.lenient,
        offset: 0,
    };
    let mut walk = Walk::open(&input.image, options)?;
    let own = match walk.detected() {
        Detected::Xl => Layer::Xl,
        Detected::Libxl => Layer::Libxl,
        _ => Layer::Libxc,
    };
    let to = args.to.map_or(own, layer_of);
    let made;
    let config = match (config, to, own) {
        (None, Layer::Xl, Layer::Libxc | Layer::Libxl) => {
            made = made_up_config(args, input)?;
            Some(&made)
        }
        (config, ..) => config,
    };
    let summary = transcode(&mut walk, sink, to, config, copy).map_err(|e| match e {
        // Unwrapped, so that its code and advice are those of a bad image.
        TranscodeError::Read(e) => Error::new(e),
        other => Error::new(other),
    })?;
    input.finish(walk.offset())?;
    let mut warnings = input.notes();
    warnings.extend(without_place(&summary, args.to));
    match args.to {
        Some(ConvertTo::Xapi) => warnings.extend(xapi::losses(input, own)),
        _ => warnings.extend(origin::losses(input, to == Layer::Xl)),
    }
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    let dropped = summary.named.iter().map(left_out);
    Ok(Done {
        to,
        legacy: false,
        zero_pages: None,
        left_out: input.left_out().into_iter().chain(dropped).collect(),
        warnings,
    })
}

/// Describes a record of a libxl stream that was left out.
fn left_out(dropped: &Dropped) -> LeftOut {
    LeftOut {
        record: dropped.kind.to_string(),
        what: match dropped.kind {
            LibxlRecordKind::EMULATOR_CONTEXT => "state of an emulator",
            LibxlRecordKind::EMULATOR_XENSTORE_DATA => "xenstore keys of an emulator",
            _ => "a record of the libxl stream",
        },
        offset: dropped.offset,
        bytes: dropped.bytes,
    }
}

/// The records of a libxl stream that were left out, in words.
fn without_place(summary: &Summary, to: Option<ConvertTo>) -> Option<String> {
    const NAMED: usize = 8;
    let named = summary.named.iter().take(NAMED).map(|dropped| {
        let left = left_out(dropped);
        let (bytes, at) = (Count(left.bytes, "byte"), left.offset);
        format!("{} ({}, {bytes} at byte {at:#x})", left.record, left.what)
    });
    let mut named: Vec<String> = named.collect();
    if summary.dropped > NAMED as u64 {
        named.push("…".to_owned());
    }
    (summary.dropped > 0).then(|| {
        let target = match to {
            Some(ConvertTo::Xapi) => "a suspend image of xapi",
            _ => "a libxc stream",
        };
        format!(
            "{} left out, for which {target} has no place: {}; --to libxl keeps them",
            Count(summary.dropped, "record"),
            named.join(", ")
        )
    })
}

/// An xl header for an image that has none, with the configuration that `xsr restore` would use.
fn made_up_config(args: &ConvertArgs, input: &Input) -> Result<XlHeader> {
    let json = super::restore::config_for(input, &args.file, args.lenient)?;
    XlHeader::new(&json).map_err(|e| Error::new(BadImage(e.to_string())))
}

fn convert_legacy(
    args: &ConvertArgs,
    input: &mut Input,
    header: Option<&XlHeader>,
    sink: &mut Sink<'_>,
) -> Result<Done> {
    let own = match header {
        Some(_) => Layer::Xl,
        None => Layer::Libxl,
    };
    let to = args.to.map_or(own, layer_of);
    let mut options = LegacyOptions {
        lenient: args.lenient,
        offset: 0,
        width: args.width.map(Into::into),
        guest: args.guest.map(Into::into),
        device_model: true,
        checkpoints: Checkpoints::All,
    };
    let mut spool: Option<Box<dyn Spool>> = None;
    if input.length.is_some() {
        options.offset = input.image.position();
        // Cheap, because page contents are skipped: finds out which checkpoints are complete.
        let found = survey(&input.image, options)?;
        if let Some(why) = &found.incomplete {
            tracing::warn!("the checkpoint after the last complete one is cut off: {why}");
        }
        options.checkpoints = Checkpoints::UpTo(found.complete);
        input.image.seek(SeekFrom::Start(options.offset))?;
    } else {
        let file = tempfile::tempfile().context("making a temporary file for checkpoints")?;
        spool = Some(Box::new(file));
    }
    let made;
    let header = match (header, to) {
        (None, Layer::Xl) => {
            let json = super::restore::config_for(input, &args.file, args.lenient)?;
            made = XlHeader::new(&json).map_err(|e| Error::new(BadImage(e.to_string())))?;
            Some(&made)
        }
        (header, _) => header,
    };
    if let (Layer::Xl, Some(header)) = (to, header) {
        sink.write_all(&header.for_version_2().encode())?;
    }
    let target = match to {
        Layer::Libxc => Target::Libxc {
            device_model: false,
        },
        Layer::Libxl | Layer::Xl => Target::Libxl,
    };
    let reader = LegacyReader::new(&input.image, options)?;
    let mut converted = Converted::new(reader, target, spool)?;
    pour(&mut converted, sink)?;
    peel::warn_of(converted.summary());
    Ok(Done {
        to,
        legacy: true,
        zero_pages: None,
        left_out: Vec::new(),
        warnings: Vec::new(),
    })
}

/// Copy the whole conversion to the sink.
fn pour(converted: &mut Converted<&StorageCursor>, sink: &mut Sink<'_>) -> Result<()> {
    loop {
        match converted.next_part()? {
            None => break,
            Some(Part::Bytes(bytes)) => sink.write_all(bytes)?,
            Some(Part::Through(_)) => {
                let mut failed = None;
                converted.with_source(|source, bytes| {
                    copy_bytes(source, bytes, sink).or_else(|e| {
                        failed = Some(e);
                        Ok(bytes)
                    })
                })?;
                if let Some(error) = failed {
                    return Err(Error::new(error).context("copying pages"));
                }
            }
        }
    }
    Ok(())
}

/// Copy from file to file, in the kernel where possible.
fn copy_bytes(
    source: &mut &StorageCursor,
    bytes: u64,
    sink: &mut Sink<'_>,
) -> Result<u64, CopyError> {
    let copied = sink.copy(source, bytes);
    copied.map_err(|error| match sink.has_failed() {
        true => CopyError::Write(error),
        false => CopyError::Read(error),
    })
}
