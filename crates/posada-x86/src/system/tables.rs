//! The registers that name descriptor tables and the task: GDTR, IDTR, LDTR, TR.

use super::descriptor::{Rights, canonical, code_of, is_null, null_segment};
use super::segments::WordPlace;
use crate::core::Core;
use crate::fault::{Exec, vector};
use crate::insn::{Insn, OPERAND16};
use crate::operand::Place;
use posada_engine::DescriptorTable;

const LDT: u8 = 2;
const TSS_16: u8 = 1;
/// A 32-bit or 64-bit TSS.
const TSS: u8 = 9;
const BUSY: u8 = 2;

impl Core {
    /// #GP(0) if CR4.UMIP keeps SGDT, SIDT, SLDT, STR and SMSW from user mode.
    pub(super) fn require_umip(&mut self) -> Exec {
        if self.cpl != 0 && self.cr[4] & 1 << 11 != 0 {
            return self.general_protection();
        }
        Ok(())
    }
}

/// SLDT.
pub fn sldt<D: WordPlace>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    core.require_umip()?;
    D::put_word(core, insn, core.ldtr.selector.into())
}

/// STR.
pub fn str<D: WordPlace>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    core.require_umip()?;
    D::put_word(core, insn, core.tr.selector.into())
}

/// LLDT.
pub fn lldt<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    core.require_cpl0()?;
    let selector = D::read::<u16>(core, insn)?;
    if is_null(selector) {
        core.ldtr = null_segment(selector, 0);
        return Ok(());
    }
    let segment = core.system_descriptor(selector)?;
    if segment.system() != Some(LDT) {
        return core.raise_code(vector::GP, code_of(selector));
    }
    if !segment.present() {
        return core.raise_code(vector::NP, code_of(selector));
    }
    core.ldtr = segment;
    Ok(())
}

/// LTR.
pub fn ltr<D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    core.require_protected()?;
    core.require_cpl0()?;
    let selector = D::read::<u16>(core, insn)?;
    let mut segment = core.system_descriptor(selector)?;
    let available = match segment.system() {
        Some(TSS) => true,
        Some(TSS_16) => !core.long_mode(),
        _ => false,
    };
    if !available {
        return core.raise_code(vector::GP, code_of(selector));
    }
    if !segment.present() {
        return core.raise_code(vector::NP, code_of(selector));
    }
    core.set_type_bit(selector, BUSY)?;
    segment.access |= u16::from(BUSY);
    core.tr = segment;
    Ok(())
}

fn store_table(core: &mut Core, insn: &Insn, table: DescriptorTable) -> Exec {
    core.require_umip()?;
    let bytes = if core.bits64() { 10 } else { 6 };
    let mut data = [0; 10];
    data[..2].copy_from_slice(&table.limit.to_le_bytes());
    data[2..].copy_from_slice(&table.base.to_le_bytes());
    let linear = core.linear(insn, bytes, true)?;
    core.store_bytes(linear, &data[..bytes as usize])
}

fn load_table(core: &mut Core, insn: &Insn) -> Exec<DescriptorTable> {
    core.require_cpl0()?;
    let bytes = if core.bits64() { 10 } else { 6 };
    let linear = core.linear(insn, bytes, false)?;
    let mut data = [0; 10];
    core.load_bytes(linear, &mut data[..bytes as usize])?;
    let [l0, l1, base @ ..] = data;
    let mut base = u64::from_le_bytes(base);
    if !core.bits64() && insn.flags & OPERAND16 != 0 {
        base &= 0xff_ffff;
    }
    if !canonical(base) {
        return core.general_protection();
    }
    Ok(DescriptorTable {
        base,
        limit: u16::from_le_bytes([l0, l1]),
    })
}

/// SGDT.
pub fn sgdt(core: &mut Core, insn: &Insn) -> Exec {
    store_table(core, insn, core.gdtr)
}

/// SIDT.
pub fn sidt(core: &mut Core, insn: &Insn) -> Exec {
    store_table(core, insn, core.idtr)
}

/// LGDT.
pub fn lgdt(core: &mut Core, insn: &Insn) -> Exec {
    core.gdtr = load_table(core, insn)?;
    Ok(())
}

/// LIDT.
pub fn lidt(core: &mut Core, insn: &Insn) -> Exec {
    core.idtr = load_table(core, insn)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr;
    use crate::operand::{Mem, Rm};
    use crate::system::tests::*;

    fn with(core: &mut Core, selector: u16) -> Insn {
        core.regs[gpr::RAX] = selector.into();
        insn()
    }

    #[test]
    fn ltr_takes_an_available_task_and_makes_it_busy() {
        let mut core = long();
        let insn = with(&mut core, TASK);
        assert_eq!(ltr::<Rm>(&mut core, &insn), Ok(()));
        assert_eq!((core.tr.base, core.tr.limit, core.tr.access), (TASK_STATE, 0x1ff, 0x8b));
        assert_eq!(core.load::<u8>(TABLE + 0x35), Ok(0x8b));
        assert!(ltr::<Rm>(&mut core, &insn).is_err(), "busy");
        assert_eq!(raised(&core), (vector::GP, Some(0x30)));
        for selector in [0, KERNEL_DATA, TASK | 4, LOCAL] {
            let insn = with(&mut core, selector);
            assert!(ltr::<Rm>(&mut core, &insn).is_err());
            assert_eq!(raised(&core), (vector::GP, Some(selector.into())));
        }
    }

    #[test]
    fn a_long_mode_descriptor_has_a_64_bit_base() {
        let mut core = long();
        core.store(TABLE + 0x38, 0xffff_8000u64).unwrap();
        let insn = with(&mut core, TASK);
        assert_eq!(ltr::<Rm>(&mut core, &insn), Ok(()));
        assert_eq!(core.tr.base, 0xffff_8000_0000_1800);
        core.store(TABLE + 0x35, 0x89u8).unwrap();
        core.store(TABLE + 0x38, 0x8000u64).unwrap();
        assert!(ltr::<Rm>(&mut core, &insn).is_err(), "not canonical");
        core.store(TABLE + 0x38, 1u64 << 40).unwrap();
        assert!(ltr::<Rm>(&mut core, &insn).is_err(), "a type above");
    }

    #[test]
    fn lldt_takes_a_table_or_none() {
        let mut core = long();
        let insn = with(&mut core, LOCAL);
        assert_eq!(lldt::<Rm>(&mut core, &insn), Ok(()));
        assert_eq!((core.ldtr.base, core.ldtr.limit), (0x1c00, 7));
        core.store(0x1c00u64, 0x00cf_f300_0000_ffffu64).unwrap();
        assert_eq!(core.load_segment(crate::core::seg::DS, 7), Ok(()));
        assert_eq!(sldt::<Rm>(&mut core, &insn), Ok(()));
        assert_eq!(core.regs[gpr::RAX], u64::from(LOCAL));
        let insn = with(&mut core, 0);
        assert_eq!(lldt::<Rm>(&mut core, &insn), Ok(()));
        assert!(core.load_segment(crate::core::seg::DS, 7).is_err(), "the table is gone");
        let insn = with(&mut core, TASK);
        assert!(lldt::<Rm>(&mut core, &insn).is_err());
    }

    #[test]
    fn tables_have_the_size_of_the_mode() {
        let mut core = long();
        core.gdtr.base = 0xffff_8000_1234_5678;
        assert_eq!(sgdt(&mut core, &insn()), Ok(()));
        assert_eq!(core.load::<u64>(2), Ok(0xffff_8000_1234_5678));
        core.gdtr = DescriptorTable::default();
        assert_eq!(lgdt(&mut core, &insn()), Ok(()));
        assert_eq!((core.gdtr.base, core.gdtr.limit), (0xffff_8000_1234_5678, 0x8f));
        core.store(2u64, 1u64 << 47).unwrap();
        assert!(lidt(&mut core, &insn()).is_err());

        let mut core = protected(0);
        core.store(0u64, 0x1122_3344_5566_7788u64).unwrap();
        assert_eq!(lidt(&mut core, &insn()), Ok(()));
        assert_eq!((core.idtr.base, core.idtr.limit), (0x3344_5566, 0x7788));
        let mut narrow = insn();
        narrow.flags = OPERAND16;
        assert_eq!(lidt(&mut core, &narrow), Ok(()));
        assert_eq!(core.idtr.base, 0x44_5566);
        assert_eq!(sidt(&mut core, &insn()), Ok(()));
        assert_eq!(core.load::<u64>(0), Ok(0x1122_0044_5566_7788));
    }

    #[test]
    fn users_see_tables_unless_umip_hides_them() {
        let mut core = long_user();
        assert_eq!(sgdt(&mut core, &insn()), Ok(()));
        assert_eq!(str::<Mem>(&mut core, &insn()), Ok(()));
        core.cr[4] |= 1 << 11;
        let stores: [crate::insn::Handler; 4] = [sgdt, sidt, sldt::<Rm>, str::<Rm>];
        for store in stores {
            assert!(store(&mut core, &insn()).is_err());
            assert_eq!(raised(&core), (vector::GP, Some(0)));
        }
        assert!(lgdt(&mut core, &insn()).is_err());
    }
}
