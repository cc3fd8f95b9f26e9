//! Differences that a restore itself makes, so that they are expected in an image saved from a
//! restored domain. The list is short, and each entry has its reason; docs/images.md has it too.
//!
//! C implementation: `process_start_info`, `handle_shared_info` and `update_guest_p2m` of
//! `xg_sr_restore_x86_pv.c`, `handle_hvm_params` of `xg_sr_restore_x86_hvm.c`, `tsc_set_info` of
//! Xen.

use std::collections::BTreeMap;

use xsr_format::fields::hvm::param_name;
use xsr_format::frame::PageType;

use super::difference::{Difference, Section, What};
use super::image::Image;

const P2M: &str = "the p2m names machine frames, and the new domain has others";
const RING: &str = "the ring is emptied: its other end is new";
const CONNECTION: &str = "the new domain's own frames, event channels and start flags";
const EVENTS: &str = "no event channel survives: none pending, all masked";
const P2M_ROOT: &str = "it named machine frames; the guest sets it anew when it resumes";
const WALL_CLOCK: &str = "Xen keeps the new domain's own wall clock";
const INCARNATION: &str = "Xen counts how often a domain was restored";
const TRAILING: &str = "frames that were never populated are not made";

/// A field by section and name; `[*]` stands for any index.
struct FieldRule {
    section: Section,
    field: &'static str,
    reason: &'static str,
}

const fn rule(section: Section, field: &'static str, reason: &'static str) -> FieldRule {
    FieldRule {
        section,
        field,
        reason,
    }
}

const FIELDS: &[FieldRule] = &[
    rule(Section::StartInfo, "nr_pages", CONNECTION),
    rule(Section::StartInfo, "shared_info", CONNECTION),
    rule(Section::StartInfo, "flags", CONNECTION),
    rule(Section::StartInfo, "store_mfn", CONNECTION),
    rule(Section::StartInfo, "store_evtchn", CONNECTION),
    rule(Section::StartInfo, "console.mfn", CONNECTION),
    rule(Section::StartInfo, "console.evtchn", CONNECTION),
    rule(Section::SharedInfo, "evtchn_pending[*]", EVENTS),
    rule(Section::SharedInfo, "evtchn_mask[*]", EVENTS),
    rule(
        Section::SharedInfo,
        "vcpu_info[*].evtchn_pending_sel",
        EVENTS,
    ),
    rule(
        Section::SharedInfo,
        "arch.pfn_to_mfn_frame_list_list",
        P2M_ROOT,
    ),
    rule(Section::SharedInfo, "arch.p2m_cr3", P2M_ROOT),
    rule(Section::SharedInfo, "wc_version", WALL_CLOCK),
    rule(Section::SharedInfo, "wc_sec", WALL_CLOCK),
    rule(Section::SharedInfo, "wc_nsec", WALL_CLOCK),
    rule(Section::SharedInfo, "wc_sec_hi", WALL_CLOCK),
    rule(Section::Tsc, "incarnation", INCARNATION),
];

/// HVM parameters whose page a restore clears.
const CLEARED: &[&str] = &["STORE_PFN", "CONSOLE_PFN", "IOREQ_PFN", "BUFIOREQ_PFN"];

/// Expected differences between two images.
#[derive(Debug)]
pub(crate) struct Expected {
    /// The p2m's pages in either image, ascending.
    p2m: Vec<u64>,
    /// Other pages that a restore changes, with the reason.
    pages: BTreeMap<u64, &'static str>,
    /// From here on no page is populated in either image.
    unpopulated_from: u64,
}

impl Expected {
    /// The expected differences if `b` was saved from a domain restored from `a`.
    pub(crate) fn new(a: &Image, b: &Image) -> Self {
        let (mut p2m, mut pages) = (Vec::new(), BTreeMap::new());
        for image in [a, b] {
            p2m.append(&mut p2m_pages(image));
            for param in image.guest.hvm_params() {
                if param_name(param.index).is_some_and(|name| CLEARED.contains(&name)) {
                    pages.insert(param.value, RING);
                }
            }
        }
        let end = |image: &Image| {
            let populated = image.map.runs().filter(|run| run.page_type.is_populated());
            populated.last().map_or(0, |run| run.last + 1)
        };
        p2m.sort_unstable();
        p2m.dedup();
        Self {
            p2m,
            pages,
            unpopulated_from: end(a).max(end(b)),
        }
    }

    /// The first page from `first` to `last` that is expected to differ, and why.
    fn next_page(&self, first: u64, last: u64) -> Option<(u64, &'static str)> {
        let at = self.p2m.partition_point(|pfn| *pfn < first);
        let p2m = self.p2m.get(at).filter(|pfn| **pfn <= last);
        let other = self.pages.range(first..=last).next();
        match (p2m, other) {
            (Some(p2m), Some((other, reason))) if other <= p2m => Some((*other, reason)),
            (Some(p2m), _) => Some((*p2m, P2M)),
            (None, other) => other.map(|(pfn, reason)| (*pfn, *reason)),
        }
    }

    /// Mark what is expected. A range that is only partly expected is split.
    pub(crate) fn mark(&self, difference: Difference) -> Vec<Difference> {
        let mut out = Vec::with_capacity(1);
        match difference.what {
            What::Field { ref field, .. } => {
                let expected = field_reason(difference.section, field);
                out.push(Difference {
                    expected,
                    ..difference
                });
            }
            What::Contents {
                first_pfn,
                last_pfn,
            } => self.mark_contents(first_pfn, last_pfn, &difference, &mut out),
            What::Types { .. } => self.mark_types(difference, &mut out),
        }
        out
    }

    fn mark_contents(
        &self,
        first: u64,
        last: u64,
        difference: &Difference,
        out: &mut Vec<Difference>,
    ) {
        let mut push = |first_pfn: u64, last_pfn: u64, expected| {
            out.push(Difference {
                what: What::Contents {
                    first_pfn,
                    last_pfn,
                },
                expected,
                ..difference.clone()
            });
        };
        let mut at = first;
        while at <= last
            && let Some((pfn, reason)) = self.next_page(at, last)
        {
            if pfn > at {
                push(at, pfn - 1, None);
            }
            let mut end = pfn;
            while end < last && self.next_page(end + 1, end + 1) == Some((end + 1, reason)) {
                end += 1;
            }
            push(pfn, end, Some(reason));
            at = end + 1;
        }
        if at <= last {
            push(at, last, None);
        }
    }

    fn mark_types(&self, difference: Difference, out: &mut Vec<Difference>) {
        let (first, last, a, b) = match difference.what {
            What::Types {
                first_pfn,
                last_pfn,
                a,
                b,
            } => (first_pfn, last_pfn, a, b),
            _ => return out.push(difference),
        };
        let absent = |page_type: Option<PageType>| page_type.is_none_or(|t| t == PageType::XTAB);
        let from = self.unpopulated_from.max(first);
        if !absent(a) || !absent(b) || from > last {
            return out.push(difference);
        }
        let part = |first_pfn, last_pfn, expected| Difference {
            what: What::Types {
                first_pfn,
                last_pfn,
                a,
                b,
            },
            expected,
            ..difference.clone()
        };
        if from > first {
            out.push(part(first, from - 1, None));
        }
        out.push(part(from, last, Some(TRAILING)));
    }
}

/// The pages of an image's p2m that have contents, ascending.
fn p2m_pages(image: &Image) -> Vec<u64> {
    let frames = image.guest.p2m().into_iter().flat_map(|p2m| &p2m.frames);
    let mut frames: Vec<u64> = frames.map(|pfn| pfn.0).collect();
    frames.sort_unstable();
    frames.dedup();
    let mut runs = image.map.runs().filter(|run| run.page_type.has_data());
    let mut run = runs.next();
    frames.retain(|pfn| {
        while run.is_some_and(|run| run.last < *pfn) {
            run = runs.next();
        }
        run.is_some_and(|run| run.first <= *pfn)
    });
    frames.shrink_to_fit();
    frames
}

fn field_reason(section: Section, field: &str) -> Option<&'static str> {
    let field = without_indices(field);
    FIELDS
        .iter()
        .find(|rule| rule.section == section && rule.field == field)
        .map(|rule| rule.reason)
}

/// The name, with `[*]` for each index.
pub(crate) fn without_indices(field: &str) -> String {
    let mut out = String::with_capacity(field.len());
    let mut rest = field;
    while let Some((before, behind)) = rest.split_once('[') {
        out.push_str(before);
        out.push_str("[*]");
        rest = behind.split_once(']').map_or("", |(_, behind)| behind);
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expected() -> Expected {
        Expected {
            p2m: vec![5, 6],
            pages: BTreeMap::from([(8, RING)]),
            unpopulated_from: 100,
        }
    }

    fn difference(section: Section, what: What) -> Difference {
        Difference {
            section,
            what,
            expected: None,
        }
    }

    #[test]
    fn a_range_is_split_where_only_part_is_expected() {
        let what = What::Contents {
            first_pfn: 3,
            last_pfn: 9,
        };
        let marked = expected().mark(difference(Section::PageContents, what));
        let got: Vec<_> = marked
            .iter()
            .map(|d| match d.what {
                What::Contents {
                    first_pfn,
                    last_pfn,
                } => (first_pfn, last_pfn, d.expected),
                _ => panic!("{d:?}"),
            })
            .collect();
        assert_eq!(
            got,
            [
                (3, 4, None),
                (5, 6, Some(P2M)),
                (7, 7, None),
                (8, 8, Some(RING)),
                (9, 9, None)
            ]
        );
    }

    #[test]
    fn only_frames_behind_the_last_populated_one_may_go() {
        let types = |first_pfn, last_pfn, a| {
            let what = What::Types {
                first_pfn,
                last_pfn,
                a: Some(a),
                b: None,
            };
            expected()
                .mark(difference(Section::Pfns, what))
                .iter()
                .map(|d| d.expected.is_some())
                .collect::<Vec<_>>()
        };
        assert_eq!(types(90, 120, PageType::XTAB), [false, true]);
        assert_eq!(types(100, 120, PageType::XTAB), [true]);
        assert_eq!(types(10, 20, PageType::XTAB), [false]);
        assert_eq!(types(100, 120, PageType::NOTAB), [false]);
    }

    #[test]
    fn fields_are_found_by_name_whatever_their_index() {
        let reason = |section, field| field_reason(section, field);
        assert_eq!(reason(Section::SharedInfo, "evtchn_mask[63]"), Some(EVENTS));
        let pending = "vcpu_info[31].evtchn_pending_sel";
        assert_eq!(reason(Section::SharedInfo, pending), Some(EVENTS));
        assert_eq!(reason(Section::Vcpus, "vcpu 0 user_regs.rax"), None);
        assert_eq!(reason(Section::StartInfo, "pt_base"), None);
        assert_eq!(reason(Section::Config, "flags"), None);
    }

    #[test]
    fn the_list_is_the_documented_one() {
        let page = include_str!("../../../../docs/images.md");
        for rule in FIELDS {
            let name = rule.field.trim_end_matches("[*]");
            let name = name.trim_start_matches("vcpu_info[*].");
            assert!(
                page.contains(&format!("`{name}`")),
                "{name} is not in docs/images.md"
            );
        }
        for name in CLEARED {
            assert!(page.contains(name), "{name} is not in docs/images.md");
        }
    }
}
