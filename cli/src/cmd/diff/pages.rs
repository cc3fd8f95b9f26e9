//! Compares the pages of two images: which pfns they mention, their types and their contents.
//! Neither image is held in memory: pages are read at the offsets in the two maps.

use std::io;

use serde::Serialize;
use xsr_format::frame::{PAGE_SIZE, PageType};
use xsr_save_restore::storage::StorageCursor;

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

/// A range of pfns that only one image mentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OnlyIn {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) side: Side,
    pub(crate) page_type: PageType,
}

/// A range of pfns whose types differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TypeDiff {
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) a: PageType,
    pub(crate) b: PageType,
}

/// A difference between the pages of two images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageDiff {
    /// Mentioned in one image only.
    OnlyIn(OnlyIn),
    /// With different types.
    Types(TypeDiff),
    /// First and last of a range of pfns with different contents.
    Contents(u64, u64),
}

/// The pages of an image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pages<'a> {
    pub(crate) map: &'a PageMap,
    pub(crate) image: &'a StorageCursor,
}

/// A range of pfns over which neither map changes.
#[derive(Clone, Copy, Debug)]
struct Segment {
    first: u64,
    last: u64,
    a: Option<Run>,
    b: Option<Run>,
}

/// The segments of two maps together, ascending. Pfns that neither mentions are left out.
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
        // A run that begins later ends the segment where it begins.
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

/// Compare the pages of two images. Calls `progress` with the number of bytes read of each, and
/// `found` with each difference: those of one kind in ascending order, neighbours joined. Returns
/// the number of pages compared.
pub(crate) fn compare(
    a: Pages<'_>,
    b: Pages<'_>,
    progress: &mut dyn FnMut(u64),
    found: &mut dyn FnMut(PageDiff),
) -> io::Result<u64> {
    let mut joined = Joined {
        only_in: None,
        types: None,
        contents: None,
        found,
    };
    let mut compared = 0;
    let mut contents = Contents::new();
    for Segment {
        first,
        last,
        a: run_a,
        b: run_b,
    } in segments(a.map, b.map)
    {
        let only_in = |side, run: Run| OnlyIn {
            first,
            last,
            side,
            page_type: run.page_type,
        };
        let (run_a, run_b) = match (run_a, run_b) {
            (Some(run_a), Some(run_b)) => (run_a, run_b),
            (Some(run), None) => {
                joined.only_in(only_in(Side::A, run));
                continue;
            }
            (None, Some(run)) => {
                joined.only_in(only_in(Side::B, run));
                continue;
            }
            (None, None) => continue,
        };
        if run_a.page_type != run_b.page_type {
            let (a, b) = (run_a.page_type, run_b.page_type);
            joined.types(TypeDiff { first, last, a, b });
        }
        if let (Some(at_a), Some(at_b)) = (run_a.offset_of(first), run_b.offset_of(first)) {
            let pages = last - first + 1;
            compared += pages;
            contents.compare((a.image, at_a), (b.image, at_b), pages, progress, |page| {
                joined.contents(first + page);
            })?;
        }
    }
    joined.finish();
    Ok(compared)
}

/// Joins neighbouring differences of one kind before it reports them.
struct Joined<'f> {
    only_in: Option<OnlyIn>,
    types: Option<TypeDiff>,
    contents: Option<(u64, u64)>,
    found: &'f mut dyn FnMut(PageDiff),
}

impl Joined<'_> {
    fn only_in(&mut self, next: OnlyIn) {
        match &mut self.only_in {
            Some(before)
                if before.last + 1 == next.first
                    && (before.side, before.page_type) == (next.side, next.page_type) =>
            {
                before.last = next.last;
            }
            slot => {
                if let Some(before) = slot.replace(next) {
                    (self.found)(PageDiff::OnlyIn(before));
                }
            }
        }
    }

    fn types(&mut self, next: TypeDiff) {
        match &mut self.types {
            Some(before)
                if before.last + 1 == next.first && (before.a, before.b) == (next.a, next.b) =>
            {
                before.last = next.last;
            }
            slot => {
                if let Some(before) = slot.replace(next) {
                    (self.found)(PageDiff::Types(before));
                }
            }
        }
    }

    fn contents(&mut self, pfn: u64) {
        match &mut self.contents {
            Some((_, last)) if *last + 1 == pfn => *last = pfn,
            slot => {
                if let Some((first, last)) = slot.replace((pfn, pfn)) {
                    (self.found)(PageDiff::Contents(first, last));
                }
            }
        }
    }

    fn finish(self) {
        let only_in = self.only_in.map(PageDiff::OnlyIn);
        let types = self.types.map(PageDiff::Types);
        let contents = self.contents;
        let contents = contents.map(|(first, last)| PageDiff::Contents(first, last));
        for last in [only_in, types, contents].into_iter().flatten() {
            (self.found)(last);
        }
    }
}

/// Buffers for a stretch of each image.
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
        a: (&StorageCursor, u64),
        b: (&StorageCursor, u64),
        pages: u64,
        progress: &mut dyn FnMut(u64),
        mut differs: impl FnMut(u64),
    ) -> io::Result<()> {
        let mut done = 0;
        while done < pages {
            let step = usize::try_from(pages - done)
                .unwrap_or(usize::MAX)
                .min(Self::STEP / PAGE_SIZE);
            let bytes = step * PAGE_SIZE;
            let into = done * PAGE_SIZE as u64;
            let (room_a, room_b) = (&mut self.a[..bytes], &mut self.b[..bytes]);
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
            progress(bytes as u64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, Write as _};

    use super::*;

    const N: PageType = PageType::NOTAB;
    const T: PageType = PageType::L1TAB;
    const X: PageType = PageType::XTAB;

    /// A file with a page for each pfn of `list` that has data, filled with the given byte, and its
    /// map.
    fn image(list: &[(u64, PageType, u8)]) -> (StorageCursor, PageMap) {
        let mut file = tempfile::tempfile().expect("a temporary file");
        let mut map = PageMap::default();
        let mut offset = 0;
        for &(pfn, page_type, fill) in list {
            map.insert(Run {
                first: pfn,
                last: pfn,
                page_type,
                offset,
            })
            .expect("few pages");
            if page_type.has_data() {
                file.write_all(&[fill; PAGE_SIZE]).expect("writing");
                offset += PAGE_SIZE as u64;
            }
        }
        file.rewind().expect("a file");
        let opened = xsr_save_restore::storage::file::opened(file, "image").expect("a file");
        (StorageCursor::new(opened).expect("a file"), map)
    }

    /// All differences.
    #[derive(Debug, Default, PartialEq, Eq)]
    struct PageDiffs {
        only_in: Vec<OnlyIn>,
        types: Vec<TypeDiff>,
        contents: Vec<(u64, u64)>,
        compared: u64,
    }

    fn diff(a: &[(u64, PageType, u8)], b: &[(u64, PageType, u8)]) -> PageDiffs {
        let ((file_a, map_a), (file_b, map_b)) = (image(a), image(b));
        let a = Pages {
            map: &map_a,
            image: &file_a,
        };
        let b = Pages {
            map: &map_b,
            image: &file_b,
        };
        let mut diffs = PageDiffs::default();
        let compared = compare(a, b, &mut |_| (), &mut |found| match found {
            PageDiff::OnlyIn(only) => diffs.only_in.push(only),
            PageDiff::Types(types) => diffs.types.push(types),
            PageDiff::Contents(first, last) => diffs.contents.push((first, last)),
        });
        diffs.compared = compared.expect("both files can be read");
        diffs
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
