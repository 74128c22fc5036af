//! What the unit tests share: an interrupt sink that remembers, random numbers with a fixed seed, and damage.

use posada_engine::{Msi, MsiLine, MsiSink, PlainLine};
use serde_json::Value;
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

/// Damages one random leaf or list of a saved state, as a file could be.
pub fn damage(value: &mut Value, random: &mut Random) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let at = random.below(fields.len() as u64) as usize;
            damage(fields.values_mut().nth(at).unwrap(), random);
        }
        Value::Array(items) if items.is_empty() || random.below(8) == 0 => {
            if let (Some(item), 0) = (items.pop(), random.below(2)) {
                items.extend([item.clone(), item]);
            }
        }
        Value::Array(items) => {
            let at = random.below(items.len() as u64) as usize;
            damage(&mut items[at], random);
        }
        Value::Number(number) => {
            let number = number.as_u64().unwrap_or(0);
            let bits = [8, 16, 32, 64][random.below(4) as usize];
            *value = match random.below(4) {
                0 => 0.into(),
                1 => (u64::MAX >> (64 - bits)).into(),
                2 => (random.next() >> (64 - bits)).into(),
                _ => (number ^ 1 << random.below(bits)).into(),
            };
        }
        Value::String(text) => {
            let digit = char::from_digit(random.below(16) as u32, 16).unwrap();
            let at = random.below(text.len() as u64 + 1) as usize;
            match (random.below(8), text.is_char_boundary(at) && at < text.len()) {
                (0, _) => text.clear(),
                (1, _) => text.extend([digit, digit]),
                (_, true) => text.replace_range(at..=at, &digit.to_string()),
                _ => {}
            }
        }
        Value::Bool(on) => *on = !*on,
        _ => *value = 1.into(),
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
