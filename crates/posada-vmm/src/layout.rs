//! Every address that guests, firmware tables and loaders agree on. All are guest physical; ends are exclusive.
//!
//! | address | what | why there |
//! |---|---|---|
//! | `0x500` | boot GDT | behind the real-mode vectors and the BIOS data area |
//! | `0x6000` | PVH start info or multiboot information, with module list and memory map | one page below the zero page |
//! | `0x7000` | Linux zero page | where other VMMs have it |
//! | `0x9000` | PML4, PDPT and four page directories of the 64-bit entry: 4 GiB mapped 1:1 | |
//! | `0x2_0000` | command line | as boot loaders do |
//! | `0x9_fc00` | end of low RAM | where a BIOS has its extended data |
//! | `0xe_0000` | RSDP, ACPI tables from `0xe_1000` | Linux scans from here without being told |
//! | `0xf_fff0` | code that resets the machine | where real-mode code jumps to ask a BIOS for a reset, F000:FFF0 |
//! | `0x10_0000` | first address a kernel may take | end of the PC's low memory |
//! | `0xc000_0000` | PCI window, begin of the MMIO hole (3-4 GiB) | |
//! | `0xe000_0000` | ECAM of bus 0 | |
//! | `0xfec0_0000` | I/O APIC | Intel's default |
//! | `0xfee0_0000` | local APICs | reset value of IA32_APIC_BASE |
//! | `0xfeff_c000` | four pages of KVM's own, for real mode on Intel | `posada-kvm` says so, and no guest |
//! | `0x1_0000_0000` | RAM beyond 3 GiB | |
//!
//! | port | what |
//! |---|---|
//! | `0x64` | reset line of the keyboard controller |
//! | `0x70` | CMOS clock |
//! | `0xf4` | debug exit (`--debug-exit`) |
//! | `0x3f8` | COM1, line 4 |
//! | `0x600` | ACPI sleep and reset registers |
//! | `0xcf8` | PCI configuration, reset control |

use posada_devices::pci;
use posada_memory::{HOLE_END, HOLE_START};
use std::ops::Range;

/// Global descriptor table of the 64-bit Linux entry.
pub const BOOT_GDT: u64 = 0x500;
/// PVH start info or multiboot information: one page.
pub const START_INFO: u64 = 0x6000;
/// Linux `boot_params`: one page.
pub const ZERO_PAGE: u64 = 0x7000;
/// Page tables of the 64-bit Linux entry: six pages.
pub const PML4: u64 = 0x9000;
/// Command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line with its final zero.
pub const CMDLINE_SIZE: u64 = 0x1_0000;
/// End of the RAM below 1 MiB that a guest may use.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI root pointer.
pub const RSDP: u64 = 0xe_0000;
/// ACPI tables.
pub const ACPI_TABLES: u64 = 0xe_1000;
/// Real mode's entry into a BIOS, 16 bytes.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// First address a kernel may be loaded to.
pub const KERNEL: u64 = 0x10_0000;
/// PCI BARs.
pub const PCI_WINDOW: Range<u64> = HOLE_START..ECAM.start;
/// PCI configuration space of bus 0.
pub const ECAM: Range<u64> = 0xe000_0000..0xe000_0000 + pci::ECAM_SIZE;
/// I/O APIC.
pub const IOAPIC: u64 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u64 = 0xfee0_0000;
/// COM1: first port.
pub const COM1_PORT: u16 = 0x3f8;
/// COM1: line of the I/O APIC.
pub const COM1_LINE: usize = 4;
/// ACPI sleep and reset registers.
pub const POWER_PORT: u16 = 0x600;

/// What a guest is told of a range of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// True for RAM; else reserved.
    pub ram: bool,
}

impl MemoryRange {
    /// The type number that E820, PVH and multiboot share.
    pub fn kind(&self) -> u32 {
        if self.ram { 1 } else { 2 }
    }
}

/// The memory map of a machine with `memory` bytes of RAM, in order.
pub fn memory_map(memory: u64) -> Vec<MemoryRange> {
    let range = |start: u64, end: u64, ram| MemoryRange {
        start,
        length: end - start,
        ram,
    };
    let mut map = vec![range(0, LOW_RAM_END, true), range(LOW_RAM_END, KERNEL, false)];
    if memory > KERNEL {
        map.push(range(KERNEL, memory.min(HOLE_START), true));
    }
    map.push(range(ECAM.start, ECAM.end, false));
    if memory > HOLE_START {
        map.push(range(HOLE_END, HOLE_END + (memory - HOLE_START), true));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use posada_devices::{acpi, ioapic};

    #[test]
    fn nothing_that_is_given_out_below_1_mib_overlaps() {
        let ranges = [
            (BOOT_GDT, 0x100),
            (START_INFO, 0x1000),
            (ZERO_PAGE, 0x1000),
            (PML4, 0x6000),
            (CMDLINE, CMDLINE_SIZE),
            (LOW_RAM_END, 0),
            (RSDP, 0x100),
            (ACPI_TABLES, 0x1000 + 8 * u64::from(acpi::MAX_CPUS)),
            (RESET_VECTOR, 16),
            (KERNEL, 0),
        ];
        for pair in ranges.windows(2) {
            assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?}");
        }
    }

    #[test]
    fn the_mmio_hole_holds_all_devices() {
        let ranges = [
            PCI_WINDOW,
            ECAM,
            IOAPIC..IOAPIC + ioapic::SIZE,
            LAPIC..LAPIC + 0x1000,
            HOLE_END..HOLE_END,
        ];
        assert_eq!(PCI_WINDOW.start, HOLE_START);
        for pair in ranges.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{pair:x?}");
        }
    }

    #[test]
    fn the_memory_map_is_ordered_and_adds_up() {
        for memory in [2 << 20, HOLE_START, HOLE_START + 4096, 100 << 30] {
            let map = memory_map(memory);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].length <= pair[1].start);
            }
            let ram: u64 = map.iter().filter(|range| range.ram).map(|range| range.length).sum();
            assert_eq!(ram, memory - (KERNEL - LOW_RAM_END));
        }
    }
}
