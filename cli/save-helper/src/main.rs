//! The program `xsr-save-helper`, which works on Xen.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    xsr_save_helper::main()
}
