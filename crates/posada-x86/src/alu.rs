//! ADD to CMP, TEST, and the one-operand operations, on registers and memory.

use crate::core::Core;
use crate::fault::Exec;
use crate::flags;
use crate::insn::Insn;
use crate::operand::{Place, Source};
use crate::size::Size;

/// An operation of two operands that sets the arithmetic flags.
pub trait Binary {
    /// Result and flags.
    fn apply<T: Size>(a: T, b: T, arithmetic: &mut u16) -> T;
}

/// An operation of one operand.
pub trait Unary {
    /// Result and flags.
    fn apply<T: Size>(a: T, arithmetic: &mut u16) -> T;
}

macro_rules! operations {
    ($($name:ident $function:ident;)*) => {$(
        #[doc = stringify!($name)]
        pub struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<T: Size>(a: T, b: T, arithmetic: &mut u16) -> T {
                flags::$function(a, b, arithmetic)
            }
        }
    )*};
}

operations! { Add add; Or or; Adc adc; Sbb sbb; And and; Sub sub; Xor xor; }

macro_rules! one_operand {
    ($($name:ident $function:ident;)*) => {$(
        #[doc = stringify!($name)]
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<T: Size>(a: T, arithmetic: &mut u16) -> T {
                flags::$function(a, arithmetic)
            }
        }
    )*};
}

one_operand! { Inc inc; Dec dec; Neg neg; }

/// NOT, which leaves the flags alone.
pub struct Not;

impl Unary for Not {
    #[inline(always)]
    fn apply<T: Size>(a: T, _: &mut u16) -> T {
        flags::not(a)
    }
}

/// ADD, OR, ADC, SBB, AND, SUB, XOR.
pub fn binary<T: Size, O: Binary, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let source = S::read::<T>(core, insn)?;
    let before = core.arithmetic;
    core.arithmetic = D::modify(core, insn, |old| {
        let mut arithmetic = before;
        let new = O::apply(old, source, &mut arithmetic);
        (new, arithmetic)
    })?;
    Ok(())
}

/// CMP and TEST: SUB and AND that keep only the flags.
pub fn compare<T: Size, O: Binary, A: Source, B: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let b = B::read::<T>(core, insn)?;
    let a = A::read::<T>(core, insn)?;
    O::apply(a, b, &mut core.arithmetic);
    Ok(())
}

/// INC, DEC, NEG, NOT.
pub fn unary<T: Size, O: Unary, D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    let before = core.arithmetic;
    core.arithmetic = D::modify(core, insn, |old: T| {
        let mut arithmetic = before;
        let new = O::apply(old, &mut arithmetic);
        (new, arithmetic)
    })?;
    Ok(())
}
