//! `xsr plan`: whether an image or a domain fits on a host, before anything is touched.

mod facts;
mod settings;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Error, Result, bail};
use nix::unistd::gethostname;
use serde::Serialize;
use xsr_format::config::DomainConfig;
use xsr_format::cpu_policy::{self, CpuPolicy};
use xsr_save_restore::plan::{Answer, Check, HostFacts, Needs, plan};
use xsr_xen_backend::GuestKind;

use self::facts::{Document, Named};
use crate::args::{Backend, PlanArgs};
use crate::backend::{self, Hypervisor};
use crate::cmd::restore::survey;
use crate::exit::{BadUsage, Code};
use crate::file::{Input, is_dash};
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::wrapped;
use crate::transport::ended;
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
    let (needs, config) = match Path::new(guest) {
        path if is_dash(path) || path.exists() => of_image(path, args, terminal)?,
        _ => of_domain(&args.backend.backend, guest)?,
    };
    let host = match args.on.as_deref() {
        None => this_host(&args.backend.backend)?,
        Some(on) if Path::new(on).is_file() => facts::read(Path::new(on))?,
        Some(on) => ask(args, on)?,
    };
    let mut checks = plan(&needs, &host.facts);
    checks.extend(config);
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
            format!("mock:{}", directory.display()),
        ),
        Backend::MockXen(directory) => (
            Hypervisor::direct(backend)?,
            format!("mock-xen:{}", directory.display()),
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
    if on.starts_with('-') {
        let why = format!("HOST {on:?} would be an option of {}", args.ssh);
        return Err(Error::new(BadUsage(why)));
    }
    let command = format!("exec {} {on} xsr plan --facts", args.ssh);
    let mut child = child::deaf(&command, false)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting sh")?;
    let from = child.stdout.take().context("the pipe from sh")?;
    let parsed = facts::parse(from);
    let status = child.wait().context("waiting for sh")?;
    match (parsed, status.success()) {
        (Ok(named), true) => Ok(named),
        (Err(error), true) => Err(error).with_context(|| format!("`{command}`")),
        (Err(error), false) if error.to_string().starts_with("the other host has") => {
            Err(error).with_context(|| format!("`{command}`"))
        }
        (_, false) => bail!("`{command}` {}: is xsr installed there?", ended(status)),
    }
}

/// A guest's needs, and what its configuration says.
type Guest = (Needs, Vec<Check>);

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
    let (host, _) =
        open(backend).with_context(|| format!("{called} is no file, so it may be a domain"))?;
    let domain = host.find(called)?;
    let json = backend::config(&*host, domain)?;
    let needs = Needs::of_domain(&*host.domain(domain.domid)?)?;
    guest(needs, json.as_deref(), true)
}

fn guest(mut needs: Needs, json: Option<&str>, moves: bool) -> Result<Guest> {
    let Some(json) = json else {
        return Ok((needs, Vec::new()));
    };
    let config = DomainConfig::parse(json)
        .map_err(|error| Error::msg(format!("the domain's configuration {error}")))?;
    needs.vcpus = needs.vcpus.max(config.vcpus);
    needs.shadow_memory_kib = config.shadow_memory_kib;
    needs.hap = config.hap;
    needs.nested = config.nested;
    Ok((needs, settings::checks(&config, moves)))
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
        writeln!(out, "{guest}: {verdict} on {host}")?;
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
    /// Of them, those that `cpuid` cannot hide.
    not_by_cpuid: Vec<String>,
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
        let policies = hosts.iter().map(|host| host.facts.largest_policy(kind));
        let Some(policies) = policies
            .map(|p| p.cloned())
            .collect::<Option<Vec<CpuPolicy>>>()
        else {
            continue;
        };
        let found = cpu_policy::level(&policies)?;
        let cpuid = (!found.registers().is_empty()).then(|| found.to_string());
        levels.push(KindLevel {
            kind: name,
            hidden: found.hidden.iter().map(ToString::to_string).collect(),
            not_by_cpuid: found.beyond_cpuid().map(|f| f.to_string()).collect(),
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

/// The report as lines that an xl configuration can take: all but the `cpuid` lines are comments.
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
        let Some(cpuid) = &level.cpuid else {
            writeln!(text, "# {kind} guests: nothing to hide")?;
            continue;
        };
        writeln!(text, "# {kind} guests: without {}", level.hidden.join(", "))?;
        if !level.not_by_cpuid.is_empty() {
            let list = level.not_by_cpuid.join(", ");
            writeln!(text, "# cpuid cannot hide {list}: these are in MSRs")?;
        }
        writeln!(text, "{cpuid}")?;
    }
    Ok(text)
}
