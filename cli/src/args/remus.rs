//! The command line of `xsr remus`.
//!
//! C implementation: `main_remus` in `tools/xl/xl_migrate.c`, whose options these are.

use clap::{Args, ValueEnum};

use super::{BackendArg, ConnectionArgs, MemorySize, ProgressArg, ThreadsArg};

/// Protect a domain by checkpoints on another host, as `xl remus` does
///
/// The domain runs here. Its memory and state are sent to HOST (`xsr migrate-receive -r`) at every
/// checkpoint. If this host is lost, HOST runs the last complete checkpoint. HOST is a host name
/// for ssh, `unix:PATH` or `tcp:ADDRESS:PORT`.
///
/// Protection continues until this command is interrupted (SIGINT, SIGTERM, SIGHUP). It then tells
/// HOST to discard the domain, which runs on here, unprotected. The domain also runs on here if
/// HOST is lost. If only the connection is lost, this host cannot tell the difference, and BOTH
/// HOSTS MAY RUN THE DOMAIN: the command prints what to do (see docs/migration.md) and exits with
/// code 3. --on-loss pause pauses the domain here instead.
///
/// A mock guest has no network and no disks, so no output is held back or compared (-c). On a Xen
/// host this command runs `xl remus` with xsr-save-helper. It passes all of xl's options on, gives
/// --threads to the helper, and refuses options that xl does not have. With --direct it works
/// without xl; a guest without devices has no output to hold back.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr remus -i 100 web other.example.org   on a Xen host
  xsr remus --direct -i 100 web other.example.org
  xsr remus --backend mock:/tmp/lab --stats web other.example.org
  xsr remus --backend mock:/tmp/lab -i 50 web unix:/tmp/remus.sock
  xsr remus --backend mock:/tmp/lab -F -b --epochs 10 --stats web nowhere")]
pub(crate) struct RemusArgs {
    /// Milliseconds from one checkpoint to the next, while the domain runs [default: 200; with
    /// -c 5000]
    #[arg(short = 'i', value_name = "MS")]
    pub(crate) interval: Option<u32>,
    /// COLO: the domain also runs on HOST (`xsr migrate-receive --colo`), and each checkpoint
    /// replaces its state there by the state here. HVM and PVH
    #[arg(short = 'c')]
    pub(crate) colo: bool,
    /// Send checkpoints to /dev/null, not to HOST. Needs -F
    #[arg(short = 'b')]
    pub(crate) blackhole: bool,
    /// Allow options that give up protection: -b, -n, -d
    #[arg(short = 'F')]
    pub(crate) allow_unsafe: bool,
    /// Do not hold back the domain's network output until its checkpoint is complete. Needs -F
    #[arg(short = 'n')]
    pub(crate) no_network_buffer: bool,
    /// Do not replicate disks. Needs -F
    #[arg(short = 'd')]
    pub(crate) no_disk_buffer: bool,
    /// What to do when HOST is lost
    #[arg(long, value_name = "WHAT", default_value = "run")]
    pub(crate) on_loss: OnLoss,
    /// Treat HOST as lost if it has accepted nothing of a checkpoint for S seconds, during which
    /// the domain may be suspended. With -c, HOST also has S seconds for each of its reports; then
    /// the domain runs on here [default: 60]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) answer_timeout: Option<u32>,
    /// End after N checkpoints; the domain runs on here
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) epochs: Option<u64>,
    /// Keep up to SIZE of a checkpoint in memory while the domain is suspended, and send it when
    /// the domain runs again [default: 64M]
    #[arg(long, value_name = "SIZE", conflicts_with = "no_buffer")]
    pub(crate) buffer: Option<MemorySize>,
    /// Send all of a checkpoint while the domain is suspended, as xl does
    #[arg(long)]
    pub(crate) no_buffer: bool,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    #[command(flatten)]
    pub(crate) progress: ProgressArg,
    /// Print a line for each checkpoint: dirty pages, pause, time
    #[arg(long)]
    pub(crate) stats: bool,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// xl's option, without effect: do not compress
    #[arg(short = 'u', hide = true)]
    pub(crate) uncompressed: bool,
    /// xl's option: the script that holds back the domain's network output
    #[arg(short = 'N', value_name = "SCRIPT", hide = true)]
    pub(crate) network_script: Option<String>,
    /// xl's option: compare the output of both guests in a process
    #[arg(short = 'p', hide = true)]
    pub(crate) userspace_colo_proxy: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
    /// The destination
    pub(crate) host: String,
}

/// What to do when the other host is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnLoss {
    /// Let the domain run on here, unprotected, as xl does
    Run,
    /// Pause it: both hosts run it no longer than it takes to notice the loss
    Pause,
}
