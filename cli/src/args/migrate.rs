//! The command line of `xsr migrate` and `xsr migrate-receive`.
//!
//! C implementation: `main_migrate`, `main_migrate_receive` in `tools/xl/xl_migrate.c`,
//! whose options these are where they make sense here.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::{BackendArg, MemorySize, ProgressArg, TargetArgs, ThreadsArg};

/// Move a domain to another host, as `xl migrate` does
///
/// HOST is a name for ssh, where `xsr migrate-receive` is run, or what one that listens
/// was told: `unix:PATH`, `tcp:ADDRESS:PORT`. The domain runs here until its memory is
/// over there; then it is suspended, the rest is sent, and it runs there. Whatever fails
/// before that, it runs on here.
///
/// Where the connection breaks after the other end has been told to run the domain, and
/// before it has said that it does, nobody can know at this end. The domain stays here,
/// suspended, as DOMAIN--migratedaway; what to do is printed, and in docs/migration.md.
/// The exit code is 3.
///
/// On a Xen host, `xl migrate` does it, with xsr-save-helper: all of its options pass;
/// --threads, --max-downtime, --timeout and --on-timeout are for the helper, which without the
/// last three suspends the domain by Xen's own rule (after five passes, or with fewer than 50
/// dirty pages); what else xl has not is refused. It runs `xl migrate-receive` on the other
/// host; `-s '' DOMAIN 'ssh HOST xsr migrate-receive'` runs another command.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr migrate web other.example.org        on a Xen host
  xsr migrate --max-downtime 100 --on-timeout cancel web other.example.org
  xsr migrate --backend mock:/tmp/lab web other.example.org
  xsr migrate --backend mock:/tmp/lab --max-downtime 50 web other.example.org
  xsr migrate --backend mock:/tmp/lab web unix:/tmp/migrate.sock
  xsr migrate --backend mock:/tmp/lab -s '' web 'xsr migrate-receive --backend mock:/tmp/b'")]
pub(crate) struct MigrateArgs {
    /// Migrate while the domain runs: what is done anyway
    #[arg(long, overrides_with = "no_live")]
    pub(crate) live: bool,
    /// Suspend the domain first
    #[arg(long, overrides_with = "live")]
    pub(crate) no_live: bool,
    /// Leave the domain paused on the other host
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// Send all memory a second time at the end, for the other end to compare
    #[arg(long)]
    pub(crate) debug: bool,
    #[command(flatten)]
    pub(crate) target: TargetArgs,
    /// Pass --force on: take the guest there though HOST lacks CPU features that it has seen. A
    /// receiver that listens has to be given it itself
    #[arg(long)]
    pub(crate) force: bool,
    /// Give HOST up when it has not answered, or has taken nothing, for so many seconds; while the
    /// domain is suspended HOST also has to take 1 MiB/s on average after that time
    #[arg(
        long,
        value_name = "S",
        default_value_t = 60,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) answer_timeout: u32,
    #[command(flatten)]
    pub(crate) threads: ThreadsArg,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
    #[command(flatten)]
    pub(crate) backend: BackendArg,
    #[command(flatten)]
    pub(crate) progress: ProgressArg,
    /// Print what was done as JSON (docs/json.md)
    #[arg(long)]
    pub(crate) json: bool,
    /// Of xl, refused: another configuration
    #[arg(short = 'C', value_name = "CONFIG", hide = true)]
    pub(crate) config: Option<OsString>,
    /// Of xl, refused: the same number there
    #[arg(short = 'D', hide = true)]
    pub(crate) preserve_domid: bool,
    /// Name or number of the domain
    pub(crate) domain: String,
    /// Where to
    pub(crate) host: String,
}

/// How the other host is reached.
#[derive(Clone, Debug, Args)]
pub(crate) struct ConnectionArgs {
    /// What to run instead of ssh, through sh; if empty, HOST is the whole command
    #[arg(
        short = 's',
        value_name = "COMMAND",
        default_value = "ssh",
        help_heading = "Connection"
    )]
    pub(crate) ssh: String,
    /// What to run on HOST
    #[arg(
        long,
        value_name = "COMMAND",
        default_value = "xsr migrate-receive",
        help_heading = "Connection"
    )]
    pub(crate) receiver: String,
    /// Pass -e on (xl: do not wait for the domain's end)
    #[arg(short = 'e', help_heading = "Connection")]
    pub(crate) no_wait: bool,
}

/// Take a domain that another host sends, as `xl migrate-receive` does
///
/// Run by `xsr migrate` or `xl migrate` on the other host, through ssh; then it speaks
/// with it on stdin and stdout. With --listen it waits for one migration, takes it and
/// ends. With -r it is the other end of `xsr remus` or `xl remus`, with
/// --colo that of `remus -c`. Nobody is asked for a password and nothing is encrypted there: keep such a
/// socket where only those can reach it who may.
///
/// On a Xen host, `xl migrate-receive` does it, with xsr-save-helper.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  xsr migrate-receive --backend mock:/tmp/b --listen unix:/tmp/migrate.sock
  xsr migrate-receive --backend mock:/tmp/b --listen tcp:127.0.0.1:8002")]
pub(crate) struct ReceiveArgs {
    /// Leave the domain paused
    #[arg(short = 'p')]
    pub(crate) paused: bool,
    /// Take a guest that has seen CPU features which this host lacks: it may crash when it uses one
    /// (docs/cpu.md)
    #[arg(long)]
    pub(crate) force: bool,
    /// Wait here for one migration: `unix:PATH` or `tcp:ADDRESS:PORT` (0: any free one)
    #[arg(long, value_name = "WHERE")]
    pub(crate) listen: Option<Endpoint>,
    /// Stand by for a domain that `remus` protects: run its last checkpoint once the other
    /// host is lost
    #[arg(short = 'r', group = "standing_by", conflicts_with = "colo")]
    pub(crate) remus: bool,
    /// The same for `remus -c`: the domain runs here, too, and each checkpoint makes it what
    /// it is there
    #[arg(long, group = "standing_by")]
    pub(crate) colo: bool,
    /// With --colo: have a mock guest write to so many pages a second here
    #[arg(
        long,
        value_name = "PAGES",
        requires = "colo",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub(crate) dirty_rate: Option<u32>,
    /// With -r or --colo: keep so much of a checkpoint in memory until it is complete, and
    /// what is more in a temporary file [default: 64M]
    #[arg(long, value_name = "SIZE", requires = "standing_by")]
    pub(crate) checkpoint_memory: Option<MemorySize>,
    /// With -r or --colo: let that file have no more than this [default: all of the domain's
    /// memory, and 64M]
    #[arg(long, value_name = "SIZE", requires = "standing_by")]
    pub(crate) checkpoint_file: Option<MemorySize>,
    /// Give the sender up, and destroy what is here, when it has sent nothing for so many seconds;
    /// with -r or --colo until the first checkpoint is complete
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
    /// Of xl: do not wait for the domain's end, which is what is done anyway
    #[arg(short = 'e', hide = true)]
    pub(crate) no_wait: bool,
    /// Of xl: stay in the foreground, which is what is done anyway
    #[arg(short = 'F', hide = true)]
    pub(crate) foreground: bool,
    /// Of xl: say more, as -v
    #[arg(short = 'd', hide = true)]
    pub(crate) debug: bool,
    /// Of xl: what compares what both guests send out, which a mock guest does not
    #[arg(long, hide = true, value_name = "SCRIPT", requires = "colo")]
    pub(crate) coloft_script: Option<OsString>,
    /// Of xl: the same in a process
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
}

impl FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once(':') {
            Some(("unix", "")) => Err("unix: wants a path behind the colon".to_owned()),
            Some(("unix", path)) => Ok(Self::Unix(PathBuf::from(path))),
            Some(("tcp", rest)) => match rest.rsplit_once(':') {
                Some((address, port)) if !address.is_empty() && port.parse::<u16>().is_ok() => {
                    Ok(Self::Tcp(rest.to_owned()))
                }
                _ => Err("tcp: wants ADDRESS:PORT behind the colon".to_owned()),
            },
            _ => Err("expected unix:PATH or tcp:ADDRESS:PORT".to_owned()),
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
