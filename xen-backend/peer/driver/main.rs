//! A single measured run of a helper with this program in libxl's place, for `cargo xtask peer
//! bench`, which starts a new process for each run.
//!
//! `xsr-peer-run make DIR KIND MIB` makes a machine with a guest, and `xsr-peer-run suspend DIR` or
//! `resume DIR` suspends or resumes it: only the process that has the machine open can do that, so
//! the guest is suspended before stock saves it, and ours suspends it itself. `xsr-peer-run save
//! WHOSE DIR KIND MIB WAY FILE` saves it, and `xsr-peer-run restore WHOSE DIR KIND MIB WAY IMAGE`
//! restores an image on a machine made for it. `xsr-peer-run make DIR KIND MIB RATE PAGES` makes a
//! guest that, while it is migrated, writes to RATE pages a second, of PAGES, and `xsr-peer-run
//! migrate WHOSE DIR KIND MIB WAY` migrates it live to a machine made for it.
//!
//! KIND is `pv`, `pv32`, `pvh` or `hvm`, WAY `null`, `pipe`, `file` or `tcp`, WHOSE `stock`,
//! `ours`, `direct` (ours, without hypercalls), or `cat`: then `cat` moves the same bytes to FILE
//! or, for a restore, into an existing file. Words after `--` are put before the command of the
//! helper, or of both.

#![allow(
    clippy::print_stdout,
    reason = "the measurement is what this program is for"
)]

#[path = "mod.rs"]
#[allow(dead_code, reason = "tests use the rest of it")]
mod driver;

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Seek as _, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use driver::migrate::{Machines, Migrated};
use driver::{Empty, Helpers, Run, Whose};
use nix::sys::resource::{UsageWho, getrusage};
use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, Stepped, WorkloadSpec};
use xsr_xen_backend::{DomId, GuestKind, Host as _};

type Failure = Box<dyn Error>;

/// Bytes that the other end of a pipe or socket moves at a time.
const BLOCK: usize = 1 << 20;

/// MiB of a PV guest for each process with its own page tables: with these, and the tables that map
/// its memory, about one page in a hundred is a page table.
const MIB_PER_PROCESS: u64 = 3;

/// The first domain of a new machine.
const DOMID: DomId = DomId(1);

/// The guest to be saved or restored.
struct Guest {
    dir: PathBuf,
    kind: GuestKind,
    width: u8,
    mib: u64,
}

impl Guest {
    fn parse(dir: &str, kind: &str, mib: &str) -> Result<Self, Failure> {
        let (kind, width) = match kind {
            "pv" => (GuestKind::Pv, 8),
            "pv32" => (GuestKind::Pv, 4),
            "pvh" => (GuestKind::Pvh, 8),
            "hvm" => (GuestKind::Hvm, 8),
            _ => return Err(format!("{kind}: no such kind of guest").into()),
        };
        Ok(Self {
            dir: dir.into(),
            kind,
            width,
            mib: mib.parse()?,
        })
    }

    /// A machine with some room beside the guest. Memory is in large extents, as Xen first gives it
    /// to a domain, so that one system call maps many frames, as it does for privcmd.
    fn machine(&self, stepped: Option<Stepped>) -> Result<MockHost, Failure> {
        let config = HostConfig {
            stepped,
            memory_pages: (self.mib << 8) + (64 << 8),
            max_run: 512,
            ..HostConfig::default()
        };
        Ok(MockHost::create(&self.dir, &config)?)
    }

    /// A machine with an empty domain. Its memory is allocated already, as that of a real machine
    /// is: the kernel's work to allocate pages of a file is not part of a restore.
    fn empty(&self) -> Result<Empty, Failure> {
        let host = self.machine(None)?;
        let memory = File::options().write(true).open(self.dir.join("memory"))?;
        write_zeros(&memory, host.config().memory_pages)?;
        let empty = driver::empty_on(&host, self.kind, self.width, self.mib)?;
        Ok(empty)
    }

    /// A machine with the guest; its workload, if any, runs in timed steps.
    fn make(&self, work: Option<WorkloadSpec>) -> Result<(), Failure> {
        let stepped = work.map(|work| Stepped {
            work,
            operations: None,
        });
        let host = self.machine(stepped)?;
        let mut spec = GuestSpec {
            width: self.width,
            vcpus: 2,
            ..GuestSpec::new("peer", self.kind, self.mib)
        };
        if self.kind == GuestKind::Pv {
            spec.processes = (self.mib / MIB_PER_PROCESS).max(3);
        }
        let domid = host.create_guest(&spec)?;
        if domid != DOMID {
            return Err("the first domain has another number".into());
        }
        Ok(())
    }
}

fn write_zeros(mut file: &File, pages: u64) -> io::Result<()> {
    let zeros = vec![0; BLOCK];
    for _ in 0..pages.div_ceil((BLOCK / PAGE_SIZE) as u64) {
        file.write_all(&zeros)?;
    }
    Ok(())
}

/// Suspend or resume the guest of the machine in `dir`.
fn put(dir: &str, suspended: bool) -> Result<(), Failure> {
    let domain = MockHost::open(Path::new(dir))?.domain(DOMID)?;
    match (suspended, domain.info()?.shutdown.is_some()) {
        (true, false) => domain.suspend()?,
        (false, true) => domain.resume()?,
        _ => {}
    }
    Ok(())
}

/// The thread at the other end of the stream.
type End = Option<JoinHandle<io::Result<u64>>>;

/// Read and discard everything.
fn drain(mut from: impl Read + Send + 'static) -> End {
    Some(thread::spawn(move || {
        let mut block = vec![0; BLOCK];
        let mut bytes = 0;
        loop {
            match from.read(&mut block)? {
                0 => return Ok(bytes),
                n => bytes += n as u64,
            }
        }
    }))
}

/// Write the contents of a file.
fn feed(mut image: File, mut to: impl Write + Send + 'static) -> End {
    Some(thread::spawn(move || {
        let mut block = vec![0; BLOCK];
        let mut bytes = 0;
        loop {
            match image.read(&mut block)? {
                0 => return Ok(bytes),
                n => to.write_all(&block[..n])?,
            }
            bytes += 1;
        }
    }))
}

fn loopback() -> io::Result<[TcpStream; 2]> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let one = TcpStream::connect(listener.local_addr()?)?;
    Ok([one, listener.accept()?.0])
}

/// The destination of a save: the descriptor, and the thread at its other end.
fn sink(way: &str, file: &Path) -> Result<(Stdio, End), Failure> {
    Ok(match way {
        "null" => {
            let null = File::options().write(true).open("/dev/null")?;
            (null.into(), None)
        }
        "file" => (File::create(file)?.into(), None),
        "pipe" => {
            let (from, to) = io::pipe()?;
            (to.into(), drain(from))
        }
        "tcp" => {
            let [one, other] = loopback()?;
            (OwnedFd::from(one).into(), drain(other))
        }
        _ => return Err(format!("{way}: no such way").into()),
    })
}

/// The source of a restore.
fn source(way: &str, image: &Path) -> Result<(Stdio, End), Failure> {
    // libxl opens the descriptor for reading and writing.
    let image = File::options().read(true).write(true).open(image)?;
    Ok(match way {
        "file" => (image.into(), None),
        "pipe" => {
            let (from, to) = io::pipe()?;
            (from.into(), feed(image, to))
        }
        "tcp" => {
            let [one, other] = loopback()?;
            (OwnedFd::from(one).into(), feed(image, other))
        }
        _ => return Err(format!("{way}: no such way").into()),
    })
}

fn whose(name: &str) -> Result<Option<Whose>, Failure> {
    Ok(match name {
        "stock" => Some(Whose::Stock),
        "ours" => Some(Whose::OursByCalls),
        "direct" => Some(Whose::Ours),
        "cat" => None,
        _ => return Err(format!("{name}: no such helper").into()),
    })
}

/// Numbers of hypercalls and maps: stock's are counted by the libraries under it, ours by the
/// machine.
fn asked(run: &Run, counts: &Path) -> Result<[u64; 2], Failure> {
    let words = |text: &str| -> Result<[u64; 2], Failure> {
        let words: Vec<u64> = text
            .split_whitespace()
            .map(str::parse)
            .collect::<Result<_, _>>()?;
        let words = words.try_into();
        words.map_err(|_| format!("not two numbers: {text:?}").into())
    };
    if counts.exists() {
        return words(&fs::read_to_string(counts)?);
    }
    let said = run
        .log
        .iter()
        .find(|line| line.contains("asked of the machine"));
    let Some(said) = said else {
        return Ok([0; 2]);
    };
    let numbers: String = said
        .chars()
        .map(|c| if c.is_ascii_digit() { c } else { ' ' })
        .collect();
    words(&numbers)
}

/// The cost of a run.
struct Took {
    seconds: f64,
    asked: [u64; 2],
}

fn finish(end: End) -> Result<(), Failure> {
    if let Some(end) = end {
        end.join().map_err(|_| "the other end panicked")??;
    }
    Ok(())
}

/// `cat` in place of a helper.
fn copy(from: Stdio, to: Stdio, end: End) -> Result<Took, Failure> {
    let begun = Instant::now();
    let mut command = Command::new("cat");
    command.stdin(from).stdout(to);
    let mut child = command.spawn()?;
    // The command holds the descriptors too, and the other end waits until all of them are closed.
    drop(command);
    let status = child.wait()?;
    finish(end)?;
    if !status.success() {
        return Err("cat failed".into());
    }
    Ok(Took {
        seconds: begun.elapsed().as_secs_f64(),
        asked: [0; 2],
    })
}

fn done(run: &Run, begun: Instant, end: End, counts: &Path) -> Result<Took, Failure> {
    finish(end)?;
    let seconds = begun.elapsed().as_secs_f64();
    if !run.succeeded() {
        return Err(format!("the helper failed: {run:#?}").into());
    }
    Ok(Took {
        seconds,
        asked: asked(run, counts)?,
    })
}

fn save(
    name: &str,
    guest: &Guest,
    way: &str,
    file: &Path,
    under: &[String],
) -> Result<Took, Failure> {
    let (to, end) = sink(way, file)?;
    let Some(whose) = whose(name)? else {
        let image = File::open(guest.dir.with_extension("image"))?;
        return copy(image.into(), to, end);
    };
    let (helpers, counts) = helpers(&guest.dir, under)?;
    let begun = Instant::now();
    let run = helpers.save(whose, &guest.dir, DOMID, to)?;
    done(&run, begun, end, &counts)
}

fn restore(
    name: &str,
    guest: &Guest,
    way: &str,
    image: &Path,
    under: &[String],
) -> Result<Took, Failure> {
    let (from, end) = source(way, image)?;
    let Some(whose) = whose(name)? else {
        // Allocated already, like a machine's memory.
        let to = File::create(&guest.dir)?;
        write_zeros(&to, image.metadata()?.len().div_ceil(PAGE_SIZE as u64))?;
        (&to).rewind()?;
        return copy(from, to.into(), end);
    };
    let (helpers, counts) = helpers(&guest.dir, under)?;
    let empty = guest.empty()?;
    let begun = Instant::now();
    let run = helpers.restore(whose, &guest.dir, &empty, from)?;
    done(&run, begun, end, &counts)
}

/// Migrate the guest to a machine next to its own.
fn migrate(name: &str, guest: &Guest, way: &str, under: &[String]) -> Result<Migrated, Failure> {
    let whose = whose(name)?.ok_or("cat does not migrate")?;
    let ends = match way {
        "pipe" => {
            let (from, to) = io::pipe()?;
            [to.into(), from.into()]
        }
        "tcp" => loopback()?.map(|end| OwnedFd::from(end).into()),
        _ => return Err(format!("{way}: no such way").into()),
    };
    let there = Guest {
        dir: guest.dir.with_extension("there"),
        ..*guest
    };
    let machines = Machines {
        from: &guest.dir,
        domid: DOMID,
        to: &there.dir,
        empty: there.empty()?,
    };
    let (helpers, _) = helpers(&guest.dir, under)?;
    let migrated = helpers.migrate(whose, machines, ends)?;
    fs::remove_dir_all(&there.dir)?;
    Ok(migrated)
}

/// The helpers, and the file with the numbers of stock's calls.
fn helpers(dir: &Path, under: &[String]) -> Result<(Helpers, PathBuf), Failure> {
    let mut helpers = Helpers::from_env().ok_or("`cargo xtask peer bench` says where they are")?;
    helpers.under = under.iter().map(OsString::from).collect();
    let counts = dir.with_extension("counts");
    if counts.exists() {
        fs::remove_file(&counts)?;
    }
    let variable = ("XSR_PEER_COUNTS".into(), counts.clone().into_os_string());
    helpers.environment.push(variable);
    Ok((helpers, counts))
}

fn main() -> Result<(), Failure> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut halves = words.splitn(2, |word| word == "--");
    let task: Vec<&str> = halves
        .next()
        .unwrap_or_default()
        .iter()
        .map(String::as_str)
        .collect();
    let under = halves.next().unwrap_or_default();
    let took = match task[..] {
        ["make", dir, kind, mib] => return Guest::parse(dir, kind, mib)?.make(None),
        ["make", dir, kind, mib, rate, pages] => {
            let work = WorkloadSpec::writes(1, rate.parse()?, pages.parse()?);
            return Guest::parse(dir, kind, mib)?.make(Some(work));
        }
        ["migrate", whose, dir, kind, mib, way] => {
            let guest = Guest::parse(dir, kind, mib)?;
            let Migrated { all, downtime } = migrate(whose, &guest, way, under)?;
            let [all, downtime] = [all, downtime].map(|time| time.as_secs_f64());
            println!(r#"{{"seconds":{all},"downtime":{downtime}}}"#);
            return Ok(());
        }
        ["suspend", dir] => return put(dir, true),
        ["resume", dir] => return put(dir, false),
        ["save", whose, dir, kind, mib, way, file] => save(
            whose,
            &Guest::parse(dir, kind, mib)?,
            way,
            Path::new(file),
            under,
        )?,
        ["restore", whose, dir, kind, mib, way, image] => restore(
            whose,
            &Guest::parse(dir, kind, mib)?,
            way,
            Path::new(image),
            under,
        )?,
        _ => return Err("what is to be done? The top of driver/main.rs says what can be".into()),
    };
    // There is only one child, whose usage includes the children that it waited for.
    let used = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let seconds = |time: nix::sys::time::TimeVal| -> Result<f64, Failure> {
        let whole = u32::try_from(time.tv_sec())?;
        Ok(f64::from(whole) + f64::from(u32::try_from(time.tv_usec())?) / 1e6)
    };
    println!(
        r#"{{"seconds":{},"user_seconds":{},"system_seconds":{},"peak_kib":{},"hypercalls":{},"maps":{}}}"#,
        took.seconds,
        seconds(used.user_time())?,
        seconds(used.system_time())?,
        used.max_rss(),
        took.asked[0],
        took.asked[1],
    );
    Ok(())
}
