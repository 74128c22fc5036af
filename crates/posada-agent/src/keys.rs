//! Keys by which users log in by ssh. A home directory is its user's: nothing in it is followed to somewhere else.

use crate::session::Refusal;
use crate::system::System;
use crate::user::User;
use posada_protocol::Failure;
use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

/// The most bytes of a file that is looked at for keys that are already there.
const MOST: u64 = 1 << 20;

/// Adds to a user's keys those that are not there.
pub fn authorize(system: &System, user: &str, keys: &[String]) -> Result<(), Refusal> {
    let user = User::find(system, user)?;
    for key in keys {
        if key.trim().is_empty() || key.chars().any(char::is_control) {
            return Err(Refusal::new(Failure::Invalid, "a key is one line of text"));
        }
    }
    add(system, &user, keys).map_err(|error| {
        let what = format!("cannot add to the keys of {}", user.name);
        Refusal::of(what, &error)
    })
}

fn add(system: &System, user: &User, keys: &[String]) -> io::Result<()> {
    let folder = OFlags::DIRECTORY | OFlags::CLOEXEC;
    let home = rustix::fs::open(system.path(&user.home), folder, Mode::empty())?;
    let made = match rustix::fs::mkdirat(&home, ".ssh", Mode::RWXU) {
        Err(Errno::EXIST) => false,
        made => made.map(|()| true)?,
    };
    let ssh = rustix::fs::openat(&home, ".ssh", folder | OFlags::NOFOLLOW, Mode::empty())?;
    if made {
        give(&ssh, user)?;
    }
    let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let is_new = rustix::fs::statat(&ssh, "authorized_keys", AtFlags::SYMLINK_NOFOLLOW).is_err();
    let file = rustix::fs::openat(&ssh, "authorized_keys", flags, Mode::RUSR | Mode::WUSR)?;
    if is_new {
        give(&file, user)?;
    }
    let mut file = File::from(file);
    let metadata = file.metadata()?;
    // A link to another file of the same disk would be one, too.
    if !metadata.is_file() || std::os::unix::fs::MetadataExt::nlink(&metadata) != 1 {
        return Err(io::Error::other("authorized_keys is no file of its own"));
    }
    let mut bytes = Vec::new();
    (&mut file).take(MOST).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let mut more = String::new();
    for key in keys.iter().map(|key| key.trim()) {
        if !text.lines().chain(more.lines()).any(|line| line.trim() == key) {
            more += key;
            more.push('\n');
        }
    }
    if !text.is_empty() && !text.ends_with('\n') && !more.is_empty() {
        more.insert(0, '\n');
    }
    file.write_all(more.as_bytes())?;
    file.sync_all()
}

fn give(fd: &OwnedFd, user: &User) -> io::Result<()> {
    if rustix::process::getuid().as_raw() == user.uid {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    Ok(rustix::fs::fchown(fd, Some(uid), Some(gid))?)
}
