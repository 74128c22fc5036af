//! Lengths against iced-x86, over real code and random bytes.

use super::{Incomplete, MAX_LENGTH, decode};
use crate::core::{CodeSize, Core};
use crate::insn::Handler;
use crate::mmu::tests::core;
use crate::transfer;
use iced_x86::{Decoder, DecoderOptions, Instruction};

fn core_with(size: CodeSize) -> Box<Core> {
    let mut core = core();
    core.code_size = size;
    core
}

fn bits(size: CodeSize) -> u32 {
    match size {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    }
}

/// Code of this process: the test itself and the C library.
fn own_code() -> Vec<&'static [u8]> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines()
        .filter(|line| line.contains(" r-xp ") && line.contains('/'))
        .map(|line| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let start = usize::from_str_radix(start, 16).unwrap();
            let end = usize::from_str_radix(end, 16).unwrap();
            // SAFETY: a readable mapping of a file that stays mapped.
            unsafe { std::slice::from_raw_parts(start as *const u8, end - start) }
        })
        .collect()
}

fn is(handler: Handler, other: Handler) -> bool {
    std::ptr::fn_addr_eq(handler, other)
}

#[test]
fn lengths_of_real_code_agree_with_iced() {
    let mut core = core_with(CodeSize::Bits64);
    let (mut count, mut unknown) = (0, 0);
    for code in own_code() {
        let mut decoder = Decoder::new(64, code, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() && count < 400_000 {
            let at = decoder.position();
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                continue;
            }
            let decoded = decode(&mut core, &code[at..]).unwrap();
            if is(decoded.insn.exec, transfer::undefined) {
                unknown += 1;
                continue;
            }
            assert_eq!(
                usize::from(decoded.insn.length),
                instruction.len(),
                "{:02x?}",
                &code[at..at + instruction.len()]
            );
            count += 1;
        }
    }
    assert!(count > 100_000 && unknown < count / 10, "{unknown} of {count} unknown");
}

#[test]
fn lengths_of_random_bytes_agree_with_iced_in_all_code_sizes() {
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for size in [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64] {
        let mut core = core_with(size);
        for _ in 0..200_000 {
            let mut bytes = [0u8; 16];
            bytes[..8].copy_from_slice(&random().to_le_bytes());
            bytes[8..].copy_from_slice(&random().to_le_bytes());
            let prefixes = [0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x2e, 0x65, 0x48, 0x41, 0x0f, 0x0f, 0x0f];
            for byte in bytes.iter_mut().take((random() % 4) as usize) {
                *byte = prefixes[random() as usize % prefixes.len()];
            }
            let ours = decode(&mut core, &bytes).unwrap();
            if is(ours.insn.exec, transfer::undefined) {
                continue;
            }
            // Forms like MOV from CR6 are refused when they run.
            let options = DecoderOptions::NO_INVALID_CHECK;
            let instruction = Decoder::new(bits(size), &bytes[..MAX_LENGTH], options).decode();
            let too_long = is(ours.insn.exec, transfer::too_long);
            assert!(
                too_long || !instruction.is_invalid(),
                "{size:?} {bytes:02x?} is not an instruction"
            );
            if !too_long {
                assert_eq!(
                    usize::from(ours.insn.length),
                    instruction.len(),
                    "{size:?} {bytes:02x?}"
                );
            }
        }
    }
}

#[test]
fn bytes_that_end_early_are_incomplete() {
    let mut core = core_with(CodeSize::Bits64);
    // mov rax, [rsp+0x12345678]; movabs; lock cmpxchg [rdi], rsi
    for whole in [
        &[0x48, 0x8b, 0x84, 0x24, 0x78, 0x56, 0x34, 0x12][..],
        &[0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8],
        &[0xf0, 0x48, 0x0f, 0xb1, 0x37],
        &[0x66, 0x0f, 0x6f, 0x44, 0x24, 0x10],
        &[0xc5, 0xfc, 0x10, 0x00],
        &[0xd9, 0x44, 0x24, 0x08],
    ] {
        for length in 0..whole.len() {
            assert_eq!(
                decode(&mut core, &whole[..length]).err(),
                Some(Incomplete),
                "{whole:02x?}"
            );
        }
        assert_eq!(usize::from(decode(&mut core, whole).unwrap().insn.length), whole.len());
    }
}

#[test]
fn sixteen_bytes_are_too_many() {
    let mut core = core_with(CodeSize::Bits64);
    let mut bytes = [0x66; 16];
    bytes[14] = 0x90;
    assert!(!is(decode(&mut core, &bytes).unwrap().insn.exec, transfer::too_long));
    bytes[14] = 0x66;
    assert!(is(decode(&mut core, &bytes).unwrap().insn.exec, transfer::too_long));
}

#[test]
fn a_lock_prefix_is_only_for_read_modify_write_of_memory() {
    let mut core = core_with(CodeSize::Bits64);
    for (bytes, valid) in [
        (&[0xf0, 0x01, 0x07][..], true),
        (&[0xf0, 0x01, 0xc7], false),
        (&[0xf0, 0x39, 0x07], false),
        (&[0xf0, 0x8b, 0x07], false),
        (&[0xf0, 0x87, 0x07], true),
        (&[0xf0, 0x0f, 0xba, 0x2f, 0x01], true),
        (&[0xf0, 0x0f, 0xba, 0x27, 0x01], false),
        (&[0xf0, 0x66, 0x0f, 0x6f, 0x07], false),
        (&[0xf0, 0x90], false),
    ] {
        let mut whole = [0x90; MAX_LENGTH];
        whole[..bytes.len()].copy_from_slice(bytes);
        let undefined = is(decode(&mut core, &whole).unwrap().insn.exec, transfer::undefined);
        assert_eq!(!undefined, valid, "{bytes:02x?}");
    }
}
