//! Exchanges, which other processors see as one step.

use crate::core::{Core, gpr};
use crate::fault::Exec;
use crate::flags::{ZF, add, sized};
use crate::insn::{Insn, LOCK};
use crate::size::Size;
use std::arch::asm;

/// `cmpxchg $a, $b` against the whole of `$rax`, then the flags.
macro_rules! exchange {
    ($letter:literal, $a:ident, $b:ident, $rax:ident, $flags:ident) => {
        asm!(concat!("cmpxchg {a:", $letter, "}, {b:", $letter, "}"), "mov {b}, rax", "lahf", "seto al", "movzx {f:e}, ax",
             a = inout(reg) $a, b = inout(reg) $b => $rax, f = out(reg) $flags, inout("rax") $rax => _,
             options(pure, nomem, nostack))
    };
}

/// CMPXCHG of `a` by `b` against whole RAX: the new `a` and RAX, with flags; what of them changes is the host's choice.
#[inline(always)]
fn compare_exchange<T: Size>(mut a: u64, b: u64, mut rax: u64, arithmetic: &mut u16) -> (u64, u64) {
    let flags: u32;
    // SAFETY: the instructions touch nothing but their operands and the flags.
    unsafe { sized!(T, exchange, a, b, rax, flags) }
    *arithmetic = flags as u16;
    (a, rax)
}

/// CMPXCHG of the register in [`Insn::rm`] by that in [`Insn::reg`].
///
/// # Errors
/// None.
pub fn cmpxchg_register<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let b = core.read_reg::<T>(insn.reg).to_u64();
    let rax = core.regs[gpr::RAX];
    if T::BITS == 8 {
        // Perhaps a high byte.
        let a = core.read_reg::<T>(insn.rm).to_u64();
        let (a, rax) = compare_exchange::<T>(a, b, rax, &mut core.arithmetic);
        core.regs[gpr::RAX] = rax;
        core.write_reg(insn.rm, T::from_u64(a));
    } else {
        let a = core.read_reg::<u64>(insn.rm);
        let (a, rax) = compare_exchange::<T>(a, b, rax, &mut core.arithmetic);
        core.regs[gpr::RAX] = rax;
        core.write_reg(insn.rm, a);
    }
    Ok(())
}

/// CMPXCHG of memory by the register in [`Insn::reg`]. Memory is written in any case.
///
/// # Errors
/// What the store raises.
pub fn cmpxchg_memory<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, T::BYTES, true)?;
    let (new, expected) = (core.read_reg::<T>(insn.reg), core.read_reg::<T>(0));
    let old = core.modify(linear, insn.flags & LOCK != 0, |old: T| {
        (if old == expected { new } else { old }, old)
    })?;
    let rax = core.regs[gpr::RAX];
    let (_, rax) = compare_exchange::<T>(old.to_u64(), new.to_u64(), rax, &mut core.arithmetic);
    core.regs[gpr::RAX] = rax;
    Ok(())
}

/// XADD of the register in [`Insn::rm`] and that in [`Insn::reg`].
///
/// # Errors
/// None.
pub fn xadd_register<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let (old, addend) = (core.read_reg::<T>(insn.rm), core.read_reg::<T>(insn.reg));
    let sum = add(old, addend, &mut core.arithmetic);
    core.write_reg(insn.reg, old);
    core.write_reg(insn.rm, sum);
    Ok(())
}

/// XADD of memory and the register in [`Insn::reg`].
///
/// # Errors
/// What the store raises.
pub fn xadd_memory<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, T::BYTES, true)?;
    let addend = core.read_reg::<T>(insn.reg);
    let (old, flags) = core.modify(linear, insn.flags & LOCK != 0, |old: T| {
        let mut flags = 0;
        let sum = add(old, addend, &mut flags);
        (sum, (old, flags))
    })?;
    core.arithmetic = flags;
    core.write_reg(insn.reg, old);
    Ok(())
}

/// XCHG of memory and the register in [`Insn::reg`]: locked with or without the prefix.
///
/// # Errors
/// What the store raises.
pub fn xchg_memory<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, T::BYTES, true)?;
    let new = core.read_reg::<T>(insn.reg);
    let old = core.modify(linear, true, |old: T| (new, old))?;
    core.write_reg(insn.reg, old);
    Ok(())
}

fn set_zero_flag(core: &mut Core, on: bool) {
    core.arithmetic = core.arithmetic & !ZF | if on { ZF } else { 0 };
}

/// CMPXCHG8B.
///
/// # Errors
/// What the store raises.
pub fn cmpxchg8b(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, 8, true)?;
    let pair = |core: &Core, high: usize, low: usize| core.regs[high] << 32 | core.regs[low] & 0xffff_ffff;
    let (expected, new) = (pair(core, gpr::RDX, gpr::RAX), pair(core, gpr::RCX, gpr::RBX));
    let old = core.modify(linear, insn.flags & LOCK != 0, |old: u64| {
        (if old == expected { new } else { old }, old)
    })?;
    if old != expected {
        core.regs[gpr::RAX] = old & 0xffff_ffff;
        core.regs[gpr::RDX] = old >> 32;
    }
    set_zero_flag(core, old == expected);
    Ok(())
}

/// LOCK CMPXCHG16B on the host: the old value.
///
/// # Safety
/// `pointer` names 16 mapped, writable bytes, aligned to 16, and the host has CMPXCHG16B.
unsafe fn compare_exchange_16(pointer: *mut u8, expected: [u64; 2], new: [u64; 2]) -> [u64; 2] {
    let [mut low, mut high] = expected;
    // SAFETY: the caller vouches for the bytes. RBX is the compiler's own: it comes back. RDI, since any `reg` may be RBX.
    unsafe {
        asm!("xchg rbx, {new}", "lock cmpxchg16b [rdi]", "xchg rbx, {new}",
             new = inout(reg) new[0] => _, in("rdi") pointer, in("rcx") new[1],
             inout("rax") low, inout("rdx") high, options(nostack));
    }
    [low, high]
}

/// CMPXCHG16B.
///
/// # Errors
/// #GP(0) if the operand is not aligned to 16 bytes; what the store raises.
pub fn cmpxchg16b(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, 16, true)?;
    if linear % 16 != 0 {
        return core.general_protection();
    }
    let expected = [core.regs[gpr::RAX], core.regs[gpr::RDX]];
    let new = [core.regs[gpr::RBX], core.regs[gpr::RCX]];
    let old = match core.host_range(linear, 16, true)? {
        // SAFETY: the bytes are writable RAM, aligned as the guest physical address is.
        Some(pointer) => unsafe { compare_exchange_16(pointer, expected, new) },
        None => exchange_16_slowly(core, linear, expected, new)?,
    };
    if old != expected {
        [core.regs[gpr::RAX], core.regs[gpr::RDX]] = old;
    }
    set_zero_flag(core, old == expected);
    Ok(())
}

/// The operand lies in a page with code, under a break point, or not in RAM; the rights are checked.
#[cold]
fn exchange_16_slowly(core: &mut Core, linear: u64, expected: [u64; 2], new: [u64; 2]) -> Exec<[u64; 2]> {
    if let Some(gpa) = core.translate(linear)
        && let Some(pointer) = core.ram.host(gpa, 16)
    {
        // SAFETY: as in `cmpxchg16b`.
        let old = unsafe { compare_exchange_16(pointer, expected, new) };
        if core.ram.code().written(gpa, 16) {
            core.leave_block();
        }
        return Ok(old);
    }
    let old = [core.load(linear)?, core.load(linear + 8)?];
    let [low, high] = if old == expected { new } else { old };
    core.store(linear, low)?;
    core.store(linear + 8, high)?;
    Ok(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr::{RAX, RBX, RCX, RDX};
    use crate::fault::vector;
    use crate::flags::tests::{Operands, insn, whole};
    use crate::mmu::tests::core;

    /// CMPXCHG of RCX by RBX on the host: RAX, RCX, flags.
    macro_rules! reference {
        ($letter:literal, $rax:expr, $rcx:expr, $b:expr) => {{
            let (mut rax, mut rcx): (u64, u64) = ($rax, $rcx);
            let rflags: u64;
            // SAFETY: touches the operands, the flags and a stack slot.
            unsafe {
                asm!(concat!("cmpxchg {c:", $letter, "}, {b:", $letter, "}"), "pushfq", "pop {f}",
                    c = inout(reg) rcx, b = in(reg) $b, f = out(reg) rflags, inout("rax") rax)
            }
            (rax, rcx, rflags & 0x8d5 | 0x202)
        }};
    }

    #[test]
    fn compare_and_exchange_is_the_hosts() {
        let (mut core, mut operands) = (core(), Operands::new());
        let mut insn = insn(RBX, RCX, 0);
        insn.disp = 0x40;
        for round in 0..5_000 {
            let (a, b) = (operands.number(), operands.number());
            let rax = if round % 2 == 0 { a ^ 7 << 60 } else { operands.number() };
            macro_rules! check {
                ($size:ty, $letter:literal) => {{
                    let expected = reference!($letter, rax, a, b);
                    core.regs[RAX] = rax;
                    core.regs[RBX] = b;
                    core.regs[RCX] = a;
                    cmpxchg_register::<$size>(&mut core, &insn).unwrap();
                    assert_eq!((core.regs[RAX], core.regs[RCX], whole(core.arithmetic)), expected);
                    core.regs[RAX] = rax;
                    core.store(0x40, a).unwrap();
                    core.arithmetic = 0;
                    insn.flags = if b & 1 != 0 { LOCK } else { 0 };
                    cmpxchg_memory::<$size>(&mut core, &insn).unwrap();
                    assert_eq!((core.regs[RAX], whole(core.arithmetic)), (expected.0, expected.2));
                    assert_eq!(core.load::<$size>(0x40), Ok(expected.1 as $size));
                }};
            }
            check!(u8, "l");
            check!(u16, "x");
            check!(u32, "e");
            check!(u64, "r");
        }
    }

    #[test]
    fn a_failing_compare_still_needs_write_access() {
        let mut core = core();
        core.physical_write(0x4000, &0x8005u64.to_le_bytes());
        core.mmu.flush();
        core.regs[RAX] = 1;
        assert!(cmpxchg_memory::<u32>(&mut core, &insn(RBX, RCX, 0)).is_err());
        assert_eq!((core.raised.vector, core.raised.error), (vector::PF, Some(3)));
    }

    #[test]
    fn sums_and_swaps() {
        let mut core = core();
        let mut insn = insn(RBX, RBX, 0);
        core.regs[RBX] = 0x21;
        xadd_register::<u32>(&mut core, &insn).unwrap();
        assert_eq!(core.regs[RBX], 0x42, "the sum goes over the old value");
        insn.disp = 0xffe;
        core.store(0xffe, 0xffff_ffffu32).unwrap();
        core.regs[RBX] = u64::MAX << 32 | 1;
        xadd_memory::<u32>(&mut core, &insn).unwrap();
        assert_eq!((core.load::<u32>(0xffe), core.regs[RBX]), (Ok(0), 0xffff_ffff));
        assert_ne!(core.arithmetic & ZF, 0);
        core.regs[RBX] = 0x1234;
        xchg_memory::<u16>(&mut core, &insn).unwrap();
        assert_eq!((core.load::<u16>(0xffe), core.regs[RBX]), (Ok(0x1234), 0));
    }

    #[test]
    fn pairs_change_only_when_equal() {
        let mut core = core();
        let mut insn = insn(0, 0, 0);
        insn.disp = 0x20;
        core.store(0x20, 0x1_0000_0002u64).unwrap();
        core.store(0x28, 7u64).unwrap();
        core.regs[..4].copy_from_slice(&[u64::MAX << 32 | 2, 4, 0, 3]);
        cmpxchg8b(&mut core, &insn).unwrap();
        assert_eq!((core.regs[RAX], core.regs[RDX], core.arithmetic & ZF), (2, 1, 0));
        cmpxchg8b(&mut core, &insn).unwrap();
        assert_eq!((core.load::<u64>(0x20), core.arithmetic & ZF), (Ok(0x4_0000_0003), ZF));
        cmpxchg16b(&mut core, &insn).unwrap();
        assert_eq!(
            (core.regs[RAX], core.regs[RDX], core.arithmetic & ZF),
            (0x4_0000_0003, 7, 0)
        );
        cmpxchg16b(&mut core, &insn).unwrap();
        assert_eq!((core.load::<u64>(0x20), core.load::<u64>(0x28)), (Ok(3), Ok(4)));
        assert_ne!(core.arithmetic & ZF, 0);
        insn.disp = 0x28;
        assert!(cmpxchg16b(&mut core, &insn).is_err());
        assert_eq!((core.raised.vector, core.raised.error), (vector::GP, Some(0)));
    }

    #[test]
    fn a_pair_exchanged_over_code_drops_the_code() {
        let mut core = core();
        core.ram.code().page(0x8000).mark(0x20, 16);
        let before = core.ram.code().page(0x8000).version();
        let mut insn = insn(0, 0, 0);
        insn.disp = 0x20;
        core.regs[..4].copy_from_slice(&[0, 4, 0, 3]);
        cmpxchg16b(&mut core, &insn).unwrap();
        assert_eq!((core.load::<u64>(0x20), core.load::<u64>(0x28)), (Ok(3), Ok(4)));
        assert_ne!(core.ram.code().page(0x8000).version(), before);
    }

    #[test]
    fn locked_instructions_of_two_processors_lose_nothing() {
        const ROUNDS: u64 = 20_000;
        let first = core();
        let mut second = core();
        second.ram = first.ram.clone();
        second.mmu.flush();
        let work = |mut core: Box<Core>| {
            let mut sum = insn(RBX, RCX, 0);
            (sum.flags, sum.disp) = (LOCK, 0x100);
            let mut pair = sum;
            pair.disp = 0x200;
            let mut single = sum;
            single.disp = 0x13c;
            for _ in 0..ROUNDS {
                core.regs[RBX] = 1;
                xadd_memory::<u32>(&mut core, &sum).unwrap();
                // The operand crosses a cache line.
                core.regs[RAX] = core.load(0x13c).unwrap();
                loop {
                    core.regs[RBX] = core.regs[RAX].wrapping_add(1);
                    cmpxchg_memory::<u64>(&mut core, &single).unwrap();
                    if core.arithmetic & ZF != 0 {
                        break;
                    }
                }
                loop {
                    core.regs[RBX] = core.regs[RAX].wrapping_add(1);
                    core.regs[RCX] = core.regs[RDX].wrapping_sub(1);
                    cmpxchg16b(&mut core, &pair).unwrap();
                    if core.arithmetic & ZF != 0 {
                        break;
                    }
                }
            }
            core
        };
        let mut core = std::thread::scope(|scope| {
            let other = scope.spawn(|| work(second));
            let core = work(first);
            other.join().unwrap();
            core
        });
        assert_eq!(core.load::<u32>(0x100), Ok(2 * ROUNDS as u32));
        assert_eq!(core.load::<u64>(0x13c), Ok(2 * ROUNDS));
        assert_eq!(core.load::<u64>(0x200), Ok(2 * ROUNDS));
        assert_eq!(core.load::<u64>(0x208), Ok((2 * ROUNDS).wrapping_neg()));
    }
}
