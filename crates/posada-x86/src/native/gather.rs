//! EVEX-encoded gathers and scatters (Intel SDM 2C, VGATHERDPS, VPSCATTERDD): each element has an address of its own, and
//! takes its bit out of the opmask once it is done. A fault leaves the elements before it done.

use super::form::needs;
use crate::core::Core;
use crate::fault::Exec;
use crate::insn::Insn;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Bytes of an element, in [`Insn::extra`].
const ELEMENT: u32 = 0xff;
/// Shift of the bytes of an index, and of the number of elements.
const INDEX: u32 = 8;
const COUNT: u32 = 16;
/// Shift of the index register.
const REGISTER: u32 = 24;

/// Fills in handler, registers and sizes if `instruction` is one of these.
pub fn decode(instruction: &Instruction, insn: &mut Insn) -> bool {
    use Mnemonic as M;
    if instruction.encoding() != EncodingKind::EVEX {
        return false;
    }
    let (element, index) = match instruction.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd | M::Vscatterdps | M::Vpscatterdd => (4, 4),
        M::Vgatherdpd | M::Vpgatherdq | M::Vscatterdpd | M::Vpscatterdq => (8, 4),
        M::Vgatherqps | M::Vpgatherqd | M::Vscatterqps | M::Vpscatterqd => (4, 8),
        M::Vgatherqpd | M::Vpgatherqq | M::Vscatterqpd | M::Vpscatterqq => (8, 8),
        _ => return false,
    };
    let scatters = instruction.op0_kind() == OpKind::Memory;
    let register = instruction.op_register(u32::from(scatters));
    let indices = instruction.memory_index();
    let vector = [register, indices].map(Register::size).into_iter().max().unwrap_or(0);
    let count = vector as u32 / element.max(index);
    insn.extra = element | index << INDEX | count << COUNT | (indices.number() as u32) << REGISTER;
    insn.reg = register.number() as u8;
    insn.rm = instruction.op_mask().number() as u8;
    insn.exec = if scatters { scatter } else { gather };
    true
}

/// The elements of an instruction.
struct Elements {
    bytes: usize,
    index: usize,
    count: usize,
    indices: [u8; 64],
}

impl Elements {
    fn of(core: &Core, insn: &Insn) -> Self {
        let field = |shift: u32| (insn.extra >> shift & 0xff) as usize;
        Self {
            bytes: (insn.extra & ELEMENT) as usize,
            index: field(INDEX),
            count: field(COUNT),
            indices: core.vector_register(field(REGISTER)),
        }
    }

    /// Linear address of an element.
    fn linear(&self, core: &mut Core, insn: &Insn, number: usize, write: bool) -> Exec<u64> {
        let at = &self.indices[number * self.index..][..self.index];
        let index = match at.try_into() {
            Ok(four) => i32::from_le_bytes(four).into(),
            Err(_) => i64::from_le_bytes(at.try_into().expect("eight bytes")),
        };
        let offset = core.offset_of(insn).wrapping_add((index as u64) << insn.scale) & insn.address_mask();
        core.linear_at(insn, offset, self.bytes as u64, write)
    }
}

fn gather(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::AVX512, false)?;
    let elements = Elements::of(core, insn);
    let (opmask, bytes) = (usize::from(insn.rm), elements.bytes);
    let mut result = core.vector_register(insn.reg.into());
    result[elements.count * bytes..].fill(0);
    for number in 0..elements.count {
        if core.vector.opmask[opmask] >> number & 1 == 0 {
            continue;
        }
        let linear = elements.linear(core, insn, number, false)?;
        core.load_element(linear, &mut result[number * bytes..][..bytes])?;
        core.set_vector_register(insn.reg.into(), &result);
        core.vector.opmask[opmask] &= !(1 << number);
    }
    core.set_vector_register(insn.reg.into(), &result);
    core.vector.opmask[opmask] = 0;
    Ok(())
}

fn scatter(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::AVX512, false)?;
    let elements = Elements::of(core, insn);
    let (opmask, bytes) = (usize::from(insn.rm), elements.bytes);
    let data = core.vector_register(insn.reg.into());
    for number in 0..elements.count {
        if core.vector.opmask[opmask] >> number & 1 == 0 {
            continue;
        }
        let linear = elements.linear(core, insn, number, true)?;
        core.store_bytes(linear, &data[number * bytes..][..bytes])?;
        core.vector.opmask[opmask] &= !(1 << number);
    }
    core.vector.opmask[opmask] = 0;
    Ok(())
}

impl Core {
    /// All of ZMM0-31.
    pub(super) fn vector_register(&self, number: usize) -> [u8; 64] {
        if number >= 16 {
            return self.vector.zmm[number - 16];
        }
        let mut value = [0; 64];
        value[..32].copy_from_slice(&self.vector.ymm[number]);
        value[32..].copy_from_slice(&self.vector.zmm_high[number]);
        value
    }

    pub(super) fn set_vector_register(&mut self, number: usize, value: &[u8; 64]) {
        if number >= 16 {
            self.vector.zmm[number - 16] = *value;
            return;
        }
        self.vector.ymm[number].copy_from_slice(&value[..32]);
        self.vector.zmm_high[number].copy_from_slice(&value[32..]);
        self.vector.zmm_high_used |= value[32..] != [0; 32];
    }
}
