//! Ballooning during a live save: a translated guest that gives pages back and takes pages arrives
//! with the memory that it had when it suspended, whether the hypervisor's dirty log reports this
//! or not.

use std::ops::ControlFlow;

use crate::common::*;
use xsr_format::frame::{Gfn, PAGE_SIZE, Pfn};
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::SaveStats;
use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats};
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack, ToolstackError};
use xsr_save_restore::{Live, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host, XenVersion};

/// Pages of the guest's memory, in different batches.
const A: u64 = 0x345;
const B: u64 = 0x7c0;

/// When the guest acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    /// Before the save.
    Before,
    /// In the middle of pass `n`, after its first batch.
    InPass(u32),
    /// After pass `n`, before the log is read.
    AfterPass(u32),
    /// When it has been asked to suspend; no look at the guest follows.
    AtSuspend,
}
use When::{AfterPass, AtSuspend, Before, InPass};

/// What the guest does.
#[derive(Clone, Copy, Debug)]
enum Does {
    GiveBack(u64),
    /// It also fills the page, with writes that an older hypervisor does not log.
    Take(u64),
}
use Does::{GiveBack, Take};

type Script = Vec<(When, Does)>;

struct Guest<'a> {
    domain: &'a dyn Domain,
    script: Script,
    fill: u8,
}

impl Guest<'_> {
    fn now(&mut self, now: When) {
        let (due, rest) = self.script.drain(..).partition(|(when, _)| *when == now);
        self.script = rest;
        let due: Script = due;
        for (_, does) in due {
            match does {
                GiveBack(pfn) => assert_eq!(self.domain.release(&[Gfn(pfn)]), Ok(1)),
                Take(pfn) => {
                    assert_eq!(self.domain.populate(0, &mut [Gfn(pfn)]), Ok(1));
                    self.fill += 1;
                    let contents = [self.fill; PAGE_SIZE];
                    let failed = self.domain.write_pages(&[Gfn(pfn)], &contents).unwrap();
                    assert_eq!(failed, []);
                }
            }
        }
    }
}

/// Makes three passes, in which the guest acts. The policy, the progress and the toolstack of a
/// save share the guest.
struct Shared<'a>(&'a std::sync::Mutex<Guest<'a>>);

impl PrecopyPolicy for Shared<'_> {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        self.0.lock().unwrap().now(AfterPass(stats.iteration));
        match stats.iteration < 3 {
            true => PrecopyDecision::Continue,
            false => PrecopyDecision::StopAndCopy,
        }
    }
}

impl SaveToolstack for Shared<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        let mut guest = self.0.lock().unwrap();
        guest.now(AtSuspend);
        DirectToolstack(guest.domain).suspend()
    }
    fn resume(&mut self) -> Result<(), ToolstackError> {
        DirectToolstack(self.0.lock().unwrap().domain).resume()
    }
    fn switch_qemu_logdirty(&mut self, _on: bool) -> Result<(), ToolstackError> {
        Ok(())
    }
}

fn machine(logs_new_pages: bool) -> MockHost {
    let config = HostConfig {
        logs_new_pages,
        xen_version: XenVersion {
            major: 4,
            minor: 20,
        },
        memory_pages: 1 << 14,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

/// Saves the guest live over `domain`, while it acts as `script` says; it stays suspended.
fn run(
    host: &MockHost,
    domain: &dyn Domain,
    script: Script,
    threads: usize,
) -> (Vec<u8>, SaveStats) {
    let guest = std::sync::Mutex::new(Guest {
        domain,
        script,
        fill: 0x40,
    });
    guest.lock().unwrap().now(Before);
    let (mut policy, mut toolstack) = (Shared(&guest), Shared(&guest));
    let live = Live {
        policy: &mut policy,
        verify: false,
    };
    let (mut pass, mut sink) = (0, CopySink(Vec::new()));
    let mut progress = |progress: &Progress| {
        if progress.phase == Phase::Precopy && progress.pages_done == 0 {
            pass += 1;
        } else if progress.phase == Phase::Precopy {
            guest.lock().unwrap().now(InPass(pass));
        }
        ControlFlow::Continue(())
    };
    let saved = SaveRequest::new(domain, host.xen_version().unwrap())
        .options(&options(threads))
        .live(live)
        .observe(&mut progress)
        .write_stream(&mut toolstack, &mut sink)
        .unwrap();
    let stats = saved.stats();
    saved.keep_suspended();
    let left = &guest.lock().unwrap().script;
    assert!(left.is_empty(), "the guest never did {left:?}");
    (sink.0, stats)
}

/// The pages that arrived changed.
fn differences(host: &MockHost, domid: DomId, stream: &[u8], kind: GuestKind) -> Vec<Pfn> {
    let to = machine(true);
    let (there, restored) = restore_stream(&to, (kind, 1, 4096), CopySource(stream));
    restored.unwrap();
    let left = host.memory_digest(domid).unwrap();
    let mut differ = left.differences(&to.memory_digest(there).unwrap());
    let rings: Vec<Pfn> = take_apart(stream).rings().collect();
    differ.retain(|pfn| !rings.contains(pfn));
    differ
}

fn scripts() -> Vec<Script> {
    let around = |script: &[(When, Does)]| script.to_vec();
    let mut scripts = vec![
        // Given back and not taken again.
        around(&[(AfterPass(1), GiveBack(A))]),
        around(&[(InPass(1), GiveBack(A))]),
        around(&[(AtSuspend, GiveBack(A))]),
        // At the same pfn, in another interval, or between two looks of the same interval.
        around(&[(AfterPass(1), GiveBack(A)), (AfterPass(2), Take(A))]),
        around(&[(AfterPass(1), GiveBack(A)), (AtSuspend, Take(A))]),
        around(&[(InPass(1), GiveBack(A)), (AfterPass(1), Take(A))]),
        around(&[(AfterPass(3), GiveBack(A)), (AtSuspend, Take(A))]),
        // As many given back as taken: the number of pages does not reveal it.
        around(&[
            (Before, GiveBack(A)),
            (AfterPass(1), GiveBack(B)),
            (AfterPass(1), Take(A)),
        ]),
        around(&[
            (Before, GiveBack(A)),
            (AtSuspend, GiveBack(B)),
            (AtSuspend, Take(A)),
        ]),
        around(&[
            (Before, GiveBack(B)),
            (AtSuspend, GiveBack(A)),
            (AtSuspend, Take(B)),
        ]),
    ];
    for when in [
        InPass(1),
        AfterPass(1),
        AfterPass(2),
        AfterPass(3),
        AtSuspend,
    ] {
        for pfn in [A, B] {
            scripts.push(vec![(Before, GiveBack(pfn)), (when, Take(pfn))]);
        }
    }
    scripts
}

#[test]
fn memory_arrives_whatever_the_guest_gives_back_and_takes() {
    for (index, script) in scripts().into_iter().enumerate() {
        let kind = match index % 5 {
            0 => GuestKind::Hvm,
            _ => GuestKind::Pvh,
        };
        let host = machine(false);
        let domid = host.create_guest(&GuestSpec::new("b", kind, 8)).unwrap();
        let (threads, domain) = match index % 2 {
            0 => (1, host.as_xen().unwrap().domain(domid).unwrap()),
            _ => (2, host.domain(domid).unwrap()),
        };
        let (stream, _) = run(&host, domain.as_ref(), script.clone(), threads);
        let differ = differences(&host, domid, &stream, kind);
        assert_eq!(differ, [], "{kind:?} {script:?}");
    }
}

/// If the hypervisor's log reports new pages, it is not queried further. What it does not report (a
/// page that is gone) arrives as with Xen's own engine: present.
#[test]
fn a_log_that_tells_of_new_pages_is_enough() {
    for script in scripts().into_iter().step_by(3) {
        let host = machine(true);
        let spec = GuestSpec::new("b", GuestKind::Pvh, 8);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.as_xen().unwrap().domain(domid).unwrap();
        let (stream, _) = run(&host, domain.as_ref(), script.clone(), 1);
        let gone = |pfn: &u64| {
            let last = script.iter().rev().find_map(|(_, does)| match does {
                GiveBack(at) if at == pfn => Some(true),
                Take(at) if at == pfn => Some(false),
                _ => None,
            });
            last == Some(true)
        };
        let gone: Vec<Pfn> = [A, B].into_iter().filter(gone).map(Pfn).collect();
        let differ = differences(&host, domid, &stream, GuestKind::Pvh);
        assert!(
            differ.iter().all(|pfn| gone.contains(pfn)),
            "{script:?} {differ:?}"
        );
    }
}

/// Without ballooning the stream is the same, however much is queried.
#[test]
fn a_guest_that_does_neither_is_sent_as_ever() {
    let streams = [true, false].map(|logs| {
        let host = machine(logs);
        let spec = GuestSpec::new("b", GuestKind::Hvm, 8);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        run(&host, domain.as_ref(), Vec::new(), 2)
    });
    let [(told, told_stats), (asked, asked_stats)] = streams;
    assert!(told == asked);
    assert_eq!(told_stats.pages, asked_stats.pages);
}

/// A page that was only taken costs itself. A page whose location is unknown costs a pass.
#[test]
fn only_memory_that_cannot_be_found_costs_a_whole_pass() {
    let pages = |script: Script| {
        let host = machine(false);
        let spec = GuestSpec::new("b", GuestKind::Pvh, 8);
        let domid = host.create_guest(&spec).unwrap();
        let domain = host.domain(domid).unwrap();
        run(&host, domain.as_ref(), script, 1).1.pages
    };
    let none = pages(vec![(Before, GiveBack(A))]);
    let found = pages(vec![(Before, GiveBack(A)), (AfterPass(2), Take(A))]);
    assert_eq!(found, none + 1);
    let lost = pages(vec![(InPass(1), GiveBack(A)), (AfterPass(1), Take(A))]);
    assert!(lost >= 2 * 2048, "{lost} pages");
}
