//! A small assembler: the few instructions that the translator puts around the guest's own.
//!
//! Everything in a [`Core`](crate::core::Core) is reached as `gs:[offset]`.

use super::frame::{self, LOG_GLOBAL, WAYS};
use super::jumps::SPREAD;
use super::operation::Memory;
use super::relocation::{Form, Holds, Relocation};
use crate::tlb::GLOBAL;

/// Scratch registers.
pub const R10: u8 = 10;
/// Scratch registers.
pub const R11: u8 = 11;
const RAX: u8 = 0;

/// An unresolved rel32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Hole(pub usize);

/// Conditions of jumps.
pub mod condition {
    #![allow(missing_docs, reason = "the manual's own mnemonics")]
    pub const B: u8 = 2;
    pub const AE: u8 = 3;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
}

/// Code being made, and the address where it will run.
#[derive(Default)]
pub struct Assembler {
    /// The bytes so far.
    pub code: Vec<u8>,
    /// Address of the first byte.
    pub start: u64,
    /// The host has BMI2.
    pub bmi2: bool,
    /// What depends on where the code is, and on where the guest's is.
    pub relocations: Vec<Relocation>,
}

impl Assembler {
    /// Begins anew.
    pub fn begin(&mut self, start: u64) {
        self.code.clear();
        self.relocations.clear();
        self.start = start;
    }

    /// Offset of what comes next.
    pub fn here(&self) -> usize {
        self.code.len()
    }

    /// Appends bytes.
    #[inline]
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    fn dword(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    fn absolute(&mut self, prefix: &[u8], rex: u8, opcode: &[u8], reg: u8, offset: usize) {
        self.bytes(&[0x65]);
        self.bytes(prefix);
        self.code.push(rex | (reg & 8) >> 1);
        self.bytes(opcode);
        self.bytes(&[(reg & 7) << 3 | 4, 0x25]);
        self.dword(offset as i32);
    }

    /// `mov reg, gs:[offset]`.
    pub fn load(&mut self, reg: u8, offset: usize) {
        self.absolute(&[], 0x48, &[0x8b], reg, offset);
    }

    /// `mov gs:[offset], reg`.
    pub fn store(&mut self, offset: usize, reg: u8) {
        self.absolute(&[], 0x48, &[0x89], reg, offset);
    }

    /// `mov gs:[offset], ax`.
    pub fn store_ax(&mut self, offset: usize) {
        self.absolute(&[0x66], 0x40, &[0x89], RAX, offset);
    }

    /// `movzx eax, word gs:[offset]`.
    pub fn load_ax(&mut self, offset: usize) {
        self.absolute(&[], 0x40, &[0x0f, 0xb7], RAX, offset);
    }

    /// `mov byte gs:[offset], value`.
    pub fn store_byte(&mut self, offset: usize, value: u8) {
        self.absolute(&[], 0x40, &[0xc6], 0, offset);
        self.code.push(value);
    }

    /// `and dword gs:[offset], value`.
    pub fn and_dword(&mut self, offset: usize, value: u32) {
        self.absolute(&[], 0x40, &[0x81], 4, offset);
        self.dword(value as i32);
    }

    /// `or dword gs:[offset], value`.
    pub fn or_dword(&mut self, offset: usize, value: u32) {
        self.absolute(&[], 0x40, &[0x81], 1, offset);
        self.dword(value as i32);
    }

    /// `inc qword gs:[offset]`.
    pub fn increment(&mut self, offset: usize) {
        self.absolute(&[], 0x48, &[0xff], 0, offset);
    }

    /// `cmp dword gs:[offset], value`.
    pub fn compare_dword(&mut self, offset: usize, value: u32) {
        self.absolute(&[], 0x40, &[0x81], 7, offset);
        self.dword(value as i32);
    }

    /// `test dword gs:[offset], value`.
    pub fn test_dword(&mut self, offset: usize, value: u32) {
        self.absolute(&[], 0x40, &[0xf7], 0, offset);
        self.dword(value as i32);
    }

    /// `mov qword gs:[offset], value`.
    pub fn store_constant(&mut self, offset: usize, value: i32) {
        self.absolute(&[], 0x48, &[0xc7], 0, offset);
        self.dword(value);
    }

    /// `movzx reg, word gs:[offset]`.
    pub fn load_word(&mut self, reg: u8, offset: usize) {
        self.absolute(&[], 0x40, &[0x0f, 0xb7], reg, offset);
    }

    /// `or reg, gs:[offset]`.
    pub fn or_from(&mut self, reg: u8, offset: usize) {
        self.absolute(&[], 0x48, &[0x0b], reg, offset);
    }

    /// `cmp reg, gs:[offset]`.
    pub fn compare_with(&mut self, reg: u8, offset: usize) {
        self.absolute(&[], 0x48, &[0x3b], reg, offset);
    }

    /// `pext r11d, r11d, gs:[offset]`.
    pub fn gather_r11(&mut self, offset: usize) {
        self.bytes(&[0x65, 0xc4, 0x62, 0x22, 0xf5, 0x1c, 0x25]);
        self.dword(offset as i32);
    }

    /// `pdep r11d, r11d, gs:[offset]`.
    pub fn scatter_r11(&mut self, offset: usize) {
        self.bytes(&[0x65, 0xc4, 0x62, 0x23, 0xf5, 0x1c, 0x25]);
        self.dword(offset as i32);
    }

    /// `cmp byte gs:[offset], 0`.
    pub fn compare_byte_zero(&mut self, offset: usize) {
        self.compare_byte(offset, 0);
    }

    /// `cmp byte gs:[offset], value`.
    pub fn compare_byte(&mut self, offset: usize, value: u8) {
        self.absolute(&[], 0x40, &[0x80], 7, offset);
        self.code.push(value);
    }

    /// `jmp gs:[offset]` through the slot of a jump cache for the linear address that was named last.
    pub fn jump_through_slot(&mut self, offset: usize) {
        self.jump_through(offset);
        self.note(Holds::Slot, Form::Signed);
    }

    /// `jmp gs:[offset]`.
    pub fn jump_through(&mut self, offset: usize) {
        self.absolute(&[], 0x40, &[0xff], 4, offset);
    }

    /// `mov to, from`.
    pub fn copy(&mut self, to: u8, from: u8) {
        if to != from {
            self.bytes(&[0x48 | (from & 8) >> 1 | to >> 3, 0x89, 0xc0 | (from & 7) << 3 | to & 7]);
        }
    }

    /// Notes what the bytes just appended end with.
    fn note(&mut self, holds: Holds, form: Form) {
        let size = if form == Form::Whole { 8 } else { 4 };
        let at = (self.here() - size) as u16;
        self.relocations.push(Relocation { at, holds, form });
    }

    /// `mov reg, address` of an operand without registers.
    pub fn named(&mut self, reg: u8, memory: &Memory) {
        let form = self.constant(reg, memory.displacement);
        if memory.relative {
            self.note(Holds::Linear, form);
        }
    }

    /// [`Assembler::constant`] for a value that depends on where the block is.
    pub fn place(&mut self, reg: u8, value: u64, holds: Holds) {
        let form = self.constant(reg, value);
        self.note(holds, form);
    }

    /// `mov reg, value`, in the shortest form.
    pub fn constant(&mut self, reg: u8, value: u64) -> Form {
        if u32::try_from(value).is_ok() {
            if reg >= 8 {
                self.code.push(0x41);
            }
            self.code.push(0xb8 | reg & 7);
            self.dword(value as u32 as i32);
            Form::Unsigned
        } else if i32::try_from(value as i64).is_ok() {
            self.bytes(&[0x48 | reg >> 3, 0xc7, 0xc0 | reg & 7]);
            self.dword(value as i32);
            Form::Signed
        } else {
            self.bytes(&[0x48 | reg >> 3, 0xb8 | reg & 7]);
            self.bytes(&value.to_le_bytes());
            Form::Whole
        }
    }

    /// The ModRM byte and displacement of `[base + offset]` with R10 or R11 as base; `reg` is that of the ModRM byte.
    pub fn based(&mut self, reg: u8, base: u8, offset: i32) {
        let modrm = (reg & 7) << 3 | base & 7;
        if offset == 0 {
            self.code.push(modrm);
        } else if let Ok(offset) = i8::try_from(offset) {
            self.bytes(&[0x40 | modrm, offset as u8]);
        } else {
            self.code.push(0x80 | modrm);
            self.dword(offset);
        }
    }

    /// The same without a displacement of one byte, which EVEX encodings multiply.
    pub fn based_evex(&mut self, reg: u8, base: u8, offset: i32) {
        if offset == 0 {
            return self.based(reg, base, 0);
        }
        self.code.push(0x80 | (reg & 7) << 3 | base & 7);
        self.dword(offset);
    }

    /// `mov reg, [r10 + offset]`.
    pub fn load_at(&mut self, reg: u8, offset: i32) {
        self.bytes(&[0x49 | (reg & 8) >> 1, 0x8b]);
        self.based(reg, R10, offset);
    }

    /// `mov [r10 + offset], reg`.
    pub fn store_at(&mut self, offset: i32, reg: u8) {
        self.bytes(&[0x49 | (reg & 8) >> 1, 0x89]);
        self.based(reg, R10, offset);
    }

    /// [`Assembler::store_constant_at`] for a linear address.
    pub fn store_linear_at(&mut self, offset: i32, value: i32) {
        self.store_constant_at(offset, value);
        self.note(Holds::Linear, Form::Signed);
    }

    /// `mov qword [r10 + offset], value`.
    pub fn store_constant_at(&mut self, offset: i32, value: i32) {
        self.bytes(&[0x49, 0xc7]);
        self.based(0, R10, offset);
        self.dword(value);
    }

    /// `lea reg, [operand]`; with `narrow` the 32-bit form, which cuts the address.
    pub fn lea(&mut self, reg: u8, memory: &Memory) {
        let prefix = if memory.narrow { 0x40 } else { 0x48 };
        let base = memory.base.unwrap_or(0);
        let index = memory.index.unwrap_or(4);
        let rex = prefix | (reg & 8) >> 1 | (index & 8) >> 2 | base >> 3;
        let displacement = memory.displacement as i32;
        let near = i8::try_from(displacement).is_ok();
        let mode = match memory.base {
            None => 0,
            Some(base) if displacement == 0 && base & 7 != 5 => 0,
            Some(_) if near => 0x40,
            Some(_) => 0x80,
        };
        let needs_sib = memory.index.is_some() || memory.base.is_none() || base & 7 == 4;
        self.bytes(&[rex, 0x8d]);
        if needs_sib {
            let low = if memory.base.is_none() { 5 } else { base & 7 };
            self.bytes(&[mode | (reg & 7) << 3 | 4, memory.scale << 6 | (index & 7) << 3 | low]);
        } else {
            self.code.push(mode | (reg & 7) << 3 | base & 7);
        }
        if mode == 0x40 {
            self.code.push(displacement as u8);
        } else if mode == 0x80 || memory.base.is_none() {
            self.dword(displacement);
        }
    }

    /// `lea reg, [base + displacement]`.
    pub fn add(&mut self, reg: u8, base: u8, displacement: i32) {
        let memory = Memory {
            base: Some(base),
            index: None,
            scale: 0,
            displacement: displacement as u64,
            relative: false,
            segment: None,
            narrow: false,
            size: 8,
            write: false,
            locked: false,
        };
        self.lea(reg, &memory);
    }

    /// `rorx r11, r10, 7`, or what does the same.
    pub fn page_bits(&mut self) {
        if self.bmi2 {
            self.bytes(&[0xc4, 0x43, 0xfb, 0xf0, 0xda, 7]);
        } else {
            self.bytes(&[0x4d, 0x89, 0xd3, 0x49, 0xc1, 0xeb, 7]);
        }
    }

    /// `and r11d, mask`.
    pub fn mask_r11(&mut self, mask: u32) {
        self.bytes(&[0x41, 0x81, 0xe3]);
        self.dword(mask as i32);
    }

    fn indexed(&mut self, opcode: u8, offset: usize) {
        self.bytes(&[0x65, 0x4d, opcode, 0x93]);
        self.dword(offset as i32);
    }

    /// `xor r10, gs:[r11 + offset]`.
    pub fn xor_tag(&mut self, offset: usize) {
        self.indexed(0x33, offset);
    }

    /// `add r10, gs:[r11 + offset]`.
    pub fn add_host(&mut self, offset: usize) {
        self.indexed(0x03, offset);
    }

    /// `xor r10, gs:[offset]`.
    pub fn xor_stack(&mut self, offset: usize) {
        self.absolute(&[], 0x48, &[0x33], R10, offset);
    }

    /// `add r10, gs:[offset]`.
    pub fn add_stack(&mut self, offset: usize) {
        self.absolute(&[], 0x48, &[0x03], R10, offset);
    }

    /// `rorx rax, r10, 7`, or what does the same; `and eax, mask`.
    pub fn page_index_rax(&mut self, mask: u32) {
        if self.bmi2 {
            self.bytes(&[0xc4, 0xc3, 0xfb, 0xf0, 0xc2, 7]);
        } else {
            self.copy(RAX, R10);
            self.bytes(&[0x48, 0xc1, 0xe8, 7]);
        }
        self.code.push(0x25);
        self.dword(mask as i32);
    }

    /// `xor r10, gs:[rax + offset]`.
    pub fn xor_by_rax(&mut self, offset: usize) {
        self.bytes(&[0x65, 0x4c, 0x33, 0x90]);
        self.dword(offset as i32);
    }

    /// `mov r11, gs:[rax + offset]`.
    pub fn load_by_rax(&mut self, offset: usize) {
        self.bytes(&[0x65, 0x4c, 0x8b, 0x98]);
        self.dword(offset as i32);
    }

    /// `cmp r11, gs:[rax + offset]`.
    pub fn compare_r11_by_rax(&mut self, offset: usize) {
        self.bytes(&[0x65, 0x4c, 0x3b, 0x98]);
        self.dword(offset as i32);
    }

    /// `jmp r11`.
    pub fn jump_r11(&mut self) {
        self.bytes(&[0x41, 0xff, 0xe3]);
    }

    /// `cmp r10, gs:[r11 + offset]`.
    pub fn compare_indexed(&mut self, offset: usize) {
        self.indexed(0x3b, offset);
    }

    fn rax_indexed(&mut self, opcode: u8, offset: usize) {
        self.bytes(&[0x65, 0x49, opcode, 0x83]);
        self.dword(offset as i32);
    }

    /// `cmp rax, gs:[r11 + offset]`.
    pub fn compare_rax_indexed(&mut self, offset: usize) {
        self.rax_indexed(0x3b, offset);
    }

    /// `mov rax, gs:[r11 + offset]`.
    pub fn load_rax_indexed(&mut self, offset: usize) {
        self.rax_indexed(0x8b, offset);
    }

    /// The place of R10's way, in bytes, into R11; RAX is what the soft TLB says of its page.
    pub fn way_index(&mut self) {
        self.copy(R11, RAX);
        // xor r11, r10; shr r11, 12; imul r11d, r11d, SPREAD
        self.bytes(&[0x4d, 0x31, 0xd3, 0x49, 0xc1, 0xeb, 12, 0x45, 0x69, 0xdb]);
        self.dword(SPREAD as i32);
        // xor r11d, r10d
        self.bytes(&[0x45, 0x31, 0xd3]);
        self.mask_r11(WAYS as u32 - 1);
        // shl r11d, 5
        self.bytes(&[0x41, 0xc1, 0xe3, 5]);
    }

    /// `mov gs:[r11 * 8 + offset], rax`.
    pub fn store_rax_at_slot(&mut self, offset: usize) {
        self.bytes(&[0x65, 0x4a, 0x89, 0x04, 0xdd]);
        self.dword(offset as i32);
    }

    /// What the soft TLB says of a page, in RAX, becomes [`LOG_GLOBAL`] if the page is global, and zero otherwise.
    pub fn global_bit(&mut self) {
        // and eax, GLOBAL; shl eax
        self.code.push(0x25);
        self.dword(GLOBAL as i32);
        self.bytes(&[
            0xc1,
            0xe0,
            (LOG_GLOBAL.trailing_zeros() - GLOBAL.trailing_zeros()) as u8,
        ]);
    }

    /// Appends R11, `first` and what is in [`frame::SITE`] to the log of filled slots.
    pub fn log_slot(&mut self, first: u32) {
        let (count, slots) = (frame::LOGGED, frame::LOGGED_SLOTS);
        // or r11d, first; or r11d, gs:[SITE]
        self.bytes(&[0x41, 0x81, 0xcb]);
        self.dword(first as i32);
        self.absolute(&[], 0x40, &[0x0b], R11, frame::SITE);
        // mov eax, gs:[count]; inc dword gs:[count]
        self.absolute(&[], 0x40, &[0x8b], RAX, count);
        self.absolute(&[], 0x40, &[0xff], 0, count);
        // mov gs:[rax * 4 + slots], r11d
        self.bytes(&[0x65, 0x44, 0x89, 0x1c, 0x85]);
        self.dword(slots as i32);
    }

    /// `cmp r10, value`.
    pub fn compare_r10(&mut self, value: i32) {
        self.bytes(&[0x49, 0x81, 0xfa]);
        self.dword(value);
    }

    /// [`Assembler::compare_r10`] with a linear address.
    pub fn compare_linear(&mut self, value: i32) {
        self.compare_r10(value);
        self.note(Holds::Linear, Form::Signed);
    }

    /// `test r10b, value`.
    pub fn test_r10(&mut self, value: u8) {
        self.bytes(&[0x41, 0xf6, 0xc2, value]);
    }

    /// `test dword [r11], value`.
    pub fn test_at_r11(&mut self, value: u32) {
        self.bytes(&[0x41, 0xf7, 0x03]);
        self.dword(value as i32);
    }

    /// `cmp r10, r11`.
    pub fn compare_scratch(&mut self) {
        self.bytes(&[0x4d, 0x39, 0xda]);
    }

    /// `pext r11d, r10d, gs:[offset]`, or `movzx r11d, r10b`: an index that leaves the flags alone.
    pub fn jump_index(&mut self, offset: usize) {
        if !self.bmi2 {
            self.bytes(&[0x45, 0x0f, 0xb6, 0xda]);
            return;
        }
        // VEX.LZ.F3.0F38.W0 F5 /r with vvvv = r10.
        self.bytes(&[0x65, 0xc4, 0x62, 0x2a, 0xf5, 0x1c, 0x25]);
        self.dword(offset as i32);
    }

    /// `jmp gs:[r11 * 8 + offset]`.
    pub fn jump_indexed(&mut self, offset: usize) {
        self.bytes(&[0x65, 0x42, 0xff, 0x24, 0xdd]);
        self.dword(offset as i32);
    }

    /// `jcc` to somewhere.
    pub fn branch(&mut self, condition: u8) -> Hole {
        self.bytes(&[0x0f, 0x80 | condition]);
        self.hole()
    }

    /// `jmp` to somewhere.
    pub fn jump(&mut self) -> Hole {
        self.code.push(0xe9);
        self.hole()
    }

    /// `lea r11, [somewhere]`.
    pub fn address_r11(&mut self) -> Hole {
        self.bytes(&[0x4c, 0x8d, 0x1d]);
        self.hole()
    }

    fn hole(&mut self) -> Hole {
        let at = self.here();
        self.dword(0);
        Hole(at)
    }

    /// Lets a hole lead to an offset of this code.
    pub fn fill(&mut self, hole: Hole, target: usize) {
        let distance = target as i64 - (hole.0 as i64 + 4);
        self.code[hole.0..hole.0 + 4].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    /// Lets a hole lead to what comes next.
    pub fn land(&mut self, hole: Hole) {
        self.fill(hole, self.here());
    }

    /// Lets a hole, the last thing so far, lead to a stub.
    pub fn aim(&mut self, hole: Hole, address: u64) {
        debug_assert_eq!(hole.0 + 4, self.here());
        self.note(Holds::Stub, Form::Signed);
        let distance = address.wrapping_sub(self.start + hole.0 as u64 + 4);
        self.code[hole.0..hole.0 + 4].copy_from_slice(&(distance as i32).to_le_bytes());
    }

    /// `jmp` to a stub.
    pub fn jump_to(&mut self, address: u64) {
        let hole = self.jump();
        self.aim(hole, address);
    }

    /// Flags into the Core. R11 is lost.
    pub fn store_flags(&mut self) {
        self.copy(R11, RAX);
        self.flags_to_ax();
        self.store_ax(frame::ARITHMETIC);
        self.copy(RAX, R11);
    }

    /// `call` of an address.
    pub fn call(&mut self, address: u64) {
        self.code.push(0xe8);
        let hole = self.hole();
        self.aim(hole, address);
    }

    /// Flags into AX as LAHF and SETO give them.
    pub fn flags_to_ax(&mut self) {
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// The way back.
    pub fn flags_from_ax(&mut self) {
        self.bytes(&[0x04, 0x7f, 0x9e]);
    }
}
