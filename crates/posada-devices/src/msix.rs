//! MSI-X (PCI 3.0 section 6.8.2): a function's interrupt vectors as messages, with masks per vector and per function.

use crate::bus::get_le;
use crate::state::StateError;
use posada_engine::{Msi, MsiLine, MsiSink};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// Capability id.
pub const CAPABILITY: u8 = 0x11;
/// Bits of the message control word that a driver may write: enable and function mask.
pub const CONTROL_WRITABLE: u16 = ENABLE | FUNCTION_MASK;
/// Bytes of a table entry.
pub const ENTRY: u64 = 16;

const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// Where the vector control word's mask bit lies in an entry.
const VECTOR_CONTROL: usize = 12;

/// A table entry, and whether its message waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control: bit 0 masks.
    pub control: u32,
    /// An interrupt came while it was masked.
    pub pending: bool,
}

/// The vectors of a function. Enable and function mask are in its configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MsixState(Vec<VectorState>);

struct State {
    control: u16,
    table: Vec<[u8; ENTRY as usize]>,
    pending: Vec<u64>,
    /// What each vector's line sends.
    told: Vec<Option<Msi>>,
}

impl State {
    fn masked(&self, vector: usize) -> bool {
        self.control & FUNCTION_MASK != 0 || self.table[vector][VECTOR_CONTROL] & 1 != 0
    }

    fn message(&self, vector: usize) -> Msi {
        let entry = &self.table[vector];
        Msi {
            address: get_le(&entry[..8]),
            data: get_le(&entry[8..12]) as u32,
        }
    }

    /// Tells the lines of vectors that may send what they send, and takes those of them that have waited for that.
    fn settle(&mut self, lines: &[Box<dyn MsiLine>]) -> Vec<usize> {
        let mut released = Vec::new();
        if self.control & ENABLE != 0 {
            for (vector, line) in lines.iter().enumerate() {
                if self.masked(vector) {
                    continue;
                }
                let message = self.message(vector);
                if self.told[vector] != Some(message) {
                    self.told[vector] = Some(message);
                    line.set(message);
                }
                let (word, bit) = (vector / 64, 1 << (vector % 64));
                if self.pending[word] & bit != 0 {
                    self.pending[word] &= !bit;
                    released.push(vector);
                }
            }
        }
        released
    }
}

/// The vectors of one function: table, pending bits and masks.
pub struct Msix {
    lines: Vec<Box<dyn MsiLine>>,
    // Held while a line is told its message, so that the last one stays; never while a line sends.
    state: Mutex<State>,
}

impl Msix {
    /// `vectors` (1 to 2048) masked vectors that send to `sink`.
    pub fn new(sink: Arc<dyn MsiSink>, vectors: u16) -> Self {
        let count = usize::from(vectors);
        let mut entry = [0; ENTRY as usize];
        entry[VECTOR_CONTROL] = 1;
        Self {
            lines: (0..count).map(|_| Arc::clone(&sink).connect()).collect(),
            state: Mutex::new(State {
                control: 0,
                table: vec![entry; count],
                pending: vec![0; count.div_ceil(64)],
                told: vec![None; count],
            }),
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.lines.len() as u16
    }

    /// The capability's body behind id and link, for a table and a pending bit array in `bar`, and which bits of it a
    /// driver may write.
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> ([u8; 10], [u8; 10]) {
        let mut body = [0; 10];
        body[..2].copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table | u32::from(bar)).to_le_bytes());
        body[6..].copy_from_slice(&(pending | u32::from(bar)).to_le_bytes());
        let mut writable = [0; 10];
        writable[..2].copy_from_slice(&CONTROL_WRITABLE.to_le_bytes());
        (body, writable)
    }

    /// The driver wrote the message control word.
    pub fn set_control(&self, control: u16) {
        let released = {
            let mut state = self.state.lock().unwrap();
            state.control = control;
            state.settle(&self.lines)
        };
        self.send(&released);
    }

    /// Raises `vector`. Lost while MSI-X is off, kept while masked; a vector that does not exist is ignored.
    pub fn signal(&self, vector: u16) {
        let vector = usize::from(vector);
        {
            let mut state = self.state.lock().unwrap();
            if vector >= state.table.len() || state.control & ENABLE == 0 {
                return;
            }
            if state.masked(vector) {
                state.pending[vector / 64] |= 1 << (vector % 64);
                return;
            }
        }
        self.lines[vector].signal();
    }

    /// A load from the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let entry = state.table.get((at / ENTRY) as usize);
            *byte = entry.map_or(0, |entry| entry[(at % ENTRY) as usize]);
        }
    }

    /// A store to the table.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let released = {
            let mut state = self.state.lock().unwrap();
            for (byte, at) in data.iter().zip(offset..) {
                if let Some(entry) = state.table.get_mut((at / ENTRY) as usize) {
                    entry[(at % ENTRY) as usize] = *byte;
                }
            }
            state.settle(&self.lines)
        };
        self.send(&released);
    }

    /// A load from the pending bit array. Stores there have no effect.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap();
        for (byte, at) in data.iter_mut().zip(offset..) {
            let word = state.pending.get((at / 8) as usize);
            *byte = word.map_or(0, |word| (word >> (at % 8 * 8)) as u8);
        }
    }

    /// Table and pending bits.
    pub fn save(&self) -> MsixState {
        let state = self.state.lock().unwrap();
        let vector = |(index, entry): (usize, &[u8; ENTRY as usize])| VectorState {
            address: get_le(&entry[..8]),
            data: get_le(&entry[8..12]) as u32,
            control: get_le(&entry[12..]) as u32,
            pending: state.pending[index / 64] >> (index % 64) & 1 != 0,
        };
        MsixState(state.table.iter().enumerate().map(vector).collect())
    }

    /// Takes a saved table over, under the message control word `control`. Nothing is sent by it: what waits, waits on.
    ///
    /// # Errors
    /// [`StateError`] if there are not as many vectors.
    pub fn restore(&self, saved: &MsixState, control: u16) -> Result<(), StateError> {
        if saved.0.len() != self.lines.len() {
            return Err(StateError::differs(
                "interrupt vectors",
                self.lines.len(),
                saved.0.len(),
            ));
        }
        let mut state = self.state.lock().unwrap();
        state.control = control;
        state.pending.fill(0);
        for (entry, vector) in state.table.iter_mut().zip(&saved.0) {
            entry[..8].copy_from_slice(&vector.address.to_le_bytes());
            entry[8..12].copy_from_slice(&vector.data.to_le_bytes());
            entry[12..].copy_from_slice(&vector.control.to_le_bytes());
        }
        // With nothing pending yet this only tells the lines.
        state.settle(&self.lines);
        for (index, vector) in saved.0.iter().enumerate() {
            state.pending[index / 64] |= u64::from(vector.pending) << (index % 64);
        }
        Ok(())
    }

    fn send(&self, vectors: &[usize]) {
        vectors.iter().for_each(|vector| self.lines[*vector].signal());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, Sink};

    fn vector(msix: &Msix, vector: u64, data: u32, masked: bool) {
        msix.table_write(vector * ENTRY, &0xfee0_1000_u64.to_le_bytes());
        msix.table_write(vector * ENTRY + 8, &data.to_le_bytes());
        msix.table_write(vector * ENTRY + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &Msix) -> u64 {
        let mut data = [0; 8];
        msix.pending_read(0, &mut data);
        get_le(&data)
    }

    #[test]
    fn a_masked_vector_is_kept_pending_until_unmasked() {
        let sink = Sink::new();
        let msix = Msix::new(sink.clone(), 3);
        vector(&msix, 1, 0x51, false);
        msix.signal(1);
        assert_eq!(sink.take(), [], "MSI-X is off");
        msix.set_control(ENABLE);
        msix.signal(1);
        let message = Msi {
            address: 0xfee0_1000,
            data: 0x51,
        };
        assert_eq!(sink.take(), [message]);
        vector(&msix, 1, 0x51, true);
        msix.signal(1);
        msix.signal(1);
        assert_eq!((sink.take(), pending(&msix)), (vec![], 2));
        vector(&msix, 1, 0x51, false);
        assert_eq!((sink.take(), pending(&msix)), (vec![message], 0));
    }

    #[test]
    fn the_function_mask_holds_all_vectors() {
        let sink = Sink::new();
        let msix = Msix::new(sink.clone(), 70);
        vector(&msix, 0, 0x50, false);
        vector(&msix, 69, 0x51, false);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.signal(0);
        msix.signal(69);
        msix.signal(70);
        assert_eq!(sink.take(), []);
        msix.set_control(ENABLE);
        assert_eq!(sink.take().iter().map(|msi| msi.data).collect::<Vec<_>>(), [0x50, 0x51]);
    }

    /// MSI-X as the specification has it, one message at a time.
    #[derive(Clone, Copy)]
    struct Model {
        entries: [(Msi, bool, bool); 3],
        control: u16,
    }

    impl Model {
        fn sendable(&mut self) -> Vec<Msi> {
            let on = self.control & (ENABLE | FUNCTION_MASK) == ENABLE;
            let send = |(message, masked, pending): &mut (Msi, bool, bool)| {
                (on && !*masked && std::mem::take(pending)).then_some(*message)
            };
            self.entries.iter_mut().filter_map(send).collect()
        }
    }

    #[test]
    fn random_sequences_send_what_the_specification_says() {
        let mut random = Random::new(11);
        let sink = Sink::new();
        let msix = Msix::new(sink.clone(), 3);
        let nothing = Msi { address: 0, data: 0 };
        let mut model = Model {
            entries: [(nothing, true, false); 3],
            control: 0,
        };
        for step in 0..20_000 {
            let index = random.below(3) as usize;
            let value = random.below(1 << 32);
            let at = index as u64 * ENTRY;
            let mut expected = Vec::new();
            let (message, masked, pending) = &mut model.entries[index];
            match random.below(6) {
                0 => {
                    message.address = value;
                    msix.table_write(at, &value.to_le_bytes());
                }
                1 => {
                    message.data = value as u32;
                    msix.table_write(at + 8, &(value as u32).to_le_bytes());
                }
                2 => {
                    *masked = value & 1 != 0;
                    msix.table_write(at + 12, &(value as u32).to_le_bytes());
                }
                3 => {
                    model.control = value as u16 & CONTROL_WRITABLE;
                    msix.set_control(model.control);
                }
                _ => {
                    if model.control & ENABLE != 0 {
                        if *masked || model.control & FUNCTION_MASK != 0 {
                            *pending = true;
                        } else {
                            expected.push(*message);
                        }
                    }
                    msix.signal(index as u16);
                }
            }
            expected.extend(model.sendable());
            assert_eq!(sink.take(), expected, "step {step}");
        }
    }

    #[test]
    fn random_accesses_never_panic() {
        let msix = Msix::new(Sink::new(), 3);
        let mut random = Random::new(3);
        for _ in 0..10_000 {
            let mut data = vec![random.next() as u8; 1 + random.below(64) as usize];
            msix.table_write(random.below(0x1000), &data);
            msix.table_read(random.below(0x1000), &mut data);
            msix.pending_read(random.below(0x1000), &mut data);
            msix.set_control(random.next() as u16);
            msix.signal(random.below(5) as u16);
        }
    }
}
