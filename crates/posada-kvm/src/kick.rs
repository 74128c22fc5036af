//! Kicks: how another thread gets a vCPU out of the guest (Linux, KVM API, `immediate_exit`).
//!
//! A kick sets `pending`, then, if the vCPU's thread is inside [`Kicker::enter`]'s span, the flag that makes KVM_RUN return at
//! once, and sends the thread a signal in case it is already in the guest. Whatever the thread does at that moment, one of the
//! three reaches it: it looks at `pending` before each KVM_RUN; a KVM_RUN that begins later sees the flag; one that has begun is
//! interrupted by the signal. The flag is the thread's to clear, and it looks at `pending` after that.

use posada_engine::Kick;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

/// Signals that a vCPU's thread gets are this one.
fn signal() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

/// Makes the signal one that only interrupts. Once for the process.
pub(crate) fn prepare() -> io::Result<()> {
    static PREPARED: OnceLock<Result<(), i32>> = OnceLock::new();
    extern "C" fn nothing(_: libc::c_int) {}
    let prepared = PREPARED.get_or_init(|| {
        // SAFETY: zeros are a valid sigaction: no flags (in particular no restart), an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = nothing as *const () as usize;
        // SAFETY: the handler does nothing, so it may run at any time.
        match unsafe { libc::sigaction(signal(), &action, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(0)),
        }
    });
    prepared.map_err(io::Error::from_raw_os_error)
}

/// A thread that runs a vCPU at present.
struct Runner {
    thread: libc::pid_t,
    /// KVM's flag in the page that it shares with us. The page outlives the span in which this is here.
    immediate_exit: *mut u8,
}

// SAFETY: the pointer is used under the lock, while the page is there, and only for atomic accesses.
unsafe impl Send for Runner {}

/// One vCPU's, for the threads that kick it and for the one that runs it.
#[derive(Default)]
pub(crate) struct Kicker {
    pending: AtomicBool,
    runner: Mutex<Option<Runner>>,
}

impl Kicker {
    fn runner(&self) -> MutexGuard<'_, Option<Runner>> {
        self.runner.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Lets kicks reach the calling thread until the returned value is dropped.
    ///
    /// # Safety
    /// `immediate_exit` must be valid until then, and accessed atomically only.
    pub(crate) unsafe fn enter(self: &Arc<Self>, immediate_exit: *mut u8) -> Inside {
        let_signal_in();
        // SAFETY: asks for the thread's number.
        let thread = unsafe { libc::gettid() };
        let inside = Inside {
            kicker: Arc::clone(self),
            immediate_exit,
        };
        let mut runner = self.runner();
        inside.flag().store(0, Ordering::Relaxed);
        *runner = Some(Runner { thread, immediate_exit });
        drop(runner);
        inside
    }
}

/// Lets the signal through on this thread, whatever it inherited.
fn let_signal_in() {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: fills the set, adds a valid signal to it and unblocks that.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        self.pending.store(true, Ordering::Release);
        if let Some(runner) = &*self.runner() {
            // SAFETY: the page is there while the runner is.
            let flag = unsafe { AtomicU8::from_ptr(runner.immediate_exit) };
            flag.store(1, Ordering::Release);
            // SAFETY: the thread is there while the runner is, and has a handler for the signal.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), runner.thread, signal()) };
        }
    }
}

/// The span in which a thread runs a vCPU.
pub(crate) struct Inside {
    kicker: Arc<Kicker>,
    immediate_exit: *mut u8,
}

impl Inside {
    fn flag(&self) -> &AtomicU8 {
        // SAFETY: valid by the contract of `enter`.
        unsafe { AtomicU8::from_ptr(self.immediate_exit) }
    }

    /// Whether there was a kick; takes it.
    pub(crate) fn take(&self) -> bool {
        self.kicker.pending.swap(false, Ordering::AcqRel)
    }

    /// Whether there was a kick.
    pub(crate) fn kicked(&self) -> bool {
        self.kicker.pending.load(Ordering::Acquire)
    }

    /// Has the next KVM_RUN finish what it was doing for the guest, and return.
    pub(crate) fn finish_only(&self) {
        self.flag().store(1, Ordering::Relaxed);
    }

    /// KVM_RUN has returned early: look for the kick after this.
    pub(crate) fn returned(&self) {
        // A swap, so that what a kicker did before it set the flag is seen.
        self.flag().swap(0, Ordering::AcqRel);
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        *self.kicker.runner() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_kick_outside_the_span_waits_and_one_inside_sets_the_flag() {
        prepare().unwrap();
        let kicker = Arc::new(Kicker::default());
        kicker.kick();
        let mut flag = 7u8;
        // SAFETY: `flag` outlives the span.
        let inside = unsafe { kicker.enter(&raw mut flag) };
        assert_eq!(inside.flag().load(Ordering::Relaxed), 0);
        assert!(inside.kicked() && inside.take() && !inside.take());
        kicker.kick();
        assert_eq!(inside.flag().load(Ordering::Relaxed), 1);
        inside.returned();
        assert_eq!(inside.flag().load(Ordering::Relaxed), 0);
        assert!(inside.take());
        drop(inside);
        kicker.kick();
        assert_eq!(flag, 0, "no thread runs it");
    }

    #[test]
    fn a_kick_interrupts_a_blocking_call() {
        prepare().unwrap();
        let kicker = Arc::new(Kicker::default());
        let (entered, wait) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let sleeper = scope.spawn(|| {
                let mut flag = 0u8;
                // SAFETY: `flag` outlives the span.
                let inside = unsafe { kicker.enter(&raw mut flag) };
                entered.send(()).unwrap();
                while !inside.take() {
                    // SAFETY: waits for a signal.
                    assert_eq!(unsafe { libc::pause() }, -1);
                }
            });
            wait.recv().unwrap();
            // The thread may not be in pause() yet, where KVM_RUN would see the flag.
            while !sleeper.is_finished() {
                kicker.kick();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
    }
}
