//! Memory for translated code: a ring of parts. Each is filled from its start on; when all are full, the oldest is emptied.

use crate::code_memory::CodeMemory;
use std::io;
use std::ops::Range;

/// Parts of a cache. Emptying one takes a sixteenth of the time that emptying all of a cache would.
pub const PARTS: usize = 16;
/// More than the code of any block takes, in bytes.
const LARGEST: usize = 64 << 10;
/// The least size of a cache, in bytes.
const LEAST: usize = PARTS * 2 * LARGEST;
const _: () = assert!(LEAST == 2 << 20, "as the help of --translation-cache says");
/// The stubs lie before the parts.
const STUBS: usize = 16 << 10;

/// A cache.
pub struct CodeCache {
    memory: CodeMemory,
    layout: Layout,
    /// The part that is being filled, and how much of it is.
    part: usize,
    used: usize,
}

/// Where the parts of a cache lie.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// Address of the first.
    start: u64,
    /// Bytes of each.
    size: usize,
}

impl Layout {
    /// The number of the part that holds `address`, which is in one.
    pub fn part(&self, address: u64) -> usize {
        (address - self.start) as usize / self.size
    }

    /// Address of the first.
    #[cfg(test)]
    pub fn start(&self) -> u64 {
        self.start
    }

    fn first(&self, part: usize) -> u64 {
        self.start + (part * self.size) as u64
    }
}

impl CodeCache {
    /// An empty cache of about `size` bytes, at least [`LEAST`]; a page costs memory only once used.
    ///
    /// # Errors
    /// The host gives no memory to execute from.
    pub fn new(size: usize) -> io::Result<Self> {
        let size = size.max(LEAST) / PARTS & !0xfff;
        let memory = CodeMemory::new(STUBS + PARTS * size)?;
        let start = memory.executable().start + STUBS as u64;
        Ok(Self {
            memory,
            layout: Layout { start, size },
            part: 0,
            used: 0,
        })
    }

    /// Address of the code that [`CodeCache::put_stubs`] puts there.
    pub fn stubs(&self) -> u64 {
        self.memory.executable().start
    }

    /// Writes the code that all other code may lead to, made for [`CodeCache::stubs`].
    ///
    /// # Panics
    /// If there is no room.
    pub fn put_stubs(&mut self, code: &[u8]) {
        assert!(code.len() <= STUBS);
        self.write(0, code);
    }

    /// Where its parts are.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Where the processor may be when it runs this cache's code.
    pub fn range(&self) -> Range<u64> {
        self.memory.executable()
    }

    /// True if the part that is being filled may be too full for a block.
    pub fn is_full(&self) -> bool {
        self.layout.size - self.used < LARGEST
    }

    /// Goes on to the next part; gives its number. Whatever was there is lost.
    pub fn next_part(&mut self) -> usize {
        self.part = (self.part + 1) % PARTS;
        self.used = 0;
        self.part
    }

    /// Address at which the next code will run.
    pub fn next(&self) -> u64 {
        self.layout.first(self.part) + self.used as u64
    }

    /// Appends code that was made for [`CodeCache::next`].
    ///
    /// # Panics
    /// If there is no room.
    pub fn append(&mut self, code: &[u8]) {
        assert!(self.used + code.len() <= self.layout.size);
        self.write((self.next() - self.stubs()) as usize, code);
        self.used += code.len().next_multiple_of(16).min(self.layout.size - self.used);
    }

    /// `size` bytes of code at `address`.
    pub fn code(&self, address: u64, size: usize) -> &[u8] {
        let range = self.range();
        assert!(range.contains(&address) && range.end - address >= size as u64);
        // SAFETY: the bytes are inside the mapping, which lives as long as `self`; only `self` writes to it.
        unsafe { std::slice::from_raw_parts(address as *const u8, size) }
    }

    /// Overwrites code at `address`.
    #[cfg(test)]
    pub fn overwrite(&mut self, address: u64, code: &[u8]) {
        self.write((address - self.stubs()) as usize, code);
    }

    fn write(&mut self, offset: usize, code: &[u8]) {
        let size = (self.range().end - self.range().start) as usize;
        assert!(offset + code.len() <= size);
        // SAFETY: the bytes are inside the mapping, and nobody runs them yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.memory.writable().add(offset), code.len()) };
    }

    /// Lets the rel32 at address `at` lead to `target`. Nobody runs this cache's code meanwhile.
    pub fn patch(&mut self, at: u64, target: u64) {
        let distance = target.wrapping_sub(at + 4) as i32;
        self.write((at - self.stubs()) as usize, &distance.to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_filled_one_after_another_and_the_first_comes_again() {
        let mut cache = CodeCache::new(0).unwrap();
        let (layout, first) = (cache.layout(), cache.next());
        let mut parts = Vec::new();
        for _ in 0..PARTS {
            assert!(!cache.is_full());
            let start = cache.next();
            while !cache.is_full() {
                cache.append(&[0xcc; LARGEST]);
            }
            parts.push(layout.part(start));
            assert_eq!(layout.part(cache.next() - 1), layout.part(start));
            cache.next_part();
        }
        assert_eq!(parts, (0..PARTS).collect::<Vec<_>>());
        assert_eq!(cache.next(), first);
        assert_eq!(cache.range().end - first, LEAST as u64);
    }

    #[test]
    fn a_branch_is_led_elsewhere() {
        let mut cache = CodeCache::new(0).unwrap();
        let start = cache.next();
        // jmp rel32
        cache.append(&[0xe9, 0, 0, 0, 0]);
        cache.patch(start + 1, start + 0x105);
        // SAFETY: five bytes of the cache.
        let code = unsafe { (start as *const [u8; 5]).read() };
        assert_eq!(code, [0xe9, 0, 1, 0, 0]);
    }
}
