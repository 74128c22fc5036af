//! Check mode: each block runs as translated code and in the interpreter, and both must leave the same behind.
//!
//! Translated code runs first, on a second Core (the *shadow*) which is set like the first one: soft TLB, registers and frame
//! are its own, and pages that it stores to are copies. It has no effect but there. Then the interpreter runs on the guest's
//! own state until it is where translated code has left, and both are compared. The guest goes on with what the interpreter
//! did, so a wrong translation is found where it is wrong.
//!
//! What has effects elsewhere or may not be repeated (devices, model specific registers, the time) is the interpreter's in
//! translated code too; here its block ends before it, and the interpreter executes it once. RDTSC joins it.

use super::Translator;
use super::blocks::Block;
use super::frame::Frame;
use super::report;
use super::stubs::{Leave, Wanted};
use super::undefined;
use crate::core::{Core, flag};
use crate::tlb::Mmu;
use posada_engine::NoDevices;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Blocks that a processor runs before it lets others have their turn.
const TURN: u32 = 64;
/// A device that was writing when a difference was found has told of it by then.
const SETTLE: Duration = Duration::from_millis(50);
const PAGE: usize = 4096;

/// Processors that run guest code one at a time, in the order in which they asked, so that no memory changes between the two
/// runs of a block.
#[derive(Debug, Default)]
pub struct Turns {
    asked: AtomicU64,
    served: Mutex<u64>,
    changed: Condvar,
    /// Times when a processor did something outside its turn.
    outside: AtomicU64,
}

impl Turns {
    pub(crate) fn take(&self) {
        let mine = self.asked.fetch_add(1, Ordering::Relaxed);
        let served = self.served.lock().unwrap_or_else(PoisonError::into_inner);
        let others = |served: &mut u64| *served != mine;
        drop(
            self.changed
                .wait_while(served, others)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    pub(crate) fn give(&self) {
        *self.served.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.changed.notify_all();
    }

    /// Somebody else waits for a turn; to be asked by who has it.
    fn is_wanted(&self) -> bool {
        let served = *self.served.lock().unwrap_or_else(PoisonError::into_inner);
        self.asked.load(Ordering::Relaxed) > served + 1
    }
}

/// A turn, given back when dropped.
pub(crate) struct Turn(Arc<Turns>);

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.give();
    }
}

/// Aligned like the original: vector instructions fault where their operands are not.
#[repr(align(4096))]
struct Page([u8; PAGE]);

/// A page of guest RAM that the shadow has stored to, and its copy.
struct Copy {
    gpa: u64,
    real: *mut u8,
    bytes: Box<Page>,
}

/// What a shadow has of memory in one run.
pub struct Copies {
    pages: Vec<Copy>,
    free: Vec<Box<Page>>,
    /// The soft TLBs of the Core whose shadow it is, during a run: what they have may be older than the page tables.
    tables: *const Mmu,
}

// SAFETY: the pointers name guest RAM, which outlives the Core that owns this; the tables are looked at only during a run, by
// the thread that has their Core.
unsafe impl Send for Copies {}

impl Copies {
    fn forget(&mut self) {
        self.free.extend(self.pages.drain(..).map(|page| page.bytes));
    }

    fn find(&mut self, gpa: u64) -> Option<*mut u8> {
        let page = self.pages.iter_mut().find(|page| page.gpa == gpa);
        page.map(|page| page.bytes.0.as_mut_ptr())
    }

    fn add(&mut self, gpa: u64, real: *mut u8) -> *mut u8 {
        let mut bytes = self.free.pop().unwrap_or_else(|| Box::new(Page([0; PAGE])));
        // SAFETY: a page of guest RAM; whatever races with this is found out by [`Core::disturbances`].
        unsafe { std::ptr::copy_nonoverlapping(real, bytes.0.as_mut_ptr(), PAGE) };
        self.pages.push(Copy { gpa, real, bytes });
        self.pages.last_mut().expect("just added").bytes.0.as_mut_ptr()
    }

    /// Bytes of memory that differ: guest physical address, what the interpreter left, and translated code.
    pub(super) fn differences(&self) -> impl Iterator<Item = (u64, u8, u8)> {
        self.pages.iter().flat_map(|page| {
            // SAFETY: as in `add`.
            let real = unsafe { std::slice::from_raw_parts(page.real, PAGE) };
            let equal = real == &page.bytes.0[..];
            let bytes = if equal { 0 } else { PAGE };
            (0..bytes)
                .map(|at| (page.gpa + at as u64, real[at], page.bytes.0[at]))
                .filter(|(_, one, other)| one != other)
        })
    }
}

/// What came of a block.
enum Outcome {
    /// None is translated here.
    Nothing,
    /// Both did the same, or one instruction was interpreted.
    Done,
    /// They did not.
    Differed(String),
}

/// How translated code was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// For this reason.
    For(Leave),
    /// By a direct branch to a block without groups.
    Plain,
}

/// One vCPU's part in check mode.
pub struct Checker {
    shadow: Box<Core>,
    /// The next block is to be one without groups.
    plain: bool,
    /// Blocks that ran in this turn.
    blocks: u32,
    judged: u64,
    not_judged: u64,
}

impl Checker {
    /// For this processor.
    pub fn new(core: &Core) -> Self {
        let mut shadow = Core::new(Arc::clone(&core.ram), Arc::new(NoDevices), Arc::clone(&core.shared));
        shadow.copies = Some(Copies {
            pages: Vec::new(),
            free: Vec::new(),
            tables: ptr::null(),
        });
        Self {
            shadow,
            plain: false,
            blocks: 0,
            judged: 0,
            not_judged: 0,
        }
    }

    /// Blocks that were compared, and blocks that could not be.
    pub fn counts(&self) -> (u64, u64) {
        (self.judged, self.not_judged)
    }

    /// What translated code has left beside a Core's state.
    pub fn frame(&self) -> &Frame {
        &self.shadow.frame
    }

    /// The Core on which translated code runs.
    pub(super) fn shadow(&mut self) -> &mut Core {
        &mut self.shadow
    }

    /// Runs the block at RIP both ways, or interprets the one instruction there that translated code leaves to the
    /// interpreter.
    fn block(&mut self, core: &mut Core, translator: &mut Translator) -> Outcome {
        self.shadow.forget_mappings();
        let Some(number) = translator.find_for_check(core, std::mem::take(&mut self.plain)) else {
            return Outcome::Nothing;
        };
        let before = core.disturbances();
        let begin = core.rip();
        self.shadow.mirror(core);
        let block = translator.block(number);
        // Code that crosses a page's end looks whether both pages are still what they were.
        for page in 0..=u64::from(block.source.next.is_some()) {
            let _ = self.shadow.fetch_page(begin.wrapping_add(page * PAGE as u64));
        }
        self.shadow.look_at(&raw const core.mmu);
        let left = translator.enter_for_check(&mut self.shadow, number);
        self.shadow.look_at(ptr::null());
        self.plain = left == Left::Plain;
        let exit = self.shadow.rip();
        match left {
            Left::Plain if exit == begin => return Outcome::Done,
            Left::For(Leave::Chain | Leave::Unknown) | Left::Plain => {}
            Left::For(_) if exit == begin => {
                core.interpret_one();
                return Outcome::Done;
            }
            Left::For(_) => {}
        }
        let block = translator.block(number);
        let steps = block.wanted.len() - 1;
        if (exit as i64) << 16 >> 16 != exit as i64 {
            // The interpreter faults at the branch: see docs/emulator.md.
            for _ in 0..steps {
                core.interpret_one();
                if !block.wanted.iter().any(|&(rip, _)| rip == core.rip()) {
                    break;
                }
            }
            self.not_judged += 1;
            return Outcome::Done;
        }
        let (mut executed, mut difference) = (Vec::new(), None);
        for _ in 0..steps {
            executed.push(core.rip());
            core.interpret_one();
            if core.rip() != exit {
                continue;
            }
            if self.alike(core, block, &executed) {
                self.judged += 1;
                return Outcome::Done;
            }
            // The guest's own code may come by there before it is where translated code has left.
            difference.get_or_insert_with(|| {
                report::differences(core, &self.shadow, block.compared_flags(core, &executed), self.copies())
            });
        }
        if core.disturbances() == before {
            thread::sleep(SETTLE);
        }
        if core.disturbances() != before {
            self.not_judged += 1;
            return Outcome::Done;
        }
        let difference = difference.unwrap_or_else(|| "  the interpreter never came there\n".into());
        let ways = report::Ways {
            executed: &executed,
            exit,
            left: &format!("{left:?}"),
        };
        Outcome::Differed(report::report(
            core,
            block,
            &ways,
            &difference,
            translator.code_of(number),
        ))
    }

    /// Both have left the same behind, now that the interpreter is where translated code has left.
    fn alike(&self, core: &Core, block: &Block, executed: &[u64]) -> bool {
        let shadow = &*self.shadow;
        let flags = core.arithmetic ^ shadow.arithmetic;
        core.regs[..16] == shadow.regs[..16]
            && (flags & block.wanted_flags(core, executed) == 0 || flags & block.compared_flags(core, executed) == 0)
            && (core.system_flags ^ shadow.system_flags) & !flag::RF == 0
            && core.cpl == shadow.cpl
            && core.mmu.active == shadow.mmu.active
            && core.segments == shadow.segments
            && core.msr.kernel_gs_base == shadow.msr.kernel_gs_base
            && core.vector.ymm == shadow.vector.ymm
            && core.vector.zmm_high == shadow.vector.zmm_high
            && core.vector.zmm == shadow.vector.zmm
            && core.vector.opmask == shadow.vector.opmask
            && core.vector.mxcsr == shadow.vector.mxcsr
            && self.copies().differences().next().is_none()
    }

    fn copies(&self) -> &Copies {
        self.shadow.copies.as_ref().expect("a shadow has them")
    }
}

impl Core {
    /// Waits for this processor's turn, in check mode.
    pub(crate) fn take_turn(&self) -> Option<Turn> {
        let turns = Arc::clone(self.turns.as_ref()?);
        turns.take();
        Some(Turn(turns))
    }

    /// In check mode: something is about to be done, or was, outside this processor's turn.
    pub(crate) fn leave_turn(&self) {
        if let Some(turns) = &self.turns {
            turns.outside.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Counts everything that may have written to RAM beside the processor whose turn it is.
    fn disturbances(&self) -> u64 {
        let outside = self
            .turns
            .as_ref()
            .map_or(0, |turns| turns.outside.load(Ordering::SeqCst));
        self.ram.code().device_writes() + outside
    }

    /// Runs blocks both ways until something else is to be looked at. False if none ran.
    #[cold]
    pub(super) fn execute_checked(&mut self, translator: &mut Translator, mut checker: Box<Checker>) -> bool {
        let mut any = false;
        for _ in checker.blocks..TURN {
            checker.blocks += 1;
            match checker.block(self, translator) {
                Outcome::Nothing => break,
                Outcome::Done => any = true,
                Outcome::Differed(report) => {
                    any = true;
                    self.failure = Some(report);
                    self.shut_down = true;
                }
            }
            let look = self.interrupt_shadow | self.careful | self.halted | self.shut_down;
            if look || self.shared.pending() {
                break;
            }
        }
        if checker.blocks == TURN {
            checker.blocks = 0;
            if let Some(turns) = self.turns.as_ref().filter(|turns| turns.is_wanted()) {
                turns.give();
                turns.take();
            }
        }
        self.checker = Some(checker);
        any
    }

    /// In a shadow: what the last run had of memory goes.
    fn forget_mappings(&mut self) {
        self.mmu.flush();
        if let Some(copies) = &mut self.copies {
            copies.forget();
        }
    }

    /// Takes over what translated code can see and change of another Core's state.
    fn mirror(&mut self, other: &Self) {
        self.regs = other.regs;
        self.arithmetic = other.arithmetic;
        self.interrupt_shadow = other.interrupt_shadow;
        self.code_size = other.code_size;
        self.cpl = other.cpl;
        self.fpu_blocked = other.fpu_blocked;
        self.system_flags = other.system_flags;
        self.mmu.active = other.mmu.active;
        self.segments = other.segments;
        (self.cr, self.pdptes) = (other.cr, other.pdptes);
        self.msr.clone_from(&other.msr);
        self.vector.clone_from(&other.vector);
        self.lapic.due = other.lapic.due;
        self.frame.vectors_live = 0;
    }

    /// In a shadow: whose soft TLBs are to be looked at; null for nobody's.
    fn look_at(&mut self, tables: *const Mmu) {
        if let Some(copies) = &mut self.copies {
            copies.tables = tables;
        }
    }

    /// In a shadow: fills the slot for an access with what its Core has there. False if that does not help.
    pub(super) fn recall(&mut self, linear: u64, wanted: Wanted) -> bool {
        let tables = self.copies.as_ref().map_or(ptr::null(), |copies| copies.tables);
        // SAFETY: null, or the tables of the Core that `Checker::block` has, which nobody changes while its shadow runs.
        let Some(tables) = (unsafe { tables.as_ref() }) else {
            return false;
        };
        let fits = |mmu: &Mmu| {
            let entry = mmu.entry(self.mmu.active, linear);
            let tag = if wanted == Wanted::Read {
                entry.read
            } else {
                entry.write
            };
            (linear ^ tag) < PAGE as u64
        };
        if fits(&self.mmu) || !fits(tables) {
            return false;
        }
        self.mmu.copy_entry(tables, self.mmu.active, linear);
        true
    }

    /// In a shadow, after a slot was filled: stores to the page are to go to a copy, and so are loads from then on.
    pub(super) fn redirect(&mut self, linear: u64, wanted: Wanted) {
        let Some(mut copies) = self.copies.take() else { return };
        let entry = *self.mmu.entry(self.mmu.active, linear);
        let gpa = entry.gpa & !0xfff;
        match copies.find(gpa) {
            Some(copy) => self.mmu.redirect(gpa, copy),
            None if wanted == Wanted::Read => self.mmu.for_reads_only(linear),
            None => {
                let copy = copies.add(gpa, entry.host);
                self.mmu.redirect(gpa, copy);
            }
        }
        self.copies = Some(copies);
    }
}

impl Block {
    /// The bits of [`Core::arithmetic`] that somebody may want after these instructions were executed.
    fn wanted_flags(&self, core: &Core, executed: &[u64]) -> u16 {
        let last = executed.last().copied();
        let at = self.wanted.iter().position(|&(rip, _)| Some(rip) == last);
        undefined::arithmetic(at.map_or(0, |at| {
            let after = self.wanted.get(at + 1).filter(|(rip, _)| *rip == core.rip());
            after.map_or(self.wanted[at].1, |(_, flags)| *flags)
        }))
    }

    /// Those among them that are defined, and so must be alike.
    fn compared_flags(&self, core: &Core, executed: &[u64]) -> u16 {
        self.wanted_flags(core, executed) & !undefined::arithmetic(undefined::after(core, executed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_aligned_like_pages() {
        let mut copies = Copies {
            pages: Vec::new(),
            free: Vec::new(),
            tables: ptr::null(),
        };
        let mut page = Page([7; PAGE]);
        // Not by chance: between them the allocator has given others something.
        let mut between = Vec::new();
        for number in 0..8 {
            let copy = copies.add(number << 12, page.0.as_mut_ptr());
            assert_eq!(copy as usize % PAGE, 0);
            between.push(vec![0_u8; 24 << number]);
        }
        assert_eq!(copies.differences().count(), 0);
    }
}
