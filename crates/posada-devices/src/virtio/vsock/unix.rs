//! The host's side: a Unix socket at which programs reach the guest, and Unix sockets of programs that the guest reaches.
//!
//! A program connects, writes `CONNECT PORT\n`, and reads `OK PORT\n` (the port that its connection has on the host) once the
//! guest has accepted; from there on the stream is the connection. If the guest refuses, it ends instead. A connection of the
//! guest to port P of the host goes to the socket of the same path with `_P` behind. Firecracker and Cloud Hypervisor do it
//! so too, and the same programs work with all three.

use super::switch::{Readiness, Stream, Token};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of the longest first line: `CONNECT 4294967295\n`.
const LINE: usize = 19;
const LISTENER: Token = 0;
/// What is always heard of a stream, once for each change.
const WATCH: EventFlags = EventFlags::IN.union(EventFlags::RDHUP).union(EventFlags::ET);

/// A connection's stream.
pub struct HostStream {
    stream: UnixStream,
    epoll: Arc<OwnedFd>,
    token: Token,
    blocked: bool,
}

impl HostStream {
    fn new(stream: UnixStream, epoll: &Arc<OwnedFd>, token: Token) -> io::Result<Self> {
        epoll::add(epoll, &stream, EventData::new_u64(token), WATCH)?;
        Ok(Self {
            stream,
            epoll: Arc::clone(epoll),
            token,
            blocked: false,
        })
    }
}

impl Stream for HostStream {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.read(bytes)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn shut(&mut self, way: Shutdown) {
        // It fails when the other end is gone, and then there is nothing to shut.
        let _ = self.stream.shutdown(way);
    }

    fn opened(&mut self, port: u32) -> io::Result<()> {
        // The first bytes of a stream fit.
        self.stream.write_all(format!("OK {port}\n").as_bytes())
    }

    fn blocked(&mut self, blocked: bool) {
        if self.blocked == blocked {
            return;
        }
        self.blocked = blocked;
        let flags = if blocked { WATCH | EventFlags::OUT } else { WATCH };
        if let Err(error) = epoll::modify(&*self.epoll, &self.stream, EventData::new_u64(self.token), flags) {
            tracing::error!(%error, "a vsock connection cannot be watched");
        }
    }
}

/// A program's stream before its first line is complete.
struct Greeting {
    stream: HostStream,
    line: Vec<u8>,
}

/// What comes from the host's side.
pub enum HostEvent {
    /// A program asks for a connection to this port of the guest.
    Connect(Token, HostStream, u32),
    /// Something can be done with a stream.
    Ready(Token, Readiness),
}

/// The sockets, and who waits at them.
pub struct UnixHost {
    epoll: Arc<OwnedFd>,
    listener: UnixListener,
    /// Where it listens; with a port behind it, where the guest's connections go.
    path: PathBuf,
    /// Somebody may wait to be accepted.
    knocked: bool,
    greetings: HashMap<Token, Greeting>,
    last_token: Token,
}

impl UnixHost {
    /// Programs come to `listener`, which listens at `path`.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(listener: UnixListener, path: &Path) -> io::Result<Self> {
        let epoll = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        listener.set_nonblocking(true)?;
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), flags)?;
        Ok(Self {
            epoll,
            listener,
            path: path.into(),
            knocked: true,
            greetings: HashMap::new(),
            last_token: LISTENER,
        })
    }

    /// What can be read when [`UnixHost::poll`] has something.
    pub fn epoll(&self) -> &Arc<OwnedFd> {
        &self.epoll
    }

    /// Forgets the programs that have not said what they want.
    pub fn clear(&mut self) {
        self.greetings.clear();
    }

    /// Whether somebody waits to be accepted who can be. The host may open `room` more connections, and who has not said what
    /// he wants counts as one.
    pub fn can_accept(&self, room: usize) -> bool {
        self.knocked && self.greetings.len() < room
    }

    /// What has come since the last call; accepts programs as [`UnixHost::can_accept`] says.
    pub fn poll(&mut self, room: usize) -> Vec<HostEvent> {
        let mut events = Vec::new();
        let mut list = [epoll::Event {
            flags: EventFlags::empty(),
            data: EventData::new_u64(0),
        }; 64];
        let count = epoll::wait(&*self.epoll, &mut list[..], Some(&Default::default())).unwrap_or(0);
        for event in &list[..count] {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == LISTENER {
                self.knocked = true;
                continue;
            }
            let now = Readiness {
                readable: flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: flags.contains(EventFlags::OUT),
                hung_up: flags.intersects(EventFlags::HUP | EventFlags::ERR),
            };
            if self.greetings.contains_key(&token) {
                events.extend(self.greet(token));
            }
            if !self.greetings.contains_key(&token) {
                events.push(HostEvent::Ready(token, now));
            }
        }
        let asks = |events: &[HostEvent]| {
            let connect = |event: &&HostEvent| matches!(event, HostEvent::Connect(..));
            events.iter().filter(connect).count()
        };
        while self.can_accept(room.saturating_sub(asks(&events))) {
            match self.listener.accept() {
                Ok((stream, _)) => events.extend(self.welcome(stream)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    if error.kind() != ErrorKind::WouldBlock {
                        tracing::warn!(%error, "a program could not be accepted at the vsock's socket");
                    }
                    self.knocked = false;
                }
            }
        }
        events
    }

    fn next_token(&mut self) -> Token {
        self.last_token += 1;
        self.last_token
    }

    fn welcome(&mut self, stream: UnixStream) -> Option<HostEvent> {
        let token = self.next_token();
        stream.set_nonblocking(true).ok()?;
        let stream = HostStream::new(stream, &self.epoll, token).ok()?;
        let line = Vec::with_capacity(LINE);
        self.greetings.insert(token, Greeting { stream, line });
        self.greet(token)
    }

    /// Reads of a program's first line what is there; byte by byte, since what follows is for the guest.
    fn greet(&mut self, token: Token) -> Option<HostEvent> {
        let greeting = self.greetings.get_mut(&token)?;
        loop {
            let mut byte = [0];
            match greeting.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if greeting.line.len() < LINE => greeting.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                // It has ended, or says something else.
                _ => {
                    self.greetings.remove(&token);
                    return None;
                }
            }
        }
        let greeting = self.greetings.remove(&token)?;
        let port = parse(&greeting.line)?;
        Some(HostEvent::Connect(token, greeting.stream, port))
    }

    /// Connects to the program that has this port.
    ///
    /// # Errors
    /// When nobody listens, or too many wait there already.
    pub fn dial(&mut self, port: u32) -> io::Result<(Token, HostStream)> {
        let mut path: OsString = self.path.clone().into();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path)?;
        // It must not wait for a program that does not accept.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &address)?;
        let token = self.next_token();
        Ok((token, HostStream::new(socket.into(), &self.epoll, token)?))
    }
}

/// The port of `CONNECT PORT`.
fn parse(line: &[u8]) -> Option<u32> {
    let digits = line.strip_prefix(b"CONNECT ")?;
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_connect_with_a_port_is_a_first_line() {
        assert_eq!(parse(b"CONNECT 0"), Some(0));
        assert_eq!(parse(b"CONNECT 4294967295"), Some(u32::MAX));
        for line in [
            "",
            "CONNECT",
            "CONNECT ",
            "CONNECT 4294967296",
            "CONNECT +5",
            "CONNECT 5 ",
            "connect 5",
        ] {
            assert_eq!(parse(line.as_bytes()), None, "{line:?}");
        }
    }
}
