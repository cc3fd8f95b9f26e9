//! Random schedules: a guest works, is saved, migrates back and forth, and meets faults and cancels
//! at any point, in random order. After each step exactly one copy of it runs, nothing is left
//! behind, and its memory equals that of an undisturbed twin which does the same work on its own
//! machine. (A migration makes a new twin, from the same stream: kernels that wake up on another
//! host choose other pages to work on. The contents of the stream have been compared with the
//! original guest before.)
//!
//! `XSR_SCHEDULES=2000 XSR_SEED=1 cargo test -p xsr-save-restore --test it schedules`: how
//! many are tried, and which.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::ops::ControlFlow;

use crate::common::faulty::{Fault, Faulty, Which};
use crate::common::stream::{Upset, Upsetting, When};
use crate::common::watch::{Refusal, Toolstack};
use crate::common::{options, restore_stream};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use xsr_format::frame::Pfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::{Phase, Progress};
use xsr_save_restore::save::precopy::{PrecopyDecision, PrecopyPolicy, PrecopyStats};
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::{Live, RestoreError, RestoreRequest, Rings, SaveError, SaveRequest, Saved};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, Errno, GuestKind, Host};

/// A fault in a step.
#[derive(Clone, Debug)]
enum Trouble {
    None,
    /// A call of the save.
    SaveCall(usize, Fault),
    /// A call of the restore.
    RestoreCall(usize, Fault),
    /// The sink, once this many bytes have been written.
    Sink(usize, Upset),
    /// The source, likewise.
    Source(usize, Upset),
    /// The save is cancelled at an event.
    CancelSave(usize),
    /// The restore is cancelled at an event.
    CancelRestore(usize),
    /// The policy gives up after this many passes.
    Policy(u32),
    /// A callback of the save's toolstack.
    Callback(usize, Refusal),
    /// The caller of the save finds at its end that the image is unusable.
    Dropped,
}

/// A step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    /// The guest works.
    Work { seed: u64, operations: u64 },
    /// It is saved and continues to run; live, with this many operations after each pass.
    Save {
        live: Option<u64>,
        threads: usize,
        trouble: Trouble,
    },
    /// It is migrated to the other machine.
    Migrate {
        live: Option<u64>,
        threads: usize,
        trouble: Trouble,
    },
}

fn fault() -> impl Strategy<Value = Fault> {
    let which = || prop_oneof![Just(Which::First), Just(Which::Middle), Just(Which::Last)];
    let errno = || {
        prop_oneof![
            Just(Errno::EINVAL),
            Just(Errno::ENOMEM),
            Just(Errno::ESRCH),
            Just(Errno::EFAULT),
            Just(Errno::ENOENT)
        ]
    };
    prop_oneof![
        errno().prop_map(Fault::Errno),
        errno().prop_map(Fault::Late),
        (which(), errno()).prop_map(|(which, errno)| Fault::Frame(which, errno)),
        which().prop_map(Fault::Short),
    ]
}

fn upset() -> impl Strategy<Value = Upset> {
    let errno = |errno: Errno| Just(Upset::Errno(errno.raw()));
    prop_oneof![
        errno(Errno::EPIPE),
        errno(Errno::ECONNRESET),
        errno(Errno::ENOSPC),
        Just(Upset::End),
        Just(Upset::Short),
        Just(Upset::Interrupted),
    ]
}

/// The number of a call or an event. A translated guest has a thousand for the gap below its last
/// pfn.
fn number() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 0_usize..12, 4 => 12_usize..60, 1 => 1000_usize..1060]
}

fn trouble() -> impl Strategy<Value = Trouble> {
    let bytes = || prop_oneof![1 => 0_usize..3000, 4 => 0_usize..6_000_000];
    let how = prop_oneof![Just(Refusal::Before), Just(Refusal::After)];
    prop_oneof![
        3 => Just(Trouble::None),
        3 => (number(), fault()).prop_map(|(at, fault)| Trouble::SaveCall(at, fault)),
        3 => (number(), fault()).prop_map(|(at, fault)| Trouble::RestoreCall(at, fault)),
        1 => (bytes(), upset()).prop_map(|(at, upset)| Trouble::Sink(at, upset)),
        1 => (bytes(), upset()).prop_map(|(at, upset)| Trouble::Source(at, upset)),
        1 => number().prop_map(Trouble::CancelSave),
        1 => number().prop_map(Trouble::CancelRestore),
        1 => (0_u32..3).prop_map(Trouble::Policy),
        1 => (0_usize..4, how).prop_map(|(at, how)| Trouble::Callback(at, how)),
        1 => Just(Trouble::Dropped),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let live = || prop_oneof![Just(None), (0_u64..150).prop_map(Some)];
    let threads = || prop_oneof![Just(1_usize), Just(2), Just(8)];
    prop_oneof![
        1 => (any::<u64>(), 1_u64..400)
            .prop_map(|(seed, operations)| Step::Work { seed, operations }),
        2 => (live(), threads(), trouble())
            .prop_map(|(live, threads, trouble)| Step::Save { live, threads, trouble }),
        3 => (live(), threads(), trouble())
            .prop_map(|(live, threads, trouble)| Step::Migrate { live, threads, trouble }),
    ]
}

fn guest() -> impl Strategy<Value = GuestSpec> {
    let spec = |kind, width| GuestSpec {
        width,
        ..GuestSpec::new("guest", kind, 4)
    };
    let pv64 = GuestSpec {
        vcpus: 2,
        ballooned_pages: 30,
        ..spec(GuestKind::Pv, 8)
    };
    prop_oneof![
        Just(pv64),
        Just(spec(GuestKind::Pv, 4)),
        Just(spec(GuestKind::Hvm, 8)),
        Just(spec(GuestKind::Pvh, 8)),
    ]
}

/// Makes two passes, or gives up after fewer.
struct Passes {
    gives_up: Option<u32>,
}

impl PrecopyPolicy for Passes {
    fn decide(&mut self, stats: &PrecopyStats) -> PrecopyDecision {
        match self.gives_up {
            Some(passes) if stats.iteration >= passes => PrecopyDecision::Abort,
            _ if stats.iteration < 2 => PrecopyDecision::Continue,
            _ => PrecopyDecision::StopAndCopy,
        }
    }
}

fn host(seed: u64) -> MockHost {
    let config = HostConfig {
        seed,
        memory_pages: 32 << 8,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

fn work(seed: u64) -> WorkloadSpec {
    WorkloadSpec {
        table_permille: 100,
        balloon_permille: 100,
        ..WorkloadSpec::writes(seed, 1, 200)
    }
}

/// What has been tried, over all schedules.
#[derive(Default)]
struct Tried {
    schedules: usize,
    steps: usize,
    saves: usize,
    migrations: usize,
    points: BTreeSet<String>,
}

/// Two machines that share one guest, and its twin.
struct World<'t> {
    hosts: [MockHost; 2],
    free: [u64; 2],
    spec: GuestSpec,
    here: usize,
    domid: DomId,
    twin: (MockHost, DomId),
    /// Pages in which the twin differs already at the start: a guest that does not publish its p2m
    /// as a tree has one all the same, of mfns, and never uses it.
    own: Vec<Pfn>,
    tried: &'t RefCell<Tried>,
}

impl<'t> World<'t> {
    fn new(spec: &GuestSpec, tried: &'t RefCell<Tried>) -> Self {
        let hosts = [host(1), host(2)];
        let twin = host(3);
        let free = [0, 1].map(|n: usize| hosts[n].free_pages());
        let domid = hosts[0].create_guest(spec).unwrap();
        let of_twin = twin.create_guest(spec).unwrap();
        let world = Self {
            hosts,
            free,
            spec: spec.clone(),
            here: 0,
            domid,
            twin: (twin, of_twin),
            own: Vec::new(),
            tried,
        };
        let own = world.unlike_twin();
        assert!(own.len() < 5, "{own:?}");
        Self { own, ..world }
    }

    /// The pages in which the guest and its twin differ.
    fn unlike_twin(&self) -> Vec<Pfn> {
        let memory = self.hosts[self.here].memory_digest(self.domid).unwrap();
        let twin = self.twin.0.memory_digest(self.twin.1).unwrap();
        memory.differences(&twin)
    }

    /// A new twin, which has come the same way as the guest that has just arrived.
    fn new_twin(&mut self, bytes: &[u8]) {
        let host = &self.twin.0;
        host.domain(self.twin.1).unwrap().destroy().unwrap();
        let pages = self.spec.memory_mib * 256;
        let shape = (self.spec.kind, self.spec.vcpus, pages);
        let (domid, result) = restore_stream(host, shape, CopySource(bytes));
        result.unwrap();
        host.domain(domid).unwrap().unpause().unwrap();
        self.twin.1 = domid;
        self.own.clear();
    }

    fn domain(&self) -> Box<dyn Domain> {
        self.hosts[self.here].domain(self.domid).unwrap()
    }

    fn point(&self, point: String) {
        let point = format!("{:?}{} {point}", self.spec.kind, self.spec.width);
        self.tried.borrow_mut().points.insert(point);
    }

    /// The twin does what the guest has done.
    fn follow(&self, seed: u64, operations: u64) {
        let mut twin = self.twin.0.workload(self.twin.1, &work(seed)).unwrap();
        assert_eq!(twin.step(operations).unwrap(), operations);
    }

    fn work(&self, seed: u64, operations: u64) {
        let here = &self.hosts[self.here];
        let mut guest = here.workload(self.domid, &work(seed)).unwrap();
        assert_eq!(guest.step(operations).unwrap(), operations);
        self.follow(seed, operations);
    }

    /// Saves; `then` gets the stream while the guest is still suspended, and decides whether the
    /// guest stays suspended. Returns that decision.
    fn save(
        &self,
        live: Option<u64>,
        threads: usize,
        trouble: &Trouble,
        then: impl FnOnce(&[u8]) -> bool,
    ) -> bool {
        let here = &self.hosts[self.here];
        let real = self.domain();
        let faulty = match trouble {
            Trouble::SaveCall(at, fault) => Faulty::new(self.domain(), *at, *fault),
            _ => Faulty::watching(self.domain()),
        };
        let mut toolstack = match trouble {
            Trouble::Callback(at, how) => Toolstack::failing(real.as_ref(), *at, *how),
            _ => Toolstack::new(real.as_ref()),
        };
        let mut sink = match trouble {
            Trouble::Sink(at, upset) => Upsetting::new(Vec::new(), When::Byte(*at), *upset),
            _ => Upsetting::watching(Vec::new()),
        };
        let seed = self.tried.borrow().steps as u64;
        let mut guest = here.workload(self.domid, &work(seed)).unwrap();
        let (mut events, mut done) = (0, 0);
        let mut progress = |event: &Progress| {
            if event.phase == Phase::Precopy && event.pass_is_complete() {
                done += guest.step(live.unwrap_or(0)).unwrap();
            }
            events += 1;
            match trouble {
                Trouble::CancelSave(at) if events > *at => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let mut policy = Passes {
            gives_up: match trouble {
                Trouble::Policy(passes) => Some(*passes),
                _ => None,
            },
        };
        let (xen, options) = (here.xen_version().unwrap(), options(threads));
        let result = {
            let (toolstack, sink) = (&mut toolstack, &mut CopySink(&mut sink));
            match live {
                None => SaveRequest::new(&faulty, xen)
                    .options(&options)
                    .observe(&mut progress)
                    .write_stream(toolstack, sink),
                Some(_) => {
                    let live = Live {
                        policy: &mut policy,
                        verify: false,
                    };
                    SaveRequest::new(&faulty, xen)
                        .options(&options)
                        .live(live)
                        .observe(&mut progress)
                        .write_stream(toolstack, sink)
                }
            }
        };
        // The twin repeats what the guest did in the passes.
        self.follow(seed, done);
        let upset = sink.happened();
        let bytes = sink.into_inner();
        let (mut kept, mut failed) = (false, result.is_err());
        let end = |result: Result<Saved<'_>, SaveError>| match result {
            Ok(saved) => {
                if matches!(trouble, Trouble::Dropped) {
                    drop(saved);
                } else if then(&bytes) {
                    saved.keep_suspended();
                    kept = true;
                } else {
                    failed |= saved.resume().is_err();
                }
            }
            Err(error) => {
                let aborted = matches!(trouble, Trouble::CancelSave(_));
                assert_eq!(matches!(error, SaveError::Aborted), aborted, "{error}");
            }
        };
        end(result);
        let refused = toolstack.refused();
        if refused.is_none() && !kept {
            toolstack.assert_undone(&format!("{trouble:?}"));
        }
        if refused == Some("resume") && real.info().unwrap().shutdown.is_some() {
            // The error says so, and its reader resumes the guest by hand.
            assert!(failed && !kept);
            real.resume().unwrap();
        }
        let struck = faulty.struck().map(|struck| struck.op);
        if struck == Some("disable_log_dirty") {
            real.disable_log_dirty().unwrap();
        }
        let given_up = live.is_some() && policy.gives_up.is_some();
        let met = struck.is_some() || upset || refused.is_some() || given_up;
        assert!(
            !failed || met || matches!(trouble, Trouble::CancelSave(_)),
            "{trouble:?}: failed for nothing"
        );
        if met || failed {
            self.point(format!("save {} {trouble:?} {struck:?}", live.is_some()));
        }
        kept
    }

    /// Restores on the other machine; returns the new domain, paused, if all of it is there.
    fn restore(&self, bytes: &[u8], trouble: &Trouble) -> Option<DomId> {
        let there = &self.hosts[1 - self.here];
        let pages = self.spec.memory_mib * 256 + 256;
        let (kind, vcpus) = (self.spec.kind, self.spec.vcpus);
        let domid = there.create_domain(kind, vcpus, pages).unwrap();
        let real = there.domain(domid).unwrap();
        let port = || real.alloc_unbound_port(DomId(0)).unwrap();
        let rings = Rings {
            store_port: port(),
            store_domid: DomId(0),
            console_port: port(),
            console_domid: DomId(0),
        };
        let domain = there.domain(domid).unwrap();
        let faulty = match trouble {
            Trouble::RestoreCall(at, fault) => Faulty::new(domain, *at, *fault),
            _ => Faulty::watching(domain),
        };
        let mut source = match trouble {
            Trouble::Source(at, upset) => Upsetting::new(bytes, When::Byte(*at), *upset),
            _ => Upsetting::watching(bytes),
        };
        let mut events = 0;
        let mut progress = |_: &Progress| {
            events += 1;
            match trouble {
                Trouble::CancelRestore(at) if events > *at => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        };
        let mut toolstack = Toolstack::new(real.as_ref());
        let reader = RecordReader::new(CopySource(&mut source), ReadOptions::default());
        let result = reader.map_err(RestoreError::from).and_then(|reader| {
            RestoreRequest::new(&faulty, rings)
                // So that the calls come in a fixed order.
                .threads(NonZeroUsize::new(1))
                .observe(&mut progress)
                .read_stream(reader, &mut toolstack)
        });
        let result = result.map(drop);
        let struck = faulty.struck().map(|struck| struck.op);
        let cancelled = matches!(result, Err(RestoreError::Aborted));
        if struck.is_some() || source.happened() || cancelled {
            self.point(format!("restore {trouble:?} {struck:?}"));
        } else {
            assert!(result.is_ok(), "{trouble:?}: {result:?}");
        }
        if result.is_err() {
            let info = real.info().unwrap();
            assert_eq!((info.paused, info.shutdown), (true, None), "{trouble:?}");
            real.destroy().unwrap();
            return None;
        }
        let left = self.hosts[self.here].memory_digest(self.domid).unwrap();
        let arrived = there.memory_digest(domid).unwrap();
        assert_eq!(arrived.differences(&left), [], "{trouble:?}");
        Some(domid)
    }

    fn step(&mut self, step: &Step) {
        self.tried.borrow_mut().steps += 1;
        match step {
            Step::Work { seed, operations } => self.work(*seed, *operations),
            Step::Save {
                live,
                threads,
                trouble,
            } => {
                self.tried.borrow_mut().saves += 1;
                let kept = self.save(*live, *threads, trouble, |bytes| {
                    // The image is good: restores a copy.
                    if let Some(copy) = self.restore(bytes, trouble) {
                        let there = &self.hosts[1 - self.here];
                        there.domain(copy).unwrap().destroy().unwrap();
                    }
                    false
                });
                assert!(!kept);
            }
            Step::Migrate {
                live,
                threads,
                trouble,
            } => {
                let mut arrived = None;
                self.save(*live, *threads, trouble, |bytes| {
                    let domid = self.restore(bytes, trouble);
                    arrived = domid.map(|domid| (domid, bytes.to_vec()));
                    domid.is_some()
                });
                if let Some((arrived, bytes)) = arrived {
                    self.tried.borrow_mut().migrations += 1;
                    self.domain().destroy().unwrap();
                    self.here = 1 - self.here;
                    self.domid = arrived;
                    self.domain().unpause().unwrap();
                    self.new_twin(&bytes);
                }
            }
        }
        self.check();
    }

    /// The invariants.
    fn check(&self) {
        let all: Vec<_> = self
            .hosts
            .iter()
            .map(|host| host.domains().unwrap())
            .collect();
        let (here, there) = (&all[self.here], &all[1 - self.here]);
        assert!(there.is_empty(), "{there:?}");
        let [only] = here.as_slice() else {
            panic!("{here:?}");
        };
        assert_eq!(
            (only.domid, only.paused, only.shutdown),
            (self.domid, false, None)
        );
        assert_eq!(
            self.hosts[1 - self.here].free_pages(),
            self.free[1 - self.here]
        );
        assert_eq!(self.hosts.each_ref().map(MockHost::mapped_pages), [0, 0]);
        let host = &self.hosts[self.here];
        assert!(!host.is_log_dirty(self.domid).unwrap());
        let mut differ = self.unlike_twin();
        differ.retain(|pfn| !self.own.contains(pfn));
        assert_eq!(differ, [], "not as its twin's");
    }

    /// And when the guest is gone, nothing is left.
    fn end(self) {
        self.domain().destroy().unwrap();
        assert_eq!(self.hosts.each_ref().map(MockHost::free_pages), self.free);
    }
}

fn number_from(name: &str, default: u32) -> u32 {
    match std::env::var(name) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{name}={text}")),
        Err(_) => default,
    }
}

#[test]
fn whatever_happens_one_copy_runs_and_it_is_the_right_one() {
    let schedules = number_from("XSR_SCHEDULES", 60);
    let seed = u8::try_from(number_from("XSR_SEED", 0)).unwrap();
    let config = Config {
        cases: schedules,
        failure_persistence: None,
        max_shrink_iters: 60,
        ..Config::default()
    };
    let random = TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]);
    let mut runner = TestRunner::new_with_rng(config, random);
    let tried = RefCell::new(Tried::default());
    let steps = proptest::collection::vec(step(), 1..10);
    let result = runner.run(&(guest(), steps), |(spec, steps)| {
        tried.borrow_mut().schedules += 1;
        let mut world = World::new(&spec, &tried);
        steps.iter().for_each(|step| world.step(step));
        world.end();
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
    let tried = tried.into_inner();
    eprintln!(
        "{} schedules, {} steps, {} saves, {} migrations, {} distinct fault points",
        tried.schedules,
        tried.steps,
        tried.saves,
        tried.migrations,
        tried.points.len()
    );
    // A few schedules need not cover everything.
    if schedules >= 50 {
        assert!(tried.points.len() >= schedules.min(100) as usize);
        assert!(tried.migrations >= schedules as usize / 2);
    }
}
