//! The test host of `tests/nested`: Linux with a real KVM, in the CPU that QEMU emulates. A command runs there as it runs
//! here, with the same paths, and a VM that it starts is a [`Process`] like any other.
//!
//! ```no_run
//! use posada_tests::{TestHost, small_linux};
//!
//! let Some(host) = TestHost::start() else { return };
//! host.run("test -c /dev/kvm").success();
//! let mut vm = small_linux().accel("kvm").start_in(&host);
//! vm.prompt();
//! vm.shell().run("nproc").expect("1");
//! ```

use crate::folder::Folder;
use crate::launch::posada;
use crate::process::{PATIENCE, Process};
use crate::session::{Control, Session, Slot};
use crate::shell::Answer;
use crate::transcript::Transcript;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Commands that run at a time, beside those of [`TestHost::run`].
const SLOTS: usize = 4;
/// How many times longer the emulated test host may need than this machine.
const SLOWDOWN: u32 = 4;
/// The largest archive that goes in or out, in bytes.
const TRANSFER: u64 = 8 << 30;

/// A running test host. It ends when dropped, with all that runs in it; what was written to its disks is lost.
pub struct TestHost {
    control: Arc<Control>,
    /// Archives go through this disk, /dev/vdd inside.
    transfer: PathBuf,
    _folder: Folder,
}

/// The frequency of this machine's time-stamp counter, which is the test host's too.
fn tsc_khz() -> u64 {
    let moment = || {
        // SAFETY: reads a counter.
        let tsc = || unsafe { std::arch::x86_64::_rdtsc() };
        // The shortest of many is one in which nothing came between.
        let reading = |_| {
            let (before, now) = (tsc(), Instant::now());
            (tsc() - before, before, now)
        };
        let (_, tsc, now) = (0..100)
            .map(reading)
            .min_by_key(|reading| reading.0)
            .expect("a hundred");
        (tsc, now)
    };
    let begin = moment();
    std::thread::sleep(Duration::from_millis(100));
    let end = moment();
    (end.0 - begin.0) * 1_000_000 / end.1.duration_since(begin.1).as_nanos() as u64
}

impl TestHost {
    /// Starts one and waits until it takes commands: a few seconds. Where QEMU is not installed, says so and gives none.
    ///
    /// # Panics
    /// When it does not start, or has no KVM.
    pub fn start() -> Option<Self> {
        if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
            eprintln!("SKIPPED: qemu-system-x86_64 is not installed, so there is no test host");
            return None;
        }
        let host = Self::try_start().unwrap_or_else(|error| panic!("cannot start the test host: {error}"));
        host.run("test -c /dev/kvm").expect("");
        Some(host)
    }

    fn try_start() -> io::Result<Self> {
        let folder = Folder::new();
        let transfer = folder.sparse("transfer.raw", TRANSFER);
        let (console, console_end) = io::pipe()?;
        let mut command = Command::new(script("host"));
        command
            .env("POSADA_NESTED", files())
            .env("POSADA_NESTED_TSC_KHZ", tsc_khz().to_string())
            .arg("-drive")
            .arg(format!("file={},format=raw,if=virtio", transfer.display()))
            .args(["-device", "virtio-serial-pci"])
            .stdin(Stdio::null())
            .stdout(console_end.try_clone()?)
            .stderr(console_end);
        let shell = port(&mut command, "shell")?;
        let mut slots = Vec::new();
        for number in 0..SLOTS {
            slots.push(Slot {
                number,
                input: port(&mut command, &format!("input{number}"))?,
                output: port(&mut command, &format!("output{number}"))?,
                errors: port(&mut command, &format!("errors{number}"))?,
            });
        }
        let child = command.spawn()?;
        // It holds its ends of the pipe and of the sockets, and nobody else may: their closing is its end.
        drop(command);
        let input = shell.try_clone()?;
        // What its kernel says is shown with everything that fails.
        let pipes = [Transcript::follow(shell), Transcript::follow(console)];
        let shell = Process::attach("the test host".into(), child, input, pipes, PATIENCE).shell();
        Ok(Self {
            control: Arc::new(Control {
                shell: Mutex::new(shell),
                slots: Mutex::new(slots),
            }),
            transfer,
            _folder: folder,
        })
    }

    /// Runs one command line of a shell in it and waits for its end.
    ///
    /// # Panics
    /// When it does not end in time.
    pub fn run(&self, line: &str) -> Answer {
        self.control.shell.lock().expect("no holder panics").run(line)
    }

    /// Starts a command in it, with the paths, the environment and the folder that `command` names. It is a process as
    /// one of this machine, but for its end by a signal, which is told as exit code 128 + signal.
    ///
    /// # Panics
    /// When the test host does not answer, or too many commands run.
    pub fn start_command(&self, command: &Command, patience: Duration) -> Process {
        let words = shell_words(command);
        let (session, input, streams) = Session::start(&self.control, &words)
            .unwrap_or_else(|error| panic!("cannot start {words} in the test host: {error}"));
        let name = format!("in the test host: {words}");
        Process::attach(name, session, input, streams, patience * SLOWDOWN)
    }

    /// Copies a file or folder of this machine into the folder `to` of the test host.
    ///
    /// # Panics
    /// When one of the two is not there.
    pub fn put(&self, from: &Path, to: &str) {
        let (folder, name) = parent_and_name(from);
        let disk = File::options().write(true).open(&self.transfer);
        let disk = disk.unwrap_or_else(|error| panic!("cannot write {}: {error}", self.transfer.display()));
        tar(Command::new("tar")
            .arg("-C")
            .arg(folder)
            .args(["--sparse", "-c", "--"])
            .arg(name)
            .stdout(disk));
        self.run(&format!(
            "tar -C {} --warning=no-timestamp -xf /dev/vdd",
            quoted(to.as_ref())
        ))
        .expect("");
    }

    /// Copies a file or folder of the test host into the folder `to` of this machine.
    ///
    /// # Panics
    /// When one of the two is not there.
    pub fn get(&self, from: &str, to: &Path) {
        let (folder, name) = parent_and_name(Path::new(from));
        let (folder, name) = (quoted(folder.as_os_str()), quoted(name));
        self.run(&format!("tar -C {folder} --sparse -cf /dev/vdd -- {name}"))
            .expect("");
        tar(Command::new("tar").arg("-C").arg(to).arg("-xf").arg(&self.transfer));
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/nested")
        .join(name)
}

/// The folder that it starts from, made when it is first wanted.
fn files() -> &'static Path {
    static FILES: OnceLock<PathBuf> = OnceLock::new();
    FILES.get_or_init(|| {
        let output = Command::new(script("build")).env("POSADA_BIN", posada()).output();
        let output = output.unwrap_or_else(|error| panic!("cannot run tests/nested/build: {error}"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "tests/nested/build fails: {errors}");
        String::from_utf8(output.stdout).expect("a path").trim().into()
    })
}

/// Adds a port to QEMU's command line, and gives our end of it.
fn port(command: &mut Command, name: &str) -> io::Result<UnixStream> {
    let (ours, theirs) = UnixStream::pair()?;
    let fd = theirs.as_raw_fd();
    command
        .args(["-chardev", &format!("socket,id={name},fd={fd}")])
        .args(["-device", &format!("virtserialport,chardev={name},name={name}")]);
    let keep = move || {
        // SAFETY: changes a flag of a descriptor, which the closure owns.
        match unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFD, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: it makes just one system call, which may be made between fork and exec.
    unsafe { command.pre_exec(keep) };
    Ok(ours)
}

fn parent_and_name(path: &Path) -> (&Path, &OsStr) {
    match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => (parent, name),
        _ => panic!("{} is no file with a name", path.display()),
    }
}

fn tar(command: &mut Command) {
    let status = command.status();
    assert!(status.is_ok_and(|status| status.success()), "{command:?} fails");
}

/// A word that a shell takes as it stands.
fn quoted(word: &OsStr) -> String {
    let word = word.to_str().expect("what tests say is text");
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// `command` as words for `env`, in a shell.
fn shell_words(command: &Command) -> String {
    let mut words = Vec::new();
    if let Some(folder) = command.get_current_dir() {
        words.push(format!("--chdir={}", quoted(folder.as_os_str())));
    }
    for (name, value) in command.get_envs() {
        let value = value.expect("nothing is unset");
        words.push(format!("{}={}", quoted(name), quoted(value)));
    }
    words.push(quoted(command.get_program()));
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_words_for_a_shell() {
        let mut command = Command::new("/bin/echo");
        command.args(["it's", "a  b", "$c"]).current_dir("/tmp").env("A", "1 2");
        let words = shell_words(&command);
        assert_eq!(words, r#"--chdir='/tmp' 'A'='1 2' '/bin/echo' 'it'\''s' 'a  b' '$c'"#);
        let shell = Command::new("sh")
            .args(["-c", &format!("env {words}")])
            .output()
            .unwrap();
        assert_eq!(shell.stdout, b"it's a  b $c\n");
    }
}
