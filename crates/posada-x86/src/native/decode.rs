//! From bytes to an [`Insn`].

use super::arena::arena;
use super::form::{key, opcode, uses_mxcsr};
use super::{Decoded, SLOTS, features, gather, masked, run};
use crate::core::{CodeSize, Core, seg};
use crate::insn::{ADDRESS16, ADDRESS32, COMPLEX, Handler, Insn, RIP, WIDE, ZERO};
use crate::xsave;
use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpKind,
    Register,
};

/// Decodes one vector, x87, MMX or crypto instruction, or one of POPCNT, LZCNT, TZCNT, BMI, ADX, MOVBE, CRC32, MOVNTI,
/// CLFLUSH and the state-saving ones. `bytes` start with its prefixes and go on for its 15 bytes or to the end of what
/// can be fetched. `None`: not one of these, not whole, or of a feature that CPUID does not show (#UD).
pub fn decode(core: &mut Core, bytes: &[u8]) -> Option<Insn> {
    let slot = slot(bytes);
    if let Some(known) = &core.native.decoded[slot] {
        let length = usize::from(known.insn.length);
        if known.code_size == core.code_size && bytes.get(..length) == Some(&known.bytes[..length]) {
            return Some(known.insn);
        }
    }
    let insn = decode_anew(core.code_size, bytes)?;
    let length = usize::from(insn.length);
    let mut decoded = Decoded {
        bytes: [0; 15],
        code_size: core.code_size,
        insn,
    };
    decoded.bytes[..length].copy_from_slice(&bytes[..length]);
    core.native.decoded[slot] = Some(decoded);
    Some(insn)
}

fn slot(bytes: &[u8]) -> usize {
    let mut first = [0; 8];
    let length = bytes.len().min(8);
    first[..length].copy_from_slice(&bytes[..length]);
    // Fibonacci hashing: the high bits depend on all.
    (u64::from_le_bytes(first).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % SLOTS
}

fn decode_anew(code_size: CodeSize, bytes: &[u8]) -> Option<Insn> {
    let bits = match code_size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let instruction = Decoder::new(bits, bytes, DecoderOptions::NONE).decode();
    if instruction.is_invalid() || instruction.has_lock_prefix() {
        return None;
    }
    let mut insn = Insn {
        exec: nothing,
        imm: 0,
        disp: 0,
        length: instruction.len() as u8,
        reg: 0,
        rm: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        segment: seg::DS as u8,
        flags: 0,
        extra: 0,
    };
    address(&instruction, code_size, &mut insn);
    if is_prefetch(&instruction) {
        return Some(insn);
    }
    if instruction.mnemonic() == Mnemonic::Wait {
        insn.exec = run::wait;
        return Some(insn);
    }
    if !instruction
        .cpuid_features()
        .iter()
        .all(|&feature| features::shown(feature))
    {
        return None;
    }
    if let Some((exec, flags)) = special(&instruction) {
        insn.exec = exec;
        insn.flags |= flags;
        return Some(insn);
    }
    if masked::decode(&instruction, &mut insn) || gather::decode(&instruction, &mut insn) {
        return Some(insn);
    }
    if !ours(&instruction) {
        return None;
    }
    let key = key(&instruction)?;
    insn.extra = opcode(bytes).into();
    match arena().ok()?.form(key) {
        Some(form) => {
            insn.exec = run::handler(form);
            insn.imm = std::ptr::from_ref(form) as u64;
        }
        None => {
            insn.exec = run::once;
            insn.imm = key;
        }
    }
    Some(insn)
}

/// True for what stubs run: all that uses vector, MMX or x87 registers, and some integer instructions.
fn ours(instruction: &Instruction) -> bool {
    use CpuidFeature as F;
    let features = instruction.cpuid_features();
    let unit = [F::FPU, F::FPU287, F::FPU387, F::MMX];
    let integer = [F::POPCNT, F::LZCNT, F::BMI1, F::BMI2, F::ADX, F::MOVBE];
    if features
        .iter()
        .any(|feature| unit.contains(feature) || integer.contains(feature))
    {
        return true;
    }
    let mnemonic = instruction.mnemonic();
    if matches!(mnemonic, Mnemonic::Crc32 | Mnemonic::Movnti) || uses_mxcsr(mnemonic) {
        return true;
    }
    InstructionInfoFactory::new()
        .info(instruction)
        .used_registers()
        .iter()
        .any(|used| {
            let register = used.register();
            register.is_vector_register() || register.is_k() || register.is_mm() || register.is_st()
        })
}

/// Fills in where the memory operand is.
fn address(instruction: &Instruction, code_size: CodeSize, insn: &mut Insn) {
    let operands = 0..instruction.op_count();
    let kind = operands.map(|operand| instruction.op_kind(operand)).find(|&kind| {
        matches!(
            kind,
            OpKind::Memory | OpKind::MemorySegDI | OpKind::MemorySegEDI | OpKind::MemorySegRDI
        )
    });
    let Some(kind) = kind else {
        return;
    };
    let (base, index) = match kind {
        OpKind::MemorySegDI => (Register::DI, Register::None),
        OpKind::MemorySegEDI => (Register::EDI, Register::None),
        OpKind::MemorySegRDI => (Register::RDI, Register::None),
        _ => (instruction.memory_base(), instruction.memory_index()),
    };
    let size = [base, index]
        .into_iter()
        .find(|register| register.is_gpr() || register.is_ip())
        .map_or(instruction.memory_displ_size() as usize, Register::size);
    if kind == OpKind::Memory {
        insn.disp = instruction.memory_displacement64() as i32;
    }
    if base.is_ip() {
        // Decoded as if at 0, the displacement counts from the instruction's start.
        insn.base = RIP;
        insn.disp = insn.disp.wrapping_sub(i32::from(insn.length));
    } else if base != Register::None {
        insn.base = base.number() as u8 * 8;
    }
    if index.is_gpr() {
        insn.index = index.number() as u8 * 8;
    }
    insn.scale = instruction.memory_index_scale().trailing_zeros() as u8;
    let segment = (instruction.memory_segment() as u32 - Register::ES as u32) as u8;
    insn.segment = match (code_size, base) {
        // Only prefixes for FS and GS count here.
        (CodeSize::Bits64, Register::RSP | Register::RBP | Register::ESP | Register::EBP) if segment < 4 => {
            seg::SS as u8
        }
        (CodeSize::Bits64, _) if segment < 4 => seg::DS as u8,
        _ => segment,
    };
    insn.flags |= match size {
        2 => COMPLEX | ADDRESS16,
        4 => COMPLEX | ADDRESS32,
        _ => 0,
    };
    if code_size != CodeSize::Bits64 || usize::from(insn.segment) >= seg::FS {
        insn.flags |= COMPLEX;
    }
}

/// Prefetches: what a processor does not know of them does nothing either.
fn is_prefetch(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        instruction.mnemonic(),
        M::Prefetch | M::Prefetchw | M::Prefetchwt1 | M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2
    )
}

/// Instructions with a handler of their own, and the flags it wants.
fn special(instruction: &Instruction) -> Option<(Handler, u8)> {
    use Mnemonic as M;
    Some(match instruction.mnemonic() {
        M::Vzeroupper => (run::zero_upper, 0),
        M::Vzeroall => (run::zero_all, 0),
        M::Lfence | M::Sfence | M::Mfence => (run::fence, 0),
        M::Clflush => (run::flush_line, 0),
        M::Ldmxcsr | M::Vldmxcsr | M::Stmxcsr | M::Vstmxcsr => {
            let vex = instruction.encoding() == EncodingKind::VEX;
            let load = matches!(instruction.mnemonic(), M::Ldmxcsr | M::Vldmxcsr);
            let handler: Handler = match (load, vex) {
                (true, false) => xsave::ldmxcsr::<false>,
                (true, true) => xsave::ldmxcsr::<true>,
                (false, false) => xsave::stmxcsr::<false>,
                (false, true) => xsave::stmxcsr::<true>,
            };
            (handler, 0)
        }
        M::Fxsave => (xsave::fxsave, 0),
        M::Fxsave64 => (xsave::fxsave, WIDE),
        M::Fxrstor => (xsave::fxrstor, 0),
        M::Fxrstor64 => (xsave::fxrstor, WIDE),
        M::Xsave => (xsave::xsave, 0),
        M::Xsave64 => (xsave::xsave, WIDE),
        M::Xsaveopt => (xsave::xsaveopt, 0),
        M::Xsaveopt64 => (xsave::xsaveopt, WIDE),
        M::Xsavec => (xsave::xsavec, 0),
        M::Xsavec64 => (xsave::xsavec, WIDE),
        M::Xsaves => (xsave::xsaves, 0),
        M::Xsaves64 => (xsave::xsaves, WIDE),
        M::Xrstor => (xsave::xrstor, 0),
        M::Xrstor64 => (xsave::xrstor, WIDE),
        M::Xrstors => (xsave::xrstors, 0),
        M::Xrstors64 => (xsave::xrstors, WIDE),
        M::Xgetbv => (xsave::xgetbv, 0),
        M::Xsetbv => (xsave::xsetbv, 0),
        _ => return None,
    })
}

fn nothing(_: &mut Core, _: &Insn) -> crate::fault::Exec {
    Ok(())
}
