//! Running translated blocks, and finding, making and forgetting them on the way.

use super::blocks::{Block, Blocks, Key, Made, Number, Source};
use super::cache::CodeCache;
use super::check::Left;
use super::emit::{Emitter, NextPage, Place};
use super::frame::{self, JUMPS, LOG, MODES};
use super::jumps::Way;
use super::operation::{MAX_LENGTH, Reader, limits};
use super::perf_map::PerfMap;
use super::region::{Next, Page, Region};
use super::relocation::Distances;
use super::stubs::{self, Enter, Leave, Stubs, Wanted};
use super::trap;
use crate::core::Core;
use crate::filled::Filled;
use posada_engine::Translation;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// A block is translated when it is wanted for the so-manieth time.
const THRESHOLD: u8 = 3;
/// Slots that count how often untranslated blocks were wanted.
const COUNTERS: usize = 1 << 14;
const PAGE: u64 = 4096;

/// How far translated code came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// There is none at RIP.
    Nothing,
    /// To code that is not translated, or events are pending.
    Some,
    /// To an instruction that only the interpreter executes.
    Interpret,
}

/// One vCPU's translator.
pub struct Translator {
    cache: CodeCache,
    pub(super) stubs: Stubs,
    pub(super) blocks: Blocks,
    reader: Reader,
    region: Region,
    emitter: Emitter,
    counters: Box<[u8]>,
    threshold: u8,
    /// Filled slots of the jump caches, one cache after another.
    pub(super) filled: Filled,
    pub(super) jump_mask: u32,
    counts: Translation,
    perf_map: Option<Arc<PerfMap>>,
    /// Blocks are to be compared with the interpreter.
    checked: bool,
}

impl Translator {
    /// A translator with an empty cache of `size` bytes, or what is the least.
    ///
    /// # Errors
    /// The host gives no memory to execute from, or refuses handlers of signals.
    pub fn new(size: usize) -> io::Result<Self> {
        trap::install()?;
        let mut cache = CodeCache::new(size)?;
        let bmi2 = std::arch::is_x86_feature_detected!("bmi2");
        let jump_mask = if bmi2 { (JUMPS as u32 - 1) << 2 } else { 0xff };
        let mut emitter = Emitter::new(Stubs::default(), bmi2, jump_mask);
        emitter.assembler.begin(cache.stubs());
        let stubs = stubs::make(&mut emitter.assembler, miss);
        cache.put_stubs(&emitter.assembler.code);
        Ok(Self {
            blocks: Blocks::new(cache.layout()),
            cache,
            stubs,
            reader: Reader::default(),
            region: Region::default(),
            emitter: Emitter::new(stubs, bmi2, jump_mask),
            counters: vec![0; COUNTERS].into(),
            threshold: THRESHOLD,
            filled: Filled::new(MODES * JUMPS),
            jump_mask,
            counts: Translation::default(),
            perf_map: None,
            checked: false,
        })
    }

    /// Names what it makes in this map.
    pub fn named_in(mut self, map: Option<Arc<PerfMap>>) -> Self {
        self.perf_map = map;
        self
    }

    /// Makes code that counts its lookups in the soft TLB.
    pub fn counting(mut self) -> Self {
        self.emitter.counting = true;
        self
    }

    /// What it has done.
    pub fn counts(&self) -> Translation {
        self.counts
    }

    /// To be called before [`Translator::run`], whenever the Core may have moved or changed threads.
    pub fn activate(&mut self, core: &mut Core) {
        trap::activate(self.cache.range(), self.stubs.trap);
        core.frame.events = core.shared.mailbox().events_address();
        core.frame.jump_mask = self.jump_mask;
        core.frame.flags_from = frame::PACKED_FLAGS;
        core.frame.flags_to = crate::core::flag::ARITHMETIC as u32;
        if core.frame.jumps[0][0] == 0 {
            let modes = core.frame.jumps.iter_mut().zip(self.stubs.unknown);
            modes.for_each(|(jumps, unknown)| jumps.fill(unknown));
        }
        trap::set_gs(core);
    }

    /// Translates code when it is wanted for the first time.
    pub fn at_once(mut self) -> Self {
        self.threshold = 1;
        self
    }

    /// Keeps flags that only handlers of faults, or functions written by hand, can see; and lets branches to addresses that
    /// are not canonical fault where they are.
    pub fn exact(mut self) -> Self {
        self.region.exact = true;
        self
    }

    /// Makes blocks that can be compared with the interpreter: without RDTSC, which gives something else each time.
    pub fn checked(mut self) -> Self {
        (self.checked, self.emitter.once) = (true, true);
        self
    }

    /// Exchanges bytes in the code of the only block that has them.
    #[cfg(test)]
    pub(super) fn corrupt(&mut self, from: &[u8], to: &[u8]) {
        let (start, end) = (self.cache.layout().start(), self.cache.next());
        let code = self.cache.code(start, (end - start) as usize);
        let at: Vec<usize> = (0..code.len()).filter(|&at| code[at..].starts_with(from)).collect();
        assert_eq!(at.len(), 1, "{from:x?}");
        self.cache.overwrite(start + at[0] as u64, to);
    }

    /// For check mode: the block at RIP, if it is translated or worth it; with `plain` that without groups.
    pub(super) fn find_for_check(&mut self, core: &mut Core, plain: bool) -> Option<Number> {
        let mode = core.translated_mode()?;
        self.synchronize(core);
        self.look_up(core, mode, plain)
    }

    /// For check mode: runs one block, with RIP left where the interpreter is to go on.
    pub(super) fn enter_for_check(&mut self, core: &mut Core, block: Number) -> Left {
        let left = self.enter(core, block);
        self.count(left);
        match left {
            Leave::Chain => {
                let branch = self.blocks.branch(core.frame.site);
                core.set_rip(branch.rip);
                if branch.plain {
                    return Left::Plain;
                }
            }
            Leave::Refused => {
                self.refused(core);
            }
            Leave::Trap => self.trapped(core),
            _ => {}
        }
        Left::For(left)
    }

    /// A block.
    pub(super) fn block(&self, number: Number) -> &Block {
        self.blocks.get(number)
    }

    /// A block's code.
    pub(super) fn code_of(&self, number: Number) -> &[u8] {
        let block = self.blocks.get(number);
        self.cache.code(block.start, block.shape.size as usize)
    }

    /// After [`Leave::Refused`]: RIP is that of the instruction. True if its block will not check for several accesses again.
    fn refused(&mut self, core: &mut Core) -> bool {
        let (rip, _) = self.blocks.instruction(core.frame.site);
        core.set_rip(rip);
        self.blocks.give_up(core.frame.site, &mut self.cache)
    }

    /// After [`Leave::Trap`]: RIP is that of the instruction, and the flags are the guest's.
    fn trapped(&mut self, core: &mut Core) {
        let (rip, saved) = self.blocks.instruction(core.frame.trap_rip);
        core.set_rip(rip);
        if !saved {
            core.set_arithmetic(core.frame.trap_flags);
        }
    }

    /// Runs translated code from RIP on until it does not go on.
    pub fn run(&mut self, core: &mut Core) -> Ran {
        if core.translated_mode().is_none() {
            return Ran::Nothing;
        }
        self.synchronize(core);
        let Some(mut block) = self.find(core) else {
            return Ran::Nothing;
        };
        loop {
            let left = self.enter(core, block);
            self.count(left);
            match left {
                Leave::Chain => {
                    let (branch, evictions) = (self.blocks.branch(core.frame.site), self.counts.evictions);
                    core.set_rip(branch.rip);
                    let next = if branch.plain {
                        self.find_plain(core)
                    } else {
                        self.find(core)
                    };
                    let Some(next) = next else {
                        return Ran::Some;
                    };
                    // The exit may be gone if the cache was full.
                    if evictions == self.counts.evictions {
                        self.blocks.link(branch, next, &mut self.cache);
                        self.counts.links += 1;
                    }
                    block = next;
                }
                Leave::Unknown => {
                    let Some(next) = self.find(core) else {
                        return Ran::Some;
                    };
                    block = next;
                }
                Leave::Poll | Leave::Helped => return Ran::Some,
                Leave::Interpret => return Ran::Interpret,
                Leave::Refused => {
                    if !self.refused(core) {
                        return Ran::Interpret;
                    }
                    let Some(next) = self.find_plain(core) else {
                        return Ran::Interpret;
                    };
                    block = next;
                }
                Leave::Trap => {
                    self.trapped(core);
                    return Ran::Interpret;
                }
            }
        }
    }

    fn count(&mut self, left: Leave) {
        let leaves = &mut self.counts.leaves;
        *match left {
            Leave::Chain => &mut leaves.unlinked,
            Leave::Unknown => &mut leaves.unknown,
            Leave::Interpret => &mut leaves.interpret,
            Leave::Poll => &mut leaves.events,
            Leave::Refused => &mut leaves.refused,
            Leave::Trap => &mut leaves.trapped,
            Leave::Helped => &mut leaves.helped,
        } += 1;
    }

    fn enter(&self, core: &mut Core, block: Number) -> Leave {
        // SAFETY: the stub has this signature.
        let enter: Enter = unsafe { std::mem::transmute(self.stubs.enter) };
        let target = self.blocks.get(block).entry();
        // SAFETY: GS points at the Core (`activate`), the block's code was made for its mode and what it reads (`find`), and
        // it touches nothing but the Core's state and guest RAM behind checks.
        Leave::from_number(unsafe { enter(core, target, 0) })
    }

    /// Takes notice of changed code and mappings.
    fn synchronize(&mut self, core: &mut Core) {
        let now = core.seen();
        let before = std::mem::replace(&mut core.frame.seen, now);
        if core.frame.logged as usize > LOG / 2 {
            self.read_log(core);
        }
        if now == before {
            return;
        }
        if now.changes != before.changes {
            self.forget_changed(core, before.changes..now.changes);
        }
        if now.settings != before.settings {
            core.frame.ways.fill(Way::default());
        }
        let all = now.generation.all != before.generation.all || now.settings != before.settings;
        if all || now.generation.context != before.generation.context {
            self.forget_jumps(core, !all);
        }
    }

    /// Forgets blocks of code that these changes concern.
    fn forget_changed(&mut self, core: &mut Core, changes: std::ops::Range<u64>) {
        let code = core.ram.code();
        // What lies too far back to be known concerns any page.
        let pages = changes.map(|number| code.changed(number)).collect::<Option<Vec<u64>>>();
        let (frame, unknown, jump_mask) = (&mut core.frame, self.stubs.unknown, self.jump_mask);
        for page in pages.unwrap_or_else(|| self.blocks.pages()) {
            let version = |page| code.page(page).version();
            let forget = |block: &Block| frame.forget(block, unknown, jump_mask);
            self.counts.outdated += self.blocks.forget_stale(page, version, &mut self.cache, forget);
        }
    }

    /// The block without groups at RIP.
    fn find_plain(&mut self, core: &mut Core) -> Option<Number> {
        let mode = core.translated_mode()?;
        self.look_up(core, mode, true)
    }

    /// The block at RIP by its key, made if it is worth it.
    pub(super) fn look_up(&mut self, core: &mut Core, mode: usize, plain: bool) -> Option<Number> {
        let rip = core.rip();
        // The interpreter will raise what this raises.
        let (page, host) = core.fetch_page(rip).ok()?;
        let shift = core.fetched_shift(rip);
        let mut key = Key::new(rip, page, mode, shift, core.limits());
        key.plain = plain;
        if let Some(number) = self.blocks.find(&key)
            && let code = core.ram.code()
            && (self.blocks.get(number).source).holds(page, |page| code.page(page).version())
        {
            return Some(number);
        }
        if let Some(number) = self.copy(core, key) {
            return Some(number);
        }
        let counter = &mut self.counters[key.mixed() as usize >> 50];
        *counter = counter.saturating_add(1);
        if *counter < self.threshold && !plain {
            return None;
        }
        let place = Place {
            rip,
            mode,
            shift,
            next: None,
            plain,
        };
        self.translate(core, key, place, host)
    }

    fn make_room(&mut self, core: &mut Core) {
        if self.cache.is_full() {
            let part = self.cache.next_part();
            let (frame, unknown, jump_mask) = (&mut core.frame, self.stubs.unknown, self.jump_mask);
            let forget = |block: &Block| frame.forget(block, unknown, jump_mask);
            self.blocks.empty(part, &mut self.cache, forget);
            self.counts.evictions += 1;
        }
    }

    fn add(&mut self, block: Block) -> Number {
        let code = &self.emitter.assembler.code;
        if let Some(map) = &self.perf_map {
            let user = frame::is_user(block.key.mode());
            map.name(block.start, code.len(), block.key.rip, user);
        }
        self.counts.branches += block.shape.links.len() as u64;
        self.cache.append(code);
        self.blocks.add(block)
    }

    /// Makes a block from one for the same code at another address, if there is one.
    #[cold]
    fn copy(&mut self, core: &mut Core, key: Key) -> Option<Number> {
        self.blocks.find_anywhere(&key)?;
        let begin = Instant::now();
        self.make_room(core);
        // It may have gone just now.
        let original = self.blocks.get(self.blocks.find_anywhere(&key)?);
        let code = core.ram.code();
        let holds = original.source.holds(key.page(), |page| code.page(page).version());
        if !holds || original.source.next.is_some() {
            return None;
        }
        let linear = key.rip.wrapping_sub(original.key.rip);
        let mut helped = original.helped.clone();
        for one in &mut helped {
            one.next = one.next.wrapping_add(linear);
        }
        let mut wanted = original.wanted.clone();
        for (rip, _) in &mut wanted {
            *rip = rip.wrapping_add(linear);
        }
        let start = self.cache.next();
        let distances = Distances {
            code: start.wrapping_sub(original.start),
            linear,
            helped: (helped.as_ptr() as u64).wrapping_sub(original.helped.as_ptr() as u64),
        };
        let code = &mut self.emitter.assembler.code;
        code.clear();
        code.extend_from_slice(self.cache.code(original.start, original.shape.size as usize));
        if !original.shape.mend(code, distances, self.jump_mask) {
            return None;
        }
        let made = Made {
            start,
            shape: Arc::clone(&original.shape),
            wanted,
            helped,
        };
        let block = Block::new(key, original.source, made);
        let number = self.add(block);
        self.counts.copies += 1;
        self.counts.copy_nanoseconds += begin.elapsed().as_nanos() as u64;
        Some(number)
    }

    #[cold]
    fn translate(&mut self, core: &mut Core, key: Key, mut place: Place, host: *const u8) -> Option<Number> {
        let begin = Instant::now();
        self.make_room(core);
        let ram = std::sync::Arc::clone(&core.ram);
        let record = ram.code().page(key.page());
        let offset = place.rip % PAGE;
        loop {
            let mut bytes = [0; PAGE as usize];
            read_host(host, &mut bytes);
            let mut page = Page {
                bytes: &bytes,
                linear: place.rip - offset,
                next: None,
                blocked: core.limits() | if self.checked { limits::TSC } else { 0 },
            };
            let blocks = &self.blocks;
            let known = |rip| blocks.find(&Key { rip, ..key }).is_some();
            self.region.read(core, &mut self.reader, &page, place.rip, known);
            if self.region.incomplete {
                page.next = core.code_after(page.linear, &mut place);
                self.region.read(core, &mut self.reader, &page, place.rip, known);
            }
            if self.region.operations.is_empty() {
                return None;
            }
            if !self.region.crosses {
                (page.next, place.next) = (None, None);
            }
            // The code map's protocol: mark, read the version, read the bytes, look at the mark.
            let length = self.region.length();
            let here = length.min(PAGE - offset);
            let version = core.mark_code(key.page() + offset, here);
            let mut again = [0; PAGE as usize];
            read_host(host, &mut again);
            let range = offset as usize..(offset + here) as usize;
            if bytes[range.clone()] != again[range] || !record.marked(offset, here) {
                continue;
            }
            let mut source = Source { version, next: None };
            if let Some(next) = page.next {
                let (gpa, length) = (next.gpa, length - here);
                let record = ram.code().page(gpa);
                source.next = Some((gpa, core.mark_code(gpa, length)));
                let mut again = [0; MAX_LENGTH];
                read_host(next.host, &mut again);
                if next.bytes[..length as usize] != again[..length as usize] || !record.marked(0, length) {
                    continue;
                }
            }
            let start = self.cache.next();
            let helped = Box::from(self.region.helped.as_slice());
            self.emitter.emit(&self.region, place, start, &helped);
            let made = Made {
                start,
                shape: Arc::new(self.emitter.shape()),
                wanted: if self.checked {
                    self.region.wanted()
                } else {
                    Box::default()
                },
                helped,
            };
            let emitter = &self.emitter;
            self.counts.blocks += 1;
            self.counts.instructions += self.region.operations.len() as u64;
            self.counts.code_bytes += emitter.assembler.code.len() as u64;
            let block = Block::new(key, source, made);
            let number = self.add(block);
            self.counts.nanoseconds += begin.elapsed().as_nanos() as u64;
            return Some(number);
        }
    }
}

impl Core {
    /// Makes this thread ready for [`Core::run_translated`].
    pub fn activate_translator(&mut self) {
        if let Some(mut translator) = self.translator.take() {
            match &mut self.checker {
                Some(checker) => translator.activate(checker.shadow()),
                None => translator.activate(self),
            }
            self.translator = Some(translator);
        }
    }

    /// What code cannot do where it runs: what its translation depends on.
    fn limits(&self) -> u8 {
        let user = self.cpl == 3;
        let settings = self.settings();
        let tsc = if user { limits::TSC_USER } else { 0 };
        let limits = settings & !limits::TSC_USER | if settings & tsc != 0 { limits::TSC } else { 0 };
        limits | if user { limits::USER } else { 0 }
    }

    /// What [`Core::limits`] follows from, at any privilege level.
    pub(super) fn settings(&self) -> u8 {
        // Both counters run alike.
        let plain = self.rate.guest(1 << 60) == 1 << 60;
        let forbidden = self.cr[4] & 1 << 2 != 0;
        self.fpu_blocked | if plain { 0 } else { limits::TSC } | if forbidden { limits::TSC_USER } else { 0 }
    }

    /// Runs translated code from RIP on, and interprets single instructions amid it, until something else is to be looked at.
    /// False if nothing ran.
    #[inline]
    pub(crate) fn execute_translated(&mut self) -> bool {
        let Some(mut translator) = self.translator.take() else {
            return false;
        };
        if let Some(checker) = self.checker.take() {
            let any = self.execute_checked(&mut translator, checker);
            self.translator = Some(translator);
            return any;
        }
        let mut any = false;
        loop {
            let ran = translator.run(self);
            any |= ran != Ran::Nothing;
            if ran != Ran::Interpret {
                break;
            }
            self.interpret_one();
            let look = self.interrupt_shadow | self.careful | self.halted | self.shut_down;
            if look || self.shared.pending() {
                break;
            }
        }
        self.translator = Some(translator);
        any
    }

    /// The start of the code page after the one at `linear`, if there is one.
    fn code_after(&mut self, linear: u64, place: &mut Place) -> Option<Next> {
        let linear = linear.wrapping_add(PAGE);
        let (gpa, host) = self.fetch_page(linear).ok()?;
        place.next = Some(NextPage {
            linear,
            gpa: self.fetched_gpa(linear),
        });
        let mut bytes = [0; MAX_LENGTH];
        read_host(host, &mut bytes);
        Some(Next { gpa, host, bytes })
    }

    /// Runs translated code from RIP on, or interprets an instruction if there is none. [`Core::activate_translator`] comes
    /// first.
    pub fn step_translated(&mut self) {
        if !self.execute_translated() {
            self.interpret_one();
        }
    }

    /// Runs translated code from RIP on, and nothing else.
    pub fn run_translated(&mut self) -> Ran {
        let Some(mut translator) = self.translator.take() else {
            return Ran::Nothing;
        };
        let ran = translator.run(self);
        self.translator = Some(translator);
        ran
    }
}

/// Copies guest code from the start of a page. Other vCPUs may write meanwhile; who uses it checks after.
fn read_host<const N: usize>(host: *const u8, bytes: &mut [u8; N]) {
    const { assert!(N <= PAGE as usize) };
    // SAFETY: `host` is a page of guest RAM.
    unsafe { std::ptr::copy_nonoverlapping(host, bytes.as_mut_ptr(), bytes.len()) };
}

/// A check failed: fills the soft TLB. False if the interpreter must do the access: it faults, crosses a page, is not RAM, or
/// would write to code.
extern "sysv64" fn miss(core: &mut Core, linear: u64, wanted: Wanted) -> bool {
    let filled = core.recall(linear, wanted) || core.fill_for_translated(linear, wanted);
    if filled {
        core.frame.fills += 1;
        core.redirect(linear, wanted);
    }
    filled
}
