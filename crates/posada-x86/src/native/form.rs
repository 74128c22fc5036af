//! Forms: what is the same for all instructions with the same opcode, registers and immediate, wherever their memory
//! operand is. A form's key is its shortest encoding in 64-bit mode with the memory operand at [RSI]; as no encoding is
//! the start of another, zeroes behind it change nothing.

use super::selected::{self, Masked};
use super::stub;
use crate::core::Core;
use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, Encoder, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register,
};

/// A stub: takes the core and the host address of the memory operand; 1 after an unmasked SIMD exception, else 0.
pub type Stub = unsafe extern "sysv64" fn(*mut Core, *mut u8) -> u32;

/// What an instruction needs, as bits of [`Core::fpu_blocked`].
pub mod needs {
    /// SSE state.
    pub const SSE: u8 = 1;
    /// AVX state.
    pub const AVX: u8 = 2;
    /// The x87 unit, for x87 or MMX.
    pub const X87: u8 = 4;
    /// Protected mode, for VEX encodings.
    pub const VEX: u8 = 8;
    /// AVX-512 state: the opmasks and all of ZMM0-31.
    pub const AVX512: u8 = 0x80;
}

/// What a stub does, and what must be checked before.
#[derive(Debug)]
pub struct Form {
    stub: *const u8,
    /// Offset of the guest's instruction in the stub.
    at: u32,
    /// [`needs`].
    pub needs: u8,
    /// An MMX instruction: CR0.EM makes it #UD, not #NM.
    pub mmx: bool,
    /// Waits for pending x87 exceptions.
    pub waits: bool,
    /// The x87 unit may note its opcode. What does not wait notes nothing, but may store what was noted; FLDENV and FRSTOR
    /// load it.
    pub notes: bool,
    /// Bytes of the memory operand, 0 without one.
    pub bytes: u8,
    /// Bits of its linear address that must be zero.
    pub align: u8,
    /// It is read.
    pub read: bool,
    /// It is written.
    pub write: bool,
    /// An opmask selects parts of the memory operand.
    pub masked: Option<Masked>,
    /// Vector registers below 16, as a set, whose bits above 255 become zero without the stub saying so.
    pub clears: u16,
    /// It may set such bits.
    pub widens: bool,
    /// The last opcode that the x87 unit notes when the host runs the stub.
    pub opcode: u16,
}

// SAFETY: the pointer names code that is never freed.
unsafe impl Send for Form {}
// SAFETY: as above; a form is not changed once it is placed.
unsafe impl Sync for Form {}

impl Form {
    /// Makes form and stub; the stub is position-independent.
    pub fn assemble(key: u64) -> Option<(Self, Vec<u8>)> {
        let bytes = key.to_le_bytes();
        let mut instruction = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        if instruction.is_invalid() {
            return None;
        }
        let uses = Uses::of(&mut instruction);
        let written = uses.vectors.iter().filter(|vector| vector.1 && vector.0 < 16);
        let written = written.fold(0, |set, (number, _)| set | 1 << number);
        let extends = uses.vex || uses.evex;
        let memory = memory_operand(&instruction);
        let bytes = if memory.is_some() {
            instruction.memory_size().size() as u8
        } else {
            0
        };
        let access = memory.map_or(OpAccess::None, |operand| {
            InstructionInfoFactory::new().info(&instruction).op_access(operand)
        });
        let opcode = opcode(&key.to_le_bytes());
        let waits = uses.x87 && !no_wait(instruction.code());
        let stub = stub::assemble(instruction, &uses)?;
        let form = Self {
            stub: std::ptr::null(),
            at: stub.at,
            needs: uses.needs,
            mmx: uses.mmx,
            waits,
            notes: waits && !matches!(instruction.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor),
            bytes,
            align: alignment(&instruction, bytes, &uses),
            read: matches!(access, OpAccess::Read | OpAccess::ReadWrite | OpAccess::CondRead),
            write: matches!(access, OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite),
            masked: memory.and_then(|_| selected::masked(&instruction)),
            clears: if extends && !uses.zmm { written } else { 0 },
            widens: uses.zmm && written != 0,
            opcode,
        };
        Some((form, stub.code))
    }

    /// Says where the stub was put.
    pub fn place(&mut self, stub: *const u8) {
        self.stub = stub;
    }

    /// The stub.
    pub fn stub(&self) -> Stub {
        // SAFETY: `place` was given code that `assemble` made.
        unsafe { std::mem::transmute::<*const u8, Stub>(self.stub) }
    }

    /// Host address of the guest's instruction.
    pub fn instruction(&self) -> u64 {
        self.stub as u64 + u64::from(self.at)
    }

    /// An x87 or MMX instruction.
    pub fn x87(&self) -> bool {
        self.needs & needs::X87 != 0
    }
}

/// A form's key, or `None` if `instruction` is none that stubs run.
pub fn key(instruction: &Instruction) -> Option<u64> {
    let mut plain = *instruction;
    plain.set_segment_prefix(Register::None);
    if memory_operand(&plain).is_some() {
        plain.set_memory_base(Register::RSI);
        plain.set_memory_index(Register::None);
        plain.set_memory_index_scale(1);
        plain.set_memory_displ_size(0);
        plain.set_memory_displacement64(0);
    }
    let mut encoder = Encoder::new(64);
    let length = encoder.encode(&plain, 0).ok()?;
    let mut bytes = [0; 8];
    bytes.get_mut(..length)?.copy_from_slice(&encoder.take_buffer());
    Some(u64::from_le_bytes(bytes))
}

/// The x87 unit's last opcode (Intel SDM 1, 8.1.9): three bits of the first byte, and the second.
pub fn opcode(bytes: &[u8]) -> u16 {
    let first = bytes.iter().position(|byte| byte & 0xf8 == 0xd8);
    first
        .and_then(|at| Some(u16::from(bytes[at] & 7) << 8 | u16::from(*bytes.get(at + 1)?)))
        .unwrap_or(0)
}

/// Number of the memory operand.
fn memory_operand(instruction: &Instruction) -> Option<u32> {
    (0..instruction.op_count()).find(|&operand| instruction.op_kind(operand) == OpKind::Memory)
}

/// x87 instructions that do not look for pending exceptions.
fn no_wait(code: Code) -> bool {
    matches!(
        code,
        Code::Fninit
            | Code::Fnclex
            | Code::Fneni
            | Code::Fndisi
            | Code::Fnsetpm
            | Code::Fnstcw_m2byte
            | Code::Fnstsw_m2byte
            | Code::Fnstsw_AX
            | Code::Fnstenv_m14byte
            | Code::Fnstenv_m28byte
            | Code::Fnsave_m94byte
            | Code::Fnsave_m108byte
    )
}

/// Address bits that must be zero (Intel SDM 2A, 2.4 and 2.7): exception classes 1 and 2, and legacy class 4.
fn alignment(instruction: &Instruction, bytes: u8, uses: &Uses) -> u8 {
    use Mnemonic as M;
    let aligned = match instruction.encoding() {
        EncodingKind::Legacy => {
            bytes == 16
                && uses.needs & needs::SSE != 0
                && !matches!(
                    instruction.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpistri
                        | M::Pcmpistrm
                        | M::Pcmpestri
                        | M::Pcmpestrm
                        | M::Pcmpestri64
                        | M::Pcmpestrm64
                )
        }
        _ => matches!(
            instruction.mnemonic(),
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovdqa32
                | M::Vmovdqa64
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        ),
    };
    if aligned && bytes != 0 { bytes - 1 } else { 0 }
}

/// True if the instruction reads MXCSR or sets its flags. Integer instructions and moves do not.
pub fn uses_mxcsr(mnemonic: Mnemonic) -> bool {
    let name = format!("{mnemonic:?}").to_ascii_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    let float = ["ps", "pd", "ss", "sd"].iter().any(|suffix| name.ends_with(suffix));
    name.starts_with("cvt")
        || float
            && [
                "add", "sub", "mul", "div", "sqrt", "min", "max", "cmp", "hadd", "hsub", "dp", "round", "comi",
                "ucomi", "rcp", "rsqrt", "fm", "fnm", "fixupimm", "fpclass", "getexp", "getmant", "range", "reduce",
                "rndscale", "scalef",
            ]
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

/// The registers and state of an instruction.
#[derive(Default)]
pub struct Uses {
    /// General registers, by number: the guest's, and the host's that stands for it.
    pub gprs: Vec<Gpr>,
    /// Vector registers, by number, and whether they are written.
    pub vectors: Vec<(u32, bool)>,
    /// Opmask registers, by number, and whether they are written.
    pub opmasks: Vec<(u32, bool)>,
    /// Whole YMM registers are read.
    pub wide: bool,
    /// Whole ZMM registers are used.
    pub zmm: bool,
    /// VEX-encoded.
    pub vex: bool,
    /// EVEX-encoded.
    pub evex: bool,
    /// x87 or MMX state is used.
    pub x87: bool,
    /// MMX instruction.
    pub mmx: bool,
    /// MXCSR is used.
    pub mxcsr: bool,
    /// Arithmetic flags must be loaded.
    pub reads_flags: bool,
    /// Arithmetic flags must be stored.
    pub writes_flags: bool,
    /// There is a memory operand.
    pub memory: bool,
    /// [`needs`].
    pub needs: u8,
}

/// A general register of an instruction.
pub struct Gpr {
    /// Number in the guest.
    pub guest: u32,
    /// Number in the stub: another one only for RSP.
    pub host: u32,
    /// Must be stored.
    pub written: bool,
}

impl Uses {
    /// Looks at an instruction, and gives its RSP operands another register.
    fn of(instruction: &mut Instruction) -> Self {
        let mut uses = Self {
            vex: instruction.encoding() == EncodingKind::VEX,
            evex: instruction.encoding() == EncodingKind::EVEX,
            mxcsr: uses_mxcsr(instruction.mnemonic()),
            memory: memory_operand(instruction).is_some(),
            ..Self::default()
        };
        let mut without_base = *instruction;
        if uses.memory {
            without_base.set_memory_base(Register::None);
            without_base.set_memory_displ_size(8);
        }
        let mut factory = InstructionInfoFactory::new();
        for used in factory.info(&without_base).used_registers() {
            let register = used.register();
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            if register.is_gpr() {
                uses.gpr(register.full_register().number() as u32, written);
            } else if register.is_vector_register() {
                add(&mut uses.vectors, register.number() as u32, written);
            } else if register.is_k() {
                add(&mut uses.opmasks, register.number() as u32, written);
            } else if register.is_mm() {
                uses.mmx = true;
            } else if register.is_st() {
                uses.x87 = true;
            }
        }
        let mut operands = (0..instruction.op_count()).map(|operand| instruction.op_register(operand));
        uses.zmm = operands.clone().any(Register::is_zmm);
        // An EVEX encoding may take one register of another's size.
        uses.wide = uses.evex || operands.any(Register::is_ymm);
        let has = |feature| instruction.cpuid_features().contains(&feature);
        uses.mmx |= has(CpuidFeature::MMX);
        uses.x87 |= uses.mmx || has(CpuidFeature::FPU) || has(CpuidFeature::FPU287) || has(CpuidFeature::FPU387);
        let modified = instruction.rflags_modified() & FLAGS;
        let defined = instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set();
        uses.writes_flags = modified != 0;
        uses.reads_flags = instruction.rflags_read() & FLAGS != 0 || uses.writes_flags && defined & FLAGS != FLAGS;
        // Conversions from memory to a general register have no vector register.
        let vectors = !uses.vectors.is_empty() || uses.mxcsr;
        uses.needs = match (uses.vex, vectors) {
            _ if uses.evex || !uses.opmasks.is_empty() => needs::AVX512,
            (true, true) => needs::AVX,
            (true, false) => needs::VEX,
            (false, true) => needs::SSE,
            (false, false) => 0,
        } | if uses.x87 { needs::X87 } else { 0 };
        uses.rename_rsp(instruction);
        uses
    }

    fn gpr(&mut self, number: u32, written: bool) {
        match self.gprs.iter_mut().find(|gpr| gpr.guest == number) {
            Some(gpr) => gpr.written |= written,
            None => self.gprs.push(Gpr {
                guest: number,
                host: number,
                written,
            }),
        }
    }

    fn rename_rsp(&mut self, instruction: &mut Instruction) {
        let taken = |number| self.gprs.iter().any(|gpr| gpr.host == number);
        let Some(free) = (0..4).find(|&number| !taken(number)) else {
            return;
        };
        let Some(gpr) = self.gprs.iter_mut().find(|gpr| gpr.guest == 4) else {
            return;
        };
        gpr.host = free;
        for operand in 0..instruction.op_count() {
            let register = instruction.op_register(operand);
            if instruction.op_kind(operand) == OpKind::Register && register.full_register() == Register::RSP {
                let first = match register.size() {
                    1 => Register::AL,
                    2 => Register::AX,
                    4 => Register::EAX,
                    _ => Register::RAX,
                };
                instruction.set_op_register(operand, first + free);
            }
        }
    }
}

fn add(registers: &mut Vec<(u32, bool)>, number: u32, written: bool) {
    match registers.iter_mut().find(|register| register.0 == number) {
        Some(register) => register.1 |= written,
        None => registers.push((number, written)),
    }
}

const FLAGS: u32 = {
    use iced_x86::RflagsBits as R;
    R::CF | R::PF | R::AF | R::ZF | R::SF | R::OF
};
