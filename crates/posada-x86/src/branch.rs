//! Near control transfers. Far ones are in [`crate::system`].

use crate::core::{Core, gpr};
use crate::fault::Exec;
use crate::flags::holds;
use crate::insn::{Insn, OPERAND16};
use crate::interpret::BRANCHED;
use crate::operand::Source;

impl Core {
    /// Goes to `target` in 64-bit mode.
    #[inline(always)]
    fn jump64(&mut self, target: u64) -> Exec {
        if (target as i64) << 16 >> 16 != target as i64 {
            return self.general_protection();
        }
        self.set_rip(target);
        Ok(())
    }

    /// Where a near branch leads, with the checks of the current mode: canonical, or inside CS.
    ///
    /// # Errors
    /// #GP(0).
    fn near_target(&mut self, insn: &Insn, target: u64) -> Exec<u64> {
        if self.bits64() {
            if (target as i64) << 16 >> 16 != target as i64 {
                return self.general_protection();
            }
            return Ok(target);
        }
        let target = target
            & if insn.flags & OPERAND16 != 0 {
                0xffff
            } else {
                0xffff_ffff
            };
        if target > u64::from(self.segments[crate::core::seg::CS].limit) {
            return self.general_protection();
        }
        Ok(target)
    }
}

fn relative(core: &Core, insn: &Insn) -> u64 {
    core.rip().wrapping_add(insn.imm)
}

/// Bytes of a near return address.
fn near_bytes(core: &Core, insn: &Insn) -> u64 {
    match (core.bits64(), insn.flags & OPERAND16 != 0) {
        (true, _) => 8,
        (false, true) => 2,
        (false, false) => 4,
    }
}

/// Jcc in 64-bit mode: taken, it leaves its block.
pub fn jcc64<const CC: u8>(core: &mut Core, insn: &Insn) -> Exec {
    if holds::<CC>(core.arithmetic) {
        core.jump64(relative(core, insn))?;
        core.stop_at = BRANCHED;
    }
    Ok(())
}

/// Jcc elsewhere.
pub fn jcc<const CC: u8>(core: &mut Core, insn: &Insn) -> Exec {
    if holds::<CC>(core.arithmetic) {
        let target = core.near_target(insn, relative(core, insn))?;
        core.set_rip(target);
        core.stop_at = BRANCHED;
    }
    Ok(())
}

/// JMP rel.
pub fn jmp(core: &mut Core, insn: &Insn) -> Exec {
    let target = core.near_target(insn, relative(core, insn))?;
    core.set_rip(target);
    Ok(())
}

/// JMP r/m in 64-bit mode.
pub fn jmp_indirect64<S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let target = S::read::<u64>(core, insn)?;
    core.jump64(target)
}

/// JMP r/m elsewhere.
pub fn jmp_indirect<S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let target = legacy_operand::<S>(core, insn)?;
    let target = core.near_target(insn, target)?;
    core.set_rip(target);
    Ok(())
}

fn legacy_operand<S: Source>(core: &mut Core, insn: &Insn) -> Exec<u64> {
    Ok(if insn.flags & OPERAND16 != 0 {
        S::read::<u16>(core, insn)?.into()
    } else {
        S::read::<u32>(core, insn)?.into()
    })
}

/// CALL rel.
pub fn call(core: &mut Core, insn: &Insn) -> Exec {
    let target = core.near_target(insn, relative(core, insn))?;
    core.push_size(near_bytes(core, insn), core.rip())?;
    core.set_rip(target);
    Ok(())
}

/// CALL r/m in 64-bit mode.
pub fn call_indirect64<S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let target = S::read::<u64>(core, insn)?;
    let target = core.near_target(insn, target)?;
    core.push_size(8, core.rip())?;
    core.set_rip(target);
    Ok(())
}

/// CALL r/m elsewhere.
pub fn call_indirect<S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let target = legacy_operand::<S>(core, insn)?;
    let target = core.near_target(insn, target)?;
    core.push_size(near_bytes(core, insn), core.rip())?;
    core.set_rip(target);
    Ok(())
}

/// RET and RET imm16.
pub fn ret(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = near_bytes(core, insn);
    let target = core.peek_size(bytes, 0)?;
    let target = core.near_target(insn, target)?;
    core.regs[gpr::RSP] = core.stack_moved((bytes + insn.imm) as i64);
    core.set_rip(target);
    Ok(())
}

/// LOOPNE, LOOPE, LOOP: `reg` 0, 1, 2.
pub fn loop_(core: &mut Core, insn: &Insn) -> Exec {
    let mask = insn.address_mask();
    let rcx = core.regs[gpr::RCX];
    let left = rcx.wrapping_sub(1) & mask;
    let zero = core.arithmetic & 1 << 14 != 0;
    let go = match insn.reg {
        0 => !zero,
        1 => zero,
        _ => true,
    };
    if go && left != 0 {
        let target = core.near_target(insn, relative(core, insn))?;
        core.set_rip(target);
    }
    core.regs[gpr::RCX] = if mask == 0xffff { rcx & !0xffff | left } else { left };
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ.
pub fn jcxz(core: &mut Core, insn: &Insn) -> Exec {
    if core.regs[gpr::RCX] & insn.address_mask() == 0 {
        let target = core.near_target(insn, relative(core, insn))?;
        core.set_rip(target);
    }
    Ok(())
}
