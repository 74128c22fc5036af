//! Unmasked SIMD floating-point exceptions: the host's own #XM, which Linux makes SIGFPE, leads a stub to its other exit.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

static START: AtomicU64 = AtomicU64::new(0);
static LENGTH: AtomicU64 = AtomicU64::new(0);
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Takes the SIGFPE of code in these bytes; that of others goes where it went before.
///
/// # Errors
/// The host refuses the handler.
pub fn catch(start: u64, length: u64) -> io::Result<()> {
    START.store(start, Ordering::Relaxed);
    LENGTH.store(length, Ordering::Relaxed);
    // SAFETY: all zeroes is a valid action to fill in.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler is async-signal-safe: it reads atomics and changes the context.
    if unsafe { libc::sigaction(libc::SIGFPE, &action, &mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let _ = BEFORE.set(before);
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
    let before = BEFORE.get().map(|action| (action.sa_sigaction, action.sa_flags));
    match before {
        Some((address, flags)) if address != libc::SIG_DFL && address != libc::SIG_IGN => {
            if flags & libc::SA_SIGINFO != 0 {
                // SAFETY: the address that the program registered with this signature.
                let next: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(address) };
                next(signal, info, context);
            } else {
                // SAFETY: as above.
                let next: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(address) };
                next(signal);
            }
        }
        // SAFETY: back to the default; the instruction runs again and ends the process.
        _ => unsafe {
            libc::signal(signal, libc::SIG_DFL);
        },
    }
}
