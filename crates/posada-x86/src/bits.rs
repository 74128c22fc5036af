//! Bit tests, scans, counts and byte swaps.

use crate::core::Core;
use crate::fault::Exec;
use crate::flags::{compare, two, wide};
use crate::insn::{COMPLEX, Insn, LOCK};
use crate::operand::{Place, Source};
use crate::size::Size;
use std::arch::asm;

/// The flags of BT.
#[inline(always)]
fn test_bit<T: Size>(value: T, bit: T, arithmetic: &mut u16) {
    let (a, b) = (value.to_u64(), bit.to_u64());
    // SAFETY: the instructions touch nothing but their operands and the flags.
    unsafe { wide!(T, compare, "add al, 0x7f\nsahf", "bt", a, b, inout("ax") * arithmetic) }
}

/// Linear address of the operand-sized unit of a bit string that holds the bit a register names, and that bit: the
/// register is a signed offset from the memory operand, in bits.
#[inline(always)]
fn locate<T: Size>(core: &mut Core, insn: &Insn, write: bool) -> Exec<(u64, T)> {
    let bit = core.read_reg::<T>(insn.reg);
    let distance = ((bit.to_i64() >> T::BITS.trailing_zeros()) * T::BYTES as i64) as u64;
    let offset = core.offset_of(insn).wrapping_add(distance);
    if insn.flags & COMPLEX == 0 {
        return Ok((offset, bit));
    }
    let offset = offset & insn.address_mask();
    let linear = core.segment_linear(insn.segment.into(), offset, T::BYTES, write)?;
    Ok((linear, bit))
}

/// BT of `D`, a register, or memory with an immediate: the bit number `S` wraps inside the operand.
///
/// # Errors
/// What the operand raises.
pub fn bt<T: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let bit = S::read::<T>(core, insn)?;
    let value = D::read::<T>(core, insn)?;
    test_bit(value, bit, &mut core.arithmetic);
    Ok(())
}

/// BT of memory by the register in [`Insn::reg`], which reaches beyond the operand.
///
/// # Errors
/// What the operand raises.
pub fn bt_string<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let (linear, bit) = locate::<T>(core, insn, false)?;
    let value = core.load::<T>(linear)?;
    test_bit(value, bit, &mut core.arithmetic);
    Ok(())
}

macro_rules! bit_changes {
    ($($change:ident, $name:ident, $string:ident, $op:literal, $mnemonic:literal;)*) => {$(
        #[inline(always)]
        fn $change<T: Size>(value: T, bit: T, arithmetic: u16) -> (T, u16) {
            let (mut a, b, mut flags) = (value.to_u64(), bit.to_u64(), arithmetic);
            // SAFETY: the instructions touch nothing but their operands and the flags.
            unsafe { wide!(T, two, "add al, 0x7f\nsahf", $op, "", a, b, inout("ax") flags) }
            (T::from_u64(a), flags)
        }

        #[doc = $mnemonic]
        /// of `D`, a register, or memory with an immediate: the bit number `S` wraps inside the operand.
        ///
        /// # Errors
        /// What the operand raises.
        pub fn $name<T: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
            let bit = S::read::<T>(core, insn)?;
            let before = core.arithmetic;
            core.arithmetic = D::modify(core, insn, |value| $change::<T>(value, bit, before))?;
            Ok(())
        }

        #[doc = $mnemonic]
        /// of memory by the register in [`Insn::reg`], which reaches beyond the operand.
        ///
        /// # Errors
        /// What the operand raises.
        pub fn $string<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
            let (linear, bit) = locate::<T>(core, insn, true)?;
            let (before, lock) = (core.arithmetic, insn.flags & LOCK != 0);
            core.arithmetic = core.modify(linear, lock, |value| $change::<T>(value, bit, before))?;
            Ok(())
        }
    )*};
}

bit_changes! {
    set_bit, bts, bts_string, "bts", "BTS";
    reset_bit, btr, btr_string, "btr", "BTR";
    complement_bit, btc, btc_string, "btc", "BTC";
}

macro_rules! scans {
    ($($(#[$doc:meta])* $name:ident, $op:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// What the source raises.
        pub fn $name<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
            let b = S::read::<T>(core, insn)?.to_u64();
            // The whole register goes in and out: what of it changes is the host's choice.
            let mut a = core.read_reg::<u64>(insn.reg);
            // SAFETY: the instructions touch nothing but their operands and the flags.
            unsafe { wide!(T, two, "add al, 0x7f\nsahf", $op, "", a, b, inout("ax") core.arithmetic) }
            core.write_reg(insn.reg, a);
            Ok(())
        }
    )*};
}

scans! {
    /// BSF into the register in [`Insn::reg`].
    bsf, "bsf";
    /// BSR into the register in [`Insn::reg`].
    bsr, "bsr";
    /// TZCNT into the register in [`Insn::reg`]; BSF on a host without it, as on the guest's processor.
    tzcnt, "tzcnt";
    /// LZCNT into the register in [`Insn::reg`]; BSR on a host without it.
    lzcnt, "lzcnt";
    /// POPCNT into the register in [`Insn::reg`]; for hosts that have it.
    popcnt, "popcnt";
}

/// BSWAP of the register in [`Insn::reg`]; the manual leaves its 16-bit form undefined, the host does not.
///
/// # Errors
/// None.
pub fn bswap<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let mut value = core.read_reg::<u64>(insn.reg);
    // SAFETY: the instruction touches nothing but its operand.
    unsafe {
        match T::BITS {
            // Assemblers refuse `bswap ax`.
            16 => {
                asm!(".byte 0x66, 0x0f, 0xc8", inout("rax") value, options(pure, nomem, nostack, preserves_flags))
            }
            32 => asm!("bswap {0:e}", inout(reg) value, options(pure, nomem, nostack, preserves_flags)),
            _ => asm!("bswap {0}", inout(reg) value, options(pure, nomem, nostack, preserves_flags)),
        }
    }
    core.write_reg(insn.reg, value);
    Ok(())
}

fn swapped<T: Size>(value: T) -> T {
    T::from_u64(value.to_u64().swap_bytes() >> (64 - T::BITS))
}

/// MOVBE from memory to the register in [`Insn::reg`].
///
/// # Errors
/// What the load raises.
pub fn movbe_load<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, T::BYTES, false)?;
    let value = core.load::<T>(linear)?;
    core.write_reg(insn.reg, swapped(value));
    Ok(())
}

/// MOVBE from the register in [`Insn::reg`] to memory.
///
/// # Errors
/// What the store raises.
pub fn movbe_store<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, T::BYTES, true)?;
    let value = core.read_reg::<T>(insn.reg);
    core.store(linear, swapped(value))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr::{RAX, RBX, RCX};
    use crate::flags::CF;
    use crate::flags::tests::{Operands, insn, reference, whole};
    use crate::insn::{ADDRESS16, ADDRESS32};
    use crate::mmu::tests::core;
    use crate::operand::{Imm, Mem, Reg, Rm};

    #[test]
    fn bits_of_registers_are_the_hosts() {
        let (mut core, mut operands) = (core(), Operands::new());
        let insn = insn(RBX, RAX, 0);
        for _ in 0..5_000 {
            let (a, b, before) = (operands.number(), operands.number(), operands.flags());
            macro_rules! check {
                ($op:literal, $handler:expr, $register:expr) => {{
                    core.regs[RAX] = a;
                    core.regs[RBX] = b;
                    core.arithmetic = before;
                    $handler(&mut core, &insn).unwrap();
                    // Scans read what tests change.
                    let (first, second) = if $register == RAX { (a, b) } else { (b, a) };
                    let expected = reference!($op, first, second, 0u64, whole(before));
                    assert_eq!(
                        (core.regs[$register], whole(core.arithmetic)),
                        expected,
                        "{} {a:#x} {b:#x}",
                        $op
                    );
                }};
            }
            check!("bt {a:x}, {b:x}", bt::<u16, Rm, Reg>, RAX);
            check!("bt {a:e}, {b:e}", bt::<u32, Rm, Reg>, RAX);
            check!("bt {a}, {b}", bt::<u64, Rm, Reg>, RAX);
            check!("bts {a:x}, {b:x}", bts::<u16, Rm, Reg>, RAX);
            check!("bts {a}, {b}", bts::<u64, Rm, Reg>, RAX);
            check!("btr {a}, {b}", btr::<u64, Rm, Reg>, RAX);
            check!("btc {a}, {b}", btc::<u64, Rm, Reg>, RAX);
            check!("bsf {a:x}, {b:x}", bsf::<u16, Rm>, RBX);
            check!("bsf {a:e}, {b:e}", bsf::<u32, Rm>, RBX);
            check!("bsf {a}, {b}", bsf::<u64, Rm>, RBX);
            check!("bsr {a:e}, {b:e}", bsr::<u32, Rm>, RBX);
            check!("tzcnt {a:x}, {b:x}", tzcnt::<u16, Rm>, RBX);
            check!("tzcnt {a}, {b}", tzcnt::<u64, Rm>, RBX);
            check!("lzcnt {a:e}, {b:e}", lzcnt::<u32, Rm>, RBX);
            check!("popcnt {a}, {b}", popcnt::<u64, Rm>, RBX);
            check!("bswap {a:e}", bswap::<u32>, RBX);
            check!("bswap {a}", bswap::<u64>, RBX);
            core.regs[RBX] = b;
            bswap::<u16>(&mut core, &insn).unwrap();
            assert_eq!(core.regs[RBX] & !0xffff, b & !0xffff);
        }
    }

    #[test]
    fn bit_strings_reach_both_ways_and_immediates_do_not() {
        let (mut core, mut operands) = (core(), Operands::new());
        let mut insn = insn(RBX, RAX, 0);
        (insn.base, insn.disp) = (RCX as u8 * 8, 0x800);
        core.regs[RCX] = 0x400;
        let mut mirror = [0u8; 0x2000];
        let base = mirror.as_mut_ptr().wrapping_add(0xc00);
        for round in 0..5_000 {
            // 16-bit operands keep to what 15 bits reach.
            let bit = (operands.bits() as i64 >> 51) as u64;
            core.regs[RBX] = bit;
            let carry: u8;
            macro_rules! check {
                ($op:literal, $handler:expr) => {{
                    $handler(&mut core, &insn).unwrap();
                    // SAFETY: 4096 bits to either side lie in the mirror.
                    unsafe { asm!($op, "setc {c}", b = in(reg) bit, p = in(reg) base, c = out(reg_byte) carry) }
                }};
            }
            match round % 6 {
                0 => check!("bts word ptr [{p}], {b:x}", bts_string::<u16>),
                1 => check!("btr dword ptr [{p}], {b:e}", btr_string::<u32>),
                2 => check!("btc qword ptr [{p}], {b:r}", btc_string::<u64>),
                3 => check!("bt word ptr [{p}], {b:x}", bt_string::<u16>),
                4 => check!("bt dword ptr [{p}], {b:e}", bt_string::<u32>),
                _ => check!("bts qword ptr [{p}], {b:r}", bts_string::<u64>),
            }
            assert_eq!(core.arithmetic & CF != 0, carry != 0);
        }
        for at in (0..0x2000).step_by(8) {
            let expected = u64::from_le_bytes(mirror[at..at + 8].try_into().unwrap());
            assert_eq!(core.load::<u64>(at as u64), Ok(expected), "{at:#x}");
        }
        core.store(0xc00, 0u64).unwrap();
        (insn.imm, insn.flags) = (35, LOCK);
        bts::<u32, Mem, Imm>(&mut core, &insn).unwrap();
        assert_eq!(core.load::<u64>(0xc00), Ok(8));
    }

    #[test]
    fn bit_strings_wrap_in_the_address_size() {
        let mut core = core();
        let mut insn = insn(RBX, RAX, 0);
        insn.flags = COMPLEX | ADDRESS32;
        core.store(0xff8, 1u64 << 63).unwrap();
        insn.disp = 0x1000;
        core.regs[RBX] = -1i64 as u64;
        bt_string::<u64>(&mut core, &insn).unwrap();
        assert_ne!(core.arithmetic & CF, 0);
        insn.flags = COMPLEX | ADDRESS16;
        insn.disp = 0;
        assert!(bt_string::<u16>(&mut core, &insn).is_err());
        assert_eq!(core.raised.address, 0xfffe);
    }

    #[test]
    fn movbe_swaps() {
        let mut core = core();
        let mut insn = insn(RBX, RAX, 0);
        insn.disp = 0x10;
        core.regs[RBX] = 0x1122_3344_5566_7788;
        movbe_store::<u64>(&mut core, &insn).unwrap();
        assert_eq!(core.load::<u32>(0x10), Ok(0x4433_2211));
        movbe_load::<u16>(&mut core, &insn).unwrap();
        assert_eq!(core.regs[RBX], 0x1122_3344_5566_1122);
        movbe_load::<u32>(&mut core, &insn).unwrap();
        assert_eq!(core.regs[RBX], 0x1122_3344);
    }
}
