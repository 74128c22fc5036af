//! The I/O APIC (Intel 82093AA, with the EOI register of version 0x20): 24 interrupt lines become messages to the local
//! APICs.
//!
//! An edge on a masked line is kept and delivered when the line is unmasked, as KVM does (the data sheet drops it): a
//! spurious interrupt costs a driver one look, a lost one hangs it.

use crate::bus::{MmioDevice, get_le, put_le};
use crate::state::StateError;
use posada_engine::{Msi, MsiSink};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// Lines of one I/O APIC.
pub const PINS: usize = 24;
/// Bytes of the register window.
pub const SIZE: u64 = 0x1000;

const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;

/// The identification register's bits.
const ID: u32 = 0x0f00_0000;
const DELIVERY_MODE: u64 = 7 << 8;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask, destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// An interrupt line from a device.
pub trait IrqLine: Send + Sync {
    /// Drives the line: `true` asserts it.
    fn set_level(&self, asserted: bool);

    /// One edge, never taken for a part of another: a guest may answer a pulse, and a device pulse again for that, before
    /// the first one's caller runs on.
    fn pulse(&self);
}

#[derive(Clone, Copy)]
struct Pin {
    /// The redirection table entry.
    entry: u64,
    asserted: bool,
    /// An edge not yet delivered.
    edge: bool,
}

/// A pin as saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinState {
    /// The redirection table entry, with remote IRR.
    pub entry: u64,
    /// A device asserts the line.
    pub asserted: bool,
    /// An edge that has not been delivered, as the pin is masked.
    pub edge: bool,
}

/// The I/O APIC's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// Identification register.
    pub id: u32,
    /// Index of the register that is shown.
    pub select: u8,
    /// The pins in order.
    pub pins: Vec<PinState>,
}

impl Pin {
    /// What the pin sends, unless it is masked.
    fn message(&self) -> Option<Msi> {
        let destination = self.entry >> 56;
        let logical = self.entry >> 11 & 1;
        let level = self.entry & LEVEL_TRIGGERED;
        (self.entry & MASKED == 0).then_some(Msi {
            address: 0xfee0_0000 | destination << 12 | logical << 2,
            // Vector and delivery mode lie alike in both; bit 14 is "assert".
            data: (self.entry & (0xff | DELIVERY_MODE) | 1 << 14 | level) as u32,
        })
    }

    /// The message to send now, if any.
    fn service(&mut self) -> Option<Msi> {
        let message = self.message()?;
        // Only fixed and lowest-priority interrupts have an end that clears the remote IRR.
        if self.entry & LEVEL_TRIGGERED != 0 && self.entry & DELIVERY_MODE <= 1 << 8 {
            if !self.asserted || self.entry & REMOTE_IRR != 0 {
                return None;
            }
            self.entry |= REMOTE_IRR;
        } else if !std::mem::take(&mut self.edge) {
            return None;
        }
        Some(message)
    }
}

struct State {
    id: u32,
    select: u8,
    pins: [Pin; PINS],
}

impl State {
    fn register(&self) -> u32 {
        match self.select {
            0 | 2 => self.id,
            1 => VERSION,
            select @ 0x10..=0x3f => {
                let entry = self.pins[usize::from(select - 0x10) / 2].entry;
                (entry >> (u32::from(select & 1) * 32)) as u32
            }
            _ => 0,
        }
    }

    fn set_register(&mut self, value: u32, sink: &dyn MsiSink) -> Option<Msi> {
        match self.select {
            0 => self.id = value & ID,
            select @ 0x10..=0x3f => {
                let index = usize::from(select - 0x10) / 2;
                let pin = &mut self.pins[index];
                let before = pin.message();
                let shift = u32::from(select & 1) * 32;
                let writable = WRITABLE & 0xffff_ffff << shift;
                pin.entry = pin.entry & !writable | u64::from(value) << shift & writable;
                pin.entry &= !DELIVERY_STATUS;
                if pin.entry & LEVEL_TRIGGERED == 0 {
                    pin.entry &= !REMOTE_IRR;
                } else {
                    pin.edge = false;
                }
                if pin.message() != before {
                    sink.route_pin(index as u8, pin.message());
                }
                return pin.service();
            }
            _ => {}
        }
        None
    }
}

/// The I/O APIC. Lives on the MMIO bus; its lines are handed to devices by [`IoApic::line`].
pub struct IoApic {
    sink: Arc<dyn MsiSink>,
    // Held while the sink is told of a route, so that the last one stays; never while it is sent an interrupt.
    state: Mutex<State>,
}

impl IoApic {
    /// All lines masked; interrupts go to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>) -> Arc<Self> {
        let pin = Pin {
            entry: MASKED,
            asserted: false,
            edge: false,
        };
        Arc::new(Self {
            sink,
            state: Mutex::new(State {
                id: 0,
                select: 0,
                pins: [pin; PINS],
            }),
        })
    }

    /// The line of `pin`.
    ///
    /// # Panics
    /// If there is no such pin (0 to 23).
    pub fn line(self: &Arc<Self>, pin: usize) -> Arc<dyn IrqLine> {
        assert!(pin < PINS, "the I/O APIC has {PINS} pins, not {pin}");
        Arc::new(Line {
            ioapic: Arc::clone(self),
            pin,
        })
    }

    /// A local APIC saw the end of the level-triggered `vector`: lines still asserted are delivered again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut again = [None; PINS];
        {
            let mut state = self.state.lock().unwrap();
            for (pin, again) in state.pins.iter_mut().zip(&mut again) {
                if pin.entry as u8 == vector && pin.entry & REMOTE_IRR != 0 {
                    pin.entry &= !REMOTE_IRR;
                    *again = pin.service();
                }
            }
        }
        again.into_iter().flatten().for_each(|msi| self.sink.signal_msi(msi));
    }

    /// All registers and lines.
    pub fn save(&self) -> IoApicState {
        let state = self.state.lock().unwrap();
        let pin = |pin: &Pin| PinState {
            entry: pin.entry,
            asserted: pin.asserted,
            edge: pin.edge,
        };
        IoApicState {
            id: state.id,
            select: state.select,
            pins: state.pins.iter().map(pin).collect(),
        }
    }

    /// Takes saved registers over. Nothing is sent by it: what waits, waits on.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore(&self, saved: &IoApicState) -> Result<(), StateError> {
        if saved.pins.len() != PINS {
            return Err(StateError::differs("pins", PINS, saved.pins.len()).of("the I/O APIC"));
        }
        let impossible = |pin: &PinState| pin.entry & !(WRITABLE | REMOTE_IRR) != 0;
        if let Some(pin) = saved.pins.iter().position(impossible) {
            let reason = format!("cannot have the redirection entry {:#x}", saved.pins[pin].entry);
            return Err(StateError::new(reason).of(format!("pin {pin}")).of("the I/O APIC"));
        }
        let mut state = self.state.lock().unwrap();
        state.id = saved.id & ID;
        state.select = saved.select;
        for (index, (pin, saved)) in state.pins.iter_mut().zip(&saved.pins).enumerate() {
            let before = pin.message();
            *pin = Pin {
                entry: saved.entry,
                asserted: saved.asserted,
                edge: saved.edge,
            };
            if pin.message() != before {
                self.sink.route_pin(index as u8, pin.message());
            }
        }
        Ok(())
    }

    fn set_level(&self, pin: usize, asserted: bool) {
        let msi = {
            let pin = &mut self.state.lock().unwrap().pins[pin];
            if asserted && !pin.asserted && pin.entry & LEVEL_TRIGGERED == 0 {
                pin.edge = true;
            }
            pin.asserted = asserted;
            pin.service()
        };
        if let Some(msi) = msi {
            self.sink.signal_msi(msi);
        }
    }

    fn pulse(&self, pin: usize) {
        let msi = {
            let pin = &mut self.state.lock().unwrap().pins[pin];
            pin.edge = pin.entry & LEVEL_TRIGGERED == 0;
            pin.asserted = true;
            let msi = pin.service();
            pin.asserted = false;
            msi
        };
        if let Some(msi) = msi {
            self.sink.signal_msi(msi);
        }
    }
}

impl MmioDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            IOREGSEL => self.state.lock().unwrap().select.into(),
            IOWIN => self.state.lock().unwrap().register(),
            _ => 0,
        };
        put_le(value.into(), data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let value = get_le(data) as u32;
        match offset {
            IOREGSEL => self.state.lock().unwrap().select = value as u8,
            IOWIN => {
                let msi = self.state.lock().unwrap().set_register(value, &*self.sink);
                if let Some(msi) = msi {
                    self.sink.signal_msi(msi);
                }
            }
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

struct Line {
    ioapic: Arc<IoApic>,
    pin: usize,
}

impl IrqLine for Line {
    fn set_level(&self, asserted: bool) {
        self.ioapic.set_level(self.pin, asserted);
    }

    fn pulse(&self) {
        self.ioapic.pulse(self.pin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, Sink};
    use posada_engine::{MsiLine, PlainLine};

    fn entry(ioapic: &IoApic, pin: u64, value: u64) {
        ioapic.write(IOREGSEL, &[(0x11 + 2 * pin) as u8]);
        ioapic.write(IOWIN, &((value >> 32) as u32).to_le_bytes());
        ioapic.write(IOREGSEL, &[(0x10 + 2 * pin) as u8]);
        ioapic.write(IOWIN, &(value as u32).to_le_bytes());
    }

    fn low(ioapic: &IoApic, pin: u64) -> u64 {
        let mut data = [0; 4];
        ioapic.write(IOREGSEL, &[(0x10 + 2 * pin) as u8]);
        ioapic.read(IOWIN, &mut data);
        get_le(&data)
    }

    #[test]
    fn an_edge_is_delivered_once_to_the_destination() {
        let sink = Sink::new();
        let ioapic = IoApic::new(sink.clone());
        entry(&ioapic, 4, 3 << 56 | 1 << 11 | 0x31);
        let line = ioapic.line(4);
        line.set_level(true);
        line.set_level(true);
        let msi = Msi {
            address: 0xfee0_3004,
            data: 0x4031,
        };
        assert_eq!(sink.take(), [msi]);
        line.set_level(false);
        assert_eq!(sink.take(), []);
        line.pulse();
        assert_eq!(sink.take(), [msi]);
    }

    #[test]
    fn a_pulse_while_another_is_delivered_is_delivered_too() {
        /// Pulses the line again at the first message, as another thread may.
        #[derive(Default)]
        struct Again {
            line: Mutex<Option<Arc<dyn IrqLine>>>,
            messages: Mutex<u32>,
        }
        impl MsiSink for Again {
            fn signal_msi(&self, _: Msi) {
                *self.messages.lock().unwrap() += 1;
                let line = self.line.lock().unwrap().take();
                if let Some(line) = line {
                    line.pulse();
                }
            }

            fn connect(self: Arc<Self>) -> Box<dyn MsiLine> {
                Box::new(PlainLine::new(self))
            }

            fn route_pin(&self, _: u8, _: Option<Msi>) {}
        }
        let sink = Arc::new(Again::default());
        let ioapic = IoApic::new(sink.clone());
        entry(&ioapic, 4, 0x31);
        *sink.line.lock().unwrap() = Some(ioapic.line(4));
        ioapic.line(4).pulse();
        assert_eq!(*sink.messages.lock().unwrap(), 2);
    }

    #[test]
    fn an_edge_on_a_masked_line_comes_when_it_is_unmasked() {
        let sink = Sink::new();
        let ioapic = IoApic::new(sink.clone());
        ioapic.line(4).pulse();
        assert_eq!(sink.take(), []);
        entry(&ioapic, 4, 0x31);
        assert_eq!(sink.take().len(), 1);
        entry(&ioapic, 4, 0x31);
        assert_eq!(sink.take(), []);
    }

    #[test]
    fn a_level_is_delivered_again_after_its_end_while_it_is_asserted() {
        for by_register in [false, true] {
            let sink = Sink::new();
            let ioapic = IoApic::new(sink.clone());
            let end = |vector: u8| {
                if by_register {
                    ioapic.write(EOI, &[vector, 0, 0, 0]);
                } else {
                    ioapic.end_of_interrupt(vector);
                }
            };
            entry(&ioapic, 9, LEVEL_TRIGGERED | 0x42);
            let line = ioapic.line(9);
            line.set_level(true);
            assert_eq!(sink.take()[0].data, 0xc042);
            assert_ne!(low(&ioapic, 9) & REMOTE_IRR, 0);
            line.set_level(false);
            line.set_level(true);
            assert_eq!(sink.take(), [], "the remote IRR holds it back");
            end(0x41);
            assert_eq!(sink.take(), []);
            end(0x42);
            assert_eq!(sink.take().len(), 1);
            line.set_level(false);
            end(0x42);
            assert_eq!(sink.take(), []);
            assert_eq!(low(&ioapic, 9) & REMOTE_IRR, 0);
        }
    }

    #[test]
    fn switching_to_edge_clears_the_remote_irr() {
        let sink = Sink::new();
        let ioapic = IoApic::new(sink.clone());
        entry(&ioapic, 9, LEVEL_TRIGGERED | 0x42);
        ioapic.line(9).set_level(true);
        entry(&ioapic, 9, MASKED | 0x42);
        assert_eq!(low(&ioapic, 9), MASKED | 0x42);
    }

    #[test]
    fn the_sink_knows_every_pins_message_and_hears_no_other() {
        let sink = Sink::new();
        let ioapic = IoApic::new(sink.clone());
        let mut random = Random::new(12);
        for _ in 0..20_000 {
            let pin = random.below(24);
            match random.below(4) {
                0 => entry(&ioapic, pin, random.next() & WRITABLE),
                1 => ioapic.end_of_interrupt(random.next() as u8),
                _ => ioapic.line(pin as usize).set_level(random.below(2) == 0),
            }
            let routes = *sink.routes.lock().unwrap();
            for sent in sink.take() {
                assert!(routes.contains(&Some(sent)), "{sent:x?}");
            }
            assert_eq!(routes[pin as usize].is_none(), low(&ioapic, pin) & MASKED != 0);
        }
    }

    #[test]
    fn what_waits_is_saved_and_sends_nothing_before_its_time() {
        let first = IoApic::new(Sink::new());
        entry(&first, 9, LEVEL_TRIGGERED | 0x42);
        first.line(9).set_level(true);
        entry(&first, 4, MASKED | 0x31);
        first.line(4).pulse();
        let state = serde_json::from_str(&serde_json::to_string(&first.save()).unwrap()).unwrap();
        let sink = Sink::new();
        let second = IoApic::new(sink.clone());
        second.restore(&state).unwrap();
        assert_eq!((sink.take(), second.save()), (vec![], state));
        assert_eq!(sink.routes.lock().unwrap()[9].unwrap().data, 0xc042);
        second.end_of_interrupt(0x42);
        assert_eq!(sink.take()[0].data, 0xc042);
        entry(&second, 4, 0x31);
        assert_eq!(sink.take()[0].data, 0x4031);
    }

    #[test]
    fn damaged_states_are_refused_or_harmless() {
        let ioapic = IoApic::new(Sink::new());
        let good = serde_json::to_value(ioapic.save()).unwrap();
        let mut random = Random::new(13);
        let mut refused = 0;
        for _ in 0..5000 {
            let mut value = good.clone();
            crate::testing::damage(&mut value, &mut random);
            match serde_json::from_value(value).map(|state| ioapic.restore(&state)) {
                Ok(Ok(())) => entry(&ioapic, random.below(24), random.next()),
                Ok(Err(_)) => refused += 1,
                Err(_) => {}
            }
        }
        assert!(refused > 100, "{refused}");
        let mut state = ioapic.save();
        state.pins.pop();
        let error = ioapic.restore(&state).unwrap_err().to_string();
        assert_eq!(error, "the I/O APIC has 24 pins, the snapshot's has 23");
    }

    #[test]
    fn random_accesses_never_panic() {
        let ioapic = IoApic::new(Sink::new());
        let mut random = Random::new(1);
        for _ in 0..20_000 {
            let mut data = vec![random.next() as u8; 1 + random.below(64) as usize];
            ioapic.write(random.below(0x50), &data);
            ioapic.read(random.below(SIZE), &mut data);
            ioapic.line(random.below(24) as usize).set_level(random.below(2) == 0);
        }
    }
}
