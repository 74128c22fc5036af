//! Multiplication and division.

use crate::core::Core;
use crate::fault::{Exec, vector};
use crate::flags::{sized, two, wide};
use crate::insn::Insn;
use crate::operand::{Imm, Source};
use crate::size::Size;
use std::arch::asm;

/// Byte offsets of the accumulator pair in [`Core::regs`].
const RAX: u8 = 0;
const RDX: u8 = 16;

/// `$op $b` on the accumulator pair `$a`, `$high`, then the flags into AX.
macro_rules! accumulate {
    ($letter:literal, $op:literal, $a:ident, $high:ident, $b:ident, $flags:expr) => {
        asm!("add al, 0x7f", "sahf", "mov rax, {a}", concat!($op, " {b:", $letter, "}"), "mov {a}, rax", "lahf", "seto al",
             a = inout(reg) $a, b = in(reg) $b, inout("rdx") $high, inout("ax") $flags, options(nomem, nostack))
    };
}

/// The accumulator pair: AX alone for bytes.
#[inline(always)]
fn accumulators<T: Size>(core: &Core) -> (u64, u64) {
    if T::BITS == 8 {
        (core.read_reg::<u16>(RAX).into(), 0)
    } else {
        (core.read_reg::<T>(RAX).to_u64(), core.read_reg::<T>(RDX).to_u64())
    }
}

#[inline(always)]
fn set_accumulators<T: Size>(core: &mut Core, low: u64, high: u64) {
    if T::BITS == 8 {
        core.write_reg(RAX, low as u16);
    } else {
        core.write_reg(RAX, T::from_u64(low));
        core.write_reg(RDX, T::from_u64(high));
    }
}

macro_rules! multiplications {
    ($($(#[$doc:meta])* $name:ident, $op:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// What the source raises.
        pub fn $name<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
            let b = S::read::<T>(core, insn)?.to_u64();
            let (mut low, mut high) = accumulators::<T>(core);
            // SAFETY: the instructions touch nothing but their operands and the flags.
            unsafe { sized!(T, accumulate, $op, low, high, b, core.arithmetic) }
            set_accumulators::<T>(core, low, high);
            Ok(())
        }
    )*};
}

multiplications! {
    /// MUL.
    mul, "mul";
    /// IMUL with one operand.
    imul, "imul";
}

/// The low half of a signed product.
#[inline(always)]
fn product<T: Size>(a: T, b: T, arithmetic: &mut u16) -> T {
    let (mut a, b) = (a.to_u64(), b.to_u64());
    // SAFETY: the instructions touch nothing but their operands and the flags.
    unsafe { wide!(T, two, "add al, 0x7f\nsahf", "imul", "", a, b, inout("ax") * arithmetic) }
    T::from_u64(a)
}

/// IMUL with two operands, into the register in [`Insn::reg`].
///
/// # Errors
/// What the source raises.
pub fn imul_two<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let b = S::read::<T>(core, insn)?;
    let a = core.read_reg::<T>(insn.reg);
    let value = product(a, b, &mut core.arithmetic);
    core.write_reg(insn.reg, value);
    Ok(())
}

/// IMUL with three operands: the source and [`Insn::imm`], into the register in [`Insn::reg`].
///
/// # Errors
/// What the source raises.
pub fn imul_three<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let a = S::read::<T>(core, insn)?;
    let b = Imm::read::<T>(core, insn)?;
    let value = product(a, b, &mut core.arithmetic);
    core.write_reg(insn.reg, value);
    Ok(())
}

/// Whether an unsigned quotient fits; no quotient by zero does.
fn fits_unsigned<T: Size>(low: u64, high: u64, divisor: u64) -> bool {
    let high = if T::BITS == 8 { low >> 8 } else { high };
    high < divisor
}

/// Whether a signed quotient fits.
fn fits_signed<T: Size>(low: u64, high: u64, divisor: T) -> bool {
    let dividend = if T::BITS == 8 {
        low as i16 as i128
    } else {
        i128::from(T::from_u64(high).to_i64()) << T::BITS | i128::from(low)
    };
    let divisor = i128::from(divisor.to_i64());
    let negative = (dividend < 0) != (divisor < 0);
    // Without a division: the quotient's magnitude is at most 2^(bits-1), or one less if it is positive.
    let beyond = (1u128 << (T::BITS - 1)) + u128::from(negative);
    dividend.unsigned_abs() < beyond * divisor.unsigned_abs()
}

/// DIV.
///
/// # Errors
/// #DE if the quotient does not fit, and what the source raises.
pub fn div<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let b = S::read::<T>(core, insn)?.to_u64();
    let (mut low, mut high) = accumulators::<T>(core);
    if !fits_unsigned::<T>(low, high, b) {
        return core.raise(vector::DE);
    }
    // SAFETY: the quotient fits; the instructions touch nothing but their operands and the flags.
    unsafe { sized!(T, accumulate, "div", low, high, b, core.arithmetic) }
    set_accumulators::<T>(core, low, high);
    Ok(())
}

/// IDIV.
///
/// # Errors
/// #DE if the quotient does not fit, and what the source raises.
pub fn idiv<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let divisor = S::read::<T>(core, insn)?;
    let (mut low, mut high) = accumulators::<T>(core);
    if !fits_signed(low, high, divisor) {
        return core.raise(vector::DE);
    }
    let b = divisor.to_u64();
    // SAFETY: the quotient fits; the instructions touch nothing but their operands and the flags.
    unsafe { sized!(T, accumulate, "idiv", low, high, b, core.arithmetic) }
    set_accumulators::<T>(core, low, high);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr;
    use crate::flags::tests::{Operands, insn, reference, whole};
    use crate::flags::{CF, OF};
    use crate::mmu::tests::core;
    use crate::operand::Rm;

    fn operands_of<T: Size>(core: &mut Core, operands: &mut Operands) -> (u64, u64, u64) {
        core.regs[gpr::RAX] = operands.number();
        core.regs[gpr::RDX] = operands.number();
        core.regs[gpr::RBX] = operands.number();
        let (low, high) = accumulators::<T>(core);
        (low, high, core.read_reg::<T>(3 * 8).to_u64())
    }

    fn pair<T: Size>(core: &Core) -> (u64, u64) {
        if T::BITS == 8 {
            (core.read_reg::<u8>(0).into(), core.read_reg::<u8>(1).into())
        } else {
            accumulators::<T>(core)
        }
    }

    fn products_agree<T: Size>() {
        let (mut core, mut operands) = (core(), Operands::new());
        let insn = insn(gpr::RCX, gpr::RBX, 0);
        for _ in 0..3_000 {
            let (low, _, b) = operands_of::<T>(&mut core, &mut operands);
            let a = T::from_u64(low);
            let mask = u128::MAX >> (128 - T::BITS);
            let before = core.regs;
            mul::<T, Rm>(&mut core, &insn).unwrap();
            let product = u128::from(a.to_u64()) * u128::from(b);
            assert_eq!(pair::<T>(&core), ((product & mask) as u64, (product >> T::BITS) as u64));
            assert_eq!(core.arithmetic & CF != 0, product > mask);
            core.regs = before;
            imul::<T, Rm>(&mut core, &insn).unwrap();
            let product = i128::from(a.to_i64()) * i128::from(T::from_u64(b).to_i64());
            let low = T::from_u64(product as u64);
            let high = T::from_u64((product >> T::BITS) as u64);
            assert_eq!(pair::<T>(&core), (low.to_u64(), high.to_u64()));
            assert_eq!(core.arithmetic & OF != 0, product != i128::from(low.to_i64()));
        }
    }

    #[test]
    fn products_are_exact() {
        products_agree::<u8>();
        products_agree::<u16>();
        products_agree::<u32>();
        products_agree::<u64>();
    }

    #[test]
    fn short_products_are_the_hosts() {
        let (mut core, mut operands) = (core(), Operands::new());
        for _ in 0..3_000 {
            let (a, b, before) = (operands.number(), operands.number(), operands.flags());
            let insn = insn(gpr::RCX, gpr::RBX, b as i32 as u64);
            macro_rules! check {
                ($handler:expr, $op:literal, $b:expr) => {{
                    core.regs[gpr::RCX] = a;
                    core.regs[gpr::RBX] = b;
                    core.arithmetic = before;
                    $handler(&mut core, &insn).unwrap();
                    let expected = reference!($op, a, $b, 0u64, whole(before));
                    assert_eq!((core.regs[gpr::RCX], whole(core.arithmetic)), expected);
                }};
            }
            check!(imul_two::<u16, Rm>, "imul {a:x}, {b:x}", b);
            check!(imul_two::<u32, Rm>, "imul {a:e}, {b:e}", b);
            check!(imul_two::<u64, Rm>, "imul {a}, {b}", b);
            core.regs[gpr::RBX] = a;
            imul_three::<u64, Rm>(&mut core, &insn).unwrap();
            assert_eq!(core.regs[gpr::RCX], a.wrapping_mul(b as i32 as u64));
        }
    }

    fn quotients_agree<T: Size>() {
        let (mut core, mut operands) = (core(), Operands::new());
        let insn = insn(gpr::RCX, gpr::RBX, 0);
        let mut faults = 0;
        for round in 0..6_000 {
            let (low, mut high, b) = operands_of::<T>(&mut core, &mut operands);
            if T::BITS != 8 && round % 2 == 0 {
                // A sign extension, as CDQ makes: random pairs seldom have a quotient.
                high = T::from_u64((T::from_u64(low).to_i64() >> 63) as u64).to_u64();
                core.write_reg(RDX, T::from_u64(high));
            }
            let before = core.regs;
            let (dividend, signed) = if T::BITS == 8 {
                (u128::from(low), low as i16 as i128)
            } else {
                let wide = i128::from(T::from_u64(high).to_i64()) << T::BITS | i128::from(low);
                (u128::from(high) << T::BITS | u128::from(low), wide)
            };
            let quotient = dividend.checked_div(b.into()).filter(|&q| q >> T::BITS == 0);
            match (div::<T, Rm>(&mut core, &insn), quotient) {
                (Ok(()), Some(q)) => assert_eq!(pair::<T>(&core), (q as u64, (dividend % u128::from(b)) as u64)),
                (Err(_), None) => assert_eq!((core.raised.vector, core.regs), (vector::DE, before)),
                (got, expected) => panic!("{got:?} {expected:?}"),
            }
            core.regs = before;
            let divisor = i128::from(T::from_u64(b).to_i64());
            let quotient = signed.checked_div(divisor).filter(|&q| q >> (T::BITS - 1) == q >> 127);
            match (idiv::<T, Rm>(&mut core, &insn), quotient) {
                (Ok(()), Some(q)) => {
                    let halves = (
                        T::from_u64(q as u64).to_u64(),
                        T::from_u64((signed % divisor) as u64).to_u64(),
                    );
                    assert_eq!(pair::<T>(&core), halves);
                }
                (Err(_), None) => {
                    faults += 1;
                    assert_eq!((core.raised.vector, core.regs), (vector::DE, before));
                }
                (got, expected) => panic!("{got:?} {expected:?} of {signed} by {divisor}"),
            }
        }
        assert!((100..5_900).contains(&faults), "both ways are tried: {faults}");
    }

    #[test]
    fn quotients_are_exact_or_divide_errors() {
        quotients_agree::<u8>();
        quotients_agree::<u16>();
        quotients_agree::<u32>();
        quotients_agree::<u64>();
    }

    #[test]
    fn the_extreme_quotients() {
        let mut core = core();
        let insn = insn(gpr::RCX, gpr::RBX, 0);
        for (dividend, divisor, fits) in [
            (i64::MIN, -1i64, false),
            (i64::MIN, 1, true),
            (i64::MAX, -1, true),
            (0, 0, false),
        ] {
            core.regs[gpr::RAX] = dividend as u64;
            core.regs[gpr::RDX] = (dividend >> 63) as u64;
            core.regs[gpr::RBX] = divisor as u64;
            assert_eq!(idiv::<u64, Rm>(&mut core, &insn).is_ok(), fits);
        }
    }
}
