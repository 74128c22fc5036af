//! Operands as types: where a handler finds its destination and its source.

use crate::core::Core;
use crate::fault::Exec;
use crate::insn::{Insn, LOCK};
use crate::size::Size;

/// Something to read.
pub trait Source {
    /// The operand's value.
    ///
    /// # Errors
    /// What the load raises.
    fn read<T: Size>(core: &mut Core, insn: &Insn) -> Exec<T>;
}

/// Something to read and write.
pub trait Place: Source {
    /// Replaces the operand.
    ///
    /// # Errors
    /// What the store raises.
    fn write<T: Size>(core: &mut Core, insn: &Insn, value: T) -> Exec;

    /// Replaces the operand by the first of what `change` makes of it and returns the second. With a LOCK prefix it is
    /// atomic, and `change` may be called more than once.
    ///
    /// # Errors
    /// What the store raises, before `change` is called.
    fn modify<T: Size, R>(core: &mut Core, insn: &Insn, change: impl FnMut(T) -> (T, R)) -> Exec<R>;
}

/// The register in [`Insn::reg`].
pub struct Reg;
/// The register in [`Insn::rm`].
pub struct Rm;
/// The memory operand.
pub struct Mem;
/// The immediate.
pub struct Imm;

macro_rules! register {
    ($place:ty, $field:ident) => {
        impl Source for $place {
            #[inline(always)]
            fn read<T: Size>(core: &mut Core, insn: &Insn) -> Exec<T> {
                Ok(core.read_reg(insn.$field))
            }
        }

        impl Place for $place {
            #[inline(always)]
            fn write<T: Size>(core: &mut Core, insn: &Insn, value: T) -> Exec {
                core.write_reg(insn.$field, value);
                Ok(())
            }

            #[inline(always)]
            fn modify<T: Size, R>(core: &mut Core, insn: &Insn, mut change: impl FnMut(T) -> (T, R)) -> Exec<R> {
                let (new, result) = change(core.read_reg(insn.$field));
                core.write_reg(insn.$field, new);
                Ok(result)
            }
        }
    };
}

register!(Reg, reg);
register!(Rm, rm);

impl Source for Mem {
    #[inline(always)]
    fn read<T: Size>(core: &mut Core, insn: &Insn) -> Exec<T> {
        let linear = core.linear(insn, T::BYTES, false)?;
        core.load(linear)
    }
}

impl Place for Mem {
    #[inline(always)]
    fn write<T: Size>(core: &mut Core, insn: &Insn, value: T) -> Exec {
        let linear = core.linear(insn, T::BYTES, true)?;
        core.store(linear, value)
    }

    #[inline(always)]
    fn modify<T: Size, R>(core: &mut Core, insn: &Insn, change: impl FnMut(T) -> (T, R)) -> Exec<R> {
        let linear = core.linear(insn, T::BYTES, true)?;
        core.modify(linear, insn.flags & LOCK != 0, change)
    }
}

impl Source for Imm {
    #[inline(always)]
    fn read<T: Size>(_: &mut Core, insn: &Insn) -> Exec<T> {
        Ok(T::from_u64(insn.imm))
    }
}
