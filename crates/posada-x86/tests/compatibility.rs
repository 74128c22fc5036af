//! 32-bit code against the host's own CPU: every integer form of 32-bit user mode that neither leaves for another segment nor
//! needs privilege runs in the software CPU and, by way of a compatibility-mode code segment, in a forked child. Memory, GPRs,
//! defined flags, whether a branch was taken, and which exception came must agree. The forms are iced-x86's table.

use iced_x86::{
    Code, CodeSize, CpuidFeature, Encoder, EncodingKind, FlowControl, Instruction, Mnemonic, OpCodeOperandKind as K,
    OpKind, Register, RflagsBits,
};
use posada_engine::{CpuState, Machine, Segment};
use posada_memory::GuestRam;
use posada_x86::core::Core;
use posada_x86::fault::vector;
use std::sync::Arc;

/// The window, at the same addresses on both sides.
const WINDOW: u32 = 0x2_0000;
const SIZE: usize = 0x1_0000;
/// 64-bit code that goes to [`CODE`] and comes back by [`LANDING`].
const ENTRY: u32 = WINDOW;
const LANDING: u32 = WINDOW + 0x400;
const CODE: u32 = WINDOW + 0x800;
/// Registers in the encoding's order, flags, the taken byte, the way to CODE, the host's RSP.
const STATE: u32 = WINDOW + 0x1000;
const FLAGS: u32 = STATE + 0x20;
const TAKEN: u32 = STATE + 0x28;
const FAR: u32 = STATE + 0x30;
const SAVED: u32 = STATE + 0x38;
/// What instructions read and write.
const DATA: u32 = WINDOW + 0x4000;
const DATA_SIZE: u32 = 0x8000;
/// Selectors of 64-bit Linux: 32-bit code, data, 64-bit code of user mode.
const CODE32: u16 = 0x23;
const FLAT: u16 = 0x2b;
const CODE64: u16 = 0x33;
/// CF PF AF ZF SF OF and DF.
const FREE_FLAGS: u32 = 0xcd5;

const ROUNDS: u64 = 12;

/// Forms that cannot be compared this way.
fn excluded(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    let info = code.op_code();
    let near16 = info.op_kinds().contains(&K::br16_1) || info.op_kinds().contains(&K::br16_2);
    Some(match info.mnemonic() {
        M::Pop if info.op_kinds()[0] == K::cs => "of the 8086",
        _ if near16 => "truncates EIP, to where nothing can be mapped",
        M::Ret if code == Code::Retnw || code == Code::Retnw_imm16 => "truncates EIP",
        M::Call | M::Jmp if info.op_kinds()[0] == K::r16_or_mem => "truncates EIP",
        M::Call | M::Jmp
            if info
                .op_kinds()
                .iter()
                .any(|kind| matches!(kind, K::farbr2_2 | K::farbr4_2)) =>
        {
            "far"
        }
        M::Call | M::Jmp if info.op_kinds()[0] == K::mem => "far",
        M::Retf | M::Iret | M::Iretd => "far",
        M::Int | M::Int1 | M::Int3 | M::Into => "the kernel's gates are not the guest's",
        M::Les | M::Lds | M::Lfs | M::Lgs | M::Lss | M::Lar | M::Lsl | M::Verr | M::Verw => {
            "the host's descriptor tables"
        }
        M::Mov | M::Pop if info.op_kinds().contains(&K::seg_reg) => "the host's descriptor tables",
        M::Pop
            if info
                .op_kinds()
                .iter()
                .any(|kind| matches!(kind, K::es | K::ss | K::ds | K::fs | K::gs)) =>
        {
            "the host's descriptor tables"
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => "system state (emulated by Linux under UMIP)",
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Rdpmc => "not the same twice",
        M::Syscall | M::Sysenter | M::Sysexit | M::Sysret => "calls the kernel",
        M::Umov | M::Xbts | M::Ibts | M::Jmpe | M::Loadall | M::Storeall => "of other processors",
        M::Wbinvd | M::Invd | M::Hlt | M::Clts | M::Lmsw | M::Ltr | M::Lldt | M::Lgdt | M::Lidt => "privileged",
        _ if info.is_privileged() => "privileged",
        _ => return None,
    })
}

fn features(code: Code) -> bool {
    use CpuidFeature as F;
    code.cpuid_features().iter().all(|feature| {
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::CMOV
                | F::CX8
                | F::MOVBE
                | F::POPCNT
                | F::MULTIBYTENOP
                | F::PAUSE
        )
    })
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u32) -> u32 {
        ((self.next() >> 32) * u64::from(end) >> 32) as u32
    }

    /// Small, extreme and any numbers.
    fn number(&mut self) -> u32 {
        let bits = (self.next() >> 20) as u32;
        match bits & 7 {
            0 => bits >> 28,
            1 => 0u32.wrapping_sub(bits >> 28),
            2 => 1 << (bits >> 27),
            3 => (1u32 << (bits >> 27)).wrapping_sub(1),
            _ => (self.next() >> 13) as u32,
        }
    }

    /// An address with room around it.
    fn address(&mut self) -> u32 {
        DATA + 0x2000 + self.below(0x4000)
    }
}

struct Case {
    bytes: Vec<u8>,
    instruction: Instruction,
    registers: [u32; 8],
    flags: u32,
    data: Vec<u8>,
}

/// What a case came to.
#[derive(Debug, PartialEq)]
enum Outcome {
    Done {
        registers: [u32; 8],
        flags: u32,
        taken: bool,
        data: Vec<u8>,
    },
    /// The signal that Linux makes of the exception.
    Signal(i32),
}

fn register(size: usize, number: u32) -> Register {
    let first = match size {
        1 => Register::AL,
        2 => Register::AX,
        _ => Register::EAX,
    };
    Register::try_from(first as usize + number as usize % 8).expect("eight of each size")
}

/// Where a taken branch leads: behind the jump back that follows the instruction.
fn taken_target(length: u32) -> u32 {
    CODE + length + 7
}

fn build(random: &mut Random, code: Code) -> Option<Case> {
    let info = code.op_code();
    let mut made = Instruction::new();
    made.set_code(code);
    made.set_code_size(CodeSize::Code32);
    let mut registers: [u32; 8] = std::array::from_fn(|_| random.number());
    registers[4] = random.address() & !3;
    registers[5] = random.address() & !3;
    let memory = random.below(2) == 0;
    let narrow_count = info.mnemonic() == Mnemonic::Enter;
    for (operand, &kind) in (0u32..).zip(info.op_kinds()) {
        let mut reg = |register| {
            made.set_op_kind(operand, OpKind::Register);
            made.set_op_register(operand, register);
        };
        let number = random.below(8);
        match kind {
            K::r8_or_mem if !memory => reg(register(1, number)),
            K::r16_or_mem if !memory => reg(register(2, number)),
            K::r32_or_mem if !memory => reg(register(4, number)),
            K::mem | K::mem_offs | K::r8_or_mem | K::r16_or_mem | K::r32_or_mem => {
                made.set_op_kind(operand, OpKind::Memory);
                let target = random.address();
                made.set_memory_displ_size(4);
                if kind == K::mem_offs || random.below(3) == 0 {
                    made.set_memory_displacement32(target);
                } else {
                    let base = random.below(8);
                    made.set_memory_base(register(4, base));
                    made.set_memory_displacement32(target.wrapping_sub(registers[base as usize]));
                }
            }
            K::r8_reg | K::r8_opcode => reg(register(1, number)),
            K::r16_reg | K::r16_reg_mem | K::r16_opcode | K::r16_rm => reg(register(2, number)),
            K::r32_reg | K::r32_reg_mem | K::r32_opcode | K::r32_rm => reg(register(4, number)),
            K::al => reg(Register::AL),
            K::cl => reg(Register::CL),
            K::ax => reg(Register::AX),
            K::dx => reg(Register::DX),
            K::eax => reg(Register::EAX),
            K::es => reg(Register::ES),
            K::cs => reg(Register::CS),
            K::ss => reg(Register::SS),
            K::ds => reg(Register::DS),
            K::fs => reg(Register::FS),
            K::gs => reg(Register::GS),
            K::imm8 if operand == 1 && narrow_count => {
                made.set_op_kind(operand, OpKind::Immediate8_2nd);
                made.set_immediate8_2nd(random.number() as u8);
            }
            K::imm8 => {
                made.set_op_kind(operand, OpKind::Immediate8);
                made.set_immediate8(random.number() as u8);
            }
            K::imm8_const_1 => {
                made.set_op_kind(operand, OpKind::Immediate8);
                made.set_immediate8(1);
            }
            K::imm8sex16 => {
                made.set_op_kind(operand, OpKind::Immediate8to16);
                made.set_immediate8to16((random.number() as i8).into());
            }
            K::imm8sex32 => {
                made.set_op_kind(operand, OpKind::Immediate8to32);
                made.set_immediate8to32((random.number() as i8).into());
            }
            K::imm16 => {
                made.set_op_kind(operand, OpKind::Immediate16);
                let mask = if info.is_stack_instruction() { 0xff } else { 0xffff };
                made.set_immediate16(random.number() as u16 & mask);
            }
            K::imm32 => {
                made.set_op_kind(operand, OpKind::Immediate32);
                made.set_immediate32(random.number());
            }
            K::br32_1 | K::br32_4 => {
                made.set_op_kind(operand, OpKind::NearBranch32);
                made.set_near_branch32(CODE);
            }
            K::seg_rSI => made.set_op_kind(operand, OpKind::MemorySegESI),
            K::es_rDI => made.set_op_kind(operand, OpKind::MemoryESEDI),
            K::seg_rDI => made.set_op_kind(operand, OpKind::MemorySegEDI),
            K::seg_rBX_al => {
                made.set_op_kind(operand, OpKind::Memory);
                made.set_memory_base(Register::EBX);
                made.set_memory_index(Register::AL);
                registers[3] = random.address();
            }
            _ => return None,
        }
    }
    if made.is_string_instruction() {
        (registers[6], registers[7]) = (random.address(), random.address());
        registers[1] = random.below(24);
        if info.can_use_rep_prefix() && random.below(2) == 0 {
            made.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix() && random.below(2) == 0 {
            made.set_has_repne_prefix(true);
        }
    }
    if info.can_use_lock_prefix() && made.op0_kind() == OpKind::Memory && random.below(4) == 0 {
        made.set_has_lock_prefix(true);
    }
    // A bit's number in a register reaches 256 MiB far.
    let bit_test = matches!(
        info.mnemonic(),
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    );
    if bit_test && made.op0_kind() == OpKind::Memory && made.op1_kind() == OpKind::Register {
        let number = made.op1_register().full_register32() as usize - Register::EAX as usize;
        if made.memory_base() != Register::None {
            made.set_memory_base(Register::None);
            made.set_memory_displacement32(random.address());
        }
        registers[number] &= 0xff;
    }
    let flow = made.flow_control();
    // Encoded twice: a branch's target depends on the length.
    let mut encoder = Encoder::new(32);
    let mut length = encoder.encode(&made, CODE.into()).ok()?;
    drop(encoder.take_buffer());
    let target = taken_target(length as u32);
    if made.op0_kind() == OpKind::NearBranch32 {
        made.set_near_branch32(target);
        length = encoder.encode(&made, CODE.into()).ok()?;
    } else {
        encoder.encode(&made, CODE.into()).ok()?;
    }
    let bytes = encoder.take_buffer();
    assert_eq!(bytes.len(), length);
    let mut data: Vec<u8> = (0..DATA_SIZE).map(|_| random.number() as u8).collect();
    let mut put = |address: u32, value: u32| {
        let at = (address - DATA) as usize;
        data[at..at + 4].copy_from_slice(&value.to_le_bytes());
    };
    match (flow, made.op0_kind()) {
        (FlowControl::IndirectBranch | FlowControl::IndirectCall, OpKind::Register) => {
            registers[made.op0_register() as usize - Register::EAX as usize] = target;
        }
        (FlowControl::IndirectBranch | FlowControl::IndirectCall, _) => {
            let base = made.memory_base();
            let base = match base {
                Register::None => 0,
                base => registers[base as usize - Register::EAX as usize],
            };
            put(base.wrapping_add(made.memory_displacement32()), target);
        }
        (FlowControl::Return, _) => put(registers[4], target),
        _ => {}
    }
    if info.mnemonic() == Mnemonic::Popf || info.mnemonic() == Mnemonic::Popfd {
        put(registers[4], random.number() & FREE_FLAGS | 0x202);
    }
    Some(Case {
        bytes,
        instruction: made,
        registers,
        flags: random.number() & FREE_FLAGS | 0x202,
        data,
    })
}

/// The code at [`CODE`] for an instruction: back at once, or with the taken byte set.
fn code_of(case: &Case) -> Vec<u8> {
    let back = |code: &mut Vec<u8>| {
        // jmp CODE64:LANDING
        code.push(0xea);
        code.extend(LANDING.to_le_bytes());
        code.extend(CODE64.to_le_bytes());
    };
    let mut code = case.bytes.clone();
    back(&mut code);
    // mov byte ptr [TAKEN], 1
    code.extend([0xc6, 0x05]);
    code.extend(TAKEN.to_le_bytes());
    code.push(1);
    back(&mut code);
    code
}

/// The host's side of the window.
struct Native(*mut u8);

impl Native {
    fn new() -> Self {
        // SAFETY: a new mapping at a place where nothing is.
        let window = unsafe {
            libc::mmap(
                WINDOW as *mut libc::c_void,
                SIZE,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(
            window,
            WINDOW as *mut libc::c_void,
            "{}",
            std::io::Error::last_os_error()
        );
        let native = Self(window.cast());
        let absolute = |code: &mut Vec<u8>, opcode: &[u8], address: u32| {
            code.extend(opcode);
            code.extend(address.to_le_bytes());
        };
        // ModRM and SIB of [disp32], by the register's number.
        let place = |number: u32| [(number << 3 | 4) as u8, 0x25];
        // push rbx, rbp, r12-r15
        let mut code = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        // mov [SAVED], rsp
        absolute(&mut code, &[0x48, 0x89, 0x24, 0x25], SAVED);
        // mov eax, FLAT; mov ds, eax; mov es, eax
        code.extend([0xb8, FLAT as u8, 0, 0, 0, 0x8e, 0xd8, 0x8e, 0xc0]);
        // push qword ptr [FLAGS]; popfq
        absolute(&mut code, &[0xff, 0x34, 0x25], FLAGS);
        code.push(0x9d);
        for number in [0, 1, 2, 3, 5, 6, 7, 4] {
            let [modrm, sib] = place(number);
            absolute(&mut code, &[0x8b, modrm, sib], STATE + number * 4);
        }
        // jmp far [FAR]
        absolute(&mut code, &[0xff, 0x2c, 0x25], FAR);
        native.write(ENTRY, &code);
        let mut code = Vec::new();
        for number in 0..8 {
            let [modrm, sib] = place(number);
            absolute(&mut code, &[0x89, modrm, sib], STATE + number * 4);
        }
        // mov rsp, [SAVED]; pushfq; pop [FLAGS]; cld
        absolute(&mut code, &[0x48, 0x8b, 0x24, 0x25], SAVED);
        code.push(0x9c);
        absolute(&mut code, &[0x8f, 0x04, 0x25], FLAGS);
        // cld; xor eax, eax; mov ds, eax; mov es, eax; pop r15-r12, rbp, rbx; ret
        code.extend([0xfc, 0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0]);
        code.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        native.write(LANDING, &code);
        let mut far = CODE.to_le_bytes().to_vec();
        far.extend(CODE32.to_le_bytes());
        native.write(FAR, &far);
        native
    }

    fn write(&self, address: u32, bytes: &[u8]) {
        let at = (address - WINDOW) as usize;
        assert!(at + bytes.len() <= SIZE);
        // SAFETY: inside the window, which nobody else uses.
        unsafe { self.0.add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn read(&self, address: u32, length: usize) -> Vec<u8> {
        let at = (address - WINDOW) as usize;
        assert!(at + length <= SIZE);
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.0.add(at), length).to_vec() }
    }

    fn word(&self, address: u32) -> u32 {
        u32::from_le_bytes(self.read(address, 4).try_into().expect("four bytes"))
    }

    fn run(&self, case: &Case) -> Outcome {
        case.registers
            .iter()
            .zip((STATE..).step_by(4))
            .for_each(|(value, at)| self.write(at, &value.to_le_bytes()));
        self.write(FLAGS, &u64::from(case.flags).to_le_bytes());
        self.write(TAKEN, &[0]);
        self.write(CODE, &code_of(case));
        self.write(DATA, &case.data);
        // SAFETY: the child runs the code in the window and ends, whatever happens; it takes no lock.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            // SAFETY: the code of `new`, which keeps the ABI unless the instruction faults.
            unsafe {
                libc::alarm(5);
                std::mem::transmute::<*mut u8, extern "sysv64" fn()>(self.0)();
                libc::_exit(0);
            }
        }
        let mut status = 0;
        // SAFETY: our own child.
        assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
        if libc::WIFSIGNALED(status) {
            return Outcome::Signal(libc::WTERMSIG(status));
        }
        Outcome::Done {
            registers: std::array::from_fn(|number| self.word(STATE + number as u32 * 4)),
            flags: self.word(FLAGS),
            taken: self.read(TAKEN, 1)[0] != 0,
            data: self.read(DATA, DATA_SIZE as usize),
        }
    }
}

struct Nothing;

impl Machine for Nothing {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
}

/// The software CPU's side: protected mode, CPL 3, flat segments, no paging.
fn guest() -> Core {
    let ram = Arc::new(GuestRam::new(1 << 20).expect("address space"));
    let mut core = Core::new(ram, Arc::new(Nothing), Arc::default());
    let mut state = CpuState::reset();
    state.cr0 = 0x11;
    state.segments = [Segment {
        selector: FLAT,
        base: 0,
        limit: u32::MAX,
        access: 0xc0f3,
    }; 6];
    state.segments[1].selector = CODE32;
    state.segments[1].access = 0xc0fb;
    // FS and GS hold null selectors in a 64-bit process.
    state.segments[4] = Segment::default();
    state.segments[5] = Segment::default();
    core.set_state(&state);
    core
}

fn run_guest(core: &mut Core, case: &Case) -> Outcome {
    let ram = Arc::clone(&core.ram);
    let write = |address: u32, bytes: &[u8]| {
        let host = ram.host(address.into(), bytes.len() as u64).expect("RAM");
        // SAFETY: inside guest RAM, which nobody else uses.
        unsafe { host.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    };
    write(CODE, &code_of(case));
    write(DATA, &case.data);
    for (register, &value) in core.regs.iter_mut().zip(&case.registers) {
        *register = value.into();
    }
    core.set_rflags(case.flags.into());
    core.update_mode();
    core.set_rip(CODE.into());
    let next = u64::from(CODE) + case.bytes.len() as u64;
    while core.rip() == u64::from(CODE) {
        if core.step().is_err() {
            return Outcome::Signal(match core.raised.vector {
                vector::DE => libc::SIGFPE,
                vector::UD => libc::SIGILL,
                _ => libc::SIGSEGV,
            });
        }
    }
    let host = ram.host(DATA.into(), DATA_SIZE.into()).expect("RAM");
    let taken = core.rip() == u64::from(taken_target(case.bytes.len() as u32));
    assert!(taken || core.rip() == next, "went to {:#x}", core.rip());
    Outcome::Done {
        registers: std::array::from_fn(|number| core.regs[number] as u32),
        flags: core.rflags() as u32,
        taken,
        // SAFETY: inside guest RAM.
        data: unsafe { std::slice::from_raw_parts(host, DATA_SIZE as usize).to_vec() },
    }
}

/// Flags that the manual leaves undefined.
fn undefined(instruction: &Instruction) -> u32 {
    let bits = instruction.rflags_undefined();
    [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 4),
        (RflagsBits::AF, 0x10),
        (RflagsBits::ZF, 0x40),
        (RflagsBits::SF, 0x80),
        (RflagsBits::OF, 0x800),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |mask, (_, flag)| mask | flag)
}

fn difference(case: &Case, native: &Outcome, guest: &Outcome) -> Option<String> {
    let (
        Outcome::Done {
            registers,
            flags,
            taken,
            data,
        },
        Outcome::Done {
            registers: guest_registers,
            flags: guest_flags,
            taken: guest_taken,
            data: guest_data,
        },
    ) = (native, guest)
    else {
        return (native != guest).then(|| match (native, guest) {
            (Outcome::Signal(one), Outcome::Signal(other)) => format!("CPU: signal {one}; posada: signal {other}"),
            (Outcome::Signal(one), _) => format!("CPU: signal {one}; posada goes on"),
            _ => format!("the CPU goes on; posada: {guest:?}"),
        });
    };
    let compared = FREE_FLAGS & !undefined(&case.instruction);
    if registers != guest_registers {
        return Some(format!("CPU: {registers:x?}; posada: {guest_registers:x?}"));
    }
    if (flags ^ guest_flags) & compared != 0 {
        return Some(format!(
            "flags: CPU {:x}, posada {:x}",
            flags & compared,
            guest_flags & compared
        ));
    }
    if taken != guest_taken {
        return Some(format!("branch taken: CPU {taken}, posada {guest_taken}"));
    }
    // A 32-bit PUSH of a segment register stores two bytes on some processors, four on others (SDM 2B, "PUSH").
    let selector =
        case.instruction.mnemonic() == Mnemonic::Push && case.instruction.op0_register().is_segment_register();
    let open = registers[4].wrapping_sub(DATA) as usize + 2;
    let at = (0..data.len())
        .filter(|at| !selector || !(open..open + 2).contains(at))
        .find(|&at| data[at] != guest_data[at])?;
    Some(format!(
        "memory at {:#x}: CPU {:x?}, posada {:x?}",
        DATA as usize + at,
        &data[at..(at + 8).min(data.len())],
        &guest_data[at..(at + 8).min(data.len())]
    ))
}

#[test]
fn code_of_32_bits_does_what_the_cpu_does() {
    let native = Native::new();
    let mut core = guest();
    let (mut forms, mut skipped, mut cases) = (0, 0, 0);
    let mut failures = Vec::new();
    for code in Code::values() {
        let info = code.op_code();
        let integer = info.encoding() == EncodingKind::Legacy && info.is_instruction() && info.mode32();
        if !integer || !features(code) {
            continue;
        }
        if excluded(code).is_some() {
            skipped += 1;
            continue;
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (code as u64) << 32);
        random.next();
        let mut tried = 0;
        for _ in 0..ROUNDS {
            let Some(case) = build(&mut random, code) else {
                continue;
            };
            tried += 1;
            let expected = native.run(&case);
            let got = run_guest(&mut core, &case);
            if let Some(text) = difference(&case, &expected, &got) {
                failures.push(format!(
                    "{code:?} {:02x?} registers {:x?} flags {:x}: {text}",
                    case.bytes, case.registers, case.flags
                ));
                break;
            }
        }
        forms += u32::from(tried > 0);
        cases += tried;
    }
    println!("{forms} forms, {cases} cases, {skipped} forms skipped by table");
    failures.iter().for_each(|failure| println!("{failure}"));
    assert!(failures.is_empty(), "{} forms differ", failures.len());
    assert!(forms > 300, "only {forms} forms");
}
