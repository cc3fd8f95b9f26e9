//! The log: the libraries' messages go to syslog, and from INFO up also to xenopsd's log.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt as _;
use xsr_xen_backend::DomId;

use crate::control::Control;
use crate::line::Line;

/// The socket of syslogd.
const SYSLOG: &str = "/dev/log";
/// The domain of this save or restore, for the name in syslog.
static DOMID: OnceLock<DomId> = OnceLock::new();
/// `LOG_DAEMON`, as in XenServer's emu-manager.
const FACILITY: u8 = 3 << 3;

/// Names the domain that all later messages are about.
pub(crate) fn about(domid: DomId) {
    DOMID.get_or_init(|| domid);
}

/// The name of this program in syslog, in the form that the stock emu-manager uses.
fn ident() -> String {
    match DOMID.get() {
        Some(domid) => format!("emu-manager-{}", domid.0),
        None => "emu-manager".to_owned(),
    }
}

/// Starts logging, for all threads; panics are logged as well.
pub(crate) fn install(control: &Arc<Control>, debug: bool) {
    // Panics would go to stderr, which does not exist under xenopsd.
    std::panic::set_hook(Box::new(|panic| say(panic)));
    let most = match debug {
        true => Level::DEBUG,
        false => Level::INFO,
    };
    let layer = Layers {
        control: Arc::clone(control),
        syslog: syslog(),
        most,
    };
    Registry::default().with(layer).init();
}

fn syslog() -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    // A syslogd that does not read must not delay the guest.
    socket.set_nonblocking(true).ok()?;
    socket.connect(syslog_path()).ok()?;
    Some(socket)
}

#[cfg(not(feature = "test-backend"))]
fn syslog_path() -> PathBuf {
    SYSLOG.into()
}

/// The socket of syslogd, or the one from which a test reads the log.
#[cfg(feature = "test-backend")]
fn syslog_path() -> PathBuf {
    crate::mock::syslog().unwrap_or_else(|| SYSLOG.into())
}

fn send(syslog: &UnixDatagram, level: Level, text: &str) -> io::Result<usize> {
    let (priority, ident, pid) = (FACILITY | severity(level), ident(), std::process::id());
    syslog.send(format!("<{priority}>{ident}[{pid}]: xsr: {text}").as_bytes())
}

/// Prints a line on stderr, which may be closed.
fn print(text: &str) {
    writeln!(io::stderr(), "xsr-emu-manager: {text}").ok();
}

/// Reports an error that has no other way out: in syslog and on stderr.
pub(crate) fn say(text: impl fmt::Display) {
    let text = text.to_string().replace('\n', " ");
    if let Some(syslog) = syslog() {
        send(&syslog, Level::ERROR, &text).ok();
    }
    print(&text);
}

struct Layers {
    control: Arc<Control>,
    /// `None` if the log goes to stderr instead.
    syslog: Option<UnixDatagram>,
    most: Level,
}

/// The syslog number of a level.
fn severity(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

impl<S: Subscriber> Layer<S> for Layers {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        *metadata.level() <= self.most && metadata.target().starts_with("xsr")
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let level = *event.metadata().level();
        let mut text = Text::default();
        event.record(&mut text);
        let text = text.message + &text.fields;
        let syslog = self.syslog.as_ref();
        let sent = syslog.map(|syslog| send(syslog, level, &text));
        if !matches!(sent, Some(Ok(_))) {
            print(&text);
        }
        if level <= Level::INFO {
            for piece in pieces(&text) {
                // The control records that xenopsd cannot be reached.
                self.control.tell(&Line::Info(piece)).ok();
            }
        }
    }
}

/// The text in pieces that each fit into a line.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    const LONGEST: usize = 120;
    let mut rest = text;
    std::iter::from_fn(move || {
        let end = (0..=rest.len().min(LONGEST)).rev();
        let end = end.into_iter().find(|at| rest.is_char_boundary(*at))?;
        let (piece, after) = rest.split_at(end);
        rest = after;
        (!piece.is_empty()).then_some(piece)
    })
}

/// A message and its fields.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        }
        .ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_messages_go_to_xenopsd_in_pieces() {
        let text = "é".repeat(200);
        let pieces: Vec<&str> = pieces(&text).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.len() == 4 && pieces.iter().all(|piece| piece.len() <= 120));
        assert_eq!(super::pieces("").count(), 0);
    }
}
