//! Memory for code that is made at run time, mapped twice: writable for who makes it and executable for the processor, so that
//! no address is ever both.

use std::io;
use std::ops::Range;
use std::ptr;

/// The two views.
pub struct CodeMemory {
    writable: View,
    executable: View,
}

// SAFETY: the mappings belong to the value alone, and it does not touch them by itself.
unsafe impl Send for CodeMemory {}
// SAFETY: as above; a shared reference only tells addresses.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// `size` bytes (whole pages) of zeros; a page costs memory only once used.
    ///
    /// # Errors
    /// The host gives no memory to execute from.
    pub fn new(size: usize) -> io::Result<Self> {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let writable = View::new(size, unsafe {
            libc::mmap(ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        })?;
        // A file would do as well, but for perf: it names what runs in anonymous memory only (`--perf-map`).
        // SAFETY: an old size of 0 maps the same shared pages once more, and leaves the first mapping (mremap(2)).
        let executable = View::new(size, unsafe {
            libc::mremap(writable.start.cast(), 0, size, libc::MREMAP_MAYMOVE)
        })?;
        // SAFETY: the mapping just made, which nobody uses yet.
        if unsafe { libc::mprotect(executable.start.cast(), size, libc::PROT_READ | libc::PROT_EXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { writable, executable })
    }

    /// Where to write, valid for all the bytes as long as the value lives.
    pub fn writable(&self) -> *mut u8 {
        self.writable.start
    }

    /// Where the processor runs what was written.
    pub fn executable(&self) -> Range<u64> {
        let start = self.executable.start as u64;
        start..start + self.executable.size as u64
    }
}

/// One mapping.
struct View {
    start: *mut u8,
    size: usize,
}

impl View {
    /// What `mmap` or `mremap` has given.
    fn new(size: usize, start: *mut libc::c_void) -> io::Result<Self> {
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast();
        Ok(Self { start, size })
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and its code runs no more.
        unsafe { libc::munmap(self.start.cast(), self.size) };
    }
}
