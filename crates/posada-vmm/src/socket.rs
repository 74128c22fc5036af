//! Sockets in the file system at which a VM is reached.

use std::fs;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Connections that wait to be accepted.
const BACKLOG: libc::c_int = 16;

/// A Unix socket for its user alone. Its path goes with it.
pub(crate) struct SocketFile {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, by which the path is known to be still ours.
    file: (u64, u64),
}

impl SocketFile {
    /// Listens at `path`, in place of a socket that a killed process has left there.
    ///
    /// # Errors
    /// What the host says: `AddrInUse` when somebody listens there, or something else is there.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let socket = fs::symlink_metadata(path).is_ok_and(|old| old.file_type().is_socket());
        let dead = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
        if socket && UnixStream::connect(path).is_err_and(dead) {
            fs::remove_file(path)?;
        }
        let listener = bind_private(path)?;
        let file = fs::symlink_metadata(path)?;
        Ok(Self {
            listener,
            path: path.into(),
            file: (file.dev(), file.ino()),
        })
    }

    /// The same listener for somebody else, who must be gone before this.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    /// The next connection.
    pub(crate) fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept()?.0)
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Binds with mode 0600 from the first moment: Linux takes the mode from the unbound socket.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let failed = |result: libc::c_int| {
        if result < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(result)
        }
    };
    // SAFETY: an all-zero address is a valid one.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a socket's path has at most {} bytes", address.sun_path.len() - 1),
        ));
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    let length = offset_of!(libc::sockaddr_un, sun_path) + bytes.len() + 1;
    // SAFETY: takes numbers.
    let fd = failed(unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: the descriptor is new and ours alone.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes numbers.
    failed(unsafe { libc::fchmod(fd.as_raw_fd(), 0o600) })?;
    // SAFETY: `address` is valid for `length` bytes, the path with its zero included.
    failed(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length as libc::socklen_t) })?;
    // SAFETY: takes numbers.
    failed(unsafe { libc::listen(fd.as_raw_fd(), BACKLOG) })?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TempDir;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_socket_is_its_users_and_goes_at_the_end() {
        let dir = TempDir::new();
        let path = dir.path("socket");
        let socket = SocketFile::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let in_use = SocketFile::bind(&path).err().unwrap();
        assert_eq!(in_use.kind(), io::ErrorKind::AddrInUse);
        drop(UnixStream::connect(&path).unwrap());
        socket.accept().unwrap();
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_dead_socket_is_replaced_and_a_file_is_not() {
        let dir = TempDir::new();
        let path = dir.path("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        drop(SocketFile::bind(&path).unwrap());
        dir.file("socket", b"precious");
        assert_eq!(SocketFile::bind(&path).err().unwrap().kind(), io::ErrorKind::AddrInUse);
        assert!(path.exists());
        let long = dir.path(&"x".repeat(200));
        assert_eq!(
            SocketFile::bind(&long).err().unwrap().kind(),
            io::ErrorKind::InvalidInput
        );
    }

    #[test]
    fn anothers_socket_stays() {
        let dir = TempDir::new();
        let path = dir.path("socket");
        let first = SocketFile::bind(&path).unwrap();
        fs::rename(&path, dir.path("moved")).unwrap();
        let _second = SocketFile::bind(&path).unwrap();
        drop(first);
        assert!(path.exists());
    }
}
