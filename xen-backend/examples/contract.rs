//! Contract suite on the hypervisor of this machine; run it as root, in the control domain. It
//! creates and destroys its own domains, and touches no others.
//!
//!     cargo run --example contract --features contract [PART OF A NAME]…

use std::process::ExitCode;

use xsr_xen_backend::{Host, XenHost, contract};

fn main() -> ExitCode {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let host = match XenHost::open() {
        Ok(host) => host,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    match host.xen_version() {
        Ok(version) => eprintln!(
            "Xen {}.{}, domctl interface {:#x}",
            version.major,
            version.minor,
            host.domctl_version()
        ),
        Err(error) => eprintln!("error: {error}"),
    }
    let chosen = |name: &str| wanted.is_empty() || wanted.iter().any(|part| name.contains(part));
    let mut report = contract::run_some(&host, chosen);
    let kept = contract::run_domain_store(&host, chosen);
    let checks = report.checks + kept.checks;
    report.failures.extend(kept.failures);
    for failure in &report.failures {
        eprintln!("FAILED {failure}");
    }
    eprintln!("{checks} checks, {} failed", report.failures.len());
    match report.failures.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
