//! Whether stdout was open when the process began.
//!
//! Before `main`, Rust's runtime opens `/dev/null` in place of closed standard descriptors. After
//! that, a closed stdout (`>&-`) looks like one that the caller has redirected to `/dev/null` on
//! purpose, as Python's `subprocess.DEVNULL` is. The first must be reported as a failure, the
//! second must not. So a function that the loader calls looks before the runtime starts, as in
//! uutils coreutils.
//!
//! This is a crate of its own for `unsafe`, because of one attribute: the loader calls a function
//! in `.init_array` without any check.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::BorrowedFd;
use rustix::io::{Errno, fcntl_getfd};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_runner_has_a_stdout() {
        assert!(!stdout_was_closed());
    }
}
