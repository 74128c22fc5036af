//! What translated code finds at `gs:`: places in a [`Core`], and the few words that are the translator's own.

use super::groups::GROUPS;
use super::jumps::Way;
use crate::core::{Core, Msrs, VectorState};
use crate::lapic::Lapic;
use crate::tlb::{ENTRIES, Entry, FETCH_SUPERVISOR, FETCH_USER, Generation, Mmu, SUPERVISOR, SUPERVISOR_AC, USER};
use std::mem::offset_of;

/// Slots of a jump cache. The kernel's hot code lies far apart: with a quarter of this, a tenth of its branches found the slot
/// taken by another.
pub const JUMPS: usize = 1 << 15;
/// Ways to blocks.
pub const WAYS: usize = 1 << 16;
/// Slots that stubs may fill before Rust takes note of them.
pub const LOG: usize = 1 << 12;
/// In the log: the slot is one for a page that is mapped globally.
pub const LOG_GLOBAL: u32 = 1 << 31;
/// Jump caches: one for each data table that translated code uses, so that no mode runs another's code.
pub const MODES: usize = 3;

/// The translator's words in a [`Core`].
#[repr(C)]
pub struct Frame {
    /// The host's stack while translated code runs.
    pub host_rsp: u64,
    /// The Core.
    pub core: u64,
    /// Where to enter; while a check has failed, the address.
    pub target: u64,
    /// Why and where translated code was left: an address in the code cache.
    pub site: u64,
    /// Holds what does not survive a check.
    pub temporary: u64,
    /// Holds RAX while a check looks further.
    pub spilled: u64,
    /// Host addresses of ranges that were checked once for several accesses.
    pub ranges: [u64; GROUPS],
    /// The mailbox' event word.
    pub events: u64,
    /// The bits of RIP that number the slots of a jump cache, side by side.
    pub jump_mask: u32,
    /// Where arithmetic flags are in a rotated [`Core::arithmetic`], and in RFLAGS.
    pub flags_from: u32,
    /// The same of RFLAGS.
    pub flags_to: u32,
    /// What of the guest's vector registers is in the processor, not in the Core: one of [`super::vectors::live`].
    pub vectors_live: u8,
    /// MXCSR as Rust wants it.
    pub host_mxcsr: u32,
    /// What the signal handler found: RIP and RFLAGS.
    pub trap_rip: u64,
    /// RFLAGS of the trap.
    pub trap_flags: u64,
    /// Checks that failed and then succeeded.
    pub fills: u64,
    /// Checks, if they are counted.
    pub lookups: u64,
    /// What the blocks and the ways to them were found under.
    pub seen: Seen,
    /// How many slots of the jump caches stubs have filled, and which, counted through all caches.
    pub logged: u32,
    /// Those.
    pub log: [u32; LOG],
    /// [`Way`]s.
    pub ways: [Way; WAYS],
    /// By RIP: addresses of code that compares R10 with its own RIP first.
    pub jumps: [[u64; JUMPS]; MODES],
}

/// What may part the ways from block to block from what the guest would find.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Mappings forgotten.
    pub generation: Generation,
    /// Changes of code.
    pub changes: u64,
    /// What code cannot do, at any privilege level.
    pub settings: u8,
}

/// The slot of a jump cache for code at `rip`.
pub fn slot(rip: u64, jump_mask: u32) -> usize {
    ((rip as u32 & jump_mask) >> jump_mask.trailing_zeros()) as usize
}

impl Frame {
    /// Makes one in place, as it is larger than a stack should hold.
    ///
    /// # Safety
    /// `at` is memory for one.
    pub(crate) unsafe fn make(at: *mut Self) {
        // SAFETY: the caller's memory; all fields are integers, or made of them.
        unsafe {
            at.write_bytes(0, 1);
            (*at).host_mxcsr = 0x1f80;
        }
    }
}

macro_rules! places {
    ($($(#[$doc:meta])* $name:ident = $field:ident;)*) => {$(
        $(#[$doc])*
        pub const $name: usize = offset_of!(Core, frame) + offset_of!(Frame, $field);
    )*};
}

places! {
    /// [`Frame::host_rsp`].
    HOST_RSP = host_rsp;
    /// [`Frame::core`].
    CORE = core;
    /// [`Frame::target`].
    TARGET = target;
    /// [`Frame::site`].
    SITE = site;
    /// [`Frame::temporary`].
    TEMPORARY = temporary;
    /// [`Frame::lookups`].
    LOOKUPS = lookups;
    /// [`Frame::spilled`].
    SPILLED = spilled;
    /// [`Frame::events`].
    EVENTS = events;
    /// [`Frame::logged`].
    LOGGED = logged;
    /// [`Frame::log`].
    LOGGED_SLOTS = log;
    /// [`Frame::jump_mask`].
    JUMP_MASK = jump_mask;
    /// [`Frame::flags_from`].
    FLAGS_FROM = flags_from;
    /// [`Frame::flags_to`].
    FLAGS_TO = flags_to;
    /// [`Frame::vectors_live`].
    VECTORS_LIVE = vectors_live;
    /// [`Frame::host_mxcsr`].
    HOST_MXCSR = host_mxcsr;
}

/// Arithmetic flags in [`Core::arithmetic`] rotated right by eight places: those of AH, and OF.
pub const PACKED_FLAGS: u32 = 0x0100_00d5;
/// RFLAGS without the arithmetic flags.
pub const SYSTEM_FLAGS: usize = offset_of!(Core, system_flags);
/// IA32_KERNEL_GS_BASE.
pub const KERNEL_GS_BASE: usize = offset_of!(Core, msr) + offset_of!(Msrs, kernel_gs_base);
/// IA32_TSC_AUX.
pub const TSC_AUX: usize = offset_of!(Core, msr) + offset_of!(Msrs, tsc_aux);
/// Guest TSC minus host TSC.
pub const TSC_OFFSET: usize = offset_of!(Core, msr) + offset_of!(Msrs, tsc_offset);
/// An interrupt waits for IF.
pub const INTERRUPT_DUE: usize = offset_of!(Core, lapic) + offset_of!(Lapic, due);
/// The data table in use.
pub const ACTIVE: usize = offset_of!(Core, mmu) + offset_of!(Mmu, active);
/// RIP.
pub const RIP: usize = reg(17);
/// Arithmetic flags.
pub const ARITHMETIC: usize = offset_of!(Core, arithmetic);
/// MXCSR.
pub const MXCSR: usize = offset_of!(Core, vector) + offset_of!(VectorState, mxcsr);

/// The upper halves of ZMM0-15 are in use.
pub const ZMM_HIGH_USED: usize = offset_of!(Core, vector) + offset_of!(VectorState, zmm_high_used);

/// A general register.
pub const fn reg(number: u8) -> usize {
    offset_of!(Core, regs) + number as usize * 8
}

/// A vector register.
pub const fn ymm(number: u8) -> usize {
    offset_of!(Core, vector) + offset_of!(VectorState, ymm) + number as usize * 32
}

/// The upper half of one of ZMM0-15.
pub const fn zmm_high(number: u8) -> usize {
    offset_of!(Core, vector) + offset_of!(VectorState, zmm_high) + number as usize * 32
}

/// One of ZMM16-31.
pub const fn zmm(number: u8) -> usize {
    offset_of!(Core, vector) + offset_of!(VectorState, zmm) + (number as usize - 16) * 64
}

/// An opmask register.
pub const fn opmask(number: u8) -> usize {
    offset_of!(Core, vector) + offset_of!(VectorState, opmask) + number as usize * 8
}

/// A segment's base.
pub const fn segment_base(segment: u8) -> usize {
    offset_of!(Core, segments)
        + segment as usize * size_of::<posada_engine::Segment>()
        + offset_of!(posada_engine::Segment, base)
}

/// One of [`Frame::ranges`].
pub const fn range(group: u8) -> usize {
    offset_of!(Core, frame) + offset_of!(Frame, ranges) + group as usize * 8
}

/// Places in the first [`Way`].
#[derive(Clone, Copy, Debug)]
pub struct WayPlaces {
    /// RIP.
    pub rip: usize,
    /// Mapping.
    pub mapping: usize,
    /// Address of code.
    pub start: usize,
}

/// Where the ways are.
pub const fn ways() -> WayPlaces {
    let first = offset_of!(Core, frame) + offset_of!(Frame, ways);
    WayPlaces {
        rip: first + offset_of!(Way, rip),
        mapping: first + offset_of!(Way, mapping),
        start: first + offset_of!(Way, start),
    }
}

/// A jump cache.
pub const fn jumps(mode: usize) -> usize {
    offset_of!(Core, frame) + offset_of!(Frame, jumps) + mode * JUMPS * 8
}

/// The data table of a mode, by its number among the soft TLBs.
pub const fn mode(active: usize) -> Option<usize> {
    match active / ENTRIES {
        USER => Some(0),
        SUPERVISOR => Some(1),
        SUPERVISOR_AC => Some(2),
        _ => None,
    }
}

/// True for the mode of user code.
pub const fn is_user(mode: usize) -> bool {
    mode == 0
}

/// The first slot of a mode's data table.
pub const fn active(mode: usize) -> usize {
    ENTRIES
        * match mode {
            0 => USER,
            1 => SUPERVISOR,
            _ => SUPERVISOR_AC,
        }
}

/// Places in the first entry of a mode's data table: tag of reads or of writes, and host address.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Tag of reads.
    pub read: usize,
    /// Tag of writes.
    pub write: usize,
    /// Host address.
    pub host: usize,
}

/// Where a mode's data table is.
pub const fn table(mode: usize) -> Table {
    let first = offset_of!(Core, mmu) + offset_of!(Mmu, entries) + active(mode) * size_of::<Entry>();
    Table {
        read: first + offset_of!(Entry, read),
        write: first + offset_of!(Entry, write),
        host: first + offset_of!(Entry, host),
    }
}

/// Where a mode's copy of an entry for the stack is.
pub const fn stack(mode: usize) -> Table {
    let entry = offset_of!(Core, mmu) + offset_of!(Mmu, stacks) + mode * size_of::<Entry>();
    Table {
        read: entry + offset_of!(Entry, read),
        write: entry + offset_of!(Entry, write),
        host: entry + offset_of!(Entry, host),
    }
}

/// Places in an entry of a table of code.
#[derive(Clone, Copy, Debug)]
pub struct FetchEntry {
    /// Tag.
    pub read: usize,
    /// Guest physical page, and more.
    pub gpa: usize,
}

/// Where the entry for a page of code is, for a mode's privilege level.
pub const fn fetch_entry(mode: usize, linear: u64) -> FetchEntry {
    let table = if is_user(mode) { FETCH_USER } else { FETCH_SUPERVISOR };
    let number = table * ENTRIES + (linear >> 12) as usize % ENTRIES;
    let entry = offset_of!(Core, mmu) + offset_of!(Mmu, entries) + number * size_of::<Entry>();
    FetchEntry {
        read: entry + offset_of!(Entry, read),
        gpa: entry + offset_of!(Entry, gpa),
    }
}

// The sequence of a check: index bits of the page number, shifted to whole entries.
const _: () = assert!(size_of::<Entry>() == 32 && size_of::<Way>() == 32);
/// Mask of the page number's bits, seven places to the right.
pub const INDEX_MASK: u32 = (ENTRIES as u32 - 1) << 5;
