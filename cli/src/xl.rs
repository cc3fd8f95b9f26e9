//! `save`, `restore`, `migrate`, `migrate-receive` and `remus` on a Xen host: they run the host's
//! own `xl`, with `xsr-save-helper` in place of libxl's save helper. Devices, device model and
//! configuration remain the toolstack's.
//!
//! The command line is then xl's, and is passed on unchanged. Options that only xsr has are
//! refused, so that they are not silently ignored.
//!
//! C implementation: `main_save`, `main_restore`, `main_migrate`, `main_migrate_receive`,
//! `main_remus` in `tools/xl`; `LIBXL_SAVE_HELPER` in `tools/libs/light/libxl_save_callout.c`.

pub(crate) mod child;
mod domain;
mod fifo;
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
use clap::{CommandFactory as _, Parser as _};

use self::setting::Setting;
use self::words::Words;
use crate::args::{Backend, Cli, Command, VARIABLE as BACKEND_VARIABLE};
use crate::cmd::save::PAGE_DIGESTS_NEED_MAPPED;
use crate::exit::{BadUsage, Code};
use crate::left::{Left, State};
use crate::pack::Packing;
use crate::transport::{check_through_ssh, quoted};

/// The commands that xl also has.
const COMMANDS: [&str; 5] = ["save", "restore", "migrate", "migrate-receive", "remus"];
/// The variable in which libxl looks for the name of its save helper.
const HELPER_VARIABLE: &str = "LIBXL_SAVE_HELPER";
/// Our helper.
const HELPER: &str = "xsr-save-helper";
/// Devices through which a control domain reaches the hypervisor.
const PRIVCMD: [&str; 2] = ["/dev/xen/privcmd", "/proc/xen/privcmd"];
/// xl's exit code for a wrong command line.
const XL_USAGE: i32 = 2;

/// A command line for xl.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    backend: Backend,
    /// xl's arguments.
    arguments: Vec<OsString>,
    /// Whether a domain is created: by a restore, or at the receiving end of a migration.
    restores: bool,
    /// Options for our helper.
    settings: Vec<Setting>,
    /// Options that xl lacks.
    refused: Vec<String>,
    /// Whether a domain is created even if it has seen CPU features that this host lacks.
    force: bool,
    /// `--live` was given for a save.
    live: bool,
    /// `--page-digests` was given for a save.
    page_digests: bool,
    /// `--compress` and `--encrypt-to` with their values: xl saves into a pipe.
    packing: Vec<(&'static str, OsString)>,
    /// For a command that works on a domain: the positions of the domain and of a save's file.
    words: Option<Words>,
    /// The options of a session, for the tunnel that xl runs in place of ssh.
    tunnel: Vec<OsString>,
    /// The value of `--suspend-timeout`.
    suspend_timeout: Option<OsString>,
    /// Additional verbosity on stderr.
    verbose: u8,
    quiet: bool,
}

/// The terminal settings for a command line that xl runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Messages {
    pub(crate) verbose: u8,
    pub(crate) quiet: bool,
}

/// A command line that xl runs.
#[derive(Debug)]
pub(crate) struct Xl(Call);

impl Xl {
    /// The command line of this process, if xl is to run it: one of xl's commands, on the Xen of
    /// this machine. `None` if xsr runs it itself.
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

    /// The settings for messages.
    pub(crate) fn messages(&self) -> Messages {
        Messages {
            verbose: self.0.verbose,
            quiet: self.0.quiet,
        }
    }

    /// Run xl until it ends. Signals are passed on to it. A request to stop goes to its save helper
    /// instead, so that the guest continues.
    ///
    /// # Errors
    ///
    /// xl or the helper is missing, xl lacks an option; a signal ended xl.
    pub(crate) fn run(self) -> Result<Code> {
        self.0.check_tunnel()?;
        let Call {
            mut arguments,
            settings,
            refused,
            restores,
            force,
            live,
            page_digests,
            packing,
            words,
            suspend_timeout,
            ..
        } = self.0;
        if !refused.is_empty() {
            let mut why = format!(
                "{} is not an option of xl, which does this on a Xen host: drop it, or give \
                 --direct (to work without libxl; see --help)",
                refused.join(", ")
            );
            if restores && refused.iter().any(|option| option == "--name") {
                why.push_str(
                    "; another name is given with: xsr edit --name NAME --uuid UUID FILE -o NEW",
                );
            }
            return Err(Error::new(BadUsage(why)));
        }
        if suspend_timeout.is_some_and(|seconds| seconds != "60") {
            return Err(Error::new(BadUsage(
                "--suspend-timeout: libxl gives a domain 60 s to accept the request and 60 s to \
                 suspend, which cannot be changed: drop it, or give --direct (to work without \
                 libxl; see --help)"
                    .to_owned(),
            )));
        }
        settings.iter().try_for_each(Setting::check)?;
        let saves = words.as_ref().is_some_and(|words| words.command == "save");
        if saves && !live && settings.iter().any(Setting::is_for_live) {
            return Err(Error::new(BadUsage(crate::cmd::save::FOR_LIVE.to_owned())));
        }
        let mapped = settings.iter().any(Setting::is_mapped);
        if page_digests && !mapped {
            return Err(Error::new(BadUsage(PAGE_DIGESTS_NEED_MAPPED.to_owned())));
        }
        let xl = program("xl").context(
            "there is no `xl` on PATH: install Xen's tools (Debian: xen-utils-common), or give \
             --direct (to work without libxl; see --help)",
        )?;
        let helper = helper()?;
        let lock = match &words {
            Some(words) => words.lock(&arguments)?,
            None => None,
        };
        let packing = Packing::of_words(&packing, mapped)?;
        let mut at_freeze = None;
        let target = match &words {
            Some(words) if words.command == "save" => {
                at_freeze = setting::freeze_program(&settings)?;
                let packing = packing.as_ref();
                let is_frozen = at_freeze.is_some();
                save::Target::prepare(&xl, words, &mut arguments, mapped, is_frozen, packing)?
            }
            _ => None,
        };
        tracing::info!(xl = %xl.display(), helper = %helper.display(), ?arguments, "running xl");
        let xl = [xl.into_os_string()].into_iter().chain(arguments);
        let plan = restores.then(|| setting::plan(force)).flatten();
        let flags = [(live, setting::LIVE), (page_digests, setting::PAGE_DIGESTS)];
        let flags = flags.into_iter().filter(|(given, _)| *given);
        let flags = flags.map(|(_, (name, value))| (name, value.into()));
        let settings = settings.into_iter().map(Setting::variable);
        let name = target.as_ref().map(|target| target.path.clone().into());
        let name = name.map(|name| (setting::FINAL_NAME, name));
        let settings = settings.chain(plan).chain(flags).chain(name);
        let give_up = || target.as_ref().map_or((), save::Target::give_up);
        let ended = child::run(xl, &helper, settings, restores, lock.as_ref(), &give_up);
        let succeeded = ended.as_ref().is_ok_and(|ended| ended.status.success());
        let frozen = ended.as_ref().ok().and_then(|ended| ended.frozen.clone());
        let killed = ended.as_ref().is_ok_and(|ended| ended.killed);
        let code = match ended {
            Ok(ended) if ended.killed => {
                child::say_what_is_left();
                Ok(Code::EndedAtOnce)
            }
            ended => ended.and_then(|ended| code_of(ended.status)),
        };
        let mut is_kept = false;
        let untold = frozen
            .as_ref()
            .map(|_| Left::guest(|| Some(State::plain(child::NOT_TOLD))));
        let code = match target {
            Some(target) => target.finish(code, succeeded, &mut is_kept),
            None => code,
        };
        drop((lock, untold));
        if let (Some(mut program), Some(guest)) = (at_freeze, frozen) {
            match killed {
                // The helper may still be at work, and the program with it.
                true => child::say_that_program_was_not_told(),
                false => {
                    program.is_about(guest);
                    program.is_saved = is_kept;
                    let what = "the program of --at-freeze is told how the save ended";
                    child::hear_while(what, || program.tell());
                }
            }
        }
        code
    }
}

/// The meaning of xl's exit status.
fn code_of(status: ExitStatus) -> Result<Code> {
    match status.code() {
        Some(0) => Ok(Code::Fine),
        // xl has printed the reason.
        Some(XL_USAGE) => Ok(Code::Usage),
        Some(_) => Ok(Code::Failed),
        None => bail!("xl was ended: {status}; see `xl list` for what became of the domain"),
    }
}

impl Call {
    /// Parse a command line (without the program's name) as far as xl needs it. `None` if it is not
    /// one of xl's commands, asks for help, or works without xl.
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
            live: false,
            page_digests: false,
            packing: Vec::new(),
            words: Words::of(name),
            tunnel: Vec::new(),
            suspend_timeout: None,
            verbose: 0,
            quiet: false,
        };
        let mut backend = from_environment.map(OsStr::to_os_string);
        // xl's own options, before its command.
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
                "--suspend-timeout" if matches!(name, "save" | "migrate") => {
                    call.suspend_timeout = Some(match value {
                        Some(value) => value.into(),
                        None => rest.next()?.clone(),
                    });
                }
                "--live" if name == "save" && value.is_none() => call.live = true,
                "--page-digests" if name == "save" && value.is_none() => call.page_digests = true,
                "--force" if call.restores => call.force = true,
                "--connections" | "--compress" | "--tls" | "--reconnect" | "--bandwidth"
                    if name == "migrate" =>
                {
                    let value = match value {
                        Some(value) => value.into(),
                        None => rest.next()?.clone(),
                    };
                    call.tunnel.extend([option.into(), value]);
                }
                "--compress" | "--encrypt-to" if name == "save" => {
                    let name = match option {
                        "--compress" => "--compress",
                        _ => "--encrypt-to",
                    };
                    call.packing.push((
                        name,
                        match value {
                            Some(value) => value.into(),
                            None => rest.next()?.clone(),
                        },
                    ));
                }
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
            // If it is invalid, clap reports the error.
            call.backend = backend.to_str()?.parse().ok()?;
        }
        let verbose = (0..call.verbose).map(|_| "-v".into());
        let arguments: Vec<OsString> = (before.into_iter())
            .chain(verbose)
            .chain([name.into()])
            .chain(call.ssh())
            .collect();
        for position in call.words.iter_mut().flat_map(|words| &mut words.positions) {
            *position += arguments.len();
        }
        call.arguments.splice(..0, arguments);
        Some(call)
    }

    /// xl's option for the command in place of ssh, if that is the tunnel.
    fn ssh(&self) -> Vec<OsString> {
        if self.tunnel.is_empty() {
            return Vec::new();
        }
        // xl gives it to sh.
        let own = std::env::current_exe().unwrap_or_else(|_| "xsr".into());
        let words = [own.as_os_str(), "tunnel".as_ref()].into_iter();
        let words = words.chain(self.tunnel.iter().map(OsString::as_os_str));
        let words = words.map(|word| quoted(&word.to_string_lossy()));
        vec!["-s".into(), Vec::from_iter(words).join(" ").into()]
    }

    /// Refuses options of a session that the tunnel would refuse, once xl has started it.
    fn check_tunnel(&self) -> Result<()> {
        if self.tunnel.is_empty() {
            return Ok(());
        }
        let words = ["xsr", "tunnel"].map(OsString::from).into_iter();
        let words = words.chain(self.tunnel.iter().cloned());
        let words = words.chain(["HOST", "COMMAND"].map(OsString::from));
        let parsed = Cli::try_parse_from(words).map_err(|error| {
            let said = error.to_string();
            let why = said.lines().next().unwrap_or_default();
            Error::new(BadUsage(why.trim_start_matches("error: ").to_owned()))
        })?;
        if let Command::Tunnel(args) = &parsed.command {
            check_through_ssh(&args.session)?;
        }
        match &self.words {
            Some(words) if words.names_ssh => Err(Error::new(BadUsage(
                "-s is taken by `xsr tunnel`, which --connections, --compress, --tls, \
                 --reconnect and --bandwidth need: give `-s 'xsr tunnel -s COMMAND ...'` without them"
                    .to_owned(),
            ))),
            _ => Ok(()),
        }
    }

    /// Add an argument for xl.
    fn push(&mut self, argument: &OsStr, may_be_option: bool) {
        if let Some(words) = &mut self.words {
            words.see(argument, self.arguments.len(), may_be_option);
        }
        self.arguments.push(argument.to_owned());
    }

    /// Take an option about verbosity.
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

/// Whether this is a long option that xsr has and xl lacks.
fn is_own(command: &clap::Command, name: &str, option: &str) -> bool {
    let Some(long) = option.strip_prefix("--") else {
        return false;
    };
    // Options that both have.
    let shared: &[&str] = match name {
        "restore" => &["vncviewer", "vncviewer-autopass"],
        "migrate" => &["live", "debug"],
        "migrate-receive" => &["colo", "coloft-script", "userspace-colo-proxy"],
        _ => &[],
    };
    let ours = command.get_arguments().any(|a| a.get_long() == Some(long));
    ours && !shared.contains(&long)
}

/// Whether this machine runs Xen, and this is its control domain.
pub(crate) fn has_xen() -> bool {
    PRIVCMD.iter().any(|path| Path::new(path).exists())
}

/// The path of a program on PATH.
pub(crate) fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let mut places = std::env::split_paths(&path);
    places.find_map(|dir| runnable(dir.join(name)))
}

fn runnable(path: PathBuf) -> Option<PathBuf> {
    let about = fs::metadata(&path).ok()?;
    (about.is_file() && about.permissions().mode() & 0o111 != 0).then_some(path)
}

/// Our save helper: beside this program, or on PATH. The path is absolute, because libxl may run it
/// from another directory.
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
