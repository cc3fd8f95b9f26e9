//! Running other programs: each command is printed as it could be typed, and a failure is an error
//! that names it.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

use crate::workspace;

/// The program that ends commands that take too long.
const TIMEOUT: &str = "timeout";

/// A program to run, by default in the root of the workspace.
#[derive(Debug)]
pub(crate) struct Invocation {
    command: Command,
}

impl Invocation {
    /// Runs `program`, without input.
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(program);
        command.current_dir(workspace::root()).stdin(Stdio::null());
        Self { command }
    }

    /// Runs `program`, and ends it if it takes longer than `seconds` (with coreutils' `timeout`).
    pub(crate) fn limited(seconds: u32, program: impl AsRef<OsStr>) -> Self {
        Self::new(TIMEOUT)
            .arg("--kill-after=10")
            .arg(seconds.to_string())
            .arg(program)
    }

    /// The exit status in words.
    fn ending(&self, status: ExitStatus) -> String {
        let limited = self.command.get_program() == TIMEOUT;
        match (limited, status.code()) {
            // 137: only SIGKILL ended it.
            (true, Some(124 | 137)) => "took too long, and was ended".to_owned(),
            _ => format!("failed: {status}"),
        }
    }

    /// Runs the cargo that runs this task.
    pub(crate) fn cargo() -> Self {
        Self::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Self {
        self.command.current_dir(dir);
        self
    }

    /// Prints the command and runs it.
    ///
    /// # Errors
    ///
    /// It cannot be started, or it fails.
    pub(crate) fn run(mut self) -> Result<()> {
        eprintln!("$ {self}");
        let status = self
            .command
            .status()
            .with_context(|| format!("cannot start `{self}`"))?;
        if !status.success() {
            bail!("`{self}` {}", self.ending(status));
        }
        Ok(())
    }

    /// Prints the command, runs it and returns what it wrote to stdout.
    ///
    /// # Errors
    ///
    /// It cannot be started, or it fails; the error contains what it wrote to stderr.
    pub(crate) fn capture(mut self) -> Result<String> {
        eprintln!("$ {self}");
        let output = self
            .command
            .output()
            .with_context(|| format!("cannot start `{self}`"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let ending = self.ending(output.status);
            bail!("`{self}` {ending}\n{}", said.trim_end());
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{self}` wrote no UTF-8"))
    }

    /// Whether the command can be started and succeeds; prints nothing.
    pub(crate) fn succeeds(mut self) -> bool {
        self.command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }

    /// Prints the command and returns it, for a caller with needs of its own.
    pub(crate) fn into_command(self) -> Command {
        eprintln!("$ {self}");
        self.command
    }
}

impl fmt::Display for Invocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.command.get_envs() {
            let value = value.map(quoted).unwrap_or_default();
            write!(f, "{}={value} ", name.to_string_lossy())?;
        }
        let program = Path::new(self.command.get_program());
        match std::env::var_os("CARGO").is_some_and(|cargo| cargo == program) {
            true => f.write_str("cargo")?,
            false => f.write_str(&quoted(program.as_os_str()))?,
        }
        for arg in self.command.get_args() {
            write!(f, " {}", quoted(arg))?;
        }
        Ok(())
    }
}

/// Quotes `word` for a shell; paths in the workspace are made relative to its root.
fn quoted(word: &OsStr) -> String {
    let root = workspace::root();
    let relative = Path::new(word).strip_prefix(&root).unwrap_or(word.as_ref());
    let text = match relative.as_os_str().is_empty() {
        true if Path::new(word) == root => ".".into(),
        _ => relative.to_string_lossy(),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn a_command_is_shown_as_it_can_be_typed() {
        let shown = Invocation::new("printf")
            .env("RUSTDOCFLAGS", "-D warnings")
            .arg("it's")
            .arg(workspace::root().join("target/x"))
            .arg("")
            .to_string();
        assert_eq!(
            shown,
            r"RUSTDOCFLAGS='-D warnings' printf 'it'\''s' target/x ''"
        );
    }

    #[test]
    fn a_failure_names_the_command_and_has_what_it_said() {
        let error = Invocation::new("sh")
            .args(["-c", "echo why >&2; exit 3"])
            .capture()
            .unwrap_err()
            .to_string();
        assert!(error.contains("sh -c"), "{error}");
        assert!(error.contains('3') && error.contains("why"), "{error}");
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let said = |command: Invocation| command.run().unwrap_err().to_string();
        let error = said(Invocation::limited(1, "sleep").arg("600"));
        assert!(error.contains("sleep 600` took too long"), "{error}");
        let error = said(Invocation::limited(600, "sh").args(["-c", "exit 3"]));
        assert!(error.contains("failed: exit status: 3"), "{error}");
        assert!(Invocation::limited(600, "true").run().is_ok());
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error() {
        let error = Invocation::new("no-such-program-here").run().unwrap_err();
        assert!(error.to_string().contains("cannot start"), "{error}");
    }
}
