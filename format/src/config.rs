//! The domain's configuration in an xl image: what a restorer needs of libxl's JSON. Needs the
//! feature `config`.
//!
//! The image keeps the text byte for byte ([`XlHeader::json`](crate::XlHeader::json)). This is a
//! view of it; keys that are not listed here are ignored.
//!
//! C implementation: `libxl_domain_config` in `tools/libs/light/libxl_types.idl`.

use serde_json::Value;
use thiserror::Error;

use crate::guest_image::{MAX_HVM_VCPUS, MAX_PV_VCPUS};
use crate::wrapper::xl::MAX_CONFIG;

/// What a configuration says about the domain to create.
///
/// ```
/// use xsr_format::config::{ConfiguredKind, DomainConfig};
///
/// let json = r#"{
///     "c_info": { "type": "pvh", "name": "web" },
///     "b_info": { "max_vcpus": 2, "max_memkb": 8192 }
/// }"#;
/// let config = DomainConfig::parse(json)?;
/// assert_eq!((config.name.as_str(), config.kind), ("web", ConfiguredKind::Pvh));
/// assert_eq!((config.vcpus, config.max_pages()), (2, 2048 + 256));
/// # Ok::<(), xsr_format::config::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DomainConfig {
    /// `c_info.name`; not empty.
    pub name: String,
    /// `c_info.uuid`, unchecked.
    pub uuid: Option<String>,
    /// `c_info.type`
    pub kind: ConfiguredKind,
    /// `b_info.max_vcpus`; 1 by default, as in libxl.
    pub vcpus: u32,
    /// `b_info.max_memkb`
    pub max_memory_kib: u64,
    /// `b_info.video_memkb`, which is added to the domain's memory; 0 by default.
    pub video_memory_kib: u64,
    /// `b_info.target_memkb`: what the domain begins with. Less than `max_memory_kib` for a guest
    /// that is populated on demand (PoD) or ballooned down.
    pub target_memory_kib: Option<u64>,
    /// `b_info.shadow_memkb`: what Xen needs besides for its page tables.
    pub shadow_memory_kib: Option<u64>,
    /// `c_info.hap`; `None` if the host decides.
    pub hap: Option<bool>,
    /// `b_info.nested_hvm`: whether the guest may run guests.
    pub nested: bool,
    /// `b_info.disable_migrate` (xl's `nomigrate`).
    pub nomigrate: bool,
    /// Number of `b_info.vnuma_nodes`, which libxl refuses to save.
    pub vnuma_nodes: u64,
    /// `disks[].pdev_path`: what the host must have for the guest's disks, except empty drives and
    /// disks that a script or another domain provides.
    pub disks: Vec<String>,
    /// Devices of the host that the guest has (`pcidevs`, `dtdevs`, `usbdevs`): libxl's name of
    /// each list that is not empty, and its length.
    pub passthrough: Vec<(&'static str, u64)>,
}

/// The kind of domain that a configuration names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfiguredKind {
    /// `pv`
    Pv,
    /// `hvm`
    Hvm,
    /// `pvh`
    Pvh,
}

impl ConfiguredKind {
    /// Maximum number of vcpus that Xen lets such a domain have.
    pub const fn max_vcpus(self) -> u32 {
        match self {
            Self::Pv => MAX_PV_VCPUS,
            Self::Hvm | Self::Pvh => MAX_HVM_VCPUS,
        }
    }
}

/// What is wrong with a configuration. The text continues a sentence: "the configuration …".
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigError {
    /// It is longer than [`MAX_CONFIG`], which limits the memory for parsing.
    #[error("has {got} bytes, expected at most {MAX_CONFIG}")]
    TooLong {
        /// Its length in bytes.
        got: u64,
    },
    /// It is not JSON.
    #[error("is not valid JSON: {message}")]
    NotJson {
        /// What the parser says, with line and column.
        message: String,
    },
    /// A key that every configuration has is missing.
    #[error("has no {key}; xl would refuse it too")]
    Missing {
        /// The key, with those around it.
        key: &'static str,
    },
    /// An unknown kind of domain.
    #[error("has c_info.type \"{}\", expected pv, hvm or pvh", got.escape_debug())]
    Kind {
        /// The value found.
        got: String,
    },
    /// A number of vcpus that Xen does not accept.
    #[error("has b_info.max_vcpus {got}, expected 1 to {max}")]
    Vcpus {
        /// The value found.
        got: u64,
        /// The limit.
        max: u32,
    },
}

/// Memory that libxl lets every domain have beyond its configuration, in KiB
/// (`LIBXL_MAXMEM_CONSTANT`): room for pages of rings and tables.
const SLACK_KIB: u64 = 1024;

impl DomainConfig {
    /// Reads a configuration.
    ///
    /// # Errors
    ///
    /// See [`ConfigError`].
    pub fn parse(json: &str) -> Result<Self, ConfigError> {
        let got = json.len() as u64;
        if got > u64::from(MAX_CONFIG) {
            return Err(ConfigError::TooLong { got });
        }
        let value: Value = serde_json::from_str(json).map_err(|e| ConfigError::NotJson {
            message: e.to_string(),
        })?;
        let text = |at: &str| Some(value.pointer(at)?.as_str()?.to_owned());
        let number = |at: &str| value.pointer(at).and_then(Value::as_u64);
        let length = |at: &str| {
            let list = value.pointer(at).and_then(Value::as_array);
            list.map_or(0, |list| list.len() as u64)
        };
        // libxl's `defbool`; absent or `<default>` if libxl decides.
        let boolean = |at: &str| match value.pointer(at)?.as_str()? {
            "True" => Some(true),
            "False" => Some(false),
            _ => None,
        };
        let missing = |key| ConfigError::Missing { key };
        let kind = match text("/c_info/type") {
            None => return Err(missing("c_info.type")),
            Some(got) => match got.as_str() {
                "pv" => ConfiguredKind::Pv,
                "hvm" => ConfiguredKind::Hvm,
                "pvh" => ConfiguredKind::Pvh,
                _ => return Err(ConfigError::Kind { got }),
            },
        };
        let max = kind.max_vcpus();
        let vcpus = match number("/b_info/max_vcpus") {
            None => 1,
            Some(got) => u32::try_from(got)
                .ok()
                .filter(|vcpus| (1..=max).contains(vcpus))
                .ok_or(ConfigError::Vcpus { got, max })?,
        };
        Ok(Self {
            name: text("/c_info/name")
                .filter(|name| !name.is_empty())
                .ok_or_else(|| missing("c_info.name"))?,
            uuid: text("/c_info/uuid"),
            kind,
            vcpus,
            max_memory_kib: number("/b_info/max_memkb")
                .ok_or_else(|| missing("b_info.max_memkb"))?,
            video_memory_kib: number("/b_info/video_memkb").unwrap_or(0),
            target_memory_kib: number("/b_info/target_memkb"),
            shadow_memory_kib: number("/b_info/shadow_memkb"),
            hap: boolean("/c_info/hap"),
            nested: boolean("/b_info/nested_hvm")
                .or_else(|| boolean("/b_info/type.hvm/nested_hvm"))
                .unwrap_or(false),
            nomigrate: boolean("/b_info/disable_migrate").unwrap_or(false),
            vnuma_nodes: length("/b_info/vnuma_nodes"),
            disks: match value.get("disks").and_then(Value::as_array) {
                Some(disks) => disks.iter().filter_map(path_of).collect(),
                None => Vec::new(),
            },
            passthrough: ["pcidevs", "dtdevs", "usbdevs"]
                .into_iter()
                .map(|list| (list, length(&format!("/{list}"))))
                .filter(|(_, devices)| *devices > 0)
                .collect(),
        })
    }

    /// Maximum number of pages that the domain may have.
    pub fn max_pages(&self) -> u64 {
        max_pages(self.max_memory_kib.saturating_add(self.video_memory_kib))
    }
}

/// The file or device of the host that a disk is. C: `libxl__device_disk_set_backend`.
fn path_of(disk: &Value) -> Option<String> {
    let text = |key: &str| {
        disk.get(key)
            .and_then(Value::as_str)
            .filter(|t| !t.is_empty())
    };
    let elsewhere = disk
        .get("backend_domid")
        .and_then(Value::as_u64)
        .unwrap_or(0)
        != 0
        || ["backend_domname", "script", "colo_host"]
            .iter()
            .any(|key| text(key).is_some());
    let path = text("pdev_path").filter(|path| path.starts_with('/') && !elsewhere)?;
    Some(path.to_owned())
}

/// Maximum number of pages of a domain with `kib` KiB of memory, as libxl sets it.
pub const fn max_pages(kib: u64) -> u64 {
    kib.saturating_add(SLACK_KIB).div_ceil(4)
}
