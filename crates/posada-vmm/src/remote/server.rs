//! The VM's end: a thread that accepts, and one for each client.

use super::{Answer, Error, Hello, LONGEST_REQUEST, PROTOCOL, Request, Status};
use crate::control::Control;
use crate::notify::Notify;
use crate::resident;
use crate::snapshot::{self, Options, Phase, Progress, Subject};
use crate::socket::SocketFile;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Clients at a time.
const MOST_CLIENTS: usize = 16;
/// Progress is told this often, and when something else begins.
const TELL: Duration = Duration::from_millis(100);
/// A client that does not take an answer for so long is gone.
const PATIENCE: Duration = Duration::from_secs(5);

/// A socket at which nobody is served yet.
pub(crate) struct Listener {
    socket: SocketFile,
    path: PathBuf,
}

impl Listener {
    pub(crate) fn bind(path: &Path) -> Result<Self, Error> {
        let socket = SocketFile::bind(path).map_err(|source| Error::Bind {
            path: path.into(),
            source,
        })?;
        Ok(Self {
            socket,
            path: path.into(),
        })
    }
}

/// What the clients' threads share.
struct Shared {
    control: Arc<Control>,
    subject: Arc<Subject>,
    /// Ends waits.
    stop: Notify,
    stopped: AtomicBool,
    /// One save at a time.
    saving: Mutex<()>,
}

/// Serves clients until it is dropped. The VM has gone then.
pub(crate) struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(listener: Listener, control: Arc<Control>, subject: Arc<Subject>) -> Result<Self, Error> {
        let Listener { socket, path } = listener;
        let refuse = |source| Error::Bind { path, source };
        let start = || {
            let shared = Arc::new(Shared {
                control,
                subject,
                stop: Notify::new()?,
                stopped: AtomicBool::new(false),
                saving: Mutex::default(),
            });
            let served = shared.clone();
            let thread = spawn("control", move || accept(&socket, &served))?;
            Ok(Self {
                shared,
                thread: Some(thread),
            })
        };
        start().map_err(refuse)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.control.close();
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.shared.stop.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new()
        .name(name.into())
        .stack_size(512 << 10)
        .spawn(run)
}

fn accept(socket: &SocketFile, shared: &Arc<Shared>) {
    let mut clients: Vec<JoinHandle<()>> = Vec::new();
    while let Ok((false, _)) = shared.stop.wait_with(socket.as_fd()) {
        clients.retain(|client| !client.is_finished());
        let served = shared.clone();
        let client = socket.accept().and_then(|stream| {
            if clients.len() >= MOST_CLIENTS {
                return Err(io::ErrorKind::QuotaExceeded.into());
            }
            spawn("control-client", move || {
                if let Err(error) = serve(&stream, &served) {
                    tracing::debug!(%error, "a control client has gone");
                }
            })
        });
        match client {
            Ok(client) => clients.push(client),
            Err(error) => tracing::warn!(%error, "cannot serve a control client"),
        }
    }
    for client in clients {
        let _ = client.join();
    }
}

fn send(mut stream: &UnixStream, message: &impl serde::Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Serves one client until it goes.
fn serve(stream: &UnixStream, shared: &Shared) -> io::Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    let hello = Hello {
        posada: env!("CARGO_PKG_VERSION").into(),
        protocol: PROTOCOL,
    };
    send(stream, &hello)?;
    let mut reader = BufReader::new(Interruptible { stream, shared });
    loop {
        let mut line = Vec::new();
        reader.by_ref().take(LONGEST_REQUEST).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Ok(());
        }
        let answer = match serde_json::from_slice(&line) {
            Ok(request) => answer(request, stream, shared),
            Err(error) => Answer::Error(format!("the VM does not understand the request: {error}")),
        };
        send(stream, &answer)?;
        if !line.ends_with(b"\n") {
            return Ok(());
        }
    }
}

/// A client's bytes, which end when the VM does.
struct Interruptible<'a> {
    stream: &'a UnixStream,
    shared: &'a Shared,
}

impl Read for Interruptible<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.shared.stop.wait_with(self.stream.as_fd())? {
            (true, _) => Ok(0),
            _ => self.stream.read(buffer),
        }
    }
}

fn answer(request: Request, stream: &UnixStream, shared: &Shared) -> Answer {
    let control = &shared.control;
    match request {
        Request::Status => Answer::Status(status(shared)),
        Request::Pause => {
            control.freeze();
            // Where it is being reset, its next life stands still too.
            match control.life() {
                Some(_) => Answer::Done,
                None => Answer::Error("the VM is ending, so it cannot be paused".into()),
            }
        }
        Request::Resume => {
            control.thaw();
            Answer::Done
        }
        Request::SnapshotSave {
            place,
            force,
            stop,
            disks,
        } => {
            let Ok(_one) = shared.saving.try_lock() else {
                return Answer::Error("another save of this VM is under way; wait for it".into());
            };
            if !place.is_absolute() {
                return Answer::Error("the VM knows absolute paths only".into());
            }
            let options = Options {
                place,
                force,
                stop,
                disks,
            };
            let saved = snapshot::save(control, &shared.subject, &options, &mut teller(stream, shared));
            match saved {
                Ok(saved) => Answer::Saved(saved),
                Err(error) => Answer::Error(error.to_string()),
            }
        }
    }
}

/// Tells a client of the progress; says stop when it has gone, or the VM is going.
fn teller<'a>(stream: &'a UnixStream, shared: &'a Shared) -> impl FnMut(Progress) -> ControlFlow<()> {
    let mut told = None::<(Phase, Instant)>;
    move |progress| {
        if shared.stopped.load(Ordering::Relaxed) || hung_up(stream) {
            return ControlFlow::Break(());
        }
        let now = Instant::now();
        if told.is_some_and(|(phase, when)| phase == progress.phase && now - when < TELL) {
            return ControlFlow::Continue(());
        }
        told = Some((progress.phase, now));
        match send(stream, &Answer::Progress(progress)) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

/// True if the other end has closed the connection, not only its own sending side.
fn hung_up(stream: &UnixStream) -> bool {
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid entry.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0 }
}

fn status(shared: &Shared) -> Status {
    let config = &shared.subject.config;
    Status {
        posada: env!("CARGO_PKG_VERSION").into(),
        pid: std::process::id(),
        condition: shared.control.condition(),
        cpus: config.model.cpus,
        memory: config.memory,
        touched: shared.control.now().map_or(0, |life| resident::of(&life.ram)),
    }
}
