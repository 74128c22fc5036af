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
    /// Sockets between host and guest, if there are any. Not in the snapshots of the first Posadas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VirtioState>,
}

/// What not every machine has must be in both or in neither.
fn restore_optional(function: Option<&VirtioPci>, state: Option<&VirtioState>, what: &str) -> Result<(), StateError> {
    match (function, state) {
        (Some(function), Some(state)) => function.restore(state).map_err(|error| error.of(format!("the {what}"))),
        (None, None) => Ok(()),
        (ours, _) => {
            let has = |has: bool| {
                if has {
                    format!("has a {what}")
                } else {
                    "has none".into()
                }
            };
            let reason = format!("{}, the snapshot's {}", has(ours.is_some()), has(ours.is_none()));
            Err(StateError::new(reason).of("the machine"))
        }
    }
}

impl Machine {
    fn functions(&self) -> impl Iterator<Item = &Arc<VirtioPci>> {
        let disks = self.disks.iter().map(|disk| &disk.function);
        disks.chain([&self.rng]).chain(&self.virtio_console).chain(&self.vsock)
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
            vsock: self.vsock.as_ref().map(|vsock| vsock.save()),
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
        restore_optional(self.virtio_console.as_deref(), state.console.as_ref(), "virtio console")?;
        restore_optional(self.vsock.as_deref(), state.vsock.as_ref(), "vsock")?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Control;
    use crate::layout;
    use crate::machine::{Parts, VsockPart};
    use crate::testing::{FakeEngine, Random, Step, TempDir};
    use posada_devices::serial::Flush;
    use posada_devices::virtio::blk::open_disk;
    use posada_engine::{Engine, Machine as _};
    use posada_memory::GuestRam;
    use serde_json::Value;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    /// BARs of the first disk and of what comes behind it, as the machine places them.
    const BARS: u64 = layout::PCI_WINDOW.start;
    const BAR: u64 = 0x8000;

    fn build(disks: &[BlkDisk], virtio_console: bool) -> Machine {
        build_with(disks, virtio_console, None)
    }

    fn build_with(disks: &[BlkDisk], virtio_console: bool, vsock: Option<VsockPart<'_>>) -> Machine {
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        let engine: Arc<dyn Engine> = Arc::new(FakeEngine::new(Arc::new(|_, _, _| Step::Halt)));
        let parts = Parts {
            cpus: 1,
            disks,
            com1: (Box::new(io::sink()), Flush::Byte),
            virtio_console: virtio_console.then(|| Box::new(io::sink()) as Box<dyn io::Write + Send>),
            vsock,
            debug_exit: false,
        };
        Machine::new(parts, &ram, &engine, &Control::new()).unwrap()
    }

    fn disk(dir: &TempDir, name: &str, sectors: usize) -> BlkDisk {
        open_disk(&dir.file(name, &vec![0; sectors * 512]), false).unwrap()
    }

    /// What a driver does until DRIVER_OK, with the rings of its `queues` in RAM.
    fn drive(machine: &Machine, bar: u64, queues: u16) {
        let write = |at: u64, data: &[u8]| machine.mmio_write(bar + at, data);
        write(20, &[3]);
        write(8, &1_u32.to_le_bytes());
        write(12, &1_u32.to_le_bytes());
        write(20, &[11]);
        for queue in 0..queues {
            let rings = 0x10_0000 + u64::from(queue) * 0x4000 + (bar - BARS) * 2;
            write(22, &queue.to_le_bytes());
            for (at, ring) in [(32, rings), (40, rings + 0x1000), (48, rings + 0x2000)] {
                write(at, &ring.to_le_bytes());
            }
            write(28, &1_u16.to_le_bytes());
        }
        write(20, &[15]);
    }

    fn status(machine: &Machine, bar: u64) -> u8 {
        let mut status = [0];
        machine.mmio_read(bar + 20, &mut status);
        status[0]
    }

    /// A machine with a disk, a virtio console and a vsock.
    fn full(dir: &TempDir, disks: &[BlkDisk]) -> Machine {
        let path = dir.path("vsock");
        let _ = std::fs::remove_file(&path);
        let vsock = VsockPart {
            cid: 3,
            listener: UnixListener::bind(&path).unwrap(),
            path: &path,
        };
        build_with(disks, true, Some(vsock))
    }

    /// The same, and its drivers are ready.
    fn driven(dir: &TempDir, disks: &[BlkDisk]) -> Machine {
        let machine = full(dir, disks);
        for (index, queues) in [(0, 1), (1, 1), (2, 2), (3, 3)] {
            drive(&machine, BARS + index * BAR, queues);
            assert_eq!(status(&machine, BARS + index * BAR), 15);
        }
        machine
    }

    fn saved(machine: &Machine) -> MachineState {
        machine.quiesce();
        let state = machine.save();
        machine.resume();
        state
    }

    #[test]
    fn a_machine_is_the_same_after_its_state_was_written_and_read() {
        let dir = TempDir::new();
        let disks = [disk(&dir, "disk", 64)];
        let first = driven(&dir, &disks);
        first.port_write(0x3ff, &[0x5a]);
        first.port_write(0x70, &[0x33]);
        first.port_write(0xcf8, &0x8000_0810_u32.to_le_bytes());
        // The disk's BAR goes elsewhere.
        let elsewhere = BARS + 0x10_0000;
        first.port_write(0xcfc, &(elsewhere as u32).to_le_bytes());
        first.mmio_write(layout::IOAPIC, &[0x18]);
        first.mmio_write(layout::IOAPIC + 0x10, &0x31_u32.to_le_bytes());
        let text = serde_json::to_string(&saved(&first)).unwrap();
        let state: MachineState = serde_json::from_str(&text).unwrap();

        let second = full(&dir, &disks);
        second.restore(&state).unwrap();
        assert_eq!(second.save(), state);
        second.resume();
        assert_eq!(saved(&second), state);
        assert_eq!((status(&second, elsewhere), status(&second, BARS)), (15, 0xff));
        let mut data = [0; 4];
        second.port_read(0xcf8, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x8000_0810);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let dir = TempDir::new();
        let disks = [disk(&dir, "a", 64), disk(&dir, "b", 4096), disk(&dir, "c", 8192)];
        let of = |disks: &[BlkDisk], console| saved(&build(disks, console));
        let clone =
            |indices: &[usize]| -> Vec<_> { indices.iter().map(|at| disks[*at].try_clone().unwrap()).collect() };
        let good = of(&clone(&[0, 1]), false);
        let refuse = |indices: &[usize], console, state: &MachineState| {
            let machine = build(&clone(indices), console);
            machine.restore(state).unwrap_err().to_string()
        };
        assert_eq!(
            refuse(&[0, 2], false, &good),
            "disk 1 has 8192 sectors, the snapshot's has 4096"
        );
        assert_eq!(
            refuse(&[0], false, &good),
            "the machine has 1 disks, the snapshot's has 2"
        );
        assert_eq!(
            refuse(&[0, 1], true, &good),
            "the machine has a virtio console, the snapshot's has none"
        );
        let listener = |name| UnixListener::bind(dir.path(name)).unwrap();
        let path = dir.path("vsock");
        let vsock = |cid, name| {
            Some(VsockPart {
                cid,
                listener: listener(name),
                path: &path,
            })
        };
        let with = saved(&build_with(&clone(&[0, 1]), false, vsock(3, "socket-a")));
        assert_eq!(
            refuse(&[0, 1], false, &with),
            "the machine has none, the snapshot's has a vsock"
        );
        build_with(&clone(&[0, 1]), false, vsock(4, "socket-b"))
            .restore(&with)
            .unwrap();
        let state = MachineState {
            version: 2,
            ..good.clone()
        };
        assert_eq!(
            refuse(&[0, 1], false, &state),
            "the machine knows state version 1, the snapshot's has 2"
        );
        build(&clone(&[0, 1]), false).restore(&good).unwrap();
    }

    /// Damages a random leaf of a state, as a file could be.
    fn damage(value: &mut Value, random: &mut Random) {
        match value {
            Value::Object(fields) if !fields.is_empty() => {
                let at = random.below(fields.len() as u64) as usize;
                damage(fields.values_mut().nth(at).unwrap(), random);
            }
            Value::Array(items) if !items.is_empty() => {
                let at = random.below(items.len() as u64) as usize;
                match random.below(8) {
                    0 => drop(items.remove(at)),
                    _ => damage(&mut items[at], random),
                }
            }
            Value::Number(number) => {
                let bit = 1 << random.below(40);
                *value = [0, u16::MAX.into(), number.as_u64().unwrap_or(0) ^ bit][random.below(3) as usize].into();
            }
            Value::String(text) if !text.is_empty() => {
                let at = random.below(text.len() as u64) as usize;
                text.replace_range(at..=at, &random.below(10).to_string());
            }
            Value::Bool(on) => *on = !*on,
            _ => *value = 1.into(),
        }
    }

    #[test]
    fn damaged_states_are_refused_or_harmless() {
        let dir = TempDir::new();
        let disks = [disk(&dir, "disk", 64)];
        let good = serde_json::to_value(saved(&driven(&dir, &disks))).unwrap();
        let mut random = Random(5);
        let (mut refused, mut taken) = (0, 0);
        for _ in 0..1500 {
            let mut value = good.clone();
            damage(&mut value, &mut random);
            let Ok(state) = serde_json::from_value::<MachineState>(value) else {
                continue;
            };
            let machine = full(&dir, &disks);
            if machine.restore(&state).is_err() {
                refused += 1;
                continue;
            }
            taken += 1;
            machine.resume();
            for index in 0..4 {
                machine.mmio_write(BARS + index * BAR + 0x3000, &[0; 2]);
                machine.mmio_write(BARS + index * BAR + 20, &[0]);
            }
            machine.com1.input(b"x");
        }
        assert!(refused > 100 && taken > 100, "{refused} {taken}");
        assert_eq!(std::fs::read(dir.path("disk")).unwrap(), [0; 64 * 512]);
    }

    #[test]
    fn disks_can_be_named_and_flushed() {
        let dir = TempDir::new();
        let machine = build(&[disk(&dir, "disk", 64)], false);
        machine.flush_disks().unwrap();
        let disks: Vec<_> = machine.disks().collect();
        let path: &Path = &dir.path("disk");
        assert_eq!((disks[0].path(), disks[0].size()), (path, 64 * 512));
        let before = disks[0].identity().unwrap();
        std::fs::write(path, [1; 64 * 512]).unwrap();
        let after = disks[0].identity().unwrap();
        assert_eq!((before.device, before.inode), (after.device, after.inode));
    }
}
