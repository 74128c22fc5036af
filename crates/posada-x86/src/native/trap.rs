//! Unmasked SIMD floating-point exceptions: the host's own #XM, which Linux makes SIGFPE, leads a stub to its other exit.

use crate::signal;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static START: AtomicU64 = AtomicU64::new(0);
static LENGTH: AtomicU64 = AtomicU64::new(0);
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Takes the SIGFPE of code in these bytes; that of others goes where it went before.
///
/// # Errors
/// The host refuses the handler.
pub fn catch(bytes: Range<u64>) -> io::Result<()> {
    START.store(bytes.start, Ordering::Relaxed);
    LENGTH.store(bytes.end - bytes.start, Ordering::Relaxed);
    let _ = BEFORE.set(signal::install(libc::SIGFPE, handler)?);
    Ok(())
}

extern "C" fn handler(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext to an SA_SIGINFO handler.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let rip = &mut registers[libc::REG_RIP as usize];
    let offset = (*rip as u64).wrapping_sub(START.load(Ordering::Relaxed));
    if offset < LENGTH.load(Ordering::Relaxed) {
        // SAFETY: a stub whose guest instruction can trap has the way to its other exit in the four bytes before it.
        *rip += i64::from(unsafe { (*rip as *const i32).sub(1).read_unaligned() });
        return;
    }
    signal::pass_on(BEFORE.get(), signal, info, context);
}
