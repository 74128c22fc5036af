//! Blobs on their way into the store: hashed as they come, zeroes left as holes.

use crate::digest::Hasher;
use crate::layout::{Layout, persist};
use crate::manifest::Blob;
use crate::progress::{Progress, Step, go_on};
use crate::{Digest, Error};
use rustix::fs::SeekFrom;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes: zeroes in less are written like other data. A page of most file systems.
const HOLE: usize = 4096;
/// Bytes read at once.
const BUFFER: usize = 1 << 20;

/// A file of the store in the making. Dropped before [`BlobWriter::finish`], it leaves nothing.
pub struct BlobWriter {
    layout: Layout,
    temporary: tempfile::NamedTempFile,
    hasher: Hasher,
    length: u64,
}

impl BlobWriter {
    pub(crate) fn new(layout: &Layout) -> Result<Self, Error> {
        Ok(Self {
            layout: layout.clone(),
            temporary: layout.temporary()?,
            hasher: Hasher::default(),
            length: 0,
        })
    }

    /// Appends zeroes, which take no space.
    pub fn zeroes(&mut self, count: u64) {
        self.hasher.zeroes(count);
        self.length += count;
    }

    /// Puts the file into the store, durably.
    ///
    /// # Errors
    /// [`Error::Digest`] if it is not `expected`; and what the host says.
    pub fn finish(self, expected: Option<Digest>) -> Result<Blob, Error> {
        let digest = self.hasher.finish();
        if let Some(expected) = expected.filter(|expected| *expected != digest) {
            return Err(Error::Digest {
                what: "what was read for the store".into(),
                expected,
                actual: digest,
                help: "get it anew",
            });
        }
        let file = self.temporary.as_file();
        file.set_len(self.length)
            .map_err(Error::io("write", self.temporary.path()))?;
        keep(&self.layout, self.temporary, digest, self.length)
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut rest = bytes;
        // Neighbouring pieces that are data go to the file in one call.
        let (mut data, mut data_at) = (&bytes[..0], self.length);
        let mut at = self.length;
        while !rest.is_empty() {
            let piece = rest.len().min(HOLE - (at % HOLE as u64) as usize);
            let zero = piece == HOLE && rest[..piece] == [0; HOLE];
            let begin = bytes.len() - rest.len();
            if zero {
                self.temporary.as_file().write_all_at(data, data_at)?;
                data = &[];
            } else if data.is_empty() {
                (data, data_at) = (&bytes[begin..begin + piece], at);
            } else {
                let first = (data_at - self.length) as usize;
                data = &bytes[first..begin + piece];
            }
            rest = &rest[piece..];
            at += piece as u64;
        }
        self.temporary.as_file().write_all_at(data, data_at)?;
        self.hasher.update(bytes);
        self.length = at;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Puts a file that lies complete in `tmp` into the store.
pub(crate) fn adopt(
    layout: &Layout,
    temporary: tempfile::NamedTempFile,
    progress: &dyn Progress,
) -> Result<Blob, Error> {
    let (digest, length) = hash(temporary.as_file(), temporary.path(), progress)?;
    keep(layout, temporary, digest, length)
}

fn keep(layout: &Layout, temporary: tempfile::NamedTempFile, digest: Digest, size: u64) -> Result<Blob, Error> {
    let path = layout.blobs().join(digest.hex());
    // One that is there may be in use: VMs share its pages only as long as all use the same file.
    if std::fs::metadata(&path).map(|there| there.len()).ok() != Some(size) {
        persist(temporary, &path)?;
    }
    Ok(Blob { digest, size })
}

/// Hands the content of a file to `data`, and to `hole` what surely is zeroes, from its begin to its end.
pub(crate) fn scan<T>(
    file: &File,
    path: &Path,
    step: Step,
    progress: &dyn Progress,
    sink: &mut T,
    mut data: impl FnMut(&mut T, &[u8]) -> Result<(), Error>,
    mut hole: impl FnMut(&mut T, u64) -> Result<(), Error>,
) -> Result<u64, Error> {
    // Of a block device, too.
    let size = rustix::fs::seek(file, SeekFrom::End(0)).map_err(|error| Error::io("read", path)(error.into()))?;
    let mut buffer = vec![0; BUFFER];
    let mut at = 0;
    while at < size {
        let begin = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(begin) => begin.min(size),
            Err(rustix::io::Errno::NXIO) => size,
            // It cannot tell.
            Err(_) => at,
        };
        if begin > at {
            hole(sink, begin - at)?;
            at = begin;
            continue;
        }
        let end = match rustix::fs::seek(file, SeekFrom::Hole(at)) {
            Ok(end) if end > at => end.min(size),
            _ => size,
        };
        while at < end {
            go_on(progress)?;
            let part = (end - at).min(BUFFER as u64) as usize;
            file.read_exact_at(&mut buffer[..part], at)
                .map_err(Error::io("read", path))?;
            data(sink, &buffer[..part])?;
            at += part as u64;
            progress.update(step, at, Some(size));
        }
    }
    Ok(size)
}

/// Digest and length of a file.
pub(crate) fn hash(file: &File, path: &Path, progress: &dyn Progress) -> Result<(Digest, u64), Error> {
    let mut hasher = Hasher::default();
    let length = scan(
        file,
        path,
        Step::Check,
        progress,
        &mut hasher,
        |hasher, bytes| {
            hasher.update(bytes);
            Ok(())
        },
        |hasher, count| {
            hasher.zeroes(count);
            Ok(())
        },
    )?;
    Ok((hasher.finish(), length))
}

/// Copies a whole stream into a blob.
pub(crate) fn copy(
    from: &mut dyn Read,
    to: &mut BlobWriter,
    what: &Path,
    progress: &dyn Progress,
) -> Result<(), Error> {
    let mut buffer = vec![0; BUFFER];
    loop {
        go_on(progress)?;
        // Full, however little a read brings: then zeroes come in whole pages.
        let mut filled = 0;
        while filled < BUFFER {
            match from.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => go_on(progress)?,
                Err(error) => return Err(Error::io("read", what)(error)),
            }
        }
        if filled == 0 {
            return Ok(());
        }
        to.write_all(&buffer[..filled])
            .map_err(Error::io("write", to.temporary.path()))?;
        progress.update(Step::Copy, to.length, None);
    }
}
