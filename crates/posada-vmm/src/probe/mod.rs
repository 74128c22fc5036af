//! Whether an engine runs a guest properly, and how fast: runs a small program on it (`program.s`) and takes the time of each
//! of its phases. Knows engines by the seam only.

mod program;
mod run;

pub use program::Phase;
pub use run::{End, Outcome, run};

#[cfg(test)]
mod tests;
