//! What tests of system instructions share: bare instructions and a processor with descriptor tables.

use crate::core::{Core, gpr, seg};
use crate::insn::{Insn, ZERO};
use posada_engine::Segment;

/// Selectors of [`GDT`].
pub(crate) const KERNEL_CODE: u16 = 0x08;
pub(crate) const KERNEL_DATA: u16 = 0x10;
pub(crate) const USER_CODE_32: u16 = 0x1b;
pub(crate) const USER_DATA: u16 = 0x23;
pub(crate) const USER_CODE: u16 = 0x2b;
pub(crate) const TASK: u16 = 0x30;
/// To KERNEL_CODE:1234h, for user mode.
pub(crate) const GATE: u16 = 0x40;
pub(crate) const ABSENT: u16 = 0x50;
/// Kernel data that was never accessed.
pub(crate) const FRESH: u16 = 0x58;
pub(crate) const CONFORMING: u16 = 0x60;
pub(crate) const KERNEL_CODE_32: u16 = 0x68;
/// To KERNEL_CODE_32:5678h with two parameters, for user mode; not for long mode.
pub(crate) const GATE_32: u16 = 0x70;
/// 64-bit code that says it is 32-bit too.
pub(crate) const RESERVED: u16 = 0x78;
pub(crate) const LOCAL: u16 = 0x80;

/// Linear address and entries of the tests' GDT.
pub(crate) const TABLE: u64 = 0x1000;
const GDT: [u64; 18] = [
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x00cf_fb00_0000_ffff,
    0x00cf_f300_0000_ffff,
    0x00af_fb00_0000_ffff,
    0x0000_8900_1800_01ff,
    0,
    0x0000_ec00_0008_1234,
    0,
    0x00cf_7300_0000_ffff,
    0x00cf_9200_0000_ffff,
    0x00af_9f00_0000_ffff,
    0x00cf_9b00_0000_ffff,
    0x0000_ec02_0068_5678,
    0x00ef_9b00_0000_ffff,
    0x0000_8200_1c00_0007,
    0,
];
/// Linear address of the tests' task state segment.
pub(crate) const TASK_STATE: u64 = 0x1800;

/// An instruction without operands that the handlers under test read: registers are RAX, memory is at address 0.
pub(crate) fn insn() -> Insn {
    Insn {
        exec: |_, _| Ok(()),
        imm: 0,
        disp: 0,
        length: 2,
        reg: 0,
        rm: 0,
        base: ZERO,
        index: ZERO,
        scale: 0,
        segment: seg::DS as u8,
        flags: 0,
        extra: 0,
    }
}

/// Goes to privilege level 3.
pub(crate) fn user(core: &mut Core) {
    core.segments[seg::SS].access = 0xf3;
    core.update_mode();
}

/// Puts the GDT and an empty TSS whose inner stack is at E00h in place.
fn install(core: &mut Core) {
    for (at, entry) in (TABLE..).step_by(8).zip(GDT) {
        core.store_system(at, entry).unwrap();
    }
    core.gdtr.base = TABLE;
    core.gdtr.limit = GDT.len() as u16 * 8 - 1;
    core.tr = Segment {
        selector: TASK,
        base: TASK_STATE,
        limit: 0x1ff,
        access: 0x8b,
    };
    core.store_system(TASK_STATE + 4, 0xe00u64).unwrap();
}

fn flat(selector: u16, access: u16) -> Segment {
    Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    }
}

/// A processor in 64-bit mode at privilege level 0.
pub(crate) fn long() -> Box<Core> {
    let mut core = crate::mmu::tests::core();
    core.segments[seg::CS] = flat(KERNEL_CODE, 0xa09b);
    core.segments[seg::SS] = flat(KERNEL_DATA, 0xc093);
    core.regs[gpr::RSP] = 0x800;
    core.set_rip(0x77);
    core.update_mode();
    install(&mut core);
    core
}

/// The same at privilege level 3.
pub(crate) fn long_user() -> Box<Core> {
    let mut core = long();
    core.segments[seg::CS] = flat(USER_CODE, 0xa0fb);
    core.segments[seg::SS] = flat(USER_DATA, 0xc0f3);
    core.update_mode();
    core
}

/// A processor in 32-bit protected mode without paging, at a privilege level.
pub(crate) fn protected(level: u16) -> Box<Core> {
    let mut core = crate::mmu::tests::core();
    core.msr.efer = 0;
    core.cr[0] = 0x11;
    let (code, data) = if level == 0 {
        (KERNEL_CODE_32, KERNEL_DATA)
    } else {
        (USER_CODE_32, USER_DATA)
    };
    core.segments = [flat(data, 0xc093 | level << 5); 6];
    core.segments[seg::CS] = flat(code, 0xc09b | level << 5);
    core.regs[gpr::RSP] = 0x800;
    core.set_rip(0x77);
    core.mmu.flush();
    core.update_mode();
    install(&mut core);
    core.store_system(TASK_STATE + 8, KERNEL_DATA).unwrap();
    core
}

/// Puts values on the stack, the last on top.
pub(crate) fn push_all(core: &mut Core, bytes: u64, values: &[u64]) {
    let mut stack = super::stack::Stack::current(core);
    for &value in values {
        stack.push(core, bytes, value).unwrap();
    }
    core.regs[gpr::RSP] = stack.rsp;
}

/// Vector and error code of what was raised.
pub(crate) fn raised(core: &Core) -> (u8, Option<u32>) {
    (core.raised.vector, core.raised.error)
}
