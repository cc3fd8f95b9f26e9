//! The scenarios: each is a kind (a function of `xtask/lab/dom0/scenarios`) and a guest (of
//! `configure` in `xtask/lab/dom0/lib`).

/// One scenario.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scenario {
    /// What the scenario does.
    pub(super) kind: &'static str,
    /// The guest.
    pub(super) guest: &'static str,
    /// Whether it is one of the few that every change must pass.
    pub(super) smoke: bool,
    /// Whether it needs the hypervisor that [`super::shadow`] builds.
    pub(super) shadow: bool,
    /// Whether it needs a second host.
    pub(super) two: bool,
}

const fn smoke(kind: &'static str, guest: &'static str) -> Scenario {
    Scenario {
        kind,
        guest,
        smoke: true,
        shadow: false,
        two: false,
    }
}

const fn more(kind: &'static str, guest: &'static str) -> Scenario {
    Scenario {
        kind,
        guest,
        smoke: false,
        shadow: false,
        two: false,
    }
}

const fn shadow(kind: &'static str, guest: &'static str) -> Scenario {
    Scenario {
        kind,
        guest,
        smoke: false,
        shadow: true,
        two: false,
    }
}

/// Between two hosts, each with its own Xen.
const fn two(kind: &'static str, guest: &'static str) -> Scenario {
    Scenario {
        two: true,
        ..more(kind, guest)
    }
}

/// The same, on hypervisors that [`super::shadow`] builds.
const fn two_shadow(kind: &'static str, guest: &'static str) -> Scenario {
    Scenario {
        two: true,
        ..shadow(kind, guest)
    }
}

/// All scenarios, in the order in which they run.
pub(super) const SCENARIOS: &[Scenario] = &[
    more("stock", "pv"),
    more("stock", "pvh"),
    more("stock", "hvm"),
    more("stock", "pv2"),
    more("stock", "pvh2"),
    more("stock", "hvm2"),
    more("stock", "hvmpv"),
    more("stock", "hvmpv2"),
    more("mock", "pv"),
    smoke("ours_stock", "pv"),
    smoke("ours_stock", "pvh"),
    smoke("ours_stock", "hvm"),
    more("ours_stock", "pv2"),
    more("ours_stock", "pvh2"),
    more("ours_stock", "hvm2"),
    more("ours_stock", "hvmpv"),
    more("ours_stock", "hvmpv2"),
    smoke("stock_ours", "pv"),
    smoke("stock_ours", "pvh"),
    smoke("stock_ours", "hvm"),
    more("stock_ours", "pv2"),
    more("stock_ours", "pvh2"),
    more("stock_ours", "hvm2"),
    more("stock_ours", "hvmpv"),
    more("stock_ours", "hvmpv2"),
    more("ours_ours", "pv"),
    more("ours_ours", "pvh"),
    more("ours_ours", "hvm"),
    more("ours_ours", "pv2"),
    more("ours_ours", "pvh2"),
    more("ours_ours", "hvm2"),
    more("ours_ours", "hvmpv"),
    more("ours_ours", "hvmpv2"),
    more("checkpoint", "pv"),
    more("checkpoint", "pvh"),
    more("checkpoint", "hvm"),
    more("checkpoint", "pv2"),
    more("checkpoint", "pvh2"),
    more("checkpoint", "hvm2"),
    more("checkpoint", "hvmpv"),
    more("checkpoint", "hvmpv2"),
    more("checkpoint_live", "pvh"),
    more("checkpoint_live", "pvh2"),
    more("checkpoint_live", "hvmpv"),
    more("checkpoint_mapped", "pvh"),
    more("checkpoint_mapped", "pvh2"),
    more("checkpoint_mapped", "hvmpv"),
    smoke("parity", "pv"),
    smoke("parity", "pvh"),
    more("parity", "hvm"),
    more("parity", "pv2"),
    more("parity", "pvh2"),
    more("parity", "hvm2"),
    more("parity", "hvmpv"),
    more("parity", "hvmpv2"),
    more("migrate_stock_stock", "pvh"),
    more("migrate_ours_stock", "pvh"),
    more("migrate_ours_stock", "hvm"),
    more("migrate_ours_stock", "pvh2"),
    more("migrate_ours_stock", "hvm2"),
    more("migrate_ours_stock", "hvmpv"),
    more("migrate_ours_stock", "hvmpv2"),
    more("migrate_stock_ours", "pvh"),
    more("migrate_stock_ours", "hvm"),
    more("migrate_stock_ours", "pvh2"),
    more("migrate_stock_ours", "hvm2"),
    more("migrate_stock_ours", "hvmpv"),
    more("migrate_stock_ours", "hvmpv2"),
    more("migrate_ours_ours", "pvh"),
    more("migrate_ours_ours", "hvm"),
    more("migrate_ours_ours", "pvh2"),
    more("migrate_ours_ours", "hvm2"),
    more("migrate_ours_ours", "hvmpv"),
    more("migrate_ours_ours", "hvmpv2"),
    more("cancel", "pvh"),
    more("cancel", "hvm"),
    more("cancel", "pvh2"),
    more("cancel", "hvm2"),
    more("cancel", "hvmpv"),
    more("cancel_suspended", "pv"),
    more("cancel_suspended", "pvh"),
    more("cancel_suspended", "hvm"),
    more("cancel_suspended", "hvmpv"),
    more("cancel_suspended", "pv2"),
    more("broken", "pv"),
    more("broken", "pvh"),
    more("broken", "hvm"),
    more("broken", "hvmpv"),
    more("direct", "pv"),
    more("direct", "pv2"),
    more("direct", "pvh"),
    more("direct", "pvh2"),
    more("direct_live", "pvh"),
    more("direct_live", "pvh2"),
    more("through_xl", "pv"),
    more("through_xl", "pvh"),
    more("through_xl", "hvm"),
    more("through_xl", "hvmpv"),
    more("through_xl_migrate", "pvh"),
    more("through_xl_migrate", "hvm"),
    more("through_xl_migrate", "hvmpv"),
    more("through_xl_cancel", "pvh"),
    more("direct_resume", "pv"),
    more("direct_resume", "pvh"),
    more("direct_settings", "pv"),
    more("direct_settings", "pvh"),
    more("direct_migrate", "pvh"),
    more("direct_migrate", "pvh2"),
    more("direct_migrate_still", "pv"),
    more("direct_to_xl", "pvh"),
    more("direct_to_xl_still", "pv"),
    more("direct_from_xl", "pvh"),
    more("direct_refused", "pvh"),
    more("direct_lost", "pvh"),
    more("direct_lost_still", "pv"),
    more("direct_cancel", "pvh"),
    more("tunnel", "pvh"),
    more("plan", "pv"),
    more("plan", "pvh"),
    more("plan", "hvm"),
    more("save_packed", "pv"),
    more("save_packed", "pvh"),
    more("freeze", "pvh"),
    more("balloon_live", "balloon"),
    more("balloon_live", "balloonhvm"),
    more("gone_guest", "pvh"),
    more("save_kept", "pvh"),
    shadow("stock", "pv32"),
    shadow("stock", "pv32x2"),
    shadow("ours_stock", "pv32"),
    shadow("ours_stock", "pv32x2"),
    shadow("stock_ours", "pv32"),
    shadow("stock_ours", "pv32x2"),
    shadow("ours_ours", "pv32"),
    shadow("ours_ours", "pv32x2"),
    shadow("checkpoint", "pv32"),
    shadow("checkpoint", "pv32x2"),
    shadow("checkpoint_live", "pv"),
    shadow("checkpoint_live", "pv32"),
    shadow("parity", "pv32"),
    shadow("parity", "pv32x2"),
    shadow("migrate_stock_stock", "pv"),
    shadow("migrate_ours_stock", "pv"),
    shadow("migrate_ours_stock", "pv2"),
    shadow("migrate_ours_stock", "pv32"),
    shadow("migrate_ours_stock", "pv32x2"),
    shadow("migrate_stock_ours", "pv"),
    shadow("migrate_stock_ours", "pv2"),
    shadow("migrate_stock_ours", "pv32"),
    shadow("migrate_stock_ours", "pv32x2"),
    shadow("migrate_ours_ours", "pv"),
    shadow("migrate_ours_ours", "pv2"),
    shadow("migrate_ours_ours", "pv32"),
    shadow("migrate_ours_ours", "pv32x2"),
    shadow("cancel", "pv"),
    shadow("cancel", "pv2"),
    shadow("cancel", "pv32"),
    shadow("cancel", "pv32x2"),
    shadow("cancel_suspended", "pv32"),
    shadow("broken", "pv32"),
    shadow("direct", "pv32"),
    shadow("direct", "pv32x2"),
    shadow("direct_live", "pv"),
    shadow("direct_live", "pv32"),
    shadow("direct_migrate", "pv"),
    shadow("direct_migrate", "pv32"),
    shadow("direct_to_xl", "pv"),
    shadow("direct_from_xl", "pv"),
    shadow("through_xl", "pv32"),
    shadow("through_xl_migrate", "pv"),
    shadow("through_xl_cancel", "pv"),
    more("remus_stock_stock", "pvh"),
    more("remus_ours_stock", "pvh"),
    more("remus_stock_ours", "pvh"),
    more("remus_ours_ours", "pvh"),
    more("remus_ours_ours", "pvh2"),
    more("remus_alone", "pvh"),
    more("through_xl_remus", "pvh"),
    more("through_xl_remus", "hvmpv"),
    more("remus_stock_stock", "hvmpv"),
    more("remus_ours_ours", "hvmpv"),
    shadow("remus_stock_stock", "pv"),
    shadow("remus_ours_stock", "pv"),
    shadow("remus_stock_ours", "pv"),
    shadow("remus_ours_ours", "pv"),
    shadow("remus_ours_ours", "pv32"),
    two("two_hosts", "none"),
    two("two_stock_stock", "pvh"),
    two("two_ours_stock", "pvh"),
    two("two_stock_ours", "pvh"),
    two("two_ours_ours", "pvh"),
    two("two_ours_ours", "pvh2"),
    two("two_stock_stock", "hvmpv"),
    two("two_ours_ours", "hvmpv"),
    two("two_xsr", "pvh"),
    two("two_xsr", "hvmpv"),
    two("two_plan", "pvh"),
    two("two_direct", "pv"),
    two("two_direct", "pvh"),
    two_shadow("two_stock_stock", "pv"),
    two_shadow("two_ours_ours", "pv"),
    two_shadow("two_ours_ours", "pv32"),
    two_shadow("two_xsr", "pv"),
    more("pairs", "pvh64m"),
    more("pairs", "pv64m"),
];

/// Description of each kind.
const KINDS: &[(&str, &str)] = &[
    (
        "stock",
        "the stock toolstack saves and restores; our checker reads the image",
    ),
    (
        "mock",
        "a stock image goes through our mock machine, then a stock restore",
    ),
    (
        "ours_stock",
        "xl save with our helper, xl restore with the stock one",
    ),
    (
        "stock_ours",
        "xl save with the stock helper, xl restore with ours",
    ),
    ("ours_ours", "xl save and xl restore with our helper"),
    (
        "checkpoint",
        "xl save -c with our helper: the guest runs on, and so does its image",
    ),
    (
        "checkpoint_live",
        "the same while the guest runs (XSR_LIVE), and the stock helper restores the image",
    ),
    (
        "checkpoint_mapped",
        "the same in the mapped layout (XSR_LAYOUT), which xsr verify --deep finds whole",
    ),
    (
        "parity",
        "one suspended domain, written by both helpers: equal bytes, except time stamps of the TSC and the PM timer",
    ),
    (
        "migrate_stock_stock",
        "live xl migrate to the same host, stock helpers",
    ),
    (
        "migrate_ours_stock",
        "live xl migrate to the same host, our helper sends",
    ),
    (
        "migrate_stock_ours",
        "live xl migrate to the same host, our helper receives",
    ),
    (
        "migrate_ours_ours",
        "live xl migrate to the same host, our helper on both sides",
    ),
    (
        "remus_stock_stock",
        "xl remus to the same host, stock helpers; the sender dies, the receiver takes over from a checkpoint",
    ),
    ("remus_ours_stock", "the same, our helper sends"),
    ("remus_stock_ours", "the same, our helper receives"),
    ("remus_ours_ours", "the same, our helper on both sides"),
    (
        "remus_alone",
        "xl remus to the same host, our helper on both sides; that of the receiver dies, the guest goes on",
    ),
    (
        "pairs",
        "five saves and five restores with each helper, in turn, measured (KIND-GUEST.log)",
    ),
    (
        "cancel",
        "SIGTERM in the middle of a live save with our helper: the guest counts on",
    ),
    (
        "cancel_suspended",
        "SIGTERM in the middle of a save with our helper: the guest counts on",
    ),
    (
        "broken",
        "a save whose reader goes away, restores of a part of an image, SIGTERM in mid-restore",
    ),
    (
        "direct",
        "xsr save --direct and xsr restore --direct, of a bare stream and of libxl's image",
    ),
    ("direct_live", "the same, the first save live"),
    (
        "through_xl",
        "xsr save and xsr restore by way of xl, with -c and -p",
    ),
    (
        "through_xl_migrate",
        "live xsr migrate to the same host, by way of xl, xsr at both ends",
    ),
    (
        "through_xl_remus",
        "xsr remus to the same host, by way of xl, xsr at both ends; the sender dies, the receiver takes over",
    ),
    (
        "two_hosts",
        "the network, ssh in both directions and the shared disk between two hosts",
    ),
    (
        "two_stock_stock",
        "live xl migrate to another host over ssh and back, stock helpers",
    ),
    ("two_ours_stock", "the same, our helper on this host"),
    ("two_stock_ours", "the same, our helper on the other host"),
    ("two_ours_ours", "the same, our helper on both hosts"),
    (
        "two_xsr",
        "live xsr migrate to another host over ssh and back, by way of xl",
    ),
    (
        "two_plan",
        "xl migrate to a host that lacks CPU features: our helper there warns, or refuses if told to",
    ),
    (
        "two_direct",
        "xsr save --direct to xsr restore --direct on another host over ssh, and back",
    ),
    (
        "direct_resume",
        "xsr save --direct -c, then xl save, then a poweroff: xenstored reports both",
    ),
    (
        "direct_settings",
        "xsr restore --direct of libxl's image sets what xl restore sets: UUID, timer mode, clock",
    ),
    (
        "direct_migrate",
        "xsr migrate --direct to xsr migrate-receive --direct on the same host, live, and again",
    ),
    (
        "direct_migrate_still",
        "the same, suspended first, which needs no dirty log",
    ),
    (
        "direct_to_xl",
        "xsr migrate --direct to a stock xl migrate-receive, live; then xl save",
    ),
    ("direct_to_xl_still", "the same, suspended first"),
    (
        "direct_from_xl",
        "a stock xl migrate to xsr migrate-receive --direct, live, and back to an xl",
    ),
    (
        "direct_refused",
        "migrate-receive --direct refuses what needs libxl by name, and the guest notices nothing",
    ),
    (
        "direct_lost",
        "\"go\" and the report of a --direct migration are lost: xsr resume --direct, or xl destroy",
    ),
    ("direct_lost_still", "the same, suspended first"),
    (
        "direct_cancel",
        "SIGTERM in the middle of xsr migrate --direct: the guest counts on",
    ),
    (
        "tunnel",
        "a stock xl migrate -s 'xsr tunnel' to the same host: two connections, and inside of ssh",
    ),
    (
        "plan",
        "xsr plan of a guest and of its image: both fit on the Xen that they come from",
    ),
    (
        "save_packed",
        "xsr save --compress zstd by way of xl; the stock helper restores what zstd unpacks",
    ),
    (
        "freeze",
        "xsr save --live -c --layout mapped --at-freeze by way of xl; the stock helper restores it",
    ),
    (
        "balloon_live",
        "a guest that gives pages back and takes them again during a live migration, with our helper",
    ),
    (
        "gone_guest",
        "a guest is destroyed, powers off or crashes during a save and a live migration: so it is said",
    ),
    (
        "save_kept",
        "a save through xl that fails leaves the old file, one that succeeds replaces it, mode 0600",
    ),
    (
        "through_xl_cancel",
        "SIGINT to xsr in the middle of a save and of a live migration: the guest counts on",
    ),
];

impl Scenario {
    /// Its name, as given on the command line.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.kind, self.guest)
    }

    /// What it does, in one line.
    pub(super) fn about(&self) -> &'static str {
        let found = KINDS.iter().find(|(kind, _)| *kind == self.kind);
        found.map_or("", |(_, about)| about)
    }

    /// Whether `pattern` is its kind, its guest or its name.
    pub(super) fn matches(&self, pattern: &str) -> bool {
        pattern == self.kind || pattern == self.guest || pattern == self.name()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::lab::build::source;

    #[test]
    fn every_kind_is_described_and_is_a_function_in_dom0() {
        let script = [
            "dom0/scenarios",
            "dom0/findings",
            "dom0/commands",
            "dom0/two-hosts",
        ]
        .map(|file| std::fs::read_to_string(source(file)).unwrap())
        .concat();
        for scenario in SCENARIOS {
            assert!(!scenario.about().is_empty(), "{}", scenario.name());
            let function = format!("\n{}() {{", scenario.kind);
            assert!(script.contains(&function), "{} is missing", scenario.kind);
        }
    }

    #[test]
    fn every_guest_can_be_configured() {
        let library = std::fs::read_to_string(source("dom0/lib")).unwrap();
        for scenario in SCENARIOS {
            let arm = format!("\n        {}) ", scenario.guest);
            assert!(library.contains(&arm), "{} is missing", scenario.guest);
        }
    }

    #[test]
    fn patterns_are_kinds_guests_or_names() {
        let scenario = more("stock", "pv");
        for pattern in ["stock", "pv", "stock/pv"] {
            assert!(scenario.matches(pattern));
        }
        for pattern in ["", "p", "pv/stock", "stock/pvh"] {
            assert!(!scenario.matches(pattern));
        }
    }
}
