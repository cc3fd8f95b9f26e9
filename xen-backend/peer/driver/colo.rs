//! The two libxls of COLO, which share the stream and the back channel with the helpers.
//!
//! C implementation: `tools/libs/light/libxl_colo_save.c`, `libxl_colo_restore.c`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use xsr_xen_backend::DomId;

use super::{
    CHECKPOINT, Empty, Helpers, LOGDIRTY, POSTCOPY, RESTORE_RESULTS, Run, STATIC_DATA_DONE,
    SUSPEND, WAIT_CHECKPOINT, Whose, answer, ask,
};

/// libxl's callbacks, at both ends.
const SAVE: u32 =
    1 << SUSPEND | 1 << POSTCOPY | 1 << CHECKPOINT | 1 << WAIT_CHECKPOINT | 1 << LOGDIRTY;
const RESTORE: u32 = 1 << SUSPEND
    | 1 << POSTCOPY
    | 1 << CHECKPOINT
    | 1 << WAIT_CHECKPOINT
    | 1 << STATIC_DATA_DONE
    | 1 << RESTORE_RESULTS;

/// libxl's empty record of type 4.
const CHECKPOINT_END: [u8; 8] = [4, 0, 0, 0, 0, 0, 0, 0];

/// How long one libxl waits for the other, in ms.
const PATIENCE: u16 = 60_000;

/// States in a CHECKPOINT_STATE record.
const NEW: u8 = 0;
const SVM_SUSPENDED: u8 = 1;
const SVM_READY: u8 = 2;
const SVM_RESUMED: u8 = 3;

fn state(id: u8) -> [u8; 16] {
    let mut record = [0; 16];
    (record[0], record[4], record[8]) = (5, 4, id);
    record
}

/// Read a record, within [`PATIENCE`]: a FIFO that is held open in both directions has no end of
/// file.
fn expect<const N: usize>(mut from: impl Read + AsFd, record: [u8; N]) -> io::Result<()> {
    let mut got = [0; N];
    let mut ready = [PollFd::new(from.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ready, PATIENCE)? == 0 {
        return Err(io::Error::other(format!("nothing came, not {record:02x?}")));
    }
    from.read_exact(&mut got)?;
    match got == record {
        true => Ok(()),
        false => Err(io::Error::other(format!(
            "{got:02x?} came, not {record:02x?}"
        ))),
    }
}

/// One of the two hosts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End<'a> {
    /// The helper's engine.
    pub(crate) whose: Whose,
    /// The machine.
    pub(crate) host: &'a Path,
}

/// Protect domain `domid` of the first machine with `empty` of the second, for as many checkpoints;
/// both domains work in steps. In the last checkpoint the primary's libxl fails after the secondary
/// has received all of it: both domains are then stopped, and are equal.
///
/// # Errors
///
/// A helper cannot be started or does not follow the protocol.
pub(crate) fn protect(
    helpers: &Helpers,
    (from, domid): (End<'_>, DomId),
    (to, empty): (End<'_>, &Empty),
    checkpoints: u32,
) -> io::Result<[Run; 2]> {
    let (stream_from, stream_to) = io::pipe()?;
    let (mut libxl_from, mut libxl_to) = (stream_from.try_clone()?, stream_to.try_clone()?);
    let name = from.host.with_extension("back");
    mkfifo(&name, Mode::S_IRWXU)?;
    // It holds both ends open, so that no helper waits for the other to open it.
    let back = File::options().read(true).write(true).open(&name)?;
    let others = format!("8<>'{}'", name.display());
    let save = format!("--save-domain 7 8 {} 1 {SAVE} 2", domid.0);
    let restore = format!(
        "--restore-domain 7 8 {} {} 0 {} 0 {RESTORE} 2",
        empty.domid.0, empty.store, empty.console
    );
    let (primary, here) = helpers.with_requests(from.host);
    let (secondary, there) = helpers.with_requests(to.host);
    let sender = primary.start(from.whose, from.host, stream_to, &save, &others)?;
    let receiver = secondary.start(to.whose, to.host, stream_from, &restore, &others)?;
    // Our helper does it itself, once it is told that it is done.
    let do_it = |end: End<'_>, requests: &Path, verb: &str, domid: DomId| match end.whose {
        Whose::Stock => ask(requests, verb, domid),
        Whose::Ours | Whose::OursByCalls => Ok(()),
    };
    thread::scope(|scope| {
        let back = &back;
        let here = here.as_path();
        let sent = scope.spawn(move || {
            let (mut number, mut running) = (0, false);
            answer(sender, |message| {
                match message {
                    SUSPEND => {
                        do_it(from, here, "suspend", domid)?;
                        if running {
                            expect(back, state(SVM_SUSPENDED))?;
                        }
                    }
                    CHECKPOINT => {
                        libxl_to.write_all(&CHECKPOINT_END)?;
                        number += 1;
                        return Ok(i32::from(number < checkpoints));
                    }
                    POSTCOPY => {
                        expect(back, state(SVM_READY))?;
                        running = true;
                        do_it(from, here, "resume", domid)?;
                        expect(back, state(SVM_RESUMED))?;
                    }
                    WAIT_CHECKPOINT => libxl_to.write_all(&state(NEW))?,
                    _ => return Ok(0),
                }
                Ok(1)
            })
        });
        let mut number = 0;
        let received = answer(receiver, |message| {
            let mut back = back;
            match message {
                CHECKPOINT => expect(&mut libxl_from, CHECKPOINT_END)?,
                POSTCOPY => {
                    number += 1;
                    if number == checkpoints {
                        // The result of a libxl that cannot send SVM_READY.
                        return Ok(2);
                    }
                    back.write_all(&state(SVM_READY))?;
                    let verb = if number == 1 { "run" } else { "resume" };
                    do_it(to, &there, verb, empty.domid)?;
                    back.write_all(&state(SVM_RESUMED))?;
                }
                WAIT_CHECKPOINT => expect(&mut libxl_from, state(NEW))?,
                SUSPEND => {
                    do_it(to, &there, "suspend", empty.domid)?;
                    back.write_all(&state(SVM_SUSPENDED))?;
                }
                _ => return Ok(0),
            }
            Ok(1)
        });
        let sent = sent
            .join()
            .map_err(|_| io::Error::other("the primary's libxl panicked"))?;
        Ok([sent?, received?])
    })
}
