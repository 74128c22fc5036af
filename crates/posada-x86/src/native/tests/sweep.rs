//! Every opcode with many operands and random state, here and on the host's own processor without stubs.

use super::{core, step};
use crate::core::{Core, gpr};
use crate::native::decode;
use iced_x86::{
    Decoder, DecoderOptions, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register,
};
use std::arch::naked_asm;

/// Where the guest finds the memory operand; the host's has the same low bits.
const OPERAND: u64 = 0x440;
/// All that gathers and scatters reach.
const AROUND: std::ops::Range<usize> = 0x200..0x700;

/// Registers as the host loads them, with room for a stack below.
#[repr(C, align(4096))]
struct Host {
    stack: [u8; 0x8000],
    gprs: [u64; 16],
    fx: [u8; 512],
    ymm: [[u8; 32]; 16],
    flags: u64,
    mxcsr: u32,
    host_mxcsr: u32,
    host_rsp: u64,
    code: u64,
    /// AVX-512 is there.
    wide: u64,
    opmask: [u64; 8],
    _unused: [u64; 3],
    zmm: [[u8; 64]; 32],
    operand: [u8; 4096],
}

/// Loads all registers but RSP, calls the code, and stores them. RSP is at the state, so that signals find a stack.
#[unsafe(naked)]
unsafe extern "sysv64" fn run_on_host(_state: *mut u64) {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "mov [rdi + 1168], rsp",
        "mov rsp, rdi",
        "fxrstor64 [rsp + 128]",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vmovups ymm\\n, [rsp + 640 + \\n * 32]",
        ".endr",
        "cmp qword ptr [rsp + 1184], 0",
        "je 2f",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
        "kmovq k\\n, [rsp + 1192 + \\n * 8]",
        ".endr",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vmovups zmm\\n, [rsp + 1280 + \\n * 64]",
        ".endr",
        ".irp n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
        "vmovups zmm\\n, [rsp + 1280 + \\n * 64]",
        ".endr",
        "2:",
        "ldmxcsr [rsp + 1160]",
        "push qword ptr [rsp + 1152]",
        "popfq",
        "mov rax, [rsp]",
        "mov rcx, [rsp + 8]",
        "mov rdx, [rsp + 16]",
        "mov rbx, [rsp + 24]",
        "mov rbp, [rsp + 40]",
        "mov rsi, [rsp + 48]",
        "mov rdi, [rsp + 56]",
        ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
        "mov r\\n, [rsp + \\n * 8]",
        ".endr",
        "call qword ptr [rsp + 1176]",
        "mov [rsp], rax",
        "mov [rsp + 8], rcx",
        "mov [rsp + 16], rdx",
        "mov [rsp + 24], rbx",
        "mov [rsp + 40], rbp",
        "mov [rsp + 48], rsi",
        "mov [rsp + 56], rdi",
        ".irp n, 8, 9, 10, 11, 12, 13, 14, 15",
        "mov [rsp + \\n * 8], r\\n",
        ".endr",
        "pushfq",
        "pop qword ptr [rsp + 1152]",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vmovups [rsp + 640 + \\n * 32], ymm\\n",
        ".endr",
        "cmp qword ptr [rsp + 1184], 0",
        "je 2f",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7",
        "kmovq [rsp + 1192 + \\n * 8], k\\n",
        ".endr",
        ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
        "vmovups [rsp + 1280 + \\n * 64], zmm\\n",
        ".endr",
        ".irp n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31",
        "vmovups [rsp + 1280 + \\n * 64], zmm\\n",
        ".endr",
        "2:",
        "stmxcsr [rsp + 1160]",
        "fxsave64 [rsp + 128]",
        "fninit",
        "ldmxcsr [rsp + 1164]",
        "vzeroupper",
        "mov rsp, [rsp + 1168]",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
    )
}

/// Xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A value that means something to some instruction: small, a float, or anything.
    fn value(&mut self) -> u64 {
        const DOUBLES: [u64; 8] = [
            0,
            1 << 63,
            0x7ff0 << 48,
            0x7ff8 << 48,
            0x7ff0_0000_0000_0001,
            1,
            0x3ff0 << 48,
            0x43e0 << 48,
        ];
        const FLOATS: [u64; 8] = [
            0,
            0x8000_0000,
            0x7f80_0000,
            0x7fc0_0000,
            0x7f80_0001,
            1,
            0x3f80_0000,
            0x4f00_0000,
        ];
        let pick = self.next();
        match pick % 8 {
            0 => self.next() % 256,
            1 => DOUBLES[(pick >> 8) as usize % 8],
            2 => FLOATS[(pick >> 8) as usize % 8] << 32 | FLOATS[(pick >> 16) as usize % 8],
            3 => (self.next() as i16 as f64).to_bits(),
            4 => u64::from((self.next() as i16 as f32).to_bits()) << 32 | u64::from((pick as i16 as f32).to_bits()),
            _ => self.next(),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.value().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// True if the host can run `instruction` in this test: it leaves the stack alone, and RBX is only an address.
fn can_compare(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    let state = matches!(
        instruction.mnemonic(),
        M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Xsave
            | M::Xsave64
            | M::Xrstor
            | M::Xrstor64
            | M::Xsavec
            | M::Xsavec64
            | M::Xsaveopt
            | M::Xsaveopt64
            | M::Xsaves
            | M::Xsaves64
            | M::Xrstors
            | M::Xrstors64
            | M::Xgetbv
            | M::Xsetbv
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Wait
    );
    let operands = 0..instruction.op_count();
    let mut without = *instruction;
    if operands
        .clone()
        .any(|operand| instruction.op_kind(operand) == OpKind::Memory)
    {
        let plain = instruction.memory_base() == Register::RBX && instruction.memory_segment() == Register::DS;
        if !plain || instruction.memory_index().is_gpr() || instruction.memory_displacement64() != 0 {
            return false;
        }
        without.set_memory_base(Register::None);
        without.set_memory_displ_size(8);
    }
    let mut factory = InstructionInfoFactory::new();
    !state
        && factory.info(&without).used_registers().iter().all(|used| {
            let full = used.register().full_register();
            full != Register::RSP && (full != Register::RBX || without.memory_base() == instruction.memory_base())
        })
}

struct Sweep {
    random: Random,
    core: Box<Core>,
    host: Box<Host>,
    code: *mut u8,
    compared: std::collections::BTreeSet<String>,
}

impl Sweep {
    fn new(seed: u64) -> Self {
        // SAFETY: a fresh mapping touches nothing that exists.
        let code = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                protection,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(code, libc::MAP_FAILED);
        // SAFETY: all zeroes is a valid value.
        let mut host: Box<Host> = unsafe { Box::new_zeroed().assume_init() };
        let mut core = core();
        if std::arch::is_x86_feature_detected!("avx512vl") {
            host.wide = 1;
            core.vector.xcr0 = 0xe7;
            core.update_mode();
        }
        Self {
            random: Random(seed),
            core,
            host,
            code: code.cast(),
            compared: Default::default(),
        }
    }

    /// Runs `bytes` on both if they can be compared.
    fn check(&mut self, bytes: &[u8]) {
        let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
        if instruction.is_invalid() || !can_compare(&instruction) {
            return;
        }
        let Some(insn) = decode(&mut self.core, bytes) else {
            return;
        };
        let bytes = &bytes[..instruction.len()];
        self.randomize(&instruction);
        let pointer = &raw const self.host.operand as u64 + OPERAND;
        self.copy_to_host(pointer, bytes);
        let before = self.describe();
        // SAFETY: the instruction touches registers and the operand only, as `can_compare` says.
        unsafe { run_on_host(&raw mut self.host.gprs[0]) };
        step(&mut self.core, &insn).unwrap_or_else(|_| panic!("{instruction} raised {:?}", self.core.raised));
        self.compare(&instruction, bytes, pointer, &before);
        self.compared.insert(format!("{:?}", instruction.code()));
    }

    fn randomize(&mut self, instruction: &Instruction) {
        let Self { random, core, .. } = self;
        for register in &mut core.regs[..16] {
            *register = random.value();
        }
        for ymm in &mut core.vector.ymm {
            random.fill(ymm);
        }
        if self.host.wide != 0 {
            // Seldom in use by an instruction of 32 bytes at most.
            core.vector.zmm_high_used = instruction.encoding() == EncodingKind::EVEX || random.next() & 1 == 0;
            core.vector.zmm_high = [[0; 32]; 16];
            if core.vector.zmm_high_used {
                random.fill(core.vector.zmm_high.as_flattened_mut());
            }
            random.fill(core.vector.zmm.as_flattened_mut());
            for opmask in &mut core.vector.opmask {
                *opmask = match random.next() % 4 {
                    0 => u64::MAX,
                    1 => random.next() & random.next() & random.next(),
                    _ => random.next(),
                };
            }
        }
        core.set_rip(0x700);
        core.set_arithmetic(random.next());
        // Masked exceptions; flags, rounding, DAZ and FTZ at random.
        core.vector.mxcsr = random.next() as u32 & 0xe07f | 0x1f80;
        random.fill(&mut core.vector.fx[32..160]);
        for register in 0..8 {
            // Half of them ordinary numbers.
            if random.next() & 1 == 0 {
                let exponent = 0x3ffe + random.next() as u16 % 20;
                core.vector.fx[32 + register * 16 + 7] |= 0x80;
                core.vector.fx[40 + register * 16..][..2].copy_from_slice(&exponent.to_le_bytes());
            }
        }
        let (mut control, mut status) = (random.next() as u16 & 0x0f00 | 0x37f, random.next() as u16 & 0x7f7f);
        if random.next() & 3 == 0 {
            // Some exceptions unmasked, but none pending.
            control &= random.next() as u16 | 0xffc0;
            status &= 0x7f00;
        }
        core.vector.fx[..2].copy_from_slice(&control.to_le_bytes());
        core.vector.fx[2..4].copy_from_slice(&status.to_le_bytes());
        core.vector.fx[4] = random.next() as u8 | random.next() as u8;
        core.vector.fx[5..24].fill(0);
        core.vector.fx[6] = 0x11;
        crate::xsave::normalize(&mut core.vector.fx);
        if instruction.is_vsib() {
            let bytes = if instruction.is_vsib64() { 8 } else { 4 };
            let number = instruction.memory_index().number();
            let mut indices = core.vector_register(number);
            for index in indices.chunks_mut(bytes) {
                let near = random.next() as i8 >> 1;
                index.copy_from_slice(&i64::from(near).to_le_bytes()[..bytes]);
            }
            if number < 16 {
                core.vector.ymm[number].copy_from_slice(&indices[..32]);
            }
            if self.host.wide != 0 {
                core.set_vector_register(number, &indices);
            }
        }
        if (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory) {
            core.regs[gpr::RBX] = OPERAND;
        }
        let implicit = (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::MemorySegRDI);
        if implicit {
            core.regs[gpr::RDI] = OPERAND;
        }
        let mut memory = [0; 128];
        random.fill(&mut memory);
        core.store_bytes(OPERAND, &memory).unwrap();
        self.host.operand[OPERAND as usize..][..128].copy_from_slice(&memory);
    }

    fn copy_to_host(&mut self, pointer: u64, bytes: &[u8]) {
        let (host, core) = (&mut *self.host, &self.core);
        host.gprs.copy_from_slice(&core.regs[..16]);
        for register in [gpr::RBX, gpr::RDI] {
            if core.regs[register] == OPERAND {
                host.gprs[register] = pointer;
            }
        }
        host.fx = core.vector.fx;
        host.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        host.ymm = core.vector.ymm;
        host.zmm = std::array::from_fn(|number| core.vector_register(number));
        host.opmask = core.vector.opmask;
        host.flags = core.rflags();
        (host.mxcsr, host.host_mxcsr) = (core.vector.mxcsr, 0x1f80);
        host.code = self.code as u64;
        // SAFETY: the page is ours; the code ends with RET.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code, bytes.len());
            self.code.add(bytes.len()).write(0xc3);
        }
        std::arch::x86_64::__cpuid(0);
    }

    fn describe(&self) -> String {
        format!(
            "gprs {:x?}\nymm {:x?}\nopmask {:x?}\nfx {:x?}",
            &self.core.regs[..16],
            self.core.vector.ymm,
            self.core.vector.opmask,
            &self.core.vector.fx[..160]
        )
    }

    fn compare(&mut self, instruction: &Instruction, bytes: &[u8], pointer: u64, before: &str) {
        let (host, core) = (&mut *self.host, &mut self.core);
        let place = |value: u64, host: u64, guest: u64| if value == host { guest } else { value };
        host.gprs[gpr::RBX] = place(host.gprs[gpr::RBX], pointer, OPERAND);
        host.gprs[gpr::RDI] = place(host.gprs[gpr::RDI], pointer, OPERAND);
        host.gprs[gpr::RSP] = core.regs[gpr::RSP];
        for (at, there, guest) in [(8, self.code as u64, 0x700), (16, pointer, OPERAND)] {
            let value = u64::from_le_bytes(host.fx[at..at + 8].try_into().unwrap());
            host.fx[at..at + 8].copy_from_slice(&place(value, there, guest).to_le_bytes());
        }
        let mut memory = [0; AROUND.end - AROUND.start];
        core.load_bytes(AROUND.start as u64, &mut memory).unwrap();
        let what = format!("{instruction} {:?} {bytes:02x?}\n{before}", instruction.code());
        assert_eq!(core.regs[..16], host.gprs, "registers: {what}");
        assert_eq!(core.rflags() & 0x8d5, host.flags & 0x8d5, "flags: {what}");
        for (number, (ours, theirs)) in core.vector.ymm.iter().zip(&host.ymm).enumerate() {
            assert_eq!(ours, theirs, "YMM{number}: {what}");
        }
        assert_eq!(core.vector.mxcsr, host.mxcsr, "MXCSR: {what}");
        assert_eq!(core.vector.fx[..24], host.fx[..24], "x87 control: {what}");
        assert_eq!(core.vector.fx[32..160], host.fx[32..160], "x87 registers: {what}");
        if host.wide != 0 {
            for (number, theirs) in host.zmm.iter().enumerate() {
                assert_eq!(core.vector_register(number), *theirs, "ZMM{number}: {what}");
            }
            assert_eq!(core.vector.opmask, host.opmask, "opmasks: {what}");
            let high = core.vector.zmm_high_used || core.vector.zmm_high == [[0; 32]; 16];
            assert!(high, "upper halves in use: {what}");
        }
        assert_eq!(memory, host.operand[AROUND], "memory: {what}");
    }
}

#[test]
fn every_form_does_what_the_host_does() {
    if !std::arch::is_x86_feature_detected!("avx2") {
        return;
    }
    let mut sweep = Sweep::new(0x1234_5678_9abc_def1);
    let operands = |random: &mut Random| {
        let pick = random.next();
        // A register, or [RBX].
        let modrm = if pick & 3 != 0 {
            0xc0 | (pick >> 8) as u8
        } else {
            (pick >> 8) as u8 & 0x38 | 3
        };
        [modrm, (pick >> 16) as u8]
    };
    for round in 0..24 {
        for opcode in 0..=255u8 {
            for prefix in [&[][..], &[0x66], &[0xf3], &[0xf2], &[0x66, 0xf2], &[0x66, 0xf3]] {
                for map in [&[0x0f][..], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                    let rex = sweep.random.next() as u8 & 15 | 0x40;
                    let rex = if round % 3 == 0 { &[][..] } else { &[rex][..] };
                    let tail = operands(&mut sweep.random);
                    sweep.check(&[prefix, rex, map, &[opcode], &tail].concat());
                }
            }
            for map in 1..=3 {
                let pick = sweep.random.next();
                // VVVV is often unused, then it must be 1111.
                let vvvv = if pick & 7 == 0 { 0x78 } else { (pick >> 8) as u8 & 0x78 };
                for low in 0..8 {
                    let second = (pick >> 16) as u8 & 0xa0 | 0x40 | map;
                    let tail = operands(&mut sweep.random);
                    sweep.check(
                        &[
                            &[0xc4, second, vvvv | low | (pick >> 24) as u8 & 0x80, opcode][..],
                            &tail,
                        ]
                        .concat(),
                    );
                    let tail = operands(&mut sweep.random);
                    sweep.check(
                        &[
                            &[0xc4, second, 0x78 | low | (pick >> 25) as u8 & 0x80, opcode][..],
                            &tail,
                        ]
                        .concat(),
                    );
                }
            }
        }
        for opcode in 0x90..=0x93 {
            for kind in [1, 5, 0x81, 0x85] {
                // The index in one of the first registers, at [RBX + index * factor].
                let (mask, reg, sib) = (sweep.random.next(), sweep.random.next(), sweep.random.next());
                let (mask, reg, sib) = (mask as u8 & 0x78, reg as u8 & 0x38 | 4, sib as u8 & 0xf8 | 3);
                sweep.check(&[0xc4, 0xe2, mask | kind, opcode, reg, sib]);
            }
        }
        for opcode in 0xd8..=0xdf {
            for modrm in (0..0x40).step_by(8).map(|reg| reg | 3).chain(0xc0..=0xff) {
                sweep.check(&[opcode, modrm]);
                sweep.check(&[0x66, opcode, modrm]);
            }
        }
    }
    assert!(sweep.compared.len() > 1200, "{} forms", sweep.compared.len());
    for form in [
        "VEX_Vpgatherqd_xmm_vm64y_xmm",
        "VEX_Vpmaskmovd_m256_ymm_ymm",
        "Maskmovq_rDI_mm_mm",
    ] {
        assert!(sweep.compared.contains(form), "{form}");
    }
}

#[test]
fn every_form_of_avx512_does_what_the_host_does() {
    if !std::arch::is_x86_feature_detected!("avx512vl") {
        println!("skipped: the host's processor has no AVX-512");
        return;
    }
    let mut sweep = Sweep::new(0x1234_5678_9abc_def2);
    for round in 0..12 {
        for opcode in 0..=255u8 {
            for kind in 0..32u8 {
                let (map, prefix, wide) = (kind & 3, kind >> 2 & 3, kind >> 4 << 7);
                for length in 0..4u8 {
                    let pick = sweep.random.next();
                    let [extension, vvvv, mask, operand, last, ..] = pick.to_le_bytes();
                    // X is B's companion for registers; VVVV is often unused, then it must be 1111.
                    let vvvv = if pick >> 40 & 3 == 0 { 0x78 } else { vvvv & 0x78 };
                    let memory = pick >> 42 & 3 == 0;
                    let (modrm, extension) = if memory {
                        (operand & 0x38 | 3, extension & 0x90 | 0x60)
                    } else {
                        (operand | 0xc0, extension & 0xf0)
                    };
                    // Zeroing needs an opmask; broadcast and rounding are rarer.
                    let mask = match pick >> 44 & 7 {
                        0 | 1 => mask & 8,
                        2 | 3 => mask & 0x0f,
                        4 => mask & 0x8f,
                        5 => mask & 0x9f,
                        _ => mask & 0x1f,
                    };
                    let vector = if vvvv == 0x78 && round % 3 != 0 { 8 } else { mask & 8 };
                    let third = mask & 0x97 | vector | length << 5;
                    let second = wide | vvvv | 4 | prefix;
                    sweep.check(&[0x62, extension | map, second, third, opcode, modrm, last]);
                }
            }
        }
        // Gathers and scatters.
        for opcode in (0x90..=0x93).chain(0xa0..=0xa3) {
            for kind in 0..6u8 {
                for _ in 0..4 {
                    let pick = sweep.random.next();
                    let [extension, third, modrm, sib, ..] = pick.to_le_bytes();
                    let (length, wide) = (kind % 3 << 5, kind / 3 << 7);
                    sweep.check(&[
                        0x62,
                        extension & 0xd0 | 0x22,
                        wide | 0x7d,
                        third & 0x0f | length,
                        opcode,
                        modrm & 0x38 | 4,
                        sib & 0xf8 | 3,
                    ]);
                }
            }
        }
    }
    println!("{} forms", sweep.compared.len());
    for form in [
        "EVEX_Vpscatterdd_vm32z_k1_zmm",
        "EVEX_Vgatherqpd_zmm_k1_vm64z",
        "EVEX_Vpcompressb_zmmm512_k1z_zmm",
        "EVEX_Vaddps_zmm_k1z_zmm_zmmm512b32_er",
        "EVEX_Vcmpps_kr_k1_zmm_zmmm512b32_imm8_sae",
        "EVEX_Vpermt2b_zmm_k1z_zmm_zmmm512",
    ] {
        assert!(sweep.compared.contains(form), "{form}");
    }
    assert!(sweep.compared.len() > 900, "{} forms", sweep.compared.len());
}
