//! What the manual leaves undefined (Intel SDM 2, each instruction's "Flags Affected" and "Operation"), and is therefore
//! not compared. The table of flags is iced-x86's, which follows those pages; what depends on a count is corrected here.
//!
//! x87's condition codes are compared even where undefined: the software CPU runs the host's own instruction for them.

use crate::state::{Case, area};
use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register, RflagsBits};

const CF: u64 = 1;
const AF: u64 = 1 << 4;
const OF: u64 = 1 << 11;
const ARITHMETIC: u64 = 0x8d5;

/// What to leave out of the comparison of one case.
#[derive(Default)]
pub struct Undefined {
    /// RFLAGS bits.
    pub flags: u64,
    /// A general register whose value is undefined.
    pub register: Option<Register>,
    /// One bit for each general register whose upper 32 bits are.
    pub upper_halves: u64,
    /// Linear addresses of bytes in memory.
    pub memory: Vec<std::ops::Range<u64>>,
}

/// The count of a shift or rotation as the processor masks it, and the operand's bits.
fn count(instruction: &Instruction, case: &Case) -> (u64, u64) {
    let operand = instruction.op_count() - 1;
    let count = match instruction.op_kind(operand) {
        OpKind::Immediate8 => instruction.immediate8().into(),
        _ => case.state.gpr[1],
    };
    let bits = match instruction.code().op_code().op0_kind() {
        OpCodeOperandKind::r8_or_mem => 8,
        OpCodeOperandKind::r16_or_mem => 16,
        OpCodeOperandKind::r32_or_mem => 32,
        _ => 64,
    };
    (count & if bits == 64 { 63 } else { 31 }, bits)
}

fn table(instruction: &Instruction) -> u64 {
    let bits = instruction.rflags_undefined();
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .into_iter()
    .fold(0, |flags, (bit, at)| flags | u64::from(bits & bit != 0) << at)
}

/// What the instruction of a case leaves undefined.
pub fn of(instruction: &Instruction, case: &Case) -> Undefined {
    let mut undefined = Undefined {
        flags: table(instruction),
        ..Undefined::default()
    };
    match instruction.mnemonic() {
        // "SAL/SAR/SHL/SHR": a count of 0 changes nothing; OF is defined for 1 only; CF not where all bits leave.
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar => {
            let (count, bits) = count(instruction, case);
            undefined.flags = match count {
                0 => 0,
                1 => AF,
                _ if count >= bits && instruction.mnemonic() != Mnemonic::Sar => AF | OF | CF,
                _ => AF | OF,
            };
        }
        // "RCL/RCR/ROL/ROR": OF is defined for a count of 1 only.
        Mnemonic::Rol | Mnemonic::Ror | Mnemonic::Rcl | Mnemonic::Rcr => {
            let (count, _) = count(instruction, case);
            undefined.flags = if count > 1 { OF } else { 0 };
        }
        // "SHLD", "SHRD": a count beyond the operand leaves flags and destination undefined.
        Mnemonic::Shld | Mnemonic::Shrd => {
            let (count, bits) = count(instruction, case);
            undefined.flags = match count {
                0 => 0,
                1 => AF,
                _ if count > bits => ARITHMETIC,
                _ => AF | OF,
            };
            if count > bits {
                undefined.destination(instruction, case, bits / 8);
            }
        }
        // x87's FOP, FIP and FDP ("x87 FPU Instruction and Data (Operand) Pointers", Intel SDM 1, 8.1.8) tell of the last
        // x87 instruction, which in the child is another than in the guest.
        Mnemonic::Fnstenv | Mnemonic::Fnsave => {
            let narrow = instruction.code().op_code().operand_size() == 16;
            undefined.pointers(instruction, case, if narrow { 6..14 } else { 12..28 });
        }
        Mnemonic::Fxsave
        | Mnemonic::Fxsave64
        | Mnemonic::Xsave
        | Mnemonic::Xsave64
        | Mnemonic::Xsavec
        | Mnemonic::Xsavec64
        | Mnemonic::Xsaveopt
        | Mnemonic::Xsaveopt64 => {
            undefined.pointers(
                instruction,
                case,
                area::POINTERS.start as u64..area::POINTERS.end as u64,
            );
        }
        // "BSF", "BSR": the destination is undefined if the source is 0.
        Mnemonic::Bsf | Mnemonic::Bsr => undefined.register = Some(instruction.op0_register()),
        _ => {}
    }
    if instruction.is_string_instruction() && case.state.gpr[1] as u32 == 0 {
        undefined.upper_halves = of_fault(instruction, case).upper_halves;
    }
    undefined
}

/// What a fault may leave changed, though the manual has it change nothing: what processors are seen to do.
pub fn of_fault(instruction: &Instruction, case: &Case) -> Undefined {
    let mut undefined = Undefined::default();
    let narrow = (0..instruction.op_count()).any(|operand| {
        matches!(
            instruction.op_kind(operand),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
        )
    });
    // Fast strings with 32-bit addresses write the registers back, zero-extended, before the first round.
    if narrow && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) {
        undefined.upper_halves = 1 << 1 | 1 << 6 | 1 << 7;
    }
    // An indirect CALL stores the return address and then finds that its target is not canonical.
    if instruction.mnemonic() == Mnemonic::Call {
        let stack = case.state.gpr[4];
        undefined.memory.push(stack.wrapping_sub(8)..stack);
    }
    undefined
}

impl Undefined {
    fn destination(&mut self, instruction: &Instruction, case: &Case, length: u64) {
        match crate::generate::operand_address(instruction, case) {
            Some(address) => self.memory.push(address..address.wrapping_add(length)),
            None => self.register = Some(instruction.op0_register()),
        }
    }

    fn pointers(&mut self, instruction: &Instruction, case: &Case, at: std::ops::Range<u64>) {
        if let Some(address) = crate::generate::operand_address(instruction, case) {
            self.memory
                .push(address.wrapping_add(at.start)..address.wrapping_add(at.end));
        }
    }
}
