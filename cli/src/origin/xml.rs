//! A reader of libvirt's XML: tags, attributes and text, without the document's own entities and
//! without recursion. `ova_xml.rs` shares its tokens.
//!
//! Documentation: <https://libvirt.org/formatdomain.html>. C implementation: `virDomainDefFormat`
//! in libvirt's `src/conf/domain_conf.c`.

use xsr_xen_backend::GuestKind;

use super::{Found, settings};

/// How deep elements may be nested.
const MAX_DEPTH: usize = 64;

/// A piece of a document.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'x> {
    Start {
        name: &'x str,
        attributes: &'x str,
        empty: bool,
    },
    End,
    Text(&'x str),
}

/// Reads a document piece by piece. Comments, declarations and processing instructions are skipped.
pub(super) struct Pieces<'x>(&'x str);

impl<'x> Pieces<'x> {
    pub(super) fn new(text: &'x str) -> Self {
        Self(text)
    }

    pub(super) fn next(&mut self) -> Result<Option<Piece<'x>>, String> {
        loop {
            let text = self.0;
            if text.is_empty() {
                return Ok(None);
            }
            let Some(tag) = text.strip_prefix('<') else {
                let end = text.find('<').unwrap_or(text.len());
                self.0 = &text[end..];
                return Ok(Some(Piece::Text(&text[..end])));
            };
            if let Some(rest) = tag.strip_prefix("!--") {
                self.0 = behind(rest, "-->")?.1;
            } else if let Some(rest) = tag.strip_prefix("![CDATA[") {
                let (inside, rest) = behind(rest, "]]>")?;
                self.0 = rest;
                return Ok(Some(Piece::Text(inside)));
            } else if let Some(rest) = tag.strip_prefix('?') {
                self.0 = behind(rest, "?>")?.1;
            } else if let Some(declaration) = tag.strip_prefix("!DOCTYPE") {
                // A doctype that only names a definition changes nothing; entities would.
                let end = end_of_tag(declaration).ok_or("ends inside a document type")?;
                if declaration[..end].contains('[') {
                    return Err("has a document type with declarations of its own".to_owned());
                }
                self.0 = &declaration[end + 1..];
            } else if tag.starts_with('!') {
                return Err("has a declaration outside a document type".to_owned());
            } else if let Some(rest) = tag.strip_prefix('/') {
                self.0 = behind(rest, ">")?.1;
                return Ok(Some(Piece::End));
            } else {
                let end = end_of_tag(tag).ok_or("ends inside a tag")?;
                self.0 = &tag[end + 1..];
                let inside = &tag[..end];
                let (inside, empty) = match inside.strip_suffix('/') {
                    Some(inside) => (inside, true),
                    None => (inside, false),
                };
                let (name, attributes) = inside
                    .split_once(|c: char| c.is_ascii_whitespace())
                    .unwrap_or((inside, ""));
                return Ok(Some(Piece::Start {
                    name,
                    attributes,
                    empty,
                }));
            }
        }
    }
}

fn behind<'x>(text: &'x str, end: &str) -> Result<(&'x str, &'x str), String> {
    text.split_once(end)
        .ok_or_else(|| format!("ends before a {end:?}"))
}

/// The end of a tag: a `>` that is not inside an attribute's value.
fn end_of_tag(tag: &str) -> Option<usize> {
    let mut quote = None;
    for (at, c) in tag.char_indices() {
        match (quote, c) {
            (None, '>') => return Some(at),
            (None, '"' | '\'') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            _ => {}
        }
    }
    None
}

/// The value of an attribute.
fn attribute(attributes: &str, wanted: &str) -> Option<String> {
    let mut rest = attributes.trim_start();
    while let Some((name, behind)) = rest.split_once('=') {
        let behind = behind.trim_start();
        let quote = behind.chars().next().filter(|c| matches!(c, '"' | '\''))?;
        let (value, behind) = behind[1..].split_once(quote)?;
        if name.trim() == wanted {
            return Some(plain(value));
        }
        rest = behind.trim_start();
    }
    None
}

/// The longest entity, in bytes: a number with leading zeros. Without a limit, a text of many `&`
/// would be searched to its end for each of them.
const LONGEST_ENTITY: usize = 16;

/// A text with its entities replaced.
pub(super) fn plain(text: &str) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, behind)) = rest.split_once('&') {
        out.push_str(before);
        let end = behind
            .bytes()
            .take(LONGEST_ENTITY + 1)
            .position(|b| b == b';');
        let Some((entity, behind)) = end.map(|end| (&behind[..end], &behind[end + 1..])) else {
            out.push('&');
            rest = behind;
            continue;
        };
        let number = match entity.strip_prefix('#') {
            Some(digits) => match digits.strip_prefix('x') {
                Some(digits) => u32::from_str_radix(digits, 16).ok(),
                None => digits.parse().ok(),
            },
            None => None,
        };
        match (entity, number.and_then(char::from_u32)) {
            ("lt", _) => out.push('<'),
            ("gt", _) => out.push('>'),
            ("amp", _) => out.push('&'),
            ("quot", _) => out.push('"'),
            ("apos", _) => out.push('\''),
            (_, Some(c)) => out.push(c),
            (entity, None) => out.push_str(&format!("&{entity};")),
        }
        rest = behind;
    }
    out.push_str(rest);
    out
}

/// A device while it is being read.
#[derive(Default)]
struct Device {
    kind: String,
    of: String,
    source: String,
    target: String,
}

/// The domain that an XML document describes.
pub(super) fn read(text: &str) -> Result<Found, String> {
    let mut pieces = Pieces::new(text);
    let mut found = Found::default();
    let mut path: Vec<&str> = Vec::new();
    let mut unit = String::new();
    let mut words = String::new();
    let mut device = None;
    let mut any = false;
    while let Some(piece) = pieces.next()? {
        match piece {
            Piece::Start {
                name,
                attributes,
                empty,
            } => {
                if path.len() >= MAX_DEPTH {
                    return Err(format!("is nested more than {MAX_DEPTH} deep"));
                }
                any |= path.is_empty() && name == "domain";
                words.clear();
                path.push(name);
                match path[..] {
                    ["domain", "clock"] => clock(attributes, &mut found),
                    ["domain", part] if !is_understood(part) => {
                        found.setting(&[part, attributes]);
                    }
                    ["domain", "clock", part] => found.setting(&["clock", part, attributes]),
                    ["domain", "os", part] if part != "type" => {
                        found.setting(&["os", part, attributes]);
                    }
                    ["domain", "memory" | "currentMemory"] => {
                        unit = attribute(attributes, "unit").unwrap_or_default();
                    }
                    ["domain", "devices", kind] => {
                        device = Some(Device {
                            kind: kind.to_owned(),
                            of: attribute(attributes, "type").unwrap_or_default(),
                            ..Device::default()
                        });
                    }
                    ["domain", "devices", _, part] => {
                        if let Some(device) = &mut device {
                            part_of(device, part, attributes);
                        }
                    }
                    _ => {}
                }
                if empty {
                    closed(&path, "", &unit, &mut found, &mut device);
                    path.pop();
                }
            }
            Piece::Text(text) => words.push_str(text),
            Piece::End => {
                closed(&path, &words, &unit, &mut found, &mut device);
                words.clear();
                if path.pop().is_none() {
                    return Err("ends an element that was not begun".to_owned());
                }
            }
        }
    }
    match (any, path.last()) {
        (true, None) => Ok(found),
        (true, Some(open)) => Err(format!("ends inside <{open}>")),
        (false, _) => Err("has no <domain>".to_owned()),
    }
}

/// Whether an element of `<domain>` is taken over, or reported at its end.
fn is_understood(element: &str) -> bool {
    matches!(
        element,
        "name"
            | "uuid"
            | "vcpu"
            | "memory"
            | "currentMemory"
            | "os"
            | "devices"
            | "on_poweroff"
            | "on_reboot"
            | "on_crash"
    )
}

/// The guest's clock for libxl's configuration. C: `libxlMakeDomBuildInfo` in libvirt's
/// `src/libxl/libxl_conf.c`.
fn clock(attributes: &str, found: &mut Found) {
    let value = |name| attribute(attributes, name);
    let local = |word: Option<String>| word.as_deref() == Some("localtime");
    let shift = value("adjustment").and_then(|text| text.parse::<i32>().ok());
    match (value("offset").as_deref(), shift) {
        (None | Some("utc"), _) => {}
        (Some("localtime"), _) => found.carry("/b_info/localtime", "True".into()),
        (Some("variable"), Some(shift)) => {
            found.carry("/b_info/rtc_timeoffset", shift.into());
            if local(value("basis")) {
                found.carry("/b_info/localtime", "True".into());
            }
        }
        _ => found.setting(&["clock", attributes]),
    }
}

/// What identifies a device.
fn part_of(device: &mut Device, part: &str, attributes: &str) {
    let first = |names: &[&str]| {
        let mut values = names.iter().filter_map(|name| attribute(attributes, name));
        values.next().unwrap_or_default()
    };
    match part {
        "source" => device.source = first(&["file", "dev", "bridge", "network", "name", "path"]),
        "target" => device.target = first(&["dev", "type"]),
        "mac" => device.target = first(&["address"]),
        _ => {}
    }
}

/// Called at the end of an element.
fn closed(path: &[&str], words: &str, unit: &str, found: &mut Found, device: &mut Option<Device>) {
    let words = plain(words.trim());
    match path {
        ["domain", "name"] => found.name = Some(words),
        ["domain", "uuid"] => found.uuid = Some(words),
        ["domain", "vcpu"] => found.vcpus = found.number("vcpu", Some(&words)),
        ["domain", "memory"] => {
            found.max_memory_kib = memory(&words, unit).filter(|kib| *kib > 0);
            if found.max_memory_kib.is_none() {
                found.not_taken("memory", &format!("{words} {unit}"));
            }
        }
        ["domain", "currentMemory"] if memory(&words, unit) != found.max_memory_kib => {
            found.setting(&["currentMemory", &words, unit]);
        }
        ["domain", event @ ("on_poweroff" | "on_reboot" | "on_crash")] => {
            match (*event, settings::action(&words)) {
                ("on_poweroff", Some(action)) => found.carry("/on_poweroff", action.into()),
                ("on_reboot", Some(action)) => found.carry("/on_reboot", action.into()),
                (_, Some(action)) => found.carry("/on_crash", action.into()),
                (event, None) => found.setting(&[event, &words]),
            }
        }
        ["domain", "os", "type"] => {
            found.kind = match words.as_str() {
                "xen" | "linux" => Some(GuestKind::Pv),
                "xenpvh" => Some(GuestKind::Pvh),
                "hvm" => Some(GuestKind::Hvm),
                _ => None,
            };
        }
        ["domain", "devices", _] => {
            if let Some(device) = device.take()
                && device.kind != "emulator"
            {
                found.device(&[&device.kind, &device.of, &device.target, &device.source]);
            }
        }
        _ => {}
    }
}

/// An amount of memory in KiB, which is also libvirt's default unit.
fn memory(words: &str, unit: &str) -> Option<u64> {
    let number: u64 = words.parse().ok()?;
    let bytes = match unit {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "TB" => 1_000_000_000_000,
        "T" | "TiB" => 1 << 40,
        "PB" => 1_000_000_000_000_000,
        "P" | "PiB" => 1 << 50,
        "EB" => 1_000_000_000_000_000_000,
        "E" | "EiB" => 1 << 60,
        _ => 1 << 10,
    };
    Some(number.checked_mul(bytes)?.div_ceil(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<!-- kept by libvirt -->\n<domain type='xen' id='3'>
  <name>a &amp; b</name> <uuid>6f18a89f-849d-4334-8633-5976cbcde14c</uuid>
  <memory unit='MiB'>8</memory><currentMemory unit='KiB'>4096</currentMemory>
  <vcpu placement='static' current='1'>2</vcpu>
  <os><type arch='x86_64' machine='xenfv'>hvm</type><loader>x</loader></os>
  <metadata><a:x xmlns:a='u'><name>no</name></a:x></metadata>
  <devices>
    <emulator>/usr/bin/qemu</emulator>
    <disk type='file' device='disk'><source file='/a>b.img'/><target dev='xvda' bus='xen'/></disk>
    <interface type='bridge'><mac address='00:16:3e:00:00:01'/><source bridge=\"br0\"/></interface>
    <video/>
  </devices>
</domain>
";

    #[test]
    fn libvirts_xml_says_what_the_domain_is() {
        let found = read(XML).expect("it is well-formed");
        assert_eq!(found.name.as_deref(), Some("a & b"));
        let uuid = "6f18a89f-849d-4334-8633-5976cbcde14c";
        assert_eq!(found.uuid.as_deref(), Some(uuid));
        assert_eq!(found.kind, Some(GuestKind::Hvm));
        assert_eq!((found.vcpus, found.max_memory_kib), (Some(2), Some(8192)));
        let devices = [
            "disk file xvda /a>b.img",
            "interface bridge 00:16:3e:00:00:01 br0",
            "video",
        ];
        assert_eq!(found.devices, devices);
        let settings = ["currentMemory 4096 KiB", "os loader", "metadata"];
        assert_eq!(found.settings, settings);
    }

    #[test]
    fn settings_are_carried_over_or_named() {
        let text = "<!DOCTYPE domain SYSTEM 'a>b'><domain><name>a</name>
            <description>x</description><cpu mode='host-model'><topology sockets='1'/></cpu>
            <clock offset='variable' adjustment='-3600' basis='localtime'><timer name='tsc'/></clock>
            <on_poweroff>preserve</on_poweroff><on_reboot>rename-restart</on_reboot>
            <on_crash>pause</on_crash></domain>";
        let found = read(text).expect("it is well-formed");
        let carried: Vec<(&str, String)> = (found.carried.iter())
            .map(|(at, value)| (*at, value.to_string()))
            .collect();
        let expected = [
            ("/b_info/rtc_timeoffset", "-3600"),
            ("/b_info/localtime", "\"True\""),
            ("/on_poweroff", "\"preserve\""),
            ("/on_reboot", "\"restart_rename\""),
        ];
        assert_eq!(carried, expected.map(|(at, value)| (at, value.to_owned())));
        let settings = [
            "description",
            "cpu mode='host-model'",
            "clock timer name='tsc'",
            "on_crash pause",
        ];
        assert_eq!(found.settings, settings);
        let declares = "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain/>";
        assert!(read(declares).is_err());
    }

    #[test]
    fn a_document_that_is_cut_off_is_no_panic() {
        for (end, _) in XML.char_indices() {
            let cut = XML[..end].trim_end();
            let whole = cut == XML.trim_end();
            assert_eq!(read(cut).is_ok(), whole, "{end}");
        }
    }

    #[test]
    fn what_is_no_domain_is_refused() {
        let deep = "<domain>".repeat(1000);
        for text in [
            "",
            "x",
            "<volume/>",
            "<!DOCTYPE x>",
            "<domain></domain></x>",
            &deep,
        ] {
            assert!(read(text).is_err(), "{text:.20}");
        }
    }
}
