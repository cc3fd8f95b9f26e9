//! The host's configuration file: settings for every VM whose platform map does not have them.
//!
//! ```text
//! # Milliseconds
//! xsr-max-downtime = 100
//! xsr-live-suspend = false
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// Where it is on a host.
pub(crate) const FILE: &str = "/etc/xsr-emu-manager.conf";

/// The settings that the file may have; in the platform map they have the same names.
const KEYS: [&str; 3] = ["xsr-compress", "xsr-live-suspend", "xsr-max-downtime"];

/// The most bytes that are read.
const MOST: u64 = 64 << 10;

/// The settings in the file.
#[derive(Debug, Default)]
pub(crate) struct Settings {
    path: PathBuf,
    values: BTreeMap<String, String>,
}

impl Settings {
    /// Reads the file. A missing one has no settings. A file or line that cannot be understood is
    /// ignored, with a warning: a VM can always be saved and restored.
    pub(crate) fn read(path: PathBuf) -> Self {
        let text = match text(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => {
                tracing::warn!("{} is ignored: {error}", path.display());
                String::new()
            }
        };
        let mut values = BTreeMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            // No value contains a `#`.
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            match line
                .split_once('=')
                .map(|(key, value)| (key.trim(), value.trim()))
            {
                Some((key, value)) if KEYS.contains(&key) => {
                    values.insert(key.to_owned(), value.to_owned());
                }
                _ => tracing::warn!(
                    "line {number} of {} is ignored: expected KEY = VALUE with one of the keys {}",
                    path.display(),
                    KEYS.join(", ")
                ),
            }
        }
        Self { path, values }
    }

    /// A setting; `None` if the file does not have it.
    pub(crate) fn get(&self, key: &str) -> Option<&str> {
        let value = self.values.get(key).map(String::as_str);
        value.filter(|value| !value.is_empty())
    }

    /// Where the settings are, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(MOST + 1).read_to_string(&mut text)?;
    match text.len() as u64 > MOST {
        true => Err(io::Error::other(format!("it is longer than {MOST} bytes"))),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn read(text: &[u8]) -> Settings {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Settings::read(file.path().to_owned())
    }

    #[test]
    fn the_last_line_of_a_setting_counts_and_what_is_not_understood_does_not() {
        let settings = read(
            b"# xsr-max-downtime = 1\n\nxsr-max-downtime=5\r\n xsr-max-downtime = 100 # ms\n\
              xsr-live-suspend =\ntea = 2\nxsr-live-suspend\n[section]\n",
        );
        assert_eq!(settings.get("xsr-max-downtime"), Some("100"));
        assert_eq!(settings.get("xsr-live-suspend"), None);
        assert_eq!(settings.get("tea"), None);
    }

    #[test]
    fn a_file_that_cannot_be_read_has_no_settings() {
        let long = [b"xsr-max-downtime = 100\n".as_slice(), &[b'#'; 70_000]].concat();
        for text in [&long[..], b"xsr-max-downtime = 100\n\xff\xfe"] {
            assert_eq!(read(text).get("xsr-max-downtime"), None);
        }
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().to_owned(), dir.path().join("none")] {
            assert_eq!(Settings::read(path).get("xsr-max-downtime"), None);
        }
    }
}
