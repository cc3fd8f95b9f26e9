//! The program `xsr-save-helper`, which works on the Xen of this machine.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xsr_save_helper::main()
}
