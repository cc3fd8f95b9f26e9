//! The domain to create for an image: from its configuration, or from the command line, another
//! toolstack's data ([`Origin`]) and the image itself, in this order.
//!
//! | from | name, UUID | kind, vcpus, memory |
//! |---|---|---|
//! | libxl's JSON in xl's header, or `--config` | `--name` with a new UUID, or there | there |
//! | anything else | `--name`, [`Origin`], the file's name | the options, [`Origin`], the image |
//!
//! C implementation: `create_domain` in `tools/xl/xl_vmcontrol.c`.

use std::path::Path;

use anyhow::{Context as _, Error, Result};
use xsr_format::image::{DomainHeader, GuestType, ImageHeader};
use xsr_format::survey::Survey;
use xsr_format::wrapper::xl::XlHeader;
use xsr_xen_backend::domain_store::{DomainRef, DomainStore, Extent};
use xsr_xen_backend::{DomainSettings, GuestKind, NewDomain, Uuid};

use super::made::Made;
use super::survey;
use super::{INCOMING, Named, bad};
use crate::args::{RestoreArgs, RestoreKind};
use crate::backend::Hypervisor;
use crate::config::{self, Config};
use crate::exit::BadUsage;
use crate::file::Input;
use crate::left;
use crate::origin::Origin;
use crate::verdict;

/// Properties of a domain from the command line.
#[derive(Clone, Debug, Default)]
pub(crate) struct Overrides {
    name: Option<String>,
    kind: Option<GuestKind>,
    vcpus: Option<u32>,
    memory_kib: Option<u64>,
    /// The configuration that replaces the image's.
    config: Option<Given>,
    /// The name of a domain that has none elsewhere.
    fallback: String,
    /// Whether this is for an xl image instead of a domain.
    is_conversion: bool,
}

/// A configuration from a file.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one for each run of the command"
)]
enum Given {
    Json(String),
    Text(Origin),
}

impl Overrides {
    /// The given options that a configuration overrides.
    fn given(&self) -> Vec<&'static str> {
        [
            ("--type", self.kind.is_some()),
            ("--vcpus", self.vcpus.is_some()),
            ("--memory", self.memory_kib.is_some()),
        ]
        .into_iter()
        .filter_map(|(option, given)| given.then_some(option))
        .collect()
    }

    /// For an image that is named after its file if it has no other name.
    pub(super) fn named_after(file: &Path) -> Self {
        let stem = file.file_stem().filter(|_| file != Path::new("-"));
        let fallback = stem.map(|stem| stem.to_string_lossy().into_owned());
        Self {
            fallback: fallback.unwrap_or_else(|| "restored".to_owned()),
            ..Self::default()
        }
    }

    /// The options of a command line.
    ///
    /// # Errors
    ///
    /// A name that no domain can have; a configuration that cannot be read.
    pub(crate) fn of(args: &RestoreArgs) -> Result<Self> {
        if let Some(name) = &args.name
            && let Some(why) = config::wrong_with_name(name)
        {
            return Err(Error::new(BadUsage(format!("--name {name:?}: {why}"))));
        }
        let config = match &args.config {
            Some(path) => Some(given(path)?),
            None => None,
        };
        Ok(Self {
            name: args.name.clone(),
            kind: args.kind.map(|kind| match kind {
                RestoreKind::Pv => GuestKind::Pv,
                RestoreKind::Hvm => GuestKind::Hvm,
                RestoreKind::Pvh => GuestKind::Pvh,
            }),
            vcpus: args.vcpus,
            memory_kib: args.memory.map(|memory| memory.kib),
            config,
            ..Self::named_after(&args.file)
        })
    }
}

/// The configuration in a file: libxl's JSON, or xl's own format, as accepted by `xl restore`.
fn given(path: &Path) -> Result<Given> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| name.to_string())?;
    let text = text.trim_end_matches('\0');
    if text.trim_start().starts_with('{') {
        Config::parse(text)
            .and_then(|config| {
                let advice = "correct c_info.uuid in that file";
                verdict::check_uuid(config.uuid.as_deref(), advice)
            })
            .map_err(|e| Error::new(BadUsage(format!("{name}: {e}"))))?;
        return Ok(Given::Json(text.to_owned()));
    }
    let origin = Origin::of_text(text);
    match &origin.error {
        Some(why) => {
            let why = format!("{name}: neither libxl's JSON nor a configuration of xl: it {why}");
            Err(Error::new(BadUsage(why)))
        }
        None => Ok(Given::Text(origin)),
    }
}

/// The domain to build, and the configuration to store with it.
#[derive(Debug)]
pub(super) struct RestorePlan {
    pub(super) json: String,
    pub(super) name: String,
    pub(super) kind: GuestKind,
    pub(super) vcpus: u32,
    pub(super) max_pages: u64,
    /// [`Uuid::NIL`] if the configuration has no valid one.
    pub(super) uuid: Uuid,
    pub(super) settings: DomainSettings,
    /// What its kernel is told about its memory and vcpus, if not by libxl.
    pub(super) extent: Option<Extent>,
    /// Whether the configuration changes what the guest sees of the CPU, and libxl does not apply
    /// that.
    pub(super) changes_cpuid: bool,
    /// The new UUID of a domain whose name differs from the image's.
    pub(super) new_uuid: Option<String>,
    /// Whether the name is the file's, because there is no other.
    name_is_made_up: bool,
}

/// Whether a domain other than `except` has this name. Here a name of digits is not a number ([`DomainStore::find`]).
fn is_taken(host: &dyn DomainStore, name: &str, except: Option<Uuid>) -> Result<bool> {
    let domains = host.list()?;
    Ok(domains
        .iter()
        .any(|listed| listed.name.as_deref() == Some(name) && Some(listed.info.uuid) != except))
}

/// The UUID that a configuration gives its domain.
fn uuid_in(text: Option<&str>) -> Uuid {
    text.and_then(|text| text.parse().ok()).unwrap_or(Uuid::NIL)
}

/// The properties of a domain without libxl's configuration.
struct Known {
    name: String,
    name_is_made_up: bool,
    uuid: String,
    new_uuid: Option<String>,
    kind: GuestKind,
    vcpus: u32,
    memory_kib: u64,
    /// Other settings, with their places in libxl's configuration.
    carried: Vec<(&'static str, serde_json::Value)>,
}

impl Known {
    fn json(self) -> Result<String> {
        let Self { name, uuid, .. } = &self;
        let json = config::make_for_image(name, uuid, self.kind, self.vcpus, self.memory_kib);
        match self.carried.is_empty() {
            true => Ok(json),
            false => Ok(config::with_values(&json, self.carried)?),
        }
    }

    /// From the command line, another toolstack, and for the rest from the image, which `survey`
    /// reads; `None` if it cannot be read for that.
    fn find_out(
        overrides: &Overrides,
        origin: Option<&Origin>,
        survey: Option<&mut dyn FnMut() -> Result<Survey>>,
    ) -> Result<Self> {
        let none = Origin::default();
        let said = origin.unwrap_or(&none);
        if let (Some(why), None) = (&said.error, &overrides.name) {
            let advice = match overrides.is_conversion {
                true => "give a configuration with --config",
                false => {
                    "give a name with --name (the domain gets a new UUID), or a configuration \
                     with --config"
                }
            };
            tracing::debug!(why, "no name and no UUID");
            return Err(verdict::not_understood(said, advice).into());
        }
        let kind = overrides.kind.or(said.kind);
        let vcpus = overrides.vcpus.or(said.vcpus);
        let memory_kib = overrides.memory_kib.or(said.max_memory_kib);
        // Other toolstacks' memory sizes do not include an HVM guest's video memory.
        let is_short = kind == Some(GuestKind::Hvm) && overrides.memory_kib.is_none();
        let (kind, vcpus, memory_kib) = match (kind, vcpus, memory_kib, survey) {
            (Some(kind), Some(vcpus), Some(memory_kib), survey)
                if survey.is_none() || !is_short =>
            {
                (kind, vcpus, memory_kib)
            }
            (.., None) => {
                let why = "the image has no configuration, so it is read twice to find out what \
                           the domain needs: give it as a file, or say --type, --vcpus and \
                           --memory (to convert: give a configuration with --config)";
                return Err(Error::new(BadUsage(why.to_owned())));
            }
            (kind, vcpus, memory_kib, Some(survey)) => {
                let found = survey()?;
                let held = found.populated_pages.saturating_mul(4);
                (
                    kind.map_or_else(|| survey::kind(&found), Ok)?,
                    vcpus.unwrap_or(found.vcpus().max(1)),
                    memory_kib.map_or(held, |kib| match is_short {
                        true => kib.max(held),
                        false => kib,
                    }),
                )
            }
        };
        let is_clone =
            matches!((&overrides.name, &said.name), (Some(new), Some(old)) if new != old);
        let name_is_made_up = overrides.name.is_none() && said.name.is_none();
        let name = overrides.name.as_ref().or(said.name.as_ref());
        let name = name.unwrap_or(&overrides.fallback).clone();
        let new_uuid = match is_clone || said.error.is_some() {
            true => Some(config::new_uuid().context("making a UUID")?),
            false => None,
        };
        let uuid = new_uuid.clone().or_else(|| said.uuid.clone());
        Ok(Self {
            uuid: uuid.unwrap_or_else(|| config::uuid(&name, 0)),
            name,
            name_is_made_up,
            new_uuid,
            kind,
            vcpus,
            memory_kib,
            carried: said.carried.clone(),
        })
    }
}

/// The configuration that a restore would make for an image without libxl's. The image is read for
/// it if other sources are not sufficient.
pub(crate) fn config_for(input: &Input, file: &Path, lenient: bool) -> Result<String> {
    let overrides = Overrides {
        is_conversion: true,
        ..Overrides::named_after(file)
    };
    let mut survey = || survey::of(&input.again()?.unwrapped(lenient)?, lenient);
    let survey: Option<&mut dyn FnMut() -> Result<Survey>> = match input.is_repeatable() {
        true => Some(&mut survey),
        false => None,
    };
    Known::find_out(&overrides, input.origin(), survey)?.json()
}

impl RestorePlan {
    /// The plan for an image whose header, if any, has been read.
    pub(super) fn of(
        input: Option<&Input>,
        header: Option<&XlHeader>,
        overrides: &Overrides,
        lenient: bool,
        guest_type: GuestType,
    ) -> Result<Self> {
        match &overrides.config {
            Some(Given::Json(json)) => return Self::from_json(json, overrides),
            Some(Given::Text(origin)) => {
                return Self::made_up(input, Some(origin), overrides, lenient, guest_type);
            }
            None => {}
        }
        let Some(header) = header else {
            let origin = input.and_then(Input::origin);
            return Self::made_up(input, origin, overrides, lenient, guest_type);
        };
        if let Some(json) = header.json().map_err(|e| bad(&e.to_string()))? {
            return Self::from_json(json, overrides);
        }
        let origin = Origin::of_xl(header);
        if let (
            Some(Origin {
                error: Some(why), ..
            }),
            Some(_),
        ) = (&origin, &overrides.name)
        {
            tracing::warn!("the configuration in the xl header could not be understood: it {why}");
        }
        Self::made_up(input, origin.as_ref(), overrides, lenient, guest_type)
    }

    /// The plan for a configuration of libxl.
    fn from_json(json: &str, overrides: &Overrides) -> Result<Self> {
        let given = overrides.given();
        if !given.is_empty() {
            let why = format!(
                "the image has a configuration, which says type, vcpus and memory, and {} is for \
                 images without: xsr edit --config changes it, restore --config takes another",
                given.join(", ")
            );
            return Err(Error::new(BadUsage(why)));
        }
        let config = Config::parse(json)?;
        let is_clone = (overrides.name.as_ref()).is_some_and(|name| *name != config.name);
        if !is_clone {
            verdict::check_uuid(config.uuid.as_deref(), verdict::UUID_OF_IMAGE)?;
        }
        let mut plan = Self {
            json: json.to_owned(),
            max_pages: config.max_pages(),
            name: config.name,
            kind: config.kind,
            vcpus: config.vcpus,
            uuid: uuid_in(config.uuid.as_deref()),
            settings: DomainSettings::default(),
            extent: None,
            changes_cpuid: false,
            new_uuid: None,
            name_is_made_up: false,
        };
        if let Some(name) = overrides.name.as_ref().filter(|name| **name != plan.name) {
            let uuid = config::new_uuid().context("making a UUID")?;
            let values = [("/c_info/name", name.as_str()), ("/c_info/uuid", &uuid)];
            plan.json = config::with(json, &values)?;
            plan.name.clone_from(name);
            plan.uuid = uuid_in(Some(&uuid));
            plan.new_uuid = Some(uuid);
        }
        Ok(plan)
    }

    /// A plan for an image without libxl's configuration.
    fn made_up(
        input: Option<&Input>,
        origin: Option<&Origin>,
        overrides: &Overrides,
        lenient: bool,
        guest_type: GuestType,
    ) -> Result<Self> {
        let mut survey = input
            .filter(|input| input.is_repeatable())
            .map(|input| move || survey::of(&input.again()?, lenient));
        let survey = survey
            .as_mut()
            .map(|survey| survey as &mut dyn FnMut() -> Result<Survey>);
        let known = Known::find_out(overrides, origin, survey)?;
        if let Err(wrong) = verdict::check_vcpus(known.vcpus, known.kind) {
            let (most, kind) = (
                config::most_vcpus(known.kind),
                config::kind_name(known.kind),
            );
            return Err(match overrides.vcpus {
                Some(vcpus) => Error::new(BadUsage(format!(
                    "--vcpus {vcpus}: a {kind} guest has at most {most}"
                ))),
                None => wrong.into(),
            });
        }
        let is_pv = guest_type == GuestType::X86_PV;
        if is_pv != (known.kind == GuestKind::Pv) {
            let kind = config::kind_name(known.kind);
            return Err(match (overrides.kind, origin) {
                (None, Some(origin)) => verdict::other_kind(origin, known.kind, guest_type).into(),
                _ => Error::new(BadUsage(format!(
                    "--type {kind}: the image is of an {guest_type} guest"
                ))),
            });
        }
        Ok(Self {
            name: known.name.clone(),
            kind: known.kind,
            vcpus: known.vcpus,
            max_pages: config::max_pages(known.memory_kib),
            uuid: uuid_in(Some(&known.uuid)),
            settings: DomainSettings::default(),
            extent: None,
            changes_cpuid: false,
            new_uuid: known.new_uuid.clone(),
            name_is_made_up: known.name_is_made_up,
            json: known.json()?,
        })
    }

    /// Checks that the domain can take a stream with these headers.
    pub(super) fn check(&self, image: ImageHeader, domain: DomainHeader) -> Result<()> {
        verdict::check_name(&self.name)?;
        Ok(verdict::check_headers(image, domain, Some(self.kind))?)
    }

    /// Create the domain, paused and without memory.
    pub(super) fn make(&self, host: &Hypervisor, named: Named) -> Result<Made> {
        let name = &self.name;
        // A domain that moves to its own host gives its name up before it runs here; if it does
        // not, it keeps it.
        let itself = (named == Named::Incoming && !self.uuid.is_nil()).then_some(self.uuid);
        if is_taken(&**host, name, itself)? {
            let another = match named {
                Named::AsItSays if self.name_is_made_up => "give this one another with --name",
                Named::AsItSays => {
                    "give this one another with --name (it gets a new UUID, too; xsr edit --name \
                     makes an image that keeps its UUID), destroy the other first, or restore on \
                     another host"
                }
                Named::Incoming | Named::StandingBy => {
                    "destroy or rename it first, or migrate elsewhere"
                }
            };
            return Err(Error::msg(format!(
                "a domain named {name:?} exists already; {another}"
            )));
        }
        if named != Named::AsItSays {
            let incoming = format!("{name}{INCOMING}");
            if is_taken(&**host, &incoming, None)? {
                return Err(Error::msg(format!(
                    "a domain named {incoming:?} exists: a migration that broke off left it; see \
                     that the sender still has its own, then destroy this one"
                )));
            }
        }
        let new = NewDomain::new(self.kind, self.vcpus, self.max_pages)
            .uuid(self.uuid)
            .settings(self.settings.clone());
        let (left, known) = left::guest::arriving(host, name);
        let domid = host
            .create(&new)
            .with_context(|| format!("making {name}"))?;
        let uuid = self.uuid;
        let which = *known.get_or_init(|| DomainRef { domid, uuid });
        let mut made = Made::new(host, which, name, left)?;
        made.extent = self.extent.clone();
        made.changes_cpuid = self.changes_cpuid;
        match made.begin(named, &self.json) {
            Ok(()) => Ok(made),
            Err(error) => Err(made.given_up(error)),
        }
    }
}
