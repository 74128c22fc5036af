//! Enters a case with its whole state and leaves it with what the instruction made of it, in assembly because neither
//! may disturb a single register. The context lies below 2 GiB, where absolute addresses reach it without a base.
//!
//! IRETQ loads RIP, RSP and RFLAGS at once and serializes, as execution of bytes just written needs (Intel SDM 3A,
//! "Serializing Instructions").

use crate::layout::{CODE, CODE_32, CODE_64, CODE_PAGES, EXIT, FLAT_DATA, GATES, PAGE};
use crate::state::{End, Outcome, State, area};
use std::arch::{asm, global_asm};
use std::mem::offset_of;

/// Where the child process keeps the [`Context`]: below 2 GiB, and no round distance from the windows, as a stray operand
/// that reads it would find memory where the guest has none.
pub const CONTEXT: u64 = 0x5b3d_7000;
/// Bytes of the stack that signals run on, at the context's end.
pub const SIGNAL_STACK: usize = 0x1_0000;

#[repr(C, align(64))]
pub struct Context {
    pub input: State,
    pub output: State,
    /// RIP, CS, RFLAGS, RSP, SS for IRETQ.
    frame: [u64; 5],
    /// What the exits jump to.
    exits: [u64; 2],
    /// The exit taken, or [`SIGNAL`].
    exit: u64,
    host_rsp: u64,
    host_fs: u64,
    host_gs: u64,
    mxcsr: u32,
    /// What XSAVE and XRSTOR carry.
    components: u32,
    /// Selector of the data segments.
    data: u32,
    /// A case runs: signals are its own.
    running: u32,
    vector: u32,
    error: u32,
    address: u64,
    pub signal_stack: [u8; SIGNAL_STACK],
}

const SIGNAL: u64 = 2;

/// Code of exit 0 (the next instruction) or 1 (the branch target), for code of 64 or 32 bits.
pub fn exit_bytes(exit: usize, bits: u32) -> [u8; EXIT as usize] {
    if bits == 32 {
        let [a, b, c, d] = (GATES as u32 + (exit as u64 * EXIT) as u32).to_le_bytes();
        let [e, f] = CODE_64.to_le_bytes();
        return [0xea, a, b, c, d, e, f];
    }
    let slot = (CONTEXT as usize + offset_of!(Context, exits) + 8 * exit) as u32;
    let [a, b, c, d] = slot.to_le_bytes();
    [0xff, 0x24, 0x25, a, b, c, d]
}

global_asm!(
    ".macro EACH_REGISTER op:req",
    "\\op rbx, 3",
    "\\op rcx, 1",
    "\\op rdx, 2",
    "\\op rbp, 5",
    "\\op rsi, 6",
    "\\op rdi, 7",
    "\\op r8, 8",
    "\\op r9, 9",
    "\\op r10, 10",
    "\\op r11, 11",
    "\\op r12, 12",
    "\\op r13, 13",
    "\\op r14, 14",
    "\\op r15, 15",
    ".endm",
    ".macro LOAD_REGISTER name:req, number:req",
    "mov \\name, [{context} + {input} + {gpr} + 8 * \\number]",
    ".endm",
    ".macro STORE_REGISTER name:req, number:req",
    "mov [{context} + {output} + {gpr} + 8 * \\number], \\name",
    ".endm",
    "posada_differential_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [{context} + {host_rsp}], rsp",
    "mov eax, [{context} + {data}]",
    "mov es, eax",
    "mov ds, eax",
    "mov fs, eax",
    "mov gs, eax",
    "mov rax, [{context} + {input} + {fs}]",
    "wrfsbase rax",
    "mov rax, [{context} + {input} + {gs}]",
    "wrgsbase rax",
    "mov eax, [{context} + {components}]",
    "xor edx, edx",
    "xrstor64 [{context} + {input}]",
    "mov dword ptr [{context} + {running}], 1",
    "EACH_REGISTER LOAD_REGISTER",
    "mov rax, [{context} + {input} + {gpr}]",
    "mov rsp, {context} + {frame}",
    "iretq",
    "posada_differential_exit0:",
    "mov qword ptr [{context} + {exit}], 0",
    "jmp 2f",
    "posada_differential_exit1:",
    "mov qword ptr [{context} + {exit}], 1",
    "2:",
    "mov [{context} + {output} + {gpr}], rax",
    "mov [{context} + {output} + {gpr} + 32], rsp",
    "EACH_REGISTER STORE_REGISTER",
    "mov rsp, [{context} + {host_rsp}]",
    "pushfq",
    "pop [{context} + {output} + {rflags}]",
    "push 2",
    "popfq",
    "mov eax, [{context} + {components}]",
    "xor edx, edx",
    "xsave64 [{context} + {output}]",
    "call 4f",
    "3:",
    "mov dword ptr [{context} + {running}], 0",
    "fninit",
    "vzeroupper",
    "ldmxcsr [{context} + {mxcsr}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    // Segments, then the host's own bases.
    "4:",
    "mov [{context} + {output} + {selectors}], es",
    "mov [{context} + {output} + {selectors} + 2], ds",
    "mov [{context} + {output} + {selectors} + 4], fs",
    "mov [{context} + {output} + {selectors} + 6], gs",
    "rdfsbase rax",
    "mov [{context} + {output} + {fs}], rax",
    "rdgsbase rax",
    "mov [{context} + {output} + {gs}], rax",
    "mov rax, [{context} + {host_fs}]",
    "wrfsbase rax",
    "mov rax, [{context} + {host_gs}]",
    "wrgsbase rax",
    "ret",
    // A signal handler: the kernel leaves AC as the case had it.
    "posada_differential_signal:",
    "push 2",
    "popfq",
    "call 4b",
    "mov rdi, rdx",
    "call {capture}",
    "mov rsp, [{context} + {host_rsp}]",
    "jmp 3b",
    context = const CONTEXT,
    input = const offset_of!(Context, input),
    output = const offset_of!(Context, output),
    frame = const offset_of!(Context, frame),
    exit = const offset_of!(Context, exit),
    host_rsp = const offset_of!(Context, host_rsp),
    host_fs = const offset_of!(Context, host_fs),
    host_gs = const offset_of!(Context, host_gs),
    mxcsr = const offset_of!(Context, mxcsr),
    data = const offset_of!(Context, data),
    running = const offset_of!(Context, running),
    components = const offset_of!(Context, components),
    gpr = const offset_of!(State, gpr),
    rflags = const offset_of!(State, rflags),
    fs = const offset_of!(State, fs_base),
    gs = const offset_of!(State, gs_base),
    selectors = const offset_of!(State, selectors),
    capture = sym capture,
);

unsafe extern "C" {
    fn posada_differential_enter();
    fn posada_differential_exit0();
    fn posada_differential_exit1();
    fn posada_differential_signal();
}

fn context() -> *mut Context {
    CONTEXT as *mut Context
}

/// True if the context is there.
pub fn contains(address: u64) -> bool {
    address.wrapping_sub(CONTEXT) < size_of::<Context>() as u64
}

/// Copies what the kernel saved at the signal into the context.
extern "C" fn capture(user: &libc::ucontext_t) {
    // SAFETY: the context is mapped before any handler is set, and only this thread uses it.
    let context = unsafe { &mut *context() };
    if context.running == 0 {
        // SAFETY: plain system call; the harness itself failed, and says so by its status.
        unsafe { libc::syscall(libc::SYS_exit, 99) };
    }
    let from = &user.uc_mcontext.gregs;
    let get = |register: libc::c_int| from[register as usize] as u64;
    use libc::{
        REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX, REG_RCX,
        REG_RDI, REG_RDX, REG_RSI, REG_RSP,
    };
    let order = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
        REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    for (to, register) in context.output.gpr.iter_mut().zip(order) {
        *to = get(register);
    }
    context.output.rip = get(libc::REG_RIP);
    context.output.rflags = get(libc::REG_EFL);
    context.exit = SIGNAL;
    context.vector = get(libc::REG_TRAPNO) as u32;
    context.error = get(libc::REG_ERR) as u32;
    context.address = get(libc::REG_CR2);
    // SAFETY: the kernel writes a standard-format XSAVE area, which is at least this long with these components.
    unsafe {
        context
            .output
            .area
            .as_mut_ptr()
            .copy_from_nonoverlapping(user.uc_mcontext.fpregs.cast::<u8>(), area::used())
    };
}

/// Sets up the context and the handlers of the calling process.
///
/// # Safety
/// The context is mapped, zeroed, and nobody else's; the process runs nothing but cases from here on.
pub unsafe fn install() {
    // SAFETY: the caller vouches for the context.
    let context = unsafe { &mut *context() };
    context.exits = [
        posada_differential_exit0 as *const () as u64,
        posada_differential_exit1 as *const () as u64,
    ];
    context.mxcsr = 0x1f80;
    context.components = area::components().into();
    // SAFETY: reads registers; the kernel lets user mode use the FSGSBASE instructions (checked by the parent).
    unsafe {
        asm!("rdfsbase {}", "rdgsbase {}", out(reg) context.host_fs, out(reg) context.host_gs);
    }
    context.frame[4] = FLAT_DATA.into();
    // SAFETY: plain system calls on memory of our own.
    unsafe {
        let alternate = libc::stack_t {
            ss_sp: context.signal_stack.as_mut_ptr().cast(),
            ss_flags: 0,
            ss_size: SIGNAL_STACK,
        };
        libc::sigaltstack(&alternate, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = posada_differential_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Runs one case whose memory is prepared.
///
/// # Safety
/// [`install`] ran, and the code window holds the case's instruction.
pub unsafe fn run(case: &crate::state::Case, outcome: &mut Outcome) {
    // SAFETY: as in `install`.
    let context = unsafe { &mut *context() };
    context.input = case.state;
    let compatibility = case.bits == 32;
    context.data = if compatibility { FLAT_DATA.into() } else { 0 };
    context.frame[0] = case.state.rip;
    context.frame[1] = if compatibility { CODE_32 } else { CODE_64 }.into();
    context.frame[2] = case.state.rflags;
    context.frame[3] = case.state.gpr[4];
    // SAFETY: the caller vouches for code and handlers; the function keeps the C calling convention.
    unsafe { posada_differential_enter() };
    outcome.state = context.output;
    (outcome.vector, outcome.error, outcome.address) = (0, 0, 0);
    if context.exit == SIGNAL {
        outcome.end = End::Raised;
        outcome.vector = context.vector;
        outcome.error = context.error;
        outcome.address = if context.vector == 14 { context.address } else { 0 };
    } else {
        outcome.end = End::Retired;
        outcome.state.rip = case.exits().nth(context.exit as usize).unwrap_or(0);
    }
    debug_assert!(case.state.rip - CODE < CODE_PAGES as u64 * PAGE);
}
