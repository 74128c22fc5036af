//! How interrupts reach the local APICs.

use std::sync::{Arc, Mutex};

/// A message-signalled interrupt (Intel SDM 3A, section 11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msi {
    /// Message address: 0xfeeX_XXXX.
    pub address: u64,
    /// Message data: vector, delivery mode, trigger mode.
    pub data: u32,
}

/// Where devices and the IOAPIC send interrupts: the local APICs of one VM.
pub trait MsiSink: Send + Sync {
    /// Delivers the message; an address or mode that means nothing is dropped.
    fn signal_msi(&self, msi: Msi);

    /// A line for a source that sends the same message many times.
    fn connect(self: Arc<Self>) -> Box<dyn MsiLine>;

    /// Tells what pin `pin` (0 to 23) of the IOAPIC sends at present; `None`: nothing, as it is masked. Interrupts of the pin
    /// still come by [`MsiSink::signal_msi`]; the engine only learns which ends of level-triggered interrupts the machine
    /// must hear of.
    fn route_pin(&self, pin: u8, msi: Option<Msi>);
}

/// A source of one message.
pub trait MsiLine: Send + Sync {
    /// What the line sends from now on.
    fn set(&self, msi: Msi);
    /// Sends it. Nothing before the first [`MsiLine::set`].
    fn signal(&self);
}

/// A line for engines that have nothing faster than [`MsiSink::signal_msi`].
pub struct PlainLine<S: ?Sized> {
    sink: Arc<S>,
    msi: Mutex<Option<Msi>>,
}

impl<S: MsiSink + ?Sized> PlainLine<S> {
    /// A line into `sink` that sends nothing yet.
    pub fn new(sink: Arc<S>) -> Self {
        Self {
            sink,
            msi: Mutex::new(None),
        }
    }

    fn msi(&self) -> std::sync::MutexGuard<'_, Option<Msi>> {
        self.msi.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl<S: MsiSink + ?Sized> MsiLine for PlainLine<S> {
    fn set(&self, msi: Msi) {
        *self.msi() = Some(msi);
    }

    fn signal(&self) {
        let msi = *self.msi();
        if let Some(msi) = msi {
            self.sink.signal_msi(msi);
        }
    }
}
