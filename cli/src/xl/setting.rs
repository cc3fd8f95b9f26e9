//! Options for our save helper when xl does the work: they are passed in environment variables
//! (docs/toolstacks.md).

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use anyhow::{Error, Result};

use xsr_save_restore::at_freeze::{DEFAULT_LIMIT, Program};
use xsr_save_restore::progress::Cancel;

use super::COMMANDS;
use crate::cmd::save::{LIMIT_NEEDS_AT_FREEZE, freeze_program as freeze_program_at};
use crate::exit::BadUsage;

/// The helper's settings, which xl and libxl do not know: our option, the variable, and the
/// commands that have it.
const SETTINGS: [(&str, &str, &[&str]); 7] = [
    ("threads", "XSR_THREADS", &COMMANDS),
    ("max-downtime", "XSR_MAX_DOWNTIME", &["migrate", "save"]),
    ("timeout", "XSR_TIMEOUT", &["migrate", "save"]),
    ("on-timeout", "XSR_ON_TIMEOUT", &["migrate", "save"]),
    ("layout", LAYOUT, &["save"]),
    ("at-freeze", AT_FREEZE, &["save"]),
    ("at-freeze-limit", AT_FREEZE_LIMIT, &["save"]),
];

/// Tells our helper the final name of the file that xl writes.
pub(super) const FINAL_NAME: &str = "XSR_HELPER_FILE";

/// The program to run while the domain is suspended.
const AT_FREEZE: &str = "XSR_AT_FREEZE";
/// The seconds after which it is killed.
const AT_FREEZE_LIMIT: &str = "XSR_AT_FREEZE_LIMIT";

/// Where page data lies in the file of a save.
const LAYOUT: &str = "XSR_LAYOUT";

/// Has our helper add the digest of each page to a mapped image.
pub(super) const PAGE_DIGESTS: (&str, &str) = ("XSR_PAGE_DIGESTS", "1");

/// Whether our helper restores a guest that has seen CPU features which this host lacks. By default
/// it only warns.
const PLAN: &str = "XSR_PLAN";

/// Has our helper save a domain while it runs: `xl save` has no option for that.
pub(super) const LIVE: (&str, &str) = ("XSR_LIVE", "1");

/// The variable for a domain that is created here, and its value; `None` if the user has set it.
pub(super) fn plan(force: bool) -> Option<(&'static str, OsString)> {
    match (force, std::env::var_os(PLAN)) {
        (true, _) => Some((PLAN, "warn".into())),
        (false, None) => Some((PLAN, "refuse".into())),
        (false, Some(_)) => None,
    }
}

/// The program to run while the domain is suspended, from these settings or the environment.
///
/// # Errors
///
/// [`BadUsage`]: another user could replace it; there is a limit without a program.
pub(super) fn freeze_program(settings: &[Setting]) -> Result<Option<Program>> {
    let given = |name| {
        let setting = settings.iter().rfind(|setting| setting.variable == name);
        setting.map(|setting| setting.value.clone())
    };
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let Some(path) = given(AT_FREEZE).or_else(|| set(AT_FREEZE)) else {
        return match given(AT_FREEZE_LIMIT) {
            None => Ok(None),
            Some(_) => Err(Error::new(BadUsage(LIMIT_NEEDS_AT_FREEZE.to_owned()))),
        };
    };
    // The helper, which checks its own, complains of another one.
    let limit = given(AT_FREEZE_LIMIT).or_else(|| set(AT_FREEZE_LIMIT));
    let seconds = limit.and_then(|limit| limit.to_str()?.parse().ok());
    let limit = seconds.map_or(DEFAULT_LIMIT, Duration::from_secs);
    freeze_program_at(Path::new(&path), limit, Cancel::new()).map(Some)
}

/// A setting of one command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// clap's definition of the option.
    option: clap::Arg,
    variable: &'static str,
    value: OsString,
}

impl Setting {
    /// If `option` of `command` is a setting, returns a function that makes it from a value.
    pub(super) fn of(
        command: &clap::Command,
        option: &str,
    ) -> Option<impl FnOnce(OsString) -> Self + use<>> {
        let name = option.strip_prefix("--")?;
        let own = |(setting, _, of): &&(&str, _, &[&str])| {
            *setting == name && of.contains(&command.get_name())
        };
        let (_, variable, _) = SETTINGS.iter().find(own)?;
        let mut options = command.get_arguments();
        let option = options.find(|a| a.get_long() == Some(name))?.clone();
        Some(|value| Self {
            option,
            variable,
            value,
        })
    }

    /// Whether it is about the passes of a live save.
    pub(super) fn is_for_live(&self) -> bool {
        ["XSR_MAX_DOWNTIME", "XSR_TIMEOUT", "XSR_ON_TIMEOUT"].contains(&self.variable)
    }

    /// Whether it asks for the mapped layout.
    pub(super) fn is_mapped(&self) -> bool {
        self.variable == LAYOUT && self.value == "mapped"
    }

    /// The variable and its value.
    pub(super) fn variable(self) -> (&'static str, OsString) {
        (self.variable, self.value)
    }

    /// Checks the value.
    ///
    /// # Errors
    ///
    /// clap's message.
    pub(super) fn check(&self) -> Result<()> {
        let mut option = OsString::from("--");
        option.push(self.option.get_long().unwrap_or_default());
        option.push("=");
        option.push(&self.value);
        let command = clap::Command::new("xsr").arg(self.option.clone());
        match command.try_get_matches_from([OsString::from("xsr"), option]) {
            Ok(_) => Ok(()),
            Err(error) => {
                let text = error.render().to_string();
                // Only the error and its hint: the usage is xl's here.
                let lines = text.lines().map(str::trim);
                let lines: Vec<&str> = lines.take_while(|line| !line.is_empty()).collect();
                let why = lines.join(" ");
                let why = why.strip_prefix("error: ").unwrap_or(&why);
                Err(Error::new(BadUsage(why.to_owned())))
            }
        }
    }
}
