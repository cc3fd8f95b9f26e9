//! Memory digests: a guest that has worked for a while arrives with unchanged memory, according to
//! the mock machine's own digest, and continues to work.

use xsr_save_restore::source::CopySource;
use xsr_xen_backend::Host;
use xsr_xen_backend::mock::WorkloadSpec;

#[test]
fn a_guest_that_has_worked_arrives_as_it_left() {
    for spec in crate::common::specs() {
        let (old, new) = (crate::common::host(1), crate::common::host(2));
        let domid = old.create_guest(&spec).unwrap();
        let work = WorkloadSpec {
            seed: 3,
            rate: 1000,
            working_set: 500,
            table_permille: 300,
            balloon_permille: 200,
            end: None,
        };
        let mut workload = old.workload(domid, &work).unwrap();
        assert_eq!(workload.step(2000).unwrap(), 2000);
        let stream = crate::common::save_to_vec(&old, domid, &crate::common::options(2)).unwrap();
        let left = old.memory_digest(domid).unwrap();
        let shape = crate::common::shape(&stream, spec.kind, spec.vcpus);
        let source = CopySource(stream.as_slice());
        let (there, restored) = crate::common::restore_stream(&new, shape, source);
        restored.unwrap();
        // Before its kernel runs, and after.
        let arrived = new.memory_digest(there).unwrap();
        assert_eq!(arrived.differences(&left), [], "{}", spec.name);
        new.domain(there).unwrap().unpause().unwrap();
        let arrived = new.memory_digest(there).unwrap();
        assert_eq!(arrived.differences(&left), [], "{}", spec.name);
        let mut workload = new.workload(there, &work).unwrap();
        assert_eq!(workload.step(2000).unwrap(), 2000);
        assert!(new.memory_digest(there).unwrap().differences(&left).len() > 100);
    }
}
