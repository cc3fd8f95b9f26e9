//! Settings that libxl applies to a domain at every restore: taken over from its configuration for
//! `restore --direct`, or refused by name. No setting is silently ignored.
//!
//! C implementation: `libxl__domain_make`, `libxl__build_pre` and `libxl__arch_domain_create` in
//! `tools/libs/light`; the names are those of `libxl_types.idl`.

use serde_json::{Map, Value};
use xsr_xen_backend::domain_store::Extent;
use xsr_xen_backend::{DomainSettings, Uuid};

use crate::config;
use crate::origin::TIMER_MODES;

/// Keys of `c_info` that a restore does not need, or that are read elsewhere.
const FINE_CREATE: &[&str] = &["type", "name", "uuid", "domid", "run_hotplug_scripts"];
/// Such keys of `b_info`: needed only for a fresh start or by a device model, contained in the
/// stream, or derived from the memory's size.
const FINE_BUILD: &[&str] = &[
    "max_vcpus",
    "avail_vcpus",
    "max_memkb",
    "target_memkb",
    "video_memkb",
    "iommu_memkb",
    "tsc_mode",
    "disable_migrate",
    "cpuid",
    "blkdev_start",
    "claim_mode",
    "kernel",
    "cmdline",
    "ramdisk",
    "bootloader",
    "bootloader_args",
    "bootloader_restrict",
    "bootloader_user",
    "acpi",
    "apic",
    "device_model_version",
    "device_model_user",
    "dm_restrict",
    "arch_arm",
    "altp2m_count",
];
/// A number that means "not set" (`LIBXL_MAX_GRANT_DEFAULT`, `~0U`).
const UNSET: u64 = u32::MAX as u64;

/// Settings that are in a domain's configuration and not in its stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) uuid: Uuid,
    pub(super) settings: DomainSettings,
    pub(super) extent: Extent,
    /// Whether it changes what the guest sees of the CPU. A stream with a CPU policy has that
    /// itself.
    pub(super) changes_cpuid: bool,
}

/// The settings in `config` for a domain with `vcpus`, or the names of those that need libxl.
pub(super) fn of(config: &Value, vcpus: u32) -> Result<Said, Vec<String>> {
    // As in `libxl_domain_create_restore`, for guests of a Xen without the strict behaviour.
    let mut settings = DomainSettings::default();
    settings.msr_relaxed = true;
    let mut reader = Reader {
        settings,
        refused: Vec::new(),
    };
    let uuid = config.pointer("/c_info/uuid").and_then(Value::as_str);
    let uuid = match uuid.map(str::parse) {
        None => Uuid::NIL,
        Some(Ok(uuid)) => uuid,
        Some(Err(_)) => {
            reader.refused.push("c_info.uuid".to_owned());
            Uuid::NIL
        }
    };
    reader.create(members(config, "c_info"));
    reader.build(members(config, "b_info"));
    match reader.refused.is_empty() {
        true => Ok(Said {
            uuid,
            settings: reader.settings,
            extent: config::extent(config, vcpus),
            changes_cpuid: config
                .pointer("/b_info/cpuid")
                .is_some_and(|cpuid| !says_nothing(cpuid)),
        }),
        false => Err(reader.refused),
    }
}

fn members<'v>(config: &'v Value, key: &str) -> impl Iterator<Item = (&'v str, &'v Value)> {
    let map: Option<&Map<String, Value>> = config.get(key).and_then(Value::as_object);
    map.into_iter()
        .flatten()
        .map(|(key, value)| (key.as_str(), value))
}

/// Whether a value is libxl's default.
fn says_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_i64().is_some_and(|n| n <= 0),
        Value::String(text) => matches!(
            text.as_str(),
            "" | "False" | "<default>" | "default" | "disabled" | "none" | "unknown"
        ),
        Value::Array(values) => values.is_empty(),
        Value::Object(map) => map.values().all(says_nothing),
    }
}

fn says_yes(value: &Value) -> bool {
    matches!(value, Value::Bool(true)) || value.as_str() == Some("True")
}

/// A number, if it is set; `Err` if it is not a 32-bit number.
fn number(value: &Value) -> Result<Option<u32>, ()> {
    match value.as_i64() {
        Some(-1) => Ok(None),
        _ => match value.as_u64() {
            Some(UNSET) => Ok(None),
            Some(n) => u32::try_from(n).map(Some).map_err(|_| ()),
            None if value.is_null() => Ok(None),
            None => Err(()),
        },
    }
}

struct Reader {
    settings: DomainSettings,
    refused: Vec<String>,
}

impl Reader {
    /// Take over a number.
    fn take(&mut self, name: String, value: &Value, set: impl FnOnce(&mut DomainSettings, u32)) {
        match number(value) {
            Ok(None) => {}
            Ok(Some(n)) => set(&mut self.settings, n),
            Err(()) => self.refused.push(name),
        }
    }

    /// Refuse a setting that cannot be applied, unless it is harmless.
    fn refuse_unless(&mut self, fine: bool, name: String) {
        if !fine {
            self.refused.push(name);
        }
    }

    fn create<'v>(&mut self, members: impl Iterator<Item = (&'v str, &'v Value)>) {
        for (key, value) in members {
            let name = format!("c_info.{key}");
            match key {
                _ if FINE_CREATE.contains(&key) => {}
                "ssidref" => self.take(name, value, |settings, n| settings.ssidref = n),
                "poolid" => self.take(name, value, |settings, n| settings.cpupool = n),
                "pool_name" => {
                    self.refuse_unless(
                        value.as_str() == Some("Pool-0") || says_nothing(value),
                        name,
                    );
                }
                // If the CPUs have nested paging it is used, as by libxl.
                "hap" | "oos" => {
                    self.refuse_unless(value.as_str() != Some("False") && *value != false, name);
                }
                _ => self.refuse_unless(says_nothing(value), name),
            }
        }
    }

    fn build<'v>(&mut self, members: impl Iterator<Item = (&'v str, &'v Value)>) {
        for (key, value) in members {
            let name = format!("b_info.{key}");
            match key {
                _ if FINE_BUILD.contains(&key) => {}
                "rtc_timeoffset" => match value.as_i64() {
                    // libxl stores it as an unsigned 32-bit number.
                    Some(seconds) => {
                        let wrapped = u32::try_from(seconds).map(|n| i64::from(n.cast_signed()));
                        self.settings.time_offset_seconds = wrapped.unwrap_or(seconds);
                    }
                    None => self.refused.push(name),
                },
                "max_grant_frames" => {
                    self.take(name, value, |settings, n| {
                        settings.max_grant_frames = Some(n)
                    });
                }
                "max_maptrack_frames" => {
                    self.take(name, value, |settings, n| {
                        settings.max_maptrack_frames = Some(n);
                    });
                }
                "max_grant_version" => match number(value) {
                    Ok(None) => {}
                    Ok(Some(1)) => self.settings.max_grant_version = Some(1),
                    Ok(Some(2)) => self.settings.max_grant_version = Some(2),
                    _ => self.refused.push(name),
                },
                "shadow_memkb" => match value.as_u64() {
                    Some(u64::MAX) => {}
                    Some(kib) => self.settings.paging_kib = Some(kib),
                    None => self.refuse_unless(says_nothing(value), name),
                },
                "event_channels" => self.take(name, value, |settings, n| {
                    if n > 0 {
                        settings.max_event_port = n;
                    }
                }),
                "timer_mode" => self.timer_mode(name, value),
                "sched_params" => self.sched_params(value),
                // Only a preference for the placement of the guest's memory.
                "numa_placement" => {}
                "xenstore_feature_mask" => {
                    self.refuse_unless(number(value) == Ok(None), name);
                }
                "arch_x86" => {
                    for (key, value) in value.as_object().into_iter().flatten() {
                        match key.as_str() {
                            "msr_relaxed" if value.as_str() == Some("<default>") => {}
                            "msr_relaxed" => self.settings.msr_relaxed = says_yes(value),
                            // For a guest with a device model.
                            "hvm_pirq" => {}
                            _ => self.refuse_unless(says_nothing(value), format!("{name}.{key}")),
                        }
                    }
                }
                _ if key.starts_with("type.") => {
                    for (key, value) in value.as_object().into_iter().flatten() {
                        match key.as_str() {
                            "timer_mode" => self.timer_mode(format!("{name}.{key}"), value),
                            _ if FINE_BUILD.contains(&key.as_str()) || key == "slack_memkb" => {}
                            // Used only when the shim was started.
                            "pvshim_path" | "pvshim_cmdline" | "pvshim_extra" => {}
                            _ => self.refuse_unless(says_nothing(value), format!("{name}.{key}")),
                        }
                    }
                }
                _ => self.refuse_unless(says_nothing(value), name),
            }
        }
    }

    fn timer_mode(&mut self, name: String, value: &Value) {
        let mode = match value {
            Value::String(text) => TIMER_MODES.iter().position(|mode| mode == text),
            _ => value.as_u64().and_then(|mode| usize::try_from(mode).ok()),
        };
        match mode.and_then(|mode| u8::try_from(mode).ok()) {
            Some(mode @ 0..=3) => self.settings.timer_mode = mode,
            _ => self.refuse_unless(says_nothing(value), name),
        }
    }

    /// A scheduler's defaults.
    fn sched_params(&mut self, value: &Value) {
        for (key, value) in value.as_object().into_iter().flatten() {
            let fine = match key.as_str() {
                "sched" => true,
                "weight" => value.as_i64() == Some(256) || says_nothing(value),
                _ => says_nothing(value),
            };
            self.refuse_unless(fine, format!("b_info.sched_params.{key}"));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use serde_json::json;
    use xsr_xen_backend::GuestKind;

    use super::*;

    fn config(b_info: Value, c_info: Value) -> Value {
        let text = crate::config::make(
            "web",
            "d143c265-76a6-4a72-8293-ec4d31492d92",
            GuestKind::Pvh,
            2,
            1 << 20,
        );
        let mut config: Value = serde_json::from_str(&text).unwrap();
        for (key, more) in [("b_info", b_info), ("c_info", c_info)] {
            for (name, value) in more.as_object().unwrap() {
                config[key][name] = value.clone();
            }
        }
        config
    }

    #[test]
    fn what_xl_keeps_of_a_plain_domain_is_taken() {
        let said = of(&config(json!({}), json!({})), 2).unwrap();
        assert_eq!(
            said.uuid.to_string(),
            "d143c265-76a6-4a72-8293-ec4d31492d92"
        );
        assert_eq!(said.settings, DomainSettings::default());
        let expected = Extent {
            max_memory_kib: 1 << 20,
            target_memory_kib: 1 << 20,
            video_memory_kib: 0,
            vcpus_online: vec![true; 2],
        };
        assert_eq!(said.extent, expected);
        assert!(!said.changes_cpuid);
    }

    #[test]
    fn what_a_guest_is_told_of_its_memory_and_vcpus_is_libxls() {
        let b_info = json!({
            "target_memkb": 65536, "video_memkb": 4096, "avail_vcpus": [0, 2],
            "cpuid": [{ "leaf": 1, "ecx": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx0" }],
            "shadow_memkb": u64::MAX,
        });
        let said = of(&config(b_info, json!({})), 3).unwrap();
        let expected = Extent {
            max_memory_kib: 1 << 20,
            target_memory_kib: 61440,
            video_memory_kib: 4096,
            vcpus_online: vec![true, false, true],
        };
        assert_eq!(said.extent, expected);
        assert!(said.changes_cpuid);
        assert_eq!(said.settings.paging_kib, None);
    }

    /// As in `libxl_domain_create_restore`.
    #[test]
    fn a_guest_of_a_xen_that_does_not_say_reads_unknown_registers() {
        for (value, expected) in [
            (json!({}), true),
            (json!({ "msr_relaxed": "<default>" }), true),
            (json!({ "msr_relaxed": "True" }), true),
            (json!({ "msr_relaxed": "False", "hvm_pirq": "True" }), false),
        ] {
            let config = config(json!({ "arch_x86": value }), json!({}));
            assert_eq!(of(&config, 1).unwrap().settings.msr_relaxed, expected);
        }
    }

    #[test]
    fn what_can_be_set_is_set() {
        let b_info = json!({
            "rtc_timeoffset": 4_294_963_696_u32, "max_grant_frames": 64,
            "max_maptrack_frames": 4_294_967_295_u32, "max_grant_version": 2,
            "event_channels": 4095, "timer_mode": "no_missed_ticks_pending",
            "shadow_memkb": 9000,
            "arch_x86": { "msr_relaxed": "True" },
        });
        let c_info = json!({ "ssidref": 5, "poolid": 1, "pool_name": "Pool-0" });
        let settings = of(&config(b_info, c_info), 2).unwrap().settings;
        let mut expected = DomainSettings::default();
        expected.time_offset_seconds = -3600;
        expected.max_grant_frames = Some(64);
        expected.max_grant_version = Some(2);
        expected.paging_kib = Some(9000);
        expected.max_event_port = 4095;
        expected.timer_mode = 2;
        expected.msr_relaxed = true;
        expected.ssidref = 5;
        expected.cpupool = 1;
        assert_eq!(settings, expected);
    }

    #[test]
    fn what_cannot_be_set_is_refused_by_name() {
        for (b_info, name) in [
            (json!({ "nested_hvm": "True" }), "b_info.nested_hvm"),
            (json!({ "altp2m": "external" }), "b_info.altp2m"),
            (json!({ "vpmu": "True" }), "b_info.vpmu"),
            (json!({ "localtime": true }), "b_info.localtime"),
            (
                json!({ "vnuma_nodes": [{ "memkb": 4 }] }),
                "b_info.vnuma_nodes",
            ),
            (json!({ "nodemap": [0] }), "b_info.nodemap"),
            (
                json!({ "vcpu_hard_affinity": [[0]] }),
                "b_info.vcpu_hard_affinity",
            ),
            (
                json!({ "sched_params": { "weight": 512 } }),
                "b_info.sched_params.weight",
            ),
            (
                json!({ "sched_params": { "cap": 50 } }),
                "b_info.sched_params.cap",
            ),
            (json!({ "iomem": [{ "start": 1 }] }), "b_info.iomem"),
            (json!({ "vmtrace_buf_kb": 8 }), "b_info.vmtrace_buf_kb"),
            (
                json!({ "type.pv": { "e820_host": "True" } }),
                "b_info.type.pv.e820_host",
            ),
            (json!({ "something_new": 1 }), "b_info.something_new"),
        ] {
            let refused = of(&config(b_info, json!({})), 2);
            assert_eq!(refused, Err(vec![name.to_owned()]));
        }
        for (c_info, name) in [
            (json!({ "passthrough": "sync_pt" }), "c_info.passthrough"),
            (json!({ "hap": "False" }), "c_info.hap"),
            (json!({ "pool_name": "mine" }), "c_info.pool_name"),
            (json!({ "uuid": "no" }), "c_info.uuid"),
        ] {
            let refused = of(&config(json!({}), c_info), 2);
            assert_eq!(refused, Err(vec![name.to_owned()]));
        }
    }
}
