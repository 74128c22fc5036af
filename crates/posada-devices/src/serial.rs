//! COM1: a 16550A UART on eight ports. The registers are vm-superio's; here are the interrupt line, the output's
//! buffering, and input that is never lost.

use crate::bus::PortDevice;
use crate::ioapic::IrqLine;
use crate::state::StateError;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial as Uart, SerialState as Registers};

/// Ports of a UART.
pub const PORTS: u64 = 8;

const IER: u16 = 1;
const IIR: u16 = 2;
const LSR: u16 = 5;
/// IIR: no interrupt is pending; the interrupt is "received data".
const NONE: u8 = 1;
const RECEIVED: u8 = 4;
/// LSR: the receiver has data.
const DATA_READY: u8 = 1;
/// Received data interrupt enable.
const RDI: u8 = 1;
/// Reads of LSR in a row, and nothing else, from which on a guest is taken to poll for input.
const POLLING: u32 = 3;

/// When output goes on to the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// At every byte: for terminals and pipes, where a prompt has no newline.
    Byte,
    /// At a newline, every 4 KiB, and in [`Serial::flush`]: for files.
    Line,
}

struct Output {
    writer: Box<dyn Write + Send>,
    when: Flush,
    buffer: Vec<u8>,
}

impl Default for Output {
    /// Nowhere.
    fn default() -> Self {
        Self {
            writer: Box::new(io::sink()),
            when: Flush::Line,
            buffer: Vec::new(),
        }
    }
}

impl Output {
    fn drain(&mut self) -> io::Result<()> {
        // A writer that fails has had its chance: keeping the bytes would only let the buffer grow.
        let result = self.writer.write_all(&self.buffer);
        self.buffer.clear();
        result.and_then(|()| self.writer.flush())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    /// The UART calls this after each byte.
    fn flush(&mut self) -> io::Result<()> {
        if self.when == Flush::Byte || self.buffer.last() == Some(&b'\n') || self.buffer.len() >= 4096 {
            self.drain()?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let _ = self.drain();
    }
}

/// Notes that the UART wants an interrupt, to be raised once no lock is held.
#[derive(Clone, Default)]
struct Wanted(Arc<AtomicBool>);

impl Trigger for Wanted {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// A port's registers (National Semiconductor PC16550D) and the input on its way to the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch.
    pub divisor: u16,
    /// IER.
    pub interrupt_enable: u8,
    /// IIR, without the bits that show the FIFOs.
    pub interrupt_identification: u8,
    /// LCR.
    pub line_control: u8,
    /// LSR.
    pub line_status: u8,
    /// MCR.
    pub modem_control: u8,
    /// MSR.
    pub modem_status: u8,
    /// SCR.
    pub scratch: u8,
    /// The receiver's FIFO, up to 64 bytes.
    #[serde(with = "const_hex")]
    pub received: Vec<u8>,
    /// Input that the FIFO had no room for.
    #[serde(with = "const_hex")]
    pub waiting: Vec<u8>,
}

struct State {
    uart: Uart<Wanted, NoEvents, Output>,
    /// Input the FIFO has no room for yet.
    waiting: VecDeque<u8>,
    /// Reads of LSR since any other access.
    polls: u32,
    /// The machine stands still: input waits.
    held: bool,
}

impl State {
    /// True while the received-data interrupt is asserted: as long as there is data, not only until the first byte is read,
    /// which is where vm-superio ends it. A driver that reads in portions asks IIR whether to go on.
    fn still_receives(&mut self) -> bool {
        self.uart.read(LSR as u8) & DATA_READY != 0 && self.uart.state().interrupt_enable & RDI != 0
    }

    /// Moves waiting input into the FIFO once the guest looks for it. A driver empties the receiver when it opens the
    /// port, so input typed before that stays here.
    fn refill(&mut self) {
        let listens = self.uart.state().interrupt_enable & RDI != 0 || self.polls >= POLLING;
        if self.held || !listens || self.waiting.is_empty() || self.uart.fifo_capacity() == 0 {
            return;
        }
        let room = self.uart.fifo_capacity().min(self.waiting.len());
        let bytes: Vec<u8> = self.waiting.iter().take(room).copied().collect();
        // In loopback the UART takes nothing; what it took leaves the queue.
        if let Ok(taken) = self.uart.enqueue_raw_bytes(&bytes) {
            self.waiting.drain(..taken);
        }
    }
}

/// A serial port. On the port bus for the guest, [`Serial::input`] for the host.
pub struct Serial {
    state: Mutex<State>,
    wanted: Wanted,
    irq: Arc<dyn IrqLine>,
}

impl Serial {
    /// A port that interrupts through `irq` (COM1: I/O APIC line 4) and prints to `output`.
    pub fn new(irq: Arc<dyn IrqLine>, output: Box<dyn Write + Send>, when: Flush) -> Arc<Self> {
        let wanted = Wanted::default();
        let output = Output {
            writer: output,
            when,
            buffer: Vec::new(),
        };
        Arc::new(Self {
            state: Mutex::new(State {
                uart: Uart::new(wanted.clone(), output),
                waiting: VecDeque::new(),
                polls: 0,
                held: false,
            }),
            wanted,
            irq,
        })
    }

    /// Input for the guest, of any length: what the FIFO cannot take waits here.
    pub fn input(&self, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap();
        state.waiting.extend(bytes);
        state.refill();
        self.finish(state);
    }

    /// Bytes of input the guest has not read yet.
    pub fn input_waiting(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.waiting.len() + state.uart.state().in_buffer.len()
    }

    /// Passes buffered output on.
    ///
    /// # Errors
    /// What the writer says.
    pub fn flush(&self) -> io::Result<()> {
        self.state.lock().unwrap().uart.writer_mut().drain()
    }

    /// Holds input back, or lets it come, for a machine that stands still.
    pub fn hold(&self, held: bool) {
        let mut state = self.state.lock().unwrap();
        state.held = held;
        state.refill();
        self.finish(state);
    }

    /// Registers and input.
    pub fn save(&self) -> SerialState {
        let state = self.state.lock().unwrap();
        let registers = state.uart.state();
        SerialState {
            divisor: u16::from_le_bytes([registers.baud_divisor_low, registers.baud_divisor_high]),
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            received: registers.in_buffer,
            waiting: state.waiting.iter().copied().collect(),
        }
    }

    /// Takes that over. No interrupt is raised by it: one that the guest has not seen is in the I/O APIC or beyond.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore(&self, saved: &SerialState) -> Result<(), StateError> {
        let mut state = self.state.lock().unwrap();
        let [baud_divisor_low, baud_divisor_high] = saved.divisor.to_le_bytes();
        let registers = Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.received.clone(),
        };
        let output = std::mem::take(state.uart.writer_mut());
        let made = Uart::from_state(&registers, self.wanted.clone(), NoEvents, output);
        self.wanted.0.store(false, Ordering::Relaxed);
        state.uart = made.map_err(|_| {
            let reason = format!("cannot have received {} bytes", saved.received.len());
            StateError::new(reason).of("the serial port")
        })?;
        saved
            .waiting
            .iter()
            .rev()
            .for_each(|byte| state.waiting.push_front(*byte));
        state.polls = 0;
        Ok(())
    }

    /// Lets go of the lock, then raises the interrupt the UART asked for.
    fn finish(&self, state: MutexGuard<'_, State>) {
        drop(state);
        if self.wanted.0.swap(false, Ordering::Relaxed) {
            self.irq.pulse();
        }
    }
}

impl PortDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap();
        for (byte, at) in data.iter_mut().zip(offset..) {
            state.polls = if at == LSR { state.polls.saturating_add(1) } else { 0 };
            state.refill();
            *byte = state.uart.read(at.min(0xff) as u8);
            if at == IIR && *byte & NONE != 0 && state.still_receives() {
                *byte = *byte & !NONE | RECEIVED;
            }
        }
        state.refill();
        self.finish(state);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state.lock().unwrap();
        for (byte, at) in data.iter().zip(offset..) {
            state.polls = 0;
            if let Err(error) = state.uart.write(at.min(0xff) as u8, *byte) {
                tracing::debug!(%error, "serial output lost");
            }
            if at == IER {
                state.refill();
            }
        }
        self.finish(state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::sync::atomic::AtomicUsize;

    #[derive(Default)]
    struct Edges(AtomicUsize);

    #[test]
    fn the_interrupt_stays_pending_until_the_last_byte_is_read() {
        let serial = Serial::new(Arc::new(Edges::default()), Box::new(std::io::sink()), Flush::Byte);
        let read = |at| {
            let mut data = [0];
            serial.read(at, &mut data);
            data[0]
        };
        serial.write(IER, &[RDI]);
        serial.input(b"abc");
        for byte in b"abc" {
            assert_eq!(read(IIR) & 0xf, RECEIVED);
            assert_eq!(read(0), *byte);
        }
        assert_eq!(read(IIR) & 0xf, NONE);
    }

    impl IrqLine for Edges {
        fn set_level(&self, asserted: bool) {
            self.0.fetch_add(usize::from(asserted), Ordering::Relaxed);
        }

        fn pulse(&self) {
            self.set_level(true);
        }
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);

    impl Write for Shared {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn register(serial: &Serial, at: u16) -> u8 {
        let mut byte = [0];
        serial.read(at, &mut byte);
        byte[0]
    }

    #[test]
    fn input_beyond_the_fifo_is_not_lost() {
        let irq = Arc::new(Edges::default());
        let serial = Serial::new(irq.clone(), Box::new(io::sink()), Flush::Byte);
        let input: Vec<u8> = (0..1000).map(|at| at as u8).collect();
        serial.input(&input[..700]);
        // What Linux does when it opens the port: it throws away what the receiver holds.
        register(&serial, LSR);
        register(&serial, 0);
        serial.write(IER, &[RDI]);
        assert_eq!(irq.0.load(Ordering::Relaxed), 1);
        let mut got = Vec::new();
        while register(&serial, LSR) & 1 != 0 {
            got.push(register(&serial, 0));
            if got.len() == 100 {
                serial.input(&input[700..]);
            }
        }
        assert_eq!(got, input);
        assert_eq!(serial.input_waiting(), 0);
        assert!(irq.0.load(Ordering::Relaxed) > 1);
    }

    #[test]
    fn a_guest_that_polls_gets_input_without_interrupts() {
        let serial = Serial::new(Arc::new(Edges::default()), Box::new(io::sink()), Flush::Byte);
        serial.input(b"ok");
        let mut got = Vec::new();
        for _ in 0..20 {
            if register(&serial, LSR) & 1 != 0 {
                got.push(register(&serial, 0));
            }
        }
        assert_eq!(got, b"ok");
    }

    #[test]
    fn output_is_flushed_at_each_byte_or_each_line() {
        for (when, early) in [(Flush::Byte, "login: "), (Flush::Line, "")] {
            let out = Shared::default();
            let serial = Serial::new(Arc::new(Edges::default()), Box::new(out.clone()), when);
            b"login: ".iter().for_each(|byte| serial.write(0, &[*byte]));
            assert_eq!(*out.0.lock().unwrap(), early.as_bytes());
            serial.write(0, b"\n");
            assert_eq!(*out.0.lock().unwrap(), b"login: \n");
            serial.write(0, b"x");
            drop(serial);
            assert_eq!(*out.0.lock().unwrap(), b"login: \nx");
        }
    }

    #[test]
    fn an_empty_transmitter_interrupts_when_enabled_and_after_each_byte() {
        let irq = Arc::new(Edges::default());
        let serial = Serial::new(irq.clone(), Box::new(io::sink()), Flush::Byte);
        serial.write(IER, &[2]);
        assert_eq!(irq.0.load(Ordering::Relaxed), 1);
        assert_eq!(register(&serial, 2) & 0xf, 2);
        serial.write(0, b"x");
        assert_eq!(irq.0.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn registers_and_unread_input_are_saved() {
        let irq = Arc::new(Edges::default());
        let made = || Serial::new(irq.clone(), Box::new(io::sink()), Flush::Byte);
        let first = made();
        let input: Vec<u8> = (0..200).collect();
        first.write(7, &[0x77]);
        first.write(IER, &[RDI]);
        first.input(&input[..150]);
        assert_eq!(register(&first, 0), 0);
        let state = serde_json::from_str(&serde_json::to_string(&first.save()).unwrap()).unwrap();
        let second = made();
        second.input(&input[150..]);
        irq.0.store(0, Ordering::Relaxed);
        second.restore(&state).unwrap();
        assert_eq!(irq.0.load(Ordering::Relaxed), 0, "the guest has had that interrupt");
        assert_eq!(register(&second, 7), 0x77);
        let mut got = vec![0];
        while register(&second, LSR) & DATA_READY != 0 {
            got.push(register(&second, 0));
        }
        assert_eq!(got, input);
    }

    #[test]
    fn held_input_comes_later() {
        let irq = Arc::new(Edges::default());
        let serial = Serial::new(irq.clone(), Box::new(io::sink()), Flush::Byte);
        serial.write(IER, &[RDI]);
        serial.hold(true);
        serial.input(b"x");
        let state = serial.save();
        assert_eq!((irq.0.load(Ordering::Relaxed), state.line_status & DATA_READY), (0, 0));
        serial.hold(false);
        assert_eq!(irq.0.load(Ordering::Relaxed), 1);
        assert_eq!(register(&serial, 0), b'x');
    }

    #[test]
    fn damaged_states_are_refused_or_harmless() {
        let serial = Serial::new(Arc::new(Edges::default()), Box::new(io::sink()), Flush::Byte);
        serial.write(IER, &[RDI]);
        serial.input(&[7; 100]);
        let good = serde_json::to_value(serial.save()).unwrap();
        let mut random = Random::new(14);
        for _ in 0..5000 {
            let mut value = good.clone();
            crate::testing::damage(&mut value, &mut random);
            let serial = Serial::new(Arc::new(Edges::default()), Box::new(io::sink()), Flush::Byte);
            if let Ok(Ok(())) = serde_json::from_value(value).map(|state| serial.restore(&state)) {
                for at in 0..8 {
                    register(&serial, at);
                    serial.write(at, &[random.next() as u8]);
                }
                serial.input(b"more");
            }
        }
        let mut state = serial.save();
        state.received.push(0);
        let error = serial.restore(&state).unwrap_err().to_string();
        assert_eq!(error, "the serial port cannot have received 65 bytes");
    }

    #[test]
    fn random_accesses_never_panic() {
        let serial = Serial::new(Arc::new(Edges::default()), Box::new(io::sink()), Flush::Line);
        let mut random = Random::new(2);
        for _ in 0..20_000 {
            let mut data = vec![random.next() as u8; 1 + random.below(4) as usize];
            serial.write(random.below(8) as u16, &data);
            serial.read(random.below(8) as u16, &mut data);
            if random.below(10) == 0 {
                serial.input(&data);
            }
        }
    }
}
