//! Diagnosis of a guest state that the hypervisor refused: what the image has, what this host has,
//! and which entry of which record is to blame.
//!
//! C implementation: none that goes as far; `xg_sr_common_x86.c` prints leaf, subleaf and register
//! of a CPU policy.

use std::fmt;

use xsr_format::cpu_policy::{self, CpuPolicy as Leaves};
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind};
use xsr_format::fields::x86::{arch_capabilities, leaf_name, msr_name};
use xsr_xen_backend::{BackendError, CpuPolicy, Detail, Domain, PolicyEntry};

/// MSR_ARCH_CAPABILITIES.
const ARCH_CAPABILITIES: u32 = 0x10a;
/// MSR_INTEL_PLATFORM_INFO, and the one bit of it that a guest may see.
const PLATFORM_INFO: u32 = 0xce;
const CPUID_FAULTING: u64 = 1 << 31;
/// Leaves that hold the processor's name.
const BRAND: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
/// Names beyond this number are only counted.
const MOST_NAMES: usize = 12;

/// A CPU policy that the hypervisor does not accept.
#[derive(Debug)]
pub struct PolicyRefused {
    /// The hypervisor's answer, with the entry that it blames.
    pub cause: BackendError,
    image: CpuPolicy,
    /// The policy of a new guest on this host; `None` if it could not be queried.
    host: Option<CpuPolicy>,
}

impl PolicyRefused {
    /// `image` was refused with `cause`.
    pub(crate) fn new(domain: &dyn Domain, image: &CpuPolicy, cause: BackendError) -> Self {
        Self {
            cause,
            image: image.clone(),
            // The domain still has its default policy.
            host: domain.cpu_policy().ok(),
        }
    }

    /// The entry of the policy that the hypervisor blames, if it blames one.
    pub fn entry(&self) -> Option<PolicyEntry> {
        match self.cause.detail.as_deref() {
            Some(Detail::PolicyEntry(entry)) => Some(*entry),
            _ => None,
        }
    }

    /// Features that the image has and the host lacks.
    fn missing_features(&self) -> Vec<String> {
        let Some(host) = &self.host else {
            return Vec::new();
        };
        let missing = cpu_policy::missing(&leaves_of(&self.image), &leaves_of(host));
        missing.iter().map(ToString::to_string).collect()
    }
}

/// The policy in typed form, as far as it can be read; empty for a policy that ends inside an
/// entry.
fn leaves_of(policy: &CpuPolicy) -> Leaves {
    Leaves::parse(&policy.leaves, &policy.msrs).unwrap_or_default()
}

/// The four registers of a leaf.
fn find_leaf(policy: &CpuPolicy, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    let leaves = leaves_of(policy).leaves;
    let found = leaves
        .iter()
        .find(|found| (found.leaf, found.subleaf) == (leaf, subleaf))?;
    Some([found.eax, found.ebx, found.ecx, found.edx])
}

/// The flags and the value of an MSR.
fn find_msr(policy: &CpuPolicy, index: u32) -> Option<(u32, u64)> {
    let msrs = leaves_of(policy).msrs;
    let found = msrs.iter().find(|found| found.index == index)?;
    Some((found.flags, found.value))
}

/// The name of the processor that a policy describes.
pub(crate) fn brand(policy: &Leaves) -> Option<String> {
    let mut bytes = Vec::new();
    for number in BRAND {
        let leaf = policy.leaves.iter().find(|leaf| leaf.leaf == number)?;
        for register in [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx] {
            bytes.extend(register.to_le_bytes());
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|c: char| c == '\0' || c.is_whitespace());
    let plain: String = text.chars().filter(|c| !c.is_control()).collect();
    (!plain.is_empty()).then_some(plain)
}

struct Leaf(Option<[u32; 4]>);

impl fmt::Display for Leaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("nothing there"),
            Some([a, b, c, d]) => {
                write!(f, "eax {a:#010x} ebx {b:#010x} ecx {c:#010x} edx {d:#010x}")
            }
        }
    }
}

struct Msr(Option<(u32, u64)>);

impl fmt::Display for Msr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("nothing there"),
            Some((0, value)) => write!(f, "{value:#018x}"),
            Some((flags, value)) => write!(f, "{value:#018x} with flags {flags:#x}"),
        }
    }
}

/// At most `most` names, and how many more there are.
pub(crate) fn list(names: &[String], most: usize) -> String {
    let shown = &names[..names.len().min(most)];
    let more = match names.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    shown.join(", ") + &more
}

impl fmt::Display for PolicyRefused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this host cannot give the guest the CPU that the image describes: ")?;
        let entry = self.entry();
        match entry {
            Some(PolicyEntry::Leaf { leaf, subleaf }) => {
                let name = leaf_name(leaf).map_or_else(String::new, |name| format!(" ({name})"));
                let at = subleaf.unwrap_or(Leaves::NO_SUBLEAF);
                write!(
                    f,
                    "Xen refuses {}{name}, where the image has {}",
                    PolicyEntry::Leaf { leaf, subleaf },
                    Leaf(find_leaf(&self.image, leaf, at)),
                )?;
                if let Some(host) = &self.host {
                    write!(f, " and this host {}", Leaf(find_leaf(host, leaf, at)))?;
                }
            }
            Some(PolicyEntry::Msr(index)) => {
                let name = msr_name(index).map_or_else(String::new, |name| format!(" ({name})"));
                let image = find_msr(&self.image, index);
                write!(
                    f,
                    "Xen refuses MSR {index:#x}{name}, where the image has {}",
                    Msr(image)
                )?;
                let here = self.host.as_ref().map(|host| find_msr(host, index));
                if let Some(here) = here {
                    write!(f, " and this host {}", Msr(here))?;
                }
                let value = |msr: Option<(u32, u64)>| msr.map_or(0, |(_, value)| value);
                let lacks = value(image) & !value(here.flatten());
                let names: Vec<String> = match index {
                    ARCH_CAPABILITIES => arch_capabilities(lacks).collect(),
                    PLATFORM_INFO if lacks & CPUID_FAULTING != 0 => {
                        vec!["cpuid-faulting".to_owned()]
                    }
                    _ => Vec::new(),
                };
                if !names.is_empty() {
                    write!(f, "; it lacks {}", list(&names, MOST_NAMES))?;
                }
            }
            None => f.write_str("Xen does not say which part of it")?,
        }
        let missing = self.missing_features();
        if !missing.is_empty() {
            write!(
                f,
                "; features that the image has and guests here do not get: {}",
                list(&missing, MOST_NAMES)
            )?;
        }
        let here = self.host.as_ref().and_then(|host| brand(&leaves_of(host)));
        match (brand(&leaves_of(&self.image)), here) {
            (Some(image), Some(here)) if image != here => write!(
                f,
                ". The image comes from another CPU: \"{image}\", this host has \"{here}\""
            )?,
            _ => f.write_str(". The image comes from another CPU or another Xen")?,
        }
        write!(
            f,
            "; restore it on a host like the one that it comes from ({})",
            self.cause
        )
    }
}

impl std::error::Error for PolicyRefused {}

/// Records of an HVM context that belong to a vcpu: each has the vcpu's number.
const OF_A_VCPU: [HvmRecordKind; 9] = [
    HvmRecordKind::CPU,
    HvmRecordKind::LAPIC,
    HvmRecordKind::LAPIC_REGS,
    HvmRecordKind::MTRR,
    HvmRecordKind::CPU_XSAVE,
    HvmRecordKind::VIRIDIAN_VCPU,
    HvmRecordKind::VMCE_VCPU,
    HvmRecordKind::TSC_ADJUST,
    HvmRecordKind::CPU_MSR,
];

/// What may be the reason for the refusal of an HVM context, for a domain whose last vcpu is
/// `max_vcpu_id`.
pub(crate) fn suspect_of_context(context: &[u8], max_vcpu_id: Option<u32>) -> String {
    let records = match HvmContext::records(context) {
        Ok(records) => records,
        // The error says what is wrong with which part.
        Err(error) => return error.to_string(),
    };
    for record in &records {
        let (kind, instance) = (record.kind, record.instance);
        if kind.name().is_none() {
            return format!("{kind} (instance {instance}) is a record that is not known");
        }
        if let Some(last) = max_vcpu_id
            && OF_A_VCPU.contains(&kind)
            && u32::from(instance) > last
        {
            return format!(
                "{kind} (instance {instance}) is of a vcpu that the domain does not have, its last is {last}"
            );
        }
    }
    format!(
        "which of its {} records, the hypervisor tells in its own log only",
        records.len()
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use xsr_xen_backend::mock::{HostConfig, MockHost};
    use xsr_xen_backend::{GuestKind, Host as _};

    use super::*;

    fn refused(change: impl FnOnce(&mut CpuPolicy)) -> PolicyRefused {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let domid = host.create_domain(GuestKind::Pvh, 1, 16).unwrap();
        let domain = host.as_xen().unwrap().domain(domid).unwrap();
        let mut policy = domain.cpu_policy().unwrap();
        change(&mut policy);
        let cause = domain.set_cpu_policy(&policy).unwrap_err();
        PolicyRefused::new(domain.as_ref(), &policy, cause)
    }

    #[test]
    fn a_register_is_named_with_both_values() {
        let refused = refused(|policy| policy.msrs[..4].copy_from_slice(&0xdead_u32.to_le_bytes()));
        assert_eq!(refused.entry(), Some(PolicyEntry::Msr(0xdead)));
        let text = refused.to_string();
        for part in [
            "MSR 0xdead, where the image has 0x0000000080000000 and this host nothing there",
            "another CPU",
            "ERANGE",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_leaf_is_named_with_both_values_and_the_features_that_are_missing() {
        let refused = refused(|policy| {
            let mut typed = leaves_of(policy);
            for leaf in &mut typed.leaves {
                match leaf.leaf {
                    0 => leaf.eax = leaf.eax & !0xff | 0x30,
                    // avx512f.
                    7 => leaf.ebx |= 1 << 16,
                    0x8000_0002 => leaf.eax = u32::from_le_bytes(*b"Real"),
                    _ => {}
                }
            }
            policy.leaves = typed.encode().0;
        });
        let text = refused.to_string();
        for part in [
            "CPUID leaf 0x0 (highest basic leaf and vendor), where the image has eax 0x00000030",
            "and this host eax 0x0000000d",
            "guests here do not get: AVX512F",
            "\"Real x86 processor of the xsr project\", this host has \"Mock x86",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn a_record_of_a_vcpu_that_is_not_there_is_suspected() {
        let host = MockHost::ephemeral(&HostConfig::default()).unwrap();
        let domid = host.create_domain(GuestKind::Pvh, 3, 16).unwrap();
        let context = host.domain(domid).unwrap();
        let context = context.hvm().unwrap().hvm_context().unwrap();
        let fine = suspect_of_context(&context, Some(2));
        assert!(fine.contains("in its own log only"), "{fine}");
        let mut record = vec![2, 0, 200, 0, 0, 0, 0, 0];
        record.extend_from_slice(&[0; 8]);
        let vcpu = suspect_of_context(&record, Some(2));
        assert!(
            vcpu.contains("CPU (instance 200)") && vcpu.contains("its last is 2"),
            "{vcpu}"
        );
        let cut = suspect_of_context(&context[..context.len() - 9], Some(2));
        assert!(cut.contains("bytes"), "{cut}");
    }
}
