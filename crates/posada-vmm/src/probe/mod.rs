//! Whether an engine runs guests properly, and how fast: runs a small program on it (`program.s`), takes the time of each of
//! its phases, and decides between KVM and the software CPU. Knows engines by the seam only.

mod policy;
mod program;
mod run;

pub use policy::{Choice, Decision, boot_seconds, decide, time, unit_seconds};
pub use program::Phase;
pub use run::{End, Make, Outcome, compare, run};

#[cfg(test)]
mod tests;
