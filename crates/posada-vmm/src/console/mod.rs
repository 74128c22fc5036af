//! The console: what COM1 (or the virtio console) is connected to on the host.
//!
//! On a terminal Ctrl-A begins a command: `x` ends the VM, `h` lists the commands, Ctrl-A sends Ctrl-A. Input that is not a
//! terminal is passed on as it is, and its end does not end the VM.

mod escape;
mod terminal;

pub use terminal::{RawMode, restore as restore_terminal};

use crate::control::{Control, Ending};
use crate::notify::Notify;
use escape::{Action, Escape};
use posada_devices::serial::{Flush, Serial};
use posada_devices::virtio::console::Console as VirtioConsole;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

/// Input that may wait for the guest before no more is read, in bytes.
const MOST_WAITING: usize = 64 << 10;
/// How long until it is looked again whether the guest has taken some of that.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

const HELP: &[u8] = b"\r\nCtrl-A x       end the VM\r\nCtrl-A h       this list\r\nCtrl-A Ctrl-A  send Ctrl-A\r\n";

/// What `--console` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleConfig {
    /// Standard input and output.
    Stdio,
    /// Output into a file, no input.
    File(PathBuf),
    /// No output, no input.
    None,
}

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be written.
    #[error("cannot write the console to {}: {source}; give another --console", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Standard input or output cannot be used.
    #[error("cannot use standard input and output as the console: {0}; give --console none or file:PATH")]
    Stdio(io::Error),
}

/// Who takes input.
pub(crate) enum Sink {
    /// COM1.
    Com1(Arc<Serial>),
    /// The virtio console.
    Virtio(Arc<VirtioConsole>),
}

impl Sink {
    fn input(&self, bytes: &[u8]) {
        match self {
            Sink::Com1(serial) => serial.input(bytes),
            Sink::Virtio(console) => console.input(bytes),
        }
    }

    fn waiting(&self) -> usize {
        match self {
            Sink::Com1(serial) => serial.input_waiting(),
            Sink::Virtio(console) => console.input_waiting(),
        }
    }
}

#[derive(Default)]
struct WireState {
    sink: Option<Sink>,
    /// Came while the VM was being reset.
    early: Vec<u8>,
    closed: bool,
}

/// From the input's thread to the machine of the life.
#[derive(Default)]
struct Wire {
    state: Mutex<WireState>,
    closed: Condvar,
}

impl Wire {
    fn lock(&self) -> MutexGuard<'_, WireState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn feed(&self, bytes: &[u8]) {
        let mut state = self.lock();
        match &state.sink {
            Some(sink) => sink.input(bytes),
            None => state.early.extend_from_slice(bytes),
        }
    }

    /// Waits until the guest has taken its input; false once closed.
    fn wait_for_room(&self) -> bool {
        let mut state = self.lock();
        loop {
            let waiting = state.sink.as_ref().map_or(state.early.len(), Sink::waiting);
            if state.closed || waiting < MOST_WAITING {
                return !state.closed;
            }
            state = match self.closed.wait_timeout(state, LOOK_AGAIN) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }
}

enum Output {
    Writer(File, Flush),
    Nothing,
}

/// An open console. Dropping it restores the terminal.
pub(crate) struct Console {
    output: Output,
    wire: Arc<Wire>,
    stop: Arc<Notify>,
    reader: Option<JoinHandle<()>>,
    raw: Option<RawMode>,
}

impl Console {
    /// Opens it. Input and escapes go on from here; `control` is told when the user wants out.
    pub(crate) fn open(config: &ConsoleConfig, control: &Arc<Control>) -> Result<Self, Error> {
        let output = match config {
            ConsoleConfig::Stdio => {
                let stdout = io::stdout().as_fd().try_clone_to_owned().map_err(Error::Stdio)?;
                Output::Writer(stdout.into(), Flush::Byte)
            }
            ConsoleConfig::File(path) => {
                let file = File::create(path).map_err(|source| Error::File {
                    path: path.clone(),
                    source,
                })?;
                Output::Writer(file, Flush::Line)
            }
            ConsoleConfig::None => Output::Nothing,
        };
        let mut console = Self {
            output,
            wire: Arc::default(),
            stop: Arc::new(Notify::new().map_err(Error::Stdio)?),
            reader: None,
            raw: None,
        };
        if *config == ConsoleConfig::Stdio {
            console.read_stdin(control).map_err(Error::Stdio)?;
        }
        Ok(console)
    }

    fn read_stdin(&mut self, control: &Arc<Control>) -> io::Result<()> {
        let stdin = io::stdin();
        let mut escape = None;
        if stdin.is_terminal() {
            self.raw = Some(RawMode::enter()?);
            escape = Some(Escape::default());
        }
        let input = File::from(stdin.as_fd().try_clone_to_owned()?);
        let (wire, stop, control) = (self.wire.clone(), self.stop.clone(), control.clone());
        let reader = std::thread::Builder::new()
            .name("console".into())
            .stack_size(128 << 10)
            .spawn(move || {
                if let Err(error) = copy(input, escape, &wire, &stop, &control) {
                    tracing::warn!(%error, "console input has ended");
                }
            })?;
        self.reader = Some(reader);
        Ok(())
    }

    /// A writer for a machine, and when it wants to be flushed.
    pub(crate) fn writer(&self) -> io::Result<(Box<dyn Write + Send>, Flush)> {
        Ok(match &self.output {
            Output::Writer(file, flush) => (Box::new(file.try_clone()?), *flush),
            Output::Nothing => (Box::new(io::sink()), Flush::Line),
        })
    }

    /// Input goes to `sink` from now on, what has come before first; `None`: it waits.
    pub(crate) fn connect(&self, sink: Option<Sink>) {
        let mut state = self.wire.lock();
        if let Some(sink) = &sink {
            sink.input(&std::mem::take(&mut state.early));
        }
        state.sink = sink;
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.wire.lock().closed = true;
        self.wire.closed.notify_all();
        self.stop.signal();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        drop(self.raw.take());
    }
}

/// The input's thread: to the end of input, or until told to stop.
fn copy(mut input: File, mut escape: Option<Escape>, wire: &Wire, stop: &Notify, control: &Control) -> io::Result<()> {
    let mut buffer = [0; 4096];
    let mut pass = Vec::new();
    // Leaving the console must work while the guest takes no input, so a terminal is read on; nobody types that much.
    while escape.is_some() || wire.wait_for_room() {
        if let (true, _) = stop.wait_with(input.as_fd())? {
            return Ok(());
        }
        let length = match input.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => continue,
            Err(error) => return Err(error),
        };
        let Some(escape) = &mut escape else {
            wire.feed(&buffer[..length]);
            continue;
        };
        pass.clear();
        for byte in &buffer[..length] {
            match escape.key(*byte) {
                Action::Pass(byte) => pass.push(byte),
                Action::Nothing => {}
                Action::Help => io::stderr().write_all(HELP)?,
                Action::Quit => control.end(Ending::Quit),
            }
        }
        wire.feed(&pass);
    }
    Ok(())
}
