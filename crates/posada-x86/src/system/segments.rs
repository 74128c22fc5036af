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

/// PUSH of a segment register. In 32 bits only the selector is stored, as the page of PUSH says of recent processors.
pub fn push_segment(core: &mut Core, insn: &Insn) -> Exec {
    let selector = core.segments[usize::from(insn.reg)].selector;
    if core.stack_operand(insn) == 4 {
        let rsp = core.stack_moved(-4);
        let linear = core.stack_linear(rsp, 2, true)?;
        core.store(linear, selector)?;
        core.regs[gpr::RSP] = rsp;
        return Ok(());
    }
    let mut stack = Stack::current(core);
    stack.push(core, core.stack_operand(insn), selector.into())?;
    core.regs[gpr::RSP] = stack.rsp;
    Ok(())
}

/// POP of a segment register.
pub fn pop_segment(core: &mut Core, insn: &Insn) -> Exec {
    // Only the selector is read, whatever the operand's size.
    let selector = core.peek_size(2, 0)?;
    let number = usize::from(insn.reg);
    core.load_segment(number, selector as u16)?;
    core.regs[gpr::RSP] = core.stack_moved(core.stack_operand(insn) as i64);
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

/// A far pointer in memory: its offset, of the operand's size, then its selector, which is an access of its own.
pub(super) fn far_pointer(core: &mut Core, insn: &Insn) -> Exec<(u64, u16)> {
    let bytes = operand_bytes(insn);
    let offset = load_part(core, insn, 0, bytes)?;
    let selector = load_part(core, insn, bytes, 2)?;
    Ok((offset, selector as u16))
}

/// Loads 2, 4 or 8 bytes at a distance from the start of the memory operand.
pub(super) fn load_part(core: &mut Core, insn: &Insn, distance: u64, bytes: u64) -> Exec<u64> {
    let offset = core.offset_of(insn).wrapping_add(distance) & insn.address_mask();
    let linear = core.segment_linear(insn.segment.into(), offset, bytes, false)?;
    match bytes {
        2 => core.load::<u16>(linear).map(u64::from),
        4 => core.load::<u32>(linear).map(u64::from),
        _ => core.load(linear),
    }
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
    let selector = D::read::<u16>(core, insn)?;
    let lower = selector & 3 < wanted;
    if lower {
        D::write(core, insn, selector & !3 | wanted)?;
    }
    core.set_zero_flag(lower);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn::WIDE;
    use crate::system::tests::*;

    fn load(core: &mut Core, number: usize, selector: u16) -> Exec {
        let mut insn = insn();
        insn.reg = number as u8;
        core.regs[gpr::RAX] = selector.into();
        load_segment::<Rm>(core, &insn)
    }

    #[test]
    fn loads_check_type_privilege_and_presence() {
        let mut core = long_user();
        for (number, selector, vector, error) in [
            (seg::DS, KERNEL_DATA, vector::GP, 0x10),
            (seg::DS, TASK, vector::GP, 0x30),
            (seg::ES, 0x98, vector::GP, 0x98),
            (seg::FS, 0x0c, vector::GP, 0x0c),
            (seg::DS, ABSENT | 3, vector::NP, 0x50),
            (seg::SS, ABSENT | 3, vector::SS, 0x50),
            (seg::SS, USER_CODE, vector::GP, 0x28),
            (seg::SS, USER_DATA & !3, vector::GP, 0x20),
            (seg::SS, 3, vector::GP, 0),
        ] {
            let before = core.segments;
            assert!(load(&mut core, number, selector).is_err(), "{selector:#x}");
            assert_eq!(raised(&core), (vector, Some(error)), "{selector:#x}");
            assert_eq!(core.segments, before);
        }
        assert_eq!(load(&mut core, seg::DS, USER_DATA), Ok(()));
        assert_eq!(core.segments[seg::DS], core.segments[seg::SS]);
        assert_eq!(load(&mut core, seg::ES, CONFORMING), Ok(()));
        assert_eq!(load(&mut core, seg::ES, 3), Ok(()));
        assert!(!core.segments[seg::ES].present());
    }

    #[test]
    fn a_load_sets_the_accessed_bit() {
        let mut core = long();
        assert_eq!(load(&mut core, seg::FS, FRESH), Ok(()));
        assert_eq!(core.segments[seg::FS].access, 0xc093);
        assert_eq!(core.load::<u64>(TABLE + u64::from(FRESH)), Ok(0x00cf_9300_0000_ffff));
    }

    #[test]
    fn a_load_of_ss_holds_interrupts_off_and_may_be_null_in_64_bit_kernels() {
        let mut core = long();
        assert_eq!(load(&mut core, seg::SS, 0), Ok(()));
        assert!(core.interrupt_shadow && core.cpl == 0);
        let mut core = protected(0);
        assert!(load(&mut core, seg::SS, 0).is_err());
        assert!(!core.interrupt_shadow);
    }

    #[test]
    fn real_mode_loads_paragraphs() {
        let mut core = protected(0);
        core.cr[0] = 0x10;
        core.update_mode();
        assert_eq!(load(&mut core, seg::DS, 0x1234), Ok(()));
        // The limit stays: "unreal mode".
        let segment = core.segments[seg::DS];
        assert_eq!((segment.base, segment.limit), (0x1_2340, u32::MAX));
        assert!(verr::<Rm>(&mut core, &insn()).is_err());
        assert_eq!(core.raised.vector, vector::UD);
    }

    #[test]
    fn a_failing_pop_leaves_the_stack() {
        let mut core = long_user();
        push_all(&mut core, 8, &[KERNEL_DATA.into()]);
        let (mut insn, rsp) = (insn(), core.regs[gpr::RSP]);
        insn.reg = seg::FS as u8;
        assert!(pop_segment(&mut core, &insn).is_err());
        assert_eq!(core.regs[gpr::RSP], rsp);
        core.store(rsp, u64::from(USER_DATA)).unwrap();
        assert_eq!(pop_segment(&mut core, &insn), Ok(()));
        assert_eq!(
            (core.segments[seg::FS].selector, core.regs[gpr::RSP]),
            (USER_DATA, 0x800)
        );
        assert_eq!(push_segment(&mut core, &insn), Ok(()));
        assert_eq!(core.load::<u64>(0x7f8), Ok(USER_DATA.into()));
    }

    #[test]
    fn far_pointers_load_both_halves_or_none() {
        let mut core = protected(3);
        core.store(0u64, 0x1122_3344u32).unwrap();
        core.store(4u64, KERNEL_DATA).unwrap();
        let mut insn = insn();
        insn.extra = seg::GS as u32;
        assert!(load_far_pointer(&mut core, &insn).is_err());
        assert_eq!(core.regs[gpr::RAX], 0);
        core.store(4u64, USER_DATA).unwrap();
        assert_eq!(load_far_pointer(&mut core, &insn), Ok(()));
        assert_eq!(
            (core.regs[gpr::RAX], core.segments[seg::GS].selector),
            (0x1122_3344, USER_DATA)
        );
    }

    #[test]
    fn a_far_pointers_offset_is_read_first() {
        let mut core = long();
        core.regs[gpr::RBX] = 0x7fff_ffff_fffc;
        let mut insn = insn();
        insn.base = gpr::RBX as u8 * 8;
        assert!(load_far_pointer(&mut core, &insn).is_err());
        assert_eq!(
            (core.raised.vector, core.raised.address),
            (vector::PF, 0x7fff_ffff_fffc)
        );
        core.regs[gpr::RBX] = 0x1000 - 4;
        core.store(0xffcu64, 0u32).unwrap();
        // The page of the selector is absent.
        core.physical_write(0x4008, &[0; 8]);
        core.mmu.flush();
        assert!(load_far_pointer(&mut core, &insn).is_err());
        assert_eq!((core.raised.vector, core.raised.address), (vector::PF, 0x1000));
    }

    #[test]
    fn stores_are_as_wide_as_their_place() {
        let mut core = long();
        let mut insn = insn();
        insn.reg = seg::SS as u8;
        for (flags, expected) in [(OPERAND16, 0xffff_ffff_ffff_0010), (0, 0x10), (WIDE, 0x10)] {
            core.regs[gpr::RAX] = u64::MAX;
            insn.flags = flags;
            assert_eq!(store_segment::<Rm>(&mut core, &insn), Ok(()));
            assert_eq!(core.regs[gpr::RAX], expected);
        }
        core.store(0u64, u32::MAX).unwrap();
        assert_eq!(store_segment::<Mem>(&mut core, &insn), Ok(()));
        assert_eq!(core.load::<u32>(0), Ok(0xffff_0010));
    }

    #[test]
    fn descriptors_answer_who_may_see_them() {
        let mut core = long_user();
        let mut ask = |run: fn(&mut Core, &Insn) -> Exec, selector: u16| {
            core.regs[gpr::RAX] = selector.into();
            run(&mut core, &insn()).unwrap();
            (core.rflags() & flag::ZF != 0).then_some(core.regs[gpr::RAX])
        };
        assert_eq!(ask(lar::<Rm>, USER_DATA), Some(0xc0_f300));
        assert_eq!(ask(lar::<Rm>, KERNEL_DATA), None);
        assert_eq!(ask(lar::<Rm>, CONFORMING), Some(0xa0_9f00));
        assert_eq!(ask(lar::<Rm>, 0), None);
        assert_eq!(ask(lar::<Rm>, 0x1000), None);
        assert_eq!(ask(lsl::<Rm>, USER_DATA), Some(0xffff_ffff));
        assert_eq!(ask(lsl::<Rm>, GATE), None);
        assert_eq!(ask(lar::<Rm>, GATE), Some(0xec00));
        assert!(ask(verr::<Rm>, USER_CODE).is_some());
        assert!(ask(verw::<Rm>, USER_CODE).is_none());
        assert!(ask(verw::<Rm>, USER_DATA).is_some());
        assert!(ask(verr::<Rm>, KERNEL_DATA).is_none());
        assert!(ask(verr::<Rm>, GATE).is_none());
    }

    #[test]
    fn a_32_bit_push_stores_the_selector_alone() {
        let mut core = protected(0);
        core.store(0x7fcu64, 0x1234_5678u32).unwrap();
        let mut insn = insn();
        insn.reg = seg::DS as u8;
        assert_eq!(push_segment(&mut core, &insn), Ok(()));
        assert_eq!((core.regs[gpr::RSP], core.load::<u32>(0x7fc)), (0x7fc, Ok(0x1234_0010)));
    }

    #[test]
    fn arpl_raises_the_requested_level() {
        let mut core = protected(0);
        core.regs[gpr::RAX] = 0x10;
        core.regs[gpr::RCX] = 0x23;
        let mut insn = insn();
        insn.reg = 8;
        assert_eq!(arpl::<Rm>(&mut core, &insn), Ok(()));
        assert_eq!((core.regs[gpr::RAX], core.rflags() & flag::ZF), (0x13, flag::ZF));
        assert_eq!(arpl::<Rm>(&mut core, &insn), Ok(()));
        assert_eq!((core.regs[gpr::RAX], core.rflags() & flag::ZF), (0x13, 0));
    }
}
