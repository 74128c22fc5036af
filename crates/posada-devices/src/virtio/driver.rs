//! A driver for the unit tests: sets a device up through its BAR as a guest would, and makes chains by hand.

use super::{VirtioDevice, VirtioPci, VirtioState};
use crate::bell::NoDoorbells;
use crate::msix;
use crate::pci::PciFunction;
use crate::testing::Sink;
use posada_memory::GuestRam;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

pub const RAM: u64 = 1 << 20;
/// Where the test's data buffers may go.
pub const DATA: u64 = 0x4_0000;
/// Entries of each queue.
pub const SIZE: u16 = 32;
/// Rings lie at 0x1_0000 + queue * 0x4000.
const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;

pub const WRITE: u16 = 2;
pub const NEXT: u16 = 1;

pub struct Driver {
    pub ram: Arc<GuestRam>,
    pub pci: Arc<VirtioPci>,
    pub sink: Arc<Sink>,
    /// By queue: chains made available so far.
    pub available: Vec<u16>,
}

impl Driver {
    /// A device brought to DRIVER_OK with `features` (besides VERSION_1) and all queues on.
    pub fn new(device: Arc<dyn VirtioDevice>, features: u64) -> Self {
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let sink = Sink::new();
        let queues = device.queue_sizes().len();
        let pci = VirtioPci::new(device, ram.clone(), sink.clone(), Arc::new(NoDoorbells)).unwrap();
        let mut driver = Self {
            ram,
            pci,
            sink,
            available: vec![0; queues],
        };
        driver.start(features);
        driver
    }

    /// Saves the device, through its written form, and goes on with another one in its place.
    pub fn move_to(&mut self, device: Arc<dyn VirtioDevice>) {
        self.pci.quiesce();
        let text = serde_json::to_string(&self.pci.save()).unwrap();
        let state: VirtioState = serde_json::from_str(&text).unwrap();
        self.pci = VirtioPci::new(device, self.ram.clone(), self.sink.clone(), Arc::new(NoDoorbells)).unwrap();
        self.pci.restore(&state).unwrap();
        let mut again = self.pci.save();
        // A console has its own size.
        again.device = state.device.clone();
        assert_eq!(again, state);
        self.pci.resume();
    }

    /// The chains given back from number `from` on: head and bytes written.
    pub fn answers(&self, queue: usize, from: u16) -> Vec<(u32, u32)> {
        let answer = |number: u16| {
            let at = Self::rings(queue) + USED + 4 + 8 * u64::from(number % SIZE);
            let read = |at| self.ram.memory().read_obj(GuestAddress(at)).unwrap();
            (read(at), read(at + 4))
        };
        let count = self.used(queue).wrapping_sub(from);
        (0..count).map(|more| answer(from.wrapping_add(more))).collect()
    }

    pub fn start(&mut self, features: u64) {
        self.negotiate(features);
        assert_eq!(self.status() & 8, 8, "FEATURES_OK");
        for queue in 0..self.available.len() {
            self.enable(queue, Self::rings(queue));
            self.available[queue] = 0;
            let zeroes = [0; 0x3000];
            self.ram
                .memory()
                .write_slice(&zeroes, GuestAddress(Self::rings(queue)))
                .unwrap();
        }
        self.set_status(15);
    }

    pub fn negotiate(&self, features: u64) {
        // MSI-X on, vector n has data 0x30 + n.
        self.pci.config_write(0x42, &0x8000_u16.to_le_bytes());
        for vector in 0..=self.available.len() as u64 {
            let at = 0x4000 + vector * msix::ENTRY;
            self.pci.bar_write(0, at, &0xfee0_0000_u64.to_le_bytes());
            self.pci.bar_write(0, at + 8, &(0x30 + vector).to_le_bytes());
        }
        self.set_status(0);
        self.set_status(3);
        let features = features | 1 << 32;
        for half in 0..2_u32 {
            self.write32(8, half);
            self.write32(12, (features >> (32 * half)) as u32);
        }
        self.pci.bar_write(0, 16, &0_u16.to_le_bytes());
        self.set_status(11);
    }

    pub fn enable(&self, queue: usize, rings: u64) {
        self.pci.bar_write(0, 22, &(queue as u16).to_le_bytes());
        self.pci.bar_write(0, 24, &SIZE.to_le_bytes());
        self.pci.bar_write(0, 26, &(queue as u16 + 1).to_le_bytes());
        self.pci.bar_write(0, 32, &rings.to_le_bytes());
        self.pci.bar_write(0, 40, &rings.wrapping_add(AVAILABLE).to_le_bytes());
        let used = rings.wrapping_add(USED);
        self.write32(48, used as u32);
        self.write32(52, (used >> 32) as u32);
        self.pci.bar_write(0, 28, &1_u16.to_le_bytes());
    }

    fn rings(queue: usize) -> u64 {
        RINGS + 0x4000 * queue as u64
    }

    fn write32(&self, at: u64, value: u32) {
        self.pci.bar_write(0, at, &value.to_le_bytes());
    }

    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut data = [0; N];
        self.pci.bar_read(0, at, &mut data);
        data
    }

    pub fn status(&self) -> u8 {
        self.read::<1>(20)[0]
    }

    pub fn set_status(&self, status: u8) {
        self.pci.bar_write(0, 20, &[status]);
    }

    pub fn descriptor(&self, queue: usize, index: u16, gpa: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&gpa.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        let at = Self::rings(queue) + 16 * u64::from(index);
        self.ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain at `head` available and notifies.
    pub fn offer(&mut self, queue: usize, head: u16) {
        self.put_available(queue, head);
        self.pci
            .bar_write(0, 0x3000 + 4 * queue as u64, &(queue as u16).to_le_bytes());
    }

    /// Makes the chain at `head` available.
    pub fn put_available(&mut self, queue: usize, head: u16) {
        let ring = Self::rings(queue) + AVAILABLE;
        let index = self.available[queue];
        let slot = ring + 4 + 2 * u64::from(index % SIZE);
        self.ram.memory().write_obj(head, GuestAddress(slot)).unwrap();
        self.available[queue] = index.wrapping_add(1);
        let next = self.available[queue];
        self.ram.memory().write_obj(next, GuestAddress(ring + 2)).unwrap();
    }

    pub fn used(&self, queue: usize) -> u16 {
        self.ram
            .memory()
            .read_obj(GuestAddress(Self::rings(queue) + USED + 2))
            .unwrap()
    }

    /// Waits until all chains were used; returns the bytes written of the last one.
    pub fn wait(&self, queue: usize) -> u32 {
        self.sink.wait(|| self.used(queue) == self.available[queue]);
        let last = self.available[queue].wrapping_sub(1) % SIZE;
        let at = Self::rings(queue) + USED + 4 + 8 * u64::from(last) + 4;
        self.ram.memory().read_obj(GuestAddress(at)).unwrap()
    }

    /// One chain: buffers with whether the device writes them. Waits for it; returns the bytes written.
    pub fn request(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) -> u32 {
        self.make(queue, buffers);
        self.wait(queue)
    }

    pub fn make(&mut self, queue: usize, buffers: &[(u64, u32, bool)]) {
        for (index, (gpa, length, write)) in buffers.iter().enumerate() {
            let more = index + 1 < buffers.len();
            let flags = if *write { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.descriptor(queue, index as u16, *gpa, *length, flags, index as u16 + 1);
        }
        self.offer(queue, 0);
    }

    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        self.ram.memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub fn get(&self, gpa: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }
}
