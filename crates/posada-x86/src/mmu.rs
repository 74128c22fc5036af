//! Address translation: soft TLBs, page walks, permissions, MMIO.

use crate::core::Core;
use crate::fault::Exec;
use crate::size::Size;

/// Soft TLBs.
#[derive(Default)]
pub struct Mmu {}

impl Core {
    /// Loads from a linear address with the rights of the current privilege level.
    #[inline(always)]
    pub fn load<T: Size>(&mut self, _linear: u64) -> Exec<T> {
        self.general_protection()
    }

    /// Stores to a linear address with the rights of the current privilege level.
    #[inline(always)]
    pub fn store<T: Size>(&mut self, _linear: u64, _value: T) -> Exec {
        self.general_protection()
    }
}
