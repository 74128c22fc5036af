//! A device's way to its driver: queue and configuration interrupts.

use crate::msix::Msix;
use posada_engine::MsiSink;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

/// No vector: the driver wants no interrupt.
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Whether the driver may be told of changes that come from the host's side.
#[derive(Default)]
struct Gate {
    /// The driver is ready.
    open: bool,
    /// The machine stands still: a change waits.
    held: bool,
    late: bool,
}

/// A device's way to its driver.
pub struct Interrupt {
    pub(super) msix: Msix,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) isr: AtomicU8,
    pub(super) generation: AtomicU8,
    pub(super) broken: AtomicBool,
    gate: Mutex<Gate>,
}

impl Interrupt {
    pub(super) fn new(sink: Arc<dyn MsiSink>, queues: usize) -> Self {
        Self {
            msix: Msix::new(sink, queues as u16 + 1),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            broken: AtomicBool::new(false),
            gate: Mutex::default(),
        }
    }

    /// Buffers of `queue` were used.
    pub fn queue(&self, queue: u16) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::Relaxed);
        if let Some(vector) = self.queue_vectors.get(usize::from(queue)) {
            self.msix.signal(vector.load(Ordering::Relaxed));
        }
    }

    /// The device configuration has changed. A driver that is ready is told, as soon as the machine runs.
    pub fn config_changed(&self) {
        let mut gate = self.gate.lock().unwrap();
        if gate.held {
            gate.late = true;
            return;
        }
        self.generation.fetch_add(1, Ordering::Release);
        if gate.open {
            self.config_interrupt();
        }
    }

    /// The device cannot go on until the driver resets it.
    pub fn needs_reset(&self) {
        self.broken.store(true, Ordering::Release);
        self.config_interrupt();
    }

    fn config_interrupt(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::Relaxed);
        self.msix.signal(self.config_vector.load(Ordering::Relaxed));
    }

    /// The driver is ready.
    pub(super) fn open(&self) {
        self.gate.lock().unwrap().open = true;
    }

    /// Holds changes from the host's side back, or lets them come.
    pub(super) fn hold(&self, held: bool) {
        let late = {
            let mut gate = self.gate.lock().unwrap();
            gate.held = held;
            !held && std::mem::take(&mut gate.late)
        };
        if late {
            self.config_changed();
        }
    }

    pub(super) fn reset(&self) {
        self.gate.lock().unwrap().open = false;
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
        self.isr.store(0, Ordering::Relaxed);
        self.broken.store(false, Ordering::Release);
    }

    /// What a driver asks for, or no vector if there is none such.
    pub(super) fn set_vector(&self, at: &AtomicU16, vector: u16) {
        let valid = vector < self.msix.vectors();
        at.store(if valid { vector } else { NO_VECTOR }, Ordering::Relaxed);
    }
}
