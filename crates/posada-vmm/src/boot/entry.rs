//! The states in which boot protocols begin.

use super::put;
use crate::layout;
use posada_engine::{CpuState, DescriptorTable, Segment};
use posada_memory::GuestRam;

const RBX: usize = 3;
const RSI: usize = 6;
const CS: usize = 1;

/// CR0: protection enable, extension type (always one on today's processors).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled and active.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

fn flat(selector: u16, access: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: 0xffff_ffff,
        access,
    }
}

fn with_segments(code_access: u16) -> CpuState {
    let mut state = CpuState::reset();
    // Data: read, write, accessed, 4 GiB.
    state.segments = [flat(DATA_SELECTOR, 0xc093); 6];
    state.segments[CS] = flat(CODE_SELECTOR, code_access);
    // A busy 32-bit TSS, as the PVH protocol asks for.
    state.tr = Segment {
        selector: 0,
        base: 0,
        limit: 0x67,
        access: 0x8b,
    };
    state
}

/// 32-bit protected mode without paging, flat 4 GiB segments, interrupts off: PVH (Linux
/// `Documentation/arch/x86/boot.rst` points to Xen's `pvh.h`) and multiboot 0.6.96, section 3.2. `info` goes to EBX.
pub(crate) fn protected(entry: u32, info: u64) -> CpuState {
    let mut state = with_segments(0xc09b);
    state.cr0 = CR0_PE | CR0_ET;
    state.rip = entry.into();
    state.gprs[RBX] = info;
    state
}

/// 64-bit mode with 4 GiB mapped 1:1 by 2 MiB pages: the 64-bit Linux boot protocol (`boot.rst`). The zero page's address
/// goes to RSI. Writes the page tables and the GDT.
pub(super) fn long(ram: &GuestRam, entry: u64) -> CpuState {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pdpt, directories) = (layout::PML4 + 0x1000, layout::PML4 + 0x2000);
    put(ram, layout::PML4, &(pdpt | PRESENT_WRITABLE).to_le_bytes());
    for gib in 0..4 {
        let directory = directories + gib * 0x1000;
        put(ram, pdpt + gib * 8, &(directory | PRESENT_WRITABLE).to_le_bytes());
        for page in 0..512 {
            let entry = gib << 30 | page << 21 | LARGE | PRESENT_WRITABLE;
            put(ram, directory + page * 8, &entry.to_le_bytes());
        }
    }
    // Null, unused, __BOOT_CS (0x10: 64-bit code), __BOOT_DS (0x18).
    let gdt = [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff];
    for (entry, at) in gdt.iter().zip(0..) {
        put(ram, layout::BOOT_GDT + at * 8, &entry.to_le_bytes());
    }
    let mut state = with_segments(0xa09b);
    state.gdtr = DescriptorTable {
        base: layout::BOOT_GDT,
        limit: size_of_val(&gdt) as u16 - 1,
    };
    state.cr0 = CR0_PE | CR0_ET | CR0_PG;
    state.cr3 = layout::PML4;
    state.cr4 = CR4_PAE;
    state.efer = EFER_LME_LMA;
    state.rip = entry;
    state.gprs[RSI] = layout::ZERO_PAGE;
    state
}
