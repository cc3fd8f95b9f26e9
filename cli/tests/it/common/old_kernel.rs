//! A dom0 with an old kernel, for the programs that run there: system calls that are newer than Linux
//! 4.19 (XCP-ng 8.3) fail with ENOSYS, and so does statx.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::process::{PidfdFlags, getpid, pidfd_open};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// The shell command that the test program becomes under an old kernel.
pub(crate) const COMMAND: &str = "XSR_TEST_OLD_KERNEL";
/// The arguments with which the test program does that.
pub(crate) const BECOME: &str = "--exact old_kernel::becomes_a_command --ignored --nocapture";

const STATX: i64 = 332;
/// Numbers of newer calls: no call of 4.19 has one from 334 to 423.
const NEWER: std::ops::Range<i64> = 424..600;

/// The test program.
pub(crate) fn test_program() -> String {
    std::env::current_exe()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

#[test]
#[ignore = "becomes another program, for other tests"]
fn becomes_a_command() {
    let refused = NEWER.chain([STATX]).map(|number| (number, vec![]));
    let filter = SeccompFilter::new(
        refused.collect(),
        SeccompAction::Allow,
        SeccompAction::Errno(nix::errno::Errno::ENOSYS as u32),
        TargetArch::x86_64,
    );
    let filter: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&filter).unwrap();
    let refused = pidfd_open(getpid(), PidfdFlags::empty());
    assert_eq!(refused.unwrap_err(), rustix::io::Errno::NOSYS);
    let command = std::env::var(COMMAND).unwrap();
    let error = Command::new("sh").args(["-c", &command]).exec();
    panic!("{command}: {error}");
}
