//! The compressions of a Linux kernel's payload, as streams with bounded memory.

use super::elf;
use std::io::{self, BufRead, Read};

/// The largest dictionary that is accepted, in bytes; kernels are packed with up to 128 MiB. It costs memory only as far
/// as output has come.
const DICTIONARY: u64 = 128 << 20;
/// Unpacked bytes of a block in the kernel's LZ4 format ("legacy" frames).
const LZ4_BLOCK: usize = 8 << 20;

/// The unpacked form of `packed`, which ends where the payload does; `None` if its format is not known.
pub(super) fn unpack<'a>(mut packed: impl BufRead + 'a) -> io::Result<Option<Box<dyn Read + 'a>>> {
    let head = packed.fill_buf()?;
    if head.starts_with(elf::MAGIC) {
        return Ok(Some(Box::new(packed)));
    }
    Ok(Some(match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::GzDecoder::new(packed)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => {
            check_xz_dictionary(head)?;
            Box::new(lzma_rust2::XzReader::new(packed, false))
        }
        [0x5d, 0, 0, ..] => {
            let limit = (DICTIONARY >> 10) as u32 + 1024;
            Box::new(lzma_rust2::LzmaReader::new_mem_limit(packed, limit, None)?)
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => {
            let mut decoder = zstd::Decoder::with_buffer(packed)?.single_frame();
            decoder.window_log_max(DICTIONARY.ilog2())?;
            Box::new(decoder)
        }
        [0x02, 0x21, 0x4c, 0x18, ..] => {
            packed.consume(4);
            Box::new(Lz4::new(packed))
        }
        _ => return Ok(None),
    }))
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Refuses a dictionary that is too large: the first block's header is at byte 12 (xz file format 1.2, section 3.1).
fn check_xz_dictionary(head: &[u8]) -> io::Result<()> {
    let mut header = head.get(13..).unwrap_or_default().iter();
    let mut dictionary = || {
        let flags = *header.next()?;
        for _ in 0..(flags >> 6 & 1) + (flags >> 7) {
            xz_number(&mut header)?;
        }
        let mut largest = 0;
        // Filters: id, size of properties, properties.
        for _ in 0..=flags & 3 {
            let (id, size) = (xz_number(&mut header)?, xz_number(&mut header)?);
            for _ in 0..size {
                let value = *header.next()?;
                if id == 0x21 {
                    largest = (2 | u64::from(value & 1)) << (value / 2 + 11).min(40);
                }
            }
        }
        Some(largest)
    };
    match dictionary() {
        Some(size) if size <= DICTIONARY => Ok(()),
        Some(_) => Err(invalid("its xz dictionary is larger than 128 MiB")),
        None => Err(invalid("its xz header cannot be right")),
    }
}

/// A multibyte integer of the xz format.
fn xz_number<'a>(bytes: &mut impl Iterator<Item = &'a u8>) -> Option<u64> {
    let mut value = 0;
    for shift in (0..63).step_by(7) {
        let byte = *bytes.next()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// Blocks of a 32-bit length and as many packed bytes. A length with nothing behind it ends them: the kernel's build puts
/// the unpacked length there.
struct Lz4<R> {
    packed: R,
    input: Vec<u8>,
    block: Vec<u8>,
    /// What of `block` is valid, and how much of that was given out.
    length: usize,
    given: usize,
}

impl<R: Read> Lz4<R> {
    fn new(packed: R) -> Self {
        Self {
            packed,
            input: Vec::new(),
            block: vec![0; LZ4_BLOCK],
            length: 0,
            given: 0,
        }
    }

    /// Unpacks the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut size = Vec::new();
        self.packed.by_ref().take(4).read_to_end(&mut size)?;
        if size.is_empty() {
            return Ok(false);
        }
        let size = size.try_into().map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let size = u32::from_le_bytes(size) as usize;
        if size > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK) {
            return Err(invalid("a block of its LZ4 payload is larger than 8 MiB"));
        }
        self.input.clear();
        self.packed.by_ref().take(size as u64).read_to_end(&mut self.input)?;
        if self.input.is_empty() {
            return Ok(false);
        }
        if self.input.len() != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.length = lz4_flex::block::decompress_into(&self.input, &mut self.block)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        self.given = 0;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.given == self.length {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let part = buffer.len().min(self.length - self.given);
        buffer[..part].copy_from_slice(&self.block[self.given..self.given + part]);
        self.given += part;
        Ok(part)
    }
}
