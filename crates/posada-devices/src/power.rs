//! How a guest ends its machine: the ACPI sleep and reset registers, and the older ways Linux falls back on (the keyboard
//! controller's reset line here, port 0xcf9 in [`crate::pci::PciPorts`]).

use crate::bus::PortDevice;
use std::sync::Arc;

/// What a guest asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off.
    Off,
    /// Reset.
    Reset,
    /// End the VM's process with this code ([`crate::debug_exit`]).
    Exit(u32),
}

/// Told of a guest's wish on the vCPU's thread, with no lock held. It must return soon; the vCPU runs on until stopped.
pub type PowerSink = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// Ports of [`AcpiPower`]: sleep control, sleep status, reset.
pub const ACPI_PORTS: u64 = 4;
/// SLP_TYP of S5 in the DSDT.
pub const S5_TYPE: u8 = 5;
/// Value that resets through the reset register.
pub const RESET_VALUE: u8 = 1;

const SLEEP_CONTROL: u16 = 0;
/// Offset of the reset register.
pub const RESET: u16 = 2;
/// SLP_EN, ACPI 6.5 section 4.8.3.7.
const SLEEP_ENABLE: u8 = 1 << 5;

/// Registers of a hardware-reduced ACPI machine (ACPI 6.5 section 4.8.3.7 and 4.8.3.6), as the FADT names them.
pub struct AcpiPower(PowerSink);

impl AcpiPower {
    /// Reports to `sink`.
    pub fn new(sink: PowerSink) -> Self {
        Self(sink)
    }
}

impl PortDevice for AcpiPower {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            if at == SLEEP_CONTROL && byte & SLEEP_ENABLE != 0 && byte >> 2 & 7 == S5_TYPE {
                (self.0)(PowerEvent::Off);
            }
            if at == RESET && *byte == RESET_VALUE {
                (self.0)(PowerEvent::Reset);
            }
        }
    }
}

/// Port of [`KeyboardReset`].
pub const KEYBOARD_PORT: u64 = 0x64;

/// The command port of an 8042 of which nothing is left but the line to the processor's reset pin.
pub struct KeyboardReset(PowerSink);

impl KeyboardReset {
    /// Reports to `sink`.
    pub fn new(sink: PowerSink) -> Self {
        Self(sink)
    }
}

impl PortDevice for KeyboardReset {
    /// Status: ready for a command, nothing to read.
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u16, data: &[u8]) {
        // 0xf0 to 0xff pulse output lines; line 0 (active low) is reset.
        if data.first().is_some_and(|command| command & 0xf1 == 0xf0) {
            (self.0)(PowerEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[test]
    fn sleep_reset_and_keyboard_writes_are_reported() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink: PowerSink = {
            let seen = seen.clone();
            Arc::new(move |event| seen.lock().unwrap().push(event))
        };
        let acpi = AcpiPower::new(sink.clone());
        acpi.write(SLEEP_CONTROL, &[S5_TYPE << 2]);
        acpi.write(SLEEP_CONTROL, &[3 << 2 | SLEEP_ENABLE]);
        acpi.write(1, &[0x80]);
        assert_eq!(*seen.lock().unwrap(), []);
        acpi.write(SLEEP_CONTROL, &[S5_TYPE << 2 | SLEEP_ENABLE]);
        acpi.write(RESET, &[RESET_VALUE]);
        let keyboard = KeyboardReset::new(sink);
        keyboard.write(0, &[0xae]);
        keyboard.write(0, &[0xfe]);
        assert_eq!(
            *seen.lock().unwrap(),
            [PowerEvent::Off, PowerEvent::Reset, PowerEvent::Reset]
        );
    }
}
