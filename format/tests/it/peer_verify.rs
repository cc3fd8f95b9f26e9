//! Conformance with Xen's own `verify-stream-v2`: on all available images, and on many damaged
//! ones, it and the strict reader accept and refuse the same, except for the kinds of disagreement
//! that `docs/verify-disagreements.md` explains.
//!
//! Needs the unpacked package `xen-utils-4.17` (`cargo xtask peer-tools`), whose directory is given
//! in `XSR_PEER_TOOLS`. Uncompressed images below `XSR_PEER_IMAGES` are compared too, such as those
//! from the mock machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::support::build::{
    Bytes, CHECKPOINT, END, HVM, HVM_CONTEXT, HVM_PARAMS, PAGE_DATA, PV, Rec, SHARED_INFO, Stream,
    TSC_INFO, record,
};
use crate::support::images;
use crate::support::mapped::mapped;
use crate::support::mutate::{Piece, cut_down, mutant, pieces};
use xsr_format::byte_order::ByteOrder;
use xsr_format::error::{DecodeError, Place, ReadError, ReadErrorCause};
use xsr_format::order::OrderError;
use xsr_format::read::ReadOptions;
use xsr_format::record::RecordKind;
use xsr_format::walk::{Content, Walk};
use xsr_format::wrapper::libxl::LibxlError;

/// Mutants of each small image.
const MUTANTS: u64 = 300;

/// Mutants of each image as Xen wrote it, for images with few batches.
const MUTANTS_OF_LARGE: u64 = 50;

/// Xen's script, kept running.
struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// The script's verdict on an image.
#[derive(Debug)]
struct Verdict {
    accepts: bool,
    error: String,
}

impl Peer {
    /// The script, if the package is available; otherwise prints why not.
    fn start() -> Option<Self> {
        let Some(tools) = std::env::var_os("XSR_PEER_TOOLS").map(PathBuf::from) else {
            eprintln!(
                "SKIPPED: XSR_PEER_TOOLS is not set, so nothing was compared with Xen's \
                 verify-stream-v2; `cargo xtask peer-tools` fetches it"
            );
            return None;
        };
        let script = tools.join("usr/lib/xen-4.17/bin/verify-stream-v2");
        assert!(
            script.is_file(),
            "XSR_PEER_TOOLS is set, but there is no {}: `cargo xtask peer-tools` fetches it",
            script.display()
        );
        let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peer/verify_many.py");
        let mut child = Command::new("python3")
            .arg(driver)
            .arg(script)
            .env("PYTHONPATH", tools.join("usr/lib/xen-4.17/lib/python"))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 should start");
        let requests = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Some(Self {
            child,
            requests,
            answers,
        })
    }

    fn verify(&mut self, format: &str, image: &[u8]) -> Verdict {
        writeln!(self.requests, "{format} {}", image.len()).unwrap();
        self.requests.write_all(image).unwrap();
        self.requests.flush().unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let status = line
            .strip_prefix(r#"{"status": "#)
            .unwrap_or_else(|| panic!("no answer but {line:?}"));
        Verdict {
            accepts: status.starts_with('0'),
            error: line
                .split_once(r#""error": "#)
                .map_or_else(String::new, |(_, error)| error.trim_end().to_owned()),
        }
    }

    fn finish(mut self) {
        drop(self.requests);
        assert!(self.child.wait().unwrap().success());
    }
}

/// The strict reader's verdict on an image.
#[derive(Debug)]
struct Ours {
    result: Result<(), ReadError>,
    big_endian: bool,
    checkpointed: bool,
}

fn ours(image: &[u8]) -> Ours {
    let (mut big_endian, mut checkpointed) = (false, false);
    let mut read = || -> Result<(), ReadError> {
        let mut walk = Walk::open(image, ReadOptions::default())?;
        while let Some(step) = walk.next_step()? {
            match step.content {
                Content::XlHeader(header) => big_endian |= header.byte_order() == ByteOrder::Big,
                Content::LibxlHeader(header) => big_endian |= header.order == ByteOrder::Big,
                Content::Headers(image, _) => big_endian |= image.order == ByteOrder::Big,
                Content::Record(record) => checkpointed |= record.kind == RecordKind::CHECKPOINT,
                Content::LibxlRecord(_) | Content::PageData(_) => {}
            }
        }
        Ok(())
    };
    let result = read();
    Ours {
        result,
        big_endian,
        checkpointed,
    }
}

/// The reason for a disagreement, by its name in the document.
fn explanation(ours: &Ours, theirs: &Verdict) -> Option<&'static str> {
    let says = |text: &str| theirs.error.contains(text);
    let error = match &ours.result {
        // We accept, the script refuses.
        Ok(()) => {
            return if ours.big_endian {
                Some("byte-order")
            } else if ours.checkpointed {
                Some("checkpoint-hand-over")
            } else if is_optional(&theirs.error) {
                Some("optional-record")
            } else if says("Data not NUL terminated") {
                Some("xenstore-data")
            } else if says("Unrecognised domain type") {
                Some("guest-type")
            } else {
                None
            };
        }
        Err(error) => error,
    };
    // The script accepts, we refuse.
    Some(match &error.cause {
        ReadErrorCause::Decode(error) => match error {
            DecodeError::Order(OrderError::Incomplete { .. }) => "incomplete",
            DecodeError::Order(OrderError::OtherGuest { .. }) => "other-guest",
            DecodeError::Order(_) => "order",
            DecodeError::PvInfo { .. } => "pv-info",
            DecodeError::P2mRange { .. } => "p2m-frames",
            DecodeError::BodyLength { .. } if is_p2m(&error_kind(ours)) => "p2m-frames",
            DecodeError::BlobLength { .. } => "vcpu-blob",
            DecodeError::PageBeyondP2m { .. } => "beyond-p2m",
            DecodeError::P2mGap { .. } | DecodeError::P2mLeafShared { .. } => "p2m-frames",
            DecodeError::PfnRange { .. } | DecodeError::P2mFrameRange { .. } => "pfn-range",
            DecodeError::TscMode { .. } => "tsc-mode",
            DecodeError::VcpuNumber { .. } => "vcpu-number",
            DecodeError::HvmParamIndex { .. } => "hvm-params",
            DecodeError::HvmContext(_) => "hvm-context",
            DecodeError::BodyTooLong { .. } => "too-long",
            _ => return None,
        },
        ReadErrorCause::Libxl(error) => match error {
            LibxlError::Order(_) => "libxl-order",
            LibxlError::ReservedNotZero { at: 12, .. } => "libxl-options",
            LibxlError::BodyLength { .. } if says_state(ours) => "checkpoint-state",
            LibxlError::UnknownCheckpointState { .. } => "checkpoint-state",
            _ => return None,
        },
        ReadErrorCause::Xl(_) => "xl-header",
        ReadErrorCause::Unreadable(_) => "not-version-2",
        _ => return None,
    })
}

/// Whether the script failed on a record with bit 31 set. (It prints the types of libxl records
/// without `0x`.)
fn is_optional(error: &str) -> bool {
    let Some((_, kind)) = error.split_once("Unrecognised record type ") else {
        return false;
    };
    let digits = kind.trim_start_matches("0x");
    let end = digits.find(|c: char| !c.is_ascii_hexdigit());
    u32::from_str_radix(&digits[..end.unwrap_or(digits.len())], 16)
        .is_ok_and(|kind| kind >> 31 == 1)
}

/// The libxc record in our error.
fn error_kind(ours: &Ours) -> Option<RecordKind> {
    match ours.result.as_ref().err()?.position.place {
        Place::Record { kind, .. } => kind,
        _ => None,
    }
}

fn is_p2m(kind: &Option<RecordKind>) -> bool {
    *kind == Some(RecordKind::X86_PV_P2M_FRAMES)
}

/// Whether our error is about libxl's CHECKPOINT_STATE.
fn says_state(ours: &Ours) -> bool {
    let error = ours.result.as_ref().unwrap_err();
    error.position.to_string().contains("CHECKPOINT_STATE")
}

/// Counts the verdicts, and notes disagreements without explanation.
#[derive(Default)]
struct Tally {
    images: u64,
    both_accept: u64,
    both_refuse: u64,
    explained: BTreeMap<&'static str, u64>,
    unexplained: Vec<String>,
}

impl Tally {
    fn compare(&mut self, peer: &mut Peer, name: &str, format: &str, image: &[u8]) -> bool {
        let (ours, theirs) = (ours(image), peer.verify(format, image));
        self.images += 1;
        match (ours.result.is_ok(), theirs.accepts) {
            (true, true) => self.both_accept += 1,
            (false, false) => self.both_refuse += 1,
            _ => match explanation(&ours, &theirs) {
                Some(class) => *self.explained.entry(class).or_default() += 1,
                None => {
                    let ours = match ours.result {
                        Ok(()) => "accepted".to_owned(),
                        Err(e) => e.to_string(),
                    };
                    self.unexplained
                        .push(format!("{name}: we say: {ours}; Xen says: {theirs:?}"));
                }
            },
        }
        theirs.accepts
    }
}

/// A stream inside a libxl stream, with a device model's records.
fn wrapped(stream: &Stream) -> Vec<u8> {
    let header = Bytes::new(true).bytes(b"LibxlFmt").u32(2).u32(0).bytes;
    let emulator = Bytes::new(false).u32(2).u32(0).bytes(b"state").bytes;
    [
        header,
        record(false, 1, b""),
        stream.bytes(),
        record(false, 3, &emulator),
        record(false, 0, b""),
    ]
    .concat()
}

/// Small valid images of every kind, by format and name.
fn bases() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut bases = Vec::new();
    for image in images::committed() {
        let small = cut_down(&image.bytes, 3, 4);
        assert!(
            small.len() < 80_000,
            "{} is cut to {}",
            image.name,
            small.len()
        );
        bases.push(("xl", format!("{}, cut", image.name), small));
    }
    for (name, stream) in [
        ("pv64", Stream::whole_pv(3, false, 8)),
        ("pv32", Stream::whole_pv(3, false, 4)),
        ("pv64-v2", Stream::whole_pv(2, false, 8)),
        ("hvm", Stream::whole_hvm(3, false)),
        ("hvm-v2", Stream::whole_hvm(2, false)),
    ] {
        bases.push(("libxc", name.to_owned(), stream.bytes()));
        bases.push(("libxl", format!("{name}, wrapped"), wrapped(&stream)));
    }
    bases
}

/// An xl header without configuration.
fn xl_header_only(mandatory_flags: u32) -> Vec<u8> {
    Bytes::new(false)
        .bytes(b"Xen saved domain, xl format\n \0 \r")
        .u32(0x0102_0304)
        .u32(mandatory_flags)
        .u32(0)
        .u32(0)
        .bytes
}

/// Images with a known disagreement.
fn known_disagreements() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let hvm = || Stream::whole_hvm(3, false);
    let pv = || Stream::whole_pv(3, false, 8);
    let libxl = |records: &[(u32, &[u8])]| {
        let mut out = Bytes::new(true).bytes(b"LibxlFmt").u32(2).u32(0).bytes;
        for (kind, body) in records {
            out.extend(record(false, *kind, body));
            if *kind == 1 {
                out.extend(hvm().bytes());
            }
        }
        out
    };
    let mut optional = hvm();
    let (kind, body) = (0x8000_0001, vec![1, 2, 3]);
    optional.records.insert(2, Rec { kind, body });
    let xenstore = [&[2, 0, 0, 0, 0, 0, 0, 0][..], b"key\0value\0"].concat();
    let mut checkpoints = wrapped(&hvm());
    let tail = checkpoints.len() - 8 - 24 - 8;
    let again = Stream::new(3, HVM, false)
        .pages(&[(1, 0)])
        .empty(END)
        .bytes();
    let pause = [
        record(false, CHECKPOINT, b""),
        record(false, 4, b""),
        again[40..].to_vec(),
    ];
    checkpoints.splice(tail..tail + 8, pause.concat());
    let mut other = Stream::new(3, 3, false).policies().pages(&[(1, 0)]);
    other = other.empty(END);
    let mut static_late = hvm();
    let end = static_late.records.remove(2);
    static_late.records.insert(4, end);
    let mut shared = hvm();
    shared.records.insert(5, pv().find(SHARED_INFO).clone());
    let mut width = pv();
    width.records[0].body[1] = 3;
    let mut p2m = pv();
    p2m.records[4].body.extend_from_slice(&[0; 8]);
    let mut range = pv();
    range.records[4].body[..4].copy_from_slice(&[9, 0, 0, 0]);
    let blob = |kind, bytes| {
        let mut stream = pv();
        let at = stream.kinds().iter().position(|k| *k == kind).unwrap();
        stream.records[at].body.truncate(bytes);
        stream.bytes()
    };
    let beyond = Stream::new(3, PV, false).pages(&[(8, 0xf)]);
    let mut vcpu = pv();
    vcpu.find(4).body[..4].copy_from_slice(&8192_u32.to_le_bytes());
    let mut params = hvm();
    params.find(HVM_PARAMS).body[8..16].copy_from_slice(&256_u64.to_le_bytes());
    let mut state = hvm();
    state.find(HVM_CONTEXT).body[8] ^= 1;
    let mut tsc = hvm();
    tsc.find(TSC_INFO).body[..4].copy_from_slice(&4_u32.to_le_bytes());
    let mut unnameable = hvm();
    let pages = unnameable.find(PAGE_DATA);
    pages.body[8..16].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    let mut far = pv();
    let at = far.kinds().iter().position(|k| *k == PAGE_DATA).unwrap();
    far.records.insert(at, beyond.records[0].clone());
    let xl = |change: fn(&mut Vec<u8>)| {
        let image = images::committed().swap_remove(0);
        let mut image = cut_down(&image.bytes, 1, 1);
        change(&mut image);
        image
    };
    let mut options = wrapped(&hvm());
    options[12] = 0x80;
    let context = (1, &[][..]);
    let bare = xl_header_only(1);
    let mut long = Stream::new(3, HVM, false)
        .policies()
        .pages(&[(1, 0)])
        .bytes();
    long.extend(record(false, HVM_CONTEXT, &vec![0; (128 << 20) + 8]));
    long.extend(record(false, END, b""));
    vec![
        ("optional-record", "libxc", optional.bytes()),
        (
            "optional-record",
            "libxl",
            libxl(&[(0x9000_0000, &[]), context, (0, &[])]),
        ),
        ("byte-order", "libxc", Stream::whole_hvm(3, true).bytes()),
        (
            "xenstore-data",
            "libxl",
            libxl(&[context, (2, &xenstore), (0, &[])]),
        ),
        ("checkpoint-hand-over", "libxl", checkpoints),
        ("guest-type", "libxc", other.bytes()),
        ("order", "libxc", static_late.bytes()),
        (
            "incomplete",
            "libxc",
            Stream::new(3, HVM, false).empty(END).bytes(),
        ),
        ("other-guest", "libxc", shared.bytes()),
        ("pv-info", "libxc", width.bytes()),
        ("p2m-frames", "libxc", p2m.bytes()),
        ("p2m-frames", "libxc", range.bytes()),
        ("vcpu-blob", "libxc", blob(4, 8 + 0x1428)),
        ("vcpu-blob", "libxc", blob(6, 8 + 15)),
        ("beyond-p2m", "libxc", far.bytes()),
        ("pfn-range", "libxc", unnameable.bytes()),
        ("tsc-mode", "libxc", tsc.bytes()),
        ("vcpu-number", "libxc", vcpu.bytes()),
        ("hvm-params", "libxc", params.bytes()),
        ("hvm-context", "libxc", state.bytes()),
        ("libxl-order", "libxl", libxl(&[(0, &[])])),
        (
            "libxl-order",
            "libxl",
            libxl(&[context, (4, &[]), (0, &[])]),
        ),
        ("libxl-options", "libxl", options),
        (
            "checkpoint-state",
            "libxl",
            libxl(&[context, (5, &[0; 3]), (0, &[])]),
        ),
        ("too-long", "libxc", long),
        ("not-version-2", "xl", [bare, hvm().bytes()].concat()),
        ("xl-header", "xl", xl(|image| image[32] = 9)),
        ("xl-header", "xl", xl(|image| image[36] |= 0x80)),
        ("xl-header", "xl", xl(|image| image[40] = 1)),
    ]
}

/// Xen's script accepts pads, blanks and a trailer.
#[test]
fn xen_accepts_what_is_mapped() {
    let Some(mut peer) = Peer::start() else {
        return;
    };
    let mut tally = Tally::default();
    let shared = images::shared();
    let large = shared.iter().map(|path| images::load(path));
    let large = large.chain(images::committed());
    let large = large.map(|image| ("xl", image.name, image.bytes));
    for (format, name, image) in large.chain(bases()) {
        for digests in [false, true] {
            let file = mapped(&image, digests);
            let accepted = tally.compare(&mut peer, &name, format, &file);
            assert!(accepted, "{name}, mapped");
        }
    }
    peer.finish();
    assert_eq!(tally.both_accept, tally.images);
    eprintln!("mapped images: {} accepted by both", tally.images);
}

#[test]
fn xen_agrees_or_we_know_why() {
    let Some(mut peer) = Peer::start() else {
        return;
    };
    let mut whole = Tally::default();
    for image in images::committed() {
        let accepted = whole.compare(&mut peer, &image.name, "xl", &image.bytes);
        assert!(accepted, "{}", image.name);
    }
    for path in images::shared() {
        let image = images::load(&path);
        let accepted = whole.compare(&mut peer, &image.name, "xl", &image.bytes);
        assert!(accepted, "{}", image.name);
    }
    if let Some(more) = std::env::var_os("XSR_PEER_IMAGES") {
        for entry in std::fs::read_dir(more).unwrap() {
            let path = entry.unwrap().path();
            let image = std::fs::read(&path).unwrap();
            let format = match image.first() {
                Some(b'X') => "xl",
                Some(b'L') => "libxl",
                _ => "libxc",
            };
            whole.compare(&mut peer, &path.display().to_string(), format, &image);
        }
    }
    for (format, name, image) in bases() {
        let accepted = whole.compare(&mut peer, &name, format, &image);
        assert!(accepted, "{name}");
    }
    assert_eq!(whole.both_accept, whole.images, "{:#?}", whole.unexplained);

    let mut mutants = Tally::default();
    let small = bases().into_iter().map(|base| (base, MUTANTS));
    let large = images::committed()
        .into_iter()
        .filter(|i| i.bytes.len() < 5 << 20);
    let large = large.map(|i| (("xl", i.name, i.bytes), MUTANTS_OF_LARGE));
    for ((format, name, image), count) in small.chain(large) {
        let pieces: Vec<Piece> = pieces(&image);
        for seed in 0..count {
            let name = format!("{name}, mutant {seed}");
            mutants.compare(&mut peer, &name, format, &mutant(&pieces, seed));
        }
    }
    peer.finish();

    eprintln!(
        "whole images: {} compared, all accepted by both",
        whole.images
    );
    eprintln!(
        "mutants: {} compared, {} accepted and {} refused by both; disagreements: {:#?}",
        mutants.images, mutants.both_accept, mutants.both_refuse, mutants.explained
    );
    let unexplained = mutants.unexplained;
    assert!(
        unexplained.is_empty(),
        "{} disagreements that nothing explains:\n{}",
        unexplained.len(),
        unexplained.join("\n")
    );
    assert!(mutants.images >= 500);
    assert!(mutants.both_accept >= 50 && mutants.both_refuse >= 500);
}

/// Each known disagreement occurs, has the expected explanation, and is in the document.
#[test]
fn each_known_disagreement_is_one() {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/verify-disagreements.md");
    let document = std::fs::read_to_string(document).unwrap();
    let cases = known_disagreements();
    for (class, _, _) in &cases {
        assert!(document.contains(&format!("`{class}`")), "{class}");
    }
    let Some(mut peer) = Peer::start() else {
        return;
    };
    for (class, format, image) in cases {
        let (ours, theirs) = (ours(&image), peer.verify(format, &image));
        assert_ne!(
            ours.result.is_ok(),
            theirs.accepts,
            "{class}: {ours:?} {theirs:?}"
        );
        assert_eq!(
            explanation(&ours, &theirs),
            Some(class),
            "{ours:?} {theirs:?}"
        );
    }
    peer.finish();
}
