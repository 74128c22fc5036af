//! Runs a program for the host. One loop carries its bytes both ways and never waits for one of the two alone: input is held
//! up to the window that the host knows, and output is read only when what was read before is on its way.

use crate::session::Refusal;
use crate::system::System;
use crate::user::User;
use posada_protocol::{
    Answer, Channel, Decoder, Exec, Failure, Frame, FrameError, Order, Size, Status, WINDOW, write_data, write_message,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Gid, Pid, PidfdFlags, Signal, Uid, kill_process_group, pidfd_open};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Bytes that are read of a program's output at a time.
const CHUNK: usize = 32 << 10;
/// The most bytes in a pipe: what a program can have written before its end. More is of those who have inherited its pipes.
const LAST: usize = 1 << 20;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs `exec` to its end, or refuses it; an error is one of the connection.
pub fn run(stream: &mut File, system: &System, exec: &Exec) -> anyhow::Result<Result<(), Refusal>> {
    let running = match start(system, exec) {
        Ok(running) => running,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let pid = running.child.id();
    let mut session = Session {
        stream,
        decoder: Decoder::default(),
        outgoing: VecDeque::new(),
        input: VecDeque::new(),
        input_ended: !exec.input,
        last: LAST,
        running,
    };
    let served = session.serve(pid);
    // Without its host a program has no use; it may decide otherwise by a handler.
    session.running.hang_up();
    served.map(Ok)
}

/// A program that runs.
struct Running {
    child: Child,
    /// Readable when it has ended.
    exit: OwnedFd,
    ended: Option<Status>,
    terminal: bool,
    input: Option<File>,
    output: Option<File>,
    errors: Option<File>,
}

impl Running {
    fn group(&self) -> Option<Pid> {
        Pid::from_raw(self.child.id() as i32)
    }

    fn signal(&self, number: i32) {
        // The group may outlive the program, but then its number is not ours any more.
        if let (None, Some(group), Some(signal)) = (self.ended, self.group(), Signal::from_named_raw(number)) {
            let _ = kill_process_group(group, signal);
        }
    }

    fn resize(&self, size: Size) {
        if let (true, Some(terminal)) = (self.terminal, &self.output) {
            let _ = rustix::termios::tcsetwinsize(terminal, winsize(size));
        }
    }

    /// Ends what is still there, and leaves no zombie.
    fn hang_up(&mut self) {
        self.signal(libc::SIGHUP);
        (self.input, self.output, self.errors) = (None, None, None);
        if self.ended.is_none() {
            let _ = self.child.wait();
        }
    }
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn nonblocking(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::io::ioctl_fionbio(fd, true)?)
}

fn refuse(what: &str) -> impl Fn(io::Error) -> Refusal + '_ {
    move |error| Refusal::of(what, &error)
}

fn start(system: &System, exec: &Exec) -> Result<Running, Refusal> {
    let Some((program, arguments)) = exec.command.split_first() else {
        return Err(Refusal::new(Failure::Invalid, "the command is empty"));
    };
    let name = exec.user.as_deref().unwrap_or("0");
    let user = User::find(system, name)?;
    let directory = match &exec.directory {
        Some(directory) => directory,
        None if Path::new(&user.home).is_dir() => &user.home,
        None => "/",
    };
    if !Path::new(directory).is_dir() {
        return Err(Refusal::new(
            Failure::Invalid,
            format!("there is no directory {directory}"),
        ));
    }
    let mut command = Command::new(program);
    command.args(arguments).env_clear().env("PATH", PATH);
    command.env("HOME", &user.home).env("SHELL", &user.shell);
    command.env("USER", &user.name).env("LOGNAME", &user.name);
    if exec.terminal.is_some() {
        command.env("TERM", "xterm-256color");
    }
    for (name, value) in &exec.environment {
        let possible = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
        if !possible {
            let message = format!("{name:?} cannot be set in an environment");
            return Err(Refusal::new(Failure::Invalid, message));
        }
        command.env(name, value);
    }
    become_user(&mut command, &user, directory)?;
    let failed = refuse("cannot start a program");
    let terminal = match exec.terminal {
        Some(size) => Some(on_terminal(&mut command, &user, size).map_err(refuse("cannot open a terminal"))?),
        None => {
            command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.stdin(if exec.input { Stdio::piped() } else { Stdio::null() });
            None
        }
    };
    let mut child = command
        .spawn()
        .map_err(|error| Refusal::of(format!("cannot run {program}"), &error))?;
    // It holds the terminal's other end.
    drop(command);
    let pid = Pid::from_child(&child);
    let exit = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| failed(error.into()))?;
    let is_terminal = terminal.is_some();
    let (input, output, errors) = match terminal {
        Some(master) => {
            let copy = master.try_clone().map_err(&failed)?;
            (Some(copy), Some(master), None)
        }
        None => {
            let file = |fd: OwnedFd| File::from(fd);
            (
                child.stdin.take().map(|pipe| file(pipe.into())),
                child.stdout.take().map(|pipe| file(pipe.into())),
                child.stderr.take().map(|pipe| file(pipe.into())),
            )
        }
    };
    for file in [&input, &output, &errors].into_iter().flatten() {
        nonblocking(file).map_err(&failed)?;
    }
    Ok(Running {
        child,
        exit,
        ended: None,
        terminal: is_terminal,
        input,
        output,
        errors,
    })
}

/// Has the program run as `user` in `directory`.
fn become_user(command: &mut Command, user: &User, directory: &str) -> Result<(), Refusal> {
    let directory =
        CString::new(directory).map_err(|_| Refusal::new(Failure::Invalid, "a directory's name has no zero byte"))?;
    let groups: Vec<_> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    // Whoever is not root, as in tests, can only be who he is.
    let changes = rustix::process::getuid() != uid || uid.is_root();
    let change = move || {
        if changes {
            rustix::thread::set_thread_groups(&groups)?;
            rustix::thread::set_thread_res_gid(gid, gid, gid)?;
            rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        }
        // With the user's rights.
        Ok(rustix::process::chdir(&directory)?)
    };
    // SAFETY: between fork and exec it makes system calls only, of a process with one thread, and takes no memory.
    unsafe { command.pre_exec(change) };
    Ok(())
}

/// Has the program run on a new terminal, as leader of a session; gives our end.
fn on_terminal(command: &mut Command, user: &User, size: Size) -> io::Result<File> {
    let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let path = name.to_str().map_err(io::Error::other)?;
    let slave = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)?;
    rustix::termios::tcsetwinsize(&slave, winsize(size))?;
    // It is its user's; only root can have another one's.
    let _ = rustix::fs::fchown(&slave, Some(Uid::from_raw(user.uid)), None);
    command
        .stdin(slave.try_clone()?)
        .stdout(slave.try_clone()?)
        .stderr(slave);
    let lead = || {
        rustix::process::setsid()?;
        Ok(rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?)
    };
    // SAFETY: between fork and exec it makes system calls only.
    unsafe { command.pre_exec(lead) };
    Ok(master.into())
}

struct Session<'a> {
    stream: &'a mut File,
    decoder: Decoder,
    /// Frames for the host.
    outgoing: VecDeque<u8>,
    /// For the program, at most [`WINDOW`] bytes.
    input: VecDeque<u8>,
    input_ended: bool,
    /// Bytes of output that are still read once the program has ended.
    last: usize,
    running: Running,
}

/// What there is to do.
#[derive(Default)]
struct Ready {
    host: bool,
    output: bool,
    errors: bool,
    exit: bool,
}

impl Session<'_> {
    fn serve(&mut self, pid: u32) -> anyhow::Result<()> {
        nonblocking(&*self.stream)?;
        write_message(&mut self.outgoing, &Answer::Started { pid })?;
        loop {
            let ready = self.wait()?;
            // Before the output is read: what the program has written is there then.
            if ready.exit {
                self.note_end()?;
            }
            if ready.host && !self.hear()? {
                return Ok(());
            }
            self.feed();
            if ready.output || self.running.ended.is_some() {
                self.collect(Channel::Output)?;
            }
            if ready.errors || self.running.ended.is_some() {
                self.collect(Channel::Errors)?;
            }
            if let Some(status) = self.running.ended
                && self.outgoing.is_empty()
            {
                write_message(&mut self.outgoing, &Answer::Ended { status })?;
                rustix::io::ioctl_fionbio(&*self.stream, false)?;
                let rest: Vec<u8> = self.outgoing.drain(..).collect();
                return Ok(self.stream.write_all(&rest)?);
            }
            self.send()?;
        }
    }

    fn wait(&self) -> io::Result<Ready> {
        let (running, quiet) = (&self.running, self.outgoing.is_empty());
        let mut fds = Vec::new();
        let host = if quiet {
            PollFlags::IN
        } else {
            PollFlags::IN | PollFlags::OUT
        };
        let host = watch(&mut fds, Some(&*self.stream), host);
        let hungry = running.input.as_ref().filter(|_| !self.input.is_empty());
        watch(&mut fds, hungry, PollFlags::OUT);
        let output = watch(&mut fds, running.output.as_ref().filter(|_| quiet), PollFlags::IN);
        let errors = watch(&mut fds, running.errors.as_ref().filter(|_| quiet), PollFlags::IN);
        let exit = Some(&running.exit).filter(|_| running.ended.is_none());
        let exit = watch(&mut fds, exit, PollFlags::IN);
        let at_once = (running.ended.is_some() && quiet).then(Default::default);
        loop {
            match poll(&mut fds, at_once.as_ref()) {
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let any = |range: Range<usize>| fds[range].iter().any(|fd| !fd.revents().is_empty());
        let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        Ok(Ready {
            host: fds[host].iter().any(|fd| fd.revents().intersects(readable)),
            output: any(output),
            errors: any(errors),
            exit: any(exit),
        })
    }

    fn note_end(&mut self) -> io::Result<()> {
        if let Some(status) = self.running.child.try_wait()? {
            self.running.ended = Some(match (status.code(), status.signal()) {
                (Some(code), _) => Status::Exited(code),
                (None, signal) => Status::Killed(signal.unwrap_or(0)),
            });
        }
        Ok(())
    }

    /// Hears what the host says; false when it has gone.
    fn hear(&mut self) -> anyhow::Result<bool> {
        let mut bytes = [0; 16 << 10];
        let count = match self.stream.read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(error) if is_later(&error) => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        self.decoder.push(&bytes[..count]);
        while let Some(frame) = self.decoder.next_frame()? {
            match frame {
                Frame::Data(Channel::Input, bytes) if bytes.is_empty() => self.input_ended = true,
                Frame::Data(Channel::Input, bytes) => {
                    if self.input_ended || self.input.len() + bytes.len() > WINDOW {
                        anyhow::bail!("the host sends more input than there is room for");
                    }
                    self.input.extend(bytes);
                }
                order => match order.message()? {
                    Order::Signal { number } => self.running.signal(number),
                    Order::Resize(size) => self.running.resize(size),
                    Order::Thaw => anyhow::bail!("the host takes a program for a file system"),
                },
            }
        }
        Ok(true)
    }

    /// Gives the program its input.
    fn feed(&mut self) {
        let mut taken = 0;
        while !self.input.is_empty() {
            let written = match &mut self.running.input {
                Some(pipe) => pipe.write(self.input.as_slices().0),
                // It wants none.
                None => Ok(self.input.len()),
            };
            match written {
                Ok(count) => {
                    self.input.drain(..count);
                    taken += count;
                }
                Err(error) if is_later(&error) => break,
                Err(_) => self.running.input = None,
            }
        }
        if taken > 0 {
            let bytes = taken as u32;
            write_message(&mut self.outgoing, &Answer::Taken { bytes }).expect("memory takes it");
        }
        if self.input_ended && self.input.is_empty() && !self.running.terminal {
            self.running.input = None;
        }
    }

    /// Takes what the program has written, if the host has what it wrote before.
    fn collect(&mut self, channel: Channel) -> Result<(), FrameError> {
        let pipe = match channel {
            Channel::Errors => &mut self.running.errors,
            _ => &mut self.running.output,
        };
        let most = if self.running.ended.is_some() { self.last } else { CHUNK };
        let Some(file) = pipe.as_mut().filter(|_| self.outgoing.len() < CHUNK && most > 0) else {
            return Ok(());
        };
        let mut bytes = [0; CHUNK];
        match file.read(&mut bytes[..most.min(CHUNK)]) {
            Ok(count) if count > 0 => {
                write_data(&mut self.outgoing, channel, &bytes[..count])?;
                if self.running.ended.is_some() {
                    self.last -= count;
                }
            }
            Err(error) if is_later(&error) => {}
            // The end; of a terminal, EIO.
            _ => *pipe = None,
        }
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match self.stream.write(self.outgoing.as_slices().0) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if is_later(&error) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Adds a descriptor, if it is there; gives its place.
fn watch<'f>(fds: &mut Vec<PollFd<'f>>, fd: Option<&'f impl AsFd>, flags: PollFlags) -> Range<usize> {
    let at = fds.len();
    fds.extend(fd.map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), flags)));
    at..fds.len()
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
