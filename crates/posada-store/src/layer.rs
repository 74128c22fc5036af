//! A VM's own thin layer over a root disk that all VMs of an image share: what the VM writes lies in the layer, all else in the
//! image's file, which is never changed and whose pages the host has in memory once for all VMs.
//!
//! One file a layer, sparse; numbers are little-endian:
//!
//! | offset | |
//! |---|---|
//! | 0 | `PosadaLy`, version (4), bytes of a granule (4), bytes of the disk (8), bytes of the root disk (8), its SHA-256 (32), XXH3-64 of all these (8) |
//! | 4096 | a bit a granule, the first in the lowest bit of the first byte: whether the layer has it |
//! | the next multiple of 1 MiB | the disk, each byte at its place |
//!
//! A layer is a disk with a volatile write cache: what [`Layer::flush`] came after is there after a crash of the host, and of
//! later writes each sector is there or not. Bits are kept in memory until a flush, which makes the data durable, then writes
//! the bits, then makes those durable: no bit ever promises data that is not there. Bits are only ever set, so a torn write of
//! them loses nothing that was flushed. Granules are what guests write: pages. A write of less copies the rest of its granule
//! from the root disk first.
//!
//! Why neither of the usual ways: pages of a reflinked copy are in the host's memory once for each VM, and ext4 cannot make one;
//! and over the same root disk, the first write of a page takes several times as long in a qcow2 overlay. The example
//! `layer_speed` compares.

mod medium;
#[cfg(test)]
mod tests;

pub use medium::Medium;

use crate::disk::{beside, place};
use crate::layout::take_lock;
use crate::manifest::LARGEST;
use crate::{Digest, Error};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &[u8; 8] = b"PosadaLy";
const VERSION: u32 = 1;
/// Bytes that one bit stands for.
pub const GRANULE: u64 = 4096;
/// Bytes of the header, its checksum included.
const HEADER: usize = 72;
const BITMAP: u64 = 4096;
/// Bytes of the bitmap that are written at once.
const PAGE: u64 = 4096;
const WORDS: usize = (PAGE / 8) as usize;
const DATA_ALIGN: u64 = 1 << 20;
/// Bytes of a disk's sector.
const SECTOR: u64 = 512;

/// What a layer's header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the disk; zeroes follow the root disk if that is shorter.
    pub size: u64,
    /// Bytes of the root disk.
    pub base_size: u64,
    /// The root disk's digest.
    pub base: Digest,
}

impl Header {
    fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(GRANULE as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.base_size.to_le_bytes());
        bytes[32..64].copy_from_slice(self.base.bytes());
        let sum = xxh3_64(&bytes[..64]);
        bytes[64..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    /// Reads a header, which may be any bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let Some(bytes) = bytes.first_chunk::<HEADER>() else {
            return Err("it is shorter than its header".into());
        };
        let number = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("8 bytes"));
        let half = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("4 bytes"));
        if &bytes[..8] != MAGIC {
            return Err("it is no layer".into());
        }
        if half(8) != VERSION {
            return Err(format!(
                "it has version {}, and this program knows only {VERSION}",
                half(8)
            ));
        }
        if number(64) != xxh3_64(&bytes[..64]) {
            return Err("its header is damaged".into());
        }
        if u64::from(half(12)) != GRANULE {
            return Err(format!("it has granules of {} bytes and not {GRANULE}", half(12)));
        }
        let header = Self {
            size: number(16),
            base_size: number(24),
            base: Digest::from_bytes(*bytes[32..].first_chunk().expect("32 bytes")),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), String> {
        if self.size == 0 || self.size > LARGEST || !self.size.is_multiple_of(SECTOR) {
            return Err(format!("a disk of {} bytes cannot be", self.size));
        }
        if self.base_size > self.size {
            let (size, base) = (self.size, self.base_size);
            return Err(format!(
                "its disk of {size} bytes is smaller than its root disk of {base}"
            ));
        }
        Ok(())
    }

    fn granules(&self) -> u64 {
        self.size.div_ceil(GRANULE)
    }

    /// Pages of the bitmap.
    fn pages(&self) -> u64 {
        self.granules().div_ceil(8 * PAGE)
    }

    /// Where the disk begins in the file.
    fn data(&self) -> u64 {
        (BITMAP + self.pages() * PAGE).next_multiple_of(DATA_ALIGN)
    }
}

/// Where a part of the disk is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the layer's file, at this offset.
    Layer(u64),
    /// In the root disk's file, at this offset.
    Base(u64),
    /// It is zeroes.
    Zero,
}

/// A layer and the root disk below it: a disk that threads may read and write at once, as the queues of a disk device do.
///
/// `M` is the layer's file; it is another only in tests.
#[derive(Debug)]
pub struct Layer<M: Medium = File> {
    file: M,
    base: File,
    header: Header,
    read_only: bool,
    /// A bit a granule: the layer has it.
    present: Vec<AtomicU64>,
    /// A bit a page of the bitmap: it has bits that the file has not.
    dirty: Vec<AtomicU64>,
    /// Held for itself to copy from below, shared to write whole granules for the first time: else the copy could overwrite
    /// what was just written.
    first_writes: RwLock<()>,
    flushing: Mutex<()>,
}

fn damaged(path: &Path) -> impl Fn(String) -> Error {
    let path = PathBuf::from(path);
    move |why| Error::Layer {
        path: path.clone(),
        why,
    }
}

impl Layer {
    /// Makes an empty layer over the root disk `base`, whose digest the caller knows. `size` is that of the disk in bytes:
    /// at least that of the root disk. The file appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Layer`] if the sizes cannot be; what the host says, also if there is a file `path` already.
    pub fn create(path: &Path, base: &Path, digest: Digest, size: u64) -> Result<(), Error> {
        let base_size = std::fs::metadata(base).map_err(Error::io("open", base))?.len();
        let header = Header {
            size,
            base_size,
            base: digest,
        };
        header.check().map_err(damaged(path))?;
        let temporary = beside(path)?;
        let file = temporary.as_file();
        file.set_len(header.data() + size)
            .and_then(|()| file.write_all_at(&header.encode(), 0))
            .map_err(Error::io("write", path))?;
        place(temporary, path)
    }

    /// Opens a layer over the root disk `base` of this digest, and locks it as long as the value lives: exclusively, or shared
    /// if it is only to be read. The root disk must not change; [`crate::Image`] sees to that.
    ///
    /// # Errors
    /// [`Error::Layer`] if the file is damaged or of another root disk, [`Error::LayerInUse`], and what the host says.
    pub fn open(path: &Path, base: &Path, digest: Digest, read_only: bool) -> Result<Self, Error> {
        let file = File::options()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(Error::io("open", path))?;
        let lock = || {
            if read_only {
                file.try_lock_shared()
            } else {
                file.try_lock()
            }
        };
        if !take_lock(lock).map_err(Error::io("lock", path))? {
            return Err(Error::LayerInUse { path: path.into() });
        }
        let length = file.metadata().map_err(Error::io("look at", path))?.len();
        let base_file = File::open(base).map_err(Error::io("open", base))?;
        let base_size = base_file.metadata().map_err(Error::io("look at", base))?.len();
        let wrong = damaged(path);
        let mut bytes = [0; HEADER];
        file.read_exact_at(&mut bytes[..HEADER.min(length as usize)], 0)
            .map_err(Error::io("read", path))?;
        let header = Header::parse(&bytes).map_err(&wrong)?;
        if (header.base, header.base_size) != (digest, base_size) {
            return Err(wrong(format!(
                "it belongs to the root disk {} and not to {digest}",
                header.base
            )));
        }
        if length < header.data() + header.size {
            return Err(wrong(format!("it is cut off at {length} bytes")));
        }
        Self::over(file, base_file, header, read_only).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => wrong(error.to_string()),
            _ => Error::io("read", path)(error),
        })
    }

    /// The layer's file, for [`Source::Layer`].
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl<M: Medium> Layer<M> {
    fn over(file: M, base: File, header: Header, read_only: bool) -> io::Result<Self> {
        let empty = |bits: u64| (0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
        let layer = Self {
            present: empty(header.pages() * PAGE * 8),
            dirty: empty(header.pages()),
            file,
            base,
            header,
            read_only,
            first_writes: RwLock::new(()),
            flushing: Mutex::new(()),
        };
        let mut page = [0; PAGE as usize];
        for number in 0..header.pages() {
            layer.file.read_exact_at(&mut page, BITMAP + number * PAGE)?;
            let words = &layer.present[number as usize * WORDS..][..WORDS];
            for (word, bytes) in words.iter().zip(page.chunks_exact(8)) {
                word.store(
                    u64::from_le_bytes(bytes.try_into().expect("8 bytes")),
                    Ordering::Relaxed,
                );
            }
        }
        let behind = header.granules()..header.pages() * PAGE * 8;
        if behind.into_iter().any(|granule| layer.has(granule)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "its bitmap goes beyond its disk",
            ));
        }
        Ok(layer)
    }

    /// Bytes of the disk, whole sectors.
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// True if writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The root disk's file, for [`Source::Base`].
    pub fn base(&self) -> &File {
        &self.base
    }

    /// Bytes of the disk that are the layer's own.
    pub fn own(&self) -> u64 {
        let bits: u64 = self
            .present
            .iter()
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum();
        bits * GRANULE
    }

    fn has(&self, granule: u64) -> bool {
        self.present[(granule / 64) as usize].load(Ordering::Acquire) >> (granule % 64) & 1 != 0
    }

    /// Granules whose data is in the layer from now on.
    fn mark(&self, granules: std::ops::Range<u64>) {
        let mut at = granules.start;
        while at < granules.end {
            let (word, bit) = ((at / 64) as usize, at % 64);
            let count = (64 - bit).min(granules.end - at);
            let mask = (u64::MAX >> (64 - count)) << bit;
            if self.present[word].fetch_or(mask, Ordering::Release) & mask != mask {
                let page = at / (8 * PAGE);
                self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
            }
            at += count;
        }
    }

    fn check(&self, offset: u64, length: u64) -> io::Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.header.size => Ok(()),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "beyond the end of the disk",
            )),
        }
    }

    fn check_writable(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.check(offset, length)
    }

    /// Where the first part of a range is to be read, and how long that part is. The range must not be empty, and lie on the
    /// disk.
    pub fn locate(&self, offset: u64, length: u64) -> (Source, u64) {
        debug_assert!(length > 0 && offset + length <= self.header.size);
        let has = self.has(offset / GRANULE);
        let mut end = (offset / GRANULE + 1) * GRANULE;
        while end < offset + length && self.has(end / GRANULE) == has {
            end += GRANULE;
        }
        let part = length.min(end - offset);
        let base = self.header.base_size;
        match has {
            true => (Source::Layer(self.header.data() + offset), part),
            false if offset >= base => (Source::Zero, part),
            false => (Source::Base(offset), part.min(base - offset)),
        }
    }

    /// Fills `bytes` from the disk.
    ///
    /// # Errors
    /// If the range does not lie on the disk; what the host says.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, bytes.len() as u64)?;
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            let (source, length) = self.locate(at, rest.len() as u64);
            let (part, behind) = rest.split_at_mut(length as usize);
            match source {
                Source::Layer(at) => self.file.read_exact_at(part, at)?,
                Source::Base(at) => self.base.read_exact_at(part, at)?,
                Source::Zero => part.fill(0),
            }
            (rest, at) = (behind, at + length);
        }
        Ok(())
    }

    /// Lets `write` write the range: it gets the layer's file and where in it the range lies, and must write all of it, or
    /// fail.
    ///
    /// # Errors
    /// If the range does not lie on the disk, or the layer is read-only; what `write` and the host say.
    pub fn write_with(
        &self,
        offset: u64,
        length: u64,
        write: impl FnOnce(&M, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        self.check_writable(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        let end = offset + length;
        let granules = offset / GRANULE..end.div_ceil(GRANULE);
        let at = self.header.data() + offset;
        if granules.clone().all(|granule| self.has(granule)) {
            return write(&self.file, at);
        }
        if !offset.is_multiple_of(GRANULE) {
            self.copy_up(granules.start)?;
        }
        if !end.is_multiple_of(GRANULE) && end != self.header.size {
            self.copy_up(granules.end - 1)?;
        }
        let _shared = self.first_writes.read().unwrap_or_else(PoisonError::into_inner);
        write(&self.file, at)?;
        self.mark(granules);
        Ok(())
    }

    /// Writes to the disk.
    ///
    /// # Errors
    /// As [`Layer::write_with`].
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write_with(offset, bytes.len() as u64, |file, at| file.write_all_at(bytes, at))
    }

    /// Has a granule in the layer, as it is below.
    fn copy_up(&self, granule: u64) -> io::Result<()> {
        if self.has(granule) {
            return Ok(());
        }
        let _alone = self.first_writes.write().unwrap_or_else(PoisonError::into_inner);
        if self.has(granule) {
            return Ok(());
        }
        let at = granule * GRANULE;
        let mut bytes = [0; GRANULE as usize];
        let bytes = &mut bytes[..GRANULE.min(self.header.size - at) as usize];
        self.read_at(bytes, at)?;
        self.file.write_all_at(bytes, self.header.data() + at)?;
        self.mark(granule..granule + 1);
        Ok(())
    }

    /// Makes all writes that returned so far durable.
    ///
    /// # Errors
    /// What the host says; nothing is known of the writes since the last flush then.
    pub fn flush(&self) -> io::Result<()> {
        let _alone = self.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        // The bits as of now, before the data is synchronized: of later ones the data may be missing.
        let mut pages = Vec::new();
        for (at, word) in self.dirty.iter().enumerate() {
            let mut bits = word.swap(0, Ordering::AcqRel);
            while bits != 0 {
                let number = at as u64 * 64 + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                let words = &self.present[number as usize * WORDS..][..WORDS];
                let page: Vec<u8> = words
                    .iter()
                    .flat_map(|word| word.load(Ordering::Acquire).to_le_bytes())
                    .collect();
                pages.push((number, page));
            }
        }
        let written = || {
            self.file.sync()?;
            for (number, page) in &pages {
                self.file.write_all_at(page, BITMAP + number * PAGE)?;
            }
            if pages.is_empty() { Ok(()) } else { self.file.sync() }
        };
        let result = written();
        if result.is_err() {
            for (number, _) in &pages {
                self.dirty[(number / 64) as usize].fetch_or(1 << (number % 64), Ordering::Release);
            }
        }
        result
    }

    /// Frees the space of a range. Whole granules in it read as zeroes from then on; of others nothing changes.
    ///
    /// # Errors
    /// If the range does not lie on the disk, or the layer is read-only; what the host says.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.check_writable(offset, length)?;
        let end = offset + length;
        let last = if end == self.header.size {
            end.div_ceil(GRANULE)
        } else {
            end / GRANULE
        };
        let granules = offset.div_ceil(GRANULE)..last;
        if granules.is_empty() {
            return Ok(());
        }
        let _shared = self.first_writes.read().unwrap_or_else(PoisonError::into_inner);
        let at = granules.start * GRANULE;
        let length = (granules.end * GRANULE).min(self.header.size) - at;
        self.file.punch(self.header.data() + at, length)?;
        self.mark(granules);
        Ok(())
    }

    /// Zeroes a range; whole granules of it take no space after.
    ///
    /// # Errors
    /// As [`Layer::discard`].
    pub fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        const ZEROES: [u8; GRANULE as usize] = [0; GRANULE as usize];
        self.check_writable(offset, length)?;
        let end = offset + length;
        let (first, last) = (offset.next_multiple_of(GRANULE), end / GRANULE * GRANULE);
        if first > last {
            // Within one granule.
            return self.write_at(&ZEROES[..length as usize], offset);
        }
        self.write_at(&ZEROES[..(first - offset) as usize], offset)?;
        self.discard(first, last - first)?;
        self.write_at(&ZEROES[..(end - last) as usize], last)
    }
}

impl<M: Medium> Drop for Layer<M> {
    /// An orderly end loses nothing, even if the guest did not flush.
    fn drop(&mut self) {
        if !self.read_only
            && let Err(error) = self.flush()
        {
            tracing::warn!(%error, "the last writes to a disk's layer may be lost");
        }
    }
}
