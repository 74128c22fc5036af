//! Guest RAM: one host mapping, thin (reserved, never populated), with a per-page record of where translated or decoded
//! guest code lies, so that every writer (vCPUs and devices alike) can tell the engines that code has changed.

mod code;
mod mapping;

pub use code::{CodeListener, CodeMap, CodePage, CodeSlice};

use mapping::Mapping;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// First byte of the MMIO hole: RAM up to here lies at its own offset.
pub const HOLE_START: u64 = 3 << 30;
/// First byte above the MMIO hole: RAM beyond 3 GiB continues here.
pub const HOLE_END: u64 = 4 << 30;

/// The guest's memory as rust-vmm crates see it.
pub type GuestMemory = GuestMemoryMmap<CodeSlice>;

/// What went wrong when RAM was reserved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A size of zero or one that is not a whole number of pages.
    #[error("guest memory must be a positive multiple of 4096 bytes, not {0}")]
    Size(u64),
    /// The host refused the mapping.
    #[error("the host cannot reserve {bytes} bytes of guest memory: {source}; use a smaller --memory")]
    Reserve {
        /// Bytes asked for.
        bytes: u64,
        /// The host's reason.
        source: std::io::Error,
    },
}

/// Guest RAM. Host address = [`GuestRam::base`] + guest physical address, for all of RAM: the MMIO hole is reserved in
/// the host mapping too, so that one constant separates guest physical from host addresses.
///
/// It is a mapping of its own in the kernel's books too, with no other behind or before it.
#[derive(Debug)]
pub struct GuestRam {
    mapping: Mapping,
    size: u64,
    memory: GuestMemory,
    code: Arc<CodeMap>,
}

// SAFETY: the mapping lives as long as the value; all access goes through raw pointers or volatile slices.
unsafe impl Send for GuestRam {}
// SAFETY: as above; guest memory is shared by design, the guest's own ordering rules apply.
unsafe impl Sync for GuestRam {}

impl GuestRam {
    /// Reserves `size` bytes of zeroed RAM; a page costs memory only once touched.
    ///
    /// # Errors
    /// [`Error::Size`], or [`Error::Reserve`] when the address space is refused.
    pub fn new(size: u64) -> Result<Self, Error> {
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            return Err(Error::Size(size));
        }
        let end = if size <= HOLE_START {
            size
        } else {
            size.checked_add(HOLE_END - HOLE_START).ok_or(Error::Size(size))?
        };
        let refuse = |source| Error::Reserve { bytes: size, source };
        let mapped = usize::try_from(end).map_err(|_| Error::Size(size))?;
        let mapping = Mapping::new(mapped).map_err(refuse)?;
        let base = mapping.base;
        let code = Arc::new(CodeMap::new(end).map_err(refuse)?);
        let mut ranges = vec![(0, size.min(HOLE_START))];
        if size > HOLE_START {
            ranges.push((HOLE_END, size - HOLE_START));
        }
        let regions = ranges
            .into_iter()
            .map(|(start, length)| region(base, start, length, &code))
            .collect();
        let memory = GuestMemory::from_regions(regions).expect("two disjoint, ordered ranges");
        Ok(Self {
            mapping,
            size,
            memory,
            code,
        })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Host address of guest physical address 0.
    pub fn base(&self) -> *mut u8 {
        self.mapping.base
    }

    /// Bytes from [`GuestRam::base`] to the end of RAM, the MMIO hole included.
    pub fn span(&self) -> u64 {
        self.mapping.length as u64
    }

    /// The view that rust-vmm crates take. Writes through it tell [`GuestRam::code`].
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Where guest code was decoded.
    pub fn code(&self) -> &Arc<CodeMap> {
        &self.code
    }

    /// True if the `length` bytes at `gpa` are all RAM.
    #[inline]
    pub fn contains(&self, gpa: u64, length: u64) -> bool {
        let Some(end) = gpa.checked_add(length) else {
            return false;
        };
        end <= self.size.min(HOLE_START) || gpa >= HOLE_END && end <= self.span()
    }

    /// Host address of `length` bytes of RAM at `gpa`. Who writes through it must call [`CodeMap::written`] after.
    #[inline]
    pub fn host(&self, gpa: u64, length: u64) -> Option<*mut u8> {
        // SAFETY: `contains` keeps the offset inside the mapping.
        self.contains(gpa, length)
            .then(|| unsafe { self.base().add(gpa as usize) })
    }
}

fn region(base: *mut u8, start: u64, length: u64, code: &Arc<CodeMap>) -> GuestRegionMmap<CodeSlice> {
    let length = usize::try_from(length).expect("checked by new");
    let slice = CodeSlice::new(Arc::clone(code), start);
    // SAFETY: `base + start` is inside the reservation, which GuestRam keeps for as long as the region lives.
    let pointer = unsafe { base.add(start as usize) };
    // SAFETY: as above: the pointer covers `length` mapped bytes, and the region does not own them.
    let builder = unsafe {
        vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(length, slice)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .with_raw_mmap_pointer(pointer)
    };
    let region: MmapRegion<CodeSlice> = builder.build().expect("an aligned pointer is all it checks");
    GuestRegionMmap::new(region, GuestAddress(start)).expect("the range does not overflow")
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn ram_above_the_hole_starts_at_4_gib() {
        let ram = GuestRam::new(HOLE_START + PAGE_SIZE).unwrap();
        assert!(ram.contains(HOLE_START - 1, 1) && !ram.contains(HOLE_START - 1, 2));
        assert!(ram.contains(HOLE_END, PAGE_SIZE) && !ram.contains(HOLE_END, PAGE_SIZE + 1));
        assert!(!ram.contains(u64::MAX, 2));
        assert!(GuestRam::new(0).is_err() && GuestRam::new(5).is_err());
    }

    #[test]
    fn a_device_write_over_code_changes_the_pages_version() {
        let ram = GuestRam::new(16 * PAGE_SIZE).unwrap();
        let page = ram.code().page(0x2010);
        page.mark(0x10, 4);
        let before = page.version();
        ram.memory().write_slice(&[1; 4], GuestAddress(0x2800)).unwrap();
        assert_eq!(page.version(), before, "no code in those 64 bytes");
        ram.memory().write_slice(&[1; 0x20], GuestAddress(0x1ff0)).unwrap();
        assert_ne!(page.version(), before);
    }
}
