//! Memory for translated code: one memfd mapped twice, writable for the translator and executable for the processor.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Bytes of a cache; a page costs memory only once used.
pub const SIZE: usize = 64 << 20;

/// A cache.
pub struct CodeCache {
    writable: *mut u8,
    executable: u64,
    used: usize,
}

// SAFETY: the mappings belong to the value alone.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// An empty cache.
    ///
    /// # Errors
    /// The host gives no memory to execute from.
    pub fn new() -> io::Result<Self> {
        // SAFETY: a constant, terminated name.
        let file = unsafe { libc::memfd_create(c"posada-code".as_ptr(), libc::MFD_CLOEXEC) };
        if file < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        // SAFETY: our own descriptor.
        if unsafe { libc::ftruncate(file.as_raw_fd(), SIZE as libc::off_t) } != 0 {
            return Err(io::Error::last_os_error());
        }
        let map = |protection| {
            // SAFETY: a fresh mapping at an address of the kernel's choice touches nothing that exists.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    SIZE,
                    protection,
                    libc::MAP_SHARED,
                    file.as_raw_fd(),
                    0,
                )
            };
            if at == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(at.cast::<u8>())
        };
        let writable = map(libc::PROT_READ | libc::PROT_WRITE)?;
        let executable = map(libc::PROT_READ | libc::PROT_EXEC).inspect_err(|_| {
            // SAFETY: just mapped, and nobody knows of it.
            unsafe { libc::munmap(writable.cast(), SIZE) };
        })?;
        Ok(Self {
            writable,
            executable: executable as u64,
            used: 0,
        })
    }

    /// Address at which the next code will run.
    pub fn next(&self) -> u64 {
        self.executable + self.used as u64
    }

    /// Where the processor may be when it runs this cache's code.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.executable..self.executable + SIZE as u64
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
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(self.used), code.len()) };
        self.used += code.len().next_multiple_of(16).min(self.room());
    }

    /// Forgets all code from `address` on.
    pub fn rewind(&mut self, address: u64) {
        self.used = (address - self.executable) as usize;
    }

    /// Lets the rel32 at address `at` lead to `target`. Nobody runs this cache's code meanwhile.
    pub fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.executable) as usize;
        assert!(offset + 4 <= SIZE);
        let distance = target.wrapping_sub(at + 4) as i32;
        // SAFETY: inside the mapping.
        unsafe { self.writable.add(offset).cast::<i32>().write_unaligned(distance) };
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: both mappings are the value's own, and its code runs no more.
        unsafe {
            libc::munmap(self.writable.cast(), SIZE);
            libc::munmap(self.executable as *mut libc::c_void, SIZE);
        }
    }
}
