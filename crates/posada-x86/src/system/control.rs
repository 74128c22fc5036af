//! Control registers, mode switches, TLB and flag instructions.

use crate::core::{Core, flag};
use crate::fault::{Exec, vector};
use crate::insn::Insn;

const PE: u64 = 1;
const WP: u64 = 1 << 16;
const PG: u64 = 1 << 31;
const CR0: u64 = 0xe005_003f;
/// VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE SMEP SMAP.
const CR4: u64 = 0x35_0fff;
const PAE: u64 = 1 << 5;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;

impl Core {
    /// #GP(0) outside privilege level 0.
    pub fn require_cpl0(&mut self) -> Exec {
        if self.cpl == 0 {
            Ok(())
        } else {
            self.general_protection()
        }
    }

    /// Sets CR0 with the checks and effects of MOV to CR0.
    ///
    /// # Errors
    /// #GP(0) for combinations that the processor refuses.
    pub fn write_cr0(&mut self, value: u64) -> Exec {
        let (old, mut efer) = (self.cr[0], self.msr.efer);
        let value = value & CR0 | 1 << 4;
        let (paging, cache, through) = (value & PG != 0, value & 1 << 30 == 0, value & 1 << 29 != 0);
        if paging && value & PE == 0 || cache && through {
            return self.general_protection();
        }
        if paging && old & PG == 0 && efer & LME != 0 {
            if self.cr[4] & PAE == 0 || self.segments[crate::core::seg::CS].access & 1 << 13 != 0 {
                return self.general_protection();
            }
            efer |= LMA;
        } else if !paging {
            if self.code_size == crate::core::CodeSize::Bits64 {
                return self.general_protection();
            }
            efer &= !LMA;
        }
        self.cr[0] = value;
        self.msr.efer = efer;
        if (old ^ value) & (PG | PE | WP) != 0 {
            self.mmu.flush();
        }
        self.update_mode();
        Ok(())
    }

    /// Sets CR4 with the checks and effects of MOV to CR4.
    ///
    /// # Errors
    /// #GP(0) for reserved bits, or when PAE is cleared in long mode.
    pub fn write_cr4(&mut self, value: u64) -> Exec {
        if value & !CR4 != 0 || self.long_mode() && value & PAE == 0 {
            return self.general_protection();
        }
        self.cr[4] = value;
        self.mmu.flush();
        self.update_mode();
        Ok(())
    }
}

/// MOV from a control register: `reg` is its number, `rm` the general register.
pub fn mov_from_cr(core: &mut Core, insn: &Insn) -> Exec {
    core.require_cpl0()?;
    match insn.reg {
        number @ (0 | 2 | 3 | 4) => store_word(core, insn.rm, core.cr[usize::from(number)]),
        _ => return core.raise(vector::UD),
    }
    Ok(())
}

/// MOV to CR0, CR2, CR3 or CR4.
pub fn mov_to_cr(core: &mut Core, insn: &Insn) -> Exec {
    core.require_cpl0()?;
    let value = load_word(core, insn.rm);
    match insn.reg {
        0 if value >> 32 != 0 => core.general_protection(),
        0 => core.write_cr0(value),
        2 => {
            core.cr[2] = value;
            Ok(())
        }
        3 if core.long_mode() && value >> crate::walk::PHYSICAL_BITS != 0 => core.general_protection(),
        3 => {
            core.cr[3] = value;
            core.mmu.flush_non_global();
            core.leave_block();
            Ok(())
        }
        4 => core.write_cr4(value),
        _ => core.raise(vector::UD),
    }
}

fn load_word(core: &Core, register: u8) -> u64 {
    if core.code_size == crate::core::CodeSize::Bits64 {
        core.read_reg(register)
    } else {
        core.read_reg::<u32>(register).into()
    }
}

fn store_word(core: &mut Core, register: u8, value: u64) {
    if core.code_size == crate::core::CodeSize::Bits64 {
        core.write_reg(register, value);
    } else {
        core.write_reg(register, value as u32);
    }
}

/// CLTS.
pub fn clts(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    core.cr[0] &= !(1 << 3);
    core.update_mode();
    Ok(())
}

/// INVD and WBINVD: caches are the host's business.
pub fn wbinvd(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()
}

/// HLT.
pub fn hlt(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    core.halted = true;
    core.leave_block();
    Ok(())
}

/// Sets or clears EFLAGS.AC.
fn set_ac(core: &mut Core, on: bool) -> Exec {
    if core.cpl != 0 {
        return core.raise(vector::UD);
    }
    core.system_flags = core.system_flags & !flag::AC | if on { flag::AC } else { 0 };
    core.update_mode();
    Ok(())
}

/// STAC.
pub fn stac(core: &mut Core, _: &Insn) -> Exec {
    set_ac(core, true)
}

/// CLAC.
pub fn clac(core: &mut Core, _: &Insn) -> Exec {
    set_ac(core, false)
}

/// SWAPGS.
pub fn swapgs(core: &mut Core, _: &Insn) -> Exec {
    if core.code_size != crate::core::CodeSize::Bits64 {
        return core.raise(vector::UD);
    }
    core.require_cpl0()?;
    std::mem::swap(
        &mut core.segments[crate::core::seg::GS].base,
        &mut core.msr.kernel_gs_base,
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::tests::core;

    #[test]
    fn control_registers_refuse_what_the_processor_refuses() {
        let mut core = core();
        assert!(core.write_cr0(PG).is_err(), "paging without protection");
        assert!(core.write_cr4(0).is_err(), "long mode needs PAE");
        assert!(core.write_cr4(PAE | 1 << 30).is_err(), "a reserved bit");
        assert_eq!(core.cr[0], 0x8001_0033);
        assert_eq!(core.write_cr0(PG | PE | 1 << 5), Ok(()));
        assert_eq!(core.write_cr4(PAE | 1 << 7), Ok(()));
    }
}
