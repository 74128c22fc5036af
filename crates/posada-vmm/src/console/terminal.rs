//! The terminal's raw mode, and that it never stays: not after an error, a panic, or a signal that kills.

use std::cell::UnsafeCell;
use std::io;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

/// Signals that end a process by something gone wrong.
const FATAL: [libc::c_int; 6] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGABRT,
    libc::SIGQUIT,
];

struct Saved {
    terminal: UnsafeCell<MaybeUninit<libc::termios>>,
    /// What the signals did before.
    actions: UnsafeCell<[MaybeUninit<libc::sigaction>; FATAL.len()]>,
}

// SAFETY: `terminal` is written only while RAW is false and read only by who has turned RAW from true to false; `actions`
// is written once, before its signals' handlers can run.
unsafe impl Sync for Saved {}

static SAVED: Saved = Saved {
    terminal: UnsafeCell::new(MaybeUninit::uninit()),
    actions: UnsafeCell::new([const { MaybeUninit::uninit() }; FATAL.len()]),
};
/// True while the terminal is raw and `SAVED.terminal` says what it was.
static RAW: AtomicBool = AtomicBool::new(false);

/// Gives the terminal back as it was found, if it is raw. Safe to call at any time and from signal handlers.
pub fn restore() {
    if RAW.swap(false, Ordering::AcqRel) {
        // SAFETY: RAW was true, so the value is initialised, and nobody else has it now.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, (*SAVED.terminal.get()).as_ptr()) };
    }
}

/// Raw mode for as long as the value lives.
pub struct RawMode(());

impl RawMode {
    /// Makes the terminal on standard input raw: every key goes to the guest. Output processing stays on, so that what
    /// else is printed still reads well. One at a time.
    ///
    /// # Errors
    /// When standard input is no terminal.
    pub fn enter() -> io::Result<Self> {
        static HOOKS: Once = Once::new();
        HOOKS.call_once(|| {
            let previous = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                previous(panic);
            }));
            restore_before_fatal_signals();
        });
        let mut terminal = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: fills `terminal`.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, terminal.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        assert!(!RAW.load(Ordering::Acquire), "there is one console");
        // SAFETY: RAW is false, so nobody reads the place.
        unsafe { *SAVED.terminal.get() = terminal };
        RAW.store(true, Ordering::Release);
        let guard = Self(());
        // SAFETY: initialised above.
        let mut raw = unsafe { terminal.assume_init() };
        // SAFETY: changes only `raw`.
        unsafe { libc::cfmakeraw(&mut raw) };
        raw.c_oflag |= libc::OPOST;
        // SAFETY: `raw` is a valid termios.
        if unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, &raw) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

fn restore_before_fatal_signals() {
    for (index, signal) in FATAL.into_iter().enumerate() {
        let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = fatal;
        // SAFETY: zeroes are a valid sigaction.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: first the old action is read, then the handler, which reads it, is set; the handler only does what is
        // allowed in one. Called once.
        unsafe {
            let old = (*SAVED.actions.get())[index].as_mut_ptr();
            libc::sigaction(signal, std::ptr::null(), old);
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

/// Restores the terminal and lets the signal do its work: a fault comes again when this returns, and meets the old action.
/// A signal that was sent is sent again and kills; the standard library's action for SIGSEGV would let it pass.
extern "C" fn fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    restore();
    let Some(index) = FATAL.iter().position(|fatal| *fatal == signal) else {
        return;
    };
    // SAFETY: the old action was read before this handler was set; `info` comes from the kernel.
    unsafe {
        if (*info).si_code <= 0 {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        } else {
            libc::sigaction(signal, (*SAVED.actions.get())[index].as_ptr(), std::ptr::null_mut());
        }
    }
}
