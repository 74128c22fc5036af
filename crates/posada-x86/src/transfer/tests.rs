//! Which fault it is: of the stack, of an operand, or none.

use super::*;
use crate::system::tests::{long, raised};

const HOLE: u64 = 0x8000_0000_0000;
const CODE: u64 = 0x40;

/// Runs one instruction at [`CODE`].
fn run(core: &mut Core, bytes: &[u8]) -> Exec {
    for (at, &byte) in (CODE..).zip(bytes) {
        core.store(at, byte).unwrap();
    }
    core.set_rip(CODE);
    core.step()
}

#[test]
fn ignored_segment_prefixes_leave_fs_and_the_kind_of_fault_alone() {
    let mut core = long();
    core.segments[seg::FS].base = 0x100;
    core.store(0x120u64, 0x55u32).unwrap();
    core.regs[gpr::RCX] = 0x20;
    // MOV EAX, FS:[RCX] and MOVD XMM0, FS:[RCX], with each other prefix behind FS.
    core.cr[4] |= 1 << 9;
    core.update_mode();
    for prefix in [0x26, 0x2e, 0x36, 0x3e] {
        core.regs[gpr::RAX] = 0;
        core.vector.ymm[0] = [0; 32];
        run(&mut core, &[0x64, prefix, 0x8b, 0x01]).unwrap();
        run(&mut core, &[0x66, 0x64, prefix, 0x0f, 0x6e, 0x01]).unwrap();
        assert_eq!((core.regs[gpr::RAX], core.vector.ymm[0][0]), (0x55, 0x55));
    }
    core.regs[gpr::RCX] = HOLE;
    for bytes in [&[0x36, 0x8b, 0x01][..], &[0x66, 0x36, 0x0f, 0x6e, 0x01]] {
        assert!(run(&mut core, bytes).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)), "{bytes:02x?}");
    }
    // A base of RBP or RSP chooses SS, unless FS does.
    core.regs[gpr::RBP] = HOLE;
    for (bytes, fault) in [
        (&[0x8b, 0x45, 0][..], vector::SS),
        (&[0x3e, 0x8b, 0x45, 0], vector::SS),
        (&[0x64, 0x8b, 0x45, 0], vector::GP),
        (&[0x66, 0x3e, 0x0f, 0x6e, 0x45, 0], vector::SS),
    ] {
        assert!(run(&mut core, bytes).is_err());
        assert_eq!(raised(&core), (fault, Some(0)), "{bytes:02x?}");
    }
}

#[test]
fn a_non_canonical_stack_is_a_stack_fault_whatever_the_operand_and_prefix() {
    let uses: [&[u8]; 14] = [
        &[0x50],
        &[0x66, 0x50],
        &[0x58],
        &[0x8f, 0x00],
        &[0xff, 0x30],
        &[0x68, 1, 2, 3, 4],
        &[0x9c],
        &[0x9d],
        &[0xc3],
        &[0xc2, 8, 0],
        &[0xe8, 0, 0, 0, 0],
        &[0xc8, 8, 0, 1],
        &[0xc9],
        &[0x0f, 0xa0],
    ];
    for bytes in uses {
        for prefix in [None, Some(0x64), Some(0x3e)] {
            let mut core = long();
            (core.regs[gpr::RSP], core.regs[gpr::RBP]) = (HOLE + 0x100, HOLE);
            let whole: Vec<u8> = prefix.into_iter().chain(bytes.iter().copied()).collect();
            assert!(run(&mut core, &whole).is_err(), "{whole:02x?}");
            assert_eq!(raised(&core), (vector::SS, Some(0)), "{whole:02x?}");
            assert_eq!((core.regs[gpr::RSP], core.rip()), (HOLE + 0x100, CODE));
        }
    }
    // PUSH [RAX], POP [RAX], CALL [RAX]: the operand's own fault.
    for bytes in [[0xff, 0x30], [0x8f, 0x00], [0xff, 0x10]] {
        let mut core = long();
        core.regs[gpr::RAX] = HOLE;
        assert!(run(&mut core, &bytes).is_err());
        assert_eq!(raised(&core), (vector::GP, Some(0)), "{bytes:02x?}");
    }
}

#[test]
fn an_operand_across_the_end_of_the_canonical_range_is_no_page_fault() {
    let mut core = long();
    core.regs[gpr::RCX] = HOLE - 2;
    core.regs[gpr::RSP] = HOLE - 2;
    for (bytes, fault) in [
        (&[0x8b, 0x01][..], vector::GP),
        (&[0x89, 0x01], vector::GP),
        (&[0x01, 0x01], vector::GP),
        (&[0x58], vector::SS),
    ] {
        assert!(run(&mut core, bytes).is_err());
        assert_eq!(raised(&core), (fault, Some(0)), "{bytes:02x?}");
    }
    // Inside, the page is merely absent.
    core.regs[gpr::RCX] = HOLE - 4;
    assert!(run(&mut core, &[0x8b, 0x01]).is_err());
    assert_eq!((core.raised.vector, core.raised.address), (vector::PF, HOLE - 4));
}

#[test]
fn pop_of_a_segment_register_reads_two_bytes() {
    let mut core = long();
    core.store(0x1ffeu64, 0u16).unwrap();
    core.regs[gpr::RSP] = 0x1ffe;
    run(&mut core, &[0x0f, 0xa1]).unwrap();
    assert_eq!(core.regs[gpr::RSP], 0x2006);
}

#[test]
fn a_rex_prefix_does_not_make_an_exchange_of_pause() {
    let mut core = long();
    (core.regs[gpr::RAX], core.regs[8]) = (1, 2);
    run(&mut core, &[0xf3, 0x41, 0x90]).unwrap();
    assert_eq!((core.pauses, core.regs[gpr::RAX]), (1, 1));
    run(&mut core, &[0x49, 0x90]).unwrap();
    assert_eq!((core.pauses, core.regs[gpr::RAX]), (1, 2));
}
