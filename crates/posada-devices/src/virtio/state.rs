//! A virtio function as saved: configuration space, MSI-X, transport registers, positions in the queues, and the device's
//! own part.

use super::blk::BlkState;
use super::console::ConsoleState;
use super::interrupt::NO_VECTOR;
use super::transport::{Common, DRIVER_OK, FEATURES_OK, NEEDS_RESET, QueueSetup, Work};
use super::{VirtioDevice, VirtioPci};
use crate::msix::MsixState;
use crate::pci::ConfigState;
use crate::state::StateError;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;

/// What a device itself keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum DeviceState {
    /// A disk.
    Blk(BlkState),
    /// Random numbers: nothing to keep.
    Rng,
    /// A console.
    Console(ConsoleState),
}

impl DeviceState {
    /// The error of a `device` that is of another kind.
    pub(super) fn is_not(&self, device: &dyn VirtioDevice) -> StateError {
        let kind = match self {
            DeviceState::Blk(_) => "blk",
            DeviceState::Rng => "rng",
            DeviceState::Console(_) => "console",
        };
        StateError::new(format!(
            "is a virtio-{}, the snapshot's is a virtio-{kind}",
            device.name()
        ))
    }
}

/// A queue: what the driver has set up (virtio 1.2 section 4.1.4.3) and how far the device has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries.
    pub size: u16,
    /// The driver uses it.
    pub enabled: bool,
    /// MSI-X vector; 0xffff: none.
    pub vector: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring.
    pub available: u64,
    /// Guest physical address of the used ring.
    pub used: u64,
    /// Chains taken from the available ring, modulo 65,536.
    pub next_available: u16,
    /// Chains put into the used ring, modulo 65,536.
    pub next_used: u16,
}

/// A virtio function between two requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// PCI configuration space: BARs, command, MSI-X control.
    pub config: ConfigState,
    /// Interrupt vectors.
    pub msix: MsixState,
    /// Device status without NEEDS_RESET.
    pub status: u8,
    /// The device waits for a reset.
    pub needs_reset: bool,
    /// Which half of the device's features is shown.
    pub device_select: u32,
    /// Which half of the driver's features is shown.
    pub driver_select: u32,
    /// What the driver has accepted.
    pub features: u64,
    /// Which queue is shown.
    pub queue_select: u16,
    /// MSI-X vector of configuration changes; 0xffff: none.
    pub config_vector: u16,
    /// Interrupt status: 1 queues, 2 configuration.
    pub isr: u8,
    /// Configuration generation.
    pub generation: u8,
    /// The queues in order.
    pub queues: Vec<QueueState>,
    /// The device's own part.
    pub device: DeviceState,
}

impl VirtioPci {
    /// What there is now. A device that runs is held for that moment.
    pub fn save(&self) -> VirtioState {
        let was_held = self.common.lock().unwrap().held;
        self.quiesce();
        let state = self.save_held();
        if !was_held {
            self.resume();
        }
        state
    }

    fn save_held(&self) -> VirtioState {
        let common = self.common.lock().unwrap();
        let interrupt = &self.interrupt;
        let position = |index: usize| match &common.work {
            Work::Held(queues) => queues[index].positions(),
            // A queue that is broken, or that nobody has looked at yet.
            _ => (0, 0),
        };
        let queue = |(index, setup): (usize, &QueueSetup)| {
            let (next_available, next_used) = position(index);
            QueueState {
                size: setup.size,
                enabled: setup.enabled,
                vector: interrupt.queue_vectors[index].load(Ordering::Relaxed),
                descriptors: setup.rings[0],
                available: setup.rings[1],
                used: setup.rings[2],
                next_available,
                next_used,
            }
        };
        VirtioState {
            config: self.config.lock().unwrap().save(),
            msix: interrupt.msix.save(),
            status: common.status,
            needs_reset: interrupt.broken.load(Ordering::Acquire),
            device_select: common.device_select,
            driver_select: common.driver_select,
            features: common.driver_features,
            queue_select: common.queue_select,
            config_vector: interrupt.config_vector.load(Ordering::Relaxed),
            isr: interrupt.isr.load(Ordering::Relaxed),
            generation: interrupt.generation.load(Ordering::Acquire),
            queues: common.queues.iter().enumerate().map(queue).collect(),
            device: self.device.save(),
        }
    }

    /// Becomes what was saved, quiesced: [`VirtioPci::resume`] lets it go on. Guest RAM need not be there before that.
    /// The bus must be told after ([`crate::pci::PciRoot::restore`]) that BARs have moved.
    ///
    /// # Errors
    /// [`StateError`] names the first thing that does not fit. The function is good for nothing but a reset then.
    pub fn restore(&self, state: &VirtioState) -> Result<(), StateError> {
        let mut common = self.common.lock().unwrap();
        // Joins the device's thread, if there is one.
        common.work = Work::Idle;
        self.interrupt.reset();
        self.interrupt.hold(true);
        self.config.lock().unwrap().check(&state.config)?;
        self.device.restore(&state.device)?;
        let mut restored = self.check(state)?;

        let runs = state.status & DRIVER_OK != 0;
        if runs && !state.needs_reset {
            let position = |index: usize| (state.queues[index].next_available, state.queues[index].next_used);
            let queues = self.queues(&restored, position).map_err(|index| {
                StateError::new("has rings that are not in RAM or not aligned").of(format!("queue {index}"))
            })?;
            restored.work = Work::Held(queues);
        }
        let control = {
            let mut config = self.config.lock().unwrap();
            config.restore(&state.config);
            config.word(self.msix_capability + 2)
        };
        let interrupt = &self.interrupt;
        interrupt.config_vector.store(state.config_vector, Ordering::Relaxed);
        for (vector, queue) in interrupt.queue_vectors.iter().zip(&state.queues) {
            vector.store(queue.vector, Ordering::Relaxed);
        }
        interrupt.isr.store(state.isr, Ordering::Relaxed);
        interrupt.generation.store(state.generation, Ordering::Release);
        interrupt.broken.store(state.needs_reset, Ordering::Release);
        interrupt.msix.restore(&state.msix, control)?;
        if runs {
            interrupt.open();
        }
        *common = restored;
        Ok(())
    }

    /// The registers of a state in which everything is possible.
    fn check(&self, state: &VirtioState) -> Result<Common, StateError> {
        let sizes = self.device.queue_sizes();
        if state.queues.len() != sizes.len() {
            return Err(StateError::differs("queues", sizes.len(), state.queues.len()));
        }
        let (ready, agreed) = (state.status & DRIVER_OK != 0, state.status & FEATURES_OK != 0);
        if state.status & NEEDS_RESET != 0 || ready && !agreed {
            return Err(StateError::new(format!("cannot have the status {:#x}", state.status)));
        }
        if agreed && !self.can_do(state.features) {
            let (ours, theirs) = (self.features(), state.features);
            return Err(StateError::new(format!(
                "offers the features {ours:#x}, the snapshot's uses {theirs:#x}"
            )));
        }
        let vectors = self.interrupt.msix.vectors();
        let possible = |vector: u16| vector < vectors || vector == NO_VECTOR;
        if !possible(state.config_vector) {
            return Err(StateError::differs(
                "interrupt vectors",
                vectors,
                format!("number {}", state.config_vector),
            ));
        }
        for (index, (queue, largest)) in state.queues.iter().zip(sizes).enumerate() {
            let of_queue = |error: StateError| error.of(format!("queue {index}"));
            if !queue.size.is_power_of_two() || queue.size > *largest {
                return Err(of_queue(StateError::new(format!("cannot have {} entries", queue.size))));
            }
            if !possible(queue.vector) {
                return Err(of_queue(StateError::new(format!(
                    "has no interrupt vector {}",
                    queue.vector
                ))));
            }
        }
        let setup = |queue: &QueueState| QueueSetup {
            size: queue.size,
            enabled: queue.enabled,
            rings: [queue.descriptors, queue.available, queue.used],
        };
        Ok(Common {
            status: state.status,
            device_select: state.device_select,
            driver_select: state.driver_select,
            driver_features: state.features,
            queue_select: state.queue_select,
            queues: state.queues.iter().map(setup).collect(),
            work: Work::Idle,
            held: true,
        })
    }
}
