//! The grant table of a domain: one page of Xen's own, lent to the domain like shared_info, with
//! entries of version 1. The mock maps no grants; a toolstack fills in the reserved entries.
//!
//! | offset | size | field of entry n, at 8 n; little endian |
//! |---|---|---|
//! | 0 | 2 | flags: 0 unused, 1 the domain below may map the frame |
//! | 2 | 2 | domid |
//! | 4 | 4 | frame (HVM: gfn, PV: mfn) |
//!
//! C: `grant_entry_v1` in `xen/include/public/grant_table.h`,
//! `xc_dom_set_gnttab_entry` in `tools/libs/guest/xg_dom_boot.c`.

use crate::Errno;
use serde::{Deserialize, Serialize};
use xsr_format::frame::Mfn;

use super::domain::MockDomain;
use super::state::State;
use crate::{DomId, RingGrant};

/// Bytes of an entry.
const ENTRY: usize = 8;
/// The flags of an entry in use (`GTF_permit_access`).
const PERMIT_ACCESS: u16 = 1;
/// Number of the console's entry (`GNTTAB_RESERVED_CONSOLE`).
const RESERVED_CONSOLE: usize = 0;
/// Number of xenstore's entry (`GNTTAB_RESERVED_XENSTORE`).
const RESERVED_XENSTORE: usize = 1;

/// A reserved entry of a domain's grant table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantEntry {
    /// The granted frame (HVM: gfn, PV: mfn).
    pub gfn: u64,
    /// The domain that may map it.
    pub backend: DomId,
}

impl GrantEntry {
    fn decode(bytes: [u8; ENTRY]) -> Option<Self> {
        let [f0, f1, d0, d1, frame @ ..] = bytes;
        (u16::from_le_bytes([f0, f1]) == PERMIT_ACCESS).then(|| Self {
            gfn: u64::from(u32::from_le_bytes(frame)),
            backend: DomId(u16::from_le_bytes([d0, d1])),
        })
    }
}

/// The entry for `ring`; `None` if it leaves the entry alone. EINVAL for a frame that does not fit
/// into an entry.
fn encode(ring: RingGrant) -> Result<Option<[u8; ENTRY]>, Errno> {
    let Some(gfn) = ring.gfn else {
        return Ok(None);
    };
    let frame = u32::try_from(gfn.0).map_err(|_| Errno::EINVAL)?;
    let mut bytes = [0; ENTRY];
    bytes[..2].copy_from_slice(&PERMIT_ACCESS.to_le_bytes());
    bytes[2..4].copy_from_slice(&ring.backend.0.to_le_bytes());
    bytes[4..].copy_from_slice(&frame.to_le_bytes());
    Ok(Some(bytes))
}

impl MockDomain {
    /// Fill in the reserved entries; neither of them if one is impossible.
    pub(super) fn set_grants(
        &self,
        state: &State,
        console: RingGrant,
        xenstore: RingGrant,
    ) -> Result<(), Errno> {
        let entries = [
            (RESERVED_CONSOLE, encode(console)?),
            (RESERVED_XENSTORE, encode(xenstore)?),
        ];
        let table = Mfn(state.record.grant_table);
        for (number, entry) in entries {
            if let Some(bytes) = entry {
                self.machine.write_frames(table, number * ENTRY, &bytes)?;
            }
        }
        Ok(())
    }

    /// The reserved entries: console and xenstore.
    pub(super) fn reserved_grants(&self, state: &State) -> Result<[Option<GrantEntry>; 2], Errno> {
        let page = self.machine.read_frame(Mfn(state.record.grant_table))?;
        let (entries, _) = page.as_chunks::<ENTRY>();
        Ok([RESERVED_CONSOLE, RESERVED_XENSTORE].map(|number| GrantEntry::decode(entries[number])))
    }
}

#[cfg(test)]
mod tests {
    use xsr_format::frame::Gfn;

    use super::*;
    use crate::mock::{HostConfig, MockHost};
    use crate::{DomainControl, GuestKind, GuestMemory, Host, X86Platform};

    fn ring(gfn: u64, backend: u16) -> RingGrant {
        RingGrant {
            gfn: Some(Gfn(gfn)),
            backend: DomId(backend),
        }
    }

    #[test]
    fn the_frame_holds_entries_as_xen_has_them() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a host");
        let free = host.free_pages();
        let domid = host.create_domain(GuestKind::Pv, 1, 1).expect("a domain");
        let domain = host.mock_domain(domid).expect("the domain");
        domain
            .seed_grants(ring(0x1234_5678, 0x102), ring(0xffff_ffff, 0))
            .expect("seeded");
        let table = domain.look("grants", |state| Ok(Mfn(state.record.grant_table)));
        let table = table.expect("a table");
        let page = domain.machine.read_frame(table).expect("its page");
        let expected = [
            1, 0, 2, 1, 0x78, 0x56, 0x34, 0x12, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff,
        ];
        assert_eq!(page[..16], expected);
        assert!(page[16..].iter().all(|byte| *byte == 0));
        // The page is Xen's: the guest may map it, but it does not count as the guest's memory.
        assert_eq!(domain.info().expect("info").tot_pages, 0);
        let map = domain.map(&[Gfn(table.0)], crate::Access::Read);
        assert!(map.expect("a mapping").all_mapped().is_ok());
        domain.destroy().expect("destroyed");
        assert_eq!(host.free_pages(), free);
    }

    #[test]
    fn a_frame_too_large_for_an_entry_is_refused_and_changes_nothing() {
        let host = MockHost::ephemeral(&HostConfig::default()).expect("a host");
        let domid = host.create_domain(GuestKind::Hvm, 1, 1).expect("a domain");
        let domain = host.mock_domain(domid).expect("the domain");
        let error = domain.seed_grants(ring(5, 0), ring(1 << 32, 0));
        assert_eq!(error.expect_err("too large").errno, Errno::EINVAL);
        assert_eq!(host.grants(domid).expect("grants"), [None; 2]);
    }
}
