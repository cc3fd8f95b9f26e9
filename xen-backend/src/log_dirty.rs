//! The dirty log of a running guest: the role that a live save needs in addition to those of a
//! still save.
//!
//! C implementation: `xc_shadow_control` and `xc_logdirty_control` in
//! `tools/libs/ctrl/xc_domain.c`; in Xen, `xen/arch/x86/mm/paging.c`.

use xsr_format::frame::Pfn;

use crate::error::BackendError;

/// Pages per word of a bitmap.
const WORD: u64 = 64;

/// A set of pfns in the format of Xen's log-dirty calls: bit n % 64 of word n / 64 is pfn n. Only
/// holds pfns below [`DirtyBitmap::pfns`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyBitmap {
    words: Vec<u64>,
    pfns: u64,
}

impl DirtyBitmap {
    /// The empty set of pfns below `pfns`. Takes an eighth of a byte per pfn.
    ///
    /// # Panics
    ///
    /// If the set is too large to allocate.
    pub fn new(pfns: u64) -> Self {
        let words = usize::try_from(pfns.div_ceil(WORD)).expect("fits the address space");
        Self {
            words: vec![0; words],
            pfns,
        }
    }

    /// One more than the largest pfn that the set can hold.
    pub fn pfns(&self) -> u64 {
        self.pfns
    }

    /// The number of words that hold the set.
    pub(crate) fn words(&self) -> usize {
        self.words.len()
    }

    /// The place of the bit of `pfn`; `None` if the set cannot hold it.
    fn place(&self, pfn: Pfn) -> Option<(usize, u64)> {
        let word = usize::try_from(pfn.0 / WORD).ok()?;
        (pfn.0 < self.pfns).then_some((word, 1 << (pfn.0 % WORD)))
    }

    /// Whether `pfn` is in the set; always false from [`DirtyBitmap::pfns`] on.
    pub fn contains(&self, pfn: Pfn) -> bool {
        self.place(pfn)
            .is_some_and(|(word, bit)| self.words[word] & bit != 0)
    }

    /// Put `pfn` into the set.
    ///
    /// # Panics
    ///
    /// If `pfn` is [`DirtyBitmap::pfns`] or more: losing a dirty page corrupts a guest.
    pub fn set(&mut self, pfn: Pfn) {
        let Some((word, bit)) = self.place(pfn) else {
            panic!("{pfn} in a set of {} pfns", self.pfns);
        };
        self.words[word] |= bit;
    }

    /// Take `pfn` out of the set.
    pub fn clear(&mut self, pfn: Pfn) {
        if let Some((word, bit)) = self.place(pfn) {
            self.words[word] &= !bit;
        }
    }

    /// Empty the set.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Put every pfn below [`DirtyBitmap::pfns`] into the set.
    pub fn set_all(&mut self) {
        self.words.fill(u64::MAX);
        self.trim();
    }

    /// Clear the bits after the last pfn.
    fn trim(&mut self) {
        let used = self.pfns % WORD;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// The pfns of the set, in ascending order. Takes time proportional to the pfns in the set, and
    /// a sixty-fourth of that for those that it could hold.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        let words = (0_u64..).zip(&self.words).filter(|(_, word)| **word != 0);
        words.flat_map(|(n, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = u64::from(left.trailing_zeros());
                // Clears the lowest bit; the word ends when none is left.
                left &= left.checked_sub(1)?;
                Some(Pfn(n * WORD + bit))
            })
        })
    }

    /// Add the pfns of `other` to this set.
    ///
    /// # Panics
    ///
    /// If `other` can hold larger pfns than this set.
    pub fn merge(&mut self, other: &Self) {
        assert!(
            other.pfns <= self.pfns,
            "a set of {} pfns into one of {}",
            other.pfns,
            self.pfns
        );
        for (word, more) in self.words.iter_mut().zip(&other.words) {
            *word |= more;
        }
    }

    /// The number of pfns in the set.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// Add the pfns whose bits are set in `words`, which begin at pfn `first`, a multiple of 64.
    /// Pfns that the set cannot hold are skipped, as Xen skips those that do not fit into the
    /// caller's buffer.
    pub(crate) fn copy_words(&mut self, first: u64, words: &[u64]) {
        let at = usize::try_from(first / WORD).unwrap_or(usize::MAX);
        let Some(place) = self.words.get_mut(at..) else {
            return;
        };
        for (word, new) in place.iter_mut().zip(words) {
            *word = *new;
        }
        self.trim();
    }
}

/// The mode of [`LogDirty::read_dirty`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DirtyRead {
    /// Report and forget (`XEN_DOMCTL_SHADOW_OP_CLEAN`).
    Clean,
    /// Report only (`XEN_DOMCTL_SHADOW_OP_PEEK`).
    Peek,
    /// Report and forget, including pages that devices may still write (`CLEAN` with
    /// `XEN_DOMCTL_SHADOW_LOGDIRTY_FINAL`): for use once the guest is stopped.
    CleanFinal,
}

impl DirtyRead {
    /// Whether the log forgets the reported pages.
    pub const fn forgets(self) -> bool {
        matches!(self, Self::Clean | Self::CleanFinal)
    }
}

/// Statistics since the last read that forgot (`xen_domctl_shadow_op_stats`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirtyStats {
    /// Pages written for the first time.
    pub dirty_count: u64,
    /// Faults that shadow paging took; 0 under hardware-assisted paging.
    pub fault_count: u64,
}

/// The pages that a guest writes. Pages that the toolstack writes are not reported.
/// ```
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::{DirtyBitmap, DirtyRead, GuestKind, Host, LogDirty};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// # let domid = host.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 8))?;
/// # let domain = host.domain(domid)?;
/// let last = domain.maximum_gfn()?.expect("it has memory");
/// let mut written = DirtyBitmap::new(last.0 + 1);
/// domain.enable_log_dirty()?;
/// // … the guest runs …
/// let stats = domain.read_dirty(DirtyRead::Clean, &mut written)?;
/// println!("{} pages, {} of them for the first time", written.count(), stats.dirty_count);
/// domain.disable_log_dirty()?;
/// assert!(domain.read_dirty(DirtyRead::Peek, &mut written).is_err(), "the log is off");
/// # Ok(())
/// # }
/// ```
pub trait LogDirty: Send + Sync {
    /// Enable the log, empty at first (`XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY`). EINVAL if it is
    /// already on: something else, such as VRAM tracking, holds it; [`LogDirty::disable_log_dirty`]
    /// takes it away. EOPNOTSUPP if the hypervisor cannot log (PV without shadow paging).
    fn enable_log_dirty(&self) -> Result<(), BackendError>;

    /// Disable the log and discard its contents (`XEN_DOMCTL_SHADOW_OP_OFF`). Succeeds if it is
    /// already off.
    fn disable_log_dirty(&self) -> Result<(), BackendError>;

    /// Fill `out`, whose size the caller chooses, with the pages that the guest wrote since the
    /// last read that forgot. `out` should have room for every pfn of the guest: pages that it
    /// cannot hold may be forgotten too. Another process may have enabled the log. EINVAL if the
    /// log is off, if something else holds it so that [`LogDirty::enable_log_dirty`] was refused,
    /// and for [`DirtyRead::CleanFinal`] while the domain runs (neither paused nor shut down).
    fn read_dirty(&self, how: DirtyRead, out: &mut DirtyBitmap)
    -> Result<DirtyStats, BackendError>;

    /// Whether the log reports a page that a translated guest takes (balloon up) while it is
    /// logged. If not, the guest's writes to such a page are not logged either, until the log has
    /// been read with [`DirtyRead::forgets`]: the caller has to find these pages itself.
    ///
    /// Xen does so since commit 98fccdf0ac (4.22.0, 4.21.1, 4.20.3, 4.19.5). An implementation that
    /// does not know returns `false`, which costs the caller time but loses nothing.
    fn logs_new_pages(&self) -> Result<bool, BackendError> {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn of(pfns: u64, members: &BTreeSet<u64>) -> DirtyBitmap {
        let mut bitmap = DirtyBitmap::new(pfns);
        members.iter().for_each(|pfn| bitmap.set(Pfn(*pfn)));
        bitmap
    }

    fn members(bitmap: &DirtyBitmap) -> Vec<u64> {
        bitmap.iter().map(|pfn| pfn.0).collect()
    }

    proptest! {
        /// A bitmap is the set of pfns that were put into it.
        #[test]
        fn a_bitmap_is_a_set(
            pfns in 300_u64..400,
            a in proptest::collection::btree_set(0_u64..300, 0..80),
            b in proptest::collection::btree_set(0_u64..300, 0..80),
        ) {
            let mut bitmap = of(pfns, &a);
            prop_assert_eq!(members(&bitmap), a.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(bitmap.count(), a.len() as u64);
            prop_assert!((0..500).all(|pfn| bitmap.contains(Pfn(pfn)) == a.contains(&pfn)));
            bitmap.merge(&of(300, &b));
            prop_assert_eq!(members(&bitmap), a.union(&b).copied().collect::<Vec<_>>());
            b.iter().chain([&pfns]).for_each(|pfn| bitmap.clear(Pfn(*pfn)));
            prop_assert_eq!(members(&bitmap), a.difference(&b).copied().collect::<Vec<_>>());
            bitmap.set_all();
            prop_assert_eq!(members(&bitmap), (0..pfns).collect::<Vec<_>>());
            prop_assert_eq!(bitmap.count(), pfns);
            bitmap.clear_all();
            prop_assert_eq!(bitmap, DirtyBitmap::new(pfns));
        }
    }

    #[test]
    fn words_from_elsewhere_are_cut_to_size() {
        let mut bitmap = DirtyBitmap::new(130);
        bitmap.copy_words(64, &[1 << 63, u64::MAX, u64::MAX]);
        assert_eq!(members(&bitmap), [127, 128, 129]);
        bitmap.copy_words(192, &[u64::MAX]);
        bitmap.copy_words(1 << 40, &[u64::MAX]);
        assert_eq!(bitmap.count(), 3);
    }

    #[test]
    fn an_empty_bitmap_holds_nothing() {
        let mut bitmap = DirtyBitmap::new(0);
        bitmap.set_all();
        assert_eq!((bitmap.count(), bitmap.contains(Pfn(0))), (0, false));
    }

    #[test]
    #[should_panic(expected = "64 pfns")]
    fn a_pfn_beyond_the_end_is_not_lost_in_silence() {
        DirtyBitmap::new(64).set(Pfn(64));
    }
}
