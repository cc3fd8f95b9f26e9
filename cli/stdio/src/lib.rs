//! The descriptors that the process was started with: whether stdout was open, and which of them
//! the programs that it starts inherit.
//!
//! Before `main`, Rust's runtime opens `/dev/null` in place of closed standard descriptors. After
//! that, a closed stdout (`>&-`) looks like one that the caller has redirected to `/dev/null` on
//! purpose, as Python's `subprocess.DEVNULL` is. The first must be reported as a failure, the
//! second must not. So a function that the loader calls looks before the runtime starts, as in
//! uutils coreutils.
//!
//! This is a crate of its own for `unsafe`: for one attribute, because the loader calls a function
//! in `.init_array` without any check, and for descriptors that are known by their numbers alone.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::BorrowedFd;
use rustix::io::{Errno, FdFlags, fcntl_getfd, fcntl_setfd};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Called by the loader with the arguments of `main`, which it ignores. It makes one system call,
/// without libc, std or heap memory, none of which is ready yet.
extern "C" fn look() {
    STDOUT_WAS_CLOSED.store(is_closed(rustix::stdio::stdout()), Ordering::Relaxed);
}

fn is_closed(descriptor: BorrowedFd<'_>) -> bool {
    fcntl_getfd(descriptor) == Err(Errno::BADF)
}

// SAFETY: `.init_array` is a table of pointers to functions that the loader calls once, on the only
// thread. This is one such pointer: a `static` of a function pointer's type, and `look` has the C
// calling convention. It takes no arguments, which a callee may ignore in that convention, and it
// does not unwind: nothing in it panics.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether stdout was closed when the process began.
pub fn stdout_was_closed() -> bool {
    STDOUT_WAS_CLOSED.load(Ordering::Relaxed)
}

/// Has the programs that this process starts from now on inherit stdin, stdout and stderr alone.
///
/// Descriptors that this process opens are closed there anyway. Those that it was started with are
/// not, unless this is called.
///
/// # Errors
///
/// `/proc/self/fd` cannot be read, or a descriptor cannot be marked.
pub fn close_on_exec() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.parse::<i32>().ok());
        let Some(number) = number.filter(|number| *number > 2) else {
            continue;
        };
        // SAFETY: it is not -1, and it was open when the kernel listed it. Another thread may have
        // closed it since: then the call below fails with EBADF, or marks a descriptor that has
        // just been opened in its place, which Rust has marked already. The borrow ends with
        // this iteration, and nothing is read, written or closed through it.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        match fcntl_setfd(descriptor, FdFlags::CLOEXEC) {
            Ok(()) | Err(Errno::BADF) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_runner_has_a_stdout() {
        assert!(!stdout_was_closed());
    }
}
