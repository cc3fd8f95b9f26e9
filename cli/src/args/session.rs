//! The options of a session between the two ends of a migration (docs/session.md).

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::MemorySize;

/// The heading in the help.
const SESSION: &str = "Session";

/// The session of a sender.
#[derive(Clone, Debug, Args)]
pub(crate) struct SessionArgs {
    /// Send over N connections at a time (1 to 16)
    #[arg(
        long,
        value_name = "N",
        value_parser = clap::value_parser!(u8).range(1..=16),
        help_heading = SESSION
    )]
    pub(crate) connections: Option<u8>,
    /// Compress what is sent: `none`, `zstd`, `zstd:LEVEL` (1 to 19), or `auto`, which compresses
    /// while that is faster [default: none]
    #[arg(long, value_name = "HOW", help_heading = SESSION)]
    pub(crate) compress: Option<CompressArg>,
    /// How the connections are encrypted: `auto`, with keys for this migration alone; `off`,
    /// through ssh only; or a directory with ca.pem, cert.pem and key.pem, which `tls:` needs
    /// [default: auto]
    #[arg(long, value_name = "HOW", help_heading = SESSION)]
    pub(crate) tls: Option<TlsArg>,
    /// Connect again if all connections are lost, for up to S seconds; 0: do not [default: 10]
    #[arg(long, value_name = "S", help_heading = SESSION)]
    pub(crate) reconnect: Option<u32>,
    /// Send at most RATE a second: a number of MiB, or one with K, M or G; at least 1M
    #[arg(long, value_name = "RATE", help_heading = SESSION)]
    pub(crate) bandwidth: Option<BandwidthArg>,
}

impl SessionArgs {
    /// Whether any of it was given.
    pub(crate) fn is_given(&self) -> bool {
        self.connections.is_some()
            || self.compress.is_some()
            || self.tls.is_some()
            || self.reconnect.is_some()
            || self.bandwidth.is_some()
    }
}

/// The session of a receiver.
#[derive(Clone, Debug, Args)]
pub(crate) struct OfferArgs {
    /// Offer the sender a session over connections of its own (docs/session.md). `migrate` adds
    /// this option when it needs it, except with -s ''
    #[arg(long, conflicts_with_all = ["listen", "standing_by"], help_heading = SESSION)]
    pub(crate) session: bool,
    /// With --session: listen at this address [default: the one that ssh was connected to]
    #[arg(long, value_name = "ADDRESS", requires = "session", help_heading = SESSION)]
    pub(crate) listen_address: Option<IpAddr>,
    /// With --session: listen at a port from A to B [default: any free one]
    #[arg(long, value_name = "A-B", requires = "session", help_heading = SESSION)]
    pub(crate) ports: Option<PortsArg>,
    /// With --listen tls:ADDRESS:PORT: a directory with ca.pem, cert.pem, key.pem, and the names of
    /// the senders that may send a domain, one on a line, in `allow`
    #[arg(long, value_name = "DIR", requires = "listen", help_heading = SESSION)]
    pub(crate) tls: Option<PathBuf>,
}

/// How a sender compresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CompressArg {
    Auto,
    None,
    Zstd(i32),
}

impl FromStr for CompressArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let level = match text {
            "auto" => return Ok(Self::Auto),
            "none" => return Ok(Self::None),
            "zstd" => return Ok(Self::Zstd(1)),
            other => other.strip_prefix("zstd:").map(str::parse),
        };
        match level {
            Some(Ok(level @ 1..=19)) => Ok(Self::Zstd(level)),
            _ => {
                Err("expected auto, none, zstd or zstd:LEVEL with a level from 1 to 19".to_owned())
            }
        }
    }
}

/// A rate in bytes a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BandwidthArg(pub(crate) u64);

impl FromStr for BandwidthArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let size: MemorySize = text.strip_suffix("/s").unwrap_or(text).parse()?;
        match size.kib << 10 {
            bytes if bytes < 1 << 20 => {
                Err("expected at least 1M: an end that hears less gives up".to_owned())
            }
            bytes => Ok(Self(bytes)),
        }
    }
}

/// How connections are encrypted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TlsArg {
    Auto,
    Off,
    Directory(PathBuf),
}

impl FromStr for TlsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "" => Err("expected auto, off or a directory".to_owned()),
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            path => Ok(Self::Directory(path.into())),
        }
    }
}

/// A range of ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PortsArg(pub(crate) RangeInclusive<u16>);

impl FromStr for PortsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let range = text.split_once('-').and_then(|(first, last)| {
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            (0 < first && first <= last).then_some(Self(first..=last))
        });
        range.ok_or_else(|| "expected A-B, two ports from 1 to 65535".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_options_of_a_session_mean() {
        assert_eq!("zstd".parse(), Ok(CompressArg::Zstd(1)));
        assert_eq!("zstd:19".parse(), Ok(CompressArg::Zstd(19)));
        assert_eq!("auto".parse(), Ok(CompressArg::Auto));
        for bad in ["", "zstd:", "zstd:0", "zstd:20", "lz4"] {
            assert!(bad.parse::<CompressArg>().is_err(), "{bad} was taken");
        }
        for (text, bytes) in [("1", 1 << 20), ("1024K/s", 1 << 20), ("2G", 2 << 30)] {
            assert_eq!(text.parse(), Ok(BandwidthArg(bytes)), "{text}");
        }
        for bad in ["", "0", "1023K", "1020K", "fast"] {
            assert!(bad.parse::<BandwidthArg>().is_err(), "{bad} was taken");
        }
        assert_eq!("off".parse(), Ok(TlsArg::Off));
        assert_eq!("/a".parse(), Ok(TlsArg::Directory("/a".into())));
        assert_eq!("1-65535".parse(), Ok(PortsArg(1..=65535)));
        for bad in ["", "1", "0-5", "5-4", "1-65536", "-"] {
            assert!(bad.parse::<PortsArg>().is_err(), "{bad} was taken");
        }
    }
}
