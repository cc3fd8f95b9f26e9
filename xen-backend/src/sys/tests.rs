//! Tests of the bindings against Xen's headers (Debian's libxen-dev), if those are installed: a C
//! compiler prints every size, offset and number.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

const COMMON: &str = include_str!("common.rs");

/// The bindings of each domctl interface version.
const VERSIONS: [(u32, &str); 7] = [
    (0x12, include_str!("v12.rs")),
    (0x13, include_str!("v13.rs")),
    (0x14, include_str!("v14.rs")),
    (0x15, include_str!("v15.rs")),
    (0x16, include_str!("v16.rs")),
    (0x17, include_str!("v17.rs")),
    (0x18, include_str!("v18.rs")),
];

/// Parts of the interface that this crate's own code defines.
const OURS: [(&str, u64); 6] = [
    ("sizeof(struct xen_domctl)", 144),
    ("offsetof(struct xen_domctl, u)", 16),
    ("offsetof(struct xen_sysctl, u)", 8),
    ("sizeof(struct mmuext_op)", 24),
    ("offsetof(struct mmuext_op, arg1)", 8),
    ("DOMID_XEN", 0x7ff2),
];

/// The headers that declare all of it.
const HEADERS: &str = "\
#include <stdint.h>
#include <stddef.h>
#include <stdio.h>
#define __XEN_TOOLS__ 1
#include <xen/xen.h>
#include <xen/domctl.h>
#include <xen/sysctl.h>
#include <xen/memory.h>
#include <xen/version.h>
#include <xen/event_channel.h>
#include <xen/sched.h>
#include <xen/grant_table.h>
#include <xen/hvm/hvm_op.h>
#include <xen/hvm/params.h>
";

/// Run a C program; its output, or the reason why it does not compile.
fn run_c(program: &str) -> Result<String, String> {
    let dir = tempfile::tempdir().unwrap();
    let (source, binary) = (dir.path().join("a.c"), dir.path().join("a"));
    std::fs::write(&source, program).unwrap();
    let compiled = Command::new("cc")
        .arg("-o")
        .arg(&binary)
        .arg(&source)
        .output()
        .map_err(|error| format!("no C compiler: {error}"))?;
    if !compiled.status.success() {
        return Err(String::from_utf8_lossy(&compiled.stderr).into_owned());
    }
    let output = Command::new(&binary).output().unwrap();
    Ok(String::from_utf8(output.stdout).unwrap())
}

/// C expressions, each with its value in the bindings. Members that bindgen made up (padding,
/// structures without a name) are left out.
fn expressions(bindings: &str) -> BTreeMap<String, u64> {
    let mut all = BTreeMap::new();
    let squeezed: String = bindings.split_whitespace().collect::<Vec<_>>().join(" ");
    for piece in squeezed.split("[\"").skip(1) {
        let (what, rest) = piece.split_once("\"]").unwrap();
        let value = rest.split_once("usize").unwrap().0;
        let value: u64 = value.rsplit('-').next().unwrap().trim().parse().unwrap();
        let expression = if let Some(name) = what.strip_prefix("Size of ") {
            format!("sizeof(struct {name})")
        } else if let Some(field) = what.strip_prefix("Offset of field: ") {
            let (name, field) = field.split_once("::").unwrap();
            format!("offsetof(struct {name}, {field})")
        } else {
            continue;
        };
        if !expression.contains("__bindgen") {
            all.insert(expression, value);
        }
    }
    for line in bindings.lines() {
        if let Some((name, value)) = line
            .strip_prefix("pub const ")
            .and_then(|constant| constant.strip_suffix(';')?.split_once(": u32 = "))
        {
            all.insert(name.to_owned(), value.parse().unwrap());
        }
    }
    all
}

/// The name in older headers for what later ones renamed: releases of 4.17 have either.
fn older_name(expression: &str) -> &str {
    match expression {
        "offsetof(struct xen_domctl_cpu_policy, leaves)" => {
            "offsetof(struct xen_domctl_cpu_policy, cpuid_policy)"
        }
        "offsetof(struct xen_domctl_cpu_policy, msrs)" => {
            "offsetof(struct xen_domctl_cpu_policy, msr_policy)"
        }
        "offsetof(struct xen_sysctl_cpu_policy, leaves)" => {
            "offsetof(struct xen_sysctl_cpu_policy, cpuid_policy)"
        }
        "offsetof(struct xen_sysctl_cpu_policy, msrs)" => {
            "offsetof(struct xen_sysctl_cpu_policy, msr_policy)"
        }
        _ => expression,
    }
}

#[test]
fn every_version_has_bindings_of_its_own_number() {
    for (version, bindings) in VERSIONS {
        let all = expressions(bindings);
        assert_eq!(all["XEN_DOMCTL_INTERFACE_VERSION"], u64::from(version));
        assert!(all.contains_key("sizeof(struct xen_domctl_createdomain)"));
        assert!(all.contains_key("offsetof(struct xen_domctl_getdomaininfo, flags)"));
    }
    assert!(expressions(COMMON).len() > 150);
}

#[test]
fn sizes_and_offsets_are_those_of_the_installed_headers() {
    let version = format!(
        "{HEADERS}int main(void) {{ printf(\"%u\", XEN_DOMCTL_INTERFACE_VERSION); return 0; }}"
    );
    let Ok(version) = run_c(&version) else {
        eprintln!("SKIPPED: no C compiler with Xen's headers (Debian: gcc, libxen-dev)");
        return;
    };
    let version: u32 = version.parse().unwrap();
    let own = VERSIONS.iter().find(|(known, _)| *known == version);
    let (_, own) = own.unwrap_or_else(|| panic!("headers of interface {version:#x}"));
    let mut expected: BTreeMap<String, u64> = expressions(COMMON);
    expected.extend(expressions(own));
    expected.extend(OURS.map(|(expression, value)| (expression.to_owned(), value)));
    let program = |name: fn(&str) -> &str| {
        let mut program = format!("{HEADERS}int main(void) {{\n");
        for expression in expected.keys() {
            let asked = name(expression);
            writeln!(
                program,
                "printf(\"%llu\\n\", (unsigned long long)({asked}));"
            )
            .unwrap();
        }
        program + "return 0; }\n"
    };
    let printed = run_c(&program(|name| name))
        .or_else(|_| run_c(&program(older_name)))
        .unwrap_or_else(|error| panic!("{error}"));
    let values: Vec<u64> = printed.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(values.len(), expected.len());
    for ((expression, expected), value) in expected.iter().zip(values) {
        assert_eq!(value, *expected, "{expression}");
    }
}
