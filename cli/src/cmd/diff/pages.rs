//! How the pages of two images differ: which pfns they mention, as what, and with
//! which contents. Neither image is held in memory: pages are read where the two
//! maps say they are.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use xsr_format::frame::{PAGE_SIZE, PageType};

use crate::page_map::{PageMap, Run};

/// One of the two images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Side {
    /// The first on the command line.
    A,
    /// The second.
    B,
}

/// A range of pfns that one image mentions and the other does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OnlyIn {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) side: Side,
    pub(crate) page_type: PageType,
}

/// A range of pfns whose type differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TypeDiff {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) a: PageType,
    pub(crate) b: PageType,
}

/// All that differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageDiffs {
    /// Mentioned on one side only, ascending.
    pub(crate) only_in: Vec<OnlyIn>,
    /// Of another type, ascending.
    pub(crate) types: Vec<TypeDiff>,
    /// Ranges of pfns with other contents, ascending.
    pub(crate) contents: Vec<(u64, u64)>,
    /// Pages whose contents were compared.
    pub(crate) compared: u64,
}

/// An image, as far as its pages go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages<'a> {
    pub(crate) map: &'a PageMap,
    pub(crate) file: &'a File,
}

/// A range of pfns over which both maps say one thing each.
#[derive(Clone, Copy, Debug)]
struct Segment {
    first: u64,
    last: u64,
    a: Option<Run>,
    b: Option<Run>,
}

/// The segments that two maps have together, ascending; what neither mentions is
/// left out.
fn segments(a: &PageMap, b: &PageMap) -> impl Iterator<Item = Segment> {
    let (mut runs_a, mut runs_b) = (a.runs().peekable(), b.runs().peekable());
    let mut at = 0_u64;
    std::iter::from_fn(move || {
        while runs_a.next_if(|run| run.last < at).is_some() {}
        while runs_b.next_if(|run| run.last < at).is_some() {}
        let (next_a, next_b) = (runs_a.peek().copied(), runs_b.peek().copied());
        let first = [next_a, next_b]
            .into_iter()
            .flatten()
            .map(|run| run.first.max(at))
            .min()?;
        let here = |run: Option<Run>| run.filter(|run| run.first <= first);
        // A run that lies ahead ends the segment where it begins.
        let end = |run: Option<Run>| match run {
            Some(run) if run.first <= first => run.last,
            Some(run) => run.first - 1,
            None => u64::MAX,
        };
        let last = end(next_a).min(end(next_b));
        at = last + 1;
        Some(Segment {
            first,
            last,
            a: here(next_a),
            b: here(next_b),
        })
    })
}

/// Compare the pages of two images; `progress` is told how many octets of each were
/// read.
pub(crate) fn compare(
    a: Pages<'_>,
    b: Pages<'_>,
    progress: &mut dyn FnMut(u64),
) -> io::Result<PageDiffs> {
    let mut diffs = PageDiffs::default();
    let mut contents = Contents::new();
    for Segment {
        first,
        last,
        a: run_a,
        b: run_b,
    } in segments(a.map, b.map)
    {
        let (run_a, run_b) = match (run_a, run_b) {
            (Some(run_a), Some(run_b)) => (run_a, run_b),
            (Some(run), None) => {
                diffs.push_only_in(first, last, Side::A, run.page_type);
                continue;
            }
            (None, Some(run)) => {
                diffs.push_only_in(first, last, Side::B, run.page_type);
                continue;
            }
            (None, None) => continue,
        };
        if run_a.page_type != run_b.page_type {
            diffs.push_type(first, last, run_a.page_type, run_b.page_type);
        }
        if let (Some(at_a), Some(at_b)) = (run_a.offset_of(first), run_b.offset_of(first)) {
            let pages = last - first + 1;
            diffs.compared += pages;
            contents.compare((a.file, at_a), (b.file, at_b), pages, progress, |page| {
                push_pfn(&mut diffs.contents, first + page);
            })?;
        }
    }
    Ok(diffs)
}

fn push_pfn(ranges: &mut Vec<(u64, u64)>, pfn: u64) {
    match ranges.last_mut() {
        Some((_, last)) if *last + 1 == pfn => *last = pfn,
        _ => ranges.push((pfn, pfn)),
    }
}

impl PageDiffs {
    fn push_only_in(&mut self, first: u64, last: u64, side: Side, page_type: PageType) {
        if let Some(before) = self.only_in.last_mut()
            && before.last + 1 == first
            && (before.side, before.page_type) == (side, page_type)
        {
            before.last = last;
            return;
        }
        self.only_in.push(OnlyIn {
            first,
            last,
            side,
            page_type,
        });
    }

    fn push_type(&mut self, first: u64, last: u64, a: PageType, b: PageType) {
        if let Some(before) = self.types.last_mut()
            && before.last + 1 == first
            && (before.a, before.b) == (a, b)
        {
            before.last = last;
            return;
        }
        self.types.push(TypeDiff { first, last, a, b });
    }
}

/// Room for a stretch of each image.
struct Contents {
    a: Vec<u8>,
    b: Vec<u8>,
}

impl Contents {
    const STEP: usize = 256 * PAGE_SIZE;

    fn new() -> Self {
        Self {
            a: vec![0; Self::STEP],
            b: vec![0; Self::STEP],
        }
    }

    /// Call `differs` with the number, from 0, of each page that differs.
    fn compare(
        &mut self,
        a: (&File, u64),
        b: (&File, u64),
        pages: u64,
        progress: &mut dyn FnMut(u64),
        mut differs: impl FnMut(u64),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < pages {
            let step = usize::try_from(pages - done)
                .unwrap_or(usize::MAX)
                .min(Self::STEP / PAGE_SIZE);
            let octets = step * PAGE_SIZE;
            let into = done * PAGE_SIZE as u64;
            let (room_a, room_b) = (&mut self.a[..octets], &mut self.b[..octets]);
            a.0.read_exact_at(room_a, a.1 + into)?;
            b.0.read_exact_at(room_b, b.1 + into)?;
            if room_a != room_b {
                let pairs = room_a.as_chunks::<PAGE_SIZE>().0.iter();
                for (i, (a, b)) in (done..).zip(pairs.zip(room_b.as_chunks::<PAGE_SIZE>().0)) {
                    if a != b {
                        differs(i);
                    }
                }
            }
            done += step as u64;
            progress(octets as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    const N: PageType = PageType::NOTAB;
    const T: PageType = PageType::L1TAB;
    const X: PageType = PageType::XTAB;

    /// A file with a page for each pfn of `list` that has data, filled with the
    /// given octet, and the map of it.
    fn image(list: &[(u64, PageType, u8)]) -> (File, PageMap) {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let mut map = PageMap::default();
        let mut offset = 0;
        for &(pfn, page_type, fill) in list {
            map.insert(Run {
                first: pfn,
                last: pfn,
                page_type,
                offset,
            });
            if page_type.has_data() {
                file.write_all(&[fill; PAGE_SIZE]).expect("writing");
                offset += PAGE_SIZE as u64;
            }
        }
        (file, map)
    }

    fn diff(a: &[(u64, PageType, u8)], b: &[(u64, PageType, u8)]) -> PageDiffs {
        let ((file_a, map_a), (file_b, map_b)) = (image(a), image(b));
        let a = Pages {
            map: &map_a,
            file: &file_a,
        };
        let b = Pages {
            map: &map_b,
            file: &file_b,
        };
        compare(a, b, &mut |_| ()).expect("both files can be read")
    }

    #[test]
    fn the_order_in_the_file_does_not_matter() {
        let a = [(0, N, 1), (1, N, 2), (2, X, 0), (9, T, 3)];
        let b = [(9, T, 3), (2, X, 0), (1, N, 2), (0, N, 1)];
        let same = diff(&a, &b);
        assert_eq!(same.compared, 3);
        assert_eq!(
            same,
            PageDiffs {
                compared: 3,
                ..PageDiffs::default()
            }
        );
    }

    #[test]
    fn every_kind_of_difference_is_told_apart() {
        let a = [
            (0, N, 1),
            (1, N, 2),
            (2, N, 3),
            (3, T, 4),
            (4, X, 0),
            (7, X, 0),
        ];
        let b = [
            (0, N, 9),
            (1, N, 9),
            (2, N, 3),
            (3, N, 4),
            (5, N, 5),
            (8, X, 0),
        ];
        let got = diff(&a, &b);
        assert_eq!(got.contents, [(0, 1)]);
        assert_eq!(
            got.types,
            [TypeDiff {
                first: 3,
                last: 3,
                a: T,
                b: N
            }]
        );
        let only: Vec<_> = got.only_in.iter().map(|o| (o.first, o.side)).collect();
        assert_eq!(
            only,
            [(4, Side::A), (5, Side::B), (7, Side::A), (8, Side::B)]
        );
    }

    #[test]
    fn runs_of_other_lengths_are_compared_where_they_meet() {
        let a: Vec<_> = (0..600).map(|pfn| (pfn, N, 1)).collect();
        let mut b = a.clone();
        b[10].1 = T;
        b[299].2 = 2;
        b[300].2 = 2;
        b.truncate(599);
        let got = diff(&a, &b);
        assert_eq!(got.contents, [(299, 300)]);
        assert_eq!(got.compared, 599);
        assert_eq!((got.types.len(), got.only_in.len()), (1, 1));
    }
}
