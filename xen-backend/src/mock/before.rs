//! The state of a domain before a change, so that a failed change leaves no trace: its small state,
//! and the other effects of the change (the rings in start_info, lent pages, references to page
//! tables).

use std::collections::BTreeMap;

use crate::Errno;
use xsr_format::frame::Mfn;

use super::domain::MockDomain;
use super::error::MockError;
use super::pv::blob_name;
use super::state::{Record, State};
use crate::{GuestKind, VcpuBlob};

/// A domain before a change.
#[derive(Debug)]
pub(super) struct Before {
    record: Record,
    blobs: BTreeMap<String, Vec<u8>>,
    /// PV: the frame of start_info, and the rings in it.
    rings: Option<(Mfn, [u64; 2])>,
}

impl Before {
    /// The current state of `domain`.
    pub(super) fn of(domain: &MockDomain, state: &State) -> Result<Self, Errno> {
        let start_info = match state.record.kind {
            GuestKind::Pv => domain.start_info(state),
            _ => None,
        };
        let rings = start_info.map(|mfn| Ok((mfn, domain.rings(state.record.width, mfn)?)));
        let rings: Result<_, Errno> = rings.transpose();
        Ok(Self {
            record: state.record.clone(),
            blobs: state.blobs.clone(),
            rings: rings?,
        })
    }

    /// Restore the earlier state of `domain`. Errors are logged, because the caller reports the
    /// failure of the change itself.
    pub(super) fn put_back(self, domain: &MockDomain, state: &mut State) {
        let done = [
            self.drop_roots(domain, state),
            self.take_back_pages(domain, state),
            self.put_back_rings(domain),
        ];
        for errno in done.into_iter().filter_map(Result::err) {
            tracing::error!(%errno, domid = domain.dom.domid.0, "a change could not be undone");
        }
        if let Err(error) = self.put_back_blobs(domain, state) {
            tracing::error!(%error, "the mock host's files are ahead of its state");
        }
        state.record = self.record;
        state.blobs = self.blobs;
    }

    /// Drop the references of contexts that the change set.
    fn drop_roots(&self, domain: &MockDomain, state: &State) -> Result<(), Errno> {
        let vcpus = self.record.vcpus.iter().zip(&state.record.vcpus);
        for (number, (old, new)) in vcpus.enumerate() {
            let context = state.blobs.get(&blob_name(number, VcpuBlob::Basic));
            if let (None, Some(_), Some(context)) = (old.roots, new.roots, context) {
                domain.drop_references(state.record.width, context)?;
            }
        }
        Ok(())
    }

    /// Take back pages that the change lent, and the p2m tree in them.
    fn take_back_pages(&self, domain: &MockDomain, state: &State) -> Result<(), Errno> {
        let new = |mfn: &&u64| !self.record.lent.contains(mfn);
        let lent: Vec<Mfn> = state
            .record
            .lent
            .iter()
            .filter(new)
            .copied()
            .map(Mfn)
            .collect();
        if !lent.is_empty() {
            domain.unpublish_tree(state)?;
        }
        lent.into_iter()
            .try_for_each(|mfn| domain.machine.take_back(mfn))
    }

    fn put_back_rings(&self, domain: &MockDomain) -> Result<(), Errno> {
        let width = self.record.width;
        match self.rings {
            Some((start_info, rings)) if domain.rings(width, start_info)? != rings => {
                domain.set_rings(width, start_info, rings)
            }
            _ => Ok(()),
        }
    }

    /// Restore the files of blobs that the change replaced.
    fn put_back_blobs(&self, domain: &MockDomain, state: &State) -> Result<(), MockError> {
        let (store, domid) = (&domain.machine.store, domain.dom.domid);
        for (name, new) in &state.blobs {
            match self.blobs.get(name) {
                Some(old) if old == new => {}
                Some(old) => store.save_blob(domid, name, old)?,
                None => store.remove_blob(domid, name)?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;
    use crate::mock::layout::{SharedInfoLayout, VcpuLayout};
    use crate::mock::{GuestSpec, HostConfig, MockHost, P2mStyle};
    use crate::{DomainControl, PvGuest};

    /// A paused PV guest of a host in `dir`, and a path that, if it is a directory, prevents the
    /// guest's record from being written.
    fn guest(dir: &tempfile::TempDir) -> (MockDomain, PathBuf) {
        let config = HostConfig {
            memory_pages: 1 << 14,
            ..HostConfig::default()
        };
        let path = dir.path().join("host");
        let host = MockHost::create(&path, &config).expect("a host");
        let spec = GuestSpec {
            p2m: Some(P2mStyle::Tree),
            ..GuestSpec::new("guest", GuestKind::Pv, 8)
        };
        let domid = host.create_guest(&spec).expect("a guest");
        let domain = host.mock_domain(domid).expect("the guest");
        domain.pause().expect("paused");
        let record = path.join(format!("domains/{}/state.json.new", domid.0));
        (domain, record)
    }

    #[test]
    fn a_guest_that_could_not_be_woken_can_be_later() {
        let dir = tempfile::tempdir().expect("a directory");
        let (domain, obstacle) = guest(&dir);
        let layout = SharedInfoLayout::of(8);
        let list = |state: &State| {
            let shared_info = Mfn(state.record.shared_info);
            Ok(domain.machine.load(shared_info, layout.frame_list_list / 8))
        };
        domain
            .change("restore", |state| {
                state.record.has_run = false;
                let shared_info = Mfn(state.record.shared_info);
                let field = layout.frame_list_list / 8;
                domain.machine.store_word(shared_info, field, 0);
                Ok(())
            })
            .expect("as restored");
        let free = domain.machine.free_pages();
        fs::create_dir(&obstacle).expect("in the way");
        for _ in 0..3 {
            assert_eq!(domain.unpause().expect_err("full").errno, Errno::EIO);
            assert_eq!(domain.machine.free_pages(), free);
            assert_eq!(domain.look("list", list).expect("a word"), 0);
        }
        fs::remove_dir(&obstacle).expect("out of the way");
        domain.unpause().expect("it wakes");
        assert_eq!(domain.machine.free_pages(), free - 2, "two levels");
        assert_ne!(domain.look("list", list).expect("a word"), 0);
    }

    #[test]
    fn a_context_that_could_not_be_kept_holds_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let (domain, obstacle) = guest(&dir);
        let context = domain.vcpu_state(0, VcpuBlob::Basic).expect("a context");
        domain
            .change("forget", |state| {
                domain.drop_references(8, &context)?;
                state.record.vcpus[0].roots = None;
                Ok(())
            })
            .expect("as if never given");
        let layout = VcpuLayout::of(8);
        let referred = [
            layout.cr3_to_mfn(layout.get(&context, layout.cr(3))),
            layout.get(&context, layout.gdt_frame(0)),
        ];
        let counts = || referred.map(|mfn| domain.machine.frames.get(Mfn(mfn)).map(|f| f.count));
        let before = counts();
        let set = || domain.set_vcpu_state(0, VcpuBlob::Basic, &context);
        fs::create_dir(&obstacle).expect("in the way");
        assert_eq!(set().expect_err("full").errno, Errno::EIO);
        assert_eq!(counts(), before);
        fs::remove_dir(&obstacle).expect("out of the way");
        set().expect("set");
        assert!(counts() != before, "a context holds references");
    }
}
