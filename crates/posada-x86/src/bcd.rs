//! Decimal adjustments and SALC: not in 64-bit mode, so in Rust. Where the manual leaves a flag undefined it is clear.

use crate::core::Core;
use crate::fault::{Exec, vector};
use crate::flags::{self, AF, CF};
use crate::insn::Insn;

fn al(core: &Core) -> u8 {
    core.read_reg(0)
}

fn ax(core: &Core) -> u16 {
    core.read_reg(0)
}

/// Sets SF, ZF and PF by `al`, and AF and CF.
fn set_flags(core: &mut Core, al: u8, adjust: bool, carry: bool) {
    flags::test(al, al, &mut core.arithmetic);
    core.arithmetic &= !(AF | CF);
    core.arithmetic |= u16::from(adjust) * AF | u16::from(carry) * CF;
}

/// What DAA and DAS find in AL and the flags: adjust the low digit, adjust the high digit.
fn digits(core: &Core) -> (bool, bool) {
    let al = al(core);
    let low = al & 15 > 9 || core.arithmetic & AF != 0;
    (low, al > 0x99 || core.arithmetic & CF != 0)
}

/// DAA.
///
/// # Errors
/// None.
pub fn daa(core: &mut Core, _: &Insn) -> Exec {
    let (low, high) = digits(core);
    let adjusted = al(core)
        .wrapping_add(if low { 6 } else { 0 })
        .wrapping_add(if high { 0x60 } else { 0 });
    core.write_reg(0, adjusted);
    set_flags(core, adjusted, low, high);
    Ok(())
}

/// DAS.
///
/// # Errors
/// None.
pub fn das(core: &mut Core, _: &Insn) -> Exec {
    let (low, high) = digits(core);
    let (adjusted, borrow) = al(core).overflowing_sub(if low { 6 } else { 0 });
    let adjusted = adjusted.wrapping_sub(if high { 0x60 } else { 0 });
    core.write_reg(0, adjusted);
    set_flags(core, adjusted, low, high || borrow);
    Ok(())
}

/// AAA and AAS: `change` makes the new AX if the digit in AL needs an adjustment.
fn adjust_digit(core: &mut Core, change: impl Fn(u16) -> u16) -> Exec {
    let adjust = al(core) & 15 > 9 || core.arithmetic & AF != 0;
    let value = if adjust { change(ax(core)) } else { ax(core) } & 0xff0f;
    core.write_reg(0, value);
    set_flags(core, value as u8, adjust, adjust);
    Ok(())
}

/// AAA.
///
/// # Errors
/// None.
pub fn aaa(core: &mut Core, _: &Insn) -> Exec {
    adjust_digit(core, |ax| ax.wrapping_add(0x106))
}

/// AAS.
///
/// # Errors
/// None.
pub fn aas(core: &mut Core, _: &Insn) -> Exec {
    adjust_digit(core, |ax| ax.wrapping_sub(0x106))
}

/// AAM with the base in [`Insn::imm`].
///
/// # Errors
/// #DE for base 0.
pub fn aam(core: &mut Core, insn: &Insn) -> Exec {
    let base = insn.imm as u8;
    let al = al(core);
    if base == 0 {
        return core.raise(vector::DE);
    }
    core.write_reg(0, u16::from(al / base) << 8 | u16::from(al % base));
    set_flags(core, al % base, false, false);
    Ok(())
}

/// AAD with the base in [`Insn::imm`].
///
/// # Errors
/// None.
pub fn aad(core: &mut Core, insn: &Insn) -> Exec {
    let [al, ah] = ax(core).to_le_bytes();
    let value = ah.wrapping_mul(insn.imm as u8).wrapping_add(al);
    core.write_reg(0, u16::from(value));
    set_flags(core, value, false, false);
    Ok(())
}

/// SALC: AL is all ones if CF is set, else zero.
///
/// # Errors
/// None.
pub fn salc(core: &mut Core, _: &Insn) -> Exec {
    let value = if core.arithmetic & CF != 0 { 0xffu8 } else { 0 };
    core.write_reg(0, value);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::tests::insn;
    use crate::flags::{PF, ZF, add, sub};
    use crate::mmu::tests::core;

    fn bcd(value: u16) -> u8 {
        (value / 10 % 10 * 16 + value % 10) as u8
    }

    #[test]
    fn packed_sums_and_differences_are_decimal() {
        let mut core = core();
        let insn = insn(0, 0, 0);
        for (a, b) in (0..100u16).flat_map(|a| (0..100).map(move |b| (a, b))) {
            let sum = add(bcd(a), bcd(b), &mut core.arithmetic);
            core.write_reg(0, sum);
            daa(&mut core, &insn).unwrap();
            assert_eq!((al(&core), core.arithmetic & CF != 0), (bcd(a + b), a + b > 99));
            let difference = sub(bcd(a), bcd(b), &mut core.arithmetic);
            core.write_reg(0, difference);
            das(&mut core, &insn).unwrap();
            assert_eq!((al(&core), core.arithmetic & CF != 0), (bcd(100 + a - b), a < b));
        }
    }

    #[test]
    fn packed_adjustments_of_what_is_not_decimal_follow_the_manual() {
        let mut core = core();
        let insn = insn(0, 0, 0);
        for (al_before, flags, after_daa, after_das) in [
            (0xffu8, 0, (0x65, CF | AF), (0x99, CF | AF)),
            (0x9a, 0, (0x00, CF | AF), (0x34, CF | AF)),
            (0x03, AF, (0x09, AF), (0xfd, CF | AF)),
            (0x10, CF, (0x70, CF), (0xb0, CF)),
        ] {
            for (adjust, expected) in [(daa as crate::insn::Handler, after_daa), (das, after_das)] {
                core.write_reg(0, al_before);
                core.arithmetic = flags;
                adjust(&mut core, &insn).unwrap();
                assert_eq!((al(&core), core.arithmetic & (CF | AF)), expected, "{al_before:#x}");
            }
        }
    }

    #[test]
    fn unpacked_digits_carry_into_ah() {
        let mut core = core();
        let insn = insn(0, 0, 10);
        for (a, b) in (0..10u8).flat_map(|a| (0..10).map(move |b| (a, b))) {
            let sum = add(a, b, &mut core.arithmetic);
            core.write_reg(0, u16::from(sum) | 0x500);
            aaa(&mut core, &insn).unwrap();
            let carry = u16::from(a + b > 9);
            assert_eq!(ax(&core), (5 + carry) << 8 | u16::from((a + b) % 10));
            assert_eq!(core.arithmetic & CF != 0, carry != 0);
            let difference = sub(a, b, &mut core.arithmetic);
            core.write_reg(0, u16::from(difference) | 0x500);
            aas(&mut core, &insn).unwrap();
            let borrow = u16::from(a < b);
            assert_eq!(ax(&core) & 0xff, u16::from((10 + a - b) % 10));
            assert_eq!((ax(&core) >> 8, core.arithmetic & CF != 0), (5 - borrow, a < b));
            core.write_reg(0, u16::from(a * b));
            aam(&mut core, &insn).unwrap();
            assert_eq!(ax(&core), u16::from(a * b / 10) << 8 | u16::from(a * b % 10));
            assert_eq!(core.arithmetic & ZF != 0, a * b % 10 == 0);
            aad(&mut core, &insn).unwrap();
            assert_eq!(ax(&core), u16::from(a * b));
            assert_eq!(core.arithmetic & PF != 0, (a * b).count_ones() % 2 == 0);
        }
        let mut insn = insn;
        insn.imm = 0;
        assert!(aam(&mut core, &insn).is_err());
        assert_eq!(core.raised.vector, vector::DE);
    }

    #[test]
    fn salc_spreads_carry() {
        let mut core = core();
        core.arithmetic = CF;
        salc(&mut core, &insn(0, 0, 0)).unwrap();
        assert_eq!(al(&core), 0xff);
        core.arithmetic = 0;
        salc(&mut core, &insn(0, 0, 0)).unwrap();
        assert_eq!(al(&core), 0);
    }
}
