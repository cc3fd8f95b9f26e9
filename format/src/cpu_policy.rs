//! Comparison of CPU policies: which CPU features of an image a host lacks. The host's policy is
//! the most that it can give to a guest of that kind.
//!
//! Xen itself compares very little. It silently clears every feature of the image that the host
//! does not have. The guest saw the feature when it booted, and crashes at the first use of it.
//!
//! A feature is missing where the image's bit is 1 and the host's is 0. In the opposite case
//! nothing is lost: the guest keeps the bit at 0. Bits that Xen decides by itself, or that a guest
//! can lose without harm, are not compared; `rules.rs` lists each with its reason. Nor are these:
//!
//! | what | why |
//! |---|---|
//! | largest leaf and subleaf | Xen refuses a too large one, naming the leaf, and trims the rest |
//! | APIC ids, cores, caches, TLBs, topology | chosen by the toolstack, or zero |
//! | size of a cache line that CLFLUSH takes | Xen passes on the host's |
//! | family, model, stepping, brand | Xen keeps the image's |
//! | width of addresses | clamped; populating a pfn beyond it fails, with an error |
//! | leaves of Xen (0x40000000 and up) | the destination's Xen makes them |
//! | details of SVM (leaf 0x8000000a) | Xen keeps the image's; SVM itself is a feature |
//! | XCR0, XSS and the size of the whole area | Xen derives them from the features |
//!
//! C implementation: Xen's own check is `x86_cpu_policies_are_compatible` in
//! `xen/lib/x86/policy.c`; `recalculate_cpuid_policy` in `xen/arch/x86/cpu-policy.c` adjusts a
//! policy.

use std::fmt;

use crate::byte_order::ByteOrder;
use crate::error::DecodeError;
use crate::fields::x86::{Feature, FeatureWord, Register};
use crate::record::Context;
use crate::record::x86::{CpuidLeaf, CpuidPolicy, MsrEntry, MsrPolicy};

mod level;
mod rules;

pub use level::{Level, LevelError, level};

/// The CPU that a guest sees, or the most that a guest could see.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuPolicy {
    /// CPUID leaves. If a number occurs twice, Xen takes the last.
    pub leaves: Vec<CpuidLeaf>,
    /// Model-specific registers, likewise.
    pub msrs: Vec<MsrEntry>,
}

impl CpuPolicy {
    /// Subleaf number of a leaf without subleaves (`XEN_CPUID_NO_SUBLEAF`).
    pub const NO_SUBLEAF: u32 = u32::MAX;

    /// Parses a policy as Xen gives it: the bodies of X86_CPUID_POLICY and X86_MSR_POLICY, little
    /// endian. Either may be empty.
    ///
    /// # Errors
    ///
    /// [`DecodeError::BodyLength`] if either ends inside an entry.
    pub fn parse(leaves: &[u8], msrs: &[u8]) -> Result<Self, DecodeError> {
        let context = Context {
            order: ByteOrder::Little,
            guest_width: None,
            lenient: false,
        };
        let mut policy = Self::default();
        if !leaves.is_empty() {
            policy.leaves = CpuidPolicy::decode(leaves, context)?.iter().collect();
        }
        if !msrs.is_empty() {
            policy.msrs = MsrPolicy::decode(msrs, context)?.iter().collect();
        }
        Ok(policy)
    }

    /// The policy as Xen takes it: leaves and MSRs, little endian.
    pub fn encode(&self) -> (Vec<u8>, Vec<u8>) {
        let leaves = self.leaves.iter();
        let msrs = self.msrs.iter();
        (
            leaves
                .flat_map(|leaf| leaf.encode(ByteOrder::Little))
                .collect(),
            msrs.flat_map(|msr| msr.encode(ByteOrder::Little)).collect(),
        )
    }

    /// Whether an entry is this leaf. `subleaf` is also 0 for a leaf without subleaves.
    const fn is_leaf(entry: &CpuidLeaf, leaf: u32, subleaf: u32) -> bool {
        entry.leaf == leaf
            && (entry.subleaf == subleaf || (subleaf == 0 && entry.subleaf == Self::NO_SUBLEAF))
    }

    /// A leaf. `subleaf` is also 0 for a leaf without subleaves.
    fn leaf(&self, leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
        let mut entries = self.leaves.iter().rev();
        entries.find(|entry| Self::is_leaf(entry, leaf, subleaf))
    }

    /// A register of a leaf, to change it; `None` if the policy does not have the leaf. `subleaf` is
    /// also 0 for a leaf without subleaves.
    pub fn register_mut(
        &mut self,
        leaf: u32,
        subleaf: u32,
        register: Register,
    ) -> Option<&mut u32> {
        let mut entries = self.leaves.iter_mut().rev();
        let entry = entries.find(|entry| Self::is_leaf(entry, leaf, subleaf))?;
        Some(match register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        })
    }

    /// A register of a leaf; 0 if there is no such leaf, as on a processor.
    fn register(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        self.leaf(leaf, subleaf).map_or(0, |entry| match register {
            Register::Eax => entry.eax,
            Register::Ebx => entry.ebx,
            Register::Ecx => entry.ecx,
            Register::Edx => entry.edx,
        })
    }

    /// The value of a register that holds features; 0 where the policy does not have the register.
    pub fn word(&self, word: FeatureWord) -> u64 {
        match word {
            FeatureWord::Cpuid {
                leaf,
                subleaf,
                register,
            } => self.register(leaf, subleaf, register).into(),
            FeatureWord::Msr { index } => {
                let entry = self.msrs.iter().rev().find(|entry| entry.index == index);
                entry.map_or(0, |entry| entry.value)
            }
        }
    }

    /// Whether the policy has a feature.
    pub fn has(&self, feature: Feature) -> bool {
        self.word(feature.word) >> feature.bit & 1 == 1
    }

    /// Removes features, and the components of the extended state that none of the other features
    /// needs, as Xen does.
    ///
    /// ```
    /// use xsr_format::byte_order::ByteOrder;
    /// use xsr_format::cpu_policy::CpuPolicy;
    /// use xsr_format::fields::x86::Feature;
    /// use xsr_format::record::x86::CpuidLeaf;
    ///
    /// let pku = Feature::named("pku").ok_or("no such feature")?;
    /// let leaf = CpuidLeaf { leaf: 7, subleaf: 0, eax: 0, ebx: 0, ecx: 1 << 3, edx: 0 };
    /// let mut policy = CpuPolicy { leaves: vec![leaf], msrs: Vec::new() };
    /// assert!(policy.has(pku));
    /// policy.remove(&[pku]);
    /// assert!(!policy.has(pku));
    /// # Ok::<(), &str>(())
    /// ```
    pub fn remove(&mut self, features: &[Feature]) {
        for Feature { word, bit } in features {
            match word {
                FeatureWord::Cpuid {
                    leaf,
                    subleaf,
                    register,
                } => {
                    if let Some(word) = self.register_mut(*leaf, *subleaf, *register) {
                        *word &= !(1 << bit);
                    }
                }
                FeatureWord::Msr { index } => {
                    let mut entries = self.msrs.iter_mut().rev();
                    if let Some(entry) = entries.find(|entry| entry.index == *index) {
                        entry.value &= !(1 << bit);
                    }
                }
            }
        }
        let gone = rules::components_of(features)
            .filter(|component| !rules::features_of(*component).any(|other| self.has(other)))
            .fold(0_u64, |gone, component| gone | 1 << component);
        for (subleaf, half, register) in [
            (0, gone, Register::Eax),
            (0, gone >> 32, Register::Edx),
            (1, gone, Register::Ecx),
            (1, gone >> 32, Register::Edx),
        ] {
            if let Some(word) = self.register_mut(rules::XSTATE_LEAF, subleaf, register) {
                *word &= !low_half(half);
            }
        }
    }

    /// The processor's vendor, if the policy names it.
    pub fn vendor(&self) -> Option<Vendor> {
        let leaf = self.leaf(0, 0)?;
        Some(Vendor([leaf.ebx, leaf.edx, leaf.ecx]))
    }

    /// The components of the extended state in `used` (one bit each, as in XCR0) that the policy
    /// lacks, by name.
    ///
    /// ```
    /// use xsr_format::cpu_policy::CpuPolicy;
    ///
    /// // x87, SSE, AVX, and AVX-512's masks.
    /// let none = CpuPolicy::default();
    /// assert_eq!(
    ///     none.lacking_state(0x27),
    ///     ["the XSAVE state of AVX", "the XSAVE state of AVX512"],
    /// );
    /// ```
    pub fn lacking_state(&self, used: u64) -> Vec<String> {
        let lost = used & !self.components();
        let components = (rules::FIRST_COMPONENT..64).filter(|n| lost >> n & 1 == 1);
        let mut names: Vec<String> = components.map(rules::state_name).collect();
        names.dedup();
        names
    }

    /// The components of the extended state that a guest may use, one bit each: XCR0 and XSS.
    fn components(&self) -> u64 {
        let pair = |subleaf, low, high| {
            u64::from(self.register(rules::XSTATE_LEAF, subleaf, low))
                | u64::from(self.register(rules::XSTATE_LEAF, subleaf, high)) << 32
        };
        pair(0, Register::Eax, Register::Edx) | pair(1, Register::Ecx, Register::Edx)
    }

    /// Location of a component of the extended state; `None` where the policy does not have it.
    fn area(&self, component: u8) -> Option<Area> {
        if self.components() >> component & 1 == 0 {
            return None;
        }
        let leaf = self.leaf(rules::XSTATE_LEAF, component.into())?;
        Some(Area {
            bytes: leaf.eax,
            offset: leaf.ebx,
        })
    }

    /// Version of performance monitoring; 0 if there is none.
    fn monitoring(&self) -> u8 {
        let [version, ..] = self.register(0xa, 0, Register::Eax).to_le_bytes();
        version
    }
}

/// The lower 32 bits.
const fn low_half(bits: u64) -> u32 {
    let [a, b, c, d, ..] = bits.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The processor's vendor, such as `GenuineIntel` or `AuthenticAMD`: EBX, EDX and ECX of leaf 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vendor([u32; 3]);

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for word in self.0 {
            write!(f, "{}", word.to_le_bytes().escape_ascii())?;
        }
        Ok(())
    }
}

/// Location of a component of the extended state in the XSAVE area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its length, in bytes.
    pub bytes: u32,
    /// Its offset in bytes; 0 for a component that only XSAVES saves.
    pub offset: u32,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:#x}", self.bytes, self.offset)
    }
}

/// Features of HVM and PVH guests that need HAP: Xen takes them away from a guest whose page tables
/// it shadows (the marks "H" in `cpufeatureset.h`).
pub const NEEDS_HAP: [&str; 5] = ["pcid", "page1gb", "invpcid", "pku", "pks"];

/// Features that only a guest with nested virtualisation gets.
pub const NEEDS_NESTED: [&str; 2] = ["vmx", "svm"];

/// Something that a guest's CPU has, and that the guest would lose on a host.
///
/// Displayed as the name of what is missing, as commonly written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Missing {
    /// The host's processor is from another vendor. Xen 4.22 and later refuses that by itself;
    /// before, the guest continues with code that was chosen for the other processor.
    Vendor {
        /// The image's vendor.
        image: Vendor,
        /// The host's vendor.
        host: Vendor,
    },
    /// A feature.
    Feature {
        /// The feature.
        feature: Feature,
        /// The image's register.
        image: u64,
        /// The host's register.
        host: u64,
    },
    /// A component of the extended state that the host lacks although it has the feature, or that
    /// it has at another offset or size. The guest keeps its processes' state in areas of the size
    /// that it has seen.
    ExtendedState {
        /// Its number, which is its bit in XCR0 or XSS.
        component: u8,
        /// Where the guest saw it.
        image: Area,
        /// Where the host has it.
        host: Option<Area>,
    },
    /// Performance monitoring (vPMU).
    PerformanceMonitoring {
        /// The image's version.
        image: u8,
        /// The host's version; 0 if there is none.
        host: u8,
    },
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { image, host } => {
                write!(f, "a processor of {image} (this one is of {host})")
            }
            Self::Feature { feature, .. } => feature.fmt(f),
            Self::ExtendedState {
                component,
                image,
                host,
            } => {
                write!(f, "{} ({image}", rules::state_name(*component))?;
                match host {
                    Some(host) => write!(f, ", here {host})"),
                    None => f.write_str(")"),
                }
            }
            Self::PerformanceMonitoring { image, host } => {
                write!(f, "performance monitoring version {image}")?;
                match host {
                    0 => Ok(()),
                    host => write!(f, " (here {host})"),
                }
            }
        }
    }
}

impl Missing {
    /// The location of the feature and both sides' values, for a log.
    pub fn details(&self) -> impl fmt::Display {
        Details(*self)
    }
}

struct Details(Missing);

impl fmt::Display for Details {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        match self.0 {
            Missing::Feature {
                feature: Feature { word, bit },
                image,
                host,
            } => write!(
                f,
                " (bit {bit} of {word}: {image:#010x} in the image, {host:#010x} here)"
            ),
            _ => Ok(()),
        }
    }
}

/// Lists what a guest with the policy `image` loses on a host that gives such a guest at most
/// `host`: the vendor first, then features in the order of [`FeatureWord::all`].
///
/// A half that the image lacks is not compared: images from before Xen 4.14 have neither half.
pub fn missing(image: &CpuPolicy, host: &CpuPolicy) -> Vec<Missing> {
    let mut all = Vec::new();
    if let (Some(image), Some(host)) = (image.vendor(), host.vendor())
        && image != host
    {
        all.push(Missing::Vendor { image, host });
    }
    for word in FeatureWord::all() {
        let (has, offered) = (image.word(word), host.word(word));
        let lost = has & !offered & !rules::harmless(word);
        let features = (0..64_u8).filter(|bit| lost >> bit & 1 == 1);
        let features = features.map(|bit| Feature { word, bit });
        for feature in features.filter(|feature| !rules::stood_in_for(*feature, host)) {
            all.push(Missing::Feature {
                feature,
                image: has,
                host: offered,
            });
        }
    }
    for component in rules::FIRST_COMPONENT..64 {
        let (Some(before), after) = (image.area(component), host.area(component)) else {
            continue;
        };
        let told = rules::features_of(component).any(|feature| !host.has(feature));
        if after != Some(before) && !(after.is_none() && told) {
            all.push(Missing::ExtendedState {
                component,
                image: before,
                host: after,
            });
        }
    }
    let (before, after) = (image.monitoring(), host.monitoring());
    if before > after {
        all.push(Missing::PerformanceMonitoring {
            image: before,
            host: after,
        });
    }
    all
}

#[cfg(test)]
mod tests;
