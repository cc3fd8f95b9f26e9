//! Which hypervisor a command works on, and what a toolstack keeps with a domain
//! there: its configuration and the records of its emulators.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use xsr_format::byte_order::ByteOrder;
use xsr_format::read::ReadOptions;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlReader, LibxlRecord, LibxlWriter};
use xsr_xen_backend::mock::{HostConfig, MockError, MockHost};
use xsr_xen_backend::{DomId, OpenError, XenHost};

use crate::args::Backend;
use crate::exit::BadUsage;

/// Under which name libxl, too, keeps a domain's configuration.
pub(crate) const CONFIG: &str = "libxl-json";
/// The emulator records of the image a domain came from.
const EMULATORS: &str = "libxl-emulators";

/// What libxl streams are written with.
pub(crate) const LIBXL_HEADER: LibxlHeader = LibxlHeader {
    order: ByteOrder::Little,
    legacy_converted: false,
};

/// Open the host that has the domain to work on.
pub(crate) fn open(backend: &Backend) -> Result<MockHost> {
    Ok(MockHost::open(directory(backend)?)?)
}

/// Open the host that a domain is to be made on; a mock machine is made where there
/// is none yet.
pub(crate) fn open_or_create(backend: &Backend) -> Result<MockHost> {
    match MockHost::open_or_create(directory(backend)?, &HostConfig::default()) {
        Err(e @ MockError::Occupied { .. }) => {
            bail!("{e}, and is no mock machine; name another directory")
        }
        other => Ok(other?),
    }
}

/// Open the hypervisor to work on without a toolstack (`--direct`).
pub(crate) fn hypervisor(backend: &Backend) -> Result<XenHost> {
    match backend {
        Backend::Auto | Backend::Xen => Ok(XenHost::open()?),
        Backend::MockXen(dir) => {
            Ok(MockHost::open_or_create(dir, &HostConfig::default())?.as_xen()?)
        }
        Backend::Mock(_) => {
            let why = "--direct is for a Xen host: a mock machine has no xl to do without";
            Err(anyhow::Error::new(BadUsage(why.to_owned())))
        }
    }
}

/// Whether this program can work on it at all, before anything is made.
pub(crate) fn check(backend: &Backend) -> Result<()> {
    directory(backend).map(drop)
}

fn directory(backend: &Backend) -> Result<&Path> {
    match backend {
        Backend::Mock(dir) => return Ok(dir),
        Backend::MockXen(_) => bail!("mock-xen: is for `save --direct` and `restore --direct`"),
        Backend::Auto | Backend::Xen => {}
    }
    let why = match XenHost::open() {
        Err(OpenError::NoXen) => {
            "this machine runs no Xen (there is no /dev/xen/privcmd)".to_owned()
        }
        Err(error) => error.to_string(),
        // Where there is one, it does the work (`xl.rs`), and nobody comes here.
        Ok(_) => "this machine runs Xen, but there is no `xl` on PATH: install Xen's tools, or \
             give --direct (save and restore without libxl)"
            .to_owned(),
    };
    bail!(
        "{why}; use a mock machine: --backend mock:DIR, or XSR_BACKEND=mock:DIR (`xsr mock \
         create` makes one)"
    )
}

/// The command by which a person does something to a domain there.
pub(crate) fn domain_command(backend: &Backend, verb: &str, rest: &str) -> String {
    match backend {
        Backend::Auto | Backend::Xen => format!("xl {verb} {rest}"),
        Backend::Mock(dir) | Backend::MockXen(dir) => {
            format!("xsr mock {verb} --host {} {rest}", dir.display())
        }
    }
}

/// Keep the configuration with a domain.
pub(crate) fn store_config(host: &MockHost, domid: DomId, json: &str) -> Result<()> {
    host.userdata_store(domid, CONFIG, json.as_bytes())
        .context("keeping the configuration")
}

/// The configuration kept with a domain.
pub(crate) fn config(host: &MockHost, domid: DomId) -> Result<Option<String>> {
    host.userdata_get(domid, CONFIG)?
        .map(String::from_utf8)
        .transpose()
        .context("the configuration kept with the domain")
}

/// Keep emulator records with a domain: as a libxl stream that has no libxc stream
/// in it.
pub(crate) fn store_emulators(
    host: &MockHost,
    domid: DomId,
    records: &[LibxlRecord],
) -> Result<()> {
    if records.is_empty() {
        return Ok(());
    }
    let mut stream = LibxlWriter::new(Vec::new(), LIBXL_HEADER)?;
    stream.write(&LibxlRecord::LibxcContext)?;
    for record in records {
        stream.write(record)?;
    }
    stream.write(&LibxlRecord::End)?;
    host.userdata_store(domid, EMULATORS, &stream.into_sink())
        .context("keeping the emulator records")
}

/// The emulator records kept with a domain.
pub(crate) fn emulators(host: &MockHost, domid: DomId) -> Result<Vec<LibxlRecord>> {
    let mut records = Vec::new();
    if let Some(kept) = host.userdata_get(domid, EMULATORS)? {
        // What is wrong with it is wrong with the host, not with an image.
        let bad = |e| anyhow::anyhow!("the emulator records kept with the domain: {e}");
        let mut stream = LibxlReader::new(kept.as_slice(), ReadOptions::default()).map_err(bad)?;
        while let Some(record) = stream.next_record().map_err(bad)? {
            if !matches!(record, LibxlRecord::LibxcContext | LibxlRecord::End) {
                records.push(record);
            }
        }
    }
    Ok(records)
}
