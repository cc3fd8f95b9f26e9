//! Whether stdin, stdout and stderr were open when the process began.
//!
//! Rust's runtime opens `/dev/null` in the place of those that are closed, before `main`: from
//! then on a stdout that is closed (`>&-`) looks like one that a caller has sent to `/dev/null`
//! on purpose, as Python's `subprocess.DEVNULL` is. The first has to be reported as a failure,
//! the second must not be. So they are looked at before the runtime is, by a function that the
//! loader calls, as coreutils in Rust do it.
//!
//! A room for `unsafe` of its own, because of one attribute: a function in `.init_array` is
//! called by the loader, which believes what it finds there.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::BorrowedFd;
use rustix::io::{Errno, fcntl_getfd};

static STDOUT_WAS_CLOSED: AtomicBool = AtomicBool::new(false);

/// Called by the loader, with the arguments of `main`, which it does not take. One system call
/// each, without libc, std or memory from a heap: none of those is ready yet.
extern "C" fn look() {
    STDOUT_WAS_CLOSED.store(is_closed(rustix::stdio::stdout()), Ordering::Relaxed);
}

fn is_closed(descriptor: BorrowedFd<'_>) -> bool {
    fcntl_getfd(descriptor) == Err(Errno::BADF)
}

// SAFETY: `.init_array` is a table of pointers to functions that the loader calls once, on the
// only thread there is. This is one such pointer: a `static` of a function pointer's type, and
// `look` has the C calling convention. It takes no arguments, which in that convention a callee
// need not look at, and does not unwind: nothing in it panics.
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
