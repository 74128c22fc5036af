//! The portable state of a processor between two instructions, out of a [`Core`] and into one.
//!
//! A state is whole: a processor that takes it goes on as the one that gave it. What is only kept for speed (soft TLBs, decoded
//! blocks, what [`Core::update_mode`] derives) is not part of it. The page-directory-pointer entries of PAE paging are read
//! anew from the guest's RAM, which must be there by then.

mod check;

use crate::clock;
use crate::core::{Core, flag};
use crate::system::debug;
use posada_engine::msr::TSC_DEADLINE;
use posada_engine::{Activity, CpuState, Events, PendingException};

/// What an engine that can stop in the middle of a delivery had begun to deliver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undelivered {
    /// An external interrupt, in service already: it comes first.
    pub interrupt: Option<u8>,
    /// An exception.
    pub exception: Option<PendingException>,
}

impl Core {
    /// The whole state.
    pub fn state(&mut self) -> CpuState {
        let now = clock::host_tsc();
        self.settle_lapic(now);
        let (init_pending, startup) = self.shared.mailbox().starts();
        let waiting = self.lapic.waiting_for_startup;
        // The shadows differ in what they hold back at the end of the instruction that casts them, which is over. With
        // interrupts off it must be MOV SS.
        let interrupts = self.system_flags & flag::IF != 0;
        let [d0, d1, d2, d3, _, _, d6, d7] = self.dr;
        let mut msrs = self.portable_msrs();
        msrs.insert(TSC_DEADLINE, self.tsc_deadline());
        CpuState {
            gprs: std::array::from_fn(|at| self.regs[at]),
            rip: self.rip(),
            rflags: self.rflags(),
            segments: self.segments,
            ldtr: self.ldtr,
            tr: self.tr,
            gdtr: self.gdtr,
            idtr: self.idtr,
            cr0: self.cr[0],
            cr2: self.cr[2],
            cr3: self.cr[3],
            cr4: self.cr[4],
            efer: self.msr.efer,
            debug: [d0, d1, d2, d3, d6, d7],
            xcr0: self.vector.xcr0,
            xsave: self.xsave_area(),
            msrs,
            apic_base: self.apic_base(),
            apic: Some(self.lapic.page(self.shared.index(), now)),
            tsc_offset: Some(self.msr.tsc_offset),
            activity: match (waiting, self.halted) {
                (true, _) => Activity::WaitingForStartup,
                (false, true) => Activity::Halted,
                (false, false) => Activity::Running,
            },
            events: Events {
                exception: self.undelivered.exception,
                interrupt: self.undelivered.interrupt,
                nmi_pending: self.lapic.nmi_pending,
                nmi_blocked: self.lapic.nmi_blocked,
                sti_shadow: self.interrupt_shadow && interrupts,
                mov_ss_shadow: self.interrupt_shadow && !interrupts,
                init_pending,
                startup: startup.filter(|_| init_pending || waiting),
            },
        }
    }

    /// Replaces the whole state by one that [`Core::check`] found good. Vectors and NMIs that have arrived since
    /// [`Core::state`] stay.
    pub fn set_state(&mut self, state: &CpuState) {
        let now = clock::host_tsc();
        self.set_registers(state);
        self.vector.xcr0 = state.xcr0;
        self.set_xsave_area(&state.xsave);
        self.set_portable_msrs(&state.msrs);
        if let Some(offset) = state.tsc_offset {
            self.msr.tsc_offset = offset;
        }
        let deadline = state.msrs.get(&TSC_DEADLINE).copied().unwrap_or(0);
        self.set_lapic(state.apic_base, state.apic.as_ref(), deadline, now);
        let events = &state.events;
        self.lapic.nmi_pending = events.nmi_pending;
        self.lapic.nmi_blocked = events.nmi_blocked;
        self.lapic.waiting_for_startup = state.activity == Activity::WaitingForStartup;
        self.shared.mailbox().set_starts(events.init_pending, events.startup);
        self.undelivered = Undelivered {
            interrupt: events.interrupt,
            exception: events.exception,
        };
        self.interrupt_shadow = events.sti_shadow || events.mov_ss_shadow;
        self.halted = state.activity == Activity::Halted;
        self.shut_down = false;
        self.watch_hits = 0;
        self.pvclock_stale = true;
        self.steal.renew();
        self.update_mode();
    }

    /// Replaces what INIT sets: general, control, segment and debug registers.
    pub(crate) fn set_registers(&mut self, state: &CpuState) {
        self.regs[..16].copy_from_slice(&state.gprs);
        self.set_rip(state.rip);
        self.set_rflags(state.rflags);
        self.segments = state.segments;
        (self.ldtr, self.tr) = (state.ldtr, state.tr);
        (self.gdtr, self.idtr) = (state.gdtr, state.idtr);
        self.cr = [state.cr0 | check::ALWAYS_IN_CR0, 0, state.cr2, state.cr3, state.cr4];
        self.msr.efer = state.efer;
        let [d0, d1, d2, d3, d6, d7] = state.debug;
        self.dr = [d0, d1, d2, d3, 0, 0, debug::dr6(d6), debug::dr7(d7)];
        let pae_paging = state.cr0 >> 31 & 1 != 0 && state.cr4 >> 5 & 1 != 0 && state.efer >> 8 & 1 == 0;
        self.pdptes = if pae_paging {
            self.read_pdptes(state.cr3)
        } else {
            [0; 4]
        };
        self.mmu.flush();
        self.update_mode();
    }
}

#[cfg(test)]
mod tests;
