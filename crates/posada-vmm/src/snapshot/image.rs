//! Sparse images: guest RAM and disks in files where a page of zeroes is a hole, each with an index of the pages that are not,
//! by whose checksums a flipped bit is found.
//!
//! The index, all numbers little-endian: `PosadaIx`, the image's length in bytes (8), the number of records (8), then for
//! each chunk of 1 MiB with any such page, in ascending order, its number (8), a bit a page (32, the first page in the lowest
//! bit of the first byte), and the XXH3-64 of those pages one behind the other (8). A last page that the image fills in
//! part only counts with zeroes behind.

use super::pages::PagesOf;
use posada_memory::{GuestRam, HOLE_END, HOLE_START, PAGE_SIZE};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a chunk.
pub(super) const CHUNK: u64 = 1 << 20;
const PAGE: usize = PAGE_SIZE as usize;
const PAGES: usize = (CHUNK / PAGE_SIZE) as usize;
const MAGIC: &[u8; 8] = b"PosadaIx";
const HEAD: usize = 24;
const RECORD: usize = 48;
/// More threads than this do not load RAM faster.
const LOADERS: usize = 4;

/// A chunk's pages that are not all zeroes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    number: u64,
    pages: [u8; PAGES / 8],
    hash: u64,
}

impl Record {
    /// What a chunk of whole pages has; `None`: zeroes.
    fn of(number: u64, chunk: &[u8]) -> Option<Self> {
        let (mut pages, mut hash) = ([0; PAGES / 8], Xxh3::new());
        for (at, page) in chunk.chunks_exact(PAGE).enumerate() {
            if page != [0; PAGE] {
                pages[at / 8] |= 1 << (at % 8);
                hash.update(page);
            }
        }
        (pages != [0; PAGES / 8]).then(|| Self {
            number,
            pages,
            hash: hash.digest(),
        })
    }

    fn has(&self, page: usize) -> bool {
        self.pages[page / 8] >> (page % 8) & 1 != 0
    }

    fn count(&self) -> u64 {
        self.pages.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// Ranges of bytes of the chunk that have content.
    fn runs(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (at..PAGES).find(|&page| self.has(page))?;
            at = (start..PAGES).find(|&page| !self.has(page)).unwrap_or(PAGES);
            Some(start * PAGE..at * PAGE)
        })
    }
}

/// Which pages of an image there are, with their checksums.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Index {
    /// Bytes of the image.
    length: u64,
    records: Vec<Record>,
}

/// Why an image cannot be taken.
#[derive(Debug)]
pub(super) enum Fault {
    /// The host's reason.
    Io(io::Error),
    /// It is not what was saved, from about this byte on.
    Differs(u64),
    /// Whoever watches does not want it any more.
    Cancelled,
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Fault::Io(error)
    }
}

impl Index {
    /// An image of `length` bytes, all zeroes.
    pub(super) fn new(length: u64) -> Self {
        Self {
            length,
            records: Vec::new(),
        }
    }

    /// Bytes of the image.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Bytes of the pages that are not holes.
    pub fn content(&self) -> u64 {
        self.records.iter().map(|record| record.count() * PAGE_SIZE).sum()
    }

    /// The file's bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.records.len() * RECORD);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.length.to_le_bytes());
        bytes.extend_from_slice(&(self.records.len() as u64).to_le_bytes());
        for record in &self.records {
            bytes.extend_from_slice(&record.number.to_le_bytes());
            bytes.extend_from_slice(&record.pages);
            bytes.extend_from_slice(&record.hash.to_le_bytes());
        }
        bytes
    }

    /// Reads the file's bytes.
    ///
    /// # Errors
    /// What is wrong, as the end of the sentence "the file …".
    pub fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("checked to be there"));
        if bytes.len() < HEAD || !bytes.starts_with(MAGIC) {
            return Err("is not an index");
        }
        let (length, count) = (word(8), word(16));
        let records = bytes[HEAD..].chunks_exact(RECORD);
        if records.len() as u64 != count || !records.remainder().is_empty() {
            return Err("has not as many records as it says");
        }
        let mut index = Self::new(length);
        for (at, record) in records.enumerate() {
            let start = HEAD + at * RECORD;
            let record = Record {
                number: word(start),
                pages: *record[8..].first_chunk().expect("a record has it"),
                hash: word(start + RECORD - 8),
            };
            let last = (0..PAGES).rfind(|&page| record.has(page));
            let Some(last) = last else {
                return Err("has a record without pages");
            };
            let begin = record
                .number
                .checked_mul(CHUNK)
                .map(|start| start + (last * PAGE) as u64);
            if begin.is_none_or(|begin| begin >= length) {
                return Err("has pages behind the image's end");
            }
            if index
                .records
                .last()
                .is_some_and(|before| before.number >= record.number)
            {
                return Err("has its records in disorder");
            }
            index.records.push(record);
        }
        Ok(index)
    }

    /// The first byte of the first chunk in which two images differ.
    fn first_difference(&self, other: &Self) -> Option<u64> {
        let (mine, theirs) = (self.records.iter().map(Some), other.records.iter().map(Some));
        let none = || std::iter::repeat(None);
        let most = self.records.len().max(other.records.len());
        let (a, b) = mine
            .chain(none())
            .zip(theirs.chain(none()))
            .take(most)
            .find(|(a, b)| a != b)?;
        a.into_iter().chain(b).map(|record| record.number * CHUNK).min()
    }

    /// Describes a file or block device of `length` bytes.
    pub(super) fn of(file: &File, length: u64, watch: &mut dyn FnMut(u64) -> bool) -> Result<Self, Fault> {
        let mut index = Self::new(length);
        each_chunk(file, length, watch, |number, chunk| {
            index.records.extend(Record::of(number, chunk));
            Ok(())
        })?;
        Ok(index)
    }

    /// Checks that `file` is the image.
    pub(super) fn check(&self, file: &File, watch: &mut dyn FnMut(u64) -> bool) -> Result<(), Fault> {
        match self.first_difference(&Self::of(file, self.length, watch)?) {
            Some(at) => Err(Fault::Differs(at)),
            None => Ok(()),
        }
    }

    /// Writes `chunk`, which is whole pages, to its place in `file`, which has holes there.
    fn put(&mut self, file: &File, number: u64, chunk: &[u8]) -> io::Result<()> {
        let Some(record) = Record::of(number, chunk) else {
            return Ok(());
        };
        let start = number * CHUNK;
        for run in record.runs() {
            let end = (run.end as u64).min(self.length - start) as usize;
            file.write_all_at(&chunk[run.start..end], start + run.start as u64)?;
        }
        self.records.push(record);
        Ok(())
    }

    /// Copies a file or block device of `length` bytes into the empty file `to`.
    pub(super) fn copy(from: &File, length: u64, to: &File, watch: &mut dyn FnMut(u64) -> bool) -> Result<Self, Fault> {
        to.set_len(length)?;
        let mut index = Self::new(length);
        each_chunk(from, length, watch, |number, chunk| index.put(to, number, chunk))?;
        Ok(index)
    }

    /// Writes RAM, which nobody changes meanwhile, into the empty file `to`. Pages without memory are not touched. `watch` is
    /// told how many bytes of RAM were looked at, and answers whether to go on.
    pub(super) fn of_ram(ram: &GuestRam, to: &File, watch: &mut dyn FnMut(u64) -> bool) -> Result<Self, Fault> {
        to.set_len(ram.size())?;
        let mut index = Self::new(ram.size());
        let mut pages = PagesOf::new(ram);
        let mut buffer = vec![0; CHUNK as usize];
        for number in 0..ram.size().div_ceil(CHUNK) {
            if !watch(number * CHUNK) {
                return Err(Fault::Cancelled);
            }
            let start = number * CHUNK;
            let count = ((ram.size() - start) / PAGE_SIZE).min(PAGES as u64) as usize;
            let present = pages.present(gpa(start), count);
            if !present.contains(&true) {
                continue;
            }
            for (at, present) in present.iter().enumerate() {
                let page = &mut buffer[at * PAGE..][..PAGE];
                if *present {
                    let from = GuestAddress(gpa(start) + (at * PAGE) as u64);
                    ram.memory().read_slice(page, from).map_err(io::Error::other)?;
                } else {
                    page.fill(0);
                }
            }
            index.put(to, number, &buffer[..count * PAGE])?;
        }
        Ok(index)
    }

    /// Fills zeroed `ram`, which has the image's length, from `file`. Holes are not touched, and all content is checked. RAM is
    /// of no use after an error.
    pub(super) fn load(&self, file: &File, ram: &GuestRam) -> Result<(), Fault> {
        let (next, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
        let load = || {
            let mut buffer = vec![0; CHUNK as usize];
            while let Some(record) = self.records.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                load_chunk(record, file, ram, &mut buffer).inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
            }
            Ok(())
        };
        let threads = thread::available_parallelism().map_or(1, usize::from).min(LOADERS);
        thread::scope(|scope| {
            // A host that gives no thread loses time only.
            let others: Vec<_> = (1..threads)
                .filter_map(|_| thread::Builder::new().spawn_scoped(scope, load).ok())
                .collect();
            let mine = load();
            let theirs = others.into_iter().map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            });
            theirs.fold(mine, |so_far, result| so_far.and(result))
        })
    }
}

/// Guest physical address of a byte of RAM.
fn gpa(offset: u64) -> u64 {
    if offset < HOLE_START {
        offset
    } else {
        offset - HOLE_START + HOLE_END
    }
}

fn load_chunk(record: &Record, file: &File, ram: &GuestRam, buffer: &mut [u8]) -> Result<(), Fault> {
    let start = record.number * CHUNK;
    let mut hash = Xxh3::new();
    for run in record.runs() {
        let buffer = &mut buffer[run.clone()];
        file.read_exact_at(buffer, start + run.start as u64)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Fault::Differs(start),
                _ => Fault::Io(error),
            })?;
        hash.update(buffer);
    }
    if hash.digest() != record.hash {
        return Err(Fault::Differs(start));
    }
    for run in record.runs() {
        let to = GuestAddress(gpa(start + run.start as u64));
        ram.memory().write_slice(&buffer[run], to).map_err(io::Error::other)?;
    }
    Ok(())
}

/// Reads a file chunk by chunk, filled up with zeroes to whole pages, but for those that are certainly holes.
fn each_chunk(
    file: &File,
    length: u64,
    watch: &mut dyn FnMut(u64) -> bool,
    mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> Result<(), Fault> {
    let mut buffer = vec![0; CHUNK as usize];
    let mut at = 0;
    while let Some(start) = next_data(file, at, length)? {
        let number = start / CHUNK;
        let start = number * CHUNK;
        if !watch(start) {
            return Err(Fault::Cancelled);
        }
        let wanted = (length - start).min(CHUNK) as usize;
        let whole = wanted.next_multiple_of(PAGE);
        buffer[wanted..whole].fill(0);
        fill(file, &mut buffer[..wanted], start)?;
        take(number, &buffer[..whole])?;
        at = start + CHUNK;
    }
    Ok(())
}

/// Reads all of `buffer`; what lies behind the file's end reads as zeroes, as a disk's last sector does.
fn fill(file: &File, buffer: &mut [u8], start: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], start + done as u64) {
            Ok(0) => {
                buffer[done..].fill(0);
                return Ok(());
            }
            Ok(length) => done += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Where the next content is, from `at` on and before `length`.
fn next_data(file: &File, at: u64, length: u64) -> io::Result<Option<u64>> {
    if at >= length {
        return Ok(None);
    }
    let offset = libc::off_t::try_from(at).map_err(io::Error::other)?;
    // SAFETY: takes numbers. The file's offset is nobody's: all else reads and writes at given places.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, libc::SEEK_DATA) };
    if let Ok(found) = u64::try_from(found) {
        return Ok((found < length).then_some(found));
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        // A block device, or a file system that does not tell.
        _ => Ok(Some(at)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, TempDir};
    use std::os::unix::fs::MetadataExt;

    fn go_on(_: u64) -> bool {
        true
    }

    fn empty(dir: &TempDir, name: &str) -> File {
        let path = dir.file(name, b"");
        File::options().read(true).write(true).open(path).unwrap()
    }

    /// RAM below and above the hole with content here and there.
    fn some_ram() -> GuestRam {
        let ram = GuestRam::new(HOLE_START + (3 << 20) + 4096).unwrap();
        let mut random = Random(11);
        for _ in 0..200 {
            let offset = match random.below(3) {
                0 => random.below(4 << 20),
                1 => HOLE_START + random.below((3 << 20) + 4096),
                _ => random.below(ram.size()),
            };
            ram.memory()
                .write_obj(random.below(256) as u8, GuestAddress(gpa(offset)))
                .unwrap();
        }
        ram.memory().write_obj(7_u8, GuestAddress(gpa(ram.size() - 1))).unwrap();
        ram
    }

    fn same(a: &GuestRam, b: &GuestRam) -> bool {
        let (mut one, mut two) = ([0_u8; 4096], [0_u8; 4096]);
        let mut pages = PagesOf::new(a);
        (0..a.size() / CHUNK * CHUNK).step_by(CHUNK as usize).all(|start| {
            let present = pages.present(gpa(start), PAGES);
            present
                .iter()
                .enumerate()
                .filter(|(_, present)| **present)
                .all(|(page, _)| {
                    let at = GuestAddress(gpa(start + (page * PAGE) as u64));
                    a.memory().read_slice(&mut one, at).unwrap();
                    b.memory().read_slice(&mut two, at).unwrap();
                    one == two
                })
        })
    }

    #[test]
    fn ram_survives_and_absent_pages_cost_nothing() {
        let (dir, ram) = (TempDir::new(), some_ram());
        // A page that was only read, and one of written zeroes.
        ram.memory().read_obj::<u64>(GuestAddress(9 << 20)).unwrap();
        ram.memory().write_obj(0_u64, GuestAddress(10 << 20)).unwrap();
        let file = empty(&dir, "memory");
        let index = Index::of_ram(&ram, &file, &mut go_on).unwrap();
        assert!(index.content() <= 201 * 4096);
        let stat = file.metadata().unwrap();
        assert_eq!(stat.len(), ram.size());
        assert!(stat.blocks() * 512 < 4 << 20, "{}", stat.blocks());
        let index = Index::decode(&index.encode()).unwrap();
        let back = GuestRam::new(ram.size()).unwrap();
        index.load(&file, &back).unwrap();
        assert!(same(&ram, &back) && same(&back, &ram));
        assert!(crate::resident::of(&back) <= 201 << 21);
        index.check(&file, &mut go_on).unwrap();
    }

    #[test]
    fn a_flipped_bit_of_content_is_found_and_one_in_a_hole_is_harmless() {
        let (dir, ram) = (TempDir::new(), some_ram());
        let file = empty(&dir, "memory");
        let index = Index::of_ram(&ram, &file, &mut go_on).unwrap();
        let mut random = Random(5);
        for _ in 0..60 {
            let record = &index.records[random.below(index.records.len() as u64) as usize];
            let at = record.number * CHUNK + random.below(CHUNK.min(ram.size() - record.number * CHUNK));
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << random.below(8)], at).unwrap();
            let back = GuestRam::new(ram.size()).unwrap();
            let loaded = index.load(&file, &back);
            if record.has((at % CHUNK) as usize / PAGE) {
                assert!(matches!(loaded, Err(Fault::Differs(chunk)) if chunk == record.number * CHUNK));
            } else {
                assert!(loaded.is_ok() && same(&ram, &back) && same(&back, &ram));
            }
            file.write_all_at(&byte, at).unwrap();
        }
    }

    #[test]
    fn a_disk_is_copied_with_its_holes_and_told_from_another() {
        let dir = TempDir::new();
        let from = empty(&dir, "from");
        let length = (5 << 20) + 700;
        from.set_len(length).unwrap();
        from.write_all_at(b"first", 5000).unwrap();
        from.write_all_at(&[0; 8192], 2 << 20).unwrap();
        from.write_all_at(b"last", length - 4).unwrap();
        let to = empty(&dir, "to");
        let index = Index::copy(&from, length, &to, &mut go_on).unwrap();
        assert_eq!(index, Index::of(&from, length, &mut go_on).unwrap());
        assert_eq!(index.content(), 2 * 4096);
        let read = |name| std::fs::read(dir.path(name)).unwrap();
        assert!(read("from") == read("to"));
        to.write_all_at(b"x", 3 << 20).unwrap();
        assert!(matches!(index.check(&to, &mut go_on), Err(Fault::Differs(at)) if at == 3 << 20));
    }

    #[test]
    fn who_watches_can_stop_it() {
        let (dir, ram) = (TempDir::new(), some_ram());
        let file = empty(&dir, "memory");
        let stopped = Index::of_ram(&ram, &file, &mut |done| done < 2 << 20);
        assert!(matches!(stopped, Err(Fault::Cancelled)));
    }

    #[test]
    fn random_changes_of_an_index_never_panic() {
        let (dir, ram) = (TempDir::new(), some_ram());
        let file = empty(&dir, "memory");
        let bytes = Index::of_ram(&ram, &file, &mut go_on).unwrap().encode();
        let mut random = Random(77);
        for _ in 0..3000 {
            let mut changed = bytes.clone();
            for _ in 0..=random.below(3) {
                let at = random.below(changed.len() as u64) as usize;
                changed[at] = random.below(256) as u8;
            }
            changed.truncate(random.below(2) as usize * random.below(bytes.len() as u64) as usize + bytes.len() / 2);
            if let Ok(index) = Index::decode(&changed)
                && index.length() == ram.size()
            {
                let _ = index.load(&file, &ram);
            }
        }
    }
}
