//! Where the host connects.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

/// VMADDR_CID_ANY and VMADDR_CID_HOST.
const ANY: u32 = u32::MAX;
const HOST: u32 = 2;
const BACKLOG: libc::c_int = 16;

/// A socket at which the host's connections arrive.
pub enum Listener {
    /// Of the family AF_VSOCK.
    Vsock(OwnedFd),
    /// For tests.
    Unix(UnixListener),
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn address(port: u32) -> libc::sockaddr_vm {
    // SAFETY: an all-zero address is a valid one.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = ANY;
    address.svm_port = port;
    address
}

const LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

impl Listener {
    /// At a vsock port.
    pub fn vsock(port: u32) -> io::Result<Self> {
        let address = address(port);
        // SAFETY: takes numbers.
        let fd = checked(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
        // SAFETY: the descriptor is new and ours alone.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: `address` is valid for `LENGTH` bytes.
        checked(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), LENGTH) })?;
        // SAFETY: takes numbers.
        checked(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
        Ok(Self::Vsock(fd))
    }

    /// At a Unix socket.
    pub fn unix(path: &Path) -> io::Result<Self> {
        UnixListener::bind(path).map(Self::Unix)
    }

    /// Waits for a connection; `None` if it is not the host's.
    pub fn accept(&self) -> io::Result<Option<File>> {
        let listener = match self {
            Self::Vsock(fd) => fd,
            Self::Unix(listener) => return Ok(Some(OwnedFd::from(listener.accept()?.0).into())),
        };
        let (mut peer, mut length) = (address(0), LENGTH);
        let to = (&raw mut peer).cast();
        // SAFETY: `peer` has room for `length` bytes.
        let fd = checked(unsafe { libc::accept4(listener.as_raw_fd(), to, &raw mut length, libc::SOCK_CLOEXEC) })?;
        // SAFETY: the descriptor is new and ours alone.
        let stream = unsafe { File::from_raw_fd(fd) };
        // Any program of the guest could reach us by its loopback.
        Ok((peer.svm_cid == HOST).then_some(stream))
    }
}
