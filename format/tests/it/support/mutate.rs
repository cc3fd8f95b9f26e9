//! Reproducible damage to images, derived from a seed. It respects record boundaries, so most of it
//! gets past the first check.

/// splitmix64: a random number generator whose only state is its seed.
pub(crate) struct Numbers(pub(crate) u64);

impl Numbers {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

/// A piece of an image: a header, or a record with header, body and padding.
#[derive(Clone, Debug)]
pub(crate) struct Piece {
    pub(crate) is_record: bool,
    pub(crate) bytes: Vec<u8>,
}

impl Piece {
    fn header(bytes: &[u8]) -> Self {
        Self {
            is_record: false,
            bytes: bytes.to_vec(),
        }
    }

    pub(crate) fn kind(&self) -> u32 {
        u32::from_le_bytes(self.bytes[..4].try_into().unwrap())
    }

    pub(crate) fn length(&self) -> u32 {
        u32::from_le_bytes(self.bytes[4..8].try_into().unwrap())
    }

    pub(crate) fn set_length(&mut self, length: u32) {
        self.bytes[4..8].copy_from_slice(&length.to_le_bytes());
    }

    /// Resizes the body, and pads it again.
    pub(crate) fn resize(&mut self, body: usize) {
        let old = (self.length() as usize).min(self.bytes.len() - 8);
        self.bytes.truncate(8 + old);
        self.bytes.resize(8 + body, 0x5a);
        self.bytes.resize(8 + body.next_multiple_of(8), 0);
        self.set_length(body as u32);
    }
}

/// Cuts a valid little-endian image into its pieces, in any layers.
pub(crate) fn pieces(mut image: &[u8]) -> Vec<Piece> {
    let mut out = Vec::new();
    let word = |bytes: &[u8], at: usize| {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    };
    if image.starts_with(b"Xen saved domain") {
        let length = 48 + word(image, 44);
        out.push(Piece::header(&image[..length]));
        image = &image[length..];
    }
    let mut in_libxl = image.starts_with(b"LibxlFmt");
    if in_libxl {
        out.push(Piece::header(&image[..16]));
        image = &image[16..];
    }
    let wrapped = in_libxl;
    while !image.is_empty() {
        if image.starts_with(&[0xff; 8]) {
            out.push(Piece::header(&image[..24]));
            out.push(Piece::header(&image[24..40]));
            image = &image[40..];
            in_libxl = false;
        }
        let length = 8 + word(image, 4).next_multiple_of(8);
        let piece = Piece {
            is_record: true,
            bytes: image[..length].to_vec(),
        };
        image = &image[length..];
        let ends = piece.kind() == 0;
        out.push(piece);
        if ends && (in_libxl || !wrapped) {
            break; // messages between the two ends of a migration may follow
        }
        in_libxl |= ends;
    }
    out
}

pub(crate) fn join(pieces: &[Piece]) -> Vec<u8> {
    pieces
        .iter()
        .flat_map(|p| p.bytes.iter().copied())
        .collect()
}

/// The same image with at most `pages` entries in each batch and `batches` batches.
pub(crate) fn cut_down(image: &[u8], batches: usize, entries: usize) -> Vec<u8> {
    let mut left = batches;
    let mut out = Vec::new();
    for mut piece in pieces(image) {
        // In the libxl layer, record 1 is empty.
        if piece.is_record && piece.kind() == 1 && piece.length() > 0 {
            if left == 0 {
                continue;
            }
            left -= 1;
            let body = &piece.bytes[8..];
            let count = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize;
            let keep = count.min(entries);
            let entry = |i: usize| &body[8 + 8 * i..16 + 8 * i];
            let with_data = (0..keep)
                .filter(|i| matches!(entry(*i)[7] >> 4, 0..=4 | 9..=12))
                .count();
            let data = &body[8 + 8 * count..][..4096 * with_data];
            let mut bytes = piece.bytes[..8].to_vec();
            bytes.extend_from_slice(&(keep as u32).to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
            bytes.extend_from_slice(&body[8..8 + 8 * keep]);
            bytes.extend_from_slice(data);
            piece.bytes = bytes;
            let length = piece.bytes.len() - 8;
            piece.set_length(length as u32);
        }
        out.push(piece);
    }
    join(&out)
}

fn flip(numbers: &mut Numbers, bytes: &mut [u8], from: usize, to: usize) {
    let (from, to) = (from.min(bytes.len()), to.min(bytes.len()));
    if from < to {
        let at = from + numbers.below(to - from);
        bytes[at] ^= 1 << numbers.below(8);
    }
}

/// Picks a record so that frequent kinds do not crowd out rare ones.
fn pick(numbers: &mut Numbers, pieces: &[Piece]) -> usize {
    let records: Vec<usize> = (0..pieces.len()).filter(|i| pieces[*i].is_record).collect();
    let kinds: std::collections::BTreeSet<u32> =
        records.iter().map(|i| pieces[*i].kind()).collect();
    let kind = *kinds.iter().nth(numbers.below(kinds.len())).unwrap();
    let same: Vec<usize> = records
        .into_iter()
        .filter(|i| pieces[*i].kind() == kind)
        .collect();
    same[numbers.below(same.len())]
}

fn odd_kind(numbers: &mut Numbers) -> u32 {
    match numbers.below(4) {
        0 => 0x8000_0000 | numbers.below(0x20) as u32,
        1 => 0x13 + numbers.below(0x10) as u32,
        _ => numbers.below(0x13) as u32,
    }
}

/// Applies one to three kinds of damage to a valid image.
pub(crate) fn mutant(image: &[Piece], seed: u64) -> Vec<u8> {
    let mut numbers = Numbers(seed);
    let mut pieces = image.to_vec();
    let mut tail = Vec::new();
    let mut cut = None;
    loop {
        let at = pick(&mut numbers, &pieces);
        match numbers.below(15) {
            0 => flip(&mut numbers, &mut pieces[at].bytes, 0, 8),
            1 => flip(&mut numbers, &mut pieces[at].bytes, 8, 24),
            2 => flip(&mut numbers, &mut pieces[at].bytes, 8, 72),
            3 => {
                let end = pieces[at].bytes.len();
                flip(
                    &mut numbers,
                    &mut pieces[at].bytes,
                    end.saturating_sub(8),
                    end,
                );
            }
            4 => {
                let kind = odd_kind(&mut numbers);
                pieces[at].bytes[..4].copy_from_slice(&kind.to_le_bytes());
            }
            5 => {
                let length = pieces[at].length();
                let length = match numbers.below(6) {
                    0 => length.wrapping_add(1),
                    1 => length.wrapping_sub(1),
                    2 => length.wrapping_add(8),
                    3 => length.wrapping_sub(8),
                    4 => 0,
                    _ => numbers.next() as u32,
                };
                pieces[at].set_length(length);
            }
            6 => {
                let old = pieces[at].bytes.len() - 8;
                let new = match numbers.below(5) {
                    0 => old + 1 + numbers.below(24),
                    1 => old.saturating_sub(1 + numbers.below(24)),
                    2 => old + 16,
                    3 => old.saturating_sub(16),
                    _ => numbers.below(40),
                };
                pieces[at].resize(new);
            }
            7 => drop(pieces.remove(at)),
            8 => {
                let again = pieces[at].clone();
                pieces.insert(at, again);
            }
            9 => {
                let other = pick(&mut numbers, &pieces);
                pieces.swap(at, other);
            }
            10 => {
                let mut new = Piece {
                    is_record: true,
                    bytes: odd_kind(&mut numbers).to_le_bytes().to_vec(),
                };
                new.bytes.extend_from_slice(&[0; 4]);
                let body = if numbers.one_in(2) {
                    0
                } else {
                    numbers.below(40)
                };
                new.resize(body);
                pieces.insert(at, new);
            }
            11 => {
                let length = pieces.iter().map(|p| p.bytes.len()).sum();
                cut = Some(numbers.below(length));
            }
            12 => tail = vec![0; 1 + numbers.below(16)],
            13 => {
                // An entry of a batch, or its count.
                let batches: Vec<usize> = (0..pieces.len())
                    .filter(|i| pieces[*i].is_record && pieces[*i].kind() == 1)
                    .filter(|i| pieces[*i].bytes.len() > 16)
                    .collect();
                if let Some(batch) = batches.get(numbers.below(batches.len())) {
                    let bytes = &mut pieces[*batch].bytes;
                    let entries = (bytes.len() - 16).min(64);
                    flip(&mut numbers, bytes, 8, 16 + entries);
                }
            }
            _ => {
                let headers: Vec<usize> = (0..pieces.len())
                    .filter(|i| !pieces[*i].is_record)
                    .collect();
                if let Some(header) = headers.get(numbers.below(headers.len())) {
                    let end = pieces[*header].bytes.len();
                    flip(&mut numbers, &mut pieces[*header].bytes, 0, end.min(64));
                }
            }
        }
        let records = pieces.iter().filter(|p| p.is_record).count();
        if records == 0 || !numbers.one_in(4) {
            break;
        }
    }
    let mut bytes = join(&pieces);
    bytes.extend(tail);
    if let Some(cut) = cut {
        bytes.truncate(cut);
    }
    bytes
}
