//! A machine that stands still, and what it is then.
//!
//! ```text
//!              quiesce                    save
//!   ┌─────────┐ ────────────► ┌──────────┐ ──► MachineState
//!   │ running │               │ quiesced │
//!   └─────────┘ ◄──────────── └──────────┘ ◄── restore, into a machine just built
//!                 resume
//! ```
//!
//! The processors stand still from before `quiesce` until after `resume`, or have not begun to run.

use super::Machine;
use posada_devices::ioapic::IoApicState;
use posada_devices::pci::PciState;
use posada_devices::rtc::RtcState;
use posada_devices::serial::SerialState;
use posada_devices::state::StateError;
use posada_devices::virtio::blk::BlkDisk;
use posada_devices::virtio::{VirtioPci, VirtioState};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

/// Version of [`MachineState`]: goes up when a state of before could be misunderstood.
pub const STATE_VERSION: u32 = 1;

/// Everything of a machine that its guest can tell, beside processors and RAM. What keeps nothing (power and reset
/// registers, debug exit) is not here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineState {
    /// [`STATE_VERSION`].
    pub version: u32,
    /// I/O APIC.
    pub ioapic: IoApicState,
    /// COM1.
    pub com1: SerialState,
    /// CMOS clock.
    pub rtc: RtcState,
    /// Host bridge and configuration ports.
    pub pci: PciState,
    /// Disks, in the order of their slots.
    pub disks: Vec<VirtioState>,
    /// Random numbers.
    pub rng: VirtioState,
    /// The virtio console, if there is one.
    pub console: Option<VirtioState>,
}

impl Machine {
    fn functions(&self) -> impl Iterator<Item = &Arc<VirtioPci>> {
        let disks = self.disks.iter().map(|disk| &disk.function);
        disks.chain([&self.rng]).chain(&self.virtio_console)
    }

    /// Stops all devices between two requests. When this returns, no request is half done: its data are where they belong,
    /// it is in the used ring and its interrupt has reached the processors. All others stay in their rings, also those that
    /// the guest has rung for. Input from the host waits until [`Machine::resume`]. This takes as long as the longest
    /// request at hand; a console whose reader has stopped makes it wait.
    pub fn quiesce(&self) {
        self.com1.hold(true);
        self.functions().for_each(|function| function.quiesce());
    }

    /// Lets the devices go on, each with a look at its rings.
    pub fn resume(&self) {
        self.functions().for_each(|function| function.resume());
        self.com1.hold(false);
    }

    /// The state of all devices. For a machine that is quiesced: of one that is not, it is of many moments.
    pub fn save(&self) -> MachineState {
        MachineState {
            version: STATE_VERSION,
            ioapic: self.ioapic.save(),
            com1: self.com1.save(),
            rtc: self.rtc.save(),
            pci: self.root.save(),
            disks: self.disks.iter().map(|disk| disk.function.save()).collect(),
            rng: self.rng.save(),
            console: self.virtio_console.as_ref().map(|console| console.save()),
        }
    }

    /// Becomes the machine that was saved, quiesced. To be called once, before any processor runs; guest RAM need not be
    /// there before [`Machine::resume`].
    ///
    /// # Errors
    /// [`StateError`] names the first thing that does not fit, as "disk 1 has 8192 sectors, the snapshot's has 4096". The
    /// machine is then neither the one nor the other and must be dropped; nothing has run by then.
    pub fn restore(&self, state: &MachineState) -> Result<(), StateError> {
        self.quiesce();
        let machine = |error: StateError| error.of("the machine");
        if state.version != STATE_VERSION {
            let reason = format!(
                "knows state version {STATE_VERSION}, the snapshot's has {}",
                state.version
            );
            return Err(machine(StateError::new(reason)));
        }
        if state.disks.len() != self.disks.len() {
            return Err(machine(StateError::differs(
                "disks",
                self.disks.len(),
                state.disks.len(),
            )));
        }
        for (index, (disk, state)) in self.disks.iter().zip(&state.disks).enumerate() {
            let restored = disk.function.restore(state);
            restored.map_err(|error| error.of(format!("disk {index}")))?;
        }
        self.rng
            .restore(&state.rng)
            .map_err(|error| error.of("the random number device"))?;
        match (&self.virtio_console, &state.console) {
            (Some(console), Some(state)) => console.restore(state).map_err(|error| error.of("the virtio console"))?,
            (None, None) => {}
            (ours, _) => {
                let has = |has: bool| if has { "has a virtio console" } else { "has none" };
                let reason = format!("{}, the snapshot's {}", has(ours.is_some()), has(ours.is_none()));
                return Err(machine(StateError::new(reason)));
            }
        }
        self.com1.restore(&state.com1)?;
        self.rtc.restore(&state.rtc)?;
        // Behind the functions: it looks where their BARs are.
        self.root.restore(&state.pci)?;
        self.ioapic.restore(&state.ioapic)
    }

    /// The disks, in the order of their slots.
    pub fn disks(&self) -> impl Iterator<Item = &BlkDisk> {
        self.disks.iter().map(|disk| disk.device.disk())
    }

    /// Makes all that guests have written to the disks durable.
    ///
    /// # Errors
    /// The host's reason, with the disk's name.
    pub fn flush_disks(&self) -> io::Result<()> {
        for disk in self.disks() {
            let failed = |error: io::Error| {
                io::Error::new(
                    error.kind(),
                    format!("cannot flush the disk {}: {error}", disk.path().display()),
                )
            };
            disk.flush().map_err(failed)?;
        }
        Ok(())
    }
}
