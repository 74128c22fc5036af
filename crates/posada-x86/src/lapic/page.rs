//! The local APIC in the portable state: the page that it shows, and back.
//!
//! Two things do not show in any register: errors that have not been told yet, and that the count of a timer has been at 0 for
//! longer than it took to notice. They go to a register that no APIC has. From an engine that leaves it zero, a count of 0 is
//! a timer about to expire: better an interrupt too many than one too few.

use super::registers::{BSP, register, writable};
use super::timer::{Mode, Timer};
use super::{ENABLE, Lapic, MASKED, Vectors, X2APIC, lvt};
use posada_engine::ApicPage;

/// Reserved in every APIC (table 11-1): see above.
const HIDDEN: u8 = 0x29;
/// In [`HIDDEN`]: the timer has expired.
const RESTS: u32 = 1 << 8;
/// In [`HIDDEN`] and the ESR: errors that exist here.
const ERRORS: u32 =
    super::error::SEND_ILLEGAL_VECTOR | super::error::RECEIVE_ILLEGAL_VECTOR | super::error::ILLEGAL_REGISTER;
/// Vectors that no interrupt can have.
const ILLEGAL_VECTORS: u32 = 0xffff;

fn get(page: &ApicPage, number: u8) -> u32 {
    page.get(usize::from(number) * 16)
}

/// Bits of a register that software could have set.
fn written(page: &ApicPage, number: u8) -> u32 {
    get(page, number) & writable(number).expect("asked for registers that can be written")
}

fn vectors(page: &ApicPage, first: u8) -> Vectors {
    Vectors(std::array::from_fn(|at| {
        let number = first + at as u8 * 2;
        u64::from(get(page, number)) | u64::from(get(page, number + 1)) << 32
    }))
}

impl Lapic {
    /// The registers of vCPU `index` at host time `now`, up to which the timer must have been advanced.
    pub(crate) fn page(&mut self, index: u32, now: u64) -> ApicPage {
        self.shown = now;
        let mut page = ApicPage::new(Vec::new());
        for number in 0..0x40 {
            if let Some(value) = self.read(number, index, now) {
                page.set(usize::from(number) * 16, value);
            }
        }
        let rests = if self.timer.rests() { RESTS } else { 0 };
        page.set(usize::from(HIDDEN) * 16, self.errors | rests);
        page
    }

    /// Takes registers that [`check`] found good, as they were before a rest that ended at host time `now`. The TSC deadline
    /// is to be set after. What waits in the mailbox has arrived since, and stays there.
    pub(crate) fn set_page(&mut self, base: u64, page: &ApicPage, now: u64) {
        self.base = base & !BSP;
        if !self.enabled() {
            self.reset();
            return;
        }
        let x2apic = self.x2apic();
        let destination = if x2apic {
            get(page, register::ICR_HIGH)
        } else {
            written(page, register::ICR_HIGH)
        };
        let icr = u64::from(destination) << 32 | u64::from(written(page, register::ICR));
        let hidden = get(page, HIDDEN);
        let svr = written(page, register::SVR);
        let mut lvt: [u32; 6] = std::array::from_fn(|at| written(page, register::LVT + at as u8));
        if svr & super::SOFTWARE_ENABLED == 0 {
            lvt.iter_mut().for_each(|entry| *entry |= MASKED);
        }
        let timer = Timer::showing(
            Mode::of(lvt[lvt::TIMER]),
            written(page, register::DIVIDE),
            get(page, register::INITIAL_COUNT),
            get(page, register::CURRENT_COUNT),
            hidden & RESTS != 0,
            now,
        );
        // A debugger writes back what it has read: then the timer has never stopped.
        let (timer, shown) = if self.timer.shows_as(self.shown, &timer, now) {
            (self.timer.clone(), self.shown)
        } else {
            (timer, now)
        };
        *self = Self {
            base: self.base,
            tpr: written(page, register::TPR) as u8,
            svr,
            ldr: if x2apic { 0 } else { written(page, register::LDR) },
            dfr: if x2apic {
                u32::MAX
            } else {
                written(page, register::DFR) | 0x0fff_ffff
            },
            esr: get(page, register::ESR) & ERRORS,
            errors: hidden & ERRORS,
            icr,
            lvt,
            irr: vectors(page, register::IRR),
            isr: vectors(page, register::ISR),
            tmr: vectors(page, register::TMR),
            timer,
            due: false,
            alarm: self.alarm,
            shown,
            nmi_pending: self.nmi_pending,
            nmi_blocked: self.nmi_blocked,
            waiting_for_startup: self.waiting_for_startup,
        };
        self.refresh();
    }
}

/// Refuses registers that the local APIC of vCPU `index` could not show.
///
/// # Errors
/// Why not.
pub(crate) fn check(base: u64, page: &ApicPage, index: u32) -> Result<(), String> {
    if base & ENABLE == 0 {
        return Ok(());
    }
    let id = get(page, register::ID);
    let own = if base & X2APIC != 0 { index } else { index << 24 };
    if id != own {
        return Err(format!(
            "the local APIC's ID register holds {id:#x} instead of {own:#x}"
        ));
    }
    for (first, name) in [(register::IRR, "IRR"), (register::ISR, "ISR"), (register::TMR, "TMR")] {
        if get(page, first) & ILLEGAL_VECTORS != 0 {
            return Err(format!("the local APIC's {name} has a vector below 16"));
        }
    }
    if get(page, register::CURRENT_COUNT) > get(page, register::INITIAL_COUNT) {
        return Err("the local APIC's timer has a current count above its initial one".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lapic::testing::{lone, read, served, write};

    fn page(core: &mut crate::core::Core) -> ApicPage {
        core.state().apic.unwrap()
    }

    #[test]
    fn a_page_shows_what_loads_from_it_would() {
        let mut core = lone();
        for (offset, value) in [
            (0x80, 0x33),
            (0xd0, 7 << 24),
            (0x310, 9 << 24),
            (0x350, 0x8123),
            (0x3e0, 9),
        ] {
            write(&mut core, offset, value);
        }
        let page = page(&mut core);
        for offset in (0..0x400).step_by(16) {
            let expected = read(&mut core, offset);
            if offset != 0x290 {
                assert_eq!(page.get(offset as usize), expected, "{offset:#x}");
            }
        }
    }

    #[test]
    fn what_an_apic_could_not_show_is_refused() {
        let good = page(&mut lone());
        assert_eq!(check(0xfee0_0800, &good, 0), Ok(()));
        for (offset, value, part) in [
            (0x20, 1 << 24, "ID"),
            (0x200, 1 << 15, "IRR"),
            (0x100, 1, "ISR"),
            (0x180, 2, "TMR"),
            (0x390, 1, "count"),
        ] {
            let mut bad = good.clone();
            bad.set(offset, value);
            let text = check(0xfee0_0800, &bad, 0).unwrap_err();
            assert!(text.contains(part), "{text}");
            assert_eq!(check(0, &bad, 0), Ok(()), "switched off it has no registers");
        }
        assert!(check(0xfee0_0c00, &good, 1).is_err());
    }

    #[test]
    fn a_debugger_that_writes_back_what_it_read_moves_no_timer() {
        let mut core = lone();
        write(&mut core, 0x3e0, 3);
        write(&mut core, 0x320, 1 << 17 | 0xec);
        write(&mut core, 0x380, 1 << 30);
        let due = core.lapic.timer.due();
        for _ in 0..100 {
            let state = core.state();
            core.set_state(&state);
        }
        assert_eq!(core.lapic.timer.due(), due);
        let mut state = core.state();
        let page = state.apic.as_mut().unwrap();
        page.set(0x390, 1 << 20);
        core.set_state(&state);
        assert!(core.lapic.timer.due() < due);
    }

    #[test]
    fn interrupts_between_reading_and_writing_a_state_are_kept() {
        let mut core = lone();
        let mailbox = std::sync::Arc::clone(core.shared.mailbox());
        mailbox.post_vector(0x41, false);
        let state = core.state();
        mailbox.post_vector(0x51, false);
        mailbox.post(crate::shared::mailbox::NMI);
        core.set_state(&state);
        assert_eq!([(); 3].map(|()| served(&mut core)), [Some(2), Some(0x51), None]);
        write(&mut core, 0xb0, 0);
        assert_eq!(served(&mut core), Some(0x41));
    }

    #[test]
    fn an_expired_timer_rests_and_one_of_another_engine_fires_once_more() {
        let mut core = lone();
        write(&mut core, 0x320, 0xec);
        write(&mut core, 0x380, 1);
        while served(&mut core).is_none() {}
        write(&mut core, 0xb0, 0);
        let mut state = core.state();
        let mut other = lone();
        other.set_state(&state);
        assert_eq!(served(&mut other), None);
        assert_eq!(read(&mut other, 0x380), 1);
        state.apic.as_mut().unwrap().set(0x290, 0);
        let mut other = lone();
        other.set_state(&state);
        assert_eq!(served(&mut other), Some(0xec));
    }
}
