//! The console of a VM that has no terminal: what it prints goes into a log of bounded size and to whoever is connected; what
//! those type goes to the guest.

use anyhow::Context;
use posada_host::logs::older;
use posada_host::store::Folder;
use rustix::net::{SendFlags, send};
use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

/// Bytes of a log before it becomes the older one.
const LARGEST_LOG: u64 = 1 << 20;
/// Clients at a time.
const MOST_CLIENTS: usize = 16;
/// How long the last output may take.
const LAST: Duration = Duration::from_secs(2);
const STACK: usize = 128 << 10;

/// Standard input and output of this process, from now on.
pub struct Console {
    drained: Receiver<()>,
}

type Clients = Arc<Mutex<Vec<UnixStream>>>;

fn lock(clients: &Clients) -> MutexGuard<'_, Vec<UnixStream>> {
    clients.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Console {
    /// Puts it in the place of standard input and output.
    pub fn start(folder: &Folder, sockets: &Path) -> anyhow::Result<Self> {
        let socket = sockets.join("console");
        // Whoever has the VM's lock may take the socket that a killed process has left.
        let _ = fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
        let log = Log::open(folder.console_log());
        let start = || {
            let (output, guest_output) = io::pipe()?;
            let (guest_input, input) = io::pipe()?;
            rustix::stdio::dup2_stdin(&guest_input)?;
            rustix::stdio::dup2_stdout(&guest_output)?;
            let clients = Clients::default();
            let (done, drained) = sync_channel(1);
            let told = clients.clone();
            spawn("console-log", move || {
                copy(output, log, &told);
                let _ = done.send(());
            })?;
            spawn("console-accept", move || accept(&listener, &clients, &Arc::new(input)))?;
            io::Result::Ok(Self { drained })
        };
        start().context("cannot make the VM's console")
    }

    /// The VM has ended: waits until all that it printed is in the log.
    pub fn end(self) {
        if let Ok(nothing) = OpenOptions::new().write(true).open("/dev/null")
            && rustix::stdio::dup2_stdout(&nothing).is_ok()
        {
            let _ = self.drained.recv_timeout(LAST);
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.into()).stack_size(STACK);
    thread.spawn(work).map(|_| ())
}

fn copy(mut output: impl Read, mut log: Log, clients: &Clients) {
    let mut bytes = [0; 4096];
    loop {
        let count = match output.read(&mut bytes) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        log.write(&bytes[..count]);
        // A client that does not read must not stop the guest: it is let go.
        lock(clients).retain(|client| {
            let sent = send(client, &bytes[..count], SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            let took_all = sent.is_ok_and(|sent| sent == count);
            if !took_all {
                let _ = client.shutdown(std::net::Shutdown::Both);
            }
            took_all
        });
    }
}

fn accept(listener: &UnixListener, clients: &Clients, input: &Arc<PipeWriter>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let mut connected = lock(clients);
        if connected.len() >= MOST_CLIENTS {
            continue;
        }
        let Ok(reader) = stream.try_clone() else { continue };
        connected.push(stream);
        drop(connected);
        let input = input.clone();
        let _ = spawn("console-client", move || pass_on(reader, &input));
    }
}

/// What a client types, until it goes.
fn pass_on(mut client: UnixStream, mut input: &PipeWriter) {
    let mut bytes = [0; 1024];
    while let Ok(count @ 1..) = client.read(&mut bytes) {
        if input.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
}

/// A log that turns when it is large. What cannot be written is lost: a full disk must not stop a guest.
struct Log {
    path: PathBuf,
    file: Option<File>,
    size: u64,
}

impl Log {
    fn open(path: PathBuf) -> Self {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let file = file
            .inspect_err(|error| tracing::warn!(%error, path = %path.display(), "the console has no log"))
            .ok();
        let size = file
            .as_ref()
            .and_then(|file| file.metadata().ok())
            .map_or(0, |found| found.len());
        Self { path, file, size }
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.size >= LARGEST_LOG && fs::rename(&self.path, older(&self.path)).is_ok() {
            *self = Self::open(std::mem::take(&mut self.path));
        }
        if let Some(file) = &mut self.file
            && self.size < 2 * LARGEST_LOG
            && file.write_all(bytes).is_ok()
        {
            self.size += bytes.len() as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_turns_and_stays_small() {
        let folder = std::env::temp_dir().join(format!("posada-log-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("console.log");
        let mut log = Log::open(path.clone());
        for _ in 0..=5 * LARGEST_LOG / 4096 {
            log.write(&[b'x'; 4096]);
        }
        assert!(fs::metadata(&path).unwrap().len() <= LARGEST_LOG);
        assert_eq!(fs::metadata(older(&path)).unwrap().len(), LARGEST_LOG);
        drop(log);
        let mut log = Log::open(path.clone());
        log.write(b"later");
        assert!(fs::read(&path).unwrap().ends_with(b"xlater"), "it goes on");
        fs::remove_dir_all(&folder).unwrap();
    }
}
