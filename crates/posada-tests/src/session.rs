//! A command of a test host, seen from outside: its streams are sockets, its end is a mark on them.

use crate::process::Body;
use crate::shell::Shell;
use crate::transcript::Transcript;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// Begins and ends the mark, with the exit status between. No text has it.
const MARK: u8 = 0x1e;
/// How long a killed command may take to be gone.
const KILLED: Duration = Duration::from_secs(30);

/// Three ports of the test host on which commands run, one after the other.
pub(crate) struct Slot {
    pub(crate) number: usize,
    /// Standard input, apart from the output: in Linux's driver (6.1) who polls a port may take the news that it can be
    /// written to again from who waits for that, and a VM's console polls its input.
    pub(crate) input: UnixStream,
    /// Standard output.
    pub(crate) output: UnixStream,
    /// Standard error.
    pub(crate) errors: UnixStream,
}

/// The test host's shell, and the slots where nothing runs.
pub(crate) struct Control {
    pub(crate) shell: Mutex<Shell>,
    pub(crate) slots: Mutex<Vec<Slot>>,
}

/// A command that runs, or has run, on a slot.
pub(crate) struct Session {
    control: Arc<Control>,
    /// There until it is given back.
    slot: Option<Slot>,
    output: Transcript,
    errors: Transcript,
    status: Arc<OnceLock<i32>>,
}

impl Session {
    /// Starts the words of `command`, quoted for a shell, on a free slot.
    ///
    /// # Panics
    /// When there is none.
    pub(crate) fn start(control: &Arc<Control>, command: &str) -> io::Result<(Self, UnixStream, [Transcript; 2])> {
        let slot = control.slots.lock().expect("no holder panics").pop();
        let slot = slot.expect("a test host runs only a few commands at a time");
        let (status, input) = (Arc::new(OnceLock::new()), slot.input.try_clone()?);
        let output = Transcript::follow(Marked::new(slot.output.try_clone()?, status.clone()));
        let errors = Transcript::follow(Marked::new(slot.errors.try_clone()?, Arc::default()));
        let number = slot.number;
        // A shell has its background commands ignore SIGINT; a port is free again when the last command on it is gone.
        let line = format!(
            "[ -z \"$job{number}\" ] || wait $job{number}; rm -f /run/{number}.pid
            (env --default-signal=INT,QUIT sh -c 'echo $$ >/run/{number}.pid; exec env \"$@\"' sh {command}
            code=$?; printf '\\036%d\\036' $code; printf '\\036%d\\036' $code >&2
            ) </dev/ports/input{number} >/dev/ports/output{number} 2>/dev/ports/errors{number} & job{number}=$!"
        );
        control.shell.lock().expect("no holder panics").run(&line).expect("");
        let session = Self {
            control: control.clone(),
            slot: Some(slot),
            output: output.clone(),
            errors: errors.clone(),
            status,
        };
        Ok((session, input, [output, errors]))
    }

    fn closed(&self, deadline: Instant) -> io::Result<()> {
        for stream in [&self.output, &self.errors] {
            stream.closed(deadline).map_err(|_| io::ErrorKind::TimedOut)?;
        }
        Ok(())
    }
}

impl Body for Session {
    fn signal(&mut self, signal: i32) -> io::Result<()> {
        let number = self.slot.as_ref().expect("it has not ended").number;
        let line =
            format!("until [ -s /run/{number}.pid ]; do usleep 1000; done; kill -{signal} $(cat /run/{number}.pid)");
        let answer = self.control.shell.lock().expect("no holder panics").run(&line);
        match answer.status {
            0 => Ok(()),
            _ => Err(io::Error::other(answer.output)),
        }
    }

    fn wait(&mut self, deadline: Instant) -> io::Result<()> {
        self.closed(deadline)
    }

    /// The end by a signal is told as shells do: as exit code 128 + signal.
    fn status(&mut self) -> io::Result<(Option<i32>, Option<i32>)> {
        let status = self.status.get();
        let status = status.ok_or_else(|| io::Error::other("the test host has ended before it"))?;
        Ok((Some(*status), None))
    }

    fn kill(&mut self) {
        // The test fails and takes the test host with it.
        if thread::panicking() {
            return;
        }
        if self.status.get().is_none() {
            let _ = self.signal(libc::SIGKILL);
        }
        if self.closed(Instant::now() + KILLED).is_ok()
            && self.status.get().is_some()
            && let Some(slot) = self.slot.take()
        {
            self.control.slots.lock().expect("no holder panics").push(slot);
        }
    }
}

/// A stream up to the mark.
struct Marked<R> {
    stream: R,
    status: Arc<OnceLock<i32>>,
    /// Read, and not given on.
    held: Vec<u8>,
}

enum Found {
    /// So many bytes that are not of a mark.
    Text(usize),
    /// The mark.
    Status(i32),
    /// Nothing, or the beginning of a mark.
    Unclear,
}

fn find(held: &[u8]) -> Found {
    match held.iter().position(|byte| *byte == MARK) {
        None if held.is_empty() => Found::Unclear,
        None => Found::Text(held.len()),
        Some(0) => {
            let digits = held[1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            match held.get(1 + digits) {
                None => Found::Unclear,
                Some(&MARK) => match std::str::from_utf8(&held[1..=digits]).unwrap_or("").parse() {
                    Ok(status) => Found::Status(status),
                    Err(_) => Found::Text(1),
                },
                Some(_) => Found::Text(1),
            }
        }
        Some(before) => Found::Text(before),
    }
}

impl<R> Marked<R> {
    fn new(stream: R, status: Arc<OnceLock<i32>>) -> Self {
        Self {
            stream,
            status,
            held: Vec::new(),
        }
    }
}

impl<R: Read> Read for Marked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match find(&self.held) {
                Found::Text(length) => {
                    let length = length.min(buffer.len());
                    buffer[..length].copy_from_slice(&self.held[..length]);
                    self.held.drain(..length);
                    return Ok(length);
                }
                Found::Status(status) => {
                    let _ = self.status.set(status);
                    return Ok(0);
                }
                Found::Unclear => {
                    let mut more = [0; 4096];
                    match self.stream.read(&mut more)? {
                        0 => return Ok(0),
                        length => self.held.extend_from_slice(&more[..length]),
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one byte at a time.
    struct Dripping<'a>(&'a [u8]);

    impl Read for Dripping<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some((first, rest)) = self.0.split_first() else {
                return Ok(0);
            };
            buffer[0] = *first;
            self.0 = rest;
            Ok(1)
        }
    }

    fn text_and_status(stream: impl Read) -> (String, Option<i32>) {
        let status = Arc::default();
        let mut text = String::new();
        Marked::new(stream, Arc::clone(&status))
            .read_to_string(&mut text)
            .unwrap();
        (text, status.get().copied())
    }

    #[test]
    fn a_stream_ends_at_its_mark_however_it_comes() {
        let bytes = b"up\n\x1e12x\x1e\x1e137\x1emore";
        let wanted = ("up\n\x1e12x\x1e".to_string(), Some(137));
        assert_eq!(text_and_status(&bytes[..]), wanted);
        assert_eq!(text_and_status(Dripping(bytes)), wanted);
        assert_eq!(text_and_status(&b"cut\x1e1"[..]), ("cut".to_string(), None));
    }
}
