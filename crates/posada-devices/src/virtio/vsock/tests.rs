//! The device with real sockets in front and a driver behind it.

use super::super::driver::{DATA, Driver};
use super::packet::{BOTH, HOST_CID, SEND, op};
use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

const CID: u64 = 5;
/// Where the test's RX buffers lie, and what each takes.
const BUFFERS: u64 = DATA + 0x4_0000;
const BUFFER: u64 = 0x1000;

/// A folder of its own with the VM's socket.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("posada-vsock-{name}-{}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> PathBuf {
        self.0.join("v")
    }

    fn device(&self, cid: u64) -> Arc<Vsock> {
        let _ = std::fs::remove_file(self.socket());
        let listener = UnixListener::bind(self.socket()).unwrap();
        Vsock::new(cid, listener, &self.socket()).unwrap()
    }

    /// A program of the host that asks for a port of the guest.
    fn connect(&self, port: u32) -> UnixStream {
        let mut program = UnixStream::connect(self.socket()).unwrap();
        program.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        program.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        program
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A guest's driver.
struct Guest {
    driver: Driver,
    /// RX chains given back and looked at.
    seen: u16,
}

impl Guest {
    fn new(device: Arc<Vsock>) -> Self {
        let mut guest = Self {
            driver: Driver::new(device, 1),
            seen: 0,
        };
        guest.give_buffers();
        guest
    }

    fn give_buffers(&mut self) {
        (0..8).for_each(|index| self.give_buffer(index));
    }

    fn give_buffer(&mut self, index: u16) {
        let at = BUFFERS + BUFFER * u64::from(index);
        self.driver
            .descriptor(RX, index, at, BUFFER as u32, super::super::driver::WRITE, 0);
        self.driver.offer(RX, index);
    }

    fn send(&mut self, packet: &Header, data: &[u8]) {
        self.driver.put(DATA, &packet.encode());
        self.driver.put(DATA + HEADER as u64, data);
        let length = (HEADER + data.len()) as u32;
        assert_eq!(
            self.driver
                .request(TX, &[(DATA, 20, false), (DATA + 20, length - 20, false)]),
            0
        );
    }

    /// The next packet; its buffer is given again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        self.driver.sink.wait(|| self.driver.used(RX) != self.seen);
        let (head, written) = self.driver.answers(RX, self.seen)[0];
        self.seen = self.seen.wrapping_add(1);
        let bytes = self.driver.get(BUFFERS + BUFFER * u64::from(head), written as usize);
        let packet = Header::decode(bytes[..HEADER].try_into().unwrap());
        assert_eq!(packet.length as usize, bytes.len() - HEADER);
        self.give_buffer(head as u16);
        (packet, bytes[HEADER..].to_vec())
    }
}

fn from_guest(guest_port: u32, host_port: u32, op: u16) -> Header {
    Header {
        source_cid: CID,
        destination_cid: HOST_CID,
        source_port: guest_port,
        destination_port: host_port,
        kind: packet::STREAM,
        op,
        window: 1 << 16,
        ..Header::default()
    }
}

fn data(packet: Header, bytes: &[u8]) -> Header {
    Header {
        length: bytes.len() as u32,
        op: op::RW,
        ..packet
    }
}

/// The guest accepts the connection that a program has asked for; gives the packets' addresses.
fn accept(guest: &mut Guest, program: &mut UnixStream, port: u32) -> Header {
    let (request, _) = guest.receive();
    assert_eq!((request.op, request.destination_port), (op::REQUEST, port));
    let answer = from_guest(port, request.source_port, op::RESPONSE);
    guest.send(&answer, &[]);
    let mut line = vec![0; format!("OK {}\n", request.source_port).len()];
    program.read_exact(&mut line).unwrap();
    assert_eq!(
        String::from_utf8(line).unwrap(),
        format!("OK {}\n", request.source_port)
    );
    answer
}

#[test]
fn a_program_reaches_a_port_of_the_guest() {
    let place = Place::new("host");
    let mut guest = Guest::new(place.device(CID));
    assert_eq!(guest.driver.read::<8>(0x2000), CID.to_le_bytes());
    let mut program = place.connect(1024);
    program.write_all(b"and more").unwrap();
    let addresses = accept(&mut guest, &mut program, 1024);
    let (packet, bytes) = guest.receive();
    assert_eq!((packet.op, &bytes[..]), (op::RW, &b"and more"[..]));
    guest.send(&data(addresses, b"hello"), b"hello");
    let mut hello = [0; 5];
    program.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    drop(program);
    let (packet, _) = guest.receive();
    assert_eq!((packet.op, packet.flags), (op::SHUTDOWN, BOTH));
    guest.send(
        &Header {
            op: op::RST,
            ..addresses
        },
        &[],
    );

    // Nobody listens there.
    let mut program = place.connect(1025);
    let (request, _) = guest.receive();
    guest.send(&from_guest(1025, request.source_port, op::RST), &[]);
    assert_eq!(program.read(&mut hello).unwrap(), 0);
}

#[test]
fn the_guest_reaches_a_program() {
    let place = Place::new("guest");
    let mut guest = Guest::new(place.device(CID));
    guest.send(&from_guest(9, 52, op::REQUEST), &[]);
    assert_eq!(guest.receive().0.op, op::RST, "nobody listens");
    let listener = UnixListener::bind(place.0.join("v_52")).unwrap();
    guest.send(&from_guest(9, 52, op::REQUEST), &[]);
    assert_eq!(guest.receive().0.op, op::RESPONSE);
    let (mut program, _) = listener.accept().unwrap();
    guest.send(&data(from_guest(9, 52, op::RW), b"abc"), b"abc");
    let end = Header {
        flags: SEND,
        ..from_guest(9, 52, op::SHUTDOWN)
    };
    guest.send(&end, &[]);
    let mut all = String::new();
    program.read_to_string(&mut all).unwrap();
    assert_eq!(all, "abc");
    program.write_all(b"answer").unwrap();
    assert_eq!(guest.receive().1, b"answer");
    guest.send(&Header { flags: BOTH, ..end }, &[]);
    assert_eq!(guest.receive().0.op, op::RST);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
}

#[test]
fn bytes_wait_for_buffers_and_for_credit() {
    let place = Place::new("flow");
    let mut guest = Guest::new(place.device(CID));
    let mut program = place.connect(7);
    let mut addresses = accept(&mut guest, &mut program, 7);
    let sent: Vec<u8> = (0..300_000_u32).map(|at| (at / 251) as u8).collect();
    let writer = {
        let (mut program, sent) = (program.try_clone().unwrap(), sent.clone());
        std::thread::spawn(move || program.write_all(&sent).unwrap())
    };
    let mut got = Vec::new();
    while got.len() < sent.len() {
        if got.len() == addresses.taken as usize + (1 << 16) {
            // The window is full: nothing comes until we take something.
            addresses.taken = got.len() as u32;
            guest.send(
                &Header {
                    op: op::CREDIT_UPDATE,
                    ..addresses
                },
                &[],
            );
        }
        let (packet, bytes) = guest.receive();
        assert_eq!(packet.op, op::RW);
        got.extend(bytes);
        assert!(got.len() <= addresses.taken as usize + (1 << 16));
    }
    assert!(got == sent);
    writer.join().unwrap();
    // The other way: a program that does not read makes the guest wait, and then learns of all.
    let chunk = vec![5; 4000];
    let (mut count, mut read, mut known) = (0_u32, 0, 0);
    for _ in 0..200 {
        while count + 4000 - known > WINDOW {
            if read < count {
                program.read_exact(&mut [0; 4000]).unwrap();
                read += 4000;
            }
            if read == count || guest.driver.used(RX) != guest.seen {
                known = guest.receive().0.taken;
            }
        }
        guest.send(&data(addresses, &chunk), &chunk);
        count += 4000;
    }
    guest.send(
        &Header {
            op: op::SHUTDOWN,
            flags: SEND,
            ..addresses
        },
        &[],
    );
    let mut rest = Vec::new();
    program.read_to_end(&mut rest).unwrap();
    assert!(rest.len() as u32 == count - read && rest.iter().all(|byte| *byte == 5));
}

#[test]
fn programs_that_say_something_else_are_turned_away() {
    let place = Place::new("words");
    let mut guest = Guest::new(place.device(CID));
    for words in ["GET / HTTP/1.1\r\n", "CONNECT x\n", "CONNECT 1234567890123456789"] {
        let mut program = UnixStream::connect(place.socket()).unwrap();
        program.write_all(words.as_bytes()).unwrap();
        // An end, or the reset of what it has not read.
        assert!(matches!(program.read(&mut [0]), Ok(0) | Err(_)), "{words}");
    }
    // One that says it slowly is heard, also behind as many silent ones as there may be.
    let silent: Vec<_> = (0..switch::MOST)
        .map(|_| UnixStream::connect(place.socket()).unwrap())
        .collect();
    let mut program = UnixStream::connect(place.socket()).unwrap();
    program.write_all(b"CONN").unwrap();
    drop(silent);
    program.write_all(b"ECT 3\n").unwrap();
    accept(&mut guest, &mut program, 3);
}

#[test]
fn a_reset_of_the_driver_ends_all_connections() {
    let place = Place::new("reset");
    let mut guest = Guest::new(place.device(CID));
    let mut program = place.connect(7);
    accept(&mut guest, &mut program, 7);
    guest.driver.set_status(0);
    assert_eq!(program.read(&mut [0]).unwrap(), 0);
    // Who comes meanwhile waits for the next driver.
    let mut early = place.connect(8);
    guest.driver.start(1);
    guest.seen = 0;
    guest.give_buffers();
    accept(&mut guest, &mut early, 8);
    // A driver that breaks its queue ends them too.
    guest.driver.descriptor(TX, 0, super::super::driver::RAM, 44, 0, 0);
    guest.driver.offer(TX, 0);
    assert_eq!(early.read(&mut [0]).unwrap(), 0);
    guest.driver.sink.wait(|| guest.driver.status() & 64 != 0);
}

#[test]
fn a_restored_guest_hears_that_its_connections_are_gone() {
    let place = Place::new("restore");
    let first = place.device(CID);
    let mut guest = Guest::new(first.clone());
    let mut program = place.connect(7);
    let addresses = accept(&mut guest, &mut program, 7);
    guest.driver.move_to(place.device(CID));
    // It gives the buffer only now.
    guest.driver.make(EVENT, &[(DATA, 8, true)]);
    assert_eq!(guest.driver.wait(EVENT), 4);
    assert_eq!(guest.driver.get(DATA, 4), TRANSPORT_RESET.to_le_bytes());
    guest.send(&data(addresses, b"x"), b"x");
    assert_eq!(guest.receive().0.op, op::RST);
    let mut again = place.connect(8);
    accept(&mut guest, &mut again, 8);
    // The device that was saved has not noticed.
    program.set_nonblocking(true).unwrap();
    assert_eq!(program.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    // One event is enough.
    guest.driver.make(EVENT, &[(DATA, 8, true)]);
    let mut third = place.connect(9);
    accept(&mut guest, &mut third, 9);
    assert_eq!(guest.driver.used(EVENT), 1);
}

#[test]
fn damaged_packets_harm_nobody() {
    let place = Place::new("damage");
    let mut guest = Guest::new(place.device(CID));
    let mut random = crate::testing::Random::new(4);
    for _ in 0..2000 {
        let mut bytes = from_guest(9, 52, random.below(9) as u16).encode();
        for _ in 0..random.below(4) {
            bytes[random.below(HEADER as u64) as usize] = random.next() as u8;
        }
        guest.driver.put(DATA, &bytes);
        // Buffers of any size, for either direction.
        let length = random.below(100) as u32;
        guest
            .driver
            .request(TX, &[(DATA, length, false), (DATA + 0x1000, 64, true)]);
        if guest.driver.used(RX) != guest.seen {
            guest.receive();
        }
    }
    assert_eq!(guest.driver.status() & 64, 0);
    while guest.driver.used(RX) != guest.seen {
        guest.receive();
    }
    guest.send(&from_guest(10, 52, op::REQUEST), &[]);
    while guest.receive().0.destination_port != 10 {}
}
