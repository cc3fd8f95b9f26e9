//! Checks of a domain's memory.

use crate::Errno;
use xsr_format::frame::{Gfn, PAGE_SIZE, PageType};

use super::kit::{self, Guest};
use super::{Check, REFUSED, Violation, ensure, equal, fails};
use crate::{Access, GuestKind, Host};

pub(super) const CHECKS: &[(&str, Check)] = &[
    ("new pages are zero and keep what is written", contents),
    ("types of absent frames are XTAB", absent_types),
    (
        "page_types takes 1024 frames and not one more",
        type_batches,
    ),
    (
        "frames that are not the domain's fail alone",
        foreign_frames,
    ),
    ("pages are written whole, each in its place", written),
    ("a read-only mapping shows later writes", shared_mappings),
    ("populate stops at the domain's limit", limit),
    ("populate of superpages gives contiguous frames", superpages),
    (
        "populate refuses other orders and misaligned pfns",
        bad_extents,
    ),
    (
        "a PV guest's pfn may be populated again",
        pv_populated_twice,
    ),
    ("pages that were given back are gone", released),
    ("release stops at a frame that cannot go", not_released),
    ("the largest gfn is that of the largest page", maximum_gfn),
];

const KINDS: [GuestKind; 2] = [GuestKind::Pv, GuestKind::Pvh];

fn contents(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let (guest, gfns) = Guest::with_pages(host, kind, 40)?;
        for (n, gfn) in (0..).zip(&gfns) {
            equal(&guest.read(*gfn)?, &[0; 512], "a new page")?;
            guest.write(*gfn, &[(0, n), (511, !n)])?;
        }
        let pages = guest.map(&gfns, Access::Read)?;
        equal(&pages.len(), &40, "pages mapped")?;
        for (n, page) in (0..).zip(pages.iter().map(|(_, page)| page)) {
            let words = (page.read_entry(0), page.read_entry(511));
            equal(&words, &(n, !n), "what was written")?;
        }
        equal(&guest.info()?.tot_pages, &40, "pages of the domain")?;
    }
    Ok(())
}

fn absent_types(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let (guest, gfns) = Guest::with_pages(host, kind, 2)?;
        let absent = [gfns[0], Gfn(1 << 40), Gfn::INVALID, gfns[1]];
        let expected = [
            PageType::NOTAB,
            PageType::XTAB,
            PageType::XTAB,
            PageType::NOTAB,
        ];
        equal(&guest.types(&absent)?, &expected.to_vec(), "types")?;
    }
    let (guest, _) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    let (other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    equal(
        &guest.types(&others)?,
        &vec![PageType::XTAB],
        "another domain's frame",
    )?;
    let shared_info = other.info()?.shared_info_frame;
    equal(
        &other.types(&[shared_info])?,
        &vec![PageType::XTAB],
        "shared_info",
    )
}

fn type_batches(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pvh, 1, 1)?;
    let gfns: Vec<Gfn> = (0..1025).map(Gfn).collect();
    let mut types = vec![PageType::NOTAB; 1025];
    guest.page_types(&gfns[..1024], &mut types[..1024])?;
    fails(
        guest.page_types(&gfns, &mut types),
        Errno::E2BIG,
        "1025 frames",
    )?;
    fails(
        guest.page_types(&gfns[..2], &mut types[..3]),
        Errno::EINVAL,
        "lengths that differ",
    )
}

fn foreign_frames(host: &dyn Host) -> Result<(), Violation> {
    let (_other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    for kind in KINDS {
        let (guest, gfns) = Guest::with_pages(host, kind, 3)?;
        let stranger = match kind {
            GuestKind::Pv => others[0],
            _ => Gfn(3),
        };
        for access in [Access::Read, Access::Write] {
            let wanted = [gfns[0], Gfn(1 << 40), gfns[1], stranger, gfns[2]];
            let pages = guest.map(&wanted, access)?;
            let failed: Vec<_> = pages
                .failed()
                .iter()
                .map(|e| (e.index, e.gfn, REFUSED.contains(&e.errno)))
                .collect();
            let expected = vec![(1, wanted[1], true), (3, wanted[3], true)];
            equal(&failed, &expected, "frames that were refused")?;
            for index in [0, 2, 4] {
                let page = pages.page(index);
                ensure(
                    page.is_some_and(|page| page.read_entry(7) == 0),
                    "the others are mapped",
                )?;
            }
        }
    }
    equal(
        &Guest::new(host, GuestKind::Pv, 1, 1)?
            .map(&[], Access::Read)?
            .len(),
        &0,
        "no frames",
    )
}

fn shared_mappings(host: &dyn Host) -> Result<(), Violation> {
    let (guest, gfns) = Guest::with_pages(host, GuestKind::Pvh, 1)?;
    // The same frame twice, and again for writing.
    let seen = guest.map(&[gfns[0], gfns[0]], Access::Read)?;
    guest.write(gfns[0], &[(3, 0x1234)])?;
    for index in 0..2 {
        let word = seen.page(index).map(|page| page.read_entry(3));
        equal(&word, &Some(0x1234), "a word of the page")?;
    }
    Ok(())
}

fn limit(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 600)?;
        let mut large = [Gfn(0), Gfn(512)];
        equal(
            &guest.populate(9, &mut large)?,
            &1,
            "extents of 512 into 600",
        )?;
        let mut small: Vec<Gfn> = (1024..1124).map(Gfn).collect();
        equal(
            &guest.populate(0, &mut small)?,
            &88,
            "pages into what is left",
        )?;
        equal(
            &guest.populate(0, &mut [Gfn(2000)])?,
            &0,
            "pages into nothing",
        )?;
        equal(&guest.info()?.tot_pages, &600, "pages of the domain")?;
    }
    Ok(())
}

fn superpages(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1024)?;
        let mut extents = [Gfn(0), Gfn(512)];
        equal(&guest.populate(9, &mut extents)?, &2, "extents")?;
        if kind != GuestKind::Pv {
            equal(&extents, &[Gfn(0), Gfn(512)], "a translated guest's gfns")?;
        }
        for first in extents {
            ensure(first.0.is_multiple_of(512), "an extent is aligned")?;
            let gfns: Vec<Gfn> = (first.0..first.0 + 512).map(Gfn).collect();
            ensure(
                guest.map(&gfns, Access::Write)?.failed().is_empty(),
                "all of it is there",
            )?;
        }
    }
    Ok(())
}

fn bad_extents(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 2048)?;
        for order in [1, 8, 10, 19, 255] {
            fails(
                guest.populate(order, &mut [Gfn(0)]),
                Errno::EINVAL,
                "an order",
            )?;
        }
        let misaligned = guest.populate(9, &mut [Gfn(0), Gfn(513)]);
        fails(misaligned, Errno::EINVAL, "a misaligned pfn")?;
        equal(&guest.info()?.tot_pages, &0, "pages of the domain")?;
    }
    Ok(())
}

fn pv_populated_twice(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Pv, 1, 2)?;
    let mut frames = [Gfn(5), Gfn(5)];
    equal(&guest.populate(0, &mut frames)?, &2, "pages")?;
    ensure(frames[0] != frames[1], "two frames")?;
    let m2p = guest.pv()?.m2p()?;
    for frame in frames {
        equal(
            &m2p.pfn(kit::mfn(frame)).map(|pfn| pfn.0),
            &Some(5),
            "their pfn",
        )?;
    }
    Ok(())
}

fn maximum_gfn(host: &dyn Host) -> Result<(), Violation> {
    let guest = Guest::new(host, GuestKind::Hvm, 1, 2048)?;
    for (pfn, largest) in [(9, 9), (0xf_effc, 0xf_effc), (3, 0xf_effc)] {
        guest.populate(0, &mut [Gfn(pfn)])?;
        equal(&guest.maximum_gfn()?, &Some(Gfn(largest)), "largest gfn")?;
    }
    equal(&guest.populate(9, &mut [Gfn(0x10_0000)])?, &1, "an extent")?;
    equal(&guest.maximum_gfn()?, &Some(Gfn(0x10_01ff)), "largest gfn")
}

fn released(host: &dyn Host) -> Result<(), Violation> {
    for kind in KINDS {
        let guest = Guest::new(host, kind, 1, 1024)?;
        let mut extent = [Gfn(512)];
        equal(&guest.populate(9, &mut extent)?, &1, "an extent")?;
        let [first] = extent;
        let gfns: Vec<Gfn> = (first.0..first.0 + 512).map(Gfn).collect();
        for gfn in [gfns[3], gfns[4], gfns[511]] {
            guest.write(gfn, &[(0, 0x5ec2e7)])?;
        }
        equal(
            &guest.release(&[gfns[3], gfns[511]])?,
            &2,
            "pages given back",
        )?;
        equal(&guest.info()?.tot_pages, &510, "pages of the domain")?;
        let types = guest.types(&[gfns[3], gfns[4], gfns[511]])?;
        let expected = [PageType::XTAB, PageType::NOTAB, PageType::XTAB];
        equal(&types, &expected.to_vec(), "types")?;
        let pages = guest.map(&gfns[2..5], Access::Read)?;
        let failed: Vec<usize> = pages.failed().iter().map(|e| e.index).collect();
        equal(&failed, &vec![1], "frames that failed")?;
        drop(pages);
        equal(&guest.read(gfns[4])?[0], &0x5ec2e7, "a neighbour")?;
        // The pfn may be populated again; its contents are unspecified.
        let mut again = [Gfn(515)];
        equal(&guest.populate(0, &mut again)?, &1, "a page")?;
        guest.write(again[0], &[(0, 7)])?;
        equal(&guest.read(again[0])?[0], &7, "a page populated again")?;
        equal(&guest.release(&[])?, &0, "no pages")?;
    }
    Ok(())
}

fn not_released(host: &dyn Host) -> Result<(), Violation> {
    let (_other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    for kind in KINDS {
        let (guest, gfns) = Guest::with_pages(host, kind, 4)?;
        let strangers = match kind {
            GuestKind::Pv => vec![others[0], Gfn(1 << 40), Gfn::INVALID],
            _ => vec![Gfn(4), Gfn(1 << 40), Gfn::INVALID],
        };
        for (n, stranger) in strangers.into_iter().enumerate() {
            let done = guest.release(&[gfns[n], stranger])?;
            equal(&guest.info()?.tot_pages, &(3 - n as u64), "pages left")?;
            // A pfn without a page may count as released.
            let passes = kind != GuestKind::Pv && done == 2;
            ensure(
                done == 1 || passes,
                &format!("{kind:?}: it stops at stranger {stranger}, not after {done}"),
            )?;
        }
        // A page cannot be released twice.
        guest.release(&[gfns[0]])?;
        equal(&guest.info()?.tot_pages, &1, "a page that is gone")?;
    }
    Ok(())
}

fn written(host: &dyn Host) -> Result<(), Violation> {
    let (_other, others) = Guest::with_pages(host, GuestKind::Pv, 1)?;
    for kind in KINDS {
        let (guest, gfns) = Guest::with_pages(host, kind, 40)?;
        let stranger = match kind {
            GuestKind::Pv => others[0],
            _ => Gfn(40),
        };
        // Out of order, with one that does not exist, one twice, and a contiguous run.
        let mut asked = vec![gfns[7], stranger, gfns[3], gfns[7], Gfn::INVALID];
        asked.extend(&gfns[8..40]);
        let contents: Vec<u8> = (0..asked.len() * PAGE_SIZE)
            .map(|byte| u8::try_from(byte / 8 % 251).unwrap_or(0))
            .collect();
        let failed = guest.write_pages(&asked, &contents)?;
        let failed: Vec<_> = failed.iter().map(|e| (e.index, e.gfn, e.errno)).collect();
        let expected = vec![
            (1, stranger, Errno::EINVAL),
            (4, Gfn::INVALID, Errno::EINVAL),
        ];
        equal(&failed, &expected, "frames that failed")?;
        for (index, gfn) in asked.iter().enumerate() {
            if [0, 1, 4].contains(&index) {
                continue;
            }
            let words = guest.read(*gfn)?;
            let bytes = &contents[index * PAGE_SIZE..(index + 1) * PAGE_SIZE];
            let same = (bytes.as_chunks().0.iter().zip(words))
                .all(|(bytes, word)| u64::from_le_bytes(*bytes) == word);
            ensure(same, "a page holds what was written")?;
        }
        for gfn in [gfns[0], gfns[2], gfns[4], gfns[6]] {
            equal(&guest.read(gfn)?, &[0; 512], "a page that was not written")?;
        }
        fails(
            guest.write_pages(&gfns[..2], &contents[..PAGE_SIZE]),
            Errno::EINVAL,
            "a page too few",
        )?;
        equal(&guest.write_pages(&[], &[])?, &vec![], "no pages")?;
    }
    Ok(())
}
