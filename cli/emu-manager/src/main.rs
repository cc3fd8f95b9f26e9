//! The program `xsr-emu-manager`, which works on the Xen of this machine.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xsr_emu_manager::main()
}
