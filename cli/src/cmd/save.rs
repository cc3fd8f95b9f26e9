//! `xsr save`: what `xl save` does. A domain is suspended and written to an image;
//! then it is gone, or runs on.
//!
//! C implementation: `save_domain` in `tools/xl/xl_saverestore.c`.

use std::fs::File;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;
use xsr_format::wrapper::libxl::{LibxlRecord, LibxlWriter};
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::progress::OnProgress;
use xsr_save_restore::sink::FdSink;
use xsr_save_restore::toolstack::DirectToolstack;
use xsr_save_restore::{SaveOptions, Saved};
use xsr_xen_backend::mock::MockHost;
use xsr_xen_backend::{DomId, Domain, Host};

use crate::args::SaveArgs;
use crate::backend::{self, LIBXL_HEADER};
use crate::config;
use crate::exit::{BadUsage, Code};
use crate::file::Output;
use crate::interrupt::Interrupt;
use crate::stdout::Results;
use crate::terminal::Terminal;
use crate::text::size;

/// What `--json` prints (docs/json.md).
#[derive(Debug, Serialize)]
struct Report<'a> {
    name: &'a str,
    domid: DomId,
    /// `destroyed`, `running` or `paused`.
    domain: &'static str,
    file: String,
    pages: u64,
    page_data_octets: u64,
    seconds: f64,
}

/// Save a domain.
///
/// Until the image is complete and has its name, whatever fails leaves the domain
/// running and no file. After that, a failure is reported, and the image stays.
pub(crate) fn run(args: &SaveArgs, terminal: &Terminal) -> Result<Code> {
    if args.json && args.file.as_os_str() == "-" {
        let why = "--json and the image would both go to stdout: give a file";
        return Err(anyhow::Error::new(BadUsage(why.to_owned())));
    }
    let interrupt = Interrupt::catch()?;
    let started = Instant::now();
    let host = backend::open(&args.backend.backend)?;
    let domid = host.find(&args.domain)?;
    let name = name_of(&host, domid);
    let domain = host.domain(domid)?;
    let output = Output::create(&args.file)?;
    let bar = terminal.progress("saving");
    let mut toolstack = DirectToolstack(&*domain);
    let saved = write_image(
        &host,
        domid,
        &*domain,
        &mut toolstack,
        output.file(),
        &mut |progress| {
            bar.show(
                progress.pages_done,
                progress.pages_total.unwrap_or(0),
                progress.octets,
            );
            interrupt.check()
        },
    )
    .with_context(|| format!("saving {name}"))?;
    drop(bar);
    output.finish()?;
    let stats = saved.stats();
    let fate = match (args.paused, args.checkpoint) {
        (true, _) => {
            domain.pause().context("pausing the domain")?;
            saved.resume()?;
            "paused"
        }
        (false, true) => {
            saved.resume()?;
            "running"
        }
        (false, false) => {
            saved.keep_suspended();
            domain
                .destroy()
                .with_context(|| format!("the image is complete, but {name} is still there"))?;
            "destroyed"
        }
    };
    let elapsed = started.elapsed();
    let octets = stats.pages * 4096;
    let file = args.file.display().to_string();
    terminal.note(&format!(
        "{name} saved to {file}: {} of memory in {:.1} s; the domain is {fate}",
        size(octets),
        elapsed.as_secs_f64()
    ));
    if args.json {
        let mut out = Results::new();
        out.json(&Report {
            name: &name,
            domid,
            domain: fate,
            file,
            pages: stats.pages,
            page_data_octets: octets,
            seconds: elapsed.as_secs_f64(),
        })?;
        out.finish()?;
    }
    Ok(Code::Fine)
}

/// Write what xl writes: its header with the configuration, the libxl stream, the
/// libxc stream inside, the emulators' records. The domain is suspended afterwards,
/// and runs on when the answer is dropped.
pub(crate) fn write_image<'a>(
    host: &MockHost,
    domid: DomId,
    domain: &dyn Domain,
    toolstack: &'a mut DirectToolstack<'_>,
    file: &File,
    progress: &mut OnProgress<'_>,
) -> Result<Saved<'a>> {
    let json = match backend::config(host, domid)? {
        Some(json) => json,
        None => made_up_config(host, domid, domain)?,
    };
    let emulators = backend::emulators(host, domid)?;
    let mut sink = FdSink::new(file);
    XlHeader::new(&json)?.write(&mut sink)?;
    let mut libxl = LibxlWriter::new(sink, LIBXL_HEADER)?;
    libxl.write(&LibxlRecord::LibxcContext)?;
    let saved = xsr_save_restore::save(
        domain,
        host.xen_version()?,
        toolstack,
        libxl.sink_mut(),
        &SaveOptions::default(),
        progress,
    )?;
    for record in &emulators {
        libxl.write(record)?;
    }
    libxl.write(&LibxlRecord::End)?;
    Ok(saved)
}

/// A configuration for a domain that has none.
fn made_up_config(host: &MockHost, domid: DomId, domain: &dyn Domain) -> Result<String> {
    let info = domain.info()?;
    let name = name_of(host, domid);
    let vcpus = info.max_vcpu_id + 1;
    let kib = info.tot_pages * 4;
    Ok(config::make(
        &name,
        &config::uuid(&name, 0),
        info.kind,
        vcpus,
        kib,
    ))
}

/// The name of a domain.
pub(crate) fn name_of(host: &MockHost, domid: DomId) -> String {
    let domains = host.list();
    let found = domains.into_iter().find(|domain| domain.domid == domid);
    found.map_or_else(|| domid.to_string(), |domain| domain.name)
}
