//! One connection as its packets and the host's stream change it: counts and flags only, no bytes, no I/O.
//!
//! ```text
//!   the host opens                              the guest opens
//!        │                                            │
//!        ▼        REQUEST          RESPONSE           ▼
//!   ┌────────┐  goes out  ┌───────┐ comes in  ┌────────────────┐
//!   │ asking │ ─────────► │ asked │ ────────► │      open      │
//!   └────────┘            └───────┘           └────────────────┘
//!                             │ RST comes in          │ RST comes in, or a packet against the rules,
//!                             ▼                       ▼ or the guest has ended both ways and its bytes are delivered
//!                            gone                    gone
//! ```
//!
//! Each side says how many bytes the other may have on the way ("window") and how many it has taken; the difference is the
//! credit (virtio 1.2 section 5.10.6.3). All counts are modulo 2^32.

use super::packet::{BOTH, Header, RECEIVE, SEND, op};

/// The most bytes of one connection that we keep while the host does not take them.
pub const WINDOW: u32 = 128 << 10;
/// After so many bytes that the host has taken, the guest is told.
const TELL: u32 = WINDOW / 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Asking,
    Asked,
    Open,
}

/// What a packet from the guest was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// Nothing that concerns the host.
    Nothing,
    /// The guest has accepted.
    Opened,
    /// Bytes for the host, which count as received.
    Data,
    /// The guest ends one way or both.
    Ended,
    /// The connection is gone.
    Reset,
    /// It must not be sent now: the connection is gone, and the guest is to be told by an RST.
    Violation,
}

/// A connection's state.
#[derive(Clone, Debug)]
pub struct Connection {
    phase: Phase,
    /// The guest's window, and what it has taken of `sent`.
    guest_window: u32,
    guest_taken: u32,
    /// Bytes to the guest.
    sent: u32,
    /// Bytes from the guest; those of them that the host has; those of them that the guest knows of.
    received: u32,
    taken: u32,
    told: u32,
    /// Ways that are over: [`RECEIVE`] and [`SEND`].
    guest_ended: u32,
    host_ended: u32,
    host_ended_told: u32,
    owes_response: bool,
    owes_credit: bool,
}

impl Connection {
    /// The host asks the guest.
    pub fn from_host() -> Self {
        Self {
            phase: Phase::Asking,
            guest_window: 0,
            guest_taken: 0,
            sent: 0,
            received: 0,
            taken: 0,
            told: 0,
            guest_ended: 0,
            host_ended: 0,
            host_ended_told: 0,
            owes_response: false,
            owes_credit: false,
        }
    }

    /// The guest has asked by `request`, and the host accepts.
    pub fn from_guest(request: &Header) -> Self {
        Self {
            phase: Phase::Open,
            guest_window: request.window,
            guest_taken: request.taken,
            owes_response: true,
            ..Self::from_host()
        }
    }

    /// Takes note of a packet from the guest.
    pub fn hear(&mut self, packet: &Header) -> Heard {
        self.guest_window = packet.window;
        self.guest_taken = packet.taken;
        match (packet.op, self.phase) {
            (op::RST, _) => Heard::Reset,
            (op::RESPONSE, Phase::Asked) => {
                self.phase = Phase::Open;
                Heard::Opened
            }
            (op::SHUTDOWN, Phase::Open) => {
                self.guest_ended |= packet.flags & BOTH;
                Heard::Ended
            }
            (op::RW, Phase::Open) if self.guest_ended & SEND == 0 && packet.length <= self.free() => {
                self.received = self.received.wrapping_add(packet.length);
                Heard::Data
            }
            (op::CREDIT_UPDATE, Phase::Open) => Heard::Nothing,
            (op::CREDIT_REQUEST, Phase::Open) => {
                self.owes_credit = true;
                Heard::Nothing
            }
            _ => Heard::Violation,
        }
    }

    /// The next packet to the guest that carries no data: what it is for, and its flags.
    pub fn speak(&mut self) -> Option<(u16, u32)> {
        if self.phase == Phase::Asking {
            self.phase = Phase::Asked;
            return Some((op::REQUEST, 0));
        }
        if std::mem::take(&mut self.owes_response) {
            return Some((op::RESPONSE, 0));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.host_ended != self.host_ended_told {
            self.host_ended_told = self.host_ended;
            return Some((op::SHUTDOWN, self.host_ended));
        }
        self.owes_credit.then_some((op::CREDIT_UPDATE, 0))
    }

    /// Whether [`Connection::speak`] has something.
    pub fn has_to_speak(&self) -> bool {
        let open = self.phase == Phase::Open;
        self.phase == Phase::Asking
            || self.owes_response
            || open && (self.owes_credit || self.host_ended != self.host_ended_told)
    }

    /// Window and taken bytes for the next packet to the guest, which then knows of them.
    pub fn tell(&mut self) -> (u32, u32) {
        self.told = self.taken;
        self.owes_credit = false;
        (WINDOW, self.taken)
    }

    /// Bytes that may go to the guest now.
    pub fn credit(&self) -> u32 {
        let over = self.guest_ended & RECEIVE | self.host_ended & SEND;
        if self.phase != Phase::Open || over != 0 {
            return 0;
        }
        self.guest_window
            .saturating_sub(self.sent.wrapping_sub(self.guest_taken))
    }

    /// `count` bytes have gone to the guest.
    pub fn sent(&mut self, count: u32) {
        self.sent = self.sent.wrapping_add(count);
    }

    /// The host has taken `count` of the bytes that were received.
    pub fn took(&mut self, count: u32) {
        debug_assert!(count <= self.kept());
        self.taken = self.taken.wrapping_add(count);
        self.owes_credit |= self.taken.wrapping_sub(self.told) >= TELL;
    }

    /// The host ends one way or both: [`RECEIVE`] and [`SEND`].
    pub fn host_ended(&mut self, ways: u32) {
        self.host_ended |= ways;
    }

    /// Whether the host has ended all of `ways`.
    pub fn has_host_ended(&self, ways: u32) -> bool {
        self.host_ended & ways == ways
    }

    /// Whether the guest has ended all of `ways`.
    pub fn has_guest_ended(&self, ways: u32) -> bool {
        self.guest_ended & ways == ways
    }

    /// Bytes received that the host has not taken.
    pub fn kept(&self) -> u32 {
        self.received.wrapping_sub(self.taken)
    }

    /// The guest has not answered yet: its socket may not even exist.
    pub fn is_unanswered(&self) -> bool {
        self.phase != Phase::Open
    }

    /// The guest knows of it.
    pub fn is_known(&self) -> bool {
        self.phase != Phase::Asking
    }

    /// The guest wants no more and the host has all: an RST says so (virtio 1.2 section 5.10.6.5).
    pub fn is_over(&self) -> bool {
        self.guest_ended == BOTH && self.kept() == 0
    }

    fn free(&self) -> u32 {
        WINDOW - self.kept()
    }
}

#[cfg(test)]
mod tests {
    use super::super::packet::STREAM;
    use super::*;
    use crate::testing::Random;

    fn packet(op: u16) -> Header {
        Header {
            kind: STREAM,
            op,
            window: 1000,
            ..Header::default()
        }
    }

    fn open() -> Connection {
        let mut connection = Connection::from_guest(&packet(op::REQUEST));
        assert_eq!(connection.speak(), Some((op::RESPONSE, 0)));
        connection
    }

    #[test]
    fn the_host_asks_and_the_guest_answers() {
        let mut connection = Connection::from_host();
        assert_eq!(connection.clone().hear(&packet(op::RESPONSE)), Heard::Violation);
        assert_eq!(connection.speak(), Some((op::REQUEST, 0)));
        assert_eq!((connection.speak(), connection.credit()), (None, 0));
        assert_eq!(connection.clone().hear(&packet(op::RST)), Heard::Reset);
        for early in [op::RW, op::SHUTDOWN, op::REQUEST, op::CREDIT_UPDATE, 0, 8] {
            assert_eq!(connection.clone().hear(&packet(early)), Heard::Violation, "{early}");
        }
        assert_eq!(connection.hear(&packet(op::RESPONSE)), Heard::Opened);
        assert_eq!(connection.credit(), 1000);
        assert_eq!(connection.hear(&packet(op::RESPONSE)), Heard::Violation);
    }

    #[test]
    fn a_guest_that_sends_more_than_its_credit_breaks_the_rules() {
        let mut connection = open();
        let data = |length| Header {
            length,
            ..packet(op::RW)
        };
        assert_eq!(connection.clone().hear(&data(WINDOW + 1)), Heard::Violation);
        assert_eq!(connection.clone().hear(&data(u32::MAX)), Heard::Violation);
        assert_eq!(connection.hear(&data(WINDOW)), Heard::Data);
        assert_eq!(connection.clone().hear(&data(1)), Heard::Violation);
        connection.took(TELL - 1);
        assert_eq!(connection.speak(), None);
        connection.took(1);
        assert_eq!(connection.speak(), Some((op::CREDIT_UPDATE, 0)));
        assert_eq!(connection.tell(), (WINDOW, TELL));
        assert_eq!(connection.speak(), None);
        assert_eq!(connection.hear(&packet(op::CREDIT_REQUEST)), Heard::Nothing);
        assert_eq!(connection.speak(), Some((op::CREDIT_UPDATE, 0)));
    }

    #[test]
    fn each_way_ends_by_itself() {
        let mut connection = open();
        connection.host_ended(SEND);
        assert_eq!(connection.speak(), Some((op::SHUTDOWN, SEND)));
        assert_eq!(connection.credit(), 0);
        let data = Header {
            length: 10,
            ..packet(op::RW)
        };
        assert_eq!(connection.hear(&data), Heard::Data);
        let end = |flags| Header {
            flags,
            ..packet(op::SHUTDOWN)
        };
        assert_eq!(connection.hear(&end(SEND)), Heard::Ended);
        assert_eq!(connection.clone().hear(&data), Heard::Violation);
        assert_eq!(connection.hear(&end(RECEIVE | 0xf0)), Heard::Ended);
        assert!(!connection.is_over(), "the host has still to take 10 bytes");
        connection.took(10);
        assert!(connection.is_over());
        connection.host_ended(RECEIVE);
        assert_eq!(connection.speak(), Some((op::SHUTDOWN, BOTH)));
    }

    #[test]
    fn nonsensical_counts_give_no_credit() {
        let mut connection = open();
        let told = |window, taken| Header {
            window,
            taken,
            ..packet(op::CREDIT_UPDATE)
        };
        connection.sent(100);
        connection.hear(&told(1000, 101));
        assert_eq!(connection.credit(), 0, "it has taken more than there was");
        connection.hear(&told(50, 0));
        assert_eq!(connection.credit(), 0, "its window has shrunk");
        connection.hear(&told(u32::MAX, 100));
        assert_eq!(connection.credit(), u32::MAX);
    }

    #[test]
    fn whatever_the_guest_says_what_is_kept_is_bounded() {
        let mut random = Random::new(8);
        let mut data = 0;
        for _ in 0..300 {
            let mut connection = if random.below(2) == 0 {
                open()
            } else {
                Connection::from_host()
            };
            for _ in 0..200 {
                match random.below(8) {
                    0 => connection.host_ended(random.below(4) as u32),
                    1 => connection.took(random.below(u64::from(connection.kept()) + 1) as u32),
                    2 => {
                        let credit = connection.credit();
                        connection.sent(credit);
                        assert_eq!(connection.credit(), 0);
                    }
                    3 => {
                        assert_eq!(connection.has_to_speak(), connection.clone().speak().is_some());
                        if connection.speak().is_some() {
                            connection.tell();
                        }
                    }
                    _ => {
                        let packet = Header {
                            op: [op::RW, random.below(9) as u16][usize::from(random.below(10) == 0)],
                            length: (random.next() >> (44 + random.below(20))) as u32,
                            flags: if random.below(20) == 0 { random.next() as u32 } else { 0 },
                            window: random.next() as u32,
                            taken: random.next() as u32,
                            ..Header::default()
                        };
                        let before = connection.kept();
                        let heard = connection.hear(&packet);
                        let more = if heard == Heard::Data { packet.length } else { 0 };
                        assert_eq!(connection.kept(), before + more);
                        data += u32::from(heard == Heard::Data);
                        if matches!(heard, Heard::Reset | Heard::Violation) {
                            break;
                        }
                    }
                }
                assert!(connection.kept() <= WINDOW);
            }
        }
        assert!(data > 500, "{data}");
    }
}
