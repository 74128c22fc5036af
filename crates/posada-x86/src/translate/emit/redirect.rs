//! Giving a copied instruction another memory operand.

use crate::translate::assembler::Assembler;
use crate::translate::operation::Operation;

/// The guest's instruction with `[base + offset]` for its memory operand; the base is R10 or R11.
pub(super) fn redirect(a: &mut Assembler, operation: &Operation, base: u8, offset: i32) {
    let bytes = &operation.bytes[..usize::from(operation.length)];
    let mut at = 0;
    while matches!(bytes[at], 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3) {
        // Segment and address size are part of what was computed.
        if matches!(bytes[at], 0x66 | 0xf0 | 0xf2 | 0xf3) {
            a.bytes(&bytes[at..=at]);
        }
        at += 1;
    }
    let evex = bytes[at] == 0x62;
    match bytes[at] {
        // EVEX: as VEX.
        0x62 => {
            a.bytes(&[
                0x62,
                bytes[at + 1] & !0x20 | 0x40,
                bytes[at + 2],
                bytes[at + 3],
                bytes[at + 4],
            ]);
            at += 5;
        }
        // VEX: B and X are inverted.
        0xc4 => {
            a.bytes(&[0xc4, bytes[at + 1] & !0x20 | 0x40, bytes[at + 2], bytes[at + 3]]);
            at += 4;
        }
        0xc5 => {
            let byte = bytes[at + 1];
            a.bytes(&[0xc4, byte & 0x80 | 0x41, byte & 0x7f, bytes[at + 2]]);
            at += 3;
        }
        first => {
            let mut rex = 0x41;
            if first & 0xf0 == 0x40 {
                rex = first & !2 | 1;
                at += 1;
            }
            a.bytes(&[rex]);
            let opcode = match (bytes[at], bytes[at + 1]) {
                (0x0f, 0x38 | 0x3a) => 3,
                (0x0f, _) => 2,
                _ => 1,
            };
            a.bytes(&bytes[at..at + opcode]);
            at += opcode;
        }
    }
    let modrm = bytes[at];
    if evex {
        a.based_evex(modrm >> 3 & 7, base, offset);
    } else {
        a.based(modrm >> 3 & 7, base, offset);
    }
    at += 1;
    let mut low = modrm & 7;
    if low == 4 {
        low = bytes[at] & 7;
        at += 1;
        // Without a base, no base at all.
        at += if low == 5 && modrm >> 6 == 0 { 4 } else { 0 };
    } else if low == 5 && modrm >> 6 == 0 {
        at += 4;
    }
    at += match modrm >> 6 {
        1 => 1,
        2 => 4,
        _ => 0,
    };
    a.bytes(&bytes[at..]);
}
