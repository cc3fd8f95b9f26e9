//! Tests of the save helper under COLO. The helpers of both hosts run, and the test plays the two
//! libxls. Each libxl shares the stream with its helper, including the reverse direction, on which
//! the secondary reports its progress (`libxl_colo_save.c`, `libxl_colo_restore.c`).

use std::io;

use xsr_xen_backend::mock::WorkloadSpec;

use super::*;

/// The callbacks that libxl has for COLO. Primary: suspend, postcopy, checkpoint, wait_checkpoint
/// and the log. Secondary: the first four, static data and results.
const COLO_SAVE: &str = "248";
const COLO_RESTORE: &str = "888";

/// libxl's empty record of type 4.
const CHECKPOINT_END: [u8; 8] = [4, 0, 0, 0, 0, 0, 0, 0];

/// Values of CHECKPOINT_STATE.
const NEW: u8 = 0;
const SVM_SUSPENDED: u8 = 1;
const SVM_READY: u8 = 2;
const SVM_RESUMED: u8 = 3;

/// A CHECKPOINT_STATE.
fn state(id: u8) -> [u8; 16] {
    let mut record = [0; 16];
    (record[0], record[4], record[8]) = (5, 4, id);
    record
}

#[track_caller]
fn expect(mut from: impl Read, id: u8) {
    let mut record = [0; 16];
    from.read_exact(&mut record).unwrap();
    assert_eq!(record, state(id));
}

/// A named pipe that the test keeps open at both ends.
fn named_pipe(path: &Path) -> File {
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

/// The arguments of the two helpers, with the host and the domain of each: the primary's and the
/// secondary's. The workloads of the two domains differ.
fn both(dir: &Path, kind: GuestKind) -> [(PathBuf, DomId, String); 2] {
    let works = |host: &MockHost, domid: DomId, seed: u64| {
        let spec = serde_json::to_vec(&WorkloadSpec::writes(seed, 1, 300)).unwrap();
        host.userdata_store(domid, "mock-workload", &spec).unwrap();
    };
    let (here, domid) = super::host(dir, kind, 8);
    works(&MockHost::open(&here).unwrap(), domid, 1);
    let save = format!("--save-domain 7 8 {} 1 {COLO_SAVE} 2", domid.0);
    let path = dir.join("there");
    let there = MockHost::create(&path, &HostConfig::default()).unwrap();
    let secondary = there.create_domain(kind, 2, 4096 + 256).unwrap();
    works(&there, secondary, 2);
    let domain = there.domain(secondary).unwrap();
    let [store, console] = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    let restore = format!(
        "--restore-domain 7 8 {} {store} 0 {console} 0 {COLO_RESTORE} 2",
        secondary.0
    );
    [(here, domid, save), (path, secondary, restore)]
}

/// The point of a checkpoint's cycle at which protection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Last {
    /// The primary's libxl ends it while both guests run.
    Waiting,
    /// The primary's libxl fails in the third checkpoint, which the secondary has received
    /// completely. No guest runs then.
    Loaded,
}

#[test]
fn colo_asks_in_libxls_order_and_each_checkpoint_makes_the_secondary_the_primary() {
    for (kind, last) in [
        (GuestKind::Hvm, Last::Loaded),
        (GuestKind::Pvh, Last::Waiting),
    ] {
        let dir = scratch();
        let [primary, secondary] = both(dir.path(), kind);
        let (stream_from, stream_to) = io::pipe().unwrap();
        let back_name = dir.path().join("back");
        let back = named_pipe(&back_name);
        let others = format!("8<>'{}'", back_name.display());
        let (mut to, mut from) = (
            stream_to.try_clone().unwrap(),
            stream_from.try_clone().unwrap(),
        );
        let sender = start_with(&primary.0, &primary.2, stream_to, &others);
        let receiver = start_with(&secondary.0, &secondary.2, stream_from, &others);
        let (sent, received) = std::thread::scope(|scope| {
            let back = &back;
            let sent = scope.spawn(move || {
                let (mut checkpoints, mut ready) = (0, false);
                play(sender, |number| match number {
                    SUSPEND => {
                        if ready {
                            expect(back, SVM_SUSPENDED);
                        }
                        Some(1)
                    }
                    CHECKPOINT => {
                        to.write_all(&CHECKPOINT_END).unwrap();
                        checkpoints += 1;
                        Some(i32::from(checkpoints < 3 || last == Last::Waiting))
                    }
                    POSTCOPY => {
                        expect(back, SVM_READY);
                        ready = true;
                        expect(back, SVM_RESUMED);
                        Some(1)
                    }
                    WAIT_CHECKPOINT if checkpoints == 3 => Some(0),
                    WAIT_CHECKPOINT => {
                        to.write_all(&state(NEW)).unwrap();
                        Some(1)
                    }
                    other => fine(other),
                })
                // When this libxl ends, the back channel closes.
            });
            let mut postcopies = 0;
            let received = play(receiver, |number| match number {
                CHECKPOINT => {
                    let mut record = [0; 8];
                    from.read_exact(&mut record).unwrap();
                    assert_eq!(record, CHECKPOINT_END);
                    Some(1)
                }
                POSTCOPY => {
                    postcopies += 1;
                    if postcopies == 3 && last == Last::Loaded {
                        // As if SVM_READY could not be sent.
                        return Some(2);
                    }
                    let mut back = back;
                    back.write_all(&state(SVM_READY)).unwrap();
                    back.write_all(&state(SVM_RESUMED)).unwrap();
                    Some(1)
                }
                WAIT_CHECKPOINT => {
                    let mut record = [0; 16];
                    Some(match from.read_exact(&mut record) {
                        Ok(()) => i32::from(record == state(NEW)),
                        Err(_) => 2,
                    })
                }
                SUSPEND => {
                    let mut back = back;
                    back.write_all(&state(SVM_SUSPENDED)).unwrap();
                    Some(1)
                }
                other => fine(other),
            });
            (sent.join().unwrap(), received)
        });
        let turn = [SUSPEND, CHECKPOINT, POSTCOPY, WAIT_CHECKPOINT];
        let mut turns = [&[LOGDIRTY][..], &turn.repeat(3)].concat();
        let result = match last {
            Last::Waiting => 0,
            Last::Loaded => {
                turns.truncate(turns.len() - 2);
                -1
            }
        };
        turns.extend([LOGDIRTY, COMPLETE]);
        assert_eq!(sent.numbers(), turns, "{kind:?}: {sent:?}");
        assert_eq!(sent.completed().0, result, "{sent:?}");
        let turn = [
            CHECKPOINT,
            RESTORE_RESULTS,
            POSTCOPY,
            WAIT_CHECKPOINT,
            SUSPEND,
        ];
        let mut turns = [&[STATIC_DATA_DONE][..], &turn.repeat(3)].concat();
        turns.truncate(turns.len() - if last == Last::Waiting { 1 } else { 2 });
        turns.extend([RESTORE_RESULTS, COMPLETE]);
        assert_eq!(received.numbers(), turns, "{kind:?}: {received:?}");
        assert_eq!(received.completed(), (0, Errno::from_raw(0)));
        received.logged(5, "the guest goes on from checkpoint 3");
        let results: Vec<&[u8]> = received
            .asked
            .iter()
            .filter(|(number, _)| *number == RESTORE_RESULTS)
            .map(|(_, args)| args.as_slice())
            .collect();
        assert!(
            results
                .iter()
                .all(|rings| *rings == results[0] && **rings != [0; 16])
        );

        let here = MockHost::open(&primary.0).unwrap();
        let there = MockHost::open(&secondary.0).unwrap();
        let state = |host: &MockHost, domid| {
            let info = host.domain(domid).unwrap().info().unwrap();
            (info.shutdown, info.paused)
        };
        let mut differ = {
            let digests = [&here, &there].map(|host| {
                let domid = if std::ptr::eq(host, &raw const here) {
                    primary.1
                } else {
                    secondary.1
                };
                host.memory_digest(domid).unwrap()
            });
            digests[0].differences(&digests[1])
        };
        let mut rings = Arguments(results[0]);
        let rings = [rings.u64(), rings.u64()];
        // A restore clears the pages of xenstore, console and ioreq.
        differ.retain(|pfn| rings.iter().all(|ring| pfn.0.abs_diff(*ring) > 8));
        let asleep = Some(ShutdownReason::Suspend);
        match last {
            Last::Loaded => {
                assert_eq!(differ, []);
                // libxl decides which guest is to run.
                assert_eq!(state(&here, primary.1), (asleep, false));
                assert_eq!(state(&there, secondary.1).0, asleep);
            }
            Last::Waiting => {
                // Both have run since, with different workloads.
                assert!(differ.len() > 20, "{}", differ.len());
                assert_eq!(state(&here, primary.1), (None, false));
                assert_eq!(state(&there, secondary.1), (None, false));
            }
        }
        assert!(!here.is_log_dirty(primary.1).unwrap());
    }
}

#[test]
fn the_answer_of_libxl_decides_whether_protection_goes_on() {
    // A secondary: 0 means failure, 2 that the primary is gone, which only a guest that has had a
    // checkpoint survives.
    let dir = scratch();
    let [primary, _] = both(dir.path(), GuestKind::Pvh);
    let stream = dir.path().join("stream");
    let back_name = dir.path().join("back");
    let _back = named_pipe(&back_name);
    let others = format!("8<>'{}'", back_name.display());
    let child = start_with(
        &primary.0,
        &primary.2,
        File::create(&stream).unwrap(),
        &others,
    );
    // Protection ends once the first checkpoint is written.
    let run = play(child, |number| match number {
        CHECKPOINT => Some(1),
        POSTCOPY => Some(-1),
        other => fine(other),
    });
    assert_eq!(
        run.numbers(),
        [LOGDIRTY, SUSPEND, CHECKPOINT, POSTCOPY, LOGDIRTY, COMPLETE]
    );
    assert_eq!(run.completed(), (-1, Errno::EIO));
    for (question, answer, retval) in [
        (CHECKPOINT, 0, -1),
        (CHECKPOINT, 2, -1),
        (POSTCOPY, 0, -1),
        (POSTCOPY, 2, 0),
        (WAIT_CHECKPOINT, 0, -1),
        (WAIT_CHECKPOINT, 2, 0),
        (SUSPEND, 0, -1),
        (SUSPEND, 2, 0),
        // And then the stream ends.
        (SUSPEND, 1, 0),
    ] {
        let dir = scratch();
        let [_, secondary] = both(dir.path(), GuestKind::Pvh);
        let child = start_with(
            &secondary.0,
            &secondary.2,
            File::open(&stream).unwrap(),
            &others,
        );
        let run = play(child, |number| match number {
            n if n == question => Some(answer),
            CHECKPOINT | POSTCOPY | WAIT_CHECKPOINT => Some(1),
            other => fine(other),
        });
        assert_eq!(run.completed().0, retval, "{question} {answer}: {run:?}");
        let asked = run.numbers();
        assert_eq!(asked[asked.len() - 2], RESTORE_RESULTS);
        let rings = &run.asked[asked.len() - 2].1;
        assert_eq!(rings == &[0; 16], retval != 0, "{question} {answer}");
    }
}
