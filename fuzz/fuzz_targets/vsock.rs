//! A guest that sends any packets over a virtio-vsock, and programs of the host that come, go, and are slow: what the device
//! keeps for either is bounded, and the guest never gets more than its credit or a packet of a connection that is gone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_devices::virtio::vsock::connection::WINDOW;
use posada_devices::virtio::vsock::packet::{HEADER, HOST_CID, Header, STREAM, op};
use posada_devices::virtio::vsock::switch::{MOST, Readiness, Stream, Switch};
use std::collections::HashSet;
use std::io::{self, ErrorKind};
use std::net::Shutdown;

const GUEST: u64 = 3;

/// A program that takes and gives so many bytes, and then waits, ends or fails.
struct Program {
    takes: usize,
    gives: usize,
    then: u8,
}

impl Program {
    fn end<T>(&self, ended: T) -> io::Result<T> {
        match self.then % 4 {
            0 | 1 => Err(ErrorKind::WouldBlock.into()),
            2 => Ok(ended),
            _ => Err(ErrorKind::ConnectionReset.into()),
        }
    }
}

impl Stream for Program {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        assert!(!bytes.is_empty());
        let count = bytes.len().min(self.gives);
        self.gives -= count;
        if count == 0 { self.end(0) } else { Ok(count) }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.takes);
        self.takes -= count;
        if count == 0 { self.end(0) } else { Ok(count) }
    }

    fn shut(&mut self, _: Shutdown) {}

    fn opened(&mut self, _: u32) -> io::Result<()> {
        self.end(())
    }

    fn blocked(&mut self, _: bool) {}
}

/// Numbers out of the fuzzer's bytes.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn take(&mut self, bytes: usize) -> Option<u32> {
        let (head, tail) = self.0.split_at_checked(bytes)?;
        self.0 = tail;
        Some(head.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn program(&mut self) -> Option<Program> {
        Some(Program {
            takes: self.take(3)? as usize,
            gives: self.take(3)? as usize,
            then: self.take(1)? as u8,
        })
    }

    fn packet(&mut self) -> Option<Header> {
        if self.take(1)? == 0 {
            let (head, tail) = self.0.split_at_checked(HEADER)?;
            self.0 = tail;
            return Some(Header::decode(head.try_into().expect("44 bytes")));
        }
        let host = self.take(1)?;
        Some(Header {
            source_cid: GUEST,
            destination_cid: HOST_CID,
            source_port: self.take(1)? % 8,
            destination_port: if host < 128 { host % 8 } else { (1 << 30) + host % 16 },
            length: self.take(3)?,
            kind: STREAM,
            op: self.take(1)? as u16 % 9,
            flags: self.take(1)? % 4,
            window: self.take(3)?,
            taken: self.take(2)?,
        })
    }
}

fn step(
    switch: &mut Switch<Program>,
    open: &mut HashSet<(u32, u32)>,
    token: &mut u64,
    choices: &mut Choices<'_>,
) -> Option<()> {
    match choices.take(1)? % 8 {
        0 if switch.room_for_host() > 0 => {
            *token += 1;
            let port = choices.take(1)? % 8;
            switch.open(*token, choices.program()?, port);
        }
        1 => {
            let bits = choices.take(1)?;
            let now = Readiness {
                readable: bits & 1 != 0,
                writable: bits & 2 != 0,
                hung_up: bits & 4 != 0,
            };
            switch.ready(u64::from(choices.take(1)?) % (*token + 1), now);
        }
        2 | 3 => {
            let mut data = vec![0; choices.take(2)? as usize];
            let Some(packet) = switch.send(&mut data) else {
                return Some(());
            };
            assert!(packet.length as usize <= data.len() && packet.destination_cid == GUEST);
            let ports = (packet.destination_port, packet.source_port);
            match packet.op {
                op::RST => drop(open.remove(&ports)),
                op::REQUEST | op::RESPONSE => assert!(open.insert(ports), "opened twice"),
                _ => assert!(open.contains(&ports), "of no connection"),
            }
        }
        _ if switch.can_receive() => {
            let packet = choices.packet()?;
            let there = packet.length.min(WINDOW) as usize;
            let data = vec![1; if choices.take(1)? < 16 { there / 2 } else { there }];
            let program = choices.program()?;
            if (packet.op, packet.kind) == (op::RST, STREAM)
                && (packet.source_cid, packet.destination_cid) == (GUEST, HOST_CID)
            {
                open.remove(&(packet.source_port, packet.destination_port));
            }
            switch.receive(&packet, &data, |_| {
                *token += 1;
                if program.then & 128 != 0 {
                    return Err(ErrorKind::ConnectionRefused.into());
                }
                Ok((*token, program))
            });
        }
        _ => {}
    }
    let (bytes, turns) = switch.kept();
    assert!(bytes <= 2 * MOST * WINDOW as usize && turns <= 1024);
    Some(())
}

fuzz_target!(|input: &[u8]| {
    let mut switch = Switch::new(GUEST);
    let (mut open, mut token, mut choices) = (HashSet::new(), 0, Choices(input));
    while step(&mut switch, &mut open, &mut token, &mut choices).is_some() {}
    switch.clear();
    assert_eq!(switch.kept(), (0, 0));
});
