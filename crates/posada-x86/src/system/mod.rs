//! System instructions.

pub mod control;
pub mod debug;
pub mod descriptor;
pub mod far;
pub mod fast;
pub mod io;
pub mod iret;
pub mod misc;
mod pvclock;
pub mod segments;
mod stack;
pub(crate) mod steal;
pub mod tables;

#[cfg(test)]
pub(crate) mod tests;
