//! Names of the feature bits of CPUID and ARCH_CAPABILITIES.
//!
//! Specification: the processor makers' manuals. The names are those of Xen's public
//! `arch-x86/cpufeatureset.h` (4.22, and 4.14 to 4.21 for names that were removed), in lower case
//! and with `-` for `_`.

use std::fmt;

/// A CPUID register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        })
    }
}

/// A register that holds features, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FeatureWord {
    /// A register of a CPUID leaf. `subleaf` is 0 for a leaf without subleaves.
    Cpuid {
        /// The leaf.
        leaf: u32,
        /// The subleaf.
        subleaf: u32,
        /// The register.
        register: Register,
    },
    /// A model-specific register.
    Msr {
        /// Its number.
        index: u32,
    },
}

impl FeatureWord {
    /// The MSR ARCH_CAPABILITIES.
    pub const ARCH_CAPABILITIES: Self = Self::Msr { index: 0x10a };

    /// Every register that holds features of a guest's CPU.
    pub fn all() -> impl Iterator<Item = Self> {
        let cpuid = WORDS.iter().map(|word| Self::Cpuid {
            leaf: word.leaf,
            subleaf: word.subleaf,
            register: word.register,
        });
        cpuid.chain([Self::ARCH_CAPABILITIES, PLATFORM_INFO])
    }

    /// The names of its bits, from bit 0 on; `-` for a bit without one.
    fn names(self) -> impl Iterator<Item = &'static str> {
        let names = match self {
            Self::ARCH_CAPABILITIES => ARCH_CAPABILITIES,
            PLATFORM_INFO => PLATFORM_INFO_NAMES,
            Self::Msr { .. } => "",
            Self::Cpuid {
                leaf,
                subleaf,
                register,
            } => WORDS
                .iter()
                .find(|word| (word.leaf, word.subleaf, word.register) == (leaf, subleaf, register))
                .map_or("", |word| word.names),
        };
        names.split_ascii_whitespace()
    }
}

impl fmt::Display for FeatureWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpuid {
                leaf,
                subleaf: 0,
                register,
            } => write!(f, "CPUID leaf {leaf:#x} {register}"),
            Self::Cpuid {
                leaf,
                subleaf,
                register,
            } => write!(f, "CPUID leaf {leaf:#x} subleaf {subleaf} {register}"),
            Self::Msr { index } => write!(f, "MSR {index:#x}"),
        }
    }
}

/// A feature: one bit of a register.
///
/// Displayed as commonly written (`AVX512F`), or as its location if it has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Feature {
    /// The register.
    pub word: FeatureWord,
    /// The bit, 0–31 in a register of CPUID and 0–63 in an MSR.
    pub bit: u8,
}

impl Feature {
    /// The feature with this name, in any case and with `-` or `_`.
    pub fn named(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase().replace('_', "-");
        FeatureWord::all().filter(|_| name != "-").find_map(|word| {
            let bit = word.names().position(|known| known == name)?;
            let bit = u8::try_from(bit).ok()?;
            Some(Self { word, bit })
        })
    }

    /// Its name, in lower case and with `-`, as in [`features`]. `None` for a bit without one.
    pub fn name(self) -> Option<&'static str> {
        let name = self.word.names().nth(self.bit.into())?;
        (name != "-").then_some(name)
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(&name.to_ascii_uppercase().replace('-', "_")),
            None => write!(f, "bit {} of {}", self.bit, self.word),
        }
    }
}

/// MSR_INTEL_PLATFORM_INFO, of which a guest may see one bit.
const PLATFORM_INFO: FeatureWord = FeatureWord::Msr { index: 0xce };
const PLATFORM_INFO_NAMES: &str =
    "- - - - - - - - - - - - - - - - - - - - - - - - - - - - - - - cpuid-faulting";

/// The names of one register's bits, from bit 0 on; `-` for a bit without one.
struct Word {
    leaf: u32,
    subleaf: u32,
    register: Register,
    names: &'static str,
}

const WORDS: &[Word] = &[
    Word {
        leaf: 1,
        subleaf: 0,
        register: Register::Edx,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov \
                pat pse36 - clflush - ds acpi mmx fxsr sse sse2 ss htt tm1 - pbe",
    },
    Word {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        names: "sse3 pclmulqdq dtes64 monitor dscpl vmx smx eist tm2 ssse3 - \
                sdbg fma cx16 xtpr pdcm - pcid dca sse4-1 sse4-2 x2apic movbe \
                popcnt tsc-deadline aesni xsave osxsave avx f16c rdrand \
                hypervisor",
    },
    Word {
        leaf: 0xd,
        subleaf: 1,
        register: Register::Eax,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: Register::Ebx,
        names: "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excp-only smep bmi2 \
                erms invpcid rtm pqm no-fpu-sel mpx pqe avx512f avx512dq rdseed \
                adx smap avx512-ifma - clflushopt clwb proc-trace avx512pf \
                avx512er avx512cd sha avx512bw avx512vl",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: Register::Ecx,
        names: "prefetchwt1 avx512-vbmi umip pku ospke waitpkg avx512-vbmi2 \
                cet-ss gfni vaes vpclmulqdq avx512-vnni avx512-bitalg tme \
                avx512-vpopcntdq - la57 - - - - - rdpid - bld cldemote - movdiri \
                movdir64b enqcmd sgx-lc pks",
    },
    Word {
        leaf: 7,
        subleaf: 0,
        register: Register::Edx,
        names: "- sgx-keys avx512-4vnniw avx512-4fmaps fsrm uintr - - \
                avx512-vp2intersect srbds-ctrl md-clear rtm-always-abort - \
                tsx-force-abort serialize hybrid tsxldtrk - pconfig arch-lbr \
                cet-ibt - amx-bf16 avx512-fp16 amx-tile amx-int8 ibrsb stibp \
                l1d-flush arch-caps core-caps ssbd",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: Register::Eax,
        names: "sha512 sm3 sm4 - avx-vnni avx512-bf16 lass cmpccxadd \
                arch-perf-mon - fzrm fsrs fsrcs - - - - fred lkgs wrmsrns \
                nmi-src amx-fp16 - avx-ifma - - lam msrlist - - no-invd",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: Register::Ebx,
        names: "intel-ppin",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: Register::Ecx,
        // Xen compares it, but none of its bits has a name yet.
        names: "",
    },
    Word {
        leaf: 7,
        subleaf: 1,
        register: Register::Edx,
        names: "- - - - avx-vnni-int8 avx-ne-convert - - amx-complex - \
                avx-vnni-int16 - - - prefetchi - - uiret-uif cet-sss - - - - - \
                slsm",
    },
    Word {
        leaf: 7,
        subleaf: 2,
        register: Register::Edx,
        names: "intel-psfd ipred-ctrl rrsba-ctrl ddp-ctrl bhi-ctrl mcdt-no \
                uc-lock-dis",
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Edx,
        names: "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - \
                ffxsr page1gb rdtscp - lm 3dnowext 3dnow",
    },
    Word {
        leaf: 0x8000_0001,
        subleaf: 0,
        register: Register::Ecx,
        names: "lahf-lm cmp-legacy svm extapic cr8-legacy abm sse4a misalignsse \
                3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 - - nodeid-msr \
                - tbm topoext - - - dbext - - monitorx addr-msk-ext",
    },
    Word {
        leaf: 0x8000_0007,
        subleaf: 0,
        register: Register::Edx,
        names: "- - - - - - - hw-pstate itsc cpb efro",
    },
    Word {
        leaf: 0x8000_0008,
        subleaf: 0,
        register: Register::Ebx,
        names: "clzero - rstr-fp-err-ptrs - - - - - - wbnoinvd - - ibpb - ibrs \
                amd-stibp ibrs-always stibp-always ibrs-fast ibrs-same-mode \
                no-lmsl - - amd-ppin amd-ssbd virt-ssbd ssb-no cppc psfd btc-no \
                ibpb-ret",
    },
    Word {
        leaf: 0x8000_0021,
        subleaf: 0,
        register: Register::Eax,
        names: "no-nest-bp fs-gs-ns lfence-dispatch - - verw-clear nscb - \
                auto-ibrs - amd-fsrs amd-fsrc - - - - - cpuid-user-dis epsf \
                fsrsc amd-prefetchi - - avx512-bmm - - - sbpb ibpb-brtype \
                srso-no srso-us-no srso-msr-fix",
    },
    Word {
        leaf: 0x8000_0021,
        subleaf: 0,
        register: Register::Ecx,
        names: "- tsa-sq-no tsa-l1-no",
    },
];

/// MSR 0x10a.
const ARCH_CAPABILITIES: &str = "rdcl-no eibrs rsba skip-l1dfl intel-ssb-no mds-no if-pschange-mc-no tsx-ctrl \
    taa-no mcu-ctrl misc-pkg-ctrl energy-filtering doitm sbdr-ssdp-no fbsdp-no \
    psdp-no mcu-ext fb-clear fb-clear-ctrl rrsba bhi-no xapic-status - \
    ovrclk-status pbrsb-no gds-ctrl gds-no rfds-no rfds-clear ign-umonitor \
    mon-umon-mitg - pb-opt-ctrl - - - - - - - - - - - - - - - - - - - - - - - - \
    - - - - - its-no";

/// The features that `value` in a register of a leaf names: the name of each bit that is set, or
/// `bit N` for one without a name. `None` for a register that holds no features.
pub fn features(
    leaf: u32,
    subleaf: u32,
    register: Register,
    value: u32,
) -> Option<impl Iterator<Item = String>> {
    let word = WORDS
        .iter()
        .find(|word| word.leaf == leaf && word.subleaf == subleaf && word.register == register)?;
    Some(set(word.names, value.into()))
}

/// The features that `value` in the MSR ARCH_CAPABILITIES names, like [`features`].
pub fn arch_capabilities(value: u64) -> impl Iterator<Item = String> {
    set(ARCH_CAPABILITIES, value)
}

fn set(names: &'static str, value: u64) -> impl Iterator<Item = String> {
    let names = names.split_ascii_whitespace().chain(std::iter::repeat("-"));
    (0..u64::BITS)
        .zip(names)
        .filter(move |(bit, _)| value >> bit & 1 == 1)
        .map(|(bit, name)| match name {
            "-" => format!("bit {bit}"),
            name => name.to_owned(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(leaf: u32, subleaf: u32, register: Register, bits: &[u32]) -> Vec<String> {
        let value = bits.iter().fold(0, |value, bit| value | 1 << bit);
        features(leaf, subleaf, register, value)
            .map(Iterator::collect)
            .unwrap_or_default()
    }

    /// Well-known bits from the makers' manuals. The last one of a word shows that no name before
    /// it is missing.
    #[test]
    fn bits_have_the_names_of_the_manuals() {
        use Register::{Eax, Ebx, Ecx, Edx};
        assert_eq!(
            names(1, 0, Edx, &[0, 4, 26, 28]),
            ["fpu", "tsc", "sse2", "htt"]
        );
        assert_eq!(
            names(1, 0, Ecx, &[0, 21, 28, 30, 31]),
            ["sse3", "x2apic", "avx", "rdrand", "hypervisor"]
        );
        assert_eq!(
            names(7, 0, Ebx, &[5, 16, 30]),
            ["avx2", "avx512f", "avx512bw"]
        );
        assert_eq!(names(7, 0, Ecx, &[2, 16]), ["umip", "la57"]);
        assert_eq!(names(7, 0, Edx, &[26, 29]), ["ibrsb", "arch-caps"]);
        assert_eq!(names(0xd, 1, Eax, &[0, 3]), ["xsaveopt", "xsaves"]);
        assert_eq!(
            names(0x8000_0001, 0, Edx, &[11, 20, 29]),
            ["syscall", "nx", "lm"]
        );
        assert_eq!(names(0x8000_0001, 0, Ecx, &[2, 6]), ["svm", "sse4a"]);
        assert_eq!(names(0x8000_0007, 0, Edx, &[8]), ["itsc"]);
        assert_eq!(names(1, 0, Edx, &[10]), ["bit 10"]);
        assert_eq!(names(0x8000_0021, 0, Ecx, &[31]), ["bit 31"]);
        assert!(features(1, 0, Eax, 1).is_none());
        assert!(features(1, 1, Edx, 1).is_none());
    }

    #[test]
    fn arch_capabilities_has_the_names_of_the_manuals() {
        let value = 1 | 1 << 8 | 1 << 27 | 1 << 62 | 1 << 63;
        assert_eq!(
            arch_capabilities(value).collect::<Vec<_>>(),
            ["rdcl-no", "taa-no", "rfds-no", "its-no", "bit 63"]
        );
    }

    #[test]
    fn a_feature_is_found_by_its_name_and_shown_by_it() {
        let avx512f = Feature {
            word: FeatureWord::Cpuid {
                leaf: 7,
                subleaf: 0,
                register: Register::Ebx,
            },
            bit: 16,
        };
        for name in ["avx512f", "AVX512F"] {
            assert_eq!(Feature::named(name), Some(avx512f));
        }
        assert_eq!(avx512f.name(), Some("avx512f"));
        let shown = |name| Feature::named(name).map(|feature| feature.to_string());
        assert_eq!(shown("sse4_1").as_deref(), Some("SSE4_1"));
        assert_eq!(shown("its-no").as_deref(), Some("ITS_NO"));
        assert_eq!(shown("CPUID_FAULTING").as_deref(), Some("CPUID_FAULTING"));
        for none in ["", "-", "_", "avx1024", "bit 10"] {
            assert_eq!(Feature::named(none), None, "{none:?}");
        }
        let nameless = |word, bit| Feature { word, bit }.to_string();
        let subleaf = FeatureWord::Cpuid {
            leaf: 7,
            subleaf: 1,
            register: Register::Ecx,
        };
        assert_eq!(
            nameless(subleaf, 5),
            "bit 5 of CPUID leaf 0x7 subleaf 1 ecx"
        );
        assert_eq!(
            nameless(FeatureWord::Msr { index: 0xce }, 3),
            "bit 3 of MSR 0xce"
        );
    }

    /// No two features have the same name, so none hides another.
    #[test]
    fn no_two_features_have_one_name() {
        let mut names: Vec<&str> = FeatureWord::all()
            .flat_map(FeatureWord::names)
            .filter(|name| *name != "-")
            .collect();
        let all = names.len();
        assert!(all > 250, "{all}");
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }

    #[test]
    fn no_word_has_more_names_than_bits() {
        for word in WORDS {
            assert!(word.names.split(' ').count() <= 32);
        }
        assert!(ARCH_CAPABILITIES.split(' ').count() <= 64);
    }
}
