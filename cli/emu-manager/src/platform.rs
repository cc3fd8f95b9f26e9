//! A VM's platform keys: what xapi keeps of it in xenstore, below `/local/domain/N/platform`, and
//! how a save or restore uses it. Keys that begin with `xsr-` may also be in the host's
//! configuration file (`settings.rs`).
//!
//! | key | |
//! |---|---|
//! | `nomigrate` | a save is refused if it is `true` or a number other than 0 |
//! | `xsr-live-suspend` | whether a suspend into a file or disk is live; if missing: unless the domain has a PCI device |
//! | `xsr-compress` | whether a migration for which xapi wants compression is compressed |
//! | `xsr-max-downtime` | for a live save, in milliseconds; `xen` for Xen's own rule |
//! | `vcpu/number`, `vcpu/I/affinity` | the processors that vcpu I may run on: 0 or 1 for each |
//! | `vcpu/weight`, `vcpu/cap` | for the credit scheduler |
//! | `hpet` | whether a translated guest has an HPET; if missing or empty: yes |
//! | `timeoffset` | seconds that a translated guest's clock is ahead |
//! | `cores-per-socket` | should divide the number of a translated guest's vcpus |
//! | `nested-virt`, else `exp-nested-hvm` | for a guest whose image has no CPU policy |
//! | `featureset` | likewise: words of 32 features in hexadecimal |
//! | `generation-id` | two numbers, `A:B`, which go to an address that a translated guest chose |

use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use xsr_format::frame::{Gfn, PAGE_SIZE};
use xsr_save_restore::save::precopy::{PrecopyPolicy, XenPolicy};
use xsr_xen_backend::{Access, DomId, Domain};

use crate::backend::Backend;
use crate::policy::MigrationPolicy;
use crate::settings::Settings;

/// `HVM_PARAM_HPET_ENABLED`
const HPET_ENABLED: u32 = 11;
/// `HVM_PARAM_VM_GENERATION_ID_ADDR`
const GENERATION_ID_ADDRESS: u32 = 34;
/// More than any host has.
const MAX_PROCESSORS: usize = 4096;

/// The platform keys of a domain.
pub(crate) struct Platform<'b> {
    backend: &'b dyn Backend,
    domid: DomId,
    /// What holds for every VM without keys of its own.
    host: Settings,
}

/// A setting, and where it is, for messages.
struct Setting {
    text: String,
    place: String,
    /// It is the VM's own.
    is_own: bool,
}

impl<'b> Platform<'b> {
    pub(crate) fn of(backend: &'b dyn Backend, domid: DomId) -> Self {
        Self {
            backend,
            domid,
            host: Settings::read(backend.settings_file()),
        }
    }

    /// A setting of this program: the VM's own, or that of the host; `None` if neither has it.
    fn setting(&self, key: &str) -> Result<Option<Setting>> {
        if let Some(text) = self.text(key)?.filter(|text| !text.is_empty()) {
            return Ok(Some(Setting {
                text,
                place: format!("platform/{key} in xenstore"),
                is_own: true,
            }));
        }
        Ok(self.host.get(key).map(|text| Setting {
            text: text.to_owned(),
            place: format!("{key} in {}", self.host.path().display()),
            is_own: false,
        }))
    }

    /// The text of a key; `None` if it does not exist.
    fn text(&self, key: &str) -> Result<Option<String>> {
        let value = self.backend.node(self.domid, &format!("platform/{key}"))?;
        let Some(value) = value else { return Ok(None) };
        let text = String::from_utf8(value);
        let text = text.with_context(|| format!("platform/{key} in xenstore is not text"))?;
        Ok(Some(text.trim_matches(['\0', ' ', '\n']).to_owned()))
    }

    /// The number of a key; `None` if it is missing, empty or nonsense: a VM without the key's
    /// effect is better than one that cannot be resumed or moved.
    fn number<N: TryFrom<i64>>(&self, key: &str) -> Result<Option<N>> {
        let Some(text) = self.text(key)?.filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        Ok(in_range(&text, &format!("platform/{key} in xenstore")))
    }

    /// Whether a key is `true` or a number other than 0. Other words mean no.
    fn flag(&self, key: &str) -> Result<bool> {
        let text = self.text(key)?.unwrap_or_default();
        Ok(text.eq_ignore_ascii_case("true") || integer(&text).is_some_and(|n| n != 0))
    }

    /// Checks, before a save, that the VM may move.
    ///
    /// # Errors
    ///
    /// It may not, or xenstore cannot be read.
    pub(crate) fn check_may_move(&self) -> Result<()> {
        let fixed = self.flag("nomigrate")?;
        ensure!(!fixed, "d{} is flagged as not being mobile", self.domid.0);
        Ok(())
    }

    /// Whether the guest may run while its memory is written to a file or disk. By default a guest
    /// with a PCI device may not, because the dirty log does not tell what the device writes; only
    /// the VM's own key changes that.
    ///
    /// # Errors
    ///
    /// xenstore cannot be read.
    pub(crate) fn live_suspend(&self) -> Result<bool> {
        if let Some(setting) = self.setting("xsr-live-suspend")? {
            let Setting { text, place, .. } = &setting;
            match (text.to_ascii_lowercase().as_str(), integer(text)) {
                ("false", _) | (_, Some(0)) => return Ok(false),
                ("true", _) | (_, Some(_)) if setting.is_own => return Ok(true),
                ("true", _) | (_, Some(_)) => {}
                _ => tracing::warn!("{place} is ignored: {text:?} is neither true nor false"),
            }
        }
        let devices = format!("backend/pci/{}", self.domid.0);
        let has_device = self.backend.node(DomId(0), &devices)?.is_some();
        if has_device {
            tracing::info!("the VM has a PCI device: the guest is suspended first");
        }
        Ok(!has_device)
    }

    /// Whether a migration may be compressed: the other end runs this program, too.
    ///
    /// # Errors
    ///
    /// xenstore cannot be read.
    pub(crate) fn compress(&self) -> Result<bool> {
        let Some(Setting { text, place, .. }) = self.setting("xsr-compress")? else {
            return Ok(false);
        };
        match (text.to_ascii_lowercase().as_str(), integer(&text)) {
            ("false", _) | (_, Some(0)) => Ok(false),
            ("true", _) | (_, Some(_)) => Ok(true),
            _ => {
                tracing::warn!("{place} is ignored: {text:?} is neither true nor false");
                Ok(false)
            }
        }
    }

    /// The policy that decides when a live save suspends the guest.
    ///
    /// # Errors
    ///
    /// xenstore cannot be read.
    pub(crate) fn policy(&self) -> Result<Box<dyn PrecopyPolicy>> {
        let mut allowed = None;
        if let Some(Setting { text, place, .. }) = self.setting("xsr-max-downtime")? {
            if text == "xen" {
                return Ok(Box::new(XenPolicy));
            }
            allowed = in_range::<u32>(&text, &place);
        }
        let allowed = allowed.map(|ms| Duration::from_millis(ms.into()));
        Ok(Box::new(MigrationPolicy::new(allowed)))
    }

    /// Sets up the domain of a restore, before the stream is read. A nonsensical key is ignored
    /// with a warning.
    ///
    /// # Errors
    ///
    /// xenstore cannot be read, or the domain does not exist.
    pub(crate) fn set_up(&self, domain: &dyn Domain) -> Result<()> {
        let xen = self.backend.xen();
        let vcpus = self.number::<u32>("vcpu/number")?.unwrap_or(0);
        let last = domain.info()?.max_vcpu_id;
        if vcpus > last + 1 {
            tracing::warn!(
                "platform/vcpu/number in xenstore is {vcpus}, and the domain has {} vcpus",
                last + 1
            );
        }
        if let Some(guest) = domain.hvm() {
            let cores = self.number::<u32>("cores-per-socket")?.unwrap_or(0);
            if cores != 0 && vcpus % cores != 0 {
                tracing::warn!(
                    "platform/cores-per-socket in xenstore is {cores}, which does not divide {vcpus} vcpus"
                );
            }
            let hpet = match self.text("hpet")?.as_deref() {
                None | Some("") => true,
                Some(_) => self.flag("hpet")?,
            };
            if let Err(error) = guest.set_hvm_param(HPET_ENABLED, hpet.into()) {
                // xenguest ignores this failure as well.
                tracing::warn!(%error, "the HPET is as the domain was made");
            }
            let offset = self.number("timeoffset")?.unwrap_or(0);
            xen.set_time_offset(self.domid, offset)?;
        }
        for vcpu in 0..vcpus.min(last + 1) {
            let key = format!("vcpu/{vcpu}/affinity");
            let Some(map) = self.text(&key)?.filter(|map| !map.is_empty()) else {
                continue;
            };
            if map.len() > MAX_PROCESSORS || map.bytes().any(|bit| bit != b'0' && bit != b'1') {
                tracing::warn!(
                    "platform/{key} in xenstore is ignored: {map:?} is not a row of 0 and 1"
                );
                continue;
            }
            let processors: Vec<bool> = map.bytes().map(|bit| bit == b'1').collect();
            if let Err(error) = xen.set_hard_affinity(self.domid, vcpu, &processors) {
                tracing::warn!("platform/{key} in xenstore is ignored: {error}");
            }
        }
        // For xapi, 0 means "not set".
        let share = |key| Ok::<_, anyhow::Error>(self.number::<u16>(key)?.filter(|n| *n != 0));
        let (weight, cap) = (share("vcpu/weight")?, share("vcpu/cap")?);
        if (weight, cap) != (None, None) {
            match xen.set_credit(self.domid, weight, cap) {
                Ok(true) => {}
                Ok(false) => {
                    tracing::info!("weight and cap are not set: this host has another scheduler");
                }
                Err(error) => {
                    tracing::warn!("platform/vcpu/weight and cap in xenstore are ignored: {error}");
                }
            }
        }
        Ok(())
    }

    /// Whether the guest may use hardware virtualisation itself.
    pub(crate) fn nested(&self) -> Result<bool> {
        match self.text("nested-virt")? {
            Some(_) => self.flag("nested-virt"),
            None => self.flag("exp-nested-hvm"),
        }
    }

    /// The features of the VM, for an image without a CPU policy.
    ///
    /// # Errors
    ///
    /// The key is not words of hexadecimal digits.
    pub(crate) fn featureset(&self) -> Result<Option<Vec<u32>>> {
        let Some(text) = self.text("featureset")?.filter(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let words = text.split(['-', ':']).map(|word| {
            u32::from_str_radix(word, 16)
                .ok()
                .with_context(|| format!("platform/featureset in xenstore has {word:?} in it"))
        });
        words.collect::<Result<_>>().map(Some)
    }

    /// Writes the VM's generation id into the memory of a completely restored guest. A PV guest has
    /// no place for it.
    ///
    /// # Errors
    ///
    /// The key is nonsense, or the guest has no memory at the address.
    pub(crate) fn write_generation_id(&self, domain: &dyn Domain) -> Result<()> {
        let Some(guest) = domain.hvm() else {
            return Ok(());
        };
        let address = guest.hvm_param(GENERATION_ID_ADDRESS)?;
        let Some(text) = self.text("generation-id")?.filter(|_| address != 0) else {
            return Ok(());
        };
        let halves = text.split_once(':').map(|(a, b)| (half(a), half(b)));
        let Some((Some(first), Some(second))) = halves else {
            bail!("platform/generation-id in xenstore is {text:?}, expected two numbers, A:B");
        };
        let mut id = [0; 16];
        id[..8].copy_from_slice(&first.to_le_bytes());
        id[8..].copy_from_slice(&second.to_le_bytes());
        let gfn = Gfn(address / PAGE_SIZE as u64);
        let at = usize::try_from(address % PAGE_SIZE as u64)?;
        // The guest's firmware has chosen the address; the id may span two pages.
        let (here, next) = id.split_at(id.len().min(PAGE_SIZE - at));
        for (gfn, at, part) in [(gfn, at, here), (Gfn(gfn.0 + 1), 0, next)] {
            if part.is_empty() {
                continue;
            }
            let pages = domain.map(&[gfn], Access::Write)?.all_mapped()?;
            let page = pages.page(0).context("the page was not mapped")?;
            let mut bytes = page.to_page();
            bytes[at..at + part.len()].copy_from_slice(part);
            page.copy_from(&bytes);
        }
        tracing::debug!("generation id {text} at {address:#x}");
        Ok(())
    }
}

/// A number in the range of its type; `None`, with a warning, for any other text.
fn in_range<N: TryFrom<i64>>(text: &str, place: &str) -> Option<N> {
    let number = integer(text).and_then(|number| N::try_from(number).ok());
    if number.is_none() {
        tracing::warn!("{place} is ignored: {text:?} is no number in range");
    }
    number
}

/// A whole number, in decimal, or in hexadecimal with the prefix 0x.
fn integer(text: &str) -> Option<i64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// One half of a generation id; it must not be 0.
fn half(text: &str) -> Option<u64> {
    let number = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.ok().filter(|number| *number != 0)
}
