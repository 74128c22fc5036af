//! virtio 1.2 devices on PCI: the transport, the queues and the devices.

mod bells;
pub mod blk;
pub mod console;
mod disk;
#[cfg(test)]
mod driver;
mod interrupt;
mod queue;
pub mod rng;
mod state;
mod transport;
pub mod vsock;
mod worker;

pub use interrupt::Interrupt;
pub use queue::{Broken, Chain, Segments, VirtQueue};
pub use state::{DeviceState, QueueState, VirtioState};
pub use transport::VirtioPci;
pub use worker::Signal;

use crate::state::StateError;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// What a device can do when something comes from the host's side.
#[derive(Clone)]
pub struct Link {
    signal: Arc<Signal>,
    interrupt: Arc<Interrupt>,
}

impl Link {
    /// Has [`VirtioDevice::serve`] called, if the driver is ready.
    pub fn wake(&self) {
        self.signal.kick();
    }

    /// The device configuration has changed.
    pub fn config_changed(&self) {
        self.interrupt.config_changed();
    }
}

/// A virtio device. The transport ([`VirtioPci`]) does the rest: negotiation, queue set-up, doorbells and a thread.
///
/// ```text
///             DRIVER_OK                 malformed chain or ring
///   ┌──────┐ ─────────► ┌────────┐ ───────────────────────────► ┌─────────────┐
///   │ idle │            │ active │ ◄──┐                         │ needs reset │
///   └──────┘ ◄───────── └────────┘    │ resume                  └─────────────┘
///      ▲ ▲      reset       │ quiesce │                                │
///      │ │                  ▼         │                                │
///      │ └───────────── ┌────────┐ ───┘                                │
///      │      reset     │  held  │  save and restore are here          │
///      │                └────────┘                                     │
///      └──────────────────────────────────────────────────────────────┘
/// ```
///
/// Only while it is active is `serve` called, on the device's own thread. All other functions may be called at any time
/// from any thread; `restore` only while it is idle.
pub trait VirtioDevice: Send + Sync {
    /// For logs and threads: `blk`, `console`.
    fn name(&self) -> &'static str;
    /// Device id, virtio 1.2 section 5.
    fn id(&self) -> u16;
    /// Feature bits 0 to 23 that it offers; the transport adds the reserved ones.
    fn features(&self) -> u64;
    /// The largest size of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// A load from the device configuration; bytes beyond it are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Does what there is to do: called once the driver is ready, after each of its doorbells and after each [`Link::wake`].
    /// Returns when nothing is left or, between two requests, when `signal` says stop. A queue that the driver left disabled
    /// never has a chain.
    ///
    /// # Errors
    /// [`Broken`]: the driver is told to reset the device, and the queues are touched no more.
    fn serve(&self, queues: &mut [VirtQueue], signal: &Signal) -> Result<(), Broken>;
    /// A descriptor (an epoll) that can be read while there is work from the host's side: `serve` is called then too.
    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Called once, by the transport that takes the device.
    fn connect(&self, _link: Link) {}
    /// The driver has reset the device: what it had with this driver is over.
    fn reset(&self) {}
    /// What the device itself keeps, beside transport and queues.
    fn save(&self) -> DeviceState;
    /// Takes what [`VirtioDevice::save`] gave in another process, perhaps long ago; it may be forged.
    ///
    /// # Errors
    /// [`StateError`] names what does not fit this device.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError>;
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
