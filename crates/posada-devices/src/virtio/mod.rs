//! virtio 1.2 devices on PCI: the transport, the queues and the devices.

pub mod blk;
pub mod console;
mod disk;
#[cfg(test)]
mod driver;
mod queue;
pub mod rng;
mod transport;
mod worker;

pub use queue::{Broken, Chain, Segments, VirtQueue};
pub use transport::{Interrupt, VirtioPci};
pub use worker::Signal;

use posada_memory::GuestRam;
use std::sync::Arc;

/// What a driver has set up when it says DRIVER_OK.
pub struct Activation {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// The device's queues, in order. One that the driver left disabled never has a chain.
    pub queues: Vec<VirtQueue>,
    /// The device's way to the driver.
    pub interrupt: Arc<Interrupt>,
    /// The negotiated features.
    pub features: u64,
}

/// A virtio device behind a transport, which does negotiation and queue set-up.
///
/// ```text
///             activate                  malformed chain or ring
///   ┌──────┐ ─────────► ┌────────┐ ───────────────────────────► ┌─────────────┐
///   │ idle │            │ active │                              │ needs reset │
///   └──────┘ ◄───────── └────────┘                              └─────────────┘
///       ▲       reset                         reset                    │
///       └──────────────────────────────────────────────────────────────┘
/// ```
///
/// `notify` and `read_config` may come in any state, from several vCPU threads at once; `activate` and `reset` come one at
/// a time. A device that finds a malformed chain tells [`Interrupt::needs_reset`] and touches its queues no more.
pub trait VirtioDevice: Send + Sync {
    /// Device id, virtio 1.2 section 5.
    fn id(&self) -> u16;
    /// Feature bits 0 to 23 that it offers; the transport adds the reserved ones.
    fn features(&self) -> u64;
    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// A load from the device configuration; bytes beyond it are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// The driver is ready. Begins work on buffers that are there already.
    fn activate(&self, activation: Activation);
    /// There may be new buffers in `queue`. Called on a vCPU's thread: must not block.
    fn notify(&self, queue: u16);
    /// Back to idle. When this returns the device has let go of its queues and touches guest memory no more.
    fn reset(&self);
}

/// Copies what `data` covers of `config` from `offset`; zeroes beyond.
fn read_config(config: &[u8], offset: u64, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(offset..) {
        *byte = usize::try_from(at)
            .ok()
            .and_then(|at| config.get(at))
            .copied()
            .unwrap_or(0);
    }
}
