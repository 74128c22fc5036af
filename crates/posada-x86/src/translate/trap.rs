//! Signals while translated code runs. RSP is the guest's then, so a thread that runs it has a stack for signals and takes
//! none but those that its own instructions cause; and what the host's processor raises in the code cache (divide errors,
//! unmasked SIMD exceptions, misaligned vector operands) leads out of it, so that the interpreter raises it for the guest.

use super::frame::{self, Frame};
use crate::core::Core;
use crate::signal;
use std::arch::asm;
use std::cell::Cell;
use std::mem::{MaybeUninit, offset_of};
use std::ops::Range;
use std::sync::OnceLock;
use std::{io, ptr};

const SIGNALS: [libc::c_int; 3] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGBUS];
const STACK: usize = 64 << 10;

static BEFORE: [OnceLock<libc::sigaction>; 3] = [const { OnceLock::new() }; 3];

#[derive(Clone, Copy)]
struct Active {
    start: u64,
    end: u64,
    trap: u64,
}

thread_local! {
    static ACTIVE: Cell<Active> = const { Cell::new(Active { start: 0, end: 0, trap: 0 }) };
    static READY: Cell<bool> = const { Cell::new(false) };
}

/// Installs the handlers, once for the process.
///
/// # Errors
/// The host refuses.
pub fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    DONE.get_or_init(|| {
        for (signal, before) in SIGNALS.into_iter().zip(&BEFORE) {
            let old = signal::install(signal, handler).map_err(|error| error.raw_os_error().unwrap_or(libc::EINVAL))?;
            let _ = before.set(old);
        }
        Ok(())
    })
    .map_err(io::Error::from_raw_os_error)
}

/// Makes this thread ready to run code in `range`, whose exceptions lead to `trap`.
pub fn activate(range: Range<u64>, trap: u64) {
    ACTIVE.set(Active {
        start: range.start,
        end: range.end,
        trap,
    });
    if READY.replace(true) {
        return;
    }
    // SAFETY: asks for this thread's signal stack, gives it one that is never freed if it has none, and blocks all
    // signals but those that instructions cause.
    unsafe {
        let mut stack = MaybeUninit::<libc::stack_t>::zeroed().assume_init();
        libc::sigaltstack(ptr::null(), &mut stack);
        if stack.ss_flags & libc::SS_DISABLE != 0 {
            stack.ss_sp = Box::leak(vec![0_u8; STACK].into_boxed_slice()).as_mut_ptr().cast();
            stack.ss_size = STACK;
            stack.ss_flags = 0;
            libc::sigaltstack(&stack, ptr::null_mut());
        }
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(set.as_mut_ptr());
        for signal in [
            libc::SIGFPE,
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGTRAP,
            libc::SIGABRT,
        ] {
            libc::sigdelset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
    }
}

/// Lets GS of this thread point at a Core.
pub fn set_gs(core: *mut Core) {
    if fsgsbase() {
        // SAFETY: the kernel allows the instruction, and nothing else in this process uses GS.
        unsafe { asm!("wrgsbase {}", in(reg) core as u64, options(nomem, nostack, preserves_flags)) };
    } else {
        const ARCH_SET_GS: libc::c_long = 0x1001;
        // SAFETY: as above.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, core) };
    }
}

/// The kernel lets programs set their segment bases (HWCAP2_FSGSBASE).
fn fsgsbase() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    // SAFETY: reads what the kernel told the process.
    *ALLOWED.get_or_init(|| unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0)
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = registers[libc::REG_RIP as usize] as u64;
    let active = ACTIVE.get();
    if (active.start..active.end).contains(&rip) {
        let core: *mut u8;
        // SAFETY: translated code runs with GS at its Core, which holds its own address.
        unsafe { asm!("mov {}, gs:[{at}]", out(reg) core, at = const frame::CORE, options(nostack, readonly)) };
        let place = offset_of!(Core, frame);
        // SAFETY: as above; the thread that owns the Core is the one that is interrupted.
        let frame = unsafe { &mut *core.add(place).cast::<Frame>() };
        frame.trap_rip = rip;
        frame.trap_flags = registers[libc::REG_EFL as usize] as u64;
        registers[libc::REG_RIP as usize] = active.trap as i64;
        return;
    }
    let at = SIGNALS.iter().position(|&known| known == signal);
    let before = at.and_then(|at| BEFORE[at].get());
    signal::pass_on(before, signal, info, context);
}
