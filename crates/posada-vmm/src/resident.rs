//! How much of guest RAM the host has really given.

use posada_memory::{GuestRam, HOLE_END, HOLE_START};
use std::fs::File;
use std::io::{self, BufRead, BufReader};

/// Bytes from the first to the last of RAM, the hole included.
fn span(ram: &GuestRam) -> u64 {
    if ram.size() <= HOLE_START {
        ram.size()
    } else {
        ram.size() + (HOLE_END - HOLE_START)
    }
}

/// Makes RAM a mapping of its own in the kernel's books, by leaving it out of core dumps, where nobody wants it anyway.
pub(crate) fn keep_apart(ram: &GuestRam) {
    // SAFETY: the range is RAM's whole mapping, and the advice changes no content.
    unsafe { libc::madvise(ram.base().cast(), span(ram) as usize, libc::MADV_DONTDUMP) };
}

/// Bytes of `ram`, which is kept apart, that have memory or swap of their own: pages that were only read share the kernel's
/// page of zeroes and do not count. 0 if the host does not tell.
pub(crate) fn of(ram: &GuestRam) -> u64 {
    let start = ram.base() as u64;
    count(start, start + span(ram)).unwrap_or_else(|error| {
        tracing::debug!(%error, "no smaps");
        0
    })
}

/// `Anonymous` and `Swap` of all mappings in the range (Linux `Documentation/filesystems/proc.rst`).
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
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn only_pages_that_were_written_count() {
        let ram = GuestRam::new(HOLE_START + (8 << 20)).unwrap();
        keep_apart(&ram);
        assert_eq!(of(&ram), 0);
        ram.memory().read_obj::<u64>(GuestAddress(0x10_0000)).unwrap();
        ram.memory().write_obj(1_u64, GuestAddress(0x20_0ff8)).unwrap();
        ram.memory().write_obj(1_u64, GuestAddress(HOLE_END)).unwrap();
        // A host that gives huge pages gives more than was written.
        let touched = of(&ram);
        assert!((2 * 4096..=3 << 21).contains(&touched), "{touched}");
    }
}
