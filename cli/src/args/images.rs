//! The command line of what is done with images: convert, export, edit, cat; and that of
//! Xen's converter, for which xsr stands in.
//!
//! As `args.rs`, it depends on clap and the standard library alone.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

use super::{IdentityArg, PackArgs};

/// Convert an image to the current form: version 3, little endian
///
/// Reads legacy images (Xen 4.5 and earlier), version 2, big endian, images of libvirt, xapi and
/// xend, and compressed ones. It also works as a filter: `-` is stdin or stdout. Under the name
/// convert-legacy-stream it takes the arguments of Xen's script of that name.
///
/// With --layout mapped, page data is at multiples of 4096 in the file, zero pages are holes, and
/// an index and digests follow the image (docs/mapped.md). Stock tools read such an image like any
/// other.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr convert old.save -o new.save
  xsr convert --to libxl bare.libxc -o guest.libxl
  xsr convert --layout mapped web.save -o web.mapped
  xsr convert --to xapi web.xva -o suspend.img
  zcat old.save.gz | xsr convert - -o - | ssh host xl restore /dev/stdin
  LIBXL_CONVERT_HELPER=/usr/lib/xsr/convert-legacy-stream xl restore old.save")]
pub(crate) struct ConvertArgs {
    /// The kind of image to write [default: the same kind; for another toolstack's image, a libxl
    /// stream]
    #[arg(long, value_name = "LAYER")]
    pub(crate) to: Option<ConvertTo>,
    /// Where page data lies in the file
    #[arg(long, value_name = "LAYOUT", default_value = "stream")]
    pub(crate) layout: LayoutArg,
    /// For mapped: write zero pages instead of holes
    #[arg(long)]
    pub(crate) no_sparse: bool,
    /// For mapped: also write a digest for each page (16 bytes)
    #[arg(long)]
    pub(crate) page_digests: bool,
    #[command(flatten)]
    pub(crate) pack: PackArgs,
    /// Read a mapped image as a stream, without looking at its index
    #[arg(long)]
    pub(crate) ignore_index: bool,
    /// The configuration for an xl image: libxl's JSON, in a file [default: found in the image]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The kind of guest in a legacy image [default: detected]
    #[arg(long, value_name = "TYPE")]
    pub(crate) guest: Option<LegacyGuestArg>,
    /// Width of the toolstack that wrote a legacy image [default: detected]
    #[arg(long, value_name = "BITS")]
    pub(crate) width: Option<WidthArg>,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) overwrite: OverwriteArg,
    /// Where the converted image goes; `-` is stdout
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// The wrappers around a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertTo {
    /// A bare libxc stream
    Libxc,
    /// A libxl stream
    Libxl,
    /// An image of xl
    Xl,
    /// A suspend image of xapi (XCP-ng, XenServer)
    Xapi,
}

/// Where page data lies in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LayoutArg {
    /// One record after the other, as Xen writes them
    Stream,
    /// At multiples of 4096, with an index; for files
    Mapped,
}

/// What a legacy stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LegacyGuestArg {
    /// Paravirtualised
    Pv,
    /// Hardware-virtualised
    Hvm,
}

/// Bytes in the toolstack's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum WidthArg {
    /// 32 bits
    #[value(name = "32")]
    Bits32,
    /// 64 bits
    #[value(name = "64")]
    Bits64,
}

/// Convert a legacy stream to a v2 (or later) stream
#[derive(Debug, Parser)]
#[command(name = "convert-legacy-stream", version, infer_long_args = true)]
pub(crate) struct ScriptArgs {
    /// Legacy input to convert
    #[arg(short, long = "in", value_name = "FD or FILE")]
    pub(crate) input: String,
    /// v2 (or later) format output
    #[arg(short, long = "out", value_name = "FD or FILE")]
    pub(crate) output: String,
    /// Legacy toolstack bitness
    #[arg(short, long)]
    pub(crate) width: WidthArg,
    /// Type of guest in stream
    #[arg(short, long = "guest-type")]
    pub(crate) guest: LegacyGuestArg,
    /// Desired format of the outgoing stream
    #[arg(short, long, default_value = "libxc")]
    pub(crate) format: ScriptFormat,
    /// Say more on stderr
    #[arg(short, long)]
    pub(crate) verbose: bool,
    /// Is an xl header present in the stream?
    #[arg(short, long)]
    pub(crate) xl: bool,
    /// Skip processing of the qemu tail?
    #[arg(long)]
    pub(crate) skip_qemu: bool,
    /// Accepted and ignored: messages go to stderr
    #[arg(long)]
    pub(crate) syslog: bool,
}

/// What Xen's script makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScriptFormat {
    /// A bare libxc stream
    Libxc,
    /// A libxl stream
    Libxl,
}

/// Extract a guest's memory from an image
///
/// If a page occurs more than once (a live save), its last version counts. The formats are: elf,
/// the layout of `xl dump-core`, with the list of pages and the vcpus' registers, for crash and
/// volatility3; gdb, a core with the memory at the addresses of the guest's kernel and a thread
/// for each vcpu; raw, physical memory with each page at its own address.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr export guest.save -o guest.core && crash vmlinux guest.core
  xsr export --format gdb guest.save -o guest.gdb && gdb vmlinux guest.gdb -ex bt
  xsr export --format raw guest.save -o guest.mem")]
pub(crate) struct ExportArgs {
    /// The format of OUT
    #[arg(long, value_name = "FORMAT", default_value = "elf")]
    pub(crate) format: ExportFormat,
    /// For raw: leave holes for absent pages and pages of zeros [default for a file]
    #[arg(long, overrides_with = "no_sparse")]
    pub(crate) sparse: bool,
    /// For raw: write zeros for absent pages
    #[arg(long)]
    pub(crate) no_sparse: bool,
    /// For elf of a PV guest: list only pfns, as for a translated guest. volatility3 needs this;
    /// crash needs the default, a list of pfns and gmfns
    #[arg(long)]
    pub(crate) pfn_list: bool,
    /// For gdb: the vcpu whose page tables map the memory [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) vcpu: Option<u32>,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) overwrite: OverwriteArg,
    /// Where the memory goes; `-` is stdout
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: Option<PathBuf>,
    /// The image
    pub(crate) file: PathBuf,
    /// The same as --output OUT
    #[arg(
        value_name = "OUT",
        conflicts_with = "output",
        required_unless_present = "output"
    )]
    pub(crate) out: Option<PathBuf>,
}

/// What becomes of a file that is there already.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct OverwriteArg {
    /// Replace OUT if it is there already
    #[arg(short, long)]
    pub(crate) force: bool,
}

/// How memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// An ELF core, in the layout of `xl dump-core`
    Elf,
    /// An ELF core of an address space
    Gdb,
    /// Physical memory
    Raw,
}

/// Change the configuration in an image, or drop or add optional records
///
/// The guest's memory and state stay as they are, byte for byte.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr edit --name web2 web.save -o web2.save
  xsr cat --layer config web.save > new.json
  xsr edit --config new.json web.save -o web2.save
  xsr edit --drop 0x80000001 --add 0x80000002:note.bin web.save -o web2.save")]
pub(crate) struct EditArgs {
    /// The domain's name: not only digits, not Domain-0, without / and control characters
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The domain's UUID: not the null UUID, which is the control domain's
    #[arg(long)]
    pub(crate) uuid: Option<String>,
    /// The whole configuration: libxl's JSON, in a file (xsr cat --layer config prints it)
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Drop the optional records of this type (bit 31 set)
    #[arg(long, value_name = "TYPE", value_parser = optional_type)]
    pub(crate) drop: Vec<u32>,
    /// Add an optional record at the end of the libxc stream
    #[arg(long, value_name = "TYPE:FILE", value_parser = optional_record)]
    pub(crate) add: Vec<(u32, PathBuf)>,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) overwrite: OverwriteArg,
    /// Where the changed image goes; `-` is stdout
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// The type of an optional record, which a restorer may ignore.
fn optional_type(text: &str) -> Result<u32, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    match number {
        Ok(number) if number >> 31 == 1 => Ok(number),
        _ => Err("expected a type with bit 31 set, say 0x80000001".to_owned()),
    }
}

fn optional_record(text: &str) -> Result<(u32, PathBuf), String> {
    match text.split_once(':') {
        Some((kind, file)) if !file.is_empty() => Ok((optional_type(kind)?, file.into())),
        _ => Err("expected a type, a colon and a file".to_owned()),
    }
}

/// What of an image to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum CatLayer {
    /// The stream of libxc
    Libxc,
    /// The stream of libxl
    Libxl,
    /// Everything that xl wrote
    Xl,
    /// Only the configuration: xl's JSON or text, libvirt's XML, or what xend or xapi stored
    #[value(alias = "xml", alias = "json")]
    Config,
}

/// Write an image without its wrappers, to stdout or a file
///
/// Removes compression and the headers of xl, libvirt and xapi, and keeps the stream inside byte
/// for byte. There are two exceptions: a legacy stream is converted, because current tools do not
/// read it, and a mapped image also loses its padding and index, so that the result is the stream
/// that a plain save writes.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr cat guest.save | verify-stream-v2
  xsr cat --layer libxl guest.save.zst -o guest.libxl
  xsr cat --layer config guest.save | jq .c_info.name
  xsr cat --layer xml virsh.save > guest.xml")]
pub(crate) struct CatArgs {
    /// Where the stream goes; `-` is stdout
    #[arg(short, long, value_name = "OUT", default_value = "-")]
    pub(crate) output: PathBuf,
    #[command(flatten)]
    pub(crate) overwrite: OverwriteArg,
    /// What to write
    #[arg(long, value_name = "LAYER", default_value = "libxc")]
    pub(crate) layer: CatLayer,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}
