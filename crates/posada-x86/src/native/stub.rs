//! Stubs: host code that takes an instruction's registers from a [`Core`], runs the instruction, and puts them back.

use super::Native;
use super::form::Uses;
use crate::core::{Core, VectorState};
use iced_x86::{Code, Encoder, IcedError, Instruction, MemoryOperand, Register};
use std::mem::offset_of;

/// A stub, not yet placed.
pub struct Assembled {
    /// Position-independent code.
    pub code: Vec<u8>,
    /// Offset of the guest's instruction.
    pub at: u32,
}

/// Offset of a part of the vector state in a core.
const fn vector(part: usize) -> usize {
    offset_of!(Core, vector) + part
}

const YMM: usize = vector(offset_of!(VectorState, ymm));
const ZMM_HIGH: usize = vector(offset_of!(VectorState, zmm_high));
const ZMM: usize = vector(offset_of!(VectorState, zmm));
const OPMASK: usize = vector(offset_of!(VectorState, opmask));
const FX: usize = vector(offset_of!(VectorState, fx));
const MXCSR: usize = vector(offset_of!(VectorState, mxcsr));
const HOST_MXCSR: usize = offset_of!(Core, native) + offset_of!(Native, host_mxcsr);
const SEEN_MXCSR: usize = offset_of!(Core, native) + offset_of!(Native, seen_mxcsr);
const FLAGS: usize = offset_of!(Core, arithmetic);

/// Registers that a called function must keep.
const KEPT: [Register; 6] = [
    Register::RBX,
    Register::RBP,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

struct Assembler {
    encoder: Encoder,
    length: usize,
    core: Register,
}

type Emit = Result<(), IcedError>;

impl Assembler {
    fn emit(&mut self, instruction: Result<Instruction, IcedError>) -> Emit {
        self.length += self.encoder.encode(&instruction?, 0)?;
        Ok(())
    }

    /// A place in the core.
    fn place(&self, offset: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(self.core, offset as i64)
    }

    fn plain(&mut self, code: Code) -> Emit {
        self.emit(Ok(Instruction::with(code)))
    }

    /// An instruction whose only operand is a place in the core.
    fn at(&mut self, code: Code, offset: usize) -> Emit {
        self.emit(Instruction::with1(code, self.place(offset)))
    }

    fn load(&mut self, code: Code, register: Register, offset: usize) -> Emit {
        self.emit(Instruction::with2(code, register, self.place(offset)))
    }

    fn store(&mut self, code: Code, offset: usize, register: Register) -> Emit {
        self.emit(Instruction::with2(code, self.place(offset), register))
    }

    fn copy(&mut self, to: Register, from: Register) -> Emit {
        if to == from {
            return Ok(());
        }
        self.emit(Instruction::with2(Code::Mov_r64_rm64, to, from))
    }

    /// Emits what `body` emits, jumped over if the comparison before came out equal.
    fn unless_equal(&mut self, body: impl FnOnce(&mut Self) -> Emit) -> Emit {
        // JE rel8.
        self.encoder.write_u8(0x74);
        self.encoder.write_u8(0);
        self.length += 2;
        let start = self.length;
        body(self)?;
        let mut code = self.encoder.take_buffer();
        code[start - 1] = (self.length - start) as u8;
        self.encoder.set_buffer(code);
        Ok(())
    }

    /// Gives the guest its MXCSR. LDMXCSR is slow: not if it is there already.
    fn enter_mxcsr(&mut self) -> Emit {
        self.at(Code::Stmxcsr_m32, SEEN_MXCSR)?;
        self.load(Code::Mov_r32_rm32, Register::EAX, SEEN_MXCSR)?;
        self.load(Code::Cmp_r32_rm32, Register::EAX, MXCSR)?;
        self.unless_equal(|a| a.at(Code::Ldmxcsr_m32, MXCSR))
    }

    /// Keeps the guest's MXCSR and gives the host its own, whose sticky flags are of no interest.
    fn leave_mxcsr(&mut self) -> Emit {
        self.at(Code::Stmxcsr_m32, MXCSR)?;
        self.load(Code::Mov_r32_rm32, Register::EAX, MXCSR)?;
        self.emit(Instruction::with2(Code::And_rm32_imm8, Register::EAX, -64))?;
        self.load(Code::Cmp_r32_rm32, Register::EAX, HOST_MXCSR)?;
        self.unless_equal(|a| a.at(Code::Ldmxcsr_m32, HOST_MXCSR))
    }

    fn load_vector(&mut self, uses: &Uses, number: u32) -> Emit {
        use Register as R;
        let at = number as usize;
        if at >= 16 {
            return self.load(
                Code::EVEX_Vmovups_zmm_k1z_zmmm512,
                R::ZMM0 + number,
                ZMM + (at - 16) * 64,
            );
        }
        let (code, register) = match (uses.vex || uses.evex, uses.wide) {
            (false, _) => (Code::Movups_xmm_xmmm128, R::XMM0),
            (true, false) => (Code::VEX_Vmovups_xmm_xmmm128, R::XMM0),
            (true, true) => (Code::VEX_Vmovups_ymm_ymmm256, R::YMM0),
        };
        self.load(code, register + number, YMM + at * 32)?;
        if uses.zmm {
            let (register, high) = (R::ZMM0 + number, self.place(ZMM_HIGH + at * 32));
            let code = Code::EVEX_Vinsertf64x4_zmm_k1z_zmm_ymmm256_imm8;
            self.emit(Instruction::with4(code, register, register, high, 1))?;
        }
        Ok(())
    }

    /// Legacy encodings keep the upper half, VEX encodings clear it, and what is above 255: see [`Form::clears`].
    ///
    /// [`Form::clears`]: super::form::Form::clears
    fn store_vector(&mut self, uses: &Uses, number: u32) -> Emit {
        use Register as R;
        let at = number as usize;
        if at >= 16 {
            return self.store(
                Code::EVEX_Vmovups_zmmm512_k1z_zmm,
                ZMM + (at - 16) * 64,
                R::ZMM0 + number,
            );
        }
        let (code, register) = if uses.vex || uses.evex {
            (Code::VEX_Vmovups_ymmm256_ymm, R::YMM0)
        } else {
            (Code::Movups_xmmm128_xmm, R::XMM0)
        };
        self.store(code, YMM + at * 32, register + number)?;
        if uses.zmm {
            let (register, high) = (R::ZMM0 + number, self.place(ZMM_HIGH + at * 32));
            let code = Code::EVEX_Vextractf64x4_ymmm256_k1z_zmm_imm8;
            self.emit(Instruction::with3(code, high, register, 1))?;
        }
        Ok(())
    }

    /// Gives the host its state back and returns `result`.
    fn leave(&mut self, uses: &Uses, saved: &[Register], result: i32) -> Emit {
        if uses.x87 {
            self.plain(Code::Fninit)?;
        }
        if uses.wide {
            self.plain(Code::VEX_Vzeroupper)?;
        }
        self.emit(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, result))?;
        for &register in saved.iter().rev() {
            self.emit(Instruction::with1(Code::Pop_r64, register))?;
        }
        self.plain(Code::Retnq)
    }
}

fn gpr(number: u32) -> Register {
    Register::RAX + number
}

/// Makes the stub of an instruction with RSI as the base of its memory operand, if it has one.
pub fn assemble(instruction: Instruction, uses: &Uses) -> Option<Assembled> {
    try_assemble(instruction, uses).ok()
}

fn try_assemble(mut instruction: Instruction, uses: &Uses) -> Result<Assembled, IcedError> {
    let taken = |register: Register| uses.gprs.iter().any(|used| gpr(used.host) == register);
    let free = |candidates: [Register; 5]| candidates.into_iter().find(|&register| !taken(register));
    use Register as R;
    let core = free([R::RDI, R::R8, R::R9, R::R10, R::R11]).unwrap_or(R::RDI);
    let memory = [R::RSI, R::R11, R::R10, R::R9, R::R8]
        .into_iter()
        .find(|&register| !taken(register) && register != core)
        .unwrap_or(R::RSI);
    let mut a = Assembler {
        encoder: Encoder::new(64),
        length: 0,
        core,
    };
    let saved: Vec<Register> = KEPT.into_iter().filter(|&register| taken(register)).collect();
    for &register in &saved {
        a.emit(Instruction::with1(Code::Push_r64, register))?;
    }
    a.copy(core, R::RDI)?;
    if uses.memory {
        a.copy(memory, R::RSI)?;
        instruction.set_memory_base(memory);
    }

    if uses.x87 {
        a.at(Code::Fxrstor64_m512byte, FX)?;
    }
    for &(number, _) in &uses.vectors {
        a.load_vector(uses, number)?;
    }
    for &(number, _) in &uses.opmasks {
        a.load(Code::VEX_Kmovq_kr_km64, R::K0 + number, OPMASK + number as usize * 8)?;
    }
    if uses.mxcsr {
        a.enter_mxcsr()?;
    }
    if uses.reads_flags {
        a.load(Code::Movzx_r32_rm16, R::EAX, FLAGS)?;
        // OF from 0 or 1, then the rest from AH.
        a.emit(Instruction::with2(Code::Add_AL_imm8, R::AL, 0x7f))?;
        a.plain(Code::Sahf)?;
    }
    for used in &uses.gprs {
        a.load(Code::Mov_r64_rm64, gpr(used.host), used.guest as usize * 8)?;
    }
    // NOP DWORD PTR [RAX + disp32]: the displacement is the way to the other exit, see `trap`.
    if uses.mxcsr {
        for byte in [0x0f, 0x1f, 0x80, 0, 0, 0, 0] {
            a.encoder.write_u8(byte);
        }
        a.length += 7;
    }
    let at = a.length;
    a.emit(Ok(instruction))?;

    for used in uses.gprs.iter().filter(|used| used.written) {
        a.store(Code::Mov_rm64_r64, used.guest as usize * 8, gpr(used.host))?;
    }
    if uses.writes_flags {
        a.plain(Code::Lahf)?;
        a.emit(Instruction::with1(Code::Seto_rm8, R::AL))?;
        a.store(Code::Mov_rm16_r16, FLAGS, R::AX)?;
    }
    for &(number, _) in uses.vectors.iter().filter(|vector| vector.1) {
        a.store_vector(uses, number)?;
    }
    for &(number, _) in uses.opmasks.iter().filter(|opmask| opmask.1) {
        a.store(Code::VEX_Kmovq_m64_kr, OPMASK + number as usize * 8, R::K0 + number)?;
    }
    if uses.x87 {
        a.at(Code::Fxsave64_m512byte, FX)?;
    }
    if uses.mxcsr {
        a.leave_mxcsr()?;
    } else if uses.x87 {
        a.at(Code::Ldmxcsr_m32, HOST_MXCSR)?;
    }
    a.leave(uses, &saved, 0)?;

    let other = a.length;
    if uses.mxcsr {
        a.leave_mxcsr()?;
        a.leave(uses, &saved, 1)?;
    }
    let mut code = a.encoder.take_buffer();
    if uses.mxcsr {
        code[at - 4..at].copy_from_slice(&((other - at) as i32).to_le_bytes());
    }
    Ok(Assembled { code, at: at as u32 })
}
