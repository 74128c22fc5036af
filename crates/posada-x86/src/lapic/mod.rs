//! The local APIC (Intel SDM 3A, chapter 11): registers through the xAPIC page and the x2APIC MSRs, priorities, the timer.
//!
//! A vCPU owns its local APIC; others reach it through its mailbox ([`crate::shared`]), whose posted vectors move into the
//! IRR when the vCPU looks. The id is that of the vCPU and cannot be changed. The page at APIC_BASE answers only where no
//! RAM lies.

mod delivery;
pub(crate) mod page;
mod registers;
mod service;
#[cfg(test)]
pub(crate) mod testing;
mod timer;

use crate::clock;
use crate::core::{Core, flag};
use crate::shared::mailbox::{Address, Mailbox};
use posada_engine::ApicPage;
pub(crate) use registers::base_valid;
use timer::{Mode, Timer};

/// APIC_BASE.EN.
const ENABLE: u64 = 1 << 11;
/// APIC_BASE.EXTD.
const X2APIC: u64 = 1 << 10;
/// An LVT entry's mask bit.
const MASKED: u32 = 1 << 16;
/// SVR: the APIC is switched on by software.
const SOFTWARE_ENABLED: u32 = 1 << 8;
/// SVR: the ends of level-triggered interrupts are not told to the IOAPIC.
const NO_EOI_BROADCAST: u32 = 1 << 12;

/// ESR bits.
mod error {
    pub const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub const ILLEGAL_REGISTER: u32 = 1 << 7;
}

/// Entries of [`Lapic::lvt`], in the registers' order.
mod lvt {
    pub const TIMER: usize = 0;
    pub const ERROR: usize = 5;
}

/// 256 bits, one a vector.
#[derive(Clone, Copy, Debug, Default)]
struct Vectors([u64; 4]);

impl Vectors {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] |= 1 << (vector % 64);
    }

    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector / 64)] &= !(1 << (vector % 64));
    }

    fn has(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 64)] >> (vector % 64) & 1 != 0
    }

    fn highest(&self) -> Option<u8> {
        let at = self.0.iter().rposition(|&word| word != 0)?;
        Some((at * 64 + 63) as u8 - self.0[at].leading_zeros() as u8)
    }

    /// One of the eight 32-bit registers.
    fn register(&self, number: u8) -> u32 {
        (self.0[usize::from(number / 2)] >> (number % 2 * 32)) as u32
    }
}

/// A local APIC, and what its processor holds of events that have arrived.
#[derive(Debug)]
pub struct Lapic {
    /// IA32_APIC_BASE without the BSP bit.
    base: u64,
    tpr: u8,
    svr: u32,
    /// LDR and DFR of xAPIC mode.
    ldr: u32,
    dfr: u32,
    /// ESR as read, and the errors since it was last written.
    esr: u32,
    errors: u32,
    icr: u64,
    /// Timer, thermal, performance, LINT0, LINT1, error.
    lvt: [u32; 6],
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    timer: Timer,
    /// A vector in the IRR outranks the processor priority: see [`Lapic::refresh`].
    due: bool,
    /// The host TSC at which the alarm is set to ring, for all that the vCPU knows.
    alarm: Option<u64>,
    /// The host TSC at which the registers last were those of a portable state.
    shown: u64,
    /// An NMI has arrived.
    pub(crate) nmi_pending: bool,
    /// NMIs are held until IRET.
    pub(crate) nmi_blocked: bool,
    /// The processor waits for INIT or SIPI.
    pub(crate) waiting_for_startup: bool,
}

impl Default for Lapic {
    /// After power-up (11.4.7.1).
    fn default() -> Self {
        Self {
            base: 0xfee0_0000 | ENABLE,
            tpr: 0,
            svr: 0xff,
            ldr: 0,
            dfr: u32::MAX,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [MASKED; 6],
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            timer: Timer::default(),
            due: false,
            alarm: None,
            shown: 0,
            nmi_pending: false,
            nmi_blocked: false,
            waiting_for_startup: false,
        }
    }
}

impl Lapic {
    fn enabled(&self) -> bool {
        self.base & ENABLE != 0
    }

    fn x2apic(&self) -> bool {
        self.base & X2APIC != 0
    }

    fn software_enabled(&self) -> bool {
        self.svr & SOFTWARE_ENABLED != 0
    }

    /// Registers as after power-up; the base and the mode stay (INIT, 11.4.7.3). What is not of the APIC itself stays too.
    fn reset(&mut self) {
        *self = Self {
            base: self.base,
            alarm: self.alarm,
            shown: self.shown,
            nmi_pending: self.nmi_pending,
            nmi_blocked: self.nmi_blocked,
            waiting_for_startup: self.waiting_for_startup,
            ..Self::default()
        };
    }

    /// What senders need to know.
    fn address(&self) -> Address {
        Address {
            disabled: !self.enabled(),
            x2apic: self.x2apic(),
            software_enabled: self.software_enabled(),
            cluster: self.dfr >> 28 == 0,
            logical: (self.ldr >> 24) as u8,
        }
    }

    /// The processor priority (11.8.3.1).
    fn ppr(&self) -> u8 {
        let serving = self.isr.highest().unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= serving { self.tpr } else { serving }
    }

    /// To be called after every change of TPR, IRR or ISR.
    fn refresh(&mut self) {
        self.due = self
            .irr
            .highest()
            .is_some_and(|vector| vector & 0xf0 > self.ppr() & 0xf0);
    }

    /// A vector arrives from inside: a local source.
    fn accept(&mut self, vector: u8) {
        if vector < 16 {
            self.errors |= error::RECEIVE_ILLEGAL_VECTOR;
            return;
        }
        self.irr.set(vector);
        self.tmr.clear(vector);
        self.refresh();
    }

    /// Moves posted vectors into the IRR. A local APIC that is switched off takes none (11.4.7.2).
    fn take_posted(&mut self, mailbox: &Mailbox) {
        let mut posted = mailbox.take_vectors();
        if !self.software_enabled() {
            return;
        }
        if posted[0].0 & 0xffff != 0 {
            posted[0].0 &= !0xffff;
            self.error(error::RECEIVE_ILLEGAL_VECTOR);
        }
        for (at, (vectors, level)) in posted.into_iter().enumerate() {
            self.irr.0[at] |= vectors;
            self.tmr.0[at] = self.tmr.0[at] & !vectors | level;
        }
        self.refresh();
    }

    /// The processor takes the highest vector of the IRR.
    fn acknowledge(&mut self) -> u8 {
        let vector = self.irr.highest().expect("an interrupt is due");
        self.irr.clear(vector);
        self.isr.set(vector);
        self.refresh();
        vector
    }

    /// EOI: the vector that ends, if it was level-triggered and the IOAPIC is to know.
    fn end(&mut self) -> Option<u8> {
        let vector = self.isr.highest()?;
        self.isr.clear(vector);
        self.refresh();
        (self.tmr.has(vector) && self.svr & NO_EOI_BROADCAST == 0).then_some(vector)
    }

    fn error(&mut self, bit: u32) {
        self.errors |= bit;
        self.local_interrupt(lvt::ERROR);
    }

    /// A local source fires.
    fn local_interrupt(&mut self, source: usize) {
        if self.lvt[source] & MASKED == 0 {
            self.accept(self.lvt[source] as u8);
        }
    }

    /// Lets the timer see the time.
    fn advance(&mut self, now: u64) {
        if self.timer.expire(now) {
            self.local_interrupt(lvt::TIMER);
        }
    }

    /// When the timer will next cause an interrupt, in host TSC ticks: never while its last one waits in the IRR.
    fn next_interrupt(&self) -> Option<u64> {
        let entry = self.lvt[lvt::TIMER];
        self.timer
            .due()
            .filter(|_| entry & MASKED == 0 && !self.irr.has(entry as u8))
    }

    fn set_lvt(&mut self, source: usize, value: u32) {
        let mask = if self.software_enabled() { 0 } else { MASKED };
        self.lvt[source] = value | mask;
        if source == lvt::TIMER {
            self.timer.set_mode(Mode::of(value));
        }
    }
}

impl Core {
    /// CR8: the task priority class.
    pub fn cr8(&self) -> u64 {
        u64::from(self.lapic.tpr >> 4)
    }

    /// Writes CR8; only bits 0-3 count.
    pub fn set_cr8(&mut self, value: u64) {
        self.lapic.tpr = (value << 4) as u8;
        self.lapic.refresh();
        self.interrupts_may_be_due();
    }

    /// To be called after whatever may let interrupts through (RFLAGS.IF, task priority, end of interrupt): if one is due,
    /// the run loop comes to [`Core::service`].
    #[inline]
    pub fn interrupts_may_be_due(&mut self) {
        let interrupt = self.lapic.due && self.system_flags & flag::IF != 0;
        if interrupt || self.lapic.nmi_pending && !self.lapic.nmi_blocked {
            self.look();
        }
    }

    /// IRET ran: NMIs may come again.
    #[inline]
    pub fn unblock_nmi(&mut self) {
        self.lapic.nmi_blocked = false;
        self.interrupts_may_be_due();
    }

    #[cold]
    fn look(&mut self) {
        self.shared.mailbox().post(crate::shared::mailbox::LOOK);
        self.leave_block();
    }

    /// Takes from the mailbox what belongs to the local APIC, and lets its timer see the time.
    pub(crate) fn settle_lapic(&mut self, now: u64) {
        let mailbox = self.shared.mailbox();
        self.lapic.nmi_pending |= mailbox.take_nmi();
        self.lapic.take_posted(mailbox);
        self.lapic.advance(now);
    }

    /// Replaces the local APIC's registers and mode at host time `now`, and the TSC deadline, by good ones.
    pub(crate) fn set_lapic(&mut self, base: u64, page: Option<&ApicPage>, deadline: u64, now: u64) {
        match page {
            Some(page) => {
                self.lapic.set_page(base, page, now);
                self.set_tsc_deadline(deadline);
            }
            None => {
                self.lapic.base = base & !registers::BSP;
                if !self.lapic.enabled() {
                    self.lapic.reset();
                }
                self.guest_tsc_moved();
            }
        }
        self.shared.mailbox().set_address(self.lapic.address());
    }

    /// IA32_TSC_DEADLINE.
    pub(crate) fn tsc_deadline(&self) -> u64 {
        self.lapic.timer.deadline()
    }

    /// The guest's TSC took a jump: a TSC deadline is as far away as it now says.
    pub(crate) fn guest_tsc_moved(&mut self) {
        self.set_tsc_deadline(self.lapic.timer.deadline());
    }

    fn set_tsc_deadline(&mut self, deadline: u64) {
        let now = clock::host_tsc();
        let left = deadline.saturating_sub(self.guest_tsc_at(now));
        let due = now.saturating_add(self.rate.host_span(left));
        self.lapic.timer.set_deadline(deadline, due);
        self.set_alarm(now);
    }

    /// Sets the alarm to the timer's next interrupt. One that is no longer wanted may ring: it does no harm.
    fn set_alarm(&mut self, now: u64) {
        let Some(due) = self.lapic.next_interrupt() else {
            return;
        };
        if due <= now {
            self.look();
        } else if self.lapic.alarm != Some(due) {
            self.lapic.alarm = Some(due);
            self.shared.set_alarm(Some(clock::ticks_to_ns(due - now)));
        }
    }
}
