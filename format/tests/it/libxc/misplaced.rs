//! Tests that break every rule of order once.

use xsr_format::image::GuestType;
use xsr_format::order::OrderError as O;
use xsr_format::record::RecordKind as K;

use crate::libxc::rules::{bytes, hvm, in_record, pv, with_body};
use crate::support::build::*;

#[test]
fn order_needs() {
    for (without, index, kind, missing) in [
        (PV_INFO, 2, STATIC_DATA_END, PV_INFO),
        (STATIC_DATA_END, 3, P2M_FRAMES, STATIC_DATA_END),
        (P2M_FRAMES, 4, PAGE_DATA, P2M_FRAMES),
        (PAGE_DATA, 7, VCPU_BASIC, PAGE_DATA),
    ] {
        let (kind, missing) = (K(kind), K(missing));
        in_record(&pv().without(without), index, O::Needs { kind, missing });
    }
    let stream = hvm().without(STATIC_DATA_END);
    let (kind, missing) = (K::PAGE_DATA, K::STATIC_DATA_END);
    in_record(&stream, 2, O::Needs { kind, missing });
    for kind in [P2M_FRAMES, SHARED_INFO, VCPU_MSRS, PAGE_DATA] {
        let stream = Stream::new(2, PV, false).with(kind, |o| o.fill(0, 4096));
        let (kind, missing) = (K(kind), K::X86_PV_INFO);
        in_record(&stream, 0, O::Needs { kind, missing });
    }
}

#[test]
fn order_static_data_over() {
    for kind in [CPUID_POLICY, MSR_POLICY] {
        let mut stream = hvm();
        let late = stream.find(kind).clone();
        let index = stream.records.len() - 1;
        stream.records.insert(index, late);
        in_record(&stream, index, O::StaticDataOver { kind: K(kind) });
    }
}

#[test]
fn order_repeated() {
    for kind in [PV_INFO, STATIC_DATA_END] {
        let mut stream = pv();
        let again = stream.find(kind).clone();
        stream.records.insert(4, again);
        in_record(&stream, 4, O::Repeated { kind: K(kind) });
    }
}

#[test]
fn order_other_guest() {
    let (kind, guest_type) = (K::HVM_CONTEXT, GuestType::X86_PV);
    let stream = Stream::new(3, PV, false).with(HVM_CONTEXT, |o| o.u64(0));
    in_record(&stream, 0, O::OtherGuest { kind, guest_type });
    let stream = Stream::new(3, PV, false).params(&[(1, 2)]);
    let kind = K::HVM_PARAMS;
    in_record(&stream, 0, O::OtherGuest { kind, guest_type });
    for rec in pv().records {
        if !matches!(rec.kind, PV_INFO..=SHARED_INFO | VCPU_MSRS) {
            continue;
        }
        let (kind, guest_type) = (K(rec.kind), GuestType::X86_HVM);
        let mut stream = hvm();
        stream.records.insert(0, rec);
        in_record(&stream, 0, O::OtherGuest { kind, guest_type });
    }
}

#[test]
fn order_back_channel() {
    let mut stream = hvm();
    let (kind, body) = (DIRTY_PFNS, vec![0; 16]);
    stream.records.insert(4, Rec { kind, body });
    let kind = K(kind);
    in_record(&stream, 4, O::BackChannel { kind });
}

#[test]
fn order_incomplete() {
    for last in [END, CHECKPOINT] {
        for missing in [SHARED_INFO, VCPU_BASIC] {
            let stream = pv().without(missing).without(END).empty(last);
            let index = stream.records.len() - 1;
            let (kind, missing) = (K(last), K(missing));
            in_record(&stream, index, O::Incomplete { kind, missing });
        }
        for missing in [PAGE_DATA, HVM_CONTEXT] {
            let stream = hvm().without(missing).without(END).empty(last);
            let index = stream.records.len() - 1;
            let (kind, missing) = (K(last), K(missing));
            in_record(&stream, index, O::Incomplete { kind, missing });
        }
    }
}

/// Neither an empty blob (erratum 1) nor another vcpu's blob counts as vcpu 0's registers.
#[test]
fn order_incomplete_without_registers_of_vcpu_0() {
    let (kind, missing) = (K::END, K::X86_PV_VCPU_BASIC);
    for (vcpu, blob) in [(0, 0), (1, 0x1430)] {
        let body = bytes().u32(vcpu).u32(0).fill(0, blob);
        let (stream, _) = with_body(pv(), VCPU_BASIC, body);
        let index = stream.records.len() - 1;
        in_record(&stream, index, O::Incomplete { kind, missing });
    }
}
