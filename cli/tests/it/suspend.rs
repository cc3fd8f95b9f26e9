//! A guest that does not answer a request to suspend: it runs on, and the wait ends at a limit or a signal.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::arg;
use crate::common::migration::{Hosts, domains};
use crate::common::phases::staged;

/// Far less than the 60 s that a guest has by default.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_save_gives_up_after_the_time_that_it_is_given() {
    for hosts in Hosts::each("pvh", &["--ignores-suspend"]) {
        let file = hosts.path("web.save");
        let begun = Instant::now();
        let save = ["save", "--suspend-timeout", "1", "web", arg(&file)];
        let save = save.map(str::to_owned).into_iter();
        crate::common::run(save.chain(hosts.on(&hosts.here)))
            .code(1)
            .stderr_has("has not read the request to suspend from xenstore within 1 s")
            .stderr_has("web runs on, no file was written");
        let took = begun.elapsed();
        assert!((Duration::from_secs(1)..SOON).contains(&took), "{took:?}");
        assert_eq!(domains(&hosts.here), ["web running"]);
        assert!(!file.exists());
    }
}

#[test]
fn a_migration_gives_up_too() {
    for hosts in Hosts::each("pvh", &["--ignores-suspend"]) {
        let socket = hosts.path("socket");
        let receiver = hosts.receiver(&socket, &[]);
        hosts
            .sender(&socket, &["--suspend-timeout=1"])
            .end()
            .code(1)
            .stderr_has("has not read the request to suspend");
        receiver.end().code(1);
        assert_eq!(hosts.domains(), [vec!["web running".to_owned()], vec![]]);
    }
}

#[test]
fn a_signal_ends_the_wait() {
    for hosts in Hosts::each("pvh", &["--ignores-suspend"]) {
        let file = hosts.path("web.save");
        let begun = Instant::now();
        let save = ["save", "web", arg(&file)].map(str::to_owned).into_iter();
        let mut running = staged(hosts.dir.path(), save.chain(hosts.on(&hosts.here)));
        assert!(running.hold("suspending", 1));
        running.signal(Signal::SIGTERM, false);
        running.until_said("interrupt");
        running.release();
        let (ran, _) = running.end();
        ran.code(1).stderr_has("web runs on, no file was written");
        assert!(begun.elapsed() < SOON);
        assert_eq!(domains(&hosts.here), ["web running"]);
        assert!(!file.exists());
    }
}
