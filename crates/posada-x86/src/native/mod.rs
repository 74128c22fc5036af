//! Vector, x87, MMX, crypto and bit-manipulation instructions: the host runs the guest's own instruction, in a stub that
//! takes registers and flags from the [`Core`](crate::core::Core) and puts them back, with the memory operand led to host memory.
//!
//! - [`decode`] makes an [`Insn`] of the guest's bytes; [`form`] says what instructions are the same but for their memory
//!   operand, [`stub`] makes code for a form, [`arena`] keeps it.
//! - [`run`] checks what the processor checks before execution, finds the memory operand and calls the stub.
//! - [`masked`] has what touches only some elements of memory, [`gather`] what has an address for each element, and
//!   [`selected`] memory operands under an opmask; [`trap`] unmasked SIMD exceptions.

mod arena;
mod decode;
mod features;
mod form;
mod gather;
mod masked;
mod run;
mod selected;
mod stub;
mod trap;

pub use decode::decode;
pub use features::shown;
pub(crate) use form::needs;

use crate::core::CodeSize;
use crate::insn::Insn;

/// Instructions that a core remembers.
const SLOTS: usize = 512;

/// What a core keeps for its native instructions.
pub struct Native {
    /// MXCSR as Rust expects it, for stubs.
    host_mxcsr: u32,
    /// MXCSR as a stub found it.
    seen_mxcsr: u32,
    /// Decoded instructions by their first bytes.
    decoded: Box<[Option<Decoded>]>,
}

#[derive(Clone)]
struct Decoded {
    bytes: [u8; 15],
    code_size: CodeSize,
    insn: Insn,
}

impl Default for Native {
    fn default() -> Self {
        Self {
            host_mxcsr: 0x1f80,
            seen_mxcsr: 0,
            decoded: vec![None; SLOTS].into(),
        }
    }
}

/// Gets memory for stubs, so that a host that forbids it is known before a guest runs.
///
/// # Errors
/// The host gives no memory to execute from, or refuses the handler of SIGFPE.
pub fn prepare() -> std::io::Result<()> {
    arena::arena().map(drop)
}

#[cfg(test)]
mod tests;
