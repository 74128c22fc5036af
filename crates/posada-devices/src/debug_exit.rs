//! `isa-debug-exit`: a port through which a test kernel ends the VM with an exit code, as under QEMU.

use crate::bus::{PortDevice, get_le};
use crate::power::{PowerEvent, PowerSink};

/// First port.
pub const PORT: u64 = 0xf4;
/// Ports taken.
pub const PORTS: u64 = 4;

/// Writing `v` asks for exit code `(v << 1) | 1`: never 0, so a test cannot succeed by accident.
pub struct DebugExit(PowerSink);

impl DebugExit {
    /// Reports [`PowerEvent::Exit`] to `sink`.
    pub fn new(sink: PowerSink) -> Self {
        Self(sink)
    }
}

impl PortDevice for DebugExit {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        (self.0)(PowerEvent::Exit((get_le(data) as u32) << 1 | 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[test]
    fn the_code_is_twice_the_value_plus_one() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let exit = {
            let seen = seen.clone();
            DebugExit::new(Arc::new(move |event| seen.lock().unwrap().push(event)))
        };
        exit.write(0, &[0x10]);
        exit.write(0, &0x101_u32.to_le_bytes());
        assert_eq!(*seen.lock().unwrap(), [PowerEvent::Exit(0x21), PowerEvent::Exit(0x203)]);
    }
}
