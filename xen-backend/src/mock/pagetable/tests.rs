//! Tests that after any operation of a guest or toolstack on page tables, the counts in the frame
//! table equal the existing references.

use std::collections::BTreeMap;

use proptest::prelude::*;
use xsr_format::frame::Gfn;

use super::*;
use crate::mock::{HostConfig, MockHost};
use crate::{Access, Domain, GuestKind, Host};

/// Frames of the guest.
const FRAMES: usize = 14;

/// An operation on the guest. Frames are numbers below [`FRAMES`].
#[derive(Clone, Debug)]
enum Step {
    /// Write an entry through a mapping: refused if the frame is a table.
    Write {
        table: usize,
        slot: usize,
        target: usize,
        flags: u64,
    },
    Pin {
        level: u8,
        frame: usize,
    },
    Root {
        frame: usize,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let flags = prop_oneof![
        Just(PRESENT),
        Just(PRESENT | RW),
        Just(PRESENT | RW | USER | ACCESSED),
        Just(PRESENT | PCD),
        Just(0),
    ];
    let slot = prop_oneof![
        Just(0_usize),
        Just(3),
        Just(4),
        Just(258),
        Just(430),
        Just(511)
    ];
    prop_oneof![
        4 => (0..FRAMES, slot, 0..=FRAMES, flags).prop_map(|(table, slot, target, flags)| {
            Step::Write { table, slot, target, flags }
        }),
        3 => (0_u8..=5, 0..FRAMES).prop_map(|(level, frame)| Step::Pin { level, frame }),
        1 => (0..FRAMES).prop_map(|frame| Step::Root { frame }),
    ]
}

/// The references held by the tables in use: the number for each frame and use.
fn references(
    machine: &Machine,
    domid: DomId,
    frames: &[Gfn],
    width: u8,
) -> BTreeMap<(u64, u64), u32> {
    let dom = machine.dom(domid).expect("the list");
    let dom = dom.expect("the domain");
    let tables = Tables::new(machine, &dom, width);
    let mut held = BTreeMap::new();
    for gfn in frames {
        let mfn = Mfn(gfn.0);
        let frame = machine.frames.owned(mfn, domid).expect("the guest's");
        let FrameUse::Table(level) = frame.used_as else {
            continue;
        };
        if frame.count == 0 {
            assert!(!frame.validated && !frame.pinned && frame.linear == 0);
            continue;
        }
        if frame.pinned {
            *held.entry((mfn.0, u64::from(level))).or_default() += 1;
        }
        let page = machine.read_frame(mfn).expect("readable");
        for index in tables.guest_slots(level, frame.pae_xen_l2) {
            let value = entry(&page, index);
            let target = entry_mfn(value);
            if value & PRESENT == 0 || (level == 1 && value & RW == 0) || target == mfn {
                continue;
            }
            let used_as = match level {
                1 => 6,
                _ => {
                    let target = machine.frames.owned(target, domid).expect("the guest's");
                    match target.used_as {
                        // Of the same level: a linear entry.
                        FrameUse::Table(below) if below == level => level,
                        _ => level - 1,
                    }
                }
            };
            *held.entry((target.0, u64::from(used_as))).or_default() += 1;
        }
    }
    held
}

/// Checks that the counts equal the references held by tables, plus `others`: frames, each with the
/// number of its use ([`FrameUse`]).
pub(in crate::mock) fn check_counts(
    host: &MockHost,
    domid: DomId,
    frames: &[Gfn],
    width: u8,
    others: &[(Mfn, u64)],
) {
    let machine = &host.machine;
    let mut held = references(machine, domid, frames, width);
    for (mfn, used_as) in others {
        *held.entry((mfn.0, *used_as)).or_default() += 1;
    }
    for gfn in frames {
        let frame = machine
            .frames
            .owned(Mfn(gfn.0), domid)
            .expect("the guest's");
        let as_now = match frame.used_as {
            FrameUse::None => 0,
            FrameUse::Table(level) => u64::from(level),
            FrameUse::Descriptors => 5,
            FrameUse::Writable => 6,
        };
        let of_now = held.remove(&(gfn.0, as_now)).unwrap_or(0);
        assert_eq!(frame.count, of_now, "{gfn}: {frame:?}");
    }
    assert!(held.is_empty(), "held as something else: {held:x?}");
}

/// Plant a well-formed tree first, so that some of the steps succeed.
fn plant(domain: &dyn Domain, frames: &[Gfn], width: u8) {
    let top = if width == 4 { 3 } else { 4 };
    // A 32-bit top-level entry has no permission bits.
    let flags = if width == 4 { PRESENT } else { PRESENT | RW };
    for level in 1..top {
        write(domain, frames[level], 3, frames[level - 1].0 << 12 | flags);
    }
    write(domain, frames[0], 4, frames[9].0 << 12 | PRESENT | RW);
}

fn write(domain: &dyn Domain, table: Gfn, slot: usize, value: u64) {
    let pages = domain.map(&[table], Access::Write).expect("a mapping");
    if let Some(page) = pages.page(0) {
        page.write_entry(slot, value);
    }
}

fn run(steps: &[Step], width: u8) {
    let config = HostConfig {
        memory_pages: 2048,
        ..HostConfig::default()
    };
    let host = MockHost::ephemeral(&config).expect("a host");
    let domid = host.create_domain(GuestKind::Pv, 1, 64).expect("a domain");
    let domain = host.mock_domain(domid).expect("the domain");
    crate::PvGuest::set_guest_width(&domain, width).expect("a width");
    let mut frames: Vec<Gfn> = (0..FRAMES as u64).map(Gfn).collect();
    let done = crate::GuestMemory::populate(&domain, 0, &mut frames).expect("memory");
    assert_eq!(done, FRAMES);
    plant(&domain, &frames, width);
    let tables = Tables::new(&host.machine, &domain.dom, width);
    let mut roots = Vec::new();
    for step in steps {
        match *step {
            Step::Write {
                table,
                slot,
                target,
                flags,
            } => {
                // One frame more than the guest has, so that one index names a frame that is not
                // the guest's.
                let target = frames.get(target).map_or(1 << 9, |gfn| gfn.0);
                write(&domain, frames[table], slot, target << 12 | flags);
            }
            Step::Pin { level, frame } => {
                let mfn = Mfn(frames[frame].0);
                let before = host.machine.frames.get(mfn).expect("a frame");
                if tables.pin(level, mfn).is_ok() {
                    let after = host.machine.frames.get(mfn).expect("a frame");
                    assert!(!before.pinned && after.pinned && after.validated);
                }
            }
            Step::Root { frame } => {
                let mfn = Mfn(frames[frame].0);
                if tables.get(mfn, FrameUse::Table(tables.top_level())).is_ok() {
                    roots.push((mfn, u64::from(tables.top_level())));
                }
            }
        }
        check_counts(&host, domid, &frames, width, &roots);
    }
    // Drop all roots: no references are left.
    for (root, _) in roots {
        tables.put(root).expect("held");
    }
    for gfn in &frames {
        let mfn = Mfn(gfn.0);
        let pinned = host.machine.frames.get(mfn).is_some_and(|f| f.pinned);
        let expected = if pinned { Ok(()) } else { Err(Errno::EINVAL) };
        assert_eq!(tables.unpin(mfn), expected);
    }
    for gfn in &frames {
        let frame = host.machine.frames.get(Mfn(gfn.0)).expect("a frame");
        assert_eq!((frame.count, frame.linear), (0, 0), "{gfn}: {frame:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn counts_are_those_of_the_references(
        steps in proptest::collection::vec(step(), 1..40),
        width in prop_oneof![Just(8_u8), Just(4)],
    ) {
        run(&steps, width);
    }
}

/// The property's steps do reach tables of all levels.
#[test]
fn a_planted_tree_can_be_pinned() {
    for (width, level) in [(8, 4), (4, 3)] {
        let frame = usize::from(level) - 1;
        run(&[Step::Pin { level, frame }, Step::Root { frame }], width);
    }
}

#[test]
fn linear_use_is_refused_the_other_way_round() {
    let config = HostConfig {
        memory_pages: 2048,
        ..HostConfig::default()
    };
    let host = MockHost::ephemeral(&config).expect("a host");
    let domid = host.create_domain(GuestKind::Pv, 1, 64).expect("a domain");
    let domain = host.mock_domain(domid).expect("the domain");
    let mut frames: Vec<Gfn> = (0..4).map(Gfn).collect();
    crate::GuestMemory::populate(&domain, 0, &mut frames).expect("memory");
    // 1 and 2 refer to 0, 3 to 2: a table with linear entries cannot be the target of one.
    for (table, target) in [(1, 0), (2, 0), (3, 2)] {
        write(&domain, frames[table], 9, frames[target].0 << 12 | PRESENT);
    }
    let tables = Tables::new(&host.machine, &domain.dom, 8);
    let pin = |n: usize| tables.pin(4, Mfn(frames[n].0));
    assert_eq!([pin(0), pin(1), pin(2)], [Ok(()); 3]);
    assert_eq!(pin(3), Err(Errno::EINVAL));
    check_counts(&host, domid, &frames, 8, &[]);
}
