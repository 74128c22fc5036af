//! virtio over PCI (virtio 1.2 section 4.1), modern only, interrupts by MSI-X only. One 32-bit BAR holds everything:
//!
//! | offset | what |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | interrupt status |
//! | 0x2000 | device configuration |
//! | 0x3000 | notifications, 4 bytes a queue |
//! | 0x4000 | MSI-X table |
//! | 0x5000 | MSI-X pending bits |

use super::bells::Bells;
use super::worker::Worker;
use super::{Interrupt, Link, Signal, VirtQueue, VirtioDevice};
use crate::bell::Doorbells;
use crate::bus::{get_le, put_le};
use crate::msix;
use crate::pci::{ConfigSpace, Identity, PciFunction};
use posada_engine::MsiSink;
use posada_memory::GuestRam;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use virtio_queue::{Queue, QueueT};

const BAR: usize = 0;
const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const REGION: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 9;

/// VIRTIO_F_INDIRECT_DESC, VIRTIO_F_EVENT_IDX, VIRTIO_F_VERSION_1.
const TRANSPORT_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const NEEDS_RESET: u8 = 64;

/// What the driver says about a queue.
#[derive(Clone, Copy)]
pub(super) struct QueueSetup {
    pub(super) size: u16,
    pub(super) enabled: bool,
    /// Descriptor table, available ring, used ring.
    pub(super) rings: [u64; 3],
}

/// Who has the queues.
pub(super) enum Work {
    /// Nobody: the driver is not ready, or has broken them.
    Idle,
    /// The device's thread.
    Running(Worker),
    /// We, as the machine stands still.
    Held(Vec<VirtQueue>),
}

pub(super) struct Common {
    pub(super) status: u8,
    pub(super) device_select: u32,
    pub(super) driver_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u16,
    pub(super) queues: Vec<QueueSetup>,
    pub(super) work: Work,
    /// The machine stands still: no thread may run.
    pub(super) held: bool,
    /// The queues come from a saved state and nobody has served them since.
    pub(super) restored: bool,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    pub(super) device: Arc<dyn VirtioDevice>,
    pub(super) ram: Arc<GuestRam>,
    pub(super) interrupt: Arc<Interrupt>,
    pub(super) config: Mutex<ConfigSpace>,
    pub(super) msix_capability: u16,
    signal: Arc<Signal>,
    bells: Bells,
    /// The capability by which BARs are accessed through configuration space (virtio 1.2 section 4.1.4.9).
    window: u16,
    // Held over activation and reset, so that those come one at a time. Devices and their threads never take it.
    pub(super) common: Mutex<Common>,
}

/// Base class, sub-class, interface for a virtio device id.
fn class(id: u16) -> u32 {
    match id {
        2 => 0x01_80_00,
        3 => 0x07_80_00,
        _ => 0xff_00_00,
    }
}

impl VirtioPci {
    /// Wraps `device`; its interrupts go to `sink`, and `doorbells` may have its driver's notifications go past us.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        sink: Arc<dyn MsiSink>,
        doorbells: Arc<dyn Doorbells>,
    ) -> io::Result<Arc<Self>> {
        let queues = device.queue_sizes().len();
        let interrupt = Arc::new(Interrupt::new(sink, queues));
        let id = DEVICE_BASE + device.id();
        let mut config = ConfigSpace::new(Identity {
            vendor: VENDOR,
            device: id,
            class: class(device.id()),
            revision: 1,
            subsystem: (VENDOR, id),
        });
        config.add_bar(BAR, BAR_SIZE, false);
        let (body, writable) = interrupt.msix.capability(BAR as u8, TABLE as u32, PENDING as u32);
        let msix_capability = config.add_capability(msix::CAPABILITY, &body, &writable).into();
        let mut add = |kind: u8, offset: u64, length: u64, more: &[u8]| {
            // cap_len, cfg_type, bar, id, padding, offset, length
            let mut body = vec![16 + more.len() as u8, kind, BAR as u8, 0, 0, 0];
            body.extend_from_slice(&(offset as u32).to_le_bytes());
            body.extend_from_slice(&(length as u32).to_le_bytes());
            body.extend_from_slice(more);
            let mut writable = vec![0; body.len()];
            if kind == 5 {
                // bar, offset, length and data are the driver's.
                writable[2] = 0xff;
                writable[6..].fill(0xff);
            }
            config.add_capability(VENDOR_CAPABILITY, &body, &writable)
        };
        add(1, COMMON, 64, &[]);
        add(2, NOTIFY, REGION, &NOTIFY_MULTIPLIER.to_le_bytes());
        add(3, ISR, 4, &[]);
        add(4, DEVICE, REGION, &[]);
        let window = add(5, 0, 0, &[0; 4]).into();
        let common = Common::new(&*device);
        let signal = Arc::new(Signal::new()?);
        device.connect(Link {
            signal: Arc::clone(&signal),
            interrupt: Arc::clone(&interrupt),
        });
        Ok(Arc::new(Self {
            device,
            ram,
            interrupt,
            config: Mutex::new(config),
            msix_capability,
            bells: Bells::new(doorbells, Arc::clone(&signal)),
            signal,
            window,
            common: Mutex::new(common),
        }))
    }

    pub(super) fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let common = self.common.lock().unwrap();
        let mut image = [0; 64];
        let half = |value: u64, select: u32| match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        };
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        let load = |vector: &AtomicU16| vector.load(Ordering::Relaxed).to_le_bytes();
        put(0, &common.device_select.to_le_bytes());
        put(4, &half(self.features(), common.device_select).to_le_bytes());
        put(8, &common.driver_select.to_le_bytes());
        put(12, &half(common.driver_features, common.driver_select).to_le_bytes());
        put(16, &load(&self.interrupt.config_vector));
        put(18, &(common.queues.len() as u16).to_le_bytes());
        let broken = self.interrupt.broken.load(Ordering::Acquire);
        put(20, &[common.status | if broken { NEEDS_RESET } else { 0 }]);
        put(21, &[self.interrupt.generation.load(Ordering::Acquire)]);
        put(22, &common.queue_select.to_le_bytes());
        let select = usize::from(common.queue_select);
        if let Some(queue) = common.queues.get(select) {
            put(24, &queue.size.to_le_bytes());
            put(26, &load(&self.interrupt.queue_vectors[select]));
            put(28, &u16::from(queue.enabled).to_le_bytes());
            put(30, &common.queue_select.to_le_bytes());
            for (at, ring) in queue.rings.iter().enumerate() {
                put(32 + 8 * at, &ring.to_le_bytes());
            }
        }
        super::read_config(&image, offset, data);
    }

    /// Stores of a field's own width, or of a ring address as a whole or by halves; others are ignored.
    fn common_write(&self, offset: u64, data: &[u8]) {
        if data.len() == 8 {
            self.common_write(offset, &data[..4]);
            return self.common_write(offset + 4, &data[4..]);
        }
        let value = get_le(data) as u32;
        let mut common = self.common.lock().unwrap();
        let select = usize::from(common.queue_select);
        // Once the device runs, its queues and features are settled.
        let settled = common.status & DRIVER_OK != 0;
        match (offset, data.len()) {
            (0, 4) => common.device_select = value,
            (8, 4) => common.driver_select = value,
            (12, 4) if common.status & FEATURES_OK == 0 => {
                let (low, value) = (common.driver_features as u32, u64::from(value));
                match common.driver_select {
                    0 => common.driver_features = common.driver_features >> 32 << 32 | value,
                    1 => common.driver_features = value << 32 | u64::from(low),
                    _ => {}
                }
            }
            (16, 2) => self.interrupt.set_vector(&self.interrupt.config_vector, value as u16),
            (20, 1) => self.set_status(&mut common, value as u8),
            (22, 2) => common.queue_select = value as u16,
            (26, 2) => {
                if let Some(vector) = self.interrupt.queue_vectors.get(select) {
                    self.interrupt.set_vector(vector, value as u16);
                }
            }
            (24 | 28, 2) | (32..=52, 4) if !settled => {
                let largest = self.device.queue_sizes().get(select).copied().unwrap_or(0);
                let Some(queue) = common.queues.get_mut(select).filter(|queue| !queue.enabled) else {
                    return;
                };
                match offset {
                    24 if value.is_power_of_two() && value <= largest.into() => queue.size = value as u16,
                    28 => queue.enabled = value == 1,
                    32..=52 if offset.is_multiple_of(4) => {
                        let ring = &mut queue.rings[(offset as usize - 32) / 8];
                        let shift = offset % 8 * 8;
                        *ring = *ring & !(0xffff_ffff << shift) | u64::from(value) << shift;
                    }
                    _ => {}
                }
            }
            _ => {}
        }
    }

    fn set_status(&self, common: &mut Common, status: u8) {
        if status == 0 {
            // Joins the device's thread.
            common.work = Work::Idle;
            self.device.reset();
            self.interrupt.reset();
            *common = Common {
                held: common.held,
                ..Common::new(&*self.device)
            };
            return;
        }
        // Bits are only ever added; FEATURES_OK stays clear if we cannot do what the driver wants.
        let mut added = status & !common.status & !NEEDS_RESET;
        if added & FEATURES_OK != 0 && !self.can_do(common.driver_features) {
            added &= !FEATURES_OK;
        }
        if (common.status | added) & FEATURES_OK == 0 {
            added &= !DRIVER_OK;
        }
        common.status |= added;
        if added & DRIVER_OK != 0 {
            self.activate(common);
        }
    }

    /// Whether these features may be what driver and device agree on.
    pub(super) fn can_do(&self, features: u64) -> bool {
        features & VERSION_1 != 0 && features & !self.features() == 0
    }

    /// The queues as the driver has set them up, each to go on from its position in available and used ring. Fails with the
    /// number of one that is not in RAM.
    pub(super) fn queues(
        &self,
        common: &Common,
        position: impl Fn(usize) -> (u16, u16),
    ) -> Result<Vec<VirtQueue>, usize> {
        let mut queues = Vec::new();
        for (index, (setup, largest)) in common.queues.iter().zip(self.device.queue_sizes()).enumerate() {
            let mut queue = Queue::new(*largest).expect("queue sizes are powers of two");
            if setup.enabled {
                let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
                let [descriptors, available, used] = setup.rings.map(halves);
                queue.set_size(setup.size);
                queue.set_desc_table_address(descriptors.0, descriptors.1);
                queue.set_avail_ring_address(available.0, available.1);
                queue.set_used_ring_address(used.0, used.1);
                queue.set_event_idx(common.driver_features & EVENT_IDX != 0);
                let (next_available, next_used) = position(index);
                queue.set_next_avail(next_available);
                queue.set_next_used(next_used);
                queue.set_ready(true);
                // A misaligned address is not taken over.
                let taken = [queue.desc_table(), queue.avail_ring(), queue.used_ring()] == setup.rings;
                if !taken || !queue.is_valid(self.ram.memory()) {
                    return Err(index);
                }
            }
            let interrupt = Arc::clone(&self.interrupt);
            queues.push(VirtQueue::new(queue, Arc::clone(&self.ram), interrupt, index as u16));
        }
        Ok(queues)
    }

    fn activate(&self, common: &mut Common) {
        match self.queues(common, |_| (0, 0)) {
            Ok(queues) => {
                self.interrupt.open();
                common.work = Work::Held(queues);
                if !common.held {
                    self.start(common);
                }
            }
            Err(queue) => {
                tracing::warn!(queue, "a guest's driver put a virtqueue outside RAM");
                self.interrupt.needs_reset();
            }
        }
    }

    /// Lets the device's thread have the queues, if we have them.
    fn start(&self, common: &mut Common) {
        common.work = match std::mem::replace(&mut common.work, Work::Idle) {
            Work::Held(queues) => {
                if std::mem::take(&mut common.restored) {
                    queues.iter().for_each(VirtQueue::remind);
                }
                Work::Running(Worker::spawn(
                    Arc::clone(&self.device),
                    queues,
                    Arc::clone(&self.signal),
                    Arc::clone(&self.interrupt),
                ))
            }
            work => work,
        };
    }

    /// Stops the device between two requests: the one it is at is finished, answered and announced; all others stay in the
    /// ring. Until [`VirtioPci::resume`] it touches neither guest memory nor what is behind it, and sends nothing.
    pub fn quiesce(&self) {
        let mut common = self.common.lock().unwrap();
        common.held = true;
        common.work = match std::mem::replace(&mut common.work, Work::Idle) {
            Work::Running(worker) => worker.hold().map_or(Work::Idle, Work::Held),
            work => work,
        };
        self.interrupt.hold(true);
    }

    /// Goes on where [`VirtioPci::quiesce`] or a restored state has stopped, and looks at all rings at once.
    pub fn resume(&self) {
        let mut common = self.common.lock().unwrap();
        common.held = false;
        self.interrupt.hold(false);
        self.start(&mut common);
    }

    /// The BAR access that the driver has set up in the window capability: offset and width.
    fn window_target(&self) -> Option<(u64, usize)> {
        let mut capability = [0; 16];
        self.config.lock().unwrap().read(self.window, &mut capability);
        let (offset, length) = (get_le(&capability[8..12]), get_le(&capability[12..16]));
        let inside = offset.is_multiple_of(length.max(1)) && offset + length <= BAR_SIZE;
        (usize::from(capability[4]) == BAR && matches!(length, 1 | 2 | 4) && inside)
            .then_some((offset, length as usize))
    }
}

impl Common {
    fn new(device: &dyn VirtioDevice) -> Self {
        let queue = |size: &u16| QueueSetup {
            size: *size,
            enabled: false,
            rings: [0; 3],
        };
        Self {
            status: 0,
            device_select: 0,
            driver_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: device.queue_sizes().iter().map(queue).collect(),
            work: Work::Idle,
            held: false,
            restored: false,
        }
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.config
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let window = self.window + 16;
        if (window..window + 4).contains(&offset)
            && let Some((at, length)) = self.window_target()
        {
            let mut bytes = [0; 4];
            self.bar_read(BAR, at, &mut bytes[..length]);
            self.config.lock().unwrap().write(window, &bytes);
        }
        self.config.lock().unwrap().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap().write(offset, data);
        let control = self.msix_capability + 2;
        if offset < control + 2 && offset + data.len() as u16 > control {
            let control = self.config.lock().unwrap().word(control);
            self.interrupt.msix.set_control(control);
        }
        let window = self.window + 16;
        if (window..window + 4).contains(&offset)
            && let Some((at, length)) = self.window_target()
        {
            let mut bytes = [0; 4];
            self.config.lock().unwrap().read(window, &mut bytes);
            self.bar_write(BAR, at, &bytes[..length]);
        }
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        let within = offset % REGION;
        match offset - within {
            COMMON => self.common_read(within, data),
            ISR if within == 0 => put_le(self.interrupt.isr.swap(0, Ordering::Relaxed).into(), data),
            DEVICE => self.device.read_config(within, data),
            TABLE => self.interrupt.msix.table_read(within, data),
            PENDING => self.interrupt.msix.pending_read(within, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        let within = offset % REGION;
        match offset - within {
            COMMON => self.common_write(within, data),
            NOTIFY => self.signal.kick(),
            TABLE => self.interrupt.msix.table_write(within, data),
            _ => {}
        }
    }

    fn placed(&self, _bar: usize, range: Option<Range<u64>>) {
        let bell = |queue: u64, base: u64| base + NOTIFY + queue * u64::from(NOTIFY_MULTIPLIER);
        let queues = 0..self.device.queue_sizes().len() as u64;
        self.bells.hang(match range {
            Some(range) => queues.map(|queue| bell(queue, range.start)).collect(),
            None => Vec::new(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::console::Console;
    use super::super::driver::Driver;
    use super::super::rng::Rng;
    use super::*;
    use crate::testing::Random;

    fn driver() -> Driver {
        Driver::new(Arc::new(Rng::new().unwrap()), EVENT_IDX)
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let driver = driver();
        driver.negotiate(1 << 3);
        assert_eq!(driver.status(), 3, "no FEATURES_OK");
        driver.set_status(15);
        assert_eq!(driver.status(), 3, "and no DRIVER_OK");
        driver.negotiate(0);
        assert_eq!(driver.status(), 11);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
    }

    #[test]
    fn queues_outside_ram_or_misaligned_ask_for_a_reset() {
        let mut driver = driver();
        for rings in [super::super::driver::RAM, u64::MAX - 0xfff, 0x1_0008] {
            driver.negotiate(0);
            driver.enable(0, rings);
            driver.set_status(15);
            assert_eq!(driver.status(), 15 | NEEDS_RESET, "{rings:#x}");
        }
        driver.start(0);
        assert_eq!(driver.status(), 15);
        assert_eq!(driver.request(0, &[(0x4_0000, 8, true)]), 8);
    }

    #[test]
    fn the_notification_threshold_of_event_idx_is_obeyed() {
        let mut driver = driver();
        // used_event is 0: the first buffer interrupts, the second does not.
        driver.request(0, &[(0x4_0000, 8, true)]);
        while driver.sink.is_empty() {
            std::thread::yield_now();
        }
        driver.sink.take();
        driver.make(0, &[(0x4_0000, 8, true)]);
        while driver.used(0) != 2 {
            std::thread::yield_now();
        }
        driver.set_status(0);
        assert_eq!(driver.sink.take(), []);
    }

    #[test]
    fn a_bar_can_be_read_through_configuration_space() {
        let driver = driver();
        let window = driver.pci.window;
        driver.pci.config_write(window + 8, &20_u32.to_le_bytes());
        driver.pci.config_write(window + 12, &1_u32.to_le_bytes());
        let mut data = [0; 4];
        driver.pci.config_read(window + 16, &mut data);
        assert_eq!(data, [15, 0, 0, 0], "the device status");
        driver.pci.config_write(window + 16, &[0; 4]);
        assert_eq!(driver.status(), 0);
        driver.pci.config_write(window + 8, &0xffff_fffc_u32.to_le_bytes());
        driver.pci.config_write(window + 12, &0xffff_ffff_u32.to_le_bytes());
        driver.pci.config_read(window + 16, &mut data);
    }

    #[test]
    fn random_accesses_never_panic() {
        let mut random = Random::new(6);
        let driver = Driver::new(Console::new(Box::new(std::io::sink()), Some((80, 25))), 0);
        for step in 0..20_000 {
            let mut data: Vec<u8> = (0..=random.below(64)).map(|_| random.next() as u8).collect();
            let width = [1, 2, 4, 8, data.len()][random.below(5) as usize].min(data.len());
            let common = random.below(2) == 0;
            let at = if common {
                random.below(64)
            } else {
                random.below(BAR_SIZE - 64)
            };
            driver.pci.bar_write(BAR, at, &data[..width]);
            driver.pci.bar_read(BAR, random.below(BAR_SIZE - 64), &mut data);
            let register = random.below(64) as u16 * 4;
            driver.pci.config_write(register, &data[..width.min(4)]);
            driver.pci.config_read(register, &mut data[..width.min(4)]);
            if step % 500 == 0 {
                driver.set_status(0);
            }
        }
    }
}
