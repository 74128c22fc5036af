//! A decoded instruction, ready to run.

use crate::core::Core;
use crate::fault::Exec;

/// Runs one decoded instruction. RIP is already at the next instruction; on `Err` the run loop takes it back.
pub type Handler = fn(&mut Core, &Insn) -> Exec;

/// Byte offset, in [`Core::regs`], of a slot that always reads zero: "no base", "no index".
pub const ZERO: u8 = 16 * 8;
/// Byte offset of RIP (of the next instruction), the base of RIP-relative operands.
pub const RIP: u8 = 17 * 8;

/// Effective addresses need more than `base + (index << scale) + disp`: a segment base or limit, 16- or 32-bit wrap.
pub const COMPLEX: u8 = 1;
/// The instruction has a LOCK prefix.
pub const LOCK: u8 = 2;
/// REP or REPE (F3).
pub const REP: u8 = 4;
/// REPNE (F2).
pub const REPNE: u8 = 8;
/// The address size is 32 bits (else, with [`COMPLEX`], see [`ADDRESS16`]).
pub const ADDRESS32: u8 = 16;
/// The address size is 16 bits.
pub const ADDRESS16: u8 = 32;
/// The operand size attribute is 16 bits.
pub const OPERAND16: u8 = 64;
/// REX.W or VEX.W.
pub const WIDE: u8 = 128;

/// One decoded instruction, 32 bytes. Register numbers are byte offsets into [`Core::regs`], so that AH is just another
/// offset; vector handlers use `reg`, `rm` and `imm` as they like.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Insn {
    /// What to run.
    pub exec: Handler,
    /// Immediate, sign- or zero-extended as the instruction wants it; a direct branch's displacement.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: i32,
    /// Bytes.
    pub length: u8,
    /// ModRM.reg (or the opcode's register).
    pub reg: u8,
    /// ModRM.rm as a register.
    pub rm: u8,
    /// Base register of the memory operand.
    pub base: u8,
    /// Index register of the memory operand.
    pub index: u8,
    /// log2 of the index' factor.
    pub scale: u8,
    /// Segment of the memory operand: 0-5 in the encoding's order; SS for instructions that use the stack.
    pub segment: u8,
    /// The flag constants of this module.
    pub flags: u8,
    /// The handler's own.
    pub extra: u32,
}

impl Insn {
    /// The bits of a register that addresses use.
    #[inline(always)]
    pub fn address_mask(&self) -> u64 {
        match self.flags & (ADDRESS16 | ADDRESS32) {
            0 => u64::MAX,
            ADDRESS32 => 0xffff_ffff,
            _ => 0xffff,
        }
    }
}

const _: () = assert!(size_of::<Insn>() == 32);
