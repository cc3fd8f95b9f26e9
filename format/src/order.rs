//! Order of the records in a libxc stream: the rules of the specification's "Layout", as one state
//! machine for each guest type.
//!
//! Enforces only real dependencies, where a record cannot be understood or used without an earlier
//! one:
//!
//! | rule | why |
//! |---|---|
//! | nothing after END | what follows does not belong to the stream |
//! | X86_PV_INFO, X86_CPUID_POLICY, X86_MSR_POLICY before STATIC_DATA_END | it completes them |
//! | X86_PV_P2M_FRAMES, PAGE_DATA after STATIC_DATA_END (v3) | setting up the guest needs it |
//! | X86_PV_INFO → X86_PV_P2M_FRAMES → PAGE_DATA → X86_PV_VCPU_* | width, range, types |
//! | X86_PV_INFO → SHARED_INFO | its layout depends on the width |
//! | X86_PV_INFO, STATIC_DATA_END once | a second would contradict the first |
//! | END and CHECKPOINT only when the state is complete | a restorer could not run the guest |
//!
//! In a v2 stream static data ends at the first X86_PV_P2M_FRAMES (PV) or PAGE_DATA (HVM).
//! HVM_PARAMS and HVM_CONTEXT may come in either order: the specification wants params first, Xen
//! writes them last, a restorer applies params first.
//!
//! C implementation: the `seen_*` flags of `xg_sr_restore.c` and
//! `xg_sr_restore_x86_pv.c`.

use thiserror::Error;

use crate::error::DecodeError;
use crate::frame::Pfn;
use crate::image::{GuestType, Version};
use crate::record::{Body, Record, RecordKind};

/// A record that is out of place.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum OrderError {
    /// It depends on a record that has not come yet.
    #[error("{kind} before {missing}, which it depends on")]
    Needs {
        /// The record.
        kind: RecordKind,
        /// The record that must come before.
        missing: RecordKind,
    },
    /// Static data after its end.
    #[error("{kind} after STATIC_DATA_END, where it would have no effect")]
    StaticDataOver {
        /// The record.
        kind: RecordKind,
    },
    /// It may come only once.
    #[error("{kind} for the second time")]
    Repeated {
        /// The record.
        kind: RecordKind,
    },
    /// It belongs to another type of guest.
    #[error("{kind} in the stream of a guest of type {guest_type}, which has none")]
    OtherGuest {
        /// The record.
        kind: RecordKind,
        /// The guest type in the domain header.
        guest_type: GuestType,
    },
    /// It belongs to the back channel.
    #[error("{kind} belongs on the back-channel, from secondary to primary")]
    BackChannel {
        /// The record.
        kind: RecordKind,
    },
    /// The state ends before it is complete.
    #[error(
        "{kind} although no {missing} has come: the state is incomplete and cannot be restored"
    )]
    Incomplete {
        /// END or CHECKPOINT.
        kind: RecordKind,
        /// The missing record.
        missing: RecordKind,
    },
}

// A kind without a bit in `Order::seen` would not be remembered.
const _: () = {
    let mut rest = RecordKind::ALL;
    while let [kind, others @ ..] = rest {
        assert!(kind.0 < u32::BITS, "Order::seen needs a wider set");
        rest = others;
    }
};

/// The state machine.
#[derive(Clone, Debug)]
pub(crate) struct Order {
    version: Version,
    guest_type: GuestType,
    /// Bit n: a record of kind n has come.
    seen: u32,
    static_data_over: bool,
    guest_width: Option<u8>,
    max_pfn: Option<Pfn>,
}

impl Order {
    /// The state at the start of a stream, after its headers.
    pub(crate) const fn new(version: Version, guest_type: GuestType) -> Self {
        Self {
            version,
            guest_type,
            seen: 0,
            static_data_over: false,
            guest_width: None,
            max_pfn: None,
        }
    }

    /// Whether static data is complete: STATIC_DATA_END has come, or is inferred.
    pub(crate) const fn static_data_over(&self) -> bool {
        self.static_data_over
    }

    /// Width of the PV guest in bytes, known after X86_PV_INFO.
    pub(crate) const fn guest_width(&self) -> Option<u8> {
        self.guest_width
    }

    /// The last pfn that X86_PV_P2M_FRAMES announced.
    pub(crate) const fn max_pfn(&self) -> Option<Pfn> {
        self.max_pfn
    }

    /// The bit of a kind in `seen`. Every named kind has one: see below.
    const fn bit(kind: RecordKind) -> u32 {
        // Kinds without a bit (unknown optional ones) are never queried.
        match 1_u32.checked_shl(kind.0) {
            Some(bit) => bit,
            None => 0,
        }
    }

    const fn has(&self, kind: RecordKind) -> bool {
        self.seen & Self::bit(kind) != 0
    }

    fn needs(&self, kind: RecordKind, missing: RecordKind) -> Result<(), OrderError> {
        match self.has(missing) {
            true => Ok(()),
            false => Err(OrderError::Needs { kind, missing }),
        }
    }

    /// Checks whether a record of `kind` may come now. Called after its header has been read.
    ///
    /// # Errors
    ///
    /// The broken rule.
    pub(crate) fn admit(&mut self, kind: RecordKind) -> Result<(), DecodeError> {
        use RecordKind as K;
        if self.version < Version::V3
            && matches!(
                kind,
                K::STATIC_DATA_END | K::X86_CPUID_POLICY | K::X86_MSR_POLICY
            )
        {
            let version = self.version;
            return Err(DecodeError::NotInVersion { kind, version });
        }
        if kind == K::TOOLSTACK {
            return Err(DecodeError::Deprecated);
        }
        if kind == K::CHECKPOINT_DIRTY_PFN_LIST {
            return Err(OrderError::BackChannel { kind }.into());
        }
        self.admit_for_guest(kind)?;
        if matches!(kind, K::X86_PV_INFO | K::STATIC_DATA_END) && self.has(kind) {
            return Err(OrderError::Repeated { kind }.into());
        }
        self.admit_static_data(kind)?;
        if matches!(kind, K::END | K::CHECKPOINT)
            && let Some(missing) = self.missing()
        {
            return Err(OrderError::Incomplete { kind, missing }.into());
        }
        if !matches!(
            kind,
            // Whether these count depends on their contents: see `note`.
            K::X86_PV_VCPU_BASIC
        ) {
            self.seen |= Self::bit(kind);
        }
        Ok(())
    }

    /// Checks the chain of a PV guest's records, and that the record belongs to this guest type.
    fn admit_for_guest(&self, kind: RecordKind) -> Result<(), OrderError> {
        use RecordKind as K;
        let guest_type = self.guest_type;
        let (pv, hvm) = (
            guest_type == GuestType::X86_PV,
            guest_type == GuestType::X86_HVM,
        );
        match kind {
            K::X86_PV_INFO
            | K::X86_PV_P2M_FRAMES
            | K::X86_PV_VCPU_BASIC
            | K::X86_PV_VCPU_EXTENDED
            | K::X86_PV_VCPU_XSAVE
            | K::X86_PV_VCPU_MSRS
            | K::SHARED_INFO
                if hvm =>
            {
                Err(OrderError::OtherGuest { kind, guest_type })
            }
            K::HVM_CONTEXT | K::HVM_PARAMS if pv => {
                Err(OrderError::OtherGuest { kind, guest_type })
            }
            // For a guest type unknown to this version there are no rules.
            _ if !pv => Ok(()),
            K::X86_PV_P2M_FRAMES | K::SHARED_INFO => self.needs(kind, K::X86_PV_INFO),
            K::PAGE_DATA => {
                self.needs(kind, K::X86_PV_INFO)?;
                self.needs(kind, K::X86_PV_P2M_FRAMES)
            }
            K::X86_PV_VCPU_BASIC
            | K::X86_PV_VCPU_EXTENDED
            | K::X86_PV_VCPU_XSAVE
            | K::X86_PV_VCPU_MSRS => {
                self.needs(kind, K::X86_PV_INFO)?;
                self.needs(kind, K::X86_PV_P2M_FRAMES)?;
                self.needs(kind, K::PAGE_DATA)
            }
            _ => Ok(()),
        }
    }

    /// Tracks the end of static data, and checks which records may come before or after it.
    fn admit_static_data(&mut self, kind: RecordKind) -> Result<(), OrderError> {
        use RecordKind as K;
        match kind {
            K::X86_PV_INFO | K::X86_CPUID_POLICY | K::X86_MSR_POLICY if self.static_data_over => {
                Err(OrderError::StaticDataOver { kind })
            }
            K::STATIC_DATA_END => {
                if self.guest_type == GuestType::X86_PV {
                    self.needs(kind, K::X86_PV_INFO)?;
                }
                self.static_data_over = true;
                Ok(())
            }
            K::X86_PV_P2M_FRAMES | K::PAGE_DATA => match self.version {
                Version::V2 => {
                    self.static_data_over = true;
                    Ok(())
                }
                Version::V3 if self.static_data_over => Ok(()),
                Version::V3 => Err(OrderError::Needs {
                    kind,
                    missing: K::STATIC_DATA_END,
                }),
            },
            _ => Ok(()),
        }
    }

    /// A record that a restorer needs and that has not come.
    fn missing(&self) -> Option<RecordKind> {
        use RecordKind as K;
        let needed: &[RecordKind] = match self.guest_type {
            GuestType::X86_PV => &[
                K::X86_PV_INFO,
                K::X86_PV_P2M_FRAMES,
                K::PAGE_DATA,
                K::SHARED_INFO,
                K::X86_PV_VCPU_BASIC,
            ],
            GuestType::X86_HVM => &[K::PAGE_DATA, K::HVM_CONTEXT],
            _ => &[],
        };
        needed.iter().copied().find(|kind| !self.has(*kind))
    }

    /// Updates the state with the contents of an admitted record.
    pub(crate) fn note(&mut self, record: &Record<'_>) {
        match record.body {
            Body::PvInfo(info) => self.guest_width = Some(info.width()),
            Body::P2mFrames(frames) => {
                // A guest that has grown sends a second record; the range never shrinks.
                self.max_pfn = self.max_pfn.max(Some(frames.end));
            }
            Body::Vcpu(vcpu)
                if record.kind == RecordKind::X86_PV_VCPU_BASIC
                    && vcpu.vcpu == 0
                    && !vcpu.state.is_empty() =>
            {
                self.seen |= Self::bit(record.kind);
            }
            _ => {}
        }
    }
}
