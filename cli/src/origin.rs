//! What a toolstack other than today's xl says about a domain, beside its image: libvirt's XML,
//! xend's s-expression, xenopsd's record, the text that xl of Xen 4.1 to 4.4 kept.
//!
//! Name, UUID, kind, vcpus, memory and what xl has as well (the clock, the actions for a guest that
//! has ended, what a guest boots from) are taken over. Devices and other settings are only
//! reported, because no container that is written here can hold them in another toolstack's format.

mod ova_xml;
mod settings;
mod sxp;
mod xl_text;
mod xml;

use serde::Serialize;
use serde_json::Value;
use xsr_format::wrapper::xl::{FLAG_JSON, XlHeader};
use xsr_xen_backend::GuestKind;

pub(crate) use self::ova_xml::SuspendDisk;
pub(crate) use self::settings::TIMER_MODES;
pub(crate) use self::xl_text::with_setting;
use crate::config;
use crate::file::Input;
use crate::peel::LeftOut;
use crate::text::Count;

/// The most devices, and the most settings, that are reported.
const MAX_DEVICES: usize = 64;
/// The longest text that is understood, in bytes. Toolstacks write some thousand.
const MAX_TEXT: usize = 1 << 20;
/// The longest value that is taken over: a name, a device.
const MAX_VALUE: usize = 256;

/// What another toolstack says about a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Origin {
    /// The toolstack: `libvirt`, `xend`, `xapi` or `xl`.
    pub(crate) toolstack: &'static str,
    /// The format: `xml`, `sxp` or `xl.cfg`.
    pub(crate) format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) uuid: Option<String>,
    #[serde(serialize_with = "kind_word", skip_serializing_if = "Option::is_none")]
    pub(crate) kind: Option<GuestKind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vcpus: Option<u32>,
    /// The most memory that the domain may have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) max_memory_kib: Option<u64>,
    /// Devices, which are not carried over; at most 64.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) devices: Vec<String>,
    /// Other settings that are not carried over; at most 64.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) settings: Vec<String>,
    /// Settings that libxl's configuration also has, by their place in it.
    #[serde(skip)]
    pub(crate) carried: Vec<(&'static str, Value)>,
    /// Values that could not be taken over, or are missing, and what the domain gets instead.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) problems: Vec<String>,
    /// The whole text.
    pub(crate) text: String,
    /// Why it could not be understood.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn kind_word<S: serde::Serializer>(kind: &Option<GuestKind>, to: S) -> Result<S::Ok, S::Error> {
    match kind {
        Some(kind) => to.serialize_str(config::kind_name(*kind)),
        None => to.serialize_none(),
    }
}

impl Origin {
    fn new(toolstack: &'static str, format: &'static str, text: &[u8]) -> Self {
        let text = text.strip_suffix(&[0]).unwrap_or(text);
        Self {
            toolstack,
            format,
            text: String::from_utf8_lossy(text).into_owned(),
            ..Self::default()
        }
    }

    /// libvirt's XML.
    pub(crate) fn of_libvirt(xml: &[u8]) -> Self {
        let mut origin = Self::new("libvirt", "xml", xml);
        let text = std::mem::take(&mut origin.text);
        origin.understood(not_too_long(&text).and_then(xml::read));
        origin.text = text;
        origin
    }

    /// xend's s-expression.
    pub(crate) fn of_xend(config: &[u8]) -> Self {
        let mut origin = Self::new("xend", "sxp", config);
        let text = std::mem::take(&mut origin.text);
        origin.understood(not_too_long(&text).and_then(sxp::read_xend));
        origin.text = text;
        origin
    }

    /// xenopsd's record. (An older one has only the time.)
    pub(crate) fn of_xapi(record: &[u8]) -> Self {
        let mut origin = Self::new("xapi", "sxp", record);
        let text = std::mem::take(&mut origin.text);
        origin.understood(not_too_long(&text).and_then(sxp::read_xapi));
        origin.text = text;
        origin
    }

    /// The text in xl's header, if it is not JSON; `None` if it is JSON or empty.
    pub(crate) fn of_xl(header: &XlHeader) -> Option<Self> {
        if header.mandatory_flags() & FLAG_JSON != 0 {
            return None;
        }
        let config = header.config()?;
        if let Err(error) = header.json() {
            return Some(Self {
                error: Some(error.to_string()),
                ..Self::new("xl", "xl.cfg", &[])
            });
        }
        let mut origin = Self::new("xl", "xl.cfg", config);
        let text = std::mem::take(&mut origin.text);
        origin.understood(xl_text::read(&text).map_err(|why| format!("is wrong in {why}")));
        origin.text = text;
        Some(origin)
    }

    /// A configuration in xl's own format, from a file.
    pub(crate) fn of_text(text: &str) -> Self {
        let mut origin = Self::new("xl", "xl.cfg", text.as_bytes());
        origin.understood(xl_text::read(text).map_err(|why| format!("is wrong in {why}")));
        origin
    }

    /// Take over what was found in the text.
    fn understood(&mut self, found: Result<Found, String>) {
        match found {
            Ok(found) => {
                self.problems = found.problems;
                self.name = found.name.filter(|name| !name.is_empty());
                self.uuid = found
                    .uuid
                    .filter(|uuid| match config::wrong_with_uuid(uuid) {
                        None => true,
                        Some(why) => {
                            let uuid = shortened(uuid);
                            self.problems
                                .push(format!("the UUID {uuid:?} is not taken over: {why}"));
                            false
                        }
                    });
                self.kind = found.kind;
                self.vcpus = found.vcpus.filter(|vcpus| *vcpus > 0);
                self.max_memory_kib = found.max_memory_kib.filter(|kib| *kib > 0);
                // xl itself makes up what is missing from a text of its own.
                if self.toolstack != "xl" {
                    if self.name.is_none() {
                        let instead = "no name: the domain gets that of the file";
                        self.problems.push(instead.to_owned());
                    }
                    if self.uuid.is_none() {
                        let instead = "no UUID: the domain gets one that is made from its name";
                        self.problems.push(instead.to_owned());
                    }
                }
                self.devices = found.devices;
                self.settings = found.settings;
                self.carried = found.carried;
            }
            Err(why) => self.error = Some(why),
        }
    }

    /// Messages about the devices and settings that are not carried over; none if there are none.
    pub(crate) fn not_carried_in_words(&self) -> Vec<String> {
        const NAMED: usize = 8;
        let lists = [(&self.devices, "device"), (&self.settings, "setting")];
        let lists = lists.into_iter().filter(|(list, _)| !list.is_empty());
        let words = lists.map(|(list, what)| {
            let mut words: Vec<&str> = list.iter().take(NAMED).map(String::as_str).collect();
            if list.len() > NAMED {
                words.push("…");
            }
            format!("{} ({})", Count(list.len(), what), words.join(", "))
        });
        words.collect()
    }

    /// Messages about values that could not be taken over.
    pub(crate) fn problems_in_words(&self) -> impl Iterator<Item = String> {
        let words = self.words();
        self.problems
            .iter()
            .map(move |what| format!("{words}: {what}"))
    }

    /// Its source, in words.
    pub(crate) fn words(&self) -> &'static str {
        match self.toolstack {
            "libvirt" => "libvirt's XML",
            "xend" => "xend's configuration",
            "xapi" => "xapi's record",
            _ => "the configuration in the xl header",
        }
    }
}

/// The text, unless reading it would cost too much.
fn not_too_long(text: &str) -> Result<&str, String> {
    match text.len() {
        ..=MAX_TEXT => Ok(text),
        bytes => Err(format!("has {bytes} bytes, expected at most {MAX_TEXT}")),
    }
}

/// Log what of an image is missing from the output: state that has no place there, and what another
/// toolstack said about the domain. `has_config`: whether the output has a configuration, and so
/// name and UUID.
pub(crate) fn warn_of_losses(input: &Input, has_config: bool) {
    for loss in losses(input, has_config) {
        tracing::warn!("{loss}");
    }
}

/// The same, as texts.
pub(crate) fn losses(input: &Input, has_config: bool) -> Vec<String> {
    let mut out = left_out(input, has_config);
    let Some(origin) = input.origin() else {
        return out;
    };
    let words = origin.words();
    if let Some(why) = &origin.error {
        out.push(format!("{words} could not be understood: it {why}"));
    }
    if has_config {
        out.extend(origin.problems_in_words());
    }
    if !has_config && (origin.name.is_some() || origin.uuid.is_some()) {
        out.push(format!(
            "not carried over: name and UUID of {words}, for which a bare stream has no place; \
             --to xl keeps them"
        ));
    }
    for what in origin.not_carried_in_words() {
        out.push(format!(
            "not carried over: {what} of {words}; xsr cat --layer config writes all of it"
        ));
    }
    out
}

/// State that has no place in an xl image, or in a bare stream, each piece in words.
pub(crate) fn left_out(input: &Input, has_config: bool) -> Vec<String> {
    let target = match has_config {
        true => "no image of xl",
        false => "no bare stream",
    };
    let words = |left: LeftOut| {
        let (record, what, at) = (&left.record, left.what, left.offset);
        let bytes = Count(left.bytes, "byte");
        format!(
            "{record} ({what}, {bytes} at byte {at:#x}) is left out: {target} has a place for it"
        )
    };
    input.left_out().into_iter().map(words).collect()
}

/// The contents of a text.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    name: Option<String>,
    uuid: Option<String>,
    kind: Option<GuestKind>,
    vcpus: Option<u32>,
    max_memory_kib: Option<u64>,
    devices: Vec<String>,
    settings: Vec<String>,
    carried: Vec<(&'static str, Value)>,
    problems: Vec<String>,
}

impl Found {
    /// A number; reports one that is given, but cannot be taken over.
    fn number<T: std::str::FromStr + PartialEq + Default>(
        &mut self,
        what: &str,
        text: Option<&str>,
    ) -> Option<T> {
        let text = text?.trim();
        let number = text.parse().ok().filter(|number| *number != T::default());
        if number.is_none() {
            self.not_taken(what, text);
        }
        number
    }

    /// Reports a value that cannot be taken over.
    fn not_taken(&mut self, what: &str, text: &str) {
        if self.problems.len() < MAX_DEVICES {
            let text = shortened(text);
            self.problems.push(format!(
                "{what} {text:?} is not taken over: no number for a domain"
            ));
        }
    }

    /// Report a setting that is not carried over.
    fn setting(&mut self, words: &[&str]) {
        if self.settings.len() < MAX_DEVICES {
            let words = words.iter().flat_map(|words| words.split_whitespace());
            let words: Vec<&str> = words.collect();
            self.settings.push(shortened(&words.join(" ")));
        }
    }

    /// A setting that libxl's configuration also has. The last one counts.
    fn carry(&mut self, at: &'static str, value: Value) {
        self.carried.retain(|(other, _)| *other != at);
        self.carried.push((at, value));
    }

    /// Report a device.
    fn device(&mut self, words: &[&str]) {
        if self.devices.len() < MAX_DEVICES {
            let words: Vec<&str> = words.iter().copied().filter(|w| !w.is_empty()).collect();
            self.devices.push(shortened(&words.join(" ")));
        }
    }
}

/// A value, shortened for output, and without control characters.
fn shortened(text: &str) -> String {
    let plain: String = text.chars().filter(|c| !c.is_control()).collect();
    match plain.char_indices().nth(MAX_VALUE) {
        Some((at, _)) => format!("{}…", &plain[..at]),
        None => plain,
    }
}
