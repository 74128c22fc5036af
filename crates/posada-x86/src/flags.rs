//! Arithmetic on the host's own ALU, so that every flag, undefined ones included, is the host's; and the conditions that
//! read the flags. Flags are kept as in [`crate::core::Core::arithmetic`].

use crate::size::Size;
use std::arch::asm;

/// Expands `$one!(LETTER, …)`, an `asm!` of operands named by `{name:LETTER}`, for each operand size.
macro_rules! sized {
    ($size:ty, $one:ident, $($argument:tt)*) => {
        match <$size>::BITS {
            8 => $one!("l", $($argument)*),
            16 => $one!("x", $($argument)*),
            32 => $one!("e", $($argument)*),
            _ => $one!("r", $($argument)*),
        }
    };
}
pub(crate) use sized;

/// [`sized`] for instructions that have no 8-bit form.
macro_rules! wide {
    ($size:ty, $one:ident, $($argument:tt)*) => {
        match <$size>::BITS {
            16 => $one!("x", $($argument)*),
            32 => $one!("e", $($argument)*),
            _ => $one!("r", $($argument)*),
        }
    };
}
pub(crate) use wide;

/// `$op $a $suffix` after `$before`, then the flags into AX.
macro_rules! one {
    ($letter:literal, $before:literal, $op:literal, $suffix:literal, $a:ident, $($operand:tt)*) => {
        asm!($before, concat!($op, " {a:", $letter, "}", $suffix), "lahf", "seto al",
             a = inout(reg) $a, $($operand)*, options(pure, nomem, nostack))
    };
}
pub(crate) use one;

/// `$op $a, $b $suffix` after `$before`, then the flags into AX.
macro_rules! two {
    ($letter:literal, $before:literal, $op:literal, $suffix:literal, $a:ident, $b:ident, $($operand:tt)*) => {
        asm!($before, concat!($op, " {a:", $letter, "}, {b:", $letter, "}", $suffix), "lahf", "seto al",
             a = inout(reg) $a, b = in(reg) $b, $($operand)*, options(pure, nomem, nostack))
    };
}
pub(crate) use two;

/// As [`two`], for instructions that leave `$a` alone.
macro_rules! compare {
    ($letter:literal, $before:literal, $op:literal, $a:ident, $b:ident, $($operand:tt)*) => {
        asm!($before, concat!($op, " {a:", $letter, "}, {b:", $letter, "}"), "lahf", "seto al",
             a = in(reg) $a, b = in(reg) $b, $($operand)*, options(pure, nomem, nostack))
    };
}
pub(crate) use compare;

macro_rules! binary {
    ($($(#[$doc:meta])* $name:ident, $before:literal, $op:literal, $flags:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name<T: Size>(a: T, b: T, arithmetic: &mut u16) -> T {
            let (mut a, b) = (a.to_u64(), b.to_u64());
            // SAFETY: the instructions touch nothing but their operands and the flags.
            unsafe { sized!(T, two, $before, $op, "", a, b, $flags("ax") *arithmetic) }
            T::from_u64(a)
        }
    )*};
}

binary! {
    /// ADD.
    add, "", "add", out;
    /// SUB.
    sub, "", "sub", out;
    /// AND.
    and, "", "and", out;
    /// OR.
    or, "", "or", out;
    /// XOR.
    xor, "", "xor", out;
    /// ADC.
    adc, "bt eax, 8", "adc", inout;
    /// SBB.
    sbb, "bt eax, 8", "sbb", inout;
}

/// CMP: the flags of `a - b`.
#[inline(always)]
pub fn cmp<T: Size>(a: T, b: T, arithmetic: &mut u16) {
    let (a, b) = (a.to_u64(), b.to_u64());
    // SAFETY: the instructions touch nothing but their operands and the flags.
    unsafe { sized!(T, compare, "", "cmp", a, b, out("ax") * arithmetic) }
}

/// TEST: the flags of `a & b`.
#[inline(always)]
pub fn test<T: Size>(a: T, b: T, arithmetic: &mut u16) {
    let (a, b) = (a.to_u64(), b.to_u64());
    // SAFETY: the instructions touch nothing but their operands and the flags.
    unsafe { sized!(T, compare, "", "test", a, b, out("ax") * arithmetic) }
}

macro_rules! unary {
    ($($(#[$doc:meta])* $name:ident, $before:literal, $op:literal, $flags:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name<T: Size>(a: T, arithmetic: &mut u16) -> T {
            let mut a = a.to_u64();
            // SAFETY: the instructions touch nothing but their operand and the flags.
            unsafe { sized!(T, one, $before, $op, "", a, $flags("ax") *arithmetic) }
            T::from_u64(a)
        }
    )*};
}

unary! {
    /// INC: CF stays.
    inc, "bt eax, 8", "inc", inout;
    /// DEC: CF stays.
    dec, "bt eax, 8", "dec", inout;
    /// NEG.
    neg, "", "neg", out;
}

/// NOT, without flags.
#[inline(always)]
pub fn not<T: Size>(a: T) -> T {
    T::from_u64(!a.to_u64())
}

/// CF in [`crate::core::Core::arithmetic`].
pub const CF: u16 = 1 << 8;
/// PF.
pub const PF: u16 = 1 << 10;
/// AF.
pub const AF: u16 = 1 << 12;
/// ZF.
pub const ZF: u16 = 1 << 14;
/// SF.
pub const SF: u16 = 1 << 15;
/// OF.
pub const OF: u16 = 1;

/// Whether condition `CC` (0-15 as Jcc, SETcc and CMOVcc encode it) holds.
#[inline(always)]
pub fn holds<const CC: u8>(arithmetic: u16) -> bool {
    condition(CC, arithmetic)
}

/// [`holds`] for a condition known only at run time.
#[inline(always)]
pub fn condition(cc: u8, arithmetic: u16) -> bool {
    // SF and OF lie at the two ends: the rotation puts SF beside OF.
    let less = arithmetic.rotate_left(1) ^ arithmetic;
    let yes = match cc >> 1 & 7 {
        0 => arithmetic & OF != 0,
        1 => arithmetic & CF != 0,
        2 => arithmetic & ZF != 0,
        3 => arithmetic & (CF | ZF) != 0,
        4 => arithmetic & SF != 0,
        5 => arithmetic & PF != 0,
        6 => less & 1 != 0,
        _ => (less & 1 | arithmetic & ZF) != 0,
    };
    yes != (cc & 1 != 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::core::seg;
    use crate::insn::Insn;

    /// A fixed sequence of operands: small, extreme and random ones.
    pub(crate) struct Operands(u64);

    impl Operands {
        pub(crate) fn new() -> Self {
            Self(0x9e37_79b9_7f4a_7c15)
        }

        /// Another sequence.
        pub(crate) fn reseed(&mut self, seed: u64) {
            self.0 = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        }

        pub(crate) fn bits(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        pub(crate) fn number(&mut self) -> u64 {
            let bits = self.bits();
            match bits >> 8 & 7 {
                0 => bits >> 61,
                1 => 0u64.wrapping_sub(bits >> 61),
                2 => 1 << (bits >> 58),
                3 => (1u64 << (bits >> 58)).wrapping_sub(1),
                _ => self.bits(),
            }
        }

        /// Arithmetic flags as a Core keeps them.
        pub(crate) fn flags(&mut self) -> u16 {
            self.bits() as u16 & (SF | ZF | AF | PF | CF | OF) | 0x200
        }
    }

    /// Runs `$op` on `{a}`, `{b}` and RCX between loads and stores of whole RFLAGS: the new `{a}` and arithmetic flags.
    macro_rules! reference {
        ($op:expr, $a:expr, $b:expr, $c:expr, $rflags:expr) => {{
            let (mut a, mut rflags): (u64, u64) = ($a, $rflags);
            // SAFETY: touches the operands, the flags and a stack slot.
            unsafe {
                std::arch::asm!("push {f}", "popfq", $op, "pushfq", "pop {f}", "/* {b} */",
                    a = inout(reg) a, b = in(reg) $b, f = inout(reg) rflags, in("rcx") $c)
            }
            (a, rflags & 0x8d5 | 0x202)
        }};
    }
    pub(crate) use reference;

    /// RFLAGS with these arithmetic flags.
    pub(crate) fn whole(arithmetic: u16) -> u64 {
        let a = u64::from(arithmetic);
        a >> 8 & 0xd5 | (a & 1) << 11 | 0x202
    }

    /// An instruction with these register numbers and, for memory, a displacement of 0.
    pub(crate) fn insn(reg: usize, rm: usize, imm: u64) -> Insn {
        Insn {
            exec: |_, _| Ok(()),
            imm,
            disp: 0,
            length: 4,
            reg: reg as u8 * 8,
            rm: rm as u8 * 8,
            base: crate::insn::ZERO,
            index: crate::insn::ZERO,
            scale: 0,
            segment: seg::DS as u8,
            flags: 0,
            extra: 0,
        }
    }

    #[test]
    fn arithmetic_is_the_hosts() {
        let mut operands = Operands::new();
        for _ in 0..20_000 {
            let (a, b, before) = (operands.number(), operands.number(), operands.flags());
            let rflags = whole(before);
            macro_rules! check {
                ($name:ident, $op:literal) => {{
                    let mut after = before;
                    let result = $name(a, b, &mut after);
                    assert_eq!((result, whole(after)), reference!($op, a, b, 0u64, rflags));
                }};
            }
            check!(add, "add {a}, {b}");
            check!(adc, "adc {a}, {b}");
            check!(sub, "sub {a}, {b}");
            check!(sbb, "sbb {a}, {b}");
            check!(and, "and {a}, {b}");
            check!(or, "or {a}, {b}");
            check!(xor, "xor {a}, {b}");
            let mut after = before;
            cmp(a as u8, b as u8, &mut after);
            assert_eq!(whole(after), reference!("cmp {a:l}, {b:l}", a, b, 0u64, rflags).1);
            test(a as u16, b as u16, &mut after);
            assert_eq!(whole(after), reference!("test {a:x}, {b:x}", a, b, 0u64, rflags).1);
            let mut after = before;
            let result = inc(a as u32, &mut after);
            let (expected, flags) = reference!("inc {a:e}", a, b, 0u64, rflags);
            assert_eq!((u64::from(result), whole(after)), (expected, flags));
            let mut after = before;
            let result = dec(a as u8, &mut after);
            let (expected, flags) = reference!("dec {a:l}", a, b, 0u64, rflags);
            assert_eq!((result, whole(after)), (expected as u8, flags));
            let result = neg(a as u16, &mut after);
            let (expected, flags) = reference!("neg {a:x}", a, b, 0u64, rflags);
            assert_eq!((result, whole(after)), (expected as u16, flags));
        }
        assert_eq!(not(0x0fu8), 0xf0);
    }

    #[test]
    fn conditions_are_the_hosts() {
        for bits in 0..64u16 {
            let bit = |number: u16, flag: u16| if bits >> number & 1 != 0 { flag } else { 0 };
            let flags = bit(0, CF) | bit(1, PF) | bit(2, AF) | bit(3, ZF) | bit(4, SF) | bit(5, OF) | 0x200;
            macro_rules! check {
                ($($cc:literal $op:literal,)*) => {$(
                    let (set, _) = reference!(concat!($op, " {a:l}"), 0, 0u64, 0u64, whole(flags));
                    assert_eq!(holds::<$cc>(flags), set != 0, "{} {flags:#x}", $op);
                )*};
            }
            check!(
                0 "seto", 1 "setno", 2 "setb", 3 "setae", 4 "sete", 5 "setne", 6 "setbe", 7 "seta",
                8 "sets", 9 "setns", 10 "setp", 11 "setnp", 12 "setl", 13 "setge", 14 "setle", 15 "setg",
            );
        }
    }
}
