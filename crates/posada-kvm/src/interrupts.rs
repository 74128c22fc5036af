//! Interrupts from devices to the local APICs in the kernel.
//!
//! Messages go by one request each (KVM_SIGNAL_MSI), or by a line: an event descriptor that KVM watches, bound to an interrupt
//! number (GSI) whose route holds the message. KVM delivers a line's message while the event is being written, so that it is in
//! the local APIC when [`MsiLine::signal`] returns. The first 24 numbers are the I/O APIC's pins: their routes deliver nothing,
//! but tell KVM of which interrupts the ends leave the kernel.

use crate::error::{Asked, Error};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use posada_engine::{Msi, MsiLine, MsiSink, PlainLine};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Pins of the I/O APIC.
pub(crate) const PINS: u32 = 24;

/// The way into one VM's local APICs.
pub(crate) struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

/// KVM's table as we last set it, and who has which number.
#[derive(Default)]
struct Routes {
    /// What each number sends.
    table: BTreeMap<u32, Msi>,
    /// Numbers of lines, routed or not.
    taken: BTreeSet<u32>,
}

impl Routes {
    /// A number for a new line.
    fn take(&mut self) -> Option<u32> {
        let free = (PINS..KVM_MAX_IRQ_ROUTES as u32).find(|gsi| !self.taken.contains(gsi))?;
        self.taken.insert(free);
        Some(free)
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let entry = |(&gsi, msi): (&u32, &Msi)| kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            u: kvm_irq_routing_entry__bindgen_ty_1 {
                msi: kvm_irq_routing_msi {
                    address_lo: msi.address as u32,
                    address_hi: (msi.address >> 32) as u32,
                    data: msi.data,
                    ..Default::default()
                },
            },
            ..Default::default()
        };
        self.table.iter().map(entry).collect()
    }
}

impl Interrupts {
    /// Into the local APICs of `vm`, which are there already.
    pub(crate) fn new(vm: Arc<VmFd>) -> Arc<Self> {
        Arc::new(Self {
            vm,
            routes: Mutex::default(),
        })
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.routes.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Makes `gsi` send `msi`.
    fn route(&self, gsi: u32, msi: Msi) -> Result<(), Error> {
        let mut routes = self.routes();
        let before = routes.table.insert(gsi, msi);
        if before == Some(msi) {
            return Ok(());
        }
        let entries = KvmIrqRouting::from_entries(&routes.entries()).expect("no more entries than numbers");
        let set = self.vm.set_gsi_routing(&entries).to("route an interrupt");
        if set.is_err() {
            match before {
                Some(before) => routes.table.insert(gsi, before),
                None => routes.table.remove(&gsi),
            };
        }
        set
    }

    /// Takes back a line's number. Its route goes with the next change.
    fn release(&self, gsi: u32) {
        let mut routes = self.routes();
        routes.table.remove(&gsi);
        routes.taken.remove(&gsi);
    }

    fn line(self: &Arc<Self>) -> Option<Line> {
        let event = EventFd::new(EFD_NONBLOCK).ok()?;
        let gsi = self.routes().take()?;
        Some(Line {
            interrupts: Arc::clone(self),
            gsi,
            event,
            state: Mutex::default(),
        })
    }
}

impl MsiSink for Interrupts {
    fn signal_msi(&self, msi: Msi) {
        let request = kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        // KVM refuses messages that mean nothing, which are dropped.
        if let Err(error) = self.vm.signal_msi(request) {
            tracing::debug!(?msi, %error, "KVM does not deliver an interrupt message");
        }
    }

    fn connect(self: Arc<Self>) -> Box<dyn MsiLine> {
        match self.line() {
            Some(line) => Box::new(line),
            None => Box::new(PlainLine::new(self)),
        }
    }

    fn route_pin(&self, pin: u8, msi: Option<Msi>) {
        // A pin that is masked while its interrupt is in service still waits for its end: the old route stays.
        let Some(msi) = msi.filter(|_| u32::from(pin) < PINS) else {
            return;
        };
        if let Err(error) = self.route(pin.into(), msi) {
            tracing::error!(pin, %error, "the ends of an I/O APIC pin's interrupts will not be seen");
        }
    }
}

/// An event descriptor with its interrupt number.
struct Line {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: EventFd,
    state: Mutex<LineState>,
}

#[derive(Default)]
struct LineState {
    msi: Option<Msi>,
    /// KVM watches the event, and the route is `msi`.
    wired: bool,
}

impl Line {
    fn state(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn wire(&self, state: &LineState, msi: Msi) -> Result<(), Error> {
        self.interrupts.route(self.gsi, msi)?;
        if !state.wired {
            let watched = self.interrupts.vm.register_irqfd(&self.event, self.gsi);
            watched.to("watch an interrupt's event")?;
        }
        Ok(())
    }

    fn unwire(&self, state: &mut LineState) {
        if std::mem::take(&mut state.wired) {
            // Fails only for a line that is not there.
            let _ = self.interrupts.vm.unregister_irqfd(&self.event, self.gsi);
        }
    }
}

impl MsiLine for Line {
    fn set(&self, msi: Msi) {
        let mut state = self.state();
        if state.msi == Some(msi) {
            return;
        }
        state.msi = Some(msi);
        match self.wire(&state, msi) {
            Ok(()) => state.wired = true,
            Err(error) => {
                tracing::debug!(gsi = self.gsi, %error, "interrupts of this line go one by one");
                self.unwire(&mut state);
            }
        }
    }

    fn signal(&self) {
        let state = self.state();
        match state.msi {
            // The counter is KVM's to empty, and it does so at once.
            Some(_) if state.wired && self.event.write(1).is_ok() => {}
            Some(msi) => self.interrupts.signal_msi(msi),
            None => {}
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut state = std::mem::take(&mut *self.state());
        self.unwire(&mut state);
        self.interrupts.release(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_lines_are_no_pins_and_come_back() {
        let mut routes = Routes::default();
        assert_eq!((routes.take(), routes.take()), (Some(24), Some(25)));
        routes.taken.remove(&24);
        assert_eq!((routes.take(), routes.take()), (Some(24), Some(26)));
        while routes.take().is_some() {}
        assert_eq!(routes.taken.len(), KVM_MAX_IRQ_ROUTES - PINS as usize);
    }
}
