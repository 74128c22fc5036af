//! Devices of the machine.
