//! A pseudo-terminal, seen from the side where a person sits.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::ptr;

/// A terminal with nobody on it. What is written to `person` is typed, what is read from it is on the screen.
pub(crate) struct Terminal {
    person: File,
}

/// How a terminal behaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    input: u32,
    output: u32,
    control: u32,
    local: u32,
    characters: Vec<u8>,
}

impl Settings {
    /// Whether every key goes to the program at once: no lines, no echo, no signals.
    pub fn is_raw(&self) -> bool {
        self.local & (libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN) == 0
            && self.input & (libc::ICRNL | libc::IXON) == 0
    }
}

impl Terminal {
    /// Opens one and makes it the standard streams and the controlling terminal of `command`.
    pub(crate) fn for_command(command: &mut Command) -> io::Result<Self> {
        let (mut person, mut program) = (-1, -1);
        // SAFETY: fills the two descriptors; the other arguments may be null.
        let opened = unsafe {
            libc::openpty(
                &raw mut person,
                &raw mut program,
                ptr::null_mut(),
                ptr::null(),
                ptr::null(),
            )
        };
        if opened != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `openpty` has just opened them, for nobody else.
        let (person, program) = unsafe { (OwnedFd::from_raw_fd(person), OwnedFd::from_raw_fd(program)) };
        // SAFETY: changes a flag of a descriptor of ours. The program shall not hold the person's side.
        unsafe { libc::fcntl(person.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
        command
            .stdin(program.try_clone()?)
            .stdout(program.try_clone()?)
            .stderr(Stdio::from(program));
        let take_terminal = || {
            // SAFETY: both calls may be made between fork and exec.
            if unsafe { libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 } {
                return Err(io::Error::last_os_error());
            }
            Ok(())
        };
        // SAFETY: see above.
        unsafe { command.pre_exec(take_terminal) };
        Ok(Self { person: person.into() })
    }

    /// The person's side.
    pub(crate) fn person(&self) -> io::Result<File> {
        self.person.try_clone()
    }

    /// The settings, which stay while this value lives, even with nobody on the terminal.
    pub(crate) fn settings(&self) -> io::Result<Settings> {
        let mut settings = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: fills `settings`, which are those of the program's side.
        if unsafe { libc::tcgetattr(self.person.as_raw_fd(), settings.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: filled.
        let settings = unsafe { settings.assume_init() };
        Ok(Settings {
            input: settings.c_iflag,
            output: settings.c_oflag,
            control: settings.c_cflag,
            local: settings.c_lflag,
            characters: settings.c_cc.into(),
        })
    }
}
