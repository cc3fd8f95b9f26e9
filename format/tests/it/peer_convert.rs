//! Conformance with Xen's own `convert-legacy-stream`: on generated images of every kind, and on
//! many damaged ones, it and [`Converted`] write the same bytes or both refuse, except for the
//! kinds of disagreement that `docs/legacy.md` explains.
//!
//! Needs `python3` and the unpacked package `xen-utils-4.17` (`cargo xtask peer-tools`), whose
//! directory is given in `XSR_PEER_TOOLS`. `XSR_PEER_MUTANTS` is the number of mutants of each
//! image.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Cursor, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use xsr_format::error::{ReadError, ReadErrorCause};
use xsr_format::legacy::detect::ToolstackWidth;
use xsr_format::legacy::{
    Checkpoints, Converted, Item, LegacyError, LegacyGuest, LegacyOptions, LegacyReader, Target,
};

/// Mutants of each image, unless `XSR_PEER_MUTANTS` is set.
const MUTANTS: u64 = 150;

/// Xen's script, kept running.
struct Peer {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
}

/// A converter's result for an image.
#[derive(Debug)]
struct Theirs {
    accepts: bool,
    error: String,
    bytes: Vec<u8>,
}

impl Peer {
    fn start() -> Option<Self> {
        let Some(tools) = std::env::var_os("XSR_PEER_TOOLS").map(PathBuf::from) else {
            eprintln!(
                "SKIPPED: XSR_PEER_TOOLS is not set, so nothing was compared with Xen's \
                 convert-legacy-stream; `cargo xtask peer-tools` fetches it"
            );
            return None;
        };
        let script = tools.join("usr/lib/xen-4.17/bin/convert-legacy-stream");
        assert!(
            script.is_file(),
            "XSR_PEER_TOOLS is set, but there is no {}: `cargo xtask peer-tools` fetches it",
            script.display()
        );
        let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peer/convert_many.py");
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

    fn convert(&mut self, case: &Case, format: &str, image: &[u8]) -> Theirs {
        let (width, guest) = (case.width, case.guest());
        writeln!(self.requests, "{width} {guest} {format} {}", image.len()).unwrap();
        self.requests.write_all(image).unwrap();
        self.requests.flush().unwrap();
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        let field = |name: &str| {
            let (_, rest) = line
                .split_once(&format!("\"{name}\": "))
                .expect("an answer");
            rest
        };
        let length = field("length").trim_end().trim_end_matches('}');
        let mut bytes = vec![0; length.parse().unwrap()];
        self.answers.read_exact(&mut bytes).unwrap();
        Theirs {
            accepts: field("status").starts_with('0'),
            error: field("error").trim_end().to_owned(),
            bytes,
        }
    }

    fn finish(mut self) {
        drop(self.requests);
        assert!(self.child.wait().unwrap().success());
    }
}

/// A kind of image.
struct Case {
    kind: &'static str,
    width: u32,
    more: &'static [&'static str],
}

impl Case {
    fn guest(&self) -> &'static str {
        match self.kind {
            "hvm" => "hvm",
            _ => "pv",
        }
    }

    fn generate(&self) -> Vec<u8> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/legacy_image.py");
        let output = Command::new("python3")
            .arg(script)
            .args(["--kind", self.kind, "--width", &self.width.to_string()])
            .args(["--pages", "6", "--batch", "4", "-o", "-"])
            .args(self.more)
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .output()
            .expect("python3 should start");
        assert!(output.status.success(), "{output:?}");
        output.stdout
    }

    fn options(&self) -> LegacyOptions {
        LegacyOptions {
            width: Some(match self.width {
                32 => ToolstackWidth::Bits32,
                _ => ToolstackWidth::Bits64,
            }),
            guest: Some(match self.kind {
                "hvm" => LegacyGuest::Hvm,
                _ => LegacyGuest::Pv,
            }),
            checkpoints: Checkpoints::UpTo(1),
            ..LegacyOptions::default()
        }
    }

    fn ours(&self, format: &str, image: &[u8]) -> Result<Vec<u8>, ReadError> {
        let target = match format {
            "libxl" => Target::Libxl,
            _ => Target::Libxc { device_model: true },
        };
        let reader = LegacyReader::new(image, self.options())?;
        let mut bytes = Vec::new();
        match Converted::new(reader, target, None)?.read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(e) => Err(*e.into_inner().unwrap().downcast::<ReadError>().unwrap()),
        }
    }

    /// The pieces of a valid image, with their offsets.
    fn pieces(&self, image: &[u8]) -> Vec<(usize, Item)> {
        let mut reader = LegacyReader::seeking(Cursor::new(image), self.options()).unwrap();
        let mut pieces = Vec::new();
        while let Some(item) = reader.next_item().unwrap() {
            let at = reader.position().offset as usize;
            // The end of a checkpoint has no bytes.
            if !matches!(item, Item::CheckpointEnd) {
                pieces.push((at, item));
            }
        }
        pieces
    }
}

/// The reason for a disagreement, by its name in the document.
fn explanation(ours: &Result<Vec<u8>, ReadError>, theirs: &Theirs) -> Option<&'static str> {
    let error = match ours {
        Ok(bytes) if theirs.accepts => return different(bytes, &theirs.bytes),
        Ok(_) => {
            return Some(match theirs.error.as_str() {
                e if e.contains("Unrecognised Qemu sig") => "qemu-signature",
                e if e.contains("todo") => "tmem-and-compression",
                e if e.contains("Unrecognised extended block") => "unknown-block",
                e if e.contains("ZeroDivisionError") => "no-vcpu-block",
                e if e.contains("Unexpected extended info marker") => "no-extended-info",
                // It looks for vcpus that are not there, and reads on in the wrong place.
                _ => return None,
            });
        }
        Err(error) => error,
    };
    if !theirs.accepts {
        return Some("both refuse");
    }
    Some(match &error.cause {
        ReadErrorCause::Legacy(error) => match error {
            LegacyError::EntryBits { .. }
            | LegacyError::PageType { .. }
            | LegacyError::PfnBeyond { .. }
            | LegacyError::DuplicatePfn { .. } => "page-entry",
            LegacyError::NotZero { .. } => "padding",
            LegacyError::MaxVcpu { .. } | LegacyError::VcpuBeyond { .. } | LegacyError::NoVcpu => {
                "vcpu-info"
            }
            LegacyError::NoPages => "no-pages",
            LegacyError::P2mSize { .. } => "p2m-size",
            LegacyError::BlockTooLong { .. }
            | LegacyError::BlockCut { .. }
            | LegacyError::BlockRepeated { .. }
            | LegacyError::XsaveSize { .. } => "extended-info",
            LegacyError::ToolstackLength { .. } | LegacyError::ToolstackName { .. } => {
                "toolstack-record"
            }
            LegacyError::Range { .. } => "length",
            LegacyError::HvmOnly { .. } => "hvm-only",
            _ => return None,
        },
        ReadErrorCause::Libxl(_) => "toolstack-record",
        // The script read fewer vcpus or pages than it should have.
        _ => return None,
    })
}

/// The difference between two converted images: known flaws of the script.
fn different(ours: &[u8], theirs: &[u8]) -> Option<&'static str> {
    if ours == theirs {
        return Some("same bytes");
    }
    // PAGE_DATA without entries, X86_PV_VCPU_XSAVE without bytes: no restorer accepts the first,
    // and the format forbids writing the second.
    for (flaw, name) in [
        (
            &[1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0][..],
            "empty-batch",
        ),
        (&[6, 0, 0, 0, 8, 0, 0, 0][..], "empty-xsave"),
    ] {
        if theirs.windows(flaw.len()).any(|window| window == flaw) {
            return Some(name);
        }
    }
    None
}

const CASES: [Case; 12] = [
    Case {
        kind: "hvm",
        width: 64,
        more: &["--toolstack", "--filler", "1", "--live"],
    },
    Case {
        kind: "hvm",
        width: 32,
        more: &["--toolstack", "--seed", "3"],
    },
    Case {
        kind: "hvm",
        width: 64,
        more: &["--verify", "--seed", "5"],
    },
    Case {
        kind: "hvm",
        width: 64,
        more: &["--no-last-checkpoint", "--checkpoints", "3"],
    },
    Case {
        kind: "pv64",
        width: 64,
        more: &["--xsave", "576", "--vcpus", "3"],
    },
    Case {
        kind: "pv64",
        width: 32,
        more: &["--filler", "1", "--verify"],
    },
    Case {
        kind: "pv32",
        width: 32,
        more: &["--xsave", "64", "--live"],
    },
    Case {
        kind: "pv32",
        width: 64,
        more: &["--shuffle", "--toolstack"],
    },
    Case {
        kind: "pv64",
        width: 64,
        more: &["--vcpus", "1", "--seed", "9"],
    },
    // Cases that the script cannot handle.
    Case {
        kind: "hvm",
        width: 64,
        more: &["--tmem"],
    },
    Case {
        kind: "hvm",
        width: 64,
        more: &["--qemu", "remus"],
    },
    Case {
        kind: "pv64",
        width: 64,
        more: &["--unknown-block"],
    },
];

/// The number of cases that the script can handle, which come first.
const HANDLED: usize = 9;

#[test]
fn the_same_bytes_as_xens_script() {
    let Some(mut peer) = Peer::start() else {
        return;
    };
    for (at, case) in CASES.iter().enumerate() {
        let image = case.generate();
        for format in ["libxc", "libxl"] {
            let name = format!("{} {} {:?} {format}", case.kind, case.width, case.more);
            let ours = case
                .ours(format, &image)
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            let theirs = peer.convert(case, format, &image);
            assert_eq!(theirs.accepts, at < HANDLED, "{name}: {}", theirs.error);
            if theirs.accepts {
                assert!(ours == theirs.bytes, "{name}: the bytes differ");
            }
        }
    }
    peer.finish();
}

#[test]
fn mutants_are_refused_by_both_or_the_reason_is_known() {
    let Some(mut peer) = Peer::start() else {
        return;
    };
    let mutants = std::env::var("XSR_PEER_MUTANTS").map_or(MUTANTS, |n| n.parse().unwrap());
    let mut tally: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut unexplained = Vec::new();
    for (at, case) in CASES.iter().take(HANDLED).enumerate() {
        let image = case.generate();
        let pieces = case.pieces(&image);
        for seed in 0..mutants {
            let mutant = mutant(&image, &pieces, (at as u64) << 32 | seed);
            let format = ["libxc", "libxl"][seed as usize % 2];
            let ours = case.ours(format, &mutant);
            let theirs = peer.convert(case, format, &mutant);
            match explanation(&ours, &theirs).or_else(|| astray(case, &mutant, &ours)) {
                Some(class) => *tally.entry(class).or_default() += 1,
                None => unexplained.push(format!(
                    "{} {} {:?}, seed {seed}, {format}: we say {:?}, Xen says {:?}",
                    case.kind,
                    case.width,
                    case.more,
                    ours.as_ref().map(Vec::len).map_err(ToString::to_string),
                    (theirs.accepts, &theirs.error, theirs.bytes.len()),
                )),
            }
        }
    }
    peer.finish();
    eprintln!("{} mutants of each of {HANDLED} images: {tally:?}", mutants);
    assert!(unexplained.is_empty(), "{}", unexplained.join("\n"));
    // Both valid and invalid ones were among them.
    assert!(
        tally["same bytes"] > 0 && tally["both refuse"] > 0,
        "{tally:?}"
    );
}

/// Where the script interprets data differently from a restorer: a second list of vcpus adds to the
/// first, no list means no vcpu, and compressed pages are not understood.
fn astray(case: &Case, mutant: &[u8], ours: &Result<Vec<u8>, ReadError>) -> Option<&'static str> {
    let mut lists = 0;
    let mut compressed = false;
    let mut reader = LegacyReader::new(mutant, case.options()).ok()?;
    while let Ok(Some(item)) = reader.next_item() {
        lists += u32::from(matches!(item, Item::VcpuInfo(_)));
        compressed |= matches!(item, Item::Compressed { .. } | Item::EnableCompression);
    }
    match (case.guest(), lists) {
        ("pv", 0 | 2..) => Some("vcpu-lists"),
        _ if compressed && ours.is_err() => Some("tmem-and-compression"),
        _ => None,
    }
}

/// splitmix64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % n.max(1) as u64) as usize
    }
}

/// Damage near the boundaries of pieces, most of which gets past the first check.
fn mutant(image: &[u8], pieces: &[(usize, Item)], seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut out = image.to_vec();
    let end_of = |piece: usize| pieces.get(piece + 1).map_or(image.len(), |(at, _)| *at);
    let piece = numbers.below(pieces.len());
    let (start, end) = (pieces[piece].0, end_of(piece));
    match numbers.below(8) {
        // A bit, a byte or a word near the start of a piece.
        0..=2 => {
            let at = (start + numbers.below(24)).min(out.len() - 1);
            out[at] ^= 1 << numbers.below(8);
        }
        3 => {
            let at = (start + numbers.below(16)).min(out.len() - 4);
            let word = [0, 1, 0xff, 0x7f, 0x80, 0xf0][numbers.below(6)];
            out[at..at + 4].fill(word);
        }
        // An entry or a byte anywhere in the piece.
        4 => {
            let at = start + numbers.below(end - start);
            out[at] = numbers.below(256) as u8;
        }
        // A piece is lost, repeated, or moved to the end.
        5 => drop(out.drain(start..end)),
        6 => {
            let copy = out[start..end].to_vec();
            out.splice(start..start, copy);
        }
        _ => out.truncate(start + numbers.below(end - start + 1)),
    }
    out
}
