//! virtio-blk (virtio 1.2 section 5.2) over a raw disk. A flush is acknowledged only when the host has written everything;
//! discard and write-zeroes give space back. A guest has a queue for each of its CPUs, so that the one that has asked gets the
//! interrupt; a thread of the device serves them by turns, and each in order.

use super::disk::{Disk, SECTOR};
use super::{Broken, Chain, DeviceState, Segments, Signal, VirtQueue, VirtioDevice};
use crate::state::StateError;
use posada_memory::GuestRam;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

pub use super::disk::{Disk as BlkDisk, DiskIdentity, Error as DiskError, open_disk};

/// VIRTIO_BLK_F_*.
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
/// Beyond this number of CPUs, some share a queue.
const QUEUES: u16 = 64;
/// Data buffers a request: what is left of the queue beside header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Sectors of one discard or write-zeroes range, and ranges a request.
const RANGE_SECTORS: u32 = 1 << 22;
const RANGES: u32 = 32;
/// Bytes of a range in a request: sector, count, flags.
const RANGE: u64 = 16;
const UNMAP: u32 = 1;
const ID_LENGTH: usize = 20;

/// Request types.
mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// The status byte of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl From<io::Result<()>> for Status {
    fn from(result: io::Result<()>) -> Self {
        match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                tracing::warn!(%error, "a disk request failed");
                Status::IoError
            }
        }
    }
}

/// What a disk has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlkCounters {
    /// Requests of all kinds, failed ones included.
    pub requests: u64,
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// Bytes discarded or zeroed.
    pub discarded: u64,
    /// Flushes.
    pub flushes: u64,
}

#[derive(Default)]
struct Counters {
    requests: AtomicU64,
    read: AtomicU64,
    written: AtomicU64,
    discarded: AtomicU64,
    flushes: AtomicU64,
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// What a guest knows of its disk; the rest is in the disk's file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// Size in sectors of 512 bytes.
    pub sectors: u64,
    /// The guest may not write.
    pub read_only: bool,
    /// The serial number, up to 20 bytes.
    pub id: String,
}

/// The device.
pub struct Blk {
    disk: Disk,
    id: String,
    queue_sizes: Vec<u16>,
    counters: Counters,
}

impl Blk {
    /// A device for `disk` in a machine of `cpus`; the guest sees the first 20 bytes of `id` as its serial number.
    pub fn new(disk: Disk, id: &str, cpus: u32) -> Arc<Self> {
        let queues = cpus.clamp(1, QUEUES.into());
        Arc::new(Self {
            disk,
            id: id.into(),
            queue_sizes: vec![QUEUE_SIZE; queues as usize],
            counters: Counters::default(),
        })
    }

    /// The disk behind it.
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What it has done so far.
    pub fn counters(&self) -> BlkCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounters {
            requests: get(&self.counters.requests),
            read: get(&self.counters.read),
            written: get(&self.counters.written),
            discarded: get(&self.counters.discarded),
            flushes: get(&self.counters.flushes),
        }
    }

    /// Serves one request; returns the bytes written into guest memory.
    fn answer(&self, ram: &GuestRam, mut chain: Chain) -> Result<u32, Broken> {
        // The last writable byte is the status; a chain without one cannot be answered.
        let Some(room) = chain.writable.length().checked_sub(1) else {
            return Err(Broken::Chain(chain.head));
        };
        let data = chain.writable.take(room);
        count(&self.counters.requests, 1);
        let mut header = [0; 16];
        let (status, written) = if chain.readable.read(ram, &mut header) {
            let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
            let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
            self.request(ram, kind, sector, chain.readable, data)
        } else {
            (Status::IoError, 0)
        };
        chain.writable.write(ram, &[status as u8]);
        Ok(written as u32 + 1)
    }

    /// Status and bytes of `to_guest` written.
    fn request(
        &self,
        ram: &GuestRam,
        kind: u32,
        sector: u64,
        from_guest: Segments,
        mut to_guest: Segments,
    ) -> (Status, u64) {
        let status = match kind {
            request::IN => {
                let length = to_guest.length();
                let Some(offset) = self.place(sector, length) else {
                    return (Status::IoError, 0);
                };
                let status = self.disk.read(ram, &to_guest, offset).into();
                if status == Status::Ok {
                    count(&self.counters.read, length);
                    return (status, length);
                }
                status
            }
            request::OUT => match self.place(sector, from_guest.length()) {
                Some(offset) if !self.disk.read_only() => {
                    count(&self.counters.written, from_guest.length());
                    self.disk.write(ram, &from_guest, offset).into()
                }
                _ => Status::IoError,
            },
            request::FLUSH => {
                count(&self.counters.flushes, 1);
                self.disk.flush().into()
            }
            request::GET_ID => {
                let mut id = [0; ID_LENGTH];
                id.iter_mut().zip(self.id.bytes()).for_each(|(to, from)| *to = from);
                return (Status::Ok, to_guest.write(ram, &id) as u64);
            }
            request::DISCARD | request::WRITE_ZEROES => self.ranges(ram, kind, from_guest),
            _ => Status::Unsupported,
        };
        (status, 0)
    }

    /// The byte at which a transfer of `length` bytes at `sector` begins, if that is all on the disk.
    fn place(&self, sector: u64, length: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(length)?;
        (length.is_multiple_of(SECTOR) && end <= self.disk.size()).then_some(offset)
    }

    fn ranges(&self, ram: &GuestRam, kind: u32, mut ranges: Segments) -> Status {
        let length = ranges.length();
        if self.disk.read_only() || length == 0 || !length.is_multiple_of(RANGE) {
            return Status::IoError;
        }
        if length / RANGE > RANGES.into() {
            return Status::Unsupported;
        }
        let mut range = [0; RANGE as usize];
        while ranges.length() > 0 {
            if !ranges.read(ram, &mut range) {
                return Status::IoError;
            }
            let sector = u64::from_le_bytes(range[..8].try_into().expect("8 bytes"));
            let sectors = u32::from_le_bytes(range[8..12].try_into().expect("4 bytes"));
            let flags = u32::from_le_bytes(range[12..].try_into().expect("4 bytes"));
            let allowed = if kind == request::WRITE_ZEROES { UNMAP } else { 0 };
            if flags & !allowed != 0 || sectors > RANGE_SECTORS {
                return Status::Unsupported;
            }
            let bytes = u64::from(sectors) * SECTOR;
            let Some(offset) = self.place(sector, bytes) else {
                return Status::IoError;
            };
            let done = if kind == request::DISCARD {
                self.disk.discard(offset, bytes)
            } else {
                self.disk.write_zeroes(offset, bytes, flags & UNMAP != 0)
            };
            if Status::from(done) != Status::Ok {
                return Status::IoError;
            }
            count(&self.counters.discarded, bytes);
        }
        Status::Ok
    }
}

impl VirtioDevice for Blk {
    fn name(&self) -> &'static str {
        "blk"
    }

    fn id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let common = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY | if self.queue_sizes.len() > 1 { MQ } else { 0 };
        common
            | if self.disk.read_only() {
                RO
            } else {
                DISCARD | WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.disk.size() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: 8 sectors to a physical block of 4 KiB, which is also the best I/O size's unit.
        put(24, &[3, 0]);
        put(26, &8_u16.to_le_bytes());
        put(34, &(self.queue_sizes.len() as u16).to_le_bytes());
        // Discard: sectors, ranges, alignment in sectors. Then write-zeroes: sectors, ranges, may unmap.
        put(36, &RANGE_SECTORS.to_le_bytes());
        put(40, &RANGES.to_le_bytes());
        put(44, &8_u32.to_le_bytes());
        put(48, &RANGE_SECTORS.to_le_bytes());
        put(52, &RANGES.to_le_bytes());
        put(56, &[1]);
        super::read_config(&config, offset, data);
    }

    fn serve(&self, queues: &mut [VirtQueue], signal: &Signal) -> Result<(), Broken> {
        VirtQueue::drain_all(queues, signal, |ram, chain| self.answer(ram, chain))
    }

    fn save(&self) -> DeviceState {
        DeviceState::Blk(BlkState {
            sectors: self.disk.size() / SECTOR,
            read_only: self.disk.read_only(),
            id: self.id.clone(),
        })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Blk(state) = state else {
            return Err(state.is_not(self));
        };
        let sectors = self.disk.size() / SECTOR;
        if state.sectors != sectors {
            return Err(StateError::differs("sectors", sectors, state.sectors));
        }
        if state.read_only != self.disk.read_only() {
            let kind = |read_only| if read_only { "read-only" } else { "writable" };
            return Err(StateError::new(format!(
                "is {}, the snapshot's is {}",
                kind(self.disk.read_only()),
                kind(state.read_only)
            )));
        }
        if state.id != self.id {
            return Err(StateError::new(format!(
                "has the serial number {:?}, the snapshot's has {:?}",
                self.id, state.id
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{DATA, Driver, NEXT, RAM, SIZE, WRITE};
    use super::super::transport::Work;
    use super::*;
    use crate::testing::Random;
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;

    const HEADER: u64 = DATA;
    const STATUS: u64 = DATA + 0x100;
    const BUFFER: u64 = DATA + 0x1000;

    struct File(PathBuf);

    impl File {
        fn new(name: &str, bytes: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("posada-blk-{name}-{}", std::process::id()));
            std::fs::write(&path, bytes).unwrap();
            Self(path)
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn driver(file: &File, read_only: bool) -> (Driver, Arc<Blk>) {
        let blk = Blk::new(open_disk(&file.0, read_only).unwrap(), "serial", 2);
        let features = blk.features();
        (Driver::new(blk.clone(), features), blk)
    }

    fn header(driver: &Driver, kind: u32, sector: u64) {
        driver.put(HEADER, &kind.to_le_bytes());
        driver.put(HEADER + 8, &sector.to_le_bytes());
        driver.put(STATUS, &[0xee]);
    }

    fn submit(driver: &mut Driver, kind: u32, sector: u64, data: &[(u64, u32, bool)]) -> (u8, u32) {
        header(driver, kind, sector);
        let mut chain = vec![(HEADER, 16, false)];
        chain.extend_from_slice(data);
        chain.push((STATUS, 1, true));
        let written = driver.request(0, &chain);
        (driver.get(STATUS, 1)[0], written)
    }

    #[test]
    fn what_is_written_is_read_back_and_is_in_the_file() {
        let file = File::new("rw", &[0x11; 8192]);
        let (mut driver, blk) = driver(&file, false);
        driver.put(BUFFER, &[0x22; 1024]);
        let parts = [(BUFFER, 100, false), (BUFFER + 100, 924, false)];
        assert_eq!(submit(&mut driver, request::OUT, 3, &parts), (0, 1));
        assert_eq!(submit(&mut driver, request::FLUSH, 0, &[]), (0, 1));
        let content = std::fs::read(&file.0).unwrap();
        assert_eq!(content[1535..1537], [0x11, 0x22]);
        assert_eq!(content[2559..2561], [0x22, 0x11]);
        let code = driver.ram.code().clone();
        let page = code.page(BUFFER + 0x2000);
        page.mark(0, 64);
        let before = page.version();
        let parts = [(BUFFER + 0x2000, 1000, true), (BUFFER + 0x3000, 536, true)];
        assert_eq!(submit(&mut driver, request::IN, 2, &parts), (0, 1537));
        assert_ne!(page.version(), before, "the code map was told");
        assert_eq!(driver.get(BUFFER + 0x2000, 1000), content[1024..2024]);
        assert_eq!(driver.get(BUFFER + 0x3000, 536), content[2024..2560]);
        assert_eq!(submit(&mut driver, request::GET_ID, 0, &[(BUFFER, 20, true)]), (0, 21));
        assert_eq!(driver.get(BUFFER, 8), b"serial\0\0");
        let expected = BlkCounters {
            requests: 4,
            read: 1536,
            written: 1024,
            discarded: 0,
            flushes: 1,
        };
        assert_eq!(blk.counters(), expected);
        assert!(driver.sink.take().iter().any(|msi| msi.data == 0x31));
    }

    #[test]
    fn the_last_sector_reads_zeroes_behind_the_file() {
        let file = File::new("tail", &[0x33; 600]);
        let (mut driver, _) = driver(&file, true);
        assert_eq!(driver.read::<8>(0x2000), 2_u64.to_le_bytes(), "capacity");
        driver.put(BUFFER, &[0x44; 1024]);
        assert_eq!(submit(&mut driver, request::IN, 0, &[(BUFFER, 1024, true)]), (0, 1025));
        assert_eq!(driver.get(BUFFER, 600), [0x33; 600]);
        assert_eq!(driver.get(BUFFER + 600, 424), [0; 424]);
    }

    #[test]
    fn bad_requests_are_answered_with_errors() {
        let file = File::new("bad", &[0; 8192]);
        let (mut driver, _) = driver(&file, false);
        let whole = [(BUFFER, 512, true)];
        for sector in [16, u64::MAX, 1 << 55] {
            assert_eq!(submit(&mut driver, request::IN, sector, &whole), (1, 1));
        }
        assert_eq!(submit(&mut driver, request::IN, 15, &[(BUFFER, 1024, true)]), (1, 1));
        assert_eq!(submit(&mut driver, request::IN, 0, &[(BUFFER, 100, true)]), (1, 1));
        assert_eq!(submit(&mut driver, 77, 0, &[]), (2, 1));
        let short = driver.request(0, &[(HEADER, 15, false), (STATUS, 1, true)]);
        assert_eq!((driver.get(STATUS, 1)[0], short), (1, 1));
        driver.put(BUFFER, &[0; 15]);
        assert_eq!(submit(&mut driver, request::DISCARD, 0, &[(BUFFER, 15, false)]), (1, 1));
        assert_eq!(driver.status() & 64, 0);
    }

    #[test]
    fn a_read_only_disk_refuses_writes() {
        let file = File::new("ro", &[0x55; 4096]);
        let (mut driver, blk) = driver(&file, true);
        assert_eq!(blk.features() & (RO | DISCARD | WRITE_ZEROES), RO);
        for kind in [request::OUT, request::DISCARD, request::WRITE_ZEROES] {
            driver.put(BUFFER, &[0; 512]);
            assert_eq!(submit(&mut driver, kind, 0, &[(BUFFER, 512, false)]), (1, 1));
        }
        assert_eq!(std::fs::read(&file.0).unwrap(), [0x55; 4096]);
    }

    fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        range
    }

    #[test]
    fn discard_and_write_zeroes_give_space_back() {
        let file = File::new("discard", &[0x66; 1 << 20]);
        let (mut driver, blk) = driver(&file, false);
        std::fs::File::open(&file.0).unwrap().sync_all().unwrap();
        let blocks = || std::fs::metadata(&file.0).unwrap().blocks();
        let before = blocks();
        for (kind, flags, sector) in [(request::DISCARD, 0, 0), (request::WRITE_ZEROES, UNMAP, 1024)] {
            driver.put(BUFFER, &range(sector, 512, flags));
            driver.put(BUFFER + 16, &range(sector + 512, 256, flags));
            assert_eq!(submit(&mut driver, kind, 0, &[(BUFFER, 32, false)]), (0, 1));
        }
        assert!(blocks() <= before - 1500, "{before} {}", blocks());
        driver.put(BUFFER, &range(800, 16, 0));
        assert_eq!(
            submit(&mut driver, request::WRITE_ZEROES, 0, &[(BUFFER, 16, false)]),
            (0, 1)
        );
        let content = std::fs::read(&file.0).unwrap();
        assert_eq!(content.len(), 1 << 20);
        for (sector, byte) in [
            (0, 0),
            (767, 0),
            (768, 0x66),
            (799, 0x66),
            (800, 0),
            (816, 0x66),
            (1024, 0),
            (1792, 0x66),
        ] {
            assert_eq!(content[sector * 512], byte, "sector {sector}");
        }
        assert_eq!(blk.counters().discarded, (768 * 2 + 16) * 512);
        driver.put(BUFFER, &range(0, 1, 1));
        assert_eq!(submit(&mut driver, request::DISCARD, 0, &[(BUFFER, 16, false)]), (2, 1));
        driver.put(BUFFER, &range(2047, 2, 0));
        assert_eq!(submit(&mut driver, request::DISCARD, 0, &[(BUFFER, 16, false)]), (1, 1));
    }

    #[test]
    fn every_cpu_has_a_queue_with_an_interrupt_of_its_own() {
        let file = File::new("queues", &[0x11; 8192]);
        let (mut driver, blk) = driver(&file, false);
        let with = |cpus| Blk::new(blk.disk().try_clone().unwrap(), "", cpus);
        assert_eq!((with(1).queue_sizes().len(), with(1).features() & MQ), (1, 0));
        assert_eq!(with(1000).queue_sizes().len(), 64);
        assert_ne!(blk.features() & MQ, 0);
        assert_eq!(driver.read::<2>(0x2000 + 34), 2_u16.to_le_bytes(), "num_queues");
        for (queue, msi) in [(1, 0x32), (0, 0x31)] {
            header(&driver, request::IN, 1);
            let chain = [(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)];
            assert_eq!(driver.request(queue, &chain), 513);
            while driver.sink.is_empty() {
                std::thread::yield_now();
            }
            let sent: Vec<u32> = driver.sink.take().iter().map(|msi| msi.data).collect();
            assert_eq!(sent, [msi], "queue {queue}");
        }
    }

    #[test]
    fn a_full_queue_lets_the_others_have_their_turn() {
        let file = File::new("turns", &[0x11; 8192]);
        let (mut driver, _) = driver(&file, false);
        driver.pci.quiesce();
        header(&driver, request::IN, 0);
        let chain = [(HEADER, 16, false), (BUFFER, 512, true), (STATUS, 1, true)];
        // One chain, 32 times.
        driver.make(0, &chain);
        for _ in 1..SIZE {
            driver.put_available(0, 0);
        }
        driver.make(1, &chain);
        let mut common = driver.pci.common.lock().unwrap();
        let Work::Held(queues) = &mut common.work else {
            panic!("the device stands still");
        };
        let (signal, mut order) = (Signal::new().unwrap(), Vec::new());
        VirtQueue::drain_all(queues, &signal, |_, _| {
            order.push((driver.used(0), driver.used(1)));
            Ok(1)
        })
        .unwrap();
        assert_eq!(order.len(), usize::from(SIZE) + 1);
        assert_eq!((order[8], order[9]), ((8, 0), (8, 1)));
    }

    #[test]
    fn a_malformed_chain_asks_for_a_reset_after_which_the_device_works() {
        let file = File::new("reset", &[0; 4096]);
        let loops: [&dyn Fn(&Driver); 5] = [
            // A loop, a buffer outside RAM, a successor outside the table, no status, a write before a read.
            &|driver| driver.descriptor(0, 0, HEADER, 16, NEXT, 0),
            &|driver| driver.descriptor(0, 0, RAM - 8, 16, WRITE, 0),
            &|driver| driver.descriptor(0, 0, HEADER, 16, NEXT, 500),
            &|driver| driver.descriptor(0, 0, HEADER, 16, 0, 0),
            &|driver| {
                driver.descriptor(0, 0, HEADER, 16, NEXT | WRITE, 1);
                driver.descriptor(0, 1, HEADER, 16, 0, 0);
            },
        ];
        let (mut driver, blk) = driver(&file, false);
        for malform in loops {
            malform(&driver);
            driver.offer(0, 0);
            driver.sink.wait(|| driver.status() & 64 != 0);
            assert!(
                driver.sink.take().iter().any(|msi| msi.data == 0x30),
                "a configuration interrupt"
            );
            driver.start(blk.features());
            assert_eq!(submit(&mut driver, request::IN, 0, &[(BUFFER, 512, true)]), (0, 513));
        }
        driver.available[0] += SIZE + 5;
        driver.offer(0, 0);
        driver.sink.wait(|| driver.status() & 64 != 0);
    }

    #[test]
    fn random_descriptors_neither_panic_nor_hang() {
        let file = File::new("random", &[0; 1 << 16]);
        for seed in 0..60 {
            let mut random = Random::new(seed);
            let (mut driver, blk) = driver(&file, false);
            for _ in 0..20 {
                for index in 0..SIZE {
                    let wild = random.below(8) == 0;
                    let gpa = if wild {
                        random.next()
                    } else {
                        DATA + random.below(RAM - DATA)
                    };
                    let length = if wild {
                        random.next() as u32
                    } else {
                        random.below(2048) as u32
                    };
                    let flags = random.below(8) as u16 & if random.below(4) == 0 { 7 } else { 3 };
                    let next = random.below(u64::from(SIZE) + 2) as u16;
                    driver.descriptor(0, index, gpa, length, flags, next);
                    let kind = random.below(16) as u32;
                    driver.put(DATA + random.below(0x8000), &kind.to_le_bytes());
                }
                for _ in 0..random.below(4) {
                    driver.offer(0, random.below(u64::from(SIZE) + 1) as u16);
                }
                if driver.status() & 64 != 0 || random.below(6) == 0 {
                    driver.start(blk.features());
                }
            }
            // Whatever came before, after a reset it works.
            driver.start(blk.features());
            assert_eq!(submit(&mut driver, request::IN, 0, &[(BUFFER, 512, true)]).0, 0);
        }
        assert_eq!(std::fs::metadata(&file.0).unwrap().len(), 1 << 16);
    }
}
