//! Far jumps, calls and returns, and the instructions that raise interrupts (Intel SDM 3A, section 5.8).

use super::descriptor::{Rights, canonical, code_of, is_null, null_segment, rpl};
use super::segments::{far_pointer, load_part, operand_bytes};
use super::stack::Stack;
use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exception, Exec, vector};
use crate::insn::{Insn, OPERAND16};
use posada_engine::Segment;

/// What a far pointer leads to.
enum Destination {
    /// Code at the same privilege level.
    Code(Segment, u64),
    /// Code through a call gate.
    Gate(Gate),
}

struct Gate {
    code: Segment,
    rip: u64,
    /// Bytes of each thing pushed.
    bytes: u64,
    /// Parameters to copy to an inner stack.
    parameters: u64,
    /// The inner privilege level, if it changes.
    inner: Option<u8>,
}

impl Core {
    /// #GP(0) unless RIP may be `rip` in `code`.
    pub(super) fn check_rip(&mut self, code: &Segment, rip: u64) -> Exec {
        let fits = if self.long_mode() && code.long() {
            canonical(rip)
        } else {
            rip <= u64::from(code.limit)
        };
        if fits { Ok(()) } else { self.general_protection() }
    }

    /// #GP(selector) unless it is code, and not of a size that long mode reserves; #NP(selector) unless it is present.
    fn check_code(&mut self, code: &Segment, privileged: impl Fn(&Segment) -> bool) -> Exec {
        let reserved = self.long_mode() && code.long() && code.big();
        if !code.code() || reserved || !privileged(code) {
            return self.raise_code(vector::GP, code_of(code.selector));
        }
        if !code.present() {
            return self.raise_code(vector::NP, code_of(code.selector));
        }
        Ok(())
    }

    /// Goes to a real or virtual-8086 mode address.
    fn jump_8086(&mut self, selector: u16, rip: u64) {
        let code = &mut self.segments[seg::CS];
        code.selector = selector;
        code.base = u64::from(selector) << 4;
        self.set_rip(rip);
        self.update_mode();
    }

    fn jump(&mut self, code: Segment, rip: u64) {
        self.segments[seg::CS] = code;
        self.set_rip(rip);
        self.update_mode();
    }

    /// Follows a far pointer of protected mode.
    fn destination(&mut self, selector: u16, rip: u64, call: bool) -> Exec<Destination> {
        let mut code = self.descriptor_of(selector, vector::GP, 0)?;
        let cpl = self.cpl;
        match code.system() {
            None => {
                self.check_code(&code, |code| {
                    if code.conforming() {
                        code.dpl() <= cpl
                    } else {
                        rpl(selector) <= cpl && code.dpl() == cpl
                    }
                })?;
                self.check_rip(&code, rip)?;
                self.mark_accessed(&mut code)?;
                code.selector = selector & !3 | u16::from(cpl);
                Ok(Destination::Code(code, rip))
            }
            Some(12) => self.gate(selector, call, 4),
            Some(4) if !self.long_mode() => self.gate(selector, call, 2),
            // Task gates and TSSs too: this processor does not switch tasks.
            Some(_) => self.raise_code(vector::GP, code_of(selector)),
        }
    }

    /// Follows a call gate whose descriptor has been found.
    fn gate(&mut self, selector: u16, call: bool, bytes: u64) -> Exec<Destination> {
        let long = self.long_mode();
        let cpl = self.cpl;
        let linear = self.descriptor_linear(selector);
        let raw = self.load_system::<u64>(linear)?;
        let dpl = (raw >> 45 & 3) as u8;
        if dpl < cpl || dpl < rpl(selector) {
            return self.raise_code(vector::GP, code_of(selector));
        }
        if raw >> 47 & 1 == 0 {
            return self.raise_code(vector::NP, code_of(selector));
        }
        let mut rip = raw & 0xffff | raw >> 32 & 0xffff_0000;
        if long {
            if u32::from(selector | 7) + 8 > self.table_limit(selector) {
                return self.raise_code(vector::GP, code_of(selector));
            }
            let high = self.load_system::<u64>(linear.wrapping_add(8))?;
            if high >> 40 & 0x1f != 0 {
                return self.raise_code(vector::GP, code_of(selector));
            }
            rip |= high << 32;
        } else if bytes == 2 {
            rip &= 0xffff;
        }
        let target = (raw >> 16) as u16;
        let mut code = self.descriptor_of(target, vector::GP, 0)?;
        self.check_code(&code, |code| {
            let level = if call || code.conforming() {
                code.dpl() <= cpl
            } else {
                code.dpl() == cpl
            };
            level && (!long || code.long())
        })?;
        self.check_rip(&code, rip)?;
        self.mark_accessed(&mut code)?;
        let inner = (!code.conforming() && code.dpl() < cpl).then(|| code.dpl());
        code.selector = target & !3 | u16::from(inner.unwrap_or(cpl));
        Ok(Destination::Gate(Gate {
            code,
            rip,
            bytes: if long { 8 } else { bytes },
            parameters: if long { 0 } else { raw >> 32 & 31 },
            inner,
        }))
    }

    fn table_limit(&self, selector: u16) -> u32 {
        if selector & 4 == 0 {
            self.gdtr.limit.into()
        } else {
            self.ldtr.limit
        }
    }

    /// Pushes CS and RIP.
    fn push_return(&mut self, stack: &mut Stack, bytes: u64) -> Exec {
        let selector = self.segments[seg::CS].selector;
        stack.push(self, bytes, selector.into())?;
        stack.push(self, bytes, self.rip())
    }

    fn call_gate(&mut self, gate: Gate) -> Exec {
        let mut stack = Stack::current(self);
        if let Some(inner) = gate.inner {
            let (old, mut outer) = (self.segments[seg::SS].selector, stack);
            let old_rsp = outer.rsp;
            let (mut segment, rsp) = self.inner_stack(inner, 0)?;
            self.mark_accessed(&mut segment)?;
            stack = Stack::inner(self, segment, rsp);
            stack.push(self, gate.bytes, old.into())?;
            stack.push(self, gate.bytes, old_rsp)?;
            let mut parameters = [0; 31];
            for parameter in &mut parameters[..gate.parameters as usize] {
                *parameter = outer.pop(self, gate.bytes)?;
            }
            for &parameter in parameters[..gate.parameters as usize].iter().rev() {
                stack.push(self, gate.bytes, parameter)?;
            }
            self.push_return(&mut stack, gate.bytes)?;
            self.segments[seg::SS] = segment;
        } else {
            self.push_return(&mut stack, gate.bytes)?;
        }
        self.regs[gpr::RSP] = stack.rsp;
        self.jump(gate.code, gate.rip);
        Ok(())
    }

    fn jmp_far(&mut self, selector: u16, rip: u64) -> Exec {
        if self.paragraphs() {
            let code = self.segments[seg::CS];
            self.check_rip(&code, rip)?;
            self.jump_8086(selector, rip);
            return Ok(());
        }
        match self.destination(selector, rip, false)? {
            Destination::Code(code, rip) => self.jump(code, rip),
            Destination::Gate(gate) => self.jump(gate.code, gate.rip),
        }
        Ok(())
    }

    fn call_far(&mut self, selector: u16, rip: u64, bytes: u64) -> Exec {
        let mut stack = Stack::current(self);
        if self.paragraphs() {
            let code = self.segments[seg::CS];
            self.check_rip(&code, rip)?;
            self.push_return(&mut stack, bytes)?;
            self.regs[gpr::RSP] = stack.rsp;
            self.jump_8086(selector, rip);
            return Ok(());
        }
        match self.destination(selector, rip, true)? {
            Destination::Code(code, rip) => {
                self.push_return(&mut stack, bytes)?;
                self.regs[gpr::RSP] = stack.rsp;
                self.jump(code, rip);
                Ok(())
            }
            Destination::Gate(gate) => self.call_gate(gate),
        }
    }

    /// The code segment that RET and IRET go back to, at the privilege level of its selector.
    pub(super) fn return_code(&mut self, selector: u16) -> Exec<Segment> {
        let mut code = self.descriptor_of(selector, vector::GP, 0)?;
        let (level, cpl) = (rpl(selector), self.cpl);
        self.check_code(&code, |code| {
            let suits = if code.conforming() {
                code.dpl() <= level
            } else {
                code.dpl() == level
            };
            level >= cpl && suits
        })?;
        self.mark_accessed(&mut code)?;
        Ok(code)
    }

    /// BOUND's lower (0) or upper (1) bound.
    fn bound_at(&mut self, insn: &Insn, number: u64, narrow: bool) -> Exec<i32> {
        let bytes = if narrow { 2 } else { 4 };
        let bound = load_part(self, insn, bytes * number, bytes)?;
        Ok(if narrow { (bound as i16).into() } else { bound as i32 })
    }

    /// Goes on at another, outer or equal privilege level, with the stack at `rsp`.
    pub(super) fn resume(&mut self, code: Segment, rip: u64, stack: Segment, rsp: u64) {
        let outer = rpl(code.selector) > self.cpl;
        let old = self.regs[gpr::RSP];
        self.regs[gpr::RSP] = if self.long_mode() && code.long() {
            rsp
        } else if stack.big() {
            rsp & 0xffff_ffff
        } else {
            old & !0xffff | rsp & 0xffff
        };
        self.segments[seg::SS] = stack;
        if outer {
            let level = rpl(code.selector);
            for register in [seg::ES, seg::DS, seg::FS, seg::GS] {
                let segment = &mut self.segments[register];
                if is_null(segment.selector) {
                    // Its RPL goes; FS and GS keep the bases that MSRs gave them.
                    segment.selector = 0;
                } else if segment.present() && !segment.conforming() && segment.dpl() < level {
                    *segment = null_segment(0, 0);
                }
            }
        }
        self.jump(code, rip);
    }
}

/// JMP ptr16:16 and ptr16:32: `imm` is the offset, with the selector from bit 32 on.
pub fn jmp_direct(core: &mut Core, insn: &Insn) -> Exec {
    core.jmp_far((insn.imm >> 32) as u16, insn.imm & 0xffff_ffff)
}

/// CALL ptr16:16 and ptr16:32: as [`jmp_direct`].
pub fn call_direct(core: &mut Core, insn: &Insn) -> Exec {
    core.call_far((insn.imm >> 32) as u16, insn.imm & 0xffff_ffff, operand_bytes(insn))
}

/// JMP m16:16, m16:32 and m16:64.
pub fn jmp_indirect(core: &mut Core, insn: &Insn) -> Exec {
    let (rip, selector) = far_pointer(core, insn)?;
    core.jmp_far(selector, rip)
}

/// CALL m16:16, m16:32 and m16:64.
pub fn call_indirect(core: &mut Core, insn: &Insn) -> Exec {
    let (rip, selector) = far_pointer(core, insn)?;
    core.call_far(selector, rip, operand_bytes(insn))
}

/// Far RET: `imm` bytes of parameters are dropped.
pub fn ret(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = operand_bytes(insn);
    let mut stack = Stack::current(core);
    let rip = stack.pop(core, bytes)?;
    let selector = stack.pop(core, bytes)? as u16;
    if core.paragraphs() {
        let code = core.segments[seg::CS];
        core.check_rip(&code, rip)?;
        stack.release(insn.imm);
        core.regs[gpr::RSP] = stack.rsp;
        core.jump_8086(selector, rip);
        return Ok(());
    }
    let code = core.return_code(selector)?;
    core.check_rip(&code, rip)?;
    stack.release(insn.imm);
    let level = rpl(selector);
    if level == core.cpl {
        core.regs[gpr::RSP] = stack.rsp;
        core.jump(code, rip);
        return Ok(());
    }
    let rsp = stack.pop(core, bytes)?;
    let outer_selector = stack.pop(core, bytes)? as u16;
    let code64 = core.long_mode() && code.long();
    let outer = core.stack_segment_for(outer_selector, level, code64)?;
    core.resume(code, rip, outer, rsp.wrapping_add(insn.imm));
    Ok(())
}

pub use super::iret::iret;

/// INT n: `imm` is the vector.
pub fn int(core: &mut Core, insn: &Insn) -> Exec {
    if core.virtual_8086() && core.system_flags & flag::IOPL != flag::IOPL {
        return core.general_protection();
    }
    core.software_interrupt(insn.imm as u8)
}

/// INT3.
pub fn int3(core: &mut Core, _: &Insn) -> Exec {
    core.software_interrupt(vector::BP)
}

/// INTO.
pub fn into(core: &mut Core, _: &Insn) -> Exec {
    if core.rflags() & flag::OF == 0 {
        return Ok(());
    }
    core.software_interrupt(vector::OF)
}

/// INT1: a debug exception that returns behind the instruction, whatever the gate's privilege level.
pub fn int1(core: &mut Core, _: &Insn) -> Exec {
    core.deliver(Exception {
        vector: vector::DB,
        ..Exception::default()
    });
    Ok(())
}

/// BOUND: `reg` is the index, memory holds the lower and the upper bound, all signed. Below the lower one, the upper one is
/// not read.
pub fn bound(core: &mut Core, insn: &Insn) -> Exec {
    let narrow = insn.flags & OPERAND16 != 0;
    let index = if narrow {
        (core.read_reg::<u16>(insn.reg) as i16).into()
    } else {
        core.read_reg::<u32>(insn.reg) as i32
    };
    if index < core.bound_at(insn, 0, narrow)? || index > core.bound_at(insn, 1, narrow)? {
        return core.raise(vector::BR);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::insn::WIDE;
    use crate::system::tests::*;

    fn to(selector: u16, rip: u64) -> Insn {
        let mut insn = insn();
        insn.imm = rip | u64::from(selector) << 32;
        insn
    }

    #[test]
    fn a_jump_changes_the_code_size() {
        let mut core = long();
        assert_eq!(jmp_direct(&mut core, &to(KERNEL_CODE_32, 0x99)), Ok(()));
        assert_eq!((core.rip(), core.code_size), (0x99, crate::core::CodeSize::Bits32));
        assert_eq!(jmp_direct(&mut core, &to(KERNEL_CODE, 0x88)), Ok(()));
        assert!(core.bits64());
    }

    #[test]
    fn jumps_refuse_what_is_not_code_of_this_level() {
        let mut core = long_user();
        for (selector, vector, error) in [
            (0, vector::GP, 0),
            (KERNEL_CODE, vector::GP, 8),
            (USER_DATA, vector::GP, 0x20),
            (TASK, vector::GP, 0x30),
            (ABSENT, vector::GP, 0x50),
            (RESERVED, vector::GP, 0x78),
            // Its upper half is another descriptor.
            (GATE_32, vector::GP, 0x70),
            (GATE, vector::GP, 8),
            (0x98, vector::GP, 0x98),
        ] {
            assert!(jmp_direct(&mut core, &to(selector, 0)).is_err(), "{selector:#x}");
            assert_eq!(raised(&core), (vector, Some(error)), "{selector:#x}");
            assert_eq!(core.rip(), 0x77);
        }
        // Code that conforms runs at the caller's level.
        assert_eq!(jmp_direct(&mut core, &to(CONFORMING, 0x99)), Ok(()));
        assert_eq!((core.segments[seg::CS].selector, core.cpl), (CONFORMING | 3, 3));
    }

    #[test]
    fn a_call_returns() {
        let mut core = long();
        core.store(0u64, 0xffff_8000_0000_1111u64).unwrap();
        core.store(8u64, KERNEL_CODE).unwrap();
        let mut insn = insn();
        insn.flags = WIDE;
        assert_eq!(call_indirect(&mut core, &insn), Ok(()));
        assert_eq!((core.rip(), core.regs[gpr::RSP]), (0xffff_8000_0000_1111, 0x7f0));
        insn.imm = 0x20;
        assert_eq!(ret(&mut core, &insn), Ok(()));
        assert_eq!((core.rip(), core.regs[gpr::RSP]), (0x77, 0x820));
    }

    #[test]
    fn a_64_bit_call_gate_switches_stacks_and_back() {
        let mut core = long_user();
        core.segments[seg::DS] = core.segments[seg::SS];
        assert_eq!(call_direct(&mut core, &to(GATE | 3, 0xdead)), Ok(()));
        assert_eq!((core.cpl, core.rip(), core.regs[gpr::RSP]), (0, 0x1234, 0xde0));
        let frame = [0, 8, 16, 24].map(|at| core.load::<u64>(0xde0 + at).unwrap());
        assert_eq!(frame, [0x77, USER_CODE.into(), 0x800, USER_DATA.into()]);
        assert_eq!(core.segments[seg::SS].selector, 0);
        core.load_segment(seg::DS, KERNEL_DATA).unwrap();
        core.load_segment(seg::FS, 0).unwrap();
        core.segments[seg::FS].base = 0x1234_5678;
        let mut insn = insn();
        insn.flags = WIDE;
        assert_eq!(ret(&mut core, &insn), Ok(()));
        assert_eq!((core.cpl, core.rip(), core.regs[gpr::RSP]), (3, 0x77, 0x800));
        assert_eq!(core.segments[seg::DS].selector, 0, "the kernel's segment does not leak");
        assert_eq!(core.segments[seg::FS].base, 0x1234_5678);
    }

    #[test]
    fn a_32_bit_call_gate_copies_parameters() {
        let mut core = protected(3);
        push_all(&mut core, 4, &[0xaaaa, 0xbbbb]);
        assert_eq!(call_direct(&mut core, &to(GATE_32 | 3, 0)), Ok(()));
        assert_eq!((core.cpl, core.rip(), core.regs[gpr::RSP]), (0, 0x5678, 0xde8));
        let frame = [0, 4, 8, 12, 16, 20].map(|at| core.load::<u32>(0xde8 + at).unwrap());
        assert_eq!(
            frame,
            [0x77, USER_CODE_32.into(), 0xbbbb, 0xaaaa, 0x7f8, USER_DATA.into()]
        );
        let mut insn = insn();
        insn.imm = 8;
        assert_eq!(ret(&mut core, &insn), Ok(()));
        assert_eq!((core.cpl, core.rip(), core.regs[gpr::RSP]), (3, 0x77, 0x800));
    }

    #[test]
    fn a_gate_without_a_stack_raises_ts() {
        let mut core = protected(3);
        core.store_system(TASK_STATE + 8, USER_DATA).unwrap();
        assert!(call_direct(&mut core, &to(GATE_32 | 3, 0)).is_err());
        assert_eq!(raised(&core), (vector::TS, Some(0x20)));
        core.tr.limit = 3;
        assert!(call_direct(&mut core, &to(GATE_32 | 3, 0)).is_err());
        assert_eq!(raised(&core), (vector::TS, Some(TASK.into())));
        assert_eq!((core.regs[gpr::RSP], core.rip(), core.cpl), (0x800, 0x77, 3));
    }

    #[test]
    fn returns_never_go_inward() {
        let mut core = long_user();
        push_all(&mut core, 4, &[KERNEL_CODE.into(), 0x1234]);
        assert!(ret(&mut core, &insn()).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(8)));
        assert_eq!(core.regs[gpr::RSP], 0x7f8);
    }

    #[test]
    fn real_mode_calls_push_16_bits() {
        let mut core = protected(0);
        core.cr[0] = 0x10;
        core.segments[seg::CS].access = 0x9b;
        core.segments[seg::CS].limit = 0xffff;
        core.segments[seg::SS].access = 0x93;
        core.update_mode();
        let mut insn = to(0x1000, 0x2222);
        insn.flags = OPERAND16;
        assert_eq!(call_direct(&mut core, &insn), Ok(()));
        assert_eq!(
            (core.segments[seg::CS].base, core.rip(), core.regs[gpr::RSP]),
            (0x1_0000, 0x2222, 0x7fc)
        );
        insn.imm = 0;
        assert_eq!(ret(&mut core, &insn), Ok(()));
        assert_eq!(
            (core.segments[seg::CS].selector, core.rip(), core.regs[gpr::RSP]),
            (KERNEL_CODE_32, 0x77, 0x800)
        );
        assert!(jmp_direct(&mut core, &to(0x1000, 0x1_0000)).is_err());
    }

    #[test]
    fn bound_compares_signed() {
        let mut core = protected(0);
        core.store(0u64, 10u64 << 32 | (-10i32) as u32 as u64).unwrap();
        for (index, inside) in [(-10, true), (10, true), (0, true), (-11, false), (11, false)] {
            core.regs[gpr::RAX] = index as u32 as u64;
            assert_eq!(bound(&mut core, &insn()).is_ok(), inside, "{index}");
        }
        assert_eq!(core.raised.vector, vector::BR);
        // The last bytes of the segment are a lower bound, and no upper one is there.
        core.segments[seg::DS].limit = 3;
        for (index, fault) in [(-11, vector::BR), (0, vector::GP)] {
            core.regs[gpr::RAX] = index as u32 as u64;
            assert!(bound(&mut core, &insn()).is_err());
            assert_eq!(core.raised.vector, fault, "{index}");
        }
    }

    #[test]
    fn int1_needs_no_rights_to_its_gate() {
        let mut core = long_user();
        (core.idtr.base, core.idtr.limit) = (0x200, 0xfff);
        for number in [1u64, 3] {
            core.store_system(0x200 + number * 16, 0x0000_8e00_0008_4321u64)
                .unwrap();
        }
        assert!(int3(&mut core, &insn()).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(3 << 3 | 2)));
        assert_eq!(int1(&mut core, &insn()), Ok(()));
        assert_eq!((core.rip(), core.cpl), (0x4321, 0));
        assert_eq!(core.load::<u64>(core.regs[gpr::RSP]), Ok(0x77));
    }
}
