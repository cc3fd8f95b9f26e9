//! CPU policy for a guest whose image holds none. Xen before 4.14 wrote none into images. The
//! receiving toolstack makes one up, from what a new guest gets and what such a guest may be using.
//!
//! Not taken over from C: the invariant TSC of a guest whose TSC is always emulated, because the
//! TSC's mode comes later in the stream; and settings of the configuration.
//!
//! C implementation: `xc_cpuid_apply_policy` with `restore` in `tools/libs/guest/xg_cpuid_x86.c`,
//! called from `libxl__cpuid_legacy`.

use std::collections::BTreeMap;

use xsr_format::byte_order::ByteOrder;
use xsr_format::cpu_policy::CpuPolicy as TypedPolicy;
use xsr_format::record::x86::{CpuidLeaf, CpuidPolicy};
use xsr_xen_backend::{BackendError, CpuPolicy, Domain};

const NO_SUBLEAF: u32 = TypedPolicy::NO_SUBLEAF;

/// The largest basic and extended leaf of Xen 4.13, and its only subleaf of leaf 7.
const MAX_BASIC: u32 = 0xd;
const MAX_EXTENDED: u32 = 0x8000_001c;
const ONLY_FEATURES: u32 = 0;

/// A bit of a register: leaf, subleaf, register from eax on, bit.
type Bit = (u32, u32, usize, u32);

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

const VMX: Bit = (1, NO_SUBLEAF, ECX, 5);
const RDRAND: Bit = (1, NO_SUBLEAF, ECX, 30);
const PAE: Bit = (1, NO_SUBLEAF, EDX, 6);
const HTT: Bit = (1, NO_SUBLEAF, EDX, 28);
const HLE: Bit = (7, 0, EBX, 4);
const RTM: Bit = (7, 0, EBX, 11);
const MPX: Bit = (7, 0, EBX, 14);
const CMP_LEGACY: Bit = (0x8000_0001, NO_SUBLEAF, ECX, 1);
const SVM: Bit = (0x8000_0001, NO_SUBLEAF, ECX, 2);
const ITSC: Bit = (0x8000_0007, NO_SUBLEAF, EDX, 8);

/// What a toolstack knows about the CPU of a guest whose image holds no CPU policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OlderGuest {
    /// Its features, as words of Xen's feature set (`xen/include/public/arch-x86/cpufeatureset.h`);
    /// `None` for those of a new guest, and in addition what Xen 4.13 would have given it.
    pub featureset: Option<Vec<u32>>,
    /// Whether it may use hardware virtualisation itself. A feature set includes this.
    pub nested: bool,
}

/// The registers that correspond to the words of a feature set, up to the last that Xen 4.13 had
/// and its guests can see.
const WORDS: [(u32, u32, usize); 10] = [
    (1, NO_SUBLEAF, EDX),
    (1, NO_SUBLEAF, ECX),
    (0x8000_0001, NO_SUBLEAF, EDX),
    (0x8000_0001, NO_SUBLEAF, ECX),
    (0xd, 1, EAX),
    (7, 0, EBX),
    (7, 0, ECX),
    (0x8000_0007, NO_SUBLEAF, EDX),
    (0x8000_0008, NO_SUBLEAF, EBX),
    (7, 0, EDX),
];

/// Replaces Xen's default policy of a domain by the one that a guest of an older Xen expects.
pub(crate) fn set(domain: &dyn Domain, older: &OlderGuest) -> Result<(), BackendError> {
    let translated = domain.info()?.kind.is_translated();
    let host = Leaves::decode(&domain.host_cpu_policy()?.leaves);
    let mut guest = Leaves::decode(&domain.cpu_policy()?.leaves);
    guest.make_older(&host, translated, older);
    domain.set_cpu_policy(&CpuPolicy {
        leaves: guest.encode(),
        msrs: Vec::new(),
    })
}

/// A policy's CPUID leaves: leaf and subleaf, and the four registers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Leaves(BTreeMap<(u32, u32), [u32; 4]>);

impl Leaves {
    fn decode(bytes: &[u8]) -> Self {
        let whole = bytes.len() - bytes.len() % CpuidPolicy::LEAF_BYTES;
        let policy = TypedPolicy::parse(&bytes[..whole], &[]).unwrap_or_default();
        let leaves = policy.leaves.iter();
        let leaves = leaves.map(|l| ((l.leaf, l.subleaf), [l.eax, l.ebx, l.ecx, l.edx]));
        Self(leaves.collect())
    }

    fn encode(&self) -> Vec<u8> {
        let leaves = self.0.iter().map(|((leaf, subleaf), registers)| {
            let [eax, ebx, ecx, edx] = *registers;
            CpuidLeaf {
                leaf: *leaf,
                subleaf: *subleaf,
                eax,
                ebx,
                ecx,
                edx,
            }
        });
        leaves
            .flat_map(|leaf| leaf.encode(ByteOrder::Little))
            .collect()
    }

    fn has(&self, (leaf, subleaf, register, bit): Bit) -> bool {
        let registers = self.0.get(&(leaf, subleaf));
        registers.is_some_and(|registers| registers[register] >> bit & 1 == 1)
    }

    fn put(&mut self, (leaf, subleaf, register, bit): Bit, on: bool) {
        let word = &mut self.0.entry((leaf, subleaf)).or_default()[register];
        *word = *word & !(1 << bit) | u32::from(on) << bit;
    }

    /// Removes the leaves of a range above the largest one allowed, and adjusts its first leaf.
    fn clamp(&mut self, first: u32, most: u32) {
        if let Some(registers) = self.0.get_mut(&(first, NO_SUBLEAF)) {
            registers[EAX] = registers[EAX].min(most);
        }
        let beyond = |leaf: u32| leaf >> 28 == first >> 28 && leaf > most;
        self.0.retain(|(leaf, _), _| !beyond(*leaf));
    }

    fn make_older(&mut self, host: &Self, translated: bool, older: &OlderGuest) {
        for bit in [RDRAND, HLE, RTM] {
            self.put(bit, host.has(bit));
        }
        if translated {
            self.put(MPX, host.has(MPX));
        }
        self.clamp(0, MAX_BASIC);
        self.clamp(0x8000_0000, MAX_EXTENDED);
        if let Some(registers) = self.0.get_mut(&(7, 0)) {
            registers[EAX] = ONLY_FEATURES;
        }
        self.0
            .retain(|(leaf, subleaf), _| *leaf != 7 || *subleaf == ONLY_FEATURES);
        match &older.featureset {
            Some(words) => {
                for (word, (leaf, subleaf, register)) in words.iter().zip(WORDS) {
                    self.0.entry((leaf, subleaf)).or_default()[register] = *word;
                }
            }
            None => {
                self.put(ITSC, false);
                if translated && !older.nested {
                    self.put(VMX, false);
                    self.put(SVM, false);
                }
            }
        }
        if translated {
            self.hide_threads();
        } else {
            // Without CPUID faulting, a PV guest sees the host's topology anyway.
            for bit in [HTT, CMP_LEGACY] {
                self.put(bit, host.has(bit));
            }
        }
    }

    /// Makes each vcpu a core of its own, with an APIC id of twice its number.
    fn hide_threads(&mut self) {
        for (bit, on) in [(PAE, true), (HTT, true), (CMP_LEGACY, false)] {
            self.put(bit, on);
        }
        // Leaf 1, ebx 23-16: the most logical processors in a package.
        let ebx = &mut self.0.entry((1, NO_SUBLEAF)).or_default()[EBX];
        let doubled = match *ebx >> 16 & 0xff {
            0 => 2,
            many @ 0x80.. => many,
            few => few * 2,
        };
        *ebx = *ebx & !(0xff << 16) | doubled << 16;
        match self.vendor() {
            b"GenuineIntel" => self.double_cores_of_caches(),
            b"AuthenticAMD" | b"HygonGenuine" => self.double_cores(),
            _ => {}
        }
    }

    /// Twelve characters, in ebx, edx and ecx.
    fn vendor(&self) -> &'static [u8] {
        const KNOWN: [&[u8; 12]; 3] = [b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine"];
        let [_, ebx, ecx, edx] = self.0.get(&(0, NO_SUBLEAF)).copied().unwrap_or_default();
        let name: Vec<u8> = [ebx, edx, ecx]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let known = KNOWN.into_iter().find(|known| known[..] == name[..]);
        known.map_or(b"", |known| &known[..])
    }

    /// Leaf 4, with a subleaf for each cache, until one without a type (eax 4-0): doubles the cores
    /// in a package (eax 31-26, less one), and sets one thread for each cache (eax 25-14, less
    /// one).
    fn double_cores_of_caches(&mut self) {
        for (_, registers) in self.0.range_mut((4, 0)..=(4, NO_SUBLEAF)) {
            if registers[EAX] & 0x1f == 0 {
                break;
            }
            let cores = (registers[EAX] >> 26) << 1 | 1;
            registers[EAX] = registers[EAX] & 0x3fff | cores << 26;
        }
    }

    /// Leaf 0x80000008: doubles the cores (ecx 7-0, less one) if there is room, and adjusts the
    /// size of a core's number (ecx 15-12), up to 7: larger ones cause trouble on some systems.
    fn double_cores(&mut self) {
        let Some(registers) = self.0.get_mut(&(0x8000_0008, NO_SUBLEAF)) else {
            return;
        };
        let ecx = registers[ECX];
        let (cores, size) = (ecx & 0xff, ecx >> 12 & 0xf);
        if cores < 0x7f {
            let size = if (1..7).contains(&size) {
                size + 1
            } else {
                size
            };
            registers[ECX] = ecx & !0xf0ff | size << 12 | cores << 1 | 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTEL: [u32; 4] = [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    const AMD: [u32; 4] = [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65];

    fn leaves(of: &[(u32, u32, [u32; 4])]) -> Leaves {
        Leaves(
            of.iter()
                .map(|(leaf, subleaf, r)| ((*leaf, *subleaf), *r))
                .collect(),
        )
    }

    fn host() -> Leaves {
        leaves(&[
            (1, NO_SUBLEAF, [0, 0, 1 << 30, 1 << 28]),
            (7, 0, [2, 1 << 4 | 1 << 14, 0, 0]),
            (0x8000_0001, NO_SUBLEAF, [0, 0, 1 << 1 | 1 << 2, 0]),
        ])
    }

    #[test]
    fn an_intel_guest_keeps_what_it_used_and_sees_no_newer_leaves() {
        let mut guest = leaves(&[
            (0, NO_SUBLEAF, INTEL),
            (1, NO_SUBLEAF, [0, 8 << 16 | 0x800, 1 << 5, 0]),
            // A cache of 2 cores with 2 threads each, another, and the end.
            (4, 0, [1 << 26 | 3 << 14 | 0x121, 7, 8, 9]),
            (4, 1, [0x122, 0, 0, 0]),
            (4, 2, [0; 4]),
            (7, 0, [2, 1 << 11, 5, 6]),
            (7, 1, [1; 4]),
            (0xd, 0, [7, 0, 0x340, 0]),
            (0x14, NO_SUBLEAF, [1; 4]),
            (0x4000_0000, NO_SUBLEAF, [1; 4]),
            (0x8000_0000, NO_SUBLEAF, [0x8000_0021, 0, 0, 0]),
            (0x8000_0001, NO_SUBLEAF, [0; 4]),
            (0x8000_001d, 0, [1; 4]),
        ]);
        guest.make_older(&host(), true, &OlderGuest::default());
        let expected = leaves(&[
            (0, NO_SUBLEAF, [0xd, INTEL[1], INTEL[2], INTEL[3]]),
            (
                1,
                NO_SUBLEAF,
                [0, 16 << 16 | 0x800, 1 << 30, 1 << 6 | 1 << 28],
            ),
            (4, 0, [3 << 26 | 0x121, 7, 8, 9]),
            (4, 1, [1 << 26 | 0x122, 0, 0, 0]),
            (4, 2, [0; 4]),
            // HLE and MPX as on the host; without RTM, which the host lacks.
            (7, 0, [0, 1 << 4 | 1 << 14, 5, 6]),
            (0xd, 0, [7, 0, 0x340, 0]),
            (0x4000_0000, NO_SUBLEAF, [1; 4]),
            (0x8000_0000, NO_SUBLEAF, [0x8000_001c, 0, 0, 0]),
            (0x8000_0001, NO_SUBLEAF, [0; 4]),
            (0x8000_0007, NO_SUBLEAF, [0; 4]),
        ]);
        assert_eq!(guest, expected);
        assert_eq!(Leaves::decode(&guest.encode()), guest);
    }

    #[test]
    fn an_amd_guest_has_twice_the_cores_where_there_is_room() {
        for (ecx, expected) in [
            (0x1001, 0x2003),
            (0x0003, 0x0007),
            (0x7003, 0x7007),
            (0x707f, 0x707f),
        ] {
            let mut guest = leaves(&[
                (0, NO_SUBLEAF, AMD),
                (0x8000_0008, NO_SUBLEAF, [0x3028, 0, ecx, 0]),
            ]);
            guest.make_older(&host(), true, &OlderGuest::default());
            let registers = guest.0[&(0x8000_0008, NO_SUBLEAF)];
            assert_eq!(registers, [0x3028, 0, expected, 0], "{ecx:#x}");
        }
        for (processors, expected) in [(0, 2), (0x40, 0x80), (0x80, 0x80), (0xff, 0xff)] {
            let mut guest = leaves(&[(1, NO_SUBLEAF, [0, processors << 16, 0, 0])]);
            guest.make_older(&host(), true, &OlderGuest::default());
            assert_eq!(guest.0[&(1, NO_SUBLEAF)][EBX] >> 16, expected);
        }
    }

    #[test]
    fn a_pv_guest_sees_the_topology_of_the_host() {
        let mut guest = leaves(&[
            (0, NO_SUBLEAF, AMD),
            (1, NO_SUBLEAF, [0, 1 << 16, 0, 0]),
            (0x8000_0008, NO_SUBLEAF, [0, 0, 0x1001, 0]),
        ]);
        guest.make_older(&host(), false, &OlderGuest::default());
        let expected = leaves(&[
            (0, NO_SUBLEAF, [0xd, AMD[1], AMD[2], AMD[3]]),
            (1, NO_SUBLEAF, [0, 1 << 16, 1 << 30, 1 << 28]),
            (7, 0, [0, 1 << 4, 0, 0]),
            (0x8000_0001, NO_SUBLEAF, [0, 0, 1 << 1, 0]),
            (0x8000_0007, NO_SUBLEAF, [0; 4]),
            (0x8000_0008, NO_SUBLEAF, [0, 0, 0x1001, 0]),
        ]);
        assert_eq!(guest, expected);
    }

    #[test]
    fn a_feature_set_says_all_and_without_one_virtualisation_is_the_toolstacks_choice() {
        let fresh = || {
            leaves(&[
                (0, NO_SUBLEAF, INTEL),
                (1, NO_SUBLEAF, [0, 1 << 16, 1 << 5, 0]),
                (7, 0, [2, 0, 0, 0]),
                (7, 1, [1; 4]),
            ])
        };
        let mut guest = fresh();
        let featureset = Some(vec![1, 2, 3, 4, 5, 6, 7, 1 << 8, 9, 10, 11, 12]);
        let older = OlderGuest {
            featureset,
            nested: false,
        };
        guest.make_older(&host(), true, &older);
        for ((leaf, subleaf, register), word) in WORDS.into_iter().zip([
            // HTT and PAE, as for every guest of an older Xen.
            1 | 1 << 6 | 1 << 28,
            2,
            3,
            // Without CMP_LEGACY, which is bit 1.
            4,
            5,
            6,
            7,
            1 << 8,
            9,
            10,
        ]) {
            assert_eq!(guest.0[&(leaf, subleaf)][register], word, "{leaf:#x}");
        }
        assert!(!guest.0.contains_key(&(7, 1)));
        for nested in [false, true] {
            let mut guest = fresh();
            let older = OlderGuest {
                featureset: None,
                nested,
            };
            guest.make_older(&host(), true, &older);
            assert_eq!(guest.has(VMX), nested);
        }
    }
}
