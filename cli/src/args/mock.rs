//! The command line of `xsr mock`.

use clap::{Args, Subcommand, ValueEnum};

use super::{MemorySize, MockHostArg};

/// Create and manage the domains of a mock machine
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
    Host(MockNewHostArgs),
    Create(MockCreateArgs),
    List(MockListArgs),
    Show(MockShowArgs),
    Workload(MockWorkloadArgs),
    /// Pause a domain; it runs again after as many unpauses
    Pause(MockDomainArgs),
    /// Undo one pause
    Unpause(MockDomainArgs),
    /// Let a suspended domain run on
    ///
    /// For a domain that a save or migration left suspended, because it was killed or because the
    /// receiver did not report whether it has the domain. Never resume a domain that runs
    /// elsewhere.
    Resume(MockDomainArgs),
    Rename(MockRenameArgs),
    /// Destroy a domain
    Destroy(MockDomainArgs),
}

/// Create a mock machine without a domain
///
/// Other commands create one if needed. This command is for a machine with a processor other than
/// the default.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr mock host --host /tmp/new --cpu=+avx512f,+avx512bw
  xsr mock host --host /tmp/old --cpu=-avx2,-pku")]
pub(crate) struct MockNewHostArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// CPU features to add to the default (+NAME) or to remove (-NAME), by Xen's names
    #[arg(
        long,
        value_name = "FEATURES",
        allow_hyphen_values = true,
        default_value = ""
    )]
    pub(crate) cpu: String,
}

/// Create a domain, filled with a seeded pattern
///
/// The same options create the same domain. The directory is created if it does not exist.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr mock create web --host /tmp/lab --type pv --memory 256M --vcpus 2 --seed 7
  xsr mock create db --host /tmp/lab --type pvh --dirty-rate 20000 --working-set 32M")]
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
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub(crate) vcpus: u32,
    /// Seed of the pattern in its memory
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) seed: u64,
    /// The guest does not answer requests to suspend, as one without drivers for Xen
    #[arg(long)]
    pub(crate) ignores_suspend: bool,
    #[command(flatten)]
    pub(crate) workload: WorkloadArgs,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
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

/// Which domain of which mock machine.
#[derive(Debug, Args)]
pub(crate) struct MockDomainArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
}

/// Give a domain another name
#[derive(Debug, Args)]
pub(crate) struct MockRenameArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
    /// Its new name
    pub(crate) name: String,
}

/// Set what a domain does while a command works on it
///
/// Nothing runs on a mock machine between two commands. While a command saves or migrates a
/// domain, the domain writes to its memory as set here; without --dirty-rate it does nothing. The
/// setting stays with the machine: a domain that is restored or migrated elsewhere does nothing
/// there until it gets a setting of its own. A command that is already working on the domain is not
/// affected.
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  xsr mock workload --host /tmp/lab web --dirty-rate 20000 --working-set 32M")]
pub(crate) struct MockWorkloadArgs {
    #[command(flatten)]
    pub(crate) host: MockHostArg,
    #[command(flatten)]
    pub(crate) workload: WorkloadArgs,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
}

const WORKLOAD: &str = "What the guest does while it is saved or migrated";

/// What a guest does.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct WorkloadArgs {
    /// Write to PAGES pages a second, chosen at random [default: none]
    #[arg(
        long,
        value_name = "PAGES",
        value_parser = clap::value_parser!(u32).range(1..),
        help_heading = WORKLOAD
    )]
    pub(crate) dirty_rate: Option<u32>,
    /// The memory it writes to [default: 16M, or all of it]
    #[arg(long, value_name = "SIZE", requires = "dirty_rate", help_heading = WORKLOAD)]
    pub(crate) working_set: Option<MemorySize>,
    /// How many of 1000 operations change page tables (PV)
    #[arg(
        long,
        value_name = "N",
        requires = "dirty_rate",
        default_value_t = 0,
        help_heading = WORKLOAD
    )]
    pub(crate) page_tables: u16,
    /// How many of 1000 operations return a page to the machine or take one from it
    #[arg(
        long,
        value_name = "N",
        requires = "dirty_rate",
        default_value_t = 0,
        help_heading = WORKLOAD
    )]
    pub(crate) balloon: u16,
    /// Shut down by itself after --after operations
    #[arg(long, value_name = "REASON", requires = "dirty_rate", help_heading = WORKLOAD)]
    pub(crate) shut_down: Option<MockEnd>,
    /// The number of operations before it shuts down
    #[arg(
        long,
        value_name = "N",
        requires = "shut_down",
        default_value_t = 10_000,
        help_heading = WORKLOAD
    )]
    pub(crate) after: u64,
}

/// How a mock guest shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MockEnd {
    /// It switches itself off
    Poweroff,
    /// It wants to be started again
    Reboot,
    /// Its kernel has given up
    Crash,
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
