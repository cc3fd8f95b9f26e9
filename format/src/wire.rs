//! Fixed-width field types for wire structs: byte arrays of alignment 1, whose value is read and
//! written in a byte order that is passed as an argument.
//!
//! A struct made of these has no padding and can be borrowed from any byte
//! slice with `zerocopy`.

use std::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::byte_order::ByteOrder;

macro_rules! field {
    ($(#[$doc:meta])* $name:ident, $int:ty, $bytes:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Default, PartialEq, Eq, Hash,
            FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
        )]
        #[repr(transparent)]
        pub(crate) struct $name([u8; $bytes]);

        impl $name {
            /// A field with `value` in the given order.
            pub(crate) const fn new(value: $int, order: ByteOrder) -> Self {
                Self(match order {
                    ByteOrder::Little => value.to_le_bytes(),
                    ByteOrder::Big => value.to_be_bytes(),
                })
            }

            /// Reads the value in the given order.
            pub(crate) const fn get(self, order: ByteOrder) -> $int {
                match order {
                    ByteOrder::Little => <$int>::from_le_bytes(self.0),
                    ByteOrder::Big => <$int>::from_be_bytes(self.0),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({:02x?})", stringify!($name), self.0)
            }
        }
    };
}

field!(
    /// A 16-bit field.
    U16, u16, 2
);
field!(
    /// A 32-bit field.
    U32, u32, 4
);
field!(
    /// A 64-bit field.
    U64, u64, 8
);

const _: () = {
    assert!(size_of::<U16>() == 2 && align_of::<U16>() == 1);
    assert!(size_of::<U32>() == 4 && align_of::<U32>() == 1);
    assert!(size_of::<U64>() == 8 && align_of::<U64>() == 1);
};
