//! The daemon: serves the API on its socket until it is told to end. VMs run on without it.

use crate::api;
use crate::host::Host;
use crate::store::Places;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Semaphore;

/// Connections at a time; more wait.
const MOST_CONNECTIONS: usize = 2048;
/// How long a client may take to send a request's head.
const PATIENCE: Duration = Duration::from_secs(30);
/// Threads that wait for disks and processes.
const WAITERS: usize = 16;

/// Why there is no daemon.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The store.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
    /// The socket.
    #[error("cannot serve at {}: {source}", path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The host does not give what every program has.
    #[error("the host gives no daemon what it needs: {0}")]
    Host(io::Error),
}

/// Serves until SIGTERM or SIGINT; `ready` is called when clients can connect.
///
/// # Errors
/// [`ServeError`].
pub fn serve(places: Places, program: PathBuf, ready: impl FnOnce()) -> Result<(), ServeError> {
    raise_files();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(WAITERS)
        .thread_keep_alive(Duration::from_secs(5))
        .build()
        .map_err(ServeError::Host)?;
    let served = runtime.block_on(run(places, program, ready));
    // Who waits for a disk now would keep an ended daemon.
    runtime.shutdown_background();
    served
}

/// A daemon with a thousand clients has a thousand files open.
fn raise_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

async fn run(places: Places, program: PathBuf, ready: impl FnOnce()) -> Result<(), ServeError> {
    let socket = places.socket();
    let mut end = signal(SignalKind::terminate()).map_err(ServeError::Host)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Host)?;
    // The store's lock comes first: who has it may take the socket of a daemon that was killed.
    let host = Host::open(places, program).await?;
    let listener = bind(&socket).map_err(|source| ServeError::Socket {
        path: socket.clone(),
        source,
    })?;
    tracing::info!(socket = %socket.display(), "the daemon serves");
    ready();
    tokio::select! {
        () = accept(&listener, host) => {}
        _ = end.recv() => {}
        _ = interrupt.recv() => {}
    }
    let _ = fs::remove_file(&socket);
    Ok(())
}

fn bind(socket: &Path) -> io::Result<UnixListener> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    // The folder is the user's alone, so there is no moment at which somebody else could connect.
    let listener = UnixListener::bind(socket)?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

async fn accept(listener: &UnixListener, host: Host) {
    let service = TowerToHyperService::new(api::router(host));
    let room = Arc::new(Semaphore::new(MOST_CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) if is_own(&stream) => stream,
            Ok(_) => continue,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection");
                // Out of files, most likely: those that are open end.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let service = service.clone();
        tokio::spawn(async move {
            let _place = place;
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .max_buf_size(64 << 10)
                .serve_connection(TokioIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a client has gone");
            }
        });
    }
}

/// Whether the other end is a process of this user, or of root: the socket's mode says so too, but may be changed.
fn is_own(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let other = stream.peer_cred().map(|other| other.uid());
    let good = other.as_ref().is_ok_and(|uid| *uid == own || *uid == 0);
    if !good {
        tracing::warn!(?other, "somebody else's connection is refused");
    }
    good
}
