//! The log: what the libraries say goes to syslog, and from INFO on to xenopsd's log as well.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt as _;
use xsr_xen_backend::DomId;

use crate::control::Control;
use crate::line::Line;

/// Where syslogd listens.
const SYSLOG: &str = "/dev/log";
/// `LOG_DAEMON`, as XenServer's emu-manager has it.
const FACILITY: u8 = 3 << 3;

/// Log from now on, whatever thread it comes from.
pub(crate) fn install(control: &Arc<Control>, domid: DomId, debug: bool) {
    let most = match debug {
        true => Level::DEBUG,
        false => Level::INFO,
    };
    let layer = Layers {
        control: Arc::clone(control),
        syslog: syslog(),
        ident: format!("emu-manager-{}", domid.0),
        most,
    };
    Registry::default().with(layer).init();
}

fn syslog() -> Option<UnixDatagram> {
    let socket = UnixDatagram::unbound().ok()?;
    // A syslogd that does not read must not hold the guest up.
    socket.set_nonblocking(true).ok()?;
    socket.connect(SYSLOG).ok()?;
    Some(socket)
}

/// A line on stderr, which may be closed.
pub(crate) fn say(text: impl fmt::Display) {
    writeln!(io::stderr(), "xsr-emu-manager: {text}").ok();
}

struct Layers {
    control: Arc<Control>,
    /// `None`: stderr takes its place.
    syslog: Option<UnixDatagram>,
    ident: String,
    most: Level,
}

/// syslog's number for a level.
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
        let sent = self.syslog.as_ref().map(|syslog| {
            let priority = FACILITY | severity(level);
            let pid = std::process::id();
            let line = format!("<{priority}>{}[{pid}]: {text}", self.ident);
            syslog.send(line.as_bytes())
        });
        if !matches!(sent, Some(Ok(_))) {
            say(&text);
        }
        if level <= Level::INFO {
            for piece in pieces(&text) {
                // An xenopsd that does not hear is noted by the control.
                self.control.tell(&Line::Info(piece)).ok();
            }
        }
    }
}

/// Text in pieces that each fit into a line.
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

/// A message, and what belongs to it.
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
