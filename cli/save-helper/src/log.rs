//! Forwards our log to libxl's log. libxl decides which lines it shows.

use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::sync::Arc;

use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt as _};
use tracing_subscriber::registry::Registry;
use tracing_subscriber::util::SubscriberInitExt as _;

use crate::wire::{Level, Wire};

/// Send log events of all threads to libxl from now on.
pub(crate) fn install(wire: &Arc<Wire>) {
    Registry::default().with(ToLibxl(Arc::clone(wire))).init();
}

/// Print a line on stderr. If stderr is closed the line is lost and the work goes on (`eprintln!`
/// would panic).
pub(crate) fn say(text: impl fmt::Display) {
    writeln!(io::stderr(), "xsr-save-helper: {text}").ok();
}

struct ToLibxl(Arc<Wire>);

/// libxl's level for one of ours; `None`: not sent to libxl.
fn level(of: tracing::Level) -> Option<Level> {
    match of {
        tracing::Level::ERROR => Some(Level::Error),
        tracing::Level::WARN => Some(Level::Warn),
        tracing::Level::INFO => Some(Level::Info),
        tracing::Level::DEBUG => Some(Level::Debug),
        tracing::Level::TRACE => None,
    }
}

impl<S: Subscriber> Layer<S> for ToLibxl {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        level(*metadata.level()).is_some() && metadata.target().starts_with("xsr")
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let Some(level) = level(*event.metadata().level()) else {
            return;
        };
        let mut line = Line::default();
        event.record(&mut line);
        let text = line.message + &line.fields;
        if let Err(error) = self.0.log(level, &text) {
            // libxl is gone, but stderr may still work.
            say(format_args!("{text} (libxl does not hear: {error})"));
        }
    }
}

/// An event's message, and its fields.
#[derive(Debug, Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let written = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
        // Writing to a String cannot fail; a value whose Debug fails is left out.
        if written.is_err() {
            self.fields.push_str(" ?");
        }
    }
}
