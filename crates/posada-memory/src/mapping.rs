//! The host mapping behind guest RAM.

use crate::PAGE_SIZE;
use std::io;

/// Guest pages of this size can be the host's too, if they begin where the host's do.
const HUGE_PAGE: usize = 2 << 20;

/// Memory that costs nothing until it is touched, between pages that nobody can touch: an access beyond its bounds is caught,
/// and the kernel, which makes one mapping of two that border on each other, keeps it apart from every other.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// The first byte, at a multiple of 2 MiB.
    pub base: *mut u8,
    /// Bytes that can be used.
    pub length: usize,
    /// With the pages around them.
    reserved: (*mut libc::c_void, usize),
}

impl Mapping {
    /// Reserves `length` zeroed bytes, a whole number of pages.
    pub fn new(length: usize) -> io::Result<Self> {
        let page = PAGE_SIZE as usize;
        let size = length
            .checked_add(HUGE_PAGE + page)
            .ok_or(io::Error::from_raw_os_error(libc::ENOMEM))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // At least a page before it, and one behind it.
        let skipped = (start as usize + page).next_multiple_of(HUGE_PAGE) - start as usize;
        let mapping = Self {
            base: start.cast::<u8>().wrapping_add(skipped),
            length,
            reserved: (start, size),
        };
        // SAFETY: a range inside the mapping that was just made.
        let opened = unsafe { libc::mprotect(mapping.base.cast(), length, libc::PROT_READ | libc::PROT_WRITE) };
        if opened != 0 {
            return Err(io::Error::last_os_error());
        }
        // Nobody wants a guest's memory in a core dump. If the kernel does not know the advice, it is there.
        // SAFETY: as above; the advice changes no content.
        unsafe { libc::madvise(mapping.base.cast(), length, libc::MADV_DONTDUMP) };
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (start, size) = self.reserved;
        // SAFETY: the mapping was made by `new` and nobody holds pointers into it past the value's life.
        unsafe { libc::munmap(start, size) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// True if the kernel can read the byte.
    fn readable(byte: *const u8) -> bool {
        let mut pipe = [0; 2];
        // SAFETY: room for two descriptors; the kernel checks the address of the byte that it reads; both are closed once.
        unsafe {
            assert_eq!(libc::pipe(pipe.as_mut_ptr()), 0);
            let written = libc::write(pipe[1], byte.cast(), 1);
            libc::close(pipe[0]);
            libc::close(pipe[1]);
            written == 1
        }
    }

    #[test]
    fn it_begins_at_a_huge_page_and_nobody_can_touch_what_is_around_it() {
        let pages = [1, 511, 512, 513];
        let mappings = pages.map(|pages| Mapping::new(pages * PAGE_SIZE as usize).unwrap());
        for mapping in &mappings {
            assert_eq!(mapping.base as usize % HUGE_PAGE, 0);
            let end = mapping.base.wrapping_add(mapping.length);
            assert!(readable(mapping.base) && readable(end.wrapping_sub(1)));
            assert!(!readable(mapping.base.wrapping_sub(1)) && !readable(end));
        }
    }

    #[test]
    fn more_than_there_are_addresses_is_refused() {
        for length in [1 << 50, usize::MAX - (PAGE_SIZE as usize - 1)] {
            assert_eq!(Mapping::new(length).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
        }
    }
}
