//! A map by which `perf report` names translated code: `/tmp/perf-PID.map`, a line for each block with its address, its size
//! and a name (linux, tools/perf/Documentation/jit-interface.txt).

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::{fs, process};

/// The map of this process. Code that made room for other is still in it, as perf knows no other way.
#[derive(Debug)]
pub struct PerfMap {
    file: Mutex<File>,
}

impl PerfMap {
    /// Begins an empty map.
    ///
    /// # Errors
    /// It cannot be made anew, so that nobody else could have put it there.
    pub fn create() -> io::Result<Self> {
        let path = Self::path();
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
        Ok(Self { file: Mutex::new(file) })
    }

    /// Where perf looks for it.
    pub fn path() -> PathBuf {
        PathBuf::from(format!("/tmp/perf-{}.map", process::id()))
    }

    /// Names `size` bytes of code at `address`, which were made from a guest's code at `rip`. What cannot be written is left
    /// out: the map is there for people who measure.
    pub(super) fn name(&self, address: u64, size: usize, rip: u64, user: bool) {
        let mode = if user { "user" } else { "kernel" };
        let line = format!("{address:x} {size:x} guest_{mode}_{rip:x}\n");
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = file.write_all(line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_named_and_an_old_map_goes() {
        let path = PerfMap::path();
        fs::write(&path, "old\n").unwrap();
        let map = PerfMap::create().unwrap();
        map.name(0x7000, 0x40, 0xffff_ffff_8100_0000, false);
        map.name(0x7040, 0x10, 0x40_1000, true);
        let text = fs::read_to_string(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(
            text,
            "7000 40 guest_kernel_ffffffff81000000\n7040 10 guest_user_401000\n"
        );
    }
}
