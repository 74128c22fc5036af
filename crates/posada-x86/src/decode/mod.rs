//! From bytes to [`Insn`]s: prefixes, ModRM and the choice of the handler (Intel SDM 2, chapter 2 and appendix A). Integer and
//! system instructions are decoded here; the vector and x87 tail is [`crate::native`]'s.

mod one_byte;
mod operands;
#[cfg(test)]
mod tests;
mod two_byte;

use crate::core::{CodeSize, Core};
use crate::insn::{ADDRESS16, ADDRESS32, COMPLEX, Handler, Insn, LOCK, OPERAND16, REP, REPNE, RIP, WIDE, ZERO};
use crate::{native, transfer};

/// The longest instruction, in bytes.
pub const MAX_LENGTH: usize = 15;

/// What the bytes are.
#[derive(Clone, Copy)]
pub struct Decoded {
    /// The instruction.
    pub insn: Insn,
    /// It may change RIP, the mode or what is mapped: nothing after it belongs to its block.
    pub ends_block: bool,
}

/// The bytes end inside the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incomplete;

type Step<T = ()> = Result<T, Incomplete>;

/// Decodes the instruction at the start of `bytes`, in the current code size. Bytes that are no instruction become one that
/// raises #UD, or #GP if there are too many.
///
/// # Errors
/// [`Incomplete`] when fewer than [`MAX_LENGTH`] bytes are given and they end inside the instruction.
pub fn decode(core: &mut Core, bytes: &[u8]) -> Result<Decoded, Incomplete> {
    let bytes = &bytes[..bytes.len().min(MAX_LENGTH)];
    let mut decoder = Decoder::new(core, bytes);
    let result = decoder.run();
    let mut decoded = Decoded {
        insn: decoder.insn,
        ends_block: decoder.ends_block,
    };
    match result {
        Ok(()) => {}
        Err(Incomplete) if bytes.len() < MAX_LENGTH => return Err(Incomplete),
        Err(Incomplete) => {
            decoded.insn.exec = transfer::too_long;
            decoded.ends_block = true;
        }
    }
    if decoded.insn.length == 0 {
        decoded.insn.length = decoder.at as u8;
    }
    Ok(decoded)
}

struct Decoder<'a> {
    core: &'a mut Core,
    bytes: &'a [u8],
    at: usize,
    size: CodeSize,
    /// REX prefix, 0 without one.
    rex: u8,
    operand_prefix: bool,
    address_prefix: bool,
    segment: Option<u8>,
    /// ModRM's fields; `reg` and `rm` with REX.
    modrm: u8,
    reg: u8,
    rm: u8,
    /// LOCK means something here.
    lockable: bool,
    ends_block: bool,
    insn: Insn,
}

impl<'a> Decoder<'a> {
    fn new(core: &'a mut Core, bytes: &'a [u8]) -> Self {
        let size = core.code_size;
        Self {
            core,
            bytes,
            at: 0,
            size,
            rex: 0,
            operand_prefix: false,
            address_prefix: false,
            segment: None,
            modrm: 0,
            reg: 0,
            rm: 0,
            lockable: false,
            ends_block: false,
            insn: Insn {
                exec: transfer::undefined,
                imm: 0,
                disp: 0,
                length: 0,
                reg: 0,
                rm: 0,
                base: ZERO,
                index: ZERO,
                scale: 0,
                segment: 3,
                flags: 0,
                extra: 0,
            },
        }
    }

    fn run(&mut self) -> Step {
        let opcode = self.prefixes()?;
        self.attributes();
        if opcode == 0x0f {
            let opcode = self.byte()?;
            self.two_byte(opcode)?;
        } else {
            self.one_byte(opcode)?;
        }
        if self.insn.flags & LOCK != 0 && !self.lockable {
            self.undefined();
        }
        Ok(())
    }

    /// Reads prefixes up to and with the first opcode byte.
    fn prefixes(&mut self) -> Step<u8> {
        loop {
            let byte = self.byte()?;
            match byte {
                // In 64-bit mode these neither choose a segment nor cancel FS and GS.
                0x26 | 0x2e | 0x36 | 0x3e if self.bits64() => {}
                0x26 | 0x2e | 0x36 | 0x3e => self.segment = Some(byte >> 3 & 3),
                0x64 | 0x65 => self.segment = Some(byte & 7),
                0x66 => self.operand_prefix = true,
                0x67 => self.address_prefix = true,
                0xf0 => self.insn.flags |= LOCK,
                0xf2 => self.insn.flags = self.insn.flags & !REP | REPNE,
                0xf3 => self.insn.flags = self.insn.flags & !REPNE | REP,
                0x40..=0x4f if self.size == CodeSize::Bits64 => {
                    self.rex = byte;
                    continue;
                }
                _ => return Ok(byte),
            }
            // A REX prefix counts only right before the opcode.
            self.rex = 0;
        }
    }

    /// Sets the flags that follow from prefixes and code size.
    fn attributes(&mut self) {
        let flags = &mut self.insn.flags;
        if self.rex & 8 != 0 {
            *flags |= WIDE;
        } else if self.operand_prefix != (self.size == CodeSize::Bits16) {
            *flags |= OPERAND16;
        }
        *flags |= match (self.size, self.address_prefix) {
            (CodeSize::Bits64, false) => 0,
            (CodeSize::Bits64, true) | (CodeSize::Bits32, false) | (CodeSize::Bits16, true) => ADDRESS32,
            (CodeSize::Bits32, true) | (CodeSize::Bits16, false) => ADDRESS16,
        };
        if self.size != CodeSize::Bits64 || self.address_prefix || self.segment.is_some() {
            *flags |= COMPLEX;
        }
        if let Some(segment) = self.segment {
            self.insn.segment = segment;
        }
    }

    fn bits64(&self) -> bool {
        self.size == CodeSize::Bits64
    }

    fn byte(&mut self) -> Step<u8> {
        let byte = *self.bytes.get(self.at).ok_or(Incomplete)?;
        self.at += 1;
        Ok(byte)
    }

    fn little_endian(&mut self, count: usize) -> Step<u64> {
        let bytes = self.bytes.get(self.at..self.at + count).ok_or(Incomplete)?;
        self.at += count;
        Ok(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    }

    /// A sign-extended immediate of 1, 2 or 4 bytes.
    fn signed(&mut self, count: usize) -> Step<u64> {
        let value = self.little_endian(count)?;
        let shift = 64 - 8 * count as u32;
        Ok(((value << shift) as i64 >> shift) as u64)
    }

    /// The operand size attribute in bytes.
    fn operand(&self) -> usize {
        match self.insn.flags & (WIDE | OPERAND16) {
            0 => 4,
            OPERAND16 => 2,
            _ => 8,
        }
    }

    /// The operand size of instructions that are 64-bit by default in 64-bit mode.
    fn stack_operand(&self) -> usize {
        match (self.bits64(), self.insn.flags & OPERAND16 != 0) {
            (true, false) => 8,
            (_, true) => 2,
            (false, false) => 4,
        }
    }

    /// An immediate as ALU instructions have it: of the operand's size, but at most 4 bytes, sign-extended.
    fn immediate(&mut self, size: usize) -> Step {
        self.insn.imm = self.signed(size.min(4))?;
        Ok(())
    }

    /// Register number `number` as an operand of `size` bytes.
    fn register(&self, number: u8, size: usize) -> u8 {
        if size == 1 && self.rex == 0 && (4..8).contains(&number) {
            (number - 4) * 8 + 1
        } else {
            number * 8
        }
    }

    fn is_memory(&self) -> bool {
        self.modrm < 0xc0
    }

    /// ModRM.reg without REX.R, for opcode groups.
    fn group(&self) -> u8 {
        self.modrm >> 3 & 7
    }

    /// Reads ModRM, SIB and displacement, and sets the operands for register operands of `size` bytes.
    fn modrm(&mut self, size: usize) -> Step {
        self.read_modrm()?;
        self.insn.reg = self.register(self.reg, size);
        if !self.is_memory() {
            self.insn.rm = self.register(self.rm, size);
        }
        Ok(())
    }

    fn read_modrm(&mut self) -> Step {
        self.modrm = self.byte()?;
        let low = self.modrm & 7;
        self.reg = self.group() | (self.rex & 4) << 1;
        self.rm = low | (self.rex & 1) << 3;
        if !self.is_memory() {
            return Ok(());
        }
        if self.insn.flags & ADDRESS16 != 0 {
            return self.memory16(low);
        }
        let mode = self.modrm >> 6;
        let mut base = self.rm;
        let mut has_base = true;
        if low == 4 {
            let sib = self.byte()?;
            let index = sib >> 3 & 7 | (self.rex & 2) << 2;
            if index != 4 {
                self.insn.index = index * 8;
                self.insn.scale = sib >> 6;
            }
            base = sib & 7 | (self.rex & 1) << 3;
            has_base = !(sib & 7 == 5 && mode == 0);
        } else if low == 5 && mode == 0 {
            has_base = false;
            if self.bits64() {
                self.insn.base = RIP;
            }
        }
        if has_base {
            self.insn.base = base * 8;
            if matches!(base, 4 | 5) && self.segment.is_none() {
                self.insn.segment = 2;
            }
        }
        self.insn.disp = match mode {
            1 => self.signed(1)? as i32,
            2 => self.signed(4)? as i32,
            _ if !has_base => self.signed(4)? as i32,
            _ => 0,
        };
        Ok(())
    }

    /// Table 2-1: 16-bit addressing.
    fn memory16(&mut self, low: u8) -> Step {
        const BX: u8 = 24;
        const BP: u8 = 40;
        const SI: u8 = 48;
        const DI: u8 = 56;
        let mode = self.modrm >> 6;
        let (base, index) = match low {
            0 => (BX, SI),
            1 => (BX, DI),
            2 => (BP, SI),
            3 => (BP, DI),
            4 => (SI, ZERO),
            5 => (DI, ZERO),
            6 if mode == 0 => (ZERO, ZERO),
            6 => (BP, ZERO),
            _ => (BX, ZERO),
        };
        (self.insn.base, self.insn.index) = (base, index);
        if base == BP && self.segment.is_none() {
            self.insn.segment = 2;
        }
        self.insn.disp = match mode {
            1 => self.signed(1)? as i32,
            2 => self.signed(2)? as i32,
            _ if base == ZERO => self.signed(2)? as i32,
            _ => 0,
        };
        Ok(())
    }

    fn set(&mut self, exec: Handler) {
        self.insn.exec = exec;
    }

    /// A handler that may change RIP, the mode, or what is mapped.
    fn last(&mut self, exec: Handler) {
        self.insn.exec = exec;
        self.ends_block = true;
    }

    fn undefined(&mut self) {
        self.last(transfer::undefined);
    }

    /// Leaves the instruction to [`native`], whole.
    fn native(&mut self) -> Step {
        match native::decode(self.core, self.bytes) {
            Some(insn) if self.insn.flags & LOCK == 0 => self.insn = insn,
            // Cut short, perhaps.
            None if self.bytes.len() < MAX_LENGTH => return Err(Incomplete),
            _ => self.undefined(),
        }
        Ok(())
    }
}
