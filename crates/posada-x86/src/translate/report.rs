//! What check mode says of a block that does not do what the interpreter does.

use super::blocks::Block;
use super::check::Copies;
use super::undefined::instruction;
use crate::core::Core;
use iced_x86::{Decoder, DecoderOptions, FastFormatter};
use std::fmt::Write;

/// Bytes of memory that are listed.
const BYTES: usize = 16;
const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];
const SEGMENTS: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// How both came to where they are compared.
pub(super) struct Ways<'a> {
    /// RIPs of the instructions that the interpreter executed.
    pub executed: &'a [u64],
    /// RIP at which translated code was left.
    pub exit: u64,
    /// Why.
    pub left: &'a str,
}

/// What differs, a line each: what the interpreter has, and translated code.
pub(super) fn differences(core: &Core, shadow: &Core, flags: u16, copies: &Copies) -> String {
    let mut text = String::new();
    let mut number = |name: &str, one: u64, other: u64| {
        if one != other {
            let _ = writeln!(text, "  {name:<14} {one:016x}  {other:016x}");
        }
    };
    for (at, name) in NAMES.iter().enumerate() {
        number(name, core.regs[at], shadow.regs[at]);
    }
    let known = |core: &Core| u64::from(core.arithmetic & flags);
    number("arithmetic", known(core), known(shadow));
    number("system flags", core.system_flags, shadow.system_flags);
    number("cpl", core.cpl.into(), shadow.cpl.into());
    number("soft TLB", core.mmu.active as u64, shadow.mmu.active as u64);
    number("kernel gs base", core.msr.kernel_gs_base, shadow.msr.kernel_gs_base);
    number("mxcsr", core.vector.mxcsr.into(), shadow.vector.mxcsr.into());
    for (at, name) in SEGMENTS.iter().enumerate() {
        let (one, other) = (core.segments[at], shadow.segments[at]);
        if one == other {
            continue;
        }
        number(&format!("{name} base"), one.base, other.base);
        number(&format!("{name} selector"), one.selector.into(), other.selector.into());
    }
    let mut register = |name: &str, one: &[u8], other: &[u8]| {
        for (part, (one, other)) in one.chunks_exact(8).zip(other.chunks_exact(8)).enumerate() {
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight"));
            number(&format!("{name} [{part}]"), word(one), word(other));
        }
    };
    let (one, other) = (&core.vector, &shadow.vector);
    for at in 0..16 {
        register(&format!("ymm{at}"), &one.ymm[at], &other.ymm[at]);
        register(&format!("upper zmm{at}"), &one.zmm_high[at], &other.zmm_high[at]);
    }
    for at in 0..16 {
        register(&format!("zmm{}", at + 16), &one.zmm[at], &other.zmm[at]);
    }
    for at in 0..8 {
        number(&format!("k{at}"), one.opmask[at], other.opmask[at]);
    }
    for (gpa, one, other) in copies.differences().take(BYTES) {
        let _ = writeln!(text, "  byte at {gpa:#x}: {one:02x}  {other:02x}");
    }
    text
}

/// The whole report: where, what differs, and the code of both, of which `code` runs at the block's start.
pub(super) fn report(core: &Core, block: &Block, ways: &Ways<'_>, difference: &str, code: &[u8]) -> String {
    let mut text = String::from("translated code does something else than the interpreter\n");
    let _ = writeln!(
        text,
        "block at {:#x}, left at {:#x} ({}); interpreted and translated:",
        block.key.rip, ways.exit, ways.left
    );
    text += difference;
    text += "the guest's instructions, as the interpreter executed them:\n";
    for &rip in ways.executed {
        let line = instruction(core, rip).map_or("?".into(), |instruction| format(&instruction));
        let _ = writeln!(text, "  {rip:16x}  {line}");
    }
    text += "translated code:\n";
    let decoder = Decoder::with_ip(64, code, block.start, DecoderOptions::NONE);
    for instruction in decoder {
        let _ = writeln!(text, "  {:16x}  {}", instruction.ip(), format(&instruction));
    }
    text
}

fn format(instruction: &iced_x86::Instruction) -> String {
    let mut text = String::new();
    FastFormatter::new().format(instruction, &mut text);
    text
}
