//! `xsr mock`: domains of a mock machine.

use std::io::Write;

use anyhow::{Context as _, Error, Result, bail};
use serde::Serialize;
use xsr_format::frame::PAGE_SIZE;
use xsr_xen_backend::domain_store::{DomainLock, DomainRef, DomainStore as _};
use xsr_xen_backend::mock::{
    BadProcessor, DomainReport, DomainState, DomainSummary, GuestSpec, HostConfig, MockHost,
    Processor, WorkloadSpec,
};
use xsr_xen_backend::{BackendError, DomId, Domain, Errno, GuestKind, Host};

use crate::args::{
    MockCommand, MockCreateArgs, MockDomainArgs, MockKind, MockListArgs, MockNewHostArgs,
    MockRenameArgs, MockShowArgs, MockWorkloadArgs,
};
use crate::backend::workload;
use crate::backend::{self, Hypervisor};
use crate::config;
use crate::exit::{Aftermath, BadUsage, Code};
use crate::interrupt::Interrupt;
use crate::left::{self, Left};
use crate::stdout::{self, Results};
use crate::terminal::Terminal;
use crate::text::{hex, size, wrapped};

/// Run a command on a mock machine.
pub(crate) fn run(command: &MockCommand, terminal: &Terminal) -> Result<Code> {
    match command {
        MockCommand::Host(args) => make_host(args, terminal)?,
        MockCommand::Create(args) => create(args, terminal)?,
        MockCommand::List(args) => list(args)?,
        MockCommand::Show(args) => show(args)?,
        MockCommand::Workload(args) => set_workload(args, terminal)?,
        MockCommand::Pause(args) => {
            change(args, "pause", "pausing", |domain| domain.pause(), terminal)?;
        }
        MockCommand::Unpause(args) => {
            let unpause = |domain: &dyn Domain| domain.unpause();
            change(args, "unpause", "unpausing", unpause, terminal)?;
        }
        MockCommand::Resume(args) => {
            let resume = |domain: &dyn Domain| domain.resume();
            change(args, "resume", "resuming", resume, terminal)?;
        }
        MockCommand::Rename(args) => rename(args, terminal)?,
        MockCommand::Destroy(args) => destroy(args, terminal)?,
    }
    Ok(Code::Fine)
}

fn make_host(args: &MockNewHostArgs, terminal: &Terminal) -> Result<()> {
    let processor: Processor =
        (args.cpu.parse()).map_err(|error: BadProcessor| BadUsage(format!("--cpu: {error}")))?;
    let config = HostConfig {
        processor,
        ..HostConfig::default()
    };
    MockHost::create(&args.host.host, &config)?;
    terminal.note(&format!("{} is a mock machine", args.host.host.display()));
    Ok(())
}

fn create(args: &MockCreateArgs, terminal: &Terminal) -> Result<()> {
    let (kind, width) = match args.kind {
        MockKind::Pv => (GuestKind::Pv, 8),
        MockKind::Pv32 => (GuestKind::Pv, 4),
        MockKind::Hvm => (GuestKind::Hvm, 8),
        MockKind::Pvh => (GuestKind::Pvh, 8),
    };
    let kib = args.memory.kib;
    if !kib.is_multiple_of(1 << 10) {
        let why = format!("--memory {kib}K: a mock guest has whole MiB");
        return Err(BadUsage(why).into());
    }
    let spec = GuestSpec {
        width,
        vcpus: args.vcpus,
        seed: args.seed,
        ignores_suspend: args.ignores_suspend,
        ..GuestSpec::new(&args.name, kind, kib >> 10)
    };
    // A signal takes effect while the guest is being filled. An incomplete guest is destroyed.
    let interrupt = Interrupt::of_process()?;
    let working = Left::work();
    let mock = &backend::mock_machine(&args.host.host)?;
    let workload = workload::spec(&args.workload, args.seed);
    let host = Hypervisor::from(mock.clone());
    left::guest::making(&host, &args.name).until_the_end();
    drop(working);
    let cancel = interrupt.cancel().clone();
    mock.stop_making_when(move || cancel.is_cancelled());
    let interrupted = || Error::msg(format!("making {}: interrupted", args.name));
    let domid =
        create_guest(mock, &spec).map_err(|error| match interrupt.cancel().is_cancelled() {
            true => interrupted(),
            false => error,
        })?;
    if let Err(error) = workload::store(&host, domid, workload.as_ref()) {
        return Err(unmade(mock, domid, error));
    }
    if interrupt.cancel().is_cancelled() {
        return Err(unmade(mock, domid, interrupted()));
    }
    made(args, domid, terminal)
}

/// Report the new domain.
fn made(args: &MockCreateArgs, domid: DomId, terminal: &Terminal) -> Result<()> {
    let done = format!("{} is {domid} of {}", args.name, args.host.host.display());
    terminal.note(&done);
    if args.json {
        let document = Done {
            name: &args.name,
            domid,
            state: "running",
        };
        stdout::report(terminal, &done, &document);
    }
    Ok(())
}

/// The `--json` document of a domain that was created or changed (docs/json.md).
#[derive(Debug, Serialize)]
struct Done<'a> {
    name: &'a str,
    domid: DomId,
    /// As in `list`, or `destroyed`.
    state: &'static str,
}

/// Print the domain's new state, if requested.
fn done(json: bool, host: &MockHost, domid: DomId, terminal: &Terminal) -> Result<()> {
    if json {
        let now = host.show(domid)?.summary;
        let document = Done {
            name: &now.name,
            domid,
            state: json_state(now.state),
        };
        stdout::report(terminal, &format!("{} is changed", now.name), &document);
    }
    Ok(())
}

/// As in the JSON of `list`.
fn json_state(state: DomainState) -> &'static str {
    match state {
        DomainState::Shutdown => "shutdown",
        other => self::state(other),
    }
}

/// The guest with its UUID, and a configuration like xl's.
fn whole(spec: &GuestSpec) -> Result<(GuestSpec, String)> {
    let uuid = config::uuid(&spec.name, spec.seed);
    let (vcpus, kib) = (spec.vcpus, spec.memory_mib << 10);
    let json = config::make(&spec.name, &uuid, spec.kind, vcpus, kib);
    let spec = GuestSpec {
        uuid: uuid.parse().context("making a UUID")?,
        ..spec.clone()
    };
    Ok((spec, json))
}

/// Create a guest with a configuration.
pub(crate) fn create_guest(host: &MockHost, spec: &GuestSpec) -> Result<DomId> {
    let name = &spec.name;
    let (spec, json) = whole(spec)?;
    let domid = host
        .create_guest(&spec)
        .with_context(|| format!("making {name}"))?;
    let domain = DomainRef {
        domid,
        uuid: spec.uuid,
    };
    match backend::store_config(host, domain, &json) {
        Ok(()) => Ok(domid),
        Err(error) => Err(unmade(host, domid, error)),
    }
}

/// Destroy a guest because of `error`, which is the one that counts.
fn unmade(host: &MockHost, domid: DomId, error: Error) -> Error {
    match host.domain(domid).and_then(|domain| domain.destroy()) {
        Ok(()) => error,
        Err(gone) if gone.errno == Errno::ESRCH => error,
        Err(left) => Aftermath::of(error, format!("{domid} is left, incomplete: {left}")),
    }
}

/// What `mock list --json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Domains<'a, D> {
    domains: &'a [D],
}

fn list(args: &MockListArgs) -> Result<()> {
    let domains = MockHost::open(&args.host.host)?.list()?;
    let mut out = Results::new();
    if args.json {
        out.json(&Domains { domains: &domains })?;
        return out.finish();
    }
    let width = domains
        .iter()
        .map(|d| d.name.len())
        .max()
        .unwrap_or(0)
        .max(4);
    writeln!(
        out,
        "{:>4}  {:<width$}  {:<4}  {:>10}  {:>5}  state",
        "id", "name", "type", "memory", "vcpus"
    )?;
    for domain in &domains {
        let DomainSummary { name, vcpus, .. } = domain;
        let (id, memory) = (domain.domid.0, memory(domain));
        let (kind, state) = (config::kind_name(domain.kind), state(domain.state));
        writeln!(
            out,
            "{id:>4}  {name:<width$}  {kind:<4}  {memory:>10}  {vcpus:>5}  {state}"
        )?;
    }
    out.finish()
}

fn memory(domain: &DomainSummary) -> String {
    size(domain.tot_pages * PAGE_SIZE as u64)
}

fn state(state: DomainState) -> &'static str {
    match state {
        DomainState::Running => "running",
        DomainState::Paused => "paused",
        DomainState::Suspended => "suspended",
        DomainState::Shutdown => "shut down",
    }
}

fn show(args: &MockShowArgs) -> Result<()> {
    let host = MockHost::open(&args.host.host)?;
    let domid = host.find(&args.domain)?;
    let report = host.show(domid)?;
    let workload = workload::read(host.userdata_get(domid, workload::WORKLOAD)?)?;
    let mut out = Results::new();
    match args.json {
        true => out.json(&report)?,
        false => print(&report, workload.as_ref(), &mut out)?,
    }
    out.finish()
}

fn print(report: &DomainReport, workload: Option<&WorkloadSpec>, out: &mut Results) -> Result<()> {
    let summary = &report.summary;
    let online = report.vcpus_online.iter().filter(|online| **online).count();
    let bits = u32::from(report.width) * 8;
    writeln!(out, "{} ({})", summary.name, summary.domid)?;
    writeln!(
        out,
        "  type     {}, {bits}-bit",
        config::kind_name(summary.kind).to_uppercase()
    )?;
    writeln!(out, "  state    {}", state(summary.state))?;
    writeln!(out, "  vcpus    {}, {online} online", summary.vcpus)?;
    let most = size(report.max_pages * PAGE_SIZE as u64);
    writeln!(out, "  memory   {}, at most {most}", memory(summary))?;
    if let Some(gfn) = report.maximum_gfn {
        writeln!(out, "  last gfn {}", hex(gfn))?;
    }
    let types: Vec<String> = report
        .page_types
        .iter()
        .map(|(name, pages)| format!("{pages} {name}"))
        .collect();
    let pages = wrapped("  pages    ", &types.join(", "), ", ", 11, out.width());
    writeln!(out, "{pages}")?;
    let tsc = report.tsc;
    let (mode, khz, incarnation) = (tsc.mode, tsc.khz, tsc.incarnation);
    writeln!(
        out,
        "  tsc      mode {mode}, {khz} kHz, incarnation {incarnation}"
    )?;
    if let Some(spec) = workload {
        let (rate, memory) = (spec.rate, size(spec.working_set * PAGE_SIZE as u64));
        writeln!(
            out,
            "  writes   {rate} pages a second of {memory}, while it is saved or migrated"
        )?;
    }
    for (key, bytes) in &report.userdata {
        writeln!(out, "  kept     {key}, {bytes} bytes")?;
    }
    Ok(())
}

fn set_workload(args: &MockWorkloadArgs, terminal: &Terminal) -> Result<()> {
    let mock = MockHost::open(&args.host.host)?;
    let (domid, _lock) = lock(&mock, &args.domain, "workload")?;
    // The seed need not be given: a domain's number is as good as any.
    let spec = workload::spec(&args.workload, u64::from(domid.0));
    workload::store(&mock.clone().into(), domid, spec.as_ref())?;
    done(args.json, &mock, domid, terminal)
}

/// Apply one change to one domain, unless a command is working on it. Such a command may have paused
/// or suspended the domain because a copy of it runs on another host.
fn change(
    args: &MockDomainArgs,
    command: &str,
    what: &str,
    change: impl Fn(&dyn Domain) -> Result<(), BackendError>,
    terminal: &Terminal,
) -> Result<()> {
    let host = MockHost::open(&args.host.host)?;
    let (domid, _lock) = lock(&host, &args.domain, command)?;
    let report = host.show(domid)?;
    possible(what, &report).with_context(|| format!("{what} {}", args.domain))?;
    let changed = host.domain(domid).and_then(|domain| change(&*domain));
    changed.with_context(|| {
        let report = host.show(domid).ok();
        let now = report.map(|report| match report.shutdown {
            Some(reason) => format!("shut down ({reason})"),
            None => state(report.summary.state).to_owned(),
        });
        format!(
            "{what} {}, which is {}",
            args.domain,
            now.as_deref().unwrap_or("gone")
        )
    })?;
    done(args.json, &host, domid, terminal)
}

/// Find a domain and lock it against other commands.
fn lock(host: &MockHost, called: &str, command: &str) -> Result<(DomId, DomainLock)> {
    let domid = host.find(called)?;
    let domain = DomainRef::from(&host.domain(domid)?.info()?);
    let lock = host.lock(domain, &format!("xsr mock {command} {called}"))?;
    Ok((domid, lock))
}

/// Refuse a change that the domain's state does not allow, with a better message than an errno.
fn possible(what: &str, report: &DomainReport) -> Result<()> {
    match (what, report.summary.state, report.shutdown) {
        ("resuming", DomainState::Shutdown, Some(reason)) => {
            bail!("it has shut down ({reason}), and cannot run on: destroy it, or make it anew")
        }
        ("resuming", DomainState::Running, _) => {
            bail!("it runs: only a suspended domain is resumed")
        }
        ("resuming", DomainState::Paused, None) => {
            bail!("it is paused, not suspended: unpause it")
        }
        ("unpausing", DomainState::Running, _) => bail!("it is not paused: it runs"),
        _ => Ok(()),
    }
}

fn rename(args: &MockRenameArgs, terminal: &Terminal) -> Result<()> {
    let host = MockHost::open(&args.host.host)?;
    // A command that works on the domain uses its name.
    let (domid, _lock) = lock(&host, &args.domain, "rename")?;
    host.rename(domid, &args.name)?;
    let kept = host.userdata_get(domid, backend::CONFIG)?;
    if let Some(json) = kept.map(String::from_utf8).transpose()? {
        let json = config::renamed(&json, &args.name)?;
        host.userdata_store(domid, backend::CONFIG, json.as_bytes())?;
    }
    done(args.json, &host, domid, terminal)
}

fn destroy(args: &MockDomainArgs, terminal: &Terminal) -> Result<()> {
    let host = MockHost::open(&args.host.host)?;
    let domid = host.find(&args.domain)?;
    let before = host.show(domid).map(|report| report.summary);
    match host.domain(domid).and_then(|domain| domain.destroy()) {
        // Another command has destroyed it first.
        Err(error) if error.errno == Errno::ESRCH => {}
        destroyed => destroyed?,
    }
    let done = format!("{} is gone", args.domain);
    terminal.note(&done);
    if let (true, Ok(before)) = (args.json, before) {
        let document = Done {
            name: &before.name,
            domid,
            state: "destroyed",
        };
        stdout::report(terminal, &done, &document);
    }
    Ok(())
}
