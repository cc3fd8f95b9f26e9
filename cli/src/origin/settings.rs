//! Settings that xl's text and xend's s-expressions both have, mapped to libxl's JSON. Settings
//! without a place there are reported.
//!
//! When a domain reboots it is created again from its configuration, so what it boots from is
//! carried over too.
//!
//! C implementation: `parse_config_data` in `tools/libxl/xl_cmdimpl.c` as of Xen 4.4, in
//! `tools/xl/xl_parse.c` since 4.10; `libxl_types.idl`.

use serde_json::Value;
use xsr_xen_backend::GuestKind;

use super::Found;

/// The type of a setting, and how it is converted.
#[derive(Clone, Copy)]
enum As {
    /// The action for a guest that has ended.
    Action,
    Bool,
    Number,
    Text,
    /// MiB, which libxl keeps as KiB.
    Mebibytes,
    /// A name, or its number.
    OneOf(&'static [&'static str]),
}

const TSC_MODES: As = As::OneOf(&["default", "always_emulate", "native", "native_paravirt"]);
/// The names of timer modes, by their number (`libxl_timer_mode`).
pub(crate) const TIMER_MODES: [&str; 4] = [
    "delay_for_missed_ticks",
    "no_delay_for_missed_ticks",
    "no_missed_ticks_pending",
    "one_missed_tick_pending",
];

/// Settings of any guest.
const ANY: &[(&str, &str, As)] = &[
    ("on_poweroff", "/on_poweroff", As::Action),
    ("on_reboot", "/on_reboot", As::Action),
    ("on_watchdog", "/on_watchdog", As::Action),
    ("on_crash", "/on_crash", As::Action),
    ("on_soft_reset", "/on_soft_reset", As::Action),
    ("pool", "/c_info/pool_name", As::Text),
    ("pool_name", "/c_info/pool_name", As::Text),
    ("rtc_timeoffset", "/b_info/rtc_timeoffset", As::Number),
    ("localtime", "/b_info/localtime", As::Bool),
    ("tsc_mode", "/b_info/tsc_mode", TSC_MODES),
    ("shadow_memory", "/b_info/shadow_memkb", As::Mebibytes),
    ("max_event_channels", "/b_info/event_channels", As::Number),
    ("max_grant_frames", "/b_info/max_grant_frames", As::Number),
    (
        "max_maptrack_frames",
        "/b_info/max_maptrack_frames",
        As::Number,
    ),
    ("max_grant_version", "/b_info/max_grant_version", As::Number),
    ("cpu_weight", "/b_info/sched_params/weight", As::Number),
    ("cap", "/b_info/sched_params/cap", As::Number),
    ("cpu_cap", "/b_info/sched_params/cap", As::Number),
];

/// Settings of guests that Xen starts from a kernel.
const WITH_KERNEL: &[(&str, &str, As)] = &[
    ("kernel", "/b_info/kernel", As::Text),
    ("ramdisk", "/b_info/ramdisk", As::Text),
    ("cmdline", "/b_info/cmdline", As::Text),
    ("bootloader", "/b_info/bootloader", As::Text),
];

/// Settings of HVM and PVH guests.
const TRANSLATED: &[(&str, &str, As)] = &[
    ("hap", "/c_info/hap", As::Bool),
    ("oos", "/c_info/oos", As::Bool),
    ("nestedhvm", "/b_info/nested_hvm", As::Bool),
    ("acpi", "/b_info/acpi", As::Bool),
    ("apic", "/b_info/apic", As::Bool),
    ("timer_mode", "/b_info/timer_mode", As::OneOf(&TIMER_MODES)),
];

/// Settings of HVM guests.
const HVM: &[(&str, &str, As)] = &[
    ("pae", "/b_info/type.hvm/pae", As::Bool),
    ("acpi_s3", "/b_info/type.hvm/acpi_s3", As::Bool),
    ("acpi_s4", "/b_info/type.hvm/acpi_s4", As::Bool),
    ("hpet", "/b_info/type.hvm/hpet", As::Bool),
    ("vpt_align", "/b_info/type.hvm/vpt_align", As::Bool),
    ("viridian", "/b_info/type.hvm/viridian", As::Bool),
    (
        "xen_platform_pci",
        "/b_info/type.hvm/xen_platform_pci",
        As::Bool,
    ),
];

/// Settings of PV guests.
const PV: &[(&str, &str, As)] = &[("e820_host", "/b_info/type.pv/e820_host", As::Bool)];

/// Take over a setting of a guest of this kind, or report it.
pub(super) fn take(found: &mut Found, kind: Option<GuestKind>, name: &str, value: &str) {
    let tables: &[&[_]] = match kind {
        Some(GuestKind::Pv) => &[ANY, WITH_KERNEL, PV],
        Some(GuestKind::Pvh) => &[ANY, WITH_KERNEL, TRANSLATED],
        Some(GuestKind::Hvm) => &[ANY, TRANSLATED, HVM],
        None => &[ANY],
    };
    let known = tables.iter().flat_map(|table| table.iter());
    let known = known.into_iter().find(|(known, ..)| *known == name);
    let carried = known.and_then(|(_, at, how)| Some((*at, how.read(value)?)));
    match carried {
        Some((at, value)) => found.carry(at, value),
        None if value.trim().is_empty() => {}
        None => found.setting(&[name, value]),
    }
}

impl As {
    /// The value in libxl's JSON; `None` if it is invalid.
    fn read(self, value: &str) -> Option<Value> {
        let value = value.trim();
        match self {
            Self::Action => action(value).map(Value::from),
            Self::Text => (!value.is_empty()).then(|| value.into()),
            Self::Number => value.parse::<i64>().ok().map(Value::from),
            Self::Mebibytes => {
                // 0: libxl's default.
                let mib = value.parse::<u64>().ok().filter(|mib| *mib > 0)?;
                mib.checked_mul(1024).map(Value::from)
            }
            Self::Bool => match value.to_ascii_lowercase().as_str() {
                "0" | "false" | "no" | "off" => Some("False".into()),
                "1" | "true" | "yes" | "on" => Some("True".into()),
                _ => None,
            },
            Self::OneOf(names) => {
                let by_number = value.parse().ok().and_then(|at: usize| names.get(at));
                let name = by_number.or_else(|| names.iter().find(|name| **name == value));
                name.map(|name| Value::from(*name))
            }
        }
    }
}

/// libxl's name for the action for a guest that has ended, from the words of xl, xend, xapi or
/// libvirt.
pub(super) fn action(word: &str) -> Option<&'static str> {
    Some(match word.replace('_', "-").as_str() {
        "destroy" => "destroy",
        "restart" => "restart",
        "preserve" => "preserve",
        "rename-restart" => "restart_rename",
        "coredump-destroy" | "coredump-and-destroy" => "coredump_destroy",
        "coredump-restart" | "coredump-and-restart" => "coredump_restart",
        "soft-reset" => "soft_reset",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_are_carried_where_libxl_has_a_place_and_named_where_it_has_none() {
        let mut found = Found::default();
        for (name, value) in [
            ("on_poweroff", "preserve"),
            ("on_reboot", "rename_restart"),
            ("on_crash", "coredump-destroy"),
            ("on_watchdog", "explode"),
            ("localtime", "1"),
            ("rtc_timeoffset", "-60"),
            ("tsc_mode", "2"),
            ("timer_mode", "one_missed_tick_pending"),
            ("shadow_memory", "8"),
            ("hpet", "0"),
            ("kernel", "/usr/lib/xen/boot/hvmloader"),
            ("cpus", "0-1"),
            ("cap", "a lot"),
            ("usbdevice", ""),
        ] {
            take(&mut found, Some(GuestKind::Hvm), name, value);
        }
        let carried = [
            ("/on_poweroff", json!("preserve")),
            ("/on_reboot", json!("restart_rename")),
            ("/on_crash", json!("coredump_destroy")),
            ("/b_info/localtime", json!("True")),
            ("/b_info/rtc_timeoffset", json!(-60)),
            ("/b_info/tsc_mode", json!("native")),
            ("/b_info/timer_mode", json!("one_missed_tick_pending")),
            ("/b_info/shadow_memkb", json!(8192)),
            ("/b_info/type.hvm/hpet", json!("False")),
        ];
        assert_eq!(found.carried, carried);
        let named = [
            "on_watchdog explode",
            "kernel /usr/lib/xen/boot/hvmloader",
            "cpus 0-1",
            "cap a lot",
        ];
        assert_eq!(found.settings, named);
    }

    /// A PV guest is created again from its kernel when it reboots.
    #[test]
    fn what_a_pv_guest_is_started_from_is_carried() {
        let mut found = Found::default();
        take(&mut found, Some(GuestKind::Pv), "kernel", "/boot/vmlinuz");
        take(&mut found, Some(GuestKind::Pv), "hpet", "1");
        assert_eq!(found.carried, [("/b_info/kernel", json!("/boot/vmlinuz"))]);
        assert_eq!(found.settings, ["hpet 1"]);
    }
}
