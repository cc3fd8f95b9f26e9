//! Comparisons of the CPU policies in images from a real Xen, with each other and with what the
//! hosts of the lab can give to a guest at most (`tests/policies`, as `xen-cpuid -p` wrote them
//! there: Xen 4.17 and 4.20 on qemu's `max` processor, and on one without AES).

use xsr_format::cpu_policy::{CpuPolicy, missing};
use xsr_format::read::ReadOptions;
use xsr_format::record::Body;
use xsr_format::record::x86::{CpuidLeaf, MsrEntry};
use xsr_format::slice::{SliceReader, SliceRecord};

use crate::support::images;

/// Name, whether it belongs to a PV guest, policy.
type Named = (String, bool, CpuPolicy);

fn policy_of(image: &images::Image) -> Named {
    let header = b"LibxlFmt";
    let libxl = image.bytes.windows(header.len());
    let libxl = libxl.clone().position(|bytes| bytes == header).unwrap();
    let stream = &image.bytes[libxl + 24..];
    let mut reader = SliceReader::new(stream, ReadOptions::default()).unwrap();
    let mut policy = CpuPolicy::default();
    while let Some(record) = reader.next_record().unwrap() {
        let SliceRecord::Record(record) = record else {
            break;
        };
        match record.body {
            Body::CpuidPolicy(leaves) => policy.leaves = leaves.iter().collect(),
            Body::MsrPolicy(msrs) => policy.msrs = msrs.iter().collect(),
            _ => {}
        }
    }
    assert!(!policy.leaves.is_empty() && !policy.msrs.is_empty());
    let is_pv = image.name.contains("pv") && !image.name.contains("pvh");
    (image.name.clone(), is_pv, policy)
}

fn policies() -> Vec<Named> {
    let committed = images::committed();
    let shared = images::shared();
    let shared = shared.iter().map(|path| policy_of(&images::load(path)));
    committed.iter().map(policy_of).chain(shared).collect()
}

#[test]
fn no_image_of_a_real_xen_is_refused_where_another_of_its_kind_came_from() {
    let all = policies();
    let mut pairs = 0;
    for (image, is_pv, policy) in &all {
        for (host, _, offered) in all.iter().filter(|(_, kind, _)| kind == is_pv) {
            let missing = missing(policy, offered);
            assert_eq!(missing, [], "{image} on the host of {host}");
            pairs += 1;
        }
    }
    assert!(pairs >= 8, "{pairs}");
}

/// A translated guest of that host sees features that PV guests do not get: each is named. In the
/// other direction nothing is missing.
#[test]
fn what_a_pv_guest_does_not_get_is_named() {
    let all: Vec<Named> = images::committed().iter().map(policy_of).collect();
    let of = |pv: bool| all.iter().find(|(_, is_pv, _)| *is_pv == pv).unwrap();
    let ((.., pv), (.., hvm)) = (of(true), of(false));
    assert_eq!(missing(pv, hvm), []);
    let names: Vec<String> = missing(hvm, pv).iter().map(ToString::to_string).collect();
    assert_eq!(
        names,
        [
            "PSE",
            "SEP",
            "MTRR",
            "PGE",
            "PSE36",
            "SMEP",
            "UMIP",
            "PKU",
            "PAGE1GB",
            "CR8_LEGACY",
            "CPUID_FAULTING",
        ]
    );
}

/// A host of the lab: its name, and its policies by their names in the output of `xen-cpuid -p`.
type Host = (&'static str, Vec<(String, CpuPolicy)>);

const HOSTS: [(&str, &str); 3] = [
    ("4.17", include_str!("../../policies/4.17.txt")),
    ("4.17-aes", include_str!("../../policies/4.17-aes.txt")),
    ("4.20", include_str!("../../policies/4.20.txt")),
];

fn hosts() -> Vec<Host> {
    let hosts = HOSTS.map(|(name, text)| (name, policies_of(text)));
    hosts.into()
}

/// Parses `NAME policy: …` with lines `LEAF:SUBLEAF -> EAX:EBX:ECX:EDX` and `INDEX -> VALUE`.
fn policies_of(text: &str) -> Vec<(String, CpuPolicy)> {
    let hex = |text: &str| u32::from_str_radix(text, 16).unwrap();
    let mut policies = Vec::new();
    for line in text.lines() {
        if let Some((name, _)) = line.split_once(" policy: ") {
            policies.push((name.to_owned(), CpuPolicy::default()));
            continue;
        }
        let (Some((key, value)), Some((_, policy))) =
            (line.trim().split_once(" -> "), policies.last_mut())
        else {
            continue;
        };
        if let Some((leaf, subleaf)) = key.split_once(':') {
            if leaf == "leaf" {
                continue;
            }
            let registers: Vec<u32> = value.split(':').map(hex).collect();
            policy.leaves.push(CpuidLeaf {
                leaf: hex(leaf),
                subleaf: hex(subleaf),
                eax: registers[0],
                ebx: registers[1],
                ecx: registers[2],
                edx: registers[3],
            });
        } else if key != "index   " && value.len() == 16 {
            policy.msrs.push(MsrEntry {
                index: hex(key),
                flags: 0,
                value: u64::from_str_radix(value, 16).unwrap(),
            });
        }
    }
    policies
}

fn named<'h>(host: &'h Host, name: &str) -> &'h CpuPolicy {
    let found = host.1.iter().find(|(of, _)| of == name);
    &found
        .unwrap_or_else(|| panic!("{}: no {name} policy", host.0))
        .1
}

/// What a new guest of each kind gets on a host is refused on another exactly where that has no
/// AES. The hosts differ otherwise in nothing that a guest sees.
#[test]
fn a_guest_of_a_lab_host_is_refused_only_where_a_feature_is_less() {
    let hosts = hosts();
    let mut pairs = 0;
    for from in &hosts {
        for to in &hosts {
            for kind in ["PV", "HVM"] {
                let guest = named(from, &format!("{kind} Default"));
                let most = named(to, &format!("{kind} Max"));
                assert!(!guest.leaves.is_empty() && !most.msrs.is_empty());
                let missing: Vec<String> = missing(guest, most)
                    .iter()
                    .map(ToString::to_string)
                    .collect();
                let lacks = to.0.ends_with("-aes") && !from.0.ends_with("-aes");
                let expected: &[&str] = if lacks { &["AESNI"] } else { &[] };
                assert_eq!(missing, expected, "{kind}: {} to {}", from.0, to.0);
                pairs += 1;
            }
        }
    }
    assert_eq!(pairs, 18);
}

/// The images come from a host with AVX, which today's lab switches off: that, what depends on it,
/// and AES where the host lacks it are named, and nothing else.
#[test]
fn an_image_of_a_real_guest_lacks_on_a_lab_host_what_that_host_was_denied() {
    for (image, is_pv, policy) in &policies() {
        for host in &hosts() {
            let most = named(host, if *is_pv { "PV Max" } else { "HVM Max" });
            let found = missing(policy, most);
            let found: Vec<String> = found.iter().map(ToString::to_string).collect();
            let aes = host.0.ends_with("-aes");
            let all = ["FMA", "AESNI", "AVX", "F16C", "AVX2", "VAES"];
            let denied: Vec<&str> = all
                .into_iter()
                .filter(|name| *name != "AESNI" || aes)
                .collect();
            assert_eq!(found, denied, "{image} on {}", host.0);
        }
    }
}
