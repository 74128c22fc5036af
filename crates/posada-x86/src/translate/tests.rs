//! Random blocks, translated and interpreted: everything that they leave behind must be the same.

use super::check::Checker;
use super::{Ran, Translator};
use crate::core::{Core, flag, gpr, seg};
use crate::flags::tests::Operands;
use crate::interpret::tests::Told;
use crate::mmu::tests::core;
use crate::shared::mailbox::KICK;
use posada_engine::Kick;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use wide::{avx512, wide_instruction};

mod wide;

/// Linear pages: code at 0, two of data from 1000h on, a gap, one that is read-only.
const DATA: u64 = 0x1000;
const END: u64 = 0x3000;
/// Pages of RAM behind code and data.
pub(super) const RAM: u64 = 0x8000;
const HLT: u8 = 0xf4;

struct Random(Operands);

impl Random {
    fn below(&mut self, count: u64) -> u64 {
        (self.0.bits() >> 20) % count
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    fn chance(&mut self, of_hundred: u64) -> bool {
        self.below(100) < of_hundred
    }
}

pub(super) fn machine() -> Box<Core> {
    let mut core = core();
    let entries = [(2, 0xa007_u64), (4, 0xb005)];
    for (page, entry) in entries {
        core.physical_write(0x4000 + page * 8, &entry.to_le_bytes());
    }
    // OSFXSR, OSXMMEXCPT, OSXSAVE.
    core.cr[4] |= 0x4_0600;
    core.vector.xcr0 = if avx512() { 0xe7 } else { 7 };
    core.idtr.limit = 0;
    core.mmu.flush();
    core.update_mode();
    core
}

/// ModRM for a register or memory; memory by a register that held an address at first.
fn modrm(random: &mut Random, out: &mut Vec<u8>, rex: &mut u8, reg: u8, memory: bool) {
    *rex |= (reg & 8) >> 1;
    let reg = (reg & 7) << 3;
    if !memory {
        let rm = random.below(16) as u8;
        *rex |= rm >> 3;
        out.push(0xc0 | reg | rm & 7);
        return;
    }
    let base = random.pick(&[3_u8, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14]);
    *rex |= base >> 3;
    let displacement = random.below(256) as u8;
    if random.chance(25) || base & 7 == 4 {
        // RCX and R8 hold small numbers at first, R11 an address.
        let index = if random.chance(60) {
            random.pick(&[1_u8, 8, 8, 11])
        } else {
            4
        };
        *rex |= (index & 8) >> 2;
        out.push(0x44 | reg);
        out.push((random.below(4) as u8) << 6 | (index & 7) << 3 | base & 7);
    } else {
        out.push(0x40 | reg | base & 7);
    }
    out.push(displacement);
}

/// One instruction.
fn instruction(random: &mut Random) -> Vec<u8> {
    if avx512() && random.chance(12) {
        return wide_instruction(random);
    }
    let reg = random.below(16) as u8;
    let memory = random.chance(55);
    let wide = random.chance(50);
    let (mut prefix, mut opcode, mut immediate): (Vec<u8>, Vec<u8>, usize) = (vec![], vec![], 0);
    let mut digit = reg;
    let mut memory_only = false;
    match random.below(30) {
        0..8 => opcode.push((random.below(8) as u8) << 3 | random.pick(&[0, 1, 2, 3])),
        8..12 => opcode.push(random.pick(&[0x88, 0x89, 0x8a, 0x8b, 0x84, 0x85, 0x86, 0x87, 0x63])),
        12 => {
            (opcode, digit) = (vec![random.pick(&[0x80, 0x83])], random.below(8) as u8);
            immediate = 1;
        }
        13 => (opcode, digit) = (vec![random.pick(&[0xfe, 0xff])], random.below(2) as u8),
        14 => (opcode, digit) = (vec![random.pick(&[0xf6, 0xf7])], random.pick(&[2, 3, 4, 5, 6, 7])),
        15 => {
            (opcode, digit) = (vec![random.pick(&[0xc0, 0xc1])], random.pick(&[0, 1, 2, 3, 4, 5, 7]));
            immediate = 1;
        }
        16 => {
            (opcode, digit) = (
                vec![random.pick(&[0xd0, 0xd1, 0xd2, 0xd3])],
                random.pick(&[0, 1, 2, 3, 4, 5, 7]),
            )
        }
        17..19 => opcode.extend([0x0f, 0x40 | random.below(16) as u8]),
        19 => (opcode, digit) = (vec![0x0f, 0x90 | random.below(16) as u8], 0),
        20 => opcode.extend([
            0x0f,
            random.pick(&[0xb6, 0xb7, 0xbe, 0xbf, 0xaf, 0xbc, 0xbd, 0xb0, 0xb1, 0xc0, 0xc1]),
        ]),
        21 => opcode.extend([0x0f, random.pick(&[0xa3, 0xab, 0xb3, 0xbb])]),
        22 => {
            (opcode, digit) = (vec![0x0f, 0xba], random.pick(&[4, 5, 6, 7]));
            immediate = 1;
        }
        23 => {
            opcode.push(0x8d);
            memory_only = true;
        }
        24 => {
            prefix.push(0x66);
            opcode.extend([
                0x0f,
                random.pick(&[0x6e, 0x7e, 0x6f, 0x7f, 0xfe, 0xef, 0x2e, 0x58, 0x10, 0x11]),
            ]);
        }
        25 => {
            prefix.push(random.pick(&[0xf2, 0xf3]));
            opcode.extend([0x0f, random.pick(&[0x10, 0x11, 0x2a, 0x2c, 0x58, 0x59, 0x5a, 0x5e])]);
        }
        26 => opcode.extend([0x0f, random.pick(&[0x10, 0x11, 0x28, 0x29, 0x57, 0x58, 0x14])]),
        27 => {
            let number = random.below(16) as u8;
            let opcode = if random.chance(50) { 0x50 } else { 0x58 };
            return vec![0x40 | number >> 3, opcode | number & 7];
        }
        28 => {
            return random
                .pick::<&[u8]>(&[
                    &[0x9c],
                    &[0xf5],
                    &[0xf9],
                    &[0x9f],
                    &[0x9e],
                    &[0x6a, 0x85],
                    &[0xe8, 0, 0, 0, 0],
                    &[0xfa],
                    &[0x48, 0x99],
                    &[0x0f, 0x01, 0xf8],
                    &[0xc5, 0xf4, 0x58, 0xc2],
                    &[0x0f, 0xa2],
                    &[0x0f, 0x01, 0xcb],
                    &[0x0f, 0x01, 0xca],
                    &[0xf3, 0xaa],
                ])
                .to_vec();
        }
        _ => {
            // andn, pdep, shlx with a memory operand by RBX.
            let (second, w) = (random.below(16) as u8, random.below(2) as u8);
            let byte = w << 7 | (!second & 15) << 3;
            let (opcode, pp) = random.pick(&[(0xf2, 0), (0xf5, 3), (0xf7, 1)]);
            return vec![
                0xc4,
                0xe2 & !((reg & 8) << 4),
                byte | pp,
                opcode,
                0x43 | (reg & 7) << 3,
                random.below(64) as u8,
            ];
        }
    }
    let mut rex = if wide { 0x48 } else { 0x40 };
    if prefix.is_empty() && random.chance(12) {
        prefix.push(0x66);
    }
    let memory = memory || memory_only;
    if memory && random.chance(8) {
        prefix.push(0x65);
    }
    let mut tail = Vec::new();
    modrm(random, &mut tail, &mut rex, digit, memory);
    if rex != 0x40 || random.chance(70) {
        prefix.push(rex);
    }
    let digit_opcode = opcode[0];
    let mut code = prefix;
    code.extend(opcode);
    code.extend(tail);
    // Shifts by more than 1 leave OF to the processor, which tells immediates from CL.
    let one = matches!(digit_opcode, 0xc0 | 0xc1);
    code.extend((0..immediate).map(|_| if one { 1 } else { random.below(256) as u8 }));
    code
}

fn block(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..1 + random.below(20) {
        let next = instruction(random);
        if random.chance(15) {
            // A branch over it.
            code.extend([0x70 | random.below(16) as u8, next.len() as u8]);
        }
        code.extend(next);
    }
    code.push(HLT);
    code
}

/// Sets all that code can see; gives the address where it begins.
fn prepare(core: &mut Core, seed: u64, code: &[u8]) -> u64 {
    let mut random = Random(Operands::new());
    random.0.reseed(seed);
    let mut bytes = [0; 0x4000];
    bytes.iter_mut().for_each(|byte| *byte = random.0.bits() as u8);
    bytes[..0x1000].fill(HLT);
    let mut start = 0;
    if random.chance(25) {
        start = 0x1000 - random.below(code.len() as u64 + 1);
    }
    // Some of it may lie where the data begin.
    bytes[start as usize..][..code.len()].copy_from_slice(code);
    for (at, part) in bytes.chunks(64).enumerate() {
        core.physical_write(RAM + at as u64 * 64, part);
    }
    for number in 0..16 {
        core.regs[number] = random.0.number();
    }
    for number in [3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14] {
        let edge = random.pick(&[DATA, DATA + 0x1000, END, 0x4800]);
        core.regs[number] = match random.below(4) {
            0 => edge.wrapping_sub(random.below(256)),
            _ => DATA + 0x100 + random.below(0x1d00),
        };
    }
    core.regs[gpr::RSP] &= !7;
    (core.regs[gpr::RCX], core.regs[8]) = (random.below(16), random.below(16));
    core.segments[seg::GS].base = random.below(64);
    core.msr.kernel_gs_base = random.below(64);
    for register in &mut core.vector.ymm {
        register.iter_mut().for_each(|byte| *byte = random.0.bits() as u8);
    }
    if avx512() {
        let byte = |byte: &mut u8| *byte = random.0.bits() as u8;
        core.vector.zmm.as_flattened_mut().iter_mut().for_each(byte);
        core.vector.opmask = std::array::from_fn(|_| random.0.number());
        core.vector.zmm_high = [[0; 32]; 16];
        core.vector.zmm_high_used = random.chance(30);
        if core.vector.zmm_high_used {
            core.vector.zmm_high[random.below(16) as usize][random.below(32) as usize] = 1;
        }
    }
    core.vector.mxcsr = random.pick(&[0x1f80, 0x1f80, 0x1f80, 0x7fa0, 0x1f00]);
    core.set_rflags(u64::from(random.0.flags() >> 8) & flag::ARITHMETIC | 2);
    (core.halted, core.shut_down, core.interrupt_shadow) = (false, false, false);
    core.cr[2] = 0;
    core.mmu.flush();
    core.set_rip(start);
    core.update_mode();
    start
}

/// A machine whose translated code is compared with the interpreter, block by block.
pub(super) fn checked_machine() -> Box<Core> {
    let mut core = machine();
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once().checked()));
    core.checker = Some(Box::new(Checker::new(&core)));
    core.turns = Some(Arc::default());
    core
}

/// Runs a machine in check mode to its end.
pub(super) fn finish_checked(core: &mut Core) {
    for _ in 0..20_000 {
        core.activate_translator();
        if core.halted || core.shut_down {
            return;
        }
        core.step_translated();
    }
    panic!("no end: rip {:x}", core.rip());
}

pub(super) fn finish(core: &mut Core) {
    for _ in 0..20_000 {
        core.activate_translator();
        while !core.halted && !core.shut_down && core.run_translated() == Ran::Some {}
        if core.halted || core.shut_down {
            return;
        }
        core.interpret_one();
    }
    panic!("no end: rip {:x}", core.rip());
}

/// Runs blocks of these seeds on both; with `exact`, flags are compared after faults too.
fn compare(seeds: std::ops::Range<u64>, exact: bool) {
    let (mut one, mut other) = (machine(), machine());
    let translator = Translator::new(0).unwrap().at_once();
    other.translator = Some(Box::new(if exact { translator.exact() } else { translator }));
    let mut ends = [0; 2];
    for seed in seeds {
        let mut random = Random(Operands::new());
        random.0.reseed(seed ^ 0x5555_0000);
        let code = block(&mut random);
        // Flags that a call takes into another page are dead, as compilers have it.
        let call = code.windows(5).any(|bytes| bytes == [0xe8, 0, 0, 0, 0]);
        if prepare(&mut one, seed, &code) != 0 && call && !exact {
            continue;
        }
        prepare(&mut other, seed, &code);
        for core in [&mut one, &mut other] {
            finish(core);
        }
        let rip = other.rip() as i64;
        if !exact && rip << 16 >> 16 != rip {
            // A branch there faults at its target.
            continue;
        }
        ends[usize::from(one.shut_down)] += 1;
        let state = |core: &mut Core| {
            let flags = if exact || core.halted { core.rflags() } else { 0 };
            let mut memory = vec![0; 0x3000];
            for (at, part) in memory.chunks_mut(64).enumerate() {
                core.physical_read(RAM + 0x1000 + at as u64 * 64, part);
            }
            let bases = (core.segments[seg::GS].base, core.msr.kernel_gs_base);
            (
                core.regs,
                flags,
                core.halted,
                core.cr[2],
                core.vector.mxcsr,
                bases,
                (
                    core.vector.ymm,
                    core.vector.zmm_high,
                    core.vector.zmm,
                    core.vector.opmask,
                ),
                memory,
            )
        };
        let (a, b) = (state(&mut one), state(&mut other));
        let text: Vec<String> = code.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("seed {seed}: {}", text.join(" "));
        assert_eq!(a.0, b.0, "registers, {text}");
        assert_eq!((a.1, a.2, a.3, a.4, a.5), (b.1, b.2, b.3, b.4, b.5), "state, {text}");
        assert_eq!(a.6, b.6, "vectors, {text}");
        for core in [&one, &other] {
            let zero = core.vector.zmm_high == [[0; 32]; 16];
            assert!(zero || core.vector.zmm_high_used, "upper halves, {text}");
        }
        assert!(a.7 == b.7, "memory, {text}");
    }
    assert!(ends[0] > 100 && ends[1] > 100, "both ends are reached: {ends:?}");
}

#[test]
fn random_blocks_do_what_the_interpreter_does() {
    compare(0..6_000, false);
}

#[test]
fn exact_blocks_keep_the_flags_through_faults() {
    compare(100_000..106_000, true);
}

/// With exact flags: among so many blocks there are some that store other code behind themselves, which reads flags that
/// their own code would not have read.
#[test]
#[ignore = "long"]
fn many_random_blocks_do_what_the_interpreter_does() {
    compare(1 << 32..(1 << 32) + 600_000, true);
}

#[test]
fn flags_survive_a_jump_cache_slot_that_leads_elsewhere() {
    let mut core = machine();
    // 0: xor eax, eax; jmp 0ff8h. 0ff8h: mov ecx, 1; cmp ecx, 2. 1000h, in the slot of 0: jb +1; hlt; inc eax; hlt.
    core.physical_write(RAM, &[0x31, 0xc0, 0xe9, 0xf1, 0x0f, 0, 0]);
    core.physical_write(RAM + 0xff8, &[0xb9, 1, 0, 0, 0, 0x83, 0xf9, 2]);
    core.physical_write(RAM + 0x1000, &[0x72, 1, HLT, 0xff, 0xc0, HLT]);
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    core.set_rip(0);
    finish(&mut core);
    assert_eq!((core.regs[gpr::RAX], core.rip()), (1, 0x1006));
}

#[test]
fn a_stack_where_no_stack_was_found_is_none() {
    let (mut one, mut other) = (machine(), machine());
    other.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    for start in [1_u64 << 63, (1 << 63) + 0xfe0] {
        // mov eax, [rsp + 8]; push rbx; hlt
        for code in [[0x8b, 0x44, 0x24, 8, HLT], [0x90, 0x90, 0x90, 0x53, HLT]] {
            for core in [&mut one, &mut other] {
                core.physical_write(RAM, &code);
                (core.halted, core.shut_down) = (false, false);
                core.regs[gpr::RSP] = start + 8;
                core.set_rip(0);
                finish(core);
                assert!(core.shut_down);
            }
            assert_eq!((one.regs, one.rip()), (other.regs, other.rip()));
        }
    }
    assert!(other.translator.as_ref().unwrap().counts().leaves.trapped >= 4);
}

#[test]
fn a_stack_that_may_only_be_read_is_written_nowhere_else() {
    let mut core = machine();
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    // Linear pages 0 and 1 have neighbouring slots; page 1 may only be read, and supervisors respect that.
    core.physical_write(0x4008, &0x9005_u64.to_le_bytes());
    core.cr[0] |= 1 << 16;
    core.mmu.flush();
    // mov eax, [rsp]; mov rsp, rbx; push rcx; hlt
    core.physical_write(RAM, &[0x8b, 0x04, 0x24, 0x48, 0x89, 0xdc, 0x51, HLT]);
    core.physical_write(0x9400, &[0x77; 8]);
    core.set_rip(0);
    (core.regs[gpr::RSP], core.regs[gpr::RBX]) = (0x1400, 0x408);
    core.regs[gpr::RCX] = 0x1111;
    finish(&mut core);
    let mut words = [[0; 8]; 2];
    core.physical_read(0x9400, &mut words[0]);
    core.physical_read(RAM + 0x400, &mut words[1]);
    assert_eq!(words, [[0x77; 8], 0x1111_u64.to_le_bytes()]);
}

#[test]
fn flags_survive_a_jump_by_a_table() {
    // As GCC compiles `switch` with comparisons of one value in its cases. The table is at 2000h: js, jg.
    for (value, case, expected) in [(-5_i64, 0, 1), (5, 0, 0), (5, 1, 1), (-5, 1, 0)] {
        let mut core = machine();
        // 0: test edx, edx; jne 20h; hlt. 20h: jmp [rbx * 8 + 2000h]
        core.physical_write(RAM, &[0x85, 0xd2, 0x75, 0x1c, HLT]);
        core.physical_write(RAM + 0x20, &[0xff, 0x24, 0xdd, 0x00, 0x20, 0, 0]);
        // 40h: js 60h; hlt. 50h: jg 60h; hlt. 60h: inc eax; hlt
        core.physical_write(RAM + 0x40, &[0x78, 0x1e, HLT]);
        core.physical_write(RAM + 0x50, &[0x7f, 0x0e, HLT]);
        core.physical_write(RAM + 0x60, &[0xff, 0xc0, HLT]);
        core.physical_write(0xa000, &0x40_u64.to_le_bytes());
        core.physical_write(0xa008, &0x50_u64.to_le_bytes());
        core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
        for _ in 0..2 {
            (core.halted, core.regs[gpr::RAX], core.regs[gpr::RBX]) = (false, 0, case);
            core.regs[gpr::RDX] = value as u32 as u64;
            core.set_rip(0);
            finish(&mut core);
            assert_eq!(core.regs[gpr::RAX], expected, "{value} in case {case}");
        }
    }
}

#[test]
fn an_instruction_across_two_pages_follows_its_second_page() {
    let mut core = machine();
    // 0ffdh: mov eax, 11111111h, with two bytes of it in the next page; hlt.
    core.physical_write(RAM + 0xffd, &[0xb8, 0x11, 0x11]);
    core.physical_write(RAM + 0x1000, &[0x11, 0x11, HLT]);
    core.physical_write(0xa000, &[0x22, 0x22, HLT]);
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    let run = |core: &mut Core| {
        (core.halted, core.regs[0]) = (false, 0);
        core.set_rip(0xffd);
        finish(core);
        core.regs[0]
    };
    assert_eq!((run(&mut core), run(&mut core)), (0x1111_1111, 0x1111_1111));
    core.physical_write(RAM + 0x1001, &[0x33]);
    assert_eq!(run(&mut core), 0x3311_1111);
    // The second page becomes another one.
    core.physical_write(0x4008, &0xa007_u64.to_le_bytes());
    core.mmu.flush_page(0x1000);
    assert_eq!(run(&mut core), 0x2222_1111);
}

#[test]
fn code_after_a_system_call_has_the_rights_of_its_own_mode() {
    let mut core = machine();
    // 5000h is the supervisor's.
    core.physical_write(0x4028, &0xc003_u64.to_le_bytes());
    // 0: syscall; test ebx, ebx; jz 40h; jmp 0. 40h: mov rax, [5000h].
    core.physical_write(RAM, &[0x0f, 0x05, 0x85, 0xdb, 0x74, 0x3a, 0xeb, 0xf8]);
    core.physical_write(RAM + 0x40, &[0x48, 0x8b, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00, HLT]);
    // 100h, the kernel's: dec ebx; jz 1000h; sysretq. 1000h: mov rax, [5000h]; sysretq.
    core.physical_write(
        RAM + 0x100,
        &[0xff, 0xcb, 0x0f, 0x84, 0xf8, 0x0e, 0, 0, 0x48, 0x0f, 0x07],
    );
    let load = [0x48, 0x8b, 0x04, 0x25, 0x00, 0x50, 0x00, 0x00];
    core.physical_write(RAM + 0x1000, &load);
    core.physical_write(RAM + 0x1008, &[0x48, 0x0f, 0x07]);
    core.mmu.flush();
    core.msr.efer |= 1;
    (core.msr.lstar, core.msr.star) = (0x100, 0x0018_0008 << 32);
    core.segments[seg::SS].access = 0xf3;
    core.update_mode();
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    core.set_rip(0);
    core.regs[gpr::RBX] = 3;
    finish(&mut core);
    assert_eq!((core.shut_down, core.cr[2]), (true, 0x5000));
}

#[test]
fn a_store_over_the_next_instruction_is_seen() {
    let mut core = machine();
    // mov byte [rip + 1], f4h (hlt); nop; nop; inc eax; hlt: the first NOP becomes HLT.
    core.physical_write(RAM, &[0xc6, 0x05, 0, 0, 0, 0, HLT, 0x90, 0x90, 0xff, 0xc0, HLT]);
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    core.set_rip(0);
    core.regs[gpr::RAX] = 0;
    finish(&mut core);
    assert_eq!((core.regs[gpr::RAX], core.rip()), (0, 8));
}

#[test]
fn a_full_cache_makes_room_and_what_was_linked_goes_on() {
    let mut core = machine();
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    // 0: call 1000h; dec ecx; jnz 0; hlt. It stays, is linked to what changes, and is evicted once.
    core.physical_write(RAM, &[0xe8, 0xfb, 0x0f, 0, 0, 0xff, 0xc9, 0x75, 0xf7, HLT]);
    // 1000h: 400 times add eax, [rbx + ...]; ret: new each time, as its first immediate changes.
    let mut code = vec![0x05, 0, 0, 0, 0];
    for number in 0..400_u32 {
        code.extend([0x03, 0x83]);
        code.extend((number % 64 * 4).to_le_bytes());
    }
    code.push(0xc3);
    let mut expected = 0_u32;
    for round in 1..400_u32 {
        code[1..5].copy_from_slice(&round.to_le_bytes());
        for (at, part) in code.chunks(64).enumerate() {
            core.physical_write(RAM + 0x1000 + at as u64 * 64, part);
        }
        (core.halted, core.regs[gpr::RCX], core.regs[gpr::RAX]) = (false, 3, u64::from(expected));
        (core.regs[gpr::RBX], core.regs[gpr::RSP]) = (0x2100, 0x2f00);
        core.set_rip(0);
        finish(&mut core);
        let mut table = [0; 256];
        core.physical_read(RAM + 0x2100, &mut table);
        let word = |at: usize| u32::from_le_bytes(table[at * 4..][..4].try_into().unwrap());
        let sum = (0..400).fold(round, |sum, number| sum.wrapping_add(word(number % 64)));
        expected = expected.wrapping_add(sum.wrapping_mul(3));
        assert_eq!(core.regs[gpr::RAX], u64::from(expected), "round {round}");
    }
    let counts = core.translator.as_ref().unwrap().counts();
    assert!(
        counts.evictions > 16 && counts.outdated > 300 && counts.links > 300,
        "{counts:?}"
    );
}

#[test]
fn a_loop_sees_that_a_device_wrote_over_it_though_nothing_else_happens() {
    let mut core = machine();
    let (sender, receiver) = channel();
    core.machine = Arc::new(Told(Mutex::new(sender)));
    // 0: mov ecx, 1000; 5: nop; loop 5; out 80h, al. 0ah: jmp 40h. 40h: jmp 0ah
    core.physical_write(RAM, &[0xb9, 0xe8, 3, 0, 0, 0x90, 0xe2, 0xfd, 0xe6, 0x80, 0xeb, 0x34]);
    core.physical_write(RAM + 0x40, &[0xeb, 0xc8]);
    core.shared.vm().watch_code(&core.ram);
    core.translator = Some(Box::new(Translator::new(0).unwrap().at_once()));
    core.set_rip(0);
    let (ram, mailbox) = (Arc::clone(&core.ram), Arc::clone(core.shared.mailbox()));
    let (ended, end) = channel::<()>();
    let device = thread::spawn(move || {
        receiver.recv().unwrap();
        // Long enough for the loop to be translated and linked.
        thread::sleep(Duration::from_millis(50));
        ram.memory().write_slice(&[HLT], GuestAddress(RAM + 0x40)).unwrap();
        if end.recv_timeout(Duration::from_secs(20)).is_err() {
            mailbox.kick();
        }
    });
    while !core.halted && core.shared.mailbox().take() & KICK == 0 {
        core.execute();
    }
    let _ = ended.send(());
    device.join().unwrap();
    assert_eq!((core.halted, core.rip()), (true, 0x41));
}

#[test]
fn check_mode_finds_nothing_in_random_blocks() {
    let mut core = checked_machine();
    let mut ends = [0; 2];
    for seed in 300_000..303_000 {
        let mut random = Random(Operands::new());
        random.0.reseed(seed ^ 0x5555_0000);
        let code = block(&mut random);
        prepare(&mut core, seed, &code);
        finish_checked(&mut core);
        ends[usize::from(core.shut_down)] += 1;
        assert_eq!(core.failure, None, "seed {seed}");
    }
    assert!(ends[0] > 100 && ends[1] > 100, "both ends are reached: {ends:?}");
    let (judged, not_judged) = core.checker.as_ref().unwrap().counts();
    assert!(judged > 3_000 && not_judged == 0, "{judged} {not_judged}");
}

/// Runs code in check mode whose translation has had these bytes exchanged; gives what is reported.
fn corrupted(code: &[u8], from: &[u8], to: &[u8]) -> Option<String> {
    let mut core = checked_machine();
    core.physical_write(RAM, code);
    (core.regs[gpr::RBX], core.regs[gpr::RAX]) = (0x1100, 0);
    core.set_rip(0);
    let run = |core: &mut Core| {
        (core.halted, core.shut_down) = (false, false);
        core.set_rip(0);
        finish_checked(core);
    };
    run(&mut core);
    assert_eq!(core.failure, None);
    core.translator.as_mut().unwrap().corrupt(from, to);
    run(&mut core);
    core.failure.take()
}

#[test]
fn check_mode_has_the_mappings_that_the_soft_tlb_still_has() {
    let mut core = checked_machine();
    // mov eax, [rbx]; hlt
    core.physical_write(RAM, &[0x8b, 0x03, HLT]);
    core.physical_write(0xa100, &[1]);
    core.physical_write(0xc100, &[2]);
    for flush in [false, false, true] {
        core.halted = false;
        core.set_rip(0);
        core.regs[gpr::RBX] = 0x2100;
        if flush {
            core.mmu.flush();
        }
        finish_checked(&mut core);
        assert_eq!(core.failure, None);
        assert_eq!(core.regs[gpr::RAX] & 0xff, if flush { 2 } else { 1 });
        // Nobody says so to the processor.
        core.physical_write(0x4010, &0xc007_u64.to_le_bytes());
    }
}

#[test]
fn check_mode_reports_a_wrong_translation() {
    // mov eax, 11h; mov [rbx], eax; cmp eax, 11h; sete cl; hlt
    let code = [0xb8, 0x11, 0, 0, 0, 0x89, 0x03, 0x83, 0xf8, 0x11, 0x0f, 0x94, 0xc1, HLT];
    let same = [0xb8, 0x11, 0, 0, 0];
    assert_eq!(corrupted(&code, &same, &same), None);
    // Another register, and by it memory.
    let report = corrupted(&code, &same, &[0xb8, 0x12, 0, 0, 0]).expect("a difference");
    for part in [
        "block at 0x0",
        "rax            0000000000000011  0000000000000012",
        "byte at 0x9100: 11  12",
        "mov eax,11h",
        "mov eax,12h",
    ] {
        assert!(report.contains(part), "no {part:?} in {report}");
    }
    // A flag that is read in the block, and one that is wanted behind it.
    let report = corrupted(&code, &[0x83, 0xf8, 0x11], &[0x83, 0xf8, 0x10]).expect("a difference");
    assert!(report.contains("rcx"), "{report}");
    // A branch that goes elsewhere: test eax, eax; jz +1; hlt; hlt.
    let code = [0x85, 0xc0, 0x74, 1, HLT, HLT];
    let report = corrupted(&code, &[0x0f, 0x84], &[0x0f, 0x85]).expect("a difference");
    assert!(report.contains("never came there"), "{report}");
}
