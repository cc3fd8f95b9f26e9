//! Mock machines, and the streams that the engine alone writes for their guests.

use std::path::{Path, PathBuf};

use xsr_save_restore::SaveRequest;
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, GuestKind, Host as _, ShutdownReason};

/// Each kind of guest, and its width in bytes.
pub(crate) const KINDS: [(GuestKind, u8); 4] = [
    (GuestKind::Pv, 8),
    (GuestKind::Pv, 4),
    (GuestKind::Hvm, 8),
    (GuestKind::Pvh, 8),
];

/// The only domain of each machine.
pub(crate) const DOMID: DomId = DomId(1);

/// Creates a machine below `dir` with a guest of 16 MiB.
pub(crate) fn guest(dir: &Path, kind: GuestKind, width: u8) -> PathBuf {
    guest_on(dir, kind, width, &HostConfig::default())
}

/// The same on a machine of this kind.
pub(crate) fn guest_on(dir: &Path, kind: GuestKind, width: u8, machine: &HostConfig) -> PathBuf {
    let path = dir.join("host");
    let host = MockHost::create(&path, machine).unwrap();
    let spec = GuestSpec {
        width,
        vcpus: 2,
        ..GuestSpec::new("web", kind, 16)
    };
    assert_eq!(host.create_guest(&spec).unwrap(), DOMID);
    path
}

/// Makes the guest write to this many pages a second from now on.
pub(crate) fn busy(machine: &Path, pages: u32) {
    let spec = WorkloadSpec::writes(7, pages, 1024);
    let host = MockHost::open(machine).unwrap();
    let spec = serde_json::to_vec(&spec).unwrap();
    host.userdata_store(DOMID, "mock-workload", &spec).unwrap();
}

/// Creates a machine below `dir` with a domain that is prepared for a restore as xenopsd does it;
/// returns it with the domain's ports for xenstore and console.
pub(crate) fn empty(dir: &Path, kind: GuestKind) -> (PathBuf, [u32; 2]) {
    let path = dir.join("host");
    let host = MockHost::create(&path, &HostConfig::default()).unwrap();
    assert_eq!(host.create_domain(kind, 2, 8192).unwrap(), DOMID);
    let domain = host.domain(DOMID).unwrap();
    let ports = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    (path, ports)
}

/// The reason why the machine's guest has shut down.
pub(crate) fn shutdown(machine: &Path) -> Option<ShutdownReason> {
    let host = MockHost::open(machine).unwrap();
    host.domain(DOMID).unwrap().info().unwrap().shutdown
}

/// The stream that the engine alone writes for the guest of an identical machine.
pub(crate) fn by_the_engine(kind: GuestKind, width: u8) -> Vec<u8> {
    let dir = crate::images::scratch();
    let host = MockHost::open(&guest(dir.path(), kind, width)).unwrap();
    let domain = host.domain(DOMID).unwrap();
    let mut stream = Vec::new();
    SaveRequest::new(domain.as_ref(), host.xen_version().unwrap())
        .write_stream(
            &mut DirectToolstack(domain.as_ref()),
            &mut CopySink(&mut stream),
        )
        .unwrap()
        .keep_suspended();
    stream
}
