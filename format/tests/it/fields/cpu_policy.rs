//! Comparisons of the CPU policies in images from a real Xen, each with each other.
//!
//! All available images are from one host. A host's largest policy is in no image. A new guest gets
//! less than that, so an image that lacks nothing of a guest's policy lacks nothing of the host's.

use xsr_format::cpu_policy::{CpuPolicy, missing};
use xsr_format::read::ReadOptions;
use xsr_format::record::Body;
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
