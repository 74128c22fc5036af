//! ACPI tables of a hardware-reduced machine (ACPI 6.5): no PIC, no PM timer, no fixed buttons. Linux learns from them the
//! processors, the I/O APIC, ECAM, the PCI window, COM1, how to power off and how to reset.

use crate::power;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, ONE,
    Package, PackageBuilder, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use std::ops::Range;

const OEM: [u8; 6] = *b"POSADA";
const OEM_TABLE: [u8; 8] = *b"POSADAVM";
const REVISION: u32 = 1;
/// The vCPUs that MADT entries with 8-bit APIC ids can name.
pub const MAX_CPUS: u32 = 255;

/// Where things are. All addresses are guest physical.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Where the RSDP goes: a multiple of 16; Linux looks at 0xe0000 to 0xfffff, or is told by its boot protocol.
    pub rsdp: u64,
    /// Where the tables go, below 4 GiB: 4 KiB and 8 bytes a vCPU are enough.
    pub tables: u64,
    /// The local APICs.
    pub lapic: u32,
    /// The I/O APIC; its lines are interrupts 0 to 23.
    pub ioapic: u32,
    /// ECAM of bus 0 ([`crate::pci::ECAM_SIZE`] bytes).
    pub ecam: u32,
    /// The window for PCI BARs.
    pub pci_window: Range<u32>,
    /// First port of [`power::AcpiPower`].
    pub power_port: u16,
    /// First port and interrupt line of COM1.
    pub com1: (u16, u32),
    /// Interrupt line of the power button: one edge is one press.
    pub power_button: Option<u32>,
}

/// The tables for `cpus` vCPUs with APIC ids from 0: address and content, the RSDP first.
pub fn build(cpus: u32, layout: &Layout) -> Vec<(u64, Vec<u8>)> {
    let mut next = layout.tables;
    let mut tables = Vec::new();
    let mut place = |bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(16);
        tables.push((at, bytes));
        at
    };
    let dsdt = place(dsdt(layout));
    let entries = [
        place(fadt(layout, dsdt)),
        place(madt(cpus, layout)),
        place(mcfg(layout)),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    entries.into_iter().for_each(|table| xsdt.add_entry(table));
    let xsdt = place(bytes(&xsdt));
    tables.insert(0, (layout.rsdp, bytes(&Rsdp::new(OEM, xsdt))));
    tables
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(layout: &Layout, dsdt: u64) -> Vec<u8> {
    let port = |offset: u16| {
        let address = u64::from(layout.power_port + offset);
        GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    // No VGA; MSI works; the 8042 and the ISA devices of old are not there.
    fadt.iapc_boot_arch = (1 << 2).into();
    fadt.sleep_control_reg = port(0);
    fadt.sleep_status_reg = port(1);
    fadt.reset_reg = port(2);
    fadt.reset_value = power::RESET_VALUE;
    bytes(&fadt.finalize())
}

fn madt(cpus: u32, layout: &Layout) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, OEM_TABLE, REVISION);
    madt.append_slice(&layout.lapic.to_le_bytes());
    // No PIC to disable.
    madt.append_slice(&0_u32.to_le_bytes());
    for cpu in 0..cpus.min(MAX_CPUS) as u8 {
        // Processor local APIC: uid, APIC id, enabled.
        madt.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    // I/O APIC: id, address, first interrupt.
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append_slice(&layout.ioapic.to_le_bytes());
    madt.append_slice(&0_u32.to_le_bytes());
    // Interrupt source override: COM1's ISA interrupt is the I/O APIC's line of the same number, edge, active high.
    let line = layout.com1.1;
    madt.append_slice(&[2, 10, 0, line as u8]);
    madt.append_slice(&line.to_le_bytes());
    madt.append_slice(&[0b0101, 0]);
    madt.as_slice().to_vec()
}

fn mcfg(layout: &Layout) -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, REVISION);
    mcfg.add_ecam(layout.ecam.into(), 0, 0, 0);
    bytes(&mcfg)
}

fn dsdt(layout: &Layout) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, REVISION);
    dsdt.append_slice(&pci(layout));
    dsdt.append_slice(&motherboard(layout));
    dsdt.append_slice(&com1(layout));
    if let Some(line) = layout.power_button {
        dsdt.append_slice(&power_button(line));
    }
    let sleep = Package::new(vec![&power::S5_TYPE]);
    dsdt.append_slice(&bytes(&Name::new(Path::new("_S5_"), &sleep)));
    dsdt.as_slice().to_vec()
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

/// The root bridge. Its functions have no INTx, so the routing table is empty.
fn pci(layout: &Layout) -> Vec<u8> {
    let window = &layout.pci_window;
    let bus = AddressSpace::<u16>::new_bus_number(0, 0);
    let config = IO::new(0xcf8, 0xcf8, 1, 8);
    let memory = AddressSpace::<u32>::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        window.start,
        window.end - 1,
        None,
    );
    let resources = ResourceTemplate::new(vec![&bus, &config, &memory]);
    bytes(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("PCI0"),
            vec![
                &name("_HID", &EISAName::new("PNP0A08")),
                &name("_CID", &EISAName::new("PNP0A03")),
                &name("_SEG", &ZERO),
                &name("_BBN", &ZERO),
                &name("_UID", &ZERO),
                &name("_CCA", &ONE),
                &name("_CRS", &resources),
                &name("_PRT", &PackageBuilder::new()),
            ],
        )],
    ))
}

/// ECAM as a motherboard resource: Linux does not use what nobody has reserved.
fn motherboard(layout: &Layout) -> Vec<u8> {
    let ecam = Memory32Fixed::new(true, layout.ecam, crate::pci::ECAM_SIZE as u32);
    let registers = IO::new(layout.power_port, layout.power_port, 1, power::ACPI_PORTS as u8);
    let resources = ResourceTemplate::new(vec![&ecam, &registers]);
    bytes(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("MBRD"),
            vec![
                &name("_HID", &EISAName::new("PNP0C02")),
                &name("_UID", &ZERO),
                &name("_CRS", &resources),
            ],
        )],
    ))
}

fn com1(layout: &Layout) -> Vec<u8> {
    let (port, line) = layout.com1;
    let interrupt = Interrupt::new(true, true, false, false, line);
    let ports = IO::new(port, port, 1, crate::serial::PORTS as u8);
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    bytes(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &name("_HID", &EISAName::new("PNP0501")),
                &name("_UID", &ONE),
                &name("_DDN", &"COM1"),
                &name("_CRS", &resources),
            ],
        )],
    ))
}

/// A generic event device whose one interrupt presses the power button.
fn power_button(line: u32) -> Vec<u8> {
    let interrupt = Interrupt::new(true, true, false, false, line);
    let button = Path::new("\\_SB_.PWRB");
    let press: aml::Byte = 0x80;
    bytes(&Scope::new(
        Path::new("_SB_"),
        vec![
            &Device::new(
                Path::new("PWRB"),
                vec![&name("_HID", &EISAName::new("PNP0C0C")), &name("_UID", &ZERO)],
            ),
            &Device::new(
                Path::new("GED_"),
                vec![
                    &name("_HID", &"ACPI0013"),
                    &name("_UID", &ZERO),
                    &name("_CRS", &ResourceTemplate::new(vec![&interrupt])),
                    &Method::new(Path::new("_EVT"), 1, true, vec![&Notify::new(&button, &press)]),
                ],
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout() -> Layout {
        Layout {
            rsdp: 0xe0000,
            tables: 0xe0040,
            lapic: 0xfee0_0000,
            ioapic: 0xfec0_0000,
            ecam: 0xe000_0000,
            pci_window: 0xc000_0000..0xe000_0000,
            power_port: 0x600,
            com1: (0x3f8, 4),
            power_button: Some(5),
        }
    }

    #[test]
    fn tables_have_right_checksums_and_lie_apart_in_4_kib() {
        for cpus in [1, 8, 255] {
            let tables = build(cpus, &layout());
            let sum = |bytes: &[u8]| bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
            assert_eq!(tables[0].0, 0xe0000);
            assert_eq!(sum(&tables[0].1[..20]), 0);
            let mut end = 0xe0040;
            for (at, bytes) in &tables[1..] {
                assert!(*at >= end && at % 16 == 0);
                end = at + bytes.len() as u64;
                assert_eq!(sum(bytes), 0, "{:?}", &bytes[..4]);
                assert_eq!(bytes[4..8], (bytes.len() as u32).to_le_bytes());
            }
            assert!(end <= 0xe0040 + 0x1000 + 8 * u64::from(cpus));
            let xsdt = &tables.last().unwrap().1;
            assert_eq!(tables[0].1[24..32], tables.last().unwrap().0.to_le_bytes());
            assert_eq!(xsdt.len(), 36 + 3 * 8);
        }
    }

    #[test]
    fn the_madt_names_every_cpu() {
        let madt = madt(3, &layout());
        assert_eq!(madt.len(), 44 + 3 * 8 + 12 + 10);
        assert_eq!(madt[44 + 16..44 + 24], [0, 8, 2, 2, 1, 0, 0, 0]);
    }
}
