//! Files and folders as tar archives, out of the guest and into it. Nothing is ever whole in memory or on a disk in between.

use crate::session::Refusal;
use posada_protocol::{Answer, Channel, Failure, Frame, read_frame, write_data};
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use tar::{Archive, Builder, EntryType, Header, HeaderMode};

/// Bytes of an archive in a frame.
const FRAME: usize = 64 << 10;

/// What could not be done, or done: the outer error is one of the connection.
type Done = anyhow::Result<Result<Answer, Refusal>>;

/// Sends the host's way what is written.
struct ToHost<'a> {
    stream: &'a mut File,
    failed: bool,
}

impl Write for ToHost<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(FRAME);
        let sent = write_data(&mut self.stream, Channel::Output, &bytes[..count]);
        self.failed |= sent.is_err();
        sent.map(|()| count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends what lies at `path`.
pub fn get(stream: &mut File, path: &str) -> Done {
    let path = Path::new(path);
    if !path.is_absolute() {
        return Ok(Err(Refusal::new(Failure::Invalid, "the path is not absolute")));
    }
    let mut to_host = ToHost { stream, failed: false };
    let packed = pack(&mut to_host, path);
    if to_host.failed {
        anyhow::bail!("the host takes no more of an archive");
    }
    Ok(packed
        .map(|()| Answer::Done)
        .map_err(|error| Refusal::of(format!("cannot read {}", path.display()), &error)))
}

fn pack(to_host: &mut ToHost<'_>, path: &Path) -> io::Result<()> {
    let metadata = fs::symlink_metadata(path)?;
    let mut builder = Builder::new(BufWriter::with_capacity(FRAME, to_host));
    // Of `/` and of what ends in `..` there is only the content.
    let name = path.file_name().map(PathBuf::from).unwrap_or_default();
    let mut left = vec![(path.to_path_buf(), name, metadata)];
    while let Some((path, name, metadata)) = left.pop() {
        if !name.as_os_str().is_empty() {
            append(&mut builder, &path, &name, &metadata)?;
        }
        if !metadata.is_dir() {
            continue;
        }
        for entry in fs::read_dir(&path)? {
            let entry = entry?;
            match entry.metadata() {
                Ok(metadata) => left.push((entry.path(), name.join(entry.file_name()), metadata)),
                // It was removed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    builder.into_inner()?.flush()
}

fn append(builder: &mut Builder<impl Write>, path: &Path, name: &Path, metadata: &Metadata) -> io::Result<()> {
    let mut header = Header::new_gnu();
    header.set_metadata_in_mode(metadata, HeaderMode::Complete);
    let kind = metadata.file_type();
    if kind.is_symlink() {
        header.set_size(0);
        return builder.append_link(&mut header, name, fs::read_link(path)?);
    }
    if kind.is_file() {
        let file = match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        // As many bytes as the header says, also of a file that changes meanwhile.
        let bytes = file.chain(io::repeat(0)).take(metadata.len());
        return builder.append_data(&mut header, name, bytes);
    }
    header.set_size(0);
    header.set_entry_type(match () {
        () if kind.is_dir() => EntryType::Directory,
        () if kind.is_fifo() => EntryType::Fifo,
        () if kind.is_char_device() => EntryType::Char,
        () if kind.is_block_device() => EntryType::Block,
        // A socket is of no use to another program.
        () => return Ok(()),
    });
    if kind.is_char_device() || kind.is_block_device() {
        header.set_device_major(rustix::fs::major(metadata.rdev()))?;
        header.set_device_minor(rustix::fs::minor(metadata.rdev()))?;
    }
    builder.append_data(&mut header, name, io::empty())
}

/// The archive that comes from the host.
struct FromHost<'a> {
    stream: &'a mut File,
    bytes: Vec<u8>,
    at: usize,
    ended: bool,
    /// It has gone, or breaks the rules.
    failed: bool,
}

impl Read for FromHost<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.at == self.bytes.len() && !self.ended {
            let Ok(Some(Frame::Data(Channel::Input, bytes))) = read_frame(self.stream) else {
                self.failed = true;
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            self.ended = bytes.is_empty();
            (self.bytes, self.at) = (bytes, 0);
        }
        let count = to.len().min(self.bytes.len() - self.at);
        to[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Unpacks what comes in `directory`.
pub fn put(stream: &mut File, directory: &str) -> Done {
    let path = Path::new(directory);
    if !path.is_absolute() || !path.is_dir() {
        let message = format!("there is no directory {directory}");
        return refused(stream, Refusal::new(Failure::NotFound, message));
    }
    let mut from_host = FromHost {
        stream,
        bytes: Vec::new(),
        at: 0,
        ended: false,
        failed: false,
    };
    let mut archive = Archive::new(&mut from_host);
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(rustix::process::geteuid().is_root());
    let unpacked = archive.unpack(path).and_then(|()| {
        // What follows an archive's end is filling.
        io::copy(&mut from_host, &mut io::sink()).map(drop)
    });
    if from_host.failed {
        anyhow::bail!("the host has not sent the whole archive");
    }
    match unpacked {
        Ok(()) => Ok(Ok(Answer::Done)),
        Err(error) => refused(stream, Refusal::of(format!("cannot unpack in {directory}"), &error)),
    }
}

/// Says why not, while the host still sends: what it has sent is read, so that the reason is not lost with it.
fn refused(stream: &mut File, refusal: Refusal) -> Done {
    posada_protocol::write_message(stream, &refusal.answer())?;
    // Not every socket can do this; then the host ends it.
    let _ = rustix::net::shutdown(&*stream, rustix::net::Shutdown::Write);
    io::copy(stream, &mut io::sink())?;
    anyhow::bail!("an archive was refused")
}
