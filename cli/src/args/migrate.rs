//! The command line of `xsr migrate` and `xsr migrate-receive`.
//!
//! C implementation: `main_migrate`, `main_migrate_receive` in `tools/xl/xl_migrate.c`,
//! whose options these are where they make sense here.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::{
    BackendArg, MemorySize, OfferArgs, ProgressArg, SessionArgs, SuspendArgs, TargetArgs,
    ThreadsArg,
};

/// Move a domain to another host, as `xl migrate` does
///
/// HOST is a host name for ssh, which runs `xsr migrate-receive` there, or the address of a
/// receiver that listens: `unix:PATH`, `tcp:ADDRESS:PORT`, `tls:ADDRESS:PORT`. The domain runs here
/// while its memory is sent. Then it is suspended, the rest is sent, and it runs on HOST. If
/// anything fails before that, it runs on here.
///
/// With --connections, --compress, --tls, --reconnect or --bandwidth, the two ends exchange keys
/// through ssh and connect directly. If that is impossible, everything goes through ssh (docs/session.md).
///
/// If the connection breaks after this host has told HOST to run the domain, but before HOST has
/// reported that it does, this host cannot know which is true. The domain stays here, suspended,
/// as DOMAIN--migratedaway. The command prints what to do (see docs/migration.md) and exits
/// with code 3.
///
/// On a Xen host this command runs `xl migrate` with xsr-save-helper. It passes all of xl's
/// options on, gives --threads, --max-downtime, --timeout and --on-timeout to the helper, and
/// refuses options that xl does not have. Without a target the helper suspends the domain by Xen's
/// own rule (after five passes, or with fewer than 50 dirty pages). xl runs `xl migrate-receive` on
/// HOST; `-s '' DOMAIN 'ssh HOST xsr migrate-receive'` runs another command. With --direct it works
/// without xl, and what it sends is what xl sends: `xl migrate-receive` takes it, too
/// (`--receiver 'xl migrate-receive'`).
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr migrate web other.example.org        on a Xen host
  xsr migrate --max-downtime 100 --on-timeout cancel web other.example.org
  xsr migrate --direct web other.example.org
  xsr migrate --backend mock:/tmp/lab web other.example.org
  xsr migrate --backend mock:/tmp/lab --max-downtime 50 web other.example.org
  xsr migrate --backend mock:/tmp/lab --compress auto --connections 2 web other
  xsr migrate --backend mock:/tmp/lab web unix:/tmp/migrate.sock
  xsr migrate --backend mock:/tmp/lab -s '' web 'xsr migrate-receive --backend mock:/tmp/b'")]
pub(crate) struct MigrateArgs {
    /// Migrate while the domain runs (the default)
    #[arg(long, overrides_with = "no_live")]
    pub(crate) live: bool,
    /// Suspend the domain first
    #[arg(long, overrides_with = "live")]
    pub(crate) no_live: bool,
    /// Leave the domain paused on the other host
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// Send all memory again at the end, so that the receiver can compare it
    #[arg(long)]
    pub(crate) debug: bool,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Pass --force to the receiver, which then accepts the guest even if HOST lacks CPU features
    /// that the guest has seen. A receiver that listens needs the option itself
    #[arg(long)]
    pub(crate) force: bool,
    /// Give up if HOST has not answered, or has accepted no data, for S seconds. While the domain
    /// is suspended, HOST must also accept 1 MiB/s on average after that time
    #[arg(
        long,
        value_name = "S",
        default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) answer_timeout: u32,
    #[command(flatten)]
    pub(crate) suspend: SuspendArgs,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
    #[command(flatten)]
    pub(crate) session: SessionArgs,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    #[command(flatten)]
    pub(crate) progress: ProgressArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// xl's option, refused: another configuration
    #[arg(short = 'C', value_name = "CONFIG", hide = true)]
    pub(crate) config: Option<OsString>,
    /// xl's option, refused: keep the domain's number
    #[arg(short = 'D', hide = true)]
    pub(crate) preserve_domid: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
    /// The destination
    pub(crate) host: String,
}

/// How the other host is reached, and what is run there.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConnectionArgs {
    /// On a Xen host: work without xl and libxl, on a guest without devices (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    /// The command to run instead of ssh, through sh; if empty, HOST is the whole command
    #[arg(
        short = 's',
        value_name = "COMMAND",
        default_value = "ssh",
        help_heading = "Connection"
    )]
    pub(crate) ssh: String,
    /// The command to run on HOST [default: xsr migrate-receive, with --direct if that is given
    /// here]
    #[arg(long, value_name = "COMMAND", help_heading = "Connection")]
    pub(crate) receiver: Option<String>,
    /// Pass -e on (xl: do not wait for the domain's end)
    #[arg(short = 'e', help_heading = "Connection")]
    pub(crate) no_wait: bool,
}

impl ConnectionArgs {
    /// The command to run on the other host.
    pub(crate) fn receiver(&self) -> &str {
        let default = match self.direct {
            true => "xsr migrate-receive --direct",
            false => "xsr migrate-receive",
        };
        self.receiver.as_deref().unwrap_or(default)
    }
}

/// Receive a domain from another host, as `xl migrate-receive` does
///
/// `xsr migrate` or `xl migrate` on the other host starts this command through ssh and talks to it
/// over stdin and stdout. With --listen it waits for one migration, receives it and ends. With -r
/// it is the receiver for `xsr remus` or `xl remus`, with --colo for `remus -c`. A socket has no
/// password and no encryption: keep it where only authorised users can connect.
///
/// On a Xen host this command runs `xl migrate-receive` with xsr-save-helper. With --direct it
/// works without xl, and refuses a domain with devices or a device model before it creates it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr migrate-receive --backend mock:/tmp/b --listen unix:/tmp/migrate.sock
  xsr migrate-receive --backend mock:/tmp/b --listen tcp:127.0.0.1:8002")]
pub(crate) struct ReceiveArgs {
    /// Leave the domain paused
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// On a Xen host: receive without xl and libxl, a guest without devices (PV and PVH)
    #[arg(long)]
    pub(crate) direct: bool,
    /// Accept the guest even if this host lacks CPU features that the guest has seen. The guest may
    /// crash when it uses one (docs/cpu.md)
    #[arg(long)]
    pub(crate) force: bool,
    /// Wait at this address for one migration: `unix:PATH`, `tcp:ADDRESS:PORT`, or
    /// `tls:ADDRESS:PORT`, which needs --tls (port 0: any free port)
    #[arg(long, value_name = "WHERE")]
    pub(crate) listen: Option<Endpoint>,
    #[command(flatten)]
    pub(crate) offer: OfferArgs,
    /// Receive the checkpoints of a domain that `remus` protects, and run the last one if the other
    /// host is lost
    #[arg(short = 'r', group = "standing_by", conflicts_with = "colo")]
    pub(crate) remus: bool,
    /// The same for `remus -c`: the domain also runs here, and each checkpoint replaces its state
    /// by that of the other host
    #[arg(long, group = "standing_by")]
    pub(crate) colo: bool,
    /// With --colo: let a mock guest write to PAGES pages a second here
    #[arg(
        long,
        value_name = "PAGES",
        requires = "colo",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) dirty_rate: Option<u32>,
    /// With -r or --colo: keep up to SIZE of a checkpoint in memory until it is complete, and the
    /// rest in a temporary file [default: 64M]
    #[arg(long, value_name = "SIZE", requires = "standing_by")]
    pub(crate) checkpoint_memory: Option<MemorySize>,
    /// With -r or --colo: the largest size of that file [default: the domain's memory and 64M]
    #[arg(long, value_name = "SIZE", requires = "standing_by")]
    pub(crate) checkpoint_file: Option<MemorySize>,
    /// Give up, and destroy the unfinished domain, if the sender has sent nothing for S seconds;
    /// with -r or --colo only until the first checkpoint is complete
    #[arg(
        long,
        value_name = "S",
        default_value_t = 300,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) answer_timeout: u32,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    #[command(flatten)]
    pub(crate) progress: ProgressArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long, requires = "listen")]
    pub(crate) json: bool,
    /// xl's option, always on: do not wait for the domain's end
    #[arg(short = 'e', hide = true)]
    pub(crate) no_wait: bool,
    /// xl's option, always on: stay in the foreground
    #[arg(short = 'F', hide = true)]
    pub(crate) foreground: bool,
    /// xl's option: print more, as -v
    #[arg(short = 'd', hide = true)]
    pub(crate) debug: bool,
    /// xl's option: the script that compares the output of both guests; a mock guest has none
    #[arg(long, hide = true, value_name = "SCRIPT", requires = "colo")]
    pub(crate) coloft_script: Option<OsString>,
    /// xl's option: compare it in a process
    #[arg(long, hide = true, requires = "colo")]
    pub(crate) userspace_colo_proxy: bool,
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Endpoint {
    /// `unix:PATH`
    Unix(PathBuf),
    /// `tcp:ADDRESS:PORT`; the address may be a name, or IPv6 in brackets.
    Tcp(String),
    /// `tls:ADDRESS:PORT`, likewise: a session (docs/session.md).
    Tls(String),
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("unix", "")) => Err("expected a path after `unix:`".to_owned()),
            Some(("unix", path)) => Ok(Self::Unix(PathBuf::from(path))),
            Some((kind @ ("tcp" | "tls"), rest)) => match rest.rsplit_once(':') {
                Some((address, port)) if !address.is_empty() && port.parse::<u16>().is_ok() => {
                    let rest = rest.to_owned();
                    Ok(match kind {
                        "tcp" => Self::Tcp(rest),
                        _ => Self::Tls(rest),
                    })
                }
                _ => Err(format!("expected ADDRESS:PORT after `{kind}:`")),
            },
            _ => Err("expected unix:PATH, tcp:ADDRESS:PORT or tls:ADDRESS:PORT".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_told_apart() {
        assert_eq!("unix:/a:b".parse(), Ok(Endpoint::Unix("/a:b".into())));
        for good in ["127.0.0.1:0", "[::1]:8002", "host.example.org:65535"] {
            let parsed = format!("tcp:{good}").parse();
            assert_eq!(parsed, Ok(Endpoint::Tcp(good.to_owned())));
        }
        for bad in [
            "",
            "unix:",
            "tcp:",
            "tcp:1",
            "tcp::1",
            "tcp:a:65536",
            "host",
        ] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad} was taken");
        }
    }
}
