//! Settings from environment variables, for what libxl cannot pass on. The user may set them for
//! the toolstack; on a Xen host `xsr migrate` sets them for its options.

use std::env::{self, VarError};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use xsr_save_restore::CpuCheck;
use xsr_save_restore::at_freeze::{DEFAULT_LIMIT, MAX_LIMIT_SECONDS};
use xsr_save_restore::save::mapped::MappedOptions;
use xsr_save_restore::save::precopy::{OnTimeout, PrecopyPolicy, TargetPolicy, XenPolicy};

/// The number of worker threads. Default: the number of processors.
const THREADS: &str = "XSR_THREADS";
/// During a live save, suspend the domain once the rest can be sent in this many milliseconds.
const MAX_DOWNTIME: &str = "XSR_MAX_DOWNTIME";
/// Start no further pass after this many seconds.
const TIMEOUT: &str = "XSR_TIMEOUT";
/// What to do after `XSR_TIMEOUT`: `stop-copy` or `cancel`.
const ON_TIMEOUT: &str = "XSR_ON_TIMEOUT";
/// Save while the domain runs although libxl does not ask for that (`xl save`): `1`.
const LIVE: &str = "XSR_LIVE";
/// Where page data lies in the file of a save: `stream` or `mapped` (docs/mapped.md).
const LAYOUT: &str = "XSR_LAYOUT";
/// Whether a mapped image contains the digest of each page: `1`.
const PAGE_DIGESTS: &str = "XSR_PAGE_DIGESTS";

/// The program to run while the domain is suspended: an absolute path (docs/checkpoint.md).
const AT_FREEZE: &str = "XSR_AT_FREEZE";
/// The seconds after which it is killed.
const AT_FREEZE_LIMIT: &str = "XSR_AT_FREEZE_LIMIT";
/// Set by `xsr save`, which gives the image its final name: that name, an absolute path.
const FINAL_NAME: &str = "XSR_HELPER_FILE";
/// Names the file to write when the program of `XSR_AT_FREEZE` is run. `xsr save` sets it, and tells
/// the program how the save ended (`cli/src/xl/child.rs`).
const FROZEN: &str = "XSR_HELPER_FROZEN";

/// What to do if the guest has seen CPU features that this host lacks: `warn` or `refuse`.
const PLAN: &str = "XSR_PLAN";

/// The value of a variable, if it is set.
fn variable(name: &'static str) -> Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(VarError::NotPresent) => Ok(None),
        Err(error) => Err(anyhow!("{name}: {error}")),
    }
}

/// The value of a variable that is a number of `what`.
fn number<T: FromStr>(name: &'static str, what: &str) -> Result<Option<T>> {
    let Some(value) = variable(name)? else {
        return Ok(None);
    };
    match value.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(anyhow!("{name} is {value:?}, expected a number of {what}")),
    }
}

/// The number of worker threads, if it is set.
pub(crate) fn threads() -> Result<Option<NonZeroUsize>> {
    number(THREADS, "threads")
}

/// Whether to restore a guest that has seen CPU features which this host lacks. By default it is
/// restored with a warning in libxl's log, as by libxl's own helper.
pub(crate) fn cpu_check() -> Result<CpuCheck> {
    match variable(PLAN)?.as_deref() {
        None | Some("warn") => Ok(CpuCheck::Warn),
        Some("refuse") => Ok(CpuCheck::Refuse),
        Some(other) => bail!("{PLAN} is {other:?}, expected warn or refuse"),
    }
}

/// The value of a variable that is 0 or 1.
fn flag(name: &'static str) -> Result<bool> {
    match variable(name)?.as_deref() {
        None | Some("0") => Ok(false),
        Some("1") => Ok(true),
        Some(other) => bail!("{name} is {other:?}, expected 0 or 1"),
    }
}

/// The program to run while the domain is suspended.
#[derive(Debug)]
pub(crate) struct AtFreeze {
    pub(crate) path: PathBuf,
    pub(crate) limit: Duration,
    /// The final name of the image, if the file gets another one.
    pub(crate) file: Option<PathBuf>,
    /// If another process tells the program how the save ended: the file by which that knows that
    /// the program has been run.
    pub(crate) frozen: Option<PathBuf>,
}

/// The program to run while the domain is suspended, if it is set.
pub(crate) fn at_freeze() -> Result<Option<AtFreeze>> {
    let limit = match number::<u32>(AT_FREEZE_LIMIT, "seconds")? {
        None => DEFAULT_LIMIT,
        Some(seconds @ 1..=MAX_LIMIT_SECONDS) => Duration::from_secs(seconds.into()),
        Some(other) => {
            bail!("{AT_FREEZE_LIMIT} is {other}, expected 1 to {MAX_LIMIT_SECONDS} seconds")
        }
    };
    let path = |name| env::var_os(name).map(PathBuf::from);
    let program = path(AT_FREEZE).filter(|path| !path.as_os_str().is_empty());
    Ok(program.map(|program| AtFreeze {
        path: program,
        limit,
        file: path(FINAL_NAME),
        frozen: path(FROZEN),
    }))
}

/// Whether to save a domain while it runs although libxl does not ask for that.
pub(crate) fn live() -> Result<bool> {
    flag(LIVE)
}

/// How to write an image in the mapped layout; `None` for the stream layout.
pub(crate) fn mapped() -> Result<Option<MappedOptions>> {
    let page_digests = flag(PAGE_DIGESTS)?;
    match variable(LAYOUT)?.as_deref() {
        None | Some("stream") => Ok(None),
        Some("mapped") => {
            let mut options = MappedOptions::default();
            options.page_digests = page_digests;
            Ok(Some(options))
        }
        Some(other) => bail!("{LAYOUT} is {other:?}, expected stream or mapped"),
    }
}

/// When to suspend a domain during a live save: by Xen's own rule, or as the environment says.
pub(crate) fn policy() -> Result<Box<dyn PrecopyPolicy>> {
    let milliseconds = number::<u32>(MAX_DOWNTIME, "milliseconds")?;
    let seconds = number::<u32>(TIMEOUT, "seconds")?;
    let on_timeout = match variable(ON_TIMEOUT)?.as_deref() {
        None => None,
        Some("stop-copy") => Some(OnTimeout::StopAndCopy),
        Some("cancel") => Some(OnTimeout::Cancel),
        Some(other) => bail!("{ON_TIMEOUT} is {other:?}, expected stop-copy or cancel"),
    };
    if (milliseconds, seconds, on_timeout) == (None, None, None) {
        return Ok(Box::new(XenPolicy));
    }
    let mut policy = TargetPolicy::default();
    if let Some(milliseconds) = milliseconds {
        policy.max_downtime = Duration::from_millis(milliseconds.into());
    }
    if let Some(seconds) = seconds {
        policy.timeout = Some(Duration::from_secs(seconds.into()));
    }
    if let Some(on_timeout) = on_timeout {
        policy.on_timeout = on_timeout;
    }
    tracing::info!(
        max_downtime = ?policy.max_downtime,
        timeout = ?policy.timeout,
        on_timeout = ?policy.on_timeout,
        "suspending the domain by the environment's target"
    );
    Ok(Box::new(policy))
}
