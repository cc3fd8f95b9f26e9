//! Checks of what a domain's configuration says about moving it.

use std::path::Path;

use xsr_format::config::{ConfiguredKind, DomainConfig};
use xsr_save_restore::plan::{Answer, Check, Subject};

use crate::text::{Count, shown_value};

/// In a text, disks beyond this number are only counted.
const MOST_DISKS: usize = 8;

/// Checks that the host has the files and devices of the guest's disks; `None` if it needs none.
/// `is_here`: whether the host is this one, so that its files can be looked at.
pub(super) fn disks(config: &DomainConfig, is_here: bool) -> Option<Check> {
    let check = |answer, text| Some(Check::new(Subject::Disks, answer, text));
    let needed = config.disks.iter();
    if config.disks.is_empty() {
        return None;
    }
    if !is_here {
        let list = listed(needed);
        return check(Answer::Unknown, format!("the host must have {list}"));
    }
    let missing: Vec<_> = needed.filter(|path| !Path::new(path).exists()).collect();
    match missing.is_empty() {
        true => check(
            Answer::Yes,
            format!("this host has {}", listed(config.disks.iter())),
        ),
        false => check(
            Answer::No,
            format!("this host does not have {}", listed(missing.into_iter())),
        ),
    }
}

fn listed<'p>(paths: impl ExactSizeIterator<Item = &'p String>) -> String {
    let beyond = paths.len().saturating_sub(MOST_DISKS);
    let mut list: Vec<_> = paths
        .take(MOST_DISKS)
        .map(|path| shown_value(path))
        .collect();
    if beyond > 0 {
        list.push(format!("{} more", Count(beyond, "disk")));
    }
    list.join(", ")
}

/// The checks that need only the configuration. `moves`: whether the domain runs, and is to be saved
/// or migrated; an image has been saved already.
pub(super) fn checks(config: &DomainConfig, moves: bool) -> Vec<Check> {
    let serious = match moves {
        true => Answer::No,
        false => Answer::Warning,
    };
    let mut out = Vec::new();
    let mut add = |answer, text: String| {
        out.push(Check::new(Subject::Configuration, answer, text));
    };
    if config.nomigrate {
        add(
            serious,
            "nomigrate is set: the guest may rely on a TSC that never changes".to_owned(),
        );
    }
    let least = config.target_memory_kib.unwrap_or(u64::MAX);
    if moves && config.kind == ConfiguredKind::Hvm && least < config.max_memory_kib {
        let text = "the guest was started with less memory than its maximum (populate on demand): \
                    until its balloon driver has given back the rest, a save makes Xen populate \
                    more pages than the guest may have, and Xen then crashes it";
        add(Answer::Warning, text.to_owned());
    }
    for (list, devices) in &config.passthrough {
        let what = match *list {
            "pcidevs" => "PCI devices",
            "usbdevs" => "USB devices",
            _ => "devices of the device tree",
        };
        let remedy = match moves {
            true => "detach them first",
            false => "the new host must have the same",
        };
        add(
            serious,
            format!("the guest has {devices} of its host's {what} ({list}): {remedy}"),
        );
    }
    if config.vnuma_nodes > 0 {
        let nodes = config.vnuma_nodes;
        add(
            serious,
            format!("the guest has {nodes} virtual NUMA nodes, which libxl does not save"),
        );
    }
    if out.is_empty() {
        let text = "nothing in it ties the guest to its host".to_owned();
        out.push(Check::new(Subject::Configuration, Answer::Yes, text));
    }
    out
}
