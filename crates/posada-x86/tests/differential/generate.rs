//! Makes a case from a form and a seed: the instruction first, then the registers that make its operands land where they
//! should, then the details without which an instruction would nearly always take the same path.

use crate::forms::Form;
use crate::layout::{CODE, DATA, PAGE};
use crate::operands::{self, Plan};
use crate::rng::Rng;
use crate::state::{Case, area};
use crate::{trampoline, values};
use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, Encoder, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    MemorySize, Mnemonic, OpAccess, OpKind, Register, UsedMemory,
};
use std::collections::HashSet;

/// Tries at operands that can be encoded together (AH and a REX prefix cannot, for one).
const TRIES: usize = 16;

/// The generator's tools, kept from case to case.
pub struct Generator {
    /// For 64-bit and compatibility mode.
    encoders: [Encoder; 2],
    factory: InstructionInfoFactory,
    tested: HashSet<(u32, Code)>,
}

/// What is known while a case is being made.
struct Draft<'a> {
    case: &'a mut Case,
    rng: Rng,
    instruction: Instruction,
    /// General registers whose value an operand's address depends on.
    pinned: u16,
}

fn number(register: Register) -> Option<usize> {
    register
        .is_gpr()
        .then(|| register.full_register() as usize - Register::RAX as usize)
}

/// The linear address of an instruction's explicit memory operand (a gather's first element not included).
pub fn operand_address(instruction: &Instruction, case: &Case) -> Option<u64> {
    let state = &case.state;
    let operand = (0..instruction.op_count()).find(|&operand| instruction.op_kind(operand) == OpKind::Memory)?;
    instruction.virtual_address(operand, 0, |register, _, _| match register {
        Register::FS => Some(state.fs_base),
        Register::GS => Some(state.gs_base),
        _ if register.is_segment_register() => Some(0),
        _ => number(register).map(|number| {
            let value = state.gpr[number];
            match register.size() {
                1 => value & 0xff,
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => value,
            }
        }),
    })
}

/// Bytes of memory that an instruction touches, where the table of sizes does not say.
fn operand_size(instruction: &Instruction, size: MemorySize) -> u64 {
    match instruction.mnemonic() {
        Mnemonic::Xsave | Mnemonic::Xsave64 | Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64 => area::used() as u64,
        Mnemonic::Xsavec | Mnemonic::Xsavec64 | Mnemonic::Xrstor | Mnemonic::Xrstor64 => area::used() as u64,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => 1,
        _ => size.size() as u64,
    }
}

impl Generator {
    pub fn new(forms: &[Form]) -> Self {
        Self {
            encoders: [64, 32].map(Encoder::new),
            factory: InstructionInfoFactory::new(),
            tested: forms.iter().map(|form| (form.bits, form.code)).collect(),
        }
    }

    /// Makes a case; false when the form has no instruction that can be encoded.
    pub fn make(&mut self, form: &Form, seed: u64, case: &mut Case) -> bool {
        let mut rng = Rng::new(seed ^ u64::from(form.number) << 40);
        case.form = form.number;
        case.seed = seed;
        case.bits = form.bits;
        case.patch_count = 0;
        values::registers(&mut rng, case);
        if form.bits == 32 {
            values::narrow(&mut case.state);
        }
        // A signal that finds RSP in the signal stack would go on below it.
        let stack = &mut case.state.gpr[4];
        *stack ^= u64::from(trampoline::contains(*stack)) << 30;
        let Some(instruction) = self.encode(&mut rng, form, case) else {
            return false;
        };
        let mut draft = Draft {
            case,
            rng,
            instruction,
            pinned: 0,
        };
        draft.count();
        let info = self
            .factory
            .info_options(&instruction, InstructionInfoOptions::NO_REGISTER_USAGE);
        for used in info.used_memory() {
            draft.place(used);
        }
        draft.branch();
        draft.details();
        true
    }

    fn encode(&mut self, rng: &mut Rng, form: &Form, case: &mut Case) -> Option<Instruction> {
        let branch = form.code.is_jcc_short_or_near()
            || form.code.is_jmp_short_or_near()
            || form.code.is_call_near()
            || form.code.is_jmp_near_indirect()
            || form.code.is_call_near_indirect()
            || form.code.is_loop()
            || form.code.is_loopcc()
            || form.code.is_jcx_short()
            || matches!(form.code.mnemonic(), Mnemonic::Ret);
        for _ in 0..TRIES {
            // Mostly inside the first page; else across into the second, or from there into nothing.
            let rip = match rng.below(100) {
                0..88 => CODE + 0x200 + rng.below(0xb00),
                88..98 => CODE + PAGE - 1 - rng.below(14),
                _ => CODE + 2 * PAGE - 1,
            };
            let taken = if branch { rip - 32 - rng.below(64) } else { 0 };
            let target = operands::target(rng, 32);
            let plan = Plan::new(rng, form.bits, taken, target);
            let mut instruction = operands::build(rng, &plan, form.code)?;
            let encoder = &mut self.encoders[usize::from(form.bits == 32)];
            encoder.set_prevent_vex2(rng.chance(50));
            encoder.set_vex_wig(rng.below(2) as u32);
            encoder.set_vex_lig(rng.below(2) as u32);
            if encoder.encode(&instruction, rip).is_err() {
                drop(encoder.take_buffer());
                continue;
            }
            let mut bytes = encoder.take_buffer();
            if rip + 1 == CODE + 2 * PAGE && bytes.len() == 1 {
                continue;
            }
            if taken == 0 && rng.chance(15) {
                instruction = self.with_prefix(rng, form.bits, rip, &mut bytes).unwrap_or(instruction);
            }
            instruction.set_len(bytes.len());
            instruction.set_ip(rip);
            case.code = [0; 15];
            case.code[..bytes.len()].copy_from_slice(&bytes);
            case.length = bytes.len() as u8;
            case.state.rip = rip;
            case.taken = taken;
            return Some(instruction);
        }
        None
    }
}

impl Generator {
    /// Puts prefixes that the instruction has no need of before it, as long as what comes out is a form that is tested,
    /// or none at all. A REX prefix that a legacy prefix follows counts for nothing.
    fn with_prefix(&self, rng: &mut Rng, bits: u32, rip: u64, bytes: &mut Vec<u8>) -> Option<Instruction> {
        const LEGACY: [u8; 11] = [0x66, 0x67, 0xf2, 0xf3, 0xf0, 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65];
        let mut longer = vec![rng.pick(&LEGACY)];
        match rng.below(4) {
            0 => longer.push(rng.pick(&LEGACY)),
            1 if bits == 64 => longer.insert(0, 0x40 | rng.below(16) as u8),
            _ => {}
        }
        longer.extend_from_slice(bytes);
        let mut decoder = Decoder::with_ip(bits, &longer, rip, DecoderOptions::NONE);
        let made = decoder.decode();
        let known = made.len() == longer.len() && self.tested.contains(&(bits, made.code()));
        // With another address size, what follows may be a part of it: that is no form of ours.
        let none = decoder.last_error() == DecoderError::InvalidInstruction && longer.len() <= 15;
        (known || none).then(|| {
            *bytes = longer;
            made
        })
    }
}

impl Draft<'_> {
    fn is_pinned(&self, register: usize) -> bool {
        self.pinned & 1 << register != 0
    }

    fn set(&mut self, register: usize, value: u64) {
        if !self.is_pinned(register) {
            self.case.state.gpr[register] = value & self.case.register_mask();
            self.pinned |= 1 << register;
        }
    }

    /// Bounds what RCX counts.
    fn count(&mut self) {
        let i = &self.instruction;
        let repeats = i.has_rep_prefix() || i.has_repe_prefix() || i.has_repne_prefix();
        if i.is_string_instruction() && repeats || i.code().is_loop() || i.code().is_loopcc() || i.code().is_jcx_short()
        {
            let count = if self.rng.chance(15) {
                self.rng.below(3)
            } else {
                self.rng.below(40)
            };
            self.set(1, count);
        }
    }

    /// Makes a memory operand land on a target by what is left to choose, and fills it.
    fn place(&mut self, used: &UsedMemory) {
        let size = operand_size(&self.instruction, used.memory_size());
        let target = operands::target(&mut self.rng, size);
        let segment = match used.segment() {
            Register::FS => self.case.state.fs_base,
            Register::GS => self.case.state.gs_base,
            _ => 0,
        };
        let mut rest = target.wrapping_sub(segment).wrapping_sub(used.displacement());
        let index = if used.index() == Register::AL {
            self.case.state.gpr[0] & 0xff
        } else if let Some(index) = number(used.index()) {
            if !self.is_pinned(index) && Some(index) != number(used.base()) && self.rng.chance(60) {
                let small = self.rng.range(-0x100, 0x100) as u64;
                self.set(index, small);
            }
            self.pinned |= 1 << index;
            self.case.state.gpr[index]
        } else {
            0
        };
        rest = rest.wrapping_sub(index.wrapping_mul(used.scale() as u64));
        match number(used.base()) {
            Some(base) if number(used.index()) == Some(base) => {
                // Base and index are one: exact only where the sum divides.
                let whole = target.wrapping_sub(segment).wrapping_sub(used.displacement()) as i64;
                let part = (whole / (1 + used.scale() as i64)) as u64;
                self.case.state.gpr[base] = part & self.case.register_mask();
            }
            Some(base) => {
                match used.base().size() {
                    2 => rest = rest & 0xffff | self.rng.next() << 16,
                    4 => rest = rest & 0xffff_ffff | self.rng.next() << 32,
                    _ => {}
                }
                self.set(base, rest);
            }
            None => {}
        }
        self.vector_index(used);
        if !matches!(used.access(), OpAccess::Write | OpAccess::NoMemAccess) {
            self.fill(used.memory_size(), target, size);
        }
    }

    /// Gives a gather's index lanes small values and its mask random signs.
    fn vector_index(&mut self, used: &UsedMemory) {
        let register = self.instruction.memory_index();
        if !register.is_vector_register() || used.vsib_size() == 0 {
            return;
        }
        let mut value = [0; 64];
        for lane in value.chunks_mut(used.vsib_size() as usize) {
            let index = match self.rng.below(24) {
                0 => self.rng.next() as i64,
                1 => self.rng.range(-0x800, 0x800),
                _ => self.rng.range(-16, 16),
            };
            lane.copy_from_slice(&index.to_le_bytes()[..lane.len()]);
        }
        self.case.state.set_vector(register.number(), &value);
    }

    /// Bytes that suit the operand's type.
    fn fill(&mut self, kind: MemorySize, target: u64, size: u64) {
        use MemorySize as M;
        let mut bytes = [0; 4096];
        let bytes = &mut bytes[..size.clamp(1, 4096) as usize];
        match kind.element_type() {
            M::Float80 => bytes.copy_from_slice(&values::extended(&mut self.rng)),
            M::Float32 | M::Float64 | M::Int32 | M::UInt32 | M::UInt64 | M::Int64 | M::UInt128 => {
                values::lanes(&mut self.rng, bytes);
            }
            M::Bcd => {
                for byte in bytes.iter_mut() {
                    let digits = self.rng.below(100);
                    *byte = (digits / 10 << 4 | digits % 10) as u8;
                }
                bytes[9] = self.rng.next() as u8 & 0x80;
            }
            _ => match self.instruction.mnemonic() {
                Mnemonic::Fldenv
                | Mnemonic::Frstor
                | Mnemonic::Fxrstor
                | Mnemonic::Fxrstor64
                | Mnemonic::Xrstor
                | Mnemonic::Xrstor64 => self.image(bytes),
                _ => return,
            },
        }
        if matches!(self.instruction.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor) {
            self.image(bytes);
        }
        if matches!(self.instruction.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && self.rng.chance(90) {
            bytes.copy_from_slice(&values::mxcsr(&mut self.rng).to_le_bytes());
        }
        self.case.patch(target, bytes);
    }

    /// An x87 environment, or an FXSAVE or XSAVE image: another case's state, damaged at times.
    fn image(&mut self, bytes: &mut [u8]) {
        let mut other = *self.case;
        values::registers(&mut self.rng, &mut other);
        let source = &mut other.state.area;
        if bytes.len() < 512 {
            // Control, status and tag words take two or four bytes each.
            let step = if self.instruction.code().op_code().operand_size() == 16 {
                2
            } else {
                4
            };
            self.rng.fill(bytes);
            bytes[..2].copy_from_slice(&source[area::FCW..][..2]);
            bytes[step..step + 2].copy_from_slice(&source[area::FSW..][..2]);
            return;
        }
        if bytes.len() > 512 {
            source[area::HEADER] = self.rng.next() as u8 & area::components();
            if self.rng.chance(25) {
                // Compacted.
                source[area::HEADER + 8] = source[area::HEADER] | self.rng.next() as u8 & area::components();
                source[area::HEADER + 15] = 0x80;
            }
        }
        if self.rng.chance(10) {
            let at = self.rng.pick(&[
                area::MXCSR + 2,
                area::HEADER,
                area::HEADER + 8,
                area::HEADER + 16,
                area::HEADER + 63,
            ]);
            // Of the components' bits only those that no processor here has or all have.
            source[at] = self.rng.next() as u8 & 0x1f;
        }
        let length = bytes.len().min(source.len());
        bytes[..length].copy_from_slice(&source[..length]);
    }

    /// Arranges for a branch through a register or memory to land on its exit.
    fn branch(&mut self) {
        let code = self.instruction.code();
        let taken = self.case.taken;
        if taken == 0 || self.rng.chance(8) {
            return;
        }
        if code.is_jmp_near_indirect() || code.is_call_near_indirect() {
            match number(self.instruction.op0_register()) {
                Some(register) => self.set(register, taken),
                None => self.patch_operand(&taken.to_le_bytes()),
            }
        } else if self.instruction.mnemonic() == Mnemonic::Ret {
            let stack = self.case.state.gpr[4];
            self.case.patch(stack, &taken.to_le_bytes());
        }
    }

    fn patch_operand(&mut self, bytes: &[u8]) {
        if let Some(address) = operand_address(&self.instruction, self.case) {
            self.case.patch(address, bytes);
        }
    }

    /// What makes particular instructions take all their paths.
    fn details(&mut self) {
        let [rax, rcx, rdx] = [0, 1, 2];
        match self.instruction.mnemonic() {
            // A small upper half, or its sign: else nearly every quotient overflows.
            Mnemonic::Div | Mnemonic::Idiv if self.rng.chance(80) => {
                let high = self.rng.pick(&[0, 0, 0, u64::MAX, 1]);
                self.set(rdx, high);
                let low = self.case.state.gpr[rax];
                if self.instruction.code().op_code().op0_kind() == iced_x86::OpCodeOperandKind::r8_or_mem {
                    self.set(
                        rax,
                        low & !0xff00 | if low & 0x80 != 0 && high != 0 { 0xff00 } else { 0 },
                    );
                }
            }
            Mnemonic::Cmpxchg if self.rng.chance(50) => {
                let value = self.case.state.gpr[rax].to_le_bytes();
                let size = self.instruction.op1_register().size();
                match number(self.instruction.op0_register()) {
                    Some(register) => self.set(register, u64::from_le_bytes(value)),
                    None => self.patch_operand(&value[..size]),
                }
            }
            Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b if self.rng.chance(50) => {
                let half = if self.instruction.mnemonic() == Mnemonic::Cmpxchg8b {
                    4
                } else {
                    8
                };
                let mut value = [0; 16];
                value[..half].copy_from_slice(&self.case.state.gpr[rax].to_le_bytes()[..half]);
                value[half..2 * half].copy_from_slice(&self.case.state.gpr[rdx].to_le_bytes()[..half]);
                self.patch_operand(&value[..2 * half]);
            }
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc => {
                // The bit offset reaches beyond the operand, but seldom beyond the window.
                if let Some(register) = number(self.instruction.op1_register())
                    && self.rng.chance(90)
                {
                    let offset = self.rng.range(-0x800, 0x800) as u64;
                    self.set(register, offset);
                }
            }
            Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd => {
                let count = self.rng.pick(&[0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]);
                if self.rng.chance(60) {
                    self.set(rcx, count);
                }
            }
            Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => {
                // No single-stepping: it would stop in the exit.
                let stack = self.case.state.gpr[4];
                let flags = (self.rng.next() & !0x4_0100).to_le_bytes();
                self.case.patch(stack, &flags);
            }
            Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Vpcmpestri
            | Mnemonic::Vpcmpestrm
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpestrm64
            | Mnemonic::Vpcmpestri64
            | Mnemonic::Vpcmpestrm64 => {
                for register in [rax, rdx] {
                    let length = self.rng.range(-18, 19) as u64;
                    self.set(register, length);
                }
            }
            Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64
            | Mnemonic::Xsavec
            | Mnemonic::Xsavec64
            | Mnemonic::Xrstor
            | Mnemonic::Xrstor64 => {
                // Only components that both processors have: the host's XCR0 may hold more.
                self.case.state.gpr[rax] &= u64::from(area::components());
                self.case.state.gpr[rdx] = 0;
            }
            Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
                if let Some(register) = number(self.instruction.op0_register()) {
                    let base = (self.rng.next() as i64 >> self.rng.pick(&[16, 17, 17, 17])) as u64;
                    self.set(register, base);
                }
            }
            Mnemonic::Mov if self.instruction.op0_register().is_segment_register() => {
                let selector = self.selector();
                match number(self.instruction.op1_register()) {
                    Some(register) => self.set(register, selector),
                    None => self.patch_operand(&selector.to_le_bytes()[..2]),
                }
            }
            Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Lss => {
                let selector = self.selector().to_le_bytes();
                if let Some(address) = operand_address(&self.instruction, self.case) {
                    let offset = self.instruction.op0_register().size() as u64;
                    self.case.patch(address.wrapping_add(offset), &selector[..2]);
                }
            }
            Mnemonic::Pop if self.instruction.op0_register().is_segment_register() => {
                let (stack, selector) = (self.case.state.gpr[4], self.selector());
                self.case.patch(stack, &selector.to_le_bytes());
            }
            Mnemonic::Cmpsb
            | Mnemonic::Cmpsw
            | Mnemonic::Cmpsd
            | Mnemonic::Cmpsq
            | Mnemonic::Scasb
            | Mnemonic::Scasw
            | Mnemonic::Scasd
            | Mnemonic::Scasq
                if self.rng.chance(60) =>
            {
                self.equal_strings();
            }
            _ => {}
        }
    }

    /// A null selector, or one beyond every descriptor table.
    fn selector(&mut self) -> u64 {
        let upper = self.rng.next() & !0xffff;
        upper | self.rng.pick(&[0, 1, 2, 3, 0xfff8, 0xfffc, 0xfff3])
    }

    /// Runs of equal bytes at both strings, and in RAX: comparisons go on for a while.
    fn equal_strings(&mut self) {
        let byte = self.rng.next() as u8;
        let run = [byte; 160];
        let down = self.case.state.rflags & 1 << 10 != 0;
        for register in [6, 7] {
            let at = self.case.state.gpr[register].wrapping_sub(if down { 152 } else { 0 });
            let length = 8 + self.rng.below(152) as usize;
            let skip = if down { 160 - length } else { 0 };
            if at >> 16 == DATA >> 16 {
                self.case.patch(at + skip as u64, &run[..length]);
            }
        }
        self.set(0, u64::from_le_bytes([byte; 8]));
    }
}
