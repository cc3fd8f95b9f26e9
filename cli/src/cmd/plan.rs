//! `xsr plan`: whether an image or a domain fits on a host, before anything is touched.

mod facts;
mod settings;

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Error, Result, bail, ensure};
use nix::unistd::gethostname;
use serde::Serialize;
use xsr_format::config::DomainConfig;
use xsr_format::cpu_policy::{self, CpuPolicy};
use xsr_save_restore::plan::{Answer, Check, HostFacts, Needs, Subject, plan};
use xsr_xen_backend::GuestKind;

use self::facts::{Document, Named};
use crate::args::{Backend, PlanArgs};
use crate::backend::{self, Hypervisor};
use crate::cmd::restore::survey;
use crate::cmd::save::least_bytes;
use crate::exit::{BadUsage, Code};
use crate::file::{Input, is_dash};
use crate::output::Room;
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::{shown, shown_path, size, wrapped};
use crate::transport::{ended, option_of};
use crate::verdict;
use crate::xl::child;

/// Checks, prints facts, or compares hosts.
pub(crate) fn run(args: &PlanArgs, terminal: &Terminal) -> Result<Code> {
    if !args.level.is_empty() {
        return level(args);
    }
    let Some(guest) = &args.guest else {
        let named = this_host(&args.backend.backend)?;
        let mut out = Results::new();
        out.json(&Document::new(named.name, &named.facts))?;
        out.finish()?;
        return Ok(Code::Fine);
    };
    // The guest first: a host that is far away is asked only for one that exists.
    let planned = match Path::new(guest) {
        path if path.is_dir() => of_domain(&args.backend.backend, guest)
            .with_context(|| format!("{} is a directory, not an image", shown_path(path)))?,
        path if is_dash(path) || path.exists() => of_image(path, args, terminal)?,
        path => of_domain(&args.backend.backend, guest)
            .with_context(|| format!("there is no file {}", shown_path(path)))?,
    };
    let host = match args.on.as_deref() {
        None => {
            let mut host = this_host(&args.backend.backend)?;
            if planned.is_domain {
                // It does not come back beside itself.
                let free = &mut host.facts.physinfo.free_pages;
                *free = free.saturating_add(planned.needs.pages + planned.needs.overhead_pages());
            }
            host
        }
        Some(on) => match Path::new(on) {
            // The name of a host has no slash.
            path if on.contains('/') || path.exists() && !path.is_dir() => facts::read(path)?,
            _ => ask(args, on)?,
        },
    };
    let mut checks = plan(&planned.needs, &host.facts);
    checks.extend(space(args, &planned)?);
    if let Some(config) = &planned.config {
        // A mock guest has no disks.
        if !matches!(args.backend.backend, Backend::Mock(_)) {
            checks.extend(settings::disks(config, args.on.is_none()));
        }
        checks.extend(settings::checks(config, planned.is_domain));
    }
    report(args, guest, &host.name, &checks)
}

/// The facts of the host that this runs on.
fn this_host(backend: &Backend) -> Result<Named> {
    let (host, name) = open(backend)?;
    Ok(Named {
        name,
        facts: HostFacts::of(&*host)?,
    })
}

/// The hypervisor, and its host's name.
fn open(backend: &Backend) -> Result<(Hypervisor, String)> {
    Ok(match backend {
        Backend::Mock(directory) => (
            Hypervisor::open(backend, false)?,
            format!("mock:{}", shown_path(directory)),
        ),
        Backend::MockXen(directory) => (
            Hypervisor::direct(backend)?,
            format!("mock-xen:{}", shown_path(directory)),
        ),
        Backend::Auto | Backend::Xen => {
            let name = gethostname().context("this host's name")?;
            let name = name.to_string_lossy().into_owned();
            (Hypervisor::direct(backend)?, name)
        }
    })
}

/// The facts of another host, by running this command there.
fn ask(args: &PlanArgs, on: &str) -> Result<Named> {
    if on.is_empty() {
        return Err(Error::new(BadUsage("--on: expected a host".to_owned())));
    }
    if on.starts_with('-') {
        return Err(option_of(on, &args.ssh));
    }
    let command = format!("exec {} {on} xsr plan --facts", args.ssh);
    // Unlike in a migration, nothing has to end in a certain order: the key that ends this command
    // ends ssh, too.
    let mut child = child::plain(&command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting sh")?;
    let from = child.stdout.take().context("the pipe from sh")?;
    let text = facts::text_of(from);
    if text.is_err() {
        // It may go on writing.
        child.kill().context("ending sh")?;
    }
    let status = child.wait().context("waiting for sh")?;
    let words = || match status.success() {
        true => format!("`{command}`"),
        false => format!("`{command}` {}", ended(status)),
    };
    let text = text.with_context(|| format!("`{command}`"))?;
    if text.is_empty() && !status.success() {
        bail!("{}: is xsr installed there?", words());
    }
    let named = facts::parse(&text).with_context(words)?;
    ensure!(status.success(), "{}, after it had printed facts", words());
    Ok(named)
}

/// A guest that is to come to a host.
#[derive(Debug)]
struct Guest {
    needs: Needs,
    /// Its configuration, if it has one.
    config: Option<DomainConfig>,
    /// Whether it is a domain, not an image.
    is_domain: bool,
}

fn of_image(path: &Path, args: &PlanArgs, terminal: &Terminal) -> Result<Guest> {
    let input = Input::open(path, args.lenient)?;
    let _bar = input.follow(terminal, "reading");
    let survey = survey::of(&input, args.lenient)?;
    let json = match &survey.xl {
        Some(header) => verdict::config_of(header)?.map(|(json, _)| json.to_owned()),
        None => None,
    };
    let kind = match (&json, input.origin().and_then(|origin| origin.kind)) {
        (Some(json), _) => crate::config::Config::parse(json)?.kind,
        (None, Some(kind)) => kind,
        (None, None) => survey::kind(&survey)?,
    };
    let words = verdict::check_headers(survey.image, survey.domain, Some(kind));
    words.with_context(|| input.name.clone())?;
    input.finish(survey.bytes)?;
    guest(Needs::of_image(&survey, kind), json.as_deref(), false)
}

fn of_domain(backend: &Backend, called: &str) -> Result<Guest> {
    let (host, _) = open(backend)?;
    let domain = host.find(called)?;
    let json = backend::config(&*host, domain)?;
    let needs = Needs::of_domain(&*host.domain(domain.domid)?)?;
    guest(needs, json.as_deref(), true)
}

fn guest(mut needs: Needs, json: Option<&str>, is_domain: bool) -> Result<Guest> {
    let config = json.map(DomainConfig::parse).transpose();
    let config =
        config.map_err(|error| Error::msg(format!("the domain's configuration {error}")))?;
    if let Some(config) = &config {
        needs.vcpus = needs.vcpus.max(config.vcpus);
        needs.shadow_memory_kib = config.shadow_memory_kib;
        needs.hap = config.hap;
        needs.nested = config.nested;
    }
    Ok(Guest {
        needs,
        config,
        is_domain,
    })
}

/// Whether an image of the domain fits where `--save-to` puts it.
fn space(args: &PlanArgs, planned: &Guest) -> Result<Option<Check>> {
    let Some(path) = &args.save_to else {
        return Ok(None);
    };
    if !planned.is_domain {
        let why = "--save-to is for a domain, which has no image yet".to_owned();
        return Err(Error::new(BadUsage(why)));
    }
    let directory = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => path,
    };
    let name = shown_path(directory);
    let opened = File::open(directory).with_context(|| format!("cannot open {name}"))?;
    let least = least_bytes(planned.needs.pages);
    let needed = format!("the image will have {} at least", size(least));
    let (answer, text) = match Room::of(&opened) {
        None => (
            Answer::Unknown,
            format!("{needed}; the free space of {name} is not known"),
        ),
        Some(room) => {
            let answer = match (room.free < least, room.is_exact) {
                (false, _) => Answer::Yes,
                // It may compress or share what is written.
                (true, false) => Answer::Warning,
                (true, true) => Answer::No,
            };
            (
                answer,
                format!("{needed}; {name} has {} free", size(room.free)),
            )
        }
    };
    Ok(Some(Check::new(Subject::Space, answer, text)))
}

/// The result, as JSON.
#[derive(Debug, Serialize)]
struct Report<'a> {
    guest: &'a str,
    host: &'a str,
    fits: bool,
    checks: Vec<Line<'a>>,
}

#[derive(Debug, Serialize)]
struct Line<'a> {
    check: &'static str,
    answer: &'static str,
    text: &'a str,
    /// For the CPU: what is missing, by name, all of it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    missing: Vec<String>,
}

impl<'a> Line<'a> {
    fn of(check: &'a Check) -> Self {
        Self {
            check: check.subject.name(),
            answer: check.answer.name(),
            text: &check.text,
            missing: check.missing.iter().map(ToString::to_string).collect(),
        }
    }
}

fn report(args: &PlanArgs, guest: &str, host: &str, checks: &[Check]) -> Result<Code> {
    let fits = checks.iter().all(|check| check.answer != Answer::No);
    let mut out = Results::new();
    if args.json {
        out.json(&Report {
            guest,
            host,
            fits,
            checks: checks.iter().map(Line::of).collect(),
        })?;
    } else {
        let verdict = if fits { "fits" } else { "DOES NOT FIT" };
        writeln!(out, "{}: {verdict} on {host}", shown(guest))?;
        for check in checks {
            let (subject, answer) = (check.subject.name(), check.answer);
            let head = format!("  {subject:<8}{answer:<9}");
            writeln!(out, "{}", wrapped(&head, &check.text, " ", head.len(), 80))?;
        }
    }
    out.finish()?;
    Ok(match fits {
        true => Code::Fine,
        false => Code::Failed,
    })
}

/// What several hosts have in common, as JSON.
#[derive(Debug, Serialize)]
struct LevelReport {
    hosts: Vec<String>,
    /// For guests of each kind that all hosts run.
    levels: Vec<KindLevel>,
}

#[derive(Debug, Serialize)]
struct KindLevel {
    /// `pv`, or `hvm` for PVH, too.
    kind: &'static str,
    hidden: Vec<String>,
    /// What `cpuid` cannot hide: features in MSRs, and state that no known feature controls.
    not_by_cpuid: Vec<String>,
    /// The version of performance monitoring that all have, if they have several.
    #[serde(skip_serializing_if = "Option::is_none")]
    performance_monitoring: Option<u8>,
    /// The line for an xl configuration; `None` if nothing has to be hidden.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpuid: Option<String>,
}

fn level(args: &PlanArgs) -> Result<Code> {
    let hosts: Vec<Named> = args
        .level
        .iter()
        .map(|path| facts::read(path))
        .collect::<Result<_>>()?;
    let mut levels = Vec::new();
    for (name, kind) in [("pv", GuestKind::Pv), ("hvm", GuestKind::Hvm)] {
        let policies = hosts
            .iter()
            .map(|host| host.facts.largest_policy(kind, true, true));
        let Some(policies) = policies.collect::<Option<Vec<CpuPolicy>>>() else {
            continue;
        };
        let found = cpu_policy::level(&policies)?;
        let cpuid = (!found.registers().is_empty()).then(|| found.to_string());
        levels.push(KindLevel {
            kind: name,
            hidden: found.hidden.iter().map(ToString::to_string).collect(),
            not_by_cpuid: found.beyond_cpuid(),
            performance_monitoring: found.monitoring,
            cpuid,
        });
    }
    let hosts = hosts.into_iter().map(|host| host.name).collect();
    let report = LevelReport { hosts, levels };
    let mut out = Results::new();
    if args.json {
        out.json(&report)?;
    } else {
        out.write_all(in_words(&report)?.as_bytes())?;
    }
    out.finish()?;
    Ok(Code::Fine)
}

/// The report as lines for an xl configuration: all are comments, except the `cpuid` lines.
fn in_words(report: &LevelReport) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "# common to {}", report.hosts.join(", "))?;
    if report.levels.is_empty() {
        writeln!(text, "# no kind of guest runs on all of them")?;
    }
    for level in &report.levels {
        let kind = match level.kind {
            "pv" => "PV",
            _ => "HVM and PVH",
        };
        if level.cpuid.is_none() && level.not_by_cpuid.is_empty() {
            writeln!(text, "# {kind} guests: nothing to hide")?;
            continue;
        }
        if !level.hidden.is_empty() {
            writeln!(text, "# {kind} guests: without {}", level.hidden.join(", "))?;
        }
        if let Some(version) = level.performance_monitoring {
            writeln!(
                text,
                "# {kind} guests: performance monitoring version {version}"
            )?;
        }
        if !level.not_by_cpuid.is_empty() {
            let list = level.not_by_cpuid.join(", ");
            writeln!(text, "# {kind} guests: cpuid cannot hide {list}")?;
        }
        if let Some(cpuid) = &level.cpuid {
            writeln!(text, "{cpuid}")?;
        }
    }
    Ok(text)
}
