//! Masked moves and gathers of AVX2: they touch only the elements that a mask selects, so the host cannot run them on a
//! buffer.

use super::form::needs;
use crate::core::Core;
use crate::fault::Exec;
use crate::insn::{COMPLEX, Insn};
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// Bytes of an element, in [`Insn::extra`].
const ELEMENT: u32 = 0xff;
/// Shift of the bytes of a gather's index, and of the vector's bytes.
const INDEX: u32 = 8;
const VECTOR: u32 = 16;
/// Shift of a gather's index register.
const REGISTER: u32 = 24;

/// Fills in handler, registers and sizes if `instruction` is one of these.
pub fn decode(instruction: &Instruction, insn: &mut Insn) -> bool {
    use Mnemonic as M;
    if instruction.encoding() == EncodingKind::EVEX {
        return false;
    }
    let number = |operand| instruction.op_register(operand).number() as u8;
    let (element, index) = match instruction.mnemonic() {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => {
            (insn.reg, insn.rm) = (number(1), number(2));
            insn.exec = match instruction.mnemonic() {
                M::Maskmovq => mask_bytes_mmx,
                M::Maskmovdqu => mask_bytes::<{ needs::SSE }>,
                _ => mask_bytes::<{ needs::AVX }>,
            };
            return true;
        }
        M::Vmaskmovps | M::Vpmaskmovd => (4, 0),
        M::Vmaskmovpd | M::Vpmaskmovq => (8, 0),
        M::Vgatherdps | M::Vpgatherdd => (4, 4),
        M::Vgatherdpd | M::Vpgatherdq => (8, 4),
        M::Vgatherqps | M::Vpgatherqd => (4, 8),
        M::Vgatherqpd | M::Vpgatherqq => (8, 8),
        _ => return false,
    };
    let vector = (0..3)
        .map(|operand| instruction.op_register(operand))
        .chain([instruction.memory_index()])
        .filter(|register| register.is_vector_register())
        .map(Register::size)
        .max()
        .unwrap_or(16) as u32;
    insn.extra = element | index << INDEX | vector << VECTOR;
    if index != 0 {
        insn.extra |= (instruction.memory_index().number() as u32) << REGISTER;
        (insn.reg, insn.rm) = (number(0), number(2));
        insn.exec = gather;
    } else if instruction.op_kind(0) == OpKind::Memory {
        (insn.reg, insn.rm) = (number(2), number(1));
        insn.exec = mask_store;
    } else {
        (insn.reg, insn.rm) = (number(0), number(1));
        insn.exec = mask_load;
    }
    true
}

type Vector = [u8; 32];

/// The sign-extended element at byte `at`.
fn element(vector: &Vector, at: usize, bytes: usize) -> i64 {
    match bytes {
        4 => i32::from_le_bytes(vector[at..at + 4].try_into().expect("four bytes")).into(),
        _ => i64::from_le_bytes(vector[at..at + 8].try_into().expect("eight bytes")),
    }
}

impl Core {
    /// Linear address of `bytes` bytes at a distance from an instruction's memory operand, beyond the address size too.
    fn linear_beside(&mut self, insn: &Insn, distance: u64, bytes: u64, write: bool) -> Exec<u64> {
        let offset = self.offset_of(insn).wrapping_add(distance);
        self.linear_at(insn, offset, bytes, write)
    }

    pub(super) fn linear_at(&mut self, insn: &Insn, offset: u64, bytes: u64, write: bool) -> Exec<u64> {
        if insn.flags & COMPLEX == 0 {
            return Ok(offset);
        }
        self.segment_linear(insn.segment.into(), offset, bytes, write)
    }

    /// Loads the pieces of `bytes` bytes that `chosen` names by their first byte.
    pub(super) fn load_pieces(
        &mut self,
        insn: &Insn,
        data: &mut [u8],
        bytes: usize,
        chosen: impl Fn(usize) -> bool,
    ) -> Exec {
        for at in (0..data.len()).step_by(bytes).filter(|&at| chosen(at)) {
            let linear = self.linear_beside(insn, at as u64, bytes as u64, false)?;
            self.load_bytes(linear, &mut data[at..at + bytes])?;
        }
        Ok(())
    }

    /// Raises what storing these pieces would.
    pub(super) fn writable_pieces(
        &mut self,
        insn: &Insn,
        length: usize,
        bytes: usize,
        chosen: impl Fn(usize) -> bool,
    ) -> Exec {
        for at in (0..length).step_by(bytes).filter(|&at| chosen(at)) {
            let linear = self.linear_beside(insn, at as u64, bytes as u64, true)?;
            self.host_range(linear, bytes as u64, true)?;
        }
        Ok(())
    }

    /// Stores the pieces of `data` that `chosen` names by their first byte: all or none.
    pub(super) fn store_pieces(
        &mut self,
        insn: &Insn,
        data: &[u8],
        bytes: usize,
        chosen: impl Fn(usize) -> bool,
    ) -> Exec {
        self.store_at(data, bytes, chosen, |core, at| {
            core.linear_beside(insn, at as u64, bytes as u64, true)
        })
    }

    /// Stores the bytes that `chosen` names: all or none. Each has an address of the address size, and those of the
    /// whole operand must be canonical, or inside the segment.
    fn store_chosen(&mut self, insn: &Insn, data: &[u8], chosen: impl Fn(usize) -> bool) -> Exec {
        let (first, mask) = (self.offset_of(insn), insn.address_mask());
        for at in [0, data.len() as u64 - 1] {
            let linear = self.linear_at(insn, first.wrapping_add(at) & mask, 1, true)?;
            if self.bits64() && (linear as i64) << 16 >> 16 != linear as i64 {
                self.load::<u8>(linear)?;
            }
        }
        self.store_at(data, 1, chosen, |core, at| {
            core.linear_at(insn, first.wrapping_add(at as u64) & mask, 1, true)
        })
    }

    fn store_at(
        &mut self,
        data: &[u8],
        bytes: usize,
        chosen: impl Fn(usize) -> bool,
        linear: impl Fn(&mut Self, usize) -> Exec<u64>,
    ) -> Exec {
        let mut places = [0; 64];
        for (place, at) in places.iter_mut().zip((0..data.len()).step_by(bytes)) {
            if chosen(at) {
                *place = linear(self, at)?;
                self.host_range(*place, bytes as u64, true)?;
            }
        }
        for (place, at) in places.into_iter().zip((0..data.len()).step_by(bytes)) {
            if chosen(at) {
                self.store_bytes(place, &data[at..at + bytes])?;
            }
        }
        Ok(())
    }

    pub(super) fn load_element(&mut self, linear: u64, data: &mut [u8]) -> Exec {
        if data.len() == 4 {
            data.copy_from_slice(&self.load::<u32>(linear)?.to_le_bytes());
        } else {
            data.copy_from_slice(&self.load::<u64>(linear)?.to_le_bytes());
        }
        Ok(())
    }
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q from memory.
fn mask_load(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::AVX, false)?;
    let (bytes, length) = sizes(insn);
    let mask = core.vector.ymm[usize::from(insn.rm)];
    let mut result = [0; 32];
    for at in (0..length).step_by(bytes) {
        if element(&mask, at, bytes) < 0 {
            let linear = core.linear_beside(insn, at as u64, bytes as u64, false)?;
            core.load_element(linear, &mut result[at..at + bytes])?;
        }
    }
    core.vector.ymm[usize::from(insn.reg)] = result;
    core.clear_high(1 << insn.reg);
    Ok(())
}

/// VMASKMOVPS/PD, VPMASKMOVD/Q to memory.
fn mask_store(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::AVX, false)?;
    let (bytes, length) = sizes(insn);
    let mask = core.vector.ymm[usize::from(insn.rm)];
    let data = core.vector.ymm[usize::from(insn.reg)];
    core.store_pieces(insn, &data[..length], bytes, |at| element(&mask, at, bytes) < 0)
}

/// MASKMOVDQU and VMASKMOVDQU.
fn mask_bytes<const NEEDS: u8>(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(NEEDS, false)?;
    let mask = core.vector.ymm[usize::from(insn.rm)];
    let data = core.vector.ymm[usize::from(insn.reg)];
    core.store_chosen(insn, &data[..16], |at| mask[at] >= 0x80)
}

/// MASKMOVQ, which like all of MMX makes every x87 register valid and the first one the top.
fn mask_bytes_mmx(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::X87, true)?;
    core.wait_x87()?;
    // FXSAVE has the registers in the order of the x87 stack.
    let top = usize::from(core.vector.fx[3] >> 3 & 7);
    let place = |register: u8| 32 + (usize::from(register) + 8 - top) % 8 * 16;
    let register = |core: &Core, number| -> [u8; 8] {
        let at = place(number);
        core.vector.fx[at..at + 8].try_into().expect("eight bytes")
    };
    let (mask, data) = (register(core, insn.rm), register(core, insn.reg));
    core.store_chosen(insn, &data, |at| mask[at] >= 0x80)?;
    core.vector.fx[32..160].rotate_right(top * 16);
    core.vector.fx[3] &= !0x38;
    core.vector.fx[4] = 0xff;
    Ok(())
}

fn sizes(insn: &Insn) -> (usize, usize) {
    ((insn.extra & ELEMENT) as usize, (insn.extra >> VECTOR & 0xff) as usize)
}

/// VGATHER and VPGATHER (Intel SDM 2C): a fault leaves the elements before it done and out of the mask.
fn gather(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::AVX, false)?;
    let (bytes, vector) = sizes(insn);
    let index_bytes = (insn.extra >> INDEX & 0xff) as usize;
    let indices = core.vector.ymm[(insn.extra >> REGISTER) as usize];
    let count = vector / bytes.max(index_bytes);
    let (target, mask) = (usize::from(insn.reg), usize::from(insn.rm));
    let asked = core.vector.ymm[mask];
    let selected = (0..count).filter(|&number| element(&asked, number * bytes, bytes) < 0);
    core.vector.ymm[mask] = [0; 32];
    for number in selected.clone() {
        core.vector.ymm[mask][number * bytes..][..bytes].fill(0xff);
    }
    for number in selected {
        let distance = (element(&indices, number * index_bytes, index_bytes) as u64) << insn.scale;
        let offset = core.offset_of(insn).wrapping_add(distance) & insn.address_mask();
        let linear = core.linear_at(insn, offset, bytes as u64, false)?;
        let mut data = [0; 8];
        core.load_element(linear, &mut data[..bytes])?;
        core.vector.ymm[target][number * bytes..][..bytes].copy_from_slice(&data[..bytes]);
        core.vector.ymm[mask][number * bytes..][..bytes].fill(0);
    }
    core.vector.ymm[mask].fill(0);
    core.vector.ymm[target][count * bytes..].fill(0);
    core.clear_high(1 << target | 1 << mask);
    Ok(())
}
