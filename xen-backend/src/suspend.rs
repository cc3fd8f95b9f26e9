//! Asks a guest to suspend, and waits for it.

use std::time::{Duration, Instant};

use crate::error::BackendError;
use crate::{DomainControl, ShutdownReason};

/// How long a guest has to suspend, unless the user says otherwise (libxl's time-out).
pub const SUSPEND_TIMEOUT: Duration = Duration::from_secs(60);

/// How often to poll, at first and in the end.
const FIRST_LOOK: Duration = Duration::from_micros(200);
const LAST_LOOK: Duration = Duration::from_millis(10);

/// What has become of a request to suspend that is taken back ([`DomainControl::withdraw_suspend`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// The guest has not read it, and will not suspend because of it.
    TakenBack,
    /// The guest has accepted it, and is about to suspend.
    Accepted,
    /// It was an event, or a stop from outside, which cannot be taken back: the guest may still
    /// suspend.
    Sent,
}

/// Why a guest has not suspended.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SuspendError {
    /// The hypervisor or xenstore refused a call. The guest may have been asked.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// It has shut down instead, for this reason.
    #[error("the guest has shut down instead ({0})")]
    ShutDown(ShutdownReason),
    /// It has not taken the request from xenstore, which was then taken back: it runs.
    #[error(
        "the guest has not read the request to suspend from xenstore within {} s, and it was taken \
         back: a guest without drivers for Xen, or one that hangs, does not answer",
        .0.as_secs()
    )]
    Unanswered(Duration),
    /// It has accepted the request, or was told to suspend in a way that cannot be taken back, and
    /// has not suspended within this time after that. It may still do so.
    #[error(
        "the guest {} and has not suspended within {} s more: it may still do so, and must then be \
         resumed",
        match .accepted {
            true => "has accepted the request to suspend",
            false => "was told to suspend",
        },
        .waited.as_secs()
    )]
    Pending {
        /// Whether it has read the request from xenstore.
        accepted: bool,
        /// The time that it had after the limit.
        waited: Duration,
    },
    /// It has suspended, but only after this time, and was resumed.
    #[error("the guest has suspended only after {:.1} s, and was resumed", .0.as_secs_f64())]
    Late(Duration),
    /// The caller has given up. The request was taken back, or the guest was resumed.
    #[error("the wait for the guest to suspend was broken off")]
    GivenUp,
}

/// Asks a guest to suspend, and waits up to `limit` until it has: then [`DomainControl::info`]
/// shows `ShutdownReason::Suspend`. `has_given_up` is asked about every 10 ms.
///
/// A request in xenstore is taken back at the limit; a guest that has accepted it by then has
/// `limit` again, and 60 s at least (C: `libxl_dom_suspend.c`, twice 60 s): it will suspend, and
/// must not do so when nothing is there to resume it. An event cannot be taken back: this waits for
/// the same time again, and resumes a guest that suspends late. If the caller has given up, these
/// are 60 s.
///
/// ```
/// use std::time::Duration;
///
/// use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
/// use xsr_xen_backend::suspend::{SuspendError, suspend_within};
/// use xsr_xen_backend::{GuestKind, Host};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let host = MockHost::ephemeral(&HostConfig::default())?;
/// let mut deaf = GuestSpec::new("web", GuestKind::Pvh, 8);
/// deaf.ignores_suspend = true;
/// let domain = host.domain(host.create_guest(&deaf)?)?;
/// let suspended = suspend_within(&*domain, Duration::from_millis(20), &|| false);
/// assert!(matches!(suspended, Err(SuspendError::Unanswered(_))));
/// assert_eq!(domain.info()?.shutdown, None);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
///
/// [`SuspendError`]. The guest is suspended only after [`SuspendError::Pending`], at some time, and
/// perhaps after [`SuspendError::Backend`].
pub fn suspend_within<D: DomainControl + ?Sized>(
    domain: &D,
    limit: Duration,
    has_given_up: &dyn Fn() -> bool,
) -> Result<(), SuspendError> {
    let more = |given_up| match given_up {
        true => SUSPEND_TIMEOUT,
        false => limit.max(SUSPEND_TIMEOUT),
    };
    suspend(domain, limit, &more, has_given_up)
}

/// The same; `more` is the time for a guest whose request cannot be taken back.
fn suspend<D: DomainControl + ?Sized>(
    domain: &D,
    limit: Duration,
    more: &dyn Fn(bool) -> Duration,
    has_given_up: &dyn Fn() -> bool,
) -> Result<(), SuspendError> {
    let asked = Instant::now();
    if domain.request_suspend()? {
        // Another program may resume it at any time, which is not for this one to wait for.
        return Ok(());
    }
    let waited = wait(domain, limit, has_given_up);
    if waited.is_err()
        && let Err(error) = domain.withdraw_suspend()
    {
        tracing::debug!(%error, "the guest's request to suspend was not taken back");
    }
    let given_up = match waited? {
        Waited::Suspended => return Ok(()),
        Waited::TooLong => false,
        Waited::GivenUp => true,
    };
    let accepted = match domain.withdraw_suspend()? {
        Withdrawn::TakenBack if given_up => return Err(SuspendError::GivenUp),
        Withdrawn::TakenBack => return Err(SuspendError::Unanswered(limit)),
        Withdrawn::Accepted => true,
        Withdrawn::Sent => false,
    };
    let waited = more(given_up);
    match wait(domain, waited, &|| false)? {
        // It had accepted the request at the last moment.
        Waited::Suspended if accepted && !given_up => Ok(()),
        Waited::Suspended => {
            domain.resume()?;
            Err(match given_up {
                true => SuspendError::GivenUp,
                false => SuspendError::Late(asked.elapsed()),
            })
        }
        Waited::TooLong | Waited::GivenUp => Err(SuspendError::Pending { accepted, waited }),
    }
}

enum Waited {
    Suspended,
    TooLong,
    GivenUp,
}

fn wait<D: DomainControl + ?Sized>(
    domain: &D,
    limit: Duration,
    has_given_up: &dyn Fn() -> bool,
) -> Result<Waited, SuspendError> {
    let (begun, mut look) = (Instant::now(), FIRST_LOOK);
    loop {
        match domain.info()?.shutdown {
            Some(ShutdownReason::Suspend) => return Ok(Waited::Suspended),
            Some(reason) => return Err(SuspendError::ShutDown(reason)),
            None if has_given_up() => return Ok(Waited::GivenUp),
            None if begun.elapsed() >= limit => return Ok(Waited::TooLong),
            None => {}
        }
        std::thread::sleep(look);
        look = (look * 2).min(LAST_LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Mutex;

    use super::*;
    use crate::mock::{GuestSpec, HostConfig, MockHost};
    use crate::{DomId, Domain, DomainInfo, Errno, GuestKind, Host as _, XenVersion};

    /// A guest that suspends once it has been looked at so many times.
    struct Guest {
        inner: Box<dyn Domain>,
        looks: Mutex<u32>,
        suspends_at: u32,
        withdrawn: Withdrawn,
    }

    impl Guest {
        fn new(suspends_at: u32, withdrawn: Withdrawn) -> Self {
            let host = MockHost::ephemeral(&HostConfig::default()).expect("a machine");
            let spec = GuestSpec::new("web", GuestKind::Pvh, 8);
            let domid = host.create_guest(&spec).expect("a guest");
            Self {
                inner: host.domain(domid).expect("a domain"),
                looks: Mutex::new(0),
                suspends_at,
                withdrawn,
            }
        }

        fn is_suspended(&self) -> bool {
            let info = self.inner.info().expect("it is there");
            info.shutdown == Some(ShutdownReason::Suspend)
        }
    }

    impl DomainControl for Guest {
        fn xen_version(&self) -> Result<XenVersion, BackendError> {
            self.inner.xen_version()
        }
        fn info(&self) -> Result<DomainInfo, BackendError> {
            let mut looks = self.looks.lock().expect("not poisoned");
            *looks += 1;
            if *looks == self.suspends_at {
                self.inner.request_suspend()?;
            }
            self.inner.info()
        }
        fn vcpu_online(&self, vcpu: u32) -> Result<bool, BackendError> {
            self.inner.vcpu_online(vcpu)
        }
        fn pause(&self) -> Result<(), BackendError> {
            self.inner.pause()
        }
        fn unpause(&self) -> Result<(), BackendError> {
            self.inner.unpause()
        }
        fn request_suspend(&self) -> Result<bool, BackendError> {
            Ok(false)
        }
        fn withdraw_suspend(&self) -> Result<Withdrawn, BackendError> {
            Ok(self.withdrawn)
        }
        fn resume(&self) -> Result<(), BackendError> {
            self.inner.resume()
        }
        fn destroy(&self) -> Result<(), BackendError> {
            self.inner.destroy()
        }
        fn alloc_unbound_port(&self, remote: DomId) -> Result<u32, BackendError> {
            self.inner.alloc_unbound_port(remote)
        }
    }

    /// Never over in a test.
    const LONG: Duration = Duration::from_secs(3600);
    const SHORT: Duration = Duration::from_millis(30);

    #[test]
    fn a_guest_that_answers_is_suspended() {
        for looks in [1, 5] {
            let guest = Guest::new(looks, Withdrawn::Sent);
            suspend_within(&guest, LONG, &|| false).expect("it suspends");
            assert!(guest.is_suspended());
        }
    }

    #[test]
    fn a_request_that_is_not_read_is_taken_back() {
        let guest = Guest::new(u32::MAX, Withdrawn::TakenBack);
        let error = suspend_within(&guest, SHORT, &|| false);
        assert!(matches!(error, Err(SuspendError::Unanswered(SHORT))));
        let error = suspend_within(&guest, LONG, &|| true);
        assert!(matches!(error, Err(SuspendError::GivenUp)));
        assert!(!guest.is_suspended());
    }

    #[test]
    fn a_guest_that_suspends_late_is_resumed_unless_it_had_accepted() {
        // The guest suspends when it is looked at first after the limit.
        let late = |withdrawn| Guest::new(2, withdrawn);
        let patient = |guest: &Guest, given_up: bool| {
            let asked = Cell::new(false);
            suspend_within(guest, SHORT, &|| {
                // Later than the limit.
                std::thread::sleep(SHORT * u32::from(!asked.replace(true)));
                given_up
            })
        };
        let guest = late(Withdrawn::Accepted);
        patient(&guest, false).expect("it had accepted");
        assert!(guest.is_suspended());

        let guest = late(Withdrawn::Sent);
        let error = patient(&guest, false);
        assert!(matches!(error, Err(SuspendError::Late(_))), "{error:?}");
        assert!(!guest.is_suspended());

        for withdrawn in [Withdrawn::Accepted, Withdrawn::Sent] {
            let guest = late(withdrawn);
            let error = patient(&guest, true);
            assert!(matches!(error, Err(SuspendError::GivenUp)), "{error:?}");
            assert!(!guest.is_suspended());
        }
    }

    #[test]
    fn a_guest_that_never_suspends_is_said_to_be_able_to() {
        for (withdrawn, expected) in [(Withdrawn::Accepted, true), (Withdrawn::Sent, false)] {
            let guest = Guest::new(u32::MAX, withdrawn);
            let error = suspend(&guest, SHORT, &|_| SHORT, &|| false);
            let Err(SuspendError::Pending { accepted, .. }) = error else {
                panic!("{error:?}");
            };
            assert_eq!(accepted, expected);
        }
    }

    #[test]
    fn a_guest_that_is_gone_or_shuts_down_is_not_waited_for() {
        let guest = Guest::new(u32::MAX, Withdrawn::Sent);
        guest.destroy().expect("destroyed");
        let error = suspend_within(&guest, LONG, &|| false);
        let Err(SuspendError::Backend(error)) = error else {
            panic!("{error:?}");
        };
        assert_eq!(error.errno, Errno::ESRCH);
    }
}
