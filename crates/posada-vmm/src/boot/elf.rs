//! ELF kernels, 32 and 64 bits, in one pass over a stream: the file may come out of a decompressor and is never held.

use super::input::{CHUNK, Input};
use super::{Error, u16_at, u32_at, u64_at};
use crate::layout;
use posada_memory::GuestRam;
use std::io::{self, Read};
use vm_memory::{Bytes, GuestAddress};

/// How an ELF file begins.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

/// Bytes at the file's start in which its program headers must lie.
const HEAD: usize = CHUNK;
/// The most notes that are looked at, in bytes.
const NOTES: u64 = 64 << 10;
/// No kernel's file is larger; a stream is not followed further.
const LONGEST: u64 = 1 << 30;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// XEN_ELFNOTE_PHYS32_ENTRY.
const PVH_NOTE: u32 = 18;

/// A kernel in RAM.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// Physical address of the ELF header's entry.
    pub entry: u64,
    /// Physical address of the 32-bit PVH entry, if the kernel has one.
    pub pvh_entry: Option<u32>,
    /// One past the last byte it takes.
    pub end: u64,
}

#[derive(Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    in_file: u64,
    in_memory: u64,
}

/// Class and program headers.
fn parse(head: &[u8]) -> Option<(u64, Vec<Segment>)> {
    let wide = match (head.get(4)?, head.get(5)?) {
        (1, 1) => false,
        (2, 1) => true,
        _ => return None,
    };
    // EM_386 and EM_X86_64; EXEC and DYN.
    if !matches!(u16_at(head, 18)?, 3 | 62) || !matches!(u16_at(head, 16)?, 2 | 3) {
        return None;
    }
    let (entry, table, size, count) = if wide {
        (
            u64_at(head, 24)?,
            u64_at(head, 32)?,
            u16_at(head, 54)?,
            u16_at(head, 56)?,
        )
    } else {
        let (entry, table) = (u32_at(head, 24)?, u32_at(head, 28)?);
        (entry.into(), table.into(), u16_at(head, 42)?, u16_at(head, 44)?)
    };
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let start = usize::try_from(table.checked_add(index * u64::from(size))?).ok()?;
        let header = head.get(start..)?;
        segments.push(if wide {
            Segment {
                kind: u32_at(header, 0)?,
                offset: u64_at(header, 8)?,
                virt: u64_at(header, 16)?,
                phys: u64_at(header, 24)?,
                in_file: u64_at(header, 32)?,
                in_memory: u64_at(header, 40)?,
            }
        } else {
            let word = |at| u32_at(header, at).map(u64::from);
            Segment {
                kind: u32_at(header, 0)?,
                offset: word(4)?,
                virt: word(8)?,
                phys: word(12)?,
                in_file: word(16)?,
                in_memory: word(20)?,
            }
        });
    }
    Some((entry, segments))
}

/// The PVH entry among notes (name size, descriptor size, type, then both padded to 4 bytes).
fn find_pvh(mut notes: &[u8]) -> Option<u32> {
    loop {
        let (name, descriptor) = (u32_at(notes, 0)? as usize, u32_at(notes, 4)? as usize);
        let kind = u32_at(notes, 8)?;
        let body = notes.get(12..)?;
        let value = name.checked_next_multiple_of(4)?;
        if kind == PVH_NOTE && body.get(..name)? == b"Xen\0" {
            return u32_at(body, value);
        }
        notes = body.get(value.checked_add(descriptor.checked_next_multiple_of(4)?)?..)?;
    }
}

/// Loads the ELF file that `stream` gives; `kernel` is whom errors name.
pub(super) fn load(mut stream: impl Read, ram: &GuestRam, kernel: &Input) -> Result<Image, Error> {
    let malformed = |why: &str| Error::Malformed {
        path: kernel.path().into(),
        why: why.into(),
    };
    let mut buffer = vec![0; HEAD];
    let mut length = fill(&mut stream, &mut buffer, kernel)?;
    let Some((entry, segments)) = parse(&buffer[..length]) else {
        let incomplete = length < HEAD && (length < 64 || parse_would_fit(&buffer[..length]));
        return Err(if incomplete {
            kernel.truncated()
        } else {
            malformed("its ELF headers are not those of an x86 executable")
        });
    };
    let loaded: Vec<Segment> = segments
        .iter()
        .filter(|segment| segment.kind == PT_LOAD && segment.in_memory > 0)
        .copied()
        .collect();
    if loaded.is_empty() {
        return Err(malformed("its ELF headers name nothing to load"));
    }
    let mut end = 0;
    for segment in &loaded {
        let behind = segment.phys.checked_add(segment.in_memory);
        let (Some(behind), true) = (behind, segment.in_file <= segment.in_memory) else {
            return Err(malformed("a segment's sizes cannot be right"));
        };
        if segment.phys < layout::KERNEL {
            return Err(malformed("it wants memory below 1 MiB; link it to 1 MiB or higher"));
        }
        if !ram.contains(segment.phys, segment.in_memory) {
            return Err(Error::Memory {
                path: kernel.path().into(),
                needed: behind,
                memory: ram.size(),
            });
        }
        end = end.max(behind);
    }
    let note = segments
        .iter()
        .find(|segment| segment.kind == PT_NOTE && segment.in_file <= NOTES);
    let mut notes = vec![0; note.map_or(0, |note| note.in_file as usize)];
    let wanted = loaded
        .iter()
        .chain(note)
        .map(|part| part.offset.checked_add(part.in_file));
    let Some(wanted) = wanted
        .collect::<Option<Vec<u64>>>()
        .and_then(|ends| ends.into_iter().max())
    else {
        return Err(malformed("a segment's place in the file cannot be right"));
    };
    if wanted > LONGEST {
        return Err(malformed("it is larger than 1 GiB"));
    }

    let mut offset = 0;
    while length > 0 && offset < wanted {
        for segment in &loaded {
            if let Some((skip, from, part)) = overlap(offset, length, segment) {
                ram.memory()
                    .write_slice(&buffer[from..from + part], GuestAddress(segment.phys + skip))
                    .expect("the segment was checked to lie in RAM");
            }
        }
        if let Some((skip, from, part)) = note.and_then(|note| overlap(offset, length, note)) {
            notes[skip as usize..skip as usize + part].copy_from_slice(&buffer[from..from + part]);
        }
        offset += length as u64;
        if offset < wanted {
            length = fill(&mut stream, &mut buffer, kernel)?;
        }
    }
    if offset < wanted {
        return Err(kernel.truncated());
    }
    // A virtual entry inside a segment is a physical one; others are physical already.
    let inside = |segment: &&Segment| entry >= segment.virt && entry - segment.virt < segment.in_memory;
    let physical = loaded
        .iter()
        .find(inside)
        .map_or(entry, |segment| entry - segment.virt + segment.phys);
    Ok(Image {
        entry: physical,
        pvh_entry: find_pvh(&notes),
        end,
    })
}

/// True if the file's kind is right, so that it can only have failed for want of program headers.
fn parse_would_fit(head: &[u8]) -> bool {
    let mut whole = vec![0; HEAD];
    whole[..head.len()].copy_from_slice(head);
    head.starts_with(MAGIC) && parse(&whole).is_some()
}

/// What of `segment` lies in the `length` bytes at `offset` of the file: place in the segment, place in the bytes, length.
fn overlap(offset: u64, length: usize, segment: &Segment) -> Option<(u64, usize, usize)> {
    let start = offset.max(segment.offset);
    let end = (offset + length as u64).min(segment.offset.saturating_add(segment.in_file));
    (start < end).then(|| {
        (
            start - segment.offset,
            (start - offset) as usize,
            (end - start) as usize,
        )
    })
}

/// Fills `buffer` as far as the stream goes.
fn fill(stream: &mut impl Read, buffer: &mut [u8], kernel: &Input) -> Result<usize, Error> {
    let mut done = 0;
    while done < buffer.len() {
        match stream.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(length) => done += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(kernel.truncated()),
            Err(error) => return Err(kernel.read_error(error)),
        }
    }
    Ok(done)
}
