//! A VM's process: started, found again, signalled, seen to end.

use crate::store::{self, Exit, Folder, Holder, Lock, StoreError};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::fs::{self, OpenOptions};
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe::Receiver;

/// Tells a VM's process, by its environment, where its sockets belong.
pub const SOCKETS: &str = "POSADA_VM_SOCKETS";

/// Why there is no process.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// One of before has the VM.
    #[error("another process has this VM; end it first")]
    Held,
    /// The host gives none.
    #[error("the host starts no process for it: {0}")]
    Host(#[from] io::Error),
    /// It holds the lock and does not say who it is.
    #[error("a process has its lock {} and does not say which it is; end it", .0.display())]
    Nameless(PathBuf),
}

/// A process that runs a VM, whoever has started it.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: AsyncFd<OwnedFd>,
    child: Mutex<Option<Child>>,
    /// Gives a byte when the guest runs.
    up: Mutex<Option<PipeReader>>,
    sockets: PathBuf,
}

impl Process {
    /// Starts `program vm NAME` in the VM's folder. Its standard input is the VM's lock, so that there is no moment at which
    /// the process has it not.
    ///
    /// # Errors
    /// [`ProcessError`]; there is no process then.
    pub fn start(program: &Path, name: &str, folder: &Folder, sockets: PathBuf) -> Result<Self, ProcessError> {
        let lock = match folder.lock()? {
            Lock::Mine(lock) => lock,
            Lock::Theirs(_) => return Err(ProcessError::Held),
        };
        // What the last process has said of itself must not be taken for this one's word.
        lock.set_len(0)?;
        folder.clear_exit();
        let log = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(folder.process_log())?;
        let (reader, writer) = io::pipe()?;
        store::make_private(&sockets)?;
        let child = Command::new(program)
            .arg0("posada")
            .args(["vm", name])
            .current_dir(&folder.0)
            .env(SOCKETS, &sockets)
            .stdin(lock)
            .stdout(writer)
            .stderr(log)
            .spawn()?;
        let pid = child.id();
        let up = Some(reader);
        Ok(Self::new(pid, Some(child), up, sockets)?)
    }

    fn new(pid: u32, child: Option<Child>, up: Option<PipeReader>, sockets: PathBuf) -> io::Result<Self> {
        Ok(Self {
            pid,
            fd: watched(pidfd_open(number(pid)?, PidfdFlags::empty())?)?,
            child: Mutex::new(child),
            up: Mutex::new(up),
            sockets,
        })
    }

    /// The process that a daemon of before has started, and whether its guest runs; `None`: there is none.
    ///
    /// # Errors
    /// [`ProcessError::Nameless`] where it has not yet said who it is; [`ProcessError::Store`].
    pub fn find(folder: &Folder) -> Result<Option<(Self, bool)>, ProcessError> {
        let Lock::Theirs(holder) = folder.lock()? else {
            return Ok(None);
        };
        let nameless = || ProcessError::Nameless(folder.lock_file());
        let Holder {
            pid,
            start_time,
            sockets,
            up,
        } = holder.ok_or_else(nameless)?;
        match Self::new(pid, None, None, sockets) {
            // The descriptor came first: the id cannot have gone to another process since.
            Ok(process) if start_time_of(pid).ok() == Some(start_time) => Ok(Some((process, up))),
            // It ended in this moment, or the word is an older process's.
            _ => match folder.lock()? {
                Lock::Mine(_) => Ok(None),
                Lock::Theirs(_) => Err(nameless()),
            },
        }
    }

    /// Its id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where its sockets are.
    pub fn sockets(&self) -> &Path {
        &self.sockets
    }

    /// Sends it a signal; one that has ended takes none.
    pub fn signal(&self, signal: Signal) {
        if let Err(error) = pidfd_send_signal(self.fd.get_ref(), signal) {
            tracing::debug!(pid = self.pid, %error, "a VM's process takes no signal");
        }
    }

    /// Waits until it has ended.
    pub async fn ended(&self) {
        // Nobody takes the readiness away: a process does not come back.
        if let Err(error) = self.fd.readable().await {
            tracing::error!(pid = self.pid, %error, "a VM's process cannot be watched");
        }
    }

    /// The pipe by which it says that its guest runs: the first caller gets it.
    pub fn take_up(&self) -> Option<PipeReader> {
        self.up.lock().ok()?.take()
    }

    /// How it ended, after [`Process::ended`]; leaves no zombie.
    pub fn exit(&self, folder: &Folder) -> Exit {
        let child = self.child.lock().ok().and_then(|mut child| child.take());
        let status = child.and_then(|mut child| child.wait().ok());
        folder.exit().unwrap_or_else(|| lost(status, folder))
    }
}

fn number(pid: u32) -> io::Result<Pid> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// The end of a process that has left no last word.
pub fn lost(status: Option<ExitStatus>, folder: &Folder) -> Exit {
    let (code, reason, message) = match status.map(|status| (status.code(), status.signal())) {
        Some((Some(code), _)) => (code, "error", last_line(folder)),
        Some((None, Some(signal))) => (
            128 + signal,
            "killed",
            Some(format!("its process was ended by signal {signal}; {}", advice(signal))),
        ),
        _ => (
            137,
            "lost",
            Some("its process has gone while no daemon looked, killed or with the whole host".into()),
        ),
    };
    Exit {
        code,
        reason: reason.into(),
        message,
        time: store::now(),
        told: false,
    }
}

fn advice(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => "somebody has killed it, or the host was out of memory",
        libc::SIGABRT | libc::SIGSEGV | libc::SIGBUS | libc::SIGILL => {
            "this is an error in Posada, please report it with posada logs --process"
        }
        _ => "somebody has sent it",
    }
}

/// The last thing that a process said.
fn last_line(folder: &Folder) -> Option<String> {
    const MOST: u64 = 4096;
    let mut text = Vec::new();
    let file = fs::File::open(folder.process_log()).ok()?;
    file.take(MOST).read_to_end(&mut text).ok()?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().rfind(|line| !line.trim().is_empty())?;
    Some(line.strip_prefix("posada: ").unwrap_or(line).to_string())
}

/// When a process was started, in clock ticks since the host's start (proc_pid_stat(5), field 22).
///
/// # Errors
/// The host's reason: it has gone.
pub fn start_time_of(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in parentheses may have any characters; behind it comes field 3.
    let fields = stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace());
    let time = fields.and_then(|mut fields| fields.nth(19)?.parse().ok());
    time.ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Bytes of memory that a process has now.
pub fn resident(pid: u32) -> u64 {
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).ok();
    let pages = pages.and_then(|text| text.split(' ').nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * rustix::param::page_size() as u64
}

/// Time that a process's threads have run, in clock ticks (100 a second).
pub fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let times = fields.split_whitespace().skip(11).take(2);
    times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// Waits for the byte by which a process says that its guest runs; false: it will not.
pub async fn comes_up(pipe: PipeReader) -> bool {
    match Receiver::from_owned_fd(pipe.into()) {
        Ok(mut pipe) => pipe.read_u8().await.is_ok(),
        Err(_) => false,
    }
}

/// A descriptor on whose readiness tasks can wait.
pub(crate) fn watched(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, so it is open and the same until the value is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_s_start_is_known_and_stays() {
        let id = std::process::id();
        let time = start_time_of(id).unwrap();
        assert!(time > 0);
        assert_eq!(start_time_of(id).unwrap(), time);
        assert!(resident(id) > 64 << 10);
    }

    #[test]
    fn the_end_of_a_silent_process_is_explained() {
        let folder = Folder(std::env::temp_dir().join(format!("posada-lost-{}", std::process::id())));
        fs::create_dir_all(&folder.0).unwrap();
        let status = |script: &str| Command::new("sh").args(["-c", script]).status().ok();
        let killed = lost(status("kill -9 $$"), &folder);
        assert_eq!((killed.code, killed.reason.as_str()), (137, "killed"));
        assert!(killed.message.unwrap().contains("out of memory"));
        fs::write(folder.process_log(), "warn\nposada: no such disk\n\n").unwrap();
        let failed = lost(status("exit 125"), &folder);
        assert_eq!((failed.code, failed.message.as_deref()), (125, Some("no such disk")));
        assert_eq!(lost(None, &folder).reason, "lost");
        fs::remove_dir_all(&folder.0).unwrap();
    }
}
