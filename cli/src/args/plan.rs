//! The command line of `plan`.
//!
//! As `args.rs`, it depends on clap and the standard library alone.

use std::path::PathBuf;

use clap::Args;

use super::BackendArg;

/// Check whether an image or a domain fits on a host, before anything is touched
///
/// Xen itself checks next to nothing: it silently clears CPU features that a host lacks, and the
/// guest crashes later. This command compares what a guest has seen and needs with what a host
/// has: its kind, vcpus, CPU features by name, the TSC's frequency, memory, versions of Xen, disks,
/// and what its configuration says. Of a domain, it also checks that it can be suspended. It prints
/// one line for each check. A check whose answer is no means that the guest does not fit; warnings
/// and unknown answers do not.
///
/// --facts prints what this host has, for use on another machine or later. --level compares several
/// hosts, and prints the `cpuid` line for an xl configuration with which a guest can move between
/// all of them.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes:
  0   it fits (with --level: the hosts have a common level)
  1   it does not, or the check failed
  2   the image is bad (damaged, truncated, or not an image)
  64  the command line is wrong

Examples:
  xsr plan web.save                          will it restore on this host?
  xsr plan web --on other.example.org        will it migrate there?
  xsr plan web --save-to /srv/web.save       will its image fit there?
  xsr plan --facts > here.json               what this host has
  xsr plan web.save --on here.json
  xsr plan --level a.json b.json c.json      what to hide from guests of a pool")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    /// The host: a file with the output of --facts, or a name for ssh. A path has a slash, or names
    /// an existing file [default: this host]
    #[arg(long, value_name = "HOST|FACTS", conflicts_with_all = ["facts", "level"])]
    pub(crate) on: Option<String>,
    /// The command to run instead of ssh, through sh
    #[arg(
        short = 's',
        value_name = "COMMAND",
        default_value = "ssh",
        requires = "on"
    )]
    pub(crate) ssh: String,
    /// Also check that an image of the domain fits where FILE is to be
    #[arg(long, value_name = "FILE", requires = "guest")]
    pub(crate) save_to: Option<PathBuf>,
    /// Print what this host has, as JSON (docs/json.md)
    #[arg(long, conflicts_with_all = ["level", "guest"])]
    pub(crate) facts: bool,
    /// Print which features to hide from a guest so that it can run on all these hosts
    #[arg(long, value_name = "FACTS", num_args = 1.., conflicts_with = "guest")]
    pub(crate) level: Vec<PathBuf>,
    /// Tolerate reserved fields of an image that are not zero
    #[arg(long)]
    pub(crate) lenient: bool,
    /// Print JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// An image, or else the name or number of a domain; `-` is an image on stdin
    #[arg(value_name = "IMAGE|DOMAIN", required_unless_present_any = ["facts", "level"])]
    pub(crate) guest: Option<String>,
}
