//! The engine on the host's KVM: guest code runs on the processor itself, and comes back to us for ports and addresses that are
//! not RAM.
//!
//! The local APICs are in the kernel, the I/O APIC is the machine's (KVM calls it a split irqchip). `host` opens the device and
//! knows what it offers, `engine` makes a VM, `interrupts` brings it messages, `vcpu` runs its processors, `state` carries the
//! portable CPU state to KVM's structures and back.

mod clock;
mod engine;
mod error;
mod failure;
mod host;
mod interrupts;
mod ioctl;
mod kick;
mod state;
mod vcpu;

pub use engine::Kvm;
pub use error::Error;
