//! The features that several hosts have in common, and how to keep a guest from seeing more.

use std::fmt;

use thiserror::Error;

use super::{CpuPolicy, Vendor, rules};
use crate::fields::x86::{Feature, FeatureWord};

/// The features to hide from a guest so that it runs on each of several hosts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Level {
    /// Features that some of the hosts have, and others lack, or whose state the hosts keep at
    /// different places of the XSAVE area, in the order of [`FeatureWord::all`].
    pub hidden: Vec<Feature>,
    /// The version of performance monitoring to show, if the hosts have several.
    pub monitoring: Option<u8>,
    /// Components of the XSAVE area that differ between the hosts, and that no known feature
    /// controls. Nothing hides them.
    pub components: Vec<u8>,
}

/// Why hosts have no common level.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LevelError {
    /// Their processors are from different vendors.
    #[error("one host's processor is of {one}, another's of {other}: no guest moves between them")]
    Vendors {
        /// The first vendor.
        one: Vendor,
        /// Another one.
        other: Vendor,
    },
}

/// Compares the largest policies of several hosts, all for the same kind of guest.
///
/// # Errors
///
/// [`LevelError::Vendors`].
pub fn level(hosts: &[CpuPolicy]) -> Result<Level, LevelError> {
    let mut vendors = hosts.iter().filter_map(CpuPolicy::vendor);
    if let Some(one) = vendors.next()
        && let Some(other) = vendors.find(|other| *other != one)
    {
        return Err(LevelError::Vendors { one, other });
    }
    let mut hidden = Vec::new();
    for word in FeatureWord::all() {
        let words = || hosts.iter().map(|host| host.word(word));
        let all = words().fold(u64::MAX, |all, word| all & word);
        let some = words().fold(0, |some, word| some | word);
        let differ = some & !all & !rules::harmless(word);
        let bits = (0..64_u8).filter(|bit| differ >> bit & 1 == 1);
        hidden.extend(bits.map(|bit| Feature { word, bit }));
    }
    let components = differing_components(hosts, &mut hidden);
    let versions = || hosts.iter().map(CpuPolicy::monitoring);
    let monitoring = versions()
        .min()
        .filter(|least| versions().any(|v| v != *least));
    Ok(Level {
        hidden,
        monitoring,
        components,
    })
}

/// Hides the features whose state the hosts keep at different places, although all have them.
/// Returns the components that differ without such a feature.
///
/// A guest loses the components of a hidden feature by itself: Xen derives them from its features
/// (`recalculate_xstate`).
fn differing_components(hosts: &[CpuPolicy], hidden: &mut Vec<Feature>) -> Vec<u8> {
    let mut beyond = Vec::new();
    for component in rules::FIRST_COMPONENT..64 {
        let mut areas = hosts.iter().map(|host| host.area(component));
        let first = areas.next().flatten();
        let mut features = rules::features_of(component).peekable();
        if areas.all(|area| area == first) {
            continue;
        }
        if features.peek().is_none() {
            beyond.push(component);
        }
        for feature in features {
            if !hidden.contains(&feature) {
                hidden.push(feature);
            }
        }
    }
    let order = |feature: &Feature| {
        (
            FeatureWord::all().position(|w| w == feature.word),
            feature.bit,
        )
    };
    hidden.sort_by_key(order);
    beyond
}

impl Level {
    /// What `cpuid=` of an xl configuration cannot hide, by name: the features in MSRs, and the
    /// [components](Self::components).
    pub fn beyond_cpuid(&self) -> Vec<String> {
        let features = self.hidden.iter();
        let features = features.filter(|feature| matches!(feature.word, FeatureWord::Msr { .. }));
        let components = self.components.iter().copied();
        features
            .map(ToString::to_string)
            .chain(components.map(rules::state_name))
            .collect()
    }

    /// The registers to change, each as xl takes it: `0x7,0:ebx=xxxx…`, 32 characters from bit 31
    /// down, `0` for a hidden feature and `x` for all others; the version of performance
    /// monitoring is set. A leaf without subleaves stands without one (`0x1:ecx=…`), as libxc looks
    /// for both numbers.
    ///
    /// C implementation: `libxl_cpuid_parse_config_xend` in `tools/libs/light/libxl_cpuid.c`.
    pub fn registers(&self) -> Vec<String> {
        let mut out = Vec::new();
        for word in FeatureWord::all() {
            let FeatureWord::Cpuid {
                leaf,
                subleaf,
                register,
            } = word
            else {
                continue;
            };
            let hidden = |bit: u8| self.hidden.contains(&Feature { word, bit });
            if !(0..32).any(hidden) {
                continue;
            }
            let bits = (0..32).rev();
            let bits: String = bits
                .map(|bit| if hidden(bit) { '0' } else { 'x' })
                .collect();
            out.push(match leaf {
                4 | 7 | 0xb | rules::XSTATE_LEAF => {
                    format!("{leaf:#x},{subleaf}:{register}={bits}")
                }
                _ => format!("{leaf:#x}:{register}={bits}"),
            });
        }
        if let Some(version) = self.monitoring {
            out.push(format!("0xa:eax={}{version:08b}", "x".repeat(24)));
        }
        out
    }
}

/// As a line of an xl configuration: `cpuid=["…","…"]`.
impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted: Vec<String> = self
            .registers()
            .iter()
            .map(|register| format!("\"{register}\""))
            .collect();
        write!(f, "cpuid=[{}]", quoted.join(","))
    }
}
