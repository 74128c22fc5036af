use super::*;
use crate::core::gpr::{RAX, RCX, RDI, RSI};
use crate::fault::vector;
use crate::flags::tests::{Operands, insn, whole};
use crate::insn::{ADDRESS16, ADDRESS32, Handler};
use crate::mmu::tests::core;

/// `$op` on the host: RAX, RCX, RSI, RDI and the flags go in and out.
macro_rules! on_host {
    ($op:expr) => {
        |registers: &mut [u64; 5]| {
            let [rax, rcx, rsi, rdi, flags] = registers;
            // SAFETY: the test's registers lie inside its buffer.
            unsafe {
                asm!(
                    "push {f}",
                    "popfq",
                    $op,
                    "pushfq",
                    "pop {f}",
                    "cld",
                    f = inout(reg) * flags,
                    inout("rax") * rax,
                    inout("rcx") * rcx,
                    inout("rsi") * rsi,
                    inout("rdi") * rdi
                )
            }
            *flags &= 0x8d5;
        }
    };
}

type Reference = fn(&mut [u64; 5]);

/// Handler, prefix, bytes, and the host's instruction.
fn forms() -> Vec<(Handler, u8, u64, Reference)> {
    let mut forms: Vec<(Handler, u8, u64, Reference)> = Vec::new();
    macro_rules! form {
        ($($name:ident $size:ty, $letter:literal;)*) => {$(
            forms.push(($name::<$size>, 0, size_of::<$size>() as u64, on_host!(concat!(stringify!($name), $letter))));
            forms.push(($name::<$size>, REP, size_of::<$size>() as u64, on_host!(concat!("repe ", stringify!($name), $letter))));
            forms.push(($name::<$size>, REPNE, size_of::<$size>() as u64, on_host!(concat!("repne ", stringify!($name), $letter))));
        )*};
    }
    form!(
        movs u8, "b"; movs u16, "w"; movs u32, "d"; movs u64, "q";
        stos u8, "b"; stos u16, "w"; stos u32, "d"; stos u64, "q";
        lods u8, "b"; lods u16, "w"; lods u32, "d"; lods u64, "q";
        scas u8, "b"; scas u16, "w"; scas u32, "d"; scas u64, "q";
        cmps u8, "b"; cmps u16, "w"; cmps u32, "d"; cmps u64, "q";
    );
    forms
}

/// Random runs over both pages, that overlap, cross the page border, go up and down and end by ZF.
#[test]
fn strings_are_the_hosts() {
    let (mut core, mut operands) = (core(), Operands::new());
    let mut buffer = [0u8; 0x2000];
    for (handler, prefix, bytes, reference) in forms() {
        let mut insn = insn(0, 0, 0);
        insn.flags = prefix;
        for round in 0..60 {
            // Few values, so that comparisons go on for a while.
            for (at, byte) in buffer.iter_mut().enumerate() {
                *byte = u8::from(operands.bits() >> 58 == 0) * (round % 3 + at as u8 % 2);
                core.store(at as u64, *byte).unwrap();
            }
            let base = buffer.as_mut_ptr() as u64;
            let down = operands.bits() >> 63 != 0;
            let count = operands.bits() >> if round % 2 == 0 { 54 } else { 60 };
            let count = count.min(0xf00 / bytes);
            let mut place = || 0x1000 + (operands.bits() as i64 >> (52 + round % 5)) / 2;
            let from = place();
            let to = if round % 4 == 0 {
                from + bytes as i64 * 2 - 1
            } else {
                place()
            };
            // A run ends inside the buffer whichever way it goes.
            let extent = (count * bytes) as i64;
            let inside = |at: i64| {
                at.clamp(
                    if down { extent } else { 0 },
                    0x2000 - 8 - if down { 0 } else { extent },
                ) as u64
            };
            let (from, to) = (inside(from), inside(to));
            let rax = if round % 2 == 0 { 0 } else { operands.number() };
            core.arithmetic = operands.flags();
            core.system_flags = 2 | if down { flag::DF } else { 0 };
            core.regs[RAX] = rax;
            core.regs[RCX] = count;
            (core.regs[RSI], core.regs[RDI]) = (from, to);
            let rflags = whole(core.arithmetic) | core.system_flags;
            let mut registers = [rax, count, base + from, base + to, rflags];
            reference(&mut registers);
            handler(&mut core, &insn).unwrap();
            let [rax, rcx, rsi, rdi, flags] = registers;
            assert_eq!(
                [
                    core.regs[RAX],
                    core.regs[RCX],
                    core.regs[RSI],
                    core.regs[RDI],
                    whole(core.arithmetic) & 0x8d5
                ],
                [rax, rcx, rsi - base, rdi - base, flags],
                "{count} of {bytes} from {from:#x} to {to:#x}, prefix {prefix}"
            );
            for (at, byte) in buffer.iter().enumerate() {
                assert_eq!(core.load::<u8>(at as u64), Ok(*byte), "at {at:#x}");
            }
        }
    }
}

#[test]
fn a_fault_in_the_middle_shows_the_progress() {
    let mut core = core();
    let mut insn = insn(0, 0, 0);
    insn.flags = REP;
    core.regs[RCX] = 0x20;
    (core.regs[RSI], core.regs[RDI]) = (0x101, 0x1fe2);
    assert!(movs::<u32>(&mut core, &insn).is_err());
    assert_eq!(
        (core.raised.vector, core.raised.error, core.raised.address),
        (vector::PF, Some(2), 0x2000)
    );
    assert_eq!((core.regs[RCX], core.regs[RSI], core.regs[RDI]), (0x19, 0x11d, 0x1ffe));
    core.system_flags |= flag::DF;
    core.regs[RCX] = 0x20;
    core.regs[RDI] = 3;
    assert!(stos::<u8>(&mut core, &insn).is_err());
    assert_eq!((core.regs[RCX], core.raised.address), (0x1c, u64::MAX));
    core.system_flags &= !flag::DF;
    core.regs[RCX] = 0x20;
    core.regs[RDI] = 0x1ff8;
    core.regs[RAX] = 0;
    core.arithmetic = 0x8301;
    assert!(scas::<u8>(&mut core, &insn).is_err());
    assert_eq!((core.regs[RCX], core.arithmetic), (0x18, 0x8301));
}

#[test]
fn addresses_wrap_in_their_size() {
    let mut core = core();
    core.cr[0] = 0x10;
    core.msr.efer = 0;
    core.segments[seg::CS].access = 0x9b;
    core.mmu.flush();
    core.update_mode();
    let mut insn = insn(0, 0, 0);
    insn.flags = REP | ADDRESS16;
    let high = 0xabcd_0000;
    core.regs[RAX] = 0x1122_3344;
    core.regs[RCX] = high | 4;
    core.regs[RDI] = high | 0xfffe;
    stos::<u8>(&mut core, &insn).unwrap();
    assert_eq!((core.regs[RCX], core.regs[RDI]), (high, high | 2));
    assert_eq!(
        (core.load::<u16>(0xfffe), core.load::<u32>(0)),
        (Ok(0x4444), Ok(0x4444))
    );
    core.system_flags |= flag::DF;
    core.regs[RCX] = high | 4;
    stos::<u16>(&mut core, &insn).unwrap();
    assert_eq!(core.regs[RDI], high | 0xfffa);
    assert_eq!(
        (core.load::<u32>(0xfffc), core.load::<u32>(0)),
        (Ok(0x3344_3344), Ok(0x3344_3344))
    );
    core.system_flags &= !flag::DF;
    core.regs[RCX] = high | 4;
    core.regs[RDI] = high | 0xfffd;
    assert!(stos::<u16>(&mut core, &insn).is_err(), "beyond the limit");
    assert_eq!(
        (core.raised.vector, core.regs[RCX], core.regs[RDI]),
        (vector::GP, high | 3, high | 0xffff)
    );
}

#[test]
fn narrow_addresses_in_64_bit_code_clear_upper_halves() {
    let mut core = core();
    let mut insn = insn(0, 0, 0);
    insn.flags = REP | ADDRESS32;
    let high = 0x1234_5678 << 32;
    core.regs[RCX] = high | 3;
    (core.regs[RSI], core.regs[RDI]) = (high | 8, high | 0x10);
    core.store(8, 0x0403_0201u32).unwrap();
    movs::<u8>(&mut core, &insn).unwrap();
    assert_eq!((core.regs[RCX], core.regs[RSI], core.regs[RDI]), (0, 0xb, 0x13));
    assert_eq!(core.load::<u32>(0x10), Ok(0x0003_0201));
}

#[test]
fn the_source_alone_takes_another_segment() {
    let mut core = core();
    core.segments[seg::GS].base = 0x1000;
    core.store(0x1010, 0x55u8).unwrap();
    let mut insn = insn(0, 0, 0);
    insn.segment = seg::GS as u8;
    (core.regs[RSI], core.regs[RDI]) = (0x10, 0x20);
    movs::<u8>(&mut core, &insn).unwrap();
    assert_eq!(core.load::<u8>(0x20), Ok(0x55));
    insn.flags = REP;
    core.regs[RCX] = 1;
    core.regs[RSI] = 0x10;
    movs::<u8>(&mut core, &insn).unwrap();
    assert_eq!(core.load::<u8>(0x21), Ok(0x55));
}

#[test]
fn long_runs_stop_for_events_and_go_on() {
    let mut core = core();
    // Linear addresses from 2 MiB on lead to all of RAM.
    core.physical_write(0x3008, &0x87u64.to_le_bytes());
    let mut insn = insn(0, 0, 0);
    insn.flags = REP;
    core.regs[RAX] = 0x77;
    core.regs[RCX] = 0x2_0001;
    core.regs[RDI] = 0x24_0000;
    let mut stops = 0;
    loop {
        core.set_rip(0x1004);
        core.stop_at = 1;
        stos::<u8>(&mut core, &insn).unwrap();
        if core.rip() != 0x1000 {
            break;
        }
        assert_eq!((core.stop_at, core.regs[RCX] + core.regs[RDI]), (0, 0x26_0001));
        stops += 1;
    }
    assert_eq!((core.rip(), core.regs[RCX], stops), (0x1004, 0, 8));
    assert_eq!(core.load::<u16>(0x26_0000), Ok(0x77));
    core.careful = true;
    core.regs[RCX] = 2;
    stos::<u8>(&mut core, &insn).unwrap();
    assert_eq!((core.rip(), core.regs[RCX]), (0x1000, 1));
}

#[test]
fn runs_over_code_drop_it() {
    let mut core = core();
    let mut insn = insn(0, 0, 0);
    insn.flags = REP;
    for (down, start) in [(false, 0x700), (true, 0x900)] {
        core.system_flags = 2 | if down { flag::DF } else { 0 };
        core.ram.code().page(0x8000).mark(0x800, 4);
        core.mmu.forbid_writes(0x8000);
        let before = core.ram.code().page(0x8000).version();
        core.regs[RCX] = 0x200;
        core.regs[RDI] = start;
        stos::<u8>(&mut core, &insn).unwrap();
        assert_ne!(core.ram.code().page(0x8000).version(), before);
        assert!(!core.ram.code().page(0x8000).has_code());
    }
}
