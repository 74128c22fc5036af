//! Instructions amid translated code that the interpreter's handlers execute: translated code calls them without leaving its
//! block, and goes straight on to where they lead, unless what they did asks for more.

use super::frame::{self, Seen};
use crate::core::Core;
use crate::insn::Insn;

/// [`Core::stop_at`] while a handler runs: no block of the interpreter's.
const CALM: usize = usize::MAX;

/// An instruction for its handler.
#[derive(Clone, Copy)]
pub struct Helped {
    /// The instruction.
    pub insn: Insn,
    /// RIP of the next one.
    pub next: u64,
    /// It may lead elsewhere, or change the mode: its block ends with it.
    pub ends: bool,
}

/// Executes an instruction. True if translated code goes on, at [`frame::Frame::target`].
pub extern "sysv64" fn help(core: &mut Core, helped: &Helped) -> bool {
    if core.copies.is_some() {
        // In check mode it is executed once, and not here.
        core.set_rip(helped.next.wrapping_sub(helped.insn.length.into()));
        return false;
    }
    let calm = loop {
        core.set_rip(helped.next);
        core.stop_at = CALM;
        core.instructions += 1;
        let done = (helped.insn.exec)(core, &helped.insn);
        if done.is_err() {
            core.take_back(&helped.insn);
            core.deliver_raised();
        }
        // A string instruction may stop halfway.
        let again = done.is_ok() && !helped.ends && core.rip() != helped.next;
        if !again || core.stop_at == 0 || core.shared.pending() {
            break done.is_ok() && core.stop_at == CALM;
        }
    };
    let look = core.interrupt_shadow | core.careful | core.halted | core.shut_down;
    if look || core.shared.pending() || core.frame.seen != core.seen() {
        return false;
    }
    core.frame.target = if calm && !helped.ends && core.rip() == helped.next {
        core.frame.site
    } else if let Some(mode) = core.translated_mode() {
        core.frame.jumps[mode][frame::slot(core.rip(), core.frame.jump_mask)]
    } else {
        return false;
    };
    true
}

impl Core {
    /// The mode of translated code, if it is possible now.
    #[inline]
    pub(super) fn translated_mode(&self) -> Option<usize> {
        let runs = self.bits64() && matches!(self.cpl, 0 | 3);
        frame::mode(self.mmu.active).filter(|_| runs)
    }

    /// What the ways from block to block depend on, now.
    #[inline]
    pub(super) fn seen(&self) -> Seen {
        Seen {
            generation: self.mmu.generation(),
            changes: self.ram.code().changes(),
            settings: self.settings(),
        }
    }
}
