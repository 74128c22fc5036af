//! Frames: a length (4 bytes, little-endian, of what follows the header), a kind (1 byte), and so many bytes.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, Read, Write};

/// Bytes of a header.
pub const HEADER: usize = 5;
/// The most bytes behind a header.
pub const MOST: usize = 256 << 10;

const MESSAGE: u8 = 0;

/// Which stream bytes belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// To the agent: a program's standard input, or an archive. No bytes are its end.
    Input = 1,
    /// From the agent: standard output, or an archive.
    Output = 2,
    /// From the agent: standard error.
    Errors = 3,
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// JSON.
    Message(Vec<u8>),
    /// Bytes of a stream.
    Data(Channel, Vec<u8>),
}

/// Why bytes are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MOST`].
    #[error("a frame of {0} bytes is longer than the most, {MOST}")]
    TooLong(usize),
    /// Of no known kind.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// A message that says nothing that could be meant here.
    #[error("a message that makes no sense here: {0}")]
    Message(#[from] serde_json::Error),
    /// The stream ended within a frame, or failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl Frame {
    fn new(kind: u8, bytes: Vec<u8>) -> Result<Self, FrameError> {
        let channel = match kind {
            MESSAGE => return Ok(Self::Message(bytes)),
            1 => Channel::Input,
            2 => Channel::Output,
            3 => Channel::Errors,
            _ => return Err(FrameError::Kind(kind)),
        };
        Ok(Self::Data(channel, bytes))
    }

    /// Reads a message as what it must be here.
    ///
    /// # Errors
    /// [`FrameError::Message`], for data too.
    pub fn message<M: DeserializeOwned>(&self) -> Result<M, FrameError> {
        let text = match self {
            Self::Message(text) => text,
            Self::Data(..) => return Err(FrameError::Message(serde::de::Error::custom("data"))),
        };
        Ok(serde_json::from_slice(text)?)
    }
}

/// Length and kind.
fn parse(header: [u8; HEADER]) -> Result<(usize, u8), FrameError> {
    let length = u32::from_le_bytes(header[..4].try_into().expect("4 bytes")) as usize;
    if length > MOST {
        return Err(FrameError::TooLong(length));
    }
    Ok((length, header[4]))
}

/// Finds frames in bytes that come in any pieces. Holds less than a frame beside what was pushed last.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
}

impl Decoder {
    /// More bytes. Take all frames out before the next ones.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole frame.
    ///
    /// # Errors
    /// [`FrameError`]: nothing that follows can be understood.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some((header, rest)) = self.bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let (length, kind) = parse(*header)?;
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let frame = Frame::new(kind, body.to_vec())?;
        self.bytes.drain(..HEADER + length);
        Ok(Some(frame))
    }
}

/// Waits for the next frame; `None` at the end of the stream. Memory grows only with the bytes that really come.
///
/// # Errors
/// [`FrameError`].
pub fn read_frame(reader: &mut impl Read) -> Result<Option<Frame>, FrameError> {
    let mut header = [0; HEADER];
    let mut have = 0;
    while have < HEADER {
        match reader.read(&mut header[have..]) {
            Ok(0) if have == 0 => return Ok(None),
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => have += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    let (length, kind) = parse(header)?;
    let mut bytes = Vec::new();
    reader.take(length as u64).read_to_end(&mut bytes)?;
    if bytes.len() < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Frame::new(kind, bytes).map(Some)
}

fn write_frame(writer: &mut impl Write, kind: u8, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() > MOST {
        let text = format!("{} bytes are more than a frame may have, {MOST}", bytes.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut frame = Vec::with_capacity(HEADER + bytes.len());
    frame.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    frame.push(kind);
    frame.extend_from_slice(bytes);
    writer.write_all(&frame)
}

/// Writes a message.
///
/// # Errors
/// The writer's, or `InvalidInput` for one that is longer than [`MOST`].
pub fn write_message(writer: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    write_frame(writer, MESSAGE, &serde_json::to_vec(message)?)
}

/// Writes bytes of a stream, at most [`MOST`].
///
/// # Errors
/// The writer's, or `InvalidInput` for more.
pub fn write_data(writer: &mut impl Write, channel: Channel, bytes: &[u8]) -> io::Result<()> {
    write_frame(writer, channel as u8, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> (Vec<u8>, Vec<Frame>) {
        let mut bytes = Vec::new();
        write_message(&mut bytes, &"hello").unwrap();
        write_data(&mut bytes, Channel::Output, &[7; 1000]).unwrap();
        write_data(&mut bytes, Channel::Input, &[]).unwrap();
        write_data(&mut bytes, Channel::Errors, &vec![8; MOST]).unwrap();
        let frames = vec![
            Frame::Message(b"\"hello\"".to_vec()),
            Frame::Data(Channel::Output, vec![7; 1000]),
            Frame::Data(Channel::Input, vec![]),
            Frame::Data(Channel::Errors, vec![8; MOST]),
        ];
        (bytes, frames)
    }

    #[test]
    fn frames_come_out_whole_whatever_the_pieces() {
        let (bytes, frames) = stream();
        for piece in [1, 2, 3, 7, 100, 5000, bytes.len()] {
            let (mut decoder, mut got) = (Decoder::default(), Vec::new());
            for part in bytes.chunks(piece) {
                decoder.push(part);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(frame);
                }
                assert!(decoder.bytes.len() < HEADER + MOST);
            }
            assert!(got == frames, "pieces of {piece}");
        }
        let mut reader = &bytes[..];
        for frame in frames {
            assert!(read_frame(&mut reader).unwrap() == Some(frame));
        }
        assert!(read_frame(&mut reader).unwrap().is_none());
    }

    #[test]
    fn a_stream_that_ends_within_a_frame_is_an_error() {
        let (bytes, _) = stream();
        for end in [1, 4, 5, 6, 13] {
            let mut reader = &bytes[..end];
            let result = loop {
                match read_frame(&mut reader) {
                    Ok(Some(_)) => {}
                    other => break other,
                }
            };
            assert!(matches!(result, Err(FrameError::Io(_))), "{end}");
        }
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_comes() {
        let mut header = ((MOST + 1) as u32).to_le_bytes().to_vec();
        header.push(MESSAGE);
        let mut decoder = Decoder::default();
        decoder.push(&header);
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong(length)) if length == MOST + 1));
        assert!(matches!(read_frame(&mut &header[..]), Err(FrameError::TooLong(_))));
        assert!(write_data(&mut Vec::new(), Channel::Input, &vec![0; MOST + 1]).is_err());
        assert!(matches!(
            read_frame(&mut &[0, 0, 0, 0, 4][..]),
            Err(FrameError::Kind(4))
        ));
        let frame = Frame::Data(Channel::Input, b"1".to_vec());
        assert!(matches!(frame.message::<u8>(), Err(FrameError::Message(_))));
    }
}
