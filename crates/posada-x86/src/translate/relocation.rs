//! Blocks for other addresses: the same guest code, mapped elsewhere by another process, needs the same host code but for the
//! places that hold a RIP or lead out. To copy a block and mend these costs a twentieth of a translation.

use super::emit::{Check, Link, Mark};
use super::frame;

/// What a place in a block's code holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// The distance to a stub.
    Stub,
    /// A linear address of the guest's code or beside it.
    Linear,
    /// Minus one.
    Negated,
    /// The offset of a jump cache's slot, for the linear address that came last.
    Slot,
    /// The address of a [`Helped`](super::help::Helped).
    Helped,
}

/// How it holds that.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Four bytes, which the processor extends by their sign.
    Signed,
    /// Four bytes, which the processor extends by zeros.
    Unsigned,
    /// Eight bytes.
    Whole,
}

/// A place in a block's code to be mended in a copy.
#[derive(Clone, Copy, Debug)]
pub struct Relocation {
    /// Offset in the code.
    pub at: u16,
    /// What is there.
    pub holds: Holds,
    /// How.
    pub form: Form,
}

/// All that a block and its copies have in common.
pub struct Shape {
    /// Bytes of the code.
    pub size: u32,
    /// Offset of the code behind the comparison of RIP.
    pub entry: u32,
    /// Where instructions begin.
    pub marks: Box<[Mark]>,
    /// Direct branches.
    pub links: Box<[Link]>,
    /// Checks for several accesses.
    pub checks: Box<[Check]>,
    /// What is to be mended.
    pub relocations: Box<[Relocation]>,
}

/// How far a copy is from its original.
#[derive(Clone, Copy, Debug)]
pub struct Distances {
    /// The host's code.
    pub code: u64,
    /// The guest's code.
    pub linear: u64,
    /// The block's instructions for handlers.
    pub helped: u64,
}

impl Shape {
    /// Mends a copy of the code, whose branches lead to their exits then. False if an address does not fit where it must be.
    pub fn mend(&self, code: &mut [u8], distances: Distances, jump_mask: u32) -> bool {
        // The linear address that came last, before and now.
        let mut last = (0, 0);
        for &Relocation { at, holds, form } in &self.relocations {
            let place = &mut code[usize::from(at)..];
            let before = form.read(place);
            let now = match holds {
                Holds::Stub => before.wrapping_sub(distances.code),
                Holds::Linear => before.wrapping_add(distances.linear),
                Holds::Negated => before.wrapping_sub(distances.linear),
                Holds::Helped => before.wrapping_add(distances.helped),
                Holds::Slot => {
                    let slot = |linear| frame::slot(linear, jump_mask) as u64 * 8;
                    before.wrapping_sub(slot(last.0)).wrapping_add(slot(last.1))
                }
            };
            if holds == Holds::Linear {
                last = (before, now);
            }
            if !form.write(place, now) {
                return false;
            }
        }
        let ways = self.links.iter().map(|link| (link.site, link.exit));
        // A check that fails tries again, as at first.
        let checks = self.checks.iter().map(|check| (check.site, check.site + 4));
        for (site, target) in ways.chain(checks) {
            let distance = i32::from(target) - (i32::from(site) + 4);
            code[usize::from(site)..][..4].copy_from_slice(&distance.to_le_bytes());
        }
        true
    }
}

impl Form {
    fn read(self, place: &[u8]) -> u64 {
        let dword = || i32::from_le_bytes(place[..4].try_into().expect("four bytes"));
        match self {
            Self::Signed => i64::from(dword()) as u64,
            Self::Unsigned => u64::from(dword() as u32),
            Self::Whole => u64::from_le_bytes(place[..8].try_into().expect("eight bytes")),
        }
    }

    fn write(self, place: &mut [u8], value: u64) -> bool {
        let fits = match self {
            Self::Signed => i32::try_from(value as i64).is_ok(),
            Self::Unsigned => u32::try_from(value).is_ok(),
            Self::Whole => true,
        };
        let size = if self == Self::Whole { 8 } else { 4 };
        place[..size].copy_from_slice(&value.to_le_bytes()[..size]);
        fits
    }
}

#[cfg(test)]
mod tests {
    use super::super::Translator;
    use super::super::tests::{RAM, checked_machine, finish, finish_checked, machine};
    use crate::core::{Core, gpr};

    /// Where the first page with code is mapped: once as any other address, below 2 GiB, and three times in the upper half.
    const BASES: [u64; 5] = [
        0,
        0x20_0000,
        0xffff_8000_0000_0000,
        0xffff_8080_0000_0000,
        0xffff_ffff_8000_0000,
    ];

    /// Makes the first pages appear at all of these addresses, with code.
    fn map(core: &mut Core) {
        // Two entries of the same table of tables, and one in the table of 2 MiB areas, which is that of 1 GiB areas too.
        for (table, entry, leads) in [
            (0x3000, 1, 0x4007_u64),
            (0x1000, 256, 0x2007),
            (0x1000, 257, 0x2007),
            (0x1000, 511, 0x2007),
            (0x2000, 510, 0x3007),
        ] {
            core.physical_write(table + entry * 8, &leads.to_le_bytes());
        }
        core.mmu.flush();
        // lea rsi, [base + 400h]; mov eax, [base + 400h]; call 100h; call 1200h; smsw ecx; lea edi, [base + 401h];
        // cmp eax, 11223346h; jmp 1203h; 2ah: movzx ebp, byte [base + 402h]; mov ecx, 3; loop; hlt
        let code = [
            0x48, 0x8d, 0x35, 0xf9, 3, 0, 0, 0x8b, 5, 0xf3, 3, 0, 0, 0xe8, 0xee, 0, 0, 0, 0xe8, 0xe9, 0x11, 0, 0, 0xf,
            1, 0xe1, 0x8d, 0x3d, 0xe1, 3, 0, 0, 0x3d, 0x46, 0x33, 0x22, 0x11, 0xe9, 0xd9, 0x11, 0, 0, 0xf, 0xb6, 0x2d,
            0xd1, 3, 0, 0, 0xb9, 3, 0, 0, 0, 0xe2, 0xfe, 0xf4,
        ];
        // add eax, [base + 404h]; cmp byte [base + 404h], 7; jne over; mov dword [base + 408h], 9; ret
        let near = [
            3, 5, 0xfe, 2, 0, 0, 0x80, 0x3d, 0xf7, 2, 0, 0, 7, 0x75, 0xa, 0xc7, 5, 0xef, 2, 0, 0, 9, 0, 0, 0, 0xc3,
        ];
        // inc eax; ret; setb dl; jmp 2ah
        let far = [0xff, 0xc0, 0xc3, 0xf, 0x92, 0xc2, 0xe9, 0x1f, 0xee, 0xff, 0xff];
        for (at, code) in [
            (0, &code[..]),
            (0x100, &near),
            (0x400, &[0x44, 0x33, 0x22, 0x11]),
            (0x1200, &far),
        ] {
            core.physical_write(RAM + at, code);
        }
    }

    fn start(core: &mut Core, base: u64) {
        core.halted = false;
        core.set_rip(base);
        (core.regs[gpr::RSP], core.regs[gpr::RDX], core.regs[gpr::RAX]) = (0x2f00, 0, 0);
    }

    #[test]
    fn a_copy_does_at_its_address_what_the_original_does() {
        let (mut one, mut other) = (machine(), machine());
        other.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
        for core in [&mut one, &mut other] {
            map(core);
        }
        for _ in 0..2 {
            for base in BASES {
                for core in [&mut one, &mut other] {
                    start(core, base);
                    finish(core);
                }
                assert_eq!(one.regs, other.regs, "at {base:x}");
                assert_eq!(other.rip(), base + 0x39);
                assert_eq!(other.regs[gpr::RSI], base + 0x400);
                let mut returns = [0; 16];
                other.physical_read(RAM + 0x2ef0, &mut returns);
                assert_eq!(returns[8..], (base + 0x17).to_le_bytes(), "at {base:x}");
            }
        }
        let counts = other.translator.as_ref().unwrap().counts();
        // The first, those whose addresses take more bytes or fewer, and all others copied.
        assert!(counts.copies >= 10 && counts.copies * 3 >= counts.blocks, "{counts:?}");
    }

    #[test]
    fn check_mode_finds_nothing_in_copies() {
        let mut core = checked_machine();
        map(&mut core);
        for base in BASES {
            start(&mut core, base);
            finish_checked(&mut core);
            assert_eq!(core.failure, None, "at {base:x}");
        }
        assert!(core.translator.as_ref().unwrap().counts().copies >= 10);
    }

    #[test]
    fn code_that_has_changed_is_not_copied() {
        let mut core = machine();
        core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
        map(&mut core);
        start(&mut core, BASES[2]);
        finish(&mut core);
        // smsw edx; hlt in the place of the loop.
        core.physical_write(RAM + 0x36, &[0x0f, 0x01, 0xe2, 0xf4]);
        start(&mut core, BASES[3]);
        finish(&mut core);
        assert_eq!(
            (core.regs[gpr::RCX], core.regs[gpr::RDX]),
            (3, core.cr[0] & 0xffff_ffff)
        );
        assert_eq!(core.rip(), BASES[3] + 0x3a);
    }
}
