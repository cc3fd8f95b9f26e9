//! The contract of a [`DomainStore`].
//!
//! All names and UUIDs start with the same letters, so that domains left by a killed suite can be
//! recognised.

use std::io;
use std::time::Duration;

use xsr_format::frame::Gfn;

use super::{Failure, Report, Violation, ensure, equal};
use crate::domain_store::{
    Blame, ConfigurationKeeper, DestroyOutcome, DomainRef, DomainStore, DomainStoreError,
    Introduction,
};
use crate::{Access, DomId, GuestKind, NewDomain, Ring, Uuid};

type Check = fn(&dyn DomainStore) -> Result<(), Violation>;

const CHECKS: &[(&str, Check)] = &[
    ("a new domain is listed and has no name", new_domain),
    ("a domain is found by its number and by its name", find),
    ("a number that is another domain's now is noticed", replaced),
    ("a domain that is gone is named so by every method", gone),
    ("a domain is given its first name once", first_name),
    ("a rename happens only from the name that was given", rename),
    ("of two renames to one name one succeeds", rename_race),
    (
        "an impossible name is refused before anything is done",
        bad_names,
    ),
    ("a configuration is kept byte for byte", configuration),
    ("the emulators' records are kept beside it", emulators),
    (
        "a domain is introduced with what was kept before, under its lock",
        introduce_locked,
    ),
    ("nothing is kept of a domain that is forgotten", forget),
    ("a domain that is forgotten stays locked", forget_locked),
    ("nothing is kept of a domain that is destroyed", destroy),
    ("a lock names the process and command that have it", lock),
    (
        "a lock is one domain's, and survives its rename",
        lock_and_rename,
    ),
];

/// The names of all checks of a domain store.
pub fn domain_store_names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, _)| *name)
}

/// Makes the chosen checks of a domain store, also after a failure.
pub fn run_domain_store(store: &dyn DomainStore, chosen: impl Fn(&str) -> bool) -> Report {
    let mut report = Report {
        checks: 0,
        failures: Vec::new(),
    };
    for (name, check) in CHECKS.iter().filter(|(name, _)| chosen(name)) {
        tracing::info!(check = name);
        report.checks += 1;
        if let Err(violation) = check(store) {
            report.failures.push(Failure {
                check: name,
                violation,
            });
        }
    }
    report
}

impl From<DomainStoreError> for Violation {
    fn from(error: DomainStoreError) -> Self {
        let mut text = format!("unexpected: {error}");
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        Self(text)
    }
}

const PREFIX: &str = "xsr-contract";
const TIMEOUT: Duration = Duration::from_secs(60);
/// Pages of the test domains.
const PAGES: u64 = 4;

/// A domain that is destroyed at the end of the check.
struct Guest<'s> {
    store: &'s dyn DomainStore,
    domain: DomainRef,
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        match self.store.destroy(self.domain, TIMEOUT) {
            Ok(_) | Err(DomainStoreError::Gone { .. }) => {}
            Err(error) => {
                tracing::error!(%error, "a domain of the contract suite is left behind");
            }
        }
    }
}

/// A UUID that ends in this byte.
fn uuid(last: u8) -> Uuid {
    Uuid([
        0x78, 0x73, 0x72, 0, 0, 0, 0x80, 0, 0x80, 0, 0, 0, 0, 0, 0, last,
    ])
}

impl<'s> Guest<'s> {
    /// A domain without a name.
    fn new(store: &'s dyn DomainStore, last: u8) -> Result<Self, Violation> {
        let new = NewDomain::new(GuestKind::Pvh, 1, PAGES).uuid(uuid(last));
        let domain = DomainRef {
            domid: store.create(&new)?,
            uuid: new.uuid,
        };
        let guest = Self { store, domain };
        let mut gfns: Vec<Gfn> = (0..PAGES).map(Gfn).collect();
        let done = store.open(domain)?.populate(0, &mut gfns)?;
        equal(&done, &gfns.len(), "extents populated")?;
        Ok(guest)
    }

    /// A domain with this name, after the prefix.
    fn named(store: &'s dyn DomainStore, last: u8, name: &str) -> Result<Self, Violation> {
        let guest = Self::new(store, last)?;
        guest.introduce(name)?;
        Ok(guest)
    }

    fn introduce(&self, name: &str) -> Result<(), Violation> {
        self.introduce_as(&full(name))?;
        Ok(())
    }

    fn introduce_as(&self, name: &str) -> Result<(), DomainStoreError> {
        let handle = self.store.open(self.domain)?;
        let port = handle.alloc_unbound_port(DomId(0))?;
        self.store.introduce(
            self.domain,
            &Introduction {
                name,
                store: Ring {
                    frame: Gfn(1),
                    port,
                },
                console: None,
                extent: None,
            },
        )
    }

    fn name(&self) -> Result<Option<String>, Violation> {
        Ok(self.store.name(self.domain)?)
    }
}

fn full(name: &str) -> String {
    format!("{PREFIX}-{name}")
}

/// Checks that `result` is an error for which `is` is true, with this blame.
fn fails<T>(
    result: Result<T, DomainStoreError>,
    blame: Blame,
    is: impl FnOnce(&DomainStoreError) -> bool,
    what: &str,
) -> Result<(), Violation> {
    match result {
        Err(error) if is(&error) => equal(&error.blame(), &blame, what),
        Err(error) => Err(Violation(format!("{what}: fails with {error:?}"))),
        Ok(_) => Err(Violation(format!("{what}: succeeds"))),
    }
}

fn new_domain(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::new(store, 1)?;
    equal(&guest.name()?, &None, "name")?;
    let list = store.list()?;
    let listed = list.iter().find(|listed| listed.domain() == guest.domain);
    equal(&listed.map(|listed| &listed.name), &Some(&None), "listed")?;
    let ascending = list.is_sorted_by_key(|listed| listed.info.domid);
    ensure(ascending, "the list ascends")?;
    let info = store.check(guest.domain)?;
    equal(&DomainRef::from(&info), &guest.domain, "what is checked")
}

fn find(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "find")?;
    let number = guest.domain.domid.0.to_string();
    equal(&store.find(&number)?, &guest.domain, "by number")?;
    equal(&store.find(&full("find"))?, &guest.domain, "by name")?;
    for absent in [
        full("absent"),
        "32751".to_owned(),
        String::new(),
        format!("+{number}"),
    ] {
        let not_found = |error: &DomainStoreError| matches!(error, DomainStoreError::NotFound { name } if *name == absent);
        fails(store.find(&absent), Blame::Request, not_found, &absent)?;
    }
    Ok(())
}

/// Checks the error of every method that takes a domain.
fn every_method(
    store: &dyn DomainStore,
    domain: DomainRef,
    is: impl Fn(&DomainStoreError) -> bool,
) -> Result<(), Violation> {
    let introduction = Introduction {
        name: &full("never"),
        store: Ring {
            frame: Gfn(1),
            port: 1,
        },
        console: None,
        extent: None,
    };
    let all: [(&str, Result<(), DomainStoreError>); 14] = [
        ("check", store.check(domain).map(drop)),
        ("open", store.open(domain).map(drop)),
        ("name", store.name(domain).map(drop)),
        ("give_name", store.give_name(domain, &full("b"))),
        ("devices", store.devices(domain).map(drop)),
        ("extent", store.extent(domain).map(drop)),
        ("rename", store.rename(domain, &full("a"), &full("b"))),
        ("configuration", store.configuration(domain).map(drop)),
        ("set_configuration", store.set_configuration(domain, b"{}")),
        ("emulators", store.emulators(domain).map(drop)),
        ("set_emulators", set_emulators(store, domain, b"")),
        ("introduce", store.introduce(domain, &introduction)),
        ("forget", store.forget(domain)),
        ("lock", store.lock(domain, "contract").map(drop)),
    ];
    for (method, result) in all {
        fails(result, Blame::Domain, &is, method)?;
    }
    fails(
        store.destroy(domain, TIMEOUT),
        Blame::Domain,
        &is,
        "destroy",
    )
}

fn replaced(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "replaced")?;
    store.set_configuration(guest.domain, b"kept")?;
    let meant = DomainRef {
        uuid: uuid(2),
        ..guest.domain
    };
    let is = |error: &DomainStoreError| {
        matches!(error, DomainStoreError::Replaced { domain, found }
            if *domain == meant && *found == guest.domain.uuid)
    };
    every_method(store, meant, is)?;
    equal(&guest.name()?, &Some(full("replaced")), "name")?;
    let kept = store.configuration(guest.domain)?;
    equal(
        &kept.map(|kept| kept.bytes),
        &Some(b"kept".to_vec()),
        "configuration",
    )
}

fn gone(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "gone")?;
    equal(
        &store.destroy(guest.domain, TIMEOUT)?.outcome,
        &DestroyOutcome::Gone,
        "outcome",
    )?;
    let is = |error: &DomainStoreError| matches!(error, DomainStoreError::Gone { domain } if *domain == guest.domain);
    every_method(store, guest.domain, is)
}

/// A receiver does this: the domain is named before it has memory, renamed, and introduced.
fn first_name(store: &dyn DomainStore) -> Result<(), Violation> {
    let [a, b] = ["a", "b"].map(full);
    let guest = Guest::new(store, 1)?;
    let other = Guest::named(store, 2, "b")?;
    let taken = |error: &DomainStoreError| {
        matches!(error, DomainStoreError::NameTaken { name, by }
            if *name == b && *by == other.domain)
    };
    let named = store.give_name(guest.domain, &b);
    fails(named, Blame::Request, taken, "another's name")?;
    equal(&guest.name()?, &None, "name")?;
    store.give_name(guest.domain, &a)?;
    equal(&store.find(&a)?, &guest.domain, "by name")?;
    let wrong = |error: &DomainStoreError| {
        matches!(error, DomainStoreError::WrongName { expected: None, found, .. }
            if found.as_ref() == Some(&a))
    };
    let named = store.give_name(guest.domain, &full("c"));
    fails(named, Blame::Request, wrong, "a second first name")?;
    equal(&store.devices(guest.domain)?, &Vec::new(), "devices")?;
    store.rename(guest.domain, &a, &full("c"))?;
    guest.introduce("c")?;
    equal(&guest.name()?, &Some(full("c")), "name")?;
    store.forget(guest.domain)?;
    equal(&guest.name()?, &None, "name after it was forgotten")
}

fn rename(store: &dyn DomainStore) -> Result<(), Violation> {
    let [a, b, c] = ["a", "b", "c"].map(full);
    let guest = Guest::named(store, 1, "a")?;
    let other = Guest::named(store, 2, "b")?;
    store.rename(guest.domain, &a, &a)?;
    store.rename(guest.domain, &a, &c)?;
    equal(&guest.name()?.as_ref(), &Some(&c), "name")?;
    let wrong = |error: &DomainStoreError| {
        matches!(error, DomainStoreError::WrongName { expected, found, .. }
            if expected.as_ref() == Some(&a) && found.as_ref() == Some(&c))
    };
    let renamed = store.rename(guest.domain, &a, &full("d"));
    fails(renamed, Blame::Request, wrong, "from another name")?;
    let taken = |error: &DomainStoreError| {
        matches!(error, DomainStoreError::NameTaken { name, by }
            if *name == b && *by == other.domain)
    };
    let renamed = store.rename(guest.domain, &c, &b);
    fails(renamed, Blame::Request, taken, "to another's name")?;
    equal(&guest.name()?.as_ref(), &Some(&c), "name")?;
    fails(guest.introduce_as(&b), Blame::Request, taken, "introduce")?;
    let nameless = Guest::new(store, 3)?;
    let wrong =
        |error: &DomainStoreError| matches!(error, DomainStoreError::WrongName { found: None, .. });
    let renamed = store.rename(nameless.domain, &a, &full("d"));
    fails(renamed, Blame::Request, wrong, "from no name")
}

fn rename_race(store: &dyn DomainStore) -> Result<(), Violation> {
    const ROUNDS: usize = 20;
    let guests = [
        Guest::named(store, 1, "left")?,
        Guest::named(store, 2, "right")?,
    ];
    let (names, to) = ([full("left"), full("right")], full("both"));
    for _ in 0..ROUNDS {
        let outcomes = std::thread::scope(|scope| {
            let renames: Vec<_> = guests
                .iter()
                .zip(&names)
                .map(|(guest, from)| {
                    let domain = guest.domain;
                    let to = &to;
                    scope.spawn(move || store.rename(domain, from, to).is_ok())
                })
                .collect();
            renames
                .into_iter()
                .map(|rename| rename.join())
                .collect::<Vec<_>>()
        });
        let won: Vec<bool> = outcomes.into_iter().flatten().collect();
        let winners = won.iter().filter(|won| **won).count();
        equal(
            &(won.len(), winners),
            &(2, 1),
            "renames and those that succeed",
        )?;
        for ((guest, from), won) in guests.iter().zip(&names).zip(won) {
            if won {
                store.rename(guest.domain, &to, from)?;
            }
        }
    }
    Ok(())
}

fn bad_names(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "good")?;
    let long = "x".repeat(100_000);
    for bad in ["", "a\0b", "a\nb", "\u{1b}[31m", &long] {
        let is = |error: &DomainStoreError| matches!(error, DomainStoreError::BadName { .. });
        let renamed = store.rename(guest.domain, &full("good"), bad);
        fails(renamed, Blame::Request, is, "rename")?;
        fails(store.check_name(bad), Blame::Request, is, "check_name")?;
        let nameless = Guest::new(store, 2)?;
        fails(nameless.introduce_as(bad), Blame::Request, is, "introduce")?;
        equal(&nameless.name()?, &None, "name")?;
    }
    store.check_name(&full("good"))?;
    equal(&guest.name()?, &Some(full("good")), "name")
}

/// Values that are not valid text, with lengths around those of pieces.
fn values() -> impl Iterator<Item = Vec<u8>> {
    let lengths = [0, 1, 3071, 3072, 3073, 4096, 70_000];
    lengths.into_iter().map(|length| {
        let bytes = (0_u32..).map(|at| at.wrapping_mul(0x9e37_79b1).to_le_bytes()[3]);
        bytes.take(length).collect()
    })
}

fn configuration(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "configured")?;
    equal(&store.configuration(guest.domain)?, &None, "before")?;
    for value in values() {
        store.set_configuration(guest.domain, &value)?;
        let kept = store.configuration(guest.domain)?;
        let kept = kept.ok_or_else(|| Violation("nothing is kept".to_owned()))?;
        ensure(kept.bytes == value, "the bytes are the same")?;
        equal(&kept.keeper, &ConfigurationKeeper::Store, "keeper")?;
    }
    let huge = vec![b' '; 2 << 20];
    match store.set_configuration(guest.domain, &huge) {
        Ok(()) => {
            let kept = store.configuration(guest.domain)?;
            ensure(
                kept.is_some_and(|kept| kept.bytes == huge),
                "it is kept whole",
            )
        }
        Err(DomainStoreError::TooLarge { bytes, most, .. }) => {
            ensure(bytes == huge.len() && most < bytes, "the sizes are told")?;
            let kept = store.configuration(guest.domain)?;
            let last = values().last();
            ensure(
                kept.map(|kept| kept.bytes) == last,
                "the earlier one is kept",
            )
        }
        Err(error) => Err(error.into()),
    }
}

fn set_emulators(
    store: &dyn DomainStore,
    domain: DomainRef,
    bytes: &[u8],
) -> Result<(), DomainStoreError> {
    // In two parts, as a writer of records does.
    let (head, tail) = bytes.split_at(bytes.len() / 2);
    store.set_emulators(domain, &mut |file| {
        file.write_all(head)?;
        file.write_all(tail)
    })
}

fn emulators(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "emulated")?;
    equal(&store.emulators(guest.domain)?, &None, "before")?;
    store.set_configuration(guest.domain, b"configuration")?;
    for value in values() {
        set_emulators(store, guest.domain, &value)?;
        ensure(
            store.emulators(guest.domain)? == Some(value),
            "the same bytes",
        )?;
    }
    let last = store.emulators(guest.domain)?;
    let fails = store.set_emulators(guest.domain, &mut |file| {
        file.write_all(b"half of it")?;
        Err(io::Error::other("the rest is missing"))
    });
    ensure(
        matches!(fails, Err(DomainStoreError::Storage { .. })),
        "a writer that fails is an error",
    )?;
    equal(&store.emulators(guest.domain)?, &last, "the earlier ones")?;
    let kept = store.configuration(guest.domain)?;
    let kept = kept.map(|kept| kept.bytes);
    equal(&kept, &Some(b"configuration".to_vec()), "configuration")
}

/// A restore does this: the domain is locked and configured before it has a name.
fn introduce_locked(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::new(store, 1)?;
    let lock = store.lock(guest.domain, "restoring")?;
    store.set_configuration(guest.domain, b"configuration")?;
    set_emulators(store, guest.domain, b"records")?;
    guest.introduce("introduced")?;
    equal(&guest.name()?, &Some(full("introduced")), "name")?;
    let kept = store.configuration(guest.domain)?;
    let kept = kept.map(|kept| kept.bytes);
    equal(&kept, &Some(b"configuration".to_vec()), "configuration")?;
    let kept = store.emulators(guest.domain)?;
    equal(&kept, &Some(b"records".to_vec()), "emulators")?;
    is_locked(store, guest.domain, "after it was introduced")?;
    drop(lock);
    store.lock(guest.domain, "another").map(drop)?;
    Ok(())
}

fn forget_locked(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "forgotten")?;
    store.set_configuration(guest.domain, b"configuration")?;
    let lock = store.lock(guest.domain, "giving up")?;
    store.forget(guest.domain)?;
    equal(&store.configuration(guest.domain)?, &None, "configuration")?;
    is_locked(store, guest.domain, "after it was forgotten")?;
    drop(lock);
    store.lock(guest.domain, "another").map(drop)?;
    store.forget(guest.domain)?;
    Ok(())
}

/// Checks that another command cannot take the lock.
fn is_locked(store: &dyn DomainStore, domain: DomainRef, what: &str) -> Result<(), Violation> {
    let is = |error: &DomainStoreError| matches!(error, DomainStoreError::Locked { .. });
    fails(store.lock(domain, "another"), Blame::Domain, is, what)
}

fn forget(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "forgotten")?;
    let handle = store.open(guest.domain)?;
    store.set_configuration(guest.domain, b"configuration")?;
    set_emulators(store, guest.domain, b"records")?;
    for _ in 0..2 {
        store.forget(guest.domain)?;
        equal(&guest.name()?, &None, "name")?;
        equal(&store.configuration(guest.domain)?, &None, "configuration")?;
        equal(&store.emulators(guest.domain)?, &None, "emulators")?;
    }
    let pages = handle.map(&[Gfn(0)], Access::Read)?;
    ensure(pages.failed().is_empty(), "the domain still has its memory")?;
    // The name is free again.
    Guest::named(store, 2, "forgotten").map(drop)
}

fn destroy(store: &dyn DomainStore) -> Result<(), Violation> {
    let name = full("destroyed");
    for _ in 0..2 {
        let guest = Guest::named(store, 1, "destroyed")?;
        equal(&store.configuration(guest.domain)?, &None, "configuration")?;
        store.set_configuration(guest.domain, b"configuration")?;
        let lock = store.lock(guest.domain, "contract")?;
        let destroyed = store.destroy(guest.domain, TIMEOUT)?;
        equal(&destroyed.outcome, &DestroyOutcome::Gone, "outcome")?;
        equal(&destroyed.left_behind, &Vec::new(), "left behind")?;
        drop(lock);
        let not_found =
            |error: &DomainStoreError| matches!(error, DomainStoreError::NotFound { .. });
        fails(store.find(&name), Blame::Request, not_found, "find")?;
    }
    Ok(())
}

fn lock(store: &dyn DomainStore) -> Result<(), Violation> {
    let guest = Guest::named(store, 1, "locked")?;
    let lock = store.lock(guest.domain, "xsr contract suite")?;
    let is = |error: &DomainStoreError| {
        matches!(error, DomainStoreError::Locked { domain, holder, node: None }
            if *domain == guest.domain
                && holder.pid == Some(std::process::id())
                && holder.command == "xsr contract suite")
    };
    for _ in 0..2 {
        let second = store.lock(guest.domain, "another");
        fails(second, Blame::Domain, is, "a second lock")?;
    }
    drop(lock);
    for _ in 0..2 {
        drop(store.lock(guest.domain, "another")?);
    }
    Ok(())
}

fn lock_and_rename(store: &dyn DomainStore) -> Result<(), Violation> {
    let [a, b] = [1, 2].map(|last| Guest::named(store, last, &format!("locked-{last}")));
    let (a, b) = (a?, b?);
    let lock = store.lock(a.domain, "first")?;
    drop(store.lock(b.domain, "second")?);
    store.rename(a.domain, &full("locked-1"), &full("locked-3"))?;
    store.set_configuration(a.domain, b"configuration")?;
    is_locked(store, a.domain, "after a rename")?;
    drop(lock);
    store.lock(a.domain, "second").map(drop)?;
    Ok(())
}
