//! The guest's vector registers in the processor: how much of them is there, and the code that brings them and takes them
//! back.
//!
//! A guest that uses no AVX-512 pays nothing for it: a block loads what its instructions need, and what was loaded is what
//! Rust finds saved. ZMM0-15 are there without their upper halves as long as these are zero, as they are in what legacy and
//! VEX encodings make of them; the Core knows ([`crate::core::VectorState::zmm_high_used`]).

use super::assembler::{Assembler, Hole, condition};
use super::frame;

/// What is in the processor, not in the Core ([`frame::Frame::vectors_live`]).
pub mod live {
    /// Nothing.
    pub const NONE: u8 = 0;
    /// YMM0-15 and MXCSR. The upper halves of ZMM0-15 are zero, in the processor and in the Core.
    pub const YMM: u8 = 1;
    /// The same, ZMM16-31 and the opmasks.
    pub const UPPER: u8 = 2;
    /// The upper halves of ZMM0-15 too.
    pub const ALL: u8 = 3;
}

/// What this host has.
#[derive(Clone, Copy, Debug)]
pub struct Host {
    /// YMM registers.
    pub avx: bool,
    /// ZMM registers and opmasks.
    pub avx512: bool,
}

impl Host {
    /// Looks.
    pub fn detect() -> Self {
        Self {
            avx: std::arch::is_x86_feature_detected!("avx"),
            avx512: crate::native::shown(iced_x86::CpuidFeature::AVX512F),
        }
    }
}

/// An opcode of EVEX encodings of 512 bits.
#[derive(Clone, Copy)]
struct Evex {
    map: u8,
    prefix: u8,
    wide: bool,
    opcode: u8,
}

const LOAD: Evex = evex(1, 0, false, 0x10);
const STORE: Evex = evex(1, 0, false, 0x11);
const INSERT_HALF: Evex = evex(3, 1, true, 0x1a);
const EXTRACT_HALF: Evex = evex(3, 1, true, 0x1b);
/// VPTERNLOGQ; with [`OR`], the disjunction of three.
const TERNARY: Evex = evex(3, 1, true, 0x25);
const OR: u8 = 0xfe;

const fn evex(map: u8, prefix: u8, wide: bool, opcode: u8) -> Evex {
    Evex {
        map,
        prefix,
        wide,
        opcode,
    }
}

impl Evex {
    /// The encoding up to its opcode; `rm` is a register, or 0 for memory.
    fn bytes(self, reg: u8, other: u8, rm: u8) -> [u8; 6] {
        let inverted = |number: u8, bit: u8, to: u8| (!number >> bit & 1) << to;
        let first = inverted(reg, 3, 7) | inverted(rm, 4, 6) | inverted(rm, 3, 5) | inverted(reg, 4, 4) | self.map;
        let second = u8::from(self.wide) << 7 | (!other & 15) << 3 | 4 | self.prefix;
        let third = 0x40 | inverted(other, 4, 3);
        [0x62, first, second, third, self.opcode, 0]
    }
}

struct Maker<'a>(&'a mut Assembler);

impl Maker<'_> {
    fn offset(&mut self, offset: usize) {
        self.0.bytes(&(offset as i32).to_le_bytes());
    }

    /// An instruction with `gs:[offset]` for its memory operand.
    fn evex(&mut self, evex: Evex, reg: u8, other: u8, offset: usize) {
        self.0.bytes(&[0x65]);
        self.0.bytes(&evex.bytes(reg, other, 0)[..5]);
        self.0.bytes(&[(reg & 7) << 3 | 4, 0x25]);
        self.offset(offset);
    }

    /// The same on registers, with an immediate.
    fn registers(&mut self, evex: Evex, reg: u8, other: u8, rm: u8, immediate: u8) {
        self.0.bytes(&evex.bytes(reg, other, rm)[..5]);
        self.0.bytes(&[0xc0 | (reg & 7) << 3 | rm & 7, immediate]);
    }

    /// MOVUPS.
    fn ymm(&mut self, host: Host, store: bool, number: u8) {
        let opcode = 0x10 | u8::from(store);
        let modrm = (number & 7) << 3 | 4;
        if host.avx {
            let byte = if number < 8 { 0xfc } else { 0x7c };
            self.0.bytes(&[0x65, 0xc5, byte, opcode, modrm, 0x25]);
        } else {
            self.0
                .bytes(&[0x65, 0x40 | (number & 8) >> 1, 0x0f, opcode, modrm, 0x25]);
        }
        self.offset(frame::ymm(number));
    }

    /// KMOVQ.
    fn opmask(&mut self, store: bool, number: u8) {
        let opcode = 0x90 | u8::from(store);
        self.0.bytes(&[0x65, 0xc4, 0xe1, 0xf8, opcode, number << 3 | 4, 0x25]);
        self.offset(frame::opmask(number));
    }

    fn mxcsr(&mut self, store: bool, offset: usize) {
        self.0.bytes(&[0x65, 0x0f, 0xae, if store { 0x1c } else { 0x14 }, 0x25]);
        self.offset(offset);
    }

    fn load_ymm(&mut self, host: Host) {
        for number in 0..16 {
            self.ymm(host, false, number);
        }
        self.mxcsr(false, frame::MXCSR);
    }

    fn upper(&mut self, store: bool) {
        for number in 16..32 {
            self.evex(if store { STORE } else { LOAD }, number, 0, frame::zmm(number));
        }
        for number in 0..8 {
            self.opmask(store, number);
        }
    }

    fn load_high(&mut self) {
        for number in 0..16 {
            self.evex(INSERT_HALF, number, number, frame::zmm_high(number));
            self.0.bytes(&[1]);
        }
    }

    /// The upper halves, and whether there is something in them. ZMM0 is lost.
    fn save_high(&mut self) {
        for number in 0..16 {
            self.evex(EXTRACT_HALF, number, 0, frame::zmm_high(number));
            self.0.bytes(&[1]);
        }
        for number in (1..15).step_by(2) {
            self.registers(TERNARY, 0, number, number + 1, OR);
        }
        self.registers(TERNARY, 0, 15, 15, OR);
        self.registers(EXTRACT_HALF, 0, 0, 0, 1);
        // vptest ymm0, ymm0; setnz gs:[...]
        self.0.bytes(&[0xc4, 0xe2, 0x7d, 0x17, 0xc0]);
        self.0.bytes(&[0x65, 0x0f, 0x95, 0x04, 0x25]);
        self.offset(frame::ZMM_HIGH_USED);
    }

    /// Jumps if no more than this is live.
    fn unless_beyond(&mut self, level: u8) -> Hole {
        self.0.compare_byte(frame::VECTORS_LIVE, level);
        self.0.branch(condition::BE)
    }
}

/// What moves the vector registers.
pub struct Vectors {
    host: Host,
    /// Functions for what goes beyond [`live::YMM`].
    save_upper: u64,
    reload_upper: u64,
}

impl Vectors {
    /// Makes its functions.
    pub fn make(a: &mut Assembler, host: Host) -> Self {
        let mut maker = Maker(a);
        let mut vectors = Self {
            host,
            save_upper: maker.0.start + maker.0.here() as u64,
            reload_upper: 0,
        };
        if host.avx512 {
            maker.upper(true);
            let zero = maker.unless_beyond(live::UPPER);
            maker.save_high();
            maker.0.land(zero);
            // ret
            maker.0.bytes(&[0xc3]);
            vectors.reload_upper = maker.0.start + maker.0.here() as u64;
            maker.upper(false);
            let zero = maker.unless_beyond(live::UPPER);
            maker.load_high();
            maker.0.land(zero);
            maker.0.bytes(&[0xc3]);
        }
        vectors
    }

    /// If they are live, vector registers to the Core and the host's MXCSR back. RSP is the host's; flags are lost.
    pub fn save(&self, a: &mut Assembler) {
        let mut maker = Maker(a);
        let nothing = maker.unless_beyond(live::NONE);
        for number in 0..16 {
            maker.ymm(self.host, true, number);
        }
        self.beyond_ymm(&mut maker, self.save_upper);
        maker.mxcsr(true, frame::MXCSR);
        maker.mxcsr(false, frame::HOST_MXCSR);
        if self.host.avx {
            // vzeroupper
            maker.0.bytes(&[0xc5, 0xf8, 0x77]);
        }
        maker.0.land(nothing);
    }

    /// What was live before [`Vectors::save`] is loaded again. RSP is the host's; flags are lost.
    pub fn reload(&self, a: &mut Assembler) {
        let mut maker = Maker(a);
        let nothing = maker.unless_beyond(live::NONE);
        maker.load_ymm(self.host);
        self.beyond_ymm(&mut maker, self.reload_upper);
        maker.0.land(nothing);
    }

    fn beyond_ymm(&self, maker: &mut Maker<'_>, function: u64) {
        if self.host.avx512 {
            let narrow = maker.unless_beyond(live::YMM);
            maker.0.call(function);
            maker.0.land(narrow);
        }
    }

    /// Code that makes at least `level` live, and goes back to R11. Flags are lost.
    pub fn load(&self, a: &mut Assembler, level: u8) {
        let mut maker = Maker(a);
        if !self.host.avx512 {
            maker.load_ymm(self.host);
            maker.back(live::YMM);
            return;
        }
        let mut some = None;
        if level > live::YMM {
            maker.0.compare_byte_zero(frame::VECTORS_LIVE);
            some = Some(maker.0.branch(condition::NE));
        }
        maker.0.compare_byte_zero(frame::ZMM_HIGH_USED);
        let all = maker.0.branch(condition::NE);
        maker.load_ymm(self.host);
        if level > live::YMM {
            maker.upper(false);
        }
        maker.back(level);
        if let Some(some) = some {
            // The upper halves are zero, if they are not there.
            maker.0.land(some);
            let upper = maker.unless_below(live::UPPER);
            maker.upper(false);
            maker.0.land(upper);
            maker.back(level);
        }
        maker.0.land(all);
        maker.load_ymm(self.host);
        maker.upper(false);
        maker.load_high();
        maker.back(live::ALL);
    }
}

impl Maker<'_> {
    /// Jumps if this is live.
    fn unless_below(&mut self, level: u8) -> Hole {
        self.0.compare_byte(frame::VECTORS_LIVE, level);
        self.0.branch(condition::AE)
    }

    /// Back to R11.
    fn back(&mut self, level: u8) {
        self.0.store_byte(frame::VECTORS_LIVE, level);
        self.0.jump_r11();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::native::needs;
    use crate::translate::operation::{Kind, Reader};
    use iced_x86::{Decoder, DecoderOptions, FastFormatter};

    #[test]
    fn instructions_need_no_more_than_they_use() {
        if !Host::detect().avx512 {
            println!("skipped: the host's processor has no AVX-512");
            return;
        }
        let mut reader = Reader::default();
        let mut read = |bytes: &[u8], blocked| {
            let operation = reader.read(bytes, 0x1000, blocked).unwrap();
            let access = matches!(operation.kind, Kind::Access(_));
            let copied = access || operation.kind == Kind::Copy;
            copied.then_some((access, operation.vectors))
        };
        for (bytes, expected) in [
            (&[0x62, 0xf1, 0x75, 0x49, 0xfe, 0x03][..], (true, live::ALL)), // VPADDD ZMM0{K1}, ZMM1, [RBX]
            (&[0x62, 0xe1, 0x75, 0x40, 0xfe, 0xc2], (false, live::UPPER)),  // VPADDD ZMM16, ZMM17, ZMM2
            (&[0x62, 0xf1, 0x75, 0x08, 0xfe, 0x03], (true, live::UPPER)),   // VPADDD XMM0, XMM1, [RBX]
            (&[0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x03], (true, live::UPPER)),   // VMOVDQU8 [RBX]{K1}, ZMM0
            (&[0xc5, 0xfb, 0x93, 0xc1], (false, live::UPPER)),              // KMOVD EAX, K1
            (&[0xc5, 0xf5, 0xfe, 0x03], (true, live::YMM)),                 // VPADDD YMM0, YMM1, [RBX]
            (&[0xc4, 0xe2, 0x71, 0xcf, 0xc2], (false, live::YMM)),          // VGF2P8MULB XMM0, XMM1, XMM2
        ] {
            assert_eq!(read(bytes, 0), Some(expected), "{bytes:x?}");
            let blocked = read(bytes, needs::AVX512);
            assert_eq!(blocked.is_none(), expected.1 > live::YMM, "{bytes:x?}");
        }
        // VPGATHERDD XMM3{K1}, [RBX + XMM5 * 4] is the interpreter's.
        assert_eq!(read(&[0x62, 0xf2, 0x7d, 0x09, 0x90, 0x1c, 0xab], 0), None);
    }

    fn text(make: impl FnOnce(&mut Maker<'_>)) -> Vec<String> {
        let mut assembler = Assembler::default();
        make(&mut Maker(&mut assembler));
        let mut formatter = FastFormatter::new();
        let lines = Decoder::new(64, &assembler.code, DecoderOptions::NONE).into_iter();
        lines
            .map(|instruction| {
                let mut line = String::new();
                formatter.format(&instruction, &mut line);
                line
            })
            .collect()
    }

    #[test]
    fn instructions_are_what_they_should_be() {
        let at = |place: usize| {
            let hex = format!("{place:X}h");
            let zero = if hex.starts_with(char::is_alphabetic) { "0" } else { "" };
            format!("gs:[{zero}{hex}]")
        };
        let upper = text(|maker| maker.upper(true));
        assert_eq!(upper.len(), 24);
        assert_eq!(upper[15], format!("vmovups {},zmm31", at(frame::zmm(31))));
        assert_eq!(upper[23], format!("kmovq {},k7", at(frame::opmask(7))));
        let loaded = text(|maker| maker.upper(false));
        assert_eq!(loaded[0], format!("vmovups zmm16,{}", at(frame::zmm(16))));
        assert_eq!(loaded[17], format!("kmovq k1,{}", at(frame::opmask(1))));
        let high = text(|maker| maker.load_high());
        assert_eq!(high[9], format!("vinsertf64x4 zmm9,zmm9,{},1h", at(frame::zmm_high(9))));
        let saved = text(|maker| maker.save_high());
        assert_eq!(saved.len(), 16 + 8 + 3);
        assert_eq!(saved[9], format!("vextractf64x4 {},zmm9,1h", at(frame::zmm_high(9))));
        assert_eq!(
            saved[22..26],
            [
                "vpternlogq zmm0,zmm13,zmm14,0FEh",
                "vpternlogq zmm0,zmm15,zmm15,0FEh",
                "vextractf64x4 ymm0,zmm0,1h",
                "vptest ymm0,ymm0"
            ]
        );
        assert_eq!(saved[26], format!("setne {}", at(frame::ZMM_HIGH_USED)));
    }
}
