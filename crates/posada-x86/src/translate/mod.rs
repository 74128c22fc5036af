//! The translator: hot 64-bit code is copied, instruction by instruction, into a code cache and runs there on the host's
//! own processor; what it does not know, and what is cold, the interpreter executes.
//!
//! - [`operation`] says what one instruction is ([`table`]: by its form), [`region`] what a block consists of and which flags
//!   are wanted where, [`emit`] makes its code with the [`assembler`].
//! - [`frame`] is what that code finds at `gs:`; [`stubs`] are the ways in and out; [`cache`] is its memory.
//! - [`blocks`] finds, links and forgets blocks, [`jumps`] leads to them by RIP, [`relocation`] copies them; [`run`] runs them.
//! - [`check`] compares each block with the interpreter, and stops with a [`report`] at the first difference.
//! - [`vectors`] says how much of the vector registers is in the processor, and moves them.
//! - [`trap`] handles what the host's processor raises; [`perf_map`] tells perf what runs.
//!
//! Guest registers are in the host registers of the same name, RSP and the flags included; only R10 and R11 belong to the
//! translator. A memory operand's address is compared with the same soft TLB that the interpreter uses.

mod assembler;
mod blocks;
mod cache;
pub mod check;
mod emit;
pub mod frame;
pub mod groups;
mod help;
mod jumps;
mod operation;
mod perf_map;
mod region;
mod relocation;
mod report;
mod run;
mod stubs;
mod table;
#[cfg(test)]
mod tests;
mod trap;
mod undefined;
mod vectors;

pub use perf_map::PerfMap;
pub use run::{Ran, Translator};
pub(crate) use stubs::Wanted;
