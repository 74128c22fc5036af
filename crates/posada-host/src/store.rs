//! What is kept of VMs on disk, and where.
//!
//! ```text
//! $XDG_DATA_HOME/posada/lock               held by the daemon
//! $XDG_DATA_HOME/posada/vms/ID/spec.json   name and spec: written by the daemon, always whole
//!                              state.json  whether it is wanted to run: the same
//!                              lock        held by the VM's process all its life; says which process that is
//!                              exit.json   written by the VM's process at its end
//!                              console.log what its console printed; console.log.1 is older
//!                              process.log what its process had to say
//! $XDG_RUNTIME_DIR/posada/api.sock         the API
//! $XDG_RUNTIME_DIR/posada/ID/              control, console, vsock: the VM's sockets
//! ```
//!
//! Root has `/var/lib/posada` and `/run/posada`, unless these variables say otherwise.

use crate::name;
use crate::policy::Cause;
use crate::spec::Spec;
use rustix::fs::{FlockOperation, flock};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The most bytes of a file that is read here.
const LARGEST: u64 = 1 << 20;
/// How often, and how long between, a store that is in use is tried.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(30);
/// The longest path of a socket, in bytes (`sun_path` of unix(7)).
const LONGEST_SOCKET: usize = 107;

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The host refuses.
    #[error("cannot {doing} {}: {source}", path.display())]
    Host {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is in use.
    #[error("another daemon{} has the store {}", process(.pid), path.display())]
    Locked {
        /// The store.
        path: PathBuf,
        /// Its process, if it says so.
        pid: Option<u32>,
    },
    /// A file has not what belongs there.
    #[error("{} is damaged: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Somebody else could get in.
    #[error("{} belongs to somebody else; set XDG_RUNTIME_DIR to a folder of your own", .0.display())]
    Foreign(PathBuf),
    /// A socket's path cannot be so long.
    #[error("{} is too long for a socket; set XDG_RUNTIME_DIR to a shorter one", .0.display())]
    TooLong(PathBuf),
    /// There is no place.
    #[error("neither XDG_DATA_HOME nor HOME says where VMs are to be kept; set one")]
    Homeless,
}

fn process(pid: &Option<u32>) -> String {
    pid.map(|pid| format!(" (process {pid})")).unwrap_or_default()
}

fn host<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Host {
        doing,
        path: path.into(),
        source,
    }
}

/// Milliseconds since 1970.
pub fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis().try_into().unwrap_or(u64::MAX)
}

/// Where a user's VMs are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Places {
    /// What stays.
    pub data: PathBuf,
    /// Sockets.
    pub run: PathBuf,
}

impl Places {
    /// As this process's environment says.
    ///
    /// # Errors
    /// [`StoreError::Homeless`].
    pub fn of_user() -> Result<Self, StoreError> {
        let folder = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let user = rustix::process::geteuid();
        let data = match folder("XDG_DATA_HOME") {
            Some(data) => data.join("posada"),
            None if user.is_root() => "/var/lib/posada".into(),
            None => folder("HOME").ok_or(StoreError::Homeless)?.join(".local/share/posada"),
        };
        let run = match folder("XDG_RUNTIME_DIR") {
            Some(run) => run.join("posada"),
            None if user.is_root() => "/run/posada".into(),
            None => format!("/tmp/posada-{}", user.as_raw()).into(),
        };
        Ok(Self { data, run })
    }

    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("api.sock")
    }

    /// What a daemon that was started on demand has to say.
    pub fn daemon_log(&self) -> PathBuf {
        self.run.join("daemon.log")
    }

    /// A VM's sockets.
    pub fn sockets(&self, id: &str) -> PathBuf {
        self.run.join(id)
    }

    /// Makes the folder of the sockets, for its user alone.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn make_run(&self) -> Result<(), StoreError> {
        make_private(&self.run)?;
        let longest = self.sockets(&"0".repeat(12)).join("console");
        if longest.as_os_str().len() > LONGEST_SOCKET {
            return Err(StoreError::TooLong(longest));
        }
        Ok(())
    }
}

/// Makes a folder that only its user can enter; one that is there already becomes so.
///
/// # Errors
/// [`StoreError`].
pub fn make_private(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(host("make the folder", path))?;
    let found = fs::symlink_metadata(path).map_err(host("look at", path))?;
    if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
        return Err(StoreError::Foreign(path.into()));
    }
    if found.mode() & 0o077 != 0 {
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).map_err(host("protect", path))?;
    }
    Ok(())
}

/// Puts a whole file in the place of an older one: after a crash at any time one of them is there.
///
/// # Errors
/// The host's reason.
pub fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        File::open(folder)?.sync_all()
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StoreError> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|error| StoreError::Damaged {
        path: path.into(),
        why: error.to_string(),
    })?;
    text.push(b'\n');
    write_whole(path, &text).map_err(host("write", path))
}

/// `None`: there is no such file.
fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let mut text = Vec::new();
    match File::open(path).and_then(|file| file.take(LARGEST).read_to_end(&mut text)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(host("read", path)(error)),
    }
    let read = serde_json::from_slice(&text);
    read.map(Some).map_err(|error| StoreError::Damaged {
        path: path.into(),
        why: error.to_string(),
    })
}

/// Takes a lock that goes with the open file; `None`: somebody has it.
fn try_lock(file: &File) -> io::Result<Option<()>> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(())),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn open_lock(path: &Path) -> Result<File, StoreError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(host("open", path))
}

/// `spec.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// What its user calls it.
    pub name: String,
    /// When it was made, in milliseconds since 1970.
    pub created: u64,
    /// The key of the request that has made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// What it is to be.
    pub spec: Spec,
}

/// `state.json`: how far its life has come.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Somebody wants it to run.
    pub wanted: bool,
    /// How often in a row it ended soon after its start.
    pub failures: u32,
    /// How often it was started again.
    pub restarts: u64,
    /// When it was started last.
    #[serde(default)]
    pub started: Option<u64>,
    /// How its last process ended, once that is known.
    #[serde(default)]
    pub last: Option<Exit>,
}

/// How a VM's process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Exit {
    /// Its exit code, as `posada run --help` explains them.
    pub code: i32,
    /// In a word: `power-off`, `reset`, `saved`, `debug-exit`, `crash`, `failure`, `signal`, `error`, `killed`, `lost`.
    pub reason: String,
    /// In a sentence, where there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// When, in milliseconds since 1970.
    pub time: u64,
    /// It was told to by who used this host's commands.
    #[serde(default)]
    pub told: bool,
}

impl Exit {
    /// What it means for who restarts VMs.
    pub fn cause(&self) -> Cause {
        match self.reason.as_str() {
            _ if self.told => Cause::Wish,
            "quit" | "saved" => Cause::Wish,
            "power-off" | "reset" => Cause::Done,
            "debug-exit" if self.code == 0 => Cause::Done,
            _ => Cause::Failure,
        }
    }
}

/// What a VM's lock file says of its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// Its id.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's start: tells it from a later process with this id.
    pub start_time: u64,
    /// Where its sockets are.
    pub sockets: PathBuf,
    /// Its guest runs.
    pub up: bool,
}

/// Who has a VM's lock.
#[derive(Debug)]
pub enum Lock {
    /// This process, by the file.
    Mine(File),
    /// A process that says so, or has not said yet.
    Theirs(Option<Holder>),
}

/// A user's VMs on disk. Only one process has it at a time.
#[derive(Debug)]
pub struct Store {
    places: Places,
    _lock: File,
}

impl Store {
    /// Opens it, and makes it if it is new.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(places: Places) -> Result<Self, StoreError> {
        make_private(&places.data)?;
        make_private(&places.data.join("vms"))?;
        let path = places.data.join("lock");
        let mut file = open_lock(&path)?;
        let mut attempts = 0;
        while try_lock(&file).map_err(host("lock", &path))?.is_none() {
            // The threads of a daemon that was killed end one after the other, and the last one's end frees the lock.
            if attempts < ATTEMPTS {
                attempts += 1;
                std::thread::sleep(PAUSE);
                continue;
            }
            let mut pid = String::new();
            let _ = (&file).take(20).read_to_string(&mut pid);
            return Err(StoreError::Locked {
                path: places.data,
                pid: pid.trim().parse().ok(),
            });
        }
        let id = std::process::id();
        // Only for people: a full disk is no reason not to have the store.
        let _ = file.set_len(0).and_then(|()| writeln!(file, "{id}"));
        Ok(Self { places, _lock: file })
    }

    /// Where it is.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// The folders of all VMs, by id.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn vms(&self) -> Result<Vec<(String, Folder)>, StoreError> {
        let path = self.places.data.join("vms");
        let mut found = Vec::new();
        for entry in fs::read_dir(&path).map_err(host("list", &path))? {
            let name = entry.map_err(host("list", &path))?.file_name();
            match name.to_str() {
                Some(id) if name::is_id(id) => found.push((id.to_string(), self.folder(id))),
                // A VM in the making when the host went down, or in the removing.
                Some(other) if other.starts_with('.') => {
                    let _ = fs::remove_dir_all(path.join(other));
                }
                _ => tracing::warn!(folder = %path.join(&name).display(), "this is no VM's folder"),
            }
        }
        found.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(found)
    }

    /// A VM's folder.
    pub fn folder(&self, id: &str) -> Folder {
        Folder(self.places.data.join("vms").join(id))
    }

    /// Keeps a new VM: all of it or nothing.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create(&self, id: &str, kept: &Kept) -> Result<Folder, StoreError> {
        let folder = self.folder(id);
        let new = self.places.data.join("vms").join(format!(".{id}"));
        let make = || {
            DirBuilder::new()
                .mode(0o700)
                .create(&new)
                .map_err(host("make the folder", &new))?;
            Folder(new.clone()).write_spec(kept)?;
            fs::rename(&new, &folder.0).map_err(host("make the folder", &folder.0))?;
            let parent = self.places.data.join("vms");
            let sync = File::open(&parent).and_then(|parent| parent.sync_all());
            sync.map_err(host("write", &parent))
        };
        make().inspect_err(|_| {
            let _ = fs::remove_dir_all(&new);
        })?;
        Ok(folder)
    }

    /// Forgets a VM and its sockets.
    ///
    /// # Errors
    /// [`StoreError`]; it is still there then.
    pub fn remove(&self, id: &str) -> Result<(), StoreError> {
        let folder = self.folder(id);
        let old = self.places.data.join("vms").join(format!(".{id}"));
        match fs::rename(&folder.0, &old) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(host("remove", &folder.0)(error)),
        }
        // What is left of it now, the next start removes.
        let _ = fs::remove_dir_all(&old);
        let _ = fs::remove_dir_all(self.places.sockets(id));
        Ok(())
    }
}

/// A VM's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder(pub PathBuf);

impl Folder {
    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What its console printed.
    pub fn console_log(&self) -> PathBuf {
        self.file("console.log")
    }

    /// What its process had to say.
    pub fn process_log(&self) -> PathBuf {
        self.file("process.log")
    }

    /// Reads `spec.json`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn spec(&self) -> Result<Kept, StoreError> {
        let path = self.file("spec.json");
        read_json(&path)?.ok_or_else(|| StoreError::Damaged {
            path,
            why: "it is missing".into(),
        })
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`StoreError`]; the older one is still there then.
    pub fn write_spec(&self, kept: &Kept) -> Result<(), StoreError> {
        write_json(&self.file("spec.json"), kept)
    }

    /// Reads `state.json`; a VM that has never run has none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn state(&self) -> Result<Progress, StoreError> {
        Ok(read_json(&self.file("state.json"))?.unwrap_or_default())
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`StoreError`]; the older one is still there then.
    pub fn write_state(&self, state: &Progress) -> Result<(), StoreError> {
        write_json(&self.file("state.json"), state)
    }

    /// How its process says to have ended, if it did.
    pub fn exit(&self) -> Option<Exit> {
        read_json(&self.file("exit.json")).unwrap_or_else(|error| {
            tracing::warn!(%error, "a VM's last word cannot be read");
            None
        })
    }

    /// Leaves a last word.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn write_exit(&self, exit: &Exit) -> Result<(), StoreError> {
        write_json(&self.file("exit.json"), exit)
    }

    /// Forgets it.
    pub fn clear_exit(&self) {
        let _ = fs::remove_file(self.file("exit.json"));
    }

    /// The file of the lock.
    pub fn lock_file(&self) -> PathBuf {
        self.file("lock")
    }

    /// Takes the lock, or says who has it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn lock(&self) -> Result<Lock, StoreError> {
        let path = self.lock_file();
        let file = open_lock(&path)?;
        if try_lock(&file).map_err(host("lock", &path))?.is_some() {
            return Ok(Lock::Mine(file));
        }
        Ok(Lock::Theirs(read_json(&path).ok().flatten()))
    }
}

/// Says in a lock's file who has it.
///
/// # Errors
/// The host's reason.
pub fn sign(lock: &File, holder: &Holder) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut text = serde_json::to_vec(holder)?;
    text.push(b'\n');
    // A reader meets the older text or the newer one: both are shorter than a page, and only a field of fixed width differs.
    lock.write_all_at(&text, 0)?;
    lock.set_len(text.len() as u64)
}

#[cfg(test)]
mod tests;
