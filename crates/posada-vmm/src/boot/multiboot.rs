//! Multiboot 1 (Multiboot Specification 0.6.96): ELF kernels, and flat ones with address fields.

use super::{Error, Source, elf, entry, put, put_cmdline, u32_at};
use crate::layout;
use posada_engine::CpuState;
use posada_memory::{GuestRam, HOLE_START, PAGE_SIZE};
use std::os::unix::ffi::OsStrExt;

/// The header lies in this many bytes at the file's start (section 3.1.1).
pub(super) const SEARCH: usize = 8192;
const MAGIC: u32 = 0x1bad_b002;
/// What EAX holds at the entry (section 3.2).
const LOADED: u64 = 0x2bad_b002;
/// Flags: modules on page boundaries, memory information, video mode, address fields.
const KNOWN_FLAGS: u32 = 1 | 1 << 1 | 1 << 2 | ADDRESSES;
const MUST_FLAGS: u32 = 0xffff;
const ADDRESSES: u32 = 1 << 16;
/// Information flags: memory sizes, command line, modules, memory map, loader's name (section 3.3).
const INFO_FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const RAX: usize = 0;

const MODULE: u64 = layout::START_INFO + 0x80;
const LOADER_NAME: u64 = layout::START_INFO + 0xa0;
const MEMORY_MAP: u64 = layout::START_INFO + 0xc0;

/// Where a flat kernel goes (section 3.1.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// A multiboot header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Where it lies in the file.
    offset: u64,
    flags: u32,
    addresses: Option<Addresses>,
}

impl Header {
    /// The header in a file that begins with `head`.
    pub(super) fn find(head: &[u8]) -> Option<Self> {
        (0..head.len().min(SEARCH)).step_by(4).find_map(|at| Self::at(head, at))
    }

    fn at(head: &[u8], at: usize) -> Option<Self> {
        let (magic, flags, sum) = (u32_at(head, at)?, u32_at(head, at + 4)?, u32_at(head, at + 8)?);
        if magic != MAGIC || magic.wrapping_add(flags).wrapping_add(sum) != 0 {
            return None;
        }
        let addresses = if flags & ADDRESSES != 0 {
            Some(Addresses {
                header: u32_at(head, at + 12)?,
                load: u32_at(head, at + 16)?,
                load_end: u32_at(head, at + 20)?,
                bss_end: u32_at(head, at + 24)?,
                entry: u32_at(head, at + 28)?,
            })
        } else {
            None
        };
        Some(Self {
            offset: at as u64,
            flags,
            addresses,
        })
    }
}

/// Loads a multiboot kernel and its information.
pub(super) fn load(source: &Source, ram: &GuestRam, header: &Header) -> Result<CpuState, Error> {
    let strange = header.flags & MUST_FLAGS & !KNOWN_FLAGS;
    if strange != 0 {
        return Err(source.malformed(format!(
            "its multiboot header wants features that there are not ({strange:#x})"
        )));
    }
    let (start, end) = match header.addresses {
        Some(addresses) => load_flat(source, ram, header.offset, addresses)?,
        None => {
            let kernel = &source.kernel;
            let image = elf::load(kernel.reader(0..kernel.size()), ram, kernel)?;
            (image.entry, image.end)
        }
    };
    let start = u32::try_from(start).map_err(|_| source.malformed("its entry lies above 4 GiB"))?;
    let module = place_module(source, ram, end)?;
    write_info(source, ram, module)?;
    let mut state = entry::protected(start, layout::START_INFO);
    state.gprs[RAX] = LOADED;
    Ok(state)
}

/// Returns entry and end.
fn load_flat(source: &Source, ram: &GuestRam, offset: u64, addresses: Addresses) -> Result<(u64, u64), Error> {
    let bad = || source.malformed("its multiboot address fields cannot be right");
    let load = u64::from(addresses.load);
    // The bytes before the header are loaded too, as far back as load_addr says.
    let before = u64::from(addresses.header).checked_sub(load).ok_or_else(bad)?;
    let start = offset.checked_sub(before).ok_or_else(bad)?;
    let length = match u64::from(addresses.load_end) {
        0 => source.kernel.size() - start,
        end => end.checked_sub(load).ok_or_else(bad)?,
    };
    if start + length > source.kernel.size() {
        return Err(source.kernel.truncated());
    }
    let end = (load + length).max(addresses.bss_end.into());
    if load < layout::KERNEL {
        return Err(source.malformed("it wants memory below 1 MiB; link it to 1 MiB or higher"));
    }
    if !ram.contains(load, end - load) {
        return Err(Error::Memory {
            path: source.kernel.path().into(),
            needed: end,
            memory: ram.size(),
        });
    }
    source.kernel.copy_to(ram, start, load, length)?;
    Ok((addresses.entry.into(), end))
}

/// Puts the module right behind the kernel: small kernels map little memory. Returns its address and size.
fn place_module(source: &Source, ram: &GuestRam, kernel_end: u64) -> Result<Option<(u64, u64)>, Error> {
    let Some(module) = &source.initramfs else {
        return Ok(None);
    };
    let start = kernel_end.next_multiple_of(PAGE_SIZE);
    if !ram.contains(start, module.size()) || start + module.size() > HOLE_START {
        return Err(source.no_room_for_initramfs(ram));
    }
    module.copy_to(ram, 0, start, module.size())?;
    Ok(Some((start, module.size())))
}

fn write_info(source: &Source, ram: &GuestRam, module: Option<(u64, u64)>) -> Result<(), Error> {
    // The module's string goes behind the command line, in the same area.
    let mut cmdline = source.kernel.path().as_os_str().as_bytes().to_vec();
    cmdline.push(b' ');
    cmdline.extend_from_slice(source.cmdline.as_bytes());
    let module_string = layout::CMDLINE + cmdline.len() as u64 + 1;
    if let Some(module) = &source.initramfs {
        cmdline.push(0);
        cmdline.extend_from_slice(module.path().as_os_str().as_bytes());
    }
    put_cmdline(ram, &cmdline, u64::MAX)?;
    if let Some((start, length)) = module {
        let entry = [start as u32, (start + length) as u32, module_string as u32, 0];
        put(ram, MODULE, &words(&entry));
    }
    put(ram, LOADER_NAME, b"posada\0");
    let map = layout::memory_map(ram.size());
    for (range, at) in map.iter().zip(0..) {
        let mut bytes = 20_u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(&range.start.to_le_bytes());
        bytes.extend_from_slice(&range.length.to_le_bytes());
        bytes.extend_from_slice(&range.kind().to_le_bytes());
        put(ram, MEMORY_MAP + at * 24, &bytes);
    }
    let upper = ram.size().min(HOLE_START) - layout::KERNEL;
    let mut info = [0_u32; 22];
    info[0] = INFO_FLAGS;
    info[1] = (layout::LOW_RAM_END >> 10) as u32;
    info[2] = (upper >> 10) as u32;
    info[4] = layout::CMDLINE as u32;
    info[5] = module.is_some().into();
    info[6] = MODULE as u32;
    info[11] = map.len() as u32 * 24;
    info[12] = MEMORY_MAP as u32;
    info[16] = LOADER_NAME as u32;
    put(ram, layout::START_INFO, &words(&info));
    Ok(())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
