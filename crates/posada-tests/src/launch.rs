//! How a `posada` is started.

use crate::nested::TestHost;
use crate::process::{PATIENCE, Process};
use crate::terminal::Settings;
use std::env;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// For a Linux in a test host. QEMU's VMRUN forgets that an interrupt must not come between STI and HLT, so that an idle CPU
/// may sleep on with work to do, until its next interrupt: with this that is at most a tick away.
const TICK_WHEN_IDLE: &str = "nohz=off";

/// The binary under test: what `POSADA_BIN` names, else the release build of this workspace.
///
/// # Panics
/// When it is not there.
pub fn posada() -> PathBuf {
    let path = match env::var_os("POSADA_BIN") {
        Some(path) => path.into(),
        None => target().join("release/posada"),
    };
    assert!(
        path.is_file(),
        "{} is missing; run these tests by `make e2e`, which builds it",
        path.display()
    );
    path.canonicalize().expect("it was there a moment ago")
}

/// The software CPU under test, as `--accel` names it: `emulate=` and what `POSADA_SOFTWARE_CPU` says, else `emulate`.
///
/// # Panics
/// When the variable is not a text.
pub fn software_cpu() -> String {
    match env::var("POSADA_SOFTWARE_CPU") {
        Ok(how) => format!("emulate={how}"),
        Err(env::VarError::NotPresent) => "emulate".into(),
        Err(error) => panic!("POSADA_SOFTWARE_CPU: {error}"),
    }
}

/// A program of `guest/bare`.
///
/// # Panics
/// When it is not built.
pub fn bare_program(name: &str) -> PathBuf {
    let path = target().join("bare").join(name);
    assert!(path.is_file(), "{} is missing; run `make bare`", path.display());
    path.canonicalize().expect("it was there a moment ago")
}

/// The static agent.
///
/// # Panics
/// When it is not built.
pub fn agent_program() -> PathBuf {
    let path = target().join("agent/posada-agent");
    assert!(path.is_file(), "{} is missing; run `make agent`", path.display());
    path
}

fn target() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(path) => path.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"),
    }
}

/// A command line of `posada`, in the making.
#[derive(Clone, Debug)]
pub struct Launch {
    arguments: Vec<OsString>,
    folder: Option<PathBuf>,
    patience: Duration,
}

impl Launch {
    /// `posada run` with the software CPU ([`software_cpu`]) and the console on its standard input and output.
    pub fn run() -> Self {
        Self {
            arguments: ["run", "--accel", &software_cpu(), "--console", "stdio"]
                .map(OsString::from)
                .into(),
            folder: None,
            patience: PATIENCE,
        }
    }

    /// Any other `posada` command.
    pub fn command<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Self {
        Self {
            arguments: arguments.into_iter().map(|argument| argument.as_ref().into()).collect(),
            folder: None,
            patience: PATIENCE,
        }
    }

    /// One more argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().into());
        self
    }

    /// `--accel`, instead of the software CPU.
    ///
    /// # Panics
    /// When this is no `posada run`.
    #[must_use]
    pub fn accel(mut self, name: &str) -> Self {
        let option = self.arguments.iter().position(|argument| argument == "--accel");
        self.arguments[option.expect("it is a run") + 1] = name.into();
        self
    }

    /// `--kernel`.
    #[must_use]
    pub fn kernel(self, path: impl AsRef<Path>) -> Self {
        self.arg("--kernel").arg(path.as_ref())
    }

    /// `--initramfs`.
    #[must_use]
    pub fn initramfs(self, path: impl AsRef<Path>) -> Self {
        self.arg("--initramfs").arg(path.as_ref())
    }

    /// `--cmdline`.
    #[must_use]
    pub fn cmdline(self, text: &str) -> Self {
        self.arg("--cmdline").arg(text)
    }

    /// `--disk`, with `,ro` behind the path if it shall not be written.
    #[must_use]
    pub fn disk(self, path: impl AsRef<OsStr>) -> Self {
        self.arg("--disk").arg(path)
    }

    /// `--cpus`.
    #[must_use]
    pub fn cpus(self, count: u32) -> Self {
        self.arg("--cpus").arg(count.to_string())
    }

    /// `--memory`.
    #[must_use]
    pub fn memory(self, size: &str) -> Self {
        self.arg("--memory").arg(size)
    }

    /// Where the process runs and puts temporary files.
    #[must_use]
    pub fn folder(mut self, path: impl AsRef<Path>) -> Self {
        self.folder = Some(path.as_ref().into());
        self
    }

    /// The deadline of everything that is waited for, instead of two minutes.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When there is no binary.
    pub fn start(&self) -> Process {
        Process::start(&mut self.as_command(), self.patience)
    }

    /// Starts it in a test host, where paths mean what they mean here; a Linux keeps its ticks there when it is idle.
    ///
    /// # Panics
    /// When the test host does not answer.
    pub fn start_in(&self, host: &TestHost) -> Process {
        let mut launch = self.clone();
        if let Some(option) = launch.arguments.iter().position(|argument| argument == "--cmdline") {
            launch.arguments[option + 1].push(format!(" {TICK_WHEN_IDLE}"));
        }
        host.start_command(&launch.as_command(), launch.patience)
    }

    /// Starts it on a new terminal; gives the terminal's settings before it came, too.
    ///
    /// # Panics
    /// When there is no binary or no terminal.
    pub fn start_on_terminal(&self) -> (Process, Settings) {
        Process::start_on_terminal(&mut self.as_command(), self.patience)
    }

    /// The command itself.
    ///
    /// # Panics
    /// When there is no binary.
    pub fn as_command(&self) -> Command {
        let mut command = Command::new(posada());
        command.args(&self.arguments);
        if let Some(folder) = &self.folder {
            command.current_dir(folder).env("TMPDIR", folder);
        }
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_is_a_command_line() {
        let launch = Launch::run()
            .accel("kvm")
            .kernel("k")
            .cpus(2)
            .memory("64M")
            .disk("d,ro")
            .arg("--debug-exit");
        let line = launch.arguments.join(OsStr::new(" "));
        assert_eq!(
            line,
            "run --accel kvm --console stdio --kernel k --cpus 2 --memory 64M --disk d,ro --debug-exit"
        );
    }
}
