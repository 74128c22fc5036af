//! Port I/O (Intel SDM 1, chapter 19).

use crate::core::{Core, gpr, seg};
use crate::fault::Exec;
use crate::insn::{ADDRESS16, ADDRESS32, Insn, REP, REPNE};
use crate::size::Size;

/// Smallest limit of a TSS with an I/O map: that of its fixed part.
const TSS_LIMIT: u32 = 103;
/// Where in the TSS the I/O map's offset stands.
const MAP_OFFSET: u64 = 0x66;
/// [`Insn::imm`] of instructions that take the port from DX.
const FROM_DX: u64 = u64::MAX;

impl Core {
    /// #GP(0) unless IOPL or the task's I/O map allows `bytes` ports from `port` on.
    fn require_port(&mut self, port: u16, bytes: u64) -> Exec {
        let by_level = u64::from(self.cpl) <= self.system_flags >> 12 & 3;
        if !self.protected() || by_level && !self.virtual_8086() {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        // Present, and a 32-bit or 64-bit TSS: a 16-bit one has no map.
        if self.tr.access & 0x88 != 0x88 || self.tr.limit < TSS_LIMIT {
            return self.general_protection();
        }
        let map = self.load_system::<u16>(self.tr.base.wrapping_add(MAP_OFFSET))?;
        let at = u64::from(map) + u64::from(port / 8);
        // The processor always reads two bytes, so that the ports may straddle them.
        if at + 1 > limit {
            return self.general_protection();
        }
        let bits = self.load_system::<u16>(self.tr.base.wrapping_add(at))?;
        if u64::from(bits) >> (port % 8) & ((1 << bytes) - 1) != 0 {
            return self.general_protection();
        }
        Ok(())
    }

    fn port_of(&self, insn: &Insn) -> u16 {
        let port = if insn.imm == FROM_DX {
            self.regs[gpr::RDX]
        } else {
            insn.imm
        };
        port as u16
    }

    fn port_read<T: Size>(&mut self, port: u16) -> T {
        let mut data = [0; 8];
        self.watch_ports(port, T::BYTES);
        self.exits += 1;
        self.machine.port_read(port, &mut data[..T::BYTES as usize]);
        T::from_u64(u64::from_le_bytes(data))
    }

    fn port_write<T: Size>(&mut self, port: u16, value: T) {
        let data = value.to_u64().to_le_bytes();
        self.watch_ports(port, T::BYTES);
        self.exits += 1;
        self.machine.port_write(port, &data[..T::BYTES as usize]);
    }

    /// A register as the address size sees it.
    fn address_register(&self, register: usize, insn: &Insn) -> u64 {
        self.regs[register] & insn.address_mask()
    }

    fn set_address_register(&mut self, register: usize, insn: &Insn, value: u64) {
        let old = self.regs[register];
        self.regs[register] = match insn.flags & (ADDRESS16 | ADDRESS32) {
            ADDRESS16 => old & !0xffff | value & 0xffff,
            ADDRESS32 => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Runs one element of INS or OUTS, moving `index`. With REP the instruction runs again until RCX is zero, so that
    /// events are seen in between.
    fn string_io(
        &mut self,
        insn: &Insn,
        index: usize,
        bytes: u64,
        element: impl FnOnce(&mut Self, u16, u64) -> Exec,
    ) -> Exec {
        let repeat = insn.flags & (REP | REPNE) != 0;
        let count = self.address_register(gpr::RCX, insn);
        let port = self.regs[gpr::RDX] as u16;
        self.require_port(port, bytes)?;
        if repeat && count == 0 {
            return Ok(());
        }
        let offset = self.address_register(index, insn);
        element(self, port, offset)?;
        let step = if self.system_flags & crate::core::flag::DF != 0 {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        self.set_address_register(index, insn, offset.wrapping_add(step));
        if repeat {
            self.set_address_register(gpr::RCX, insn, count - 1);
            if count > 1 {
                self.set_rip(self.rip().wrapping_sub(insn.length.into()));
                self.leave_block();
            }
        }
        Ok(())
    }
}

/// IN: the port is `imm`, or DX if that is all ones.
pub fn input<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let port = core.port_of(insn);
    core.require_port(port, T::BYTES)?;
    let value = core.port_read::<T>(port);
    core.write_reg(0, value);
    Ok(())
}

/// OUT: as [`input`].
pub fn output<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let port = core.port_of(insn);
    core.require_port(port, T::BYTES)?;
    let value = core.read_reg::<T>(0);
    core.port_write(port, value);
    Ok(())
}

/// INS, always to ES.
pub fn ins<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    core.string_io(insn, gpr::RDI, T::BYTES, |core, port, offset| {
        let linear = core.segment_linear(seg::ES, offset, T::BYTES, true)?;
        // A store that cannot work must not take the data from the device.
        core.host_range(linear, T::BYTES, true)?;
        let value = core.port_read::<T>(port);
        core.store(linear, value)
    })
}

/// OUTS.
pub fn outs<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    core.string_io(insn, gpr::RSI, T::BYTES, |core, port, offset| {
        let linear = core.segment_linear(insn.segment.into(), offset, T::BYTES, false)?;
        let value = core.load::<T>(linear)?;
        core.port_write(port, value);
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::flag;
    use crate::fault::vector;
    use crate::system::tests::*;

    /// With an I/O map behind the fixed part that closes port 11h alone.
    fn mapped() -> Box<Core> {
        let mut core = long_user();
        core.store_system(TASK_STATE + MAP_OFFSET, 0x68u16).unwrap();
        core.store_system(TASK_STATE + 0x68, 1u64 << 0x11).unwrap();
        core
    }

    #[test]
    fn the_map_decides_where_iopl_does_not() {
        let mut core = mapped();
        let mut insn = insn();
        insn.imm = 0x10;
        assert_eq!(input::<u8>(&mut core, &insn), Ok(()));
        assert_eq!(core.regs[gpr::RAX], 0xff);
        assert!(input::<u16>(&mut core, &insn).is_err(), "port 11h is closed");
        assert_eq!(raised(&core), (vector::GP, Some(0)));
        insn.imm = 0x18;
        assert_eq!(output::<u32>(&mut core, &insn), Ok(()));
        // Across the end of the map.
        core.tr.limit = 0x6b;
        assert!(output::<u8>(&mut core, &insn).is_err());
        core.tr.limit = 0x6c;
        assert_eq!(output::<u8>(&mut core, &insn), Ok(()));
        core.tr.limit = 0x66;
        assert!(
            output::<u8>(&mut core, &insn).is_err(),
            "a task segment too short for a map"
        );
        core.system_flags |= flag::IOPL;
        assert_eq!(output::<u8>(&mut core, &insn), Ok(()));
    }

    #[test]
    fn ports_come_from_dx() {
        let mut core = mapped();
        core.regs[gpr::RDX] = 0x12;
        let mut insn = insn();
        insn.imm = FROM_DX;
        core.regs[gpr::RAX] = 0x1234_5678_9abc_def0;
        assert_eq!(input::<u16>(&mut core, &insn), Ok(()));
        assert_eq!(core.regs[gpr::RAX], 0x1234_5678_9abc_ffff);
        core.regs[gpr::RDX] = 0x11;
        assert!(input::<u8>(&mut core, &insn).is_err());
    }

    #[test]
    fn repeated_input_runs_until_the_count_is_zero() {
        let mut core = long();
        let mut insn = insn();
        insn.flags = REP;
        core.regs[gpr::RCX] = 3;
        core.regs[gpr::RDI] = 0x100;
        for rip in [0x75, 0x75, 0x77] {
            core.set_rip(0x77);
            assert_eq!(ins::<u16>(&mut core, &insn), Ok(()));
            assert_eq!(core.rip(), rip);
        }
        assert_eq!((core.regs[gpr::RCX], core.regs[gpr::RDI]), (0, 0x106));
        assert_eq!(core.load::<u64>(0x100), Ok(0x0000_ffff_ffff_ffff));
        assert_eq!(ins::<u16>(&mut core, &insn), Ok(()));
        assert_eq!(core.regs[gpr::RDI], 0x106);
        core.system_flags |= flag::DF;
        core.regs[gpr::RSI] = 0x1_0000_0100;
        insn.flags = ADDRESS32;
        assert_eq!(outs::<u32>(&mut core, &insn), Ok(()));
        assert_eq!(core.regs[gpr::RSI], 0xfc);
    }

    #[test]
    fn a_closed_port_faults_for_no_rounds_too() {
        let mut core = mapped();
        let mut insn = insn();
        insn.flags = REP;
        (core.regs[gpr::RCX], core.regs[gpr::RDX]) = (0, 0x11);
        assert!(ins::<u8>(&mut core, &insn).is_err() && outs::<u8>(&mut core, &insn).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)));
        core.regs[gpr::RDX] = 0x10;
        assert_eq!(ins::<u8>(&mut core, &insn), Ok(()));
    }

    #[test]
    fn a_faulting_store_takes_nothing() {
        let mut core = long();
        core.regs[gpr::RDI] = 0x1ffd;
        assert!(ins::<u32>(&mut core, &insn()).is_err());
        assert_eq!((core.raised.vector, core.raised.address), (vector::PF, 0x2000));
        assert_eq!(core.regs[gpr::RDI], 0x1ffd);
    }
}
