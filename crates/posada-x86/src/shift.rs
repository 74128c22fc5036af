//! Shifts and rotations. The host masks the count, and leaves the flags alone where the guest's processor would.

use crate::core::{Core, gpr};
use crate::fault::Exec;
use crate::flags::{one, sized, two, wide};
use crate::insn::Insn;
use crate::operand::{Place, Source};
use crate::size::Size;
use std::arch::asm;

/// The count in CL; shifts by 1 take an immediate of 1.
pub struct Cl;

impl Source for Cl {
    #[inline(always)]
    fn read<T: Size>(core: &mut Core, _: &Insn) -> Exec<T> {
        Ok(T::from_u64(core.regs[gpr::RCX]))
    }
}

macro_rules! shifts {
    ($($(#[$doc:meta])* $name:ident, $op:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// What the destination raises.
        pub fn $name<T: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
            let count: u8 = S::read(core, insn)?;
            let before = core.arithmetic;
            core.arithmetic = D::modify::<T, u16>(core, insn, |value| {
                let (mut a, mut flags) = (value.to_u64(), before);
                // SAFETY: the instructions touch nothing but their operands and the flags.
                unsafe {
                    sized!(T, one, "add al, 0x7f\nsahf", $op, ", cl", a, inout("ax") flags, in("cl") count)
                }
                (T::from_u64(a), flags)
            })?;
            Ok(())
        }
    )*};
}

shifts! {
    /// ROL.
    rol, "rol";
    /// ROR.
    ror, "ror";
    /// RCL.
    rcl, "rcl";
    /// RCR.
    rcr, "rcr";
    /// SHL and SAL.
    shl, "shl";
    /// SHR.
    shr, "shr";
    /// SAR.
    sar, "sar";
}

macro_rules! double_shifts {
    ($($(#[$doc:meta])* $name:ident, $op:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// What the destination raises.
        pub fn $name<T: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
            let count: u8 = S::read(core, insn)?;
            let b = core.read_reg::<T>(insn.reg).to_u64();
            let before = core.arithmetic;
            core.arithmetic = D::modify::<T, u16>(core, insn, |value| {
                let (mut a, mut flags) = (value.to_u64(), before);
                // SAFETY: the instructions touch nothing but their operands and the flags.
                unsafe {
                    wide!(T, two, "add al, 0x7f\nsahf", $op, ", cl", a, b, inout("ax") flags, in("cl") count)
                }
                (T::from_u64(a), flags)
            })?;
            Ok(())
        }
    )*};
}

double_shifts! {
    /// SHLD of `D` from the register in [`Insn::reg`], by `S`.
    shld, "shld";
    /// SHRD of `D` from the register in [`Insn::reg`], by `S`.
    shrd, "shrd";
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr::{RAX, RBX, RCX};
    use crate::flags::tests::{Operands, insn, reference, whole};
    use crate::mmu::tests::core;
    use crate::operand::{Imm, Mem, Rm};

    #[test]
    fn shifts_are_the_hosts_in_registers_and_memory() {
        let (mut core, mut operands) = (core(), Operands::new());
        let insn = insn(RBX, RAX, 0);
        for _ in 0..3_000 {
            let (a, b, count, before) = (
                operands.number(),
                operands.number(),
                operands.number(),
                operands.flags(),
            );
            core.regs[RCX] = count;
            let mut insn = insn;
            insn.imm = count & 0xff;
            macro_rules! check {
                ($size:ty, $letter:literal, $($name:ident)*) => {$(
                    let op = concat!(stringify!($name), " {a:", $letter, "}, cl");
                    check!(@ $size, $name, reference!(concat!(stringify!($name), " {a:", $letter, "}, cl"), a, b, count, whole(before)), op);
                )*};
                (double $size:ty, $letter:literal, $($name:ident)*) => {$(
                    let op = concat!(stringify!($name), " {a:", $letter, "}, {b:", $letter, "}, cl");
                    check!(@ $size, $name, reference!(
                        concat!(stringify!($name), " {a:", $letter, "}, {b:", $letter, "}, cl"), a, b, count, whole(before)), op);
                )*};
                (@ $size:ty, $name:ident, $expected:expr, $op:expr) => {{
                    let expected = $expected;
                    core.regs[RAX] = a;
                    core.regs[RBX] = b;
                    core.arithmetic = before;
                    $name::<$size, Rm, Cl>(&mut core, &insn).unwrap();
                    assert_eq!((core.regs[RAX], whole(core.arithmetic)), expected, "{} {a:#x} {count}", $op);
                    core.store(0x40, a).unwrap();
                    core.arithmetic = before;
                    insn.disp = 0x40;
                    $name::<$size, Mem, Imm>(&mut core, &insn).unwrap();
                    assert_eq!(core.load::<$size>(0x40), Ok(expected.0 as $size));
                    assert_eq!(whole(core.arithmetic), expected.1);
                }};
            }
            check!(u8, "l", rol ror rcl rcr shl shr sar);
            check!(u16, "x", rol ror rcl rcr shl shr sar);
            check!(u32, "e", rol ror rcl rcr shl shr sar);
            check!(u64, "r", rol ror rcl rcr shl shr sar);
            check!(double u16, "x", shld shrd);
            check!(double u32, "e", shld shrd);
            check!(double u64, "r", shld shrd);
        }
    }

    #[test]
    fn a_shift_of_memory_that_cannot_be_written_changes_nothing() {
        let mut core = core();
        let mut insn = insn(RBX, RAX, 1);
        insn.disp = 0x2000;
        core.arithmetic = 0x200;
        assert!(shr::<u8, Mem, Imm>(&mut core, &insn).is_err());
        assert_eq!(
            (core.raised.address, core.raised.error, core.arithmetic),
            (0x2000, Some(2), 0x200)
        );
    }
}
