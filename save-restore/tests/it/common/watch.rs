//! Checks after a failed save or restore: the source is unchanged, the device model is informed, no
//! page is mapped.

use xsr_format::frame::Gfn;
use xsr_save_restore::toolstack::{
    DirectToolstack, MissingStaticData, RestoreToolstack, SaveToolstack, ToolstackError,
};
use xsr_xen_backend::mock::{MemoryDigest, MockHost};
use xsr_xen_backend::{DomId, Domain, DomainInfo, GuestKind, Host, VcpuBlob};

/// Everything of a domain that a failed save must not change.
#[derive(PartialEq)]
pub(crate) struct State {
    info: DomainInfo,
    vcpus: Vec<(bool, Vec<Vec<u8>>)>,
    hvm: Option<(Vec<u8>, Vec<u64>)>,
}

impl State {
    /// The current state.
    pub(crate) fn of(host: &MockHost, domid: DomId) -> Self {
        let domain = host.domain(domid).unwrap();
        let info = domain.info().unwrap();
        let blobs = [
            VcpuBlob::Basic,
            VcpuBlob::Extended,
            VcpuBlob::Xsave,
            VcpuBlob::Msrs,
        ];
        let vcpus = (0..=info.max_vcpu_id)
            .map(|id| {
                let online = domain.vcpu_online(id).unwrap();
                let of_pv = online && info.kind == GuestKind::Pv;
                let blobs = blobs.iter().filter(|_| of_pv);
                let state = blobs.map(|blob| domain.pv().unwrap().vcpu_state(id, *blob).unwrap());
                (online, state.collect())
            })
            .collect();
        let hvm = info.kind.is_translated().then(|| {
            let params = (0..39).filter_map(|index| domain.hvm().unwrap().hvm_param(index).ok());
            (
                domain.hvm().unwrap().hvm_context().unwrap(),
                params.collect(),
            )
        });
        Self { info, vcpus, hvm }
    }
}

/// A running domain before a test acts on it.
pub(crate) struct Source<'a> {
    host: &'a MockHost,
    domid: DomId,
    state: State,
    digest: MemoryDigest,
}

impl<'a> Source<'a> {
    /// Records the current state. The domain's suspend has been cancelled once already, because a
    /// PV guest sees in eax from then on that it was.
    pub(crate) fn of(host: &'a MockHost, domid: DomId) -> Self {
        let domain = host.domain(domid).unwrap();
        domain.suspend().unwrap();
        domain.resume().unwrap();
        Self {
            host,
            domid,
            state: State::of(host, domid),
            digest: host.memory_digest(domid).unwrap(),
        }
    }

    /// The domain runs, not paused and not shut down, with the vcpus it had; its writes are not
    /// logged; no page is mapped.
    pub(crate) fn assert_runs(&self, what: &str) {
        assert_eq!(
            self.host.mapped_pages(),
            0,
            "{what}: pages are still mapped"
        );
        assert!(!self.host.is_log_dirty(self.domid).unwrap(), "{what}");
        let now = State::of(self.host, self.domid);
        assert_eq!(now.info, self.state.info, "{what}");
        assert!(now == self.state, "{what}: vcpus or devices have changed");
    }

    /// And its memory is unchanged.
    pub(crate) fn assert_unchanged(&self, what: &str) {
        self.assert_runs(what);
        let now = self.host.memory_digest(self.domid).unwrap();
        assert_eq!(now.differences(&self.digest), [], "{what}: memory");
    }
}

/// How a callback fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nothing was done.
    Before,
    /// It was done, and then something else failed.
    After,
}

/// A toolstack that records its calls, and of which one callback may fail.
pub(crate) struct Toolstack<'a> {
    inner: DirectToolstack<'a>,
    fails: Option<(usize, Refusal)>,
    pub(crate) log: Vec<&'static str>,
}

impl<'a> Toolstack<'a> {
    pub(crate) fn new(domain: &'a dyn Domain) -> Self {
        Self {
            inner: DirectToolstack(domain),
            fails: None,
            log: Vec::new(),
        }
    }

    /// Callback number `at` fails, from 0.
    pub(crate) fn failing(domain: &'a dyn Domain, at: usize, how: Refusal) -> Self {
        Self {
            fails: Some((at, how)),
            ..Self::new(domain)
        }
    }

    fn callback(
        &mut self,
        what: &'static str,
        call: impl FnOnce(&mut DirectToolstack<'a>) -> Result<(), ToolstackError>,
    ) -> Result<(), ToolstackError> {
        let turn = self.fails.filter(|(at, _)| *at == self.log.len());
        self.log.push(what);
        let refused = || Err(ToolstackError::new(what, "refused by the test"));
        match turn {
            None => call(&mut self.inner),
            Some((_, Refusal::Before)) => refused(),
            Some((_, Refusal::After)) => call(&mut self.inner).and_then(|()| refused()),
        }
    }

    /// The callback that failed, if its turn has come.
    pub(crate) fn refused(&self) -> Option<&'static str> {
        self.fails.and_then(|(at, _)| self.log.get(at).copied())
    }

    /// The device model was told to end what it was told to begin, and a suspended guest was
    /// resumed.
    pub(crate) fn assert_undone(&self, what: &str) {
        let count = |name| self.log.iter().filter(|asked| **asked == name).count();
        let log = &self.log;
        assert_eq!(
            count("logdirty on"),
            count("logdirty off"),
            "{what}: {log:?}"
        );
        assert_eq!(count("suspend"), count("resume"), "{what}: {log:?}");
    }
}

impl SaveToolstack for Toolstack<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.callback("suspend", |inner| inner.suspend())
    }
    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.callback("resume", |inner| inner.resume())
    }
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        let what = if on { "logdirty on" } else { "logdirty off" };
        self.callback(what, |inner| inner.switch_qemu_logdirty(on))
    }
}

impl RestoreToolstack for Toolstack<'_> {
    fn static_data_done(&mut self, missing: MissingStaticData) -> Result<(), ToolstackError> {
        self.callback("static data done", |inner| inner.static_data_done(missing))
    }
    fn restore_results(
        &mut self,
        store: Option<Gfn>,
        console: Option<Gfn>,
    ) -> Result<(), ToolstackError> {
        self.callback("restore results", |inner| {
            inner.restore_results(store, console)
        })
    }
}
