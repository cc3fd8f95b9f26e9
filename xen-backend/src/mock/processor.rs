//! The processor of the mock machine: features that it has in addition to the default ones, or
//! lacks, and their effect on the policies of guests.
//!
//! C implementation: `calculate_hvm_max_policy`, `recalculate_cpuid_policy` and
//! `recalculate_xstate` in `xen/arch/x86/cpu-policy.c`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use xsr_format::cpu_policy::CpuPolicy as Leaves;
use xsr_format::fields::x86::{Feature, FeatureWord, Register};
use xsr_format::record::x86::CpuidLeaf;

use super::policy;
use crate::{CpuPolicy, GuestKind};

/// A processor: the default one with features added or removed.
///
/// The text form is that of qemu's `-cpu`, `+avx512f,-avx2`, with Xen's names for features. Adding
/// a feature does not add those that it depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Processor {
    changes: Vec<(bool, Feature)>,
}

/// Text that does not describe a possible processor.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{0:?} is not a list of features: expected +NAME or -NAME, as in +avx512f,-avx2")]
pub struct BadProcessor(String);

impl FromStr for Processor {
    type Err = BadProcessor;

    fn from_str(text: &str) -> Result<Self, BadProcessor> {
        let words = text.split(',').filter(|word| !word.is_empty());
        let changes = words.map(|word| {
            let change = match word.split_at_checked(1) {
                Some(("+", name)) => Feature::named(name).map(|feature| (true, feature)),
                Some(("-", name)) => Feature::named(name).map(|feature| (false, feature)),
                _ => None,
            };
            change.ok_or_else(|| BadProcessor(word.to_owned()))
        });
        Ok(Self {
            changes: changes.collect::<Result<_, _>>()?,
        })
    }
}

impl TryFrom<String> for Processor {
    type Error = BadProcessor;

    fn try_from(text: String) -> Result<Self, BadProcessor> {
        text.parse()
    }
}

impl From<Processor> for String {
    fn from(processor: Processor) -> Self {
        processor.to_string()
    }
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, (has, feature)) in self.changes.iter().enumerate() {
            let comma = if n == 0 { "" } else { "," };
            let sign = if *has { '+' } else { '-' };
            write!(f, "{comma}{sign}{}", feature.name().unwrap_or_default())?;
        }
        Ok(())
    }
}

/// Features that Xen offers every guest, whatever the processor has.
const ALWAYS: [&str; 5] = ["htt", "cmp-legacy", "x2apic", "erms", "itsc"];
/// The same, for translated guests.
const ALWAYS_TRANSLATED: [&str; 2] = ["no-lmsl", "verw-clear"];
/// Features of the default processor that a guest gets only on request (`policy::host_policy`).
const ASKED_FOR: [&str; 2] = ["hle", "rtm"];
/// The same, for translated guests.
const ASKED_FOR_TRANSLATED: [&str; 3] = ["mpx", "vmx", "svm"];

/// AMD's copies of leaf 1's edx in that of 0x80000001 (`CPUID_COMMON_1D_FEATURES`): Xen makes them
/// for a guest, but the largest policy does not have them.
const COPIED: u32 = 0x0183_f3ff;
const FEATURES: FeatureWord = cpuid(1, Register::Edx);
const COPIES: FeatureWord = cpuid(0x8000_0001, Register::Edx);

const fn cpuid(leaf: u32, register: Register) -> FeatureWord {
    FeatureWord::Cpuid {
        leaf,
        subleaf: 0,
        register,
    }
}

/// Extended state components: number, the feature it belongs to, length and offset, in bytes.
const STATES: [(u32, &str, u32, u32); 7] = [
    (2, "avx", 0x100, 0x240),
    (3, "mpx", 0x40, 0x3c0),
    (4, "mpx", 0x40, 0x400),
    (5, "avx512f", 0x40, 0x440),
    (6, "avx512f", 0x200, 0x480),
    (7, "avx512f", 0x400, 0x680),
    (9, "pku", 0x8, 0xa80),
];
/// x87 and SSE, and the length of their area.
const FIRST_STATES: u32 = 3;
const FIRST_BYTES: u32 = 0x240;
const XSTATE: u32 = 0xd;

impl Processor {
    /// The policy of a new guest of this kind.
    pub(super) fn default_policy(&self, kind: GuestKind) -> CpuPolicy {
        let usual = policy::default_policy(kind);
        if self.changes.is_empty() {
            return usual;
        }
        let mut policy = leaves_of(&usual);
        self.change(&mut policy);
        encoded(&policy)
    }

    /// The largest policy for a guest of this kind.
    pub(super) fn max_policy(&self, kind: GuestKind) -> CpuPolicy {
        let mut policy = leaves_of(&policy::default_policy(kind));
        let translated = ALWAYS_TRANSLATED.iter().chain(&ASKED_FOR_TRANSLATED);
        let translated = translated.filter(|_| kind.is_translated());
        for feature in ALWAYS.iter().chain(&ASKED_FOR).chain(translated) {
            set_named(&mut policy, feature);
        }
        if let Some(word) = word_of(&mut policy, COPIES) {
            *word &= !COPIED;
        }
        for (word, most) in [
            (cpuid(0, Register::Eax), policy::MAX_BASIC),
            (cpuid(7, Register::Eax), policy::MAX_FEATURES),
            (cpuid(0x8000_0000, Register::Eax), policy::MAX_EXTENDED),
        ] {
            if let Some(word) = word_of(&mut policy, word) {
                *word = most;
            }
        }
        self.change(&mut policy);
        encoded(&policy)
    }

    /// The policy of a guest for which `asked` is set: without the features that the machine does
    /// not have. The rest is unchanged, and so is all of it if the machine has every feature.
    pub(super) fn clamp(&self, kind: GuestKind, asked: &CpuPolicy) -> CpuPolicy {
        let most = leaves_of(&self.max_policy(kind));
        let before = leaves_of(asked);
        let mut policy = before.clone();
        for word in FeatureWord::all() {
            let copied = match word {
                COPIES => policy.word(FEATURES) & u64::from(COPIED),
                _ => 0,
            };
            let given = most.word(word) | copied;
            match word {
                FeatureWord::Msr { index } => {
                    let entries = policy.msrs.iter_mut();
                    for entry in entries.filter(|entry| entry.index == index) {
                        entry.value &= given;
                    }
                }
                FeatureWord::Cpuid { .. } => {
                    if let Some(word) = word_of(&mut policy, word) {
                        *word &= u32::try_from(given).unwrap_or(u32::MAX);
                    }
                }
            }
        }
        if policy == before {
            return asked.clone();
        }
        derive_states(&mut policy);
        encoded(&policy)
    }

    fn change(&self, policy: &mut Leaves) {
        for (has, feature) in &self.changes {
            set(policy, *feature, *has);
        }
        derive_states(policy);
    }
}

fn leaves_of(policy: &CpuPolicy) -> Leaves {
    // A policy that ends inside an entry has been refused earlier, or is the machine's own.
    Leaves::parse(&policy.leaves, &policy.msrs).unwrap_or_default()
}

fn encoded(policy: &Leaves) -> CpuPolicy {
    let (leaves, msrs) = policy.encode();
    CpuPolicy { leaves, msrs }
}

/// A register of the policy, if it has the leaf.
fn word_of(policy: &mut Leaves, word: FeatureWord) -> Option<&mut u32> {
    let FeatureWord::Cpuid {
        leaf,
        subleaf,
        register,
    } = word
    else {
        return None;
    };
    policy.register_mut(leaf, subleaf, register)
}

fn set_named(policy: &mut Leaves, name: &str) {
    if let Some(feature) = Feature::named(name) {
        set(policy, feature, true);
    }
}

fn set(policy: &mut Leaves, Feature { word, bit }: Feature, has: bool) {
    match word {
        FeatureWord::Msr { index } => {
            let entries = policy.msrs.iter_mut();
            for entry in entries.filter(|entry| entry.index == index) {
                entry.value = entry.value & !(1 << bit) | u64::from(has) << bit;
            }
        }
        FeatureWord::Cpuid { leaf, subleaf, .. } => {
            if has && word_of(policy, word).is_none() {
                add_leaf(policy, leaf, subleaf);
            }
            if let Some(word) = word_of(policy, word) {
                *word = *word & !(1 << bit) | u32::from(has) << bit;
            }
        }
    }
}

/// Add a subleaf, and those before it, at the right place.
fn add_leaf(policy: &mut Leaves, leaf: u32, subleaf: u32) {
    for subleaf in 0..=subleaf {
        let place = |entry: &CpuidLeaf| (entry.leaf, entry.subleaf) < (leaf, subleaf);
        let at = policy.leaves.partition_point(place);
        let there = policy.leaves.get(at);
        if there.is_none_or(|there| (there.leaf, there.subleaf) != (leaf, subleaf)) {
            let new = leaf_with(leaf, subleaf, [0; 4]);
            policy.leaves.insert(at, new);
        }
    }
    if let Some(highest) = word_of(policy, cpuid(leaf, Register::Eax)).filter(|_| leaf == 7) {
        *highest = subleaf.max(*highest);
    }
}

const fn leaf_with(leaf: u32, subleaf: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
    CpuidLeaf {
        leaf,
        subleaf,
        eax,
        ebx,
        ecx,
        edx,
    }
}

/// Recompute the leaf of the extended state from the features, if it exists.
fn derive_states(policy: &mut Leaves) {
    let Some(at) = policy.leaves.iter().position(|entry| entry.leaf == XSTATE) else {
        return;
    };
    let kinds = policy.word(FeatureWord::Cpuid {
        leaf: XSTATE,
        subleaf: 1,
        register: Register::Eax,
    });
    let has = |name: &str| Feature::named(name).is_some_and(|feature| policy.has(feature));
    let parts = match has("xsave") {
        true => STATES.iter().filter(|(_, name, ..)| has(name)).collect(),
        false => Vec::new(),
    };
    let (states, bytes) = match has("xsave") {
        true => parts.iter().fold(
            (FIRST_STATES, FIRST_BYTES),
            |(states, bytes), (number, _, length, place)| {
                (states | 1 << number, bytes.max(place + length))
            },
        ),
        false => (0, 0),
    };
    let kinds = u32::try_from(kinds).unwrap_or(0);
    let mut leaves = vec![
        leaf_with(XSTATE, 0, [states, 0, bytes, 0]),
        leaf_with(XSTATE, 1, [kinds, 0, 0, 0]),
    ];
    // One subleaf for each number up to the last.
    for subleaf in 2..u32::BITS - states.leading_zeros().min(u32::BITS - 2) {
        let part = parts.iter().find(|(number, ..)| *number == subleaf);
        let registers = part.map_or([0; 4], |(_, _, length, place)| [*length, *place, 0, 0]);
        leaves.push(leaf_with(XSTATE, subleaf, registers));
    }
    policy.leaves.retain(|entry| entry.leaf != XSTATE);
    policy.leaves.splice(at..at, leaves);
}

#[cfg(test)]
mod tests {
    use xsr_format::cpu_policy::missing;

    use super::*;

    const KINDS: [GuestKind; 3] = [GuestKind::Pv, GuestKind::Hvm, GuestKind::Pvh];

    fn processor(text: &str) -> Processor {
        text.parse().unwrap()
    }

    fn names(image: &CpuPolicy, host: &CpuPolicy) -> Vec<String> {
        let all = missing(&leaves_of(image), &leaves_of(host));
        all.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_processor_is_written_as_it_is_read() {
        for text in ["", "+avx512f", "-avx2,+its-no,-sse4-1"] {
            assert_eq!(processor(text).to_string(), text);
        }
        assert_eq!(processor("-AVX2,+SSE4_1").to_string(), "-avx2,+sse4-1");
        for bad in ["avx2", "+", "-avx1024", "+bit 10", "+é"] {
            let error = bad.parse::<Processor>().unwrap_err();
            assert!(error.to_string().contains("+avx512f,-avx2"), "{error}");
        }
    }

    /// The derived extended state equals that of a real machine's image, from which `policy.rs`
    /// takes it.
    #[test]
    fn the_usual_processor_has_the_usual_policies() {
        for kind in KINDS {
            let usual = policy::default_policy(kind);
            let mut again = leaves_of(&usual);
            derive_states(&mut again);
            assert_eq!(encoded(&again), usual);
            assert_eq!(Processor::default().default_policy(kind), usual);
        }
    }

    #[test]
    fn a_guest_gets_no_more_than_the_most() {
        for text in ["", "+avx512f,+avx512bw", "-avx2,-pku", "+amx-tile"] {
            let processor = processor(text);
            for kind in KINDS {
                let (given, most) = (processor.default_policy(kind), processor.max_policy(kind));
                assert_eq!(names(&given, &most), [""; 0], "{text} {kind:?}");
                assert_eq!(processor.clamp(kind, &given), given, "{text} {kind:?}");
            }
        }
    }

    #[test]
    fn what_the_machine_does_not_have_is_cleared() {
        let (rich, poor) = (processor("+avx512f,+avx-vnni,+itsc"), processor("-avx"));
        for kind in KINDS {
            let asked = rich.default_policy(kind);
            let given = poor.clamp(kind, &asked);
            let lost = names(&asked, &given);
            assert_eq!(lost, ["AVX", "AVX512F", "AVX_VNNI"], "{kind:?}");
            assert_eq!(names(&asked, &poor.max_policy(kind)), lost, "{kind:?}");
            // Its extended state is removed as well.
            let leaf = |leaf, subleaf| {
                let leaves = leaves_of(&given).leaves;
                let mut leaves = leaves.into_iter();
                leaves.find(|l| (l.leaf, l.subleaf) == (leaf, subleaf))
            };
            let states = leaf(XSTATE, 0).unwrap();
            let expected = match kind.is_translated() {
                true => (0x203, 0xa88),
                false => (3, 0x240),
            };
            assert_eq!((states.eax, states.ecx), expected, "{kind:?}");
            assert!(leaf(XSTATE, 5).is_none_or(|part| (part.eax, part.ebx) == (0, 0)));
        }
    }
}
