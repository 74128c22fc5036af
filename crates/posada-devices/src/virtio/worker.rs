//! A thread that serves a device's queues, so that no vCPU waits for I/O.

use super::{Activation, Broken, VirtQueue};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};

/// Tells a worker that there is work, or that it must stop.
#[derive(Default)]
pub struct Signal {
    kicked: Mutex<bool>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Signal {
    /// There is work. Never lost.
    pub fn kick(&self) {
        *self.kicked.lock().unwrap() = true;
        self.changed.notify_one();
    }

    /// True once the worker must leave, also in the middle of a queue.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.kick();
    }

    fn wait(&self) {
        let mut kicked = self.kicked.lock().unwrap();
        while !std::mem::take(&mut *kicked) {
            kicked = self.changed.wait(kicked).unwrap();
        }
    }
}

/// A running worker; dropping it stops and joins the thread.
pub(super) struct Worker {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread that calls `serve` now and after each kick, until stopped or until `serve` says that a queue is
    /// broken; then, and when the host has no thread to give, the driver is told to reset the device.
    pub(super) fn spawn(
        name: &str,
        activation: Activation,
        mut serve: impl FnMut(&mut [VirtQueue], &Signal) -> Result<(), Broken> + Send + 'static,
    ) -> Self {
        let signal = Arc::new(Signal::default());
        let interrupt = Arc::clone(&activation.interrupt);
        let thread = {
            let signal = Arc::clone(&signal);
            thread::Builder::new()
                .name(name.into())
                .stack_size(256 << 10)
                .spawn(move || {
                    let mut queues = activation.queues;
                    while !signal.stopping() {
                        if let Err(broken) = serve(&mut queues, &signal) {
                            tracing::warn!(%broken, "a guest's driver broke its virtqueue");
                            activation.interrupt.needs_reset();
                            return;
                        }
                        if !signal.stopping() {
                            signal.wait();
                        }
                    }
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

    pub(super) fn kick(&self) {
        self.signal.kick();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.signal.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
