//! Memory for code that is made at run time: one memfd mapped twice, writable for who makes it and executable for the
//! processor, so that no address is ever both.

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
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
    /// `size` bytes (whole pages) of zeros; a page costs memory only once used. The host shows them under `name`.
    ///
    /// # Errors
    /// The host gives no memory to execute from.
    pub fn new(name: &CStr, size: usize) -> io::Result<Self> {
        // SAFETY: a terminated name.
        let file = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        // SAFETY: our own descriptor.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            writable: View::new(&file, size, libc::PROT_READ | libc::PROT_WRITE)?,
            executable: View::new(&file, size, libc::PROT_READ | libc::PROT_EXEC)?,
        })
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
    fn new(file: &OwnedFd, size: usize, protection: libc::c_int) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { libc::mmap(ptr::null_mut(), size, protection, libc::MAP_SHARED, file.as_raw_fd(), 0) };
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
