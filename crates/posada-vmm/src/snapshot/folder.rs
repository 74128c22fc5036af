//! A folder that is there whole or not at all: filled under another name beside its place, made durable, then renamed.

use super::Error;
use std::ffi::CString;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// By this file a folder is known as a snapshot.
pub(super) const MANIFEST: &str = "manifest.json";

/// A folder in the making, `.NAME.partial` beside NAME. Dropped before [`Partial::commit`], it goes. What a killed process
/// has left is removed by the next save to the same place, which knows it by its lock being free.
pub(super) struct Partial {
    place: PathBuf,
    parent: PathBuf,
    path: PathBuf,
    /// The folder itself, locked.
    folder: File,
    replace: bool,
    done: bool,
}

impl Partial {
    /// Begins a folder for `place`, where nothing may be yet, or with `replace` a snapshot.
    pub(super) fn new(place: &Path, replace: bool) -> Result<Self, Error> {
        let refuse = |source| Error::Create {
            path: place.into(),
            source,
        };
        let Some(name) = place.file_name() else {
            return Err(refuse(io::ErrorKind::InvalidInput.into()));
        };
        let parent = match place.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
            _ => PathBuf::from("."),
        };
        match (fs::symlink_metadata(place), replace) {
            (Err(error), _) if error.kind() == io::ErrorKind::NotFound => {}
            (Err(error), _) => return Err(refuse(error)),
            (Ok(_), false) => return Err(Error::Exists { path: place.into() }),
            (Ok(there), true) => {
                // Whatever else is there was not made by us and is not ours to remove.
                if !there.is_dir() || !is_ours(place).map_err(refuse)? {
                    return Err(Error::Foreign { path: place.into() });
                }
            }
        }
        let mut partial = std::ffi::OsString::from(".");
        partial.push(name);
        partial.push(".partial");
        let path = parent.join(partial);
        let folder = loop {
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(refuse(error)),
            }
            let folder = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
                .open(&path)
                .map_err(refuse)?;
            match folder.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Err(Error::Busy { path: place.into() }),
                Err(fs::TryLockError::Error(error)) => return Err(refuse(error)),
            }
            // A save that has just ended may have taken it away between the two steps.
            match fs::metadata(&path) {
                Ok(there) if there.ino() != folder.metadata().map_err(refuse)?.ino() => continue,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(refuse(error)),
            }
            if fs::read_dir(&path).map_err(refuse)?.next().is_none() {
                break folder;
            }
            fs::remove_dir_all(&path).map_err(refuse)?;
        };
        Ok(Self {
            place: place.into(),
            parent,
            path,
            folder,
            replace,
            done: false,
        })
    }

    /// A new file in it, which only its user can read: guest RAM has secrets.
    pub(super) fn file(&self, name: &str) -> Result<File, Error> {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path.join(name))
            .map_err(self.writing(name))
    }

    /// What to say when writing the file `name` fails.
    pub(super) fn writing(&self, name: &str) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.place.join(name);
        move |source| Error::Write {
            path: path.clone(),
            source,
        }
    }

    /// Gives it its place, for good. Its files have reached the disk.
    pub(super) fn commit(mut self) -> Result<(), Error> {
        let refuse = self.writing("");
        self.folder.sync_all().map_err(&refuse)?;
        let flags = if self.replace && self.place.exists() {
            libc::RENAME_EXCHANGE
        } else {
            libc::RENAME_NOREPLACE
        };
        rename(&self.path, &self.place, flags).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Error::Exists {
                path: self.place.clone(),
            },
            _ => refuse(error),
        })?;
        self.done = flags == libc::RENAME_NOREPLACE;
        // In an exchange the old one is under the partial name now, and goes with this value.
        File::open(&self.parent)
            .and_then(|parent| parent.sync_all())
            .map_err(refuse)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.done
            && let Err(error) = fs::remove_dir_all(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a partial snapshot");
        }
    }
}

/// True for a snapshot, and for a folder with nothing in it.
fn is_ours(place: &Path) -> io::Result<bool> {
    Ok(place.join(MANIFEST).try_exists()? || fs::read_dir(place)?.next().is_none())
}

fn rename(from: &Path, to: &Path, flags: libc::c_uint) -> io::Result<()> {
    let name = |path: &Path| CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other);
    let (from, to) = (name(from)?, name(to)?);
    // SAFETY: two strings with their zeroes.
    let renamed = unsafe { libc::renameat2(libc::AT_FDCWD, from.as_ptr(), libc::AT_FDCWD, to.as_ptr(), flags) };
    if renamed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;
    use std::io::Write;

    fn begin(dir: &TempDir, replace: bool) -> Result<Partial, Error> {
        Partial::new(&dir.path("snap"), replace)
    }

    fn put(partial: &Partial, name: &str, text: &str) {
        partial.file(name).unwrap().write_all(text.as_bytes()).unwrap();
    }

    #[test]
    fn it_is_there_whole_or_not_at_all() {
        let dir = TempDir::new();
        let partial = begin(&dir, false).unwrap();
        put(&partial, MANIFEST, "1");
        assert_eq!(dir.names(), [".snap.partial"]);
        drop(partial);
        assert!(dir.names().is_empty());
        let partial = begin(&dir, false).unwrap();
        put(&partial, MANIFEST, "1");
        partial.commit().unwrap();
        assert_eq!(dir.names(), ["snap"]);
        assert!(matches!(begin(&dir, false), Err(Error::Exists { .. })));
    }

    #[test]
    fn a_snapshot_is_replaced_at_once_and_nothing_else_ever() {
        let dir = TempDir::new();
        for content in ["1", "2"] {
            let partial = begin(&dir, true).unwrap();
            put(&partial, MANIFEST, content);
            partial.commit().unwrap();
            assert_eq!(dir.names(), ["snap"]);
            assert_eq!(fs::read_to_string(dir.path("snap").join(MANIFEST)).unwrap(), content);
        }
        fs::remove_file(dir.path("snap").join(MANIFEST)).unwrap();
        fs::write(dir.path("snap").join("thesis"), "precious").unwrap();
        assert!(matches!(begin(&dir, true), Err(Error::Foreign { .. })));
        fs::remove_dir_all(dir.path("snap")).unwrap();
        dir.file("snap", b"precious");
        assert!(matches!(begin(&dir, true), Err(Error::Foreign { .. })));
    }

    #[test]
    fn what_appears_meanwhile_is_not_replaced() {
        let dir = TempDir::new();
        let partial = begin(&dir, false).unwrap();
        dir.file("snap", b"");
        assert!(matches!(partial.commit(), Err(Error::Exists { .. })));
        assert_eq!(dir.names(), ["snap"]);
    }

    #[test]
    fn one_saves_to_a_place_and_what_a_killed_one_left_goes() {
        let dir = TempDir::new();
        let first = begin(&dir, false).unwrap();
        put(&first, "memory", "half");
        assert!(matches!(begin(&dir, false), Err(Error::Busy { .. })));
        // The kernel drops a killed process's lock and leaves its files.
        first.folder.unlock().unwrap();
        std::mem::forget(first);
        let second = begin(&dir, false).unwrap();
        assert!(!dir.path(".snap.partial").join("memory").exists());
        second.commit().unwrap();
        assert_eq!(dir.names(), ["snap"]);
    }

    #[test]
    fn a_place_that_cannot_be_is_told() {
        let dir = TempDir::new();
        for place in [dir.path("no/snap"), "/".into(), dir.path("..")] {
            let refused = Partial::new(&place, false).map(drop).unwrap_err();
            assert!(
                matches!(refused, Error::Create { .. } | Error::Exists { .. }),
                "{refused}"
            );
        }
    }
}
