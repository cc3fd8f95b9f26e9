//! The command line, as clap sees it: names, types, help texts. What the options
//! mean, the modules below `cmd` decide.
//!
//! Depends on clap and the standard library alone: `cargo xtask dist` includes this
//! file by its path to make man pages and completions.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

// Named, because `xtask` includes this file by its path, too.
#[path = "args/images.rs"]
pub(crate) mod images;

use images::{CatArgs, ConvertArgs, EditArgs, ExportArgs};

const LONG_ABOUT: &str = "\
Save, restore, inspect, verify and compare Xen domains and their images.

inspect, verify, diff, convert, edit, export and cat take images of any age, of xl, libvirt \
and xapi, compressed or not, on any machine. save and restore \
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
