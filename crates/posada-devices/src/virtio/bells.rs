//! The notification addresses of one device, as doorbells where the host can have them.

use super::Signal;
use crate::bell::Doorbells;
use posada_engine::Doorbell;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

/// Bytes of a driver's notification: the queue's number (virtio 1.2 section 4.1.5.2).
const LENGTH: u32 = 2;

/// Which writes ring for the device's thread without us. All queues have one event: the thread looks at all its rings.
pub(super) struct Bells {
    host: Arc<dyn Doorbells>,
    signal: Arc<Signal>,
    hung: Mutex<Vec<Doorbell>>,
}

impl Bells {
    pub(super) fn new(host: Arc<dyn Doorbells>, signal: Arc<Signal>) -> Self {
        Self {
            host,
            signal,
            hung: Mutex::default(),
        }
    }

    /// Has bells at these guest physical addresses and at no others. Where the host cannot, writes come to us as ever.
    pub(super) fn hang(&self, addresses: Vec<u64>) {
        let mut hung = self.hung.lock().unwrap();
        let event = self.signal.event.as_fd();
        hung.retain(|bell| {
            let keep = addresses.contains(&bell.gpa);
            if !keep {
                self.host.detach(*bell, event);
            }
            keep
        });
        for gpa in addresses {
            if hung.iter().any(|bell| bell.gpa == gpa) {
                continue;
            }
            let bell = Doorbell {
                gpa,
                length: LENGTH,
                value: None,
            };
            match self.host.attach(bell, event) {
                Ok(true) => hung.push(bell),
                Ok(false) => return,
                Err(error) => return tracing::warn!(%error, "the host gives no doorbell for a virtio device"),
            }
        }
    }
}

impl Drop for Bells {
    fn drop(&mut self) {
        self.hang(Vec::new());
    }
}
