//! From an operand's offset to a linear address (Intel SDM 3A, chapters 3 and 5).

use crate::core::{Core, seg};
use crate::fault::{Exec, vector};
use crate::insn::{ADDRESS16, ADDRESS32, COMPLEX, Insn};

impl Core {
    /// Offset of a memory operand in its segment.
    #[inline(always)]
    pub fn offset_of(&self, insn: &Insn) -> u64 {
        let base = self.read_reg::<u64>(insn.base);
        let index = self.read_reg::<u64>(insn.index);
        let sum = base.wrapping_add(index << insn.scale).wrapping_add(insn.disp as u64);
        if insn.flags & (ADDRESS16 | ADDRESS32) == 0 {
            sum
        } else if insn.flags & ADDRESS16 != 0 {
            sum & 0xffff
        } else {
            sum & 0xffff_ffff
        }
    }

    /// Linear address of a memory operand of `bytes` bytes.
    ///
    /// # Errors
    /// What segmentation raises; non-canonical addresses are left to the access itself.
    #[inline(always)]
    pub fn linear(&mut self, insn: &Insn, bytes: u64, write: bool) -> Exec<u64> {
        if insn.flags & COMPLEX == 0 {
            let base = self.read_reg::<u64>(insn.base);
            let index = self.read_reg::<u64>(insn.index);
            return Ok(base.wrapping_add(index << insn.scale).wrapping_add(insn.disp as u64));
        }
        let offset = self.offset_of(insn);
        self.segment_linear(insn.segment.into(), offset, bytes, write)
    }

    /// Linear address of `bytes` bytes at `offset` in a segment.
    ///
    /// # Errors
    /// #GP(0), or #SS(0) through SS: limit, rights, a null segment.
    #[inline(never)]
    pub fn segment_linear(&mut self, segment: usize, offset: u64, bytes: u64, write: bool) -> Exec<u64> {
        let register = &self.segments[segment];
        if self.bits64() {
            let base = if segment >= seg::FS { register.base } else { 0 };
            return Ok(base.wrapping_add(offset));
        }
        let access = register.access;
        let (code, rights) = (access & 8 != 0, access & 2 != 0);
        // Bit 1: writable data or readable code.
        let allowed = !self.protected()
            || self.virtual_8086()
            || access & 0x80 != 0 && (if write { !code && rights } else { !code || rights });
        let last = offset.wrapping_add(bytes - 1);
        let limit = u64::from(register.limit);
        let inside = if access & 0xc == 4 {
            let top = if access & 1 << 14 != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            // Nothing is beyond 4 GiB: such accesses "may or may not" fault (Intel SDM 3A, "Limit Checking"), and do not.
            last <= limit || limit == 0xffff_ffff
        };
        if allowed && inside && last >= offset {
            return Ok(register.base.wrapping_add(offset) & 0xffff_ffff);
        }
        self.raise_code(if segment == seg::SS { vector::SS } else { vector::GP }, 0)
    }
}
