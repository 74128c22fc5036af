//! Random instructions of AVX-512, among them some that leave the upper halves of registers zero.

use super::Random;

/// The host has it.
pub fn avx512() -> bool {
    std::arch::is_x86_feature_detected!("avx512vl")
}

/// One instruction that has to do with AVX-512, or makes upper halves zero.
pub fn wide_instruction(random: &mut Random) -> Vec<u8> {
    const MOVE: u8 = 1;
    const TO_OPMASK: u8 = 2;
    const REGISTER: u8 = 4;
    // Map, prefix, opcode, immediate, kind.
    const FORMS: [(u8, u8, u8, bool, u8); 16] = [
        (1, 0, 0x58, false, 0),               // VADDPS
        (1, 1, 0xfe, false, 0),               // VPADDD
        (1, 1, 0xef, false, 0),               // VPXORD
        (3, 1, 0x25, true, 0),                // VPTERNLOGD
        (1, 1, 0xda, false, 0),               // VPMINUB
        (2, 1, 0x36, false, 0),               // VPERMD
        (1, 0, 0x28, false, MOVE),            // VMOVAPS
        (1, 2, 0x6f, false, MOVE),            // VMOVDQU32
        (1, 2, 0x7f, false, MOVE),            // VMOVDQU32, a store
        (1, 3, 0x7f, false, MOVE),            // VMOVDQU8, a store
        (2, 1, 0x8b, false, MOVE),            // VPCOMPRESSD
        (2, 1, 0x89, false, MOVE),            // VPEXPANDD
        (2, 1, 0x7a, false, MOVE | REGISTER), // VPBROADCASTB of a general register
        (1, 1, 0x74, false, TO_OPMASK),       // VPCMPEQB
        (3, 1, 0x3e, true, TO_OPMASK),        // VPCMPUB
        (2, 2, 0x26, false, TO_OPMASK),       // VPTESTNMB
    ];
    if random.chance(35) {
        let number = random.below(8) as u8;
        return match random.below(7) {
            0 => vec![0xc5, 0xfb, 0x93, 0xc0 | number],                  // KMOVD EAX, K
            1 => vec![0xc5, 0xfb, 0x92, 0xc1 | number << 3],             // KMOVD K, ECX
            2 => vec![0xc4, 0xe1, 0xf8, 0x98, 0xc1 | number << 3],       // KORTESTQ
            3 => vec![0xc4, 0xe1, 0xf8, 0x91, 0x43 | number << 3, 0x10], // KMOVQ [RBX + 16], K
            4 => vec![0xc5, 0xf8, 0x77],                                 // VZEROUPPER
            5 => vec![0xc5, 0xe5, 0xfe, 0xc0 | number << 3],             // VPADDD YMM
            _ => vec![0x0f, 0x58, 0xc1 | number << 3],                   // ADDPS
        };
    }
    let (map, prefix, opcode, immediate, kind) = random.pick(&FORMS);
    let (reg, other, rm) = (random.below(32) as u8, random.below(32) as u8, random.below(32) as u8);
    let memory = kind & REGISTER == 0 && random.chance(55);
    let reg = if kind & TO_OPMASK != 0 { reg & 7 } else { reg };
    let other = if kind & MOVE != 0 { 0 } else { other };
    let base = random.pick(&[3_u8, 6, 7, 9, 10, 11, 14]);
    let rm = match (memory, kind & REGISTER != 0) {
        (true, _) => base,
        (_, true) => random.pick(&[0, 1, 10, 11]),
        _ => rm,
    };
    let bit = |number: u8, bit: u8, to: u8| (!number >> bit & 1) << to;
    let length = random.pick(&[0_u8, 1, 1, 2, 2]);
    let opmask = if random.chance(60) { random.below(8) as u8 } else { 0 };
    let mut code = vec![
        0x62,
        bit(reg, 3, 7) | bit(rm, 4, 6) | bit(rm, 3, 5) | bit(reg, 4, 4) | map,
        (!other & 15) << 3 | 4 | prefix,
        length << 5 | bit(other, 4, 3) | opmask,
        opcode,
    ];
    let modrm = (reg & 7) << 3 | rm & 7;
    if !memory {
        code.push(0xc0 | modrm);
    } else if random.chance(50) {
        code.push(modrm);
    } else {
        code.extend([0x40 | modrm, random.pick(&[0, 1, 2, 3, 0xff])]);
    }
    code.extend(immediate.then(|| random.below(256) as u8));
    code
}
