//! A thread that serves a device's queues, so that no vCPU waits for I/O.
//!
//! ```text
//!          spawn               hold: between two requests
//!   idle ────────► running ─────────────────────────────► idle, the queues are handed back
//!                   │  ▲ └─────────────────────────────► idle: abandoned, or a queue was broken
//!                   └──┘ doorbell, host's event
//! ```

use super::{Broken, Interrupt, VirtQueue, VirtioDevice};
use crate::event::Event;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::{self, JoinHandle};

const RUN: u8 = 0;
const HOLD: u8 = 1;
const ABANDON: u8 = 2;

/// Tells a device's thread that there is work, or that it must stop.
pub struct Signal {
    pub(super) event: Event,
    order: AtomicU8,
}

impl Signal {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            event: Event::new()?,
            order: AtomicU8::new(RUN),
        })
    }

    /// There is work. Never lost.
    pub fn kick(&self) {
        self.event.ring();
    }

    /// True once the thread must leave: it finishes the request it is at, and takes no other.
    pub fn stopping(&self) -> bool {
        self.order.load(Ordering::Relaxed) != RUN
    }

    /// True once the driver has reset the device: nobody waits for the request any more.
    pub fn abandoned(&self) -> bool {
        self.order.load(Ordering::Relaxed) == ABANDON
    }

    fn stop(&self, order: u8) {
        self.order.store(order, Ordering::Relaxed);
        self.kick();
    }
}

/// A running thread; dropping it abandons its request and joins it.
pub(super) struct Worker {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<Result<Vec<VirtQueue>, Broken>>>,
}

impl Worker {
    /// Starts a thread that has `device` serve its queues now and after each kick, until it is stopped or a queue is broken;
    /// then, and when the host has no thread to give, the driver is told to reset the device.
    pub(super) fn spawn(
        device: Arc<dyn VirtioDevice>,
        mut queues: Vec<VirtQueue>,
        signal: Arc<Signal>,
        interrupt: Arc<Interrupt>,
    ) -> Self {
        signal.order.store(RUN, Ordering::Relaxed);
        let thread = {
            let (signal, interrupt) = (Arc::clone(&signal), Arc::clone(&interrupt));
            thread::Builder::new()
                .name(format!("virtio-{}", device.name()))
                .stack_size(256 << 10)
                .spawn(move || {
                    while !signal.stopping() {
                        if let Err(broken) = device.serve(&mut queues, &signal) {
                            tracing::warn!(%broken, device = device.name(), "a guest's driver broke its virtqueue");
                            interrupt.needs_reset();
                            return Err(broken);
                        }
                        if !signal.stopping() {
                            signal.event.wait_or(device.host_events());
                        }
                    }
                    Ok(queues)
                })
        };
        let thread = thread
            .inspect_err(|error| {
                tracing::error!(%error, "no thread for a virtio device");
                interrupt.needs_reset();
            })
            .ok();
        Self { signal, thread }
    }

    /// Stops between two requests, each of which is either wholly done or not begun. `None`: a queue is broken, and the
    /// driver knows.
    pub(super) fn hold(mut self) -> Option<Vec<VirtQueue>> {
        self.signal.stop(HOLD);
        self.thread.take()?.join().ok()?.ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.signal.stop(ABANDON);
            let _ = thread.join();
        }
    }
}
