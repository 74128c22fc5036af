//! Devices of the machine: what answers at ports, in MMIO and on the PCI bus. They know guest RAM and where to send
//! interrupts ([`posada_engine::MsiSink`]), and nothing of the processors.
//!
//! A machine wires them up like this:
//!
//! ```no_run
//! # fn machine(
//! #     sink: std::sync::Arc<dyn posada_engine::MsiSink>,
//! #     ram: std::sync::Arc<posada_memory::GuestRam>,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! use posada_devices::{bell, bus::*, ioapic, pci, power, serial, virtio};
//! use std::sync::Arc;
//!
//! let (mut ports, mut mmio) = (PortBus::new(), MmioBus::new());
//! let power: power::PowerSink = Arc::new(|event| println!("{event:?}"));
//!
//! let ioapic = ioapic::IoApic::new(sink.clone());
//! mmio.insert(0xfec0_0000..0xfec0_0000 + ioapic::SIZE, ioapic.clone())?;
//! let com1 = serial::Serial::new(ioapic.line(4), Box::new(std::io::stdout()), serial::Flush::Byte);
//! ports.insert(0x3f8..0x3f8 + serial::PORTS, com1.clone())?;
//! ports.insert(0x600..0x600 + power::ACPI_PORTS, Arc::new(power::AcpiPower::new(power.clone())))?;
//!
//! let root = pci::PciRoot::new(0xc000_0000..0xe000_0000);
//! let config = pci::PciPorts::new(root.clone(), power);
//! ports.insert(pci::PORT..pci::PORT + pci::PORTS, Arc::new(config))?;
//! mmio.insert(0xe000_0000..0xe000_0000 + pci::ECAM_SIZE, Arc::new(pci::Ecam(root.clone())))?;
//! let window = pci::PciWindow { root: root.clone(), base: 0xc000_0000 };
//! mmio.insert(0xc000_0000..0xe000_0000, Arc::new(window))?;
//!
//! let disk = virtio::blk::open_disk("disk.img".as_ref(), false)?;
//! let blk = virtio::blk::Blk::new(disk, "disk0", 2);
//! root.add(virtio::VirtioPci::new(blk, ram, sink, Arc::new(bell::NoDoorbells))?)?;
//!
//! com1.input(b"root\n");
//! # Ok(())
//! # }
//! ```

pub mod acpi;
pub mod bell;
pub mod bus;
pub mod debug_exit;
mod event;
pub mod ioapic;
pub mod msix;
pub mod pci;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod state;
#[cfg(test)]
mod testing;
pub mod virtio;
