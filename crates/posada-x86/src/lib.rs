//! The software CPU: an x86-64 processor with its local APIC, MMU, decoder and interpreter.

pub mod alu;
pub mod atomic;
pub mod bcd;
pub mod bits;
pub mod branch;
pub mod clock;
pub mod core;
pub mod cpuid;
pub mod decode;
pub mod engine;
pub mod exception;
pub mod fault;
pub mod flags;
mod host;
pub mod insn;
pub mod interpret;
pub mod lapic;
pub mod mmu;
pub mod msr;
pub mod muldiv;
pub mod native;
pub mod operand;
pub mod segmentation;
pub mod shared;
pub mod shift;
pub mod size;
pub mod state;
pub mod strings;
pub mod system;
pub mod tlb;
pub mod transfer;
pub mod walk;
pub mod xsave;

pub use engine::Emulator;
