//! Licences of the crates linked into the shipped binaries: one text file, which their terms
//! require when binaries are distributed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::TARGET;
use crate::command::Invocation;

/// The parts of `cargo metadata` that are used here.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    /// `None` for a package of this workspace.
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Edge>,
}

#[derive(Deserialize)]
struct Edge {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// `None` for a normal dependency, otherwise `dev` or `build`.
    kind: Option<String>,
}

/// Writes the licences of all crates that the packages `of` link.
///
/// # Errors
///
/// cargo fails, or a crate does not name a licence.
pub(super) fn write<const N: usize>(of: [&str; N], to: &Path) -> Result<()> {
    let json = Invocation::cargo()
        .args(["metadata", "--format-version", "1", "--locked"])
        .args(["--filter-platform", TARGET])
        .capture()?;
    let metadata: Metadata =
        serde_json::from_str(&json).context("cannot understand `cargo metadata`")?;
    let linked = linked(&metadata, &of);
    ensure!(!linked.is_empty(), "no dependency found of {of:?}");
    let mut text = String::from(
        "The binaries of this package contain the following Rust crates. Each is named with its\n\
         licence; the licence files that come with it follow.\n",
    );
    for package in linked {
        let licence = package
            .license
            .as_deref()
            .with_context(|| format!("{} names no licence", package.name))?;
        let bar = "=".repeat(78);
        write!(
            text,
            "\n{bar}\n{} {}: {licence}\n{bar}\n",
            package.name, package.version
        )?;
        for file in files(package)? {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let content = fs::read(&file).with_context(|| file.display().to_string())?;
            let content = String::from_utf8_lossy(&content);
            write!(text, "\n--- {name}\n\n{}\n", content.trim_end())?;
        }
    }
    fs::write(to, text).with_context(|| to.display().to_string())
}

/// The registry crates that are reached only through normal dependencies.
fn linked<'m>(metadata: &'m Metadata, of: &[&str]) -> Vec<&'m Package> {
    let packages: BTreeMap<&str, &Package> = metadata
        .packages
        .iter()
        .map(|package| (&*package.id, package))
        .collect();
    let nodes: BTreeMap<&str, &Node> = metadata
        .resolve
        .nodes
        .iter()
        .map(|node| (&*node.id, node))
        .collect();
    let ours = |package: &&&Package| package.source.is_none() && of.contains(&&*package.name);
    let mut left: Vec<&str> = packages.values().filter(ours).map(|p| &*p.id).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = left.pop() {
        if !seen.insert(id) {
            continue;
        }
        let edges = nodes.get(id).map_or(&[][..], |node| &node.deps);
        let normal = |edge: &&Edge| edge.dep_kinds.iter().any(|kind| kind.kind.is_none());
        left.extend(edges.iter().filter(normal).map(|edge| &*edge.pkg));
    }
    let mut linked: Vec<&Package> = seen
        .into_iter()
        .filter_map(|id| packages.get(id).copied())
        .filter(|package| package.source.is_some())
        .collect();
    linked.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    linked
}

/// The licence files next to a crate's manifest.
fn files(package: &Package) -> Result<Vec<PathBuf>> {
    let directory = package.manifest_path.parent().unwrap_or(Path::new("."));
    let listed = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut files = Vec::new();
    for entry in listed {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.to_ascii_uppercase();
        let is_licence = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"]
            .iter()
            .any(|start| name.starts_with(start));
        if is_licence && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
