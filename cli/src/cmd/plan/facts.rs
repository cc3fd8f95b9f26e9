//! The facts of a host, as JSON (docs/json.md): `plan --facts` writes them, and `plan --on` and
//! `plan --level` read them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use xsr_format::cpu_policy::CpuPolicy;
use xsr_format::record::x86::{CpuidLeaf, MsrEntry};
use xsr_save_restore::plan::HostFacts;
use xsr_xen_backend::{PhysInfo, XenVersion};

use crate::stdout::CURRENT;
use crate::text::{shown, shown_name, shown_path};

/// The longest facts that are accepted. Those of a real host take some 20 KiB.
const MAX_BYTES: u64 = 1 << 20;

/// A host, by name, and what it has.
#[derive(Clone, Debug)]
pub(super) struct Named {
    /// Fit to be shown.
    pub(super) name: String,
    pub(super) facts: HostFacts,
}

/// What `plan --facts` prints.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Document {
    /// The host's name.
    host: String,
    xen_major: u16,
    xen_minor: u16,
    total_pages: u64,
    free_pages: u64,
    outstanding_pages: u64,
    tsc_khz: u32,
    hap: bool,
    shadow: bool,
    /// Whether the host runs guests of these kinds.
    runs_pv: bool,
    runs_hvm: bool,
    /// The largest policy of a guest of each kind.
    pv: Option<Policy>,
    hvm: Option<Policy>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Policy {
    leaves: Vec<Leaf>,
    msrs: Vec<Msr>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Leaf {
    leaf: u32,
    /// `None` for a leaf without subleaves.
    subleaf: Option<u32>,
    eax: u32,
    ebx: u32,
    ecx: u32,
    edx: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Msr {
    index: u32,
    value: u64,
}

impl From<&CpuPolicy> for Policy {
    fn from(policy: &CpuPolicy) -> Self {
        let leaf = |leaf: &CpuidLeaf| Leaf {
            leaf: leaf.leaf,
            subleaf: (leaf.subleaf != CpuPolicy::NO_SUBLEAF).then_some(leaf.subleaf),
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
        };
        let msr = |msr: &MsrEntry| Msr {
            index: msr.index,
            value: msr.value,
        };
        Self {
            leaves: policy.leaves.iter().map(leaf).collect(),
            msrs: policy.msrs.iter().map(msr).collect(),
        }
    }
}

impl From<Policy> for CpuPolicy {
    fn from(policy: Policy) -> Self {
        let leaf = |leaf: Leaf| CpuidLeaf {
            leaf: leaf.leaf,
            subleaf: leaf.subleaf.unwrap_or(CpuPolicy::NO_SUBLEAF),
            eax: leaf.eax,
            ebx: leaf.ebx,
            ecx: leaf.ecx,
            edx: leaf.edx,
        };
        let msr = |msr: Msr| MsrEntry {
            index: msr.index,
            flags: 0,
            value: msr.value,
        };
        Self {
            leaves: policy.leaves.into_iter().map(leaf).collect(),
            msrs: policy.msrs.into_iter().map(msr).collect(),
        }
    }
}

impl Document {
    pub(super) fn new(host: String, facts: &HostFacts) -> Self {
        let PhysInfo {
            total_pages,
            free_pages,
            outstanding_pages,
            cpu_khz,
            pv,
            hvm,
            hap,
            shadow,
        } = facts.physinfo;
        Self {
            host,
            xen_major: facts.xen.major,
            xen_minor: facts.xen.minor,
            total_pages,
            free_pages,
            outstanding_pages,
            tsc_khz: cpu_khz,
            hap,
            shadow,
            runs_pv: pv,
            runs_hvm: hvm,
            pv: facts.pv.as_ref().map(Policy::from),
            hvm: facts.hvm.as_ref().map(Policy::from),
        }
    }
}

impl From<Document> for Named {
    fn from(document: Document) -> Self {
        Self {
            name: shown_name(&document.host),
            facts: HostFacts {
                xen: XenVersion {
                    major: document.xen_major,
                    minor: document.xen_minor,
                },
                physinfo: PhysInfo {
                    total_pages: document.total_pages,
                    free_pages: document.free_pages,
                    outstanding_pages: document.outstanding_pages,
                    cpu_khz: document.tsc_khz,
                    pv: document.runs_pv,
                    hvm: document.runs_hvm,
                    hap: document.hap,
                    shadow: document.shadow,
                },
                pv: document.pv.map(CpuPolicy::from),
                hvm: document.hvm.map(CpuPolicy::from),
            },
        }
    }
}

/// Reads facts from a file, which may be a pipe.
///
/// # Errors
///
/// It cannot be read, or its contents are not facts.
pub(super) fn read(path: &Path) -> Result<Named> {
    let name = || shown_path(path);
    let file = File::open(path).with_context(|| format!("cannot open {}", name()))?;
    let text = text_of(file).with_context(name)?;
    parse(&text).with_context(name)
}

/// Reads everything, if it is not longer than facts can be.
///
/// # Errors
///
/// It is longer, or cannot be read.
pub(super) fn text_of(source: impl Read) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let bytes = source.take(MAX_BYTES + 1).read_to_end(&mut text)? as u64;
    ensure!(
        bytes <= MAX_BYTES,
        "longer than 1 MiB, which the output of `xsr plan --facts` never is"
    );
    Ok(text)
}

/// Parses facts.
///
/// # Errors
///
/// The text is something else, or has another version.
pub(super) fn parse(text: &[u8]) -> Result<Named> {
    ensure!(!text.is_empty(), "there are no facts: it is empty");
    let not_facts = "this is not the output of `xsr plan --facts`";
    let value: serde_json::Value = serde_json::from_slice(text).context(not_facts)?;
    if let Some(error) = value.get("error").and_then(serde_json::Value::as_str) {
        bail!("`xsr plan --facts` failed: {}", shown(error));
    }
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(CURRENT) => {}
        Some(other) => bail!(
            "the facts have version {other}, and this xsr reads version {CURRENT}: run the same \
             xsr on both hosts"
        ),
        None => bail!("{not_facts}: there is no version"),
    }
    let document: Document = serde_json::from_value(value).context(not_facts)?;
    Ok(document.into())
}
