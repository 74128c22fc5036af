//! Soft TLBs: direct-mapped tables of translations, one for each set of rights that accesses come with.

use crate::core::write_fields;
use crate::filled::Filled;
use crate::walk::Mapping;
use posada_memory::CodeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

pub(crate) const ENTRIES: usize = 4096;
const FETCHED_WORDS: usize = 128;
const LARGE_WORDS: usize = 64;
/// Tables: data of user mode, of supervisor mode, of supervisor mode with EFLAGS.AC, code of user and supervisor mode, and
/// one that stays empty, for data of user mode while alignment is checked (CR0.AM and EFLAGS.AC).
const TABLES: usize = 6;
pub(crate) const USER: usize = 0;
pub(crate) const SUPERVISOR: usize = 1;
pub(crate) const SUPERVISOR_AC: usize = 2;
pub(crate) const FETCH_USER: usize = 3;
pub(crate) const FETCH_SUPERVISOR: usize = 4;
pub(crate) const USER_ALIGNED: usize = 5;
/// A page that no canonical address is in.
pub(crate) const NOWHERE: u64 = 1 << 63;
/// In an entry's `gpa`: the mapping is global; the page's log2 size is in the five bits below.
pub(crate) const GLOBAL: u64 = 1 << 7;

/// One cached translation. A tag is a linear page address, or that of another slot's page for "never".
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Entry {
    pub read: u64,
    pub write: u64,
    pub host: *mut u8,
    pub gpa: u64,
}

impl Entry {
    /// For no table's slot: an access to the tag's page, which no canonical address is in, leads to what is none on the host
    /// either, and raises an exception there.
    const NOWHERE: Self = Self {
        read: NOWHERE,
        write: NOWHERE,
        host: NOWHERE as *mut u8,
        gpa: 0,
    };

    fn empty(index: usize) -> Self {
        let never = ((index % ENTRIES) as u64 ^ 1) << 12;
        Self {
            read: never,
            write: never,
            host: std::ptr::null_mut(),
            gpa: 0,
        }
    }
}

/// How often mappings were forgotten: those of any page, and those of all pages that are not global.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Generation {
    /// Flushes that may concern any mapping.
    pub all: u64,
    /// Flushes of what is not global.
    pub context: u64,
}

/// Soft TLBs.
pub struct Mmu {
    /// All tables, one after another, in place: translated code finds them at a fixed distance from the Core's start.
    pub(crate) entries: [Entry; TABLES * ENTRIES],
    /// For each data table that translated code uses, a copy of the entry for the page that the stack was last found in.
    pub(crate) stacks: [Entry; 3],
    filled: Filled,
    /// Which 2 MiB regions may have slots that are part of a large page, and which 1 GiB regions of a huge one: hashed bit
    /// sets, so that forgetting a small page need not look at every slot. For the lower half of the addresses what is not
    /// global, and what is; and all for the upper half.
    large: [[u64; LARGE_WORDS]; 3],
    huge: [u64; 3],
    /// Which pages code was fetched from since all was forgotten: a hashed bit set. To forget one of the others is nothing
    /// to those who keep ways to code.
    fetched: [u64; FETCHED_WORDS],
    /// Counts what was forgotten: while `all` stands global mappings hold, while both stand all do.
    generation: Generation,
    /// The data table of the current mode: its first slot.
    pub(crate) active: usize,
    others: Others,
}

/// What is known of code that other processors decode from the same RAM; nothing, where there are none.
///
/// Until a processor takes notice of an announcement ([`crate::shared::Shared::announce_code`]) it may store to pages with
/// code without a look at their marks. Its writable entries remember which pages these can be: so none of them goes without
/// that look, or the stores would never be seen.
struct Others(Option<Arc<CodeMap>>);

impl Others {
    /// Before a look: who marks code after it sees the stores that came before.
    #[inline]
    fn settle_stores(&self) {
        if self.0.is_some() {
            fence(Ordering::SeqCst);
        }
    }

    /// A page can no longer be stored to; true if it holds code, which is invalid now.
    #[inline]
    fn look(&self, gpa: u64) -> bool {
        let code = self.0.as_ref().filter(|code| code.page(gpa).has_code());
        code.inspect(|code| code.invalidate(gpa)).is_some()
    }

    /// Empties a slot, once stores are settled.
    #[inline]
    fn empty(&self, entry: &mut Entry, slot: usize) {
        let empty = Entry::empty(slot);
        if entry.write != empty.write {
            self.look(entry.gpa);
        }
        *entry = empty;
    }
}

// SAFETY: the pointers name guest RAM, which outlives the Core that owns this.
unsafe impl Send for Mmu {}

impl Mmu {
    /// Makes empty ones in place, as they are larger than a stack should hold, of a processor that alone uses its RAM or
    /// shares it, with code in it, with others.
    ///
    /// # Safety
    /// `at` is memory for one.
    pub(crate) unsafe fn make(at: *mut Self, shared: Option<Arc<CodeMap>>) {
        // SAFETY: the caller's memory; each slot of the table is written.
        unsafe {
            let entries = (&raw mut (*at).entries).cast::<Entry>();
            (0..TABLES * ENTRIES).for_each(|slot| entries.add(slot).write(Entry::empty(slot)));
            write_fields!(Self at at, with entries; {
                stacks: [Entry::NOWHERE; 3],
                filled: Filled::new(TABLES * ENTRIES),
                large: [[0; LARGE_WORDS]; 3],
                huge: [0; 3],
                fetched: [0; FETCHED_WORDS],
                generation: Generation::default(),
                active: SUPERVISOR * ENTRIES,
                others: Others(shared),
            });
        }
    }

    #[inline(always)]
    fn slot(first: usize, linear: u64) -> usize {
        first + (linear >> 12) as usize % ENTRIES
    }

    #[inline(always)]
    pub(crate) fn entry(&self, first: usize, linear: u64) -> &Entry {
        let slot = Self::slot(first, linear);
        debug_assert!(slot < self.entries.len());
        // SAFETY: `first` is the start of one of the tables and the rest is below a table's length.
        unsafe { self.entries.get_unchecked(slot) }
    }

    pub(crate) fn fill(&mut self, first: usize, linear: u64, host: *mut u8, mapping: &Mapping, write: bool) {
        self.note_size(linear, mapping);
        let slot = Self::slot(first, linear);
        let empty = Entry::empty(slot);
        let entry = &mut self.entries[slot];
        if entry.write != empty.write {
            self.others.settle_stores();
            self.others.look(entry.gpa);
        }
        if self.stacks.iter().any(|stack| stack.read == entry.read) {
            self.stacks = [Entry::NOWHERE; 3];
        }
        self.filled.add(slot, mapping.global);
        if matches!(first / ENTRIES, FETCH_USER | FETCH_SUPERVISOR) {
            let (word, bit) = Self::fetched_bit(linear);
            self.fetched[word] |= 1 << bit;
        }
        let page = linear & !0xfff;
        *entry = Entry {
            read: page,
            write: if write { page } else { empty.write },
            host,
            gpa: mapping.gpa & !0xfff | u64::from(mapping.shift) | if mapping.global { GLOBAL } else { 0 },
        };
    }

    /// Makes the slot for this address what it is in other tables.
    pub(crate) fn copy_entry(&mut self, other: &Self, first: usize, linear: u64) {
        let slot = Self::slot(first, linear);
        self.stacks = [Entry::NOWHERE; 3];
        self.entries[slot] = other.entries[slot];
        self.filled.add(slot, self.entries[slot].gpa & GLOBAL != 0);
    }

    /// Lets all data slots of a page, by its guest physical address, lead to another host page.
    pub(crate) fn redirect(&mut self, gpa: u64, host: *mut u8) {
        self.stacks = [Entry::NOWHERE; 3];
        for slot in self.filled.iter() {
            let data = !matches!(slot / ENTRIES, FETCH_USER | FETCH_SUPERVISOR);
            let entry = &mut self.entries[slot];
            if data && entry.gpa & !0xfff == gpa && !entry.host.is_null() {
                entry.host = host;
            }
        }
    }

    /// The slot of the current mode for this address is for reads only.
    pub(crate) fn for_reads_only(&mut self, linear: u64) {
        self.stacks = [Entry::NOWHERE; 3];
        let slot = Self::slot(self.active, linear);
        self.entries[slot].write = Entry::empty(slot).write;
    }

    fn note_size(&mut self, linear: u64, mapping: &Mapping) {
        let set = if linear >> 63 == 0 {
            usize::from(mapping.global)
        } else {
            2
        };
        match mapping.shift {
            12 => {}
            30.. => self.huge[set] |= 1 << (linear >> 30 & 63),
            shift => {
                let first = linear >> shift << shift >> 21;
                for region in first..first + (1 << (shift - 21)) {
                    let region = region as usize % (LARGE_WORDS * 64);
                    self.large[set][region / 64] |= 1 << (region % 64);
                }
            }
        }
    }

    /// True if the page may be part of a larger one.
    fn may_be_large(&self, linear: u64) -> bool {
        let region = (linear >> 21) as usize % (LARGE_WORDS * 64);
        let is_in = |set: usize| {
            (self.large[set][region / 64] >> (region % 64) | self.huge[set] >> (linear >> 30 & 63)) & 1 != 0
        };
        if linear >> 63 == 0 {
            is_in(0) || is_in(1)
        } else {
            is_in(2)
        }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.stacks = [Entry::NOWHERE; 3];
        let (entries, others) = (&mut self.entries, &self.others);
        others.settle_stores();
        self.filled.drain(|slot| others.empty(&mut entries[slot], slot));
        self.fetched = [0; FETCHED_WORDS];
        (self.large, self.huge) = ([[0; LARGE_WORDS]; 3], [0; 3]);
        self.generation.all += 1;
    }

    fn fetched_bit(linear: u64) -> (usize, u32) {
        let page = linear >> 12;
        let hash = (page ^ page >> 13) as u32 % (FETCHED_WORDS as u32 * 64);
        (hash as usize / 64, hash % 64)
    }

    /// Forgets all but global pages.
    pub fn flush_non_global(&mut self) {
        self.stacks = [Entry::NOWHERE; 3];
        let (entries, others) = (&mut self.entries, &self.others);
        others.settle_stores();
        self.filled.drain_context(|slot| {
            if entries[slot].gpa & GLOBAL == 0 {
                others.empty(&mut entries[slot], slot);
            }
        });
        (self.large[0], self.huge[0]) = ([0; LARGE_WORDS], 0);
        self.generation.context += 1;
    }

    /// How often what was forgotten.
    #[inline(always)]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Forgets one page, whatever its size.
    pub fn flush_page(&mut self, linear: u64) {
        self.stacks = [Entry::NOWHERE; 3];
        self.others.settle_stores();
        if !self.may_be_large(linear) {
            let (word, bit) = Self::fetched_bit(linear);
            self.generation.all += self.fetched[word] >> bit & 1;
            for table in 0..TABLES {
                let slot = Self::slot(table * ENTRIES, linear);
                let entry = &mut self.entries[slot];
                if (entry.read ^ linear) < 4096 {
                    self.others.empty(entry, slot);
                }
            }
            return;
        }
        self.generation.all += 1;
        for slot in self.filled.iter() {
            let entry = &mut self.entries[slot];
            if (entry.read ^ linear) >> (entry.gpa & 0x3f) == 0 {
                self.others.empty(entry, slot);
            }
        }
    }

    /// Sends stores to the page at guest physical address `gpa` through the slow path: it holds code now.
    pub fn forbid_writes(&mut self, gpa: u64) {
        self.stacks = [Entry::NOWHERE; 3];
        for slot in self.filled.iter() {
            let entry = &mut self.entries[slot];
            if (entry.gpa ^ gpa) >> 12 == 0 {
                entry.write = Entry::empty(slot).write;
            }
        }
    }

    /// Does the same for every page that others have found code in by now, and invalidates the code of those that could be
    /// stored to.
    pub fn forbid_writes_to_code(&mut self) {
        self.stacks = [Entry::NOWHERE; 3];
        self.others.settle_stores();
        for slot in self.filled.iter() {
            let never = Entry::empty(slot).write;
            let entry = &mut self.entries[slot];
            if entry.write != never && self.others.look(entry.gpa) {
                entry.write = never;
            }
        }
    }
}
