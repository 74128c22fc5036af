//! `posada snapshot`: VMs in folders.

use crate::size;
use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use posada_vmm::remote::{Answer, Client, Request};
use posada_vmm::snapshot::{KeepDisks, Phase, Progress, Saved};
use serde_json::json;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const SAVE_HELP: &str = "\
The VM stands still while its memory and disks are copied, and then runs on. DIR is there when all of it is on the disk,
or not at all; Ctrl-C gives up and leaves the VM running.

Example:
  posada run --control vm.sock …          posada snapshot save vm.sock monday
  cp --reflink=auto --sparse=always monday/disk0.raw disk.raw
  posada run --restore monday --disk disk.raw";

/// Save a running VM, to go on from there later with posada run --restore
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Save(Save),
}

/// Save a running VM into a new folder
#[derive(Args)]
#[command(after_help = SAVE_HELP)]
struct Save {
    /// The VM's control socket: what its --control names
    path: PathBuf,

    /// The folder to make
    dir: PathBuf,

    /// End the VM in the state that was saved, instead of letting it run on
    #[arg(long)]
    stop: bool,

    /// What becomes of the disks that the guest can write; those that it cannot always stay where they are
    #[arg(long, value_enum, default_value_t = Disks::Copy)]
    disks: Disks,

    /// Replace a snapshot that is there
    #[arg(long)]
    force: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Disks {
    /// They are copied into the snapshot, sharing blocks with the originals where the file system can
    Copy,
    /// They stay where they are, and must not change before the VM is restored
    Reference,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let Command::Save(arguments) = &arguments.command;
    let place = place(&arguments.dir)?;
    let request = Request::SnapshotSave {
        place: place.clone(),
        force: arguments.force,
        stop: arguments.stop,
        disks: match arguments.disks {
            Disks::Copy => KeepDisks::Copy,
            Disks::Reference => KeepDisks::Reference,
        },
    };
    let mut shown = ProgressLine(io::stderr().is_terminal(), false);
    let answer = Client::connect(&arguments.path)?.ask(&request, &mut |progress| shown.show(progress));
    shown.clear();
    let Answer::Saved(saved) = answer? else {
        bail!("the VM does not say what it has saved; use its own posada command");
    };
    if arguments.json {
        let report = json!({
            "snapshot": place,
            "memory_bytes": saved.memory,
            "disk_bytes": saved.disks,
            "paused_seconds": seconds(&saved),
        });
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!(
            "saved {}: {} of memory, {} of disks; the VM {} {:.2} s",
            place.display(),
            size::of(saved.memory),
            size::of(saved.disks),
            if arguments.stop {
                "stopped, after"
            } else {
                "stood still for"
            },
            seconds(&saved),
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn seconds(saved: &Saved) -> f64 {
    saved.paused_ns as f64 / 1e9
}

/// The folder as the VM's process, which may run elsewhere, knows it.
fn place(dir: &Path) -> anyhow::Result<PathBuf> {
    let place = std::path::absolute(dir).with_context(|| format!("{} is no place for a snapshot", dir.display()))?;
    if place.to_str().is_none() {
        bail!("{} is not UTF-8; give another DIR", dir.display());
    }
    // Without a slash at the end.
    Ok(place.components().collect())
}

/// How far it is, on a line of a terminal that is written over.
struct ProgressLine(bool, bool);

impl ProgressLine {
    fn show(&mut self, progress: Progress) {
        if !self.0 {
            return;
        }
        let what = match progress.phase {
            Phase::Memory => "writing memory",
            Phase::Disks => "copying disks",
            Phase::Checksums => "checking disks",
            Phase::Sync => "waiting for the disk",
        };
        let share = progress.done as f64 / progress.total.max(1) as f64 * 100.0;
        self.1 = true;
        let _ = write!(io::stderr(), "\r{what}: {share:3.0} %\x1b[K");
    }

    fn clear(&mut self) {
        if self.1 {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_absolute_and_ends_in_its_name() {
        assert_eq!(place(Path::new("/a/b/")).unwrap(), Path::new("/a/b"));
        let here = std::env::current_dir().unwrap();
        assert_eq!(place(Path::new("snap")).unwrap(), here.join("snap"));
        assert!(place(Path::new("")).is_err());
    }
}
