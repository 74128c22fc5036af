//! The machine around the processors: which devices there are and where. Built anew for every life of a VM.
//!
//! To add a device, make it here and put it on a bus; a PCI device needs one [`PciRoot::add`]. What a guest can tell of it
//! later is its state, and has a place in [`MachineState`].

mod state;

pub use state::{MachineState, STATE_VERSION};

use crate::control::{Control, Ending};
use crate::layout;
use posada_devices::bell::Doorbells;
use posada_devices::bus::{MmioBus, PortBus, RangeError};
use posada_devices::ioapic::IoApic;
use posada_devices::pci::{Ecam, PciPorts, PciRoot, PciWindow};
use posada_devices::power::{AcpiPower, KeyboardReset, PowerEvent, PowerSink};
use posada_devices::rtc::Rtc;
use posada_devices::serial::{Flush, Serial};
use posada_devices::virtio::blk::{Blk, BlkDisk};
use posada_devices::virtio::console::Console;
use posada_devices::virtio::rng::Rng;
use posada_devices::virtio::vsock::Vsock;
use posada_devices::virtio::{VirtioDevice, VirtioPci};
use posada_devices::{acpi, debug_exit, ioapic, pci, power, rtc, serial};
use posada_engine::{Doorbell, Engine};
use posada_memory::GuestRam;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More PCI devices than slots.
    #[error("the VM has too many devices: {0}; give fewer --disk")]
    Pci(#[from] pci::Error),
    /// Two devices at the same place.
    #[error("the machine's layout is broken: {0}")]
    Range(#[from] RangeError),
    /// The host lacks a resource.
    #[error("cannot give the VM its {what}: {source}")]
    Host {
        /// What for.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
}

/// What differs from machine to machine.
pub struct Parts<'a> {
    /// How many vCPUs it has; disks have as many queues.
    pub cpus: u32,
    /// Disks, in the order of their slots.
    pub disks: &'a [BlkDisk],
    /// Where COM1 prints, and when.
    pub com1: (Box<dyn Write + Send>, Flush),
    /// Where the virtio console prints, if there is to be one.
    pub virtio_console: Option<Box<dyn Write + Send>>,
    /// Sockets between host and guest, if there are to be any.
    pub vsock: Option<VsockPart<'a>>,
    /// Have the debug-exit port.
    pub debug_exit: bool,
}

/// A vsock and its place on the host.
pub struct VsockPart<'a> {
    /// The guest's context id.
    pub cid: u32,
    /// Where programs of the host come to it.
    pub listener: UnixListener,
    /// The listener's path.
    pub path: &'a Path,
}

/// The devices of one life.
pub struct Machine {
    ports: PortBus,
    mmio: MmioBus,
    ioapic: Arc<IoApic>,
    rtc: Arc<Rtc>,
    root: Arc<PciRoot>,
    disks: Vec<Disk>,
    rng: Arc<VirtioPci>,
    virtio_console: Option<Arc<VirtioPci>>,
    vsock: Option<Arc<VirtioPci>>,
    /// COM1.
    pub com1: Arc<Serial>,
    /// The virtio console.
    pub console: Option<Arc<Console>>,
}

/// A disk and the PCI function in front of it.
struct Disk {
    device: Arc<Blk>,
    function: Arc<VirtioPci>,
}

/// The engine's doorbells.
struct Bells(Arc<dyn Engine>);

impl Doorbells for Bells {
    fn attach(&self, bell: Doorbell, event: BorrowedFd<'_>) -> Result<bool, posada_engine::Error> {
        self.0.attach_doorbell(bell, event)
    }

    fn detach(&self, bell: Doorbell, event: BorrowedFd<'_>) {
        self.0.detach_doorbell(bell, event);
    }
}

impl Machine {
    /// Builds the devices. Interrupts go to `engine`, the guest's endings to `control`.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(
        parts: Parts<'_>,
        ram: &Arc<GuestRam>,
        engine: &Arc<dyn Engine>,
        control: &Arc<Control>,
    ) -> Result<Self, Error> {
        let power = power_sink(control);
        let sink = engine.msi_sink();
        let (mut ports, mut mmio) = (PortBus::new(), MmioBus::new());

        let ioapic = IoApic::new(Arc::clone(&sink));
        mmio.insert(layout::IOAPIC..layout::IOAPIC + ioapic::SIZE, ioapic.clone())?;
        let (writer, flush) = parts.com1;
        let com1 = Serial::new(ioapic.line(layout::COM1_LINE), writer, flush);
        let mut port = |first: u64, count, device| ports.insert(first..first + count, device);
        port(layout::COM1_PORT.into(), serial::PORTS, com1.clone())?;
        let rtc = Arc::new(Rtc::new());
        port(rtc::PORT, rtc::PORTS, rtc.clone())?;
        port(power::KEYBOARD_PORT, 1, Arc::new(KeyboardReset::new(power.clone())))?;
        let acpi_power = Arc::new(AcpiPower::new(power.clone()));
        port(layout::POWER_PORT.into(), power::ACPI_PORTS, acpi_power)?;
        if parts.debug_exit {
            let device = Arc::new(debug_exit::DebugExit::new(power.clone()));
            port(debug_exit::PORT, debug_exit::PORTS, device)?;
        }

        let root = PciRoot::new(layout::PCI_WINDOW);
        port(pci::PORT, pci::PORTS, Arc::new(PciPorts::new(root.clone(), power)))?;
        mmio.insert(layout::ECAM, Arc::new(Ecam(root.clone())))?;
        let window = PciWindow {
            root: root.clone(),
            base: layout::PCI_WINDOW.start,
        };
        mmio.insert(layout::PCI_WINDOW, Arc::new(window))?;
        let bells: Arc<dyn Doorbells> = Arc::new(Bells(Arc::clone(engine)));
        let add = |device: Arc<dyn VirtioDevice>| -> Result<Arc<VirtioPci>, Error> {
            let what = "virtio device";
            let function = VirtioPci::new(device, Arc::clone(ram), Arc::clone(&sink), Arc::clone(&bells))
                .map_err(|source| Error::Host { what, source })?;
            root.add(function.clone())?;
            Ok(function)
        };
        let mut disks = Vec::new();
        for (index, disk) in parts.disks.iter().enumerate() {
            let disk = disk
                .try_clone()
                .map_err(|source| Error::Host { what: "disk", source })?;
            let device = Blk::new(disk, &format!("disk{index}"), parts.cpus);
            let function = add(device.clone())?;
            disks.push(Disk { device, function });
        }
        let rng = Rng::new().map_err(|source| Error::Host {
            what: "random numbers",
            source,
        })?;
        let rng = add(Arc::new(rng))?;
        let console = parts.virtio_console.map(|output| Console::new(output, None));
        let virtio_console = match &console {
            Some(console) => Some(add(console.clone())?),
            None => None,
        };
        let vsock = match parts.vsock {
            Some(part) => {
                let made = Vsock::new(part.cid.into(), part.listener, part.path);
                Some(add(made.map_err(|source| Error::Host { what: "vsock", source })?)?)
            }
            None => None,
        };

        Ok(Self {
            ports,
            mmio,
            ioapic,
            rtc,
            root,
            disks,
            rng,
            virtio_console,
            vsock,
            com1,
            console,
        })
    }
}

fn power_sink(control: &Arc<Control>) -> PowerSink {
    let control = Arc::clone(control);
    Arc::new(move |event| {
        control.end(match event {
            PowerEvent::Off => Ending::PowerOff,
            PowerEvent::Reset => Ending::Reset,
            PowerEvent::Exit(code) => Ending::DebugExit(code),
        });
    })
}

/// Puts into `ram` what a guest finds of a firmware: the ACPI tables, and the way to a reset that Linux takes when it has no
/// EFI.
///
/// # Errors
/// [`Error::Host`] when `ram` ends below 1 MiB.
pub(crate) fn put_firmware(ram: &GuestRam, cpus: u32) -> Result<(), Error> {
    let window = layout::PCI_WINDOW;
    let tables = acpi::build(
        cpus,
        &acpi::Layout {
            rsdp: layout::RSDP,
            tables: layout::ACPI_TABLES,
            lapic: layout::LAPIC as u32,
            ioapic: layout::IOAPIC as u32,
            ecam: layout::ECAM.start as u32,
            pci_window: window.start as u32..window.end as u32,
            power_port: layout::POWER_PORT,
            com1: (layout::COM1_PORT, layout::COM1_LINE as u32),
            power_button: None,
        },
    );
    let [low, high] = (layout::POWER_PORT + power::RESET).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; cli; hlt
    let reset = vec![0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xfa, 0xf4];
    for (at, bytes) in tables.into_iter().chain([(layout::RESET_VECTOR, reset)]) {
        ram.memory()
            .write_slice(&bytes, GuestAddress(at))
            .map_err(|error| Error::Host {
                what: "firmware",
                source: io::Error::other(error),
            })?;
    }
    Ok(())
}

impl posada_engine::Machine for Machine {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.ports.read(port, data);
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        self.ports.write(port, data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}
