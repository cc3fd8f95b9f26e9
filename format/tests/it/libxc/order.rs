//! Tests that every order permitted by the specification is accepted.

use crate::support::build::*;
use crate::support::drive::strict;

/// All permutations of `items`.
fn permutations<T: Clone>(items: &[T]) -> Vec<Vec<T>> {
    let Some((first, rest)) = items.split_first() else {
        return vec![Vec::new()];
    };
    let mut out = Vec::new();
    for shorter in permutations(rest) {
        for at in 0..=shorter.len() {
            let mut longer = shorter.clone();
            longer.insert(at, first.clone());
            out.push(longer);
        }
    }
    out
}

#[track_caller]
fn accepted(stream: &Stream) {
    let bytes = stream.bytes();
    let outcome = strict(&bytes);
    assert_eq!(outcome.end, Ok(bytes.len() as u64));
    assert_eq!(outcome.kinds(), stream.kinds());
}

/// Replaces the records of these kinds by `records`, in each order.
fn each_order(stream: &Stream, kinds: &[u32]) -> Vec<Stream> {
    let places: Vec<usize> = stream
        .records
        .iter()
        .enumerate()
        .filter(|(_, r)| kinds.contains(&r.kind))
        .map(|(i, _)| i)
        .collect();
    let records: Vec<Rec> = places.iter().map(|i| stream.records[*i].clone()).collect();
    permutations(&records)
        .into_iter()
        .map(|order| {
            let mut stream = stream.clone();
            for (place, record) in places.iter().zip(order) {
                stream.records[*place] = record;
            }
            stream
        })
        .collect()
}

#[test]
fn whole_streams() {
    for big in [false, true] {
        for version in [2, 3] {
            accepted(&Stream::whole_pv(version, big, 4));
            accepted(&Stream::whole_pv(version, big, 8));
            accepted(&Stream::whole_hvm(version, big));
        }
    }
}

#[test]
fn static_data_in_each_order() {
    let orders = each_order(
        &Stream::whole_pv(3, false, 8),
        &[PV_INFO, CPUID_POLICY, MSR_POLICY],
    );
    assert_eq!(orders.len(), 6);
    orders.iter().for_each(accepted);
    each_order(&Stream::whole_hvm(3, false), &[CPUID_POLICY, MSR_POLICY])
        .iter()
        .for_each(accepted);
}

#[test]
fn pv_tail_in_each_order() {
    let orders = each_order(
        &Stream::whole_pv(3, false, 8),
        &[
            TSC_INFO,
            SHARED_INFO,
            VCPU_BASIC,
            VCPU_EXTENDED,
            VCPU_XSAVE,
            VCPU_MSRS,
        ],
    );
    assert_eq!(orders.len(), 720);
    orders.iter().for_each(accepted);
}

#[test]
fn hvm_tail_in_each_order() {
    let orders = each_order(
        &Stream::whole_hvm(3, false),
        &[TSC_INFO, HVM_CONTEXT, HVM_PARAMS],
    );
    assert_eq!(orders.len(), 6);
    orders.iter().for_each(accepted);
}

/// Records that do not depend on memory may come before, between and after the batches.
#[test]
fn tail_records_anywhere_among_the_batches() {
    for stream in [Stream::whole_hvm(3, false), Stream::whole_hvm(2, false)] {
        let free = [TSC_INFO, HVM_CONTEXT, HVM_PARAMS, PAGE_DATA];
        let orders = each_order(&stream, &free);
        assert_eq!(orders.len(), 120);
        orders.iter().for_each(accepted);
    }
    for kind in [TSC_INFO, SHARED_INFO] {
        let stream = Stream::whole_pv(3, false, 8);
        let first = stream.kinds().iter().position(|k| *k == PV_INFO).unwrap() + 1;
        let mut rest = stream.clone().without(kind);
        let record = stream.clone().find(kind).clone();
        for at in first..rest.records.len() {
            rest.records.insert(at, record.clone());
            accepted(&rest);
            rest.records.remove(at);
        }
    }
}

/// A PV guest that grows while it is saved sends its p2m again. The range of pfns only grows.
#[test]
fn p2m_frames_again() {
    let mut stream = Stream::new(3, PV, false)
        .pv_info(8)
        .policies()
        .p2m(0, 1, &[0])
        .pages(&[(1, 0)])
        .p2m(0, 1000, &[0, 1])
        .pages(&[(1000, 0xf)])
        .p2m(0, 1, &[0])
        .pages(&[(1000, 0xf)]);
    let tail = Stream::whole_pv(3, false, 8);
    let at = tail.kinds().iter().position(|k| *k == TSC_INFO).unwrap();
    stream.records.extend_from_slice(&tail.records[at..]);
    accepted(&stream);
}

/// VERIFY, and CHECKPOINT with a complete state before it, may come more than once.
#[test]
fn verify_and_checkpoints() {
    let mut stream = Stream::whole_hvm(3, false).without(END);
    let again = stream.records[3..].to_vec();
    stream = stream.empty(CHECKPOINT);
    stream.records.extend(again.clone());
    stream = stream.empty(CHECKPOINT).empty(VERIFY);
    stream.records.extend(again);
    accepted(&stream.empty(END));
}

/// In version 2, static data ends where memory begins.
#[test]
fn v2_infers_static_data_end() {
    use xsr_format::slice::SliceReader;
    for (stream, ends_at) in [
        (Stream::whole_pv(2, false, 8), P2M_FRAMES),
        (Stream::whole_pv(2, true, 4), P2M_FRAMES),
        (Stream::whole_hvm(2, false), PAGE_DATA),
        (Stream::whole_hvm(2, true), PAGE_DATA),
    ] {
        let bytes = stream.bytes();
        let mut reader = SliceReader::new(&bytes, Default::default()).unwrap();
        let at = stream.kinds().iter().position(|k| *k == ends_at).unwrap();
        for index in 0..stream.records.len() {
            assert_eq!(reader.static_data_over(), index > at);
            reader.next_record().unwrap().unwrap();
        }
    }
}

/// A tail record before memory does not end static data.
#[test]
fn v2_tail_record_first_does_not_end_static_data() {
    use xsr_format::slice::SliceReader;
    let bytes = Stream::new(2, HVM, false).tsc().bytes();
    let mut reader = SliceReader::new(&bytes, Default::default()).unwrap();
    reader.next_record().unwrap().unwrap();
    assert!(!reader.static_data_over());
}

#[test]
fn v3_static_data_ends_where_it_says() {
    use xsr_format::read::RecordReader;
    let stream = Stream::whole_hvm(3, false);
    let bytes = stream.bytes();
    let mut reader = RecordReader::new(&bytes[..], Default::default()).unwrap();
    for kind in stream.kinds() {
        let over = reader.static_data_over();
        assert!(reader.next_record().unwrap().is_some());
        if kind == STATIC_DATA_END {
            assert!(!over && reader.static_data_over());
        }
    }
    assert!(reader.next_record().unwrap().is_none());
    assert!(reader.next_record().unwrap().is_none());
}
