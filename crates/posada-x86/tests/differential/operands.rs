//! Turns a form into an instruction with random operands.

use crate::layout::{CODE, DATA, PAGE};
use crate::rng::Rng;
use iced_x86::{Code, CodeSize, EncodingKind, Instruction, OpCodeOperandKind, OpKind, Register, RoundingControl};

/// Registers of a kind, but MMX's.
fn registers(bits: u32) -> u64 {
    if bits == 32 { 8 } else { 16 }
}

/// Vector registers of an encoding.
fn vectors(bits: u32, code: Code) -> u64 {
    match bits {
        32 => 8,
        _ if code.encoding() == EncodingKind::EVEX => 32,
        _ => 16,
    }
}

fn numbered(first: Register, number: u64) -> Register {
    Register::try_from(first as usize + number as usize).unwrap()
}

/// A general register of `size` bytes.
pub fn general(size: usize, number: u64) -> Register {
    use Register::{AX, EAX, RAX};
    match size {
        2 => numbered(AX, number),
        4 => numbered(EAX, number),
        _ => numbered(RAX, number),
    }
}

/// What the whole instruction agrees on.
pub struct Plan {
    /// Take the memory form where there is a choice.
    memory: bool,
    /// 64, or 32 for compatibility mode.
    bits: u32,
    /// Address size in bytes: 4 or 8, in compatibility mode 2 or 4.
    address_size: usize,
    /// Where a branch goes.
    taken: u64,
    /// Where a memory operand without a base register points.
    target: u64,
}

impl Plan {
    pub fn new(rng: &mut Rng, bits: u32, taken: u64, target: u64) -> Self {
        let size = bits as usize / 8;
        Self {
            bits,
            memory: rng.chance(60),
            address_size: if rng.chance(12) { size / 2 } else { size },
            taken,
            target,
        }
    }
}

fn memory(rng: &mut Rng, plan: &Plan, instruction: &mut Instruction, index: Option<Register>) {
    let size = plan.address_size;
    let vector = index.is_some();
    let shape = if vector { 2 + rng.below(2) } else { rng.below(10) };
    if size == 2 {
        return memory16(rng, instruction);
    }
    if shape == 0 && plan.bits == 64 {
        // RIP-relative: the encoder wants the target.
        instruction.set_memory_base(if size == 8 { Register::RIP } else { Register::EIP });
        instruction.set_memory_displ_size(size as u32);
        instruction.set_memory_displacement64(plan.target & 0x7fff_ffff);
        return;
    }
    let mut displacement = match rng.below(4) {
        0 => 0,
        1 => rng.range(-128, 128),
        2 => rng.range(-0x1000, 0x1000),
        _ => rng.range(i32::MIN.into(), i32::MAX.into()),
    };
    if shape == 1 {
        displacement = plan.target as i32 as i64;
    } else {
        let base = general(size, rng.below(registers(plan.bits)));
        instruction.set_memory_base(base);
        let pinned = [
            Register::RSP,
            Register::RBP,
            Register::RSI,
            Register::RDI,
            Register::RBX,
        ];
        if pinned.contains(&base.full_register()) && rng.chance(70) {
            displacement = rng.range(-128, 128);
        }
    }
    if instruction.code().encoding() == EncodingKind::EVEX && shape != 1 && rng.chance(30) {
        // Compressed to a byte.
        displacement = rng.range(-128, 128) * 64;
    }
    if vector || shape > 5 {
        let index = index.unwrap_or_else(|| {
            let count = registers(plan.bits);
            general(size, (5 + rng.below(count - 1)) % count)
        });
        instruction.set_memory_index(index);
        instruction.set_memory_index_scale(1 << rng.below(4));
    }
    if shape == 1 && instruction.memory_index() == Register::None || displacement as i8 as i64 != displacement {
        instruction.set_memory_displ_size(size as u32);
    } else {
        instruction.set_memory_displ_size(u32::from(displacement != 0 || rng.chance(20)));
    }
    instruction.set_memory_displacement64(if size == 4 {
        displacement as u32 as u64
    } else {
        displacement as u64
    });
}

/// 16-bit addressing: one of eight sums, none of which reaches the windows.
fn memory16(rng: &mut Rng, instruction: &mut Instruction) {
    use Register::{BP, BX, DI, None, SI};
    let (base, index) = rng.pick(&[
        (BX, SI),
        (BX, DI),
        (BP, SI),
        (BP, DI),
        (SI, None),
        (DI, None),
        (BP, None),
        (BX, None),
        (None, None),
    ]);
    instruction.set_memory_base(base);
    instruction.set_memory_index(index);
    let (size, displacement) = match rng.below(3) {
        _ if base == None => (2, rng.next() as u16),
        0 => (0, 0),
        1 => (1, rng.next() as i8 as u16),
        _ => (2, rng.next() as u16),
    };
    instruction.set_memory_displ_size(size);
    instruction.set_memory_displacement64(displacement.into());
}

fn immediate(instruction: &mut Instruction, operand: u32, kind: OpKind, value: u64) {
    instruction.set_op_kind(operand, kind);
    instruction.set_immediate_u64(operand, value);
}

/// Makes one; `None` for operands that user mode has not.
pub fn build(rng: &mut Rng, plan: &Plan, code: Code) -> Option<Instruction> {
    use OpCodeOperandKind as K;
    let info = code.op_code();
    let mut made = Instruction::new();
    made.set_code(code);
    made.set_code_size(if plan.bits == 32 {
        CodeSize::Code32
    } else {
        CodeSize::Code64
    });
    let mut immediates = 0;
    for (operand, &kind) in (0..).zip(info.op_kinds()) {
        let reg = |made: &mut Instruction, register| {
            made.set_op_kind(operand, OpKind::Register);
            made.set_op_register(operand, register);
        };
        let mut byte_value = rng.integer() as u8;
        if rng.chance(30) {
            byte_value &= 0x1f;
        }
        let number = rng.below(registers(plan.bits));
        let vector = rng.below(vectors(plan.bits, code));
        match kind {
            K::mem | K::mem_offs => {
                made.set_op_kind(operand, OpKind::Memory);
                if kind == K::mem_offs {
                    made.set_memory_displ_size(plan.address_size as u32);
                    made.set_memory_displacement64(plan.target & u64::MAX >> (64 - 8 * plan.address_size));
                } else {
                    memory(rng, plan, &mut made, None);
                }
            }
            K::mem_vsib32x | K::mem_vsib64x => {
                made.set_op_kind(operand, OpKind::Memory);
                memory(rng, plan, &mut made, Some(numbered(Register::XMM0, vector)));
            }
            K::mem_vsib32y | K::mem_vsib64y => {
                made.set_op_kind(operand, OpKind::Memory);
                memory(rng, plan, &mut made, Some(numbered(Register::YMM0, vector)));
            }
            K::mem_vsib32z | K::mem_vsib64z => {
                made.set_op_kind(operand, OpKind::Memory);
                memory(rng, plan, &mut made, Some(numbered(Register::ZMM0, vector)));
            }
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
                if plan.memory =>
            {
                made.set_op_kind(operand, OpKind::Memory);
                memory(rng, plan, &mut made, None);
            }
            // AL..R15L are the last 16 of 20 byte registers; the first eight of all are AL..BH.
            K::r8_or_mem | K::r8_reg | K::r8_opcode => {
                let count = if plan.bits == 32 { 8 } else { 20 };
                reg(&mut made, numbered(Register::AL, rng.below(count)));
            }
            K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
                reg(&mut made, general(2, number))
            }
            K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                reg(&mut made, general(4, number));
            }
            K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                reg(&mut made, general(8, number));
            }
            K::seg_reg => reg(&mut made, numbered(Register::ES, rng.below(6))),
            K::mm_or_mem | K::mm_reg | K::mm_rm => reg(&mut made, numbered(Register::MM0, number % 8)),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                reg(&mut made, numbered(Register::XMM0, vector));
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                reg(&mut made, numbered(Register::YMM0, vector));
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => {
                reg(&mut made, numbered(Register::ZMM0, vector));
            }
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => reg(&mut made, numbered(Register::K0, number % 8)),
            K::cr_reg => reg(&mut made, numbered(Register::CR0, rng.pick(&[0, 2, 3, 4, 8]))),
            K::dr_reg => reg(&mut made, numbered(Register::DR0, number % 8)),
            K::es => reg(&mut made, Register::ES),
            K::cs => reg(&mut made, Register::CS),
            K::ss => reg(&mut made, Register::SS),
            K::ds => reg(&mut made, Register::DS),
            K::fs => reg(&mut made, Register::FS),
            K::gs => reg(&mut made, Register::GS),
            K::al => reg(&mut made, Register::AL),
            K::cl => reg(&mut made, Register::CL),
            K::ax => reg(&mut made, Register::AX),
            K::dx => reg(&mut made, Register::DX),
            K::eax => reg(&mut made, Register::EAX),
            K::rax => reg(&mut made, Register::RAX),
            K::st0 => reg(&mut made, Register::ST0),
            K::sti_opcode => reg(&mut made, numbered(Register::ST0, number % 8)),
            K::imm8 => {
                let kind = if immediates == 0 {
                    OpKind::Immediate8
                } else {
                    OpKind::Immediate8_2nd
                };
                immediates += 1;
                immediate(&mut made, operand, kind, byte_value.into());
            }
            K::imm8_const_1 => immediate(&mut made, operand, OpKind::Immediate8, 1),
            K::imm8sex16 => immediate(&mut made, operand, OpKind::Immediate8to16, byte_value as i8 as u64),
            K::imm8sex32 => immediate(&mut made, operand, OpKind::Immediate8to32, byte_value as i8 as u64),
            K::imm8sex64 => immediate(&mut made, operand, OpKind::Immediate8to64, byte_value as i8 as u64),
            K::imm16 => {
                immediates += 1;
                // ENTER's and RET's counts: small enough to stay in the window, mostly.
                let mask = if info.is_stack_instruction() && rng.chance(90) {
                    0x3f8
                } else {
                    0xffff
                };
                immediate(&mut made, operand, OpKind::Immediate16, rng.integer() & mask);
            }
            K::imm32 => immediate(&mut made, operand, OpKind::Immediate32, rng.integer() & 0xffff_ffff),
            K::imm32sex64 => immediate(&mut made, operand, OpKind::Immediate32to64, rng.integer() as i32 as u64),
            K::imm64 => immediate(&mut made, operand, OpKind::Immediate64, rng.integer()),
            K::seg_rSI => made.set_op_kind(
                operand,
                match plan.address_size {
                    2 => OpKind::MemorySegSI,
                    4 => OpKind::MemorySegESI,
                    _ => OpKind::MemorySegRSI,
                },
            ),
            K::es_rDI => made.set_op_kind(
                operand,
                match plan.address_size {
                    2 => OpKind::MemoryESDI,
                    4 => OpKind::MemoryESEDI,
                    _ => OpKind::MemoryESRDI,
                },
            ),
            K::seg_rDI => made.set_op_kind(
                operand,
                match plan.address_size {
                    2 => OpKind::MemorySegDI,
                    4 => OpKind::MemorySegEDI,
                    _ => OpKind::MemorySegRDI,
                },
            ),
            K::seg_rBX_al => {
                made.set_op_kind(operand, OpKind::Memory);
                made.set_memory_base(general(plan.address_size, 3));
                made.set_memory_index(Register::AL);
            }
            K::br16_1 | K::br16_2 => {
                made.set_op_kind(operand, OpKind::NearBranch16);
                made.set_near_branch16(plan.taken as u16);
            }
            K::br32_1 | K::br32_4 => {
                made.set_op_kind(operand, OpKind::NearBranch32);
                made.set_near_branch32(plan.taken as u32);
            }
            K::br64_1 | K::br64_4 => {
                made.set_op_kind(operand, OpKind::NearBranch64);
                made.set_near_branch64(plan.taken);
            }
            _ => return None,
        }
    }
    let stored = made.op0_kind() == OpKind::Memory;
    let accesses = (0..made.op_count()).any(|operand| made.op_kind(operand) == OpKind::Memory);
    if info.can_use_op_mask_register() && (info.require_op_mask_register() || rng.chance(70)) {
        made.set_op_mask(numbered(Register::K1, rng.below(7)));
        made.set_zeroing_masking(info.can_use_zeroing_masking() && !stored && rng.chance(40));
    }
    if accesses {
        made.set_is_broadcast(info.can_broadcast() && rng.chance(40));
    } else if info.can_use_rounding_control() && rng.chance(50) {
        use RoundingControl::{RoundDown, RoundToNearest, RoundTowardZero, RoundUp};
        made.set_rounding_control(rng.pick(&[RoundToNearest, RoundDown, RoundUp, RoundTowardZero]));
    } else if info.can_suppress_all_exceptions() && rng.chance(50) {
        made.set_suppress_all_exceptions(true);
    }
    if info.can_use_lock_prefix() && stored && rng.chance(25) {
        made.set_has_lock_prefix(true);
    }
    if code.mnemonic() != iced_x86::Mnemonic::INVALID && made.is_string_instruction() {
        match rng.below(4) {
            0 if info.can_use_rep_prefix() => made.set_has_rep_prefix(true),
            1 if info.can_use_repne_prefix() => made.set_has_repne_prefix(true),
            2 if info.can_use_rep_prefix() => made.set_has_repe_prefix(true),
            _ => {}
        }
    }
    if rng.chance(15) {
        use Register::{CS, DS, ES, FS, GS, SS};
        made.set_segment_prefix(rng.pick(&[FS, GS, FS, GS, FS, GS, ES, CS, SS, DS]));
    }
    Some(made)
}

/// An address for an operand of `size` bytes that must be writable to succeed: mostly in the window, with every kind of
/// edge among the rest.
pub fn target(rng: &mut Rng, size: u64) -> u64 {
    let size = size.clamp(1, 4096);
    let page = |number: u64| DATA + number * PAGE;
    let straddle = |rng: &mut Rng, boundary: u64| {
        boundary
            - if size > 1 {
                1 + rng.below(size - 1)
            } else {
                rng.below(2)
            }
    };
    match rng.below(100) {
        0..70 if size > 1024 => page(1) + 64 * rng.below((2 * PAGE - size) / 64),
        0..50 => page(1) + 0x400 + 64 * rng.below(0x60),
        50..70 => page(1) + 0x400 + rng.below(0x1800),
        // Between two writable pages, from there into the one that is read only, and into nothing.
        70..80 => straddle(rng, page(2)),
        80..83 => straddle(rng, page(3)),
        83..85 => straddle(rng, page(4)),
        85..87 => straddle(rng, page(1)),
        87..89 => straddle(rng, page(6)),
        // The last bytes before nothing: no fault.
        89..91 => page(6) - size,
        91..94 => page(3) + 0x400 + 16 * rng.below(0x40),
        94..96 => page(4) + rng.below(PAGE),
        96 => CODE + rng.below(PAGE),
        97 => rng.next() >> 1 | 1 << 62,
        98 => 0x0000_8000_0000_0000 - rng.below(2 * size),
        _ => rng.next(),
    }
}
