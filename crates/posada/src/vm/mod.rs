//! `posada vm NAME`: a VM of the daemon, in a process that lives as long as the VM does, whatever becomes of the daemon.

mod console;

use crate::{run, signals};
use anyhow::{Context, anyhow};
use clap::Args;
use console::Console;
use posada_host::process::{SOCKETS, start_time_of};
use posada_host::store::{self, Exit, Folder, Holder, Lock, Places};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

/// Run a VM of the daemon's store; the daemon starts these itself
#[derive(Args)]
#[command(hide = true)]
pub struct Arguments {
    /// The VM's name, for who looks at processes
    name: String,

    /// The VM's folder
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    // A process of its own session: the daemon's end, or its terminal's, is none of its business. One that leads a group
    // cannot leave it, and need not: somebody has started it by hand.
    let _ = rustix::process::setsid();
    let dir = std::path::absolute(&arguments.dir)?;
    let folder = Folder(dir.clone());
    let lock = take_lock(&folder)?;
    let sockets = sockets(&dir)?;
    let holder = Holder {
        pid: std::process::id(),
        start_time: start_time_of(std::process::id()).context("the host does not say when this process began")?,
        sockets: sockets.clone(),
        up: false,
    };
    store::sign(&lock, &holder).context("cannot write to the VM's lock")?;
    let ended = run_locked(&folder, &sockets, &lock, &holder);
    let exit = match &ended {
        Ok(outcome) => Exit {
            code: outcome.code.into(),
            reason: outcome.reason.into(),
            message: outcome.message.clone(),
            time: store::now(),
            told: false,
        },
        Err(error) => Exit {
            code: crate::FAILURE.into(),
            reason: "error".into(),
            message: Some(crate::with_causes(error)),
            time: store::now(),
            told: false,
        },
    };
    // Without it the exit code has to do.
    if let Err(error) = folder.write_exit(&exit) {
        tracing::error!(%error, "cannot say how the VM ended");
    }
    let outcome = ended?;
    if let Some(message) = outcome.message {
        eprintln!("posada: {message}");
    }
    Ok(ExitCode::from(outcome.code))
}

fn run_locked(folder: &Folder, sockets: &Path, lock: &File, holder: &Holder) -> anyhow::Result<run::Outcome> {
    let kept = folder.spec()?;
    let vm = run::Arguments::of_spec(&kept.spec, sockets)?;
    // The daemon waits at standard output for a byte; then the console has it.
    let daemon = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3).context("standard output")?;
    let daemon = Mutex::new(Some(File::from(daemon)));
    // Before the console has threads: a signal that one of them took would end the process, not the VM.
    signals::block(&signals::SIGNALS);
    let console = Console::start(folder, sockets)?;
    let up = || {
        let Some(mut daemon) = daemon.lock().ok().and_then(|mut daemon| daemon.take()) else {
            return;
        };
        let holder = Holder {
            up: true,
            ..holder.clone()
        };
        if let Err(error) = store::sign(lock, &holder) {
            tracing::warn!(%error, "cannot write to the VM's lock");
        }
        // A daemon that has gone reads it from the lock.
        let _ = daemon.write_all(b"\n");
    };
    let outcome = run::run_to_end(&vm, &up);
    console.end();
    outcome
}

/// The lock: as standard input from the daemon, so that the VM was never without it; else it is taken here.
fn take_lock(folder: &Folder) -> anyhow::Result<File> {
    let input = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3).context("standard input")?;
    let input = File::from(input);
    let same =
        |one: &std::fs::Metadata, other: &std::fs::Metadata| (one.dev(), one.ino()) == (other.dev(), other.ino());
    if let (Ok(given), Ok(named)) = (input.metadata(), std::fs::metadata(folder.lock_file()))
        && same(&given, &named)
    {
        return Ok(input);
    }
    match folder.lock()? {
        Lock::Mine(lock) => Ok(lock),
        Lock::Theirs(holder) => {
            let which = holder.map_or("another process".into(), |holder| format!("process {}", holder.pid));
            Err(anyhow!("{which} runs this VM already"))
        }
    }
}

/// Where the VM's sockets belong.
fn sockets(dir: &Path) -> anyhow::Result<PathBuf> {
    let sockets = match std::env::var_os(SOCKETS) {
        Some(sockets) => sockets.into(),
        None => {
            let places = Places::of_user()?;
            places.make_run()?;
            let id = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            places.sockets(id)
        }
    };
    store::make_private(&sockets)?;
    Ok(sockets)
}
