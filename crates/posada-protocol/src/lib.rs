//! What a host and the agent in its guest say to each other, and the host's side of it.
//!
//! Each piece of work has a connection of its own: closing it gives the work up, and the connection's flow control is the
//! work's. Both sides begin with [`Hello`]; then the client sends one [`Request`], and what follows depends on that.
//! Everything goes in [`Frame`]s.
//!
//! The agent is as little trusted as its guest. Whoever reads from it holds one frame at a time, and nothing of what it says
//! is a path or a command on the host.
#![forbid(unsafe_code)]

pub mod archive;
mod client;
mod frame;
mod message;
pub mod statistics;

pub use client::{Client, Error, Event, Finished, Frozen, Input, Output};
pub use frame::{Channel, Decoder, Frame, FrameError, HEADER, MOST, read_frame, write_data, write_message};
pub use message::{Answer, Ending, Exec, Failure, Hello, NEWEST, OLDEST, Order, Request, Size, Status};

/// The vsock port at which the agent listens. Below 1024: in the guest only root can take it.
pub const PORT: u32 = 700;

/// Bytes of input that may be on their way to a program: its agent tells what the program has taken.
pub const WINDOW: usize = 64 << 10;
