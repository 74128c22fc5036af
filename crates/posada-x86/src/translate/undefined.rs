//! Which arithmetic flags the manual leaves undefined (Intel SDM 2, "Flags Affected"), by iced-x86's table.

use super::operation::MAX_LENGTH;
use crate::core::Core;
use iced_x86::{Decoder, DecoderOptions, Instruction, RflagsBits};

/// The instruction at `rip`, if its bytes can be read.
pub(super) fn instruction(core: &Core, rip: u64) -> Option<Instruction> {
    let bytes: Vec<u8> = (0..MAX_LENGTH as u64)
        .map_while(|at| core.peek(rip.wrapping_add(at)))
        .collect();
    let instruction = Decoder::with_ip(64, &bytes, rip, DecoderOptions::NONE).decode();
    (!instruction.is_invalid()).then_some(instruction)
}

/// Flags (as [`RflagsBits`]) that are undefined after the instructions at these addresses.
pub(super) fn after(core: &Core, executed: &[u64]) -> u8 {
    let instructions = executed.iter().filter_map(|&rip| instruction(core, rip));
    let undefined = instructions.fold(0, |undefined, instruction| {
        // What it may leave alone, as a shift by zero does, it does not define.
        let shift = instruction.rflags_undefined() != 0;
        let defined = if shift { 0 } else { instruction.rflags_modified() };
        undefined & !defined | instruction.rflags_undefined()
    });
    undefined as u8
}

/// The same flags as they are in [`Core::arithmetic`].
pub(super) fn arithmetic(flags: u8) -> u16 {
    let places = [
        (RflagsBits::OF, 1 << 0),
        (RflagsBits::CF, 1 << 8),
        (RflagsBits::PF, 1 << 10),
        (RflagsBits::AF, 1 << 12),
        (RflagsBits::ZF, 1 << 14),
        (RflagsBits::SF, 1 << 15),
    ];
    let set = places.iter().filter(|(flag, _)| u32::from(flags) & flag != 0);
    set.map(|(_, place)| place).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::flag;

    #[test]
    fn flags_have_their_places() {
        let mut core = crate::mmu::tests::core();
        let bits = [
            (RflagsBits::OF, flag::OF),
            (RflagsBits::CF, flag::CF),
            (RflagsBits::PF, flag::PF),
            (RflagsBits::AF, flag::AF),
            (RflagsBits::ZF, flag::ZF),
            (RflagsBits::SF, flag::SF),
        ];
        for (number, bit) in bits {
            core.set_arithmetic(bit);
            let none = core.arithmetic & !(1 << 9);
            assert_eq!(none, arithmetic(number as u8), "{bit:x}");
        }
    }

    #[test]
    fn a_multiplication_leaves_some_undefined_until_an_addition() {
        let mut core = crate::mmu::tests::core();
        // 0: mul ebx; 2: shl eax, 2; 5: add eax, ebx
        core.physical_write(0x8000, &[0xf7, 0xe3, 0xc1, 0xe0, 2, 0x01, 0xd8]);
        let after_mul = after(&core, &[0]);
        assert_eq!(
            u32::from(after_mul),
            RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::PF
        );
        assert_ne!(u32::from(after(&core, &[2])) & RflagsBits::OF, 0);
        assert_eq!(after(&core, &[0, 2, 5]), 0);
    }
}
