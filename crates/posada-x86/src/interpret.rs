//! The interpreter: a cache of decoded blocks and the loop that runs them.
//!
//! A block is what follows from one entry point up to the first instruction that always changes RIP, or may change the mode
//! or what is mapped, inside one page. It is keyed by guest physical address and code size, so it survives changes of address space,
//! and it is valid as long as its page's version in the code map stands still. A taken conditional branch leaves it early.
//!
//! A second table leads from RIP straight to a block, as long as nothing is unmapped: the soft TLBs' generation tells.

use crate::core::{CodeSize, Core, flag, seg};
use crate::decode::{self, Decoded, MAX_LENGTH};
use crate::fault::{Exception, Exec, vector};
use crate::insn::Insn;
use posada_memory::CodePage;

/// Decoded instructions kept: 2 MiB.
const INSNS: usize = 1 << 16;
/// Blocks kept: 512 KiB.
const BLOCKS: usize = 1 << 14;
/// The longest block, in instructions.
const LONGEST: usize = 64;
const PAGE: u64 = 4096;
/// Entries of the table by RIP: 128 KiB.
const JUMPS: usize = 1 << 11;
/// [`Jump::context`] of blocks in global pages.
const GLOBALLY: u64 = u64::MAX;
/// [`Core::stop_at`] after a branch in the middle of a block: as every value below the end of the block it leaves the
/// block, but unlike 0 it means that nothing needs a look.
pub const BRANCHED: usize = 1;

/// Why [`Core::execute`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// There is something for `Core::service`, or the vCPU halted or shut down.
    Pending,
    /// A debugger's break point or single step.
    Debug,
}

/// A block in the cache.
#[derive(Clone, Copy)]
struct Block {
    /// Guest physical address of the first byte << 2 | code size; 3 in the low bits means an empty slot.
    key: u64,
    /// Where its instructions are in the ring: counts up for ever, the ring's index is the rest by its length.
    position: u64,
    /// Version of the page that was decoded.
    version: u32,
    /// Instructions.
    count: u16,
    /// Bytes.
    length: u16,
}

const EMPTY: Block = Block {
    key: 3,
    position: 0,
    version: 0,
    count: 0,
    length: 0,
};

/// A block by RIP, in 64-bit mode.
#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    /// The mappings and the rights under which it leads there: see [`Core::jump_tag`] and [`crate::tlb::Generation`].
    tag: u64,
    context: u64,
    block: Block,
    page: *const CodePage,
}

// SAFETY: the record it points to belongs to the guest RAM of the Core that owns this, and is an atomic.
unsafe impl Send for Jump {}

/// Decoded blocks of one vCPU: a ring of instructions, where new ones overwrite the oldest, and a direct-mapped table.
pub struct Cache {
    insns: Vec<Insn>,
    blocks: Box<[Block]>,
    jumps: Box<[Jump]>,
    /// Where the next block's instructions go.
    head: u64,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            insns: Vec::with_capacity(INSNS),
            blocks: vec![EMPTY; BLOCKS].into_boxed_slice(),
            jumps: vec![
                Jump {
                    rip: 0,
                    // A tag that no mode and generation have.
                    tag: u64::MAX,
                    context: 0,
                    block: EMPTY,
                    page: std::ptr::null(),
                };
                JUMPS
            ]
            .into_boxed_slice(),
            head: 0,
        }
    }
}

impl Cache {
    #[inline(always)]
    fn slot(key: u64) -> usize {
        (key ^ key >> 14) as usize % BLOCKS
    }

    /// Room for a block of `count` instructions at the ring's head.
    fn put(&mut self, insns: &[Insn]) -> u64 {
        let at = self.head as usize % INSNS;
        if at + insns.len() > INSNS {
            // Blocks do not wrap: the rest of the ring stays unused this time.
            self.head += (INSNS - at) as u64;
        }
        let position = self.head;
        let at = position as usize % INSNS;
        if at == self.insns.len() {
            self.insns.extend_from_slice(insns);
        } else {
            let end = (at + insns.len()).min(self.insns.len());
            self.insns[at..end].copy_from_slice(&insns[..end - at]);
            self.insns.extend_from_slice(&insns[end - at..]);
        }
        self.head += insns.len() as u64;
        position
    }

    /// True if a block's instructions are still there.
    #[inline(always)]
    fn holds(&self, block: &Block) -> bool {
        self.head - block.position <= INSNS as u64
    }
}

/// Copies guest code at `offset` in the page at `host`. Other vCPUs may write meanwhile; who decodes it checks after.
fn copy_code(host: *const u8, offset: usize, bytes: &mut [u8]) {
    assert!(offset + bytes.len() <= PAGE as usize);
    // SAFETY: `host` is a page of guest RAM, and what is read ends inside it.
    unsafe { std::ptr::copy_nonoverlapping(host.add(offset), bytes.as_mut_ptr(), bytes.len()) };
}

impl Core {
    /// Runs guest code until there is a reason to stop; see [`Stop`]. Exceptions are delivered to the guest on the way.
    pub fn execute(&mut self) -> Stop {
        self.activate_translator();
        let _turn = self.take_turn();
        loop {
            if self.halted || self.shut_down {
                return Stop::Pending;
            }
            if self.interrupt_shadow {
                // One instruction before anything else may come in between, but for a debugger.
                if let Some(stop) = self.step_carefully() {
                    return stop;
                }
                continue;
            }
            if self.shared.pending() {
                return Stop::Pending;
            }
            if self.careful {
                if let Some(stop) = self.step_carefully() {
                    return stop;
                }
                continue;
            }
            if self.bits64() {
                if self.execute_translated() {
                    continue;
                }
                let jump = &self.cache.jumps[Self::jump_slot(self.rip())];
                let here = jump.context == GLOBALLY || jump.context == self.mmu.generation().context;
                if jump.rip == self.rip() && jump.tag == self.jump_tag() && here {
                    // SAFETY: a filled entry's page is a record of this Core's guest RAM.
                    let version = unsafe { (*jump.page).version() };
                    if version == jump.block.version && self.cache.holds(&jump.block) {
                        let block = jump.block;
                        self.run_block(block);
                        continue;
                    }
                }
            }
            match self.find_block() {
                Ok(Some(block)) => {
                    self.remember(block);
                    self.run_block(block);
                }
                Ok(None) => {
                    if self.step().is_err() {
                        self.deliver_raised();
                    }
                }
                Err(_) => self.deliver_raised(),
            }
        }
    }

    #[inline(always)]
    fn jump_slot(rip: u64) -> usize {
        (rip ^ rip >> 11) as usize % JUMPS
    }

    /// What must be the same for RIP to lead to the same block: the mappings, and whose rights fetch.
    #[inline(always)]
    fn jump_tag(&self) -> u64 {
        self.mmu.generation().all << 1 | u64::from(self.cpl == 3)
    }

    /// Enters the block at RIP into the table by RIP.
    fn remember(&mut self, block: Block) {
        if self.bits64() {
            let rip = self.rip();
            self.cache.jumps[Self::jump_slot(rip)] = Jump {
                rip,
                tag: self.jump_tag(),
                context: if self.fetched_globally(rip) {
                    GLOBALLY
                } else {
                    self.mmu.generation().context
                },
                block,
                page: self.ram.code().page(block.key >> 2),
            };
        }
    }

    /// Runs a block, and again as long as it leads back to its own start.
    #[inline(always)]
    fn run_block(&mut self, block: Block) {
        let start = self.rip();
        let page: *const CodePage = self.ram.code().page(block.key >> 2);
        let at = block.position as usize % INSNS;
        let insns = &self.cache.insns[at..at + usize::from(block.count)];
        // The loop below hands the Core to handlers; none of them touches the cache, which changes between blocks only.
        let range = insns.as_ptr_range();
        let done = |cursor: *const Insn| (cursor as usize - range.start as usize) as u64 / size_of::<Insn>() as u64;
        loop {
            let mut cursor = range.start;
            let mut rip = start;
            self.stop_at = range.end as usize;
            loop {
                // SAFETY: the cursor is inside the block's instructions, which stay where they are while a block runs.
                let insn = unsafe { &*cursor };
                // RIP is only stored: who changes it leaves the block.
                rip = rip.wrapping_add(insn.length.into());
                self.set_rip(rip);
                let result = (insn.exec)(self, insn);
                // SAFETY: at most one past the last instruction.
                cursor = unsafe { cursor.add(1) };
                if result.is_err() {
                    self.instructions += done(cursor);
                    self.take_back(insn);
                    self.deliver_raised();
                    return;
                }
                if cursor as usize >= self.stop_at {
                    break;
                }
            }
            self.instructions += done(cursor);
            // Another processor may have changed the code of a loop that waits for just that.
            // SAFETY: the record belongs to this Core's guest RAM.
            let changed = unsafe { (*page).version() } != block.version;
            let counted = self.translator.is_some();
            if self.rip() != start || self.stop_at == 0 || changed || counted || self.shared.pending() {
                return;
            }
        }
    }

    /// One instruction amid translated code. Exceptions are delivered.
    pub(crate) fn interpret_one(&mut self) {
        let result = match self.find_block() {
            Ok(Some(block)) => {
                let insn = self.cache.insns[block.position as usize % INSNS];
                self.set_rip(self.rip().wrapping_add(insn.length.into()));
                self.instructions += 1;
                (insn.exec)(self, &insn).inspect_err(|_| self.take_back(&insn))
            }
            Ok(None) => self.step(),
            Err(raised) => Err(raised),
        };
        if result.is_err() {
            self.deliver_raised();
        }
    }

    /// After a handler's `Err`: RIP goes back to the instruction.
    #[inline]
    pub(crate) fn take_back(&mut self, insn: &Insn) {
        self.set_rip(self.rip().wrapping_sub(insn.length.into()));
        if self.raised.non_canonical && usize::from(insn.segment) == seg::SS {
            self.raised.vector = vector::SS;
        }
    }

    pub(crate) fn deliver_raised(&mut self) {
        let raised = self.raised;
        self.deliver(raised);
    }

    /// Linear address of the next instruction.
    ///
    /// # Errors
    /// #GP(0) beyond the code segment.
    #[inline(always)]
    fn fetch_address(&mut self) -> Exec<u64> {
        let rip = self.rip();
        if self.bits64() {
            return Ok(rip);
        }
        let code = &self.segments[seg::CS];
        if rip > u64::from(code.limit) {
            return self.general_protection();
        }
        Ok(code.base.wrapping_add(rip) & 0xffff_ffff)
    }

    /// The block at RIP, decoded if need be; `None` if there is none that the cache can hold: an instruction that crosses
    /// the end of its page or of the code segment.
    #[inline(always)]
    fn find_block(&mut self) -> Exec<Option<Block>> {
        let linear = self.fetch_address()?;
        let (page, host) = self.fetch_page(linear)?;
        let gpa = page | linear & (PAGE - 1);
        let key = gpa << 2 | self.code_size as u64;
        let block = self.cache.blocks[Cache::slot(key)];
        if block.key == key
            && self.ram.code().page(page).version() == block.version
            && self.cache.holds(&block)
            && self.inside_segment(block.length.into())
        {
            return Ok(Some(block));
        }
        Ok(self.decode_block(key, page, host, (linear & (PAGE - 1)) as usize))
    }

    /// True if `length` bytes at RIP are inside the code segment.
    #[inline(always)]
    fn inside_segment(&self, length: u64) -> bool {
        self.bits64() || self.rip() + length - 1 <= u64::from(self.segments[seg::CS].limit)
    }

    #[cold]
    #[inline(never)]
    fn decode_block(&mut self, key: u64, page: u64, host: *const u8, offset: usize) -> Option<Block> {
        let ram = std::sync::Arc::clone(&self.ram);
        let record = ram.code().page(page);
        loop {
            let reach = (PAGE as usize - offset).min(LONGEST * MAX_LENGTH);
            let mut bytes = [0; LONGEST * MAX_LENGTH];
            copy_code(host, offset, &mut bytes[..reach]);
            let mut insns = Vec::with_capacity(16);
            let mut at = 0;
            while insns.len() < LONGEST && at < reach {
                let Ok(Decoded { insn, ends_block }) = decode::decode(self, &bytes[at..reach]) else {
                    break;
                };
                if !self.inside_segment(at as u64 + u64::from(insn.length)) {
                    break;
                }
                at += usize::from(insn.length);
                insns.push(insn);
                if ends_block {
                    break;
                }
            }
            if insns.is_empty() {
                return None;
            }
            // Now that its length is known, the code map's protocol: mark, read the version, read the bytes, look at the mark.
            let version = self.mark_code(page + offset as u64, at as u64);
            let mut again = [0; LONGEST * MAX_LENGTH];
            copy_code(host, offset, &mut again[..at]);
            if bytes[..at] != again[..at] || !record.marked(offset as u64, at as u64) {
                continue;
            }
            let block = Block {
                key,
                position: self.cache.put(&insns),
                version,
                count: insns.len() as u16,
                length: at as u16,
            };
            self.cache.blocks[Cache::slot(key)] = block;
            return Some(block);
        }
    }

    /// Decodes the instruction at RIP without the cache.
    fn decode_one(&mut self) -> Exec<Insn> {
        let linear = self.fetch_address()?;
        let mut bytes = [0; MAX_LENGTH];
        let (_, host) = self.fetch_page(linear)?;
        let offset = (linear & (PAGE - 1)) as usize;
        let here = (PAGE as usize - offset).min(MAX_LENGTH);
        copy_code(host, offset, &mut bytes[..here]);
        let decoded = match decode::decode(self, &bytes[..here]) {
            Ok(decoded) => decoded,
            Err(decode::Incomplete) => {
                let mut next = linear.wrapping_add(here as u64);
                if self.code_size != CodeSize::Bits64 {
                    next &= 0xffff_ffff;
                }
                let (_, host) = self.fetch_page(next)?;
                copy_code(host, 0, &mut bytes[here..]);
                decode::decode(self, &bytes).expect("the longest instruction was given")
            }
        };
        if !self.inside_segment(decoded.insn.length.into()) {
            return self.general_protection();
        }
        Ok(decoded.insn)
    }

    /// Runs exactly one instruction (one iteration or batch of a repeated string instruction). Exceptions are left to the
    /// caller, with RIP at the instruction.
    ///
    /// # Errors
    /// [`crate::fault::Raised`], with the exception in [`Core::raised`].
    pub fn step(&mut self) -> Exec {
        let insn = self.decode_one()?;
        self.set_rip(self.rip().wrapping_add(insn.length.into()));
        self.instructions += 1;
        (insn.exec)(self, &insn).inspect_err(|_| self.take_back(&insn))
    }

    /// One instruction with everything that debugging asks for before and after it (Intel SDM 3B, chapter 18).
    #[cold]
    fn step_carefully(&mut self) -> Option<Stop> {
        let Ok(linear) = self.fetch_address() else {
            self.deliver_raised();
            return None;
        };
        if self.debug.breakpoints.contains(&linear) && self.debug_passed != Some(linear) {
            self.debug_passed = Some(linear);
            return Some(Stop::Debug);
        }
        self.debug_passed = None;
        self.interrupt_shadow = false;
        let before = (self.system_flags, self.cpl, self.rip());
        let resume = before.0 & flag::RF;
        let hits = if resume != 0 { 0 } else { self.code_breakpoints(linear) };
        if hits != 0 {
            // A fault: the handler returns past the break point by RF in its frame.
            self.system_flags |= flag::RF;
            self.raise_debug(hits);
            return None;
        }
        // RF holds for one instruction, which may set it anew (IRET).
        self.system_flags &= !flag::RF;
        self.entered = false;
        match self.step() {
            Ok(()) => {
                if self.rip() == before.2 {
                    self.system_flags |= resume;
                }
                let set = !before.0 & self.system_flags;
                // A load of SS holds debug traps back; STI does not.
                if self.interrupt_shadow && set & flag::IF == 0 {
                    return None;
                }
                let mut dr6 = std::mem::take(&mut self.watch_hits);
                // INT n and SYSCALL enter their handlers without a trap when they clear TF.
                let entered = (self.entered || self.cpl != before.1) && self.system_flags & flag::TF == 0;
                if before.0 & flag::TF != 0 && !entered {
                    dr6 |= 1 << 14;
                }
                self.update_mode();
                if dr6 != 0 {
                    self.raise_debug(dr6);
                }
            }
            Err(_) => {
                self.system_flags |= resume;
                self.watch_hits = 0;
                self.deliver_raised();
            }
        }
        self.debug.single_step.then_some(Stop::Debug)
    }

    /// Delivers #DB.
    fn raise_debug(&mut self, dr6: u64) {
        self.deliver(Exception {
            vector: vector::DB,
            dr6,
            ..Exception::default()
        });
    }

    /// What a debugger wants from now on.
    pub fn set_debug(&mut self, debug: &posada_engine::DebugControl) {
        self.debug = debug.clone();
        self.debug_passed = self.debug_passed.filter(|at| debug.breakpoints.contains(at));
        self.update_mode();
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::mmu::tests::core;
    use posada_engine::{Kick, Machine};
    use std::sync::mpsc::{Sender, channel};
    use std::sync::{Arc, Mutex};
    use std::thread;
    use std::time::Duration;
    use vm_memory::{Bytes, GuestAddress};

    /// Tells of each OUT.
    pub(crate) struct Told(pub(crate) Mutex<Sender<()>>);

    impl Machine for Told {
        fn port_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0xff);
        }
        fn port_write(&self, _: u16, _: &[u8]) {
            self.0.lock().unwrap().send(()).unwrap();
        }
        fn mmio_read(&self, _: u64, data: &mut [u8]) {
            data.fill(0xff);
        }
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn end_of_interrupt(&self, _: u8) {}
    }

    #[test]
    fn a_loop_of_one_block_sees_that_another_processor_changed_it() {
        let mut core = core();
        let (sender, receiver) = channel();
        core.machine = Arc::new(Told(Mutex::new(sender)));
        // out 0x80, al; jmp to itself
        core.physical_write(0x8000, &[0xe6, 0x80, 0xeb, 0xfe]);
        core.set_rip(0);
        let (ram, mailbox) = (Arc::clone(&core.ram), Arc::clone(core.shared.mailbox()));
        let (ended, end) = channel::<()>();
        let other = thread::spawn(move || {
            receiver.recv().unwrap();
            // hlt
            ram.memory().write_slice(&[0xf4], GuestAddress(0x8002)).unwrap();
            if end.recv_timeout(Duration::from_secs(20)).is_err() {
                mailbox.kick();
            }
        });
        core.execute();
        let _ = ended.send(());
        other.join().unwrap();
        assert!(core.halted);
        assert_eq!(core.rip(), 3);
    }

    #[test]
    fn a_taken_branch_in_the_middle_leaves_its_block() {
        let mut core = core();
        // xor eax, eax; jz +1; hlt; inc eax; jnz +1; hlt; inc eax; hlt
        let code = [0x31, 0xc0, 0x74, 1, 0xf4, 0xff, 0xc0, 0x75, 1, 0xf4, 0xff, 0xc0, 0xf4];
        core.physical_write(0x8000, &code);
        core.set_rip(0);
        assert_eq!(core.execute(), Stop::Pending);
        assert_eq!((core.regs[0], core.rip(), core.instructions), (2, 13, 6));
    }
}
