//! `cargo xtask bindings`: generates Rust bindings for Xen's structures and numbers from Xen's
//! public headers with bindgen, into `xen-backend/src/sys/`. The result is checked in, so that a
//! build needs neither Xen nor libclang.
//!
//! There are two kinds of files. `common.rs` has what all versions share. To verify this, the task generates bindings from each version's headers and compares sizes, offsets and
//! numbers. `vN.rs` has what differs, for domctl interface version N (hexadecimal).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::command::Invocation;
use crate::tools;
use crate::workspace;

/// Regenerate the bindings to Xen's interfaces
///
/// Reads the public headers of every supported Xen from a clone of Xen's git repository (by release
/// tag) and writes xen-backend/src/sys/. Needs libclang, git and bindgen; bindgen is built below
/// target/tools if it is missing. Only needed for a new version of Xen, or for a structure that
/// no code has used before.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask bindings --xen ../xen           write xen-backend/src/sys/
  cargo xtask bindings --xen ../xen --check   check that the files are up to date")]
pub(crate) struct BindingsArgs {
    /// A clone of Xen's git repository, bare or not, with its release tags
    #[arg(long, value_name = "DIR")]
    xen: PathBuf,
    /// Write nothing; fail if the checked-in files differ
    #[arg(long)]
    check: bool,
}

/// The domctl interface versions, and the releases that use them, oldest first.
const VERSIONS: &[(u32, &[&str])] = &[
    (0x12, &["4.14.0"]),
    (0x13, &["4.15.0"]),
    (0x14, &["4.16.0"]),
    (0x15, &["4.17.0"]),
    (0x16, &["4.18.0"]),
    (0x17, &["4.19.0", "4.20.0", "4.21.0"]),
    (0x18, &["4.22.0"]),
];

/// Headers for which bindings are generated.
const HEADERS: &[&str] = &[
    "xen.h",
    "domctl.h",
    "sysctl.h",
    "memory.h",
    "version.h",
    "event_channel.h",
    "sched.h",
    "grant_table.h",
    "hvm/hvm_op.h",
    "hvm/params.h",
];

/// Structures that are the same in all versions.
const COMMON: &[&str] = &[
    "evtchn_alloc_unbound",
    "evtchn_close",
    "gnttab_setup_table",
    "grant_entry_v1",
    "mmuext_op",
    "sched_remote_shutdown",
    "vcpu_guest_context",
    "xen_add_to_physmap",
    "xen_cpuid_leaf",
    "xen_domctl",
    "xen_domctl_address_size",
    "xen_domctl_cpu_policy",
    "xen_domctl_getpageframeinfo3",
    "xen_domctl_getvcpuinfo",
    "xen_domctl_hvmcontext",
    "xen_domctl_max_mem",
    "xen_domctl_max_vcpus",
    "xen_domctl_settimeoffset",
    "xen_domctl_shadow_op",
    "xen_domctl_shadow_op_stats",
    "xen_domctl_tsc_info",
    "xen_domctl_vcpu_msr",
    "xen_domctl_vcpu_msrs",
    "xen_domctl_vcpucontext",
    "xen_domctl_vcpuextstate",
    "xen_hvm_param",
    "xen_machphys_mfn_list",
    "xen_memory_reservation",
    "xen_msr_entry",
    "xen_remove_from_physmap",
    "xen_sysctl",
    "xen_sysctl_cpu_policy",
    "xen_sysctl_getdomaininfolist",
];

/// Those of them for which only the size matters: everything except size and alignment is left out.
const OPAQUE: &[&str] = &[
    "mmuext_op",
    "vcpu_guest_context",
    "xen_domctl",
    "xen_sysctl",
];

/// Numbers that are the same in all versions that define them.
const COMMON_NUMBERS: &[&str] = &[
    "DOMID_SELF",
    "DOMID_XEN",
    "DOMID_FIRST_RESERVED",
    "EVTCHNOP_(alloc_unbound|close)",
    "GNTTABOP_setup_table",
    "GNTTAB_RESERVED_(CONSOLE|XENSTORE)",
    "GTF_permit_access",
    "HVM_PARAM_(CALLBACK_IRQ|TIMER_MODE)",
    "HVMOP_[gs]et_param",
    "MMUEXT_PIN_L[1-4]_TABLE",
    "SCHEDOP_remote_shutdown",
    "SHUTDOWN_(poweroff|reboot|suspend|crash|watchdog|soft_reset)",
    "XEN_DOMCTL_CDF_(hvm|hap)",
    "XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL",
    "XEN_DOMCTL_SHADOW_OP_(OFF|ENABLE_LOGDIRTY|CLEAN|PEEK|[GS]ET_ALLOCATION)",
    "XEN_DOMCTL_((create|destroy|pause|unpause|resume)domain|getdomaininfo|max_mem|max_vcpus)",
    "XEN_DOMCTL_(shadow_op|[gs]etvcpucontext|getvcpuinfo|[gs]ethvmcontext)",
    "XEN_DOMCTL_settimeoffset",
    "XEN_DOMCTL_([gs]et_address_size|[gs]et_ext_vcpucontext|[gs]ettscinfo)",
    "XEN_DOMCTL_(getpageframeinfo3|[gs]etvcpuextstate|[gs]et_vcpu_msrs|[gs]et_cpu_policy)",
    "XEN_DOMINF_(dying|hvm_guest|shutdown|paused|shutdownmask|shutdownshift)",
    "XEN_INVALID_MAX_VCPU_ID",
    "XEN_SYSCTL_(getdomaininfolist|get_cpu_policy|cpu_policy_(host|(pv|hvm)_max)|physinfo)",
    "XEN_SYSCTL_PHYSCAP_(hvm|pv|hap|shadow)",
    "XEN_X86_EMU_(LAPIC|VPCI|ALL)",
    "XENMEM_(add_to|remove_from)_physmap",
    "XENMEM_(machphys_mfn_list|machphys_compat_mfn_list|maximum_gpfn|maximum_ram_page)",
    "XENMEM_((populate|decrease)_(physmap|reservation)|resource_grant_table)",
    "XENMEM_resource_grant_table_id_shared",
    "XENVER_(version|extraversion)",
    "__HYPERVISOR_(memory_op|xen_version|sched_op|event_channel_op|hvm_op)",
    "__HYPERVISOR_(mmuext_op|sysctl|domctl|grant_table_op)",
];

/// Structures that differ between versions.
const DIFFERENT: &[&str] = &[
    "xen_arch_domainconfig",
    "xen_domctl_createdomain.*",
    "xen_domctl_getdomaininfo",
    "xen_sysctl_physinfo",
];
const DIFFERENT_NUMBERS: &[&str] = &["XEN_(DOMCTL|SYSCTL)_INTERFACE_VERSION"];

/// The attribute that bindgen puts before each block of assertions.
const ALLOWED: &str = "# [allow (clippy :: unnecessary_operation , clippy :: identity_op)]";

/// Types in Xen's headers that the structures use.
const TYPES: &[(&str, &str)] = &[
    ("domid_t", "u16"),
    ("evtchn_port_t", "u32"),
    ("uint64_aligned_t", "u64"),
    ("xen_domain_handle_t", "[u8; 16]"),
    ("xen_pfn_t", "u64"),
    ("xen_ulong_t", "u64"),
];

/// Generates the bindings, or compares them with the checked-in ones.
///
/// # Errors
///
/// A header, libclang or bindgen is missing; a structure that should be the same in all versions is
/// not; or, with `--check`, the checked-in files differ.
pub(crate) fn run(args: &BindingsArgs) -> Result<()> {
    let bindgen = tools::BINDGEN.find_or_install()?;
    let scratch = workspace::root().join("target/bindings");
    let mut files = Vec::new();
    let mut layouts: Vec<(&str, BTreeMap<String, String>)> = Vec::new();
    for (interface, releases) in VERSIONS {
        let mut differing: Option<String> = None;
        for release in *releases {
            let headers = unpack(&args.xen, release, &scratch)?;
            let common = generate(&bindgen, &headers, COMMON, COMMON_NUMBERS)?;
            layouts.push((release, facts(&common)));
            let own = generate(&bindgen, &headers, DIFFERENT, DIFFERENT_NUMBERS)?;
            ensure!(
                facts(&own).get("XEN_DOMCTL_INTERFACE_VERSION : u32")
                    == Some(&interface.to_string()),
                "Xen {release} does not speak domctl interface {interface:#x}"
            );
            if let Some(first) = &differing {
                // A member may have become a structure of its own, at the same offset.
                let there = offsets(&own);
                ensure!(
                    offsets(first)
                        .iter()
                        .all(|(name, at)| there.get(name) == Some(at)),
                    "Xen {release} lays structures out otherwise than Xen {}",
                    releases[0]
                );
            }
            differing.get_or_insert(own);
            if (*interface, releases.last()) == (newest(), Some(release)) {
                let about = "Structures and numbers that every version of Xen's interfaces shares.";
                files.push(("common.rs".to_owned(), finish(about, release, &common)?));
            }
        }
        let own = differing.context("a version without a release")?;
        let about = format!("Structures and numbers of domctl interface version {interface:#x}.");
        let file = format!("v{interface:x}.rs");
        files.push((file, finish(&about, releases[0], &own)?));
    }
    compare(&layouts)?;
    write(&files, args.check)
}

fn newest() -> u32 {
    VERSIONS.last().map_or(0, |(interface, _)| *interface)
}

/// Unpacks a release's public headers. Returns the directory to search for `xen/…`.
fn unpack(xen: &Path, release: &str, scratch: &Path) -> Result<PathBuf> {
    let dir = scratch.join(release);
    if !dir.is_dir() {
        // Under a temporary name until it is complete.
        let partial = scratch.join(format!("{release}.partial"));
        let public = partial.join("xen");
        if partial.exists() {
            fs::remove_dir_all(&partial)
                .with_context(|| format!("cannot remove {}", partial.display()))?;
        }
        fs::create_dir_all(&public)
            .with_context(|| format!("cannot create {}", public.display()))?;
        let archive = partial.join("headers.tar");
        Invocation::new("git")
            .arg("-C")
            .arg(xen)
            .args(["archive", "--output"])
            .arg(&archive)
            .arg(format!("RELEASE-{release}"))
            .arg("xen/include/public")
            .run()?;
        Invocation::new("tar")
            .arg("-xf")
            .arg(&archive)
            .arg("-C")
            .arg(&public)
            .arg("--strip-components=3")
            .run()?;
        fs::rename(&partial, &dir)
            .with_context(|| format!("cannot rename {}", partial.display()))?;
    }
    // Written every time, since the list may have grown.
    let wrapper: String = ["#include <stdint.h>\n#define __XEN_TOOLS__ 1\n".to_owned()]
        .into_iter()
        .chain(HEADERS.iter().map(|h| format!("#include <xen/{h}>\n")))
        .collect();
    let all = dir.join("all.h");
    fs::write(&all, wrapper).with_context(|| format!("cannot write {}", all.display()))?;
    Ok(dir)
}

/// bindgen's output for these structures and numbers.
fn generate(bindgen: &Path, headers: &Path, types: &[&str], numbers: &[&str]) -> Result<String> {
    Invocation::new(bindgen)
        .arg(headers.join("all.h"))
        .args(["--use-core", "--no-doc-comments", "--explicit-padding"])
        .args([
            "--formatter",
            "none",
            "--no-derive-copy",
            "--no-derive-debug",
        ])
        .args(["--no-recursive-allowlist", "--sort-semantically"])
        .args(["--blocklist-type", "__guest_handle_.*"])
        .args([
            "--with-derive-custom-struct",
            ".*=Clone,Copy,Debug,FromBytes,IntoBytes,KnownLayout,Immutable",
        ])
        .arg("--opaque-type")
        .arg(format!("^({})$", OPAQUE.join("|")))
        .arg("--blocklist-type")
        .arg(format!("^({})__bindgen_ty_.*$", OPAQUE.join("|")))
        .arg("--allowlist-type")
        .arg(format!("^({})$", types.join("|")))
        .arg("--allowlist-var")
        .arg(format!("^({})$", numbers.join("|")))
        .arg("--")
        .arg("-I")
        .arg(headers)
        .capture()
}

/// The facts in bindings: sizes, offsets and numbers, by name.
fn facts(bindings: &str) -> BTreeMap<String, String> {
    let mut facts = BTreeMap::new();
    for (structure, members) in offsets(bindings) {
        for (at, number) in members.iter().enumerate() {
            // By position: names of members change, offsets do not.
            facts.insert(format!("{structure} {at}"), number.clone());
        }
    }
    for line in bindings.split(';') {
        if let Some((name, value)) = line
            .split_once("pub const ")
            .and_then(|(_, constant)| constant.split_once('='))
        {
            facts.insert(name.trim().to_owned(), value.trim().to_owned());
        }
    }
    facts
}

/// For each structure its size, its alignment and the offsets of its members, from bindgen's
/// assertions.
fn offsets(bindings: &str) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for piece in bindings.split("[\"").skip(1) {
        let Some((what, rest)) = piece.split_once('"') else {
            continue;
        };
        let structure = what
            .rsplit(' ')
            .next()
            .and_then(|name| name.split("::").next());
        let number = rest
            .split_once("usize")
            .and_then(|(before, _)| before.rsplit('-').next());
        if let (Some(structure), Some(number)) = (structure, number) {
            let members = all.entry(structure.to_owned()).or_default();
            members.push(number.trim().to_owned());
        }
    }
    all
}

/// Checks that every version agrees on what it has.
fn compare(layouts: &[(&str, BTreeMap<String, String>)]) -> Result<()> {
    let Some(((newest, wanted), others)) = layouts.split_last() else {
        bail!("no version at all");
    };
    for (release, facts) in others {
        for (name, value) in facts {
            if let Some(expected) = wanted.get(name)
                && expected != value
            {
                bail!("{name} is {value} in Xen {release}, {expected} in Xen {newest}");
            }
        }
        if let Some(missing) = wanted.keys().find(|name| !facts.contains_key(*name)) {
            bail!("{missing} of Xen {newest} is not in Xen {release}");
        }
    }
    Ok(())
}

/// The complete file: with its purpose, formatted.
fn finish(about: &str, release: &str, bindings: &str) -> Result<String> {
    let body = bindings
        .split_once("*/")
        .map_or(bindings, |(_, body)| body)
        // `sys.rs` allows it for all of them, and explains why.
        .replace(ALLOWED, "");
    let body = body.trim();
    let mut text = format!(
        "//! {about}\n//!\n//! Generated by `cargo xtask bindings` from the public headers of Xen \
         {release} (MIT). Do not edit.\n\n\
         use zerocopy::{{FromBytes, Immutable, IntoBytes, KnownLayout}};\n\n"
    );
    let word = |name: &str| {
        body.split(|c: char| !c.is_alphanumeric() && c != '_')
            .any(|w| w == name)
    };
    for (name, rust) in TYPES {
        if word(name) {
            text.push_str(&format!("pub type {name} = {rust};\n"));
        }
    }
    let mut handles: Vec<&str> = body
        .split(|c: char| !c.is_alphanumeric() && c != '_')
        .filter(|w| w.starts_with("__guest_handle_"))
        .collect();
    handles.sort_unstable();
    handles.dedup();
    for handle in handles {
        text.push_str(&format!("pub type {handle} = u64;\n"));
    }
    text.push_str(body);
    text.push('\n');
    format_source(&text)
}

fn format_source(text: &str) -> Result<String> {
    let file = workspace::root().join("target/bindings/unformatted.rs");
    fs::write(&file, text)?;
    Invocation::new("rustfmt")
        .args(["--edition", "2024"])
        .arg(&file)
        .run()?;
    Ok(fs::read_to_string(&file)?)
}

fn write(files: &[(String, String)], check: bool) -> Result<()> {
    let dir = workspace::root().join("xen-backend/src/sys");
    for (name, text) in files {
        let path = dir.join(name);
        if check {
            let there = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            ensure!(
                there == *text,
                "{} is not what Xen's headers give: run the task without --check",
                path.display()
            );
        } else {
            fs::create_dir_all(&dir)?;
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    println!(
        "{} files {}",
        files.len(),
        if check { "are right" } else { "written" }
    );
    Ok(())
}
