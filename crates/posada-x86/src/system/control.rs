//! Control registers, mode switches, TLB and flag instructions.

use super::descriptor::canonical;
use super::segments::WordPlace;
use crate::core::{CodeSize, Core, flag, seg};
use crate::fault::{Exec, vector};
use crate::insn::Insn;
use crate::operand::Place;
use crate::walk::PHYSICAL_BITS;
use posada_engine::cpu::Features;

const PE: u64 = 1;
const TS: u64 = 1 << 3;
const WP: u64 = 1 << 16;
const NW: u64 = 1 << 29;
const CD: u64 = 1 << 30;
const PG: u64 = 1 << 31;
/// The bits that exist.
pub(crate) const CR0: u64 = 0xe005_003f;
/// TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT.
const CR4: u64 = 0x7fc;
const PAE: u64 = 1 << 5;
const PCIDE: u64 = 1 << 17;
const OSXSAVE: u64 = 1 << 18;
const UMIP: u64 = 1 << 11;
const FSGSBASE: u64 = 1 << 16;
const SMEP: u64 = 1 << 20;
const SMAP: u64 = 1 << 21;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
/// With CR4.PCIDE, in a value for CR3: keep what is cached of the new address space.
const NO_FLUSH: u64 = 1 << 63;
/// The address space's number in CR3.
const PCID: u64 = 0xfff;

/// The bits of CR4 that exist on a processor with these features.
pub(crate) fn cr4_bits(features: &Features) -> u64 {
    [
        (features.umip, UMIP),
        (features.fsgsbase, FSGSBASE),
        (features.pcid, PCIDE),
        (features.xsave, OSXSAVE),
        (features.smep, SMEP),
        (features.smap, SMAP),
    ]
    .into_iter()
    .fold(CR4, |bits, (there, bit)| if there { bits | bit } else { bits })
}

impl Core {
    /// #GP(0) outside privilege level 0.
    pub fn require_cpl0(&mut self) -> Exec {
        if self.cpl == 0 {
            Ok(())
        } else {
            self.general_protection()
        }
    }

    /// The end of a serialising instruction: code that other processors have changed is seen after it.
    pub(crate) fn serializing(&mut self) {
        self.serialize();
        self.leave_block();
    }

    /// Sets CR0 with the checks and effects of MOV to CR0.
    ///
    /// # Errors
    /// #GP(0) for combinations that the processor refuses.
    pub fn write_cr0(&mut self, value: u64) -> Exec {
        let (old, mut efer) = (self.cr[0], self.msr.efer);
        let value = value & CR0 | 1 << 4;
        let paging = value & PG != 0;
        if paging && value & PE == 0 || value & (NW | CD) == NW {
            return self.general_protection();
        }
        if paging && old & PG == 0 && efer & LME != 0 {
            if self.cr[4] & PAE == 0 || self.segments[seg::CS].access & 1 << 13 != 0 {
                return self.general_protection();
            }
            efer |= LMA;
        } else if !paging {
            if self.code_size == CodeSize::Bits64 || self.cr[4] & PCIDE != 0 {
                return self.general_protection();
            }
            efer &= !LMA;
        }
        if (old ^ value) & (PG | NW | CD) != 0 {
            self.load_pdptes(value, self.cr[3], self.cr[4])?;
        }
        self.cr[0] = value;
        self.msr.efer = efer;
        if (old ^ value) & (PG | PE | WP) != 0 {
            self.mmu.flush();
        }
        self.update_mode();
        Ok(())
    }

    /// Sets CR3 with the checks and effects of MOV to CR3.
    ///
    /// # Errors
    /// #GP(0) for reserved bits.
    pub fn write_cr3(&mut self, value: u64) -> Exec {
        // One address space is cached, so the old one's pages go whether the new one's may stay or not.
        let value = if self.cr[4] & PCIDE != 0 {
            value & !NO_FLUSH
        } else {
            value
        };
        if self.long_mode() && value >> PHYSICAL_BITS != 0 {
            return self.general_protection();
        }
        self.load_pdptes(self.cr[0], value, self.cr[4])?;
        self.cr[3] = value;
        self.mmu.flush_non_global();
        self.leave_block();
        Ok(())
    }

    /// Sets CR4 with the checks and effects of MOV to CR4.
    ///
    /// # Errors
    /// #GP(0) for reserved bits, when PAE is cleared in long mode, or when PCIDE is set outside it or with a PCID in CR3.
    pub fn write_cr4(&mut self, value: u64) -> Exec {
        let exist = cr4_bits(&self.shared.vm().model().features);
        let starts_pcids = value & !self.cr[4] & PCIDE != 0;
        if value & !exist != 0
            || self.long_mode() && value & PAE == 0
            || starts_pcids && (!self.long_mode() || self.cr[3] & PCID != 0)
        {
            return self.general_protection();
        }
        self.load_pdptes(self.cr[0], self.cr[3], value)?;
        self.cr[4] = value;
        self.mmu.flush();
        self.update_mode();
        Ok(())
    }
}

/// MOV from a control register: `reg` is its number, `rm` the general register.
pub fn mov_from_cr(core: &mut Core, insn: &Insn) -> Exec {
    let value = match insn.reg {
        number @ (0 | 2 | 3 | 4) => core.cr[usize::from(number)],
        8 => core.cr8(),
        _ => return core.raise(vector::UD),
    };
    core.require_cpl0()?;
    store_word(core, insn.rm, value);
    Ok(())
}

/// MOV to CR0, CR2, CR3, CR4 or CR8: as [`mov_from_cr`].
pub fn mov_to_cr(core: &mut Core, insn: &Insn) -> Exec {
    if !matches!(insn.reg, 0 | 2..=4 | 8) {
        return core.raise(vector::UD);
    }
    core.require_cpl0()?;
    let value = load_word(core, insn.rm);
    match insn.reg {
        0 if value >> 32 != 0 => return core.general_protection(),
        0 => core.write_cr0(value)?,
        2 => core.cr[2] = value,
        3 => core.write_cr3(value)?,
        4 => core.write_cr4(value)?,
        _ if value > 15 => return core.general_protection(),
        _ => {
            core.set_cr8(value);
            return Ok(());
        }
    }
    core.serializing();
    Ok(())
}

fn load_word(core: &Core, register: u8) -> u64 {
    if core.bits64() {
        core.read_reg(register)
    } else {
        core.read_reg::<u32>(register).into()
    }
}

fn store_word(core: &mut Core, register: u8, value: u64) {
    if core.bits64() {
        core.write_reg(register, value);
    } else {
        core.write_reg(register, value as u32);
    }
}

/// SMSW.
pub fn smsw<D: WordPlace>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_umip()?;
    D::put_word(core, insn, core.cr[0])
}

/// LMSW: MP, EM and TS as given; PE can only be set.
pub fn lmsw<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_cpl0()?;
    let word = u64::from(D::read::<u16>(core, insn)?);
    core.write_cr0(core.cr[0] & !0xe | word & 0xf)?;
    core.serializing();
    Ok(())
}

/// CLTS.
pub fn clts(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    core.cr[0] &= !TS;
    core.update_mode();
    Ok(())
}

/// INVD and WBINVD: caches are the host's business.
pub fn wbinvd(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    core.serializing();
    Ok(())
}

/// INVLPG: neither limit nor rights of the address matter.
pub fn invlpg(core: &mut Core, insn: &Insn) -> Exec {
    core.require_cpl0()?;
    let segment = usize::from(insn.segment);
    let flat = core.bits64() && segment < seg::FS;
    let base = if flat { 0 } else { core.segments[segment].base };
    let linear = base.wrapping_add(core.offset_of(insn));
    core.mmu
        .flush_page(if core.bits64() { linear } else { linear & 0xffff_ffff });
    core.serializing();
    Ok(())
}

/// INVPCID: `reg` has the type, memory the PCID and the linear address.
pub fn invpcid(core: &mut Core, insn: &Insn) -> Exec {
    core.require_cpl0()?;
    let kind = load_word(core, insn.reg);
    let at = core.linear(insn, 16, false)?;
    let mut descriptor = [0; 16];
    core.load_bytes(at, &mut descriptor)?;
    let descriptor = u128::from_le_bytes(descriptor);
    let (pcid, linear) = (descriptor as u64, (descriptor >> 64) as u64);
    let one_space = kind < 2;
    if kind > 3
        || pcid & !PCID != 0
        || one_space && pcid != 0 && core.cr[4] & PCIDE == 0
        || kind == 0 && !canonical(linear)
    {
        return core.general_protection();
    }
    // Nothing is cached of address spaces other than the current one.
    let current = pcid == core.cr[3] & PCID || core.cr[4] & PCIDE == 0;
    match kind {
        0 if current => core.mmu.flush_page(linear),
        1 if current => core.mmu.flush_non_global(),
        2 => core.mmu.flush(),
        3 => core.mmu.flush_non_global(),
        _ => {}
    }
    core.serializing();
    Ok(())
}

/// HLT.
pub fn hlt(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    core.halted = true;
    core.leave_block();
    Ok(())
}

/// #GP(0) unless the current level may change RFLAGS.IF.
fn require_iopl(core: &mut Core) -> Exec {
    if core.protected() && u64::from(core.cpl) > core.system_flags >> 12 & 3 {
        return core.general_protection();
    }
    Ok(())
}

/// CLI.
pub fn cli(core: &mut Core, _: &Insn) -> Exec {
    require_iopl(core)?;
    core.system_flags &= !flag::IF;
    Ok(())
}

/// STI.
pub fn sti(core: &mut Core, _: &Insn) -> Exec {
    require_iopl(core)?;
    if core.system_flags & flag::IF == 0 {
        core.system_flags |= flag::IF;
        core.interrupt_shadow = true;
        core.leave_block();
        core.interrupts_may_be_due();
    }
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
    if !core.bits64() {
        return core.raise(vector::UD);
    }
    core.require_cpl0()?;
    std::mem::swap(&mut core.segments[seg::GS].base, &mut core.msr.kernel_gs_base);
    Ok(())
}

pub use super::debug::{mov_from_dr, mov_to_dr};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr;
    use crate::insn::ZERO;
    use crate::mmu::tests::core;
    use crate::operand::Rm;
    use crate::system::tests::{insn, user};

    #[test]
    fn control_registers_refuse_what_the_processor_refuses() {
        let mut core = core();
        assert!(core.write_cr0(PG).is_err(), "paging without protection");
        assert!(core.write_cr4(0).is_err(), "long mode needs PAE");
        assert!(core.write_cr4(PAE | 1 << 30).is_err(), "a reserved bit");
        assert!(core.write_cr4(PAE | 1).is_err(), "no virtual-8086 extensions");
        assert_eq!(core.cr[0], 0x8001_0033);
        assert_eq!(core.write_cr0(PG | PE | 1 << 5), Ok(()));
        assert_eq!(core.write_cr4(PAE | 1 << 7), Ok(()));
        assert!(core.write_cr0(PG | PE | NW).is_err(), "NW without CD");
        assert!(core.write_cr0(PE).is_err(), "no way out of paging in 64-bit code");
    }

    #[test]
    fn pcids_start_from_zero_and_need_long_mode() {
        let mut core = core();
        core.cr[3] |= 5;
        assert!(core.write_cr4(PAE | PCIDE).is_err());
        core.cr[3] &= !5;
        assert_eq!(core.write_cr4(PAE | PCIDE), Ok(()));
        assert_eq!(core.write_cr3(0x1005 | NO_FLUSH), Ok(()));
        assert_eq!(core.cr[3], 0x1005);
        assert_eq!(core.load::<u8>(0), Ok(0));
        assert_eq!(core.write_cr4(PAE), Ok(()));
        assert!(core.write_cr3(0x1000 | NO_FLUSH).is_err(), "reserved without PCIDE");
        assert!(core.write_cr3(1 << PHYSICAL_BITS).is_err());
    }

    #[test]
    fn invpcid_checks_its_descriptor() {
        let mut core = core();
        let mut invalidate = |kind: u64, pcid: u64, linear: u64| {
            core.store(0x100, pcid).unwrap();
            core.store(0x108, linear).unwrap();
            core.regs[gpr::RAX] = kind;
            let mut insn = insn();
            (insn.base, insn.disp) = (ZERO, 0x100);
            invpcid(&mut core, &insn)
        };
        for kind in 0..4 {
            assert_eq!(invalidate(kind, 0, 0x5000), Ok(()));
            assert!(invalidate(kind, 0x1000, 0).is_err());
        }
        assert!(invalidate(4, 0, 0).is_err());
        assert!(invalidate(0, 0, 1 << 47).is_err());
        assert!(invalidate(1, 3, 0).is_err(), "a PCID without CR4.PCIDE");
        assert_eq!(invalidate(3, 3, 1 << 47), Ok(()));
    }

    #[test]
    fn users_cannot_touch_control_registers_or_interrupts() {
        let mut core = core();
        user(&mut core);
        let instructions = [mov_from_cr, mov_to_cr, clts, wbinvd, invlpg, hlt, cli, sti, swapgs];
        for run in instructions {
            assert!(run(&mut core, &insn()).is_err());
            assert_eq!((core.raised.vector, core.raised.error), (vector::GP, Some(0)));
        }
        assert!(stac(&mut core, &insn()).is_err());
        assert_eq!(core.raised.vector, vector::UD);
        core.system_flags |= flag::IOPL;
        assert_eq!(sti(&mut core, &insn()), Ok(()));
        assert!(core.interrupt_shadow);
    }

    #[test]
    fn there_is_no_cr1() {
        let mut core = core();
        let mut insn = insn();
        for number in [1, 5, 6, 7, 9, 15] {
            insn.reg = number;
            assert!(mov_to_cr(&mut core, &insn).is_err());
            assert_eq!(core.raised.vector, vector::UD);
            assert!(mov_from_cr(&mut core, &insn).is_err());
        }
    }

    #[test]
    fn smsw_is_the_kernels_with_umip() {
        let mut core = core();
        user(&mut core);
        assert_eq!(smsw::<Rm>(&mut core, &insn()), Ok(()));
        assert_eq!(core.regs[gpr::RAX], 0x8001_0033);
        core.cr[4] |= 1 << 11;
        assert!(smsw::<Rm>(&mut core, &insn()).is_err());
    }

    #[test]
    fn lmsw_cannot_leave_protected_mode() {
        let mut core = core();
        core.regs[gpr::RAX] = 8;
        assert_eq!(lmsw::<Rm>(&mut core, &insn()), Ok(()));
        assert_eq!(core.cr[0], 0x8001_0039);
    }
}
