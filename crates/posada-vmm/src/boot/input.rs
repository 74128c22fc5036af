//! A kernel or initramfs: opened once, so that a reset of the VM boots what the start has booted.

use super::Error;
use posada_memory::GuestRam;
use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use vm_memory::{Bytes, GuestAddress};

/// Bytes read at a time.
pub(super) const CHUNK: usize = 64 << 10;

/// An open regular file.
#[derive(Debug)]
pub struct Input {
    what: &'static str,
    path: PathBuf,
    file: File,
    size: u64,
}

impl Input {
    /// Opens `path`, called `what` in errors.
    ///
    /// # Errors
    /// [`Error::Open`], [`Error::Kind`] and [`Error::Empty`].
    pub fn open(what: &'static str, path: &Path) -> Result<Self, Error> {
        let refuse = |source| Error::Open {
            what,
            path: path.into(),
            source,
        };
        // Looked at first: to open a pipe would block.
        if !std::fs::metadata(path).map_err(refuse)?.is_file() {
            return Err(Error::Kind {
                what,
                path: path.into(),
            });
        }
        let file = File::open(path).map_err(refuse)?;
        let size = file.metadata().map_err(refuse)?.len();
        if size == 0 {
            return Err(Error::Empty {
                what,
                path: path.into(),
            });
        }
        Ok(Self {
            what,
            path: path.into(),
            file,
            size,
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes it had when opened.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from byte `at` on as far as the file goes; returns how far.
    pub(crate) fn read_at(&self, buffer: &mut [u8], at: u64) -> Result<usize, Error> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], at + done as u64) {
                Ok(0) => break,
                Ok(length) => done += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(self.read_error(source)),
            }
        }
        Ok(done)
    }

    /// A stream of a part of the file.
    pub(super) fn reader(&self, range: Range<u64>) -> Part<'_> {
        Part { input: self, range }
    }

    /// Copies `length` bytes from `offset` to `gpa`.
    pub(super) fn copy_to(&self, ram: &GuestRam, offset: u64, gpa: u64, length: u64) -> Result<(), Error> {
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < length {
            let part = (length - done).min(CHUNK as u64) as usize;
            if self.read_at(&mut buffer[..part], offset + done)? != part {
                return Err(self.read_error(io::ErrorKind::UnexpectedEof.into()));
            }
            ram.memory()
                .write_slice(&buffer[..part], GuestAddress(gpa + done))
                .map_err(|error| self.read_error(io::Error::other(error)))?;
            done += part as u64;
        }
        Ok(())
    }

    pub(super) fn read_error(&self, source: io::Error) -> Error {
        Error::Read {
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }

    pub(crate) fn truncated(&self) -> Error {
        Error::Truncated {
            path: self.path.clone(),
        }
    }
}

/// [`Input::reader`].
#[derive(Debug)]
pub(super) struct Part<'a> {
    input: &'a Input,
    range: Range<u64>,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.range.end.saturating_sub(self.range.start).min(buffer.len() as u64);
        let length = self
            .input
            .file
            .read_at(&mut buffer[..left as usize], self.range.start)?;
        self.range.start += length as u64;
        Ok(length)
    }
}
