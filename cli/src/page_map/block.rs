//! A block: the runs of one range of pfns, encoded as bytes. It keeps a [`PageMap`] within eight
//! bytes for each page, however scattered the pages are.
//!
//! | bytes | meaning |
//! |---|---|
//! | 1 | bits 4–7: page type; bit 3: length follows; bits 0–2: bytes of the offset, minus one |
//! | 1– | LEB128: pfns between the previous run's end (or the range's beginning) and this run |
//! | 0– | LEB128: pfns of the run, minus one, if bit 3 is set |
//! | 0–8 | offset of its contents, little endian, if its type has any |
//!
//! [`PageMap`]: super::PageMap

use xsr_format::frame::PageType;

use super::Run;

/// The most runs in a block, which is searched from its beginning or from its last run.
const MOST_RUNS: usize = 256;

/// Set in a run's first byte if it has more than one pfn.
const LONG: u8 = 1 << 3;

/// Runs, in ascending order, that do not overlap.
#[derive(Clone, Debug, Default)]
pub(super) struct Block {
    bytes: Vec<u8>,
    runs: usize,
    /// The position of the last run, and the pfn that its gap counts from, because most pages come
    /// in ascending order. If unknown, searches begin at the first run.
    last: Option<(usize, u64)>,
}

#[cfg(test)]
thread_local! {
    /// The number of runs decoded.
    pub(super) static DECODED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// Reads a block from its beginning.
#[derive(Clone, Debug)]
pub(super) struct Cursor<'b> {
    bytes: &'b [u8],
    /// The position of the next run in `bytes`.
    at: usize,
    /// The pfn that the next run's gap counts from.
    base: u64,
}

impl Cursor<'_> {
    fn byte(&mut self) -> u8 {
        let byte = self.bytes[self.at];
        self.at += 1;
        byte
    }

    fn number(&mut self) -> u64 {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = self.byte();
            number |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return number;
            }
            shift += 7;
        }
    }
}

impl Iterator for Cursor<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.at == self.bytes.len() {
            return None;
        }
        #[cfg(test)]
        DECODED.set(DECODED.get() + 1);
        let head = self.byte();
        let page_type = PageType::from_nibble(head >> 4);
        let first = self.base + self.number();
        let more = match head & LONG {
            0 => 0,
            _ => self.number(),
        };
        let mut offset = [0; 8];
        if page_type.has_data() {
            let length = usize::from(head & 7) + 1;
            offset[..length].copy_from_slice(&self.bytes[self.at..self.at + length]);
            self.at += length;
        }
        let last = first + more;
        self.base = last + 1;
        Some(Run {
            first,
            last,
            page_type,
            offset: u64::from_le_bytes(offset),
        })
    }
}

/// Append a run whose gap counts from `base`.
fn encode(run: &Run, base: u64, out: &mut Vec<u8>) {
    let number = |mut number: u64, out: &mut Vec<u8>| {
        while number >= 0x80 {
            let [low, ..] = number.to_le_bytes();
            out.push(low | 0x80);
            number >>= 7;
        }
        let [low, ..] = number.to_le_bytes();
        out.push(low);
    };
    let offset = run.offset.to_le_bytes();
    let zeros = offset.iter().rev().take_while(|byte| **byte == 0).count();
    let length = (offset.len() - zeros).max(1);
    let long = if run.last > run.first { LONG } else { 0 };
    let [length_bits, ..] = (length - 1).to_le_bytes();
    let has_data = run.page_type.has_data();
    out.push(run.page_type.nibble() << 4 | long | if has_data { length_bits } else { 0 });
    number(run.first - base, out);
    if long != 0 {
        number(run.last - run.first, out);
    }
    if has_data {
        out.extend_from_slice(&offset[..length]);
    }
}

impl Block {
    /// The number of bytes of its runs.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs == 0
    }

    /// The runs, given that the block's range begins with `key`.
    pub(super) fn runs(&self, key: u64) -> Cursor<'_> {
        Cursor {
            bytes: &self.bytes,
            at: 0,
            base: key,
        }
    }

    /// Replace `first..=last` by `run`, which covers exactly that range. The block's range begins
    /// with `key`, and contains both.
    pub(super) fn replace(&mut self, key: u64, (first, last): (u64, u64), run: Option<Run>) {
        let mut cursor = self.cursor_before(key, first);
        // Runs that overlap or touch, and the position before the first of those.
        let (mut from, mut base) = (0, key);
        let (mut left, mut right, mut touched) = (None, None, 0);
        let behind = loop {
            let (at, base_here) = (cursor.at, cursor.base);
            match cursor.next() {
                Some(next) if next.last + 1 < first => {}
                Some(next) if next.first <= last + 1 => {
                    if touched == 0 {
                        (from, base) = (at, base_here);
                        left = (next.first < first).then(|| {
                            let end = next.last.min(first - 1);
                            next.part(next.first, end)
                        });
                    }
                    touched += 1;
                    right = (next.last > last).then(|| {
                        let begin = next.first.max(last + 1);
                        next.part(begin, next.last)
                    });
                }
                other => {
                    if touched == 0 {
                        (from, base) = (at, base_here);
                    }
                    break other;
                }
            }
        };
        let to = cursor.at;
        let replaced = touched + usize::from(behind.is_some());
        let mut new: Vec<u8> = Vec::with_capacity(64);
        let mut waiting: Option<Run> = None;
        let mut written = 0;
        let mut last_written = None;
        let mut write = |run: Run, new: &mut Vec<u8>| {
            last_written = Some((from + new.len(), base));
            encode(&run, base, new);
            base = run.last + 1;
            written += 1;
        };
        for run in [left, run, right, behind].into_iter().flatten() {
            waiting = Some(match waiting {
                Some(before) if before.goes_on_with(&run) => Run {
                    last: run.last,
                    ..before
                },
                Some(before) => {
                    write(before, &mut new);
                    run
                }
                None => run,
            });
        }
        if let Some(run) = waiting {
            write(run, &mut new);
        }
        self.runs = self.runs - replaced + written;
        self.last = match self.last {
            _ if to == self.bytes.len() => last_written,
            Some((at, base)) if at >= to => Some((at + new.len() - (to - from), base)),
            _ => None,
        };
        self.splice(from, to, &new);
    }

    /// A cursor before all runs that a run from `first` on overlaps or touches.
    fn cursor_before(&self, key: u64, first: u64) -> Cursor<'_> {
        if let Some((at, base)) = self.last {
            let from_last = Cursor {
                bytes: &self.bytes,
                at,
                base,
            };
            // All other runs end before the last one begins.
            if (from_last.clone().next()).is_some_and(|last| last.first < first) {
                return from_last;
            }
        }
        self.runs(key)
    }

    /// Replace bytes. The capacity stays close to the length.
    fn splice(&mut self, from: usize, to: usize, new: &[u8]) {
        const ROOM: usize = 48;
        let grows = new.len().saturating_sub(to - from);
        if self.bytes.len() + grows > self.bytes.capacity() {
            self.bytes.reserve_exact(grows + ROOM);
        }
        self.bytes.splice(from..to, new.iter().copied());
    }

    /// Split off what is after `last`, as a block whose range begins there.
    pub(super) fn split_behind(&mut self, key: u64, last: u64) -> Self {
        let mut cursor = self.runs(key);
        let mut kept = (0, 0);
        let mut first = None;
        while let Some(run) = cursor.next() {
            if run.last > last {
                first = Some(run.part(run.first.max(last + 1), run.last));
                break;
            }
            kept = (kept.0 + 1, cursor.at);
        }
        let Some(first) = first else {
            return Self::default();
        };
        let mut bytes = Vec::with_capacity(self.bytes.len() - cursor.at + 16);
        encode(&first, last + 1, &mut bytes);
        bytes.extend_from_slice(&self.bytes[cursor.at..]);
        let behind = Self {
            bytes,
            runs: self.runs - kept.0,
            last: None,
        };
        self.last = None;
        self.bytes.truncate(kept.1);
        self.bytes.shrink_to_fit();
        self.runs = kept.0;
        behind
    }

    /// Where to split the block if it has too many runs: the last pfn of the part that stays.
    /// `first` is the latest pfn: if it is at the end, more pages are likely to come in ascending
    /// order, and a larger part stays.
    pub(super) fn too_full(&self, key: u64, first: u64) -> Option<u64> {
        if self.runs <= MOST_RUNS {
            return None;
        }
        let lasts = || self.runs(key).map(|run| run.last);
        let ascending = lasts().nth(self.runs - 2).is_some_and(|last| last < first);
        let stay = match ascending {
            true => self.runs / 4 * 3,
            false => self.runs / 2,
        };
        lasts().nth(stay)
    }
}
