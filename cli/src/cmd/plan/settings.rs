//! What a domain's configuration says about moving it.

use xsr_format::config::DomainConfig;
use xsr_save_restore::plan::{Answer, Check, Subject};

/// The checks that need only the configuration. `moves`: of a domain that runs, and would be saved
/// or migrated. An image has that behind it.
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
            "nomigrate is set: the guest may rely on a TSC that is the same for ever".to_owned(),
        );
    }
    for (list, devices) in &config.passthrough {
        let what = match *list {
            "pcidevs" => "PCI devices",
            "usbdevs" => "USB devices",
            _ => "devices of the device tree",
        };
        let remedy = match moves {
            true => "detach them first",
            false => "the host must have them",
        };
        add(
            serious,
            format!("the guest has {devices} of the host's {what} ({list}): {remedy}"),
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
