//! What lies where in a store's folder, and how files get there: whole or not at all.
//!
//! | path | |
//! |---|---|
//! | `posada-store` | says what the folder is, and its version |
//! | `blobs/sha256/<hex>` | kernels, initramfs and raw root disks, never changed; named by their SHA-256 |
//! | `images/<id>.json` | a [manifest](crate::manifest); the id is its SHA-256 |
//! | `names/<name>` | the id of the image of that name; `:`, `/` and `@` of the name are `%3a`, `%2f`, `%40` |
//! | `tmp/` | what is being written |
//! | `partial/<hex>` | downloads that were interrupted, to go on with |
//! | `quarantine/` | damaged files that a repair took away |
//! | `lock` | shared while somebody adds blobs, exclusive while garbage is collected |
//! | `names.lock` | exclusive while names and images change, which is short |
//!
//! Who uses an image holds a shared lock on its manifest. All locks are `flock`: the kernel lets go of them however a process
//! ends.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file that tells what the folder is.
pub(crate) const FORMAT: &str = "posada-store";
/// Version of this layout.
pub(crate) const VERSION: u32 = 1;
const FOLDERS: [&str; 7] = [
    "blobs",
    "blobs/sha256",
    "images",
    "names",
    "tmp",
    "partial",
    "quarantine",
];

#[derive(Serialize, Deserialize)]
struct Format {
    version: u32,
}

#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub root: PathBuf,
}

impl Layout {
    /// The store in `root`, made if there is nothing yet.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let layout = Self { root: root.into() };
        let format = root.join(FORMAT);
        match read_bounded(&format, 1024) {
            Ok(bytes) => {
                let Format { version } = serde_json::from_slice(&bytes)
                    .map_err(|error| Error::io("understand", &format)(io::Error::other(error)))?;
                if version != VERSION {
                    return Err(Error::Version {
                        path: root.into(),
                        version,
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => layout.create()?,
            Err(error) => return Err(Error::io("read", &format)(error)),
        }
        Ok(layout)
    }

    /// Two processes may do so at once: each step is fine with what it finds done, and the format comes last.
    fn create(&self) -> Result<(), Error> {
        fs::create_dir_all(&self.root).map_err(Error::io("make the image store", &self.root))?;
        for entry in entries(&self.root)? {
            let ours = |name: &str| FOLDERS.contains(&name) || name.ends_with("lock") || name == FORMAT;
            if !entry.to_str().is_some_and(ours) {
                return Err(Error::NotAStore {
                    path: self.root.clone(),
                });
            }
        }
        for folder in FOLDERS {
            let path = self.root.join(folder);
            match fs::create_dir(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(Error::io("make the folder", path)(error));
                }
                _ => {}
            }
        }
        let format = serde_json::to_vec(&Format { version: VERSION }).expect("a number");
        self.write_atomically(&self.root.join(FORMAT), &format)
    }

    pub fn blobs(&self) -> PathBuf {
        self.root.join("blobs/sha256")
    }

    pub fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    pub fn names(&self) -> PathBuf {
        self.root.join("names")
    }

    pub fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    pub fn partial(&self) -> PathBuf {
        self.root.join("partial")
    }

    pub fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    /// A file for `flock`, which works on a read-only file system if the file is there.
    pub fn lock_file(&self, name: &str) -> Result<File, Error> {
        let path = self.root.join(name);
        let writable = File::options().create(true).truncate(false).write(true).open(&path);
        match writable {
            Ok(file) => Ok(file),
            Err(refused) => File::open(&path).map_err(|_| Error::io("open", path)(refused)),
        }
    }

    /// A new file in `tmp`, which goes when the value is dropped.
    pub fn temporary(&self) -> Result<tempfile::NamedTempFile, Error> {
        tempfile::NamedTempFile::new_in(self.tmp()).map_err(Error::io("make a file in", self.tmp()))
    }

    /// Replaces a small file: after a crash it has the old content or the new.
    pub fn write_atomically(&self, path: &Path, content: &[u8]) -> Result<(), Error> {
        let mut temporary = self.temporary()?;
        temporary.write_all(content).map_err(Error::io("write", path))?;
        persist(temporary, path)
    }
}

/// Tries to lock; false: another process has it. A child that another thread of this process is about to start inherits locks
/// until its `exec`, so one that was just let go of may be held for a moment: too short to tell a user that it is in use.
pub(crate) fn take_lock(lock: impl Fn() -> Result<(), TryLockError>) -> io::Result<bool> {
    const TRIES: u32 = 20;
    for _ in 0..TRIES {
        match lock() {
            Ok(()) => return Ok(true),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
            Err(TryLockError::Error(error)) => return Err(error),
        }
    }
    Ok(false)
}

/// Makes a temporary file durable under its final name, for reading only: what the store keeps never changes.
pub(crate) fn persist(temporary: tempfile::NamedTempFile, path: &Path) -> Result<(), Error> {
    use std::os::unix::fs::PermissionsExt;
    let file = temporary.as_file();
    file.set_permissions(fs::Permissions::from_mode(0o444))
        .and_then(|()| file.sync_all())
        .map_err(Error::io("write", path))?;
    temporary
        .persist(path)
        .map_err(|error| Error::io("write", path)(error.error))?;
    sync_folder_of(path)
}

/// Makes it durable that a file is, or is no more, in its folder.
pub(crate) fn sync_folder_of(path: &Path) -> Result<(), Error> {
    let folder = path.parent().unwrap_or(path);
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .map_err(Error::io("make durable", folder))
}

/// The names in a folder, in order.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let names = fs::read_dir(folder).and_then(|entries| {
        entries
            .map(|entry| Ok(PathBuf::from(entry?.file_name())))
            .collect::<io::Result<Vec<_>>>()
    });
    let mut names = names.map_err(Error::io("list", folder))?;
    names.sort();
    Ok(names)
}

/// A whole file, unless it is longer than it can rightly be.
pub(crate) fn read_bounded(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it is longer than {most} bytes"),
        ));
    }
    Ok(bytes)
}
