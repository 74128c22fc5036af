//! Temporary folders.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// A new, empty folder that goes when dropped.
pub struct Folder(PathBuf);

impl Folder {
    /// Makes one below the host's folder for such.
    ///
    /// # Panics
    /// When the host refuses.
    #[expect(clippy::new_without_default, reason = "making a folder is no default")]
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("posada-tests-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap_or_else(|error| panic!("cannot make {}: {error}", path.display()));
        Self(path)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A new file in it.
    ///
    /// # Panics
    /// When the host refuses.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
        path
    }

    /// A new file of `length` bytes that takes no room on the disk.
    ///
    /// # Panics
    /// When the host refuses.
    pub fn sparse(&self, name: &str, length: u64) -> PathBuf {
        let path = self.file(name, b"");
        File::options()
            .write(true)
            .open(&path)
            .and_then(|file| file.set_len(length))
            .unwrap_or_else(|error| panic!("cannot extend {}: {error}", path.display()));
        path
    }

    /// The names in it, sorted.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn names(&self) -> Vec<OsString> {
        let mut names: Vec<_> = fs::read_dir(&self.0)
            .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", self.0.display()));
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_goes_with_its_files() {
        let folder = Folder::new();
        let path = folder.file("a", b"1");
        assert_eq!(fs::metadata(folder.sparse("b", 1 << 30)).unwrap().len(), 1 << 30);
        assert_eq!(folder.names(), ["a", "b"]);
        drop(folder);
        assert!(!path.exists() && !path.parent().unwrap().exists());
    }
}
