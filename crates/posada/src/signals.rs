//! SIGINT, SIGTERM and SIGHUP end the VM, not the process: a thread of its own waits for them.

use anyhow::Context;
use posada_vmm::control::{Control, Ending};
use std::mem::MaybeUninit;
use std::sync::Arc;

const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// To be called while the process has one thread: the others inherit that these signals are blocked. A second signal ends
/// the process at once.
pub fn end_on_signals(control: Arc<Control>) -> anyhow::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set, adds valid signals to it and blocks them.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in SIGNALS {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        set.assume_init()
    };
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            let mut seen = false;
            loop {
                let mut signal = 0;
                // SAFETY: waits for a signal of the set.
                if unsafe { libc::sigwait(&set, &mut signal) } != 0 {
                    return;
                }
                if seen {
                    posada_vmm::console::restore_terminal();
                    std::process::exit(128 + signal);
                }
                seen = true;
                control.end(Ending::Signal(signal));
            }
        })
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}
