//! The control socket of a running VM: commands from other processes.
//!
//! Each message is a line of JSON. The VM begins with [`Hello`]; to each [`Request`] it sends [`Answer`]s, any number of
//! [`Answer::Progress`] and then exactly one other. A client that goes takes its request with it.

mod client;
mod server;
#[cfg(test)]
mod tests;

pub use client::Client;
pub(crate) use server::{Listener, Server};

use crate::control::Condition;
use crate::snapshot::{KeepDisks, Progress, Saved};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;

/// The protocol: goes up when a client of before could misunderstand an answer.
pub const PROTOCOL: u32 = 1;

/// The most bytes of a request.
const LONGEST_REQUEST: u64 = 64 << 10;

/// The VM's first line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The VM's version.
    pub posada: String,
    /// [`PROTOCOL`].
    pub protocol: u32,
}

/// What a client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Tell how the VM is: [`Answer::Status`].
    Status,
    /// Have the vCPUs stand still: [`Answer::Done`] when they do.
    Pause,
    /// Let them run on: [`Answer::Done`].
    Resume,
    /// Save the VM: [`Answer::Saved`].
    SnapshotSave {
        /// The folder to make, absolute.
        place: PathBuf,
        /// Replace a snapshot there.
        force: bool,
        /// End the VM as it was saved.
        stop: bool,
        /// What becomes of writable disks.
        disks: KeepDisks,
    },
}

/// How a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The VM's version.
    pub posada: String,
    /// Its process.
    pub pid: u32,
    /// What it does.
    pub condition: Condition,
    /// vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// Bytes of RAM that the host has really given.
    pub touched: u64,
}

/// What a VM says to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It is at it.
    Progress(Progress),
    /// It was done.
    Done,
    /// How it is.
    Status(Status),
    /// What was saved.
    Saved(Saved),
    /// It was not done: why, and what to do about it.
    Error(String),
}

/// Why a command does not reach its VM, or a VM has no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The socket cannot be made.
    #[error("cannot have a control socket at {}: {}; give another --control", path.display(), bind_reason(source))]
    Bind {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// Nobody is there.
    #[error("no VM answers at {}: {source}; give the path that its --control has", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// What is there is no VM, or not one that we understand.
    #[error("what answers at {} is not a VM of this Posada: {why}", path.display())]
    Foreign {
        /// The socket.
        path: PathBuf,
        /// What it said.
        why: String,
    },
    /// The VM ended meanwhile.
    #[error("the VM at {} has gone without an answer", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
    },
    /// The VM's own words.
    #[error("{0}")]
    Refused(String),
}

/// Why a socket cannot be made, for a user.
pub(crate) fn bind_reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another VM has it, or it is no socket".into(),
        _ => error.to_string(),
    }
}
