//! What a layer needs of its file.

use rustix::fs::{FallocateFlags, fallocate};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// A file as a layer uses it: at offsets, from several threads.
pub trait Medium: Send + Sync {
    /// Fills `bytes`.
    ///
    /// # Errors
    /// What the host says; at the end of the file too.
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all `bytes`.
    ///
    /// # Errors
    /// What the host says.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Has a range within the file read as zeroes, and take no space if the host can do that.
    ///
    /// # Errors
    /// What the host says.
    fn punch(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// What the host says.
    fn sync(&self) -> io::Result<()>;
}

impl Medium for File {
    fn read_exact_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, bytes, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, bytes, offset)
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::io::retry_on_intr(|| fallocate(self, how, offset, length)) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                let mut at = offset;
                while at < offset + length {
                    let part = (offset + length - at).min(ZEROES.len() as u64);
                    FileExt::write_all_at(self, &ZEROES[..part as usize], at)?;
                    at += part;
                }
                Ok(())
            }
            result => Ok(result?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
