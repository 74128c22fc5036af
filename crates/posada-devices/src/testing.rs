//! What the unit tests share: an interrupt sink that remembers, and random numbers with a fixed seed.

use posada_engine::{Msi, MsiLine, MsiSink, PlainLine};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Remembers the interrupts, and what it was told of the I/O APIC's pins.
#[derive(Default)]
pub struct Sink {
    seen: Mutex<Vec<Msi>>,
    pub routes: Mutex<[Option<Msi>; 24]>,
    changed: Condvar,
}

impl Sink {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// What came since the last call.
    pub fn take(&self) -> Vec<Msi> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }

    /// True if nothing came since the last `take`.
    pub fn is_empty(&self) -> bool {
        self.seen.lock().unwrap().is_empty()
    }

    /// Waits until `condition` holds; looks again at each interrupt.
    pub fn wait(&self, mut condition: impl FnMut() -> bool) {
        let mut seen = self.seen.lock().unwrap();
        for _ in 0..1000 {
            if condition() {
                return;
            }
            seen = self.changed.wait_timeout(seen, Duration::from_millis(20)).unwrap().0;
        }
        panic!("the condition never came true");
    }
}

impl MsiSink for Sink {
    fn signal_msi(&self, msi: Msi) {
        self.seen.lock().unwrap().push(msi);
        self.changed.notify_all();
    }

    fn connect(self: Arc<Self>) -> Box<dyn MsiLine> {
        Box::new(PlainLine::new(self))
    }

    fn route_pin(&self, pin: u8, msi: Option<Msi>) {
        self.routes.lock().unwrap()[usize::from(pin)] = msi;
    }
}

/// xorshift64*.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }
}
