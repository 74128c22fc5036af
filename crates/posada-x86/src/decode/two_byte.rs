//! The two-byte opcode map, and what is integer in the three-byte ones (Intel SDM 2D, tables ).

use super::operands::{condition, extend, rm, rm_only, sized};
use super::{Decoder, Step};
use crate::insn::{OPERAND16, REP, REPNE};
use crate::operand::{Imm, Mem, Reg, Rm};
use crate::shift::Cl;
use crate::system::{control, fast, misc, segments, tables};
use crate::{atomic, bits, msr, muldiv, shift, transfer};

impl Decoder<'_> {
    pub(super) fn two_byte(&mut self, opcode: u8) -> Step {
        let size = self.operand();
        let pair = if opcode & 1 == 0 { 1 } else { size };
        let (rep, repne) = (self.insn.flags & REP != 0, self.insn.flags & REPNE != 0);
        match opcode {
            0x00 => return self.group6(),
            0x01 => return self.group7(),
            0x02 | 0x03 => {
                self.modrm(size)?;
                self.set(if opcode == 2 {
                    rm_only!(self, segments::lar)
                } else {
                    rm_only!(self, segments::lsl)
                });
            }
            0x05 => self.last(fast::syscall),
            0x06 => self.last(control::clts),
            0x07 => self.last(fast::sysret),
            0x08 | 0x09 => self.set(control::wbinvd),
            // Prefetches and hints.
            0x0d | 0x18..=0x1f => {
                self.modrm(size)?;
                self.set(transfer::nop);
            }
            0x20..=0x23 => {
                // These take ModRM.rm as a register whatever its mode bits say.
                self.modrm = self.byte()?;
                self.insn.rm = (self.modrm & 7 | (self.rex & 1) << 3) * 8;
                self.insn.reg = self.group() | (self.rex & 4) << 1;
                self.last(match opcode {
                    0x20 => control::mov_from_cr,
                    0x21 => control::mov_from_dr,
                    0x22 => control::mov_to_cr,
                    _ => control::mov_to_dr,
                });
            }
            0x30 => self.last(msr::wrmsr),
            0x31 => self.set(misc::rdtsc),
            0x32 => self.set(msr::rdmsr),
            0x33 => self.set(misc::rdpmc),
            0x34 => self.last(fast::sysenter),
            0x35 => self.last(fast::sysexit),
            0x38 => return self.three_byte_38(),
            0x40..=0x4f => {
                self.modrm(size)?;
                self.set(match (size, self.is_memory()) {
                    (2, true) => condition!(opcode, transfer::cmov, u16, Mem),
                    (2, false) => condition!(opcode, transfer::cmov, u16, Rm),
                    (4, true) => condition!(opcode, transfer::cmov, u32, Mem),
                    (4, false) => condition!(opcode, transfer::cmov, u32, Rm),
                    (_, true) => condition!(opcode, transfer::cmov, u64, Mem),
                    (_, false) => condition!(opcode, transfer::cmov, u64, Rm),
                });
            }
            0x80..=0x8f => {
                self.insn.imm = self.branch_displacement()?;
                self.conditional(opcode);
            }
            0x90..=0x9f => {
                self.modrm(1)?;
                self.set(if self.is_memory() {
                    condition!(opcode, transfer::setcc, Mem)
                } else {
                    condition!(opcode, transfer::setcc, Rm)
                });
            }
            0xa0 | 0xa8 => {
                self.insn.reg = if opcode == 0xa0 { 4 } else { 5 };
                self.set(segments::push_segment);
            }
            0xa1 | 0xa9 => {
                self.insn.reg = if opcode == 0xa1 { 4 } else { 5 };
                self.last(segments::pop_segment);
            }
            0xa2 => self.last(misc::cpuid),
            0xa3 | 0xab | 0xb3 | 0xbb => {
                self.modrm(size)?;
                self.bit_test_register(opcode >> 3 & 3, size);
            }
            0xba => {
                self.modrm(size)?;
                self.insn.imm = self.little_endian(1)?;
                self.bit_test_immediate(size);
            }
            0xa4 | 0xac => {
                self.modrm(size)?;
                self.insn.imm = self.little_endian(1)?;
                self.double_shift::<Imm>(opcode == 0xa4, size);
            }
            0xa5 | 0xad => {
                self.modrm(size)?;
                self.double_shift::<Cl>(opcode == 0xa5, size);
            }
            0xae => return self.group15(),
            0xaf => {
                self.modrm(size)?;
                self.set(rm!(self, size, muldiv::imul_two, (), ()));
            }
            0xb0 | 0xb1 => {
                self.modrm(pair)?;
                self.lockable = self.is_memory();
                self.set(if self.is_memory() {
                    sized!(pair, atomic::cmpxchg_memory)
                } else {
                    sized!(pair, atomic::cmpxchg_register)
                });
            }
            0xb2 | 0xb4 | 0xb5 => {
                self.modrm(size)?;
                self.insn.extra = u32::from(opcode & 7);
                self.last(segments::load_far_pointer);
                if !self.is_memory() {
                    self.undefined();
                }
            }
            0xb6 | 0xbe => {
                self.modrm(1)?;
                self.insn.reg = self.register(self.reg, size);
                self.set(match (opcode, self.is_memory()) {
                    (0xb6, true) => extend!(size, movzx, u8, Mem),
                    (0xb6, false) => extend!(size, movzx, u8, Rm),
                    (_, true) => extend!(size, movsx, u8, Mem),
                    (_, false) => extend!(size, movsx, u8, Rm),
                });
            }
            0xb7 | 0xbf => {
                self.modrm(size)?;
                self.set(match (opcode, self.is_memory()) {
                    (0xb7, true) => extend!(size, movzx, u16, Mem),
                    (0xb7, false) => extend!(size, movzx, u16, Rm),
                    (_, true) => extend!(size, movsx, u16, Mem),
                    (_, false) => extend!(size, movsx, u16, Rm),
                });
            }
            0xb8 if rep => {
                self.modrm(size)?;
                self.set(rm!(self, size, bits::popcnt, (), ()));
            }
            0xb9 | 0xff => {
                self.modrm(size)?;
                self.undefined();
            }
            0xbc | 0xbd => {
                self.modrm(size)?;
                self.set(match (opcode, rep) {
                    (0xbc, false) => rm!(self, size, bits::bsf, (), ()),
                    (0xbc, true) => rm!(self, size, bits::tzcnt, (), ()),
                    (_, false) => rm!(self, size, bits::bsr, (), ()),
                    (_, true) => rm!(self, size, bits::lzcnt, (), ()),
                });
            }
            0xc0 | 0xc1 => {
                self.modrm(pair)?;
                self.lockable = self.is_memory();
                self.set(if self.is_memory() {
                    sized!(pair, atomic::xadd_memory)
                } else {
                    sized!(pair, atomic::xadd_register)
                });
            }
            0xc3 if !rep && !repne && !self.operand_prefix => {
                self.modrm(size)?;
                self.set(sized!(size, transfer::mov, Mem, Reg));
                if !self.is_memory() {
                    self.undefined();
                }
            }
            0xc7 => return self.group9(),
            0xc8..=0xcf => {
                self.insn.reg = (opcode & 7 | (self.rex & 1) << 3) * 8;
                self.set(sized!(size, bits::bswap));
            }
            _ => return self.native(),
        }
        Ok(())
    }

    fn three_byte_38(&mut self) -> Step {
        let opcode = self.byte()?;
        let size = self.operand();
        let (rep, repne) = (self.insn.flags & REP != 0, self.insn.flags & REPNE != 0);
        match opcode {
            0x82 if self.insn.flags & OPERAND16 != 0 && !rep && !repne => {
                self.modrm(8)?;
                self.last(control::invpcid);
                if !self.is_memory() {
                    self.undefined();
                }
            }
            0xf0 | 0xf1 if !rep && !repne => {
                self.modrm(size)?;
                self.set(if opcode == 0xf0 {
                    sized!(size, bits::movbe_load)
                } else {
                    sized!(size, bits::movbe_store)
                });
                if !self.is_memory() {
                    self.undefined();
                }
            }
            _ => return self.native(),
        }
        Ok(())
    }

    /// BT, BTS, BTR, BTC with the bit's number in a register, which reaches beyond a memory operand.
    fn bit_test_register(&mut self, number: u8, size: usize) {
        self.lockable = self.is_memory() && number != 0;
        self.set(match (number, self.is_memory()) {
            (0, false) => sized!(size, bits::bt, Rm, Reg),
            (1, false) => sized!(size, bits::bts, Rm, Reg),
            (2, false) => sized!(size, bits::btr, Rm, Reg),
            (_, false) => sized!(size, bits::btc, Rm, Reg),
            (0, true) => sized!(size, bits::bt_string),
            (1, true) => sized!(size, bits::bts_string),
            (2, true) => sized!(size, bits::btr_string),
            (_, true) => sized!(size, bits::btc_string),
        });
    }

    fn bit_test_immediate(&mut self, size: usize) {
        self.lockable = self.is_memory() && self.group() != 4;
        self.set(match self.group() {
            4 => rm!(self, size, bits::bt, (), (Imm)),
            5 => rm!(self, size, bits::bts, (), (Imm)),
            6 => rm!(self, size, bits::btr, (), (Imm)),
            7 => rm!(self, size, bits::btc, (), (Imm)),
            _ => return self.undefined(),
        });
    }

    fn double_shift<S: crate::operand::Source>(&mut self, left: bool, size: usize) {
        self.set(if left {
            rm!(self, size, shift::shld, (), (S))
        } else {
            rm!(self, size, shift::shrd, (), (S))
        });
    }

    /// SLDT, STR, LLDT, LTR, VERR, VERW.
    fn group6(&mut self) -> Step {
        self.modrm(self.operand())?;
        match self.group() {
            0 => self.set(rm_only!(self, tables::sldt)),
            1 => self.set(rm_only!(self, tables::str)),
            2 => self.last(rm_only!(self, tables::lldt)),
            3 => self.last(rm_only!(self, tables::ltr)),
            4 => self.set(rm_only!(self, segments::verr)),
            5 => self.set(rm_only!(self, segments::verw)),
            _ => self.undefined(),
        }
        Ok(())
    }

    /// Descriptor tables, INVLPG, machine status word, and instructions that are whole ModRM bytes.
    fn group7(&mut self) -> Step {
        let size = self.operand();
        self.modrm(size)?;
        let plain = !self.operand_prefix && self.insn.flags & (REP | REPNE) == 0;
        match (self.group(), self.is_memory()) {
            (0, true) => self.set(tables::sgdt),
            (1, true) => self.set(tables::sidt),
            (2, true) => self.last(tables::lgdt),
            (3, true) => self.last(tables::lidt),
            (4, _) => self.set(rm_only!(self, control::smsw)),
            (6, _) => self.last(rm_only!(self, control::lmsw)),
            (7, true) => self.last(control::invlpg),
            _ => match self.modrm {
                0xca if plain => self.last(control::clac),
                0xcb if plain => self.last(control::stac),
                0xe8 if plain => self.last(misc::serialize),
                0xf8 if plain && self.bits64() => self.last(control::swapgs),
                0xf9 if plain => self.set(misc::rdtscp),
                // XGETBV, XSETBV.
                0xd0 | 0xd1 => {
                    self.ends_block = true;
                    return self.native();
                }
                _ => self.undefined(),
            },
        }
        Ok(())
    }

    /// CMPXCHG8B/16B, RDRAND, RDSEED, RDPID; the rest saves extended state.
    fn group9(&mut self) -> Step {
        let at = self.at;
        let size = self.operand();
        self.modrm(size)?;
        let (rep, repne) = (self.insn.flags & REP != 0, self.insn.flags & REPNE != 0);
        match (self.group(), self.is_memory()) {
            (1, true) => {
                self.lockable = true;
                self.set(if size == 8 {
                    atomic::cmpxchg16b
                } else {
                    atomic::cmpxchg8b
                });
            }
            (6, false) if !rep && !repne => self.set(misc::rdrand),
            (7, false) if !rep && !repne => self.set(misc::rdseed),
            (7, false) if rep => self.set(misc::rdpid),
            (3..=5, true) => {
                self.at = at;
                self.ends_block = true;
                return self.native();
            }
            _ => self.undefined(),
        }
        Ok(())
    }

    /// Fences, FS and GS bases, cache lines; the rest saves extended state.
    fn group15(&mut self) -> Step {
        self.modrm(self.operand())?;
        let rep = self.insn.flags & REP != 0;
        let mandatory = self.insn.flags & (REP | REPNE) != 0;
        match (self.group(), self.is_memory()) {
            (0..=3, false) if rep && self.bits64() => {
                let register = 4 + (self.group() & 1);
                let write = self.group() >= 2;
                self.insn.reg = register;
                self.last(if write { misc::write_base } else { misc::read_base });
            }
            (5..=7, false) if !mandatory && !self.operand_prefix => self.set(transfer::fence),
            // CLFLUSH, CLFLUSHOPT, CLWB.
            (6 | 7, true) if !mandatory && (self.group() == 7 || self.operand_prefix) => {
                self.set(misc::clflush);
            }
            (0..=6, true) => {
                self.ends_block = true;
                return self.native();
            }
            _ => self.undefined(),
        }
        Ok(())
    }
}
