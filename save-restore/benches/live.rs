//! Timing of saves, restores and live migrations between two mock machines. `cargo xtask bench
//! --live` runs it and makes tables and a plot of its output: a JSON object a line, one for each
//! measurement.
//!
//! A migration's sender and receiver run at the same time, at the ends of a socket pair, while the
//! guest writes at a rate that is a share of the bandwidth. Downtime counts from the request to
//! suspend until the guest may run on the other side.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark fails by panicking, and reports on stdout"
)]

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use xsr_format::read::{ReadOptions, RecordReader};
use xsr_save_restore::progress::Progress;
use xsr_save_restore::save::SaveStats;
use xsr_save_restore::save::precopy::{OnTimeout, PrecopyPolicy, TargetPolicy, XenPolicy};
use xsr_save_restore::sink::{FdSink, PageSink};
use xsr_save_restore::source::{FdSource, PageSource};
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack, ToolstackError};
use xsr_save_restore::{Live, RestoreRequest, Rings, SaveOptions, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host};

/// Dirty rates, as shares of the bandwidth.
const SHARES: [f64; 8] = [0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2];

/// How long a policy with a target may try before it stops the guest, whatever is dirty.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Threads at each end of a migration.
const MIGRATION_THREADS: usize = 2;

/// Migrations of each of the two guests, by the target policy and with a dirty rate below the
/// bandwidth: with fewer, a success rate near 95 % cannot be measured.
const ENOUGH_BELOW: usize = 20;

fn go_on(_: &Progress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The number that follows `name` among the arguments.
fn argument(name: &str, default: u64) -> u64 {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    match arguments.nth(1) {
        Some(text) => text.parse().unwrap(),
        None => default,
    }
}

fn host(seed: u64, memory_mib: u64) -> MockHost {
    let config = HostConfig {
        seed,
        memory_pages: (memory_mib * 2 + 128) << 8,
        ..HostConfig::default()
    };
    MockHost::ephemeral(&config).unwrap()
}

fn options(threads: usize) -> SaveOptions {
    SaveOptions {
        threads: NonZeroUsize::new(threads),
    }
}

/// Records when the guest is asked to suspend.
struct Timed<'a> {
    inner: DirectToolstack<'a>,
    asked: Option<Instant>,
}

impl<'a> Timed<'a> {
    fn new(domain: &'a dyn Domain) -> Self {
        Self {
            inner: DirectToolstack(domain),
            asked: None,
        }
    }
}

impl SaveToolstack for Timed<'_> {
    fn suspend(&mut self) -> Result<(), ToolstackError> {
        self.asked = Some(Instant::now());
        self.inner.suspend()
    }
    fn resume(&mut self) -> Result<(), ToolstackError> {
        self.inner.resume()
    }
    fn switch_qemu_logdirty(&mut self, on: bool) -> Result<(), ToolstackError> {
        self.inner.switch_qemu_logdirty(on)
    }
}

/// Restores into a new domain and starts it; returns when it could start.
fn receive(
    host: &MockHost,
    spec: &GuestSpec,
    threads: usize,
    source: impl PageSource,
) -> (DomId, Instant) {
    let pages = spec.memory_mib * 256 + 256;
    let domid = host.create_domain(spec.kind, spec.vcpus, pages).unwrap();
    let domain = host.domain(domid).unwrap();
    let port = || domain.alloc_unbound_port(DomId(0)).unwrap();
    let rings = Rings {
        store_port: port(),
        store_domid: DomId(0),
        console_port: port(),
        console_domid: DomId(0),
    };
    let mut toolstack = DirectToolstack(domain.as_ref());
    let reader = RecordReader::new(source, ReadOptions::default()).unwrap();
    let (toolstack, domain) = (&mut toolstack, domain.as_ref());
    RestoreRequest::new(domain, rings)
        .threads(NonZeroUsize::new(threads))
        .observe(&mut go_on)
        .read_stream(reader, toolstack)
        .unwrap();
    domain.unpause().unwrap();
    (domid, Instant::now())
}

/// The measurements of a migration.
struct Migration {
    stats: SaveStats,
    total: Duration,
    downtime: Duration,
    /// Pages the guest wrote per second while it ran, counted each time.
    rate: f64,
    /// Pages sent per second while it ran.
    bandwidth: f64,
}

/// Migrates a guest that writes `rate` pages a second; it continues on the source afterwards.
fn migrate(
    from: &MockHost,
    to: &MockHost,
    spec: &GuestSpec,
    domid: DomId,
    rate: u32,
    policy: &mut dyn PrecopyPolicy,
) -> Migration {
    let domain = from.domain(domid).unwrap();
    let mut toolstack = Timed::new(domain.as_ref());
    let writes = WorkloadSpec::writes(3, rate.max(1), spec.memory_mib << 8);
    let work = from.workload(domid, &writes).unwrap();
    let work = (rate > 0).then(|| work.run_in_background());
    let (one, other) = UnixStream::pair().unwrap();
    let begun = Instant::now();
    let (stats, (arrived, runs)) = thread::scope(|scope| {
        let receiver =
            scope.spawn(move || receive(to, spec, MIGRATION_THREADS, FdSource::new(other)));
        let live = Live {
            policy,
            verify: false,
        };
        let mut sink = FdSink::new(one);
        let saved = SaveRequest::new(domain.as_ref(), from.xen_version().unwrap())
            .options(&options(MIGRATION_THREADS))
            .live(live)
            .observe(&mut go_on)
            .write_stream(&mut toolstack, &mut sink)
            .unwrap();
        let stats = saved.stats();
        saved.keep_suspended();
        (stats, receiver.join().unwrap())
    });
    let asked = toolstack.asked.unwrap();
    let written = work.map_or(0, |work| work.stop().unwrap().counts().writes);
    domain.resume().unwrap();
    to.domain(arrived).unwrap().destroy().unwrap();
    let live = (asked - begun).as_secs_f64();
    Migration {
        stats,
        total: runs - begun,
        downtime: runs - asked,
        rate: f64::from(u32::try_from(written).unwrap()) / live,
        bandwidth: f64::from(u32::try_from(stats.pages).unwrap()) / live,
    }
}

fn migrations(spec: &GuestSpec, rounds: u64, target: Duration) {
    let (from, to) = (host(1, spec.memory_mib), host(2, spec.memory_mib));
    let domid = from.create_guest(spec).unwrap();
    let mut idle: Vec<f64> = (0..5)
        .map(|_| migrate(&from, &to, spec, domid, 0, &mut XenPolicy).bandwidth)
        .collect();
    idle.sort_by(f64::total_cmp);
    let most = idle[idle.len() / 2];
    // Whether the guest wrote less than was sent.
    let measured = |share: f64, name: &str| {
        // A share of what fits into 32 bits, far above what any machine reaches.
        let rate = format!("{:.0}", most * share).parse().unwrap();
        let mut aims = TargetPolicy {
            max_downtime: target,
            timeout: Some(TIMEOUT),
            on_timeout: OnTimeout::StopAndCopy,
        };
        let policy: &mut dyn PrecopyPolicy = match name {
            "xen" => &mut XenPolicy,
            _ => &mut aims,
        };
        let run = migrate(&from, &to, spec, domid, rate, policy);
        println!(
            r#"{{"what":"migration","guest":"{}","policy":"{name}","share":{share},"dirty_pages_per_second":{:.0},"pages_per_second":{:.0},"passes":{},"pages":{},"total_ms":{:.3},"downtime_ms":{:.3},"suspended_ms":{:.3}}}"#,
            spec.name,
            run.rate,
            run.bandwidth,
            run.stats.iterations,
            run.stats.pages,
            run.total.as_secs_f64() * 1e3,
            run.downtime.as_secs_f64() * 1e3,
            run.stats.suspended_for.as_secs_f64() * 1e3,
        );
        run.rate < run.bandwidth
    };
    let mut below = 0;
    for round in 0..rounds {
        eprintln!("{}: round {} of {rounds}", spec.name, round + 1);
        for share in SHARES {
            measured(share, "xen");
            below += usize::from(measured(share, "target"));
        }
    }
    let mut shares = SHARES.iter().cycle().take(4 * ENOUGH_BELOW);
    while below < ENOUGH_BELOW {
        let share = *shares.next().unwrap();
        below += usize::from(measured(share, "target"));
    }
}

/// Makes a still save to `sink`; returns how long it took.
fn timed_save(host: &MockHost, domid: DomId, threads: usize, sink: &mut dyn PageSink) -> Duration {
    let domain = host.domain(domid).unwrap();
    let mut toolstack = DirectToolstack(domain.as_ref());
    let xen = host.xen_version().unwrap();
    let begun = Instant::now();
    let (toolstack, domain) = (&mut toolstack, domain.as_ref());
    let saved = SaveRequest::new(domain, xen)
        .options(&options(threads))
        .observe(&mut go_on)
        .write_stream(toolstack, sink)
        .unwrap();
    let took = begun.elapsed();
    saved.resume().unwrap();
    took
}

/// Reads everything from one end and discards it, as `cat >/dev/null` does.
fn drain(mut from: impl Read) {
    let mut room = vec![0; 1 << 17];
    while from.read(&mut room).unwrap() > 0 {}
}

/// Reads everything and writes it to the other end, as `cat` does.
fn feed(mut from: impl Read, mut to: impl Write) {
    let mut room = vec![0; 1 << 17];
    loop {
        match from.read(&mut room).unwrap() {
            0 => return,
            n => to.write_all(&room[..n]).unwrap(),
        }
    }
}

fn throughput(spec: &GuestSpec, rounds: u64) {
    let (from, to) = (host(1, spec.memory_mib), host(2, spec.memory_mib));
    let domid = from.create_guest(spec).unwrap();
    let mut image = tempfile::tempfile_in("/dev/shm").unwrap();
    timed_save(&from, domid, 2, &mut FdSink::new(&image));
    let bytes = image.metadata().unwrap().len();
    let print = |what: &str, threads: usize, took: Duration| {
        println!(
            r#"{{"what":"{what}","guest":"{}","threads":{threads},"bytes":{bytes},"ms":{:.3}}}"#,
            spec.name,
            took.as_secs_f64() * 1e3
        );
    };
    for round in 0..rounds {
        eprintln!("{}: throughput, round {} of {rounds}", spec.name, round + 1);
        for threads in [1, 2] {
            let null = File::options().write(true).open("/dev/null").unwrap();
            let took = timed_save(&from, domid, threads, &mut FdSink::new(null));
            print("save to /dev/null", threads, took);

            let (reader, writer) = io::pipe().unwrap();
            let took = thread::scope(|scope| {
                scope.spawn(move || drain(reader));
                timed_save(&from, domid, threads, &mut FdSink::new(writer))
            });
            print("save to a pipe", threads, took);

            image.rewind().unwrap();
            let begun = Instant::now();
            let (arrived, runs) = receive(&to, spec, threads, FdSource::new(&image));
            print("restore from a file", threads, runs - begun);
            to.domain(arrived).unwrap().destroy().unwrap();

            image.rewind().unwrap();
            let (reader, writer) = io::pipe().unwrap();
            let begun = Instant::now();
            let (arrived, runs) = thread::scope(|scope| {
                scope.spawn(|| feed(&image, writer));
                receive(&to, spec, threads, FdSource::new(reader))
            });
            print("restore from a pipe", threads, runs - begun);
            to.domain(arrived).unwrap().destroy().unwrap();
        }
    }
}

fn main() {
    let memory = argument("--memory", 512);
    let rounds = argument("--rounds", 7);
    let target = Duration::from_millis(argument("--target", 100));
    for (name, kind) in [("pvh", GuestKind::Pvh), ("pv", GuestKind::Pv)] {
        let spec = GuestSpec {
            vcpus: 2,
            ..GuestSpec::new(name, kind, memory)
        };
        throughput(&spec, rounds);
        migrations(&spec, rounds, target);
    }
}
