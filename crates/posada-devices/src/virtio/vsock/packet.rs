//! The header in front of every packet (virtio 1.2 section 5.10.6), and nothing of what it means.

/// Bytes of a header.
pub const HEADER: usize = 44;
/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The only type of socket here: VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;

/// Bits of a SHUTDOWN packet: its sender receives no more, sends no more.
pub const RECEIVE: u32 = 1;
/// See [`RECEIVE`].
pub const SEND: u32 = 2;
/// Both.
pub const BOTH: u32 = RECEIVE | SEND;

/// VIRTIO_VSOCK_OP_*.
pub mod op {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet's header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub source_cid: u64,
    /// Context id of the receiver.
    pub destination_cid: u64,
    /// Port of the sender.
    pub source_port: u32,
    /// Port of the receiver.
    pub destination_port: u32,
    /// Bytes that follow, in an RW packet.
    pub length: u32,
    /// Type of the socket: [`STREAM`].
    pub kind: u16,
    /// What it is for: [`op`].
    pub op: u16,
    /// Of a SHUTDOWN packet: [`RECEIVE`] and [`SEND`].
    pub flags: u32,
    /// Bytes of the sender's buffer for this connection.
    pub window: u32,
    /// Bytes that have left that buffer, modulo 2^32.
    pub taken: u32,
}

impl Header {
    /// Reads a header as it lies in guest memory.
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
        let half = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().expect("2 bytes"));
        Self {
            source_cid: long(0),
            destination_cid: long(8),
            source_port: word(16),
            destination_port: word(20),
            length: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            window: word(36),
            taken: word(40),
        }
    }

    /// Writes it as it lies in guest memory.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.destination_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.window.to_le_bytes());
        put(40, &self.taken.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;

    #[test]
    fn a_header_is_laid_out_as_in_the_specification() {
        let header = Header {
            source_cid: 0x0102_0304_0506_0708,
            destination_cid: 2,
            source_port: 0x1112_1314,
            destination_port: 0x2122_2324,
            length: 0x3132_3334,
            kind: STREAM,
            op: op::RW,
            flags: 0x4142_4344,
            window: 0x5152_5354,
            taken: 0x6162_6364,
        };
        let bytes = header.encode();
        assert_eq!(bytes[..9], [8, 7, 6, 5, 4, 3, 2, 1, 2]);
        assert_eq!(bytes[16..20], [0x14, 0x13, 0x12, 0x11]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[40..], [0x64, 0x63, 0x62, 0x61]);
    }

    #[test]
    fn any_bytes_are_a_header_and_come_back() {
        let mut random = Random::new(3);
        for _ in 0..1000 {
            let bytes: [u8; HEADER] = std::array::from_fn(|_| random.next() as u8);
            assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}
