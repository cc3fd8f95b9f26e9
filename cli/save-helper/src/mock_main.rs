//! The program `xsr-save-helper-mock`, for tests: the helper on a mock machine.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xsr_save_helper::main_on_mock()
}
