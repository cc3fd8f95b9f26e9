//! Whether a domain fits on a host, before anything is touched.
//!
//! Xen itself checks next to nothing: it silently clears CPU features that the host lacks, and a
//! restore that runs out of memory has already taken most of it. A plan compares what a domain
//! needs ([`Needs`]) with what a host has ([`HostFacts`]). The facts can come from another host: a
//! caller carries them there.
//!
//! ```
//! use xsr_save_restore::plan::{Answer, HostFacts, Needs, Subject, plan};
//! use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
//! use xsr_xen_backend::{Host, GuestKind};
//!
//! # let dir = tempfile::tempdir()?;
//! let host = MockHost::create(&dir.path().join("a"), &HostConfig::default())?;
//! let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
//! let needs = Needs::of_domain(&*host.domain(domid)?)?;
//!
//! let without = HostConfig { processor: "-avx2".parse()?, ..HostConfig::default() };
//! let other = MockHost::create(&dir.path().join("b"), &without)?;
//! let checks = plan(&needs, &HostFacts::of(&other)?);
//! let cpu = checks.iter().find(|check| check.subject == Subject::Cpu).ok_or("no check")?;
//! assert_eq!(cpu.answer, Answer::No);
//! assert!(cpu.text.contains("AVX2"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! C implementation: none.

use std::fmt;

use xsr_format::cpu_policy::{self, CpuPolicy, Missing, NEEDS_HAP, NEEDS_NESTED};
use xsr_format::fields::hvm::{HvmContext, HvmRecordKind};
use xsr_format::fields::x86::Feature;
use xsr_format::guest_image::GuestImage;
use xsr_format::survey::Survey;
use xsr_xen_backend::{
    BackendError, CpuPolicy as Bytes, Domain, DomainInfo, GuestKind, Host, PhysInfo,
    ShutdownReason, XenVersion,
};

use crate::guest::refused;

/// What a host has for its domains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFacts {
    /// The version of Xen.
    pub xen: XenVersion,
    /// Memory, clock and capabilities.
    pub physinfo: PhysInfo,
    /// The most that a PV guest can see of the processor; `None` if there are no such guests.
    pub pv: Option<CpuPolicy>,
    /// The same for HVM and PVH guests.
    pub hvm: Option<CpuPolicy>,
}

impl HostFacts {
    /// Asks a host.
    ///
    /// # Errors
    ///
    /// The hypervisor refuses.
    pub fn of(host: &dyn Host) -> Result<Self, BackendError> {
        let physinfo = host.physinfo()?;
        let most = |there: bool, kind| match there {
            true => host.max_cpu_policy(kind).map(parse),
            false => Ok(None),
        };
        Ok(Self {
            xen: host.xen_version()?,
            pv: most(physinfo.pv, GuestKind::Pv)?,
            hvm: most(physinfo.hvm, GuestKind::Hvm)?,
            physinfo,
        })
    }

    /// The most that a guest can see of the processor: one of this kind, with or without HAP if the
    /// host has it, and with or without guests of its own.
    pub fn largest_policy(&self, kind: GuestKind, hap: bool, nested: bool) -> Option<CpuPolicy> {
        let mut most = match kind.is_translated() {
            true => self.hvm.clone()?,
            false => return self.pv.clone(),
        };
        if !(hap && self.physinfo.hap) {
            most.remove(&named(&NEEDS_HAP));
        }
        if !nested {
            most.remove(&named(&NEEDS_NESTED));
        }
        Some(most)
    }
}

/// `None` for a policy that ends inside an entry, as no Xen gives it.
fn parse(policy: Bytes) -> Option<CpuPolicy> {
    CpuPolicy::parse(&policy.leaves, &policy.msrs).ok()
}

/// What a domain needs of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Needs {
    /// Its kind.
    pub kind: GuestKind,
    /// Number of vcpus.
    pub vcpus: u32,
    /// Pages that have memory.
    pub pages: u64,
    /// KiB that Xen needs besides for its page tables; `None` for what libxl would set.
    pub shadow_memory_kib: Option<u64>,
    /// The CPU that the guest has seen. Empty if that is not known.
    pub cpu: CpuPolicy,
    /// Frequency of the TSC that the guest has seen, in kHz; 0 if that is not known.
    pub tsc_khz: u32,
    /// Whether the guest always sees the processor's own TSC (`tsc_mode="native"`).
    pub tsc_native: bool,
    /// The Xen that the guest comes from.
    pub xen: Option<XenVersion>,
    /// Whether the guest shall have HAP; `None` if the host decides.
    pub hap: Option<bool>,
    /// Whether the guest runs guests itself.
    pub nested: bool,
    /// Components of the XSAVE area that its vcpus have used, one bit each, as in XCR0. Only known
    /// of an image.
    pub used_state: u64,
    /// What the guest is doing.
    pub activity: Activity,
}

/// What a guest is doing, which decides whether it can be suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Activity {
    /// Nothing: it is in an image.
    Saved,
    /// It runs.
    Running,
    /// A toolstack has paused it.
    Paused,
    /// It has shut down, for this reason.
    Down(ShutdownReason),
    /// It is being destroyed.
    Dying,
}

impl From<&DomainInfo> for Activity {
    fn from(info: &DomainInfo) -> Self {
        match info.shutdown {
            _ if info.dying => Self::Dying,
            Some(reason) => Self::Down(reason),
            None if info.paused => Self::Paused,
            None => Self::Running,
        }
    }
}

/// `TSC_MODE_NEVER_EMULATE` of `xen/arch/x86/include/asm/time.h`.
const TSC_NATIVE: u32 = 2;

impl Needs {
    /// What a domain on this machine needs.
    ///
    /// # Errors
    ///
    /// The hypervisor refuses.
    pub fn of_domain(domain: &dyn Domain) -> Result<Self, BackendError> {
        let info = domain.info()?;
        let tsc = domain.tsc_info()?;
        Ok(Self {
            kind: info.kind,
            vcpus: info.max_vcpu_id.saturating_add(1),
            pages: info.tot_pages,
            shadow_memory_kib: None,
            cpu: parse(domain.cpu_policy()?).unwrap_or_default(),
            tsc_khz: tsc.khz,
            tsc_native: tsc.mode == TSC_NATIVE,
            xen: Some(domain.xen_version()?),
            hap: None,
            nested: false,
            used_state: 0,
            activity: Activity::from(&info),
        })
    }

    /// What the domain in an image needs, as a domain of this kind.
    pub fn of_image(survey: &Survey, kind: GuestKind) -> Self {
        let guest = &survey.guest;
        let xen = survey.xen().and_then(|(major, minor)| {
            Some(XenVersion {
                major: major.try_into().ok()?,
                minor: minor.try_into().ok()?,
            })
        });
        Self {
            kind,
            vcpus: survey.vcpus(),
            pages: survey.populated_pages,
            shadow_memory_kib: None,
            cpu: CpuPolicy {
                leaves: guest.cpuid().to_vec(),
                msrs: guest.msrs().to_vec(),
            },
            tsc_khz: guest.tsc().map_or(0, |tsc| tsc.khz),
            tsc_native: guest.tsc().is_some_and(|tsc| tsc.mode == TSC_NATIVE),
            xen,
            hap: None,
            nested: false,
            used_state: used_state(guest),
            activity: Activity::Saved,
        }
    }

    /// Pages that Xen needs besides the guest's own.
    ///
    /// C implementation: `libxl__get_required_paging_memory` in `tools/libs/light/libxl_create.c`, and
    /// for the domain itself `libxl_domain_need_memory`.
    pub fn overhead_pages(&self) -> u64 {
        const DOMAIN_KIB: u64 = 2048;
        let mib = self.pages.div_ceil(256);
        let tables = match (self.shadow_memory_kib, self.kind.is_translated()) {
            (Some(kib), true) => kib,
            (None, true) => {
                let vcpus = u64::from(self.vcpus).saturating_mul(256);
                vcpus
                    .saturating_add(mib.saturating_mul(2))
                    .saturating_mul(4)
            }
            (_, false) => 0,
        };
        tables.saturating_add(DOMAIN_KIB).div_ceil(4)
    }
}

/// The components of the XSAVE area that any vcpu has ever enabled: `xcr0_accum` in the state of
/// each.
fn used_state(guest: &GuestImage) -> u64 {
    let word = |state: &[u8], at: usize| {
        let bytes = state.get(at..).and_then(|rest| rest.first_chunk());
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let pv = guest.vcpus().values().map(|vcpu| word(&vcpu.xsave, 8));
    // `struct hvm_hw_cpu_xsave` has another mask before.
    let hvm = HvmContext::new(guest.hvm_context())
        .map_while(Result::ok)
        .filter(|record| record.kind == HvmRecordKind::CPU_XSAVE)
        .map(|record| word(record.body, 16));
    pv.chain(hvm).fold(0, |all, used| all | used)
}

/// What a check is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Subject {
    /// Whether the guest can be suspended.
    State,
    /// Whether the host runs guests of this kind.
    Kind,
    /// The number of vcpus.
    Vcpus,
    /// CPUID leaves and MSRs.
    Cpu,
    /// The frequency of the TSC.
    Tsc,
    /// Free memory.
    Memory,
    /// Versions of Xen.
    Xen,
    /// Free space for the image, which a caller checks.
    Space,
    /// The disks of the guest, which a caller checks.
    Disks,
    /// What the domain's configuration says, which a caller checks.
    Configuration,
}

impl Subject {
    /// A word for it, in text and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::State => "state",
            Self::Kind => "kind",
            Self::Vcpus => "vcpus",
            Self::Cpu => "cpu",
            Self::Tsc => "tsc",
            Self::Memory => "memory",
            Self::Xen => "xen",
            Self::Space => "space",
            Self::Disks => "disks",
            Self::Configuration => "config",
        }
    }
}

/// The result of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// It fits.
    Yes,
    /// It works, but not as before.
    Warning,
    /// What is needed to tell is missing.
    Unknown,
    /// It does not fit.
    No,
}

impl Answer {
    /// A word for it, in text and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Yes => "yes",
            Self::Warning => "warning",
            Self::Unknown => "unknown",
            Self::No => "no",
        }
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// One comparison, and its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What it is about.
    pub subject: Subject,
    /// Whether it fits.
    pub answer: Answer,
    /// The reason, with both sides' values.
    pub text: String,
    /// The parts of the CPU that are missing, for [`Subject::Cpu`].
    pub missing: Vec<Missing>,
}

impl Check {
    /// A check without [`Check::missing`].
    pub const fn new(subject: Subject, answer: Answer, text: String) -> Self {
        Self {
            subject,
            answer,
            text,
            missing: Vec::new(),
        }
    }
}

/// Compares what a domain needs with what a host has. Every check is made, whatever the others
/// find.
pub fn plan(needs: &Needs, host: &HostFacts) -> Vec<Check> {
    let others = [
        kind(needs, host),
        vcpus(needs),
        cpu(needs, host),
        tsc(needs, host),
        memory(needs, host),
        xen(needs, host),
    ];
    state(needs).into_iter().chain(others).collect()
}

/// Whether the guest can be suspended; `None` for one in an image.
fn state(needs: &Needs) -> Option<Check> {
    let (answer, text) = match needs.activity {
        Activity::Saved => return None,
        Activity::Running => (Answer::Yes, "it is running".to_owned()),
        // A guest without PV drivers is suspended without its help.
        Activity::Paused if needs.kind == GuestKind::Hvm => (
            Answer::Warning,
            "it is paused, so its PV drivers cannot suspend it: unpause it first, if it has any"
                .to_owned(),
        ),
        Activity::Paused => (
            Answer::No,
            "it is paused, and a paused domain cannot suspend: unpause it first".to_owned(),
        ),
        Activity::Down(ShutdownReason::Suspend) => (
            Answer::No,
            "it is suspended: it is being saved or migrated, or that has failed".to_owned(),
        ),
        Activity::Down(reason) => (Answer::No, format!("it has shut down ({reason})")),
        Activity::Dying => (Answer::No, "it is being destroyed".to_owned()),
    };
    Some(Check::new(Subject::State, answer, text))
}

fn kind(needs: &Needs, host: &HostFacts) -> Check {
    let name = needs.kind.name();
    let there = match needs.kind.is_translated() {
        true => host.physinfo.hvm,
        false => host.physinfo.pv,
    };
    let hap = host.physinfo.hap || host.physinfo.shadow;
    let (answer, text) = match (there, needs.kind.is_translated() && !hap) {
        (false, _) => (Answer::No, format!("the host runs no {name} guests")),
        (true, true) => {
            let why = "it has neither HAP nor shadow paging for their page tables";
            (Answer::No, format!("the host runs no {name} guests: {why}"))
        }
        (true, false) => (Answer::Yes, format!("the host runs {name} guests")),
    };
    Check::new(Subject::Kind, answer, text)
}

fn vcpus(needs: &Needs) -> Check {
    let (has, most) = (needs.vcpus, needs.kind.max_vcpus());
    let answer = match has <= most {
        true => Answer::Yes,
        false => Answer::No,
    };
    let name = needs.kind.name();
    let text = format!("{has}; {name} guests can have {most}");
    Check::new(Subject::Vcpus, answer, text)
}

/// In a text, features beyond this number are only counted; [`Check::missing`] has them all.
const MOST_NAMES: usize = 16;

fn cpu(needs: &Needs, host: &HostFacts) -> Check {
    let check = |answer, text: String| Check::new(Subject::Cpu, answer, text);
    let hap = needs.hap != Some(false);
    let most = host.largest_policy(needs.kind, hap, needs.nested);
    if needs.cpu.leaves.is_empty() && needs.cpu.msrs.is_empty() {
        let lost = (most.as_ref()).map_or(Vec::new(), |most| most.lacking_state(needs.used_state));
        if !lost.is_empty() {
            let list = refused::list(&lost, MOST_NAMES);
            return check(
                Answer::No,
                format!("the guest has used what the host lacks: {list}"),
            );
        }
        let why = "the guest's CPU policy is not known (Xen before 4.14 saved none): it gets the \
                   host's, and may crash if it has seen more";
        return check(Answer::Unknown, why.to_owned());
    }
    let Some(most) = most else {
        let name = needs.kind.name();
        return check(
            Answer::Unknown,
            format!("the CPU features for {name} guests on the host are not known"),
        );
    };
    let shadow = needs.kind.is_translated() && !(host.physinfo.hap && hap);
    let missing = cpu_policy::missing(&needs.cpu, &most);
    if missing.is_empty() {
        return check(
            Answer::Yes,
            "the host has all that the guest has seen".to_owned(),
        );
    }
    let names: Vec<String> = missing.iter().map(ToString::to_string).collect();
    let shadowed = match shadow {
        true => " (shadow paging takes away what needs HAP)",
        false => "",
    };
    let list = refused::list(&names, MOST_NAMES);
    Check {
        missing,
        ..check(
            Answer::No,
            format!("the guest has seen what the host lacks{shadowed}: {list}"),
        )
    }
}

fn named(names: &[&str]) -> Vec<Feature> {
    names
        .iter()
        .filter_map(|name| Feature::named(name))
        .collect()
}

/// C implementation: `tsc_set_info` in `xen/arch/x86/time.c`.
fn tsc(needs: &Needs, host: &HostFacts) -> Check {
    let (seen, has) = (needs.tsc_khz, host.physinfo.cpu_khz);
    let (answer, text) = if needs.tsc_native && seen == 0 {
        (
            Answer::Unknown,
            "the guest reads the processor's own TSC, whose frequency may differ".to_owned(),
        )
    } else if seen == 0 || has == 0 {
        (Answer::Unknown, "the frequency is not known".to_owned())
    } else if seen == has {
        (Answer::Yes, format!("{has} kHz, as the guest has seen it"))
    } else if needs.tsc_native {
        let why = "never emulated: its clock may run wrong";
        (
            Answer::Warning,
            format!("the guest has seen {seen} kHz, the host has {has} kHz, and the TSC is {why}"),
        )
    } else {
        (
            Answer::Warning,
            format!(
                "the guest has seen {seen} kHz, the host has {has} kHz: the processor scales the \
                 TSC if it can, otherwise Xen emulates each read, which is slower"
            ),
        )
    };
    Check::new(Subject::Tsc, answer, text)
}

fn memory(needs: &Needs, host: &HostFacts) -> Check {
    let overhead = needs.overhead_pages();
    let needed = needs.pages.saturating_add(overhead);
    let available = host.physinfo.available_pages();
    let mib = |pages: u64| pages.div_ceil(256);
    let claimed = match host.physinfo.outstanding_pages {
        0 => String::new(),
        pages => format!(" ({} MiB more are claimed for other domains)", mib(pages)),
    };
    let needs = format!(
        "the guest needs {} MiB and Xen {} MiB for it",
        mib(needs.pages),
        mib(overhead)
    );
    let (answer, text) = match needed <= available {
        true => (
            Answer::Yes,
            format!("{needs}; {} MiB are free{claimed}", available / 256),
        ),
        false if needed > host.physinfo.total_pages => (
            Answer::No,
            format!(
                "{needs}, and the host has only {} MiB in all",
                host.physinfo.total_pages / 256
            ),
        ),
        // libxl takes it from the control domain, unless that has a fixed size.
        false => (
            Answer::Warning,
            format!(
                "{needs}, and only {} MiB are free{claimed}: the rest must come from the control \
                 domain or from other domains",
                available / 256
            ),
        ),
    };
    Check::new(Subject::Memory, answer, text)
}

/// Xen 4.21.0 and 4.21.1 lose r8 to r15 of PV guests that they save (9f892f84c2, mended by
/// d5ad2233bb).
const LOSES_REGISTERS: XenVersion = XenVersion {
    major: 4,
    minor: 21,
};

fn xen(needs: &Needs, host: &HostFacts) -> Check {
    let there = host.xen;
    let has = |xen: XenVersion| xen == LOSES_REGISTERS;
    let (answer, text) = match needs.xen {
        None => (
            Answer::Unknown,
            format!("the host has Xen {there}; the guest's is not known"),
        ),
        Some(xen) if has(xen) && needs.kind == GuestKind::Pv => (
            Answer::Warning,
            format!(
                "the guest comes from Xen {xen}, whose first releases (.0 and .1) save a 64-bit PV \
                 guest without its registers r8 to r15"
            ),
        ),
        Some(_) if has(there) => (
            Answer::Warning,
            format!(
                "the host has Xen {there}, whose first releases (.0 and .1) zero the registers r8 \
                 to r15 of a guest that is resumed there (save -c, Remus, a cancelled migration)"
            ),
        ),
        Some(xen) if (xen.major, xen.minor) > (there.major, there.minor) => (
            Answer::Warning,
            format!(
                "the guest comes from Xen {xen}, and the host has {there}: the Xen project does not \
                 support a move to an older Xen"
            ),
        ),
        Some(xen) => (
            Answer::Yes,
            format!("the guest comes from Xen {xen}, and the host has {there}"),
        ),
    };
    Check::new(Subject::Xen, answer, text)
}

#[cfg(test)]
mod tests;
