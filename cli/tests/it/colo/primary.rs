//! The primary, with the test as its secondary: the contents of the stream, and the messages when
//! the secondary fails or does not answer.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use xsr_format::read::ReadOptions;
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::LibxlRecord;

use super::*;
use crate::common::migration::{BANNER, GO, REPORT, domain_dir, hear, listen};

/// The values of a CHECKPOINT_STATE, and the record with which a primary takes its domain back.
const NEW: u32 = 0;
const SUSPENDED: u32 = 1;
const READY: u32 = 2;
const RESUMED: u32 = 3;
const WITHDRAWAL: u32 = 0x7fff_ffff;
/// The messages of a secondary that has a checkpoint.
const RUNS: [u32; 2] = [READY, RESUMED];

/// A CHECKPOINT_STATE, as libxl writes it.
fn state(id: u32) -> Vec<u8> {
    [5, 4, id, 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// Play the secondary. Expects `checkpoints` checkpoints in the sender's stream, its messages
/// between them, and that it takes its domain back. The secondary's dirty pages are `pages`, which
/// the next checkpoint must contain, and it answers the last checkpoint with `last`.
fn heard(
    stream: &mut UnixStream,
    mut to: UnixStream,
    checkpoints: usize,
    pages: &[u64],
    last: &[u32],
) {
    to.write_all(BANNER).unwrap();
    let mut walk = Walk::open(stream, ReadOptions::default()).unwrap();
    let mut number = 0;
    let mut came = BTreeSet::new();
    while number < checkpoints {
        let mut record = None;
        if let Some(step) = walk.next_step().unwrap() {
            match step.content {
                Content::PageData(body) => {
                    let whole = body.entries().iter().filter(|e| e.page_type.has_data());
                    came.extend(whole.map(|entry| entry.pfn.0));
                }
                Content::LibxlRecord(libxl) => record = Some(libxl),
                Content::Record(libxc) => assert_ne!(libxc.kind, RecordKind::END),
                _ => {}
            }
        }
        match record {
            Some(LibxlRecord::CheckpointEnd) => {
                number += 1;
                if number > 1 {
                    // The primary's guest writes nothing itself.
                    assert_eq!(came, pages.iter().copied().collect());
                }
                came.clear();
                let states = match number == checkpoints {
                    true => last,
                    false => &RUNS[..],
                };
                let states: Vec<u8> = states.iter().copied().flat_map(state).collect();
                to.write_all(&states).unwrap();
            }
            Some(LibxlRecord::CheckpointState(new)) => {
                assert_eq!(new.value(), NEW);
                let mut list = state(SUSPENDED);
                list.extend(0xf_u32.to_le_bytes());
                list.extend(u32::try_from(8 * pages.len()).unwrap().to_le_bytes());
                list.extend(pages.iter().flat_map(|pfn| pfn.to_le_bytes()));
                to.write_all(&list).unwrap();
            }
            _ => {}
        }
    }
}

#[test]
fn the_stream_is_libxls_and_its_last_word_makes_xls_secondary_fail() {
    for (pages, code) in [(&[5_u64, 700][..], 0), (&[1 << 40], 1)] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let sender = sender(&hosts, &socket, &["--epochs", "3"]);
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        if code == 0 {
            heard(&mut from, to.try_clone().unwrap(), 3, pages, &RUNS);
            hear(&mut from, &state(WITHDRAWAL));
        } else {
            // An invalid list, while the secondary waits for the second checkpoint.
            heard(&mut from, to.try_clone().unwrap(), 1, pages, &RUNS);
            hear(&mut from, &state(NEW));
            let mut list = state(SUSPENDED);
            list.extend([0xf, 8].iter().flat_map(|word: &u32| word.to_le_bytes()));
            list.extend(pages[0].to_le_bytes());
            to.write_all(&list).unwrap();
            hear(&mut from, &withdrawal_within());
        }
        to.write_all(&[REPORT, &[1], GO].concat()).unwrap();
        drop(to);
        let mut rest = Vec::new();
        from.read_to_end(&mut rest).unwrap();
        assert_eq!(rest, b"");
        drop(from);
        let sent = sender.end();
        assert_eq!(sent.code, code, "{sent:?}");
        if code == 1 {
            assert!(sent.stderr.contains("names pfn"), "{sent:?}");
        }
        assert_eq!(hosts.domains()[0], ["web running"]);
    }
}

/// The message with which a primary takes its domain back from a secondary that waits for a
/// checkpoint's records.
fn withdrawal_within() -> Vec<u8> {
    let kinds = [0x7fff_ffff, 0xe, 4];
    let records = kinds.iter().flat_map(|kind: &u64| kind.to_le_bytes());
    records.collect()
}

#[test]
fn a_secondary_that_does_not_answer_is_given_up_and_the_domain_runs_on() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    // It never has the checkpoint; it never runs; it does not suspend; it sends no list of pages.
    for (checkpoints, last, said) in [
        (1, &[][..], None),
        (2, &[READY], None),
        (1, &RUNS, Some(vec![])),
        (2, &RUNS, Some(state(SUSPENDED))),
    ] {
        let listener = listen(&socket);
        let options = ["--answer-timeout", "1", "--progress-fd", "1"];
        let sender = sender(&hosts, &socket, &options);
        let (mut from, _) = listener.accept().unwrap();
        std::fs::remove_file(&socket).unwrap();
        // So that a sender that waits forever fails the test.
        from.set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut to = from.try_clone().unwrap();
        heard(&mut from, to.try_clone().unwrap(), checkpoints, &[5], last);
        match said {
            None => hear(&mut from, &state(WITHDRAWAL)),
            Some(said) => {
                hear(&mut from, &state(NEW));
                to.write_all(&said).unwrap();
                hear(&mut from, &withdrawal_within());
            }
        }
        to.write_all(&[REPORT, &[1], GO].concat()).unwrap();
        drop((from, to));
        let sent = sender.end().code(1);
        assert!(sent.stderr.contains("has not answered in 1 s"), "{sent:?}");
        assert_eq!(hosts.domains()[0], ["web running"], "{sent:?}");
        // Not before the secondary has run.
        let protected = sent.stdout.contains("\"step\":\"protected\"");
        assert_eq!(protected, !last.is_empty(), "{sent:?}");
    }
}

/// The secondary has been told to destroy its copy, and it is unknown whether it has received that.
#[test]
fn a_secondary_that_never_answers_is_lost_by_on_loss() {
    for (on_loss, left) in [("run", "web running"), ("pause", "web paused")] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let options = ["--answer-timeout", "1", "--on-loss", on_loss];
        let mut sender = sender(&hosts, &socket, &options);
        let (mut from, _) = listener.accept().unwrap();
        let to = from.try_clone().unwrap();
        heard(&mut from, to, 1, &[5], &[]);
        hear(&mut from, &state(WITHDRAWAL));
        sender.until_its_end();
        let sent = sender.end().code(3);
        assert!(sent.stderr.contains("has not answered in 1 s"), "{sent:?}");
        assert_eq!(hosts.domains()[0], [left], "{sent:?}");
    }
}

/// In the middle of a checkpoint, with the domain suspended.
#[test]
fn a_secondary_that_reads_nothing_any_more_is_lost_and_the_domain_runs_on() {
    for (on_loss, left) in [("run", "web running"), ("pause", "web paused")] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let options = ["--answer-timeout", "1", "--on-loss", on_loss];
        let mut sender = sender(&hosts, &socket, &options);
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        heard(&mut from, to.try_clone().unwrap(), 1, &[], &RUNS);
        hear(&mut from, &state(NEW));
        // More than a socket can buffer.
        let mut list = state(SUSPENDED);
        list.extend(
            [0xf, 8 * 2000]
                .iter()
                .flat_map(|word: &u32| word.to_le_bytes()),
        );
        list.extend((0..2000_u64).flat_map(u64::to_le_bytes));
        to.write_all(&list).unwrap();
        sender.until_its_end();
        let sent = sender.end().code(3);
        let said = "the other end has taken nothing for 1 s";
        assert!(sent.stderr.contains(said), "{sent:?}");
        assert_eq!(hosts.domains()[0], [left], "{sent:?}");
    }
}

#[test]
fn what_a_secondary_that_fails_says_is_heard_wherever_it_says_it() {
    let hosts = Hosts::with("pvh", &[]);
    let socket = hosts.path("socket");
    // In place of each of its messages, and while it has nothing to say.
    for (last, said) in [
        (&[][..], None),
        (&[READY], None),
        (&RUNS, Some(vec![])),
        (&RUNS, Some(state(SUSPENDED))),
        (&RUNS, None),
    ] {
        let listener = listen(&socket);
        let interval: &[&str] = match (last, &said) {
            (&[READY, RESUMED], None) => &["-i", "4000000000"],
            _ => &[],
        };
        let sender = sender(&hosts, &socket, interval);
        let (mut from, _) = listener.accept().unwrap();
        std::fs::remove_file(&socket).unwrap();
        let mut to = from.try_clone().unwrap();
        heard(
            &mut from,
            to.try_clone().unwrap(),
            2 - interval.len() / 2,
            &[5],
            last,
        );
        if let Some(said) = said {
            hear(&mut from, &state(NEW));
            to.write_all(&said).unwrap();
        }
        to.write_all(&[REPORT, &[7], GO].concat()).unwrap();
        drop((from, to));
        let sent = sender.end().code(1);
        assert!(
            sent.stderr.contains("the other end has failed (status 7)"),
            "{sent:?}"
        );
        assert!(!sent.stderr.contains("where it had to say"), "{sent:?}");
        assert_eq!(hosts.domains()[0], ["web running"], "{sent:?}");
    }
}

/// The domain should run at the other end, which must not be told to drop it.
#[test]
fn a_domain_that_cannot_be_resumed_is_said_to_be_suspended() {
    let given_back = [REPORT, &[1], GO].concat();
    for (on_loss, said, code, words) in [
        // The secondary is killed.
        ("run", &[][..], 3, "Here it is suspended"),
        ("pause", &[], 3, "Here it could not be paused"),
        (
            "run",
            &given_back,
            1,
            "web is suspended here, and runs nowhere else",
        ),
        (
            "run",
            &[REPORT, &[0]].concat(),
            1,
            "here it does not run any more, and must not run again; it is still called web (pausing",
        ),
    ] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let sender = sender(&hosts, &socket, &["--on-loss", on_loss]);
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        heard(&mut from, to.try_clone().unwrap(), 2, &[5], &[]);
        // The domain is suspended here until this end reports the checkpoint. Then the machine's
        // disk refuses writes.
        let refused = domain_dir(&hosts.here).join("state.json.new");
        std::fs::create_dir(&refused).unwrap();
        to.write_all(&state(READY)).unwrap();
        to.write_all(said).unwrap();
        to.shutdown(std::net::Shutdown::Write).unwrap();
        let mut taken_back = Vec::new();
        from.read_to_end(&mut taken_back).unwrap();
        assert_eq!(taken_back, b"");
        let sent = sender.end();
        assert_eq!(sent.code, code, "{sent:?}");
        assert!(sent.stderr.contains(words), "{sent:?}");
        std::fs::remove_dir(refused).unwrap();
        assert_eq!(hosts.domains()[0], ["web suspended"]);
        run(["mock", "resume", "web", "--host", arg(&hosts.here)]).code(0);
    }
}

/// A secondary that is applying a checkpoint receives it once it runs.
#[test]
fn a_domain_is_taken_back_from_a_secondary_that_applies() {
    for last in [&[SUSPENDED][..], &[READY, NEW]] {
        let hosts = Hosts::with("pvh", &[]);
        let socket = hosts.path("socket");
        let listener = listen(&socket);
        let sender = sender(&hosts, &socket, &NONE);
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        heard(&mut from, to.try_clone().unwrap(), 2, &[5], last);
        hear(&mut from, &state(WITHDRAWAL));
        // The secondary gets this far first.
        let runs: Vec<u8> = RUNS.into_iter().flat_map(state).collect();
        to.write_all(&[&runs, REPORT, &[1], GO].concat()).unwrap();
        drop(to);
        from.read_to_end(&mut Vec::new()).unwrap();
        drop(from);
        let sent = sender.end();
        assert_eq!(sent.code, 1, "{sent:?}");
        assert!(sent.stderr.contains("web runs on here"), "{sent:?}");
        assert_eq!(hosts.domains()[0], ["web running"]);
    }
}
