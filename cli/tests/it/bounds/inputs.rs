//! Images that cost as much as possible: written byte by byte, with holes where the contents do not
//! matter.

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write};
use std::path::Path;

use flate2::Crc;
use flate2::write::GzEncoder;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// A configuration like libxl's, without its closing brace.
pub(crate) fn config(kind: &str, vcpus: u32) -> String {
    format!(
        r#"{{"c_info":{{"type":"{kind}","name":"evil","uuid":"6f18a89f-849d-4334-8633-5976cbcde14c"}},"b_info":{{"max_vcpus":{vcpus},"max_memkb":8388608,"target_memkb":8388608}}"#
    )
}

/// Record types.
pub(crate) const PAGE_DATA: u32 = 1;
pub(crate) const OPTIONAL: u32 = 0x8000_1000;
const END: u32 = 0;
const PV_INFO: u32 = 2;
pub(crate) const P2M_FRAMES: u32 = 3;
pub(crate) const VCPU_BASIC: u32 = 4;
pub(crate) const VCPU_EXTENDED: u32 = 5;
pub(crate) const VCPU_XSAVE: u32 = 6;
const SHARED_INFO: u32 = 7;
const TSC_INFO: u32 = 8;
pub(crate) const HVM_CONTEXT: u32 = 9;
pub(crate) const HVM_PARAMS: u32 = 10;
pub(crate) const CHECKPOINT: u32 = 14;
const STATIC_DATA_END: u32 = 16;
pub(crate) const CPUID_POLICY: u32 = 17;
pub(crate) const MSR_POLICY: u32 = 18;
/// Record types of libxl.
pub(crate) const LIBXC_CONTEXT: u32 = 1;
pub(crate) const XENSTORE_DATA: u32 = 2;
pub(crate) const EMULATOR_CONTEXT: u32 = 3;
pub(crate) const CHECKPOINT_END: u32 = 4;

/// Page types.
pub(crate) const NOTAB: u64 = 0;
pub(crate) const XALLOC: u64 = 0xe << 60;
pub(crate) const XTAB: u64 = 0xf << 60;

/// The kind of guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guest {
    Pv,
    Hvm,
}

/// An image being built.
pub(crate) struct Image {
    out: BufWriter<File>,
    guest: Guest,
    wrapped: bool,
    /// Whether the vcpus' state has been written.
    has_vcpus: bool,
    /// Whether all state has been written.
    has_state: bool,
}

impl Image {
    /// Write up to the first record of the libxc stream. `before` writes records of libxl.
    pub(crate) fn wrapped(
        path: &Path,
        guest: Guest,
        config: &[u8],
        before: impl FnOnce(&mut Self),
    ) -> Self {
        let mut image = Self::with_header(path, guest, config);
        before(&mut image);
        image.record(LIBXC_CONTEXT, &[]);
        image.headers(|_| {});
        image
    }

    /// The same for an HVM guest. `policies` writes records of its static data.
    pub(crate) fn policies(path: &Path, config: &[u8], policies: impl FnOnce(&mut Self)) -> Self {
        let mut image = Self::with_header(path, Guest::Hvm, config);
        image.record(LIBXC_CONTEXT, &[]);
        image.headers(policies);
        image
    }

    /// Write xl's header and the libxl stream's.
    fn with_header(path: &Path, guest: Guest, config: &[u8]) -> Self {
        let mut image = Self::empty(path, guest);
        image.wrapped = true;
        image.put(b"Xen saved domain, xl format\n \0 \r");
        let length = config.len() as u32 + 1;
        for word in [0x0102_0304, 3, 0, length + 4, length] {
            image.word(word);
        }
        image.put(config);
        image.put(b"\0LibxlFmt\0\0\0\x02\0\0\0\0");
        image
    }

    fn empty(path: &Path, guest: Guest) -> Self {
        Self {
            out: BufWriter::with_capacity(1 << 20, File::create(path).unwrap()),
            guest,
            wrapped: false,
            has_vcpus: false,
            has_state: false,
        }
    }

    fn headers(&mut self, policies: impl FnOnce(&mut Self)) {
        self.put(b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x03\0\0\0\0\0\0\0\0");
        let kind = match self.guest {
            Guest::Pv => 1,
            Guest::Hvm => 2,
        };
        for word in [kind, 12, 4, 17] {
            self.word(word);
        }
        if self.guest == Guest::Pv {
            self.record(PV_INFO, &[8, 4, 0, 0, 0, 0, 0, 0]);
        }
        policies(self);
        self.record(STATIC_DATA_END, &[]);
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) {
        self.out.write_all(bytes).unwrap();
    }

    pub(crate) fn word(&mut self, word: u32) {
        self.put(&word.to_le_bytes());
    }

    pub(crate) fn long(&mut self, word: u64) {
        self.put(&word.to_le_bytes());
    }

    /// Zero bytes that take no space.
    pub(crate) fn hole(&mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap();
        self.out.seek(SeekFrom::Current(bytes)).unwrap();
    }

    pub(crate) fn record(&mut self, kind: u32, body: &[u8]) {
        self.word(kind);
        self.word(body.len() as u32);
        self.put(body);
        let pad = body.len().next_multiple_of(8) - body.len();
        self.put(&[0; 8][..pad]);
    }

    /// A record of this many zero bytes, a multiple of eight.
    pub(crate) fn zeros(&mut self, kind: u32, bytes: u32) {
        self.word(kind);
        self.word(bytes);
        self.hole(bytes.into());
    }

    /// PAGE_DATA with these entries, and zero pages.
    pub(crate) fn pages(&mut self, entries: &[u64]) {
        let with_data = entries.iter().filter(|entry| **entry >> 60 < 0xd).count() as u64;
        self.word(PAGE_DATA);
        self.word((8 + 8 * entries.len() as u64 + PAGE * with_data) as u32);
        self.long(entries.len() as u64);
        for entry in entries {
            self.long(*entry);
        }
        self.hole(PAGE * with_data);
    }

    /// X86_PV_P2M_FRAMES for the pfns up to `end`, with each leaf at the pfn that `leaf` returns.
    pub(crate) fn p2m(&mut self, end: u32, leaf: impl Fn(u64) -> u64) {
        let leaves = end / 512 + 1;
        self.word(P2M_FRAMES);
        self.word(8 + 8 * leaves);
        self.word(0);
        self.word(end);
        for n in 0..leaves {
            self.long(leaf(n.into()));
        }
    }

    /// An HVM context: header, this many times `record`, and END.
    pub(crate) fn context(&mut self, count: usize, record: impl Fn(usize) -> Vec<u8>) {
        let mut body = Vec::new();
        context_record(&mut body, 1, 0, &[0; 24]);
        body[8..12].copy_from_slice(&0x5438_1286_u32.to_le_bytes());
        body[12..16].copy_from_slice(&1_u32.to_le_bytes());
        for n in 0..count {
            body.extend(record(n));
        }
        context_record(&mut body, 0, 0, &[]);
        self.record(HVM_CONTEXT, &body);
        self.has_vcpus = true;
    }

    /// A record of a PV vcpu's state.
    pub(crate) fn vcpu(&mut self, kind: u32, vcpu: u64, bytes: usize) {
        let mut body = vcpu.to_le_bytes().to_vec();
        body.resize(8 + bytes, 0x5a);
        self.record(kind, &body);
        self.has_vcpus = true;
    }

    /// The records that complete a guest, except those written already.
    pub(crate) fn state(&mut self) {
        if std::mem::replace(&mut self.has_state, true) {
            return;
        }
        let has_vcpus = self.has_vcpus;
        match self.guest {
            Guest::Pv => {
                self.record(SHARED_INFO, &[0; PAGE as usize]);
                if !has_vcpus {
                    self.vcpu(VCPU_BASIC, 0, 0x1430);
                }
            }
            Guest::Hvm => {
                if !has_vcpus {
                    self.context(1, |_| cpu(0));
                }
                self.record(HVM_PARAMS, &[0; 8]);
            }
        }
        self.record(TSC_INFO, &[0; 24]);
    }

    /// The end of the streams. `after` writes records of libxl.
    pub(crate) fn end(mut self, after: impl FnOnce(&mut Self)) {
        self.state();
        self.record(END, &[]);
        if self.wrapped {
            after(&mut self);
            self.record(END, &[]);
        }
        self.done();
    }

    /// Finish the file.
    pub(crate) fn done(mut self) {
        self.out.flush().unwrap();
        let end = self.out.stream_position().unwrap();
        self.out.get_ref().set_len(end).unwrap();
    }
}

/// A record of an HVM context.
pub(crate) fn context_record(out: &mut Vec<u8>, kind: u16, instance: u16, body: &[u8]) {
    out.extend(kind.to_le_bytes());
    out.extend(instance.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(body);
}

/// A vcpu's state in an HVM context.
pub(crate) fn cpu(instance: u16) -> Vec<u8> {
    let mut out = Vec::new();
    context_record(&mut out, 2, instance, &[0; 1032]);
    out
}

/// A file compressed with gzip.
pub(crate) fn gzip(from: &Path, to: &Path) {
    let mut out = GzEncoder::new(File::create(to).unwrap(), flate2::Compression::fast());
    io::copy(&mut File::open(from).unwrap(), &mut out).unwrap();
    out.finish().unwrap();
}

/// A file as one zstd frame with a window of 2^`log` bytes, in which only runs of one byte are
/// compressed.
pub(crate) fn zstd(from: &Path, to: &Path, log: u8) {
    const BLOCK: usize = 128 << 10;
    let bytes = std::fs::read(from).unwrap();
    let mut out = BufWriter::new(File::create(to).unwrap());
    out.write_all(&[0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3])
        .unwrap();
    let blocks = bytes.chunks(BLOCK);
    let last = blocks.len() - 1;
    for (n, block) in blocks.enumerate() {
        let is_run = block.iter().all(|byte| *byte == block[0]);
        let head = (block.len() << 3) | usize::from(is_run) << 1 | usize::from(n == last);
        out.write_all(&head.to_le_bytes()[..3]).unwrap();
        out.write_all(if is_run { &block[..1] } else { block })
            .unwrap();
    }
    out.flush().unwrap();
}

/// A file compressed with lz4 in blocks of 4 MiB, each of which refers to earlier data.
pub(crate) fn lz4(from: &Path, to: &Path) {
    use lz4_flex::frame::{BlockMode, BlockSize, FrameEncoder, FrameInfo};
    let info = FrameInfo::new()
        .block_size(BlockSize::Max4MB)
        .block_mode(BlockMode::Linked);
    let mut out = FrameEncoder::with_frame_info(info, File::create(to).unwrap());
    io::copy(&mut File::open(from).unwrap(), &mut out).unwrap();
    out.finish().unwrap();
}

/// A file compressed with xz and a small dictionary, whose header asks for one of 64 MiB.
pub(crate) fn xz(from: &Path, to: &Path) {
    use lzma_rust2::{XzOptions, XzWriter};
    let options = XzOptions::with_preset(0);
    let mut out = XzWriter::new(Vec::new(), options).unwrap();
    io::copy(&mut File::open(from).unwrap(), &mut out).unwrap();
    let mut bytes = out.finish().unwrap();
    // Stream header (12 bytes), block header: size, flags, filter LZMA2 (0x21), one byte of
    // properties with the dictionary's size, and at its end the CRC-32.
    let length = (usize::from(bytes[12]) + 1) * 4;
    let header = &mut bytes[12..12 + length];
    let at = header.iter().position(|byte| *byte == 0x21).unwrap();
    assert_eq!(header[at + 1], 1, "{header:?}");
    // 2 << (n / 2 + 11), or 3 << that if n is odd: 64 MiB.
    header[at + 2] = 28;
    let mut crc = Crc::new();
    crc.update(&header[..length - 4]);
    header[length - 4..].copy_from_slice(&crc.sum().to_le_bytes());
    std::fs::write(to, bytes).unwrap();
}
