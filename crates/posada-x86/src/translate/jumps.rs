//! Ways from a RIP to its block, in two levels. A slot of a jump cache, which code looks at itself, knows one block and is
//! forgotten with its mapping. A [`Way`] stays: a stub finds it by RIP and by what the soft TLB says of RIP's page, without
//! Rust, and fills the slot.

use super::blocks::{Block, Number};
use super::frame::{self, Frame, JUMPS, LOG, LOG_GLOBAL, WAYS};
use super::run::Translator;
use crate::core::Core;

/// Spreads pages over ways: what Fibonacci hashing multiplies by.
pub const SPREAD: u32 = 0x9e37_79b1;
/// Where a mapping has the mode; the soft TLB leaves these bits zero.
pub const MODE_SHIFT: u32 = 8;

/// A way to a block.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Way {
    /// RIP.
    pub rip: u64,
    /// [`Entry::gpa`](crate::tlb::Entry::gpa) of its page, and the mode. Never zero in a way that leads somewhere: a page has
    /// its size there.
    pub mapping: u64,
    /// Address of the block's code.
    pub start: u64,
    /// The block.
    pub block: Number,
}

/// The place of a way for code at `rip` in the guest physical page at `gpa`.
fn index(rip: u64, gpa: u64) -> usize {
    (((gpa ^ rip) >> 12) as u32).wrapping_mul(SPREAD) as usize % WAYS ^ rip as usize % WAYS
}

fn mapping(gpa: u64, mode: usize) -> u64 {
    gpa | (mode as u64) << MODE_SHIFT
}

impl Frame {
    /// No way leads to a block any longer.
    pub(super) fn forget(&mut self, block: &Block, unknown: [u64; frame::MODES], jump_mask: u32) {
        let (rip, mode) = (block.key.rip, block.key.mode());
        let slot = &mut self.jumps[mode][frame::slot(rip, jump_mask)];
        if *slot == block.start {
            *slot = unknown[mode];
        }
        let way = &mut self.ways[index(rip, block.key.page())];
        if way.start == block.start {
            *way = Way::default();
        }
    }
}

impl Translator {
    /// Takes note of the slots that stubs have filled.
    pub(super) fn read_log(&mut self, core: &mut Core) {
        let count = std::mem::take(&mut core.frame.logged) as usize;
        for &slot in &core.frame.log[..count.min(LOG)] {
            self.filled.add((slot & !LOG_GLOBAL) as usize, slot & LOG_GLOBAL != 0);
        }
    }

    /// Forgets all slots of the jump caches, or only those for pages that are not global.
    pub(super) fn forget_jumps(&mut self, core: &mut Core, keep_global: bool) {
        self.read_log(core);
        let unknown = self.stubs.unknown;
        let forget = |number: usize| {
            let (mode, slot) = (number / JUMPS, number % JUMPS);
            core.frame.jumps[mode][slot] = unknown[mode];
        };
        if keep_global {
            self.filled.drain_context(forget);
        } else {
            self.filled.drain(forget);
        }
    }

    /// The block at RIP, if it is translated or worth it.
    pub(super) fn find(&mut self, core: &mut Core) -> Option<Number> {
        let mode = core.translated_mode()?;
        let rip = core.rip();
        // The interpreter will raise what this raises.
        let (page, _) = core.fetch_page(rip).ok()?;
        let mapping = mapping(core.fetched_gpa(rip), mode);
        let place = index(rip, page);
        let mut way = core.frame.ways[place];
        if (way.rip, way.mapping) != (rip, mapping) {
            let block = self.look_up(core, mode, false)?;
            let start = self.blocks.get(block).start;
            way = Way {
                rip,
                mapping,
                start,
                block,
            };
            core.frame.ways[place] = way;
        }
        let slot = frame::slot(rip, self.jump_mask);
        core.frame.jumps[mode][slot] = way.start;
        self.filled.add(mode * JUMPS + slot, core.fetched_globally(rip));
        Some(way.block)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Translator;
    use super::super::tests::{RAM, finish, machine};
    use crate::core::gpr;

    #[test]
    fn code_whose_slots_collide_is_found_without_leaving() {
        let mut core = machine();
        core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
        // The same pages at 20_0000h: code there has the slots of that at 0.
        core.physical_write(0x3008, &0x4007_u64.to_le_bytes());
        core.mmu.flush();
        // 0: mov ecx, 1000; 5: call rbx; xchg rbx, rbp; cmc; dec ecx; jnz 5; hlt. 40h: inc eax; ret
        let code = [
            0xb9, 0xe8, 3, 0, 0, 0xff, 0xd3, 0x48, 0x87, 0xdd, 0xf5, 0xff, 0xc9, 0x75, 0xf6, 0xf4,
        ];
        core.physical_write(RAM, &code);
        core.physical_write(RAM + 0x40, &[0xff, 0xc0, 0xc3]);
        let run = |core: &mut crate::core::Core| {
            core.halted = false;
            core.set_rip(0);
            core.regs[gpr::RAX] = 0;
            (core.regs[gpr::RBX], core.regs[gpr::RBP], core.regs[gpr::RSP]) = (0x40, 0x20_0040, 0x2f00);
            finish(core);
            assert_eq!((core.regs[gpr::RAX], core.rip()), (1000, 0x10));
            core.translator.as_ref().unwrap().counts().leaves.unknown
        };
        let first = run(&mut core);
        assert!(first < 10, "{first}");
        // Another address space: the page is looked up anew, its blocks are not.
        core.mmu.flush();
        let second = run(&mut core);
        assert!(second - first < 5, "{first} {second}");
        // And mapped elsewhere, where the function adds two.
        core.physical_write(0xc040, &[0x83, 0xc0, 2, 0xc3]);
        core.physical_write(0x3008, &0xd007_u64.to_le_bytes());
        core.physical_write(0xd000, &0xc007_u64.to_le_bytes());
        core.mmu.flush();
        core.halted = false;
        core.set_rip(0);
        core.regs[gpr::RAX] = 0;
        (core.regs[gpr::RBX], core.regs[gpr::RBP], core.regs[gpr::RSP]) = (0x40, 0x20_0040, 0x2f00);
        finish(&mut core);
        assert_eq!(core.regs[gpr::RAX], 1500);
    }
}
