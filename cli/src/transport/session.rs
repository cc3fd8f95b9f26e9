//! A session between the two ends: how they agree on one through ssh, or over `tls:` by the keys in
//! a directory. docs/session.md describes it.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Error, Result, bail};
use xsr_save_restore::migrate::connection::{Connection, ConnectionReader, ConnectionWriter, Wait};
use xsr_save_restore::migrate::session::{
    Compression, Dial, KeyDirectory, OneTimeKey, Server, ServerTls, Session, SessionListener,
    SessionRequest, TcpDial, Wire,
};
use xsr_save_restore::progress::Cancel;

use crate::args::{CompressArg, MigrateArgs, OfferArgs, PortsArg, SessionArgs, TlsArg};
use crate::exit::BadUsage;
use crate::interrupt::Interrupt;
use crate::terminal::Terminal;

/// How long a direct connection is tried before everything goes through ssh.
const DIRECT: Duration = Duration::from_secs(3);

/// How long a domain may stay suspended without a link, in addition to its downtime.
const GRACE: Duration = Duration::from_secs(2);

/// For how long a session is kept without a link, unless the command line says otherwise.
const RECONNECT: u32 = 10;

/// The first word of what the two ends tell each other through ssh, with the version.
const OFFER: &str = "xsr-session 1";

/// The longest line of them.
const LINE: usize = 2048;

/// The option of a receiver that offers a session.
pub(crate) const OPTION: &str = "--session";

/// What the command line asks of a session.
pub(crate) fn request_of_migration(args: &MigrateArgs) -> SessionRequest {
    let downtime = args.target.max_downtime.unwrap_or(300);
    let suspended = Duration::from_millis(downtime.into()) + GRACE;
    request(&args.session).reconnect_suspended(suspended)
}

/// What the options of a session ask.
pub(crate) fn request(session: &SessionArgs) -> SessionRequest {
    let seconds = session.reconnect.unwrap_or(RECONNECT);
    let request = SessionRequest::new()
        .links(session.connections.unwrap_or(1))
        .reconnect(Duration::from_secs(seconds.into()))
        .compression(match session.compress {
            None | Some(CompressArg::None) => Compression::None,
            Some(CompressArg::Auto) => Compression::Auto,
            Some(CompressArg::Zstd(level)) => Compression::Zstd(level),
        });
    match session.bandwidth {
        Some(bandwidth) => request.bandwidth(bandwidth.0),
        None => request,
    }
}

/// What a receiver takes: as long as the sender wants, but no longer than it waits for an answer.
pub(crate) fn accepted(answer: Duration) -> SessionRequest {
    SessionRequest::new().reconnect(answer)
}

fn usage(why: &str) -> Error {
    Error::new(BadUsage(why.to_owned()))
}

/// Refuses options of a session that do not fit each other or the destination.
pub(crate) fn check(args: &MigrateArgs) -> Result<()> {
    let tls = args.session.tls.as_ref();
    let on_socket =
        args.connection.ssh == "ssh" && ["unix:", "tcp:"].iter().any(|p| args.host.starts_with(p));
    if args.session.is_given() && on_socket {
        return Err(usage(
            "--connections, --compress, --tls, --reconnect and --bandwidth need a host name, or \
             tls:ADDRESS:PORT",
        ));
    }
    let by_certificate = args.connection.ssh == "ssh" && args.host.starts_with("tls:");
    match tls {
        Some(TlsArg::Directory(_)) if by_certificate => Ok(()),
        _ if by_certificate => Err(usage(
            "tls: needs --tls DIR, a directory with ca.pem, cert.pem and key.pem",
        )),
        _ => check_through_ssh(&args.session),
    }
}

/// The same for a session that is agreed on through ssh.
pub(crate) fn check_through_ssh(session: &SessionArgs) -> Result<()> {
    let own =
        session.connections.is_some_and(|n| n > 1) || session.reconnect.is_some_and(|s| s > 0);
    match &session.tls {
        Some(TlsArg::Off) if own => Err(usage(
            "--connections and --reconnect need connections of their own: drop --tls off",
        )),
        Some(TlsArg::Directory(_)) => Err(usage(
            "--tls DIR is for `xsr migrate` to tls:ADDRESS:PORT: through ssh the two ends exchange \
             keys by themselves",
        )),
        _ => Ok(()),
    }
}

/// Connects to `tls:ADDRESS:PORT`.
pub(crate) fn connect(
    request: &SessionRequest,
    endpoint: &str,
    directory: &Path,
    limit: Duration,
    interrupt: &Interrupt,
) -> Result<Session> {
    let (name, _) = endpoint.rsplit_once(':').unwrap_or((endpoint, ""));
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let tls = KeyDirectory::open(directory)?.client(name)?;
    let address = endpoint.to_owned();
    let addresses = interrupt.wait_for(limit, move || Ok(address.to_socket_addrs()?.collect()))?;
    let dial = Arc::new(TcpDial::new(addresses, tls));
    Ok(request.connect(dial, limit, interrupt.cancel())?)
}

/// Binds the receiver's end of `tls:ADDRESS:PORT`.
pub(crate) fn listen(endpoint: &str) -> Result<SessionListener> {
    let address = endpoint.to_socket_addrs()?.next();
    let address: SocketAddr = address.with_context(|| format!("{endpoint}: no address"))?;
    let listener = SessionListener::bind(address.ip(), address.port()..=address.port());
    listener.with_context(|| endpoint.to_owned())
}

/// Waits for a sender that has the right certificate.
pub(crate) fn accept(
    listener: SessionListener,
    tls: ServerTls,
    answer: Duration,
    interrupt: &Interrupt,
) -> Result<Box<dyn Connection>> {
    let server = Arc::new(Server::new(accepted(answer)));
    let session = listener.accept(server, tls, None, interrupt.cancel())?;
    Ok(Box::new(session))
}

/// Reads a line of the other end.
fn line(from: &mut ConnectionReader<'_>) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < LINE {
        from.read_exact(&mut byte)?;
        if byte == *b"\n" {
            break;
        }
        line.push(byte[0]);
    }
    Ok(String::from_utf8_lossy(&line).into_owned())
}

/// Writes a line for the other end.
fn say(pipe: &dyn Connection, line: &str, wait: Wait<'_>) -> std::io::Result<()> {
    use std::io::Write as _;
    ConnectionWriter::new(pipe, wait).write_all(format!("{line}\n").as_bytes())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) || text.len() > 2 * OneTimeKey::LONGEST {
        return None;
    }
    let pairs = text.as_bytes().chunks(2);
    let bytes = pairs.map(|pair| {
        let pair = std::str::from_utf8(pair).ok()?;
        u8::from_str_radix(pair, 16).ok()
    });
    bytes.collect()
}

/// The two words of an offer.
fn offer(line: &str) -> Option<(Vec<u8>, &str)> {
    let rest = line.strip_prefix(OFFER)?.strip_prefix(' ')?;
    let (key, rest) = rest.split_once(' ')?;
    Some((unhex(key)?, rest))
}

/// The one link that goes through ssh.
#[derive(Debug)]
struct Through(std::sync::Mutex<Option<Box<dyn Connection>>>);

impl Dial for Through {
    fn dial(&self, _: Duration, _: &Cancel) -> std::io::Result<Wire> {
        let mut pipe = self.0.lock().unwrap_or_else(|error| error.into_inner());
        let pipe = pipe.take();
        pipe.map(Wire::plain)
            .ok_or_else(|| std::io::ErrorKind::NotConnected.into())
    }
}

/// A session that was agreed on through ssh.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) session: Session,
    /// The connection through ssh, which stays open beside the session.
    pub(crate) beside: Option<Box<dyn Connection>>,
}

/// What an end that has started the other one through a command wants.
#[derive(Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) request: SessionRequest,
    pub(crate) session: &'a SessionArgs,
    /// The command of xsr that wants it.
    pub(crate) name: &'static str,
    /// The command that reaches the other host.
    pub(crate) ssh: &'a str,
}

/// Agrees on a session with the other end, which a command has started.
pub(crate) fn agree(
    wanted: &Wanted<'_>,
    pipe: Box<dyn Connection>,
    limit: Duration,
    terminal: &Terminal,
    interrupt: &Interrupt,
) -> Result<Agreed> {
    let request = wanted.request.clone();
    let cancel = interrupt.cancel();
    let wait = Wait::forever().unless(cancel);
    let key = OneTimeKey::new()?;
    let token = SessionRequest::new_token()?;
    let mine = format!("{OFFER} {} {}", hex(key.public()), hex(&token));
    say(&*pipe, &mine, wait.at_most(limit)).context("offering a session")?;
    let theirs = line(&mut ConnectionReader::new(&*pipe, wait)?.within(limit))
        .context("waiting for the other end's keys: does it know --session?")?;
    let Some((theirs, addresses)) = offer(&theirs) else {
        bail!("the other end offers no session, but says {theirs:?}");
    };
    let addresses: Vec<SocketAddr> = addresses
        .split(',')
        .filter_map(|a| a.parse().ok())
        .collect();
    let direct = match (&wanted.session.tls, addresses.is_empty()) {
        (Some(TlsArg::Off), _) => Err(None),
        (_, true) => Err(Some("it does not know at which address".to_owned())),
        _ => {
            let dial = Arc::new(TcpDial::new(addresses, key.client(&theirs)?));
            let made = request.clone().token(token).connect(dial, DIRECT, cancel);
            made.map_err(|error| Some(crate::exit::words_of(&error)))
        }
    };
    let why = match direct {
        Ok(session) => {
            say(&*pipe, "direct", wait.at_most(limit)).context("choosing the session")?;
            return Ok(Agreed {
                session,
                beside: Some(pipe),
            });
        }
        Err(why) => why,
    };
    if let Some(why) = why {
        let through = match wanted.ssh {
            "" => "the command",
            ssh => ssh,
        };
        terminal.say(&format!(
            "{}: no direct connection ({why}): everything goes through {through}",
            wanted.name
        ));
    }
    say(&*pipe, "pipe", wait.at_most(limit)).context("choosing the session")?;
    // There is one pipe, and it does not return.
    let request = request.links(1).reconnect(Duration::ZERO).token(token);
    let dial = Arc::new(Through(Some(pipe).into()));
    let session = request.connect(dial, limit, cancel)?;
    Ok(Agreed {
        session,
        beside: None,
    })
}

/// The address at which ssh was reached.
fn reached() -> Option<IpAddr> {
    let words = std::env::var("SSH_CONNECTION").ok()?;
    words.split(' ').nth(2)?.parse().ok()
}

/// What the end that was started offers.
#[derive(Debug)]
pub(crate) struct Offer {
    /// Its part in the session. The other end's limits are taken, if they are shorter.
    pub(crate) request: SessionRequest,
    pub(crate) listen_address: Option<IpAddr>,
    pub(crate) ports: Option<PortsArg>,
}

impl Offer {
    /// A receiver's: a session is kept as long as the sender wants, but no longer than the receiver
    /// waits for an answer.
    pub(crate) fn of_receiver(args: &OfferArgs, answer: Duration) -> Self {
        Self {
            request: accepted(answer),
            listen_address: args.listen_address,
            ports: args.ports.clone(),
        }
    }
}

/// Agrees on a session with the end that has started this process through ssh.
pub(crate) fn offered(
    args: &Offer,
    pipe: Box<dyn Connection>,
    answer: Duration,
    interrupt: &Interrupt,
) -> Result<Agreed> {
    let cancel = interrupt.cancel();
    let wait = Wait::forever().unless(cancel);
    let key = OneTimeKey::new()?;
    let mut reader = ConnectionReader::new(&*pipe, wait)?.within(answer);
    let theirs = line(&mut reader).context("waiting for the sender's keys")?;
    let Some((theirs, token)) = offer(&theirs) else {
        bail!("the other end offers no session: start this with `xsr migrate` or `xsr tunnel`");
    };
    let token = unhex(token).and_then(|token| token.try_into().ok());
    let token: [u8; SessionRequest::TOKEN] = token.context("the sender's token is malformed")?;
    let ports = args.ports.clone().map_or(0..=0, |ports| ports.0);
    let listener = args.listen_address.or_else(reached).map(|address| {
        let bound = SessionListener::bind(address, ports);
        bound.map_err(|error| {
            tracing::warn!(%error, "cannot listen at {address}: everything goes through ssh");
        })
    });
    let listener = listener.and_then(Result::ok);
    let address = match &listener {
        Some(listener) => listener.address()?.to_string(),
        None => "-".to_owned(),
    };
    let server = Arc::new(Server::new(args.request.clone().token(token)));
    let tls = key.server(&theirs)?;
    let coming = listener.map(|listener| {
        let (server, cancel) = (Arc::clone(&server), Cancel::new());
        let stop = cancel.clone();
        let coming = std::thread::spawn(move || listener.accept(server, tls, None, &cancel));
        (coming, stop)
    });
    let mine = format!("{OFFER} {} {address}", hex(key.public()));
    say(&*pipe, &mine, wait.at_most(answer)).context("telling the sender the keys")?;
    let choice = line(&mut reader);
    drop(reader);
    match (choice.as_deref(), coming) {
        (Ok("direct"), Some((coming, stop))) => {
            let began = Instant::now();
            while !coming.is_finished() {
                if began.elapsed() >= answer || cancel.is_cancelled() {
                    stop.cancel();
                }
                std::thread::park_timeout(Duration::from_millis(20));
            }
            let Ok(session) = coming.join() else {
                bail!("waiting for the session: a thread has panicked");
            };
            Ok(Agreed {
                session: session.context("the sender has made no session")?,
                beside: Some(pipe),
            })
        }
        (choice, coming) => {
            if let Some((_, stop)) = coming {
                stop.cancel();
            }
            match choice {
                Ok("pipe") => {}
                Ok(other) => bail!("the sender chooses {other:?}, which is not known"),
                Err(_) => return Err(choice_failed(choice)),
            }
            // A client may have got in that the sender could not use.
            let server = Server::new(args.request.clone().token(token));
            let session = server.admit(Wire::plain(pipe), cancel)?;
            Ok(Agreed {
                session: session.context("the sender has made no session")?,
                beside: None,
            })
        }
    }
}

fn choice_failed(choice: Result<&str, &std::io::Error>) -> Error {
    let why = choice.err().map_or_else(String::new, ToString::to_string);
    Error::msg(format!("waiting for the sender's choice: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offer_is_read_as_it_is_written_and_nothing_else() {
        let key = [0, 1, 0xAB, 0xFF];
        assert_eq!(hex(&key), "0001abff");
        let line = format!("{OFFER} {} 192.0.2.7:8002", hex(&key));
        assert_eq!(offer(&line), Some((key.to_vec(), "192.0.2.7:8002")));
        let long = format!("{OFFER} {} -", "00".repeat(OneTimeKey::LONGEST + 1));
        for bad in [
            "",
            "xl migration receiver ready",
            "xsr-session 2 00 -",
            "xsr-session 1 0 -",
            "xsr-session 1 0g -",
            "xsr-session 1 00",
            &long,
        ] {
            assert_eq!(offer(bad), None, "{bad}");
        }
    }
}
