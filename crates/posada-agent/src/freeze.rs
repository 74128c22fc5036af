//! File systems that stand still while their host copies the disks below them.

use crate::session::Refusal;
use crate::system::System;
use posada_protocol::{Answer, Failure, Order, read_frame, write_message};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// FIFREEZE and FITHAW of `linux/fs.h`.
const FREEZE: libc::Ioctl = 0xc004_5877_u32 as libc::Ioctl;
const THAW: libc::Ioctl = 0xc004_5878_u32 as libc::Ioctl;
/// The longest time that a host may ask for, in seconds.
const LONGEST: u32 = 600;

/// File systems that are frozen; they go on when this is dropped, the last one first.
struct Frozen(Vec<File>);

impl Drop for Frozen {
    fn drop(&mut self) {
        while let Some(file) = self.0.pop() {
            // One that was thawed by somebody else is as it shall be.
            let _ = control(&file, THAW);
        }
    }
}

fn control(file: &File, what: libc::Ioctl) -> io::Result<()> {
    // SAFETY: these two take no argument that they read or write.
    if unsafe { libc::ioctl(file.as_raw_fd(), what, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Freezes, waits for the host, and thaws.
pub fn freeze(stream: &mut File, system: &System, seconds: u32) -> anyhow::Result<Result<Answer, Refusal>> {
    if !(1..=LONGEST).contains(&seconds) {
        let message = format!("file systems are frozen for 1 to {LONGEST} seconds, not {seconds}");
        return Ok(Err(Refusal::new(Failure::Invalid, message)));
    }
    let end = Instant::now() + Duration::from_secs(seconds.into());
    let frozen = match freeze_all(system) {
        Ok(frozen) => frozen,
        Err(refusal) => return Ok(Err(refusal)),
    };
    write_message(stream, &Answer::Done)?;
    // Until here a failure has thawed them by dropping them; so does whatever comes now.
    let heard = wait(stream, end);
    drop(frozen);
    if !heard? {
        let message = format!("the file systems went on after {seconds} seconds");
        return Ok(Err(Refusal::new(Failure::Other, message)));
    }
    match read_frame(stream)?.map(|frame| frame.message()).transpose()? {
        Some(Order::Thaw) => Ok(Ok(Answer::Done)),
        Some(_) => Ok(Err(Refusal::new(Failure::Invalid, "no program runs here"))),
        None => anyhow::bail!("the host has gone, and the file systems go on"),
    }
}

/// Whether something came from the host before `end`.
fn wait(stream: &File, end: Instant) -> io::Result<bool> {
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::from_borrowed_fd(stream.as_fd(), PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn freeze_all(system: &System) -> Result<Frozen, Refusal> {
    let mut frozen = Frozen(Vec::new());
    for place in disks(&system.read("/proc/self/mountinfo")?) {
        let failed = |error: &io::Error| Refusal::of(format!("cannot freeze {place}"), error);
        let file = File::open(system.path(&place)).map_err(|error| failed(&error))?;
        match control(&file, FREEZE) {
            Ok(()) => frozen.0.push(file),
            // It has nothing to freeze.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY)) => {}
            Err(error) => return Err(failed(&error)),
        }
    }
    Ok(frozen)
}

/// Where writable file systems on disks are mounted, by `mountinfo` (proc_pid_mountinfo(5)), each once. The last one comes
/// first: its disk may be a file of one before.
fn disks(mountinfo: &str) -> Vec<String> {
    let (mut seen, mut places) = (HashSet::new(), Vec::new());
    for line in mountinfo.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let Some(dash) = words.iter().position(|word| *word == "-") else {
            continue;
        };
        let (Some([_, _, device, _, place, options]), Some([_, source, super_options])) = (
            words.first_chunk::<6>(),
            words.get(dash + 1..).and_then(|rest| rest.first_chunk::<3>()),
        ) else {
            continue;
        };
        let writable = |options: &str| options.split(',').any(|option| option == "rw");
        if source.starts_with("/dev/") && writable(options) && writable(super_options) && seen.insert(*device) {
            places.push(unescape(place));
        }
    }
    places.reverse();
    places
}

/// Spaces and such are octal numbers in `mountinfo`.
fn unescape(text: &str) -> String {
    let mut plain = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        plain += &rest[..at];
        let digits = rest.get(at + 1..at + 4);
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if byte.is_ascii() => {
                plain.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            _ => {
                plain.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    plain + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writable_disks_are_found_the_last_first() {
        let mountinfo = "\
            22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard\n\
            23 22 0:5 / /dev rw,nosuid shared:2 - devtmpfs devtmpfs rw\n\
            24 22 254:16 / /mnt/a\\040b rw - xfs /dev/vdb rw\n\
            25 22 254:0 /srv /bind rw - ext4 /dev/vda rw\n\
            26 22 254:32 / /ro ro - ext4 /dev/vdc ro\n\
            27 22 254:48 / /half ro - ext4 /dev/vdd rw\n\
            28 22 7:0 / /loop rw - ext4 /dev/loop0 rw\n\
            29 22 broken\n\
            - - -\n";
        assert_eq!(disks(mountinfo), ["/loop", "/mnt/a b", "/"]);
        assert_eq!(unescape(r"\134x\9\"), r"\x\9\");
    }
}
