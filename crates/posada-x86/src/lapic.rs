//! The local APIC.

/// Own side.
#[derive(Default)]
pub struct Lapic {}
