//! Both ends of a stream of checkpoints: a primary whose guest changes in every way between
//! checkpoints, and a secondary with a disk.

use std::cell::RefCell;
use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::rc::Rc;

use crate::common::*;
use xsr_format::frame::Gfn;
use xsr_format::read::{ReadOptions, RecordReader};
use xsr_format::record::RecordKind;
use xsr_save_restore::SaveRequest;
use xsr_save_restore::restore::checkpoint::{CheckpointOptions, Ending, Survivor};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::save::{BUFFER_BYTES, Checkpoints};
use xsr_save_restore::sink::CopySink;
use xsr_save_restore::source::CopySource;
use xsr_save_restore::toolstack::{
    Arrival, CheckpointRestoreToolstack, CheckpointToolstack, Epoch, MissingStaticData, NextEpoch,
    RestoreToolstack, SaveToolstack, ToolstackError,
};
use xsr_save_restore::{RestoreError, RestoreRequest, Rings};
use xsr_xen_backend::mock::{GuestSpec, MemoryDigest, MockHost, Workload, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host, VcpuBlob};

pub(crate) const EPOCHS: usize = 4;
pub(crate) const CHECKPOINT: u32 = 0xe;

/// Takes checkpoints of a guest that works between them.
pub(crate) struct Primary<'a> {
    domain: &'a dyn Domain,
    kind: GuestKind,
    pub(crate) work: Workload,
    epoch: u8,
}

/// A primary of a running guest.
pub(crate) fn primary<'a>(
    from: &MockHost,
    domid: DomId,
    domain: &'a dyn Domain,
    kind: GuestKind,
) -> Primary<'a> {
    let work = WorkloadSpec {
        table_permille: 100,
        balloon_permille: 50,
        ..WorkloadSpec::writes(7, 1, 300)
    };
    Primary {
        domain,
        kind,
        work: from.workload(domid, &work).unwrap(),
        epoch: 0,
    }
}

pub(crate) fn refused(error: impl std::error::Error + Send + Sync + 'static) -> ToolstackError {
    ToolstackError::new("the hypervisor", error)
}

impl SaveToolstack for Primary<'_> {
    /// The guest's first vcpu has another register value in each epoch.
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.domain.suspend().map_err(refused)?;
        self.epoch += 1;
        // After 512 bytes of FPU state in both. A PV vcpu has flags before that, which must mark it
        // as online; an HVM context has two descriptors and a header before it.
        if self.kind == GuestKind::Pv {
            let mut state = self
                .domain
                .pv()
                .unwrap()
                .vcpu_state(0, VcpuBlob::Basic)
                .unwrap();
            state[512] |= 1 << 5;
            state[520] = self.epoch;
            self.domain
                .pv()
                .unwrap()
                .set_vcpu_state(0, VcpuBlob::Basic, &state)
                .unwrap();
        } else {
            let mut context = self.domain.hvm().unwrap().hvm_context().unwrap();
            let header = u32::from_le_bytes(context[4..8].try_into().unwrap()) as usize;
            let cpu = 8 + header;
            assert_eq!(context[cpu..cpu + 2], [2, 0], "the CPU record");
            context[cpu + 8 + 512] = self.epoch;
            self.domain
                .hvm()
                .unwrap()
                .set_hvm_context(&context)
                .unwrap();
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.domain.resume().map_err(refused)
    }

    fn switch_qemu_logdirty(&mut self, _: bool) -> Result<(), ToolstackError> {
        Ok(())
    }
}

impl CheckpointToolstack for Primary<'_> {
    fn postcopy(&mut self) -> Result<(), ToolstackError> {
        self.resume()
    }

    fn checkpoint(&mut self, epoch: &Epoch) -> Result<NextEpoch, ToolstackError> {
        self.work.step(200).unwrap();
        Ok(match epoch.number == EPOCHS as u64 {
            true => NextEpoch::Finish,
            false => NextEpoch::Continue,
        })
    }
}

/// Blocks and what is in them.
pub(crate) type Disk = std::collections::BTreeMap<u64, u64>;

/// The guest's disk writes between two checkpoints, as a replicating disk sends them, beside the
/// stream.
pub(crate) fn disk_writes(epoch: u64) -> Vec<(u64, u64)> {
    let mut seed = epoch;
    (0..20)
        .map(|_| (random(&mut seed) % 64, random(&mut seed)))
        .collect()
}

/// Disk writes that have arrived and wait for their checkpoint.
pub(crate) type Buffered = Rc<RefCell<Vec<(u64, u64)>>>;

/// A stream with disk writes beside it: those of an epoch arrive in the course of its bytes, the
/// last write with the last byte.
pub(crate) struct WithDisk<R> {
    stream: R,
    bytes: usize,
    /// After how many bytes each arrives, the last first.
    writes: Vec<(usize, (u64, u64))>,
    buffered: Buffered,
}

impl<R> WithDisk<R> {
    /// `ends` are the bytes at which each checkpoint is complete.
    pub(crate) fn new(stream: R, ends: &[usize], buffered: &Buffered) -> Self {
        Self {
            stream,
            bytes: 0,
            writes: all_writes(ends).rev().collect(),
            buffered: Rc::clone(buffered),
        }
    }
}

/// All disk writes of a stream whose checkpoints end there, with the byte counts before them.
pub(crate) fn all_writes(
    ends: &[usize],
) -> impl DoubleEndedIterator<Item = (usize, (u64, u64))> + use<> {
    let mut begin = 0;
    let mut writes = Vec::new();
    for (epoch, end) in (1..).zip(ends) {
        let epoch = disk_writes(epoch);
        let count = epoch.len();
        let at = |n: usize| begin + (end - begin) * n / count;
        writes.extend((1..).map(at).zip(epoch));
        begin = *end;
    }
    writes.into_iter()
}

impl<R: Read> Read for WithDisk<R> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        let bytes = self.stream.read(room)?;
        self.bytes += bytes;
        let come = |write: &mut (usize, _)| write.0 <= self.bytes;
        let mut buffered = self.buffered.borrow_mut();
        while let Some((_, write)) = self.writes.pop_if(come) {
            buffered.push(write);
        }
        Ok(bytes)
    }
}

/// The bytes at which the checkpoints of a stream are complete.
pub(crate) fn ends(stream: &[u8]) -> Vec<usize> {
    let records = record_offsets(stream);
    let checkpoints = records.iter().filter(|(_, kind, _)| *kind == CHECKPOINT);
    checkpoints.map(|(at, _, bytes)| at + bytes).collect()
}

/// A stream of checkpoints.
pub(crate) fn protect(spec: &GuestSpec) -> Vec<u8> {
    let from = host(300);
    let domid = from.create_guest(spec).unwrap();
    let domain = from.domain(domid).unwrap();
    let mut primary = primary(&from, domid, domain.as_ref(), spec.kind);
    let mut sink = CopySink(Vec::new());
    SaveRequest::new(domain.as_ref(), from.xen_version().unwrap())
        .options(&options(1))
        .observe(&mut |_| ControlFlow::Continue(()))
        .write_checkpoints(
            &mut primary,
            &mut sink,
            Checkpoints {
                policy: &mut XenPolicy,
                buffer_bytes: BUFFER_BYTES,
            },
        )
        .unwrap();
    sink.0
}

/// The first `checkpoints` as a plain stream.
pub(crate) fn plain(stream: &[u8], checkpoints: usize) -> Vec<u8> {
    let mut plain = stream[..40].to_vec();
    let mut left = checkpoints;
    for (at, kind, bytes) in record_offsets(stream) {
        match kind {
            CHECKPOINT => left -= 1,
            _ => plain.extend_from_slice(&stream[at..at + bytes]),
        }
        if left == 0 {
            break;
        }
    }
    plain.extend_from_slice(&[0; 8]);
    plain
}

/// The whole state of a guest: memory, and the records after it (registers, devices, clock).
pub(crate) struct State {
    pub(crate) memory: MemoryDigest,
    pub(crate) records: Vec<(RecordKind, Vec<u8>)>,
}

impl State {
    /// The kinds of the records that differ. A PV guest's shared info is compared without two
    /// frames, which differ in each domain.
    pub(crate) fn other_records(&self, other: &Self) -> Vec<RecordKind> {
        let kinds = |state: &Self| -> Vec<_> { state.records.iter().map(|r| r.0).collect() };
        assert_eq!(kinds(self), kinds(other));
        let pairs = self.records.iter().zip(&other.records);
        pairs.filter(|(a, b)| a != b).map(|(a, _)| a.0).collect()
    }
}

/// The state of a restored domain. The domain is gone afterwards.
pub(crate) fn state_of(host: &MockHost, domid: DomId) -> State {
    let memory = host.memory_digest(domid).unwrap();
    let domain = unpause(host, domid);
    let saved = save_to_vec(host, domid, &options(1)).unwrap();
    let records = take_apart(&saved).records;
    let guest_is_wide = |records: &[(RecordKind, &[u8])]| {
        let info = records
            .iter()
            .find(|record| record.0 == RecordKind::X86_PV_INFO);
        info.is_some_and(|(_, raw)| raw[0] == 8)
    };
    let wide = guest_is_wide(&records);
    let whole = |(kind, raw): &(RecordKind, &[u8])| {
        let mut raw = raw.to_vec();
        if *kind == RecordKind::SHARED_INFO {
            // arch.pfn_to_mfn_frame_list_list and arch.p2m_cr3, of either width.
            let (at, bytes) = if wide { (3096, 8) } else { (2320, 4) };
            raw[at..at + bytes].fill(0);
            raw[at + 2 * bytes..at + 3 * bytes].fill(0);
        }
        (*kind, raw)
    };
    let records = records.iter().map(whole).collect();
    domain.destroy().unwrap();
    State { memory, records }
}

/// A restorer's toolstack that counts, and may find the other side gone.
#[derive(Default)]
pub(crate) struct Secondary {
    pub(crate) checkpoints: u64,
    pub(crate) lost_at: Option<u64>,
    pub(crate) fails_at: Option<u64>,
    pub(crate) results: u32,
    /// Its disk, and the disk writes that have arrived for an incomplete checkpoint.
    pub(crate) disk: Disk,
    pub(crate) buffered: Buffered,
}

impl RestoreToolstack for Secondary {
    fn static_data_done(&mut self, _: MissingStaticData) -> Result<(), ToolstackError> {
        Ok(())
    }

    fn restore_results(&mut self, _: Option<Gfn>, _: Option<Gfn>) -> Result<(), ToolstackError> {
        self.results += 1;
        Ok(())
    }
}

impl CheckpointRestoreToolstack for Secondary {
    fn checkpoint(&mut self, _: u64) -> Result<Arrival, ToolstackError> {
        let number = self.checkpoints + 1;
        if self.lost_at == Some(number) {
            return Ok(Arrival::Lost);
        }
        if self.fails_at == Some(number) {
            return Err(ToolstackError::new("a callback", "no"));
        }
        self.checkpoints = number;
        self.disk.extend(self.buffered.borrow_mut().drain(..));
        Ok(Arrival::Whole { bytes: 0 })
    }
}

/// Returns its bytes, then fails.
pub(crate) struct Breaks<'a>(pub(crate) &'a [u8]);

impl Read for Breaks<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        match self.0.is_empty() && !room.is_empty() {
            true => Err(io::ErrorKind::ConnectionReset.into()),
            false => self.0.read(room),
        }
    }
}

/// Restores into a new domain, which exists afterwards, whatever the result.
pub(crate) fn survive<R: Read>(
    host: &MockHost,
    (kind, vcpus, pages): Shape,
    source: R,
    toolstack: &mut Secondary,
    keep: &CheckpointOptions,
) -> (DomId, Result<Survivor<CopySource<R>>, RestoreError>) {
    let domid = host.create_domain(kind, vcpus, pages + 256).unwrap();
    let domain = host.domain(domid).unwrap();
    let result = survive_in(host, domain.as_ref(), source, toolstack, keep);
    (domid, result)
}

/// Restores into a domain that has just been created.
pub(crate) fn survive_in<R: Read>(
    host: &MockHost,
    domain: &dyn Domain,
    source: R,
    toolstack: &mut Secondary,
    keep: &CheckpointOptions,
) -> Result<Survivor<CopySource<R>>, RestoreError> {
    let [store_port, console_port] = [(); 2].map(|()| domain.alloc_unbound_port(DomId(0)).unwrap());
    let rings = Rings {
        store_port,
        store_domid: DomId(0),
        console_port,
        console_domid: DomId(0),
    };
    let reader = RecordReader::new(CopySource(source), ReadOptions::default());
    let result = reader.map_err(RestoreError::from).and_then(|reader| {
        RestoreRequest::new(domain, rings)
            .threads(NonZeroUsize::new(2))
            .keep(keep)
            .read_checkpoints(reader, toolstack)
    });
    assert_eq!(host.mapped_pages(), 0);
    result
}

pub(crate) fn guests() -> Vec<GuestSpec> {
    vec![
        GuestSpec {
            vcpus: 2,
            ..GuestSpec::new("pv64", GuestKind::Pv, 8)
        },
        GuestSpec {
            width: 4,
            ..GuestSpec::new("pv32", GuestKind::Pv, 8)
        },
        GuestSpec::new("hvm", GuestKind::Hvm, 8),
        GuestSpec::new("pvh", GuestKind::Pvh, 8),
    ]
}

pub(crate) fn in_memory(memory_bytes: usize) -> CheckpointOptions {
    CheckpointOptions {
        memory_bytes,
        ..CheckpointOptions::default()
    }
}

/// splitmix64
pub(crate) fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

pub(crate) fn is_loss<S>(ending: &Ending<S>) -> bool {
    matches!(ending, Ending::SourceLost(_))
}
