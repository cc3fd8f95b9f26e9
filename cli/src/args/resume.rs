//! The command line of `xsr resume`.
//!
//! As `args.rs`, it depends on clap and the standard library alone.

use clap::Args;

use super::BackendArg;

/// Let a suspended domain run on
///
/// For a domain that a save or migration left suspended: because the command was killed, or because
/// the receiver did not report whether it has the domain. The guest is told that its suspend was
/// cancelled. Never resume a domain that may run on another host. A domain that is called
/// DOMAIN--migratedaway is therefore refused: look at the other host first, and rename the domain
/// only if that one does not have it (docs/migration.md).
///
/// A domain that Remus protects keeps its name: after a `remus` that was killed, resume the domain
/// only if the other host does not run it.
///
/// On a Xen host, --direct resumes PV and PVH domains, also those that xl has made. A domain with a
/// device model is resumed by `xl resume` of Xen 4.20 and newer.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr resume --direct web                  on a Xen host
  xsr resume --backend mock:/tmp/lab web")]
pub(crate) struct ResumeArgs {
    /// On a Xen host: work without xl and libxl (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    /// Name or number of the domain
    pub(crate) domain: String,
}
