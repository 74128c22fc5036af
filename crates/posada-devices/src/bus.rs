//! Address-range buses for ports and MMIO: which device answers where. Holes read all ones and swallow writes.
//!
//! A bus is filled once, before the vCPUs run, and is read-only after. PCI BARs, which the guest may move, are looked up
//! in [`crate::pci::PciRoot`]; the bus only knows the window they live in.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// A device behind I/O ports. `offset` counts from the start of the device's range.
pub trait PortDevice: Send + Sync {
    /// IN of `data.len()` bytes, all inside the range.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// OUT.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device behind guest physical addresses. `offset` counts bytes from the start of the device's range.
pub trait MmioDevice: Send + Sync {
    /// Load of 1 to 64 bytes, all inside the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Store.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range that cannot be put on a bus.
#[derive(Debug, thiserror::Error)]
#[error("the address range {start:#x}..{end:#x} is empty or overlaps another device")]
pub struct RangeError {
    start: u64,
    end: u64,
}

/// Which device owns which addresses.
pub struct Bus<D: ?Sized> {
    /// By first address: one past the last, and the device.
    ranges: BTreeMap<u64, (u64, Arc<D>)>,
}

/// The I/O ports of a machine.
pub type PortBus = Bus<dyn PortDevice>;
/// The MMIO space of a machine.
pub type MmioBus = Bus<dyn MmioDevice>;

impl<D: ?Sized> Default for Bus<D> {
    fn default() -> Self {
        Self {
            ranges: BTreeMap::new(),
        }
    }
}

impl<D: ?Sized> Bus<D> {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `range` to `device`.
    ///
    /// # Errors
    /// [`RangeError`] if the range is empty or taken.
    pub fn insert(&mut self, range: Range<u64>, device: Arc<D>) -> Result<(), RangeError> {
        let taken = self
            .ranges
            .range(..range.end)
            .next_back()
            .is_some_and(|(_, (end, _))| *end > range.start);
        if range.is_empty() || taken {
            return Err(RangeError {
                start: range.start,
                end: range.end,
            });
        }
        self.ranges.insert(range.start, (range.end, device));
        Ok(())
    }

    /// The device at `address`, the offset in its range and the bytes from there to the range's end.
    pub fn lookup(&self, address: u64) -> Option<(&D, u64, u64)> {
        let (start, (end, device)) = self.ranges.range(..=address).next_back()?;
        (address < *end).then(|| (&**device, address - start, end - address))
    }

    /// Cuts the access `address..address + length` where devices begin and end; for each piece calls `access` with the
    /// device and offset (`None`: a hole) and the piece's place in the access.
    fn pieces(&self, address: u64, length: usize, mut access: impl FnMut(Option<(&D, u64)>, Range<usize>)) {
        let mut done = 0;
        while done < length {
            let Some(at) = address.checked_add(done as u64) else {
                return access(None, done..length);
            };
            let left = (length - done) as u64;
            let (device, piece) = match self.lookup(at) {
                Some((device, offset, room)) => (Some((device, offset)), left.min(room)),
                None => {
                    let next = self.ranges.range(at..).next().map_or(u64::MAX, |(start, _)| *start);
                    (None, left.min((next - at).max(1)))
                }
            };
            let piece = piece as usize;
            access(device, done..done + piece);
            done += piece;
        }
    }
}

impl PortBus {
    /// IN: fills `data`.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        self.pieces(port.into(), data.len(), |device, piece| match device {
            Some((device, offset)) => device.read(offset as u16, &mut data[piece]),
            None => data[piece].fill(0xff),
        });
    }

    /// OUT.
    pub fn write(&self, port: u16, data: &[u8]) {
        self.pieces(port.into(), data.len(), |device, piece| {
            if let Some((device, offset)) = device {
                device.write(offset as u16, &data[piece]);
            }
        });
    }
}

impl MmioBus {
    /// A load: fills `data`.
    pub fn read(&self, gpa: u64, data: &mut [u8]) {
        self.pieces(gpa, data.len(), |device, piece| match device {
            Some((device, offset)) => device.read(offset, &mut data[piece]),
            None => data[piece].fill(0xff),
        });
    }

    /// A store.
    pub fn write(&self, gpa: u64, data: &[u8]) {
        self.pieces(gpa, data.len(), |device, piece| {
            if let Some((device, offset)) = device {
                device.write(offset, &data[piece]);
            }
        });
    }
}

/// A register's little-endian bytes as an access of any width sees them: beyond the register, zeroes.
pub(crate) fn put_le(value: u64, data: &mut [u8]) {
    let bytes = value.to_le_bytes();
    for (at, byte) in data.iter_mut().enumerate() {
        *byte = bytes.get(at).copied().unwrap_or(0);
    }
}

/// The value of up to 8 little-endian bytes; more are ignored.
pub(crate) fn get_le(data: &[u8]) -> u64 {
    data.iter()
        .take(8)
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Echo(Mutex<Vec<(u64, usize)>>);

    impl MmioDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
            data.fill(offset as u8);
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.len()));
        }
    }

    #[test]
    fn an_access_across_a_range_end_is_cut_and_holes_read_all_ones() {
        let echo = Arc::new(Echo(Mutex::default()));
        let mut bus = MmioBus::new();
        bus.insert(0x10..0x14, echo.clone()).unwrap();
        bus.insert(0x16..0x18, echo.clone()).unwrap();
        let mut data = [0; 12];
        bus.read(0xe, &mut data);
        assert_eq!(data, [0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff]);
        assert_eq!(*echo.0.lock().unwrap(), [(0, 4), (0, 2)]);
        bus.write(0x13, &[0; 2]);
        assert_eq!(echo.0.lock().unwrap()[2], (3, 1));
        let mut end = [0; 8];
        bus.read(u64::MAX - 2, &mut end);
        assert_eq!(end, [0xff; 8]);
    }

    #[test]
    fn ranges_may_not_overlap() {
        let echo = Arc::new(Echo(Mutex::default()));
        let mut bus = MmioBus::new();
        bus.insert(0x10..0x20, echo.clone()).unwrap();
        for range in [0x1f..0x21, 0xf..0x11, 0x12..0x13, 0..0x100, 5..5] {
            assert!(bus.insert(range, echo.clone()).is_err());
        }
        bus.insert(0x20..0x21, echo.clone()).unwrap();
        bus.insert(0xf..0x10, echo).unwrap();
    }
}
