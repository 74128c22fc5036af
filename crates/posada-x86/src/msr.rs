//! RDMSR and WRMSR (Intel SDM 4). A register that is not here does not exist: #GP(0), by which software finds out.

use crate::core::{Core, Msrs, gpr, seg};
use crate::cpuid::features;
use crate::fault::Exec;
use crate::insn::Insn;
use crate::system::descriptor::canonical;
use crate::system::steal;
use crate::walk::PHYSICAL_BITS;

pub(crate) mod portable;

const TSC: u32 = 0x10;
const PLATFORM_ID: u32 = 0x17;
const APIC_BASE: u32 = 0x1b;
const TSC_ADJUST: u32 = 0x3b;
const SPEC_CTRL: u32 = 0x48;
const PRED_CMD: u32 = 0x49;
const BIOS_SIGN_ID: u32 = 0x8b;
const PLATFORM_INFO: u32 = 0xce;
const MTRRCAP: u32 = 0xfe;
const ARCH_CAPABILITIES: u32 = 0x10a;
const SYSENTER_CS: u32 = 0x174;
const SYSENTER_EIP: u32 = 0x176;
const MCG_CAP: u32 = 0x179;
const MCG_STATUS: u32 = 0x17a;
const MISC_ENABLE: u32 = 0x1a0;
const DEBUGCTL: u32 = 0x1d9;
const MTRR_VARIABLE: u32 = 0x200;
const MTRR_VARIABLE_LAST: u32 = 0x20f;
const PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;
const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: u32 = 0x800;
const X2APIC_LAST: u32 = 0x8ff;
const XSS: u32 = 0xda0;
const WALL_CLOCK: u32 = 0x4b56_4d00;
const SYSTEM_TIME: u32 = 0x4b56_4d01;
const STEAL_TIME: u32 = 0x4b56_4d03;
const PV_EOI: u32 = 0x4b56_4d04;
const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const FMASK: u32 = 0xc000_0084;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const TSC_AUX: u32 = 0xc000_0103;

/// SCE, LME, NXE. LMA is read-only.
const EFER_WRITABLE: u64 = 0x901;
const LME: u64 = 1 << 8;
const LMA: u64 = 1 << 10;
const NXE: u64 = 1 << 11;
/// IBRS, which nothing has to act on.
const SPEC_CTRL_BITS: u64 = 1;
/// IBPB, likewise.
const PRED_CMD_BITS: u64 = 1;
/// Eight variable ranges, the fixed ones, write combining.
const MTRRCAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
/// Fast strings; no branch trace or event sampling.
const MISC_ENABLE_VALUE: u64 = 1 | 1 << 11 | 1 << 12;
/// The revision that KVM gives: some microcode is loaded.
const MICROCODE: u64 = 1 << 32;
/// UC, WC, WT, WP, WB.
const MEMORY_TYPES: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6;
/// UC-, in the PAT only.
const UC_MINUS: u64 = 1 << 7;

/// IA32_ARCH_CAPABILITIES: what the processor is not vulnerable to, so that kernels leave out their countermeasures.
///
/// Those are made against the processor that speculates on behalf of the code it runs: the host's processor runs this
/// program and never the guest's branches and loads, so that no countermeasure inside a guest could help.
/// A guest is kept from others by its process, whose kernel guards the host.
pub(crate) const ARCH_CAPABILITIES_VALUE: u64 = {
    const RDCL_NO: u64 = 1 << 0;
    const IBRS_ALL: u64 = 1 << 1;
    const SKIP_L1DFL_VMENTRY: u64 = 1 << 3;
    const SSB_NO: u64 = 1 << 4;
    const MDS_NO: u64 = 1 << 5;
    const PSCHANGE_MC_NO: u64 = 1 << 6;
    const TAA_NO: u64 = 1 << 8;
    const SBDR_SSDP_NO: u64 = 1 << 13;
    const FBSDP_NO: u64 = 1 << 14;
    const PSDP_NO: u64 = 1 << 15;
    const BHI_NO: u64 = 1 << 20;
    const PBRSB_NO: u64 = 1 << 24;
    const GDS_NO: u64 = 1 << 26;
    const RFDS_NO: u64 = 1 << 27;
    const ITS_NO: u64 = 1 << 62;
    RDCL_NO
        | IBRS_ALL
        | SKIP_L1DFL_VMENTRY
        | SSB_NO
        | MDS_NO
        | PSCHANGE_MC_NO
        | TAA_NO
        | SBDR_SSDP_NO
        | FBSDP_NO
        | PSDP_NO
        | BHI_NO
        | PBRSB_NO
        | GDS_NO
        | RFDS_NO
        | ITS_NO
};

impl Default for Msrs {
    /// After RESET, but with all memory write-back in the MTRRs: there is no firmware that would say so later.
    fn default() -> Self {
        const ENABLED: u64 = 1 << 11;
        const WRITE_BACK: u64 = 6;
        Self {
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            fmask: 0,
            kernel_gs_base: 0,
            sysenter: [0; 3],
            tsc_aux: 0,
            pat: 0x0007_0406_0007_0406,
            mtrr_def_type: ENABLED | WRITE_BACK,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            misc_enable: MISC_ENABLE_VALUE,
            xss: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            spec_ctrl: 0,
            wall_clock: 0,
            system_time: 0,
            steal_time: 0,
            pv_eoi: 0,
        }
    }
}

/// Which of the fixed-range MTRRs a number is.
fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        0x250 => Some(0),
        0x258 | 0x259 => Some(msr as usize - 0x257),
        0x268..=0x26f => Some(msr as usize - 0x268 + 3),
        _ => None,
    }
}

/// True if each byte of `value` is one of `types`.
fn types_valid(value: u64, types: u64) -> bool {
    value
        .to_le_bytes()
        .iter()
        .all(|&kind| kind < 8 && types >> kind & 1 != 0)
}

/// True for a value that a variable-range MTRR may have: base and mask take turns.
fn variable_valid(msr: u32, value: u64) -> bool {
    let reserved = !((1 << PHYSICAL_BITS) - 0x1000);
    if msr & 1 == 0 {
        value & reserved & !0xff == 0 && types_valid(value & 0xff, MEMORY_TYPES)
    } else {
        value & reserved & !(1 << 11) == 0
    }
}

fn def_type_valid(value: u64) -> bool {
    value & !0xcff == 0 && types_valid(value & 0xff, MEMORY_TYPES)
}

impl Msrs {
    /// Where a register is kept that gives back what was written to it.
    fn place(&mut self, msr: u32) -> Option<&mut u64> {
        Some(match msr {
            TSC_ADJUST => &mut self.tsc_adjust,
            SPEC_CTRL => &mut self.spec_ctrl,
            SYSENTER_CS..=SYSENTER_EIP => &mut self.sysenter[(msr - SYSENTER_CS) as usize],
            MISC_ENABLE => &mut self.misc_enable,
            MTRR_VARIABLE..=MTRR_VARIABLE_LAST => &mut self.mtrr_variable[(msr - MTRR_VARIABLE) as usize],
            PAT => &mut self.pat,
            MTRR_DEF_TYPE => &mut self.mtrr_def_type,
            XSS if features().xsaves => &mut self.xss,
            WALL_CLOCK => &mut self.wall_clock,
            SYSTEM_TIME => &mut self.system_time,
            STEAL_TIME => &mut self.steal_time,
            PV_EOI => &mut self.pv_eoi,
            STAR => &mut self.star,
            LSTAR => &mut self.lstar,
            CSTAR => &mut self.cstar,
            FMASK => &mut self.fmask,
            KERNEL_GS_BASE => &mut self.kernel_gs_base,
            TSC_AUX => &mut self.tsc_aux,
            _ => return fixed_mtrr(msr).map(|at| &mut self.mtrr_fixed[at]),
        })
    }
}

/// True for a value that the register may have.
fn valid(msr: u32, value: u64) -> bool {
    match msr {
        SYSENTER_CS..=SYSENTER_EIP | LSTAR | CSTAR | FS_BASE | GS_BASE | KERNEL_GS_BASE => canonical(value),
        FMASK | TSC_AUX => value >> 32 == 0,
        SPEC_CTRL => value & !SPEC_CTRL_BITS == 0,
        PRED_CMD => value & !PRED_CMD_BITS == 0,
        PAT => types_valid(value, MEMORY_TYPES | UC_MINUS),
        MTRR_DEF_TYPE => def_type_valid(value),
        MTRR_VARIABLE..=MTRR_VARIABLE_LAST => variable_valid(msr, value),
        MISC_ENABLE => value & !1 == MISC_ENABLE_VALUE & !1,
        STEAL_TIME => value & steal::RESERVED == 0,
        PV_EOI => value & 2 == 0,
        // What is always zero may be cleared.
        XSS | MCG_STATUS | DEBUGCTL => value == 0,
        _ => fixed_mtrr(msr).is_none() || types_valid(value, MEMORY_TYPES),
    }
}

impl Core {
    fn read_msr(&mut self, msr: u32) -> Exec<u64> {
        Ok(match msr {
            TSC => self.guest_tsc(),
            APIC_BASE | TSC_DEADLINE | X2APIC..=X2APIC_LAST => return self.lapic_read_msr(msr),
            BIOS_SIGN_ID => MICROCODE,
            ARCH_CAPABILITIES => self.shared.vm().model().arch_capabilities,
            // No machine-check banks, no branch records, no turbo ratios.
            PLATFORM_ID | PLATFORM_INFO | MCG_CAP | MCG_STATUS | DEBUGCTL => 0,
            MTRRCAP => MTRRCAP_VALUE,
            EFER => self.msr.efer,
            FS_BASE => self.segments[seg::FS].base,
            GS_BASE => self.segments[seg::GS].base,
            _ => match self.msr.place(msr) {
                Some(place) => *place,
                None => return self.general_protection(),
            },
        })
    }

    fn write_msr(&mut self, msr: u32, value: u64) -> Exec {
        if !valid(msr, value) {
            return self.general_protection();
        }
        match msr {
            TSC => {
                self.set_guest_tsc(value);
                self.update_pvclock();
            }
            TSC_ADJUST => {
                self.set_tsc_adjust(value);
                self.update_pvclock();
            }
            APIC_BASE | TSC_DEADLINE | X2APIC..=X2APIC_LAST => return self.lapic_write_msr(msr, value),
            // Software clears the revision before it asks for it.
            PRED_CMD | BIOS_SIGN_ID | MCG_STATUS | DEBUGCTL => {}
            WALL_CLOCK => self.write_wall_clock(value),
            SYSTEM_TIME => self.write_system_time(value),
            STEAL_TIME => self.write_steal_time(value),
            EFER => return self.write_efer(value),
            FS_BASE => self.segments[seg::FS].base = value,
            GS_BASE => self.segments[seg::GS].base = value,
            // PV_EOI among them: we may set the flag that spares the guest the write to the EOI register, and never do, as that
            // write is cheap here.
            _ => match self.msr.place(msr) {
                Some(place) => *place = value,
                None => return self.general_protection(),
            },
        }
        Ok(())
    }

    fn write_efer(&mut self, value: u64) -> Exec {
        let old = self.msr.efer;
        let paging = self.cr[0] >> 31 & 1 != 0;
        if value & !(EFER_WRITABLE | LMA) != 0 || paging && (old ^ value) & LME != 0 {
            return self.general_protection();
        }
        self.msr.efer = value & EFER_WRITABLE | old & LMA;
        if (old ^ value) & NXE != 0 {
            self.mmu.flush();
        }
        self.update_mode();
        Ok(())
    }
}

/// RDMSR.
pub fn rdmsr(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    let value = core.read_msr(core.regs[gpr::RCX] as u32)?;
    core.regs[gpr::RAX] = value & 0xffff_ffff;
    core.regs[gpr::RDX] = value >> 32;
    Ok(())
}

/// WRMSR.
pub fn wrmsr(core: &mut Core, _: &Insn) -> Exec {
    core.require_cpl0()?;
    let msr = core.regs[gpr::RCX] as u32;
    let value = core.regs[gpr::RAX] & 0xffff_ffff | core.regs[gpr::RDX] << 32;
    core.write_msr(msr, value)?;
    // Neither the APIC's registers nor its deadline serialise (Intel SDM 3A, 11.12.3 and 11.5.4.1).
    if !matches!(msr, TSC_DEADLINE | X2APIC..=X2APIC_LAST) {
        core.serializing();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::vector;
    use crate::mmu::tests::core;
    use crate::system::tests::{insn, user};

    fn read(core: &mut Core, msr: u32) -> Exec<u64> {
        core.regs[gpr::RCX] = msr.into();
        rdmsr(core, &insn()).map(|()| core.regs[gpr::RDX] << 32 | core.regs[gpr::RAX])
    }

    fn write(core: &mut Core, msr: u32, value: u64) -> Exec {
        core.regs[gpr::RCX] = msr.into();
        core.regs[gpr::RAX] = value & 0xffff_ffff;
        core.regs[gpr::RDX] = value >> 32;
        wrmsr(core, &insn())
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut core = core();
        let address = 0xffff_8000_1234_5678;
        for (msr, value) in [
            (STAR, 0x0023_0010_0000_0000),
            (LSTAR, address),
            (CSTAR, address),
            (FMASK, 0x4_7700),
            (FS_BASE, address),
            (GS_BASE, 0x7fff_ffff_f000),
            (KERNEL_GS_BASE, address),
            (TSC_AUX, 0x1002),
            (SYSENTER_CS, 0x10),
            (SYSENTER_CS + 1, address),
            (SYSENTER_EIP, address),
            (PAT, 0x0407_0506_0007_0106),
            (MTRR_DEF_TYPE, 0xc06),
            (0x250, 0x0606_0606_0606_0606),
            (0x258, 0x0606_0606_0606_0606),
            (0x259, 0),
            (0x268, 0x0505_0505_0505_0505),
            (0x26f, 0x0505_0505_0505_0505),
            (MTRR_VARIABLE, 0x8000_0006),
            (MTRR_VARIABLE_LAST, 0x3fff_8000_0800),
            (SPEC_CTRL, 1),
            (STEAL_TIME, 0x8_0041),
            (PV_EOI, 0x8_0005),
            (MISC_ENABLE, 0x1800),
        ] {
            assert_eq!(write(&mut core, msr, value), Ok(()), "{msr:#x}");
            assert_eq!(read(&mut core, msr), Ok(value), "{msr:#x}");
        }
    }

    #[test]
    fn wrong_values_and_unknown_registers_raise_gp() {
        let mut core = core();
        for (msr, value) in [
            (LSTAR, 1 << 47),
            (FS_BASE, 1 << 63),
            (KERNEL_GS_BASE, 0xffff_7fff_ffff_ffff),
            (SYSENTER_EIP, 1 << 47),
            (FMASK, 1 << 32),
            (TSC_AUX, 1 << 32),
            (PAT, 2),
            (PAT, 3 << 56),
            (PAT, 8),
            (MTRR_DEF_TYPE, 2),
            (MTRR_DEF_TYPE, 1 << 12),
            (0x250, 7),
            (MTRR_VARIABLE, 0x100),
            (MTRR_VARIABLE, 3),
            (MTRR_VARIABLE + 1, 1 << PHYSICAL_BITS),
            (XSS, 1),
            (SPEC_CTRL, 2),
            (PRED_CMD, 2),
            (STEAL_TIME, 0x8003),
            (STEAL_TIME, 0x8021),
            (PV_EOI, 0x8003),
            (MISC_ENABLE, 0),
            (EFER, 1 << 12),
            (EFER, 0),
            (DEBUGCTL, 1),
            (MTRRCAP, 0x508),
            (ARCH_CAPABILITIES, 0),
            (0x11, 0),
            (0x1234, 0),
        ] {
            assert!(write(&mut core, msr, value).is_err(), "{msr:#x} = {value:#x}");
            assert_eq!((core.raised.vector, core.raised.error), (vector::GP, Some(0)));
        }
        for msr in [PRED_CMD, 0x11, 0x12, 0x3a, 0x140, 0x210, 0x1234] {
            assert!(read(&mut core, msr).is_err(), "{msr:#x}");
        }
        user(&mut core);
        assert!(read(&mut core, TSC).is_err());
        assert!(write(&mut core, TSC, 0).is_err());
    }

    #[test]
    fn efer_keeps_lma() {
        let mut core = core();
        assert_eq!(write(&mut core, EFER, 0x101), Ok(()));
        assert_eq!(read(&mut core, EFER), Ok(0x501));
        // Without NXE, its bit in page tables is reserved.
        core.mmu.flush();
        let entry = 0x8007u64 | 1 << 63;
        core.physical_write(0x4000, &entry.to_le_bytes());
        assert!(core.load::<u8>(0).is_err());
        assert_eq!(core.raised.error, Some(9));
        assert_eq!(write(&mut core, EFER, 0xd01), Ok(()));
        assert_eq!(core.load::<u8>(0), Ok(0));
    }

    #[test]
    fn the_counter_and_its_adjustment_move_together() {
        let mut core = core();
        assert_eq!(write(&mut core, TSC, 1 << 50), Ok(()));
        let now = read(&mut core, TSC).unwrap();
        assert!((1 << 50..1 << 51).contains(&now), "{now}");
        let adjust = read(&mut core, TSC_ADJUST).unwrap();
        assert_eq!(write(&mut core, TSC_ADJUST, adjust.wrapping_add(1 << 52)), Ok(()));
        assert!(read(&mut core, TSC).unwrap() >= (1 << 52) + (1 << 50));
    }
}
