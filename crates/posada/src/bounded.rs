//! The log of a process that nobody watches: its standard error is a file, which must not fill the disk.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes of all that a process may log.
const MOST: u64 = 1 << 20;
const LAST: &[u8] = b"posada: this log is full; what follows is left out\n";

static WRITTEN: AtomicU64 = AtomicU64::new(0);

/// Standard error, up to a limit.
pub struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let before = WRITTEN.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        io::stderr().write_all(part(before, bytes))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// What of `bytes` is written after `before` bytes: all, then one last line, then nothing.
fn part(before: u64, bytes: &[u8]) -> &[u8] {
    match before {
        MOST.. => b"",
        _ if before + bytes.len() as u64 >= MOST => LAST,
        _ => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_log_says_so_once() {
        let line = [b'x'; 1000];
        let (mut before, mut size, mut ends) = (0, 0, 0);
        for _ in 0..10_000 {
            let written = part(before, &line);
            before += line.len() as u64;
            size += written.len();
            ends += usize::from(written == LAST);
        }
        assert_eq!(ends, 1);
        assert!(size as u64 <= MOST);
    }
}
