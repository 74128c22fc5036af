//! A VM at rest in a folder: processors, clock, devices, RAM and disks, from which any engine goes on.
//!
//! [`save`] stops the VM for as long as it takes to copy what changes, and has it run on; a folder has its name only when it
//! is whole and on the disk. [`Snapshot::open`] checks all of a folder before anything of it is used.
//! docs/snapshots.md describes the format.

mod disks;
mod folder;
mod image;
mod manifest;
mod pages;
mod restore;
mod save;
#[cfg(test)]
mod tests;

pub use image::Index;
pub use manifest::{FORMAT, State};
pub use restore::{Restore, Snapshot};
pub use save::{KeepDisks, Options, Phase, Progress, Saved, Subject, Watch, save};

use crate::boot;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;

/// Why a VM cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder cannot be made.
    #[error("cannot make the snapshot {}: {source}; give another DIR", path.display())]
    Create {
        /// The snapshot.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Something is there.
    #[error("{} is there already; give another DIR, or --force to replace a snapshot", path.display())]
    Exists {
        /// The snapshot.
        path: PathBuf,
    },
    /// Something else is there.
    #[error("{} is not a snapshot, and --force replaces nothing else; give another DIR", path.display())]
    Foreign {
        /// What is there.
        path: PathBuf,
    },
    /// Another process is at it.
    #[error("another save to {} is under way; wait for it or give another DIR", path.display())]
    Busy {
        /// The snapshot.
        path: PathBuf,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}; the VM runs on and the snapshot is dropped", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// What the VM has booted cannot be read any more.
    #[error("{0}; the VM runs on and the snapshot is dropped")]
    Input(boot::Error),
    /// A disk cannot be copied.
    #[error("cannot save the disk {}: {source}; the VM runs on and the snapshot is dropped", path.display())]
    SaveDisk {
        /// The disk.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// A state cannot be encoded.
    #[error("cannot encode the VM's state: {0}; this is an error in Posada, please report it")]
    Encode(#[from] serde_json::Error),
    /// Whoever wanted it has gone.
    #[error("the save was given up; the VM runs on and the snapshot is dropped")]
    Cancelled,
    /// The VM has no processors any more.
    #[error("the VM is ending, so it cannot be saved")]
    Ending,
    /// The processors do not give or take their state.
    #[error(transparent)]
    Engine(#[from] posada_engine::Error),
    /// A file of a snapshot cannot be opened or read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Not a snapshot.
    #[error("{} is not a snapshot: it has no manifest.json", path.display())]
    NotOne {
        /// What it is instead.
        path: PathBuf,
    },
    /// From a Posada to come.
    #[error(
        "the snapshot {} has format {format}, and this Posada reads formats up to {FORMAT}; use the Posada that saved it, or a newer one",
        path.display()
    )]
    Newer {
        /// The snapshot.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
    /// A file is not there.
    #[error("the snapshot {} is not whole: its file {name} is missing; use another copy of it", path.display())]
    Missing {
        /// The snapshot.
        path: PathBuf,
        /// The file.
        name: String,
    },
    /// A file is not what was saved.
    #[error("the snapshot {} is damaged: its file {name} {why}; use another copy of it", path.display())]
    Damaged {
        /// The snapshot.
        path: PathBuf,
        /// The file.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The VM to be is not the one that was saved.
    #[error("the snapshot {} does not fit: {why}", path.display())]
    Shape {
        /// The snapshot.
        path: PathBuf,
        /// The first thing that does not, and what to do.
        why: String,
    },
    /// Disks of the snapshot itself are not written to.
    #[error("{}", copies(path, numbers))]
    NeedsCopies {
        /// The snapshot.
        path: PathBuf,
        /// Which disks.
        numbers: Vec<usize>,
    },
    /// A disk is not what was saved.
    #[error("the disk {} {why}", path.display())]
    Disk {
        /// The disk.
        path: PathBuf,
        /// What is wrong, and what to do.
        why: String,
    },
}

/// How to make the copies that a restored VM writes to.
fn copies(path: &std::path::Path, numbers: &[usize]) -> String {
    let mut text = format!("the snapshot {} keeps its disks as they are", path.display());
    text += "; make copies for the VM and give them in this order:";
    for number in numbers {
        let from = path.join(disks::file_name(*number));
        let _ = write!(
            text,
            " cp --reflink=auto --sparse=always {} NEW{number} &&",
            from.display()
        );
    }
    text += " posada run --restore …";
    for number in numbers {
        let _ = write!(text, " --disk NEW{number}");
    }
    text
}
