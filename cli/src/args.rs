//! The command line, as clap sees it: names, types, help texts. What the options
//! mean, the modules below `cmd` decide.
//!
//! Depends on clap and the standard library alone: `cargo xtask dist` includes this
//! file by its path to make man pages and completions.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

const LONG_ABOUT: &str = "\
Save, restore, inspect, verify and compare Xen domains and their images.

inspect, verify and diff read what `xl save` wrote, on any machine. save and restore \
work on the domains of a hypervisor; on a machine without Xen, that is a mock machine \
kept in a directory (`xsr mock create`, `--backend mock:DIR`).";

const EXIT_CODES: &str = "\
Exit codes:
  0   fine; for diff: no difference
  1   the operation failed; for diff: there are differences
  2   the image is bad (damaged, truncated, or not an image)
  64  the command line is wrong";

const ENVIRONMENT: &str = "\
Environment:
  XSR_BACKEND  the hypervisor, where --backend is not given
  XSR_LOG      what goes to the log on stderr, say `debug` or `xsr_save_restore=trace`";

const MAIN_EXAMPLES: &str = "\
Examples:
  xsr demo                                 see it work, no Xen needed
  xsr inspect guest.save                   what is in an image
  xsr verify *.save                        check images
  zstd -dc guest.save.zst | xsr verify -   check one as it comes
  xsr mock create web --host /tmp/lab      a domain to try things on
  xsr save --backend mock:/tmp/lab web web.save";

/// Save, restore, inspect, verify and compare Xen domains and their images
#[derive(Debug, Parser)]
#[command(
    name = "xsr",
    version,
    long_about = LONG_ABOUT,
    after_help = EXIT_CODES,
    after_long_help = format!("{MAIN_EXAMPLES}\n\n{EXIT_CODES}\n\n{ENVIRONMENT}"),
    arg_required_else_help = true,
    max_term_width = 100
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options that every command has.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Global {
    /// Say more on stderr (-vv: still more)
    #[arg(
        short,
        long,
        global = true,
        action = ArgAction::Count,
        conflicts_with = "quiet",
        help_heading = "Messages"
    )]
    pub(crate) verbose: u8,
    /// No progress, no notes: only results and errors
    #[arg(short, long, global = true, help_heading = "Messages")]
    pub(crate) quiet: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Save(SaveArgs),
    Restore(RestoreArgs),
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Diff(DiffArgs),
    Convert(ConvertArgs),
    Export(ExportArgs),
    Edit(EditArgs),
    Cat(CatArgs),
    Mock(MockArgs),
    Demo(DemoArgs),
}

/// Save a domain to an image, as `xl save` does
///
/// Afterwards the domain is gone, unless -c or -p keeps it. FILE appears when it is
/// complete, under a temporary name until then; where saving fails, the domain runs
/// on and no file is left. `-`, a pipe or a device is written straight.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr save --backend mock:/tmp/lab web web.save
  xsr save --backend mock:/tmp/lab -c web - | zstd > web.save.zst")]
pub(crate) struct SaveArgs {
    /// Leave the domain running afterwards
    #[arg(short = 'c', long)]
    pub(crate) checkpoint: bool,
    /// Leave the domain there, but paused
    #[arg(short = 'p', long)]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
    /// Where the image goes; `-` is stdout
    pub(crate) file: PathBuf,
}

/// Restore a domain from an image, as `xl restore` does
///
/// The image may be one of xl's, a libxl stream, or a bare libxc stream. Where
/// restoring fails, the domain that was being built is destroyed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr restore --backend mock:/tmp/lab web.save
  zstd -dc web.save.zst | xsr restore --backend mock:/tmp/lab -p -
  xsr restore --backend mock:/tmp/lab --name web --vcpus 2 --memory 256M bare.libxc")]
pub(crate) struct RestoreArgs {
    /// Leave the domain paused
    #[arg(short = 'p', long)]
    pub(crate) paused: bool,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// For an image without configuration: the domain's name [default: that of FILE]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// For an image without configuration: vcpus [default: found in the image]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) vcpus: Option<u32>,
    /// For an image without configuration: memory [default: found in the image]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<MemorySize>,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// Show what is in an image
///
/// Headers, configuration, each record with its offset and the facts in it, and what
/// they say of the guest.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr inspect guest.save
  xsr inspect --pages guest.save | less
  xsr inspect --json guest.save | jq .guest")]
pub(crate) struct InspectArgs {
    /// List every page entry (pfn and type)
    #[arg(long)]
    pub(crate) pages: bool,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// Check images against the format's rules
///
/// One line for each file. The exit code is 2 if any of them is bad, else 1 if any
/// could not be read.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr verify *.save
  zstd -dc guest.save.zst | xsr verify -")]
pub(crate) struct VerifyArgs {
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print JSON, one line for each file (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// The images; `-` is stdin
    #[arg(required = true, value_name = "FILE")]
    pub(crate) files: Vec<PathBuf>,
}

/// Say how two images differ in meaning
///
/// Headers, configuration, records, page types and contents, and the fields of
/// start_info, shared_info, the vcpus, the HVM context and parameters by name. Of a
/// page that comes more than once (a live save), the last version counts. Both images
/// must be files.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr diff before.save after.save
  xsr diff --after-restore original.save saved-again.save
  xsr diff --json before.save after.save | jq '.differences[].section'")]
pub(crate) struct DiffArgs {
    /// Take what a restore itself rewrites as expected (docs/images.md has the list)
    #[arg(long)]
    pub(crate) after_restore: bool,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// One image
    pub(crate) a: PathBuf,
    /// The other
    pub(crate) b: PathBuf,
}

/// Convert an image to today's form: version 3, little endian
///
/// Reads everything: legacy images (Xen 4.5 and earlier), version 2, big endian, images of
/// libvirt and xapi, compressed ones. It is a filter too: `-` is stdin and stdout. Under
/// the name convert-legacy-stream it takes the arguments of Xen's script of that name.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr convert old.save -o new.save
  xsr convert --to libxl bare.libxc -o guest.libxl
  zcat old.save.gz | xsr convert - -o - | ssh host xl restore /dev/stdin
  LIBXL_CONVERT_HELPER=/usr/lib/xsr/convert-legacy-stream xl restore old.save")]
pub(crate) struct ConvertArgs {
    /// What to make [default: what it was; of another toolstack's image, a libxl stream]
    #[arg(long, value_name = "LAYER")]
    pub(crate) to: Option<ConvertTo>,
    /// The configuration for an xl image: libxl's JSON, in a file [default: found in the image]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// What a legacy image holds [default: found out]
    #[arg(long, value_name = "TYPE")]
    pub(crate) guest: Option<LegacyGuestArg>,
    /// Width of the toolstack that wrote a legacy image [default: found out]
    #[arg(long, value_name = "BITS")]
    pub(crate) width: Option<WidthArg>,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Where the converted image goes; `-` is stdout
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// What stands around a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ConvertTo {
    /// A bare libxc stream
    Libxc,
    /// A libxl stream
    Libxl,
    /// An image of xl
    Xl,
}

/// What a legacy stream holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LegacyGuestArg {
    /// Paravirtualised
    Pv,
    /// Hardware-virtualised
    Hvm,
}

/// Octets in the toolstack's words.
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

/// Take a guest's memory out of an image
///
/// Of a page that comes more than once (a live save), the last version counts. elf is the
/// layout of `xl dump-core`, with the list of pages and the vcpus' registers, which crash
/// and volatility3 open; raw is physical memory, each page at its own address.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr export guest.save guest.core
  xsr export --format raw --sparse guest.save guest.mem")]
pub(crate) struct ExportArgs {
    /// What to make
    #[arg(long, value_name = "FORMAT", default_value = "elf")]
    pub(crate) format: ExportFormat,
    /// For raw: leave holes where there is no page, or one of zeros
    #[arg(long)]
    pub(crate) sparse: bool,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// The image
    pub(crate) file: PathBuf,
    /// Where the memory goes; `-` is stdout
    pub(crate) output: PathBuf,
}

/// How memory is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// An ELF core
    Elf,
    /// Physical memory
    Raw,
}

/// Change the configuration in an image, drop or add optional records
///
/// The guest's memory and state stay as they are, octet for octet.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr edit --name web2 web.save -o web2.save
  xsr edit --config new.json web.save -o web2.save
  xsr edit --drop 0x80000001 --add 0x80000002:note.bin web.save -o web2.save")]
pub(crate) struct EditArgs {
    /// The domain's name
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// The domain's UUID
    #[arg(long)]
    pub(crate) uuid: Option<String>,
    /// All of the configuration: libxl's JSON, in a file
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Drop the optional records of this type (bit 31 set)
    #[arg(long, value_name = "TYPE", value_parser = optional_type)]
    pub(crate) drop: Vec<u32>,
    /// Add an optional record at the end of the libxc stream
    #[arg(long, value_name = "TYPE:FILE", value_parser = optional_record)]
    pub(crate) add: Vec<(u32, PathBuf)>,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Where the changed image goes; `-` is stdout
    #[arg(short, long, value_name = "OUT")]
    pub(crate) output: PathBuf,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// The type of an optional record: whoever restores the image may not know it.
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

/// Write an image to stdout without what stands around it
///
/// Compressions, the headers of xl, libvirt and xapi go; the stream inside stays as it is,
/// octet for octet. (A legacy stream, which nobody reads any more, is converted.)
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr cat guest.save | verify-stream-v2
  xsr cat --layer libxl guest.save.zst | wc -c")]
pub(crate) struct CatArgs {
    /// Down to which layer: the stream of libxc, that of libxl, or all that xl wrote
    #[arg(long, value_name = "LAYER", default_value = "libxc")]
    pub(crate) layer: ConvertTo,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// Make and look after the domains of a mock machine
///
/// A mock machine is a directory. Its domains have real memory, page tables and
/// registers, and outlive the command.
#[derive(Debug, Args)]
pub(crate) struct MockArgs {
    #[command(subcommand)]
    pub(crate) command: MockCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum MockCommand {
    Create(MockCreateArgs),
    List(MockListArgs),
    Show(MockShowArgs),
    Destroy(MockDestroyArgs),
}

/// Make a domain, filled with a seeded pattern
///
/// The same options make the same domain. The directory is made where there is none.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  xsr mock create web --host /tmp/lab --type pv --memory 256M --vcpus 2 --seed 7")]
pub(crate) struct MockCreateArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// How the guest is virtualised
    #[arg(long = "type", value_name = "TYPE", default_value = "pv")]
    pub(crate) kind: MockKind,
    /// Memory: a number of MiB, or one with K, M or G
    #[arg(long, value_name = "SIZE", default_value = "256M")]
    pub(crate) memory: MemorySize,
    /// Virtual CPUs
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) vcpus: u32,
    /// What the pattern in its memory grows from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// The domain's name
    pub(crate) name: String,
}

/// List the domains
#[derive(Debug, Args)]
pub(crate) struct MockListArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show one domain
#[derive(Debug, Args)]
pub(crate) struct MockShowArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
}

/// Destroy a domain
#[derive(Debug, Args)]
pub(crate) struct MockDestroyArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// Name or number of the domain
    pub(crate) domain: String,
}

/// Which mock machine.
#[derive(Debug, Args)]
pub(crate) struct MockHostArg {
    /// The directory that is the mock machine
    #[arg(long, value_name = "DIR")]
    pub(crate) host: PathBuf,
}

/// See it work: domains on a mock machine, saved, verified, restored, compared
///
/// Needs no Xen and no privileges. Leaves nothing behind.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {}

/// Which hypervisor.
#[derive(Debug, Args)]
pub(crate) struct BackendArg {
    /// The hypervisor: `auto` (the Xen this runs on) or `mock:DIR`
    #[arg(
        long,
        value_name = "BACKEND",
        env = "XSR_BACKEND",
        default_value = "auto",
        hide_env_values = true
    )]
    pub(crate) backend: Backend,
}

/// A hypervisor, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    /// The Xen this runs on.
    Auto,
    /// The mock machine in this directory.
    Mock(PathBuf),
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            None if text == "auto" => Ok(Self::Auto),
            Some(("mock", "")) => Err("mock: wants a directory behind the colon".to_owned()),
            Some(("mock", dir)) => Ok(Self::Mock(PathBuf::from(dir))),
            _ => Err("expected `auto` or `mock:DIR`".to_owned()),
        }
    }
}

/// The kinds of guest that the mock machine makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MockKind {
    /// Paravirtualised, 64-bit
    Pv,
    /// Paravirtualised, 32-bit
    Pv32,
    /// Hardware-virtualised, with a device model
    Hvm,
    /// Hardware-virtualised, without a device model
    Pvh,
}

/// An amount of memory: whole pages, at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemorySize {
    /// The amount in KiB, a multiple of 4.
    pub(crate) kib: u64,
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let kib_per_unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
            "k" | "kib" => 1,
            "" | "m" | "mib" => 1 << 10,
            "g" | "gib" => 1 << 20,
            "t" | "tib" => 1 << 30,
            _ => return Err("expected a number of MiB, or one with K, M, G or T".to_owned()),
        };
        let number: u64 = digits
            .parse()
            .map_err(|_| "expected a number of MiB, or one with K, M, G or T".to_owned())?;
        let kib = number
            .checked_mul(kib_per_unit)
            .filter(|kib| *kib <= 1 << 40)
            .ok_or("that is more than an x86 machine can address")?;
        if kib == 0 || !kib.is_multiple_of(4) {
            return Err("expected one or more whole pages of 4 KiB".to_owned());
        }
        Ok(Self { kib })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn memory_is_in_mib_unless_it_says_otherwise() {
        let kib = |text: &str| MemorySize::from_str(text).map(|size| size.kib);
        assert_eq!(kib("256"), Ok(256 << 10));
        assert_eq!(kib("256M"), Ok(256 << 10));
        assert_eq!(kib("2GiB"), Ok(2 << 20));
        assert_eq!(kib("8k"), Ok(8));
        for bad in [
            "",
            "M",
            "0",
            "3k",
            "1.5G",
            "-1",
            "12X",
            "99999999999999999T",
        ] {
            assert!(kib(bad).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn backends_are_told_apart() {
        assert_eq!("auto".parse(), Ok(Backend::Auto));
        assert_eq!("mock:/a:b".parse(), Ok(Backend::Mock("/a:b".into())));
        for bad in ["", "mock", "mock:", "xen:", "kvm"] {
            assert!(bad.parse::<Backend>().is_err(), "{bad} was taken");
        }
    }
}
