//! The program `xsr-emu-manager-mock`, for tests: `xsr-emu-manager` on a mock machine.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xsr_emu_manager::main_on_mock()
}
