//! Soft TLBs: direct-mapped tables of translations, one for each set of rights that accesses come with.

use crate::core::write_fields;
use crate::filled::Filled;
use crate::walk::Mapping;
use posada_memory::CodeMap;

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
}

// SAFETY: the pointers name guest RAM, which outlives the Core that owns this.
unsafe impl Send for Mmu {}

impl Mmu {
    /// Makes empty ones in place, as they are larger than a stack should hold.
    ///
    /// # Safety
    /// `at` is memory for one.
    pub(crate) unsafe fn make(at: *mut Self) {
        // SAFETY: the caller's memory; each slot of the table is written.
        unsafe {
            let entries = (&raw mut (*at).entries).cast::<Entry>();
            (0..TABLES * ENTRIES).for_each(|slot| entries.add(slot).write(Entry::empty(slot)));
            write_fields!(Self at at, with entries; {
                filled: Filled::new(TABLES * ENTRIES),
                large: [[0; LARGE_WORDS]; 3],
                huge: [0; 3],
                fetched: [0; FETCHED_WORDS],
                generation: Generation::default(),
                active: SUPERVISOR * ENTRIES,
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
        let entries = &mut self.entries;
        self.filled.drain(|slot| entries[slot] = Entry::empty(slot));
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
        let entries = &mut self.entries;
        self.filled.drain_context(|slot| {
            if entries[slot].gpa & GLOBAL == 0 {
                entries[slot] = Entry::empty(slot);
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
        if !self.may_be_large(linear) {
            let (word, bit) = Self::fetched_bit(linear);
            self.generation.all += self.fetched[word] >> bit & 1;
            for table in 0..TABLES {
                let slot = Self::slot(table * ENTRIES, linear);
                let entry = &mut self.entries[slot];
                if (entry.read ^ linear) < 4096 {
                    let Entry { read, write, .. } = Entry::empty(slot);
                    (entry.read, entry.write) = (read, write);
                }
            }
            return;
        }
        self.generation.all += 1;
        for slot in self.filled.iter() {
            let entry = &mut self.entries[slot];
            if (entry.read ^ linear) >> (entry.gpa & 0x3f) == 0 {
                *entry = Entry::empty(slot);
            }
        }
    }

    /// Sends stores to the page at guest physical address `gpa` through the slow path: it holds code now.
    pub fn forbid_writes(&mut self, gpa: u64) {
        for slot in self.filled.iter() {
            let entry = &mut self.entries[slot];
            if (entry.gpa ^ gpa) >> 12 == 0 {
                entry.write = Entry::empty(slot).write;
            }
        }
    }

    /// Does the same for every page that holds code by now, and invalidates the code of those that could be stored to.
    pub fn forbid_writes_to_code(&mut self, code: &CodeMap) {
        for slot in self.filled.iter() {
            let never = Entry::empty(slot).write;
            let entry = &mut self.entries[slot];
            if entry.write != never && code.page(entry.gpa).has_code() {
                entry.write = never;
                code.invalidate(entry.gpa);
            }
        }
    }
}
