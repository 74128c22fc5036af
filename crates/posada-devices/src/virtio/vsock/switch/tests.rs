//! A guest that keeps to the rules gets every byte in order, whatever the two sides do; one that does not gets no memory.

use super::super::connection::WINDOW;
use super::*;
use crate::testing::Random;
use std::cell::RefCell;
use std::rc::Rc;

const GUEST: u64 = 7;
/// Bytes that a pipe of the host holds.
const PIPE: usize = 5000;

/// The far end of a stream, as the host's program sees it.
#[derive(Default)]
struct Far {
    /// From the guest: bytes, and whether they have ended.
    inbox: VecDeque<u8>,
    inbox_ended: bool,
    /// To the guest.
    outbox: VecDeque<u8>,
    outbox_ended: bool,
    /// The program is gone.
    gone: bool,
    opened: Option<u32>,
    blocked: bool,
}

#[derive(Clone, Default)]
struct Near(Rc<RefCell<Far>>);

impl Stream for Near {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let mut far = self.0.borrow_mut();
        let count = bytes.len().min(far.outbox.len());
        if count == 0 && !far.outbox_ended && !far.gone {
            return Err(ErrorKind::WouldBlock.into());
        }
        bytes
            .iter_mut()
            .zip(far.outbox.drain(..count))
            .for_each(|(to, from)| *to = from);
        Ok(count)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut far = self.0.borrow_mut();
        let count = bytes.len().min(PIPE - far.inbox.len());
        if far.gone {
            return Err(ErrorKind::BrokenPipe.into());
        }
        assert!(!far.inbox_ended, "bytes behind the end");
        if count == 0 {
            return Err(ErrorKind::WouldBlock.into());
        }
        far.inbox.extend(&bytes[..count]);
        Ok(count)
    }

    fn shut(&mut self, way: Shutdown) {
        if way == Shutdown::Write {
            self.0.borrow_mut().inbox_ended = true;
        }
    }

    fn opened(&mut self, port: u32) -> io::Result<()> {
        self.0.borrow_mut().opened = Some(port);
        Ok(())
    }

    fn blocked(&mut self, blocked: bool) {
        self.0.borrow_mut().blocked = blocked;
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        if Rc::strong_count(&self.0) == 2 {
            self.0.borrow_mut().inbox_ended = true;
        }
    }
}

fn packet(guest_port: u32, host_port: u32, op: u16) -> Header {
    Header {
        source_cid: GUEST,
        destination_cid: HOST_CID,
        source_port: guest_port,
        destination_port: host_port,
        kind: STREAM,
        op,
        window: 1 << 16,
        ..Header::default()
    }
}

fn nobody(_: u32) -> io::Result<(Token, Near)> {
    Err(ErrorKind::ConnectionRefused.into())
}

fn data(guest_port: u32, host_port: u32, bytes: &[u8]) -> Header {
    Header {
        length: bytes.len() as u32,
        ..packet(guest_port, host_port, op::RW)
    }
}

/// What the guest gets next: op, flags and data.
fn next(switch: &mut Switch<Near>) -> Option<(u16, u32, Vec<u8>)> {
    let mut data = vec![0; 4096];
    let packet = switch.send(&mut data)?;
    assert_eq!((packet.destination_cid, packet.kind), (GUEST, STREAM));
    data.truncate(packet.length as usize);
    Some((packet.op, packet.flags, data))
}

/// A connection that the guest has opened from port 10 to port 80.
fn opened() -> (Switch<Near>, Near) {
    let (mut switch, stream) = (Switch::new(GUEST), Near::default());
    let near = stream.clone();
    switch.receive(&packet(10, 80, op::REQUEST), &[], |port| {
        assert_eq!(port, 80);
        Ok((1, near))
    });
    assert_eq!(next(&mut switch), Some((op::RESPONSE, 0, vec![])));
    assert_eq!(next(&mut switch), None);
    (switch, stream)
}

const READABLE: Readiness = Readiness {
    readable: true,
    writable: false,
    hung_up: false,
};
const WRITABLE: Readiness = Readiness {
    readable: false,
    writable: true,
    hung_up: false,
};
const HUNG_UP: Readiness = Readiness {
    readable: true,
    writable: true,
    hung_up: true,
};

#[test]
fn what_nobody_knows_is_refused_once() {
    let mut switch = Switch::new(GUEST);
    let refused = |switch: &mut Switch<Near>, packet: &Header| {
        switch.receive(packet, &[], nobody);
        let answer = switch.send(&mut []);
        assert_eq!(switch.send(&mut []), None);
        answer.map(|answer| {
            assert_eq!((answer.op, answer.destination_cid), (op::RST, GUEST));
            assert_eq!((answer.source_port, answer.destination_port), (80, 10));
            (answer.source_cid, answer.kind)
        })
    };
    for op in 0..10 {
        let expected = (op != op::RST).then_some((HOST_CID, STREAM));
        assert_eq!(refused(&mut switch, &packet(10, 80, op)), expected, "{op}");
    }
    let elsewhere = Header {
        destination_cid: 99,
        ..packet(10, 80, op::REQUEST)
    };
    assert_eq!(refused(&mut switch, &elsewhere), Some((99, STREAM)));
    let datagram = Header {
        kind: 3,
        ..packet(10, 80, op::RW)
    };
    assert_eq!(refused(&mut switch, &datagram), Some((HOST_CID, 3)));
    let forged = Header {
        source_cid: GUEST + 1,
        ..packet(10, 80, op::REQUEST)
    };
    assert_eq!(refused(&mut switch, &forged), None);
}

#[test]
fn the_host_opens_and_learns_its_port() {
    let (mut switch, stream) = (Switch::new(GUEST), Near::default());
    switch.open(1, stream.clone(), 22);
    stream.0.borrow_mut().outbox.extend(b"early");
    let request = switch.send(&mut [0; 100]).unwrap();
    assert_eq!((request.op, request.destination_port), (op::REQUEST, 22));
    assert_eq!(next(&mut switch), None);
    assert_eq!(stream.0.borrow().opened, None);
    switch.receive(&packet(22, request.source_port, op::RESPONSE), &[], nobody);
    assert_eq!(stream.0.borrow().opened, Some(request.source_port));
    assert_eq!(next(&mut switch), Some((op::RW, 0, b"early".to_vec())));

    // Who gives up before the guest has heard of it leaves no trace; after that the guest is told.
    let (silent, told) = (Near::default(), Near::default());
    switch.open(2, silent, 23);
    switch.ready(2, HUNG_UP);
    assert_eq!(next(&mut switch), None);
    switch.open(3, told, 24);
    assert_eq!(next(&mut switch).unwrap().0, op::REQUEST);
    switch.ready(3, HUNG_UP);
    assert_eq!(next(&mut switch).unwrap().0, op::RST);

    // A guest that refuses ends the stream.
    let refused = Near::default();
    switch.open(4, refused.clone(), 25);
    let request = switch.send(&mut []).unwrap();
    switch.receive(&packet(25, request.source_port, op::RST), &[], nobody);
    assert!(refused.0.borrow().inbox_ended);
    assert_eq!((next(&mut switch), switch.kept()), (None, (0, 0)));
}

#[test]
fn each_way_ends_when_its_bytes_have_arrived() {
    let (mut switch, stream) = opened();
    // The host's end comes behind its bytes.
    stream.0.borrow_mut().outbox.extend(b"last words");
    stream.0.borrow_mut().outbox_ended = true;
    switch.ready(1, READABLE);
    assert_eq!(next(&mut switch), Some((op::RW, 0, b"last words".to_vec())));
    assert_eq!(next(&mut switch), Some((op::SHUTDOWN, SEND, vec![])));
    // The guest's too.
    let bytes = vec![7; PIPE + 10];
    switch.receive(&data(10, 80, &bytes), &bytes, nobody);
    assert!(stream.0.borrow().blocked);
    let end = |flags| Header {
        flags,
        ..packet(10, 80, op::SHUTDOWN)
    };
    switch.receive(&end(SEND), &[], nobody);
    assert!(!stream.0.borrow().inbox_ended);
    assert_eq!(next(&mut switch), None);
    switch.receive(&end(RECEIVE), &[], nobody);
    assert_eq!(next(&mut switch), None, "10 bytes are still here");
    stream.0.borrow_mut().inbox.clear();
    switch.ready(1, WRITABLE);
    assert_eq!(stream.0.borrow().inbox, vec![7; 10]);
    assert!(stream.0.borrow().inbox_ended && !stream.0.borrow().blocked);
    assert_eq!(next(&mut switch), Some((op::RST, 0, vec![])));
    switch.receive(&packet(10, 80, op::RST), &[], nobody);
    assert_eq!((next(&mut switch), switch.lines.len()), (None, 0));
}

#[test]
fn bytes_of_a_guest_that_has_left_are_delivered_and_its_ports_are_free() {
    let (mut switch, stream) = opened();
    let bytes = vec![7; PIPE + 10];
    switch.receive(&data(10, 80, &bytes), &bytes, nobody);
    switch.receive(&packet(10, 80, op::RST), &[], nobody);
    let again = Near::default();
    switch.receive(&packet(10, 80, op::REQUEST), &[], |_| Ok((2, again.clone())));
    assert_eq!(next(&mut switch).unwrap().0, op::RESPONSE);
    stream.0.borrow_mut().inbox.clear();
    switch.ready(1, WRITABLE);
    assert_eq!(stream.0.borrow().inbox.len(), 10);
    assert!(stream.0.borrow().inbox_ended);
    assert!(!again.0.borrow().inbox_ended);
    assert_eq!(switch.lines.len(), 1);
}

#[test]
fn a_program_that_dies_ends_both_ways() {
    let (mut switch, stream) = opened();
    let bytes = vec![7; PIPE + 10];
    switch.receive(&data(10, 80, &bytes), &bytes, nobody);
    stream.0.borrow_mut().outbox.extend(b"last words");
    stream.0.borrow_mut().gone = true;
    switch.ready(1, HUNG_UP);
    // It takes no more, and what it has sent goes first.
    let (op, flags, _) = next(&mut switch).unwrap();
    assert_eq!((op, flags), (op::SHUTDOWN, RECEIVE));
    assert_eq!(next(&mut switch), Some((op::RW, 0, b"last words".to_vec())));
    assert_eq!(next(&mut switch), Some((op::SHUTDOWN, BOTH, vec![])));
    switch.receive(&data(10, 80, &bytes), &bytes, nobody);
    assert_eq!(switch.kept().0, 0);
    switch.receive(&packet(10, 80, op::RST), &[], nobody);
    assert_eq!(switch.lines.len(), 0);
}

#[test]
fn a_guest_that_breaks_the_rules_loses_its_connection() {
    let big = vec![7; WINDOW as usize];
    let bad: [(Header, &[u8]); 5] = [
        (packet(10, 80, op::REQUEST), &[]),
        (packet(10, 80, op::RESPONSE), &[]),
        (packet(10, 80, 77), &[]),
        // Less than it says.
        (data(10, 80, &big[..100]), &big[..99]),
        (
            Header {
                length: WINDOW + 1,
                ..data(10, 80, &big)
            },
            &big,
        ),
    ];
    for (packet, bytes) in bad {
        let (mut switch, stream) = opened();
        switch.receive(&packet, bytes, nobody);
        assert_eq!(next(&mut switch), Some((op::RST, 0, vec![])));
        assert!(stream.0.borrow().inbox_ended);
        assert_eq!((switch.kept(), switch.lines.len()), ((0, 0), 0));
    }
}

#[test]
fn guest_and_host_have_their_own_bounds() {
    let mut switch = Switch::new(GUEST);
    for port in 0..200 {
        switch.receive(&packet(port, 80, op::REQUEST), &[], |_| {
            Ok((u64::from(port) + 1, Near::default()))
        });
    }
    assert_eq!(switch.lines.len(), MOST);
    assert_eq!(switch.room_for_host(), MOST);
    let answers: Vec<_> = std::iter::from_fn(|| next(&mut switch))
        .map(|answer| answer.0)
        .collect();
    let count = |op| answers.iter().filter(|answer| **answer == op).count();
    assert_eq!((count(op::RST), count(op::RESPONSE)), (200 - MOST, MOST));
    // RSTs that are not taken stop the guest.
    let mut refused = 0;
    while switch.can_receive() {
        switch.receive(&packet(refused, 81, op::RW), &[], nobody);
        refused += 1;
    }
    assert_eq!(refused as usize, MOST_RESETS);
    next(&mut switch);
    assert!(switch.can_receive());
    switch.clear();
    assert_eq!((switch.lines.len(), next(&mut switch)), (0, None));
}

#[test]
fn every_connection_has_its_turn() {
    let mut switch = Switch::new(GUEST);
    for port in [1, 2] {
        let stream = Near::default();
        stream.0.borrow_mut().outbox.extend(vec![port as u8; 40_000]);
        switch.receive(&packet(port, 80, op::REQUEST), &[], |_| Ok((port.into(), stream)));
    }
    let turns: Vec<_> = std::iter::from_fn(|| next(&mut switch))
        .filter_map(|(_, _, data)| data.first().copied())
        .collect();
    assert_eq!(turns[..6], [1, 2, 1, 2, 1, 2]);
    assert_eq!(turns.len(), 20);
}

/// One end of a connection, with what has come and what is to go.
struct End {
    to_send: VecDeque<u8>,
    got: Vec<u8>,
}

/// A guest's socket that keeps to the rules.
struct GuestSocket {
    port: u32,
    window: u32,
    buffer: VecDeque<u8>,
    taken: u32,
    sent: u32,
    host_window: u32,
    host_taken: u32,
    host_ended: u32,
    answered: bool,
    ended: bool,
    reset: bool,
    end: End,
}

impl GuestSocket {
    fn packet(&self, op: u16) -> Header {
        Header {
            window: self.window,
            taken: self.taken,
            ..packet(self.port, 80, op)
        }
    }

    fn hear(&mut self, packet: &Header, data: &[u8]) {
        assert!(!self.reset, "a packet behind an RST");
        if packet.op == op::RST {
            self.reset = true;
            assert!(self.ended, "it has kept to the rules");
            return;
        }
        self.host_window = packet.window;
        self.host_taken = packet.taken;
        match packet.op {
            op::RESPONSE => self.answered = true,
            op::RW => {
                assert!(self.answered && self.host_ended & SEND == 0);
                self.buffer.extend(data);
                assert!(self.buffer.len() <= self.window as usize, "more than the credit");
            }
            op::SHUTDOWN => self.host_ended |= packet.flags,
            op::CREDIT_UPDATE => {}
            other => panic!("op {other}"),
        }
    }
}

#[test]
fn all_bytes_arrive_in_order_whatever_the_pace() {
    for seed in 0..40 {
        let mut random = Random::new(seed);
        let mut switch = Switch::<Near>::new(GUEST);
        let (mut guests, mut hosts) = (Vec::new(), Vec::new());
        for port in 0..1 + random.below(4) as u32 {
            let mut bytes = || {
                let count = random.below(400_000);
                (0..count)
                    .map(|at| (at / 7 + u64::from(port)) as u8)
                    .collect::<Vec<u8>>()
            };
            let (of_guest, of_host) = (bytes(), bytes());
            let end = |bytes: &[u8]| End {
                to_send: bytes.to_vec().into(),
                got: Vec::new(),
            };
            let guest = GuestSocket {
                port,
                window: [100, 4096, 1 << 18][random.below(3) as usize],
                buffer: VecDeque::new(),
                taken: 0,
                sent: 0,
                host_window: 0,
                host_taken: 0,
                host_ended: 0,
                answered: false,
                ended: false,
                reset: false,
                end: end(&of_guest),
            };
            let stream = Near::default();
            let near = stream.clone();
            switch.receive(&guest.packet(op::REQUEST), &[], |_| Ok((port.into(), near)));
            hosts.push((stream, end(&of_host), of_guest));
            guests.push((guest, of_host));
        }
        let mut steps = 0;
        while guests.iter().any(|(guest, _)| !guest.reset) {
            steps += 1;
            assert!(steps < 500_000, "it stands still");
            let which = random.below(guests.len() as u64) as usize;
            let (guest, of_host) = &mut guests[which];
            let (stream, end, _) = &mut hosts[which];
            let token = which as u64;
            match random.below(7) {
                // The guest's program writes, and at the end closes when it has all.
                0 if guest.answered && !guest.ended => {
                    let credit = guest.host_window - guest.sent.wrapping_sub(guest.host_taken);
                    let most = random
                        .below(70_000)
                        .min(u64::from(credit))
                        .min(guest.end.to_send.len() as u64);
                    let bytes: Vec<u8> = guest.end.to_send.drain(..most as usize).collect();
                    if !bytes.is_empty() {
                        let packet = Header {
                            length: bytes.len() as u32,
                            ..guest.packet(op::RW)
                        };
                        guest.sent = guest.sent.wrapping_add(packet.length);
                        switch.receive(&packet, &bytes, nobody);
                    }
                    let has_all = guest.host_ended & SEND != 0 && guest.buffer.is_empty();
                    if guest.end.to_send.is_empty() && has_all {
                        let packet = Header {
                            flags: BOTH,
                            ..guest.packet(op::SHUTDOWN)
                        };
                        guest.ended = true;
                        switch.receive(&packet, &[], nobody);
                    }
                }
                // It reads.
                1 if !guest.buffer.is_empty() => {
                    let most = guest.buffer.len().min(1 + random.below(100_000) as usize);
                    guest.end.got.extend(guest.buffer.drain(..most));
                    guest.taken = guest.taken.wrapping_add(most as u32);
                    switch.receive(&guest.packet(op::CREDIT_UPDATE), &[], nobody);
                    assert!(guest.end.got.len() <= of_host.len());
                }
                // The host's program reads.
                2 | 3 => {
                    let mut far = stream.0.borrow_mut();
                    let most = far.inbox.len().min(1 + random.below(2 * PIPE as u64) as usize);
                    end.got.extend(far.inbox.drain(..most));
                    let blocked = far.blocked;
                    drop(far);
                    if blocked && most > 0 {
                        switch.ready(token, WRITABLE);
                    }
                }
                // It writes, and ends.
                4 => {
                    let mut far = stream.0.borrow_mut();
                    let most = (PIPE - far.outbox.len()).min(end.to_send.len());
                    far.outbox.extend(end.to_send.drain(..most));
                    let ends =
                        end.to_send.is_empty() && !std::mem::replace(&mut far.outbox_ended, end.to_send.is_empty());
                    drop(far);
                    if most > 0 || ends {
                        switch.ready(token, READABLE);
                    }
                }
                // The guest's driver takes a packet.
                _ => {
                    let mut data = vec![0; [60, 4096, 1 << 16][random.below(3) as usize]];
                    if let Some(packet) = switch.send(&mut data) {
                        let (guest, _) = &mut guests[packet.destination_port as usize];
                        guest.hear(&packet, &data[..packet.length as usize]);
                    }
                }
            }
        }
        for ((guest, of_host), (stream, end, of_guest)) in guests.iter().zip(&mut hosts) {
            end.got.extend(stream.0.borrow_mut().inbox.drain(..));
            assert!(guest.end.got == *of_host && end.got == *of_guest, "seed {seed}");
        }
        assert_eq!((switch.lines.len(), switch.kept()), (0, (0, 0)), "seed {seed}");
    }
}

#[test]
fn a_hostile_guest_gets_no_memory() {
    let mut random = Random::new(12);
    let (mut token, mut opened, mut most) = (0, 0, 0);
    let bytes = vec![3; WINDOW as usize];
    for _ in 0..200 {
        let mut switch = Switch::<Near>::new(GUEST);
        let mut streams = Vec::new();
        for _ in 0..400 {
            match random.below(10) {
                0 if switch.room_for_host() > 0 => {
                    token += 1;
                    streams.push(Near::default());
                    switch.open(token, streams.last().unwrap().clone(), random.below(3) as u32);
                }
                1 => {
                    let now = [READABLE, WRITABLE, HUNG_UP][random.below(3) as usize];
                    switch.ready(random.below(token + 1), now);
                }
                2 => {
                    switch.send(&mut [0; 4096]);
                }
                _ if switch.can_receive() => {
                    let host = if random.below(2) == 0 {
                        random.below(3)
                    } else {
                        u64::from(FIRST_PORT) + random.below(30)
                    };
                    let mut packet = packet(random.below(3) as u32, host as u32, random.below(9) as u16);
                    packet.flags = random.below(4) as u32;
                    packet.window = random.next() as u32;
                    packet.taken = random.next() as u32;
                    let length = random.below(u64::from(WINDOW) + 1) as usize;
                    packet.length = if random.below(10) == 0 {
                        random.next() as u32
                    } else {
                        length as u32
                    };
                    if random.below(50) == 0 {
                        packet.kind = random.next() as u16;
                    }
                    switch.receive(&packet, &bytes[..length], |_| {
                        token += 1;
                        opened += 1;
                        streams.push(Near::default());
                        Ok((token, streams.last().unwrap().clone()))
                    });
                }
                _ => {}
            }
            let (kept, turns) = switch.kept();
            most = most.max(kept);
            assert!(kept <= switch.lines.len() * WINDOW as usize);
            assert!(switch.lines.len() <= 2 * MOST && switch.tokens.len() <= switch.lines.len());
            assert!(turns <= MOST_RESETS + 4 * MOST, "{turns}");
        }
    }
    assert!(opened > 1000 && most > 2 * WINDOW as usize, "{opened} {most}");
}
