//! Compressed streams, recognized by their first bytes: gzip, Zstandard, or neither.

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::io::{self, BufRead, BufReader, Read};

const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const BUFFER: usize = 64 << 10;

/// The content of a stream that may be compressed.
pub(crate) fn decompress<'a>(stream: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut stream = BufReader::with_capacity(BUFFER, stream);
    let begin = stream.fill_buf()?;
    Ok(if begin.starts_with(GZIP) {
        Box::new(flate2::bufread::MultiGzDecoder::new(stream))
    } else if begin.starts_with(ZSTD) {
        Box::new(Zstd {
            source: stream,
            decoder: FrameDecoder::new(),
            in_frame: false,
        })
    } else {
        Box::new(stream)
    })
}

/// A Zstandard stream: any number of frames, and others to be skipped (RFC 8878, 3.1).
struct Zstd<R: BufRead> {
    source: R,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl<R: BufRead> Zstd<R> {
    /// Goes to the next frame; false at the end of the stream.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.source.fill_buf()?.is_empty() {
            match self.decoder.init(&mut self.source) {
                Ok(()) => return Ok(true),
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                    io::copy(&mut (&mut self.source).take(length.into()), &mut io::sink())?;
                }
                Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
            }
        }
        Ok(false)
    }
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while !bytes.is_empty() {
            if !self.in_frame {
                self.in_frame = self.next_frame()?;
                if !self.in_frame {
                    break;
                }
            }
            while self.decoder.can_collect() < bytes.len() && !self.decoder.is_finished() {
                let enough = BlockDecodingStrategy::UptoBytes(bytes.len() - self.decoder.can_collect());
                self.decoder
                    .decode_blocks(&mut self.source, enough)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            }
            let count = self.decoder.read(bytes)?;
            if count > 0 {
                return Ok(count);
            }
            self.in_frame = false;
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ruzstd::encoding::{CompressionLevel, compress_to_vec};
    use std::io::Write;

    fn content(stream: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(stream)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn all_kinds_are_recognized() {
        let text = b"some text, some text, some text".repeat(9000);
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let gzip = gzip.finish().unwrap();
        let zstd = compress_to_vec(&text[..], CompressionLevel::Fastest);
        let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        for stream in [&text, &gzip, &zstd] {
            assert!(content(stream).unwrap() == text);
        }
        let twice = text.repeat(2);
        assert!(content(&[&gzip[..], &gzip].concat()).unwrap() == twice);
        assert!(content(&[&zstd[..], &skipped, &zstd, &skipped].concat()).unwrap() == twice);
        assert_eq!(content(b"").unwrap(), b"");
        for stream in [&gzip, &zstd] {
            assert!(content(&stream[..stream.len() / 2]).is_err());
        }
    }
}
