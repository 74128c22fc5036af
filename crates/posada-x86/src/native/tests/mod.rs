mod avx512;
mod sweep;

use super::decode;
use crate::core::{CodeSize, Core, gpr, seg};
use crate::fault::Exec;
use crate::insn::Insn;
use crate::mmu::tests::core as bare_core;
use std::arch::asm;

/// A 64-bit core with everything enabled.
fn core() -> Box<Core> {
    let mut core = bare_core();
    // OSFXSR, OSXMMEXCPT, OSXSAVE.
    core.cr[4] |= 3 << 9 | 1 << 18;
    core.vector.xcr0 = 7;
    core.vector.fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    core.update_mode();
    core
}

/// Decodes and runs, as the run loop does.
fn run(core: &mut Core, bytes: &[u8]) -> Exec {
    let insn = decode(core, bytes).unwrap_or_else(|| panic!("{bytes:x?} did not decode"));
    step(core, &insn)
}

fn step(core: &mut Core, insn: &Insn) -> Exec {
    let start = core.rip();
    core.set_rip(start.wrapping_add(insn.length.into()));
    (insn.exec)(core, insn).inspect_err(|_| core.set_rip(start))
}

fn faults(core: &mut Core, bytes: &[u8]) -> u8 {
    run(core, bytes).expect_err("a fault");
    core.raised.vector
}

fn floats(core: &mut Core, register: usize, values: [f32; 8]) {
    for (at, value) in values.into_iter().enumerate() {
        core.vector.ymm[register][at * 4..][..4].copy_from_slice(&value.to_le_bytes());
    }
}

fn float(core: &Core, register: usize, at: usize) -> f32 {
    f32::from_le_bytes(core.vector.ymm[register][at * 4..][..4].try_into().unwrap())
}

fn double(core: &Core, register: usize) -> f64 {
    f64::from_le_bytes(core.vector.ymm[register][..8].try_into().unwrap())
}

fn word(core: &Core, at: usize) -> u16 {
    u16::from_le_bytes(core.vector.fx[at..at + 2].try_into().unwrap())
}

#[test]
fn legacy_encodings_keep_the_upper_half_and_vex_ones_clear_it() {
    let mut core = core();
    floats(&mut core, 1, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    floats(&mut core, 9, [0.5; 8]);
    // ADDPS XMM1, XMM9.
    run(&mut core, &[0x41, 0x0f, 0x58, 0xc9]).unwrap();
    assert_eq!(
        (float(&core, 1, 0), float(&core, 1, 3), float(&core, 1, 4)),
        (1.5, 4.5, 5.0)
    );
    // VADDPS YMM2, YMM1, YMM9; VADDPS XMM1, XMM1, XMM9.
    run(&mut core, &[0xc4, 0xc1, 0x74, 0x58, 0xd1]).unwrap();
    assert_eq!((float(&core, 2, 0), float(&core, 2, 7)), (2.0, 8.5));
    run(&mut core, &[0xc4, 0xc1, 0x70, 0x58, 0xc9]).unwrap();
    assert_eq!((float(&core, 1, 0), float(&core, 1, 4)), (2.0, 0.0));
    // 1.0 / 3.0 is inexact: DIVSS XMM2, XMM1.
    assert_eq!(core.vector.mxcsr, 0x1f80);
    floats(&mut core, 1, [3.0; 8]);
    run(&mut core, &[0xf3, 0x0f, 0x5e, 0xd1]).unwrap();
    assert_eq!(core.vector.mxcsr, 0x1fa0);
}

#[test]
fn operands_cross_pages_and_fault_at_the_second() {
    let mut core = core();
    core.store(0xff8, 0x1111_2222_3333_4444u64).unwrap();
    core.store(0x1000, 0x5555_6666_7777_8888u64).unwrap();
    core.regs[gpr::RBX] = 0xff8;
    // MOVUPS XMM3, [RBX]; MOVUPS [RBX + 4], XMM3.
    run(&mut core, &[0x0f, 0x10, 0x1b]).unwrap();
    assert_eq!(core.vector.ymm[3][8..16], 0x5555_6666_7777_8888u64.to_le_bytes());
    run(&mut core, &[0x0f, 0x11, 0x5b, 0x04]).unwrap();
    assert_eq!(core.load::<u64>(0x1004), Ok(0x5555_6666_7777_8888));
    core.regs[gpr::RBX] = 0x1ff8;
    assert_eq!(faults(&mut core, &[0x0f, 0x10, 0x1b]), 14);
    assert_eq!((core.raised.address, core.raised.error), (0x2000, Some(0)));
    assert_eq!(faults(&mut core, &[0x0f, 0x11, 0x1b]), 14);
    assert_eq!((core.raised.address, core.raised.error), (0x2000, Some(2)));
    assert_eq!(core.load::<u64>(0x1ff8), Ok(0));
}

#[test]
fn only_some_operands_must_be_aligned() {
    let mut core = core();
    core.regs[gpr::RBX] = 0x108;
    for (bytes, aligned) in [
        (&[0x0f, 0x28, 0x03][..], true),             // MOVAPS
        (&[0x0f, 0x10, 0x03], false),                // MOVUPS
        (&[0x66, 0x0f, 0xfe, 0x03], true),           // PADDD
        (&[0x66, 0x0f, 0x3a, 0x63, 0x03, 0], false), // PCMPISTRI
        (&[0xf3, 0x0f, 0x58, 0x03], false),          // ADDSS
        (&[0xc5, 0xf9, 0xfe, 0x03], false),          // VPADDD XMM
        (&[0xc5, 0xfc, 0x28, 0x03], true),           // VMOVAPS YMM
        (&[0xc5, 0xfd, 0xe7, 0x03], true),           // VMOVNTDQ
        (&[0xf2, 0x0f, 0xf0, 0x03], false),          // LDDQU
        (&[0x0f, 0x6f, 0x03], false),                // MOVQ MM
        (&[0xc5, 0xfc, 0x28, 0xca], false),          // VMOVAPS YMM1, YMM2
        (&[0xc5, 0xf9, 0x6f, 0xca], false),          // VMOVDQA XMM1, XMM2
    ] {
        if aligned {
            assert_eq!(faults(&mut core, bytes), 13, "{bytes:x?}");
        } else {
            assert_eq!(run(&mut core, bytes), Ok(()), "{bytes:x?}");
        }
    }
}

#[test]
fn flags_and_general_registers_go_in_and_out() {
    let mut core = core();
    core.set_arithmetic(0x8d5);
    (core.regs[gpr::RAX], core.regs[gpr::RSP]) = (0xf0f0, 0x1234_5678_9abc_def0);
    // POPCNT RSP, RSP: RSP stands for no register of the host's.
    run(&mut core, &[0xf3, 0x48, 0x0f, 0xb8, 0xe4]).unwrap();
    assert_eq!((core.regs[gpr::RSP], core.rflags() & 0x8d5), (32, 0));
    // ADCX EAX, ECX with carry; ADOX keeps what ADCX set.
    core.set_arithmetic(0x841);
    (core.regs[gpr::RAX], core.regs[gpr::RCX]) = (u64::MAX, 0);
    run(&mut core, &[0x66, 0x0f, 0x38, 0xf6, 0xc1]).unwrap();
    assert_eq!((core.regs[gpr::RAX], core.rflags() & 0x8d5), (0, 0x841));
    run(&mut core, &[0xf3, 0x0f, 0x38, 0xf6, 0xc1]).unwrap();
    assert_eq!((core.regs[gpr::RAX], core.rflags() & 0x8d5), (1, 0x41));
    // MULX R12, RDI, RSI reads RDX; BLSR EDI, EDI; PEXT RAX, RAX, [RBX]; RORX.
    (core.regs[gpr::RDX], core.regs[gpr::RSI]) = (u64::MAX, u64::MAX);
    run(&mut core, &[0xc4, 0x62, 0xc3, 0xf6, 0xe6]).unwrap();
    assert_eq!((core.regs[12], core.regs[gpr::RDI]), (u64::MAX - 1, 1));
    run(&mut core, &[0xc4, 0xe2, 0x40, 0xf3, 0xcf]).unwrap();
    assert_eq!((core.regs[gpr::RDI], core.rflags() & 0xc1), (0, 0x40));
    (core.regs[gpr::RAX], core.regs[gpr::RBX]) = (0xabcd, 0x40);
    core.store(0x40, 0xff00u64).unwrap();
    run(&mut core, &[0xc4, 0xe2, 0xfa, 0xf5, 0x03]).unwrap();
    assert_eq!(core.regs[gpr::RAX], 0xab);
    // CRC32 ESP, AH; MOVBE [RBX], AX.
    (core.regs[gpr::RSP], core.regs[gpr::RAX]) = (0, 0x1234);
    run(&mut core, &[0xf2, 0x0f, 0x38, 0xf0, 0xe4]).unwrap();
    // SAFETY: SSE4.2 is there, or decoding had failed.
    let crc = unsafe { std::arch::x86_64::_mm_crc32_u8(0, 0x12) };
    assert_eq!(core.regs[gpr::RSP], u64::from(crc));
    run(&mut core, &[0x66, 0x0f, 0x38, 0xf1, 0x03]).unwrap();
    assert_eq!(core.load::<u64>(0x40), Ok(0x3412));
}

#[test]
fn strings_and_conversions_reach_general_registers() {
    let mut core = core();
    core.vector.ymm[0][..4].copy_from_slice(b"xyz\0");
    core.vector.ymm[1][..9].copy_from_slice(b"abcdeyfgh");
    core.regs[gpr::RCX] = u64::MAX;
    // PCMPISTRI XMM0, XMM1, 0: equal any.
    run(&mut core, &[0x66, 0x0f, 0x3a, 0x63, 0xc1, 0]).unwrap();
    assert_eq!((core.regs[gpr::RCX], core.rflags() & 1), (5, 1));
    // CVTTSD2SI RSP, [RIP + 0x100]; out of range is indefinite, and invalid.
    core.set_rip(0x200);
    core.store(0x309, (-7.9f64).to_bits()).unwrap();
    run(&mut core, &[0xf2, 0x48, 0x0f, 0x2c, 0x25, 0, 1, 0, 0]).unwrap();
    assert_eq!(core.regs[gpr::RSP] as i64, -7);
    assert_eq!(core.vector.mxcsr, 0x1fa0);
    // CVTSI2SD XMM8, RSP; MOVMSKPD R10D, XMM8.
    run(&mut core, &[0xf2, 0x4c, 0x0f, 0x2a, 0xc4]).unwrap();
    assert_eq!(double(&core, 8), -7.0);
    run(&mut core, &[0x66, 0x45, 0x0f, 0x50, 0xd0]).unwrap();
    assert_eq!(core.regs[10], 1);
}

#[test]
fn unmasked_simd_exceptions_change_nothing_but_mxcsr() {
    let mut core = core();
    floats(&mut core, 0, [1.0; 8]);
    // Divide-by-zero is unmasked, invalid is not; DIVPS XMM0, XMM1 with 1/0 and 0/0.
    core.vector.mxcsr = 0x1d80;
    floats(&mut core, 0, [1.0, 0.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0]);
    floats(&mut core, 1, [0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 0.0, 0.0]);
    let before = core.vector.ymm;
    assert_eq!(faults(&mut core, &[0x0f, 0x5e, 0xc1]), 19);
    assert_eq!((core.vector.mxcsr, core.vector.ymm), (0x1d85, before));
    core.cr[4] &= !(1 << 10);
    assert_eq!(faults(&mut core, &[0x0f, 0x5e, 0xc1]), 6);
    // The other flags are sticky, and the host's MXCSR is as it was.
    core.vector.mxcsr = 0x1f80;
    assert_eq!(run(&mut core, &[0x0f, 0x5e, 0xc1]), Ok(()));
    assert_eq!(core.vector.mxcsr, 0x1fa5);
    let mut host = 0u32;
    // SAFETY: stores four bytes.
    unsafe { asm!("stmxcsr [{}]", in(reg) &mut host, options(nostack)) };
    assert_eq!(host & !0x3f, 0x1f80);
}

#[test]
fn x87_notes_the_guests_instruction_and_operand() {
    let mut core = core();
    core.set_rip(0x700);
    core.regs[gpr::RBX] = 0x40;
    core.store(0x48, 2.5f64.to_bits()).unwrap();
    // FLD QWORD PTR [RBX + 8]; FLD1; FADDP; FSTP QWORD PTR [RBX].
    run(&mut core, &[0xdd, 0x43, 0x08]).unwrap();
    assert_eq!((word(&core, 8), core.vector.fx[4]), (0x700, 0x80));
    run(&mut core, &[0xd9, 0xe8]).unwrap();
    run(&mut core, &[0xde, 0xc1]).unwrap();
    run(&mut core, &[0xdd, 0x1b]).unwrap();
    assert_eq!(core.load::<u64>(0x40), Ok(3.5f64.to_bits()));
    assert_eq!(
        (word(&core, 8), word(&core, 2) & 0x3800, core.vector.fx[4]),
        (0x707, 0, 0)
    );
    // FLD of a signalling NaN at a page's edge: pending once FCW unmasks it, noted with opcode and operand.
    core.store(0xffc, 0x7ff0_0000_0000_0001u64).unwrap();
    core.vector.fx[0] &= !1;
    core.regs[gpr::RBX] = 0xffc;
    run(&mut core, &[0xdd, 0x03]).unwrap();
    assert_eq!(word(&core, 2) & 0x80bf, 0x8081);
    assert_eq!((word(&core, 6), word(&core, 8), word(&core, 16)), (0x503, 0x709, 0xffc));
    // FLD1 and FWAIT wait, FNSTSW does not, FNSTENV stores the guest's pointers.
    assert_eq!(faults(&mut core, &[0xd9, 0xe8]), 16);
    assert_eq!(faults(&mut core, &[0x9b]), 16);
    run(&mut core, &[0xdf, 0xe0]).unwrap();
    assert_eq!(core.regs[gpr::RAX] & 0xffff, u64::from(word(&core, 2)));
    core.regs[gpr::RBX] = 0x100;
    run(&mut core, &[0xd9, 0x33]).unwrap();
    assert_eq!(core.load::<u32>(0x10c), Ok(0x709));
    assert_eq!(core.load::<u32>(0x114), Ok(0xffc));
    assert_eq!(word(&core, 0) & 0x3f, 0x3f, "FNSTENV masks all");
    run(&mut core, &[0xdb, 0xe2]).unwrap();
    assert_eq!(word(&core, 2) & 0x80ff, 0);
}

#[test]
fn fldenv_loads_any_opcode() {
    let mut core = core();
    core.regs[gpr::RBX] = 0x100;
    let image: [u8; 28] = std::array::from_fn(|at| if at == 0 { 0x7f } else { 3 * u8::from(at == 1) });
    core.store_bytes(0x100, &image).unwrap();
    for opcode in 0..0x800u16 {
        core.store(0x112u64, opcode).unwrap();
        // FLDENV [RBX], whatever the host's own copy of it looks like.
        run(&mut core, &[0xd9, 0x23]).unwrap();
        assert_eq!(word(&core, 6), opcode);
    }
}

#[test]
fn mmx_shares_the_x87_registers() {
    let mut core = core();
    run(&mut core, &[0xd9, 0xe8]).unwrap();
    core.vector.ymm[2][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    // MOVDQ2Q MM3, XMM2; PADDB MM3, MM3; MOVQ2DQ XMM4, MM3.
    run(&mut core, &[0xf2, 0x0f, 0xd6, 0xda]).unwrap();
    assert_eq!((core.vector.fx[4], word(&core, 2) & 0x3800), (0xff, 0));
    run(&mut core, &[0x0f, 0xfc, 0xdb]).unwrap();
    run(&mut core, &[0xf3, 0x0f, 0xd6, 0xe3]).unwrap();
    assert_eq!(core.vector.ymm[4][..8], [2, 4, 6, 8, 10, 12, 14, 16]);
    // MASKMOVQ MM3, MM3 stores nothing, so may point anywhere; then PCMPEQB MM4, MM4 selects all.
    core.regs[gpr::RDI] = 0x7000;
    run(&mut core, &[0x0f, 0xf7, 0xdb]).unwrap();
    run(&mut core, &[0x0f, 0x74, 0xe4]).unwrap();
    assert_eq!(faults(&mut core, &[0x0f, 0xf7, 0xdc]), 14);
    core.regs[gpr::RDI] = 0xffd;
    run(&mut core, &[0x0f, 0xf7, 0xdc]).unwrap();
    assert_eq!(core.load::<u64>(0xffd), Ok(0x100e_0c0a_0806_0402));
    // EMMS.
    run(&mut core, &[0x0f, 0x77]).unwrap();
    assert_eq!(core.vector.fx[4], 0);
}

#[test]
fn modes_and_control_bits_block() {
    let mut core = core();
    let (sse, avx, x87, mmx, bmi) = (
        &[0x0f, 0x58, 0xc1][..],
        &[0xc5, 0xf0, 0x58, 0xc2][..],
        &[0xd9, 0xe8][..],
        &[0x0f, 0xfc, 0xdb][..],
        &[0xc4, 0xe2, 0x40, 0xf3, 0xcf][..],
    );
    let check = |core: &mut Core, wanted: [u8; 5]| {
        core.update_mode();
        let got = [sse, avx, x87, mmx, bmi].map(|bytes| run(core, bytes).map_or_else(|_| core.raised.vector, |()| 0));
        assert_eq!(got, wanted);
    };
    check(&mut core, [0; 5]);
    core.cr[0] |= 8;
    check(&mut core, [7, 7, 7, 7, 0]);
    core.cr[0] ^= 8 | 4;
    check(&mut core, [6, 0, 7, 6, 0]);
    core.cr[0] ^= 4;
    core.cr[4] &= !(1 << 9);
    check(&mut core, [6, 0, 0, 0, 0]);
    core.cr[4] &= !(1 << 18);
    check(&mut core, [6, 6, 0, 0, 0]);
    core.cr[4] |= 1 << 18 | 1 << 9;
    core.vector.xcr0 = 3;
    check(&mut core, [0, 6, 0, 0, 0]);
    core.vector.xcr0 = 7;
    core.system_flags |= crate::core::flag::VM;
    check(&mut core, [0, 6, 0, 0, 6]);
}

#[test]
fn a_gather_that_faults_keeps_what_is_done() {
    let mut core = core();
    core.store(0x10, 0x1111_1111u32).unwrap();
    core.store(0x20, 0x2222_2222u32).unwrap();
    core.regs[gpr::RBX] = 0x10;
    for (at, index) in [0i32, 0x10, 0x7000, -0x10].into_iter().enumerate() {
        core.vector.ymm[1][at * 4..][..4].copy_from_slice(&index.to_le_bytes());
    }
    core.vector.ymm[2] = [0xff; 32];
    core.vector.ymm[0] = [0x77; 32];
    // VPGATHERDD XMM0, [RBX + XMM1], XMM2.
    let bytes = [0xc4, 0xe2, 0x69, 0x90, 0x04, 0x0b];
    assert_eq!(faults(&mut core, &bytes), 14);
    assert_eq!(core.raised.address, 0x7010);
    assert_eq!(
        core.vector.ymm[0][..12],
        [0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x22, 0x22, 0x77, 0x77, 0x77, 0x77]
    );
    assert_eq!(
        core.vector.ymm[2][..12],
        [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]
    );
    core.vector.ymm[1][8..12].fill(0);
    run(&mut core, &bytes).unwrap();
    assert_eq!(core.vector.ymm[0][8..12], [0x11; 4]);
    assert_eq!(
        (core.vector.ymm[2], core.vector.ymm[0][16..] == [0; 16]),
        ([0; 32], true)
    );
    // VPMASKMOVD [RBX], XMM2, XMM0 and back with one element, the others in no page.
    core.regs[gpr::RBX] = 0x1ffc;
    core.vector.ymm[2][3] = 0x80;
    run(&mut core, &[0xc4, 0xe2, 0x69, 0x8e, 0x03]).unwrap();
    assert_eq!(core.load::<u32>(0x1ffc), Ok(0x1111_1111));
    run(&mut core, &[0xc4, 0xe2, 0x69, 0x8c, 0x2b]).unwrap();
    assert_eq!(core.vector.ymm[5][..8], [0x11, 0x11, 0x11, 0x11, 0, 0, 0, 0]);
    core.vector.ymm[2][7] = 0x80;
    assert_eq!(faults(&mut core, &[0xc4, 0xe2, 0x69, 0x8c, 0x2b]), 14);
}

#[test]
fn masked_elements_beyond_a_32_bit_address_do_not_wrap() {
    let mut core = core();
    core.regs[gpr::RDI] = 0xffff_fff8;
    core.vector.ymm[2] = [0; 32];
    core.vector.ymm[2][11] = 0x80;
    // VMASKMOVPS XMM1, XMM2, [EDI]: the third of its elements alone.
    assert_eq!(faults(&mut core, &[0x67, 0xc4, 0xe2, 0x69, 0x2c, 0x0f]), 14);
    assert_eq!(core.raised.address, 0x1_0000_0000);
}

#[test]
fn masked_bytes_wrap_and_all_must_be_canonical() {
    let mut core = core();
    core.regs[gpr::RDI] = 0xffff_fffe;
    core.vector.ymm[0][..16].copy_from_slice(&[0x5a; 16]);
    core.vector.ymm[1] = [0; 32];
    core.vector.ymm[1][3] = 0x80;
    // MASKMOVDQU XMM0, XMM1 through EDI: byte 3 alone, at address 1.
    run(&mut core, &[0x67, 0x66, 0x0f, 0xf7, 0xc1]).unwrap();
    assert_eq!(core.load::<u32>(0), Ok(0x5a00));
    core.regs[gpr::RDI] = 0x7fff_ffff_fff8;
    core.vector.ymm[1] = [0; 32];
    assert_eq!(faults(&mut core, &[0x66, 0x0f, 0xf7, 0xc1]), 13);
    core.regs[gpr::RDI] = 0x7fff_ffff_fff0;
    run(&mut core, &[0x66, 0x0f, 0xf7, 0xc1]).unwrap();
}

#[test]
fn what_is_no_vector_instruction_or_not_shown_does_not_decode() {
    let mut core = core();
    for bytes in [
        &[0x01, 0xc8][..],                     // ADD
        &[0x0f, 0x44, 0xc1],                   // CMOVZ
        &[0xf0, 0x0f, 0x58, 0xc1],             // LOCK ADDPS
        &[0x62, 0xf5, 0x7c, 0x48, 0x58, 0xc1], // VADDPH ZMM
        &[0x0f, 0x0f, 0xc1, 0x9e],             // PFADD
        &[0xc4, 0xe2, 0x75, 0x50, 0xc2],       // VPDPBUSD of AVX-VNNI
        &[0xd9, 0xd1],                         // reserved
        &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x13], // VPGATHERDD with index = mask
        &[0x0f, 0x58],                         // cut off
    ] {
        assert!(decode(&mut core, bytes).is_none(), "{bytes:x?}");
    }
}

#[test]
fn other_code_sizes_address_by_their_rules() {
    let mut core = core();
    core.segments[seg::CS].access = 0x409b;
    core.segments[seg::DS].base = 0x100;
    core.segments[seg::DS].limit = 0x1f;
    core.segments[seg::DS].access = 0xc093;
    core.update_mode();
    assert_eq!(core.code_size, CodeSize::Bits32);
    core.store(0x118, 6.25f64.to_bits()).unwrap();
    core.regs[gpr::RBX] = 0xffff_fff8;
    // MOVSD XMM1, [EBX + 0x20], then 8 bytes further: beyond the limit. The same with 16-bit addressing.
    run(&mut core, &[0xf2, 0x0f, 0x10, 0x4b, 0x20]).unwrap();
    assert_eq!(double(&core, 1), 6.25);
    assert_eq!(faults(&mut core, &[0xf2, 0x0f, 0x10, 0x4b, 0x28]), 13);
    core.vector.ymm[1] = [0; 32];
    core.regs[gpr::RSI] = 0x1_0020;
    run(&mut core, &[0x67, 0xf2, 0x0f, 0x10, 0x08]).unwrap();
    assert_eq!(double(&core, 1), 6.25);
}

#[test]
fn an_instruction_outside_the_arena_runs_too() {
    let mut core = core();
    core.store(0x48, 2.5f64.to_bits()).unwrap();
    core.regs[gpr::RBX] = 0x40;
    let mut insn = decode(&mut core, &[0xdd, 0x43, 0x08]).unwrap();
    insn.exec = super::run::once;
    insn.imm = u64::from_le_bytes([0xdd, 0x06, 0, 0, 0, 0, 0, 0]);
    step(&mut core, &insn).unwrap();
    assert_eq!(core.vector.fx[4], 0x80);
    floats(&mut core, 1, [3.0; 8]);
    let mut insn = decode(&mut core, &[0x0f, 0x58, 0xc9]).unwrap();
    insn.exec = super::run::once;
    insn.imm = u64::from_le_bytes([0x0f, 0x58, 0xc9, 0, 0, 0, 0, 0]);
    step(&mut core, &insn).unwrap();
    assert_eq!(float(&core, 1, 2), 6.0);
}
