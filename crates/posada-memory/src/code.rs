//! Which 64-byte granules of guest RAM hold code that an engine has decoded or translated, with a version per page that
//! every write into such a granule raises.
//!
//! The protocol (no locks): an engine marks the granules, *then* reads the version and the bytes, *then* looks whether the
//! marks still stand (else it begins anew), and checks the version each time before it runs what it decoded. A writer
//! stores, *then* looks at the marks; on a hit it clears all marks of the page, *then* raises the version. One of the two
//! always sees the other, and a page whose code is overwritten is plain data again.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, PoisonError, RwLock, Weak};
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

/// Who wants to know of changes of code at once.
pub trait CodeListener: std::fmt::Debug + Send + Sync {
    /// [`CodeMap::changes`] has grown. Called by whoever wrote, on any thread.
    fn code_changed(&self);
}

/// The records of all of guest RAM (16 bytes a page, thin as RAM itself).
#[derive(Debug)]
pub struct CodeMap {
    pages: *mut CodePage,
    count: u64,
    changes: AtomicU64,
    /// The page of each of the last changes, in the low [`PAGE_BITS`], and the low bits of the change's number.
    log: [AtomicU64; LOG],
    listener: RwLock<Option<Weak<dyn CodeListener>>>,
    device_writes: AtomicU64,
}

/// Changes that are remembered.
const LOG: usize = 256;
/// Bits of a page's number: guest physical addresses have 52.
const PAGE_BITS: u32 = 40;

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
            log: std::array::from_fn(|_| AtomicU64::new(u64::MAX)),
            listener: RwLock::new(None),
            device_writes: AtomicU64::new(0),
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
        self.note_change(gpa);
    }

    /// A page's version was raised.
    fn note_change(&self, gpa: u64) {
        let number = self.changes.fetch_add(1, Ordering::SeqCst);
        let entry = number << PAGE_BITS | gpa / crate::PAGE_SIZE;
        self.log[number as usize % LOG].store(entry, Ordering::Release);
        let listener = self.listener.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(listener) = listener.as_ref().and_then(Weak::upgrade) {
            listener.code_changed();
        }
    }

    /// Has this one, instead of any other, told of all changes from now on, as long as it lives.
    pub fn listen(&self, listener: Weak<dyn CodeListener>) {
        *self.listener.write().unwrap_or_else(PoisonError::into_inner) = Some(listener);
    }

    /// The page (its guest physical address) whose version the change of this number raised, counted as
    /// [`CodeMap::changes`] does. `None` if that is forgotten, or not known yet.
    pub fn changed(&self, number: u64) -> Option<u64> {
        let entry = self.log[number as usize % LOG].load(Ordering::Acquire);
        let known = entry >> PAGE_BITS == number << PAGE_BITS >> PAGE_BITS;
        known.then_some((entry & ((1 << PAGE_BITS) - 1)) * crate::PAGE_SIZE)
    }

    /// How often anybody wrote to RAM by way of [`crate::GuestRam::memory`].
    pub fn device_writes(&self) -> u64 {
        self.device_writes.load(Ordering::SeqCst)
    }

    /// To be called after every store of `length` bytes to RAM that bypasses [`crate::GuestRam::memory`]; true if code
    /// was hit.
    pub fn written(&self, gpa: u64, length: u64) -> bool {
        fence(Ordering::SeqCst);
        let mut hit = false;
        let (mut at, end) = (gpa, gpa + length);
        while at < end {
            let next = (at / crate::PAGE_SIZE + 1) * crate::PAGE_SIZE;
            if self.page(at).written(at % crate::PAGE_SIZE, next.min(end) - at) {
                self.note_change(at);
                hit = true;
            }
            at = next;
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
        self.map.device_writes.fetch_add(1, Ordering::SeqCst);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_changes_are_known_by_their_pages() {
        let map = CodeMap::new(1 << 20).unwrap();
        assert_eq!((map.changes(), map.changed(0)), (0, None));
        for page in 0..3 {
            map.page(page << 12).mark(0x40, 64);
        }
        assert!(!map.written(0x1000, 0x40));
        // Over the end of a page: two changes.
        map.page(0x1000).mark(0xfc0, 64);
        map.page(0x2000).mark(0, 64);
        assert!(map.written(0x1ffc, 8));
        map.invalidate(0x5000);
        let changes: Vec<_> = (0..4).map(|number| map.changed(number)).collect();
        assert_eq!(
            (map.changes(), changes),
            (3, vec![Some(0x1000), Some(0x2000), Some(0x5000), None])
        );
        for _ in 0..LOG {
            map.invalidate(0x7000);
        }
        assert_eq!((map.changed(2), map.changed(3)), (None, Some(0x7000)));
    }
}
