//! Which engine runs a VM's processors.

use posada_engine::cpu::CpuModel;
use posada_engine::{Engine, Error};
use posada_memory::GuestRam;
use std::sync::Arc;

/// The software CPU with the vCPUs of `model` on `ram`.
pub fn emulate(ram: Arc<GuestRam>, model: &CpuModel) -> Result<Arc<dyn Engine>, Error> {
    Ok(Arc::new(posada_x86::Emulator::new(ram, model)?))
}

/// The host's KVM with the vCPUs of `model` on `ram`.
pub fn kvm(ram: Arc<GuestRam>, model: &CpuModel) -> Result<Arc<dyn Engine>, Error> {
    Ok(Arc::new(posada_kvm::Kvm::new(ram, model)?))
}
