//! Signals: a thread of its own waits for them. SIGINT, SIGTERM and SIGHUP end the VM, not the process.

use anyhow::Context;
use posada_vmm::control::{Control, Ending};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A signal this soon after the first is the same wish: timeout(1) sends one to the process and one to its group.
const SAME_WISH: Duration = Duration::from_secs(1);
/// Those that end what goes on.
pub const SIGNALS: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

/// Blocks `signals` in this thread and in those that it will start: they wait until somebody takes them.
pub fn block(signals: &[libc::c_int]) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set, adds valid signals to it and blocks them.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), *signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        set.assume_init()
    }
}

/// Blocks `signals` and has a thread call `came` for each that comes. To be called while the process has one thread, or
/// after [`block`]: the others inherit that they are blocked.
pub fn follow(signals: &[libc::c_int], mut came: impl FnMut(libc::c_int) + Send + 'static) -> anyhow::Result<()> {
    let set = block(signals);
    std::thread::Builder::new()
        .name("signals".into())
        .stack_size(128 << 10)
        .spawn(move || {
            let mut signal = 0;
            // SAFETY: waits for a signal of the set.
            while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
                came(signal);
            }
        })
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}

/// Has the first signal end the VM. Another one, a second later, ends the process at once.
pub fn end_on_signals(control: Arc<Control>) -> anyhow::Result<()> {
    let mut first = None::<Instant>;
    follow(&SIGNALS, move |signal| {
        if first.is_some_and(|first| first.elapsed() > SAME_WISH) {
            posada_vmm::console::restore_terminal();
            std::process::exit(128 + signal);
        }
        first.get_or_insert_with(Instant::now);
        control.end(Ending::Signal(signal));
    })
}
