//! gdb's remote protocol: gdb attaches by TCP or by a Unix socket, one at a time. The VM does not wait for it; it stops
//! when gdb attaches and runs on when gdb leaves. vCPUs are threads (vCPU 0 is thread 1).

mod registers;
mod target;

use crate::control::Control;
use crate::notify::Notify;
use crate::socket::SocketFile;
use gdbstub::common::Signal;
use gdbstub::conn::{Connection, ConnectionExt};
use gdbstub::stub::run_blocking::{BlockingEventLoop, Event, WaitForStopReasonError};
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;
use target::Target;

/// Where gdb attaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = String;

    /// `PORT` and `:PORT` are on 127.0.0.1; what has a slash is a path.
    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains('/') {
            return Ok(Address::Unix(text.into()));
        }
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let host = if host.is_empty() { "127.0.0.1" } else { host };
        match port.parse::<u16>() {
            Ok(port) => Ok(Address::Tcp(format!("{host}:{port}"))),
            Err(_) => Err("write it as PORT, HOST:PORT, or a path with a slash".into()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp(address) => f.write_str(address),
            Address::Unix(path) => path.display().fmt(f),
        }
    }
}

/// gdb cannot attach.
#[derive(Debug, thiserror::Error)]
#[error("cannot wait for gdb at {address}: {source}; give another --gdb")]
pub struct Error {
    address: Address,
    source: io::Error,
}

enum Socket {
    Tcp(TcpListener),
    Unix(SocketFile),
}

/// A socket that waits for gdb. A Unix socket's path is removed with it.
pub(crate) struct Listener {
    socket: Socket,
    address: Address,
}

impl Listener {
    pub(crate) fn bind(address: &Address) -> Result<Self, Error> {
        let socket = match address {
            Address::Tcp(address) => TcpListener::bind(address).map(Socket::Tcp),
            Address::Unix(path) => SocketFile::bind(path).map(Socket::Unix),
        };
        let refuse = |source| Error {
            address: address.clone(),
            source,
        };
        Ok(Self {
            socket: socket.map_err(refuse)?,
            address: address.clone(),
        })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Unix(socket) => socket.as_fd(),
        }
    }

    fn accept(&self) -> io::Result<OwnedFd> {
        Ok(match &self.socket {
            Socket::Tcp(socket) => {
                let stream = socket.accept()?.0;
                stream.set_nodelay(true)?;
                stream.into()
            }
            Socket::Unix(socket) => socket.accept()?.into(),
        })
    }

    /// Serves gdb in a thread until the value that is returned is dropped.
    pub(crate) fn serve(self, control: Arc<Control>) -> Result<Server, Error> {
        let address = self.address.clone();
        let refuse = |source| Error { address, source };
        let stop = Notify::new().map(Arc::new);
        let start = stop.and_then(|stop| {
            let (thread_stop, thread_control) = (stop.clone(), control.clone());
            let thread = std::thread::Builder::new()
                .name("gdb".into())
                .stack_size(512 << 10)
                .spawn(move || self.run(&thread_control, &thread_stop))?;
            Ok((stop, thread))
        });
        let (stop, thread) = start.map_err(refuse)?;
        Ok(Server {
            control,
            stop,
            thread: Some(thread),
        })
    }

    fn run(self, control: &Arc<Control>, stop: &Arc<Notify>) {
        loop {
            match stop.wait_with(self.fd()) {
                Ok((false, _)) => {}
                Ok((true, _)) => return,
                Err(error) => return tracing::warn!(%error, "gdb cannot attach any more"),
            }
            let session = self.accept().and_then(|fd| session(fd, control, stop));
            control.detach();
            if let Err(error) = session {
                tracing::warn!(%error, "the gdb session has failed");
            }
        }
    }
}

/// The thread that serves gdb; dropping it ends the session and the thread.
pub(crate) struct Server {
    control: Arc<Control>,
    stop: Arc<Notify>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.control.close();
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn session(fd: OwnedFd, control: &Arc<Control>, stop: &Arc<Notify>) -> io::Result<()> {
    let stopped = Arc::new(Notify::new()?);
    control.attach(stopped.clone());
    let Some(mut target) = Target::new(control.clone(), stopped) else {
        return Ok(());
    };
    let stub = GdbStub::new(Link {
        stream: File::from(fd),
        stop: stop.clone(),
    });
    match stub.run_blocking::<Loop>(&mut target) {
        Ok(DisconnectReason::Kill) => {
            // gdb's `kill` means the program: the VM.
            control.end(crate::control::Ending::Quit);
            Ok(())
        }
        Ok(_) => Ok(()),
        Err(error) if error.is_connection_error() => Ok(()),
        Err(error) => Err(io::Error::other(error.to_string())),
    }
}

/// The connection to gdb. Reading ends when the VM does.
struct Link {
    stream: File,
    stop: Arc<Notify>,
}

impl Connection for Link {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.stream.write_all(&[byte])
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ConnectionExt for Link {
    fn read(&mut self) -> io::Result<u8> {
        if let (true, _) = self.stop.wait_with(self.stream.as_fd())? {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }

    fn peek(&mut self) -> io::Result<Option<u8>> {
        let mut byte = 0_u8;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
        // SAFETY: receives one byte into `byte`.
        match unsafe { libc::recv(self.stream.as_raw_fd(), (&raw mut byte).cast(), 1, flags) } {
            1 => Ok(Some(byte)),
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }
}

enum Loop {}

impl BlockingEventLoop for Loop {
    type Target = Target;
    type Connection = Link;
    type StopReason = MultiThreadStopReason<u64>;

    fn wait_for_stop_reason(
        target: &mut Target,
        link: &mut Link,
    ) -> Result<Event<Self::StopReason>, WaitForStopReasonError<target::Error, io::Error>> {
        let connection = WaitForStopReasonError::Connection;
        loop {
            let (_, incoming) = target.stopped.wait_with(link.stream.as_fd()).map_err(connection)?;
            target.stopped.clear();
            if let Some(reason) = target.stop_reason() {
                return Ok(Event::TargetStopped(reason));
            }
            if incoming {
                return link.read().map(Event::IncomingData).map_err(connection);
            }
        }
    }

    fn on_interrupt(target: &mut Target) -> Result<Option<Self::StopReason>, target::Error> {
        target.pause();
        Ok(Some(MultiThreadStopReason::Signal(Signal::SIGINT)))
    }
}

#[cfg(test)]
mod tests;
