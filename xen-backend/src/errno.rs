//! Error numbers of the hypervisor and of this system, whose numbers are the same on Linux.

use std::fmt;
use std::io;

use nix::errno::Errno as Named;

/// An error number.
///
/// ```
/// use xsr_xen_backend::Errno;
///
/// let errno = Errno::from_raw(22);
/// assert_eq!(errno, Errno::EINVAL);
/// assert_eq!(errno.to_string(), "EINVAL: Invalid argument");
/// assert_eq!(std::io::Error::from(errno).kind(), std::io::ErrorKind::InvalidInput);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(i32);

macro_rules! errnos {
    ($($name:ident)*) => {
        #[allow(missing_docs, reason = "errno(3) describes them")]
        impl Errno {
            $(pub const $name: Self = Self(Named::$name as i32);)*
        }
    };
}

errnos! {
    E2BIG EACCES EAGAIN EBADF EBUSY ECANCELED ECHILD ECONNABORTED ECONNREFUSED ECONNRESET EDQUOT
    EEXIST EFAULT EFBIG EHOSTDOWN EHOSTUNREACH EINTR EINVAL EIO EISCONN EISDIR ENETDOWN ENETRESET
    ENETUNREACH ENOBUFS ENODATA ENODEV ENOENT ENOMEM ENOSPC ENOSYS ENOTCONN ENOTEMPTY ENOTSOCK ENOTTY
    ENXIO EOPNOTSUPP EOVERFLOW EPERM EPIPE ERANGE EROFS ESRCH ETIMEDOUT EUSERS
}

impl Errno {
    /// The error of this number.
    pub const fn from_raw(raw: i32) -> Self {
        Self(raw)
    }

    /// Its number.
    pub const fn raw(self) -> i32 {
        self.0
    }

    /// The number of the system's error; EIO if it has none.
    pub fn of(error: &io::Error) -> Self {
        error.raw_os_error().map_or(Self::EIO, Self)
    }

    /// The error of the last system call of this thread.
    pub(crate) fn last() -> Self {
        Named::last().into()
    }

    /// `value`, or the error of the last system call if that is -1.
    pub(crate) fn result<S: nix::errno::ErrnoSentinel + PartialEq>(value: S) -> Result<S, Self> {
        Ok(Named::result(value)?)
    }
}

/// Its name.
impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Named::from_raw(self.0) {
            Named::UnknownErrno => write!(f, "errno {}", self.0),
            named => write!(f, "{named:?}"),
        }
    }
}

/// Its name and its meaning.
impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Named::from_raw(self.0) {
            Named::UnknownErrno => write!(f, "errno {}", self.0),
            named => write!(f, "{named}"),
        }
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.0)
    }
}

#[doc(hidden)]
impl From<Named> for Errno {
    fn from(errno: Named) -> Self {
        Self(errno as i32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_errno_without_a_name_keeps_its_number() {
        let errno = Errno::from_raw(9999);
        assert_eq!(errno.raw(), 9999);
        assert_eq!(errno.to_string(), "errno 9999");
        assert_eq!(io::Error::from(errno).raw_os_error(), Some(9999));
    }

    #[test]
    fn an_error_without_a_number_is_eio() {
        assert_eq!(Errno::of(&io::Error::other("no number")), Errno::EIO);
        assert_eq!(Errno::of(&Errno::ENOSPC.into()), Errno::ENOSPC);
    }
}
