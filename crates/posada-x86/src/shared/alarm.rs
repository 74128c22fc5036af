//! Alarms for vCPUs that run: one thread a VM waits for all their deadlines, and sleeps while there are none.
//!
//! Each vCPU has a timerfd of its own, which it sets itself: that needs no hand-shake with the thread, nor with the other
//! vCPUs. A vCPU that sleeps needs no alarm, it waits for its own deadline.

use super::mailbox::{LOOK, Mailbox};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

const STOP: u64 = u64::MAX;

/// The alarms of one VM. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct Alarms {
    timers: Vec<OwnedFd>,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

/// Takes the descriptor that a system call returned.
fn descriptor(result: libc::c_int) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the callers pass descriptors just opened, which nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

fn watch(epoll: &OwnedFd, file: &OwnedFd, data: u64) -> io::Result<()> {
    let mut event = libc::epoll_event {
        // Edge-triggered: an expiry is told once and nobody needs to read the timer.
        events: (libc::EPOLLIN | libc::EPOLLET) as u32,
        u64: data,
    };
    // SAFETY: three valid descriptors and an event of this frame.
    match unsafe { libc::epoll_ctl(epoll.as_raw_fd(), libc::EPOLL_CTL_ADD, file.as_raw_fd(), &mut event) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Alarms {
    /// Starts the thread, which posts to `mailboxes`.
    pub(crate) fn new(mailboxes: Arc<[Arc<Mailbox>]>) -> io::Result<Self> {
        // SAFETY: plain system calls that take no pointers.
        let (epoll, stop) = unsafe {
            (
                descriptor(libc::epoll_create1(libc::EPOLL_CLOEXEC))?,
                descriptor(libc::eventfd(0, libc::EFD_CLOEXEC))?,
            )
        };
        watch(&epoll, &stop, STOP)?;
        let mut timers = Vec::new();
        for index in 0..mailboxes.len() {
            // SAFETY: as above.
            let timer = descriptor(unsafe { libc::timerfd_create(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC) })?;
            watch(&epoll, &timer, index as u64)?;
            timers.push(timer);
        }
        let thread = std::thread::Builder::new()
            .name("timers".into())
            .stack_size(64 << 10)
            .spawn(move || deliver(&epoll, &mailboxes))?;
        Ok(Self {
            timers,
            stop,
            thread: Some(thread),
        })
    }

    /// Posts to vCPU `index` after `delay` (nanoseconds, at least 1), or with `None` never; replaces its last alarm.
    pub(crate) fn set(&self, index: u32, delay: Option<u64>) {
        let delay = delay.map_or(0, |delay| delay.max(1));
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let time = libc::itimerspec {
            it_interval: zero,
            it_value: libc::timespec {
                tv_sec: (delay / 1_000_000_000) as libc::time_t,
                tv_nsec: (delay % 1_000_000_000) as libc::c_long,
            },
        };
        let timer = self.timers[index as usize].as_raw_fd();
        // SAFETY: a valid descriptor and a time of this frame; the old time is not asked for.
        let result = unsafe { libc::timerfd_settime(timer, 0, &time, std::ptr::null_mut()) };
        debug_assert_eq!(result, 0, "the time is valid by construction");
    }
}

/// The thread's body.
fn deliver(epoll: &OwnedFd, mailboxes: &[Arc<Mailbox>]) {
    prefer_short_slices();
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 16];
    loop {
        // SAFETY: the kernel fills at most as many events as there are.
        let count = unsafe { libc::epoll_wait(epoll.as_raw_fd(), events.as_mut_ptr(), events.len() as i32, -1) };
        for event in &events[..usize::try_from(count).unwrap_or(0)] {
            match event.u64 {
                STOP => return,
                index => mailboxes[index as usize].post(LOOK),
            }
        }
    }
}

/// Asks for a short time slice (since Linux 6.12): the thread then does not wait for the end of the slice of a vCPU that
/// keeps the processor busy. Older kernels refuse or ignore it, and favour a thread that has slept anyway.
fn prefer_short_slices() {
    let size = size_of::<libc::sched_attr>();
    // SAFETY: all fields are integers.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills at most `size` bytes of the structure, which are this frame's.
    if unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } == 0 {
        attributes.sched_runtime = 100_000;
        // SAFETY: the structure says its own size.
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    }
}

impl Drop for Alarms {
    fn drop(&mut self) {
        let one = 1u64;
        // SAFETY: eight bytes of this frame, as an eventfd wants them.
        unsafe { libc::write(self.stop.as_raw_fd(), std::ptr::from_ref(&one).cast(), 8) };
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has already said so.
            let _ = thread.join();
        }
    }
}
