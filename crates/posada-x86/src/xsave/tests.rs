use super::*;
use crate::core::Core;
use crate::insn::{Handler, ZERO};
use crate::mmu::tests::core as bare_core;

fn supported(core: &Core) -> u64 {
    core.shared.vm().model().xcr0()
}

/// A core with XSAVE enabled and every component in use.
fn core() -> Box<Core> {
    let mut core = bare_core();
    core.cr[4] |= 3 << 9 | 1 << 18;
    core.vector.xcr0 = supported(&core);
    core.update_mode();
    core.vector.fx[..5].copy_from_slice(&[0x7f, 3, 0, 0x38, 0x80]);
    core.vector.fx[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    core.vector.ymm = std::array::from_fn(|register| std::array::from_fn(|at| (register * 32 + at) as u8));
    if supported(&core) & AVX512 != 0 {
        core.vector.zmm_high = std::array::from_fn(|register| [register as u8 + 1; 32]);
        core.vector.zmm_high_used = true;
        core.vector.zmm = std::array::from_fn(|register| std::array::from_fn(|at| (register * 3 + at + 1) as u8));
        core.vector.opmask = std::array::from_fn(|register| 0x0123_4567_89ab_cdef << register);
    }
    core.vector.mxcsr = 0x1fa0;
    core
}

/// False, with the reason, where the host has no AVX-512.
fn has_avx512() -> bool {
    let has = supported(&bare_core()) & AVX512 != 0;
    if !has {
        println!("skipped: the host's processor has no AVX-512");
    }
    has
}

/// Runs a handler on the area at `at`, with EDX:EAX as the mask.
fn run(core: &mut Core, exec: Handler, at: u32, mask: u64) -> Exec {
    (core.regs[0], core.regs[2]) = (mask & 0xffff_ffff, mask >> 32);
    let insn = Insn {
        exec,
        imm: 0,
        disp: at as i32,
        length: 4,
        reg: 0,
        rm: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        segment: 3,
        flags: WIDE,
        extra: 0,
    };
    exec(core, &insn)
}

fn fault(core: &mut Core, exec: Handler, at: u32, mask: u64) -> u8 {
    run(core, exec, at, mask).expect_err("a fault");
    core.raised.vector
}

fn clear(core: &mut Core) {
    let empty = bare_core();
    core.vector.fx = empty.vector.fx;
    (core.vector.ymm, core.vector.mxcsr) = ([[0; 32]; 16], 0x1f80);
    (core.vector.zmm_high, core.vector.zmm_high_used) = ([[0; 32]; 16], false);
    (core.vector.zmm, core.vector.opmask) = ([[0; 64]; 16], [0; 8]);
}

#[test]
fn every_format_brings_all_state_back() {
    let formats: [(Handler, Handler); 5] = [
        (xsave, xrstor),
        (xsaveopt, xrstor),
        (xsavec, xrstor),
        (xsaves, xrstors),
        (fxsave, fxrstor),
    ];
    for (number, (save, restore)) in formats.into_iter().enumerate() {
        let mut core = core();
        let before = core.vector.clone();
        // Over a page border.
        run(&mut core, save, 0xe00, !0).unwrap();
        clear(&mut core);
        run(&mut core, restore, 0xe00, !0).unwrap();
        assert_eq!(
            (core.vector.mxcsr, &core.vector.fx[..160]),
            (before.mxcsr, &before.fx[..160]),
            "{number}"
        );
        let kept = if number == 4 { 16 } else { 32 };
        for (ours, theirs) in core.vector.ymm.iter().zip(&before.ymm) {
            assert_eq!(ours[..kept], theirs[..kept], "{number}");
        }
        if number < 4 {
            let wide = |core: &Core| (core.vector.zmm_high, core.vector.zmm, core.vector.opmask);
            assert_eq!(wide(&core), (before.zmm_high, before.zmm, before.opmask), "{number}");
            assert_eq!(core.vector.zmm_high_used, before.zmm_high_used, "{number}");
        }
    }
}

#[test]
fn components_that_are_absent_become_initial() {
    let mut core = core();
    core.vector.ymm.iter_mut().for_each(|ymm| ymm[16..].fill(0));
    core.vector.zmm_high = [[0; 32]; 16];
    (core.vector.zmm, core.vector.opmask) = ([[0; 64]; 16], [0; 8]);
    let in_use = core.xinuse(!0);
    assert_eq!(in_use, X87 | SSE);
    run(&mut core, xsave, 0x400, !0).unwrap();
    assert_eq!((core.load(0x600), core.load(0x608)), (Ok(in_use), Ok(0u64)));
    run(&mut core, xsavec, 0x800, !0).unwrap();
    assert_eq!(
        (core.load(0xa00), core.load(0xa08)),
        (Ok(in_use), Ok(COMPACTED | supported(&core)))
    );
    // XSAVE keeps the bits of what it was not asked for.
    run(&mut core, xsave, 0x400, X87).unwrap();
    assert_eq!(core.load(0x600), Ok(in_use));
    // Nothing but x87 is there: the rest is initial, but MXCSR only if compacted.
    core.store(0x600, X87).unwrap();
    core.store(0xa00, X87).unwrap();
    core.vector.mxcsr = 0x1f81;
    run(&mut core, xrstor, 0x400, !0).unwrap();
    assert_eq!((core.vector.mxcsr, core.vector.ymm), (0x1fa0, [[0; 32]; 16]));
    core.vector.ymm[3][0] = 1;
    run(&mut core, xrstor, 0x800, AVX).unwrap();
    assert_eq!((core.vector.mxcsr, core.vector.ymm[3][0]), (0x1fa0, 1));
    run(&mut core, xrstor, 0x800, !0).unwrap();
    assert_eq!((core.vector.mxcsr, core.vector.ymm[3][0]), (0x1f80, 0));
    assert_eq!(core.xinuse(!0), X87);
    core.store(0x600, 0u64).unwrap();
    run(&mut core, xrstor, 0x400, X87).unwrap();
    assert_eq!(core.vector.fx[..24], initial_fx()[..24]);
    assert_eq!(core.xinuse(!0), 0);
}

#[test]
fn each_component_of_avx512_is_where_its_format_has_it() {
    if !has_avx512() {
        return;
    }
    let mut core = core();
    let zmm_high = core.vector.zmm_high;
    // Compacted, without AVX: opmasks, upper halves and the upper registers follow the header.
    run(&mut core, xsavec, 0x400, AVX512).unwrap();
    assert_eq!(core.load(0x600), Ok(AVX512));
    assert_eq!(core.load(0x640), Ok(core.vector.opmask[0]));
    assert_eq!(core.load(0x640 + 64), Ok(u64::from_le_bytes([1; 8])));
    let first = u64::from_le_bytes(*core.vector.zmm[0].first_chunk().unwrap());
    assert_eq!(core.load(0x640 + 64 + 512), Ok(first));
    // One of them in its initial state keeps its place.
    core.vector.opmask = [0; 8];
    run(&mut core, xsavec, 0x400, AVX512).unwrap();
    assert_eq!(
        (core.load(0x600), core.load(0x640 + 64)),
        (Ok(AVX512 & !components::OPMASK), Ok(u64::from_le_bytes([1; 8])))
    );
    core.vector.opmask = [7; 8];
    run(&mut core, xrstor, 0x400, components::OPMASK).unwrap();
    assert_eq!((core.vector.opmask, core.vector.zmm_high), ([0; 8], zmm_high));
    // Standard, as CPUID tells.
    run(&mut core, xsave, 0x400, !0).unwrap();
    let [_, offset, ..] = crate::cpuid::cpuid(&core, 0xd, 6);
    assert_eq!(core.load(0x400 + u64::from(offset)), Ok(u64::from_le_bytes([1; 8])));
}

#[test]
fn outside_64_bit_mode_there_are_eight_registers() {
    if !has_avx512() {
        return;
    }
    let mut core = core();
    core.segments[crate::core::seg::CS].access = 0xc09b;
    core.update_mode();
    let before = core.vector.clone();
    assert_eq!(core.xinuse(AVX512), AVX512 & !components::ZMM);
    run(&mut core, xsave, 0x400, !0).unwrap();
    clear(&mut core);
    (core.vector.zmm[0][0], core.vector.zmm_high[8][0]) = (9, 9);
    run(&mut core, xrstor, 0x400, !0).unwrap();
    assert_eq!(core.vector.zmm_high[..8], before.zmm_high[..8]);
    assert_eq!(core.vector.opmask, before.opmask);
    // These are neither saved nor restored nor cleared.
    assert_eq!((core.vector.zmm[0][0], core.vector.zmm_high[8][0]), (9, 9));
}

#[test]
fn without_components_only_the_header_is_written() {
    let mut core = core();
    // Linear page 0 is no more.
    core.physical_write(0x4000, &[0; 8]);
    core.mmu.flush();
    for (exec, mask) in [(xsave as Handler, 0), (xsavec, 0), (xsavec, AVX)] {
        run(&mut core, exec, 0xe00, mask).unwrap();
        assert_eq!(core.load::<u64>(0x1000), Ok(mask));
    }
    for (exec, mask) in [(xsave as Handler, X87), (xsave, AVX), (xsavec, SSE)] {
        assert_eq!(fault(&mut core, exec, 0xe00, mask), vector::PF);
        // Up to the last byte of all.
        assert_eq!(fault(&mut core, exec, 0u32.wrapping_sub(64), mask), vector::PF);
    }
}

#[test]
fn bad_areas_change_nothing() {
    let mut core = core();
    let before = core.vector.clone();
    assert_eq!(fault(&mut core, xsave, 0x420, !0), vector::GP, "64 bytes");
    assert_eq!(fault(&mut core, fxsave, 0x408, !0), vector::GP, "16 bytes");
    assert_eq!(fault(&mut core, xsave, 0x1e00, !0), vector::PF);
    assert_eq!(core.load(0x1e00), Ok(0u64), "all or nothing");
    run(&mut core, xsave, 0x400, !0).unwrap();
    for (at, value) in [(0x600, 1u64 << 3), (0x608, 1), (0x610, 1), (0x608, COMPACTED | X87)] {
        let old: u64 = core.load(at).unwrap();
        core.store(at, value).unwrap();
        assert_eq!(fault(&mut core, xrstor, 0x400, !0), vector::GP, "{at:x}");
        core.store(at, old).unwrap();
    }
    assert_eq!(fault(&mut core, xrstors, 0x400, !0), vector::GP, "not compacted");
    core.store(0x418, 0x1_0000u32).unwrap();
    assert_eq!(fault(&mut core, xrstor, 0x400, !0), vector::GP, "MXCSR");
    assert_eq!(fault(&mut core, fxrstor, 0x400, !0), vector::GP, "MXCSR");
    assert_eq!(core.vector.ymm, before.ymm);
    core.cr[0] |= 8;
    core.update_mode();
    assert_eq!(fault(&mut core, xsave, 0x400, !0), vector::NM);
    core.cr[4] &= !(1 << 18);
    assert_eq!(fault(&mut core, xsave, 0x400, !0), vector::UD);
}

#[test]
fn xcr0_takes_what_exists_and_belongs_together() {
    let mut core = core();
    core.regs[1] = 0;
    for bad in [0, SSE, X87 | AVX, X87 | 8, 1 << 63 | X87, X87 | SSE | AVX512] {
        assert_eq!(fault(&mut core, xsetbv, 0, bad), vector::GP, "{bad:x}");
    }
    for some in [1 << 5, 1 << 6, 3 << 6, 5 << 5] {
        let bad = X87 | SSE | AVX | some;
        assert_eq!(fault(&mut core, xsetbv, 0, bad), vector::GP, "{bad:x}");
    }
    if supported(&core) & AVX512 != 0 {
        run(&mut core, xsetbv, 0, X87 | SSE | AVX | AVX512).unwrap();
        assert_eq!(core.fpu_blocked & needs::AVX512, 0);
        run(&mut core, xsetbv, 0, X87 | SSE | AVX).unwrap();
        assert_eq!(core.fpu_blocked & needs::AVX512, needs::AVX512);
    }
    run(&mut core, xsetbv, 0, X87 | SSE).unwrap();
    run(&mut core, xgetbv, 0, 0).unwrap();
    assert_eq!((core.regs[0], core.regs[2], core.fpu_blocked & 2), (3, 0, 2));
    core.regs[1] = 1;
    core.vector.ymm = [[0; 32]; 16];
    run(&mut core, xgetbv, 0, 0).unwrap();
    assert_eq!(core.regs[0], X87);
    core.segments[crate::core::seg::SS].access = 0xf3;
    core.update_mode();
    core.regs[1] = 0;
    assert_eq!(fault(&mut core, xsetbv, 0, X87), vector::GP);
}
