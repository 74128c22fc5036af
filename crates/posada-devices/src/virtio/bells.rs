//! The notification addresses of one device, as doorbells where the host can have them.

use super::Signal;
use crate::bell::Doorbells;
use posada_engine::Doorbell;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

/// Bytes of a driver's notification: the queue's number (virtio 1.2 section 4.1.5.2).
const LENGTH: u32 = 2;

/// Which writes ring for the device's thread without us. All queues have one event: the thread looks at all its rings.
pub(super) struct Bells {
    host: Arc<dyn Doorbells>,
    signal: Arc<Signal>,
    hung: Mutex<Vec<Doorbell>>,
}

impl Bells {
    pub(super) fn new(host: Arc<dyn Doorbells>, signal: Arc<Signal>) -> Self {
        Self {
            host,
            signal,
            hung: Mutex::default(),
        }
    }

    /// Has bells at these guest physical addresses and at no others. Where the host cannot, writes come to us as ever.
    pub(super) fn hang(&self, addresses: Vec<u64>) {
        let mut hung = self.hung.lock().unwrap();
        let event = self.signal.event.as_fd();
        hung.retain(|bell| {
            let keep = addresses.contains(&bell.gpa);
            if !keep {
                self.host.detach(*bell, event);
            }
            keep
        });
        for gpa in addresses {
            if hung.iter().any(|bell| bell.gpa == gpa) {
                continue;
            }
            let bell = Doorbell {
                gpa,
                length: LENGTH,
                value: None,
            };
            match self.host.attach(bell, event) {
                Ok(true) => hung.push(bell),
                Ok(false) => return,
                Err(error) => return tracing::warn!(%error, "the host gives no doorbell for a virtio device"),
            }
        }
    }
}

impl Drop for Bells {
    fn drop(&mut self) {
        self.hang(Vec::new());
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::Driver;
    use super::super::rng::Rng;
    use super::super::{VirtioDevice, VirtioPci};
    use super::*;
    use crate::pci::PciRoot;
    use crate::testing::Sink;
    use posada_engine::Error;
    use posada_memory::GuestRam;
    use std::collections::HashMap;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::BorrowedFd;

    /// An engine's doorbells, that a test rings.
    #[derive(Default)]
    struct Tower {
        bells: Mutex<HashMap<Doorbell, File>>,
        most: Option<usize>,
    }

    impl Doorbells for Tower {
        fn attach(&self, bell: Doorbell, event: BorrowedFd<'_>) -> Result<bool, Error> {
            let mut bells = self.bells.lock().unwrap();
            if self.most.is_some_and(|most| bells.len() >= most) {
                return Err(Error::Host("too many".into()));
            }
            let event = File::from(event.try_clone_to_owned().unwrap());
            assert!(bells.insert(bell, event).is_none(), "{bell:?} twice");
            Ok(true)
        }

        fn detach(&self, bell: Doorbell, _: BorrowedFd<'_>) {
            assert!(
                self.bells.lock().unwrap().remove(&bell).is_some(),
                "{bell:?} is not there"
            );
        }
    }

    impl Tower {
        fn hung(&self) -> Vec<u64> {
            let bells = self.bells.lock().unwrap();
            let mut hung: Vec<_> = bells.keys().map(|bell| bell.gpa).collect();
            hung.sort();
            hung
        }
    }

    const WINDOW: u64 = 0xc000_0000;

    fn console(tower: &Arc<Tower>) -> (Arc<PciRoot>, Arc<VirtioPci>) {
        let root = PciRoot::new(WINDOW..WINDOW + 0x10_0000);
        let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
        let device = super::super::console::Console::new(Box::new(std::io::sink()), None);
        let function = VirtioPci::new(device, ram, Sink::new(), tower.clone()).unwrap();
        root.add(function.clone()).unwrap();
        (root, function)
    }

    #[test]
    fn bells_hang_where_the_bar_is() {
        let tower = Arc::new(Tower::default());
        let (root, function) = console(&tower);
        let at = |base: u64| vec![base + 0x3000, base + 0x3004];
        assert_eq!(tower.hung(), at(WINDOW));
        root.config_write(0, 8, 0x04, &[0]);
        assert_eq!(tower.hung(), [0; 0], "memory decoding is off");
        root.config_write(0, 8, 0x10, &(WINDOW as u32 + 0x8_0000).to_le_bytes());
        root.config_write(0, 8, 0x04, &[6]);
        assert_eq!(tower.hung(), at(WINDOW + 0x8_0000));
        root.config_write(0, 8, 0x10, &0x8000_0000_u32.to_le_bytes());
        assert_eq!(tower.hung(), [0; 0], "outside the window nobody answers");
        let (function_state, bus) = (function.save(), root.save());
        root.config_write(0, 8, 0x10, &(WINDOW as u32).to_le_bytes());
        let state = function.save();
        assert_eq!(tower.hung(), at(WINDOW));
        function.restore(&function_state).unwrap();
        root.restore(&bus).unwrap();
        assert_eq!(tower.hung(), [0; 0]);
        function.restore(&state).unwrap();
        root.restore(&bus).unwrap();
        assert_eq!(tower.hung(), at(WINDOW));
        drop((root, function));
        assert_eq!(tower.hung(), [0; 0]);
    }

    #[test]
    fn a_host_with_too_few_bells_leaves_the_rest_to_us() {
        let tower = Arc::new(Tower {
            most: Some(1),
            ..Tower::default()
        });
        let (root, _function) = console(&tower);
        assert_eq!(tower.hung(), [WINDOW + 0x3000]);
        root.config_write(0, 8, 0x04, &[0]);
        assert_eq!(tower.hung(), [0; 0]);
    }

    #[test]
    fn the_device_serves_its_rings_when_the_host_rings_for_it() {
        let mut driver = Driver::new(Arc::new(Rng::new().unwrap()), 0);
        let tower = Arc::new(Tower::default());
        let device: Arc<dyn VirtioDevice> = Arc::new(Rng::new().unwrap());
        driver.pci = VirtioPci::new(device, driver.ram.clone(), driver.sink.clone(), tower.clone()).unwrap();
        let root = PciRoot::new(WINDOW..WINDOW + 0x10_0000);
        root.add(driver.pci.clone()).unwrap();
        driver.start(0);
        for count in 1..50 {
            driver.descriptor(0, 0, super::super::driver::DATA, 8, super::super::driver::WRITE, 0);
            driver.put_available(0, 0);
            let mut bells = tower.bells.lock().unwrap();
            let event = bells.values_mut().next().unwrap();
            event.write_all(&1_u64.to_ne_bytes()).unwrap();
            drop(bells);
            assert_eq!(driver.wait(0), 8);
            assert_eq!(driver.used(0), count);
        }
    }
}
