//! s-expressions: xend's configuration, and xenopsd's record.
//!
//! Implementations: `tools/python/xen/xend/sxp.py` and `XendConfig.py` as of Xen 4.4;
//! `Xenops_record` in `ocaml/xenopsd/lib/suspend_image.ml` and `Vm.t` in
//! `ocaml/xapi-idl/xen/xenops_types.ml` of xen-api.

use std::iter::Peekable;
use std::str::Chars;

use xsr_xen_backend::GuestKind;

use super::{Found, settings};

/// xend's entries that are not settings, or that are read elsewhere in this file, including those
/// of the image part.
const NO_SETTINGS: [&str; 27] = [
    "domid",
    "uuid",
    "name",
    "vcpus",
    "online_vcpus",
    "vcpu_avail",
    "VCPUs_live",
    "VCPUs_max",
    "memory",
    "maxmem",
    "memory_static_min",
    "memory_static_max",
    "memory_dynamic_min",
    "memory_dynamic_max",
    "image",
    "device",
    "status",
    "state",
    "shutdown_reason",
    "start_time",
    "cpu_time",
    "up_time",
    "store_mfn",
    "console_mfn",
    "is_control_domain",
    "is_a_template",
    "notes",
];
/// Settings with xend's default values.
const UNASKED: [(&str, &str); 5] = [
    ("on_xend_start", "ignore"),
    ("on_xend_stop", "ignore"),
    ("pool_name", "Pool-0"),
    ("cpu_weight", "256"),
    ("cpu_cap", "0"),
];

/// How deep lists may be nested.
const MAX_DEPTH: usize = 64;

/// An atom or a list.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Sxp {
    Atom(String),
    List(Vec<Sxp>),
}

impl Sxp {
    /// Read the first expression of a text.
    fn parse(text: &str) -> Result<Self, String> {
        let mut open: Vec<Vec<Self>> = Vec::new();
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            let atom = match c {
                c if c.is_whitespace() => continue,
                '(' => {
                    if open.len() >= MAX_DEPTH {
                        return Err(format!("is nested more than {MAX_DEPTH} deep"));
                    }
                    open.push(Vec::new());
                    continue;
                }
                ')' => Self::List(open.pop().ok_or("closes a list that was not opened")?),
                '"' | '\'' => Self::Atom(quoted(&mut chars, c)?),
                c => Self::Atom(bare(&mut chars, c)),
            };
            match open.last_mut() {
                Some(list) => list.push(atom),
                None => return Ok(atom),
            }
        }
        Err("ends inside a list".to_owned())
    }

    fn atom(&self) -> Option<&str> {
        match self {
            Self::Atom(text) => Some(text),
            Self::List(_) => None,
        }
    }

    /// All its atoms, joined by spaces.
    fn words(&self) -> String {
        match self {
            Self::Atom(text) => text.clone(),
            Self::List(list) => {
                let words: Vec<String> = list.iter().map(Self::words).collect();
                words.join(" ").trim().to_owned()
            }
        }
    }

    fn list(&self) -> &[Self] {
        match self {
            Self::List(list) => list,
            Self::Atom(_) => &[],
        }
    }

    /// The head of a list.
    fn head(&self) -> Option<&str> {
        self.list().first()?.atom()
    }

    /// The lists in this one that begin with a name.
    fn children<'s>(&'s self, name: &'static str) -> impl Iterator<Item = &'s Self> {
        let children = self.list().iter();
        children.filter(move |child| child.head() == Some(name))
    }

    /// The value after the name in the first such list.
    fn value(&self, name: &str) -> Option<&Self> {
        let mut lists = self.list().iter();
        lists.find(|list| list.head() == Some(name))?.list().get(1)
    }

    fn text(&self, name: &str) -> Option<String> {
        Some(self.value(name)?.atom()?.to_owned())
    }
}

fn bare(chars: &mut Peekable<Chars<'_>>, first: char) -> String {
    let mut text = String::from(first);
    while let Some(c) = chars.next_if(|c| !c.is_whitespace() && !matches!(c, '(' | ')')) {
        text.push(c);
    }
    text
}

/// A string, up to its closing quote. Python and OCaml write the same escapes, except for numbers,
/// which are octal in Python and decimal in OCaml. A numeric escape is kept as it is written.
fn quoted(chars: &mut Peekable<Chars<'_>>, quote: char) -> Result<String, String> {
    let mut text = String::new();
    while let Some(c) = chars.next() {
        match c {
            c if c == quote => return Ok(text),
            '\\' => match chars.next() {
                Some('n') => text.push('\n'),
                Some('t') => text.push('\t'),
                Some('r') => text.push('\r'),
                // OCaml breaks long strings: the line end and the blanks after it are dropped.
                Some('\n') => while chars.next_if(|c| matches!(c, ' ' | '\t')).is_some() {},
                Some(c @ ('\\' | '"' | '\'' | ' ')) => text.push(c),
                Some(c) => text.extend(['\\', c]),
                None => break,
            },
            c => text.push(c),
        }
    }
    Err("ends inside a string".to_owned())
}

/// xend's configuration of a domain.
pub(super) fn read_xend(text: &str) -> Result<Found, String> {
    let domain = Sxp::parse(text)?;
    if !matches!(domain.head(), Some("domain" | "vm")) {
        return Err("is no (domain …)".to_owned());
    }
    // Both in MiB. The domain may have the larger one.
    let mut found = Found::default();
    let mut number = |name| found.number::<u64>(name, domain.value(name).and_then(Sxp::atom));
    // 0 is no limit.
    let most = domain.text("maxmem").filter(|most| most != "0");
    let memory = [most.and_then(|_| number("maxmem")), number("memory")];
    let mib = memory.into_iter().flatten().max();
    let vcpus = found.number("vcpus", domain.value("vcpus").and_then(Sxp::atom));
    let mut found = Found {
        name: domain.text("name"),
        uuid: domain.text("uuid").map(|uuid| dashed(&uuid)),
        kind: match domain.value("image").and_then(Sxp::head) {
            Some("linux") => Some(GuestKind::Pv),
            Some("hvm") => Some(GuestKind::Hvm),
            _ => None,
        },
        vcpus,
        max_memory_kib: mib.and_then(|mib| mib.checked_mul(1024)),
        ..found
    };
    if let (Some(mib), None) = (mib, found.max_memory_kib) {
        found.not_taken("memory", &mib.to_string());
    }
    take_settings(&domain, &mut found);
    if let Some(image) = domain.value("image") {
        take_settings(image, &mut found);
    }
    for device in domain.children("device") {
        let Some(about) = device.list().get(1) else {
            continue;
        };
        let of = |names: &[&str]| {
            let mut values = names.iter().filter_map(|name| about.text(name));
            values.next().unwrap_or_default()
        };
        let (target, source) = (of(&["dev", "mac", "type"]), of(&["uname", "bridge"]));
        found.device(&[about.head().unwrap_or_default(), &target, &source]);
    }
    Ok(found)
}

/// Settings: lists of a name and a value.
fn take_settings(of: &Sxp, found: &mut Found) {
    let kind = found.kind;
    for setting in of.list() {
        let (Some(name), Some(value)) = (setting.head(), setting.list().get(1)) else {
            continue;
        };
        let value = value.words();
        if NO_SETTINGS.contains(&name) || UNASKED.contains(&(name, value.as_str())) {
            continue;
        }
        // xl's name for it differs.
        let name = match name {
            "args" => "cmdline",
            name => name,
        };
        settings::take(found, kind, name, &value);
    }
}

/// libxl's action for xenopsd's actions for a guest that has ended.
fn xapis_action(actions: &Sxp) -> Option<&'static str> {
    let actions: Vec<&str> = actions.list().iter().filter_map(Sxp::atom).collect();
    Some(match actions[..] {
        ["Shutdown"] => "destroy",
        ["Start"] => "restart",
        ["Pause"] => "preserve",
        ["Coredump", "Shutdown"] => "coredump_destroy",
        ["Coredump", "Start"] => "coredump_restart",
        ["Softreboot"] => "soft_reset",
        _ => return None,
    })
}

/// xenopsd's record of a domain, in which the VM is a string that holds an s-expression.
pub(super) fn read_xapi(text: &str) -> Result<Found, String> {
    let record = Sxp::parse(text)?;
    let Some(text) = record.text("vm_str") else {
        return Ok(Found::default());
    };
    let vm = match Sxp::parse(&text) {
        Ok(vm) if !vm.list().is_empty() => vm,
        Err(why) if text.starts_with('(') => return Err(format!("has a vm_str that {why}")),
        // Other versions store something else here.
        _ => {
            return Ok(Found {
                problems: vec!["its vm_str is not an s-expression, and is not read".to_owned()],
                ..Found::default()
            });
        }
    };
    let kind = vm.value("ty").and_then(|ty| ty.head().or(ty.atom()));
    let mut found = Found::default();
    let memory = vm.value("memory_static_max").and_then(Sxp::atom);
    let bytes: Option<u64> = found.number("memory_static_max", memory);
    let vcpus = found.number("vcpu_max", vm.value("vcpu_max").and_then(Sxp::atom));
    let mut found = Found {
        name: vm.text("name"),
        uuid: vm.text("id"),
        kind: match kind {
            Some("HVM") => Some(GuestKind::Hvm),
            Some("PV") => Some(GuestKind::Pv),
            Some("PVH" | "PVinPVH") => Some(GuestKind::Pvh),
            _ => None,
        },
        vcpus,
        max_memory_kib: bytes.map(|bytes| bytes.div_ceil(1024)),
        ..found
    };
    for (event, at) in [
        ("on_shutdown", "/on_poweroff"),
        ("on_reboot", "/on_reboot"),
        ("on_crash", "/on_crash"),
        ("on_softreboot", "/on_soft_reset"),
    ] {
        let Some(actions) = vm.value(event) else {
            continue;
        };
        match xapis_action(actions) {
            Some(action) => found.carry(at, action.into()),
            None => found.setting(&[event, &actions.words()]),
        }
    }
    Ok(found)
}

/// A UUID in today's form. (xend of Xen 3.0 wrote no dashes.)
fn dashed(uuid: &str) -> String {
    let all_digits = uuid.len() == 32 && uuid.bytes().all(|b| b.is_ascii_hexdigit());
    match all_digits {
        true => [(0, 8), (8, 12), (12, 16), (16, 20), (20, 32)]
            .map(|(from, to)| &uuid[from..to])
            .join("-"),
        false => uuid.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const XEND: &str = "(domain (domid 3) (uuid 1f2e3d4c-0000-1111-2222-333344445555) \
        (bootloader_args ) (vcpus 2) (name 'a \\'b\\'') (memory 256) (maxmem 512) \
        (image (linux (kernel /boot/vmlinuz) (args \"root=/dev/sda1 ro\"))) (status 2) \
        (device (vif (bridge xenbr0) (mac 00:16:3e:00:00:01))) \
        (device (vbd (uname phy:vg/disk) (dev sda1:disk) (mode w))))";

    #[test]
    fn xends_configuration_says_what_the_domain_is() {
        let found = read_xend(XEND).expect("it is well-formed");
        assert_eq!(found.name.as_deref(), Some("a 'b'"));
        let uuid = "1f2e3d4c-0000-1111-2222-333344445555";
        assert_eq!(found.uuid.as_deref(), Some(uuid));
        assert_eq!(found.kind, Some(GuestKind::Pv));
        assert_eq!(
            (found.vcpus, found.max_memory_kib),
            (Some(2), Some(512 << 10))
        );
        let devices = ["vif 00:16:3e:00:00:01 xenbr0", "vbd sda1:disk phy:vg/disk"];
        assert_eq!(found.devices, devices);
        let carried: [(&str, serde_json::Value); 2] = [
            ("/b_info/kernel", "/boot/vmlinuz".into()),
            ("/b_info/cmdline", "root=/dev/sda1 ro".into()),
        ];
        assert_eq!(found.carried, carried);
        assert!(found.settings.is_empty(), "{:?}", found.settings);
    }

    #[test]
    fn what_xend_does_when_a_guest_ends_is_carried_and_other_settings_are_named() {
        let text = "(domain (name x) (on_poweroff preserve) (on_reboot rename-restart) \
            (on_crash coredump_and_destroy) (on_xend_start ignore) (on_xend_stop suspend) \
            (shadow_memory 8) (cpus ((0 1) ())) (cpu_weight 512) (pool_name Pool-0) \
            (image (hvm (kernel ) (hpet 1) (rtc_timeoffset 3600) (device_model /usr/qemu-dm) \
            (cpuid ()) (notes (a b)))))";
        let found = read_xend(text).expect("it is well-formed");
        let carried: [(&str, serde_json::Value); 7] = [
            ("/on_poweroff", "preserve".into()),
            ("/on_reboot", "restart_rename".into()),
            ("/on_crash", "coredump_destroy".into()),
            ("/b_info/shadow_memkb", 8192.into()),
            ("/b_info/sched_params/weight", 512.into()),
            ("/b_info/type.hvm/hpet", "True".into()),
            ("/b_info/rtc_timeoffset", 3600.into()),
        ];
        assert_eq!(found.carried, carried);
        let named = [
            "on_xend_stop suspend",
            "cpus 0 1",
            "device_model /usr/qemu-dm",
        ];
        assert_eq!(found.settings, named);
    }

    #[test]
    fn a_uuid_without_dashes_gets_them() {
        let found = read_xend("(domain (uuid 1f2e3d4c000011112222333344445555))").expect("good");
        let uuid = "1f2e3d4c-0000-1111-2222-333344445555";
        assert_eq!(found.uuid.as_deref(), Some(uuid));
    }

    #[test]
    fn xenopsds_record_says_what_the_domain_is() {
        let record = r#"((time 20200101T00:00:00Z)(word_size 64)(vm_str "((id 6f18a89f-849d-4334-8633-5976cbcde14c)(name \"my vm\")(ty (HVM ((hap true))))(memory_static_max 268435456)(vcpu_max 4)(vcpus 2))")(xs_subtree ()))"#;
        let found = read_xapi(record).expect("it is well-formed");
        assert_eq!(found.name.as_deref(), Some("my vm"));
        assert_eq!(found.kind, Some(GuestKind::Hvm));
        assert_eq!(
            (found.vcpus, found.max_memory_kib),
            (Some(4), Some(262_144))
        );
        let record = record.replace(
            "(vcpus 2)",
            "(on_crash (Coredump Start))(on_reboot (Start))(on_shutdown (Shutdown Pause))",
        );
        let found = read_xapi(&record).expect("it is well-formed");
        let carried: [(&str, serde_json::Value); 2] = [
            ("/on_reboot", "restart".into()),
            ("/on_crash", "coredump_restart".into()),
        ];
        assert_eq!(found.carried, carried);
        assert_eq!(found.settings, ["on_shutdown Shutdown Pause"]);
        let other = "((time x)(word_size 64)(vm_str(<methodResponse>))(xs_subtree()))";
        let found = read_xapi(other).expect("it is well-formed");
        assert_eq!((&found.name, &found.uuid), (&None, &None));
        assert_eq!(
            found.problems,
            Vec::<String>::new(),
            "an s-expression of one list"
        );
        let json = r#"((vm_str "{\"id\": \"6f18a89f-849d-4334-8633-5976cbcde14c\"}"))"#;
        let found = read_xapi(json).expect("it is well-formed");
        assert_eq!(found.problems.len(), 1, "{found:?}");
        // Cut off.
        let cut = r#"((vm_str "((id 6f18a89f-849d-4334-8633-5976cbcde14c)(name web"))"#;
        let error = read_xapi(cut).expect_err("it ends too early");
        assert!(error.starts_with("has a vm_str that "), "{error}");
    }

    #[test]
    fn a_number_that_no_domain_can_have_is_named() {
        for record in [
            r#"((vm_str "((memory_static_max 99999999999999999999)(vcpu_max 4294967297))"))"#,
            r#"((vm_str "((memory_static_max 0)(vcpu_max 0))"))"#,
        ] {
            let found = read_xapi(record).expect("it is well-formed");
            assert_eq!((found.vcpus, found.max_memory_kib), (None, None));
            assert_eq!(found.problems.len(), 2, "{found:?}");
        }
        let xend = "(domain (memory 18446744073709551615) (maxmem 0) (vcpus -1))";
        let found = read_xend(xend).expect("it is well-formed");
        assert_eq!((found.vcpus, found.max_memory_kib), (None, None));
        assert_eq!(found.problems.len(), 2, "{found:?}");
    }

    #[test]
    fn what_is_cut_off_or_too_deep_is_refused() {
        for (end, _) in XEND.char_indices() {
            assert!(read_xend(&XEND[..end]).is_err(), "{end}");
        }
        for text in ["", ")", "(a)", &"(".repeat(100_000), "(domain 'x\\"] {
            assert!(read_xend(text).is_err(), "{text:.20}");
        }
    }
}
