//! A process with pipes or a terminal, deadlines and a certain end.

use crate::shell::Shell;
use crate::terminal::{Settings, Terminal};
use crate::transcript::{Missing, Transcript};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long is waited for anything: long enough for a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Where a process runs: as a child of this one, or in a test host.
pub(crate) trait Body: Send {
    /// Sends it a signal.
    fn signal(&mut self, signal: i32) -> io::Result<()>;

    /// Waits until it has ended, and leaves it so.
    fn wait(&mut self, deadline: Instant) -> io::Result<()>;

    /// After its end: its exit code, or the signal that ended it.
    fn status(&mut self) -> io::Result<(Option<i32>, Option<i32>)>;

    /// Ends it if it has not ended.
    fn kill(&mut self);
}

/// A running process. Dropping it kills it.
pub struct Process {
    body: Box<dyn Body>,
    name: String,
    input: Box<dyn Write + Send>,
    output: Transcript,
    errors: Transcript,
    terminal: Option<Terminal>,
    /// How much of the output was looked at, in bytes.
    seen: usize,
    patience: Duration,
}

/// How a process ended.
#[derive(Clone, Debug)]
pub struct Ended {
    /// Its exit code, if no signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// All it wrote to standard output, without carriage returns.
    pub output: String,
    /// All it wrote to standard error.
    pub errors: String,
    /// How it left its terminal, if it had one.
    pub terminal: Option<Settings>,
}

impl Process {
    /// Starts `command`; `patience` is the deadline of everything that is waited for.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(command: &mut Command, patience: Duration) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self {
            input: Box::new(child.stdin.take().expect("it is piped")),
            output: Transcript::follow(child.stdout.take().expect("it is piped")),
            errors: Transcript::follow(child.stderr.take().expect("it is piped")),
            terminal: None,
            name: format!("{command:?}"),
            body: Box::new(child),
            seen: 0,
            patience,
        }
    }

    /// Takes a process that runs already.
    pub(crate) fn attach(
        name: String,
        body: impl Body + 'static,
        input: impl Write + Send + 'static,
        [output, errors]: [Transcript; 2],
        patience: Duration,
    ) -> Self {
        Self {
            body: Box::new(body),
            name,
            input: Box::new(input),
            output,
            errors,
            terminal: None,
            seen: 0,
            patience,
        }
    }

    /// Starts `command` on a new terminal. All that it prints is output, and keys may mean signals. Gives the terminal's
    /// settings before it came, too.
    ///
    /// # Panics
    /// When there is no terminal or it cannot be started.
    pub fn start_on_terminal(command: &mut Command, patience: Duration) -> (Self, Settings) {
        let start = |command: &mut Command| {
            let terminal = Terminal::for_command(command)?;
            let before = terminal.settings()?;
            let (input, output) = (terminal.person()?, terminal.person()?);
            Ok((command.spawn()?, terminal, before, input, output))
        };
        let name = format!("{command:?}");
        let (child, terminal, before, input, output) =
            start(command).unwrap_or_else(|error: io::Error| panic!("cannot start {name} on a terminal: {error}"));
        // The terminal ends when its last program does, so nothing of this process may hold that side.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let process = Self {
            input: Box::new(input),
            output: Transcript::follow(output),
            errors: Transcript::follow(io::empty()),
            terminal: Some(terminal),
            name,
            body: Box::new(child),
            seen: 0,
            patience,
        };
        (process, before)
    }

    /// The settings of its terminal now.
    ///
    /// # Panics
    /// When it has none.
    pub fn terminal_settings(&self) -> Settings {
        let terminal = self.terminal.as_ref().expect("it was started on a terminal");
        terminal.settings().expect("a terminal tells its settings")
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.patience
    }

    /// Waits until it prints `text`, behind what was waited for before.
    ///
    /// # Panics
    /// When it does not.
    pub fn expect(&mut self, text: &str) -> &mut Self {
        self.until(text);
        self
    }

    /// The same; gives what was printed before `text`.
    ///
    /// # Panics
    /// When it does not print it.
    pub fn until(&mut self, text: &str) -> String {
        match self.output.find(text, self.seen, self.deadline()) {
            Ok(at) => {
                let before = self.output.text()[self.seen..at].to_string();
                self.seen = at + text.len();
                before
            }
            Err(Missing::Late) => self.fail(&format!("{text:?} did not come within {:?}", self.patience)),
            Err(Missing::Closed) => self.fail(&format!("it ended before {text:?} came")),
        }
    }

    /// Types `text`.
    ///
    /// # Panics
    /// When it does not listen any more.
    pub fn send(&mut self, text: &str) -> &mut Self {
        if let Err(error) = self.input.write_all(text.as_bytes()).and_then(|()| self.input.flush()) {
            self.fail(&format!("it does not take {text:?}: {error}"));
        }
        self
    }

    /// A shell at whose prompt the guest is.
    ///
    /// # Panics
    /// When none answers.
    pub fn shell(self) -> Shell {
        Shell::new(self)
    }

    /// Sends it a signal, such as `libc::SIGTERM`.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&mut self, signal: i32) -> &mut Self {
        if let Err(error) = self.body.signal(signal) {
            self.fail(&format!("cannot signal it: {error}"));
        }
        self
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not come.
    pub fn end(mut self) -> Ended {
        if let Err(error) = self.body.wait(self.deadline()) {
            self.fail(&format!("it did not end within {:?}: {error}", self.patience));
        }
        let (code, signal) = self
            .body
            .status()
            .unwrap_or_else(|error| panic!("cannot tell how it ended: {error}"));
        for pipe in [&self.output, &self.errors] {
            if pipe.closed(self.deadline()).is_err() {
                self.fail("it ended and left a process behind that holds its pipes");
            }
        }
        Ended {
            code,
            signal,
            output: self.output.text(),
            errors: self.errors.text(),
            terminal: self.terminal.as_ref().map(|_| self.terminal_settings()),
        }
    }

    fn fail(&self, what: &str) -> ! {
        panic!(
            "{}: {what}{}",
            self.name,
            printed(&self.output.text(), &self.errors.text())
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.body.kill();
    }
}

impl Body for Child {
    fn signal(&mut self, signal: i32) -> io::Result<()> {
        // SAFETY: takes numbers; the child is not waited for yet, so its id is still its own.
        if unsafe { libc::kill(process_id(self), signal) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn wait(&mut self, deadline: Instant) -> io::Result<()> {
        // SAFETY: takes numbers and gives a descriptor that is ours alone.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, process_id(self), 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = i32::try_from(fd).expect("descriptors are small");
        // SAFETY: see above.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        loop {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let mut poll = libc::pollfd {
                fd: fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid entry.
            match unsafe { libc::poll(&raw mut poll, 1, i32::try_from(left).unwrap_or(i32::MAX)) } {
                0 => return Err(io::ErrorKind::TimedOut.into()),
                1.. => return Ok(()),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }

    fn status(&mut self) -> io::Result<(Option<i32>, Option<i32>)> {
        let status = Child::wait(self)?;
        Ok((status.code(), status.signal()))
    }

    fn kill(&mut self) {
        let _ = Child::kill(self);
        let _ = Child::wait(self);
    }
}

fn process_id(child: &Child) -> i32 {
    i32::try_from(child.id()).expect("Linux has no larger ids")
}

impl Ended {
    /// Checks its exit code.
    ///
    /// # Panics
    /// When it is another one.
    #[track_caller]
    pub fn expect_code(&self, code: i32) -> &Self {
        if self.code != Some(code) {
            self.fail(&format!("wanted exit code {code}"));
        }
        self
    }

    /// Fails with what was printed.
    ///
    /// # Panics
    /// Always.
    #[track_caller]
    pub fn fail(&self, what: &str) -> ! {
        let how = match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, Some(signal)) => format!("ended by signal {signal}"),
            (None, None) => "ended strangely".to_string(),
        };
        panic!("{what}, got: {how}{}", printed(&self.output, &self.errors));
    }
}

/// The last lines of what a process printed.
fn printed(output: &str, errors: &str) -> String {
    let tail = |text: &str| {
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    };
    format!(
        "\n--- standard output\n{}\n--- standard error\n{}\n---",
        tail(output),
        tail(errors)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Process {
        Process::start(Command::new("sh").args(["-c", script]), Duration::from_secs(20))
    }

    #[test]
    fn output_input_and_code_are_seen() {
        let mut process = sh("echo ready; read word; echo got $word; echo oops >&2; exit 7");
        assert_eq!(process.expect("ready\n").send("it\n").until("\n"), "got it");
        let ended = process.end();
        assert_eq!(ended.expect_code(7).errors, "oops\n");
        assert_eq!(ended.output, "ready\ngot it\n");
    }

    #[test]
    fn a_terminal_is_the_process_s_own() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "stty raw -echo -iexten; echo raw; read word; echo got $word; tty; exec sleep 1000",
        ]);
        let (mut process, before) = Process::start_on_terminal(&mut command, Duration::from_secs(20));
        process.expect("raw\n");
        assert!(!before.is_raw() && process.terminal_settings().is_raw());
        assert_eq!(process.send("it\n").until("\n"), "got it");
        process.expect("/dev/pts/").signal(libc::SIGTERM);
        let ended = process.end();
        assert_eq!(ended.signal, Some(libc::SIGTERM));
        assert!(ended.terminal.is_some_and(|left| left.is_raw()));
    }

    #[test]
    fn signals_are_told_from_codes() {
        let mut process = sh("echo up; exec sleep 1000");
        process.expect("up").signal(libc::SIGTERM);
        let ended = process.end();
        assert_eq!((ended.code, ended.signal), (None, Some(libc::SIGTERM)));
    }

    #[test]
    fn nothing_outlives_a_dropped_process() {
        let mut process = sh("echo $$; exec sleep 1000");
        let id = process.until("\n").parse().unwrap();
        drop(process);
        // SAFETY: signal 0 only asks.
        assert_eq!(unsafe { libc::kill(id, 0) }, -1);
    }

    #[test]
    #[should_panic(expected = "did not end within")]
    fn an_end_that_does_not_come_fails() {
        Process::start(Command::new("sleep").arg("1000"), Duration::from_millis(50)).end();
    }

    #[test]
    #[should_panic(expected = "it ended before \"never\" came")]
    fn an_end_before_the_text_fails() {
        sh("echo always").expect("never");
    }

    #[test]
    #[should_panic(expected = "wanted exit code 0, got: exit code 3")]
    fn another_code_fails() {
        sh("exit 3").end().expect_code(0);
    }
}
