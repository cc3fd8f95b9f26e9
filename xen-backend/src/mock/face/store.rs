//! Xenstore beside the mock machine, with guests that listen to it.
//!
//! C implementation: `tools/xenstore/xenstored_core.c`; in a guest, Linux's
//! `drivers/xen/manage.c`.

use super::Face;
use crate::DomainControl;
use crate::xenstore::{StoreError, Xenstore};

impl Xenstore for Face {
    fn read(&self, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.state().nodes.get(path).cloned())
    }

    fn write(&self, path: &str, value: &[u8]) -> Result<(), StoreError> {
        self.state().nodes.insert(path.to_owned(), value.to_vec());
        let guest = path
            .strip_prefix("/local/domain/")
            .and_then(|rest| rest.strip_suffix("/control/shutdown"))
            .and_then(|domid| domid.parse().ok())
            .and_then(|domid| self.domain(domid).ok());
        // A guest that listens takes the request and suspends; one that does not leaves
        // the node as it is.
        if let Some(guest) = guest
            && value == b"suspend"
            && guest.suspend().is_ok()
        {
            self.state().nodes.insert(path.to_owned(), Vec::new());
        }
        Ok(())
    }

    fn exchange(&self, path: &str, old: &[u8], new: &[u8]) -> Result<bool, StoreError> {
        let mut state = self.state();
        match state.nodes.get_mut(path) {
            Some(value) if value == old => {
                *value = new.to_vec();
                Ok(true)
            }
            _ => Ok(false),
        }
    }
}
