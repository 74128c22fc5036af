//! virtio-console (virtio 1.2 section 5.3): one port, optionally with the terminal's size. Input waits on the host until
//! the guest has buffers for it, also across resets of the device.

use super::{Broken, DeviceState, Link, Signal, VirtQueue, VirtioDevice};
use crate::state::StateError;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};

/// VIRTIO_CONSOLE_F_SIZE.
const SIZE: u64 = 1;
const RX: usize = 0;
const TX: usize = 1;
/// Bytes copied at a time.
const CHUNK: u64 = 4096;

/// What a console keeps for its guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns and rows that the guest was told of, if it is.
    pub size: Option<(u16, u16)>,
    /// Input that the guest has not taken.
    #[serde(with = "const_hex")]
    pub input: Vec<u8>,
}

/// The device.
pub struct Console {
    input: Mutex<VecDeque<u8>>,
    output: Mutex<Box<dyn Write + Send>>,
    /// Columns and rows.
    size: Mutex<Option<(u16, u16)>>,
    link: OnceLock<Link>,
}

impl Console {
    /// A console that prints to `output`; with a `size` (columns, rows) the guest is told of it and of its changes.
    pub fn new(output: Box<dyn Write + Send>, size: Option<(u16, u16)>) -> Arc<Self> {
        Arc::new(Self {
            input: Mutex::default(),
            output: Mutex::new(output),
            size: Mutex::new(size),
            link: OnceLock::new(),
        })
    }

    /// Input for the guest, of any length.
    pub fn input(&self, bytes: &[u8]) {
        self.input.lock().unwrap().extend(bytes);
        if let Some(link) = self.link.get() {
            link.wake();
        }
    }

    /// Bytes of input the guest has not taken yet.
    pub fn input_waiting(&self) -> usize {
        self.input.lock().unwrap().len()
    }

    /// The terminal has a new size. Without effect on a console made without one.
    pub fn resize(&self, columns: u16, rows: u16) {
        if let Some(size) = &mut *self.size.lock().unwrap() {
            *size = (columns, rows);
        } else {
            return;
        }
        self.tell_size();
    }

    fn tell_size(&self) {
        if let Some(link) = self.link.get() {
            link.config_changed();
        }
    }

    /// Gives waiting input to the guest while it has buffers. Notifications of buffers are wanted only while there is
    /// input for which there are none.
    fn receive(&self, queue: &mut VirtQueue, signal: &Signal) -> Result<(), Broken> {
        let ram = Arc::clone(queue.ram());
        queue.disable_notification()?;
        while self.input_waiting() > 0 && !signal.stopping() {
            let Some(mut chain) = queue.pop()? else {
                if queue.enable_notification()? {
                    queue.disable_notification()?;
                    continue;
                }
                return Ok(());
            };
            let mut written = 0;
            loop {
                let room = chain.writable.length().min(CHUNK) as usize;
                let bytes: Vec<u8> = self.input.lock().unwrap().iter().take(room).copied().collect();
                if bytes.is_empty() {
                    break;
                }
                let copied = chain.writable.write(&ram, &bytes);
                self.input.lock().unwrap().drain(..copied);
                written += copied as u32;
            }
            queue.push(chain.head, written)?;
        }
        Ok(())
    }

    /// Prints what the guest sends. A writer that fails loses output; the guest goes on.
    fn transmit(&self, queue: &mut VirtQueue, signal: &Signal) -> Result<(), Broken> {
        queue.drain(signal, |ram, mut chain| {
            let mut output = self.output.lock().unwrap();
            let mut bytes = vec![0; chain.readable.length().min(CHUNK) as usize];
            while chain.readable.length() > 0 && !signal.abandoned() {
                let part = chain.readable.length().min(CHUNK) as usize;
                if !chain.readable.read(ram, &mut bytes[..part]) || output.write_all(&bytes[..part]).is_err() {
                    break;
                }
            }
            let _ = output.flush();
            Ok(0)
        })
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn id(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        if self.size.lock().unwrap().is_some() { SIZE } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = self.size.lock().unwrap().unwrap_or_default();
        let mut config = [0; 12];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        // max_nr_ports
        config[4] = 1;
        super::read_config(&config, offset, data);
    }

    fn serve(&self, queues: &mut [VirtQueue], signal: &Signal) -> Result<(), Broken> {
        self.receive(&mut queues[RX], signal)?;
        self.transmit(&mut queues[TX], signal)
    }

    fn connect(&self, link: Link) {
        // A console has one transport for its life.
        let _ = self.link.set(link);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            size: *self.size.lock().unwrap(),
            input: self.input.lock().unwrap().iter().copied().collect(),
        })
    }

    /// The size stays that of this console's terminal; a guest that knows another is told.
    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Console(state) = state else {
            return Err(state.is_not(self));
        };
        let size = *self.size.lock().unwrap();
        if size.is_some() != state.size.is_some() {
            let tells = |size: Option<_>| if size.is_some() { "tells" } else { "does not tell" };
            return Err(StateError::new(format!(
                "{} the guest its size, the snapshot's {}",
                tells(size),
                tells(state.size)
            )));
        }
        let mut input = self.input.lock().unwrap();
        state.input.iter().rev().for_each(|byte| input.push_front(*byte));
        drop(input);
        if size != state.size {
            self.tell_size();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{DATA, Driver};
    use super::*;
    use std::io;

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

    #[test]
    fn output_is_printed_in_order() {
        let out = Shared::default();
        let mut driver = Driver::new(Console::new(Box::new(out.clone()), None), 0);
        driver.put(DATA, b"hello, world");
        driver.request(TX, &[(DATA, 7, false), (DATA + 7, 5, false)]);
        driver.request(TX, &[(DATA, 5, false)]);
        assert_eq!(*out.0.lock().unwrap(), b"hello, worldhello");
    }

    #[test]
    fn input_waits_for_buffers_and_survives_a_reset() {
        let console = Console::new(Box::new(io::sink()), None);
        console.input(b"early ");
        let mut driver = Driver::new(console.clone(), 0);
        console.input(b"bird and more");
        assert_eq!(driver.request(RX, &[(DATA, 4, true), (DATA + 4, 4, true)]), 8);
        assert_eq!(driver.get(DATA, 8), b"early bi");
        driver.start(0);
        assert_eq!(driver.request(RX, &[(DATA, 6, true)]), 6);
        assert_eq!(driver.get(DATA, 6), b"rd and");
        assert_eq!(driver.request(RX, &[(DATA, 600, true)]), 5);
        driver.make(RX, &[(DATA, 600, true)]);
        assert_eq!(console.input_waiting(), 0);
        console.input(b"!");
        assert_eq!(driver.wait(RX), 1);
    }

    #[test]
    fn a_new_size_is_announced() {
        let console = Console::new(Box::new(io::sink()), Some((80, 25)));
        let driver = Driver::new(console.clone(), SIZE);
        assert_eq!(driver.read::<4>(0x2000), [80, 0, 25, 0]);
        let generation = driver.read::<1>(21);
        console.resize(132, 50);
        assert_eq!(driver.read::<4>(0x2000), [132, 0, 50, 0]);
        assert_ne!(driver.read::<1>(21), generation);
        assert_eq!(driver.sink.take().last().unwrap().data, 0x30);
    }
}
