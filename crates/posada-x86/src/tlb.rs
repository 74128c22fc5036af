//! Soft TLBs: direct-mapped tables of translations, one for each set of rights that accesses come with.

use crate::walk::Mapping;
use posada_memory::CodeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

pub(crate) const ENTRIES: usize = 1024;
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
    /// Slots in use (those whose entry has a host address), so that a flush costs what was used.
    filled: Vec<u16>,
    /// Which 2 MiB regions may have slots that are part of a large page, and which 1 GiB regions of a huge one: hashed
    /// bit sets, so that forgetting a small page need not look at every slot.
    large: [u64; 16],
    huge: u64,
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
}

// SAFETY: the pointers name guest RAM, which outlives the Core that owns this.
unsafe impl Send for Mmu {}

impl Mmu {
    /// Empty ones, of a processor that alone uses its RAM or shares it, with code in it, with others.
    pub fn new(shared: Option<Arc<CodeMap>>) -> Self {
        Self {
            others: Others(shared),
            entries: std::array::from_fn(Entry::empty),
            filled: Vec::new(),
            large: [0; 16],
            huge: 0,
            generation: Generation::default(),
            active: SUPERVISOR * ENTRIES,
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
        let slot = Self::slot(first, linear);
        let empty = Entry::empty(slot);
        let entry = &mut self.entries[slot];
        if entry.host.is_null() {
            self.filled.push(slot as u16);
        } else if entry.write != empty.write {
            self.others.settle_stores();
            self.others.look(entry.gpa);
        }
        match mapping.shift {
            12 => {}
            30.. => self.huge |= 1 << (linear >> 30 & 63),
            shift => {
                let first = linear >> shift << shift >> 21;
                for region in first..first + (1 << (shift - 21)) {
                    self.large[(region >> 6 & 15) as usize] |= 1 << (region & 63);
                }
            }
        }
        let page = linear & !0xfff;
        *entry = Entry {
            read: page,
            write: if write { page } else { empty.write },
            host,
            gpa: mapping.gpa & !0xfff | u64::from(mapping.shift) | if mapping.global { GLOBAL } else { 0 },
        };
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.others.settle_stores();
        for slot in self.filled.drain(..) {
            let empty = Entry::empty(slot.into());
            let entry = std::mem::replace(&mut self.entries[usize::from(slot)], empty);
            if entry.write != empty.write {
                self.others.look(entry.gpa);
            }
        }
        (self.large, self.huge) = ([0; 16], 0);
        self.generation.all += 1;
    }

    fn flush_where(&mut self, drop: impl Fn(&Entry) -> bool) {
        let (entries, others) = (&mut self.entries, &self.others);
        others.settle_stores();
        self.filled.retain(|&slot| {
            let entry = &mut entries[usize::from(slot)];
            let gone = drop(entry);
            if gone {
                let empty = Entry::empty(slot.into());
                let entry = std::mem::replace(entry, empty);
                if entry.write != empty.write {
                    others.look(entry.gpa);
                }
            }
            !gone
        });
    }

    /// Forgets all but global pages.
    pub fn flush_non_global(&mut self) {
        self.flush_where(|entry| entry.gpa & GLOBAL == 0);
        self.generation.context += 1;
    }

    /// How often what was forgotten.
    #[inline(always)]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Forgets one page, whatever its size.
    pub fn flush_page(&mut self, linear: u64) {
        self.generation.all += 1;
        let large = self.large[(linear >> 27 & 15) as usize] >> (linear >> 21 & 63) & 1;
        if large | self.huge >> (linear >> 30 & 63) & 1 == 0 {
            self.others.settle_stores();
            for table in 0..TABLES {
                let slot = Self::slot(table * ENTRIES, linear);
                let entry = &mut self.entries[slot];
                if (entry.read ^ linear) < 4096 {
                    let Entry { read, write, .. } = Entry::empty(slot);
                    if entry.write != write {
                        self.others.look(entry.gpa);
                    }
                    (entry.read, entry.write) = (read, write);
                }
            }
            return;
        }
        self.flush_where(|entry| (entry.read ^ linear) >> (entry.gpa & 0x3f) == 0);
    }

    /// Sends stores to the page at guest physical address `gpa` through the slow path: it holds code now.
    pub fn forbid_writes(&mut self, gpa: u64) {
        for &slot in &self.filled {
            let entry = &mut self.entries[usize::from(slot)];
            if (entry.gpa ^ gpa) >> 12 == 0 {
                entry.write = Entry::empty(slot.into()).write;
            }
        }
    }

    /// Does the same for every page that others have found code in by now, and invalidates the code of those that could be
    /// stored to.
    pub fn forbid_writes_to_code(&mut self) {
        self.others.settle_stores();
        for &slot in &self.filled {
            let never = Entry::empty(slot.into()).write;
            let entry = &mut self.entries[usize::from(slot)];
            if entry.write != never && self.others.look(entry.gpa) {
                entry.write = never;
            }
        }
    }
}
