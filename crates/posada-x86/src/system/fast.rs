//! SYSCALL, SYSENTER and the way back (Intel SDM 3A, sections 5.8.7 and 5.8.8).

use super::descriptor::canonical;
use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exec, vector};
use crate::insn::{Insn, WIDE};
use posada_engine::Segment;

/// EFER.SCE.
const SCE: u64 = 1;

/// A flat code segment, present and accessed: 64-bit, or 32-bit.
fn code(selector: u16, privilege: u8, bits64: bool) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access: if bits64 { 0xa09b } else { 0xc09b } | u16::from(privilege) << 5,
    }
}

/// A flat data segment.
fn data(selector: u16, privilege: u8) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access: 0xc093 | u16::from(privilege) << 5,
    }
}

impl Core {
    fn go(&mut self, code: Segment, stack: Segment, rip: u64) {
        self.segments[seg::CS] = code;
        self.segments[seg::SS] = stack;
        self.set_rip(rip);
        self.update_mode();
    }
}

/// SYSCALL. In compatibility mode only AMD's processors have it.
pub fn syscall(core: &mut Core, _: &Insn) -> Exec {
    let compatible = core.bits64() || core.long_mode() && core.shared.vm().model().amd();
    if !compatible || core.msr.efer & SCE == 0 {
        return core.raise(vector::UD);
    }
    let flags = core.rflags() & !flag::RF;
    let rip = core.rip();
    core.regs[gpr::RCX] = rip;
    core.regs[11] = flags;
    let target = if core.bits64() { core.msr.lstar } else { core.msr.cstar };
    core.set_rflags(flags & !core.msr.fmask);
    let selector = (core.msr.star >> 32) as u16 & !3;
    core.go(code(selector, 0, true), data(selector.wrapping_add(8), 0), target);
    Ok(())
}

/// SYSRET; with REX.W to 64-bit code.
pub fn sysret(core: &mut Core, insn: &Insn) -> Exec {
    if !core.bits64() || core.msr.efer & SCE == 0 {
        return core.raise(vector::UD);
    }
    core.require_cpl0()?;
    let (wide, rip) = (insn.flags & WIDE != 0, core.regs[gpr::RCX]);
    if wide && !canonical(rip) {
        return core.general_protection();
    }
    core.set_rflags(core.regs[11] & 0x3c_7fd7);
    let base = (core.msr.star >> 48) as u16;
    let selector = base.wrapping_add(if wide { 16 } else { 0 }) | 3;
    let rip = if wide { rip } else { rip & 0xffff_ffff };
    core.go(code(selector, 3, wide), data(base.wrapping_add(8) | 3, 3), rip);
    core.interrupts_may_be_due();
    Ok(())
}

/// SYSENTER.
pub fn sysenter(core: &mut Core, _: &Insn) -> Exec {
    let [selector, rsp, rip] = core.msr.sysenter;
    let selector = selector as u16 & !3;
    if !core.protected() || selector == 0 {
        return core.general_protection();
    }
    let long = core.long_mode();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    core.system_flags &= !(flag::VM | flag::IF | flag::RF);
    core.regs[gpr::RSP] = rsp & mask;
    core.go(code(selector, 0, long), data(selector.wrapping_add(8), 0), rip & mask);
    Ok(())
}

/// SYSEXIT; with REX.W to 64-bit code.
pub fn sysexit(core: &mut Core, insn: &Insn) -> Exec {
    let base = core.msr.sysenter[0] as u16 & !3;
    if !core.protected() || base == 0 {
        return core.general_protection();
    }
    core.require_cpl0()?;
    let (mut rsp, mut rip) = (core.regs[gpr::RCX], core.regs[gpr::RDX]);
    let wide = insn.flags & WIDE != 0;
    if wide {
        if !canonical(rsp) || !canonical(rip) {
            return core.general_protection();
        }
    } else {
        (rsp, rip) = (rsp & 0xffff_ffff, rip & 0xffff_ffff);
    }
    let selector = base.wrapping_add(if wide { 32 } else { 16 }) | 3;
    core.regs[gpr::RSP] = rsp;
    core.go(code(selector, 3, wide), data(selector.wrapping_add(8), 3), rip);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::CodeSize;
    use crate::system::tests::*;

    fn system() -> Box<Core> {
        let mut core = long_user();
        core.msr.efer |= SCE;
        core.msr.star = 0x0018_0008 << 32;
        core.msr.lstar = 0xffff_8000_0000_1000;
        core.msr.fmask = flag::IF | flag::DF;
        core.msr.sysenter = [0x08, 0x1f00, 0x4567];
        core
    }

    #[test]
    fn a_system_call_goes_in_and_back() {
        let mut core = system();
        let flags = flag::IF | flag::DF | flag::CF | 2;
        core.set_rflags(flags | flag::RF);
        assert_eq!(syscall(&mut core, &insn()), Ok(()));
        assert_eq!((core.rip(), core.cpl), (0xffff_8000_0000_1000, 0));
        assert_eq!((core.regs[gpr::RCX], core.regs[11]), (0x77, flags));
        assert_eq!(core.rflags(), flag::CF | 2);
        assert_eq!(
            (core.segments[seg::CS].selector, core.segments[seg::SS].selector),
            (8, 0x10)
        );
        let mut insn = insn();
        insn.flags = WIDE;
        assert_eq!(sysret(&mut core, &insn), Ok(()));
        assert_eq!((core.rip(), core.cpl, core.rflags()), (0x77, 3, flags));
        assert_eq!(
            (core.segments[seg::CS].selector, core.segments[seg::SS].selector),
            (0x2b, 0x23)
        );
        assert!(core.bits64());
        assert!(sysret(&mut core, &insn).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
    }

    #[test]
    fn sysret_without_a_prefix_goes_to_compatibility_mode() {
        let mut core = system();
        assert_eq!(syscall(&mut core, &insn()), Ok(()));
        core.regs[gpr::RCX] = 0x1_0000_2222;
        assert_eq!(sysret(&mut core, &insn()), Ok(()));
        assert_eq!((core.rip(), core.code_size), (0x2222, CodeSize::Bits32));
        assert_eq!(core.segments[seg::CS].selector, 0x1b);
    }

    #[test]
    fn sysret_faults_in_the_kernel() {
        let mut core = system();
        assert_eq!(syscall(&mut core, &insn()), Ok(()));
        core.regs[gpr::RCX] = 1 << 47;
        let mut insn = insn();
        insn.flags = WIDE;
        assert!(sysret(&mut core, &insn).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
        assert_eq!(core.cpl, 0);
        core.msr.efer &= !SCE;
        assert!(sysret(&mut core, &insn).is_err());
        assert!(syscall(&mut core, &insn).is_err());
        assert_eq!(core.raised.vector, vector::UD);
    }

    #[test]
    fn sysenter_goes_in_and_sysexit_back() {
        let mut core = system();
        core.system_flags |= flag::IF;
        assert_eq!(sysenter(&mut core, &insn()), Ok(()));
        assert_eq!((core.rip(), core.regs[gpr::RSP], core.cpl), (0x4567, 0x1f00, 0));
        assert!(core.bits64() && core.system_flags & flag::IF == 0);
        (core.regs[gpr::RCX], core.regs[gpr::RDX]) = (0x1_0000_0900, 0x1_0000_3333);
        assert_eq!(sysexit(&mut core, &insn()), Ok(()));
        assert_eq!((core.rip(), core.regs[gpr::RSP], core.cpl), (0x3333, 0x900, 3));
        assert_eq!(
            (core.code_size, core.segments[seg::CS].selector),
            (CodeSize::Bits32, 0x1b)
        );
        assert!(sysexit(&mut core, &insn()).is_err());
        core.msr.sysenter[0] = 3;
        assert!(sysenter(&mut core, &insn()).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
    }
}
