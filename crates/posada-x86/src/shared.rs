//! What vCPUs of a VM share.

/// One vCPU as other threads see it.
#[derive(Default)]
pub struct Shared {}
