//! The command line of `xsr tunnel`.

use std::net::IpAddr;

use clap::Args;

use super::SessionArgs;
use super::session::PortsArg;

/// Run a command on another host, as ssh does, over a connection that may break
///
/// ssh starts the other end of the tunnel on HOST, which runs COMMAND. The two ends exchange keys
/// through ssh and connect directly (docs/session.md). The tunnel carries stdin, stdout and stderr,
/// and exits with COMMAND's exit code, or with 255 if it fails itself. All words after HOST belong
/// to COMMAND.
///
/// It is for `xl migrate -s 'xsr tunnel'`: xl's stream is encrypted once, may use several
/// connections and compression, and survives a link that is lost for up to 10 s (--reconnect).
///
/// The tunnel does not know what it carries. If COMMAND is a `migrate-receive` with -r or --colo, a
/// lost connection is not taken up again, because the other host must notice the loss at once.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xl migrate -s 'xsr tunnel' web other.example.org
  xl migrate -s 'xsr tunnel --connections 4 --compress auto' web other.example.org
  xsr tunnel --remote 'xsr tunnel --ports 8002-8010' other.example.org uname -a")]
pub(crate) struct TunnelArgs {
    /// The command to run instead of ssh, through sh
    #[arg(
        short = 's',
        value_name = "COMMAND",
        default_value = "ssh",
        help_heading = "Connection"
    )]
    pub(crate) ssh: String,
    /// The other end of the tunnel on HOST, without its --serve
    #[arg(
        long,
        value_name = "COMMAND",
        default_value = "xsr tunnel",
        help_heading = "Connection"
    )]
    pub(crate) remote: String,
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    /// Be the other end, and run this command through sh. The near end adds this option
    #[arg(
        long,
        value_name = "COMMAND",
        conflicts_with_all = ["ssh", "remote", "connections", "compress", "tls", "reconnect", "bandwidth"],
        help_heading = "Other end"
    )]
    pub(crate) serve: Option<String>,
    /// With --serve: listen at this address [default: the one that ssh was connected to]
    #[arg(
        long,
        value_name = "ADDRESS",
        requires = "serve",
        help_heading = "Other end"
    )]
    pub(crate) listen_address: Option<IpAddr>,
    /// With --serve: listen at a port from A to B [default: any free one]
    #[arg(
        long,
        value_name = "A-B",
        requires = "serve",
        help_heading = "Other end"
    )]
    pub(crate) ports: Option<PortsArg>,
    /// The host on which COMMAND runs
    #[arg(required_unless_present = "serve", conflicts_with = "serve")]
    pub(crate) host: Option<String>,
    /// The command, and its arguments
    #[arg(
        required_unless_present = "serve",
        conflicts_with = "serve",
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) command: Vec<String>,
}
