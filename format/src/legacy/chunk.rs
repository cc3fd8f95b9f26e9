//! Markers of legacy chunks: the signed word before each chunk.
//!
//! | marker | what follows |
//! |---|---|
//! | 1 to 1024 | that number of pages: entries, then contents |
//! | 0 | the tail |
//! | −1 to −20 | metadata, see [`Marker`] |
//!
//! C implementation: `XC_SAVE_ID_*` in `tools/libxc/xg_save_restore.h` (Xen 4.5).

use std::fmt;

/// The kind of chunk that follows.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Marker(pub i32);

impl Marker {
    /// The body has ended; the tail follows.
    pub const END: Self = Self(0);
    /// All pages follow again, for comparison.
    pub const ENABLE_VERIFY_MODE: Self = Self(-1);
    /// The vcpus that are present.
    pub const VCPU_INFO: Self = Self(-2);
    /// Transcendent memory, dropped in Xen 4.13.
    pub const TMEM: Self = Self(-5);
    /// Pages of transcendent memory that became invalid meanwhile.
    pub const TMEM_EXTRA: Self = Self(-6);
    /// The TSC.
    pub const TSC_INFO: Self = Self(-7);
    /// The checkpoint that ends with the next tail is the last one.
    pub const LAST_CHECKPOINT: Self = Self(-9);
    /// Pages as differences (Remus).
    pub const COMPRESSED_DATA: Self = Self(-12);
    /// From the next checkpoint on, pages are sent as differences.
    pub const ENABLE_COMPRESSION: Self = Self(-13);
    /// State of the toolstack: libxl's physmap.
    pub const TOOLSTACK: Self = Self(-18);

    /// The name in Xen's header; `None` if it defines none.
    pub const fn name(self) -> Option<&'static str> {
        Some(match self.0 {
            0 => "end",
            -1 => "enable_verify_mode",
            -2 => "vcpu_info",
            -3 => "hvm_ident_pt",
            -4 => "hvm_vm86_tss",
            -5 => "tmem",
            -6 => "tmem_extra",
            -7 => "tsc_info",
            -8 => "hvm_console_pfn",
            -9 => "last_checkpoint",
            -10 => "hvm_acpi_ioports_location",
            -11 => "hvm_viridian",
            -12 => "compressed_data",
            -13 => "enable_compression",
            -14 => "hvm_generation_id_addr",
            -15 => "hvm_paging_ring_pfn",
            -16 => "hvm_monitor_ring_pfn",
            -17 => "hvm_sharing_ring_pfn",
            -18 => "toolstack",
            -19 => "hvm_ioreq_server_pfn",
            -20 => "hvm_nr_ioreq_server_pages",
            _ => return None,
        })
    }

    /// The index of the HVM parameter (`HVM_PARAM_*`) that such a chunk holds, if it
    /// holds one.
    pub const fn hvm_param(self) -> Option<u64> {
        Some(match self.0 {
            -3 => 12,
            -4 => 15,
            -8 => 17,
            -10 => 19,
            -11 => 9,
            -14 => 34,
            -15 => 27,
            -16 => 28,
            -17 => 29,
            -19 => 32,
            -20 => 33,
            _ => return None,
        })
    }
}

impl fmt::Display for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.name(), self.0) {
            (Some(name), number) => write!(f, "{number}, {name}"),
            (None, 1..) => write!(f, "{} pages", self.0),
            (None, number) => write!(f, "{number}, unknown"),
        }
    }
}

impl fmt::Debug for Marker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Marker({self})")
    }
}
