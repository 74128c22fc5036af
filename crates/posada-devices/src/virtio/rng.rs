//! virtio-rng (virtio 1.2 section 5.4): the host's random numbers.

use super::{Broken, DeviceState, Signal, VirtQueue, VirtioDevice};
use crate::state::StateError;
use std::fs::File;
use std::io::{self, Read};

/// Most bytes given for one request; drivers ask for less and ask again.
const MOST: u64 = 4096;

/// The device.
pub struct Rng {
    source: File,
}

impl Rng {
    /// A device that reads the host kernel's random numbers.
    ///
    /// # Errors
    /// When `/dev/urandom` cannot be opened.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            source: File::open("/dev/urandom")?,
        })
    }
}

impl VirtioDevice for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn id(&self) -> u16 {
        4
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config(&[], offset, data);
    }

    fn serve(&self, queues: &mut [VirtQueue], signal: &Signal) -> Result<(), Broken> {
        queues[0].drain(signal, |ram, mut chain| {
            let mut bytes = vec![0; chain.writable.length().min(MOST) as usize];
            let got = (&self.source).read(&mut bytes).unwrap_or(0);
            Ok(chain.writable.write(ram, &bytes[..got]) as u32)
        })
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        match state {
            DeviceState::Rng => Ok(()),
            _ => Err(state.is_not(self)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::{DATA, Driver};
    use super::*;
    use std::sync::Arc;

    #[test]
    fn buffers_come_back_full_of_random_bytes() {
        let mut driver = Driver::new(Arc::new(Rng::new().unwrap()), 0);
        assert_eq!(driver.request(0, &[(DATA, 64, true), (DATA + 0x100, 64, true)]), 128);
        assert_ne!(driver.get(DATA, 64), driver.get(DATA + 0x100, 64));
        assert_eq!(driver.request(0, &[(DATA, 0x1_0000, true)]), MOST as u32);
        assert_eq!(driver.request(0, &[(DATA, 64, false)]), 0);
    }
}
