//! The mock machine of this process, which is open as long as any of the libraries is.

use std::ffi::{OsString, c_void};
use std::path::Path;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use xsr_xen_backend::Errno;
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::mock::peer::PeerFace;

use crate::memory::BUFFERS;

/// Sets this thread's `errno` for the C caller.
pub(crate) fn set_errno(errno: Errno) {
    nix::errno::Errno::from_raw(errno.raw()).set();
}

/// The variable that names the machine's directory.
const HOST: &str = "XSR_PEER_HOST";
/// The variable that names a file for the final numbers of hypercalls and of maps.
const COUNTS: &str = "XSR_PEER_COUNTS";

/// The variable that names a file of requests. Once the file exists, its requests are carried out
/// before the next hypercall: lines of a verb (`suspend`, `resume`, or `run`: unpause, with the
/// dirty log on) and a domain number. They come from the program that plays libxl, so that a guest
/// is suspended at the right time of a live save. The file is removed when they are done.
const REQUESTS: &str = "XSR_PEER_REQUESTS";

/// The machine, and the number of open handles on it.
static MACHINE: Mutex<Option<(PeerFace, usize)>> = Mutex::new(None);

/// The number of calls to it.
pub(crate) static HYPERCALLS: AtomicU64 = AtomicU64::new(0);
pub(crate) static MAPS: AtomicU64 = AtomicU64::new(0);

fn lock() -> MutexGuard<'static, Option<(PeerFace, usize)>> {
    // Every change is a single step, so a panic leaves no partial state.
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A handle of any of the libraries: they all stand for the one machine. If the machine cannot be
/// opened, null, with errno set and the cause on stderr.
pub(crate) fn open() -> *mut c_void {
    let mut machine = lock();
    if let Some((_, handles)) = machine.as_mut() {
        *handles += 1;
        return handle();
    }
    let Some(dir) = std::env::var_os(HOST) else {
        eprintln!("xsr-peer: {HOST} is not set, and there is no other hypervisor here");
        set_errno(Errno::ENOENT);
        return ptr::null_mut();
    };
    match MockHost::open(Path::new(&dir)) {
        Ok(host) => {
            *machine = Some((PeerFace::new(&host, Arc::new(&BUFFERS)), 1));
            handle()
        }
        Err(error) => {
            eprintln!("xsr-peer: {error}");
            set_errno(Errno::EIO);
            ptr::null_mut()
        }
    }
}

/// Callers only check that it is not null.
fn handle() -> *mut c_void {
    ptr::without_provenance_mut(1)
}

/// Close a handle; null is ignored.
pub(crate) fn close(handle: *mut c_void) {
    let mut machine = lock();
    let Some((_, handles)) = machine.as_mut().filter(|_| !handle.is_null()) else {
        return;
    };
    *handles -= 1;
    if *handles > 0 {
        return;
    }
    *machine = None;
    if let Some(path) = std::env::var_os(COUNTS) {
        let counts = format!(
            "{} {}\n",
            HYPERCALLS.load(Ordering::Relaxed),
            MAPS.load(Ordering::Relaxed)
        );
        if let Err(error) = std::fs::write(&path, counts) {
            eprintln!(
                "xsr-peer: cannot write {}: {error}",
                Path::new(&path).display()
            );
        }
    }
}

/// Carry out the requests from the request file.
pub(crate) fn requests(face: &PeerFace) {
    static NAME: OnceLock<Option<OsString>> = OnceLock::new();
    let Some(path) = NAME.get_or_init(|| std::env::var_os(REQUESTS)) else {
        return;
    };
    let Ok(lines) = std::fs::read_to_string(path) else {
        return;
    };
    for line in lines.lines() {
        if let Err(errno) = request(face, line) {
            eprintln!("xsr-peer: {line}: {errno}");
        }
    }
    if let Err(error) = std::fs::remove_file(path) {
        eprintln!("xsr-peer: the requests stay: {error}");
    }
}

fn request(face: &PeerFace, line: &str) -> Result<(), Errno> {
    let (verb, domid) = line.split_once(' ').ok_or(Errno::EINVAL)?;
    let domid = domid.parse().map_err(|_| Errno::EINVAL)?;
    match verb {
        "suspend" => face.suspend(domid),
        "resume" => face.resume(domid),
        "run" => face.run_logged(domid),
        _ => Err(Errno::EINVAL),
    }
}

/// The face; EBADF if no handle is open.
pub(crate) fn face() -> Result<PeerFace, Errno> {
    let machine = lock();
    machine
        .as_ref()
        .map(|(face, _)| face.clone())
        .ok_or(Errno::EBADF)
}

/// A result in C's form: -1 with errno set, or the value.
pub(crate) fn returned(result: Result<u64, Errno>) -> i64 {
    match result.and_then(|value| i64::try_from(value).map_err(|_| Errno::ERANGE)) {
        Ok(value) => value,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}

/// As [`returned`], for a result without a value.
pub(crate) fn status(result: Result<(), Errno>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(errno) => {
            set_errno(errno);
            -1
        }
    }
}
