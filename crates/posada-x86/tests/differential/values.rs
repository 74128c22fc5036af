//! Random registers: general, vector, x87.

use crate::rng::Rng;
use crate::state::{Case, State, area};

/// Bits of floating-point values at the edges, single and double.
const SINGLES: [u32; 14] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7fa0_0001,
    0x0000_0001,
    0x807f_ffff,
    0x0080_0000,
    0x7f7f_ffff,
    0x4f00_0000,
    0xcf00_0000,
];
const DOUBLES: [u64; 14] = [
    0,
    1 << 63,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x7ff4_0000_0000_0001,
    1,
    0x800f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x7fef_ffff_ffff_ffff,
    0x41e0_0000_0000_0000,
    0xc3e0_0000_0000_0000,
];
/// Extended: exponent and significand; the last four are encodings that the manual calls unsupported.
const EXTENDED: [(u16, u64); 14] = [
    (0, 0),
    (0x8000, 0),
    (0x3fff, 1 << 63),
    (0x7fff, 1 << 63),
    (0xffff, 1 << 63),
    (0x7fff, 3 << 62),
    (0x7fff, 1 << 63 | 1),
    (0, 1),
    (0, 1 << 63),
    (0x7ffe, !0),
    (0x7fff, 0),
    (0x7fff, 1),
    (0x3fff, 1),
    (0x403e, 0),
];

pub fn single(rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 => rng.pick(&SINGLES),
        1 => (rng.range(-1000, 1000) as f32 / 8.0).to_bits(),
        2 => rng.next() as u32 & 0x83ff_ffff | 0x3c00_0000,
        _ => rng.next() as u32,
    }
}

pub fn double(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.pick(&DOUBLES),
        1 => (rng.range(-1000, 1000) as f64 / 8.0).to_bits(),
        2 => rng.next() & 0x807f_ffff_ffff_ffff | 0x3fc0_0000_0000_0000,
        _ => rng.next(),
    }
}

pub fn extended(rng: &mut Rng) -> [u8; 10] {
    let (exponent, significand) = match rng.below(5) {
        0 => rng.pick(&EXTENDED),
        1 => (rng.next() as u16, rng.next()),
        _ => (
            (0x3fff + rng.range(-40, 72)) as u16 | (rng.next() as u16 & 0x8000),
            rng.next() | 1 << 63,
        ),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&significand.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// Bytes for lanes of any kind.
pub fn lanes(rng: &mut Rng, bytes: &mut [u8]) {
    let style = rng.below(6);
    for lane in bytes.chunks_mut(8) {
        let value = match style {
            0 => u64::from(single(rng)) | u64::from(single(rng)) << 32,
            1 => double(rng),
            2 => rng.pick(&[
                0,
                !0,
                0x8000_7fff_8000_7fff,
                0x807f_807f_00ff_0001,
                0x8000_0000_7fff_ffff,
            ]),
            3 => rng.integer(),
            _ => rng.next(),
        };
        lane.copy_from_slice(&value.to_le_bytes()[..lane.len()]);
    }
}

/// An x87 control word: precision and rounding at random, exceptions masked unless `unmask`.
pub fn control_word(rng: &mut Rng, unmask: bool) -> u16 {
    let masks = if unmask { rng.next() as u16 & 0x3f } else { 0x3f };
    // The precision 01 is reserved.
    0x40 | masks | rng.pick(&[0, 2, 3, 3]) << 8 | (rng.below(4) as u16) << 10
}

/// A status word that goes with a control word: ES and B tell of exceptions that are not masked.
pub fn status_word(rng: &mut Rng, control: u16) -> u16 {
    let status = rng.next() as u16 & 0x7f00 | if rng.chance(50) { rng.next() as u16 & 0x7f } else { 0 };
    if status & !control & 0x3f != 0 {
        status | 0x8080
    } else {
        status
    }
}

pub fn mxcsr(rng: &mut Rng) -> u32 {
    let masks = if rng.chance(8) {
        rng.next() as u32 & 0x1f80
    } else {
        0x1f80
    };
    let modes = if rng.chance(40) { rng.next() as u32 & 0xe040 } else { 0 };
    let raised = if rng.chance(50) { rng.next() as u32 & 0x3f } else { 0 };
    masks | modes | raised
}

/// Leaves what compatibility mode sees of the registers.
pub fn narrow(state: &mut State) {
    for register in &mut state.gpr[..8] {
        *register &= 0xffff_ffff;
    }
    // Segments are flat.
    (state.fs_base, state.gs_base) = (0, 0);
}

/// Fills a case's registers, flags, and vector and x87 state.
pub fn registers(rng: &mut Rng, case: &mut Case) {
    let state = &mut case.state;
    for register in &mut state.gpr {
        *register = rng.integer();
    }
    // Arithmetic flags at random; always IF and bit 1.
    state.rflags = 0x202 | rng.next() & 0x8d5;
    state.rflags |= if rng.chance(20) { 1 << 10 } else { 0 } | if rng.chance(5) { 1 << 14 } else { 0 };
    state.rflags |= if rng.chance(10) { 1 << 21 } else { 0 };
    for base in [&mut state.fs_base, &mut state.gs_base] {
        *base = match rng.below(3) {
            0 => 0,
            1 => rng.below(1 << 32),
            _ => (rng.next() as i64 >> 17) as u64,
        };
    }
    for number in 0..16 {
        let mut value = [0; 32];
        lanes(rng, &mut value);
        state.set_ymm(number, &value);
    }
    if area::avx512() {
        for number in 0..32 {
            let mut value = state.vector(number);
            lanes(rng, &mut value[if number < 16 { 32 } else { 0 }..]);
            state.set_vector(number, &value);
        }
        for number in 0..8 {
            let value = opmask(rng);
            state.set_opmask(number, value);
        }
    }
    let area = &mut state.area;
    let unmask = rng.chance(8);
    let control = control_word(rng, unmask);
    let status = status_word(rng, control);
    area[area::FCW..][..2].copy_from_slice(&control.to_le_bytes());
    area[area::FSW..][..2].copy_from_slice(&status.to_le_bytes());
    area[area::FTW] = match rng.below(3) {
        0 => 0xff,
        1 => 0,
        _ => rng.next() as u8,
    };
    // FOP has eleven bits; FIP and FDP are canonical.
    area[area::FOP..][..2].copy_from_slice(&(rng.next() as u16 & 0x7ff).to_le_bytes());
    for at in [area::FIP, area::FDP] {
        let pointer = rng.next() as i64 >> rng.pick(&[16, 33]);
        area[at..][..8].copy_from_slice(&pointer.to_le_bytes());
    }
    for number in 0..8 {
        let value = if rng.chance(20) {
            // What an MMX instruction leaves.
            let mut bytes = [0xff; 10];
            lanes(rng, &mut bytes[..8]);
            bytes
        } else {
            extended(rng)
        };
        area[area::ST + 16 * number..][..10].copy_from_slice(&value);
    }
    area[area::MXCSR..][..4].copy_from_slice(&mxcsr(rng).to_le_bytes());
    // XSTATE_BV: all parts are there.
    area[area::HEADER] = area::components();
}

/// All, none, few, or any.
fn opmask(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0 => u64::MAX,
        1 => 0,
        2 => 1 << rng.below(64),
        3 => rng.next() & rng.next() & rng.next(),
        4 => (1 << rng.below(64)) - 1,
        _ => rng.next(),
    }
}
