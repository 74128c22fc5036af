//! Devices of the machine.

pub mod bus;
pub mod debug_exit;
pub mod ioapic;
pub mod msix;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod serial;
#[cfg(test)]
mod testing;
