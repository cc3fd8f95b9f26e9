//! Tests of the emu-manager, in which the test plays xenopsd: every order of lines; an abort, the
//! end of a pipe and nonsense at every point; each kind of stream; and the image around the stream.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod command_line;
mod guardian;
#[path = "../../../tests/it/common/images.rs"]
mod images;
mod live_suspend;
mod machine;
mod old_dom0;
#[path = "../../../tests/it/common/old_kernel.rs"]
mod old_kernel;
mod platform;
mod qemu;
mod restore;
mod save;
mod xenopsd;
