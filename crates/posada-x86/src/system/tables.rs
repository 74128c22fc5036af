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
