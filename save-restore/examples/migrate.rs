//! A toolstack that migrates a domain from one mock machine to another, over a Unix socket.
//!
//!     cargo run -p xsr-save-restore --example migrate

use std::os::unix::net::UnixStream;
use std::thread;

use xsr_format::byte_order::ByteOrder;
use xsr_format::read::ReadOptions;
use xsr_format::walk::Walk;
use xsr_format::wrapper::libxl::{LibxlHeader, LibxlRecord, LibxlWriter};
use xsr_format::wrapper::xl::XlHeader;
use xsr_save_restore::migrate::BoxError;
use xsr_save_restore::migrate::connection::{ConnectionReader, ConnectionWriter, UnixConnection};
use xsr_save_restore::migrate::ownership::plain::{ReceiverEnd, SenderEnd};
use xsr_save_restore::migrate::receive::{Arriving, ReceiveRequest};
use xsr_save_restore::migrate::send::{Departing, MigrateRequest, TakenBack};
use xsr_save_restore::save::precopy::XenPolicy;
use xsr_save_restore::toolstack::{DirectToolstack, SaveToolstack as _};
use xsr_save_restore::{Live, RestoreRequest, Rings, SaveOptions, SaveRequest};
use xsr_xen_backend::mock::{GuestSpec, HostConfig, MockHost};
use xsr_xen_backend::{DomId, Domain, GuestKind, Host as _, ShutdownReason};

/// A domain that leaves a mock machine.
#[derive(Debug)]
pub struct Leaving<'h> {
    /// The machine.
    pub host: &'h MockHost,
    /// The domain.
    pub domid: DomId,
}

impl Leaving<'_> {
    fn domain(&self) -> Result<Box<dyn Domain>, BoxError> {
        Ok(self.host.domain(self.domid)?)
    }
}

impl Departing for Leaving<'_> {
    fn send_image(&mut self, to: &mut ConnectionWriter<'_>) -> Result<(), BoxError> {
        let domain = self.domain()?;
        XlHeader::new(r#"{"c_info":{"type":"pvh","name":"web"}}"#)?.write(&mut *to)?;
        let header = LibxlHeader {
            order: ByteOrder::Little,
            legacy_converted: false,
        };
        let mut libxl = LibxlWriter::new(to, header)?;
        libxl.write(&LibxlRecord::LibxcContext)?;
        let mut toolstack = DirectToolstack(&*domain);
        let saved = SaveRequest::new(&*domain, self.host.xen_version()?)
            .options(&SaveOptions::default())
            .live(Live {
                policy: &mut XenPolicy,
                verify: false,
            })
            .observe(&mut |progress| {
                tracing::debug!(?progress, "sending");
                std::ops::ControlFlow::Continue(())
            })
            .write_stream(&mut toolstack, libxl.sink_mut())?;
        libxl.write(&LibxlRecord::End)?;
        // From here on the state machine of the migration decides.
        saved.keep_suspended();
        Ok(())
    }

    fn rename_away(&mut self) -> Result<(), BoxError> {
        Ok(self.host.rename(self.domid, "web--migratedaway")?)
    }

    fn take_back(&mut self) -> Result<TakenBack, BoxError> {
        self.host.rename(self.domid, "web")?;
        let domain = self.domain()?;
        Ok(match domain.info()?.shutdown {
            None => TakenBack::Runs,
            Some(ShutdownReason::Suspend) => {
                DirectToolstack(&*domain).resume()?;
                TakenBack::Runs
            }
            Some(_) => TakenBack::Gone,
        })
    }

    fn destroy(&mut self) -> Result<(), BoxError> {
        Ok(self.domain()?.destroy()?)
    }
}

/// A domain that comes to a mock machine.
#[derive(Debug)]
pub struct Coming<'h> {
    /// The machine.
    pub host: &'h MockHost,
    /// The domain, once it has been created.
    pub domid: Option<DomId>,
}

impl Coming<'_> {
    fn domain(&self) -> Result<Box<dyn Domain>, BoxError> {
        let domid = self.domid.ok_or("no domain was made")?;
        Ok(self.host.domain(domid)?)
    }
}

impl Arriving for Coming<'_> {
    fn receive_image(&mut self, from: &mut ConnectionReader<'_>) -> Result<(), BoxError> {
        let (reader, around) = Walk::open(from, ReadOptions::default())?.into_libxc()?;
        // The configuration in the xl header says how large the domain is; here all are small.
        let domid = self.host.create_domain(GuestKind::Pvh, 1, 4096)?;
        self.domid = Some(domid);
        self.host.rename(domid, "web--incoming")?;
        let domain = self.domain()?;
        let rings = Rings {
            store_port: domain.alloc_unbound_port(DomId(0))?,
            store_domid: DomId(0),
            console_port: domain.alloc_unbound_port(DomId(0))?,
            console_domid: DomId(0),
        };
        let mut toolstack = DirectToolstack(&*domain);
        let (_, source) =
            RestoreRequest::new(&*domain, rings).read_stream(reader, &mut toolstack)?;
        // What follows the libxc stream, to the end.
        let offset = source.bytes_read();
        let mut walk = around.resume(source, offset);
        while walk.next_step()?.is_some() {}
        Ok(())
    }

    fn take_name(&mut self) -> Result<(), BoxError> {
        let domid = self.domid.ok_or("no domain was made")?;
        Ok(self.host.rename(domid, "web")?)
    }

    fn run(&mut self) -> Result<(), BoxError> {
        Ok(self.domain()?.unpause()?)
    }

    fn destroy(&mut self) -> Result<(), BoxError> {
        match self.domid {
            None => Ok(()),
            Some(domid) => {
                self.host.domain(domid)?.destroy()?;
                self.domid = None;
                Ok(())
            }
        }
    }
}

/// Migrates a domain, and checks that its memory is the same at the destination.
///
/// # Errors
///
/// A step failed, or the memory differs.
pub fn main() -> Result<(), BoxError> {
    let (here, there) = (HostConfig::default(), HostConfig::default());
    let (here, there) = (MockHost::ephemeral(&here)?, MockHost::ephemeral(&there)?);
    let domid = here.create_guest(&GuestSpec::new("web", GuestKind::Pvh, 4))?;
    let before = here.memory_digest(domid)?;

    let (sender, receiver) = UnixStream::pair()?;
    let sender = UnixConnection::new(sender)?;
    let receiver = UnixConnection::new(receiver)?;
    let mut leaving = Leaving { host: &here, domid };
    let mut coming = Coming {
        host: &there,
        domid: None,
    };
    let (sent, arrived) = thread::scope(|scope| {
        let arriving = scope.spawn(|| ReceiveRequest::new().run(&receiver, &mut coming));
        let sent = MigrateRequest::new().run(&sender, &mut leaving);
        (sent, arriving.join())
    });
    let arrived = arrived.map_err(|_| "the receiver panicked")?;
    if sent.end != SenderEnd::Moved || arrived.end != (ReceiverEnd::Runs { told: true }) {
        return Err(format!("{sent:?}, {arrived:?}").into());
    }
    let domid = there.find("web")?;
    if there.memory_digest(domid)? != before || here.find("web").is_ok() {
        return Err("it has not moved whole".into());
    }
    Ok(())
}
