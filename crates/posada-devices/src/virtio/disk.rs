//! The file behind a virtio-blk device: opened under a lock, read and written straight to and from guest RAM.

use super::Segments;
use posada_memory::GuestRam;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bytes of a sector: the unit of all requests.
pub const SECTOR: u64 = 512;

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be opened.
    #[error("cannot open the disk {}: {source}", path.display())]
    Open {
        /// The disk.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Another process holds it.
    #[error("the disk {} is in use by another VM; stop that VM, or share the disk read-only (,ro) in both", path.display())]
    Locked {
        /// The disk.
        path: PathBuf,
    },
    /// It cannot be locked at all.
    #[error("cannot lock the disk {}: {source}", path.display())]
    Lock {
        /// The disk.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Not a file or block device.
    #[error("the disk {} is neither a file nor a block device", path.display())]
    Kind {
        /// The disk.
        path: PathBuf,
    },
    /// Nothing in it.
    #[error("the disk {} is empty; give it a size first, for example with truncate -s 1G", path.display())]
    Empty {
        /// The disk.
        path: PathBuf,
    },
}

/// A raw disk image or block device, locked for as long as the value lives: exclusively, or shared when read-only. The
/// kernel lets go of the lock however the process ends.
#[derive(Debug)]
pub struct Disk {
    file: File,
    path: PathBuf,
    read_only: bool,
    /// Bytes; the last sector may reach beyond the file, and reads zeroes there.
    size: u64,
}

/// Opens and locks a raw disk.
///
/// # Errors
/// [`Error`] says what to do.
pub fn open_disk(path: &Path, read_only: bool) -> Result<Disk, Error> {
    use std::os::unix::fs::FileTypeExt;
    let refuse = |source| Error::Open {
        path: path.into(),
        source,
    };
    let kind = std::fs::metadata(path).map_err(refuse)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::Kind { path: path.into() });
    }
    let mut file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(refuse)?;
    let locked = if read_only {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => Error::Locked { path: path.into() },
        TryLockError::Error(source) => Error::Lock {
            path: path.into(),
            source,
        },
    })?;
    let size = file.seek(SeekFrom::End(0)).map_err(refuse)?;
    if size == 0 {
        return Err(Error::Empty { path: path.into() });
    }
    Ok(Disk {
        file,
        path: path.into(),
        read_only,
        size: size.next_multiple_of(SECTOR),
    })
}

/// Which file a disk is on its host, and when it was last written to: a snapshot belongs to this content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskIdentity {
    /// The host's device number of its file system, or of `/dev`.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// Last modification, seconds since 1970.
    pub modified_seconds: i64,
    /// And nanoseconds.
    pub modified_nanoseconds: u32,
}

#[derive(Clone, Copy)]
enum Direction {
    /// From the disk into RAM.
    In,
    /// From RAM to the disk.
    Out,
}

impl Disk {
    /// A second handle on the same disk and its lock, for a device that takes the place of this one's.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            file: self.file.try_clone()?,
            path: self.path.clone(),
            ..*self
        })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file this is, and as of when.
    ///
    /// # Errors
    /// What the host says.
    pub fn identity(&self) -> io::Result<DiskIdentity> {
        let metadata = self.file.metadata()?;
        Ok(DiskIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            modified_seconds: metadata.mtime(),
            modified_nanoseconds: metadata.mtime_nsec() as u32,
        })
    }

    /// True if writes are refused.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Bytes, whole sectors.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `segments` from byte `offset` on. Returns the bytes read: all, or none.
    pub(super) fn read(&self, ram: &GuestRam, segments: &Segments, offset: u64) -> io::Result<()> {
        self.transfer(ram, segments, offset, Direction::In)
    }

    /// Writes `segments` to byte `offset` on.
    pub(super) fn write(&self, ram: &GuestRam, segments: &Segments, offset: u64) -> io::Result<()> {
        self.transfer(ram, segments, offset, Direction::Out)
    }

    fn transfer(&self, ram: &GuestRam, segments: &Segments, offset: u64, direction: Direction) -> io::Result<()> {
        /// Buffers a call, well below the kernel's 1024.
        const BATCH: usize = 128;
        let mut segments = segments.clone();
        let mut offset = offset;
        while segments.length() > 0 {
            let buffers: Vec<libc::iovec> = segments
                .iter()
                .take(BATCH)
                .map(|(gpa, length)| {
                    let host = ram.host(gpa, length.into()).ok_or(io::ErrorKind::InvalidInput)?;
                    Ok(libc::iovec {
                        iov_base: host.cast(),
                        iov_len: length as usize,
                    })
                })
                .collect::<io::Result<_>>()?;
            let (file, count) = (self.file.as_raw_fd(), buffers.len() as libc::c_int);
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let moved = match direction {
                // SAFETY: every buffer is a range of guest RAM's mapping, which outlives the call; guest RAM is only
                // ever accessed through raw pointers, so the kernel may write it at any time.
                Direction::In => unsafe { libc::preadv(file, buffers.as_ptr(), count, at) },
                // SAFETY: as above.
                Direction::Out => unsafe { libc::pwritev(file, buffers.as_ptr(), count, at) },
            };
            let Ok(moved) = u64::try_from(moved) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            match direction {
                Direction::In if moved == 0 => {
                    // Behind the end of a file that does not fill its last sector.
                    let zeroes = [0; SECTOR as usize];
                    while segments.length() > 0 {
                        segments.write(ram, &zeroes);
                    }
                }
                Direction::In => {
                    for (gpa, length) in segments.take(moved).iter() {
                        ram.code().written(gpa, length.into());
                    }
                }
                Direction::Out if moved == 0 => return Err(io::ErrorKind::WriteZero.into()),
                Direction::Out => drop(segments.take(moved)),
            }
            offset += moved;
        }
        Ok(())
    }

    /// Makes all writes so far durable.
    ///
    /// # Errors
    /// What the host says; nothing is known of the writes then.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Frees the space of a range, which reads as zeroes after where the host can do that.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, length) {
            // A hint: to keep the space is allowed.
            Err(error) if unsupported(&error) => Ok(()),
            result => result,
        }
    }

    /// Zeroes a range; `unmap` frees its space too.
    pub(super) fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let how = if unmap {
            libc::FALLOC_FL_PUNCH_HOLE
        } else {
            libc::FALLOC_FL_ZERO_RANGE
        };
        match self.fallocate(how | libc::FALLOC_FL_KEEP_SIZE, offset, length) {
            Err(error) if unsupported(&error) => self.zero_by_hand(offset, length),
            result => result,
        }
    }

    fn zero_by_hand(&self, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut file = &self.file;
        file.seek(SeekFrom::Start(offset))?;
        let mut left = length;
        while left > 0 {
            let part = left.min(ZEROES.len() as u64);
            file.write_all(&ZEROES[..part as usize])?;
            left -= part;
        }
        Ok(())
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, length: u64) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let range = (libc::off_t::try_from(offset), libc::off_t::try_from(length));
        let (Ok(offset), Ok(length)) = range else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        loop {
            // SAFETY: the call takes no pointers.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, length) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

/// For who copies the disk while no device uses it.
impl AsFd for Disk {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_in_use_is_refused_and_read_only_use_is_shared() {
        let path = std::env::temp_dir().join(format!("posada-lock-{}", std::process::id()));
        std::fs::write(&path, [1; 700]).unwrap();
        let disk = open_disk(&path, false).unwrap();
        assert_eq!(disk.size(), 1024);
        for read_only in [false, true] {
            let error = open_disk(&path, read_only).unwrap_err();
            assert!(error.to_string().contains("is in use by another VM"), "{error}");
        }
        drop(disk);
        let first = open_disk(&path, true).unwrap();
        let second = open_disk(&path, true).unwrap();
        assert!(matches!(open_disk(&path, false), Err(Error::Locked { .. })));
        drop((first, second));
        std::fs::write(&path, []).unwrap();
        assert!(matches!(open_disk(&path, false), Err(Error::Empty { .. })));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(open_disk(&path, false), Err(Error::Open { .. })));
        assert!(matches!(open_disk(Path::new("/"), true), Err(Error::Kind { .. })));
    }
}
