//! Signals that instructions of ours cause on purpose, beside those of the rest of the program.

use std::io;

/// A handler that gets the signal, what the kernel knows of it, and the interrupted context (a ucontext).
pub type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Has `handler` take `signal`, on the thread's stack for signals if it has one; returns who took it before. The handler must
/// be async-signal-safe.
///
/// # Errors
/// The host refuses.
pub fn install(signal: libc::c_int, handler: Handler) -> io::Result<libc::sigaction> {
    // SAFETY: all zeroes is a valid action to fill in.
    let (mut action, mut before): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: a handler of the right signature, which the caller vouches for.
    if unsafe { libc::sigaction(signal, &action, &mut before) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(before)
}

/// Hands a signal that is not ours to who took it before.
pub fn pass_on(
    before: Option<&libc::sigaction>,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    match before.map(|action| (action.sa_sigaction, action.sa_flags)) {
        Some((address, flags)) if address != libc::SIG_DFL && address != libc::SIG_IGN => {
            if flags & libc::SA_SIGINFO != 0 {
                // SAFETY: the address that the program registered with this signature.
                let next: Handler = unsafe { std::mem::transmute(address) };
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
