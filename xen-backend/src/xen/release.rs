//! Differences between point releases of Xen that matter to a save or a restore: bugs, and the
//! releases that have them.
//!
//! The source is the branches of Xen's repository. A distribution may have a fix earlier than its
//! release number says, so a quirk is a caution, not a certainty.

use crate::XenVersion;

/// Known quirks of a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quirks {
    /// The dirty log reports pages that a translated guest takes (98fccdf0ac, December 2025).
    pub(super) logs_new_pages: bool,
    /// Reading and setting a vcpu's context loses r8 to r15 of a 64-bit guest (9f892f84c2,
    /// fixed by bedbc17d84): 4.21.0 and 4.21.1.
    pub(super) loses_registers: bool,
}

impl Quirks {
    /// The quirks of this release; `extra` is what follows major and minor.
    pub(super) fn of(version: XenVersion, extra: &str) -> Self {
        let point = point(extra);
        let from = |first| point.is_some_and(|point| point >= first);
        let XenVersion { major, minor } = version;
        Self {
            logs_new_pages: match (major, minor) {
                (4, ..=18) => false,
                (4, 19) => from(5),
                (4, 20) => from(3),
                (4, 21) => from(1),
                // A 4.22 built before its release may not have it.
                (4, 22) => from(0),
                _ => true,
            },
            loses_registers: (major, minor) == (4, 21) && matches!(point, Some(0 | 1)),
        }
    }
}

/// The point release that an extra version begins with: 4 of ".4", ".4+13-g2445b30a44";
/// `None` for "-rc1", "-unstable" and the like.
fn point(extra: &str) -> Option<u32> {
    let digits = extra.strip_prefix('.')?;
    let end = digits.find(|c: char| !c.is_ascii_digit());
    digits[..end.unwrap_or(digits.len())].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quirks(minor: u16, extra: &str) -> Quirks {
        Quirks::of(XenVersion { major: 4, minor }, extra)
    }

    #[test]
    fn each_branch_logs_new_pages_from_the_release_that_has_the_fix_on() {
        for (minor, extra, logs) in [
            (14, ".6", false),
            (17, ".7+13-g2445b30a44", false),
            (18, ".9", false),
            (19, ".4", false),
            (19, ".5", true),
            (20, ".2", false),
            (20, ".4", true),
            (21, ".0", false),
            (21, ".1", true),
            (21, "-rc3", false),
            (22, "-unstable", false),
            (22, ".0", true),
            (23, "-unstable", true),
            (20, "", false),
        ] {
            assert_eq!(
                quirks(minor, extra).logs_new_pages,
                logs,
                "4.{minor}{extra}"
            );
        }
    }

    #[test]
    fn two_releases_lose_registers() {
        for (minor, extra, loses) in [
            (20, ".0", false),
            (21, ".0", true),
            (21, ".1", true),
            (21, ".2", false),
            (22, ".0", false),
        ] {
            assert_eq!(
                quirks(minor, extra).loses_registers,
                loses,
                "4.{minor}{extra}"
            );
        }
    }
}
