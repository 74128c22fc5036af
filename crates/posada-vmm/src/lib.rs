//! One VM: its memory layout, boot, the machine around the processors, the run loop, the console and gdb.

pub mod boot;
pub mod console;
pub mod control;
pub mod gdb;
pub mod layout;
pub mod machine;
pub mod notify;
pub mod probe;
mod resident;
#[cfg(test)]
mod testing;
pub mod vm;
