//! Memory for stubs. What is in it never moves and is never freed, so a decoded instruction may name its stub for ever; what
//! no longer fits is assembled anew, in one slot that all share, each time it runs.

use super::form::Form;
use super::trap;
use crate::code_memory::CodeMemory;
use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Bytes of stubs; a page costs memory only once used.
const SIZE: usize = 4 << 20;
/// Bytes at the end of it for the shared slot, more than any stub takes.
const SLOT: usize = 4096;

/// The memory and what lies in it. Writes to it happen under the mutexes.
pub struct Arena {
    memory: CodeMemory,
    kept: Mutex<Kept>,
    slot: Mutex<()>,
}

#[derive(Default)]
struct Kept {
    forms: HashMap<u64, &'static Form>,
    used: usize,
}

/// The arena of this process.
///
/// # Errors
/// The host gives no memory to execute from.
pub fn arena() -> io::Result<&'static Arena> {
    static ARENA: OnceLock<Result<Arena, i32>> = OnceLock::new();
    ARENA
        .get_or_init(|| Arena::new().map_err(|error| error.raw_os_error().unwrap_or(libc::ENOMEM)))
        .as_ref()
        .map_err(|&number| io::Error::from_raw_os_error(number))
}

impl Arena {
    fn new() -> io::Result<Self> {
        let arena = Self {
            memory: CodeMemory::new(SIZE)?,
            kept: Mutex::default(),
            slot: Mutex::default(),
        };
        trap::catch(arena.memory.executable())?;
        Ok(arena)
    }

    /// The form with this key: the one that is kept, or a new one. `None` when the arena is full or there is no such
    /// instruction.
    pub fn form(&self, key: u64) -> Option<&'static Form> {
        let mut kept = lock(&self.kept);
        if let Some(form) = kept.forms.get(&key) {
            return Some(form);
        }
        let (mut form, code) = Form::assemble(key)?;
        let end = kept.used + code.len().next_multiple_of(16);
        if end > SIZE - SLOT {
            return None;
        }
        self.place(&mut form, &code, kept.used);
        kept.used = end;
        let form = Box::leak(Box::new(form));
        kept.forms.insert(key, form);
        Some(form)
    }

    /// Lets `run` have the form with this key in the shared slot.
    pub fn once<R>(&self, key: u64, run: impl FnOnce(&Form) -> R) -> Option<R> {
        let (mut form, code) = Form::assemble(key)?;
        debug_assert!(code.len() <= SLOT);
        let guard = lock(&self.slot);
        self.place(&mut form, &code, SIZE - SLOT);
        // The slot was written through another address: serialize (Intel SDM 3A, 9.1.3).
        std::arch::x86_64::__cpuid(0);
        let result = run(&form);
        drop(guard);
        Some(result)
    }

    fn place(&self, form: &mut Form, code: &[u8], offset: usize) {
        // SAFETY: `offset` and the length were checked against the arena's; nobody runs these bytes yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.memory.writable().add(offset), code.len()) };
        form.place((self.memory.executable().start as *const u8).wrapping_add(offset));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
