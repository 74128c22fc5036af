//! Compares the outcomes of one case, field by field.

use crate::layout::{DATA, original};
use crate::state::{Case, End, Outcome, SELECTORS, State, area};
use crate::undefined::{self, Undefined};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, Register};

const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];
/// RF is the kernel's to see, not the instruction's.
const RESUME: u64 = 1 << 16;

/// Where Linux' user addresses end.
const USER_END: u64 = 0x7fff_ffff_f000;

/// The instruction of a case.
pub fn decode(case: &Case) -> Instruction {
    let bytes = &case.code[..usize::from(case.length)];
    Decoder::with_ip(case.bits, bytes, case.state.rip, DecoderOptions::NONE).decode()
}

/// How a case ended, in words.
pub fn end(outcome: &Outcome) -> String {
    match outcome.end {
        End::Retired => format!("goes on at {:#x}", outcome.state.rip),
        End::Died => "dies or hangs".into(),
        End::Raised if outcome.vector == 14 => {
            format!("#PF({:x}) at {:#x}", outcome.error, outcome.address)
        }
        End::Raised => format!("exception {}({:x})", outcome.vector, outcome.error),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
}

struct Differences(Vec<String>);

impl Differences {
    fn check<T: PartialEq>(&mut self, name: &str, native: T, guest: T, show: impl Fn(&T) -> String) {
        if native != guest {
            self.0
                .push(format!("{name}: CPU {}, posada {}", show(&native), show(&guest)));
        }
    }

    fn number(&mut self, name: &str, native: u64, guest: u64) {
        self.check(name, native, guest, |value| format!("{value:#x}"));
    }
}

/// Whether two cases ended alike, as far as that is defined.
fn same_end(undefined: &Undefined, native: &Outcome, guest: &Outcome) -> bool {
    // Linux sets P in a fault of its own half, to tell nothing of its layout (arch/x86/mm/fault.c).
    let error = |outcome: &Outcome| outcome.error | u32::from(outcome.vector == 14 && outcome.address >= USER_END);
    let ended = |outcome: &Outcome| (outcome.end, outcome.vector, error(outcome), outcome.address);
    if ended(native) == ended(guest) {
        return true;
    }
    let retired = |outcome: &Outcome| outcome.end == End::Retired;
    let memory = |outcome: &Outcome| outcome.end == End::Raised && matches!(outcome.vector, 12..=14);
    let part = |outcome: &Outcome| {
        let inside = |(first, length)| {
            let distance = outcome.address.wrapping_sub(first);
            distance < length || undefined.wraps.is_some_and(|mask| distance & mask < length)
        };
        outcome.end == End::Raised && outcome.vector == 14 && undefined.parts.is_some_and(inside)
    };
    let same_page = native.address >> 12 == guest.address >> 12;
    if part(native) && part(guest) {
        return !same_page || error(native) == error(guest);
    }
    // One side took a fault of memory, the other a numeric exception: at once, or (x87) at the next instruction.
    let numeric =
        |outcome: &Outcome| retired(outcome) || outcome.end == End::Raised && matches!(outcome.vector, 16 | 19);
    let either = |one: &dyn Fn(&Outcome) -> bool, other: &dyn Fn(&Outcome) -> bool| {
        one(native) && other(guest) || one(guest) && other(native)
    };
    // Some part of the operand is beyond the canonical range: another may fault first.
    let beyond = |(first, length): (u64, u64)| first < 1 << 47 && first.wrapping_add(length) > 1 << 47;
    undefined.parts.is_some_and(beyond) && either(&memory, &memory)
        || undefined.numeric_first && either(&memory, &numeric)
        || undefined.optional && either(&part, &retired)
        || undefined.any_memory_fault && either(&memory, &memory)
}

/// What differs between the CPU's outcome and the guest's; empty when nothing does.
pub fn differences(case: &Case, native: &Outcome, guest: &Outcome) -> Vec<String> {
    let mut found = Differences(Vec::new());
    let instruction = decode(case);
    let undefined = match (native.end, guest.end) {
        (End::Retired, End::Retired) => undefined::of(&instruction, case),
        _ => undefined::of_fault(&instruction, case),
    };
    if guest.end == End::Raised && guest.vector == 14 && crate::trampoline::contains(guest.address) {
        // A stray operand, which on the CPU met the harness.
        return found.0;
    }
    if !same_end(&undefined, native, guest) {
        found.0.push(format!("CPU: {}; posada: {}", end(native), end(guest)));
        if native.end == End::Died || guest.end == End::Died {
            return found.0;
        }
    } else if (native.end, native.vector) != (guest.end, guest.vector) {
        // Alike in the manual's eyes, yet with nothing to compare.
        return found.0;
    }
    registers(&mut found, &undefined, native, guest);
    vectors(&mut found, &undefined, native, guest);
    memory(&mut found, &undefined, native, guest);
    found.0
}

fn registers(found: &mut Differences, undefined: &Undefined, native: &Outcome, guest: &Outcome) {
    let (native, guest) = (&native.state, &guest.state);
    for (number, name) in NAMES.iter().enumerate() {
        if undefined.registers >> number & 1 == 0 {
            let compared = !(undefined.upper_halves >> number & 1).wrapping_mul(0xffff_ffff << 32);
            found.number(name, native.gpr[number] & compared, guest.gpr[number] & compared);
        }
    }
    found.number("rip", native.rip, guest.rip);
    let compared = !(undefined.flags | RESUME);
    found.number("rflags", native.rflags & compared, guest.rflags & compared);
    found.number("fs base", native.fs_base, guest.fs_base);
    found.number("gs base", native.gs_base, guest.gs_base);
    for (number, name) in SELECTORS.iter().enumerate() {
        let (native, guest) = (native.selectors[number], guest.selectors[number]);
        // The return from an interrupt in between makes any null selector 0 ("IRET").
        if native.min(guest) != 0 || native.max(guest) > 3 {
            found.number(name, native.into(), guest.into());
        }
    }
}

/// The x87 register with a physical number: ST(0) is the one that TOP names.
fn physical(area: &[u8], number: usize) -> String {
    let top = usize::from(area[area::FSW + 1] >> 3 & 7);
    hex(&area[area::ST + 16 * ((number + 8 - top) % 8)..][..10])
}

fn vectors(found: &mut Differences, undefined: &Undefined, native: &Outcome, guest: &Outcome) {
    let (native, guest) = (&native.state, &guest.state);
    let word = |state: &State, at: usize| u64::from(u16::from_le_bytes([state.area[at], state.area[at + 1]]));
    if !undefined.x87 {
        found.number("x87 control", word(native, area::FCW), word(guest, area::FCW));
        let pointer = |state: &State, at: usize| u64::from_le_bytes(state.area[at..at + 8].try_into().unwrap());
        found.number("x87 opcode", word(native, area::FOP), word(guest, area::FOP));
        for (name, at) in [("x87 instruction pointer", area::FIP), ("x87 data pointer", area::FDP)] {
            found.number(name, pointer(native, at), pointer(guest, at));
        }
        let status = if undefined.mmx_state { 0xc7ff } else { 0xffff };
        found.number(
            "x87 status",
            word(native, area::FSW) & status,
            word(guest, area::FSW) & status,
        );
        if !undefined.mmx_state {
            found.number(
                "x87 tags",
                word(native, area::FTW) & 0xff,
                word(guest, area::FTW) & 0xff,
            );
        }
        for number in 0..8 {
            let name = format!("x87 r{number}");
            found.check(
                &name,
                physical(&native.area, number),
                physical(&guest.area, number),
                String::clone,
            );
        }
    }
    let compared = if undefined.mxcsr { !0x3f } else { !0 };
    found.number(
        "mxcsr",
        (native.mxcsr() & compared).into(),
        (guest.mxcsr() & compared).into(),
    );
    let count = if area::avx512() { 32 } else { 16 };
    for number in (0..count).filter(|number| undefined.vectors >> number & 1 == 0) {
        found.check(
            &format!("vector {number}"),
            native.vector(number),
            guest.vector(number),
            |value| hex(value),
        );
    }
    if area::avx512() {
        for number in (0..8).filter(|number| undefined.opmasks >> number & 1 == 0) {
            found.number(&format!("k{number}"), native.opmask(number), guest.opmask(number));
        }
    }
}

fn memory(found: &mut Differences, undefined: &Undefined, native: &Outcome, guest: &Outcome) {
    // Each outcome holds the first lines only; a case patches fewer, and an instruction writes fewer.
    let room = native.lines.len();
    if native.lines_changed.max(guest.lines_changed) as usize > room {
        let (native, guest) = (native.lines_changed, guest.lines_changed);
        found.number("lines of memory changed", native.into(), guest.into());
    }
    let line = |outcome: &Outcome, address| {
        let changed = outcome.lines().iter().find(|line| line.address == address);
        changed.map_or_else(|| original(address), |line| line.bytes)
    };
    let lines = native.lines().iter().chain(guest.lines());
    let mut addresses: Vec<u32> = lines.map(|line| line.address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    for address in addresses {
        let (a, b) = (line(native, address), line(guest, address));
        let differs = |&at: &usize| {
            let linear = u64::from(address) + at as u64;
            a[at] != b[at] && !undefined.memory.iter().any(|range| range.contains(&linear))
        };
        let wrong: Vec<usize> = (0..64).filter(differs).collect();
        if let (Some(&first), Some(&last)) = (wrong.first(), wrong.last()) {
            found.0.push(format!(
                "memory DATA+{:#x}: CPU {}, posada {}",
                u64::from(address) - DATA + first as u64,
                hex(&a[first..=last]),
                hex(&b[first..=last])
            ));
        }
    }
}

/// One mismatch for a reader, with the way to see it again.
pub fn describe(case: &Case, native: &Outcome, name: &str, differences: &[String]) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(&decode(case), &mut text);
    let bytes: Vec<String> = case.code[..usize::from(case.length)]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let mut report = format!(
        "{name}: {text}  [{}]\n    on the CPU {}, from",
        bytes.join(" "),
        end(native)
    );
    let before = NAMES.iter().zip(case.state.gpr);
    report.extend(before.map(|(name, value)| format!(" {name}={value:x}")));
    report += &format!(
        " rflags={:x} fs={:x} gs={:x} mxcsr={:x}\n",
        case.state.rflags,
        case.state.fs_base,
        case.state.gs_base,
        case.state.mxcsr()
    );
    if let Some(opmask) = (decode(case).op_mask() != Register::None).then(|| decode(case).op_mask().number()) {
        report += &format!("    k{opmask}={:x}\n", case.state.opmask(opmask));
    }
    for difference in differences {
        report += &format!("    {difference}\n");
    }
    report + &format!("    replay: POSADA_FORM={name} POSADA_SEED={}", case.seed)
}

mod tests {
    use super::*;

    /// Every byte of an outcome that an instruction could change is seen.
    #[test]
    fn one_wrong_bit_anywhere_is_found() {
        let mut case = Case::EMPTY;
        (case.code[0], case.length) = (0x90, 1);
        let mut native = Outcome::EMPTY;
        native.end = End::Retired;
        native.lines_changed = 2;
        (native.lines[0].address, native.lines[1].address) = (DATA as u32 + 0x1000, DATA as u32 + 0x2000);
        let mut wrong: Vec<fn(&mut Outcome, usize)> = vec![
            |outcome, at| outcome.state.gpr[at % 16] ^= 1 << (at % 64),
            |outcome, at| outcome.state.area[area::XMM + at % 256] ^= 1,
            |outcome, at| outcome.state.area[area::YMM_HIGH + at % 256] ^= 0x80,
            |outcome, at| outcome.state.area[area::ST + at % 8 * 16 + at % 10] ^= 1,
            |outcome, at| outcome.state.area[[0, 1, 2, 3, 4, 6, 8, 15, 16, 23, 24, 25, 26, 27][at % 14]] ^= 1,
            |outcome, at| outcome.state.rflags ^= [1, 4, 16, 64, 128, 1 << 10, 1 << 11, 1 << 14, 1 << 21][at % 9],
            |outcome, at| outcome.state.selectors[at % 4] ^= 4,
            |outcome, at| {
                *[
                    &mut outcome.state.fs_base,
                    &mut outcome.state.gs_base,
                    &mut outcome.state.rip,
                ][at % 3] ^= 1
            },
            |outcome, at| outcome.lines[at % 2].bytes[at % 64] ^= 1,
            |outcome, at| {
                outcome.end = End::Raised;
                outcome.vector = at as u32 % 32;
            },
        ];
        if area::avx512() {
            wrong.push(|outcome, at| outcome.state.area[area::places()[0] + at % 64] ^= 1);
            wrong.push(|outcome, at| outcome.state.area[area::places()[1] + at % 128 * 4] ^= 1);
            wrong.push(|outcome, at| outcome.state.area[area::places()[2] + at * 4 + 3] ^= 1);
        }
        assert!(differences(&case, &native, &native).is_empty());
        for change in wrong {
            for at in 0..256 {
                let mut guest = native;
                change(&mut guest, at);
                assert!(!differences(&case, &native, &guest).is_empty());
            }
        }
    }

    #[test]
    fn undefined_flags_are_not_compared() {
        // AND leaves AF undefined.
        let mut case = Case::EMPTY;
        case.code[..2].copy_from_slice(&[0x21, 0xd8]);
        case.length = 2;
        let mut native = Outcome::EMPTY;
        native.end = End::Retired;
        let mut guest = native;
        guest.state.rflags ^= 1 << 4;
        assert!(differences(&case, &native, &guest).is_empty());
        // But where it faults it changes none.
        (native.end, guest.end) = (End::Raised, End::Raised);
        assert!(!differences(&case, &native, &guest).is_empty());
    }
}
