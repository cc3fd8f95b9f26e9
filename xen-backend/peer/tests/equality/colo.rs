//! COLO with either engine on either host: both guests work, differently, and each checkpoint makes
//! them equal.

use xsr_format::frame::Gfn;
use xsr_xen_backend::ShutdownReason;
use xsr_xen_backend::mock::HostConfig;

use super::driver::colo::{End, protect};
use super::*;

/// The number of checkpoints.
const CHECKPOINTS: u32 = 4;

/// A page that Xen itself gives each HVM domain on Intel processors. Stock's secondary asks for the
/// largest page once, before any memory has arrived, and reports no page above it: on a machine
/// without that page it would report none at all.
const APIC_ACCESS: u64 = 0xf_ee00;

/// The guest's work: ours has it stored with the domain, stock's does it in steps.
fn work(seed: u64) -> Stepped {
    Stepped {
        work: WorkloadSpec::writes(seed, 1, 2000),
        operations: Some(100),
    }
}

fn keep(dir: &Path, domid: DomId, seed: u64) {
    let spec = serde_json::to_vec(&work(seed).work).unwrap();
    let host = MockHost::open(dir).unwrap();
    host.userdata_store(domid, "mock-workload", &spec).unwrap();
}

fn pair(kind: GuestKind, from: Whose, to: Whose) {
    let Some(helpers) = helpers() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let [here, there] = ["here", "there"].map(|name| scratch.path().join(name));
    let stepped = |whose, seed| (whose == Whose::Stock).then(|| work(seed));
    let domid = driver::with_working_guest(&here, kind, 8, MIB, stepped(from, 1)).unwrap();
    keep(&here, domid, 1);
    let config = HostConfig {
        stepped: stepped(to, 2),
        ..driver::config(MIB)
    };
    let host = MockHost::create(&there, &config).unwrap();
    let empty = driver::empty_on(&host, kind, 8, MIB).unwrap();
    let domain = host.domain(empty.domid).unwrap();
    let mut page = [Gfn(APIC_ACCESS)];
    assert_eq!(domain.populate(0, &mut page).unwrap(), 1);
    drop((domain, host));
    keep(&there, empty.domid, 2);
    let end = |whose, host| End { whose, host };
    let [sent, received] = protect(
        &helpers,
        (end(from, &here), domid),
        (end(to, &there), &empty),
        CHECKPOINTS,
    )
    .unwrap();
    let what = format!("{kind:?}, from {from:?} to {to:?}: {sent:#?}, {received:#?}");
    let (suspend, postcopy, checkpoint, wait) = (3, 4, 5, 6);
    let turns = CHECKPOINTS as usize;
    let turn = [suspend, checkpoint, postcopy, wait];
    let mut expected = [&[7][..], &turn.repeat(turns)].concat();
    expected.truncate(expected.len() - 2);
    expected.extend([7, 10]);
    assert_eq!(sent.numbers(), expected, "{what}");
    let turn = [checkpoint, 9, postcopy, wait, suspend];
    let mut expected = [&[8][..], &turn.repeat(turns)].concat();
    expected.truncate(expected.len() - 2);
    expected.extend([9, 10]);
    assert_eq!(received.numbers(), expected, "{what}");
    let result = |run: &driver::Run| run.result().map(|(result, _)| result);
    assert_eq!((result(&sent), sent.code), (Some(-1), Some(0)), "{what}");
    assert_eq!(
        (result(&received), received.code),
        (Some(0), Some(0)),
        "{what}"
    );
    let [left, arrived] = [(&here, domid), (&there, empty.domid)].map(|(dir, domid)| {
        let host = MockHost::open(dir).unwrap();
        let info = host.domain(domid).unwrap().info().unwrap();
        assert_eq!(info.shutdown, Some(ShutdownReason::Suspend), "{what}");
        host.memory_digest(domid).unwrap()
    });
    let mut differ = left.differences(&arrived);
    let (rings, _) = received.rings().unwrap().as_chunks::<8>();
    // The pages that a restore clears: those of xenstore, console and ioreq.
    differ.retain(|pfn| {
        let ring = |ring: &[u8; 8]| pfn.0.abs_diff(u64::from_ne_bytes(*ring)) <= 8;
        pfn.0 != APIC_ACCESS && !rings.iter().any(ring)
    });
    assert_eq!(differ, [], "{what}");
}

fn pairs(kind: GuestKind) {
    use Whose::{Ours, OursByCalls, Stock};
    for (from, to) in [
        (Stock, Stock),
        (Stock, Ours),
        (Ours, Stock),
        (Stock, OursByCalls),
        (OursByCalls, Stock),
        (OursByCalls, OursByCalls),
    ] {
        pair(kind, from, to);
    }
}

#[test]
fn colo_pvh() {
    pairs(GuestKind::Pvh);
}

#[test]
fn colo_hvm() {
    pairs(GuestKind::Hvm);
}
