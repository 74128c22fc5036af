//! The configuration space of a function: type 0 header, BARs that can be sized and moved, a capability list. Which bits
//! the guest may write is a mask beside each byte.

use crate::state::StateError;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Bytes of the space; what lies beyond in ECAM (extended capabilities) reads zero.
pub const SIZE: usize = 256;
/// Command register.
pub const COMMAND: u16 = 0x04;
/// First and one past the last byte of the BARs.
pub const BARS: Range<u16> = 0x10..0x28;

const MEMORY_ENABLE: u8 = 1 << 1;
/// Memory space, bus master; INTx disable is in the upper byte.
const COMMAND_WRITABLE: [u8; 2] = [0x06, 0x04];
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITY_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: u8 = 0x40;
/// Address bits of a memory BAR.
const ADDRESS: u64 = !0xf;
/// Type bits of a memory BAR: 64 bits wide.
const WIDE: u8 = 1 << 2;

/// Who a function is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Base class, sub-class and programming interface (24 bits).
    pub class: u32,
    /// Revision id.
    pub revision: u8,
    /// Subsystem vendor id and id.
    pub subsystem: (u16, u16),
}

/// A function's configuration space, with what the guest has written: BARs, command, capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigState(#[serde(with = "const_hex")] [u8; SIZE]);

#[derive(Clone, Copy)]
struct Bar {
    /// Bytes, a power of two.
    size: u64,
    wide: bool,
}

/// The space of one function.
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: [Option<Bar>; 6],
    /// Where the link to the next capability goes, and where that may begin.
    link: usize,
    free: u8,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities. Memory decoding is on, as firmware leaves it.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; 6],
            link: CAPABILITY_POINTER,
            free: FIRST_CAPABILITY,
        };
        space.bytes[0x00..0x02].copy_from_slice(&identity.vendor.to_le_bytes());
        space.bytes[0x02..0x04].copy_from_slice(&identity.device.to_le_bytes());
        space.bytes[0x08] = identity.revision;
        space.bytes[0x09..0x0c].copy_from_slice(&identity.class.to_le_bytes()[..3]);
        space.bytes[0x2c..0x2e].copy_from_slice(&identity.subsystem.0.to_le_bytes());
        space.bytes[0x2e..0x30].copy_from_slice(&identity.subsystem.1.to_le_bytes());
        let command = usize::from(COMMAND);
        space.bytes[command] = MEMORY_ENABLE;
        space.writable[command..command + 2].copy_from_slice(&COMMAND_WRITABLE);
        // Cache line size and interrupt line are scratch bytes to us.
        space.writable[0x0c] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Adds memory BAR `index` of `size` bytes; a `wide` (64-bit) one takes `index + 1` too.
    ///
    /// # Panics
    /// If the size is no power of two of at least 16 bytes (below 4 GiB unless wide) or the index is taken.
    pub fn add_bar(&mut self, index: usize, size: u64, wide: bool) {
        assert!(size.is_power_of_two() && size >= 16 && (wide || size <= 1 << 31));
        let registers = index..index + 1 + usize::from(wide);
        let taken = |at: usize| self.bars[at].is_some() || at > 0 && self.bars[at - 1].is_some_and(|bar| bar.wide);
        assert!(!registers.clone().any(taken));
        self.bars[index] = Some(Bar { size, wide });
        let at = usize::from(BARS.start) + 4 * index;
        let length = 4 * registers.len();
        let mask = !(size - 1) & ADDRESS;
        self.writable[at..at + length].copy_from_slice(&mask.to_le_bytes()[..length]);
        self.bytes[at] = if wide { WIDE } else { 0 };
    }

    /// Adds a capability: `body` follows id and link, `writable` marks its bits that the guest may change. Returns its
    /// offset.
    ///
    /// # Panics
    /// If the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u8 {
        let offset = self.free;
        let at = usize::from(offset);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[self.link] = offset;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.link = at + 1;
        self.free = ((at + 2 + body.len()).next_multiple_of(4)) as u8;
        offset
    }

    /// The sizes in bytes of the BARs there are, by index.
    pub fn bar_sizes(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        (0..).zip(&self.bars).filter_map(|(at, bar)| Some((at, (*bar)?.size)))
    }

    /// Puts a BAR at an address, as firmware does.
    pub fn set_bar(&mut self, index: usize, address: u64) {
        if let Some(bar) = self.bars[index] {
            let at = BARS.start + 4 * index as u16;
            self.write(at, &address.to_le_bytes()[..if bar.wide { 8 } else { 4 }]);
        }
    }

    /// Where BAR `index` answers now; `None` if memory decoding is off or the address was never set.
    pub fn decoded_bar(&self, index: usize) -> Option<Range<u64>> {
        let bar = self.bars[index]?;
        let at = usize::from(BARS.start) + 4 * index;
        let length = if bar.wide { 8 } else { 4 };
        let base = crate::bus::get_le(&self.bytes[at..at + length]) & ADDRESS;
        let on = self.bytes[usize::from(COMMAND)] & MEMORY_ENABLE != 0 && base != 0;
        Some(base..base.checked_add(bar.size)?).filter(|_| on)
    }

    /// The 16-bit word at `offset`.
    pub fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// A load of any width; zero beyond the configuration space.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(usize::from(offset)..) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A store of any width; bits that cannot be written keep their value.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (byte, at) in data.iter().zip(usize::from(offset)..SIZE) {
            let mask = self.writable[at];
            self.bytes[at] = self.bytes[at] & !mask | byte & mask;
        }
    }
}

impl ConfigSpace {
    /// What is in it.
    pub fn save(&self) -> ConfigState {
        ConfigState(self.bytes)
    }

    /// Checks that a state is one of this function: what the guest cannot write is the same.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn check(&self, state: &ConfigState) -> Result<(), StateError> {
        let id = |bytes: &[u8; SIZE]| format!("{:02x}{:02x}:{:02x}{:02x}", bytes[1], bytes[0], bytes[3], bytes[2]);
        let (ours, theirs) = (id(&self.bytes), id(&state.0));
        if ours != theirs {
            return Err(StateError::new(format!(
                "is PCI device {ours}, the snapshot's is {theirs}"
            )));
        }
        let fixed = |bytes: &[u8; SIZE], at: usize| bytes[at] & !self.writable[at];
        match (0..SIZE).find(|at| fixed(&self.bytes, *at) != fixed(&state.0, *at)) {
            Some(at) => Err(StateError::new(format!(
                "has {:#04x} at {at:#x} of its configuration space, the snapshot's has {:#04x}",
                self.bytes[at], state.0[at]
            ))),
            None => Ok(()),
        }
    }

    /// Takes a state over that [`ConfigSpace::check`] has found good.
    pub fn restore(&mut self, state: &ConfigState) {
        self.bytes = state.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_80_00,
            revision: 1,
            subsystem: (0x1af4, 0x1042),
        })
    }

    fn dword(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn writing_all_ones_shows_a_bars_size() {
        let mut space = space();
        space.add_bar(0, 0x8000, false);
        space.add_bar(2, 0x2_0000_0000, true);
        space.set_bar(0, 0xc000_8000);
        space.set_bar(2, 0x40_0000_0000);
        assert_eq!(dword(&space, 0x10), 0xc000_8000);
        assert_eq!((dword(&space, 0x18), dword(&space, 0x1c)), (4, 0x40));
        for register in [0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x30] {
            space.write(register, &[0xff; 4]);
        }
        assert_eq!(dword(&space, 0x10), 0xffff_8000);
        assert_eq!(dword(&space, 0x14), 0, "no BAR there");
        assert_eq!((dword(&space, 0x18), dword(&space, 0x1c)), (4, 0xffff_fffe));
        assert_eq!((dword(&space, 0x20), dword(&space, 0x30)), (0, 0));
    }

    #[test]
    fn a_bar_is_decoded_where_the_guest_puts_it_while_memory_is_enabled() {
        let mut space = space();
        space.add_bar(0, 0x1000, false);
        assert_eq!(space.decoded_bar(0), None, "never set");
        space.write(0x10, &0xc001_2345_u32.to_le_bytes());
        assert_eq!(space.decoded_bar(0), Some(0xc001_2000..0xc001_3000));
        space.write(COMMAND, &[0, 0]);
        assert_eq!(space.decoded_bar(0), None);
        assert_eq!(space.decoded_bar(1), None);
    }

    #[test]
    fn capabilities_are_linked_and_only_their_writable_bits_change() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3, 4, 5], &[]);
        let second = space.add_capability(0x11, &[6, 7], &[0, 0xc0]);
        assert_eq!(space.word(0x06) & 0x10, 0x10);
        assert_eq!(space.word(0x34) as u8, first);
        assert_eq!(space.word(first.into()), u16::from(second) << 8 | 9);
        assert_eq!(space.word(second.into()), 0x11);
        space.write(second.into(), &[0xff; 4]);
        assert_eq!(dword(&space, second.into()), 0xc706_0011);
    }
}
