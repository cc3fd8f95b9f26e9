//! What a domain's configuration has its host run or open. An image from elsewhere may name any
//! program there: docs/security.md.
//!
//! C implementation: `libxl_domain_config_from_json`; what libxl does with these fields is in
//! `tools/libs/light/libxl_dm.c`, `libxl_bootloader.c` and `libxl_linux.c`.

use std::fmt;

use serde::Serialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// The most that is listed.
const MOST: usize = 256;

/// How much of a key is shown. libxl's are shorter.
const LONGEST_KEY: usize = 32;

/// The keys of libxl's JSON, wherever they are in it, and what the host does with their values.
const KEYS: [(&str, &str); 17] = [
    ("device_model", "runs"),
    ("bootloader", "runs"),
    ("script", "runs"),
    ("bootloader_args", "passes to the bootloader"),
    ("extra", "passes to the device model"),
    ("extra_pv", "passes to the device model"),
    ("extra_hvm", "passes to the device model"),
    ("device_model_user", "runs the device model as"),
    ("kernel", "reads"),
    ("ramdisk", "reads"),
    ("stubdomain_kernel", "reads"),
    ("stubdomain_ramdisk", "reads"),
    ("firmware", "reads"),
    ("system_firmware", "reads"),
    ("smbios_firmware", "reads"),
    ("acpi_firmware", "reads"),
    ("bios_firmware", "reads"),
];

/// Something that the host does because a configuration says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct HostUse {
    /// Where in the configuration, as `b_info.device_model` or `disks[0].script`.
    pub(crate) field: String,
    /// What the host does with the value.
    #[serde(rename = "use")]
    pub(crate) what: &'static str,
    pub(crate) value: String,
}

/// What the host does because of a configuration, in its order. A key that is there twice counts
/// twice, because readers differ in which one they take. Empty for a text that is not JSON.
pub(super) fn uses(json: &str) -> Vec<HostUse> {
    let mut found = Vec::new();
    let seed = Place {
        path: String::new(),
        what: None,
        found: &mut found,
    };
    let mut reader = serde_json::Deserializer::from_str(json);
    if let Err(error) = seed.deserialize(&mut reader) {
        tracing::debug!(%error, "the rest of the configuration cannot be read");
    }
    found
}

/// A value in the configuration.
struct Place<'f> {
    path: String,
    what: Option<&'static str>,
    found: &'f mut Vec<HostUse>,
}

impl<'de> DeserializeSeed<'de> for Place<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Place<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a configuration")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            let known = KEYS.iter().find(|(name, _)| *name == key);
            let dot = if self.path.is_empty() { "" } else { "." };
            let key: String = key.chars().take(LONGEST_KEY).collect();
            map.next_value_seed(Place {
                path: format!("{}{dot}{key}", self.path),
                what: known.map(|(_, what)| *what),
                found: &mut *self.found,
            })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut index = 0;
        while list
            .next_element_seed(Place {
                path: format!("{}[{index}]", self.path),
                what: self.what,
                found: &mut *self.found,
            })?
            .is_some()
        {
            index += 1;
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        if let Some(what) = self.what
            && !text.is_empty()
            && self.found.len() < MOST
        {
            self.found.push(HostUse {
                field: self.path,
                what,
                value: text.to_owned(),
            });
        }
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(json: &str) -> Vec<(String, &'static str, String)> {
        let uses = uses(json).into_iter();
        uses.map(|one| (one.field, one.what, one.value)).collect()
    }

    #[test]
    fn every_program_that_a_configuration_names_is_found() {
        let json = r#"{
            "c_info": { "name": "web", "run_hotplug_scripts": "True", "domid": 3 },
            "b_info": {
                "device_model": "/tmp/qemu", "bootloader": "", "kernel": "/boot/k",
                "extra": [ "-netdev", "tap,script=/tmp/x" ], "max_vcpus": 1.5,
                "type.pv": { "bootloader": "pygrub", "bootloader_args": [ "-q" ] },
                "u": null
            },
            "disks": [ { "script": "block-a" }, { "pdev_path": "/d", "script": "block-b" } ],
            "nics": [ { "script": "/etc/vif", "script": "/tmp/vif" } ]
        }"#;
        let expected = [
            ("b_info.device_model", "runs", "/tmp/qemu"),
            ("b_info.kernel", "reads", "/boot/k"),
            ("b_info.extra[0]", "passes to the device model", "-netdev"),
            (
                "b_info.extra[1]",
                "passes to the device model",
                "tap,script=/tmp/x",
            ),
            ("b_info.type.pv.bootloader", "runs", "pygrub"),
            (
                "b_info.type.pv.bootloader_args[0]",
                "passes to the bootloader",
                "-q",
            ),
            ("disks[0].script", "runs", "block-a"),
            ("disks[1].script", "runs", "block-b"),
            ("nics[0].script", "runs", "/etc/vif"),
            ("nics[0].script", "runs", "/tmp/vif"),
        ];
        let expected = expected.map(|(field, what, value)| (field.into(), what, value.into()));
        assert_eq!(found(json), expected);
    }

    #[test]
    fn a_hostile_configuration_is_read_within_bounds() {
        let many = format!("[{}1]", r#"{"script": "x"},"#.repeat(5000));
        assert_eq!(found(&many).len(), MOST);
        let long = format!(r#"{{"{}": {{"script": "x"}}}}"#, "k".repeat(1 << 19));
        assert_eq!(
            found(&long)[0].0,
            format!("{}.script", "k".repeat(LONGEST_KEY))
        );
        let deep = format!("{}\"x\"{}", "[".repeat(5000), "]".repeat(5000));
        assert_eq!(found(&deep), []);
        assert_eq!(found("no JSON"), []);
        // What was found before the damage is still said.
        assert_eq!(found(r#"{"kernel": "/k", "#).len(), 1);
    }
}
