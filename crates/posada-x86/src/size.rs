//! Operand sizes as types.

/// An unsigned integer of 8, 16, 32 or 64 bits.
pub trait Size: Copy + Eq + Ord + Default + Send + Sync + 'static {
    /// Bits.
    const BITS: u32;
    /// Bytes.
    const BYTES: u64 = Self::BITS as u64 / 8;
    /// Zero-extends.
    fn to_u64(self) -> u64;
    /// Sign-extends.
    fn to_i64(self) -> i64;
    /// Truncates.
    fn from_u64(value: u64) -> Self;
}

macro_rules! size {
    ($($unsigned:ty, $signed:ty;)*) => {$(
        impl Size for $unsigned {
            const BITS: u32 = <$unsigned>::BITS;
            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }
            #[inline(always)]
            fn to_i64(self) -> i64 {
                self as $signed as i64
            }
            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as Self
            }
        }
    )*};
}

size! { u8, i8; u16, i16; u32, i32; u64, i64; }
