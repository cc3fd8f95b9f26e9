//! The command line of `xsr remus`.
//!
//! C implementation: `main_remus` in `tools/xl/xl_migrate.c`, whose options these are.

use clap::{Args, ValueEnum};

use super::{BackendArg, ConnectionArgs, MemorySize, ProgressArg, ThreadsArg};

/// Protect a domain by checkpoints on another host, as `xl remus` does
///
/// The domain runs here. Its memory and state go to HOST (`xsr migrate-receive -r`) again
/// and again, and when this host is lost, HOST runs the last checkpoint that was complete.
/// HOST is a name for ssh, `unix:PATH` or `tcp:ADDRESS:PORT`.
///
/// It goes on until it is interrupted (SIGINT, SIGTERM, SIGHUP): then HOST is told to
/// forget the domain, which runs on here, unprotected. So it does when HOST is lost. If
/// only the connection is lost, this end cannot know, and BOTH MAY RUN THE DOMAIN; the
/// exit code is 3, what to do is printed and in docs/migration.md, and --on-loss pause has
/// this end stand still instead.
///
/// A mock guest has no network and no disks whose output would have to wait for the
/// checkpoint, or be compared (-c). On a Xen host, `xl remus` does it, with xsr-save-helper: all of its
/// options pass, --threads is for the helper, what else xl has not is refused.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr remus -i 100 web other.example.org   on a Xen host
  xsr remus --backend mock:/tmp/lab --stats web other.example.org
  xsr remus --backend mock:/tmp/lab -i 50 web unix:/tmp/remus.sock
  xsr remus --backend mock:/tmp/lab -F -b --epochs 10 --stats web nobody")]
pub(crate) struct RemusArgs {
    /// Milliseconds from one checkpoint to the next, while the domain runs [default: 200; with
    /// -c 5000]
    #[arg(short = 'i', value_name = "MS")]
    pub(crate) interval: Option<u32>,
    /// COLO: the domain runs on HOST, too (`xsr migrate-receive --colo`), and each checkpoint
    /// makes it what it is here. HVM and PVH
    #[arg(short = 'c')]
    pub(crate) colo: bool,
    /// Send checkpoints to /dev/null: HOST is not reached. Needs -F
    #[arg(short = 'b')]
    pub(crate) blackhole: bool,
    /// Allow what does not protect: -b, -n, -d
    #[arg(short = 'F')]
    pub(crate) allow_unsafe: bool,
    /// Do not hold back what the domain sends until its checkpoint is complete. Needs -F
    #[arg(short = 'n')]
    pub(crate) no_network_buffer: bool,
    /// Do not replicate disks. Needs -F
    #[arg(short = 'd')]
    pub(crate) no_disk_buffer: bool,
    /// What to do when HOST is lost
    #[arg(long, value_name = "WHAT", default_value = "run")]
    pub(crate) on_loss: OnLoss,
    /// HOST is lost when it has taken nothing of a checkpoint for so many seconds: the domain may
    /// be suspended meanwhile. With -c, also give it so long to say that it has the checkpoint,
    /// that it runs it, that it is suspended and what it has written; then take the domain back
    /// [default: 60]
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) answer_timeout: Option<u32>,
    /// End after so many checkpoints; the domain runs on here
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) epochs: Option<u64>,
    /// Keep so much of a checkpoint in memory while the domain is suspended, and send it
    /// when it runs [default: 64M]
    #[arg(long, value_name = "SIZE", conflicts_with = "no_buffer")]
    pub(crate) buffer: Option<MemorySize>,
    /// Keep nothing: send all of a checkpoint while the domain is suspended, as xl does
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
    /// Of xl: do not compress, which nobody does any more
    #[arg(short = 'u', hide = true)]
    pub(crate) uncompressed: bool,
    /// Of xl: the script that holds back what the domain sends
    #[arg(short = 'N', value_name = "SCRIPT", hide = true)]
    pub(crate) network_script: Option<String>,
    /// Of xl: compare in a process what both guests send out
    #[arg(short = 'p', hide = true)]
    pub(crate) userspace_colo_proxy: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
    /// Where to
    pub(crate) host: String,
}

/// What to do when the other end is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum OnLoss {
    /// Let the domain run on here, unprotected, as xl does
    Run,
    /// Pause it: it never runs at both ends for longer than it takes to notice
    Pause,
}
