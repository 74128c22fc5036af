//! What a vCPU does about events between two instructions: interrupts, INIT and SIPI, kicks, announcements of code; and how
//! it sleeps.

use crate::clock;
use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exception, vector};
use crate::shared::mailbox::{CODE, INIT, KICK, NMI, POSTED, STARTUP};
use crate::state::Undelivered;
use posada_engine::{CpuState, Exit, PendingException, Segment};
use std::sync::Arc;
use std::time::Duration;

/// CR0.CD and CR0.NW, which INIT keeps.
const CACHE_BITS: u64 = 0x6000_0000;

impl Core {
    /// Takes notice of all that has arrived, between two instructions; delivers at most one interrupt. Sleeps here while the
    /// processor is halted or waits for SIPI. Returns what `run` is to return, if anything.
    pub fn service(&mut self) -> Option<Exit> {
        loop {
            let events = self.shared.mailbox().take();
            if events & CODE != 0 {
                self.answer_announcements();
            }
            if events & INIT != 0 {
                self.init();
            }
            if events & STARTUP != 0 && self.lapic.waiting_for_startup {
                self.start_up(self.shared.mailbox().startup_vector());
            }
            self.lapic.nmi_pending |= events & NMI != 0;
            if events & POSTED != 0 {
                self.lapic.take_posted(self.shared.mailbox());
            }
            let now = clock::host_tsc();
            self.lapic.advance(now);
            if events & KICK != 0 {
                return Some(Exit::Kicked);
            }
            if self.lapic.waiting_for_startup {
                self.rest(None, now);
                continue;
            }
            if self.shut_down {
                return None;
            }
            // What put the processor to sleep was the instruction that the shadow was for.
            self.interrupt_shadow &= !self.halted;
            let delivered = self.finish_delivery() || !self.interrupt_shadow && self.deliver_interrupt();
            if delivered || !self.halted {
                self.tell_stolen_time(now);
                // Another one may be due, or this one after the shadow.
                self.interrupts_may_be_due();
                self.set_alarm(now);
                return None;
            }
            let deaf = self.system_flags & flag::IF == 0;
            self.rest(self.lapic.next_interrupt().filter(|_| !deaf), now);
        }
    }

    /// Delivers what a state said to be in delivery.
    fn finish_delivery(&mut self) -> bool {
        if self.undelivered == Undelivered::default() {
            return false;
        }
        let Undelivered { interrupt, exception } = std::mem::take(&mut self.undelivered);
        self.halted = false;
        if let Some(vector) = interrupt {
            self.interrupt(vector);
        }
        if let Some(PendingException { vector, error }) = exception
            && !self.shut_down
        {
            self.deliver(Exception {
                vector,
                error,
                address: self.cr[2],
                ..Exception::default()
            });
        }
        true
    }

    /// Delivers an NMI or the highest interrupt, if the processor takes it now.
    fn deliver_interrupt(&mut self) -> bool {
        if self.lapic.nmi_pending && !self.lapic.nmi_blocked {
            self.lapic.nmi_pending = false;
            self.lapic.nmi_blocked = true;
            self.interrupt(vector::NMI);
            return true;
        }
        let due = self.lapic.due && self.system_flags & flag::IF != 0;
        if due {
            let vector = self.lapic.acknowledge();
            self.interrupt(vector);
        }
        due
    }

    /// Sleeps until an event or until host TSC `until`.
    fn rest(&mut self, until: Option<u64>, now: u64) {
        // The vCPU wakes by itself: no need to wake the alarms' thread too.
        if self.lapic.alarm.take().is_some_and(|alarm| alarm > now) {
            self.shared.set_alarm(None);
        }
        let time = until.map(|until| Duration::from_nanos(clock::ticks_to_ns(until.saturating_sub(now)) + 1));
        self.set_preempted(true);
        self.shared.mailbox().sleep(time);
        self.set_preempted(false);
    }

    /// INIT (table 10-1): vCPU 0 goes on at the reset vector, the others wait for SIPI. Vector and x87 state, the TSC and
    /// most MSRs stay.
    fn init(&mut self) {
        let mut state = CpuState::reset();
        state.cr0 = state.cr0 & !CACHE_BITS | self.cr[0] & CACHE_BITS;
        state.gprs[gpr::RDX] = self.shared.vm().model().signature.into();
        self.set_registers(&state);
        // As KVM: whoever runs next does not know what memory the last one gave away.
        (self.msr.system_time, self.msr.steal_time, self.msr.pv_eoi) = (0, 0, 0);
        self.lapic.reset();
        self.shared.mailbox().set_address(self.lapic.address());
        (self.halted, self.shut_down, self.interrupt_shadow) = (false, false, false);
        self.undelivered = Undelivered::default();
        (self.lapic.nmi_pending, self.lapic.nmi_blocked) = (false, false);
        self.lapic.waiting_for_startup = self.shared.index() != 0;
    }

    /// SIPI: real mode at `page` * 4096.
    fn start_up(&mut self, page: u8) {
        self.lapic.waiting_for_startup = false;
        self.segments[seg::CS] = Segment {
            selector: u16::from(page) << 8,
            base: u64::from(page) << 12,
            ..CpuState::reset().segments[seg::CS]
        };
        self.set_rip(0);
        self.update_mode();
    }

    /// Makes the processor wait for SIPI, as all but vCPU 0 do from the start.
    pub fn wait_for_startup(&mut self) {
        self.lapic.waiting_for_startup = true;
    }

    /// Marks `length` bytes of code at `gpa`, inside one page, which are to be read only then, and gives the version that holds
    /// as long as nobody stores to them. Other vCPUs' stores count once they have taken notice: [`Core::serialize`] waits for
    /// that.
    pub(crate) fn mark_code(&mut self, gpa: u64, length: u64) -> u32 {
        let ram = Arc::clone(&self.ram);
        let page = ram.code().page(gpa);
        let first = page.mark(gpa & 0xfff, length);
        let version = page.version();
        // Another vCPU may have set the first mark and not yet told of it.
        if first || !page.announced(version) {
            self.mmu.forbid_writes(gpa);
            self.shared.announce_code();
            page.set_announced(version);
        } else {
            self.shared.heed_announcements();
        }
        version
    }

    fn answer_announcements(&mut self) {
        let count = self.shared.announcements();
        self.mmu.forbid_writes_to_code();
        self.shared.mailbox().answer(count);
        self.leave_block();
    }

    /// Waits until all other vCPUs have taken notice of the code that this one uses: for serialising instructions.
    /// Takes notice of theirs meanwhile, so that two that wait for each other both go on.
    pub fn serialize(&mut self) {
        if self.shared.settled() {
            return;
        }
        // In check mode the others need a turn for that.
        if let Some(turns) = &self.turns {
            turns.give();
        }
        let mut round = 0;
        while !self.shared.settled() {
            if self.shared.mailbox().take_code() {
                self.answer_announcements();
            }
            // They answer at the end of a block, unless they lost the processor or talk to a device.
            match round {
                0..100 => std::hint::spin_loop(),
                100..200 => std::thread::yield_now(),
                _ => std::thread::sleep(Duration::from_micros(50)),
            }
            round += 1;
        }
        if let Some(turns) = &self.turns {
            turns.take();
        }
    }
}

#[cfg(test)]
mod tests;
