//! A private apt that sees one Debian suite, through the mirror that this machine's apt uses, and
//! no installed packages, so that a download includes all dependencies. Touches nothing outside its
//! directory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::command::Invocation;

/// Debian's own keys, as the package `debian-archive-keyring` installs them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Suites that are never released, and so get no updates from elsewhere.
const ROLLING: [&str; 2] = ["sid", "unstable"];

/// Time limits for apt, in seconds: for reading local data, fetching lists, and fetching packages.
const READING: u32 = 60;
pub(super) const LISTS: u32 = 300;
pub(super) const PACKAGES: u32 = 1200;

/// An apt with state of its own.
#[derive(Debug)]
pub(super) struct Apt {
    dir: PathBuf,
}

impl Apt {
    /// Sets it up in `dir` for packages (`deb`) or sources (`deb-src`) of a suite, and fetches the
    /// lists.
    ///
    /// # Errors
    ///
    /// This machine's apt has no Debian archive configured, or the archive cannot be reached.
    pub(super) fn open(dir: &Path, kind: &str, suite: &str) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial", "none"] {
            let path = dir.join(part);
            std::fs::create_dir_all(&path)
                .with_context(|| format!("cannot make {}", path.display()))?;
        }
        std::fs::write(dir.join("status"), "")?;
        std::fs::write(dir.join("sources.list"), sources(kind, suite)?)?;
        let apt = Self {
            dir: dir.to_owned(),
        };
        apt.program(LISTS, "apt-get")
            .args(["-qq", "update"])
            .run()?;
        Ok(apt)
    }

    fn program(&self, seconds: u32, name: &str) -> Invocation {
        let dir = self.dir.display();
        let options = [
            format!("Dir::State={dir}/state"),
            format!("Dir::State::status={dir}/status"),
            format!("Dir::Cache={dir}/cache"),
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            format!("Dir::Etc::sourceparts={dir}/none"),
            format!("Dir::Etc::preferences={dir}/none/none"),
            format!("Dir::Etc::preferencesparts={dir}/none"),
            "APT::Sandbox::User=root".to_owned(),
            "APT::Install-Recommends=false".to_owned(),
            // For servers that have stalled.
            "Acquire::http::Timeout=60".to_owned(),
            "Acquire::https::Timeout=60".to_owned(),
            "Acquire::Retries=2".to_owned(),
        ];
        let flagged = options.into_iter().flat_map(|o| ["-o".to_owned(), o]);
        Invocation::limited(seconds, name).args(flagged)
    }

    /// Names of the packages that begin with `prefix`.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let listed = self
            .program(READING, "apt-cache")
            .args(["pkgnames", prefix])
            .capture()?;
        Ok(listed.lines().map(str::to_owned).collect())
    }

    /// Downloads packages and all their dependencies. Returns the paths of the archives.
    pub(super) fn download(&self, packages: &[String]) -> Result<Vec<PathBuf>> {
        let archives = self.dir.join("cache/archives");
        // Remove the archives of earlier versions of the suite.
        for old in debs(&archives)? {
            std::fs::remove_file(old)?;
        }
        self.program(PACKAGES, "apt-get")
            .args(["-qq", "install", "--yes", "--download-only"])
            .args(packages)
            .run()?;
        let found = debs(&archives)?;
        ensure!(!found.is_empty(), "apt-get left no packages behind");
        Ok(found)
    }

    /// Downloads the source of a package. Returns the path of upstream's archive.
    pub(super) fn source(&self, package: &str) -> Result<PathBuf> {
        let shown = self
            .program(READING, "apt-cache")
            .args(["showsrc", package])
            .capture()?;
        // The newest first; an archive may list one that it does not have.
        let others = shown.lines().filter_map(|l| l.strip_prefix("Version: "));
        let wanted = std::iter::once(package.to_owned())
            .chain(others.map(|version| format!("{package}={version}")));
        for source in wanted {
            let fetched = self
                .program(PACKAGES, "apt-get")
                .args(["-qq", "source", "--download-only"])
                .arg(&source)
                .current_dir(&self.dir)
                .run();
            if let Err(error) = fetched {
                eprintln!("{error:#}");
                continue;
            }
            for entry in std::fs::read_dir(&self.dir)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if name.contains(".orig.tar.") && !name.ends_with(".asc") {
                    return Ok(path);
                }
            }
        }
        bail!("there is no source of {package} available")
    }
}

fn debs(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Source lines for `suite`, from the archives that this machine's apt uses.
fn sources(kind: &str, suite: &str) -> Result<String> {
    let known = Invocation::limited(READING, "apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(RELEASE)"])
        .args(["Created-By: Packages", "Origin: Debian"])
        .capture()
        .context("the lab is made of Debian packages, and wants apt to fetch them")?;
    let rolling = ROLLING.contains(&suite);
    let lines: BTreeSet<String> = known
        .lines()
        .filter_map(|line| line.split_once(' '))
        // A rolling suite has no security or update archives.
        .filter(|(_, release)| !rolling || !release.contains('-'))
        .map(|(uri, release)| {
            let suffix = ["-security", "-updates"]
                .into_iter()
                .find(|suffix| release.ends_with(suffix))
                .unwrap_or_default();
            format!("{kind} [signed-by={KEYRING}] {uri} {suite}{suffix} main\n")
        })
        .collect();
    ensure!(
        !lines.is_empty(),
        "apt knows no Debian archive here: add one to its sources and run apt-get update"
    );
    Ok(lines.into_iter().collect())
}
