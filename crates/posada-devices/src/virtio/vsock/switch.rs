//! All connections of a VM: takes the packets that the guest sends, and says which one the guest gets next. It does no I/O of
//! its own: the host's side are [`Stream`]s.
//!
//! Bytes for the guest stay in their stream until the guest has room, so the host's kernel makes their senders wait. Bytes for
//! the host wait here, up to a window ([`super::connection::WINDOW`]) for each connection.

use super::connection::{Connection, Heard};
use super::packet::{BOTH, HOST_CID, Header, RECEIVE, SEND, STREAM, op};
use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::net::Shutdown;

/// The most connections that guest and host each may open.
pub const MOST: usize = 128;
/// With so many RSTs that the guest has not taken, no packets are taken from it.
const MOST_RESETS: usize = 256;
/// Host ports of connections that the host opens begin here.
const FIRST_PORT: u32 = 1 << 30;

/// Names a stream; never used twice.
pub type Token = u64;

/// A byte stream of the host's side that never waits: it says [`ErrorKind::WouldBlock`] instead, and its owner reports
/// [`Readiness`] later.
pub trait Stream {
    /// Reads what there is; no bytes are the end.
    ///
    /// # Errors
    /// The host's.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize>;
    /// Writes what it takes.
    ///
    /// # Errors
    /// The host's.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize>;
    /// No more bytes go this way.
    fn shut(&mut self, way: Shutdown);
    /// The guest has accepted the connection, which has this port on the host.
    ///
    /// # Errors
    /// The host's.
    fn opened(&mut self, port: u32) -> io::Result<()>;
    /// Whether bytes wait for it to be writable.
    fn blocked(&mut self, blocked: bool);
}

/// What a stream can do now that it could not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// There are bytes, or the end.
    pub readable: bool,
    /// It takes bytes.
    pub writable: bool,
    /// Nobody is at its other end any more; bytes may still be in it.
    pub hung_up: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Ports {
    guest: u32,
    host: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Guest,
    Host,
}

struct Line<S> {
    stream: S,
    /// None once the guest has let go: its bytes are still delivered, and its ports are free.
    ports: Option<Ports>,
    origin: Origin,
    connection: Connection,
    /// From the guest, for the host: as many as the connection keeps.
    kept: VecDeque<u8>,
    /// There may be bytes, or the end.
    readable: bool,
    hung_up: bool,
    /// It is in [`Switch::ready`].
    queued: bool,
    /// Ways that the stream was told to end.
    shut: u32,
}

impl<S: Stream> Line<S> {
    fn has_to_send(&self) -> bool {
        self.ports.is_some() && (self.connection.has_to_speak() || self.readable && self.connection.credit() > 0)
    }

    /// Gives `bytes` to the host, and keeps what it does not take now.
    fn deliver(&mut self, mut bytes: &[u8]) {
        if self.kept.is_empty() {
            while !bytes.is_empty() {
                match self.try_write(bytes) {
                    Some(count) => bytes = &bytes[count..],
                    None => break,
                }
            }
            if !bytes.is_empty() {
                self.stream.blocked(true);
            }
        }
        self.kept.extend(bytes);
    }

    /// Goes on with what was kept.
    fn flush(&mut self) {
        while !self.kept.is_empty() {
            let kept = std::mem::take(&mut self.kept);
            let written = self.try_write(kept.as_slices().0);
            self.kept = kept;
            match written {
                Some(count) => drop(self.kept.drain(..count)),
                None => return,
            }
        }
        self.stream.blocked(false);
        // A connection at rest has no buffer.
        self.kept = VecDeque::new();
    }

    /// Bytes that the host has taken; none when it takes no more for now. A host that is gone has taken all.
    fn try_write(&mut self, bytes: &[u8]) -> Option<usize> {
        let count = if self.connection.has_host_ended(RECEIVE) {
            bytes.len()
        } else {
            match self.stream.write(bytes) {
                Ok(count) if count > 0 => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => 0,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
                _ => {
                    self.connection.host_ended(RECEIVE);
                    bytes.len()
                }
            }
        };
        self.connection.took(count as u32);
        Some(count)
    }

    /// Ends the ways of the stream that the guest has ended.
    fn shut(&mut self) {
        let ended = |way| self.connection.has_guest_ended(way) && self.shut & way == 0;
        if ended(RECEIVE) {
            self.stream.shut(Shutdown::Read);
            self.shut |= RECEIVE;
        }
        if self.connection.has_guest_ended(SEND) && self.shut & SEND == 0 && self.kept.is_empty() {
            self.stream.shut(Shutdown::Write);
            self.shut |= SEND;
        }
    }
}

/// An RST for the guest: what is in its header.
struct Reset {
    cid: u64,
    ports: Ports,
    kind: u16,
}

/// The connections.
pub struct Switch<S> {
    guest_cid: u64,
    lines: HashMap<Token, Line<S>>,
    tokens: HashMap<Ports, Token>,
    /// Lines that may have something for the guest, in their turn.
    ready: VecDeque<Token>,
    resets: VecDeque<Reset>,
    next_port: u32,
}

impl<S: Stream> Switch<S> {
    /// None yet, with the guest of this context id.
    pub fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            lines: HashMap::new(),
            tokens: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
        }
    }

    /// Forgets all connections: the guest's driver has begun anew, or the device stops.
    pub fn clear(&mut self) {
        *self = Self {
            next_port: self.next_port,
            ..Self::new(self.guest_cid)
        };
    }

    /// How many connections the host may open now.
    pub fn room_for_host(&self) -> usize {
        MOST.saturating_sub(self.count(Origin::Host))
    }

    /// Bytes for the host, and RSTs and turns for the guest: what is kept because one of them is slow. All of it is bounded.
    pub fn kept(&self) -> (usize, usize) {
        let bytes = self.lines.values().map(|line| line.kept.len()).sum();
        (bytes, self.resets.len() + self.ready.len())
    }

    fn count(&self, origin: Origin) -> usize {
        self.lines.values().filter(|line| line.origin == origin).count()
    }

    /// The host asks for a connection to a port of the guest.
    pub fn open(&mut self, token: Token, stream: S, port: u32) {
        let ports = loop {
            let ports = Ports {
                guest: port,
                host: self.next_port,
            };
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            if !self.tokens.contains_key(&ports) {
                break ports;
            }
        };
        self.insert(token, stream, ports, Origin::Host, Connection::from_host());
    }

    fn insert(&mut self, token: Token, stream: S, ports: Ports, origin: Origin, connection: Connection) {
        self.tokens.insert(ports, token);
        let line = Line {
            stream,
            ports: Some(ports),
            origin,
            connection,
            kept: VecDeque::new(),
            readable: true,
            hung_up: false,
            queued: false,
            shut: 0,
        };
        self.lines.insert(token, line);
        self.settle(token);
    }

    /// Whether packets may be taken from the guest. If not, it has first to take some itself.
    pub fn can_receive(&self) -> bool {
        self.resets.len() < MOST_RESETS
    }

    /// A packet from the guest, with the data that it really has. `dial` connects to a port of the host.
    pub fn receive(&mut self, packet: &Header, data: &[u8], dial: impl FnOnce(u32) -> io::Result<(Token, S)>) {
        if packet.source_cid != self.guest_cid {
            // Nobody has this address, so nobody could be answered.
            return;
        }
        if packet.destination_cid != HOST_CID || packet.kind != STREAM {
            return self.refuse(packet);
        }
        let ports = Ports {
            guest: packet.source_port,
            host: packet.destination_port,
        };
        let Some(&token) = self.tokens.get(&ports) else {
            return match packet.op {
                op::REQUEST => self.accept(packet, ports, dial),
                _ => self.refuse(packet),
            };
        };
        let line = self.lines.get_mut(&token).expect("tokens are of lines");
        let heard = match packet.op {
            // It says more than there is.
            op::RW if packet.length as usize != data.len() => Heard::Violation,
            _ => line.connection.hear(packet),
        };
        match heard {
            Heard::Nothing | Heard::Ended => {}
            Heard::Opened => {
                if line.stream.opened(ports.host).is_err() {
                    line.connection.host_ended(BOTH);
                }
            }
            Heard::Data => line.deliver(data),
            Heard::Reset => self.let_go(token),
            Heard::Violation => {
                self.refuse(packet);
                self.remove(token);
            }
        }
        self.settle(token);
    }

    fn accept(&mut self, packet: &Header, ports: Ports, dial: impl FnOnce(u32) -> io::Result<(Token, S)>) {
        if self.count(Origin::Guest) >= MOST {
            tracing::debug!(
                port = ports.host,
                "a guest has all the vsock connections that it may open"
            );
            return self.refuse(packet);
        }
        match dial(ports.host) {
            Ok((token, stream)) => {
                let connection = Connection::from_guest(packet);
                self.insert(token, stream, ports, Origin::Guest, connection);
            }
            Err(error) => {
                tracing::debug!(%error, port = ports.host, "nobody answers a guest's vsock connection");
                self.refuse(packet);
            }
        }
    }

    /// Answers by an RST what cannot be, unless it is one itself.
    fn refuse(&mut self, packet: &Header) {
        if packet.op != op::RST {
            self.resets.push_back(Reset {
                cid: packet.destination_cid,
                ports: Ports {
                    guest: packet.source_port,
                    host: packet.destination_port,
                },
                kind: packet.kind,
            });
        }
    }

    /// Something can be done with a stream.
    pub fn ready(&mut self, token: Token, now: Readiness) {
        let Some(line) = self.lines.get_mut(&token) else {
            return;
        };
        // What is left in a stream that has hung up can be read, to its end.
        line.readable |= now.readable || now.hung_up;
        line.hung_up |= now.hung_up;
        if now.hung_up && line.connection.is_unanswered() {
            let known = line.connection.is_known();
            return self.drop_line(token, known);
        }
        if now.hung_up && line.connection.has_host_ended(SEND) {
            line.connection.host_ended(BOTH);
        }
        if now.writable || now.hung_up {
            line.flush();
        }
        self.settle(token);
    }

    /// Whether [`Switch::send`] may have a packet for the guest.
    pub fn has_to_send(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, and in `data` its bytes, as many as the header says. RSTs go first, then each connection
    /// in its turn.
    pub fn send(&mut self, data: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(Header {
                source_cid: reset.cid,
                destination_cid: self.guest_cid,
                source_port: reset.ports.host,
                destination_port: reset.ports.guest,
                kind: reset.kind,
                op: op::RST,
                ..Header::default()
            });
        }
        while let Some(token) = self.ready.pop_front() {
            let line = self.lines.get_mut(&token).expect("removed lines are not ready");
            line.queued = false;
            let packet = next_packet(line, data);
            let too_small = packet.is_none() && data.is_empty() && line.has_to_send();
            let ports = line.ports;
            self.settle(token);
            if too_small {
                return None;
            }
            if let (Some(packet), Some(ports)) = (packet, ports) {
                return Some(Header {
                    source_cid: HOST_CID,
                    destination_cid: self.guest_cid,
                    source_port: ports.host,
                    destination_port: ports.guest,
                    kind: STREAM,
                    ..packet
                });
            }
        }
        None
    }

    /// After any change of a line: what follows from it.
    fn settle(&mut self, token: Token) {
        let Some(line) = self.lines.get_mut(&token) else {
            return;
        };
        line.shut();
        if line.ports.is_none() && line.kept.is_empty() {
            return self.remove(token);
        }
        if line.ports.is_some() && line.connection.is_over() {
            return self.drop_line(token, true);
        }
        if !line.queued && line.has_to_send() {
            line.queued = true;
            self.ready.push_back(token);
        }
    }

    /// The guest is out of it; what it has sent is still delivered.
    fn let_go(&mut self, token: Token) {
        self.ready.retain(|ready| *ready != token);
        let Some(line) = self.lines.get_mut(&token) else {
            return;
        };
        if let Some(ports) = line.ports.take() {
            self.tokens.remove(&ports);
        }
        line.queued = false;
    }

    /// Ends a connection, and tells the guest if it knows of it.
    fn drop_line(&mut self, token: Token, tell: bool) {
        if let Some(ports) = self.lines.get(&token).and_then(|line| line.ports)
            && tell
        {
            self.resets.push_back(Reset {
                cid: HOST_CID,
                ports,
                kind: STREAM,
            });
        }
        self.remove(token);
    }

    fn remove(&mut self, token: Token) {
        self.let_go(token);
        self.lines.remove(&token);
    }
}

/// What a line has for the guest: op, flags, length and credit of a header, and `data`.
fn next_packet<S: Stream>(line: &mut Line<S>, data: &mut [u8]) -> Option<Header> {
    let (op, flags, length) = loop {
        if let Some((op, flags)) = line.connection.speak() {
            break (op, flags, 0);
        }
        let room = data.len().min(line.connection.credit() as usize);
        if !line.readable || room == 0 {
            return None;
        }
        match line.stream.read(&mut data[..room]) {
            Ok(0) => {
                line.readable = false;
                line.connection.host_ended(if line.hung_up { BOTH } else { SEND });
            }
            Ok(count) => {
                line.connection.sent(count as u32);
                break (op::RW, 0, count as u32);
            }
            Err(error) => match error.kind() {
                ErrorKind::Interrupted => {}
                ErrorKind::WouldBlock => line.readable = false,
                _ => {
                    line.readable = false;
                    line.connection.host_ended(BOTH);
                }
            },
        }
    };
    let (window, taken) = line.connection.tell();
    Some(Header {
        length,
        op,
        flags,
        window,
        taken,
        ..Header::default()
    })
}

#[cfg(test)]
mod tests;
