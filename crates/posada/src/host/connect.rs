//! The daemon: `posada daemon`, and how a command finds it or starts it.

use anyhow::{Context, anyhow};
use clap::Args;
use posada_host::client::Api;
use posada_host::server;
use posada_host::store::{Places, StoreError};
use rustix::fs::{FlockOperation, flock};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

/// What a daemon says when clients can connect.
const READY: &str = "ready";

/// Run the host's daemon, which keeps VMs and serves the API
///
/// Commands start it by themselves when there is none. It ends by SIGTERM; VMs run on, and the next daemon adopts them.
#[derive(Args)]
pub struct DaemonArguments {
    /// Leave the terminal, and say "ready" on standard output when clients can connect
    #[arg(long, hide = true)]
    background: bool,
}

impl DaemonArguments {
    /// Whether its standard error is a file at which nobody looks.
    pub fn is_in_background(&self) -> bool {
        self.background
    }
}

/// Runs `posada daemon`.
pub fn daemon(arguments: &DaemonArguments) -> anyhow::Result<ExitCode> {
    let places = Places::of_user()?;
    if arguments.background {
        let _ = rustix::process::setsid();
    }
    server::serve(places, program()?, || {
        if arguments.background {
            println!("{READY}");
            // Nobody listens any more, and who has started it waits for the end of this.
            if let Ok(nothing) = OpenOptions::new().write(true).open("/dev/null") {
                let _ = rustix::stdio::dup2_stdout(&nothing);
            }
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

/// This program, also after it was replaced by a newer one.
fn program() -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe().context("the host does not say where posada is")?;
    let text = path.to_string_lossy();
    Ok(match text.strip_suffix(" (deleted)") {
        Some(replaced) => replaced.into(),
        None => path,
    })
}

/// This user's daemon, started if there is none.
pub fn api() -> anyhow::Result<Api> {
    let places = Places::of_user()?;
    ensure(&places)?;
    Ok(Api::of(&places, || {
        let places = Places::of_user().map_err(|error| error.to_string())?;
        ensure(&places).map_err(|error| crate::with_causes(&error))
    }))
}

/// Starts a daemon if there is none.
fn ensure(places: &Places) -> anyhow::Result<()> {
    let answers = || UnixStream::connect(places.socket()).is_ok();
    if answers() {
        return Ok(());
    }
    places.make_run()?;
    // One at a time: of many commands the first starts the daemon, and the others find it.
    let path = places.run.join("start.lock");
    let lock = open(&path, false).with_context(|| format!("cannot open {}", path.display()))?;
    flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("cannot lock {}", path.display()))?;
    if answers() {
        return Ok(());
    }
    start(places)
}

fn open(path: &PathBuf, truncate: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .write(true)
        .create(true)
        .truncate(truncate)
        .mode(0o600)
        .open(path)
}

fn start(places: &Places) -> anyhow::Result<()> {
    let path = places.daemon_log();
    let log = open(&path, true).with_context(|| format!("cannot write {}", path.display()))?;
    let mut daemon = Command::new(program()?)
        .args(["daemon", "--background"])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the daemon")?;
    let mut line = String::new();
    if let Some(output) = daemon.stdout.take() {
        let _ = BufReader::new(output).read_line(&mut line);
    }
    if line.trim() == READY {
        return Ok(());
    }
    let _ = daemon.wait();
    let said = std::fs::read_to_string(&path).unwrap_or_default();
    let last = said
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("it says nothing");
    let why = last.strip_prefix("posada: ").unwrap_or(last);
    Err(anyhow!("the daemon does not start: {why}"))
}

/// What standard output takes; a reader that has gone is no error.
pub fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// A word as a part of an address: a VM's name needs no escapes, anything else gets them.
pub fn part(word: &str) -> String {
    let mut text = String::new();
    for byte in word.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => text.push(byte as char),
            _ => text += &format!("%{byte:02X}"),
        }
    }
    if text.chars().all(|letter| letter == '.') {
        // "", "." and ".." would be another address.
        return "%20".into();
    }
    text
}

/// Whether there is a daemon at all.
pub fn has_store() -> Result<bool, StoreError> {
    Ok(Places::of_user()?.data.join("vms").exists())
}
