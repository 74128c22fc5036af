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
    /// One bit for each general register whose value is.
    pub registers: u16,
    /// One bit for each general register whose upper 32 bits are.
    pub upper_halves: u64,
    /// The x87 unit's TOP and tags.
    pub mmx_state: bool,
    /// All of the x87 unit.
    pub x87: bool,
    /// One bit for each vector register.
    pub vectors: u32,
    /// One bit for each opmask register.
    pub opmasks: u8,
    /// MXCSR's flags.
    pub mxcsr: bool,
    /// A numeric exception may hide one of memory.
    pub numeric_first: bool,
    /// Where #PF may report any address: the first, and how many bytes.
    pub parts: Option<(u64, u64)>,
    /// The bits of an operand's addresses, if fewer than 64: its parts may be on both sides of 64 KiB or 4 GiB.
    pub wraps: Option<u64>,
    /// Each of two memory operands may fault first.
    pub any_memory_fault: bool,
    /// #PF may not be raised at all.
    pub optional: bool,
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

fn bit(register: Register) -> u16 {
    1 << register.full_register().number()
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
        // "BSF", "BSR": the destination is undefined if the source is 0.
        Mnemonic::Bsf | Mnemonic::Bsr => undefined.registers = bit(instruction.op0_register()),
        _ => {}
    }
    if instruction.is_string_instruction() && case.state.gpr[1] as u32 == 0 {
        undefined.upper_halves = of_fault(instruction, case).upper_halves;
    }
    undefined
}

/// What a fault may leave changed, and which fault it is, where that is the processor's own affair: faults of one
/// instruction are one class of Intel SDM 3A's "Priority Among Concurrent Events", inside which processors differ, and an
/// access of several parts makes them in any order.
pub fn of_fault(instruction: &Instruction, case: &Case) -> Undefined {
    use Mnemonic as M;
    let mut undefined = Undefined::default();
    let operands = || 0..instruction.op_count();
    let narrow = operands().any(|operand| {
        matches!(
            instruction.op_kind(operand),
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI
        )
    });
    // Fast strings with 32-bit addresses write the registers back, zero-extended, before the first round.
    if narrow && (instruction.has_rep_prefix() || instruction.has_repne_prefix()) {
        undefined.upper_halves = 1 << 1 | 1 << 6 | 1 << 7;
    }
    let registers = [instruction.memory_base(), instruction.memory_index()];
    undefined.wraps =
        if registers.iter().any(|register| register.size() == 2) || instruction.op0_kind() == OpKind::MemorySegDI {
            Some(0xffff)
        } else if narrow || case.bits == 32 || registers.iter().any(|register| register.size() == 4) {
            Some(0xffff_ffff)
        } else {
            None
        };
    // MMX instructions may have entered MMX state, that is, set TOP to 0 and all tags.
    undefined.mmx_state = operands().any(|operand| instruction.op_register(operand).is_mm());
    // What an unmasked numeric exception keeps from being stored may fault or not.
    if matches!(
        instruction.mnemonic(),
        M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp
    ) {
        undefined.numeric_first = case.state.area[area::FCW] & 0x3f != 0x3f;
    }
    let mut parts = 0;
    match instruction.mnemonic() {
        // An indirect CALL stores the return address, and then finds that its target is not canonical.
        M::Call => {
            undefined.any_memory_fault = true;
            let stack = case.state.gpr[4];
            undefined.memory.push(stack.wrapping_sub(8)..stack);
        }
        // What was popped before the fault may be in its registers.
        M::Popa | M::Popad => undefined.registers = 0xff & !(1 << 4),
        // A far pointer is an offset and a selector.
        M::Lss | M::Lfs | M::Lgs | M::Lds | M::Les => parts = instruction.memory_size().size() as u64,
        M::Fldenv => parts = 28,
        M::Fnstenv => parts = 28,
        M::Fnsave | M::Frstor => parts = 108,
        // Ten bytes are eight and two.
        M::Fstp | M::Fbstp | M::Fld | M::Fbld if instruction.memory_size().size() == 10 => parts = 10,
        M::Fxsave | M::Fxsave64 => parts = 512,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => parts = area::used() as u64,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => parts = 32,
        M::Fxrstor | M::Fxrstor64 => parts = 512,
        // Components that come before one that faults, or before a bad MXCSR, may be loaded.
        M::Xrstor | M::Xrstor64 => {
            parts = area::used() as u64;
            undefined.vectors = u32::MAX;
            undefined.opmasks = u8::MAX;
            undefined.x87 = true;
            // Nor does the manual say which components are read that need not be, and whether before the header is judged.
            undefined.optional = true;
            undefined.any_memory_fault = true;
        }
        // The bytes are stored one by one, at RDI. Faults with a mask of zeros are left to the processor ("MASKMOVDQU"),
        // and so are those at bytes that the mask leaves out.
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            let segment = match instruction.memory_segment() {
                Register::FS => case.state.fs_base,
                Register::GS => case.state.gs_base,
                _ => 0,
            };
            let mask = match instruction.op0_kind() {
                OpKind::MemorySegDI => 0xffff,
                OpKind::MemorySegEDI => 0xffff_ffff,
                _ => u64::MAX,
            };
            let offset = case.state.gpr[7] & mask;
            let address = segment.wrapping_add(offset);
            undefined.parts = Some((address, 16));
            undefined.optional = true;
        }
        // Numeric exceptions may come before or after those of the operand's store.
        M::Vcvtps2ph => {
            undefined.numeric_first = case.state.mxcsr() & 0x1f80 != 0x1f80;
            undefined.mxcsr = true;
            if instruction.op_mask() != Register::None {
                parts = instruction.memory_size().size() as u64;
            }
        }
        // Either operand may be read first.
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => undefined.any_memory_fault = true,
        // Elements may be gathered in any order, as long as none is missing below the one that faults ("VGATHERDPS").
        _ if instruction.is_vsib() => {
            for operand in [0, 2] {
                let register = instruction.op_register(operand);
                if register.is_vector_register() {
                    undefined.vectors |= 1 << register.number();
                }
            }
            if instruction.op_mask() != Register::None {
                undefined.opmasks |= 1 << instruction.op_mask().number();
            }
        }
        // Which of the elements that an opmask selects faults first.
        _ if instruction.op_mask() != Register::None => parts = instruction.memory_size().size() as u64,
        _ => {}
    }
    if parts != 0
        && let Some(address) = crate::generate::operand_address(instruction, case)
    {
        undefined.memory.push(address..address.wrapping_add(parts));
        undefined.parts = Some((address, parts));
    }
    undefined
}

impl Undefined {
    fn destination(&mut self, instruction: &Instruction, case: &Case, length: u64) {
        match crate::generate::operand_address(instruction, case) {
            Some(address) => self.memory.push(address..address.wrapping_add(length)),
            None => self.registers = bit(instruction.op0_register()),
        }
    }
}
