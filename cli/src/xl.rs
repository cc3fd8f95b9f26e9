//! `save`, `restore`, `migrate`, `migrate-receive` and `remus` on a Xen host: the host's own
//! `xl` does them, with `xsr-save-helper` in the place of libxl's save helper. Devices, device
//! model and configuration stay with the toolstack that owns them.
//!
//! The command line is xl's then, and is passed on as it is; what xsr alone has is
//! refused, so that nobody takes it for done.
//!
//! C implementation: `main_save`, `main_restore`, `main_migrate`, `main_migrate_receive`,
//! `main_remus` in `tools/xl`; `LIBXL_SAVE_HELPER` in `tools/libs/light/libxl_save_callout.c`.

pub(crate) mod child;
mod save;
mod setting;
#[cfg(test)]
mod tests;
mod words;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use anyhow::{Context as _, Error, Result, anyhow, bail};
use clap::CommandFactory as _;

use self::setting::Setting;
use self::words::Words;
use crate::args::{Backend, Cli, VARIABLE as BACKEND_VARIABLE};
use crate::exit::{BadUsage, Code};

/// The commands that xl does, too.
const COMMANDS: [&str; 5] = ["save", "restore", "migrate", "migrate-receive", "remus"];
/// Where libxl looks for the name of its save helper.
const HELPER_VARIABLE: &str = "LIBXL_SAVE_HELPER";
/// Our helper.
const HELPER: &str = "xsr-save-helper";
/// Where a control domain reaches the hypervisor.
const PRIVCMD: [&str; 2] = ["/dev/xen/privcmd", "/proc/xen/privcmd"];
/// What xl exits with when its command line is wrong.
const XL_USAGE: i32 = 2;

/// What a command line asks of xl.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    backend: Backend,
    /// xl's arguments.
    arguments: Vec<OsString>,
    /// Whether a domain is made: it is a restore, or the receiving end of a migration.
    restores: bool,
    /// Options that are for our helper.
    settings: Vec<Setting>,
    /// Options that xl has not.
    refused: Vec<String>,
    /// Whether a domain is made although this host lacks CPU features that it has seen.
    force: bool,
    /// Of a command that works on a domain: what the command line says of it, and of the file
    /// of a save.
    words: Option<Words>,
    /// How much more to say on stderr.
    verbose: u8,
    quiet: bool,
}

/// What to tell the terminal of a command line that xl does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages {
    pub(crate) verbose: u8,
    pub(crate) quiet: bool,
}

/// A command line that is xl's to do.
#[derive(Debug)]
pub(crate) struct Xl(Call);

impl Xl {
    /// Whether xl is to do what this process was started for: one of its commands, on the
    /// Xen that this machine runs. `None` is for the command line of xsr itself.
    pub(crate) fn asked() -> Option<Self> {
        let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
        let from_environment = std::env::var_os(BACKEND_VARIABLE).filter(|name| !name.is_empty());
        let call = Call::of(&arguments, from_environment.as_deref())?;
        let through_xl = match call.backend {
            Backend::Xen => true,
            Backend::Auto => has_xen() && program("xl").is_some(),
            _ => false,
        };
        through_xl.then_some(Self(call))
    }

    /// What it may say.
    pub(crate) fn messages(&self) -> Messages {
        Messages {
            verbose: self.0.verbose,
            quiet: self.0.quiet,
        }
    }

    /// Run xl until it ends. Signals that this process gets are passed on to it; what asks to
    /// stop, to its save helper, so that a guest runs on.
    ///
    /// # Errors
    ///
    /// xl or the helper is not there, an option is none of xl's; a signal ended xl.
    pub(crate) fn run(self) -> Result<Code> {
        let Call {
            mut arguments,
            settings,
            refused,
            restores,
            force,
            words,
            ..
        } = self.0;
        if !refused.is_empty() {
            let mut why = format!(
                "{} is not an option of xl, which does this on a Xen host: drop it, or give \
                 --direct (save and restore without libxl; see --help)",
                refused.join(", ")
            );
            if restores && refused.iter().any(|option| option == "--name") {
                why.push_str(
                    "; another name is given with: xsr edit --name NAME --uuid UUID FILE -o NEW",
                );
            }
            return Err(Error::new(BadUsage(why)));
        }
        settings.iter().try_for_each(Setting::check)?;
        let xl = program("xl").context(
            "there is no `xl` on PATH: install Xen's tools (Debian: xen-utils-common), or give \
             --direct (save and restore without libxl; see --help)",
        )?;
        let helper = helper()?;
        let lock = match &words {
            Some(words) => words.lock(&arguments)?,
            None => None,
        };
        let target = match &words {
            Some(words) if words.command == "save" => save::Target::prepare(words, &mut arguments)?,
            _ => None,
        };
        tracing::info!(xl = %xl.display(), helper = %helper.display(), ?arguments, "running xl");
        let xl = [xl.into_os_string()].into_iter().chain(arguments);
        let plan = restores.then(|| setting::plan(force)).flatten();
        let settings = settings.into_iter().map(Setting::variable).chain(plan);
        let ended = child::run(xl, &helper, settings, restores);
        let succeeded = ended.as_ref().is_ok_and(|ended| ended.status.success());
        let code = match ended {
            Ok(ended) if ended.killed => {
                child::say_what_is_left();
                Ok(Code::EndedAtOnce)
            }
            ended => ended.and_then(|ended| code_of(ended.status)),
        };
        drop(lock);
        match target {
            Some(target) => target.finish(code, succeeded),
            None => code,
        }
    }
}

/// What xl's end means.
fn code_of(status: ExitStatus) -> Result<Code> {
    match status.code() {
        Some(0) => Ok(Code::Fine),
        // xl has said why.
        Some(XL_USAGE) => Ok(Code::Usage),
        Some(_) => Ok(Code::Failed),
        None => bail!("xl was ended: {status}; see `xl list` for what became of the domain"),
    }
}

impl Call {
    /// Read a command line (without the program's name) as far as xl's part in it needs:
    /// `None` where it is no command of xl's, is for help, or works without xl.
    fn of(arguments: &[OsString], from_environment: Option<&OsStr>) -> Option<Self> {
        let command = arguments.iter().position(|a| !is_option(a))?;
        let name = arguments[command].to_str()?;
        if !COMMANDS.contains(&name) {
            return None;
        }
        let cli = Cli::command();
        let own = cli.find_subcommand(name)?;
        let mut call = Self {
            backend: Backend::Auto,
            arguments: Vec::new(),
            settings: Vec::new(),
            refused: Vec::new(),
            restores: matches!(name, "restore" | "migrate-receive"),
            force: false,
            words: Words::of(name),
            verbose: 0,
            quiet: false,
        };
        let mut backend = from_environment.map(OsStr::to_os_string);
        // xl's own options, which stand before its command.
        let mut before = Vec::new();
        for argument in &arguments[..command] {
            match argument.to_str() {
                Some("-h" | "--help" | "-V" | "--version") => return None,
                _ if call.message(argument) => {}
                _ => before.push(argument.clone()),
            }
        }
        let mut rest = arguments[command + 1..].iter();
        while let Some(argument) = rest.next() {
            let text = argument.to_str().unwrap_or_default();
            let (option, value) = match text.split_once('=') {
                Some((option, value)) => (option, Some(value)),
                None => (text, None),
            };
            match option {
                "--" => rest
                    .by_ref()
                    .for_each(|argument| call.push(argument, false)),
                "-h" | "--help" | "--direct" => return None,
                "--backend" => {
                    backend = Some(match value {
                        Some(value) => value.into(),
                        None => rest.next()?.clone(),
                    });
                }
                "--host" => {
                    let mut mock = OsString::from("mock:");
                    mock.push(match value {
                        Some(value) => value.as_ref(),
                        None => rest.next()?.as_os_str(),
                    });
                    backend = Some(mock);
                }
                "--checkpoint" => call.push("-c".as_ref(), true),
                "--paused" => call.push("-p".as_ref(), true),
                "--force" if name == "save" => {
                    if let Some(words) = &mut call.words {
                        words.force = true;
                    }
                }
                "--force" if call.restores => call.force = true,
                _ if call.message(argument) => {}
                _ => match Setting::of(own, option) {
                    Some(setting) => call.settings.push(setting(match value {
                        Some(value) => value.into(),
                        None => rest.next()?.clone(),
                    })),
                    None if is_own(own, name, option) => call.refused.push(option.to_owned()),
                    None => call.push(argument, true),
                },
            }
        }
        if let Some(backend) = backend {
            // What cannot be read is for clap to complain of.
            call.backend = backend.to_str()?.parse().ok()?;
        }
        let verbose = (0..call.verbose).map(|_| "-v".into());
        let arguments: Vec<OsString> = (before.into_iter())
            .chain(verbose)
            .chain([name.into()])
            .collect();
        for position in call.words.iter_mut().flat_map(|words| &mut words.positions) {
            *position += arguments.len();
        }
        call.arguments.splice(..0, arguments);
        Some(call)
    }

    /// An argument that xl gets.
    fn push(&mut self, argument: &OsStr, may_be_option: bool) {
        if let Some(words) = &mut self.words {
            words.see(argument, self.arguments.len(), may_be_option);
        }
        self.arguments.push(argument.to_owned());
    }

    /// Take an option that says how much is to be said.
    fn message(&mut self, argument: &OsStr) -> bool {
        match argument.to_str() {
            Some("-q" | "--quiet") => self.quiet = true,
            Some("--verbose") => self.verbose = self.verbose.saturating_add(1),
            Some(text) => {
                let Some(letters) = text.strip_prefix('-').filter(|v| !v.is_empty()) else {
                    return false;
                };
                if letters.bytes().any(|letter| letter != b'v') {
                    return false;
                }
                let more = u8::try_from(letters.len()).unwrap_or(u8::MAX);
                self.verbose = self.verbose.saturating_add(more);
            }
            None => return false,
        }
        true
    }
}

fn is_option(argument: &OsStr) -> bool {
    argument.as_bytes().first() == Some(&b'-')
}

/// Whether xsr has a long option of this name and xl has not.
fn is_own(command: &clap::Command, name: &str, option: &str) -> bool {
    let Some(long) = option.strip_prefix("--") else {
        return false;
    };
    // What both have.
    let shared: &[&str] = match name {
        "restore" => &["vncviewer", "vncviewer-autopass"],
        "migrate" => &["live", "debug"],
        "migrate-receive" => &["colo", "coloft-script", "userspace-colo-proxy"],
        _ => &[],
    };
    let ours = command.get_arguments().any(|a| a.get_long() == Some(long));
    ours && !shared.contains(&long)
}

/// Whether this machine runs Xen, and this is where it is controlled from.
pub(crate) fn has_xen() -> bool {
    PRIVCMD.iter().any(|path| Path::new(path).exists())
}

/// A program on PATH.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut places = std::env::split_paths(&path);
    places.find_map(|dir| runnable(dir.join(name)))
}

fn runnable(path: PathBuf) -> Option<PathBuf> {
    let about = fs::metadata(&path).ok()?;
    (about.is_file() && about.permissions().mode() & 0o111 != 0).then_some(path)
}

/// Our save helper: beside this program, or on PATH. libxl runs it from wherever it is,
/// so that its name is whole.
fn helper() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding where this program is")?;
    let beside = own.with_file_name(HELPER);
    runnable(beside)
        .or_else(|| program(HELPER).and_then(|path| std::path::absolute(path).ok()))
        .ok_or_else(|| {
            let place = own.parent().unwrap_or(&own).display();
            anyhow!(
                "there is no {HELPER}, neither in {place} nor on PATH: put it beside xsr (in a \
                 checkout: cargo build -p {HELPER})"
            )
        })
}
