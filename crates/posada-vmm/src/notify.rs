//! Waking a thread that waits for file descriptors.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An eventfd.
#[derive(Debug)]
pub struct Notify(OwnedFd);

impl Notify {
    /// Not signalled.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Self> {
        // SAFETY: no memory is involved.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours alone.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Wakes the waiter, now or when it next waits.
    pub fn signal(&self) {
        let one = 1_u64;
        // SAFETY: writes 8 bytes from `one`. It can only fail when the counter is full, and then the waiter is awake.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    /// Takes the signals back.
    pub fn clear(&self) {
        let mut count = 0_u64;
        // SAFETY: reads 8 bytes into `count`; without a signal it fails at once.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }

    /// Waits until it is signalled or `other` can be read (or has ended); says which: (signalled, readable).
    ///
    /// # Errors
    /// What the host says.
    pub fn wait_with(&self, other: BorrowedFd<'_>) -> io::Result<(bool, bool)> {
        let poll = |fd| libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [poll(self.0.as_raw_fd()), poll(other.as_raw_fd())];
        loop {
            // SAFETY: `fds` is an array of two.
            if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } >= 0 {
                return Ok((fds[0].revents != 0, fds[1].revents != 0));
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;

    #[test]
    fn a_signal_or_data_ends_the_wait() {
        let notify = Notify::new().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        notify.signal();
        assert_eq!(notify.wait_with(reader.as_fd()).unwrap(), (true, false));
        notify.clear();
        writer.write_all(b"x").unwrap();
        assert_eq!(notify.wait_with(reader.as_fd()).unwrap(), (false, true));
    }
}
