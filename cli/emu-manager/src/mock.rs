//! The mock machine as the hypervisor, for tests: compiled only with the cargo feature
//! `test-backend`, and used only by the program `xsr-emu-manager-mock`.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use xsr_save_restore::toolstack::ToolstackError;
use xsr_xen_backend::mock::{BackgroundWorkload, MockHost, WorkloadSpec};
use xsr_xen_backend::{DomId, Domain, Host, XenHost};

use crate::backend::{Backend, StandIn};

/// Names the machine: `mock:DIR`, or `mock-xen:DIR`, which is the same machine accessed by
/// hypercalls.
const VARIABLE: &str = "XSR_EMU_TEST_BACKEND";
/// The directory that replaces /var/run/xen; the files below its `xenstore/N` replace xenstore.
const RUN: &str = "XSR_EMU_TEST_RUN";

/// A mock machine, accessed directly or by hypercalls.
struct Mock {
    host: Box<dyn Host>,
    xen: XenHost,
    machine: MockHost,
}

/// The socket to which this program logs.
pub(crate) fn syslog() -> Option<PathBuf> {
    env::var_os(RUN).map(|run| Path::new(&run).join("log"))
}

/// On exit, writes to the file `left` which dirty logs and mappings the program has not released,
/// for a test to check.
impl Drop for Mock {
    fn drop(&mut self) {
        let logging = Host::domains(&self.machine).unwrap_or_default();
        let logging = logging
            .iter()
            .filter(|info| self.machine.is_log_dirty(info.domid).is_ok_and(|on| on))
            .count();
        let mapped = self.machine.mapped_pages();
        if (logging, mapped) != (0, 0) {
            let left = format!("{logging} dirty logs, {mapped} mapped pages");
            std::fs::write(run_dir().join("left"), left).ok();
        }
    }
}

fn run_dir() -> PathBuf {
    let run = env::var_os(RUN).unwrap_or_else(|| "/var/run/xen".into());
    PathBuf::from(run)
}

/// Opens the machine that the environment names.
///
/// # Errors
///
/// The variable is not set or has another form, or the machine cannot be opened.
pub(crate) fn open() -> Result<Box<dyn Backend>> {
    let name = env::var(VARIABLE).context(VARIABLE)?;
    let (how, dir) = name.split_once(':').unwrap_or_default();
    let machine = MockHost::open(Path::new(dir))?;
    let host: Box<dyn Host> = match how {
        "mock" => Box::new(machine.clone()),
        "mock-xen" => Box::new(machine.as_xen()?),
        _ => bail!("{VARIABLE} is {name:?}, expected mock:DIR or mock-xen:DIR"),
    };
    let xen = machine.as_xen()?;
    // In this test, another process was killed while the dirty log was on.
    if let Ok(domid) = std::fs::read_to_string(run_dir().join("dirty-log-of")) {
        machine.hold_log_dirty(DomId(domid.parse()?))?;
    }
    Ok(Box::new(Mock { host, xen, machine }))
}

impl Backend for Mock {
    fn host(&self) -> &dyn Host {
        &*self.host
    }

    fn xen(&self) -> &XenHost {
        &self.xen
    }

    fn node(&self, domid: DomId, name: &str) -> Result<Option<Vec<u8>>> {
        let path = run_dir().join(format!("xenstore/{}/{name}", domid.0));
        match std::fs::read(path) {
            Ok(value) => Ok(Some(value)),
            // A node may have no value, but others below it.
            Err(error) if error.kind() == io::ErrorKind::IsADirectory => Ok(Some(Vec::new())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn settings_file(&self) -> PathBuf {
        run_dir().join("settings")
    }

    fn qmp_socket(&self, domid: DomId) -> PathBuf {
        run_dir().join(format!("qmp-libxl-{}", domid.0))
    }

    /// Zero, except in the test of a guest that suspends late.
    fn late_suspend(&self) -> Duration {
        match run_dir().join("late").exists() {
            true => Duration::from_secs(60),
            false => Duration::ZERO,
        }
    }

    fn stand_in(&self, domid: DomId) -> Result<Option<Box<dyn StandIn + '_>>> {
        let domain = Host::domain(&self.machine, domid)?;
        let kept = self.machine.userdata_get(domid, "mock-workload")?;
        let work = match kept.filter(|bytes| !bytes.is_empty()) {
            None => None,
            Some(bytes) => {
                let spec: WorkloadSpec = serde_json::from_slice(&bytes)?;
                Some(self.machine.workload(domid, &spec)?.run_in_background())
            }
        };
        Ok(Some(Box::new(MockGuest {
            domain,
            _work: work,
        })))
    }
}

/// A domain of the mock machine. Only the process that has the machine open can suspend it and run
/// its workload.
struct MockGuest {
    domain: Box<dyn Domain>,
    /// The workload that `xsr mock workload` keeps with the domain.
    _work: Option<BackgroundWorkload>,
}

impl StandIn for MockGuest {
    fn suspend(&self) -> Result<(), ToolstackError> {
        assert!(!run_dir().join("panic").exists(), "as the test asks");
        let suspended = self.domain.suspend();
        suspended.map_err(|error| ToolstackError::new("suspending the mock guest", error))
    }
}
