//! Memory operands of which an opmask selects parts (Intel SDM 1, 15.6): what it leaves out is neither read nor written,
//! and raises nothing.
//!
//! Where all of the operand is at hand the host does it all by itself. Elsewhere the selected parts go through a buffer.

use super::form::Form;
use super::run::{self, Bounce, call};
use crate::core::Core;
use crate::fault::Exec;
use crate::insn::Insn;
use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

const PAGE: u64 = 4096;

/// How an opmask selects parts of a memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// The opmask's number.
    register: u8,
    /// Bits of it that count.
    bits: u8,
    /// Bytes of an element in memory. There may be fewer of them than bits, which then select them by turns.
    element: u8,
    /// The elements are as many as bits are set, side by side.
    packed: bool,
    /// Faults count wherever they are in the operand.
    whole: bool,
}

/// What an opmask does to the memory operand of an instruction, if it has both.
pub fn masked(instruction: &Instruction) -> Option<Masked> {
    let register = instruction.op_mask();
    if register == Register::None || instruction.encoding() != EncodingKind::EVEX {
        return None;
    }
    // As many elements as without broadcast.
    let mut full = *instruction;
    full.set_is_broadcast(false);
    let size = full.memory_size();
    let mut element = granularity(instruction.mnemonic()).unwrap_or(size.element_size());
    let mut bits = (size.size() / element).max(1);
    if repeats(instruction.mnemonic()) {
        bits = instruction.op0_register().size() / element;
    }
    if instruction.is_broadcast() {
        element = instruction.memory_size().size();
    }
    Some(Masked {
        register: register.number() as u8,
        bits: bits as u8,
        element: element as u8,
        packed: packs(instruction.mnemonic()),
        whole: faults_whole(instruction),
    })
}

/// Bytes of memory for each bit of the opmask, where that is not what the operand's type says.
fn granularity(mnemonic: Mnemonic) -> Option<usize> {
    use Mnemonic as M;
    Some(match mnemonic {
        M::Vpmuldq | M::Vpmuludq => 8,
        M::Vpdpbusd | M::Vpdpbusds | M::Vpdpwssd | M::Vpdpwssds => 4,
        M::Vpshufbitqmb => 1,
        _ => return None,
    })
}

/// Their operand is repeated until it fills the destination.
fn repeats(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vbroadcastss
            | M::Vbroadcastsd
            | M::Vbroadcastf32x2
            | M::Vbroadcastf32x4
            | M::Vbroadcastf32x8
            | M::Vbroadcastf64x2
            | M::Vbroadcastf64x4
            | M::Vbroadcasti32x2
            | M::Vbroadcasti32x4
            | M::Vbroadcasti32x8
            | M::Vbroadcasti64x2
            | M::Vbroadcasti64x4
            | M::Vpbroadcastb
            | M::Vpbroadcastw
            | M::Vpbroadcastd
            | M::Vpbroadcastq
    )
}

fn packs(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Vcompressps
            | M::Vcompresspd
            | M::Vpcompressb
            | M::Vpcompressw
            | M::Vpcompressd
            | M::Vpcompressq
            | M::Vexpandps
            | M::Vexpandpd
            | M::Vpexpandb
            | M::Vpexpandw
            | M::Vpexpandd
            | M::Vpexpandq
    )
}

/// Exception classes with "NF" in their names (Intel SDM 2A, 2.8): an opmask does not suppress faults.
fn faults_whole(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        // By a count in memory; with a count in the instruction, memory holds elements.
        M::Vpsllw | M::Vpslld | M::Vpsllq | M::Vpsrlw | M::Vpsrld | M::Vpsrlq | M::Vpsraw | M::Vpsrad | M::Vpsraq => {
            instruction.op_kind(2) == OpKind::Memory
        }
        mnemonic => matches!(
            mnemonic,
            M::Valignd
                | M::Valignq
                | M::Vdbpsadbw
                | M::Vextractf32x4
                | M::Vextractf32x8
                | M::Vextractf64x2
                | M::Vextractf64x4
                | M::Vextracti32x4
                | M::Vextracti32x8
                | M::Vextracti64x2
                | M::Vextracti64x4
                | M::Vgf2p8affineinvqb
                | M::Vgf2p8affineqb
                | M::Vinsertf32x4
                | M::Vinsertf32x8
                | M::Vinsertf64x2
                | M::Vinsertf64x4
                | M::Vinserti32x4
                | M::Vinserti32x8
                | M::Vinserti64x2
                | M::Vinserti64x4
                | M::Vmovddup
                | M::Vmovshdup
                | M::Vmovsldup
                | M::Vpackssdw
                | M::Vpacksswb
                | M::Vpackusdw
                | M::Vpackuswb
                | M::Vpalignr
                | M::Vpconflictd
                | M::Vpconflictq
                | M::Vpermb
                | M::Vpermd
                | M::Vpermi2b
                | M::Vpermi2d
                | M::Vpermi2pd
                | M::Vpermi2ps
                | M::Vpermi2q
                | M::Vpermi2w
                | M::Vpermilpd
                | M::Vpermilps
                | M::Vpermpd
                | M::Vpermps
                | M::Vpermq
                | M::Vpermt2b
                | M::Vpermt2d
                | M::Vpermt2pd
                | M::Vpermt2ps
                | M::Vpermt2q
                | M::Vpermt2w
                | M::Vpermw
                | M::Vpmaddubsw
                | M::Vpmaddwd
                | M::Vpmultishiftqb
                | M::Vpshufb
                | M::Vpshufd
                | M::Vpshufhw
                | M::Vpshuflw
                | M::Vpunpckhbw
                | M::Vpunpckhdq
                | M::Vpunpckhqdq
                | M::Vpunpckhwd
                | M::Vpunpcklbw
                | M::Vpunpckldq
                | M::Vpunpcklqdq
                | M::Vpunpcklwd
                | M::Vshuff32x4
                | M::Vshuff64x2
                | M::Vshufi32x4
                | M::Vshufi64x2
                | M::Vshufpd
                | M::Vshufps
                | M::Vunpckhpd
                | M::Vunpckhps
                | M::Vunpcklpd
                | M::Vunpcklps
        ),
    }
}

impl Masked {
    /// Bytes of the operand, as a set: those of the elements that this value of the opmask selects.
    fn selected(self, opmask: u64, bytes: u8) -> u64 {
        let opmask = opmask & ones(self.bits);
        if self.packed {
            return ones(opmask.count_ones() as u8 * self.element);
        }
        let elements = bytes / self.element;
        let mut set = 0;
        for bit in (0..self.bits).filter(|bit| opmask >> bit & 1 != 0) {
            set |= ones(self.element) << (bit % elements * self.element);
        }
        set
    }
}

fn ones(count: u8) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

/// The bytes of the operand that the opmask selects now.
fn selected(core: &Core, form: &Form) -> u64 {
    let masked = form.masked.expect("the handler of masked forms");
    masked.selected(core.vector.opmask[usize::from(masked.register)], form.bytes)
}

/// Runs a form with a memory operand under an opmask.
pub fn with_memory(core: &mut Core, insn: &Insn, form: &Form) -> Exec {
    let bytes = u64::from(form.bytes);
    if let Ok(linear) = core.linear(insn, bytes, form.write) {
        if linear & u64::from(form.align) != 0 {
            // Not even that counts where nothing is selected.
            return if selected(core, form) == 0 {
                in_parts(core, insn, form)
            } else {
                core.general_protection()
            };
        }
        // What this page does not let all of the operand do may be left out by the mask, and so may another page.
        if linear % PAGE + bytes <= PAGE
            && let Ok(Some(pointer)) = core.host_range(linear, bytes, form.write)
        {
            return call(core, form, pointer);
        }
    }
    in_parts(core, insn, form)
}

#[cold]
#[inline(never)]
fn in_parts(core: &mut Core, insn: &Insn, form: &Form) -> Exec {
    let masked = form.masked.expect("the handler of masked forms");
    let length = usize::from(form.bytes);
    let selected = selected(core, form);
    if masked.whole && !form.write {
        return run::with_memory(core, insn, form);
    }
    if masked.whole {
        let linear = core.linear(insn, length as u64, true)?;
        core.host_range(linear, length as u64, true)?;
    }
    let element = usize::from(masked.element);
    let chosen = |at: usize| selected >> at & 1 != 0;
    let mut buffer = Bounce([0; 128]);
    let bytes = &mut buffer.0[..length];
    if !form.write {
        core.load_pieces(insn, bytes, element, chosen)?;
        return call(core, form, bytes.as_mut_ptr());
    }
    core.writable_pieces(insn, length, element, chosen)?;
    let before = (core.regs, core.arithmetic, core.vector.clone());
    call(core, form, bytes.as_mut_ptr())?;
    // The rights were checked, but another processor may have changed them since.
    core.store_pieces(insn, bytes, element, chosen).inspect_err(|_| {
        (core.regs, core.arithmetic, core.vector) = before;
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn of(code: &[u8]) -> Masked {
        masked(&Decoder::new(64, code, DecoderOptions::NONE).decode()).unwrap()
    }

    #[test]
    fn opmasks_select_bytes() {
        // vmovdqu32 zmm0{k2}, [rsi]
        let load = of(&[0x62, 0xf1, 0x7e, 0x4a, 0x6f, 0x06]);
        assert_eq!((load.register, load.selected(0x1_8001, 64)), (2, 0xf000_0000_0000_000f));
        // vaddps zmm0{k1}, zmm0, [rsi]{1to16}
        let broadcast = of(&[0x62, 0xf1, 0x7c, 0x59, 0x58, 0x06]);
        assert_eq!(
            [0, 1 << 16, 1 << 15].map(|opmask| broadcast.selected(opmask, 4)),
            [0, 0, 15]
        );
        // vpcompressb [rsi]{k1}, zmm0
        let packed = of(&[0x62, 0xf2, 0x7d, 0x49, 0x63, 0x06]);
        assert_eq!(packed.selected(0x8000_0000_0000_1001, 64), 7);
        assert_eq!(packed.selected(!0, 64), !0);
        // vbroadcastf32x4 zmm0{k1}, [rsi]
        let repeated = of(&[0x62, 0xf2, 0x7d, 0x49, 0x1a, 0x06]);
        assert_eq!(repeated.selected(0x8020, 16), 0xf0f0);
        // vmovss [rsi]{k1}, xmm0
        let scalar = of(&[0x62, 0xf1, 0x7e, 0x09, 0x11, 0x06]);
        assert_eq!([2, 3].map(|opmask| scalar.selected(opmask, 4)), [0, 15]);
    }
}
