//! Kernels made for tests.

/// A segment: physical address, content, size in memory.
pub(crate) struct Segment<'a>(pub u64, pub &'a [u8], pub u64);

fn note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    // Another note comes first.
    for (name, kind, value) in [(b"GNU\0", 1_u32, 7_u32), (b"Xen\0", 18, entry)] {
        note.extend_from_slice(&4_u32.to_le_bytes());
        note.extend_from_slice(&4_u32.to_le_bytes());
        note.extend_from_slice(&kind.to_le_bytes());
        note.extend_from_slice(name);
        note.extend_from_slice(&value.to_le_bytes());
    }
    note
}

/// A 64-bit ELF file, with a PVH note if there is an `entry`. Virtual addresses are 0xffff_8000_0000_0000 above physical
/// ones; the ELF entry is the first segment's start.
pub(crate) fn elf64(segments: &[Segment<'_>], entry: Option<u32>) -> Vec<u8> {
    const VIRTUAL: u64 = 0xffff_8000_0000_0000;
    let notes = entry.map(note);
    let count = segments.len() + notes.iter().len();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend_from_slice(&[2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend_from_slice(&(VIRTUAL + segments[0].0).to_le_bytes());
    file.extend_from_slice(&64_u64.to_le_bytes());
    file.resize(52, 0);
    for half in [64_u16, 56, count as u16, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    let mut offset = 64 + 56 * count as u64;
    let mut bodies = Vec::new();
    let loads = segments
        .iter()
        .map(|Segment(at, content, size)| (1_u32, *at, *content, *size));
    let notes = notes.iter().map(|note| (4, 0, &note[..], note.len() as u64));
    for (kind, at, content, size) in loads.chain(notes) {
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&7_u32.to_le_bytes());
        for value in [offset, VIRTUAL + at, at, content.len() as u64, size, 0x1000] {
            file.extend_from_slice(&value.to_le_bytes());
        }
        offset += content.len() as u64;
        bodies.extend_from_slice(content);
    }
    file.extend_from_slice(&bodies);
    file
}

/// A bzImage with this payload, which prefers to be at 2 MiB.
pub(super) fn bz_image(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    let system = payload.len().next_multiple_of(16) + 0x400;
    file[0x1f4..0x1f8].copy_from_slice(&((system / 16) as u32).to_le_bytes());
    file[0x1fe..0x208].copy_from_slice(&[0x55, 0xaa, 0xeb, 0x6a, b'H', b'd', b'r', b'S', 0x0f, 0x02]);
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&64_u32.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&0x400_u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x20_0000_u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    // The protected-mode part: 0x400 bytes of code, then the payload.
    file.resize(1024 + 0x400, 0x90);
    file.extend_from_slice(payload);
    file.resize(1024 + system, 0);
    file
}

/// A multiboot header.
pub(super) fn multiboot(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002_u32;
    let mut words = vec![magic, flags, 0_u32.wrapping_sub(magic).wrapping_sub(flags)];
    words.extend_from_slice(addresses);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
