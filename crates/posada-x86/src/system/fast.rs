//! SYSCALL, SYSENTER and the way back (Intel SDM 3A, sections 5.8.7 and 5.8.8).

use super::descriptor::canonical;
use crate::core::{Core, flag, gpr, seg};
use crate::cpuid::features;
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
    let compatible = core.bits64() || core.long_mode() && features().amd;
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
