//! PCI: the root bus with its host bridge, configuration access by ECAM and by ports 0xcf8/0xcfc, and the dispatch of MMIO
//! to the BARs wherever the guest has put them.
//!
//! There is one bus (0) with up to 32 single-function devices, so ECAM is 1 MiB and the MCFG names buses 0 to 0.

mod config;

pub use config::{ConfigSpace, ConfigState, Identity};

use crate::bus::{MmioDevice, PortDevice};
use crate::power::{PowerEvent, PowerSink};
use crate::state::StateError;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};

/// Bytes of ECAM for bus 0.
pub const ECAM_SIZE: u64 = 1 << 20;
/// First configuration port.
pub const PORT: u64 = 0xcf8;
/// Configuration ports: address and data.
pub const PORTS: u64 = 8;

const SLOTS: usize = 32;

/// A function on the bus.
pub trait PciFunction: Send + Sync {
    /// The header, BARs and capabilities. Locked only for the time of one access, never while a BAR is accessed.
    fn config(&self) -> &Mutex<ConfigSpace>;

    /// A configuration load inside a naturally aligned 32-bit word.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config().lock().unwrap().read(offset, data);
    }

    /// A configuration store inside a naturally aligned 32-bit word.
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config().lock().unwrap().write(offset, data);
    }

    /// A load inside BAR `bar`.
    fn bar_read(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// A store inside BAR `bar`.
    fn bar_write(&self, bar: usize, offset: u64, data: &[u8]);

    /// BAR `bar` answers at `range` of the window, or nowhere. Called one at a time, each time that may have changed.
    fn placed(&self, _bar: usize, _range: Option<Range<u64>>) {}
}

/// What the bus itself keeps.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// The host bridge's configuration space.
    pub bridge: ConfigState,
    /// The register at port 0xcf8.
    pub address: u32,
}

/// Why a function cannot be added.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// All slots are taken.
    #[error("the PCI bus is full: a VM can have 31 PCI devices")]
    Full,
    /// The MMIO window has no room for its BARs.
    #[error("the PCI memory window has no room for a BAR of {0} bytes")]
    Window(u64),
}

/// Hands out addresses from a range, each aligned to its size.
#[derive(Debug)]
pub struct Resources {
    left: Range<u64>,
}

impl Resources {
    /// Everything in `range` is free.
    pub fn new(range: Range<u64>) -> Self {
        Self { left: range }
    }

    /// The address of `size` (a power of two) bytes.
    pub fn allocate(&mut self, size: u64) -> Option<u64> {
        let start = self.left.start.checked_next_multiple_of(size)?;
        let end = start.checked_add(size).filter(|end| *end <= self.left.end)?;
        self.left.start = end;
        Some(start)
    }
}

struct HostBridge(Mutex<ConfigSpace>);

impl PciFunction for HostBridge {
    fn config(&self) -> &Mutex<ConfigSpace> {
        &self.0
    }

    fn bar_read(&self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

struct Decoded {
    range: Range<u64>,
    function: Arc<dyn PciFunction>,
    bar: usize,
}

/// Bus 0.
pub struct PciRoot {
    slots: RwLock<Vec<Arc<dyn PciFunction>>>,
    /// Where BARs answer now.
    decoded: RwLock<Vec<Decoded>>,
    window: Range<u64>,
    /// What was last written to port 0xcf8.
    address: AtomicU32,
    resources: Mutex<Resources>,
}

impl PciRoot {
    /// A bus with a host bridge at 00:00.0; BARs are first put into `window` (guest physical, below 4 GiB).
    pub fn new(window: Range<u64>) -> Arc<Self> {
        // The identity of QEMU's generic host bridge for PCI Express: known to guests, without a driver's quirks.
        let bridge = ConfigSpace::new(Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: 0x06_00_00,
            revision: 0,
            subsystem: (0x1af4, 0x1100),
        });
        Arc::new(Self {
            slots: RwLock::new(vec![Arc::new(HostBridge(Mutex::new(bridge)))]),
            decoded: RwLock::default(),
            window: window.clone(),
            address: AtomicU32::new(0),
            resources: Mutex::new(Resources::new(window)),
        })
    }

    /// Puts `function` into the next slot and gives its BARs addresses. Returns the slot's number.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::Window`].
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<u8, Error> {
        let slot = {
            let mut slots = self.slots.write().unwrap();
            if slots.len() == SLOTS {
                return Err(Error::Full);
            }
            {
                let mut config = function.config().lock().unwrap();
                let mut resources = self.resources.lock().unwrap();
                let sizes: Vec<_> = config.bar_sizes().collect();
                for (bar, size) in sizes {
                    let address = resources.allocate(size).ok_or(Error::Window(size))?;
                    config.set_bar(bar, address);
                }
            }
            slots.push(function);
            slots.len() - 1
        };
        self.decode();
        Ok(slot as u8)
    }

    /// Looks up anew where all BARs answer.
    fn decode(&self) {
        let slots = self.slots.read().unwrap();
        // Taken before the BARs are read, so that of two vCPUs' changes the later one is what stays.
        let mut decoded = self.decoded.write().unwrap();
        decoded.clear();
        for function in slots.iter() {
            let bars: Vec<_> = {
                let config = function.config().lock().unwrap();
                let place = |(bar, _)| (bar, config.decoded_bar(bar));
                config.bar_sizes().map(place).collect()
            };
            for (bar, range) in bars {
                if let Some(range) = range.clone() {
                    let function = Arc::clone(function);
                    decoded.push(Decoded { range, function, bar });
                }
                let inside = |range: &Range<u64>| self.window.start <= range.start && range.end <= self.window.end;
                function.placed(bar, range.filter(inside));
            }
        }
    }

    /// What the bus itself keeps; its functions are saved one by one.
    pub fn save(&self) -> PciState {
        PciState {
            bridge: self.bridge().config().lock().unwrap().save(),
            address: self.address.load(Ordering::Relaxed),
        }
    }

    /// Takes a state over and looks where all BARs answer: to be called after the functions have theirs.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn restore(&self, state: &PciState) -> Result<(), StateError> {
        {
            let bridge = self.bridge();
            let mut config = bridge.config().lock().unwrap();
            config
                .check(&state.bridge)
                .map_err(|error| error.of("the PCI host bridge"))?;
            config.restore(&state.bridge);
        }
        self.address.store(state.address, Ordering::Relaxed);
        self.decode();
        Ok(())
    }

    fn bridge(&self) -> Arc<dyn PciFunction> {
        Arc::clone(&self.slots.read().unwrap()[0])
    }

    fn function(&self, bus: u8, device_function: u8) -> Option<Arc<dyn PciFunction>> {
        let slots = self.slots.read().unwrap();
        let single = bus == 0 && device_function.is_multiple_of(8);
        slots.get(usize::from(device_function / 8)).filter(|_| single).cloned()
    }

    /// A configuration load; all ones where there is no function.
    pub fn config_read(&self, bus: u8, device_function: u8, offset: u16, data: &mut [u8]) {
        let Some(function) = self.function(bus, device_function) else {
            return data.fill(0xff);
        };
        for piece in words(offset, data.len()) {
            function.config_read(offset + piece.start as u16, &mut data[piece]);
        }
    }

    /// A configuration store.
    pub fn config_write(&self, bus: u8, device_function: u8, offset: u16, data: &[u8]) {
        let Some(function) = self.function(bus, device_function) else {
            return;
        };
        for piece in words(offset, data.len()) {
            function.config_write(offset + piece.start as u16, &data[piece]);
        }
        let end = offset.saturating_add(data.len() as u16);
        if offset < config::BARS.end && end > config::COMMAND {
            self.decode();
        }
    }

    /// Cuts `gpa..gpa + length` where BARs begin and end, as the bus does with its ranges.
    fn pieces(
        &self,
        gpa: u64,
        length: usize,
        mut access: impl FnMut(Option<(&dyn PciFunction, usize, u64)>, Range<usize>),
    ) {
        let mut done = 0;
        while done < length {
            let at = gpa.wrapping_add(done as u64);
            let found = {
                let decoded = self.decoded.read().unwrap();
                let hit = decoded.iter().find(|hit| hit.range.contains(&at));
                hit.map(|hit| (Arc::clone(&hit.function), hit.bar, hit.range.clone()))
            };
            match found {
                Some((function, bar, range)) => {
                    let piece = ((range.end - at).min((length - done) as u64)) as usize;
                    access(Some((&*function, bar, at - range.start)), done..done + piece);
                    done += piece;
                }
                None => {
                    access(None, done..done + 1);
                    done += 1;
                }
            }
        }
    }

    /// A load from the MMIO space of the BARs.
    pub fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.pieces(gpa, data.len(), |hit, piece| match hit {
            Some((function, bar, offset)) => function.bar_read(bar, offset, &mut data[piece]),
            None => data[piece].fill(0xff),
        });
    }

    /// A store to the MMIO space of the BARs.
    pub fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.pieces(gpa, data.len(), |hit, piece| {
            if let Some((function, bar, offset)) = hit {
                function.bar_write(bar, offset, &data[piece]);
            }
        });
    }
}

/// The pieces of an access that lie in one aligned 32-bit word each.
fn words(offset: u16, length: usize) -> impl Iterator<Item = Range<usize>> {
    let offset = usize::from(offset);
    let mut at = offset;
    std::iter::from_fn(move || {
        let end = (at / 4 * 4 + 4).min(offset + length);
        let piece = at - offset..end - offset;
        at = end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// ECAM (PCI Express 7.2.2): configuration space as MMIO, [`ECAM_SIZE`] bytes on the MMIO bus.
pub struct Ecam(pub Arc<PciRoot>);

/// Function and register of an ECAM offset; an access does not leave its function's 4 KiB.
fn ecam(offset: u64, length: usize) -> (u8, u8, u16, usize) {
    let register = (offset & 0xfff) as u16;
    let inside = length.min(0x1000 - usize::from(register));
    ((offset >> 20) as u8, (offset >> 12) as u8, register, inside)
}

impl MmioDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (bus, function, register, inside) = ecam(offset, data.len());
        data[inside..].fill(0xff);
        self.0.config_read(bus, function, register, &mut data[..inside]);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (bus, function, register, inside) = ecam(offset, data.len());
        self.0.config_write(bus, function, register, &data[..inside]);
    }
}

/// The BARs' window on the MMIO bus.
pub struct PciWindow {
    /// The bus behind it.
    pub root: Arc<PciRoot>,
    /// Guest physical address at which the window is on the bus.
    pub base: u64,
}

impl MmioDevice for PciWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.root.mmio_read(self.base + offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.root.mmio_write(self.base + offset, data);
    }
}

/// Configuration by ports: a 32-bit address at 0xcf8, data at 0xcfc to 0xcff; and between them 0xcf9, the chipset's reset
/// control.
pub struct PciPorts {
    root: Arc<PciRoot>,
    power: PowerSink,
}

const CONFIG_ENABLE: u32 = 1 << 31;
const RESET_CONTROL: u16 = 1;
/// RST_CPU of the reset control.
const RESET_CPU: u8 = 1 << 2;

impl PciPorts {
    /// Ports for `root`; resets go to `power`.
    pub fn new(root: Arc<PciRoot>, power: PowerSink) -> Self {
        Self { root, power }
    }

    /// Bus, function and register that a data port at `offset` stands for.
    fn target(&self, offset: u16) -> Option<(u8, u8, u16)> {
        let address = self.root.address.load(Ordering::Relaxed);
        let register = (address & 0xfc) as u16 + offset.checked_sub(4)?;
        (address & CONFIG_ENABLE != 0).then_some(((address >> 16) as u8, (address >> 8) as u8, register))
    }
}

impl PortDevice for PciPorts {
    fn read(&self, offset: u16, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            return data.copy_from_slice(&self.root.address.load(Ordering::Relaxed).to_le_bytes());
        }
        match self.target(offset) {
            Some((bus, function, register)) => self.root.config_read(bus, function, register, data),
            None => data.fill(if offset == RESET_CONTROL { 0 } else { 0xff }),
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        if let (0, Ok(address)) = (offset, data.try_into()) {
            self.root.address.store(u32::from_le_bytes(address), Ordering::Relaxed);
        } else if offset == RESET_CONTROL && data.len() == 1 {
            if data[0] & RESET_CPU != 0 {
                (self.power)(PowerEvent::Reset);
            }
        } else if let Some((bus, function, register)) = self.target(offset) {
            self.root.config_write(bus, function, register, data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::sync::atomic::AtomicBool;

    struct Memory {
        config: Mutex<ConfigSpace>,
        bytes: Mutex<Vec<u8>>,
    }

    impl Memory {
        fn new() -> Arc<Self> {
            let mut config = ConfigSpace::new(Identity {
                vendor: 0x1234,
                device: 0x5678,
                class: 0x05_00_00,
                revision: 0,
                subsystem: (0, 0),
            });
            config.add_bar(0, 0x1000, false);
            Arc::new(Self {
                config: Mutex::new(config),
                bytes: Mutex::new(vec![0; 0x1000]),
            })
        }
    }

    impl PciFunction for Memory {
        fn config(&self) -> &Mutex<ConfigSpace> {
            &self.config
        }

        fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
            data.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..data.len()]);
        }

        fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
            self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        }
    }

    fn machine() -> (Arc<PciRoot>, PciPorts, Arc<AtomicBool>) {
        let root = PciRoot::new(0xc000_0000..0xc010_0000);
        root.add(Memory::new()).unwrap();
        let reset = Arc::new(AtomicBool::new(false));
        let power: PowerSink = {
            let reset = reset.clone();
            Arc::new(move |event| reset.store(event == PowerEvent::Reset, Ordering::Relaxed))
        };
        (root.clone(), PciPorts::new(root, power), reset)
    }

    #[test]
    fn ports_and_ecam_show_the_same_registers() {
        let (root, ports, _) = machine();
        let ecam = Ecam(root);
        for (slot, id) in [
            (0_u32, 0x0008_1b36),
            (1, 0x5678_1234),
            (2, 0xffff_ffff),
            (31, 0xffff_ffff),
        ] {
            let mut data = [0; 4];
            ports.write(0, &(CONFIG_ENABLE | slot << 11).to_le_bytes());
            ports.read(4, &mut data);
            assert_eq!(u32::from_le_bytes(data), id);
            ecam.read(u64::from(slot) << 15, &mut data);
            assert_eq!(u32::from_le_bytes(data), id);
        }
        let mut wide = [0; 8];
        ecam.read((1 << 15) + 2, &mut wide);
        assert_eq!(wide[..2], [0x78, 0x56]);
        ports.write(0, &(1_u32 << 11).to_le_bytes());
        let mut data = [0; 2];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 2], "not enabled");
    }

    #[test]
    fn a_moved_bar_answers_at_its_new_address_only() {
        let (root, _, _) = machine();
        let window = PciWindow {
            root: root.clone(),
            base: 0xc000_0000,
        };
        window.write(0x10, &[0xab]);
        root.config_write(0, 8, 0x10, &0xc008_0000_u32.to_le_bytes());
        let mut data = [0; 2];
        window.read(0x10, &mut data);
        assert_eq!(data, [0xff; 2]);
        window.read(0x8_0010, &mut data);
        assert_eq!(data, [0xab, 0]);
        window.read(0x8_0fff, &mut data);
        assert_eq!(data, [0, 0xff], "the BAR ends in the middle of the access");
        root.config_write(0, 8, 0x04, &[0]);
        window.read(0x8_0010, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn the_bus_and_the_window_can_be_full() {
        let (root, _, _) = machine();
        for slot in 2..32 {
            assert_eq!(root.add(Memory::new()).unwrap(), slot);
        }
        assert!(matches!(root.add(Memory::new()), Err(Error::Full)));
        let small = PciRoot::new(0xc000_0800..0xc000_1800);
        assert!(matches!(small.add(Memory::new()), Err(Error::Window(0x1000))));
    }

    #[test]
    fn a_byte_at_cf9_resets_and_a_dword_at_cf8_does_not() {
        let (_, ports, reset) = machine();
        ports.write(0, &[0xff; 4]);
        ports.write(1, &[0x02]);
        assert!(!reset.load(Ordering::Relaxed));
        ports.write(1, &[0x06]);
        assert!(reset.load(Ordering::Relaxed));
    }

    #[test]
    fn random_accesses_never_panic() {
        let (root, ports, _) = machine();
        let (ecam, window) = (
            Ecam(root.clone()),
            PciWindow {
                root,
                base: 0xc000_0000,
            },
        );
        let mut random = Random::new(4);
        for _ in 0..50_000 {
            let mut data: Vec<u8> = (0..=random.below(64)).map(|_| random.next() as u8).collect();
            let at = if random.below(2) == 0 {
                random.below(ECAM_SIZE)
            } else {
                (1 << 15) + random.below(0x40)
            };
            ecam.write(at, &data);
            ecam.read(random.below(ECAM_SIZE), &mut data);
            window.write(random.below(0x2000), &data);
            window.read(random.below(0x2000), &mut data);
            let port = random.below(8) as u16;
            let width = [1, 2, 4][random.below(3) as usize]
                .min(8 - usize::from(port))
                .min(data.len());
            ports.write(port, &data[..width]);
            ports.read(port, &mut data[..width]);
        }
    }
}
