//! The software CPU: an x86-64 processor with its local APIC, MMU, decoder and interpreter.

pub mod core;
pub mod exception;
pub mod fault;
pub mod insn;
pub mod lapic;
pub mod mmu;
pub mod native;
pub mod operand;
pub mod segmentation;
pub mod shared;
pub mod size;
pub mod system;
pub mod walk;
pub mod xsave;
