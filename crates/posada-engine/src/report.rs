//! A processor's registers for people: the report of a crash.

use crate::{CpuState, Segment};
use std::fmt::Write;

const CS: usize = 1;
const SS: usize = 2;
const RSP: usize = 4;

/// CR0.PE.
const PROTECTED: u64 = 1;
/// EFER.LMA.
const LONG: u64 = 1 << 10;
/// RFLAGS.VM.
const VIRTUAL_8086: u64 = 1 << 17;
/// CS.L and CS.D.
const CODE_64: u16 = 1 << 13;
const CODE_32: u16 = 1 << 14;

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];

impl CpuState {
    /// The registers of vCPU `index` with the code at RIP and the top of the stack, for people. `note`, a line or none, comes
    /// behind the first. `peek` reads a byte at a linear address, if there is memory.
    pub fn report(&self, index: u32, note: &str, peek: impl Fn(u64) -> Option<u8>) -> String {
        let mut text = String::new();
        self.write_report(&mut text, index, note, peek)
            .expect("a String takes all");
        text
    }

    fn write_report(
        &self,
        out: &mut String,
        index: u32,
        note: &str,
        peek: impl Fn(u64) -> Option<u8>,
    ) -> std::fmt::Result {
        let privilege = self.segments[SS].access >> 5 & 3;
        writeln!(out, "vCPU {index} in {} mode, privilege level {privilege}", self.mode())?;
        if !note.is_empty() {
            writeln!(out, "{note}")?;
        }
        let code = self.segments[CS].selector;
        writeln!(out, "rip {code:04x}:{:016x}  rflags {:08x}", self.rip, self.rflags)?;
        for row in 0..4 {
            for (name, value) in NAMES.iter().zip(self.gprs).skip(row * 4).take(4) {
                write!(out, "{name:<3} {value:016x}  ")?;
            }
            out.truncate(out.trim_end().len());
            writeln!(out)?;
        }
        writeln!(
            out,
            "cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:08x}",
            self.cr0, self.cr2, self.cr3, self.cr4, self.efer
        )?;
        let segment = |out: &mut String, name: &str, segment: &Segment| {
            writeln!(
                out,
                "{name:<3} {:04x}  base {:016x}  limit {:08x}  access {:04x}",
                segment.selector, segment.base, segment.limit, segment.access
            )
        };
        for (name, value) in ["es", "cs", "ss", "ds", "fs", "gs"].into_iter().zip(&self.segments) {
            segment(out, name, value)?;
        }
        segment(out, "ldt", &self.ldtr)?;
        segment(out, "tr", &self.tr)?;
        for (name, table) in [("gdt", self.gdtr), ("idt", self.idtr)] {
            writeln!(
                out,
                "{name:<3}       base {:016x}  limit {:08x}",
                table.base, table.limit
            )?;
        }
        write!(out, "code at rip:")?;
        let start = self.linear(CS, self.rip);
        for at in 0..16 {
            match peek(start.wrapping_add(at)) {
                Some(byte) => write!(out, " {byte:02x}")?,
                None => write!(out, " ??")?,
            }
        }
        let stack = self.gprs[RSP];
        write!(out, "\nstack at rsp {stack:#x}:")?;
        let start = self.linear(SS, stack);
        for at in 0..4 {
            let word = (0..8).try_fold(0, |word, byte: u64| {
                let value = peek(start.wrapping_add(at * 8 + byte))?;
                Some(word | u64::from(value) << (byte * 8))
            });
            match word {
                Some(word) => write!(out, " {word:016x}")?,
                None => write!(out, " ????????????????")?,
            }
        }
        writeln!(out)
    }

    fn sixty_four_bits(&self) -> bool {
        self.efer & LONG != 0 && self.segments[CS].access & CODE_64 != 0
    }

    fn mode(&self) -> &'static str {
        let wide = self.segments[CS].access & CODE_32 != 0;
        match (self.efer & LONG != 0, self.cr0 & PROTECTED != 0) {
            (true, _) if self.sixty_four_bits() => "64-bit",
            (true, _) => "compatibility",
            (_, false) => "real",
            _ if self.rflags & VIRTUAL_8086 != 0 => "virtual-8086",
            _ if wide => "32-bit protected",
            _ => "16-bit protected",
        }
    }

    /// Linear address of an offset in CS or SS.
    fn linear(&self, segment: usize, offset: u64) -> u64 {
        if self.sixty_four_bits() {
            offset
        } else {
            self.segments[segment].base.wrapping_add(offset) & 0xffff_ffff
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_has_registers_code_and_stack() {
        let mut state = CpuState::reset();
        state.gprs[RSP] = 0x10;
        let report = state.report(3, "a note", |linear| match linear {
            0xffff_fff0 => Some(0xea),
            0x10..0x18 => Some(linear as u8),
            _ => None,
        });
        for part in [
            "vCPU 3 in real mode, privilege level 0\na note\nrip f000:000000000000fff0  rflags 00000002\n",
            "rsp 0000000000000010  rbp",
            "cs  f000  base 00000000ffff0000  limit 0000ffff  access 009b",
            "code at rip: ea ?? ??",
            "stack at rsp 0x10: 1716151413121110 ????????????????",
        ] {
            assert!(report.contains(part), "{part} is not in\n{report}");
        }
    }

    #[test]
    fn modes_have_their_names() {
        let mut state = CpuState::reset();
        let modes = [
            (0, 0, 0, 0, "real"),
            (1, 0, 0, 0, "16-bit protected"),
            (1, 0, 0, CODE_32, "32-bit protected"),
            (1, 0, VIRTUAL_8086, 0, "virtual-8086"),
            (1, LONG, 0, CODE_32, "compatibility"),
            (1, LONG, 0, CODE_64, "64-bit"),
        ];
        for (cr0, efer, rflags, code, mode) in modes {
            (state.cr0, state.efer, state.rflags, state.segments[CS].access) = (cr0, efer, rflags, code);
            assert_eq!(state.mode(), mode);
        }
    }
}
