//! Linux bzImages (Linux `Documentation/arch/x86/boot.rst`). The payload is unpacked here, on the host, and entered by
//! PVH; a guest's own unpacker would cost seconds on a software CPU. If that cannot be, the image starts as it is by the
//! 64-bit protocol.

use super::{Error, Input, Source, elf, entry, put, put_cmdline, pvh, u16_at, u32_at, u64_at, unpack};
use crate::layout;
use posada_engine::CpuState;
use posada_memory::GuestRam;
use std::io::BufReader;
use std::ops::Range;

/// Offsets of the setup header.
mod setup {
    pub const SECTORS: usize = 0x1f1;
    pub const SYSTEM_SIZE: usize = 0x1f4;
    pub const BOOT_FLAG: usize = 0x1fe;
    pub const JUMP: usize = 0x201;
    pub const MAGIC: usize = 0x202;
    pub const VERSION: usize = 0x206;
    pub const LOADER: usize = 0x210;
    pub const RAMDISK: usize = 0x218;
    pub const CMDLINE: usize = 0x228;
    pub const RAMDISK_MAX: usize = 0x22c;
    pub const XLOAD_FLAGS: usize = 0x236;
    pub const CMDLINE_SIZE: usize = 0x238;
    pub const PAYLOAD: usize = 0x248;
    pub const PREFERRED: usize = 0x258;
    pub const INIT_SIZE: usize = 0x260;
}
/// Offsets of the zero page beyond the setup header.
mod zero_page {
    pub const RSDP: u64 = 0x70;
    pub const E820_ENTRIES: u64 = 0x1e8;
    pub const E820: u64 = 0x2d0;
}

/// Protocol 2.08 has the payload's place, 2.12 the 64-bit flags.
const PAYLOAD_VERSION: u16 = 0x208;
const FLAGS_VERSION: u16 = 0x20c;
/// XLF_KERNEL_64: there is a 64-bit entry at 0x200.
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// A boot loader without a number of its own.
const UNKNOWN_LOADER: u8 = 0xff;

/// A bzImage's setup header.
#[derive(Debug)]
pub(super) struct Header {
    /// The setup header's bytes, to be handed to the kernel.
    bytes: Vec<u8>,
    version: u16,
    /// The protected-mode part of the file.
    system: Range<u64>,
    /// The packed kernel in the file.
    payload: Range<u64>,
    cmdline_most: u64,
}

impl Header {
    /// The header in a file that begins with `head`, if it is a bzImage.
    pub(super) fn find(kernel: &Input, head: &[u8]) -> Result<Option<Self>, Error> {
        if u16_at(head, setup::BOOT_FLAG) != Some(0xaa55) || head.get(setup::MAGIC..setup::MAGIC + 4) != Some(b"HdrS") {
            return Ok(None);
        }
        Self::parse(kernel, head).map(Some)
    }

    fn parse(kernel: &Input, head: &[u8]) -> Result<Self, Error> {
        let malformed = |why: &str| Error::Malformed {
            path: kernel.path().into(),
            why: why.into(),
        };
        let version = u16_at(head, setup::VERSION).ok_or_else(|| kernel.truncated())?;
        if version < PAYLOAD_VERSION {
            return Err(malformed(
                "its boot protocol is older than 2.08 (Linux 2.6.26); use a newer kernel",
            ));
        }
        let word = |at| u32_at(head, at).map(u64::from).ok_or_else(|| kernel.truncated());
        let sectors = match head[setup::SECTORS] {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let start = (sectors + 1) * 512;
        let end = start + word(setup::SYSTEM_SIZE)? * 16;
        // The size is in units of 16 bytes, rounded up.
        if kernel.size() + 15 < end {
            return Err(kernel.truncated());
        }
        let system = start..end.min(kernel.size());
        let (offset, length) = (word(setup::PAYLOAD)?, word(setup::PAYLOAD + 4)?);
        let payload = system.start + offset..system.start + offset + length;
        if payload.end > system.end || length == 0 {
            return Err(malformed("its payload does not lie inside the file"));
        }
        let header_end = setup::MAGIC + usize::from(head[setup::JUMP]);
        let bytes = head
            .get(setup::SECTORS..header_end.min(0x290))
            .ok_or_else(|| kernel.truncated())?;
        Ok(Self {
            bytes: bytes.to_vec(),
            version,
            payload,
            system,
            cmdline_most: word(setup::CMDLINE_SIZE)?,
        })
    }

    fn at(&self, offset: usize) -> &[u8] {
        self.bytes.get(offset - setup::SECTORS..).unwrap_or_default()
    }
}

/// Loads and prepares a bzImage.
pub(super) fn load(source: &Source, ram: &GuestRam, header: &Header) -> Result<CpuState, Error> {
    let kernel = &source.kernel;
    if source.cmdline.len() as u64 > header.cmdline_most {
        return Err(Error::Cmdline {
            length: source.cmdline.len(),
            most: header.cmdline_most,
        });
    }
    let packed = BufReader::new(kernel.reader(header.payload.clone()));
    let stream = unpack::unpack(packed).map_err(|error| kernel.read_error(error))?;
    if let Some(stream) = stream {
        let image = elf::load(stream, ram, kernel)?;
        if let Some(entry) = image.pvh_entry {
            return pvh::start(source, ram, image.end, entry);
        }
        tracing::info!("the kernel has no PVH entry; it unpacks itself");
    }
    // What was unpacked so far may stay: a kernel expects RAM to hold anything.
    boot_64(source, ram, header)
}

/// The 64-bit boot protocol.
fn boot_64(source: &Source, ram: &GuestRam, header: &Header) -> Result<CpuState, Error> {
    let flags = u16_at(header.at(setup::XLOAD_FLAGS), 0).unwrap_or(0);
    if header.version < FLAGS_VERSION || flags & KERNEL_64 == 0 {
        return Err(
            source.malformed("it is a 32-bit kernel without a PVH entry; build it with CONFIG_PVH or for 64 bits")
        );
    }
    let (Some(load), Some(init_size)) = (
        u64_at(header.at(setup::PREFERRED), 0),
        u32_at(header.at(setup::INIT_SIZE), 0),
    ) else {
        return Err(source.kernel.truncated());
    };
    let length = header.system.end - header.system.start;
    let needed = length.max(init_size.into());
    let end = load.checked_add(needed).filter(|_| load >= layout::KERNEL);
    let Some(end) = end else {
        return Err(source.malformed("its preferred address cannot be right"));
    };
    // The page tables at its entry map 4 GiB.
    if !ram.contains(load, needed) || load >= layout::PCI_WINDOW.start {
        return Err(Error::Memory {
            path: source.kernel.path().into(),
            needed: end,
            memory: ram.size(),
        });
    }
    source.kernel.copy_to(ram, header.system.start, load, length)?;

    put_cmdline(ram, source.cmdline.as_bytes(), header.cmdline_most)?;
    let page = layout::ZERO_PAGE;
    put(ram, page + setup::SECTORS as u64, &header.bytes);
    put(ram, page + setup::LOADER as u64, &[UNKNOWN_LOADER]);
    put(
        ram,
        page + setup::CMDLINE as u64,
        &(layout::CMDLINE as u32).to_le_bytes(),
    );
    put(ram, page + zero_page::RSDP, &layout::RSDP.to_le_bytes());
    let initrd_limit = u64::from(u32_at(header.at(setup::RAMDISK_MAX), 0).unwrap_or(0x37ff_ffff)) + 1;
    if let Some((start, length)) = source.place_initramfs(ram, end, initrd_limit)? {
        put(ram, page + setup::RAMDISK as u64, &(start as u32).to_le_bytes());
        put(ram, page + setup::RAMDISK as u64 + 4, &(length as u32).to_le_bytes());
    }
    let map = layout::memory_map(ram.size());
    put(ram, page + zero_page::E820_ENTRIES, &[map.len() as u8]);
    for (range, at) in map.iter().zip(0..) {
        let entry = page + zero_page::E820 + at * 20;
        put(ram, entry, &range.start.to_le_bytes());
        put(ram, entry + 8, &range.length.to_le_bytes());
        put(ram, entry + 16, &range.kind().to_le_bytes());
    }
    Ok(entry::long(ram, load + ENTRY_64))
}
