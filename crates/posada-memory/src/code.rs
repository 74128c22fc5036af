//! Which 64-byte granules of guest RAM hold code that an engine has decoded or translated, with a version per page that
//! every write into such a granule raises.
//!
//! The protocol (no locks): an engine marks the granules, *then* reads the version and the bytes, *then* looks whether the
//! marks still stand (else it begins anew), and checks the version each time before it runs what it decoded. A writer
//! stores, *then* looks at the marks; on a hit it clears all marks of the page, *then* raises the version. One of the two
//! always sees the other, and a page whose code is overwritten is plain data again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

/// One page's record. All zeroes: no code.
#[repr(C)]
#[derive(Debug)]
pub struct CodePage {
    granules: AtomicU64,
    version: AtomicU32,
    /// One more than the last version at which [`CodePage::set_announced`] was called.
    announced: AtomicU32,
}

/// Bits for the granules that `length` bytes at `offset` in a page touch.
fn granules(offset: u64, length: u64) -> u64 {
    let (first, last) = (offset / 64, (offset + length.max(1) - 1) / 64);
    (u64::MAX >> (63 - last.min(63))) & (u64::MAX << first)
}

impl CodePage {
    /// Marks `length` bytes at `offset` in the page as code, before they are read. True if the page held no code before:
    /// writers that go past [`CodeMap::written`] must then be told.
    pub fn mark(&self, offset: u64, length: u64) -> bool {
        self.granules.fetch_or(granules(offset, length), Ordering::SeqCst) == 0
    }

    /// True if the bytes are still marked.
    pub fn marked(&self, offset: u64, length: u64) -> bool {
        let wanted = granules(offset, length);
        self.granules.load(Ordering::SeqCst) & wanted == wanted
    }

    /// True if any code was marked: stores to this page must go through [`CodeMap::written`].
    pub fn has_code(&self) -> bool {
        self.granules.load(Ordering::SeqCst) != 0
    }

    /// Raised by each write over code.
    #[inline]
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// True if all who may go past [`CodeMap::written`] have been told that the page holds code since it has this version.
    pub fn announced(&self, version: u32) -> bool {
        self.announced.load(Ordering::Acquire) == version.wrapping_add(1)
    }

    /// They have been.
    pub fn set_announced(&self, version: u32) {
        self.announced.store(version.wrapping_add(1), Ordering::Release);
    }

    fn invalidate(&self) {
        self.granules.swap(0, Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
    }

    /// After a store of `length` bytes at `offset`; true if code was hit.
    fn written(&self, offset: u64, length: u64) -> bool {
        let hit = self.granules.load(Ordering::SeqCst) & granules(offset, length) != 0;
        if hit {
            self.invalidate();
        }
        hit
    }
}

/// The records of all of guest RAM (16 bytes a page, thin as RAM itself).
#[derive(Debug)]
pub struct CodeMap {
    pages: *mut CodePage,
    count: u64,
    changes: AtomicU64,
}

// SAFETY: the records are atomics in a mapping that lives as long as the value.
unsafe impl Send for CodeMap {}
// SAFETY: as above.
unsafe impl Sync for CodeMap {}

impl CodeMap {
    /// Records for guest physical addresses below `end` (bytes).
    pub(crate) fn new(end: u64) -> io::Result<Self> {
        let count = end.div_ceil(crate::PAGE_SIZE);
        // SAFETY: a fresh anonymous mapping; zero is a valid CodePage.
        let pages = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count as usize * size_of::<CodePage>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if pages == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            pages: pages.cast(),
            count,
            changes: AtomicU64::new(0),
        })
    }

    /// The record of the page that holds `gpa`.
    ///
    /// # Panics
    /// If `gpa` lies beyond the end of RAM.
    #[inline]
    pub fn page(&self, gpa: u64) -> &CodePage {
        let index = gpa / crate::PAGE_SIZE;
        assert!(index < self.count);
        // SAFETY: the index was checked against the mapping's length.
        unsafe { &*self.pages.add(index as usize) }
    }

    /// How often any page's version was raised: while this stands, all versions do.
    #[inline]
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Makes all that was decoded from the page that holds `gpa` invalid: a writer may have gone past [`CodeMap::written`].
    pub fn invalidate(&self, gpa: u64) {
        self.page(gpa).invalidate();
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    /// To be called after every store of `length` bytes to RAM that bypasses [`crate::GuestRam::memory`]; true if code
    /// was hit.
    pub fn written(&self, gpa: u64, length: u64) -> bool {
        fence(Ordering::SeqCst);
        let mut hit = false;
        let (mut at, end) = (gpa, gpa + length);
        while at < end {
            let next = (at / crate::PAGE_SIZE + 1) * crate::PAGE_SIZE;
            hit |= self.page(at).written(at % crate::PAGE_SIZE, next.min(end) - at);
            at = next;
        }
        if hit {
            self.changes.fetch_add(1, Ordering::SeqCst);
        }
        hit
    }
}

impl Drop for CodeMap {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`.
        unsafe { libc::munmap(self.pages.cast(), self.count as usize * size_of::<CodePage>()) };
    }
}

/// The code map as vm-memory's dirty bitmap: tells it about every write by devices.
#[derive(Clone, Debug)]
pub struct CodeSlice {
    map: Arc<CodeMap>,
    start: u64,
}

impl CodeSlice {
    pub(crate) fn new(map: Arc<CodeMap>, start: u64) -> Self {
        Self { map, start }
    }
}

impl WithBitmapSlice<'_> for CodeSlice {
    type S = Self;
}

impl BitmapSlice for CodeSlice {}

impl Bitmap for CodeSlice {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.map.written(self.start + offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            map: Arc::clone(&self.map),
            start: self.start + offset as u64,
        }
    }
}
