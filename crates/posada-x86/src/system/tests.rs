//! What tests of system instructions share: bare instructions and a processor with descriptor tables.

use crate::core::{Core, seg};
use crate::insn::{Insn, ZERO};

/// An instruction without operands that the handlers under test read: registers are RAX, memory is at address 0.
pub(crate) fn insn() -> Insn {
    Insn {
        exec: |_, _| Ok(()),
        imm: 0,
        disp: 0,
        length: 2,
        reg: 0,
        rm: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        segment: seg::DS as u8,
        flags: 0,
        extra: 0,
    }
}

/// Goes to privilege level 3.
pub(crate) fn user(core: &mut Core) {
    core.segments[seg::SS].access = 0xf3;
    core.update_mode();
}
