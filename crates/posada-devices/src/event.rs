//! What a device's thread sleeps on: an eventfd, so that KVM can ring it for a guest without anybody of ours running.

use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// An event for one waiter. Rings before and during its work are not lost; many make one.
#[derive(Debug)]
pub struct Event {
    fd: OwnedFd,
    /// Rung by [`Event::ring`] and not yet seen: further rings need no system call.
    rung: AtomicBool,
}

impl Event {
    /// Not rung.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: the descriptor is new and ours alone.
            fd: unsafe { OwnedFd::from_raw_fd(fd) },
            rung: AtomicBool::new(false),
        })
    }

    /// Wakes the waiter, now or when it next waits.
    pub fn ring(&self) {
        // What was stored before this is seen by a waiter whose `wait` takes the flag, also if that was up already.
        if !self.rung.swap(true, Ordering::AcqRel) {
            let one = 1_u64;
            // SAFETY: writes 8 bytes from `one`. It can only fail when the counter is full, and then the waiter is awake.
            unsafe { libc::write(self.fd.as_raw_fd(), (&raw const one).cast(), 8) };
        }
    }

    /// The same, or until `other` can be read.
    pub fn wait_or(&self, other: Option<BorrowedFd<'_>>) {
        let Some(other) = other else {
            return self.wait();
        };
        let readable = |fd| PollFd::from_borrowed_fd(fd, PollFlags::IN);
        let mut fds = [readable(self.as_fd()), readable(other)];
        // A signal may end it early: the waiter then looks once for nothing.
        if poll(&mut fds, None).is_ok() && !fds[0].revents().is_empty() {
            self.wait();
        }
    }

    /// Sleeps until it was rung since the last wait; what the ringers stored before is seen after.
    pub fn wait(&self) {
        let mut count = 0_u64;
        // SAFETY: reads 8 bytes into `count`. A signal may end it early: the waiter then looks once for nothing.
        unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut count).cast(), 8) };
        self.rung.swap(false, Ordering::AcqRel);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn whatever_was_stored_before_a_ring_is_seen_after_a_wait() {
        let event = Arc::new(Event::new().unwrap());
        let work = Arc::new(AtomicU32::new(0));
        let waiter = {
            let (event, work) = (event.clone(), work.clone());
            std::thread::spawn(move || {
                let mut done = 0;
                while done < 20_000 {
                    event.wait();
                    done += work.swap(0, Ordering::Relaxed);
                }
                done
            })
        };
        for _ in 0..20_000 {
            work.fetch_add(1, Ordering::Relaxed);
            event.ring();
        }
        assert_eq!(waiter.join().unwrap(), 20_000);
    }

    #[test]
    fn another_descriptor_ends_the_wait_and_leaves_the_event_as_it_is() {
        let event = Event::new().unwrap();
        let (reader, writer) = io::pipe().unwrap();
        event.ring();
        event.wait_or(Some(reader.as_fd()));
        drop(writer);
        event.wait_or(Some(reader.as_fd()));
        event.ring();
        event.wait();
    }

    #[test]
    fn who_holds_the_descriptor_can_ring_too() {
        let event = Event::new().unwrap();
        let one = 1_u64;
        // SAFETY: writes 8 bytes from `one`.
        unsafe { libc::write(event.as_fd().as_raw_fd(), (&raw const one).cast(), 8) };
        event.wait();
    }
}
