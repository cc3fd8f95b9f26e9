//! What a domain's configuration has its host run, open or give away. An image from elsewhere may name any
//! program there: docs/security.md.
//!
//! C implementation: `libxl_domain_config_from_json`; what libxl does with these fields is in
//! `tools/libs/light/libxl_dm.c`, `libxl_bootloader.c` and `libxl_linux.c`.

use std::fmt;

use serde::Serialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::text::Count;

/// The most that is listed. What runs programs displaces the rest.
const MOST: usize = 256;

/// How much of a key is shown. libxl's are shorter.
const LONGEST_KEY: usize = 32;

/// How much of the host a use puts at risk; the first is listed if there is no room for all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Risk {
    /// Runs a program of which libxl starts one for a domain.
    Program,
    /// Runs a program for each device.
    Script,
    /// Passes options to a program.
    Options,
    /// Anything else.
    Other,
}

impl Risk {
    const ALL: [Self; 4] = [Self::Program, Self::Script, Self::Options, Self::Other];
}

/// The values of a key that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counts {
    /// Each string that is not empty.
    Text,
    /// Each string with a comma: the device model takes what follows for another option.
    Commas,
    /// The list, by its length.
    List,
}

/// What the host does with the values of a key.
#[derive(Clone, Copy, Debug)]
struct Key {
    /// The key at the top of the configuration that it is below; empty for any.
    section: &'static str,
    name: &'static str,
    what: &'static str,
    risk: Risk,
    counts: Counts,
}

const fn key(name: &'static str, what: &'static str, risk: Risk) -> Key {
    Key {
        section: "",
        name,
        what,
        risk,
        counts: Counts::Text,
    }
}

const fn below(section: &'static str, name: &'static str, what: &'static str) -> Key {
    let key = key(name, what, Risk::Other);
    Key { section, ..key }
}

const fn options(name: &'static str) -> Key {
    key(name, "passes to the device model", Risk::Options)
}

const fn commas(name: &'static str) -> Key {
    let counts = Counts::Commas;
    Key {
        counts,
        ..options(name)
    }
}

const fn reads(name: &'static str) -> Key {
    key(name, "reads", Risk::Other)
}

const fn opens(name: &'static str) -> Key {
    key(name, "opens", Risk::Other)
}

const fn gives(name: &'static str) -> Key {
    let key = key(name, "gives the guest", Risk::Other);
    Key {
        counts: Counts::List,
        ..key
    }
}

/// The keys of libxl's JSON.
const KEYS: [Key; 46] = [
    key("device_model", "runs", Risk::Program),
    key("bootloader", "runs", Risk::Program),
    key("script", "runs", Risk::Script),
    key("bootloader_args", "passes to the bootloader", Risk::Options),
    options("extra"),
    options("extra_pv"),
    options("extra_hvm"),
    options("serial"),
    options("serial_list"),
    options("usbdevice"),
    options("usbdevice_list"),
    commas("boot"),
    commas("ifname"),
    commas("image_compression"),
    commas("model"),
    commas("soundhw"),
    commas("streaming_video"),
    commas("vdev"),
    key("device_model_user", "runs the device model as", Risk::Other),
    reads("kernel"),
    reads("ramdisk"),
    reads("stubdomain_kernel"),
    reads("stubdomain_ramdisk"),
    reads("firmware"),
    reads("system_firmware"),
    reads("smbios_firmware"),
    reads("acpi_firmware"),
    reads("bios_firmware"),
    reads("device_tree"),
    reads("pvshim_path"),
    reads("keymap"),
    reads("xauthority"),
    opens("pdev_path"),
    opens("active_disk"),
    opens("hidden_disk"),
    below("p9s", "path", "shares with the guest"),
    below("dtdevs", "path", "gives the guest"),
    below("channels", "path", "listens on"),
    key("listen", "listens on", Risk::Other),
    below("b_info", "host", "listens on"),
    below("disks", "colo_host", "connects to"),
    gives("pcidevs"),
    gives("usbdevs"),
    gives("iomem"),
    gives("ioports"),
    gives("irqs"),
];

/// The beginning of the keys of a network device under COLO. libxl makes options of the device model
/// from all of them, whether COLO is used or not.
const COLO: &str = "colo_";
const NIC: Key = commas("colo_*");

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

/// What the host does because of a configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct HostUses {
    /// In the configuration's order. A key that is there twice counts twice, because readers differ
    /// in which one they take.
    pub(super) listed: Vec<HostUse>,
    /// How many more there are.
    pub(super) left_out: u64,
}

/// What the host does because of a configuration. Nothing for a text that is not JSON.
pub(super) fn uses(json: &str) -> HostUses {
    let mut found = Found::default();
    let seed = Place {
        path: String::new(),
        key: None,
        found: &mut found,
    };
    let mut reader = serde_json::Deserializer::from_str(json);
    if let Err(error) = seed.deserialize(&mut reader) {
        tracing::debug!(%error, "the rest of the configuration cannot be read");
    }
    found.listed()
}

/// What was found so far: for each risk, at most [`MOST`], with their numbers in the configuration.
#[derive(Debug, Default)]
struct Found {
    by_risk: [Vec<(u64, HostUse)>; Risk::ALL.len()],
    count: u64,
}

impl Found {
    fn push(&mut self, key: &Key, field: String, value: impl FnOnce() -> String) {
        let number = self.count;
        self.count += 1;
        let place = &mut self.by_risk[key.risk as usize];
        if place.len() < MOST {
            let (what, value) = (key.what, value());
            place.push((number, HostUse { field, what, value }));
        }
    }

    /// The worst risks first, as long as there is room; then in the configuration's order.
    fn listed(self) -> HostUses {
        let mut listed: Vec<_> = self.by_risk.into_iter().flatten().take(MOST).collect();
        listed.sort_by_key(|(number, _)| *number);
        HostUses {
            left_out: self.count - listed.len() as u64,
            listed: listed.into_iter().map(|(_, one)| one).collect(),
        }
    }
}

/// A value in the configuration.
struct Place<'f> {
    path: String,
    key: Option<&'static Key>,
    found: &'f mut Found,
}

impl Place<'_> {
    /// Whether it is below this key at the top.
    fn is_below(&self, section: &str) -> bool {
        let top = self.path.split(['.', '[']).next();
        section.is_empty() || top == Some(section)
    }
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
        while let Some(name) = map.next_key::<String>()? {
            // libxl compares C strings.
            let name = name.split('\0').next().unwrap_or_default();
            let mut known = KEYS.iter().filter(|key| key.name == name);
            let key = known.find(|key| self.is_below(key.section));
            let key =
                key.or_else(|| (self.is_below("nics") && name.starts_with(COLO)).then_some(&NIC));
            let dot = if self.path.is_empty() { "" } else { "." };
            let name: String = name.chars().take(LONGEST_KEY).collect();
            map.next_value_seed(Place {
                path: format!("{}{dot}{name}", self.path),
                key,
                found: &mut *self.found,
            })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut index = 0_u64;
        let whole = self.key.filter(|key| key.counts == Counts::List);
        while list
            .next_element_seed(Place {
                path: format!("{}[{index}]", self.path),
                key: self.key.filter(|_| whole.is_none()),
                found: &mut *self.found,
            })?
            .is_some()
        {
            index += 1;
        }
        if let Some(key) = whole
            && index > 0
        {
            self.found
                .push(key, self.path, || Count(index, "entry").to_string());
        }
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        let Some(key) = self.key else { return Ok(()) };
        let counts = match key.counts {
            Counts::Text => !text.is_empty(),
            Counts::Commas => text.contains(','),
            Counts::List => false,
        };
        if counts {
            self.found.push(key, self.path, || text.to_owned());
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
        let uses = uses(json).listed.into_iter();
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
            "nics": [ { "script": "/etc/vif", "script": "/tmp/vif" } ],
            "b_info\u0000x": { "device_model\u0000y": "/tmp/hidden" }
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
            ("disks[1].pdev_path", "opens", "/d"),
            ("disks[1].script", "runs", "block-b"),
            ("nics[0].script", "runs", "/etc/vif"),
            ("nics[0].script", "runs", "/tmp/vif"),
            ("b_info.device_model", "runs", "/tmp/hidden"),
        ];
        let expected = expected.map(|(field, what, value)| (field.into(), what, value.into()));
        assert_eq!(found(json), expected);
    }

    #[test]
    fn what_the_host_opens_or_gives_away_is_found() {
        let json = r#"{
            "b_info": {
                "device_tree": "/boot/dt", "iomem": [ { "start": 1, "number": 2 } ], "irqs": [],
                "type.hvm": {
                    "serial": "file:/etc/x", "serial_list": [ "pty", "pipe:/p" ], "boot": "cd",
                    "usbdevice": "host:1:2", "usbdevice_list": [ "disk:/dev/sda" ],
                    "soundhw": "ac97,x=y", "vnc": { "listen": "0.0.0.0" },
                    "spice": { "host": "10.0.0.1" }, "sdl": { "xauthority": "/root/.X" }
                }
            },
            "nics": [ { "model": "e1000", "ifname": "a,b" } ],
            "pcidevs": [ { "dev": 3 }, { "dev": 4, "path": "/no" } ],
            "dtdevs": [ { "path": "/soc/eth" } ],
            "p9s": [ { "tag": "t", "path": "/srv" } ],
            "channels": [ { "connection.socket": { "path": "/run/s" } } ]
        }"#;
        let device_model = "passes to the device model";
        let expected = [
            ("b_info.device_tree", "reads", "/boot/dt"),
            ("b_info.iomem", "gives the guest", "1 entry"),
            ("b_info.type.hvm.serial", device_model, "file:/etc/x"),
            ("b_info.type.hvm.serial_list[0]", device_model, "pty"),
            ("b_info.type.hvm.serial_list[1]", device_model, "pipe:/p"),
            ("b_info.type.hvm.usbdevice", device_model, "host:1:2"),
            (
                "b_info.type.hvm.usbdevice_list[0]",
                device_model,
                "disk:/dev/sda",
            ),
            ("b_info.type.hvm.soundhw", device_model, "ac97,x=y"),
            ("b_info.type.hvm.vnc.listen", "listens on", "0.0.0.0"),
            ("b_info.type.hvm.spice.host", "listens on", "10.0.0.1"),
            ("b_info.type.hvm.sdl.xauthority", "reads", "/root/.X"),
            ("nics[0].ifname", device_model, "a,b"),
            ("pcidevs", "gives the guest", "2 entries"),
            ("dtdevs[0].path", "gives the guest", "/soc/eth"),
            ("p9s[0].path", "shares with the guest", "/srv"),
            ("channels[0].connection.socket.path", "listens on", "/run/s"),
        ];
        let expected = expected.map(|(field, what, value)| (field.into(), what, value.into()));
        assert_eq!(found(json), expected);
    }

    #[test]
    fn no_program_is_hidden_behind_many_others() {
        let kernels = r#""kernel": "/k","#.repeat(1000);
        let scripts = r#"{"script": "/s"},"#.repeat(100);
        let json = format!(
            r#"{{ {kernels} "extra": [ "-x" ], "disks": [ {scripts} 1 ], "device_model": "/evil" }}"#
        );
        let HostUses { listed, left_out } = uses(&json);
        assert_eq!(listed.len(), MOST);
        assert_eq!(left_out, 1000 + 1 + 100 + 1 - MOST as u64);
        let with = |what| listed.iter().filter(|one| one.what == what).count();
        assert_eq!(with("runs"), 101);
        assert_eq!(with("passes to the device model"), 1);
        assert_eq!(listed.last().map(|one| &*one.value), Some("/evil"));

        // Scripts may fill the list, but not displace the device model.
        let scripts = r#"{"script": "/s"},"#.repeat(1000);
        let json = format!(r#"{{ "disks": [ {scripts} 1 ], "device_model": "/evil" }}"#);
        let HostUses { listed, left_out } = uses(&json);
        assert_eq!((listed.len(), left_out), (MOST, 1001 - MOST as u64));
        assert_eq!(listed.last().map(|one| &*one.value), Some("/evil"));
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
