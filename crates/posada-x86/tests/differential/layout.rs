//! The memory that a case sees, at the same addresses with the same rights in the child process and in the guest.
//!
//! ```text
//! CODE + 0     executable, readable        DATA + 0000h  absent
//! CODE + 1000h executable, readable        DATA + 1000h  read, write
//! CODE + 2000h absent                      DATA + 2000h  read, write
//!                                          DATA + 3000h  read only
//!                                          DATA + 4000h  absent
//!                                          DATA + 5000h  read, write
//!                                          DATA + 6000h  absent
//! ```
//!
//! All addresses are below 2 GiB: 32-bit addresses and sign-extended displacements reach them.

use crate::state::{Case, Line, Outcome};
use std::sync::OnceLock;

pub const PAGE: u64 = 0x1000;
pub const CODE: u64 = 0x1000_0000;
pub const CODE_PAGES: usize = 2;
pub const DATA: u64 = 0x2000_0000;
/// Which page after [`DATA`] each backing page appears at, and whether it can be written.
pub const DATA_PAGES: [(u64, bool); 4] = [(1, true), (2, true), (3, false), (5, true)];

/// What is in the code pages where no case is: HLT, which in user mode is #GP(0) on both sides.
const FILLER: u8 = 0xf4;
/// Bytes of an exit: a jump through memory, or far out of compatibility mode.
pub const EXIT: u64 = 7;
/// Where such far jumps lead: exits again, that of 64-bit mode.
pub const GATES: u64 = CODE + 0x3d;

/// The selectors that Linux gives user mode.
pub const CODE_64: u16 = 0x33;
pub const CODE_32: u16 = 0x23;
pub const FLAT_DATA: u16 = 0x2b;

/// The backing memory of both windows.
pub struct Memory {
    data: *mut u8,
    code: *mut u8,
    pool: &'static [[u8; 64]],
    /// Code bytes written for the present case.
    written: [(u64, u64); 3],
}

/// Index of a data address in the backing pages.
fn data_index(address: u64) -> Option<usize> {
    let page = address.wrapping_sub(DATA) / PAGE;
    let at = DATA_PAGES.iter().position(|&(number, _)| number == page)?;
    Some(at * PAGE as usize + (address % PAGE) as usize)
}

/// What the data pages hold between cases.
fn pool() -> &'static [[u8; 64]] {
    static POOL: OnceLock<Vec<[u8; 64]>> = OnceLock::new();
    POOL.get_or_init(|| {
        let mut lines = vec![[0; 64]; DATA_PAGES.len() * PAGE as usize / 64];
        crate::rng::Rng::new(0x706f_7361_6461).fill(lines.as_flattened_mut());
        lines
    })
}

/// A line of the data window as it is between cases.
pub fn original(address: u32) -> [u8; 64] {
    data_index(address.into()).map_or([0; 64], |index| pool()[index / 64])
}

impl Memory {
    /// # Safety
    /// `data` and `code` name as many writable pages as [`DATA_PAGES`] and [`CODE_PAGES`] say, used by nobody else
    /// while a method runs.
    pub unsafe fn new(data: *mut u8, code: *mut u8) -> Self {
        let pool = pool();
        // SAFETY: the caller vouches for the pages.
        unsafe {
            data.cast::<[u8; 64]>()
                .copy_from_nonoverlapping(pool.as_ptr(), pool.len());
            code.write_bytes(FILLER, CODE_PAGES * PAGE as usize);
        }
        let mut memory = Self {
            data,
            code,
            pool,
            written: [(0, 0); 3],
        };
        for exit in 0..2 {
            memory.put_code(
                0,
                GATES + exit * EXIT,
                &crate::trampoline::exit_bytes(exit as usize, 64),
            );
        }
        memory.written = [(0, 0); 3];
        memory
    }

    fn put_code(&mut self, slot: usize, address: u64, bytes: &[u8]) {
        let at = address - CODE;
        let room = (CODE_PAGES as u64 * PAGE).saturating_sub(at);
        let length = room.min(bytes.len() as u64);
        self.written[slot] = (at, length);
        // SAFETY: `at + length` is inside the code pages.
        unsafe {
            self.code
                .add(at as usize)
                .copy_from_nonoverlapping(bytes.as_ptr(), length as usize)
        };
    }

    /// Writes a case's instruction, exits and data.
    pub fn prepare(&mut self, case: &Case) {
        for (at, length) in std::mem::take(&mut self.written) {
            // SAFETY: `put_code` wrote these bytes.
            unsafe { self.code.add(at as usize).write_bytes(FILLER, length as usize) };
        }
        let code = &case.code[..usize::from(case.length)];
        self.put_code(0, case.state.rip, code);
        for (slot, address) in case.exits().enumerate() {
            self.put_code(1 + slot, address, &crate::trampoline::exit_bytes(slot, case.bits));
        }
        let mut from = 0;
        for patch in &case.patches[..usize::from(case.patch_count)] {
            for offset in 0..u64::from(patch.length) {
                let byte = case.patch_bytes[from];
                from += 1;
                if let Some(index) = data_index(u64::from(patch.address) + offset) {
                    // SAFETY: the index is inside the data pages.
                    unsafe { self.data.add(index).write(byte) };
                }
            }
        }
    }

    /// Records the lines that now differ from the pool, and restores them.
    pub fn collect(&mut self, outcome: &mut Outcome) {
        outcome.lines_changed = 0;
        for (index, line) in self.pool.iter().enumerate() {
            // SAFETY: the pool is as long as the data pages.
            let now = unsafe { &mut *self.data.cast::<[u8; 64]>().add(index) };
            if now != line {
                if let Some(slot) = outcome.lines.get_mut(usize::from(outcome.lines_changed)) {
                    let (page, _) = DATA_PAGES[index / 64];
                    *slot = Line {
                        address: (DATA + page * PAGE) as u32 + (index % 64) as u32 * 64,
                        bytes: *now,
                    };
                }
                outcome.lines_changed += 1;
                *now = *line;
            }
        }
    }
}
