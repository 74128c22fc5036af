//! virtio-blk (virtio 1.2 section 5.2) over a raw disk. A flush is acknowledged only when the host has written everything;
//! discard and write-zeroes give space back. Requests are served in order by a thread of the device.

use super::disk::{Disk, SECTOR};
use super::worker::Worker;
use super::{Activation, Broken, Chain, Segments, VirtioDevice};
use posada_memory::GuestRam;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use super::disk::{Disk as BlkDisk, Error as DiskError, open_disk};

/// VIRTIO_BLK_F_*.
const SEG_MAX: u64 = 1 << 2;
const RO: u64 = 1 << 5;
const BLK_SIZE: u64 = 1 << 6;
const FLUSH: u64 = 1 << 9;
const TOPOLOGY: u64 = 1 << 10;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
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

struct Backend {
    disk: Disk,
    id: [u8; ID_LENGTH],
    counters: Counters,
}

/// The device.
pub struct Blk {
    backend: Arc<Backend>,
    worker: Mutex<Option<Worker>>,
}

impl Blk {
    /// A device for `disk`; the guest sees the first 20 bytes of `id` as its serial number.
    pub fn new(disk: Disk, id: &str) -> Arc<Self> {
        let mut bytes = [0; ID_LENGTH];
        bytes.iter_mut().zip(id.bytes()).for_each(|(to, from)| *to = from);
        Arc::new(Self {
            backend: Arc::new(Backend {
                disk,
                id: bytes,
                counters: Counters::default(),
            }),
            worker: Mutex::new(None),
        })
    }

    /// What it has done so far.
    pub fn counters(&self) -> BlkCounters {
        let counters = &self.backend.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        BlkCounters {
            requests: get(&counters.requests),
            read: get(&counters.read),
            written: get(&counters.written),
            discarded: get(&counters.discarded),
            flushes: get(&counters.flushes),
        }
    }
}

impl Backend {
    /// Serves one request; returns the bytes written into guest memory.
    fn serve(&self, ram: &GuestRam, mut chain: Chain) -> Result<u32, Broken> {
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
            request::GET_ID => return (Status::Ok, to_guest.write(ram, &self.id) as u64),
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
    fn id(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let common = SEG_MAX | BLK_SIZE | FLUSH | TOPOLOGY;
        common
            | if self.backend.disk.read_only() {
                RO
            } else {
                DISCARD | WRITE_ZEROES
            }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.backend.disk.size() / SECTOR).to_le_bytes());
        put(12, &SEGMENTS.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        // Topology: 8 sectors to a physical block of 4 KiB, which is also the best I/O size's unit.
        put(24, &[3, 0]);
        put(26, &8_u16.to_le_bytes());
        // Discard: sectors, ranges, alignment in sectors. Then write-zeroes: sectors, ranges, may unmap.
        put(36, &RANGE_SECTORS.to_le_bytes());
        put(40, &RANGES.to_le_bytes());
        put(44, &8_u32.to_le_bytes());
        put(48, &RANGE_SECTORS.to_le_bytes());
        put(52, &RANGES.to_le_bytes());
        put(56, &[1]);
        super::read_config(&config, offset, data);
    }

    fn activate(&self, activation: Activation) {
        let backend = Arc::clone(&self.backend);
        let worker = Worker::spawn("virtio-blk", activation, move |queues, signal| {
            queues[0].drain(signal, |ram, chain| backend.serve(ram, chain))
        });
        *self.worker.lock().unwrap() = Some(worker);
    }

    fn notify(&self, _queue: u16) {
        if let Some(worker) = &*self.worker.lock().unwrap() {
            worker.kick();
        }
    }

    fn reset(&self) {
        let worker = self.worker.lock().unwrap().take();
        drop(worker);
    }
}
