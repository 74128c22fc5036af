//! One vCPU as other threads see it.
//!
//! # No wake-up is lost
//! All that can be wanted of a vCPU is a bit in one word, [`Mailbox::events`], and so is "the vCPU sleeps". The vCPU goes to
//! sleep by turning the word from 0 into ASLEEP, then waits on the word itself (futex). A poster sets its bit by one atomic
//! OR. The word has a single order of changes, so either the poster's bit comes first, and the vCPU cannot set ASLEEP; or
//! it comes second, and the poster sees ASLEEP in what the OR returns and wakes the vCPU. If the vCPU has not reached the
//! kernel by then, the kernel compares the word with ASLEEP, finds it changed and does not sleep. Of several posters only
//! the first need wake: its wake-up comes after the others' bits or is still to come.
//!
//! # Memory order
//! A poster writes what the bit speaks of (posted vectors, the SIPI vector, code marks) before its OR, which releases it;
//! the vCPU takes the bits by an acquiring swap, and then reads.

use posada_engine::Kick;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Somebody wants `run` to return.
pub(crate) const KICK: u32 = 1;
/// A non-maskable interrupt.
pub(crate) const NMI: u32 = 1 << 1;
/// INIT.
pub(crate) const INIT: u32 = 1 << 2;
/// A start-up interrupt (SIPI), later than any INIT in the word.
pub(crate) const STARTUP: u32 = 1 << 3;
/// Vectors were posted.
pub(crate) const POSTED: u32 = 1 << 4;
/// The timer may be due, or an interrupt that was held back.
pub(crate) const LOOK: u32 = 1 << 5;
/// Another vCPU found code: see [`crate::shared::Shared::announce_code`]. Nothing to wake up for.
pub(crate) const CODE: u32 = 1 << 6;
/// Code has changed: what was made of it is not to run in circles. Nothing to wake up for either.
pub(crate) const CHANGED: u32 = 1 << 7;
/// The vCPU sleeps, or is about to.
const ASLEEP: u32 = 1 << 30;
/// The vCPU is outside `run`.
const AWAY: u32 = 1 << 31;

/// Bits of the word that ask for something.
pub(crate) const WORK: u32 = !(ASLEEP | AWAY);
const AWAKENING: u32 = WORK & !(CODE | CHANGED);

/// What the local APIC lets others know, to find the destinations of their interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Address {
    /// APIC_BASE.EN is clear: nothing arrives.
    pub disabled: bool,
    /// Addressed by 32-bit x2APIC ids.
    pub x2apic: bool,
    /// SVR bit 8: takes part in lowest-priority arbitration.
    pub software_enabled: bool,
    /// DFR chose the cluster model.
    pub cluster: bool,
    /// xAPIC logical id.
    pub logical: u8,
}

impl Address {
    fn pack(self) -> u32 {
        u32::from(self.logical)
            | u32::from(self.disabled) << 8
            | u32::from(self.x2apic) << 9
            | u32::from(self.software_enabled) << 10
            | u32::from(self.cluster) << 11
    }

    fn unpack(word: u32) -> Self {
        Self {
            disabled: word & 1 << 8 != 0,
            x2apic: word & 1 << 9 != 0,
            software_enabled: word & 1 << 10 != 0,
            cluster: word & 1 << 11 != 0,
            logical: word as u8,
        }
    }
}

/// One vCPU as other threads see it.
#[derive(Debug)]
// Two cache lines, as hardware fetches pairs: the words of two vCPUs never share one.
#[repr(align(128))]
pub struct Mailbox {
    events: AtomicU32,
    address: AtomicU32,
    startup: AtomicU8,
    /// Vectors posted and not yet taken, one bit each.
    requested: [AtomicU64; 4],
    /// Which of them are level-triggered.
    level: [AtomicU64; 4],
    /// Announcements of code that the vCPU has taken notice of: the VM's count when it last looked.
    answered: AtomicU64,
}

impl Default for Mailbox {
    fn default() -> Self {
        Self {
            events: AtomicU32::new(AWAY),
            address: AtomicU32::new(Address::default().pack()),
            startup: AtomicU8::new(0),
            requested: Default::default(),
            level: Default::default(),
            answered: AtomicU64::new(0),
        }
    }
}

impl Mailbox {
    /// True if there is something in the word. Relaxed: who acts on it takes the bits first.
    #[inline(always)]
    pub(crate) fn pending(&self) -> bool {
        self.events.load(Ordering::Relaxed) & WORK != 0
    }

    /// Address of the word whose [`WORK`] bits are [`Mailbox::pending`], for translated code.
    pub(crate) fn events_address(&self) -> u64 {
        self.events.as_ptr() as u64
    }

    /// Sets event bits, and wakes the vCPU.
    pub(crate) fn post(&self, events: u32) {
        self.wake(self.events.fetch_or(events, Ordering::AcqRel), events);
    }

    fn wake(&self, before: u32, events: u32) {
        if before & ASLEEP != 0 && before & AWAKENING == 0 && events & AWAKENING != 0 {
            futex_wake(&self.events);
        }
    }

    /// INIT: what start-up interrupt came before it means nothing any more.
    pub(crate) fn post_init(&self) {
        let with_init = |events| Some(events & !STARTUP | INIT);
        let before = self.events.fetch_update(Ordering::AcqRel, Ordering::Relaxed, with_init);
        self.wake(before.expect("always some"), INIT);
    }

    /// SIPI.
    pub(crate) fn post_startup(&self, vector: u8) {
        self.startup.store(vector, Ordering::Relaxed);
        self.post(STARTUP);
    }

    /// The vector of the last SIPI.
    pub(crate) fn startup_vector(&self) -> u8 {
        self.startup.load(Ordering::Relaxed)
    }

    /// Requests an interrupt. Requests of a vector that the vCPU has not yet taken are one, as in an IRR.
    pub(crate) fn post_vector(&self, vector: u8, level: bool) {
        let (at, bit) = (usize::from(vector / 64), 1 << (vector % 64));
        if level {
            self.level[at].fetch_or(bit, Ordering::Relaxed);
        } else if self.level[at].load(Ordering::Relaxed) & bit != 0 {
            self.level[at].fetch_and(!bit, Ordering::Relaxed);
        }
        self.requested[at].fetch_or(bit, Ordering::Release);
        self.post(POSTED);
    }

    /// Takes all posted vectors: for each word the requests, and which of them are level-triggered.
    pub(crate) fn take_vectors(&self) -> [(u64, u64); 4] {
        std::array::from_fn(|at| {
            if self.requested[at].load(Ordering::Relaxed) == 0 {
                return (0, 0);
            }
            let requested = self.requested[at].swap(0, Ordering::Acquire);
            (requested, requested & self.level[at].load(Ordering::Relaxed))
        })
    }

    /// Takes all event bits.
    pub(crate) fn take(&self) -> u32 {
        if self.pending() {
            self.events.swap(0, Ordering::AcqRel)
        } else {
            0
        }
    }

    /// Takes only the CODE bit: true if it was set.
    pub(crate) fn take_code(&self) -> bool {
        self.events.load(Ordering::Relaxed) & CODE != 0 && self.events.fetch_and(!CODE, Ordering::AcqRel) & CODE != 0
    }

    /// Takes only the NMI bit: true if it was set.
    pub(crate) fn take_nmi(&self) -> bool {
        self.events.fetch_and(!NMI, Ordering::AcqRel) & NMI != 0
    }

    /// What has arrived of INIT and start-up interrupts (the last one's vector).
    pub(crate) fn starts(&self) -> (bool, Option<u8>) {
        let events = self.events.load(Ordering::Acquire);
        let startup = (events & STARTUP != 0).then(|| self.startup_vector());
        (events & INIT != 0, startup)
    }

    /// Replaces what [`Mailbox::starts`] tells.
    pub(crate) fn set_starts(&self, init: bool, startup: Option<u8>) {
        self.events.fetch_and(!(INIT | STARTUP), Ordering::AcqRel);
        if init {
            self.post_init();
        }
        if let Some(vector) = startup {
            self.post_startup(vector);
        }
    }

    /// Sleeps until something is posted or the time is over; may also return early.
    pub(crate) fn sleep(&self, time: Option<Duration>) {
        let fell_asleep = self
            .events
            .compare_exchange(0, ASLEEP, Ordering::AcqRel, Ordering::Relaxed);
        if fell_asleep.is_ok() {
            futex_wait(&self.events, ASLEEP, time);
            self.events.fetch_and(!ASLEEP, Ordering::AcqRel);
        }
    }

    /// The vCPU enters `run`.
    pub fn enter(&self) {
        self.events.fetch_and(!AWAY, Ordering::AcqRel);
    }

    /// The vCPU leaves `run`. What is posted from now on waits for the next one.
    pub fn leave(&self) {
        self.events.fetch_or(AWAY, Ordering::AcqRel);
    }

    /// True if the vCPU runs no guest code, and will take its events before it does.
    pub(crate) fn at_rest(&self) -> bool {
        self.events.load(Ordering::Acquire) & (ASLEEP | AWAY) != 0
    }

    pub(crate) fn answer(&self, announcements: u64) {
        self.answered.store(announcements, Ordering::Release);
    }

    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Acquire)
    }

    /// Publishes how the local APIC is addressed. Release and acquire order it as the guest's own stores and loads are.
    pub(crate) fn set_address(&self, address: Address) {
        self.address.store(address.pack(), Ordering::Release);
    }

    pub(crate) fn address(&self) -> Address {
        Address::unpack(self.address.load(Ordering::Acquire))
    }
}

impl Kick for Mailbox {
    fn kick(&self) {
        self.post(KICK);
    }
}

fn futex_wake(word: &AtomicU32) {
    // SAFETY: the kernel only uses the word's address.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        )
    };
}

fn futex_wait(word: &AtomicU32, expected: u32, time: Option<Duration>) {
    let time = time.map(|time| libc::timespec {
        tv_sec: time.as_secs() as libc::time_t,
        tv_nsec: time.subsec_nanos().into(),
    });
    let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: the word lives as long as the borrow, and `time` is null or names a timespec of this frame.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
            expected,
            time,
        )
    };
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_later_init_takes_back_an_earlier_start_up() {
        let mailbox = Mailbox::default();
        mailbox.post_startup(7);
        mailbox.post_init();
        assert_eq!(mailbox.take() & WORK, INIT);
        mailbox.post_init();
        mailbox.post_startup(9);
        assert_eq!((mailbox.take(), mailbox.startup_vector()), (INIT | STARTUP, 9));
    }

    #[test]
    fn a_posted_vector_keeps_its_last_trigger_mode() {
        let mailbox = Mailbox::default();
        mailbox.post_vector(0x41, true);
        mailbox.post_vector(0x42, false);
        assert_eq!(mailbox.take_vectors()[1], (6, 2));
        mailbox.post_vector(0x41, false);
        assert_eq!(mailbox.take_vectors()[1], (2, 0));
        assert_eq!(mailbox.take_vectors(), [(0, 0); 4]);
    }

    #[test]
    fn ping_pong_of_two_sleepers_never_stops() {
        let boxes: [Arc<Mailbox>; 2] = Default::default();
        boxes.iter().for_each(|mailbox| mailbox.enter());
        let threads = [0, 1].map(|me| {
            let boxes = boxes.clone();
            std::thread::spawn(move || {
                for _ in 0..20_000 {
                    if me == 0 {
                        boxes[1].post(LOOK);
                    }
                    while boxes[me].take() == 0 {
                        // The other side's only wake-up is the one post a round: without it this sleeps for ever.
                        boxes[me].sleep(None);
                    }
                    if me == 1 {
                        boxes[0].post(LOOK);
                    }
                }
            })
        });
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn code_and_its_changes_wake_nobody_and_hide_no_wake_up() {
        let mailbox = Arc::new(Mailbox::default());
        mailbox.enter();
        let sleeper = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            let mut seen = 0;
            while seen & KICK == 0 {
                seen |= sleeper.take();
                if seen & KICK == 0 {
                    sleeper.sleep(None);
                }
            }
            seen
        });
        while !mailbox.at_rest() {
            std::thread::yield_now();
        }
        mailbox.post(CODE);
        mailbox.post(CHANGED);
        mailbox.kick();
        assert_eq!(thread.join().unwrap() & WORK, CODE | CHANGED | KICK);
    }
}
