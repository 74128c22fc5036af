//! A virtio function as saved: configuration space, MSI-X, transport registers, positions in the queues, and the device's
//! own part.

use super::blk::BlkState;
use super::console::ConsoleState;
use super::interrupt::NO_VECTOR;
use super::transport::{Common, DRIVER_OK, FEATURES_OK, NEEDS_RESET, QueueSetup, Work};
use super::vsock::VsockState;
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
    /// Sockets.
    Vsock(VsockState),
}

impl DeviceState {
    /// The error of a `device` that is of another kind.
    pub(super) fn is_not(&self, device: &dyn VirtioDevice) -> StateError {
        let kind = match self {
            DeviceState::Blk(_) => "blk",
            DeviceState::Rng => "rng",
            DeviceState::Console(_) => "console",
            DeviceState::Vsock(_) => "vsock",
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
            restored: true,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::blk::{Blk, BlkDisk, open_disk};
    use super::super::console::Console;
    use super::super::driver::{DATA, Driver, NEXT, RAM, WRITE};
    use super::super::rng::Rng;
    use super::*;
    use crate::bell::NoDoorbells;
    use crate::pci::PciFunction;
    use crate::testing::{Random, Sink, damage};
    use posada_memory::GuestRam;
    use std::path::PathBuf;
    use std::sync::Arc;

    const EVENT_IDX: u64 = 1 << 29;
    const SECTORS: u32 = 400;
    /// Requests at a time: three descriptors each.
    const SLOTS: u32 = 10;

    struct File(PathBuf);

    impl File {
        fn new(name: &str, bytes: u64) -> Self {
            let path = std::env::temp_dir().join(format!("posada-state-{name}-{}", std::process::id()));
            std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
            Self(path)
        }

        fn disk(&self) -> BlkDisk {
            open_disk(&self.0, false).unwrap()
        }
    }

    impl Drop for File {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    /// Offers a write of its own number to sector `number`.
    fn write(driver: &mut Driver, number: u32) {
        let slot = number % SLOTS;
        let (header, buffer) = (DATA + 0x1000 * u64::from(slot), DATA + 0x1000 * u64::from(slot) + 0x200);
        let status = header + 0x100;
        driver.put(header, &1_u32.to_le_bytes());
        driver.put(header + 8, &u64::from(number).to_le_bytes());
        driver.put(buffer, &number.to_le_bytes().repeat(128));
        driver.put(status, &[0xee]);
        let head = 3 * slot as u16;
        driver.descriptor(0, head, header, 16, NEXT, head + 1);
        driver.descriptor(0, head + 1, buffer, 512, NEXT, head + 2);
        driver.descriptor(0, head + 2, status, 1, WRITE, 0);
        driver.offer(0, head);
    }

    #[test]
    fn every_request_is_answered_once_when_a_device_is_saved_amid_traffic() {
        for (features, seed) in [(0, 1), (EVENT_IDX, 2), (EVENT_IDX, 3)] {
            let file = File::new("traffic", u64::from(SECTORS) * 512);
            let disk = file.disk();
            let mut random = Random::new(seed);
            let mut devices = vec![Blk::new(disk.try_clone().unwrap(), "d", 1)];
            let mut driver = Driver::new(devices[0].clone(), features);
            let mut number = 0;
            while number < SECTORS {
                let batch = number..SECTORS.min(number + 1 + random.below(SLOTS.into()) as u32);
                let before = driver.used(0);
                let (from, how) = (random.below(u64::from(SLOTS)) as u32, random.below(3));
                for number in batch.clone() {
                    if how == 0 && number == batch.start + from {
                        // From here on nobody answers the doorbell, until another device does.
                        driver.pci.quiesce();
                    }
                    write(&mut driver, number);
                }
                if how < 2 {
                    devices.push(Blk::new(disk.try_clone().unwrap(), "d", 1));
                    driver.move_to(devices.last().unwrap().clone());
                }
                while driver.used(0) != driver.available[0] {
                    std::thread::yield_now();
                }
                let expected: Vec<_> = batch.clone().map(|number| (3 * (number % SLOTS), 1)).collect();
                assert_eq!(driver.answers(0, before), expected);
                for number in batch.clone() {
                    assert_eq!(driver.get(DATA + 0x1000 * u64::from(number % SLOTS) + 0x100, 1), [0]);
                }
                number = batch.end;
            }
            let requests: u64 = devices.iter().map(|device| device.counters().requests).sum();
            assert_eq!(requests, u64::from(SECTORS), "over {} devices", devices.len());
            let content = std::fs::read(&file.0).unwrap();
            for number in 0..SECTORS {
                let sector = &content[number as usize * 512..][..512];
                assert_eq!(sector, number.to_le_bytes().repeat(128));
            }
        }
    }

    #[test]
    fn a_quiesced_device_does_nothing_and_then_all() {
        let mut driver = Driver::new(Arc::new(Rng::new().unwrap()), 0);
        driver.pci.quiesce();
        driver.sink.take();
        driver.make(0, &[(DATA, 8, true)]);
        let state = driver.pci.save();
        assert_eq!((driver.used(0), driver.sink.take()), (0, vec![]));
        assert_eq!((state.queues[0].next_available, state.status), (0, 15));
        driver.pci.resume();
        assert_eq!(driver.wait(0), 8);
        assert_eq!(driver.pci.save().queues[0].next_used, 1);
        assert_eq!(driver.request(0, &[(DATA, 8, true)]), 8, "saving lets it run on");
    }

    #[test]
    fn an_interrupt_that_waits_behind_a_mask_is_saved() {
        let mut driver = Driver::new(Arc::new(Rng::new().unwrap()), 0);
        // Vector 1's mask.
        driver.pci.bar_write(0, 0x401c, &1_u32.to_le_bytes());
        driver.make(0, &[(DATA, 8, true)]);
        while driver.used(0) != 1 {
            std::thread::yield_now();
        }
        driver.move_to(Arc::new(Rng::new().unwrap()));
        assert_eq!(driver.sink.take(), []);
        driver.pci.bar_write(0, 0x401c, &0_u32.to_le_bytes());
        assert_eq!(driver.sink.take()[0].data, 0x31);
    }

    #[test]
    fn a_driver_that_still_waits_for_an_interrupt_is_reminded() {
        /// Where the driver says when to interrupt: flags, and with EVENT_IDX the number of a chain.
        const FLAGS: u64 = 0x1_1000;
        const USED_EVENT: u64 = FLAGS + 4 + 2 * 32;
        for (features, at, word, reminded) in [
            (0, FLAGS, 0_u16, true),
            (0, FLAGS, 1, false),
            (EVENT_IDX, USED_EVENT, 0, true),
            (EVENT_IDX, USED_EVENT, 1, false),
        ] {
            let mut driver = Driver::new(Arc::new(Rng::new().unwrap()), features);
            driver.request(0, &[(DATA, 8, true)]);
            driver.put(at, &word.to_le_bytes());
            driver.pci.quiesce();
            driver.sink.take();
            driver.move_to(Arc::new(Rng::new().unwrap()));
            assert_eq!(!driver.sink.is_empty(), reminded, "{features:#x} {word}");
            driver.pci.quiesce();
            driver.sink.take();
            driver.pci.resume();
            assert!(driver.sink.is_empty(), "nobody was replaced");
        }
    }

    #[test]
    fn a_console_keeps_its_input_and_tells_of_another_size() {
        let made = |size| Console::new(Box::new(std::io::sink()), Some(size));
        let first = made((80, 25));
        first.input(b"typed before");
        let mut driver = Driver::new(first.clone(), 1);
        let second = made((100, 30));
        second.input(b" and after");
        driver.sink.take();
        driver.move_to(second.clone());
        assert_eq!(driver.sink.take()[0].data, 0x30, "the size has changed");
        assert_eq!(driver.request(0, &[(DATA, 64, true)]), 22);
        assert_eq!(driver.get(DATA, 22), b"typed before and after");
        driver.pci.quiesce();
        second.input(b"held");
        second.resize(132, 50);
        driver.make(0, &[(DATA, 64, true)]);
        assert_eq!(driver.sink.take().len(), 1, "the answer from before");
        assert_eq!(driver.used(0), 1);
        driver.pci.resume();
        assert_eq!(driver.wait(0), 4);
        assert!(driver.sink.take().iter().any(|msi| msi.data == 0x30));
    }

    #[test]
    fn a_device_that_waits_for_its_reset_still_does_elsewhere() {
        let mut driver = Driver::new(Arc::new(Rng::new().unwrap()), 0);
        driver.descriptor(0, 0, RAM, 8, WRITE, 0);
        driver.offer(0, 0);
        driver.sink.wait(|| driver.status() & 64 != 0);
        driver.move_to(Arc::new(Rng::new().unwrap()));
        assert_eq!(driver.status() & 64, 64);
        driver.start(0);
        assert_eq!(driver.request(0, &[(DATA, 8, true)]), 8);
    }

    fn idle(device: Arc<dyn VirtioDevice>, ram: &Arc<GuestRam>) -> Arc<VirtioPci> {
        VirtioPci::new(device, ram.clone(), Sink::new(), Arc::new(NoDoorbells)).unwrap()
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let (file, small) = (File::new("fit", 8192 * 512), File::new("small", 4096 * 512));
        let blk = || Blk::new(file.disk(), "d", 1);
        let driver = Driver::new(blk(), 0);
        let good = driver.pci.save();
        let ram = driver.ram.clone();
        let refuse = |device: Arc<dyn VirtioDevice>, state: &VirtioState| {
            let error = idle(device, &ram).restore(state).unwrap_err();
            error.of("disk 1").to_string()
        };
        let small: Arc<dyn VirtioDevice> = Blk::new(small.disk(), "d", 1);
        assert_eq!(refuse(small, &good), "disk 1 has 4096 sectors, the snapshot's has 8192");
        drop(driver);
        let rng = Arc::new(Rng::new().unwrap());
        assert_eq!(
            refuse(rng, &good),
            "disk 1 is PCI device 1af4:1044, the snapshot's is 1af4:1042"
        );
        let mut state = good.clone();
        state.queues[0].used = RAM - 8;
        let error = "disk 1: queue 0 has rings that are not in RAM or not aligned";
        assert_eq!(refuse(blk(), &state), error);
        state.queues[0].used = good.queues[0].used + 1;
        assert_eq!(refuse(blk(), &state), error);
        let mut state = good.clone();
        state.queues[0].size = 512;
        assert_eq!(refuse(blk(), &state), "disk 1: queue 0 cannot have 512 entries");
        let mut state = good.clone();
        state.features |= 1 << 40;
        assert!(refuse(blk(), &state).starts_with("disk 1 offers the features 0x"));
        idle(blk(), &ram).restore(&good).unwrap();
    }

    #[test]
    fn damaged_states_are_refused_or_harmless() {
        let file = File::new("damaged", 1 << 16);
        let disk = file.disk();
        let blk = || Blk::new(disk.try_clone().unwrap(), "d", 1);
        let mut driver = Driver::new(blk(), EVENT_IDX);
        driver.request(0, &[(DATA, 16, false), (DATA + 0x100, 1, true)]);
        driver.pci.quiesce();
        let good = serde_json::to_value(driver.pci.save()).unwrap();
        let mut random = Random::new(21);
        let (mut read, mut taken) = (0, 0);
        for _ in 0..3000 {
            let mut value = good.clone();
            for _ in 0..=random.below(3) {
                damage(&mut value, &mut random);
            }
            let Ok(state) = serde_json::from_value::<VirtioState>(value) else {
                continue;
            };
            read += 1;
            driver.pci = idle(blk(), &driver.ram);
            if driver.pci.restore(&state).is_ok() {
                taken += 1;
                driver.pci.resume();
                driver.pci.bar_write(0, 0x3000, &[0; 2]);
            }
        }
        assert!(read > 1000 && taken > 100 && taken < read, "{read} {taken}");
        // Whatever came before, after a reset it works.
        driver.pci = VirtioPci::new(blk(), driver.ram.clone(), driver.sink.clone(), Arc::new(NoDoorbells)).unwrap();
        driver.start(EVENT_IDX);
        driver.request(0, &[(DATA, 16, false), (DATA + 0x100, 1, true)]);
    }
}
