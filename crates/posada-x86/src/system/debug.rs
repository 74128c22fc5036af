//! Debug registers (Intel SDM 3B, section 18.2).

use crate::core::Core;
use crate::fault::{Exception, Exec, Raised, vector};
use crate::insn::Insn;

/// DR6: an access to a debug register while DR7.GD is set.
const BD: u64 = 1 << 13;
/// DR7: accesses to debug registers raise #DB.
const GD: u64 = 1 << 13;
/// DR6 bits that are always set (no transactions, no bus locks to report), and those that software may write.
const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
/// DR7 likewise.
const DR7_FIXED: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7: break points that are switched on.
const ENABLED: u64 = 0xff;

/// Checks an access; gives the register's number, DR4 and DR5 being DR6 and DR7 where they exist.
fn access(core: &mut Core, insn: &Insn) -> Exec<usize> {
    let number = match usize::from(insn.reg) {
        number @ (0..=3 | 6 | 7) => number,
        number @ (4 | 5) if core.cr[4] & 1 << 3 == 0 => number + 2,
        _ => return core.raise(vector::UD),
    };
    core.require_cpl0()?;
    if core.dr[7] & GD != 0 {
        core.raised = Exception {
            vector: vector::DB,
            dr6: BD,
            ..Exception::default()
        };
        return Err(Raised);
    }
    Ok(number)
}

/// DR6 as it reads back after `value` was written.
pub(crate) fn dr6(value: u64) -> u64 {
    value & DR6_WRITABLE | DR6_FIXED
}

/// DR7 as it reads back after `value` was written.
pub(crate) fn dr7(value: u64) -> u64 {
    value & DR7_WRITABLE | DR7_FIXED
}

impl Core {
    /// DR6 bits of the break points that are on, of a kind that is `wanted` and have a byte among `length` at `address`.
    fn breakpoints(&self, address: u64, length: u64, wanted: impl Fn(u64) -> bool) -> u64 {
        let hit = |&number: &usize| {
            let (enabled, kind) = (self.dr[7] >> (number * 2) & 3, self.dr[7] >> (16 + number * 4) & 15);
            let bytes = [1, 2, 8, 4][(kind >> 2) as usize];
            let start = self.dr[number] & !(bytes - 1);
            let overlap = address.wrapping_sub(start) < bytes || start.wrapping_sub(address) < length;
            enabled != 0 && wanted(kind & 3) && overlap
        };
        (0..4).filter(hit).fold(0, |bits, number| bits | 1 << number)
    }

    /// DR6 bits of the data break points that an access touches.
    pub(crate) fn watched(&self, linear: u64, length: u64, write: bool) -> u64 {
        self.breakpoints(linear, length, |kind| kind == 3 || kind == 1 && write)
    }

    /// DR6 bits of the code break points at an instruction.
    pub(crate) fn code_breakpoints(&self, linear: u64) -> u64 {
        self.breakpoints(linear, 1, |kind| kind == 0)
    }

    /// Notes the I/O break points that an access to ports touches; they exist with CR4.DE.
    pub(crate) fn watch_ports(&mut self, port: u16, length: u64) {
        if self.careful && self.cr[4] & 1 << 3 != 0 {
            self.watch_hits |= self.breakpoints(port.into(), length, |kind| kind == 2);
        }
    }
}

/// MOV from a debug register: `reg` is its number, `rm` the general register.
pub fn mov_from_dr(core: &mut Core, insn: &Insn) -> Exec {
    let value = core.dr[access(core, insn)?];
    if core.bits64() {
        core.write_reg(insn.rm, value);
    } else {
        core.write_reg(insn.rm, value as u32);
    }
    Ok(())
}

/// MOV to a debug register: as [`mov_from_dr`].
pub fn mov_to_dr(core: &mut Core, insn: &Insn) -> Exec {
    let number = access(core, insn)?;
    let value = if core.bits64() {
        core.read_reg::<u64>(insn.rm)
    } else {
        core.read_reg::<u32>(insn.rm).into()
    };
    if number >= 6 && value >> 32 != 0 {
        return core.general_protection();
    }
    let before = core.dr[7];
    core.dr[number] = match number {
        6 => dr6(value),
        7 => dr7(value),
        _ => value,
    };
    // Pages with data break points stay out of the TLBs.
    if number != 6 && (before | core.dr[7]) & ENABLED != 0 {
        core.mmu.flush();
    }
    core.update_mode();
    core.serializing();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::gpr;
    use crate::mmu::tests::core;
    use crate::system::tests::{insn, user};

    fn write(core: &mut Core, number: u8, value: u64) -> Exec {
        core.regs[gpr::RAX] = value;
        let mut insn = insn();
        insn.reg = number;
        mov_to_dr(core, &insn)
    }

    fn read(core: &mut Core, number: u8) -> Exec<u64> {
        let mut insn = insn();
        insn.reg = number;
        mov_from_dr(core, &insn).map(|()| core.regs[gpr::RAX])
    }

    #[test]
    fn fixed_bits_stay() {
        let mut core = core();
        assert_eq!(write(&mut core, 6, 0), Ok(()));
        assert_eq!(read(&mut core, 4), Ok(0xffff_0ff0));
        assert_eq!(write(&mut core, 7, 0xffff_ffff & !GD), Ok(()));
        assert_eq!(read(&mut core, 5), Ok(0xffff_07ff));
        assert!(core.careful);
        assert!(write(&mut core, 7, 1 << 32).is_err());
        core.cr[4] |= 1 << 3;
        assert!(read(&mut core, 4).is_err());
        assert_eq!(core.raised.vector, vector::UD);
        assert!(read(&mut core, 8).is_err());
    }

    #[test]
    fn general_detect_guards_the_registers_once() {
        let mut core = core();
        assert_eq!(write(&mut core, 7, GD), Ok(()));
        assert!(read(&mut core, 0).is_err());
        assert_eq!((core.raised.vector, core.raised.dr6), (vector::DB, BD));
    }

    #[test]
    fn users_have_no_debug_registers() {
        let mut core = core();
        user(&mut core);
        assert!(read(&mut core, 7).is_err());
        assert_eq!(core.raised.vector, vector::GP);
    }
}
