//! PVH: what Xen's `public/arch-x86/hvm/start_info.h` (version 1) describes, entered in 32-bit protected mode.

use super::{Error, Source, entry, put, put_cmdline};
use crate::layout;
use posada_engine::CpuState;
use posada_memory::{GuestRam, HOLE_START};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MODULES: u64 = layout::START_INFO + 0x40;
const MEMORY_MAP: u64 = layout::START_INFO + 0x80;

/// Writes the start info for a kernel that ends at `kernel_end` and begins at `address`.
pub(super) fn start(source: &Source, ram: &GuestRam, kernel_end: u64, address: u32) -> Result<CpuState, Error> {
    put_cmdline(ram, source.cmdline.as_bytes(), u64::MAX)?;
    let initramfs = source.place_initramfs(ram, kernel_end, HOLE_START)?;
    if let Some((start, length)) = initramfs {
        // Address, size, command line, reserved.
        for (value, at) in [start, length, 0, 0].iter().zip(0..) {
            put(ram, MODULES + at * 8, &value.to_le_bytes());
        }
    }
    let map = layout::memory_map(ram.size());
    for (range, at) in map.iter().zip(0..) {
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&range.start.to_le_bytes());
        bytes.extend_from_slice(&range.length.to_le_bytes());
        bytes.extend_from_slice(&range.kind().to_le_bytes());
        bytes.extend_from_slice(&0_u32.to_le_bytes());
        put(ram, MEMORY_MAP + at * 24, &bytes);
    }
    let mut info = Vec::new();
    let modules = u32::from(initramfs.is_some());
    [MAGIC, VERSION, 0, modules]
        .iter()
        .for_each(|word| info.extend_from_slice(&word.to_le_bytes()));
    [MODULES, layout::CMDLINE, layout::RSDP, MEMORY_MAP]
        .iter()
        .for_each(|address| info.extend_from_slice(&address.to_le_bytes()));
    [map.len() as u32, 0]
        .iter()
        .for_each(|word| info.extend_from_slice(&word.to_le_bytes()));
    put(ram, layout::START_INFO, &info);
    Ok(entry::protected(address, layout::START_INFO))
}
