//! AVX-512: opmasks that select parts of memory, elements with addresses of their own, what XCR0 allows.

use super::{core as narrow_core, faults, run};
use crate::core::{Core, gpr};
use crate::xsave::AVX512;

/// A core with AVX-512 enabled; `None`, with the reason, where the host has none.
fn core() -> Option<Box<Core>> {
    if !std::arch::is_x86_feature_detected!("avx512vl") {
        println!("skipped: the host's processor has no AVX-512");
        return None;
    }
    let mut core = narrow_core();
    core.vector.xcr0 |= AVX512;
    core.update_mode();
    for (number, byte) in (0..64).zip(1..) {
        let (half, at) = (number / 32, number % 32);
        let register: &mut [u8; 32] = if half == 0 {
            &mut core.vector.ymm[2]
        } else {
            &mut core.vector.zmm_high[2]
        };
        register[at] = byte;
    }
    core.vector.zmm_high_used = true;
    core.vector.zmm[4] = core.vector_register(2);
    Some(core)
}

fn fault_address(core: &mut Core, bytes: &[u8]) -> (u8, u64, Option<u32>) {
    (faults(core, bytes), core.raised.address, core.raised.error)
}

/// VMOVDQU8 ZMM3{K1}{Z}, [RBX]; VMOVDQU8 [RBX]{K1}, ZMM2; VMOVDQA32 ZMM3{K1}, [RBX].
const LOAD: [u8; 6] = [0x62, 0xf1, 0x7f, 0xc9, 0x6f, 0x1b];
const STORE: [u8; 6] = [0x62, 0xf1, 0x7f, 0x49, 0x7f, 0x13];
const ALIGNED: [u8; 6] = [0x62, 0xf1, 0x7d, 0x49, 0x6f, 0x1b];

#[test]
fn what_an_opmask_leaves_out_does_not_fault() {
    let Some(mut core) = core() else { return };
    core.store(0x1ff8, 0x8877_6655_4433_2211u64).unwrap();
    core.regs[gpr::RBX] = 0x1ff8;
    core.vector.opmask[1] = 0x82;
    run(&mut core, &LOAD).unwrap();
    assert_eq!(core.vector_register(3)[..10], [0, 0x22, 0, 0, 0, 0, 0, 0x88, 0, 0]);
    run(&mut core, &STORE).unwrap();
    assert_eq!(core.load::<u64>(0x1ff8), Ok(0x0877_6655_4433_0211));
    core.vector.opmask[1] = 0x8_0002;
    assert_eq!(fault_address(&mut core, &LOAD), (14, 0x200b, Some(0)));
    assert_eq!(fault_address(&mut core, &STORE), (14, 0x200b, Some(2)));
    assert_eq!(core.load::<u64>(0x1ff8), Ok(0x0877_6655_4433_0211), "nothing is stored");
    // None of it is mapped, or even canonical.
    for nowhere in [0x5000, 0x7fff_ffff_ffe0, 1 << 62] {
        core.regs[gpr::RBX] = nowhere;
        core.vector.opmask[1] = 0;
        run(&mut core, &LOAD).unwrap();
        run(&mut core, &STORE).unwrap();
        assert_eq!(core.vector_register(3), [0; 64]);
    }
    core.regs[gpr::RBX] = 1 << 62;
    core.vector.opmask[1] = 1 << 63;
    assert_eq!(faults(&mut core, &LOAD), 13);
}

#[test]
fn a_store_over_code_writes_only_what_is_selected() {
    let Some(mut core) = core() else { return };
    core.mark_code(0x8000, 64);
    core.regs[gpr::RBX] = 0;
    core.vector.opmask[1] = 4;
    run(&mut core, &STORE).unwrap();
    assert_eq!(core.load::<u64>(0), Ok(0x03_0000));
}

#[test]
fn alignment_counts_unless_nothing_is_selected() {
    let Some(mut core) = core() else { return };
    core.regs[gpr::RBX] = 0x120;
    core.vector.opmask[1] = 1;
    assert_eq!(faults(&mut core, &ALIGNED), 13);
    core.vector.opmask[1] = 0x1_0000;
    run(&mut core, &ALIGNED).unwrap();
    (core.regs[gpr::RBX], core.vector.opmask[1]) = (0x140, 1);
    run(&mut core, &ALIGNED).unwrap();
}

#[test]
fn shuffles_and_inserts_read_all_whatever_the_opmask() {
    let Some(mut core) = core() else { return };
    core.regs[gpr::RBX] = 0x1ff8;
    core.vector.opmask[1] = 0;
    // VPERMD ZMM3{K1}, ZMM2, [RBX]; VADDPS likewise; VEXTRACTF32X4 [RBX]{K1}, ZMM2, 1.
    assert_eq!(faults(&mut core, &[0x62, 0xf2, 0x6d, 0x49, 0x36, 0x1b]), 14);
    run(&mut core, &[0x62, 0xf1, 0x6c, 0x49, 0x58, 0x1b]).unwrap();
    assert_eq!(faults(&mut core, &[0x62, 0xf3, 0x7d, 0x49, 0x19, 0x13, 1]), 14);
}

#[test]
fn compressed_bytes_end_where_the_opmask_is_used_up() {
    let Some(mut core) = core() else { return };
    core.regs[gpr::RBX] = 0x1ffd;
    core.vector.opmask[1] = 0x8000_0000_0001_0001;
    if !std::arch::is_x86_feature_detected!("avx512vbmi2") {
        return;
    }
    // VPCOMPRESSB [RBX]{K1}, ZMM2; VPEXPANDB ZMM3{K1}{Z}, [RBX].
    let (compress, expand) = (
        [0x62, 0xf2, 0x7d, 0x49, 0x63, 0x13],
        [0x62, 0xf2, 0x7d, 0xc9, 0x62, 0x1b],
    );
    run(&mut core, &compress).unwrap();
    assert_eq!(core.load::<u32>(0x1ffc), Ok(0x4011_0100));
    run(&mut core, &expand).unwrap();
    assert_eq!(core.vector_register(3)[16..18], [17, 0]);
    core.vector.opmask[1] |= 2;
    assert_eq!(fault_address(&mut core, &compress), (14, 0x2000, Some(2)));
    assert_eq!(fault_address(&mut core, &expand), (14, 0x2000, Some(0)));
}

#[test]
fn a_scatter_or_gather_that_faults_keeps_what_is_done() {
    let Some(mut core) = core() else { return };
    // Indices 0, 1, 0 and one that leads to what is not mapped.
    for (at, index) in [0u32, 1, 0, 0x800].into_iter().enumerate() {
        core.vector.ymm[5][at * 4..][..4].copy_from_slice(&index.to_le_bytes());
    }
    core.regs[gpr::RBX] = 0x100;
    core.vector.opmask[1] = 0xf;
    // VPSCATTERDD [RBX + XMM5 * 4]{K1}, XMM2.
    let scatter = [0x62, 0xf2, 0x7d, 0x09, 0xa0, 0x14, 0xab];
    assert_eq!(fault_address(&mut core, &scatter), (14, 0x2100, Some(2)));
    assert_eq!(core.vector.opmask[1], 8);
    // The later of two at one place remains.
    assert_eq!(core.load::<u64>(0x100), Ok(0x0807_0605_0c0b_0a09));
    core.vector.opmask[1] = 0xe;
    // VPGATHERDD XMM3{K1}, [RBX + XMM5 * 4].
    let gather = [0x62, 0xf2, 0x7d, 0x09, 0x90, 0x1c, 0xab];
    assert_eq!(fault_address(&mut core, &gather), (14, 0x2100, Some(0)));
    assert_eq!(core.vector.opmask[1], 8);
    assert_eq!(core.vector_register(3)[4..12], [5, 6, 7, 8, 9, 10, 11, 12]);
    core.vector.opmask[1] = !0xf;
    run(&mut core, &gather).unwrap();
    assert_eq!(core.vector.opmask[1], 0);
}

#[test]
fn upper_halves_go_with_vex_encodings_and_stay_with_legacy_ones() {
    let Some(mut core) = core() else { return };
    // ADDPS XMM2, XMM2; VADDPS YMM2, YMM2, YMM2.
    run(&mut core, &[0x0f, 0x58, 0xd2]).unwrap();
    assert_ne!(core.vector.zmm_high[2], [0; 32]);
    run(&mut core, &[0xc5, 0xec, 0x58, 0xd2]).unwrap();
    assert_eq!(core.vector.zmm_high[2], [0; 32]);
    // VMOVDQU32 ZMM2, ZMM20; VZEROUPPER.
    run(&mut core, &[0x62, 0xb1, 0x7e, 0x48, 0x6f, 0xd4]).unwrap();
    assert_eq!(core.vector_register(2), core.vector.zmm[4]);
    run(&mut core, &[0xc5, 0xf8, 0x77]).unwrap();
    assert_eq!(core.vector_register(2)[16..], [0; 48]);
    assert_ne!(core.vector.zmm[4], [0; 64], "the upper registers stay");
}

#[test]
fn xcr0_and_cr0_decide() {
    let Some(mut core) = core() else { return };
    // VADDPS ZMM1, ZMM1, ZMM1; KORTESTB K1, K1; VADDPS XMM16, XMM16, XMM16.
    let all: [&[u8]; 3] = [
        &[0x62, 0xf1, 0x74, 0x48, 0x58, 0xc9],
        &[0xc5, 0xf9, 0x98, 0xc9],
        &[0x62, 0xa1, 0x7c, 0x00, 0x58, 0xc0],
    ];
    for bytes in all {
        run(&mut core, bytes).unwrap();
    }
    core.cr[0] |= 8;
    core.update_mode();
    for bytes in all {
        assert_eq!(faults(&mut core, bytes), 7, "{bytes:x?}");
    }
    core.vector.xcr0 &= !AVX512;
    core.update_mode();
    for bytes in all {
        assert_eq!(faults(&mut core, bytes), 6, "{bytes:x?}");
    }
    core.cr[0] &= !8;
    core.update_mode();
    for bytes in all {
        assert_eq!(faults(&mut core, bytes), 6, "{bytes:x?}");
    }
    // VADDPS XMM1, XMM1, XMM1 needs only AVX.
    run(&mut core, &[0xc5, 0xf0, 0x58, 0xc9]).unwrap();
}
