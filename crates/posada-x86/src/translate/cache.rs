//! Memory for translated code, filled from its start on.

use crate::code_memory::CodeMemory;
use std::io;

/// Bytes of a cache; a page costs memory only once used.
pub const SIZE: usize = 64 << 20;

/// A cache.
pub struct CodeCache {
    memory: CodeMemory,
    used: usize,
}

impl CodeCache {
    /// An empty cache.
    ///
    /// # Errors
    /// The host gives no memory to execute from.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            memory: CodeMemory::new(c"posada-code", SIZE)?,
            used: 0,
        })
    }

    fn start(&self) -> u64 {
        self.memory.executable().start
    }

    /// Address at which the next code will run.
    pub fn next(&self) -> u64 {
        self.start() + self.used as u64
    }

    /// Where the processor may be when it runs this cache's code.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.memory.executable()
    }

    /// Bytes that are left.
    pub fn room(&self) -> usize {
        SIZE - self.used
    }

    /// Appends code that was made for [`CodeCache::next`].
    ///
    /// # Panics
    /// If there is no room.
    pub fn append(&mut self, code: &[u8]) {
        assert!(code.len() <= self.room());
        // SAFETY: the bytes are inside the mapping, and nobody runs them yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.memory.writable().add(self.used), code.len()) };
        self.used += code.len().next_multiple_of(16).min(self.room());
    }

    /// Forgets all code from `address` on.
    pub fn rewind(&mut self, address: u64) {
        self.used = (address - self.start()) as usize;
    }

    /// Lets the rel32 at address `at` lead to `target`. Nobody runs this cache's code meanwhile.
    pub fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.start()) as usize;
        assert!(offset + 4 <= SIZE);
        let distance = target.wrapping_sub(at + 4) as i32;
        // SAFETY: inside the mapping.
        unsafe {
            self.memory
                .writable()
                .add(offset)
                .cast::<i32>()
                .write_unaligned(distance)
        };
    }
}
