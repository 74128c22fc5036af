//! Which pages of guest RAM have memory (Linux, Documentation/admin-guide/mm/pagemap.rst).

use posada_memory::{GuestRam, PAGE_SIZE};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// In memory, or in swap.
const PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;

/// Looks into the kernel's books about one RAM.
pub(super) struct PagesOf<'a> {
    ram: &'a GuestRam,
    /// `None`: the host does not tell, and each page may have memory.
    pagemap: Option<File>,
    entries: Vec<u8>,
}

impl<'a> PagesOf<'a> {
    pub(super) fn new(ram: &'a GuestRam) -> Self {
        let pagemap = File::open("/proc/self/pagemap");
        Self {
            ram,
            pagemap: pagemap.inspect_err(|error| tracing::debug!(%error, "no pagemap")).ok(),
            entries: Vec::new(),
        }
    }

    /// For each of `count` pages from `gpa` on: false if it was never touched. A page may have memory and yet be all zeroes.
    pub(super) fn present(&mut self, gpa: u64, count: usize) -> Vec<bool> {
        let Some(pagemap) = &self.pagemap else {
            return vec![true; count];
        };
        self.entries.resize(count * 8, 0);
        let first = (self.ram.base() as u64 + gpa) / PAGE_SIZE;
        if let Err(error) = pagemap.read_exact_at(&mut self.entries, first * 8) {
            tracing::debug!(%error, "no pagemap");
            self.pagemap = None;
            return vec![true; count];
        }
        let (entries, _) = self.entries.as_chunks();
        let present = |entry: &[u8; 8]| u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
        entries.iter().map(present).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn untouched_pages_are_absent() {
        let ram = GuestRam::new(16 << 20).unwrap();
        ram.memory().write_obj(1_u8, GuestAddress(5 << 20)).unwrap();
        let present = PagesOf::new(&ram).present(0, 4096);
        assert!(present[5 << 8]);
        // A host that gives huge pages gives more than was written.
        assert!(!present[0] && !present[4095]);
    }
}
