//! The one-byte opcode map (Intel SDM 2D, table A-2).

use super::operands::{arithmetic, condition, rm, rm_only, sized};
use super::{Decoder, Step};
use crate::insn::{ADDRESS16, ADDRESS32, OPERAND16, REP};
use crate::operand::{Imm, Mem, Reg, Rm};
use crate::shift::Cl;
use crate::system::{far, io, segments};
use crate::{alu, atomic, bcd, branch, muldiv, shift, strings, transfer};

/// RAX and RCX as byte offsets.
const RAX: u8 = 0;

impl Decoder<'_> {
    pub(super) fn one_byte(&mut self, opcode: u8) -> Step {
        // Most opcodes come in pairs: bytes, then the operand size.
        let size = if opcode & 1 == 0 { 1 } else { self.operand() };
        match opcode {
            0x00..=0x3f if opcode & 7 < 6 => return self.arithmetic(opcode, size),
            0x06 | 0x0e | 0x16 | 0x1e if !self.bits64() => {
                self.insn.reg = opcode >> 3;
                self.set(segments::push_segment);
            }
            0x07 | 0x17 | 0x1f if !self.bits64() => {
                self.insn.reg = opcode >> 3;
                self.last(segments::pop_segment);
            }
            0x27 if !self.bits64() => self.set(bcd::daa),
            0x2f if !self.bits64() => self.set(bcd::das),
            0x37 if !self.bits64() => self.set(bcd::aaa),
            0x3f if !self.bits64() => self.set(bcd::aas),
            // In 64-bit code these are REX prefixes and never arrive here.
            0x40..=0x4f => {
                let size = self.operand();
                self.insn.rm = self.register(opcode & 7, size);
                self.set(if opcode < 0x48 {
                    sized!(size, alu::unary, alu::Inc, Rm)
                } else {
                    sized!(size, alu::unary, alu::Dec, Rm)
                });
            }
            0x50..=0x57 => {
                self.insn.reg = (opcode & 7 | (self.rex & 1) << 3) * 8;
                self.set(match self.stack_operand() {
                    8 => transfer::push64::<Reg>,
                    4 => transfer::push::<u32, Reg>,
                    _ => transfer::push::<u16, Reg>,
                });
            }
            0x58..=0x5f => {
                self.insn.reg = (opcode & 7 | (self.rex & 1) << 3) * 8;
                self.set(match self.stack_operand() {
                    8 => transfer::pop64,
                    4 => transfer::pop::<u32, Reg>,
                    _ => transfer::pop::<u16, Reg>,
                });
            }
            0x60 if !self.bits64() => {
                self.set(transfer::pusha);
            }
            0x61 if !self.bits64() => {
                self.set(transfer::popa);
            }
            0x62 if !self.bits64() && self.peek_memory()? => {
                self.modrm(self.operand())?;
                self.set(far::bound);
            }
            0x63 if self.bits64() => {
                self.modrm(self.operand())?;
                self.set(match (self.operand(), self.is_memory()) {
                    (8, true) => transfer::movsx::<u64, u32, Reg, Mem>,
                    (8, false) => transfer::movsx::<u64, u32, Reg, Rm>,
                    (4, true) => transfer::mov::<u32, Reg, Mem>,
                    (4, false) => transfer::mov::<u32, Reg, Rm>,
                    (_, true) => transfer::mov::<u16, Reg, Mem>,
                    (_, false) => transfer::mov::<u16, Reg, Rm>,
                });
            }
            0x63 => {
                self.modrm(2)?;
                self.set(rm_only!(self, segments::arpl));
            }
            0x68 | 0x6a => {
                let size = self.stack_operand();
                self.insn.imm = self.signed(if opcode == 0x6a { 1 } else { size.min(4) })?;
                self.set(match size {
                    8 => transfer::push64::<Imm>,
                    4 => transfer::push::<u32, Imm>,
                    _ => transfer::push::<u16, Imm>,
                });
            }
            0x69 | 0x6b => {
                let size = self.operand();
                self.modrm(size)?;
                self.insn.imm = self.signed(if opcode == 0x6b { 1 } else { size.min(4) })?;
                self.set(rm!(self, size, muldiv::imul_three, (), ()));
            }
            0x6c | 0x6d => self.last(match size.min(4) {
                1 => io::ins::<u8>,
                2 => io::ins::<u16>,
                _ => io::ins::<u32>,
            }),
            0x6e | 0x6f => self.last(match size.min(4) {
                1 => io::outs::<u8>,
                2 => io::outs::<u16>,
                _ => io::outs::<u32>,
            }),
            0x70..=0x7f => {
                self.insn.imm = self.signed(1)?;
                self.conditional(opcode);
            }
            0x80..=0x83 => return self.arithmetic_immediate(opcode, size),
            0x84 | 0x85 => {
                self.modrm(size)?;
                self.set(rm!(self, size, alu::compare, (alu::And), (Reg)));
            }
            0x86 | 0x87 => {
                self.modrm(size)?;
                self.lockable = self.is_memory();
                self.set(if self.is_memory() {
                    sized!(size, atomic::xchg_memory)
                } else {
                    sized!(size, transfer::xchg)
                });
            }
            0x88 | 0x89 => {
                self.modrm(size)?;
                self.set(rm!(self, size, transfer::mov, (), (Reg)));
            }
            0x8a | 0x8b => {
                self.modrm(size)?;
                self.set(rm!(self, size, transfer::mov, (Reg), ()));
            }
            0x8c => {
                self.modrm(self.operand())?;
                self.insn.reg = self.group();
                self.set(rm_only!(self, segments::store_segment));
                if self.group() > 5 {
                    self.undefined();
                }
            }
            0x8d => {
                self.modrm(size)?;
                self.set(sized!(size, transfer::lea));
                if !self.is_memory() {
                    self.undefined();
                }
            }
            0x8e => {
                self.modrm(2)?;
                self.insn.reg = self.group();
                self.last(rm_only!(self, segments::load_segment));
                if self.group() > 5 || self.group() == 1 {
                    self.undefined();
                }
            }
            0x8f => {
                let size = self.stack_operand();
                self.modrm(size)?;
                self.set(rm!(self, size, transfer::pop, (), ()));
                if self.group() != 0 {
                    self.undefined();
                }
            }
            0x90 if self.rex & 1 == 0 || self.insn.flags & REP != 0 => self.set(if self.insn.flags & REP != 0 {
                transfer::pause
            } else {
                transfer::nop
            }),
            0x90..=0x97 => {
                let size = self.operand();
                self.insn.reg = RAX;
                self.insn.rm = (opcode & 7 | (self.rex & 1) << 3) * 8;
                self.set(sized!(size, transfer::xchg));
            }
            0x98 => self.set(transfer::cbw),
            0x99 => self.set(transfer::cwd),
            0x9a | 0xea if !self.bits64() => {
                let offset = self.little_endian(if self.insn.flags & OPERAND16 != 0 { 2 } else { 4 })?;
                let selector = self.little_endian(2)?;
                self.insn.imm = offset | selector << 32;
                self.last(if opcode == 0x9a {
                    far::call_direct
                } else {
                    far::jmp_direct
                });
            }
            0x9c => {
                self.set(transfer::pushf);
            }
            0x9d => {
                self.last(transfer::popf);
            }
            0x9e => self.set(transfer::sahf),
            0x9f => self.set(transfer::lahf),
            0xa0..=0xa3 => {
                let bytes = match self.insn.flags & (ADDRESS16 | ADDRESS32) {
                    0 => 8,
                    ADDRESS16 => 2,
                    _ => 4,
                };
                self.insn.imm = self.little_endian(bytes)?;
                self.set(if opcode < 0xa2 {
                    sized!(size, transfer::mov_from_offset)
                } else {
                    sized!(size, transfer::mov_to_offset)
                });
            }
            0xa4 | 0xa5 => self.set(sized!(size, strings::movs)),
            0xa6 | 0xa7 => self.set(sized!(size, strings::cmps)),
            0xa8 | 0xa9 => {
                self.immediate(size)?;
                self.insn.reg = RAX;
                self.set(sized!(size, alu::compare, alu::And, Reg, Imm));
            }
            0xaa | 0xab => self.set(sized!(size, strings::stos)),
            0xac | 0xad => self.set(sized!(size, strings::lods)),
            0xae | 0xaf => self.set(sized!(size, strings::scas)),
            0xb0..=0xb7 => {
                let number = opcode & 7 | (self.rex & 1) << 3;
                self.insn.reg = self.register(number, 1);
                self.insn.imm = self.little_endian(1)?;
                self.set(transfer::mov::<u8, Reg, Imm>);
            }
            0xb8..=0xbf => {
                let size = self.operand();
                self.insn.reg = (opcode & 7 | (self.rex & 1) << 3) * 8;
                self.insn.imm = self.little_endian(size)?;
                self.set(sized!(size, transfer::mov, Reg, Imm));
            }
            0xc0 | 0xc1 => {
                self.modrm(size)?;
                self.insn.imm = self.little_endian(1)?;
                self.shift::<Imm>(size);
            }
            0xc2 | 0xc3 => {
                if opcode == 0xc2 {
                    self.insn.imm = self.little_endian(2)?;
                }
                self.last(branch::ret);
            }
            // In 64-bit code, and with a register for ModRM.rm, these are VEX prefixes.
            0xc4 | 0xc5 if !self.bits64() && self.peek_memory()? => {
                self.modrm(self.operand())?;
                self.insn.extra = if opcode == 0xc4 { 0 } else { 3 };
                self.last(segments::load_far_pointer);
            }
            0xc6 | 0xc7 => {
                self.modrm(size)?;
                self.immediate(size)?;
                self.set(rm!(self, size, transfer::mov, (), (Imm)));
                // XABORT and XBEGIN are other groups of these opcodes: not here.
                if self.group() != 0 {
                    self.undefined();
                }
            }
            0xc8 => {
                self.insn.imm = self.little_endian(2)?;
                self.insn.imm |= self.little_endian(1)? << 16;
                self.set(transfer::enter);
            }
            0xc9 => {
                self.set(transfer::leave);
            }
            0xca | 0xcb => {
                if opcode == 0xca {
                    self.insn.imm = self.little_endian(2)?;
                }
                self.last(far::ret);
            }
            0xcc => self.last(far::int3),
            0xcd => {
                self.insn.imm = self.little_endian(1)?;
                self.last(far::int);
            }
            0xce if !self.bits64() => self.last(far::into),
            0xcf => {
                self.last(far::iret);
            }
            0xd0 | 0xd1 => {
                self.modrm(size)?;
                self.insn.imm = 1;
                self.shift::<Imm>(size);
            }
            0xd2 | 0xd3 => {
                self.modrm(size)?;
                self.shift::<Cl>(size);
            }
            0xd4 | 0xd5 if !self.bits64() => {
                self.insn.imm = self.little_endian(1)?;
                self.set(if opcode == 0xd4 { bcd::aam } else { bcd::aad });
            }
            0xd6 if !self.bits64() => self.set(bcd::salc),
            0xd7 => {
                self.insn.base = 3 * 8;
                self.set(transfer::xlat);
            }
            0xe0..=0xe2 => {
                self.insn.imm = self.signed(1)?;
                self.insn.reg = opcode & 3;
                self.last(branch::loop_);
            }
            0xe3 => {
                self.insn.imm = self.signed(1)?;
                self.last(branch::jcxz);
            }
            0xe4..=0xe7 => {
                self.insn.imm = self.little_endian(1)?;
                self.port(opcode & 2 == 0, size.min(4));
            }
            0xec..=0xef => {
                self.insn.imm = u64::MAX;
                self.port(opcode & 2 == 0, size.min(4));
            }
            0xe8 => {
                self.insn.imm = self.branch_displacement()?;
                self.last(branch::call);
            }
            0xe9 => {
                self.insn.imm = self.branch_displacement()?;
                self.last(branch::jmp);
            }
            0xeb => {
                self.insn.imm = self.signed(1)?;
                self.last(branch::jmp);
            }
            0xf1 => self.last(far::int1),
            0xf4 => self.last(crate::system::control::hlt),
            0xf5 => {
                self.insn.imm = 2;
                self.set(transfer::carry);
            }
            0xf6 | 0xf7 => return self.group3(size),
            0xf8 | 0xf9 => {
                self.insn.imm = u64::from(opcode & 1);
                self.set(transfer::carry);
            }
            0xfa => self.set(crate::system::control::cli),
            0xfb => self.last(crate::system::control::sti),
            0xfc | 0xfd => {
                self.insn.imm = u64::from(opcode & 1);
                self.set(transfer::direction);
            }
            0xfe | 0xff => return self.group5(size),
            // 62, 9B, C4, C5, D8-DF.
            _ => return self.native(),
        }
        Ok(())
    }

    /// True if the ModRM byte that follows names memory.
    fn peek_memory(&mut self) -> Step<bool> {
        let byte = self.byte()?;
        self.at -= 1;
        Ok(byte < 0xc0)
    }

    fn arithmetic(&mut self, opcode: u8, size: usize) -> Step {
        let number = opcode >> 3;
        match opcode & 7 {
            0 | 1 => {
                self.modrm(size)?;
                self.lockable = self.is_memory() && number != 7;
                self.set(if self.is_memory() {
                    arithmetic!(number, size, Mem, Reg)
                } else {
                    arithmetic!(number, size, Rm, Reg)
                });
            }
            2 | 3 => {
                self.modrm(size)?;
                self.set(if self.is_memory() {
                    arithmetic!(number, size, Reg, Mem)
                } else {
                    arithmetic!(number, size, Reg, Rm)
                });
            }
            _ => {
                self.immediate(size)?;
                self.insn.reg = RAX;
                self.set(arithmetic!(number, size, Reg, Imm));
            }
        }
        Ok(())
    }

    fn arithmetic_immediate(&mut self, opcode: u8, size: usize) -> Step {
        if opcode == 0x82 && self.bits64() {
            self.undefined();
            return Ok(());
        }
        self.modrm(size)?;
        if opcode == 0x83 {
            self.insn.imm = self.signed(1)?;
        } else {
            self.immediate(size)?;
        }
        let number = self.group();
        self.lockable = self.is_memory() && number != 7;
        self.set(if self.is_memory() {
            arithmetic!(number, size, Mem, Imm)
        } else {
            arithmetic!(number, size, Rm, Imm)
        });
        Ok(())
    }

    fn shift<S: crate::operand::Source>(&mut self, size: usize) {
        self.set(match self.group() {
            0 => rm!(self, size, shift::rol, (), (S)),
            1 => rm!(self, size, shift::ror, (), (S)),
            2 => rm!(self, size, shift::rcl, (), (S)),
            3 => rm!(self, size, shift::rcr, (), (S)),
            5 => rm!(self, size, shift::shr, (), (S)),
            7 => rm!(self, size, shift::sar, (), (S)),
            // 6 is an alias of 4.
            _ => rm!(self, size, shift::shl, (), (S)),
        });
    }

    pub(super) fn conditional(&mut self, opcode: u8) {
        self.set(if self.bits64() {
            condition!(opcode, branch::jcc64)
        } else {
            condition!(opcode, branch::jcc)
        });
    }

    /// The displacement of a near branch: 2 bytes with a 16-bit operand size, outside 64-bit mode.
    pub(super) fn branch_displacement(&mut self) -> Step<u64> {
        let short = !self.bits64() && self.insn.flags & OPERAND16 != 0;
        self.signed(if short { 2 } else { 4 })
    }

    fn port(&mut self, input: bool, size: usize) {
        self.last(match (input, size) {
            (true, 1) => io::input::<u8>,
            (true, 2) => io::input::<u16>,
            (true, _) => io::input::<u32>,
            (false, 1) => io::output::<u8>,
            (false, 2) => io::output::<u16>,
            (false, _) => io::output::<u32>,
        });
    }

    fn group3(&mut self, size: usize) -> Step {
        self.modrm(size)?;
        match self.group() {
            0 | 1 => {
                self.immediate(size)?;
                self.set(rm!(self, size, alu::compare, (alu::And), (Imm)));
            }
            2 => {
                self.lockable = self.is_memory();
                self.set(rm!(self, size, alu::unary, (alu::Not), ()));
            }
            3 => {
                self.lockable = self.is_memory();
                self.set(rm!(self, size, alu::unary, (alu::Neg), ()));
            }
            4 => self.set(rm!(self, size, muldiv::mul, (), ())),
            5 => self.set(rm!(self, size, muldiv::imul, (), ())),
            6 => self.set(rm!(self, size, muldiv::div, (), ())),
            _ => self.set(rm!(self, size, muldiv::idiv, (), ())),
        }
        Ok(())
    }

    fn group5(&mut self, size: usize) -> Step {
        self.modrm(size)?;
        let bits64 = self.bits64();
        match (self.group(), size) {
            (0, _) => {
                self.lockable = self.is_memory();
                self.set(rm!(self, size, alu::unary, (alu::Inc), ()));
            }
            (1, _) => {
                self.lockable = self.is_memory();
                self.set(rm!(self, size, alu::unary, (alu::Dec), ()));
            }
            (2.., 1) => self.undefined(),
            (2, _) => self.last(if bits64 {
                rm_only!(self, branch::call_indirect64)
            } else {
                rm_only!(self, branch::call_indirect)
            }),
            (4, _) => self.last(if bits64 {
                rm_only!(self, branch::jmp_indirect64)
            } else {
                rm_only!(self, branch::jmp_indirect)
            }),
            (3, _) if self.is_memory() => self.last(far::call_indirect),
            (5, _) if self.is_memory() => self.last(far::jmp_indirect),
            (6, _) => self.set(match (self.stack_operand(), self.is_memory()) {
                (8, true) => transfer::push64::<Mem>,
                (8, false) => transfer::push64::<Rm>,
                (4, true) => transfer::push::<u32, Mem>,
                (4, false) => transfer::push::<u32, Rm>,
                (_, true) => transfer::push::<u16, Mem>,
                (_, false) => transfer::push::<u16, Rm>,
            }),
            _ => self.undefined(),
        }
        Ok(())
    }
}
