//! The command line, as clap sees it: names, types, help texts. What the options
//! mean, the modules below `cmd` decide.
//!
//! Depends on clap and the standard library alone: `cargo xtask dist` includes this
//! file by its path to make man pages and completions.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::ArgPredicate;
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};

use self::images::{CatArgs, ConvertArgs, EditArgs, ExportArgs, LayoutArg};
pub(crate) use self::machine::{Backend, BackendArg, MockHostArg, VARIABLE};
pub(crate) use self::migrate::{ConnectionArgs, Endpoint, MigrateArgs, ReceiveArgs};
pub(crate) use self::mock::{
    MockArgs, MockCommand, MockCreateArgs, MockDomainArgs, MockEnd, MockKind, MockListArgs,
    MockNewHostArgs, MockRenameArgs, MockShowArgs, MockWorkloadArgs, WorkloadArgs,
};
pub(crate) use self::plan::PlanArgs;
pub(crate) use self::remus::{OnLoss, RemusArgs};
pub(crate) use self::resume::ResumeArgs;
pub(crate) use self::session::{CompressArg, OfferArgs, PortsArg, SessionArgs, TlsArg};
pub(crate) use self::tunnel::TunnelArgs;

// Named, because `xtask` includes this file from another place.
#[path = "args/images.rs"]
pub(crate) mod images;
#[path = "args/machine.rs"]
mod machine;
#[path = "args/migrate.rs"]
mod migrate;
#[path = "args/mock.rs"]
mod mock;
#[path = "args/plan.rs"]
mod plan;
#[path = "args/remus.rs"]
mod remus;
#[path = "args/resume.rs"]
mod resume;
#[path = "args/session.rs"]
mod session;
#[path = "args/tunnel.rs"]
mod tunnel;

const LONG_ABOUT: &str = "\
Save, restore, migrate, inspect, verify and compare Xen domains and their images.

inspect, verify, diff, convert, edit, export and cat read images of any age, written by xl, \
libvirt or xapi, compressed or not, on any machine. save, restore, migrate and remus work on the \
domains of a hypervisor. On a Xen host they run the host's own xl, with this engine as its save \
helper, and accept all of xl's options. On a machine without Xen they work on a mock machine, \
which is kept in a directory (`xsr mock create`, `--backend mock:DIR`).";

const EXIT_CODES: &str = "\
Exit codes:
  0   success; for diff: no difference
  1   the operation failed; for diff: there are differences
  2   the image is bad (damaged, truncated, or not an image)
  3   migrate, remus: it is unknown whether the domain is running on the other host
  64  the command line is wrong
  130 ended at once by a second signal (docs/signals.md)";

const ENVIRONMENT: &str = "\
Environment:
  XSR_BACKEND  the hypervisor, if neither --backend nor --host is given
  XSR_LOG      what to log on stderr, for example `debug` or `xsr_save_restore=trace`";

const MAIN_EXAMPLES: &str = "\
Examples:
  xsr demo                                 see it work, no Xen needed
  xsr inspect guest.save                   what is in an image
  xsr verify *.save                        check images
  zstd -dc guest.save.zst | xsr verify -   check an image from a pipe
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
    /// Print more on stderr (-vv: still more)
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
    Tunnel(TunnelArgs),
    Remus(RemusArgs),
    Resume(ResumeArgs),
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Diff(DiffArgs),
    Convert(ConvertArgs),
    Export(ExportArgs),
    Edit(EditArgs),
    Cat(CatArgs),
    Plan(PlanArgs),
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
            Self::Plan(args) => args.json || args.facts,
            Self::Demo(args) => args.json,
            Self::Cat(_) | Self::Resume(_) | Self::Tunnel(_) => false,
        }
    }
}

/// How an image is packed as it is written
#[derive(Debug, Default, Args)]
pub(crate) struct PackArgs {
    /// Compress the image; any zstd reads it
    #[arg(long, value_name = "COMPRESSION")]
    pub(crate) compress: Option<ImageCompressionArg>,
    /// Encrypt the image to this recipient of age (age1…); can be given several times
    // Not parsed by clap, which would print the value: it may be a secret by mistake.
    #[arg(long, value_name = "RECIPIENT")]
    pub(crate) encrypt_to: Vec<String>,
}

/// A compression that images are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageCompressionArg {
    /// Zstandard, in frames of 64 KiB and with a table of them
    Zstd,
}

/// The identities for an encrypted image
#[derive(Debug, Default, Args)]
pub(crate) struct IdentityArg {
    /// Decrypt the image with the identities of age in this file; can be given several times
    #[arg(long, value_name = "FILE")]
    pub(crate) identity: Vec<PathBuf>,
}

/// Save a domain to an image, as `xl save` does
///
/// The domain is destroyed when the image is complete, unless -c or -p keeps it. The image is
/// written under a temporary name and then renamed to FILE. If saving fails, the domain runs on
/// and an existing FILE is unchanged. `-`, a pipe or a device is written directly, but a domain is
/// never destroyed for /dev/null or a closed stdout.
///
/// With --live the domain runs while its memory is written. Pages that it changes meanwhile are
/// written again, and it is paused only for the last pass. Xen's rule decides when the last pass
/// begins (after five passes, or with fewer than 50 pages left), unless --max-downtime, --timeout
/// or --on-timeout sets a target.
///
/// With --layout mapped, every page has a place in the file (docs/mapped.md), and a page that is
/// written again goes there again, so that a live save does not make the file longer. With --live and
/// -c this is a checkpoint: the domain is paused only for the last pass, and runs on before the
/// file is complete.
///
/// --compress and --encrypt-to pack the image as it is written (docs/images.md). They are for the
/// stream layout, which has no bound if the domain is saved --live.
///
/// With --onto, the file shares the pages that have not changed since BASE was saved: only the
/// others are written and take room. It is mapped, has page digests, and is whole by itself: BASE
/// can be removed. On file systems without reflinks it is refused.
///
/// On a Xen host this command runs `xl save` with xsr-save-helper. It passes all of xl's options
/// on, gives --live with its target, --layout, --page-digests, --at-freeze and --threads to the
/// helper, packs what xl writes for --compress and --encrypt-to, and refuses other options that xl
/// does not have. With --direct it works without xl: it asks the domain to suspend, saves it to a
/// bare libxc stream, and resumes or destroys it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr save web web.save                    on a Xen host
  xsr save --direct --live -c web web.libxc
  xsr save --backend mock:/tmp/lab web web.save
  xsr save --backend mock:/tmp/lab --live -c web web.save
  xsr save --backend mock:/tmp/lab --live -c --layout mapped --max-downtime 50 web web.save
  xsr save --backend mock:/tmp/lab -c --compress zstd --encrypt-to age1… web web.save")]
pub(crate) struct SaveArgs {
    /// Leave the domain running afterwards
    #[arg(short = 'c', long)]
    pub(crate) checkpoint: bool,
    /// Keep the domain, paused
    #[arg(short = 'p', long)]
    pub(crate) paused: bool,
    /// Save while the domain runs
    #[arg(long)]
    pub(crate) live: bool,
    /// Where page data lies in the file
    #[arg(
        long,
        value_name = "LAYOUT",
        default_value = "stream",
        default_value_if("onto", ArgPredicate::IsPresent, "mapped")
    )]
    pub(crate) layout: LayoutArg,
    /// For mapped: also write a digest for each page (16 bytes)
    #[arg(long, default_value_if("onto", ArgPredicate::IsPresent, "true"))]
    pub(crate) page_digests: bool,
    /// Share the pages that this mapped image has already, on XFS or Btrfs (docs/checkpoint.md)
    #[arg(long, value_name = "BASE")]
    pub(crate) onto: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) pack: PackArgs,
    /// Run this program while the domain is suspended, to snapshot its disks (docs/checkpoint.md)
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) at_freeze: Option<PathBuf>,
    /// Kill that program after S seconds, and fail the save [default: 10]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..=3600))]
    pub(crate) at_freeze_limit: Option<u32>,
    /// Save even if there is too little space for the image
    #[arg(long)]
    pub(crate) force: bool,
    /// On a Xen host: save without xl and libxl, to a bare libxc stream (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    #[command(flatten)]
    pub(crate) suspend: SuspendArgs,
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
/// The image may be an xl image, a libxl stream, or a bare libxc stream. A stream without a
/// configuration is read twice, to find out what the domain needs. If it comes from a pipe, give
/// --type, --vcpus and --memory instead. If restoring fails, the unfinished domain is destroyed.
///
/// On a Xen host this command runs `xl restore` with xsr-save-helper. It passes all of xl's
/// options on, gives --threads to the helper, and refuses options that xl does not have. With
/// --direct it works without xl: it creates the domain and connects it to xenstore and its console,
/// and to nothing else.
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
    /// On a Xen host: restore without xl and libxl, a guest without devices (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    /// Restore even if this host lacks CPU features that the guest has seen. The guest may crash
    /// when it uses one (docs/cpu.md)
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
    /// Tolerate reserved fields that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// The domain's name. If the image has another name, the domain is a clone and also gets a
    /// new UUID [default: the name in the image, or that of FILE]
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
    /// Accepted as by xl, without effect on a mock machine: do not wait for the domain's end
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
    /// Likewise, and pass the password to the viewer
    #[arg(short = 'A', long)]
    pub(crate) vncviewer_autopass: bool,
    /// A configuration that replaces the image's: libxl's JSON or xl's own format
    pub(crate) config: Option<PathBuf>,
    /// The image; `-` is stdin
    pub(crate) file: PathBuf,
}

/// Show what is in an image
///
/// Headers, configuration, each record with its offset and contents, and a summary of the guest.
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
    /// Decode the blobs field by field: registers, CPUID and MSR policies, HVM context,
    /// shared_info, the emulators' xenstore data, the configuration
    #[arg(long)]
    pub(crate) fields: bool,
    /// Show only the contents of one page. In a mapped image (docs/mapped.md) nothing else is read
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
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
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
/// Prints one line for each file. The exit code is 2 if any file is bad, otherwise 1 if any
/// could not be read. The index of a mapped image (docs/mapped.md) is checked, too. With --deep
/// every byte is read and compared with the digests; damage is reported by record and pfn.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr verify *.save
  xsr verify --deep web.mapped
  zstd -dc guest.save.zst | xsr verify -")]
pub(crate) struct VerifyArgs {
    /// Check every digest of a mapped image; report if the image has none
    #[arg(long, conflicts_with = "ignore_index")]
    pub(crate) deep: bool,
    /// Read a mapped image as a stream, without looking at its index
    #[arg(long)]
    pub(crate) ignore_index: bool,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
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

/// Show how two images differ in meaning
///
/// Compares headers, configuration, records, page types and contents, and, by name, the fields of
/// start_info, shared_info, the vcpus, the HVM context and parameters. If a page occurs more than
/// once (a live save), its last version counts. Both images must be files.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr diff before.save after.save
  xsr diff --after-restore original.save saved-again.save
  xsr diff --json before.save after.save | jq '.differences[].section'")]
pub(crate) struct DiffArgs {
    /// Treat what every restore rewrites as expected (docs/images.md has the list)
    #[arg(long)]
    pub(crate) after_restore: bool,
    #[command(flatten)]
    pub(crate) identity: IdentityArg,
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

/// See it work: save, verify, restore and compare domains on a mock machine
///
/// Needs no Xen and no privileges. Removes everything that it creates.
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
    /// Suspend the domain once the rest can be sent within MS milliseconds [default: 300]
    #[arg(
        long,
        value_name = "MS",
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = TARGET
    )]
    pub(crate) max_downtime: Option<u32>,
    /// Begin no further pass over the running domain's memory after S seconds [default: 300]
    #[arg(long, value_name = "S", help_heading = TARGET)]
    pub(crate) timeout: Option<u32>,
    /// What to do when --timeout has passed [default: stop-copy]
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
    /// Number of threads [default: one per processor]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<NonZeroUsize>,
}

/// How long a guest may take to suspend.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct SuspendArgs {
    /// Give up if the domain has not answered S seconds after it was asked to suspend: it runs on
    #[arg(
        long,
        value_name = "S",
        default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..=3600)
    )]
    pub(crate) suspend_timeout: u32,
}

impl SuspendArgs {
    pub(crate) fn limit(self) -> Duration {
        Duration::from_secs(self.suspend_timeout.into())
    }
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
