//! Guests that have seen CPU features which the host lacks: refused before they have any memory, or
//! restored with a warning.

use std::ops::ControlFlow;

use crate::common::faulty::{Fault, Faulty};
use crate::common::*;
use xsr_format::cpu_policy::{CpuPolicy as Leaves, Missing};
use xsr_format::fields::x86::Feature;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{CpuCheck, RestoreError, RestoreRequest, Rings};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{CpuPolicy, DomId, Domain, DomainControl as _, Errno, GuestKind, Host};

/// A host with more or fewer features than usual.
fn host_with(processor: &str) -> MockHost {
    let config = HostConfig {
        processor: processor.parse().unwrap(),
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

fn guests() -> Vec<GuestSpec> {
    vec![
        GuestSpec::new("pv64", GuestKind::Pv, 8),
        GuestSpec {
            width: 4,
            ..GuestSpec::new("pv32", GuestKind::Pv, 8)
        },
        GuestSpec::new("hvm", GuestKind::Hvm, 8),
        GuestSpec::new("pvh", GuestKind::Pvh, 8),
    ]
}

/// The stream of a guest that was created on a host with this processor.
fn saved_on(processor: &str, spec: &GuestSpec) -> Vec<u8> {
    let host = host_with(processor);
    let domid = host.create_guest(spec).unwrap();
    save_to_vec(&host, domid, &options(1)).unwrap()
}

fn empty_domain(host: &dyn Host, kind: GuestKind, stream: &[u8]) -> Box<dyn Domain> {
    let (kind, vcpus, pages) = shape(stream, kind, 1);
    let domid = host.create_domain(kind, vcpus, pages + 256).unwrap();
    host.domain(domid).unwrap()
}

fn rings(domain: &dyn Domain) -> Rings {
    Rings {
        store_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        store_domid: DomId(0),
        console_port: domain.alloc_unbound_port(DomId(0)).unwrap(),
        console_domid: DomId(0),
    }
}

fn restored(domain: &dyn Domain, stream: &[u8], cpu: CpuCheck) -> Result<(), RestoreError> {
    let reader = RecordReader::new(CopySource(stream), ReadOptions::default()).unwrap();
    let mut toolstack = DirectToolstack(domain);
    let rings = rings(domain);
    let mut go_on = |_: &_| ControlFlow::Continue(());
    RestoreRequest::new(domain, rings)
        .cpu(cpu)
        .observe(&mut go_on)
        .read_stream(reader, &mut toolstack)
        .map(drop)
}

fn names(error: &RestoreError) -> Vec<String> {
    match error {
        RestoreError::CpuFeatures(missing) => {
            missing.missing.iter().map(ToString::to_string).collect()
        }
        other => panic!("{other}"),
    }
}

fn leaves_of(policy: &CpuPolicy) -> Leaves {
    Leaves::parse(&policy.leaves, &policy.msrs).unwrap()
}

fn has(domain: &dyn Domain, feature: &str) -> bool {
    leaves_of(&domain.cpu_policy().unwrap()).has(Feature::named(feature).unwrap())
}

const RICH: &str = "+avx512f,+avx512bw";

#[test]
fn a_feature_less_is_refused_by_name_before_there_is_memory() {
    for spec in guests() {
        let stream = saved_on(RICH, &spec);
        let machine = host_with("");
        let over_hypercalls = machine.as_xen().unwrap();
        for host in [&machine as &dyn Host, &over_hypercalls] {
            let domain = empty_domain(host, spec.kind, &stream);
            let before = domain.cpu_policy().unwrap();
            let error = restored(domain.as_ref(), &stream, CpuCheck::Refuse).unwrap_err();
            assert_eq!(names(&error), ["AVX512F", "AVX512BW"], "{}", spec.name);
            assert!(!error.is_bad_image());
            let text = error.to_string();
            assert!(text.contains("it lacks AVX512F, AVX512BW"), "{text}");
            let info = domain.info().unwrap();
            assert_eq!((info.tot_pages, info.paused), (0, true), "{}", spec.name);
            assert_eq!(domain.cpu_policy().unwrap(), before, "{}", spec.name);
            domain.destroy().unwrap();
        }
        // A host like the source accepts it, and so does one with more features.
        for processor in [RICH, "+avx512f,+avx512bw,+avx512vl"] {
            let machine = host_with(processor);
            let domain = empty_domain(&machine, spec.kind, &stream);
            restored(domain.as_ref(), &stream, CpuCheck::Refuse).unwrap();
            assert!(has(domain.as_ref(), "avx512bw"), "{}", spec.name);
        }
    }
}

#[test]
fn a_feature_less_is_lost_where_that_is_allowed() {
    for spec in guests() {
        let stream = saved_on(RICH, &spec);
        let machine = host_with("");
        let domain = empty_domain(&machine, spec.kind, &stream);
        restored(domain.as_ref(), &stream, CpuCheck::Warn).unwrap();
        assert!(!has(domain.as_ref(), "avx512f"), "{}", spec.name);
        assert!(has(domain.as_ref(), "avx2"), "{}", spec.name);
        domain.unpause().unwrap();
    }
}

#[test]
fn a_checkpointed_stream_is_compared_as_well() {
    let spec = GuestSpec::new("hvm", GuestKind::Hvm, 8);
    let stream = saved_on(RICH, &spec);
    let machine = host_with("");
    let domain = empty_domain(&machine, spec.kind, &stream);
    let domain = domain.as_ref();
    let refused = RestoreRequest::new(domain, rings(domain)).read_checkpoints(
        RecordReader::new(CopySource(stream.as_slice()), ReadOptions::default()).unwrap(),
        &mut DirectToolstack(domain),
    );
    assert_eq!(names(&refused.unwrap_err()), ["AVX512F", "AVX512BW"]);
}

/// Shadowed page tables, for example, remove features that the host's maximum has: only the policy
/// as Xen has changed it shows this.
#[test]
fn what_xen_takes_away_beyond_the_most_is_found_as_well() {
    let spec = GuestSpec::new("hvm", GuestKind::Hvm, 8);
    let stream = saved_on(RICH, &spec);
    let rich = host_with(RICH);
    let most = rich.max_cpu_policy(GuestKind::Hvm).unwrap();
    for cpu in [CpuCheck::Refuse, CpuCheck::Warn] {
        let machine = host_with("-pku");
        let inner = empty_domain(&machine, spec.kind, &stream);
        let domain = Faulty::watching(inner).with_most(most.clone());
        let result = restored(&domain, &stream, cpu);
        match cpu {
            CpuCheck::Refuse => {
                let error = result.unwrap_err();
                assert_eq!(names(&error), ["AVX512F", "AVX512BW", "PKU"]);
                assert_eq!(domain.info().unwrap().tot_pages, 0);
            }
            CpuCheck::Warn => result.unwrap(),
        }
    }
}

/// If the hypervisor does not report its features, nothing is known. A drop-in must not fail for
/// this, but a command that should find out must.
#[test]
fn a_host_that_does_not_tell_is_refused_unless_a_warning_will_do() {
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 8);
    let stream = saved_on("", &spec);
    let machine = host_with("");
    let trace = {
        let domain = Faulty::watching(empty_domain(&machine, spec.kind, &stream));
        restored(&domain, &stream, CpuCheck::Refuse).unwrap();
        domain.trace()
    };
    for op in ["max_cpu_policy", "cpu_policy"] {
        let at = trace.iter().position(|call| call.op == op).unwrap();
        let broken = || {
            let inner = empty_domain(&machine, spec.kind, &stream);
            Faulty::new(inner, at, Fault::Errno(Errno::EPERM))
        };
        let refused = restored(&broken(), &stream, CpuCheck::Refuse).unwrap_err();
        match refused {
            RestoreError::Backend(error) => assert_eq!((error.op, error.errno), (op, Errno::EPERM)),
            other => panic!("{op}: {other}"),
        }
        restored(&broken(), &stream, CpuCheck::Warn).unwrap();
    }
}

#[test]
fn the_processors_are_named_where_they_differ() {
    let spec = GuestSpec::new("pvh", GuestKind::Pvh, 8);
    let mut stream = saved_on(RICH, &spec);
    let brand = b"Mock x86 process";
    let at = stream
        .windows(brand.len())
        .position(|w| w == brand)
        .unwrap();
    stream[at..at + 4].copy_from_slice(b"Real");
    let machine = host_with("");
    let domain = empty_domain(&machine, spec.kind, &stream);
    let error = restored(domain.as_ref(), &stream, CpuCheck::Refuse).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("comes from another CPU: \"Real x86 processor of the xsr project\", this host has \"Mock x86"),
        "{text}"
    );
    let RestoreError::CpuFeatures(missing) = error else {
        unreachable!("it was one");
    };
    assert!(matches!(missing.missing[0], Missing::Feature { .. }));
}
