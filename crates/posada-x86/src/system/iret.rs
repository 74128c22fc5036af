//! IRET in every mode (Intel SDM 2A; 3A, sections 6.12 and 6.14).

use super::descriptor::{Rights, rpl, segment_8086};
use super::segments::operand_bytes;
use super::stack::Stack;
use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exec, vector};
use crate::insn::Insn;
use posada_engine::Segment;

/// What IRET may change at any privilege level.
const ALWAYS: u64 = flag::ARITHMETIC | flag::TF | flag::DF | flag::NT;

impl Core {
    /// RFLAGS after IRET popped `popped` in `bytes` bytes, by the rights of the current level.
    fn returned_flags(&self, popped: u64, bytes: u64) -> u64 {
        let wide = bytes > 2;
        let mut mask = ALWAYS;
        if wide {
            mask |= flag::RF | flag::AC | flag::ID;
        }
        if u64::from(self.cpl) <= self.system_flags >> 12 & 3 {
            mask |= flag::IF;
        }
        if self.cpl == 0 {
            mask |= flag::IOPL;
            if wide && self.protected() {
                mask |= flag::VIF | flag::VIP;
            }
        }
        self.rflags() & !mask | popped & mask
    }

    /// IRET in real mode, and in virtual-8086 mode with IOPL 3.
    fn iret_8086(&mut self, bytes: u64) -> Exec {
        if self.virtual_8086() && self.system_flags & flag::IOPL != flag::IOPL {
            return self.general_protection();
        }
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, bytes)?;
        let selector = stack.pop(self, bytes)? as u16;
        let flags = stack.pop(self, bytes)?;
        let code = self.segments[seg::CS];
        self.check_rip(&code, rip)?;
        let flags = self.returned_flags(flags, bytes);
        self.set_rflags(flags);
        self.regs[gpr::RSP] = stack.rsp;
        let code = &mut self.segments[seg::CS];
        code.selector = selector;
        code.base = u64::from(selector) << 4;
        self.set_rip(rip);
        self.update_mode();
        Ok(())
    }

    /// Into virtual-8086 mode: the stack holds ESP, SS, ES, DS, FS and GS behind the flags.
    fn enter_8086(&mut self, rip: u64, selector: u16, flags: u64, mut stack: Stack) -> Exec {
        if rip > 0xffff {
            return self.general_protection();
        }
        let rsp = stack.pop(self, 4)?;
        let mut segments = [Segment::default(); 6];
        segments[seg::CS] = segment_8086(selector);
        for register in [seg::SS, seg::ES, seg::DS, seg::FS, seg::GS] {
            segments[register] = segment_8086(stack.pop(self, 4)? as u16);
        }
        self.set_rflags(flags);
        self.segments = segments;
        self.regs[gpr::RSP] = rsp;
        self.set_rip(rip);
        self.update_mode();
        Ok(())
    }

    fn iret_protected(&mut self, bytes: u64) -> Exec {
        if self.system_flags & flag::NT != 0 {
            // A return to another task, which long mode does not have. Nor does this processor outside it: there the
            // link in the TSS never names one.
            if self.long_mode() {
                return self.general_protection();
            }
            let error = u32::from(self.tr.selector & 0xfffc);
            return self.raise_code(vector::TS, error);
        }
        let bits64 = self.bits64();
        let mut stack = Stack::current(self);
        let rip = stack.pop(self, bytes)?;
        let selector = stack.pop(self, bytes)? as u16;
        let flags = stack.pop(self, bytes)?;
        if flags & flag::VM != 0 && self.cpl == 0 && bytes == 4 && !self.long_mode() {
            return self.enter_8086(rip, selector, flags, stack);
        }
        let code = self.return_code(selector)?;
        self.check_rip(&code, rip)?;
        let flags = self.returned_flags(flags, bytes);
        let level = rpl(selector);
        if bits64 || level > self.cpl {
            let rsp = stack.pop(self, bytes)?;
            let stack_selector = stack.pop(self, bytes)? as u16;
            let code64 = self.long_mode() && code.long();
            let segment = self.stack_segment_for(stack_selector, level, code64)?;
            self.set_rflags(flags);
            self.resume(code, rip, segment, rsp);
        } else {
            self.set_rflags(flags);
            self.regs[gpr::RSP] = stack.rsp;
            let segment = self.segments[seg::SS];
            self.resume(code, rip, segment, stack.rsp);
        }
        Ok(())
    }
}

/// IRET, IRETD and IRETQ.
pub fn iret(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = operand_bytes(insn);
    if core.paragraphs() {
        core.iret_8086(bytes)?;
    } else {
        core.iret_protected(bytes)?;
    }
    core.serializing();
    core.unblock_nmi();
    Ok(())
}
