//! Hypercalls with their structures, as they are passed in and returned.
//!
//! C implementation: `tools/libs/ctrl/xc_private.{c,h}`.

use std::sync::Arc;

use crate::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::interface::Interface;
use super::sys;
use crate::privcmd::call::{EXTRA_VERSION, LARGEST_INFO, Named, VNUMA_INFO, XENMEM_GET_VNUMAINFO};
use crate::privcmd::{Call, CallBuffer, Hypercalls};
use crate::{DomId, DomainInfo, PhysInfo};

pub(crate) use crate::privcmd::call::{BODY, DOMCTL_HEADER, SYSCTL_HEADER};

/// The hypervisor, and the version of the interface it speaks.
#[derive(Debug)]
pub(super) struct Calls {
    pub(super) raw: Arc<dyn Hypercalls>,
    pub(super) interface: &'static Interface,
}

/// A buffer that holds `bytes`.
pub(super) fn filled(raw: &dyn Hypercalls, bytes: &[u8]) -> Result<CallBuffer, Errno> {
    let mut buffer = raw.buffer(bytes.len())?;
    buffer.write(0, bytes);
    Ok(buffer)
}

/// A domctl of this version, with the buffers that its body names. Returns the bytes of its union
/// after the call.
pub(super) fn domctl(
    raw: &dyn Hypercalls,
    version: u32,
    cmd: u32,
    domid: u16,
    body: &[u8],
    named: Named<'_, '_>,
) -> Result<(u16, [u8; BODY]), Errno> {
    let mut buffer = domctl_buffer(raw, version, cmd, domid, body)?;
    raw.hypercall(Call::domctl(&mut buffer, named)?)?;
    let mut domid = [0; 2];
    buffer.read(8, &mut domid);
    Ok((u16::from_ne_bytes(domid), body_of(&buffer)))
}

/// A buffer with the domctl's header and body.
fn domctl_buffer(
    raw: &dyn Hypercalls,
    version: u32,
    cmd: u32,
    domid: u16,
    body: &[u8],
) -> Result<CallBuffer, Errno> {
    let mut buffer = raw.buffer(DOMCTL_HEADER + BODY)?;
    buffer.write(0, &cmd.to_ne_bytes());
    buffer.write(4, &version.to_ne_bytes());
    buffer.write(8, &domid.to_ne_bytes());
    buffer.write(DOMCTL_HEADER, body);
    Ok(buffer)
}

/// The union of a domctl.
fn body_of(buffer: &CallBuffer) -> [u8; BODY] {
    let mut body = [0; BODY];
    buffer.read(DOMCTL_HEADER, &mut body);
    body
}

impl Calls {
    /// Make a hypercall whose argument `at` is a structure. Returns the structure after the call,
    /// and the call's result.
    pub(super) fn with_struct<T: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u32,
        cmd: u32,
        argument: &T,
    ) -> Result<(u64, T), Errno> {
        self.with_struct_naming(number, cmd, argument, &mut [])
    }

    /// Likewise, with the buffers that the structure names.
    pub(super) fn with_struct_naming<T: FromBytes + IntoBytes + Immutable>(
        &self,
        number: u32,
        cmd: u32,
        argument: &T,
        named: Named<'_, '_>,
    ) -> Result<(u64, T), Errno> {
        let mut buffer = filled(&*self.raw, argument.as_bytes())?;
        let call = Call::operation(number, cmd, &mut buffer, named)?;
        let returned = self.raw.hypercall(call)?;
        let mut out = T::new_zeroed();
        buffer.read(0, out.as_mut_bytes());
        Ok((returned, out))
    }

    /// The part of the release number after major and minor (".4" of 4.17.4); empty if the
    /// hypervisor does not report it.
    pub(super) fn extra_version(&self) -> String {
        let (number, cmd) = (sys::__HYPERVISOR_xen_version, sys::XENVER_extraversion);
        match self.with_struct(number, cmd, &[0_u8; EXTRA_VERSION]) {
            Ok((_, text)) => {
                let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
                String::from_utf8_lossy(text).into_owned()
            }
            Err(errno) => {
                tracing::debug!(%errno, "the hypervisor does not say which release it is");
                String::new()
            }
        }
    }

    /// Whether a domain has been given virtual NUMA nodes.
    pub(super) fn has_vnuma(&self, domid: DomId) -> Result<bool, Errno> {
        let mut ask = [0_u8; VNUMA_INFO];
        let [low, high] = domid.0.to_ne_bytes();
        (ask[0], ask[1]) = (low, high);
        let number = sys::__HYPERVISOR_memory_op;
        // If there is virtual NUMA but no buffer for it, Xen reports its size and ENOBUFS.
        match self.with_struct(number, XENMEM_GET_VNUMAINFO, &ask) {
            Ok(_) | Err(Errno::ENOBUFS) => Ok(true),
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// A domctl on a domain, with the member of the union that it uses.
    pub(super) fn domctl<T: FromBytes + IntoBytes + Immutable>(
        &self,
        cmd: u32,
        domid: DomId,
        body: &T,
    ) -> Result<T, Errno> {
        self.domctl_naming(cmd, domid, body, &mut [])
    }

    /// Likewise, with the buffers that the member names, in its order.
    pub(super) fn domctl_naming<T: FromBytes + IntoBytes + Immutable>(
        &self,
        cmd: u32,
        domid: DomId,
        body: &T,
        named: Named<'_, '_>,
    ) -> Result<T, Errno> {
        let version = self.interface.domctl;
        let (_, out) = domctl(&*self.raw, version, cmd, domid.0, body.as_bytes(), named)?;
        let (out, _) = T::read_from_prefix(&out).map_err(|_| Errno::EINVAL)?;
        Ok(out)
    }

    /// As [`Calls::domctl_naming`], for a domctl in whose member Xen explains a refusal: the member
    /// is returned with the errno.
    pub(super) fn domctl_telling<T: FromBytes + IntoBytes + Immutable>(
        &self,
        cmd: u32,
        domid: DomId,
        body: &T,
        named: Named<'_, '_>,
    ) -> Result<T, (Errno, Option<T>)> {
        let early = |errno| (errno, None);
        let (raw, version) = (&*self.raw, self.interface.domctl);
        let mut buffer =
            domctl_buffer(raw, version, cmd, domid.0, body.as_bytes()).map_err(early)?;
        let call = Call::domctl(&mut buffer, named).map_err(early)?;
        let result = raw.hypercall(call);
        let body = body_of(&buffer);
        let out = T::read_from_prefix(&body).ok().map(|(out, _)| out);
        match (result, out) {
            (Ok(_), Some(out)) => Ok(out),
            (Ok(_), None) => Err((Errno::EINVAL, None)),
            (Err(errno), out) => Err((errno, out)),
        }
    }

    /// A domctl without arguments.
    pub(super) fn plain_domctl(&self, cmd: u32, domid: DomId) -> Result<(), Errno> {
        domctl(
            &*self.raw,
            self.interface.domctl,
            cmd,
            domid.0,
            &[],
            &mut [],
        )
        .map(drop)
    }

    /// A buffer that holds `bytes`.
    pub(super) fn filled(&self, bytes: &[u8]) -> Result<CallBuffer, Errno> {
        filled(&*self.raw, bytes)
    }

    /// The first `bytes` bytes of a buffer.
    pub(super) fn contents(buffer: &CallBuffer, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        buffer.read(0, &mut out);
        out
    }

    /// `XEN_DOMCTL_getdomaininfo`. If no domain has this number, older hypervisors answer for the
    /// next domain.
    pub(super) fn info(&self, domid: DomId) -> Result<DomainInfo, Errno> {
        let (version, cmd) = (self.interface.domctl, sys::XEN_DOMCTL_getdomaininfo);
        let (_, body) = domctl(&*self.raw, version, cmd, domid.0, &[], &mut [])?;
        let info = (self.interface.decode_info)(&body).ok_or(Errno::EINVAL)?;
        match info.domid == domid.0 {
            true => Ok(info.to_domain_info()),
            false => Err(Errno::ESRCH),
        }
    }

    /// `XEN_SYSCTL_getdomaininfolist`: at most `max` domains from number `first` on.
    pub(super) fn list_domains(&self, first: u16, max: u32) -> Result<Vec<DomainInfo>, Errno> {
        let bytes = self.interface.info_bytes;
        let room = usize::try_from(max).map_err(|_| Errno::EINVAL)?;
        let mut list = self.raw.buffer(room * LARGEST_INFO)?;
        let mut body = sys::xen_sysctl_getdomaininfolist::new_zeroed();
        body.first_domain = first;
        body.max_domains = max;
        let cmd = sys::XEN_SYSCTL_getdomaininfolist;
        let answer = self.sysctl(cmd, &body, &mut [&mut list])?;
        let found = usize::try_from(answer.num_domains).map_err(|_| Errno::EINVAL)?;
        let infos = Self::contents(&list, found.min(room) * bytes);
        let infos = infos.chunks_exact(bytes);
        infos
            .map(|info| (self.interface.decode_info)(info).map(|info| info.to_domain_info()))
            .collect::<Option<Vec<DomainInfo>>>()
            .ok_or(Errno::EINVAL)
    }

    /// `XEN_SYSCTL_physinfo`.
    pub(super) fn physinfo(&self) -> Result<PhysInfo, Errno> {
        let answer = self.sysctl(sys::XEN_SYSCTL_physinfo, &[0; BODY], &mut [])?;
        (self.interface.decode_physinfo)(&answer).ok_or(Errno::EINVAL)
    }

    /// A sysctl, in the interface version of this Xen.
    pub(super) fn sysctl<T: FromBytes + IntoBytes + Immutable>(
        &self,
        cmd: u32,
        body: &T,
        named: Named<'_, '_>,
    ) -> Result<T, Errno> {
        let mut result = Err(Errno::EACCES);
        for version in self.interface.sysctl {
            result = self.sysctl_by(*version, cmd, body, &mut *named);
            if !matches!(result, Err(Errno::EACCES)) {
                break;
            }
        }
        result
    }

    fn sysctl_by<T: FromBytes + IntoBytes + Immutable>(
        &self,
        version: u32,
        cmd: u32,
        body: &T,
        named: Named<'_, '_>,
    ) -> Result<T, Errno> {
        let mut buffer = self.raw.buffer(SYSCTL_HEADER + BODY)?;
        buffer.write(0, &cmd.to_ne_bytes());
        buffer.write(4, &version.to_ne_bytes());
        buffer.write(SYSCTL_HEADER, body.as_bytes());
        self.raw.hypercall(Call::sysctl(&mut buffer, named)?)?;
        let mut out = T::new_zeroed();
        buffer.read(SYSCTL_HEADER, out.as_mut_bytes());
        Ok(out)
    }
}
