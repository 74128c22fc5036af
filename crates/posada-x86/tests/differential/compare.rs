//! Compares the outcomes of one case, field by field.

use crate::layout::{DATA, original};
use crate::state::{Case, End, Outcome, SELECTORS, area};
use crate::undefined::{self, Undefined};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter};

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
    Decoder::with_ip(64, bytes, case.state.rip, DecoderOptions::NONE).decode()
}

/// How a case ended, in words.
pub fn end(outcome: &Outcome) -> String {
    match outcome.end {
        End::Retired => format!("goes on at {:#x}", outcome.state.rip),
        End::Died => "never ends".into(),
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

/// What differs between the CPU's outcome and the guest's; empty when nothing does.
pub fn differences(case: &Case, native: &Outcome, guest: &Outcome) -> Vec<String> {
    let mut found = Differences(Vec::new());
    let ended = |outcome: &Outcome| {
        // Linux sets P in a fault of its own half, to tell nothing of its layout (arch/x86/mm/fault.c).
        let hidden = outcome.vector == 14 && outcome.address >= USER_END;
        (
            outcome.end,
            outcome.vector,
            outcome.error | u32::from(hidden),
            outcome.address,
        )
    };
    if ended(native) != ended(guest) {
        found.0.push(format!("CPU: {}; posada: {}", end(native), end(guest)));
        if native.end == End::Died || guest.end == End::Died {
            return found.0;
        }
    }
    let undefined = match native.end {
        End::Retired => undefined::of(&decode(case), case),
        _ => undefined::of_fault(&decode(case), case),
    };
    registers(&mut found, &undefined, native, guest);
    vectors(&mut found, native, guest);
    memory(&mut found, &undefined, native, guest);
    found.0
}

fn registers(found: &mut Differences, undefined: &Undefined, native: &Outcome, guest: &Outcome) {
    let (native, guest) = (&native.state, &guest.state);
    for (number, name) in NAMES.iter().enumerate() {
        let free = undefined
            .register
            .is_some_and(|register| register.full_register().number() == number);
        if !free {
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
        found.number(name, native.selectors[number].into(), guest.selectors[number].into());
    }
}

fn vectors(found: &mut Differences, native: &Outcome, guest: &Outcome) {
    let (native, guest) = (&native.state, &guest.state);
    for (name, at, length) in [
        ("x87 control", area::FCW, 2),
        ("x87 status", area::FSW, 2),
        ("x87 tags", area::FTW, 1),
        ("mxcsr", area::MXCSR, 4),
    ] {
        let part = |from: &[u8]| hex(&from[at..at + length]);
        found.check(name, part(&native.area), part(&guest.area), String::clone);
    }
    for number in 0..8 {
        let part = |from: &[u8]| hex(&from[area::ST + 16 * number..][..10]);
        found.check(
            &format!("st{number}"),
            part(&native.area),
            part(&guest.area),
            String::clone,
        );
    }
    for number in 0..16 {
        found.check(
            &format!("ymm{number}"),
            native.ymm(number),
            guest.ymm(number),
            |value| hex(value),
        );
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
        let wrong: [fn(&mut Outcome, usize); 10] = [
            |outcome, at| outcome.state.gpr[at % 16] ^= 1 << (at % 64),
            |outcome, at| outcome.state.area[area::XMM + at % 256] ^= 1,
            |outcome, at| outcome.state.area[area::YMM_HIGH + at % 256] ^= 0x80,
            |outcome, at| outcome.state.area[area::ST + at % 8 * 16 + at % 10] ^= 1,
            |outcome, at| outcome.state.area[[0, 1, 2, 3, 4, 24, 25, 26, 27][at % 9]] ^= 2,
            |outcome, at| outcome.state.rflags ^= [1, 4, 16, 64, 128, 1 << 10, 1 << 11, 1 << 14, 1 << 21][at % 9],
            |outcome, at| outcome.state.selectors[at % 4] ^= 1,
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
