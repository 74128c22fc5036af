//! Single accesses to guest memory at its host address: whole, as the guest's own would be, and atomic where it asks.

use crate::size::Size;
use std::arch::asm;

/// One load of guest memory, whole as the guest's own would be.
///
/// # Safety
/// `pointer` names `T::BYTES` mapped bytes.
#[inline(always)]
pub(crate) unsafe fn read_host<T: Size>(pointer: *const u8) -> T {
    let value: u64;
    // SAFETY: the caller vouches for the bytes; the instruction changes nothing else.
    unsafe {
        match T::BITS {
            8 => {
                asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) pointer, options(nostack, preserves_flags))
            }
            16 => {
                asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) pointer, options(nostack, preserves_flags))
            }
            32 => asm!("mov {0:e}, [{1}]", out(reg) value, in(reg) pointer, options(nostack, preserves_flags)),
            _ => asm!("mov {0}, [{1}]", out(reg) value, in(reg) pointer, options(nostack, preserves_flags)),
        }
    }
    T::from_u64(value)
}

/// One store to guest memory.
///
/// # Safety
/// `pointer` names `T::BYTES` mapped, writable bytes.
#[inline(always)]
pub(crate) unsafe fn write_host<T: Size>(pointer: *mut u8, value: T) {
    let value = value.to_u64();
    // SAFETY: the caller vouches for the bytes.
    unsafe {
        match T::BITS {
            8 => asm!("mov [{1}], {0}", in(reg_byte) value as u8, in(reg) pointer, options(nostack, preserves_flags)),
            16 => asm!("mov [{1}], {0:x}", in(reg) value, in(reg) pointer, options(nostack, preserves_flags)),
            32 => asm!("mov [{1}], {0:e}", in(reg) value, in(reg) pointer, options(nostack, preserves_flags)),
            _ => asm!("mov [{1}], {0}", in(reg) value, in(reg) pointer, options(nostack, preserves_flags)),
        }
    }
}

/// A compare-and-swap loop.
///
/// # Safety
/// `pointer` names `T::BYTES` mapped, writable bytes inside one cache line.
#[inline(always)]
pub(crate) unsafe fn modify_atomically<T: Size, R>(pointer: *mut u8, mut change: impl FnMut(T) -> (T, R)) -> R {
    // SAFETY: the caller vouches for the bytes.
    let mut old: T = unsafe { read_host(pointer) };
    loop {
        let (new, result) = change(old);
        // SAFETY: as above.
        match unsafe { compare_exchange(pointer, old, new) } {
            Ok(()) => return result,
            Err(now) => old = now,
        }
    }
}

/// LOCK CMPXCHG, which unlike Rust's atomics need not be aligned.
///
/// # Safety
/// As for [`modify_atomically`].
#[inline(always)]
unsafe fn compare_exchange<T: Size>(pointer: *mut u8, old: T, new: T) -> Result<(), T> {
    let mut value = old.to_u64();
    let new = new.to_u64();
    // SAFETY: the caller vouches for the bytes.
    unsafe {
        match T::BITS {
            8 => {
                asm!("lock cmpxchg [{}], {}", in(reg) pointer, in(reg_byte) new as u8, inout("rax") value, options(nostack))
            }
            16 => asm!("lock cmpxchg [{}], {:x}", in(reg) pointer, in(reg) new, inout("rax") value, options(nostack)),
            32 => asm!("lock cmpxchg [{}], {:e}", in(reg) pointer, in(reg) new, inout("rax") value, options(nostack)),
            _ => asm!("lock cmpxchg [{}], {}", in(reg) pointer, in(reg) new, inout("rax") value, options(nostack)),
        }
    }
    let now = T::from_u64(value);
    if now == old { Ok(()) } else { Err(now) }
}
