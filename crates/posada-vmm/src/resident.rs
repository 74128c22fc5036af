//! How much of guest RAM the host has really given.

use posada_memory::GuestRam;
use std::fs::File;
use std::io::{self, BufRead, BufReader};

/// Bytes of `ram` that have memory or swap of their own: pages that were only read share the kernel's
/// page of zeroes and do not count. 0 if the host does not tell.
pub(crate) fn of(ram: &GuestRam) -> u64 {
    let start = ram.base() as u64;
    count(start, start + ram.span()).unwrap_or_else(|error| {
        tracing::debug!(%error, "no smaps");
        0
    })
}

/// `Anonymous` and `Swap` of all mappings in the range, beyond which none of them reaches (Linux `Documentation/filesystems/proc.rst`).
fn count(start: u64, end: u64) -> io::Result<u64> {
    let mut inside = false;
    let mut bytes = 0;
    for line in BufReader::new(File::open("/proc/self/smaps")?).lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        let name = words.next().unwrap_or_default();
        if matches!(name, "Anonymous:" | "Swap:") {
            let kib = words.next().and_then(|number| number.parse::<u64>().ok());
            bytes += if inside { kib.unwrap_or(0) << 10 } else { 0 };
        } else if let Some((from, to)) = name.split_once('-') {
            let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
            inside = number(from) >= start && number(to) <= end;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use posada_memory::{HOLE_END, HOLE_START};
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn only_pages_that_were_written_count() {
        let ram = GuestRam::new(HOLE_START + (8 << 20)).unwrap();
        assert_eq!(of(&ram), 0);
        ram.memory().read_obj::<u64>(GuestAddress(0x10_0000)).unwrap();
        ram.memory().write_obj(1_u64, GuestAddress(0x20_0ff8)).unwrap();
        ram.memory().write_obj(1_u64, GuestAddress(HOLE_END)).unwrap();
        // A host that gives huge pages gives more than was written.
        let touched = of(&ram);
        assert!((2 * 4096..=3 << 21).contains(&touched), "{touched}");
    }

    /// Leaves gaps that only a code map of 4 MiB of RAM fills, so that the RAM itself comes to lie side by side.
    fn leave_gaps_for_code_maps(count: usize) {
        const GAP: usize = 16 << 10;
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh mapping of the test's own, of which it never touches a byte.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), 2 * count * GAP, libc::PROT_NONE, anonymous, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        for gap in 0..count {
            // SAFETY: a part of that mapping.
            assert_eq!(unsafe { libc::munmap(start.byte_add(2 * gap * GAP), GAP) }, 0);
        }
    }

    #[test]
    fn the_ram_of_two_vms_is_told_apart_however_close_it_lies() {
        leave_gaps_for_code_maps(16);
        let rams: Vec<GuestRam> = (0..16).map(|_| GuestRam::new(4 << 20).unwrap()).collect();
        for (index, ram) in rams.iter().enumerate().filter(|(index, _)| index % 2 == 0) {
            ram.memory()
                .write_obj(1_u64, GuestAddress(index as u64 * 4096))
                .unwrap();
        }
        for (index, ram) in rams.iter().enumerate() {
            assert_eq!(of(ram) > 0, index % 2 == 0, "{index}");
        }
    }
}
