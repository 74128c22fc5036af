//! The local APIC's registers as software sees them: the xAPIC page, the x2APIC MSRs, IA32_APIC_BASE and
//! IA32_TSC_DEADLINE.

use super::delivery::{Destination, Interrupt, Mode, x2apic_logical_id};
use super::{ENABLE, Lapic, MASKED, NO_EOI_BROADCAST, SOFTWARE_ENABLED, X2APIC, error};
use crate::clock;
use crate::core::Core;
use crate::fault::Exec;

/// An integrated APIC with six LVT entries that can suppress EOI broadcasts.
const VERSION: u32 = 0x0105_0014;
/// IA32_APIC_BASE.BSP.
pub(super) const BSP: u64 = 1 << 8;
const IA32_APIC_BASE: u32 = 0x1b;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// Register numbers: the offset in the page divided by 16, or the MSR less 800h.
pub(super) mod register {
    pub const ID: u8 = 0x02;
    pub const VERSION: u8 = 0x03;
    pub const TPR: u8 = 0x08;
    pub const APR: u8 = 0x09;
    pub const PPR: u8 = 0x0a;
    pub const EOI: u8 = 0x0b;
    pub const RRD: u8 = 0x0c;
    pub const LDR: u8 = 0x0d;
    pub const DFR: u8 = 0x0e;
    pub const SVR: u8 = 0x0f;
    pub const ISR: u8 = 0x10;
    pub const TMR: u8 = 0x18;
    pub const IRR: u8 = 0x20;
    pub const ESR: u8 = 0x28;
    pub const ICR: u8 = 0x30;
    pub const ICR_HIGH: u8 = 0x31;
    pub const LVT: u8 = 0x32;
    pub const LVT_LAST: u8 = 0x37;
    pub const INITIAL_COUNT: u8 = 0x38;
    pub const CURRENT_COUNT: u8 = 0x39;
    pub const DIVIDE: u8 = 0x3e;
    pub const SELF_IPI: u8 = 0x3f;
}

/// Bits of the LVT entries that software can set.
const LVT_WRITABLE: [u32; 6] = [
    MASKED | 3 << 17 | 0xff,
    MASKED | 0x7ff,
    MASKED | 0x7ff,
    MASKED | 1 << 15 | 1 << 13 | 0x7ff,
    MASKED | 1 << 15 | 1 << 13 | 0x7ff,
    MASKED | 0xff,
];
/// The ICR without its reserved bits and the delivery status.
const ICR_WRITABLE: u64 = 0xffff_ffff_000c_cfff;

/// Bits that software can set in a register of the page or, in x2APIC mode, must not go beyond. `None`: it cannot be
/// written.
pub(super) fn writable(number: u8) -> Option<u32> {
    Some(match number {
        register::EOI | register::ESR => 0,
        register::TPR | register::SELF_IPI => 0xff,
        register::LDR | register::ICR_HIGH => 0xff00_0000,
        register::DFR => 0xf000_0000,
        register::SVR => NO_EOI_BROADCAST | SOFTWARE_ENABLED | 0xff,
        register::ICR => ICR_WRITABLE as u32,
        register::LVT..=register::LVT_LAST => LVT_WRITABLE[usize::from(number - register::LVT)],
        register::INITIAL_COUNT => u32::MAX,
        register::DIVIDE => 0b1011,
        _ => return None,
    })
}

/// True for a value that IA32_APIC_BASE may have.
pub(crate) fn base_valid(value: u64) -> bool {
    let exist = BSP | X2APIC | ENABLE | (1 << crate::walk::PHYSICAL_BITS) - 0x1000;
    value & !exist == 0 && value & (ENABLE | X2APIC) != X2APIC
}

/// Registers that only the page has; x2APIC mode has the self-IPI register instead.
fn xapic_only(number: u8) -> bool {
    matches!(
        number,
        register::APR | register::RRD | register::DFR | register::ICR_HIGH
    )
}

impl Lapic {
    /// A register of vCPU `index` at host time `now`; `None`: there is none, or it cannot be read.
    pub(super) fn read(&mut self, number: u8, index: u32, now: u64) -> Option<u32> {
        Some(match number {
            register::ID if self.x2apic() => index,
            register::ID => index << 24,
            register::VERSION => VERSION,
            register::TPR => self.tpr.into(),
            register::PPR => self.ppr().into(),
            // No arbitration bus, and no remote reads.
            register::APR | register::RRD => 0,
            register::LDR if self.x2apic() => x2apic_logical_id(index),
            register::LDR => self.ldr,
            register::DFR => self.dfr,
            register::SVR => self.svr,
            register::ISR..register::TMR => self.isr.register(number - register::ISR),
            register::TMR..register::IRR => self.tmr.register(number - register::TMR),
            register::IRR..register::ESR => self.irr.register(number - register::IRR),
            register::ESR => self.esr,
            register::ICR => self.icr as u32,
            register::ICR_HIGH => (self.icr >> 32) as u32,
            register::LVT..=register::LVT_LAST => self.lvt[usize::from(number - register::LVT)],
            register::INITIAL_COUNT => self.timer.initial(),
            register::CURRENT_COUNT => {
                self.advance(now);
                self.timer.current(now)
            }
            register::DIVIDE => self.timer.divide(),
            _ => return None,
        })
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if !self.software_enabled() {
            self.lvt.iter_mut().for_each(|entry| *entry |= MASKED);
        }
    }
}

impl Core {
    fn read_register(&mut self, number: u8) -> Option<u32> {
        self.lapic.take_posted(self.shared.mailbox());
        let value = self.lapic.read(number, self.shared.index(), clock::host_tsc());
        self.interrupts_may_be_due();
        value
    }

    /// Writes bits that the register has.
    fn write_register(&mut self, number: u8, value: u32) {
        // What arrived before the write arrived under the old settings.
        self.lapic.take_posted(self.shared.mailbox());
        let now = clock::host_tsc();
        self.lapic.advance(now);
        match number {
            register::TPR => {
                self.lapic.tpr = value as u8;
                self.lapic.refresh();
            }
            register::EOI => {
                if let Some(vector) = self.lapic.end() {
                    self.exits += 1;
                    self.machine.end_of_interrupt(vector);
                }
            }
            register::LDR => self.lapic.ldr = value,
            register::DFR => self.lapic.dfr = value | 0x0fff_ffff,
            register::SVR => self.lapic.set_svr(value),
            register::ESR => self.lapic.esr = std::mem::take(&mut self.lapic.errors),
            register::ICR => self.write_icr(self.lapic.icr & !0xffff_ffff | u64::from(value)),
            register::ICR_HIGH => self.lapic.icr = self.lapic.icr & 0xffff_ffff | u64::from(value) << 32,
            register::LVT..=register::LVT_LAST => self.lapic.set_lvt(usize::from(number - register::LVT), value),
            register::INITIAL_COUNT => self.lapic.timer.start(value, now),
            register::DIVIDE => self.lapic.timer.set_divide(value, now),
            register::SELF_IPI => self.send_ipi(Mode::Fixed, value, Destination::Only(self.shared.index())),
            _ => unreachable!("`writable` knows no other register"),
        }
        if matches!(number, register::LDR | register::DFR | register::SVR) {
            self.shared.mailbox().set_address(self.lapic.address());
        }
        self.set_alarm(now);
        self.interrupts_may_be_due();
    }

    /// Sends what an interrupt command says (11.6.1).
    fn write_icr(&mut self, icr: u64) {
        self.lapic.icr = icr;
        let (low, own) = (icr as u32, self.shared.index());
        let Some(mode) = Mode::of(low) else {
            return;
        };
        // "INIT level de-assert" synchronised arbitration on a bus that is long gone.
        if mode == Mode::Init && low & 1 << 15 != 0 && low & 1 << 14 == 0 {
            return;
        }
        let (logical, id) = (low & 1 << 11 != 0, (icr >> 32) as u32);
        let to = match low >> 18 & 3 {
            0 if self.lapic.x2apic() => Destination::x2apic(logical, id),
            0 => Destination::xapic(logical, (id >> 24) as u8),
            1 => Destination::Only(own),
            2 => Destination::Everyone,
            _ => Destination::AllBut(own),
        };
        self.send_ipi(mode, low, to);
    }

    fn send_ipi(&mut self, mode: Mode, vector: u32, to: Destination) {
        let vector = vector as u8;
        if vector < 16 && matches!(mode, Mode::Fixed | Mode::LowestPriority) {
            self.lapic.error(error::SEND_ILLEGAL_VECTOR);
            return;
        }
        let interrupt = Interrupt {
            mode,
            vector,
            level: false,
        };
        self.shared.vm().send(interrupt, to);
        if self.shared.pending() {
            self.leave_block();
        }
    }

    /// True if `gpa` lies in the page of this vCPU's local APIC.
    #[inline]
    fn in_lapic_page(&self, gpa: u64) -> bool {
        (gpa ^ self.lapic.base) >> 12 == 0 && self.lapic.base & (ENABLE | X2APIC) == ENABLE
    }

    /// A load from physical address `gpa`; false if that is not the local APIC's.
    pub fn lapic_mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> bool {
        if !self.in_lapic_page(gpa) {
            return false;
        }
        let value = self.read_register((gpa >> 4) as u8).unwrap_or_else(|| {
            self.lapic.error(error::ILLEGAL_REGISTER);
            0
        });
        // Registers are 32 bits at multiples of 16 bytes; what follows them is reserved.
        let bytes = u128::from(value).to_le_bytes();
        for (byte, at) in data.iter_mut().zip(gpa as usize & 15..) {
            *byte = bytes.get(at).copied().unwrap_or(0);
        }
        true
    }

    /// A store to physical address `gpa`; false if that is not the local APIC's. Stores that are not of a whole register
    /// have no effect (11.4.1.1 leaves them undefined).
    pub fn lapic_mmio_write(&mut self, gpa: u64, data: &[u8]) -> bool {
        if !self.in_lapic_page(gpa) {
            return false;
        }
        if let (0, &[a, b, c, d]) = (gpa & 15, data) {
            let (number, value) = ((gpa >> 4) as u8, u32::from_le_bytes([a, b, c, d]));
            match writable(number).filter(|_| number != register::SELF_IPI) {
                Some(bits) => self.write_register(number, value & bits),
                // A read-only register takes no harm.
                None if self.lapic.read(number, 0, 0).is_some() => {}
                None => self.lapic.error(error::ILLEGAL_REGISTER),
            }
        }
        true
    }

    /// IA32_APIC_BASE.
    pub fn apic_base(&self) -> u64 {
        self.lapic.base | if self.shared.index() == 0 { BSP } else { 0 }
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE and 800h-8FFh.
    ///
    /// # Errors
    /// #GP(0) for registers that do not exist, cannot be read, or are x2APIC ones outside that mode.
    pub fn lapic_read_msr(&mut self, msr: u32) -> Exec<u64> {
        match msr {
            IA32_APIC_BASE => return Ok(self.apic_base()),
            IA32_TSC_DEADLINE => {
                self.lapic.advance(clock::host_tsc());
                self.interrupts_may_be_due();
                return Ok(self.lapic.timer.deadline());
            }
            0x830 if self.lapic.x2apic() => return Ok(self.lapic.icr),
            0x800..=0x8ff if self.lapic.x2apic() && !xapic_only(msr as u8) => {
                if let Some(value) = self.read_register(msr as u8) {
                    return Ok(value.into());
                }
            }
            _ => {}
        }
        self.general_protection()
    }

    /// WRMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE and 800h-8FFh.
    ///
    /// # Errors
    /// #GP(0) for registers that do not exist, cannot be written or are x2APIC ones outside that mode, for reserved bits,
    /// and for forbidden changes of the mode.
    pub fn lapic_write_msr(&mut self, msr: u32, value: u64) -> Exec {
        let number = msr as u8;
        match msr {
            IA32_APIC_BASE => return self.write_apic_base(value),
            IA32_TSC_DEADLINE => {
                self.lapic.advance(clock::host_tsc());
                self.set_tsc_deadline(value);
                self.interrupts_may_be_due();
                return Ok(());
            }
            // The delivery status has no bit in x2APIC mode; old software writes it back as it was.
            0x830 if self.lapic.x2apic() && value & !(ICR_WRITABLE | 1 << 12) == 0 => {
                self.write_icr(value & ICR_WRITABLE);
                self.interrupts_may_be_due();
                return Ok(());
            }
            0x830 => {}
            0x800..=0x8ff if self.lapic.x2apic() && !xapic_only(number) && number != register::LDR => {
                if let Some(bits) = writable(number)
                    && value & !u64::from(bits) == 0
                {
                    self.write_register(number, value as u32);
                    return Ok(());
                }
            }
            _ => {}
        }
        self.general_protection()
    }

    /// IA32_APIC_BASE: address and mode (11.12.5 and figure 11-27).
    fn write_apic_base(&mut self, value: u64) -> Exec {
        let (before, after) = (self.lapic.base & (ENABLE | X2APIC), value & (ENABLE | X2APIC));
        let both = ENABLE | X2APIC;
        let forbidden = before == both && after == ENABLE || before == 0 && after == both;
        if !base_valid(value) || forbidden {
            return self.general_protection();
        }
        self.lapic.take_posted(self.shared.mailbox());
        self.lapic.base = value & !BSP;
        match after {
            0 if before != 0 => self.lapic.reset(),
            // x2APIC mode has a logical id of its own, and no models.
            _ if after == both => (self.lapic.ldr, self.lapic.dfr) = (0, u32::MAX),
            _ => {}
        }
        self.shared.mailbox().set_address(self.lapic.address());
        Ok(())
    }
}

#[cfg(test)]
mod tests;
