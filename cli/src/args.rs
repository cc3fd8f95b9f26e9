//! The command line, as clap sees it: names, types, help texts. What the options
//! mean, the modules below `cmd` decide.
//!
//! Depends on clap and the standard library alone: `cargo xtask dist` includes this
//! file by its path to make man pages and completions.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use self::images::{CatArgs, ConvertArgs, EditArgs, ExportArgs};
pub(crate) use self::machine::{Backend, BackendArg, MockHostArg, VARIABLE};
pub(crate) use self::migrate::{ConnectionArgs, Endpoint, MigrateArgs, ReceiveArgs};
pub(crate) use self::mock::{
    MockArgs, MockCommand, MockCreateArgs, MockDomainArgs, MockEnd, MockKind, MockListArgs,
    MockNewHostArgs, MockRenameArgs, MockShowArgs, MockWorkloadArgs, WorkloadArgs,
};
pub(crate) use self::remus::{OnLoss, RemusArgs};

// Named, because `xtask` includes this file from another place.
#[path = "args/images.rs"]
pub(crate) mod images;
#[path = "args/machine.rs"]
mod machine;
#[path = "args/migrate.rs"]
mod migrate;
#[path = "args/mock.rs"]
mod mock;
#[path = "args/remus.rs"]
mod remus;

const LONG_ABOUT: &str = "\
Save, restore, migrate, inspect, verify and compare Xen domains and their images.

inspect, verify, diff, convert, edit, export and cat take images of any age, of xl, libvirt \
and xapi, compressed or not, on any machine. save, restore, \
migrate and remus work on the domains of a hypervisor. On a Xen host the host's own xl does them, with \
this engine as its save helper, and takes all of its own flags; on a machine without Xen, they \
work on a mock machine kept in a directory (`xsr mock create`, `--backend mock:DIR`).";

const EXIT_CODES: &str = "\
Exit codes:
  0   fine; for diff: no difference
  1   the operation failed; for diff: there are differences
  2   the image is bad (damaged, truncated, or not an image)
  3   migrate, remus: nobody knows at this end whether the domain runs at the other
  64  the command line is wrong
  130 ended at once, because the user insisted (docs/signals.md)";

const ENVIRONMENT: &str = "\
Environment:
  XSR_BACKEND  the hypervisor, where neither --backend nor --host is given
  XSR_LOG      what goes to the log on stderr, say `debug` or `xsr_save_restore=trace`";

const MAIN_EXAMPLES: &str = "\
Examples:
  xsr demo                                 see it work, no Xen needed
  xsr inspect guest.save                   what is in an image
  xsr verify *.save                        check images
  zstd -dc guest.save.zst | xsr verify -   check one as it comes
  xsr mock create web --host /tmp/lab      a domain to try things on
  xsr save --backend mock:/tmp/lab web web.save
  xsr migrate --backend mock:/tmp/lab web other.example.org";

/// Save, restore, migrate, inspect, verify and compare Xen domains and their images
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
    Migrate(MigrateArgs),
    MigrateReceive(ReceiveArgs),
    Remus(RemusArgs),
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

impl Command {
    /// Whether its results are to be JSON.
    pub(crate) fn json(&self) -> bool {
        match self {
            Self::Save(args) => args.json,
            Self::Restore(args) => args.json,
            Self::Migrate(args) => args.json,
            Self::MigrateReceive(args) => args.json,
            Self::Remus(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Verify(args) => args.json,
            Self::Diff(args) => args.json,
            Self::Convert(args) => args.json,
            Self::Export(args) => args.json,
            Self::Edit(args) => args.json,
            Self::Mock(args) => match &args.command {
                MockCommand::Host(_) => false,
                MockCommand::Create(args) => args.json,
                MockCommand::List(args) => args.json,
                MockCommand::Show(args) => args.json,
                MockCommand::Workload(args) => args.json,
                MockCommand::Rename(args) => args.json,
                MockCommand::Pause(args)
                | MockCommand::Unpause(args)
                | MockCommand::Resume(args)
                | MockCommand::Destroy(args) => args.json,
            },
            Self::Demo(args) => args.json,
            Self::Cat(_) => false,
        }
    }
}

/// Save a domain to an image, as `xl save` does
///
/// Afterwards the domain is gone, unless -c or -p keeps it. FILE appears when it is
/// complete, under a temporary name until then; where saving fails, the domain runs
/// on and a file of that name is as it was. `-`, a pipe or a device is written straight, but
/// no domain is given up for /dev/null or a stdout that is closed.
///
/// With --live the domain runs while its memory is written, and again what it wrote
/// meanwhile; it stands still for the rest only. When that is, Xen's rule decides
/// (five passes, or fewer than 50 pages left), or a target: any of --max-downtime,
/// --timeout and --on-timeout sets one.
///
/// On a Xen host, `xl save` does it, with xsr-save-helper: all of its options pass,
/// --threads is for the helper, what else xl has not is refused. With --direct, no xl is needed: the domain is asked
/// to suspend, saved to a bare libxc stream, and resumed or destroyed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr save web web.save                    on a Xen host
  xsr save --direct --live -c web web.libxc
  xsr save --backend mock:/tmp/lab web web.save
  xsr save --backend mock:/tmp/lab --live -c web web.save
  xsr save --backend mock:/tmp/lab -c web - | zstd > web.save.zst")]
pub(crate) struct SaveArgs {
    /// Leave the domain running afterwards
    #[arg(short = 'c', long)]
    pub(crate) checkpoint: bool,
    /// Leave the domain there, but paused
    #[arg(short = 'p', long)]
    pub(crate) paused: bool,
    /// Save while the domain runs
    #[arg(long)]
    pub(crate) live: bool,
    /// Save even where there is too little room for the image
    #[arg(long)]
    pub(crate) force: bool,
    /// On a Xen host: without xl and libxl, to a bare libxc stream (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    #[command(flatten)]
    pub(crate) progress: ProgressArg,
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
/// The image may be one of xl's, a libxl stream, or a bare libxc stream. A stream
/// without configuration is read twice, to find out what the domain needs; from a pipe,
/// --type, --vcpus and --memory must say it. Where restoring fails, the domain that was
/// being built is destroyed.
///
/// On a Xen host, `xl restore` does it, with xsr-save-helper: all of its options pass,
/// --threads is for the helper, what else xl has not is refused. With --direct, no xl is needed: the domain is made
/// here, and connected to xenstore and its console; nothing else is.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr restore -p -e web.save               on a Xen host
  xsr restore --direct --name web web.libxc
  xsr restore --backend mock:/tmp/lab web.save
  zstd -dc web.save.zst | xsr restore --backend mock:/tmp/lab -p -
  xsr restore --backend mock:/tmp/lab --name web2 web.save    beside web
  xsr restore --backend mock:/tmp/lab --name web --vcpus 2 --memory 256M bare.libxc")]
#[command(allow_missing_positional = true)]
pub(crate) struct RestoreArgs {
    /// Leave the domain paused
    #[arg(short = 'p', long)]
    pub(crate) paused: bool,
    /// On a Xen host: without xl and libxl, a guest without devices (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    /// Restore a guest that has seen CPU features which this host lacks: it may crash when it uses
    /// one (docs/cpu.md)
    #[arg(long)]
    pub(crate) force: bool,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// The domain's name; if the image says another, the domain is a clone and gets a new
    /// UUID, too [default: what the image says, or that of FILE]
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Restore from a mapped image (docs/mapped.md) whose index is missing or wrong
    #[arg(long)]
    pub(crate) ignore_index: bool,
    /// For an image without libxl's configuration: kind of guest [default: found in the image]
    #[arg(long = "type", value_name = "TYPE")]
    pub(crate) kind: Option<RestoreKind>,
    /// For an image without libxl's configuration: vcpus [default: found in the image]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub(crate) vcpus: Option<u32>,
    /// For an image without libxl's configuration: memory [default: found in the image]
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<MemorySize>,
    #[command(flatten)]
    pub(crate) progress: ProgressArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Taken as xl takes it, without effect on a mock machine: do not wait for the domain's end
    #[arg(short = 'e')]
    pub(crate) no_monitor: bool,
    /// Likewise: debugging messages of xl
    #[arg(short = 'd')]
    pub(crate) debug: bool,
    /// Likewise: stay in the foreground
    #[arg(short = 'F')]
    pub(crate) foreground: bool,
    /// Likewise: attach to the domain's screen
    #[arg(short = 'V', long)]
    pub(crate) vncviewer: bool,
    /// Likewise, and hand it the password
    #[arg(short = 'A', long)]
    pub(crate) vncviewer_autopass: bool,
    /// The configuration that counts in the place of the image's, libxl's JSON or xl's own
    /// format
    pub(crate) config: Option<PathBuf>,
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
  xsr inspect --fields guest.save | less
  xsr inspect --page 0x1234 guest.save
  xsr inspect --json guest.save | jq .guest")]
pub(crate) struct InspectArgs {
    /// List every page entry (pfn and type)
    #[arg(long)]
    pub(crate) pages: bool,
    /// Name what is in the blobs, field by field: registers, CPUID and MSR policies,
    /// HVM context, shared_info, the emulators' xenstore data, the configuration
    #[arg(long)]
    pub(crate) fields: bool,
    /// Show the contents of one page, and nothing else; of a mapped image (docs/mapped.md)
    /// without reading the rest
    #[arg(
        long,
        value_name = "PFN",
        value_parser = number,
        conflicts_with_all = ["pages", "fields"]
    )]
    pub(crate) page: Option<u64>,
    /// Read a mapped image as a stream, without looking at its index
    #[arg(long)]
    pub(crate) ignore_index: bool,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// A number, decimal or hexadecimal with 0x.
fn number(text: &str) -> Result<u64, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.map_err(|_| "expected a number, decimal or with 0x".to_owned())
}

/// Check images against the format's rules
///
/// One line for each file. The exit code is 2 if any of them is bad, else 1 if any
/// could not be read. Of a mapped image (docs/mapped.md) the index is checked, too; with --deep
/// every byte is read and compared with the digests, and damage is named by record and pfn.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr verify *.save
  xsr verify --deep web.mapped
  zstd -dc guest.save.zst | xsr verify -")]
pub(crate) struct VerifyArgs {
    /// Check every digest of a mapped image; of any other, say that there are none
    #[arg(long, conflicts_with = "ignore_index")]
    pub(crate) deep: bool,
    /// Read a mapped image as a stream, without looking at its index
    #[arg(long)]
    pub(crate) ignore_index: bool,
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

/// See it work: domains on a mock machine, saved, verified, restored, compared
///
/// Needs no Xen and no privileges. Leaves nothing behind.
#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
}

const TARGET: &str = "When to suspend the domain";

/// When a live save suspends its domain, as a target.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct TargetArgs {
    /// Suspend the domain once the rest can be sent in so many milliseconds [default: 300]
    #[arg(
        long,
        value_name = "MS",
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = TARGET
    )]
    pub(crate) max_downtime: Option<u32>,
    /// Begin no pass over the running domain's memory after so many seconds [default: 300]
    #[arg(long, value_name = "S", help_heading = TARGET)]
    pub(crate) timeout: Option<u32>,
    /// What to do then [default: stop-copy]
    #[arg(long, value_name = "WHAT", help_heading = TARGET)]
    pub(crate) on_timeout: Option<OnTimeoutArg>,
}

impl TargetArgs {
    /// Whether any of it was given.
    pub(crate) fn is_given(&self) -> bool {
        self.max_downtime.is_some() || self.timeout.is_some() || self.on_timeout.is_some()
    }
}

/// What to do when the time for the passes is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnTimeoutArg {
    /// Suspend the domain, and send the rest however long it takes
    StopCopy,
    /// Give up: the domain runs on
    Cancel,
}

/// How many threads.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ThreadsArg {
    /// Threads to work with [default: what the machine has]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

/// Where a program can follow what is being done.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct ProgressArg {
    /// Write progress to descriptor N, as lines of JSON (docs/json.md)
    #[arg(long, value_name = "N", help_heading = "Messages")]
    pub(crate) progress_fd: Option<u32>,
}

/// The kinds of guest that an image can be of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RestoreKind {
    /// Paravirtualised, 64-bit or 32-bit
    Pv,
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
        assert_eq!("xen".parse(), Ok(Backend::Xen));
        assert_eq!("mock:/a:b".parse(), Ok(Backend::Mock("/a:b".into())));
        for bad in ["", "mock", "mock:", "xen:", "kvm"] {
            assert!(bad.parse::<Backend>().is_err(), "{bad} was taken");
        }
    }
}
