//! Release artefacts below `target/dist`: static binaries, man pages, shell completions, the
//! licences of all linked crates, a tarball and a Debian package.
//!
//! The man pages and completions are generated from the command line's own definition.

mod licences;
mod package;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, ValueEnum};
use clap_complete::Shell;

use crate::command::Invocation;
use crate::stages::Outcome;
use crate::workspace;

// The command is a program, not a library. This is its only module that another package needs, and
// it depends only on clap.
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    reason = "only the definition is wanted here, not what it parses to"
)]
#[path = "../../cli/src/args.rs"]
mod args;

/// The target for which the binaries are built. It is given even if it is the host's, so that the
/// flags below do not affect build scripts and procedural macros.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Links the C library statically, so that one file runs on any x86-64 Linux. This is glibc rather
/// than musl, whose memory copies make decompression four times slower.
const STATIC: &str = "-C target-feature=+crt-static";

/// The profile of what is shipped.
pub(crate) const PROFILE: &str = "dist";

/// A shipped binary, and the package of the workspace that builds it.
struct Shipped {
    package: &'static str,
    binary: &'static str,
}

/// Each is built by a cargo of its own: cargo unites the features of packages that it builds
/// together, and the programs for a Xen host must not get the mock machine that the command has.
const SHIPPED: [Shipped; 3] = [
    Shipped {
        package: "xsr",
        binary: "xsr",
    },
    Shipped {
        package: "xsr-save-helper",
        binary: "xsr-save-helper",
    },
    Shipped {
        package: "xsr-emu-manager",
        binary: "xsr-emu-manager",
    },
];

/// Builds everything below `target/dist`.
///
/// # Errors
///
/// A build fails, a file cannot be written, or a built program does not run.
pub(crate) fn run() -> Result<()> {
    let made = Dist::make()?;
    made.try_out()?;
    for file in [&made.tarball].into_iter().chain(&made.deb) {
        println!("{}: {} bytes", file.display(), fs::metadata(file)?.len());
    }
    Ok(())
}

/// Like [`run`], for `cargo xtask ci`.
pub(crate) fn stage() -> Result<Outcome> {
    let made = Dist::make()?;
    made.try_out()?;
    Ok(match made.deb {
        Some(_) => Outcome::Done,
        None => Outcome::Skipped("there is no dpkg-deb here, so no package was built".to_owned()),
    })
}

/// What was built.
struct Dist {
    /// The directory tree to install under `/`.
    root: PathBuf,
    tarball: PathBuf,
    /// `None` without dpkg-deb.
    deb: Option<PathBuf>,
}

impl Dist {
    fn make() -> Result<Self> {
        let dist = workspace::root().join("target/dist");
        let man = empty(dist.join("man"))?;
        clap_mangen::generate_to(args::Cli::command(), &man)
            .with_context(|| format!("cannot write to {}", man.display()))?;
        let completions = empty(dist.join("completions"))?;
        for shell in Shell::value_variants() {
            clap_complete::generate_to(*shell, &mut args::Cli::command(), "xsr", &completions)
                .with_context(|| format!("cannot write to {}", completions.display()))?;
        }
        let root = empty(dist.join("root"))?;
        let bin = root.join("usr/bin");
        fs::create_dir_all(&bin)?;
        for shipped in SHIPPED {
            shipped.build(&bin)?;
        }
        package::link_for_xapi(&root)?;
        package::lay_out(&root, &man, &completions)?;
        licences::write(
            SHIPPED.map(|shipped| shipped.package),
            &root.join(package::DOC).join("third-party-licences.txt"),
        )?;
        let tarball = package::tarball(&dist, &root)?;
        let deb = package::deb(&dist, &root)?;
        Ok(Self { root, tarball, deb })
    }

    /// Runs the built programs in isolation, without any library or file of this machine, if the
    /// caller may change its root; otherwise in place.
    fn try_out(&self) -> Result<()> {
        for shipped in SHIPPED {
            let says = self.inside(shipped.binary).arg("--version").capture()?;
            ensure!(
                says.starts_with(shipped.binary),
                "{} --version says {says:?}",
                shipped.binary
            );
        }
        self.inside("xsr").arg("demo").run()
    }

    fn inside(&self, binary: &str) -> Invocation {
        if nix::unistd::geteuid().is_root() {
            Invocation::new("chroot")
                .arg(&self.root)
                .arg(Path::new("/usr/bin").join(binary))
                .env("TMPDIR", "/")
        } else {
            Invocation::new(self.root.join("usr/bin").join(binary))
        }
    }
}

/// Builds one program as it is shipped, or with another profile. Returns its path.
///
/// # Errors
///
/// It does not build.
pub(crate) fn build(package: &str, binary: &str, profile: &str) -> Result<PathBuf> {
    Invocation::cargo()
        .args(["build", "--locked", "--profile", profile])
        .args(["--target", TARGET])
        .args(["--package", package, "--bin", binary])
        .env("RUSTFLAGS", STATIC)
        .run()?;
    let directory = if profile == "dev" { "debug" } else { profile };
    let target = workspace::root().join("target").join(TARGET);
    Ok(target.join(directory).join(binary))
}

impl Shipped {
    fn build(&self, bin: &Path) -> Result<()> {
        let built = build(self.package, self.binary, PROFILE)?;
        let to = bin.join(self.binary);
        fs::copy(&built, &to)
            .with_context(|| format!("cannot copy {} to {}", built.display(), to.display()))?;
        Ok(())
    }
}

/// Creates or empties the directory.
fn empty(directory: PathBuf) -> Result<PathBuf> {
    if directory.exists() {
        fs::remove_dir_all(&directory)
            .with_context(|| format!("cannot clear {}", directory.display()))?;
    }
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}
