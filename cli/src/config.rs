//! A domain's configuration as xl keeps it in an image: libxl's JSON. Only what a save or restore
//! needs is parsed; the text itself is kept byte for byte.
//!
//! C implementation: `libxl_domain_config` in `tools/libs/light/libxl_types.idl`.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

use anyhow::Error;
use serde_json::Value;
pub(crate) use xsr_format::config::max_pages;
use xsr_format::config::{ConfiguredKind, DomainConfig};
use xsr_format::guest_image::{MAX_HVM_VCPUS, MAX_PV_VCPUS};
use xsr_xen_backend::domain_store::Extent;
use xsr_xen_backend::{GuestKind, Uuid};

use crate::exit::{BadImage, BadUsage};
use crate::origin::Origin;

/// What a configuration says about the domain to build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Config {
    /// `c_info.name`
    pub(crate) name: String,
    /// `c_info.uuid`
    pub(crate) uuid: Option<String>,
    /// `c_info.type`
    pub(crate) kind: GuestKind,
    /// `b_info.max_vcpus`; 1 by default, as in libxl.
    pub(crate) vcpus: u32,
    /// `b_info.max_memkb`
    pub(crate) max_memory_kib: u64,
    /// `b_info.video_memkb`, which is added to the domain's memory.
    pub(crate) video_memory_kib: u64,
}

impl Config {
    /// Read a configuration.
    ///
    /// # Errors
    ///
    /// It is longer than [`xsr_format::wrapper::xl::MAX_CONFIG`], which limits the memory for
    /// parsing its JSON; it is not JSON; or something that a domain needs is missing.
    pub(crate) fn parse(json: &str) -> Result<Self, BadImage> {
        let config = DomainConfig::parse(json)
            .map_err(|e| BadImage(format!("the domain's configuration {e}")))?;
        Ok(Self {
            kind: match config.kind {
                ConfiguredKind::Pv => GuestKind::Pv,
                ConfiguredKind::Hvm => GuestKind::Hvm,
                ConfiguredKind::Pvh => GuestKind::Pvh,
            },
            name: config.name,
            uuid: config.uuid,
            vcpus: config.vcpus,
            max_memory_kib: config.max_memory_kib,
            video_memory_kib: config.video_memory_kib,
        })
    }

    /// The most pages that the domain may have.
    pub(crate) fn max_pages(&self) -> u64 {
        max_pages(self.max_memory_kib.saturating_add(self.video_memory_kib))
    }
}

/// The most vcpus that Xen lets a domain of a kind have.
pub(crate) fn most_vcpus(kind: GuestKind) -> u32 {
    match kind {
        GuestKind::Pv => MAX_PV_VCPUS,
        GuestKind::Hvm | GuestKind::Pvh => MAX_HVM_VCPUS,
    }
}

/// The configuration that xl would keep for a domain that it has created.
pub(crate) fn make(name: &str, uuid: &str, kind: GuestKind, vcpus: u32, memory_kib: u64) -> String {
    text(name, uuid, kind, vcpus, memory_kib, "False")
}

/// The same for a domain that another Xen created, which may let its guests read missing MSRs: as
/// `libxl_domain_create_restore` if the image does not say.
pub(crate) fn make_for_image(
    name: &str,
    uuid: &str,
    kind: GuestKind,
    vcpus: u32,
    memory_kib: u64,
) -> String {
    text(name, uuid, kind, vcpus, memory_kib, "True")
}

fn text(
    name: &str,
    uuid: &str,
    kind: GuestKind,
    vcpus: u32,
    memory_kib: u64,
    msr_relaxed: &str,
) -> String {
    let kind = kind_name(kind);
    let avail: Vec<u32> = (0..vcpus).collect();
    // `json!` sorts its keys, but libxl has a fixed order that users are used to.
    let (name, uuid) = (Value::from(name), Value::from(uuid));
    let avail = Value::from(avail);
    format!(
        r#"{{
    "c_info": {{
        "type": "{kind}",
        "name": {name},
        "uuid": {uuid},
        "run_hotplug_scripts": "True"
    }},
    "b_info": {{
        "max_vcpus": {vcpus},
        "avail_vcpus": {avail},
        "max_memkb": {memory_kib},
        "target_memkb": {memory_kib},
        "video_memkb": 0,
        "sched_params": {{
            "sched": "credit2",
            "weight": 256,
            "cap": 0
        }},
        "claim_mode": "True",
        "type.{kind}": {{

        }},
        "arch_arm": {{

        }},
        "arch_x86": {{
            "msr_relaxed": "{msr_relaxed}"
        }}
    }},
    "on_reboot": "restart",
    "on_crash": "preserve",
    "on_soft_reset": "soft_reset"
}}
"#
    )
}

/// The configuration with another name for the domain; unchanged if it has that name already.
pub(crate) fn renamed(json: &str, name: &str) -> Result<String, BadImage> {
    match Config::parse(json)?.name == name {
        true => Ok(json.to_owned()),
        false => with(json, &[("/c_info/name", name)]),
    }
}

/// The configuration with other values for some keys, which are added if they are missing.
pub(crate) fn with(json: &str, values: &[(&str, &str)]) -> Result<String, BadImage> {
    let values = values.iter().map(|(at, value)| (*at, Value::from(*value)));
    with_values(json, values)
}

/// The same, with values of any type.
pub(crate) fn with_values<'a>(
    json: &str,
    values: impl IntoIterator<Item = (&'a str, Value)>,
) -> Result<String, BadImage> {
    let mut document: Value = serde_json::from_str(json).map_err(invalid)?;
    for (at, value) in values {
        let (parent, key) = at.rsplit_once('/').unwrap_or(("", at));
        if let Some(Value::Object(parent)) = document.pointer_mut(parent) {
            parent.insert(key.to_owned(), value);
        }
    }
    serde_json::to_string_pretty(&document).map_err(invalid)
}

fn invalid(error: serde_json::Error) -> BadImage {
    BadImage(format!(
        "the domain's configuration is not valid JSON: {error}"
    ))
}

/// An amount of memory in `b_info`, if it is set.
fn kib(config: &Value, key: &str) -> Option<u64> {
    let value = config.get("b_info")?.get(key)?.as_u64()?;
    // `LIBXL_MEMKB_DEFAULT`
    (value != u64::MAX).then_some(value)
}

/// The memory and the vcpus of a configuration (C: `libxl__build_post`).
pub(crate) fn extent(config: &Value, vcpus: u32) -> Extent {
    let max_memory_kib = kib(config, "max_memkb").unwrap_or(0);
    let video_memory_kib = kib(config, "video_memkb").unwrap_or(0);
    let target = kib(config, "target_memkb").unwrap_or(max_memory_kib);
    let online = config
        .pointer("/b_info/avail_vcpus")
        .and_then(Value::as_array);
    let is_online = |vcpu: u32| match online {
        Some(list) => list.contains(&Value::from(vcpu)),
        None => true,
    };
    Extent {
        max_memory_kib,
        target_memory_kib: target.saturating_sub(video_memory_kib),
        video_memory_kib,
        vcpus_online: (0..vcpus).map(is_online).collect(),
    }
}

/// The configuration of a domain that is to use `now` of its memory and vcpus (C:
/// `libxl_retrieve_domain_configuration`).
pub(crate) fn with_extent(json: &str, now: &Extent) -> Result<String, BadImage> {
    let config: Value = serde_json::from_str(json).map_err(invalid)?;
    let vcpus = &now.vcpus_online;
    // The guest cannot have more than Xen has numbers for.
    if extent(&config, u32::try_from(vcpus.len()).unwrap_or(u32::MAX)) == *now {
        return Ok(json.to_owned());
    }
    let online = vcpus.iter().enumerate().filter(|(_, online)| **online);
    let online: Vec<usize> = online.map(|(vcpu, _)| vcpu).collect();
    let target = now.target_memory_kib.saturating_add(now.video_memory_kib);
    let values = [
        ("/b_info/max_memkb", now.max_memory_kib.into()),
        ("/b_info/target_memkb", target.into()),
        ("/b_info/video_memkb", now.video_memory_kib.into()),
        ("/b_info/avail_vcpus", online.into()),
    ];
    with_values(json, values)
}

/// A UUID derived from a name and a seed (RFC 9562's version 8, which is meant for such).
pub(crate) fn uuid(name: &str, seed: u64) -> String {
    // FNV-1a, 128 bits.
    let mut hash = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d_u128;
    for byte in seed.to_le_bytes().iter().chain(name.as_bytes()) {
        hash ^= u128::from(*byte);
        hash = hash.wrapping_mul(0x0100_0000_0000_0000_0000_013b);
    }
    let hash = hash & !(0xf << 76) | 0x8 << 76;
    dashed(hash)
}

/// A number as a UUID of RFC 9562's variant.
fn dashed(number: u128) -> String {
    let number = number & !(0x3 << 62) | 0x2 << 62;
    let digits = format!("{number:032x}");
    let parts = [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)];
    parts.map(|(from, to)| &digits[from..to]).join("-")
}

/// What is wrong with the UUID of a domain, or `None`. libxl accepts 8, 4, 4, 4 and 12 hexadecimal
/// digits. It also accepts the null UUID, and then overwrites `/vm/UUID` of the control domain in
/// xenstore.
///
/// C implementation: `uuid_parse` of libuuid, called by `libxl_uuid_from_string`;
/// `libxl__domain_make`.
pub(crate) fn wrong_with_uuid(text: &str) -> Option<&'static str> {
    match text.parse::<Uuid>() {
        Ok(uuid) if uuid.is_nil() => Some("it is the UUID of the control domain"),
        Ok(_) => None,
        Err(_) => Some("expected 8, 4, 4, 4 and 12 hexadecimal digits with - between them"),
    }
}

/// A new, unique UUID.
pub(crate) fn new_uuid() -> io::Result<String> {
    let mut bytes = [0; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let number = u128::from_le_bytes(bytes);
    // RFC 9562's version 4.
    Ok(dashed(number & !(0xf << 76) | 0x4 << 76))
}

/// What is wrong with the name of a domain, or `None`. Xen accepts any text. This refuses names
/// with which a domain cannot be created or found:
///
/// | name | why not |
/// |---|---|
/// | empty | the domain cannot be found by it |
/// | all digits | xl treats it as a domain's number (`libxl_domain_qualifier_to_domid`) |
/// | `Domain-0` | names are unique, and every host has this one (`libxl__domain_rename`) |
/// | with `/` | xl and libxl name log files after the domain (`libxl_create_logfile`) |
/// | with control characters | it is written to terminals and log files |
/// | long | `qemu-dm-NAME.log` must be a valid file name |
pub(crate) fn wrong_with_name(name: &str) -> Option<&'static str> {
    const MOST: usize = 240;
    if name.is_empty() {
        Some("it is empty")
    } else if name.bytes().all(|byte| byte.is_ascii_digit()) {
        Some("xl takes digits alone for a domain's number")
    } else if name == "Domain-0" {
        Some("it is the name of the control domain")
    } else if name.contains('/') {
        Some("xl names log files after the domain, so there can be no / in it")
    } else if name.chars().any(char::is_control) {
        Some("it has control characters")
    } else if name.len() > MOST {
        Some("it has more than 240 bytes")
    } else {
        None
    }
}

/// The error for a file that should hold libxl's configuration but does not. It blames the file,
/// not the image.
pub(crate) fn not_libxls(path: &Path, text: &str, why: &BadImage) -> Error {
    let is_xls = !text.trim_start().starts_with('{') && Origin::of_text(text).error.is_none();
    let instead = match is_xls {
        true => "it is in xl's own format, and libxl's JSON is wanted here",
        false => "libxl's JSON is wanted here",
    };
    let what = why.0.replace("the domain's configuration", "it");
    Error::new(BadUsage(format!(
        "{}: {what}; {instead}: xsr cat --layer config IMAGE writes that of an image",
        path.display()
    )))
}

/// libxl's name for a kind of guest.
pub(crate) fn kind_name(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Pv => "pv",
        GuestKind::Hvm => "hvm",
        GuestKind::Pvh => "pvh",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_can_be_read() {
        let json = make("a \"b\"", "0-1", GuestKind::Pvh, 3, 8192);
        let config = Config::parse(&json).expect("it is well-formed");
        assert_eq!(config.name, "a \"b\"");
        assert_eq!(config.kind, GuestKind::Pvh);
        assert_eq!((config.vcpus, config.max_memory_kib), (3, 8192));
        assert_eq!(config.max_pages(), 2048 + 256);
    }

    #[test]
    fn a_domain_can_be_renamed() {
        let json = make("web", "0-1", GuestKind::Pv, 1, 4096);
        assert_eq!(renamed(&json, "web"), Ok(json.clone()));
        let other = renamed(&json, "db").expect("it is well-formed");
        let config = Config::parse(&other).expect("it is well-formed");
        assert_eq!((config.name.as_str(), config.vcpus), ("db", 1));
    }

    #[test]
    fn a_domain_can_have_another_extent() {
        let json = make("web", "0-1", GuestKind::Pvh, 3, 8192);
        let value = |json: &str| serde_json::from_str::<Value>(json).expect("it is well-formed");
        let mut now = extent(&value(&json), 3);
        assert_eq!(with_extent(&json, &now), Ok(json.clone()));
        now.target_memory_kib = 4096;
        now.video_memory_kib = 1024;
        now.vcpus_online[1] = false;
        let other = with_extent(&json, &now).expect("it is well-formed");
        assert_eq!(extent(&value(&other), 3), now);
        assert_eq!(value(&other)["b_info"]["target_memkb"], 5120);
        assert_eq!(
            value(&other)["b_info"]["avail_vcpus"],
            serde_json::json!([0, 2])
        );
    }

    #[test]
    fn a_clone_has_its_own_uuid_and_keeps_the_rest() {
        let json = make("web", "0-1", GuestKind::Pv, 1, 4096);
        let uuid = new_uuid().expect("there is /dev/urandom");
        assert_eq!(wrong_with_uuid(&uuid), None, "{uuid}");
        assert_ne!(uuid, new_uuid().expect("there is /dev/urandom"));
        let values = [("/c_info/name", "db"), ("/c_info/uuid", uuid.as_str())];
        let clone = with(&json, &values).expect("it is well-formed");
        let config = Config::parse(&clone).expect("it is well-formed");
        assert_eq!((config.name.as_str(), config.uuid), ("db", Some(uuid)));
        assert_eq!(config.max_memory_kib, 4096);
    }

    #[test]
    fn names_that_xl_can_work_with_are_good() {
        for name in ["web", "my web", "a.b+c_d-1", "é", "42a", "-x"] {
            assert_eq!(wrong_with_name(name), None, "{name}");
        }
        let long = "x".repeat(241);
        for name in [
            "",
            "42",
            "Domain-0",
            "a/b",
            "esc\u{1b}[31m",
            "a\nb",
            "\u{9b}",
            &long,
        ] {
            assert!(wrong_with_name(name).is_some(), "{name:?}");
        }
    }

    #[test]
    fn uuids_are_those_that_libuuid_reads() {
        let good = wrong_with_uuid("6f18a89f-849d-4334-8633-5976CBCDE14C");
        assert_eq!(good, None);
        for bad in [
            "",
            "foo",
            "6f18a89f849d433486335976cbcde14c",
            "6f18a89f-849d-4334-8633-5976cbcde14g",
            "00000000-0000-0000-0000-000000000000",
        ] {
            assert!(wrong_with_uuid(bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn an_uuid_has_the_right_form_and_depends_on_its_seed() {
        let one = uuid("web", 1);
        assert_eq!(one.len(), 36);
        assert_eq!((&one[14..15], &one[8..9]), ("8", "-"));
        assert!("89ab".contains(&one[19..20]), "{one}");
        assert_eq!(one, uuid("web", 1));
        assert_ne!(one, uuid("web", 2));
        assert_ne!(one, uuid("db", 1));
    }

    #[test]
    fn each_thing_that_is_missing_is_named() {
        let cases = [
            ("{", "not valid JSON"),
            (r#"{"c_info":{"name":"x"}}"#, "c_info.type"),
            (r#"{"c_info":{"type":"arm"}}"#, "\"arm\""),
            (
                r#"{"c_info":{"type":"pv"},"b_info":{"max_memkb":1}}"#,
                "c_info.name",
            ),
            (r#"{"c_info":{"type":"pv","name":"x"}}"#, "b_info.max_memkb"),
            (
                r#"{"c_info":{"type":"pv","name":"x"},"b_info":{"max_vcpus":0,"max_memkb":1}}"#,
                "max_vcpus 0",
            ),
        ];
        for (json, word) in cases {
            let error = Config::parse(json).expect_err(json).to_string();
            assert!(error.contains(word), "{json}: {error}");
        }
    }
}
