//! `xsr resume`: lets a domain run on that a save or migration left suspended.
//!
//! C implementation: `main_resume` in `tools/xl/xl_vmcontrol.c`, `libxl_domain_resume` in
//! `tools/libs/light/libxl_domain.c`.

use anyhow::{Context as _, Error, Result, bail};
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack as _};
use xsr_xen_backend::GuestKind;

use crate::args::{Backend, ResumeArgs};
use crate::backend::{Found, Hypervisor, domain_command};
use crate::cmd::migrate::MIGRATED_AWAY_SUFFIX;
use crate::cmd::restore::INCOMING;
use crate::condition::Condition;
use crate::exit::{BadUsage, Code};
use crate::terminal::Terminal;

/// Resumes a domain.
///
/// A domain that another command works on, whose name says that it may run on another host, or that
/// is not suspended is refused, and is unchanged. A domain that Remus protects keeps its name: if
/// `remus` was killed, only the user can know that the other host does not run it.
pub(crate) fn run(args: &ResumeArgs, terminal: &Terminal) -> Result<Code> {
    let backend = &args.backend.backend;
    if !args.direct && matches!(backend, Backend::Auto | Backend::Xen) {
        let why = "on a Xen host this command works without libxl: give --direct (PV and PVH), or \
                   use `xl resume` (Xen 4.20 and newer)";
        return Err(Error::new(BadUsage(why.to_owned())));
    }
    let host = Hypervisor::open(backend, args.direct)?;
    let found = Found::find(&host, &args.domain, "resume")?;
    let name = &found.name;
    resume(args, &host, &found).with_context(|| format!("resuming {name}"))?;
    let now = Condition::in_store(&*host, found.domain);
    terminal.note(&now.after_failure(name, backend));
    Ok(Code::Fine)
}

fn resume(args: &ResumeArgs, host: &Hypervisor, found: &Found) -> Result<()> {
    let (name, backend) = (&found.name, &args.backend.backend);
    let command = |verb: &str, rest: &str| domain_command(backend, verb, rest);
    if args.direct && host.check(found.domain)?.kind == GuestKind::Hvm {
        bail!(
            "it has a device model, which only libxl resumes: `xl resume {name}` (Xen 4.20 and \
             newer)"
        );
    }
    if let Some(own) = name.strip_suffix(MIGRATED_AWAY_SUFFIX) {
        bail!(
            "another host has been told to run it, and may: look there first. If {own} is there, \
             `{}`. If not, `{}` && `{}`",
            command("destroy", name),
            command("rename", &format!("{name} {own}")),
            command("resume", own)
        );
    }
    if name.ends_with(INCOMING) {
        bail!("it is a copy of a domain that another host sends, and may run there");
    }
    match Condition::in_store(&**host, found.domain) {
        Condition::Suspended => {}
        Condition::Runs => bail!("it runs: only a suspended domain is resumed"),
        Condition::Paused => bail!(
            "it is paused, not suspended: `{}`",
            command("unpause", &found.handle)
        ),
        Condition::Down(reason) => bail!(
            "it has shut down ({reason}), and cannot run on: start it anew, or destroy what is \
             left of it: `{}`",
            command("destroy", &found.handle)
        ),
        Condition::Gone => bail!("it has been destroyed"),
        Condition::Unknown(error) => return Err(error.into()),
    }
    let domain = host.open(found.domain)?;
    Ok(DirectToolstack(&*domain).resume()?)
}
