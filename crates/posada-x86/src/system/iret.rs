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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::CodeSize;
    use crate::insn::{OPERAND16, WIDE};
    use crate::system::tests::*;

    fn wide() -> Insn {
        let mut insn = insn();
        insn.flags = WIDE;
        insn
    }

    #[test]
    fn a_kernel_returns_to_64_bit_and_compatibility_mode() {
        for (code, size) in [(USER_CODE, CodeSize::Bits64), (USER_CODE_32, CodeSize::Bits32)] {
            let mut core = long();
            let flags = flag::IF | flag::CF | flag::ID | 2;
            push_all(
                &mut core,
                8,
                &[USER_DATA.into(), 0x1_0000_5550, flags, code.into(), 0x4444],
            );
            assert_eq!(iret(&mut core, &wide()), Ok(()));
            assert_eq!((core.rip(), core.cpl, core.code_size), (0x4444, 3, size));
            let rsp = if code == USER_CODE { 0x1_0000_5550 } else { 0x5550 };
            assert_eq!((core.regs[gpr::RSP], core.rflags()), (rsp, flags));
            assert_eq!(core.segments[seg::SS].selector, USER_DATA);
        }
    }

    #[test]
    fn user_mode_sees_no_kernel_segment_and_no_null_selector_but_0() {
        let mut core = long();
        core.segments[seg::DS] = core.segments[seg::SS];
        core.segments[seg::FS].selector = 3;
        core.segments[seg::FS].base = 0x1234;
        push_all(&mut core, 8, &[USER_DATA.into(), 0x5550, 2, USER_CODE.into(), 0x4444]);
        assert_eq!(iret(&mut core, &wide()), Ok(()));
        assert_eq!(core.segments[seg::DS].selector, 0);
        assert_eq!(
            (core.segments[seg::FS].selector, core.segments[seg::FS].base),
            (0, 0x1234)
        );
    }

    #[test]
    fn the_same_level_pops_a_stack_in_64_bit_mode() {
        let mut core = long();
        push_all(&mut core, 8, &[0, 0x1230, 2, KERNEL_CODE.into(), 0x4444]);
        assert_eq!(iret(&mut core, &wide()), Ok(()));
        assert_eq!((core.rip(), core.cpl, core.regs[gpr::RSP]), (0x4444, 0, 0x1230));
        assert_eq!(core.segments[seg::SS].selector, 0);
    }

    #[test]
    fn user_mode_cannot_raise_its_rights() {
        let mut core = long_user();
        let flags = flag::IOPL | flag::IF | flag::VIP | flag::AC | flag::ZF | 2;
        push_all(
            &mut core,
            8,
            &[USER_DATA.into(), 0x800, flags, USER_CODE.into(), 0x4444],
        );
        assert_eq!(iret(&mut core, &wide()), Ok(()));
        assert_eq!(core.rflags(), flag::AC | flag::ZF | 2);
        push_all(&mut core, 8, &[0, 0x800, 2, KERNEL_CODE.into(), 0x4444]);
        assert!(iret(&mut core, &wide()).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(8)));
    }

    #[test]
    fn faults_leave_everything_as_it_was() {
        let user_data = u64::from(USER_DATA);
        for (frame, expected) in [
            ([user_data, 0, 2, USER_CODE.into(), 1 << 47], (vector::GP, Some(0))),
            ([0, 0, 2, USER_CODE.into(), 0], (vector::GP, Some(0))),
            (
                [KERNEL_DATA.into(), 0, 2, USER_CODE.into(), 0],
                (vector::GP, Some(0x10)),
            ),
            (
                [(ABSENT | 3).into(), 0, 2, USER_CODE.into(), 0],
                (vector::SS, Some(0x50)),
            ),
            ([user_data, 0, 2, (RESERVED | 3).into(), 0], (vector::GP, Some(0x78))),
        ] {
            let mut core = long();
            push_all(&mut core, 8, &frame);
            let before = core.state();
            assert!(iret(&mut core, &wide()).is_err());
            assert_eq!(raised(&core), expected);
            assert_eq!(core.state(), before);
        }
    }

    #[test]
    fn there_are_no_nested_tasks_in_long_mode() {
        let mut core = long();
        core.system_flags |= flag::NT;
        assert!(iret(&mut core, &wide()).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
    }

    #[test]
    fn protected_mode_keeps_its_stack_at_the_same_level() {
        let mut core = protected(0);
        push_all(&mut core, 4, &[flag::DF | 2, KERNEL_CODE_32.into(), 0x4444]);
        assert_eq!(iret(&mut core, &insn()), Ok(()));
        assert_eq!(
            (core.rip(), core.regs[gpr::RSP], core.rflags()),
            (0x4444, 0x800, flag::DF | 2)
        );
        push_all(&mut core, 4, &[USER_DATA.into(), 0x900, 2, USER_CODE_32.into(), 0x5555]);
        assert_eq!(iret(&mut core, &insn()), Ok(()));
        assert_eq!((core.rip(), core.regs[gpr::RSP], core.cpl), (0x5555, 0x900, 3));
    }

    #[test]
    fn virtual_8086_mode_starts_from_level_0_and_is_left_through_the_idt() {
        let mut core = protected(0);
        let segments = [0x500, 0x400, 0x300, 0x200, 0x100];
        let flags = flag::VM | flag::IOPL | flag::IF | 2;
        push_all(&mut core, 4, &segments);
        push_all(&mut core, 4, &[0x700, flags, 0x1000, 0x10]);
        assert_eq!(iret(&mut core, &insn()), Ok(()));
        assert_eq!((core.cpl, core.rip(), core.code_size), (3, 0x10, CodeSize::Bits16));
        assert!(core.virtual_8086());
        assert_eq!(core.segments[seg::CS].base, 0x1_0000);
        assert_eq!(
            (core.segments[seg::SS].selector, core.segments[seg::GS].selector),
            (0x100, 0x500)
        );
        // In it, with IOPL 3, IRET is that of real mode.
        push_all(&mut core, 2, &[0x3002, 0x2000, 0x20]);
        let mut narrow = insn();
        narrow.flags = OPERAND16;
        assert_eq!(iret(&mut core, &narrow), Ok(()));
        assert_eq!(
            (core.rip(), core.segments[seg::CS].base, core.regs[gpr::RSP]),
            (0x20, 0x2_0000, 0x700)
        );
        assert!(core.virtual_8086());
        core.system_flags &= !flag::IOPL;
        assert!(iret(&mut core, &narrow).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
        // An interrupt goes to level 0, with all segments on its stack.
        (core.idtr.base, core.idtr.limit) = (0x200, 0xfff);
        core.store_system(0x200u64 + 0x40 * 8, 0x0000_8e00_0068_4321u64)
            .unwrap();
        core.interrupt(0x40);
        assert_eq!((core.cpl, core.rip(), core.regs[gpr::RSP]), (0, 0x4321, 0xe00 - 36));
        assert_eq!(iret(&mut core, &insn()), Ok(()));
        assert!(core.virtual_8086() && core.rip() == 0x20);
    }
}
