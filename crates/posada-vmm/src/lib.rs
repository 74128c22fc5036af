//! One VM: its memory layout, boot, the machine around the processors, the run loop, the console, gdb, the control socket
//! and snapshots.

pub mod boot;
pub mod console;
pub mod control;
pub mod gdb;
pub mod layout;
pub mod machine;
pub mod notify;
pub mod probe;
pub mod remote;
mod resident;
pub mod snapshot;
mod socket;
#[cfg(test)]
mod testing;
pub mod vm;
