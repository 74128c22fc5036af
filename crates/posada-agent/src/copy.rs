//! Files and folders, out of the guest and into it.

use crate::session::Refusal;
use posada_protocol::archive::{self, Trust};
use posada_protocol::{Answer, Channel, Failure, Frame, read_frame, write_data};
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

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
    let packed = archive::pack(path, &mut to_host);
    if to_host.failed {
        anyhow::bail!("the host takes no more of an archive");
    }
    Ok(packed
        .map(|()| Answer::Done)
        .map_err(|error| Refusal::of(format!("cannot read {}", path.display()), &error)))
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
    let unpacked = archive::unpack(&mut from_host, path, Trust::Full);
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
