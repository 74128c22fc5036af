//! Segment registers: loads, stores and the instructions that look at descriptors.

use super::descriptor::{Rights, code_of, is_null, null_segment, rpl};
use super::stack::Stack;
use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exec, Raised, vector};
use crate::insn::{Insn, OPERAND16, WIDE};
use crate::operand::{Mem, Place, Rm};
use posada_engine::Segment;

/// Where a selector or status word is stored: memory takes 16 bits, a register as many as the operand size says.
pub trait WordPlace: Place {
    /// Stores it.
    ///
    /// # Errors
    /// What the store raises.
    fn put_word(core: &mut Core, insn: &Insn, value: u64) -> Exec;
}

impl WordPlace for Mem {
    fn put_word(core: &mut Core, insn: &Insn, value: u64) -> Exec {
        Self::write(core, insn, value as u16)
    }
}

impl WordPlace for Rm {
    fn put_word(core: &mut Core, insn: &Insn, value: u64) -> Exec {
        match insn.flags & (OPERAND16 | WIDE) {
            OPERAND16 => Self::write(core, insn, value as u16),
            0 => Self::write(core, insn, value as u32),
            _ => Self::write(core, insn, value),
        }
    }
}

impl Core {
    /// Loads a segment register other than CS, as MOV does.
    ///
    /// # Errors
    /// #GP, #NP or #SS with the selector; what reading its descriptor raises.
    pub fn load_segment(&mut self, number: usize, selector: u16) -> Exec {
        if self.paragraphs() {
            let segment = &mut self.segments[number];
            segment.selector = selector;
            segment.base = u64::from(selector) << 4;
        } else {
            self.segments[number] = self.segment_for(number, selector)?;
        }
        self.update_mode();
        Ok(())
    }

    /// The hidden part for a selector, with all checks of protected mode.
    fn segment_for(&mut self, number: usize, selector: u16) -> Exec<Segment> {
        if number == seg::SS {
            let (cpl, code64) = (self.cpl, self.bits64());
            return self.stack_segment_for(selector, cpl, code64);
        }
        if is_null(selector) {
            return Ok(null_segment(selector, 0));
        }
        let mut segment = self.descriptor_of(selector, vector::GP, 0)?;
        let dpl = segment.dpl();
        let reachable = segment.conforming() || rpl(selector) <= dpl && self.cpl <= dpl;
        if !segment.readable() || !reachable {
            return self.raise_code(vector::GP, code_of(selector));
        }
        if !segment.present() {
            return self.raise_code(vector::NP, code_of(selector));
        }
        self.mark_accessed(&mut segment)?;
        Ok(segment)
    }

    /// SS for code at privilege level `cpl`; 64-bit code outside level 3 may have a null one.
    pub(super) fn stack_segment_for(&mut self, selector: u16, cpl: u8, code64: bool) -> Exec<Segment> {
        if is_null(selector) {
            if code64 && cpl != 3 && rpl(selector) == cpl {
                return Ok(null_segment(selector, cpl));
            }
            return self.general_protection();
        }
        let mut segment = self.descriptor_of(selector, vector::GP, 0)?;
        if rpl(selector) != cpl || segment.dpl() != cpl || !segment.writable() {
            return self.raise_code(vector::GP, code_of(selector));
        }
        if !segment.present() {
            return self.raise_code(vector::SS, code_of(selector));
        }
        self.mark_accessed(&mut segment)?;
        Ok(segment)
    }

    /// The descriptor that LAR and its like look at; `None` where they would clear ZF.
    fn visible_descriptor(&mut self, selector: u16) -> Exec<Option<Segment>> {
        // TS never comes from reading the table itself.
        let segment = match self.descriptor_of(selector, vector::TS, 0) {
            Ok(segment) => segment,
            Err(Raised) if self.raised.vector == vector::TS => return Ok(None),
            Err(Raised) => return Err(Raised),
        };
        let dpl = segment.dpl();
        let reachable = segment.conforming() || self.cpl <= dpl && rpl(selector) <= dpl;
        Ok(reachable.then_some(segment))
    }

    fn set_zero_flag(&mut self, on: bool) {
        let flags = self.rflags() & !flag::ZF;
        self.set_arithmetic(flags | if on { flag::ZF } else { 0 });
    }

    /// #UD in real and virtual-8086 mode.
    pub(super) fn require_protected(&mut self) -> Exec {
        if self.paragraphs() {
            return self.raise(vector::UD);
        }
        Ok(())
    }

    /// Bytes that an implicit access to the stack has: PUSH and POP of a segment register.
    fn stack_operand(&self, insn: &Insn) -> u64 {
        match (insn.flags & OPERAND16 != 0, self.bits64()) {
            (true, _) => 2,
            (false, true) => 8,
            (false, false) => 4,
        }
    }
}

/// MOV to a segment register: `reg` is its number, `D` the selector.
pub fn load_segment<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    let selector = D::read(core, insn)?;
    let number = usize::from(insn.reg);
    core.load_segment(number, selector)?;
    core.interrupt_shadow |= number == seg::SS;
    Ok(())
}

/// MOV from a segment register.
pub fn store_segment<D: WordPlace>(core: &mut Core, insn: &Insn) -> Exec {
    let selector = core.segments[usize::from(insn.reg)].selector;
    D::put_word(core, insn, selector.into())
}

/// PUSH of a segment register.
pub fn push_segment(core: &mut Core, insn: &Insn) -> Exec {
    let selector = core.segments[usize::from(insn.reg)].selector;
    let mut stack = Stack::current(core);
    stack.push(core, core.stack_operand(insn), selector.into())?;
    core.regs[gpr::RSP] = stack.rsp;
    Ok(())
}

/// POP of a segment register.
pub fn pop_segment(core: &mut Core, insn: &Insn) -> Exec {
    let mut stack = Stack::current(core);
    let selector = stack.pop(core, core.stack_operand(insn))?;
    let number = usize::from(insn.reg);
    core.load_segment(number, selector as u16)?;
    core.regs[gpr::RSP] = stack.rsp;
    core.interrupt_shadow |= number == seg::SS;
    Ok(())
}

/// LES, LDS, LFS, LGS and LSS: `extra` is the segment register, `reg` takes the offset.
pub fn load_far_pointer(core: &mut Core, insn: &Insn) -> Exec {
    let (offset, selector) = far_pointer(core, insn)?;
    core.load_segment(insn.extra as usize, selector)?;
    match insn.flags & (OPERAND16 | WIDE) {
        OPERAND16 => core.write_reg(insn.reg, offset as u16),
        0 => core.write_reg(insn.reg, offset as u32),
        _ => core.write_reg(insn.reg, offset),
    }
    Ok(())
}

/// A far pointer in memory: its offset, of the operand's size, then its selector.
pub(super) fn far_pointer(core: &mut Core, insn: &Insn) -> Exec<(u64, u16)> {
    let bytes = operand_bytes(insn);
    let linear = core.linear(insn, bytes + 2, false)?;
    let mut data = [0; 10];
    core.load_bytes(linear, &mut data[..bytes as usize + 2])?;
    let mut offset = [0; 8];
    offset[..bytes as usize].copy_from_slice(&data[..bytes as usize]);
    let at = bytes as usize;
    Ok((u64::from_le_bytes(offset), u16::from_le_bytes([data[at], data[at + 1]])))
}

/// The operand size attribute, in bytes.
pub(super) fn operand_bytes(insn: &Insn) -> u64 {
    match insn.flags & (OPERAND16 | WIDE) {
        OPERAND16 => 2,
        0 => 4,
        _ => 8,
    }
}

/// LAR.
pub fn lar<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    let selector = D::read::<u16>(core, insn)?;
    let long = core.long_mode();
    let found = core
        .visible_descriptor(selector)?
        .filter(|segment| match segment.system() {
            None | Some(2 | 9 | 11 | 12) => true,
            Some(1 | 3 | 4 | 5) => !long,
            Some(_) => false,
        });
    if let Some(segment) = found {
        let rights = u32::from(segment.access) << 8;
        if insn.flags & OPERAND16 != 0 {
            core.write_reg(insn.reg, rights as u16);
        } else {
            core.write_reg(insn.reg, rights);
        }
    }
    core.set_zero_flag(found.is_some());
    Ok(())
}

/// LSL.
pub fn lsl<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    let selector = D::read::<u16>(core, insn)?;
    let long = core.long_mode();
    let found = core
        .visible_descriptor(selector)?
        .filter(|segment| match segment.system() {
            None | Some(2 | 9 | 11) => true,
            Some(1 | 3) => !long,
            Some(_) => false,
        });
    if let Some(segment) = found {
        if insn.flags & OPERAND16 != 0 {
            core.write_reg(insn.reg, segment.limit as u16);
        } else {
            core.write_reg(insn.reg, segment.limit);
        }
    }
    core.set_zero_flag(found.is_some());
    Ok(())
}

fn verify<D: Place>(core: &mut Core, insn: &Insn, allowed: impl Fn(&Segment) -> bool) -> Exec {
    core.require_protected()?;
    let selector = D::read::<u16>(core, insn)?;
    let found = core.visible_descriptor(selector)?;
    core.set_zero_flag(found.is_some_and(|segment| segment.system().is_none() && allowed(&segment)));
    Ok(())
}

/// VERR.
pub fn verr<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    verify::<D>(core, insn, Segment::readable)
}

/// VERW.
pub fn verw<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    verify::<D>(core, insn, Segment::writable)
}

/// ARPL.
pub fn arpl<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    let wanted = core.read_reg::<u16>(insn.reg) & 3;
    let raised = D::modify(core, insn, |selector: u16| {
        let lower = selector & 3 < wanted;
        (if lower { selector & !3 | wanted } else { selector }, lower)
    })?;
    core.set_zero_flag(raised);
    Ok(())
}
