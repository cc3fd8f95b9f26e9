//! Builder of streams from plain numbers, in either byte order, written from the specification
//! without using the crate.

use std::iter;

/// Record types from the specification.
pub(crate) const END: u32 = 0x00;
pub(crate) const PAGE_DATA: u32 = 0x01;
pub(crate) const PV_INFO: u32 = 0x02;
pub(crate) const P2M_FRAMES: u32 = 0x03;
pub(crate) const VCPU_BASIC: u32 = 0x04;
pub(crate) const VCPU_EXTENDED: u32 = 0x05;
pub(crate) const VCPU_XSAVE: u32 = 0x06;
pub(crate) const SHARED_INFO: u32 = 0x07;
pub(crate) const TSC_INFO: u32 = 0x08;
pub(crate) const HVM_CONTEXT: u32 = 0x09;
pub(crate) const HVM_PARAMS: u32 = 0x0a;
pub(crate) const TOOLSTACK: u32 = 0x0b;
pub(crate) const VCPU_MSRS: u32 = 0x0c;
pub(crate) const VERIFY: u32 = 0x0d;
pub(crate) const CHECKPOINT: u32 = 0x0e;
pub(crate) const DIRTY_PFNS: u32 = 0x0f;
pub(crate) const STATIC_DATA_END: u32 = 0x10;
pub(crate) const CPUID_POLICY: u32 = 0x11;
pub(crate) const MSR_POLICY: u32 = 0x12;

pub(crate) const PV: u32 = 1;
pub(crate) const HVM: u32 = 2;

/// Bytes in one byte order.
#[derive(Clone, Debug)]
pub(crate) struct Bytes {
    pub(crate) big: bool,
    pub(crate) bytes: Vec<u8>,
}

impl Bytes {
    pub(crate) fn new(big: bool) -> Self {
        let bytes = Vec::new();
        Self { big, bytes }
    }

    pub(crate) fn u8(self, value: u8) -> Self {
        self.bytes(&[value])
    }

    pub(crate) fn u16(self, value: u16) -> Self {
        let raw = if self.big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        };
        self.bytes(&raw)
    }

    pub(crate) fn u32(self, value: u32) -> Self {
        let raw = if self.big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        };
        self.bytes(&raw)
    }

    pub(crate) fn u64(self, value: u64) -> Self {
        let raw = if self.big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        };
        self.bytes(&raw)
    }

    pub(crate) fn bytes(mut self, raw: &[u8]) -> Self {
        self.bytes.extend_from_slice(raw);
        self
    }

    pub(crate) fn fill(mut self, byte: u8, count: usize) -> Self {
        self.bytes.extend(iter::repeat_n(byte, count));
        self
    }
}

/// A record before it is put into a stream.
#[derive(Clone, Debug)]
pub(crate) struct Rec {
    pub(crate) kind: u32,
    pub(crate) body: Vec<u8>,
}

/// A stream under construction.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    pub(crate) version: u32,
    pub(crate) guest: u32,
    pub(crate) big: bool,
    pub(crate) records: Vec<Rec>,
}

impl Stream {
    pub(crate) fn new(version: u32, guest: u32, big: bool) -> Self {
        let records = Vec::new();
        Self {
            version,
            guest,
            big,
            records,
        }
    }

    pub(crate) fn with(mut self, kind: u32, body: impl FnOnce(Bytes) -> Bytes) -> Self {
        let body = body(Bytes::new(self.big)).bytes;
        self.records.push(Rec { kind, body });
        self
    }

    pub(crate) fn empty(self, kind: u32) -> Self {
        self.with(kind, |o| o)
    }

    /// The first record of this kind.
    pub(crate) fn find(&mut self, kind: u32) -> &mut Rec {
        self.records.iter_mut().find(|r| r.kind == kind).unwrap()
    }

    /// Removes the records of this kind.
    pub(crate) fn without(mut self, kind: u32) -> Self {
        self.records.retain(|r| r.kind != kind);
        self
    }

    pub(crate) fn kinds(&self) -> Vec<u32> {
        self.records.iter().map(|r| r.kind).collect()
    }

    /// The stream's bytes.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut out = headers(self.version, self.guest, self.big);
        for rec in &self.records {
            out.extend(record(self.big, rec.kind, &rec.body));
        }
        out
    }

    /// The offset of each record, and the end of the stream.
    pub(crate) fn offsets(&self) -> Vec<usize> {
        let mut at = 40;
        let mut out = vec![at];
        for rec in &self.records {
            at += 8 + rec.body.len().next_multiple_of(8);
            out.push(at);
        }
        out
    }

    pub(crate) fn pv_info(self, width: u8) -> Self {
        let levels = if width == 4 { 3 } else { 4 };
        self.with(PV_INFO, |o| o.u8(width).u8(levels).u16(0).u32(0))
    }

    pub(crate) fn p2m(self, start: u32, end: u32, frames: &[u64]) -> Self {
        self.with(P2M_FRAMES, |o| {
            frames.iter().fold(o.u32(start).u32(end), |o, f| o.u64(*f))
        })
    }

    /// Adds entries given as (pfn, type), and a page filled with the byte `pfn & 0xff` for each
    /// that has data.
    pub(crate) fn pages(self, entries: &[(u64, u8)]) -> Self {
        self.with(PAGE_DATA, |o| {
            let count = u32::try_from(entries.len()).unwrap();
            let o = entries.iter().fold(o.u32(count).u32(0), |o, (pfn, ty)| {
                o.u64(pfn | u64::from(*ty) << 60)
            });
            entries
                .iter()
                .filter(|(_, ty)| matches!(ty, 0..=4 | 9..=12))
                .fold(o, |o, (pfn, _)| o.fill((pfn & 0xff) as u8, 4096))
        })
    }

    pub(crate) fn vcpu(self, kind: u32, vcpu: u32, bytes: usize) -> Self {
        self.with(kind, |o| o.u32(vcpu).u32(0).fill(0x5a, bytes))
    }

    pub(crate) fn tsc(self) -> Self {
        self.with(TSC_INFO, |o| o.u32(1).u32(2_500_000).u64(99).u32(3).u32(0))
    }

    pub(crate) fn params(self, params: &[(u64, u64)]) -> Self {
        let count = u32::try_from(params.len()).unwrap();
        self.with(HVM_PARAMS, |o| {
            params
                .iter()
                .fold(o.u32(count).u32(0), |o, (i, v)| o.u64(*i).u64(*v))
        })
    }

    /// Adds the records that a v3 stream begins with, besides X86_PV_INFO; nothing in v2.
    pub(crate) fn policies(self) -> Self {
        if self.version < 3 {
            return self;
        }
        self.with(CPUID_POLICY, |o| (0..12).fold(o, Bytes::u32))
            .with(MSR_POLICY, |o| o.u32(0xce).u32(0).u64(7))
            .empty(STATIC_DATA_END)
    }

    /// A complete PV stream, in Xen's order.
    pub(crate) fn whole_pv(version: u32, big: bool, width: u8) -> Self {
        let basic = if width == 4 { 0xaf0 } else { 0x1430 };
        Self::new(version, PV, big)
            .pv_info(width)
            .policies()
            .p2m(0, 7, &[0])
            .pages(&[(0, 0), (1, 9), (2, 1), (3, 0xf)])
            .pages(&[(4, 0xe), (5, 0xd), (6, 4), (7, 0xc)])
            .tsc()
            .with(SHARED_INFO, |o| o.fill(0x77, 4096))
            .vcpu(VCPU_BASIC, 0, basic)
            .vcpu(VCPU_EXTENDED, 0, 64)
            .vcpu(VCPU_XSAVE, 0, 20)
            .vcpu(VCPU_MSRS, 0, 32)
            .empty(END)
    }

    /// A complete HVM stream, in Xen's order.
    pub(crate) fn whole_hvm(version: u32, big: bool) -> Self {
        Self::new(version, HVM, big)
            .policies()
            .pages(&[(0, 0), (1, 0), (2, 0xf)])
            .pages(&[(0xfeffc, 0), (0xfefff, 0xf)])
            .tsc()
            .with(HVM_CONTEXT, |o| o.bytes(&hvm_context()))
            .params(&[(1, 0xfeffc), (2, 5)])
            .empty(END)
    }
}

/// A context that Xen could load: HEADER, CPU of vcpu 0, PCI_IRQ, END. Always little endian. Its
/// length is not a multiple of 8.
pub(crate) fn hvm_context() -> Vec<u8> {
    let entry = |o: Bytes, kind: u16, body: &[u8]| {
        let length = u32::try_from(body.len()).unwrap();
        o.u16(kind).u16(0).u32(length).bytes(body)
    };
    let header = Bytes::new(false).u32(0x5438_1286).u32(1).fill(0, 16).bytes;
    let context = entry(Bytes::new(false), 1, &header);
    let context = entry(context, 2, &[0x33; 1032]);
    let context = entry(context, 7, &[0; 5]);
    entry(context, 0, &[]).bytes
}

pub(crate) fn headers(version: u32, guest: u32, big: bool) -> Vec<u8> {
    let image = Bytes::new(true)
        .u64(u64::MAX)
        .bytes(b"XENF")
        .u32(version)
        .u16(u16::from(big))
        .u16(0)
        .u32(0);
    let domain = Bytes::new(big).u32(guest).u16(12).u16(0).u32(4).u32(17);
    [image.bytes, domain.bytes].concat()
}

pub(crate) fn record(big: bool, kind: u32, body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap();
    Bytes::new(big)
        .u32(kind)
        .u32(length)
        .bytes(body)
        .fill(0, body.len().next_multiple_of(8) - body.len())
        .bytes
}
