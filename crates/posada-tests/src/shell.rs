//! Commands at a guest's shell, each with its output and exit status.

use crate::process::{Ended, Process};

/// Words that the kernel says when something is wrong.
const TROUBLE: [&str; 18] = [
    "Oops",
    "BUG:",
    "WARNING:",
    "Call Trace",
    "lockup",
    "stall",
    "blocked for more than",
    "scheduling while atomic",
    "general protection",
    "segfault",
    "traps:",
    "unable to handle",
    "I/O error",
    "EXT4-fs error",
    "nobody cared",
    "unexpected IRQ",
    "did not come online",
    "Marking TSC unstable",
];

/// A process at a POSIX shell's prompt.
pub struct Shell {
    process: Process,
    commands: u32,
}

/// What a command printed (both outputs) and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The command.
    pub command: String,
    /// Its output, without white space at both ends.
    pub output: String,
    /// Its exit status.
    pub status: u32,
}

impl Shell {
    /// Takes a process at a prompt and silences what it echoes.
    pub(crate) fn new(mut process: Process) -> Self {
        process.send("stty -echo; PS1= PS2=\n");
        let mut shell = Self { process, commands: 0 };
        shell.run("true").expect("");
        shell
    }

    /// Runs one command line and waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn run(&mut self, command: &str) -> Answer {
        self.commands += 1;
        let number = self.commands;
        // The marks are typed in two halves, so that a typed one that is echoed is not taken for a printed one.
        self.process.send(&format!(
            "echo begin''-{number}; {{ {command}\n}} 2>&1; echo end''-{number} $?-\n"
        ));
        self.process.expect(&format!("begin-{number}\n"));
        let output = self.process.until(&format!("end-{number} "));
        let status = self.process.until("-");
        Answer {
            command: command.to_string(),
            output: output.trim().to_string(),
            status: status.parse().expect("a shell's statuses are numbers"),
        }
    }

    /// Checks what the guest's Linux has said since its start.
    ///
    /// # Panics
    /// When that is something wrong.
    #[track_caller]
    pub fn kernel_is_well(&mut self) {
        self.run("dmesg --level=emerg,alert,crit,err").expect("");
        let log = self.run("dmesg").success().output.clone();
        assert!(log.contains("Linux version"), "the log is not whole: {log}");
        for line in log.lines() {
            let trouble = TROUBLE.iter().find(|word| line.contains(**word));
            assert!(trouble.is_none(), "the kernel says: {line}");
        }
    }

    /// After the guest has started anew and is at a prompt: the new shell.
    pub fn again(self) -> Self {
        Self::new(self.process)
    }

    /// Types something that is no command to wait for, such as `poweroff`.
    pub fn send(&mut self, text: &str) -> &mut Self {
        self.process.send(text);
        self
    }

    /// The process below.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for the end of the process.
    pub fn end(self) -> Ended {
        self.process.end()
    }
}

impl Answer {
    /// Checks that the command succeeded and printed just this.
    ///
    /// # Panics
    /// When not.
    #[track_caller]
    pub fn expect(&self, output: &str) -> &Self {
        self.success();
        assert_eq!(self.output, output, "the output of {:?}", self.command);
        self
    }

    /// Checks that the command succeeded and printed this among other things.
    ///
    /// # Panics
    /// When not.
    #[track_caller]
    pub fn contains(&self, part: &str) -> &Self {
        self.success();
        assert!(
            self.output.contains(part),
            "the output of {:?} has no {part:?}: {}",
            self.command,
            self.output
        );
        self
    }

    /// Checks that the command succeeded.
    ///
    /// # Panics
    /// When not.
    #[track_caller]
    pub fn success(&self) -> &Self {
        assert_eq!(self.status, 0, "the exit status of {:?}: {}", self.command, self.output);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    fn shell() -> Shell {
        Process::start(&mut Command::new("sh"), Duration::from_secs(20)).shell()
    }

    #[test]
    fn commands_read_like_sentences() {
        let mut shell = shell();
        shell.run("echo hello").expect("hello");
        shell.run("printf 'a\\nb'; echo c >&2").expect("a\nbc");
        shell.run("cat /proc/version # and a comment").contains("Linux");
        assert_eq!(shell.run("(exit 5)").status, 5);
        shell.send("exit 4\n");
        shell.end().expect_code(4);
    }

    #[test]
    #[should_panic(expected = "exit status of \"false\"")]
    fn a_command_that_fails_fails_the_test() {
        shell().run("false").expect("");
    }
}
