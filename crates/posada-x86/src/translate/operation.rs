//! What the translator must know of one instruction of 64-bit code: how it is translated, which of the two scratch registers
//! it names, where its memory operand is, and what it does to the arithmetic flags.

use super::table::{Treatment, treatment};
use super::vectors::live;
use crate::native::needs;
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, InstructionInfoOptions, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};

/// The longest instruction, in bytes.
pub const MAX_LENGTH: usize = 15;
/// R10 and R11 hold what the translator likes; the guest's are in its state.
pub const SCRATCH: [u8; 2] = [10, 11];

/// Arithmetic flags as a set.
pub mod flags {
    #![allow(missing_docs, reason = "the manual's own mnemonics")]
    use iced_x86::RflagsBits;
    pub const ALL: u8 =
        (RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF) as u8;
    pub const NONE: u8 = 0;
}

/// A memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Base register.
    pub base: Option<u8>,
    /// Index register.
    pub index: Option<u8>,
    /// log2 of the index' factor.
    pub scale: u8,
    /// Displacement; the whole address of a RIP-relative operand.
    pub displacement: u64,
    /// The operand is RIP-relative.
    pub relative: bool,
    /// FS or GS, by number.
    pub segment: Option<u8>,
    /// Addresses have 32 bits.
    pub narrow: bool,
    /// Bytes.
    pub size: u8,
    /// The operand is written.
    pub write: bool,
    /// LOCK, or an exchange, which locks by itself.
    pub locked: bool,
}

impl Memory {
    /// True if it is at a constant distance from RSP.
    pub fn is_stack(&self) -> bool {
        self.base == Some(4) && self.index.is_none() && self.segment.is_none() && !self.narrow
    }
}

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Its bytes are copied.
    Copy,
    /// Copied with another address in its ModRM byte.
    Access(Memory),
    /// BT and its like on 64-bit words: the register with the bit's number, and word 0.
    BitString(u8, Memory),
    /// LEA with an address that needs the translator: RIP-relative, or by R10 and R11.
    Address {
        /// Destination.
        register: u8,
        /// Bytes of it.
        size: u8,
        /// What is to be computed.
        memory: Memory,
    },
    /// Nothing happens: NOP, prefetches.
    Nothing,
    /// PUSH of a register.
    Push(u8),
    /// PUSH of an immediate.
    PushImmediate(i32),
    /// PUSH of an operand in memory.
    PushMemory(Memory),
    /// POP of a register.
    Pop(u8),
    /// LEAVE.
    Leave,
    /// JMP.
    Jump(u64),
    /// JMP to a register.
    JumpRegister(u8),
    /// JMP to what is in memory.
    JumpMemory(Memory),
    /// Jcc: condition and target.
    Branch(u8, u64),
    /// JRCXZ or LOOPcc: opcode and target.
    Count(u8, u64),
    /// CALL.
    Call(u64),
    /// CALL of a register.
    CallRegister(u8),
    /// CALL of what is in memory.
    CallMemory(Memory),
    /// RET; bytes to drop.
    Return(u16),
    /// The kernel's.
    System(System),
    /// The interpreter's.
    Interpret,
}

/// An instruction that changes more than registers and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    /// CLI.
    Cli,
    /// STI.
    Sti,
    /// SWAPGS.
    Swapgs,
    /// PUSHFQ.
    PushFlags,
    /// RDTSC, or RDTSCP.
    ReadTsc(bool),
    /// STAC or CLAC.
    SetAccess(bool),
}

/// What code cannot do where it runs, beside [`crate::core::Core::fpu_blocked`].
pub mod limits {
    /// RDTSC is not allowed, or more than the host's and an addition.
    pub const TSC: u8 = 0x10;
    /// RDTSC is not allowed to user mode.
    pub const TSC_USER: u8 = 0x40;
    /// The privilege level is 3.
    pub const USER: u8 = 0x20;
}

/// One decoded instruction.
#[derive(Clone, Copy, Debug)]
pub struct Operation {
    /// How it is translated.
    pub kind: Kind,
    /// The instruction.
    pub bytes: [u8; MAX_LENGTH],
    /// Its length.
    pub length: u8,
    /// Registers beside those of addresses: bit 0 and 1 name R10 and R11, bit 2 and 3 say that it is written.
    pub scratch: u8,
    /// General registers that it writes, as a set; for copied instructions and their like.
    pub writes: u16,
    /// It only adds this constant to the register that it writes.
    pub adds: Option<(u8, i32)>,
    /// What it needs of the vector registers and MXCSR: one of [`live`].
    pub vectors: u8,
    /// Arithmetic flags that it reads.
    pub reads: u8,
    /// Arithmetic flags that it always replaces.
    pub replaces: u8,
    /// Arithmetic flags that it may change.
    pub changes: u8,
    /// It is of the kind that functions written by hand end with to return flags: comparisons, CLC, STC.
    pub tells: bool,
    /// The host's processor may raise an exception of its own.
    pub traps: bool,
}

impl Operation {
    /// One of which nothing is known.
    pub const UNKNOWN: Self = Self {
        kind: Kind::Interpret,
        bytes: [0; MAX_LENGTH],
        length: 0,
        scratch: 0,
        writes: u16::MAX,
        adds: None,
        vectors: live::NONE,
        reads: flags::ALL,
        replaces: flags::NONE,
        changes: flags::ALL,
        tells: false,
        traps: true,
    };
}

/// A decoder with its tables.
pub struct Reader {
    factory: InstructionInfoFactory,
    instruction: Instruction,
}

impl Default for Reader {
    fn default() -> Self {
        Self {
            factory: InstructionInfoFactory::new(),
            instruction: Instruction::default(),
        }
    }
}

fn number(register: Register) -> u8 {
    (register.full_register() as u32 - Register::RAX as u32) as u8
}

/// Registers whose encoding a REX prefix changes into another one.
fn high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

impl Reader {
    /// The instruction at the start of `bytes`, which lies at `rip` in 64-bit code. `None` if the bytes end inside it or
    /// are none.
    pub fn read(&mut self, bytes: &[u8], rip: u64, blocked: u8) -> Option<Operation> {
        let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
        decoder.decode_out(&mut self.instruction);
        let i = &self.instruction;
        if i.is_invalid() {
            return None;
        }
        let mut operation = Operation {
            length: i.len() as u8,
            ..Operation::UNKNOWN
        };
        operation.bytes[..i.len()].copy_from_slice(&bytes[..i.len()]);
        if usual_prefixes(&operation.bytes) {
            operation.kind = self.kind(&mut operation, blocked).unwrap_or(Kind::Interpret);
        }
        if operation.kind == Kind::Interpret {
            let i = &self.instruction;
            let set = |bits: u32| (bits & u32::from(flags::ALL)) as u8;
            operation = Operation {
                reads: set(i.rflags_read()),
                changes: set(i.rflags_modified()),
                bytes: operation.bytes,
                length: operation.length,
                ..Operation::UNKNOWN
            };
        }
        Some(operation)
    }

    fn kind(&mut self, operation: &mut Operation, blocked: u8) -> Option<Kind> {
        let i = &self.instruction;
        let treatment = treatment(i.code());
        if treatment == Treatment::Interpret {
            return None;
        }
        operation.reads = (i.rflags_read() & u32::from(flags::ALL)) as u8;
        let changed = i.rflags_modified() & (RflagsBits::OF | u32::from(flags::ALL));
        operation.changes = changed as u8;
        operation.replaces = changed as u8;
        if shifts(i.mnemonic()) || keeps_undefined(i.mnemonic()) {
            operation.replaces &= !(i.rflags_undefined() as u8);
        }
        if shifts(i.mnemonic()) {
            let counted = i.op_kind(i.op_count() - 1) == OpKind::Register;
            let immediate = i.op_kind(i.op_count() - 1) == OpKind::Immediate8;
            if counted || immediate && i.immediate8() & 0x1f <= 1 {
                operation.replaces = flags::NONE;
                operation.changes = flags::ALL;
            }
        }
        if i.mnemonic() == Mnemonic::Pushfq {
            operation.reads = flags::ALL;
        }
        operation.tells = tells(i.mnemonic());
        operation.traps =
            matches!(treatment, Treatment::Vector(_)) || matches!(i.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        let kind = match treatment {
            Treatment::Interpret => return None,
            Treatment::Nothing => Kind::Nothing,
            Treatment::Control => self.control()?,
            Treatment::System => Kind::System(self.system(blocked)?),
            Treatment::Stack => self.stack(operation)?,
            Treatment::Integer | Treatment::Vector(_) => self.plain(operation, treatment, blocked)?,
        };
        Some(kind)
    }

    fn control(&self) -> Option<Kind> {
        let i = &self.instruction;
        let near = i.near_branch_target();
        // A 16-bit operand would cut RIP.
        let wide = |kind: OpKind| kind == OpKind::NearBranch64;
        Some(match i.flow_control() {
            FlowControl::UnconditionalBranch if wide(i.op0_kind()) => Kind::Jump(near),
            FlowControl::ConditionalBranch if wide(i.op0_kind()) => {
                if i.is_jcc_short_or_near() {
                    Kind::Branch(condition(i.mnemonic())?, near)
                } else {
                    use iced_x86::Code as C;
                    let opcode = match i.code() {
                        C::Loopne_rel8_64_RCX => 0xe0,
                        C::Loope_rel8_64_RCX => 0xe1,
                        C::Loop_rel8_64_RCX => 0xe2,
                        C::Jrcxz_rel8_64 => 0xe3,
                        _ => return None,
                    };
                    Kind::Count(opcode, near)
                }
            }
            FlowControl::Call if wide(i.op0_kind()) => Kind::Call(near),
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let call = i.flow_control() == FlowControl::IndirectCall;
                match i.op0_kind() {
                    OpKind::Register if i.op0_register().is_gpr64() => {
                        let register = number(i.op0_register());
                        if call {
                            Kind::CallRegister(register)
                        } else {
                            Kind::JumpRegister(register)
                        }
                    }
                    OpKind::Memory if i.memory_size().size() == 8 => {
                        let memory = self.memory(false)?;
                        if call {
                            Kind::CallMemory(memory)
                        } else {
                            Kind::JumpMemory(memory)
                        }
                    }
                    _ => return None,
                }
            }
            FlowControl::Return if i.code() == iced_x86::Code::Retnq => Kind::Return(0),
            FlowControl::Return if i.code() == iced_x86::Code::Retnq_imm16 => Kind::Return(i.immediate16()),
            _ => return None,
        })
    }

    fn system(&self, blocked: u8) -> Option<System> {
        use Mnemonic as M;
        let system = match self.instruction.mnemonic() {
            M::Cli => System::Cli,
            M::Sti => System::Sti,
            M::Swapgs => System::Swapgs,
            M::Stac => System::SetAccess(true),
            M::Clac => System::SetAccess(false),
            M::Pushfq => System::PushFlags,
            M::Rdtsc => System::ReadTsc(false),
            M::Rdtscp => System::ReadTsc(true),
            _ => return None,
        };
        let needed = match system {
            System::PushFlags => 0,
            System::ReadTsc(_) => limits::TSC,
            _ => limits::USER,
        };
        (blocked & needed == 0).then_some(system)
    }

    fn stack(&self, operation: &mut Operation) -> Option<Kind> {
        use iced_x86::Code as C;
        let i = &self.instruction;
        operation.scratch = 0;
        Some(match i.code() {
            C::Push_r64 => Kind::Push(number(i.op0_register())),
            C::Push_rm64 if i.op0_kind() == OpKind::Register => Kind::Push(number(i.op0_register())),
            C::Push_rm64 => Kind::PushMemory(self.memory(false)?),
            C::Pushq_imm8 => Kind::PushImmediate(i.immediate8to64() as i32),
            C::Pushq_imm32 => Kind::PushImmediate(i.immediate32to64() as i32),
            C::Pop_r64 => Kind::Pop(number(i.op0_register())),
            C::Pop_rm64 if i.op0_kind() == OpKind::Register => Kind::Pop(number(i.op0_register())),
            C::Leaveq => Kind::Leave,
            _ => return None,
        })
    }

    /// Integer and vector instructions without a meaning for RIP or the stack.
    fn plain(&mut self, operation: &mut Operation, treatment: Treatment, blocked: u8) -> Option<Kind> {
        let i = self.instruction;
        if let Treatment::Vector(needed) = treatment {
            if blocked & needed != 0 {
                return None;
            }
            operation.vectors = if needed & needs::AVX512 != 0 {
                // Shorter ones make the upper halves zero.
                let register = i.op0_register();
                if register.is_zmm() && register.number() < 16 {
                    live::ALL
                } else {
                    live::UPPER
                }
            } else if needed & (needs::SSE | needs::AVX) != 0 {
                live::YMM
            } else {
                live::NONE
            };
        }
        let operands = 0..i.op_count();
        let high = operands
            .clone()
            .any(|at| i.op_kind(at) == OpKind::Register && high_byte(i.op_register(at)));
        for at in operands.clone() {
            match i.op_kind(at) {
                OpKind::Register if i.op_register(at).is_mm() || i.op_register(at).is_st() => return None,
                OpKind::Register | OpKind::Memory => {}
                kind if is_immediate(kind) => {}
                _ => return None,
            }
        }
        let has_memory = operands.clone().any(|at| i.op_kind(at) == OpKind::Memory);
        let address_only = i.mnemonic() == Mnemonic::Lea;
        let info = self.factory.info_options(&i, InstructionInfoOptions::NONE);
        let addresses = [i.memory_base(), i.memory_index()];
        operation.writes = 0;
        operation.adds = added(&i);
        for used in info.used_registers() {
            let register = used.register();
            if !register.is_gpr() {
                continue;
            }
            let which = number(register);
            if !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None) {
                operation.writes |= 1 << which;
            }
            if which != 10 && which != 11 {
                continue;
            }
            let bit = which - 10;
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            let operand = operands.clone().any(|at| {
                i.op_kind(at) == OpKind::Register && i.op_register(at).is_gpr() && number(i.op_register(at)) == which
            });
            let address = has_memory && addresses.iter().any(|&part| part.is_gpr() && number(part) == which);
            if operand || written {
                operation.scratch |= 1 << bit;
            } else if !address {
                return None;
            }
            if written {
                operation.scratch |= 4 << bit;
            }
        }
        if address_only {
            let memory = self.memory(false)?;
            let scratch = |register: Option<u8>| register.is_some_and(|register| SCRATCH.contains(&register));
            if i.memory_base() != Register::RIP && !scratch(memory.base) && !scratch(memory.index) {
                return Some(Kind::Copy);
            }
            if i.op0_register().size() == 2 {
                return None;
            }
            return Some(Kind::Address {
                register: number(i.op0_register()),
                size: i.op0_register().size() as u8,
                memory: Memory {
                    segment: None,
                    ..memory
                },
            });
        }
        if !has_memory {
            return Some(Kind::Copy);
        }
        let mut accesses = info.used_memory().iter();
        let access = accesses.next()?.access();
        if accesses.next().is_some() || i.is_vsib() || high {
            return None;
        }
        // Both scratch registers as operands leave none for the address.
        if operation.scratch & 3 == 3 {
            return None;
        }
        let moffs = matches!(opcode_byte(&operation.bytes), 0xa0..=0xa3)
            && i.encoding() == iced_x86::EncodingKind::Legacy
            && i.op_count() == 2
            && i.mnemonic() == Mnemonic::Mov;
        if moffs {
            return None;
        }
        // A bit offset in a register reaches beyond the operand.
        let bits = matches!(
            i.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        );
        let write = !matches!(access, OpAccess::Read | OpAccess::CondRead);
        if bits && i.op1_kind() == OpKind::Register {
            let (register, memory) = (i.op1_register(), self.memory(write)?);
            return register.is_gpr64().then(|| Kind::BitString(number(register), memory));
        }
        Some(Kind::Access(self.memory(write)?))
    }

    fn memory(&self, write: bool) -> Option<Memory> {
        let i = &self.instruction;
        let (base, index) = (i.memory_base(), i.memory_index());
        let register = |register: Register| register.is_gpr().then(|| number(register));
        let wide = |register: Register| matches!(register, Register::None | Register::RIP) || register.is_gpr64();
        let narrow = !wide(base) || !wide(index);
        if base == Register::EIP || base == Register::None && index == Register::None && i.memory_displ_size() == 4 {
            return None;
        }
        let segment = match i.memory_segment() {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ => None,
        };
        let size = i.memory_size().size();
        if i.mnemonic() != Mnemonic::Lea && !(1..=64).contains(&size) {
            return None;
        }
        Some(Memory {
            base: register(base),
            index: register(index),
            scale: i.memory_index_scale().trailing_zeros() as u8,
            displacement: i.memory_displacement64(),
            relative: base == Register::RIP,
            segment,
            narrow,
            size: size as u8,
            write,
            locked: i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg,
        })
    }
}

/// What an instruction adds to the one register that it writes, if that is all it does to registers.
fn added(i: &Instruction) -> Option<(u8, i32)> {
    let register = i.op0_register();
    if i.op0_kind() != OpKind::Register || !register.is_gpr64() {
        return None;
    }
    let value = match i.mnemonic() {
        Mnemonic::Add | Mnemonic::Sub if is_immediate(i.op1_kind()) => i.immediate(1) as i64,
        Mnemonic::Lea if i.memory_base() == register && i.memory_index() == Register::None => {
            i.memory_displacement64() as i64
        }
        _ => return None,
    };
    let value = i32::try_from(value).ok()?;
    let value = if i.mnemonic() == Mnemonic::Sub {
        value.checked_neg()?
    } else {
        value
    };
    Some((number(register), value))
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

fn prefixes(bytes: &[u8]) -> usize {
    bytes.iter().take_while(|&&byte| is_prefix(byte)).count()
}

/// Not so many prefixes that one more byte would be too much, and no REX prefix that another one makes void.
fn usual_prefixes(bytes: &[u8]) -> bool {
    let at = prefixes(bytes);
    at <= 4 && (bytes[at] & 0xf0 != 0x40 || !is_prefix(bytes[at + 1]) && bytes[at + 1] & 0xf0 != 0x40)
}

/// The first byte that is no prefix.
fn opcode_byte(bytes: &[u8]) -> u8 {
    let at = prefixes(bytes);
    bytes[at + usize::from(bytes[at] & 0xf0 == 0x40)]
}

fn shifts(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
    )
}

/// Processors leave alone what the manual calls undefined.
fn keeps_undefined(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Bt | M::Bts | M::Btr | M::Btc | M::Div | M::Idiv | M::Bsf | M::Bsr | M::Lzcnt | M::Tzcnt
    )
}

fn tells(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Cmp | M::Test | M::Bt | M::Clc | M::Stc | M::Cmc | M::Sahf)
}

/// Condition number of Jcc.
fn condition(mnemonic: Mnemonic) -> Option<u8> {
    use Mnemonic as M;
    const NAMES: [Mnemonic; 16] = [
        M::Jo,
        M::Jno,
        M::Jb,
        M::Jae,
        M::Je,
        M::Jne,
        M::Jbe,
        M::Ja,
        M::Js,
        M::Jns,
        M::Jp,
        M::Jnp,
        M::Jl,
        M::Jge,
        M::Jle,
        M::Jg,
    ];
    NAMES.iter().position(|&name| name == mnemonic).map(|at| at as u8)
}
