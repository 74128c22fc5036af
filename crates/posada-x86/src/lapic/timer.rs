//! The local APIC's timer (Intel SDM 3A, 11.5.4): one-shot, periodic and TSC-deadline. Pure: the time is handed in.

use crate::clock::{APIC_BUS_KHZ, ns_to_ticks, ticks_to_ns};

/// LVT timer bits 18-17.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Mode {
    #[default]
    OneShot,
    Periodic,
    Deadline,
}

impl Mode {
    /// The mode in an LVT timer entry; the reserved one acts as one-shot.
    pub(crate) fn of(entry: u32) -> Self {
        match entry >> 17 & 3 {
            1 => Self::Periodic,
            2 => Self::Deadline,
            _ => Self::OneShot,
        }
    }
}

/// The timer. Times are host TSC ticks, counts are those of the APIC bus clock after the divider.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timer {
    mode: Mode,
    /// Divide configuration register.
    divide: u32,
    /// Initial count register.
    initial: u32,
    /// When the timer expires next.
    due: Option<u64>,
    /// IA32_TSC_DEADLINE, in guest TSC ticks; 0 is disarmed.
    deadline: u64,
}

impl Timer {
    /// A timer that shows these registers at `now`. One whose count is at 0 is about to expire, unless it `rests`: then it has
    /// expired before. A TSC deadline is to be set anew.
    pub(crate) fn showing(mode: Mode, divide: u32, initial: u32, current: u32, rests: bool, now: u64) -> Self {
        let counts = mode != Mode::Deadline;
        let mut timer = Self {
            mode,
            divide,
            initial: if counts { initial } else { 0 },
            due: None,
            deadline: 0,
        };
        if timer.initial != 0 && !rests {
            timer.due = Some(now.saturating_add(timer.ticks(current)));
        }
        timer
    }

    /// The timer has a count and does not count: it has expired.
    pub(crate) fn rests(&self) -> bool {
        self.initial != 0 && self.due.is_none()
    }

    /// True if both show the same registers, each at its moment.
    pub(crate) fn shows_as(&self, at: u64, other: &Self, then: u64) -> bool {
        let registers = |timer: &Self, at| {
            (
                timer.mode,
                timer.divide,
                timer.initial,
                timer.current(at),
                timer.rests(),
            )
        };
        registers(self, at) == registers(other, then)
    }

    /// The initial count register.
    pub(crate) fn initial(&self) -> u32 {
        self.initial
    }

    /// The divide configuration register.
    pub(crate) fn divide(&self) -> u32 {
        self.divide
    }

    /// IA32_TSC_DEADLINE.
    pub(crate) fn deadline(&self) -> u64 {
        self.deadline
    }

    /// When the timer expires next, if it runs.
    pub(crate) fn due(&self) -> Option<u64> {
        self.due
    }

    /// Nanoseconds a count.
    fn count_ns(&self) -> u64 {
        let code = self.divide >> 1 & 4 | self.divide & 3;
        (1 << (code + 1 & 7)) * 1_000_000 / APIC_BUS_KHZ
    }

    fn ticks(&self, count: u32) -> u64 {
        ns_to_ticks(u64::from(count) * self.count_ns())
    }

    /// Changes the mode. TSC-deadline mode shares nothing with the others: going there or back stops the timer.
    pub(crate) fn set_mode(&mut self, mode: Mode) {
        if (self.mode == Mode::Deadline) != (mode == Mode::Deadline) {
            (self.due, self.initial, self.deadline) = (None, 0, 0);
        }
        self.mode = mode;
    }

    /// Writes the initial count: starts or (0) stops the timer.
    pub(crate) fn start(&mut self, initial: u32, now: u64) {
        if self.mode != Mode::Deadline {
            self.initial = initial;
            self.due = (initial != 0).then(|| now.saturating_add(self.ticks(initial)));
        }
    }

    /// The current count.
    pub(crate) fn current(&self, now: u64) -> u32 {
        match self.due {
            Some(due) if self.mode != Mode::Deadline => {
                let left = due.saturating_sub(now);
                // The last count lasts until the end.
                let count = ticks_to_ns(left).div_ceil(self.count_ns()).max(left.min(1));
                count.min(self.initial.into()) as u32
            }
            _ => 0,
        }
    }

    /// Writes the divide configuration: what is left of the count goes on at the new speed.
    pub(crate) fn set_divide(&mut self, value: u32, now: u64) {
        let left = self.current(now);
        self.divide = value & 0b1011;
        if self.due.is_some() && self.mode != Mode::Deadline {
            self.due = Some(now.saturating_add(self.ticks(left)));
        }
    }

    /// Writes IA32_TSC_DEADLINE, which counts in the guest's TSC; the host's will be `due` then.
    pub(crate) fn set_deadline(&mut self, deadline: u64, due: u64) {
        if self.mode == Mode::Deadline {
            self.deadline = deadline;
            self.due = (deadline != 0).then_some(due);
        }
    }

    /// Looks at the time: true if the timer has expired since the last look. Periods missed are one expiry.
    pub(crate) fn expire(&mut self, now: u64) -> bool {
        let Some(due) = self.due.filter(|&due| due <= now) else {
            return false;
        };
        self.due = None;
        self.deadline = 0;
        if self.mode == Mode::Periodic && self.initial != 0 {
            let period = self.ticks(self.initial);
            self.due = Some(due + ((now - due) / period + 1) * period);
        }
        true
    }
}

#[cfg(test)]
impl Timer {
    /// All that a guest can change of it, at host time `now`.
    pub(crate) fn pieces(&self, now: u64) -> [(&'static str, String); 5] {
        let Self {
            mode,
            divide,
            initial,
            due,
            deadline,
        } = self;
        [
            ("timer mode", format!("{mode:?}")),
            ("divide", divide.to_string()),
            ("initial count", initial.to_string()),
            ("current count", format!("{} {}", self.current(now), due.is_some())),
            ("deadline", deadline.to_string()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1 << 45;

    fn timer(mode: Mode, divide: u32) -> Timer {
        let mut timer = Timer::default();
        timer.set_mode(mode);
        timer.set_divide(divide, NOW);
        timer
    }

    #[test]
    fn the_divider_has_its_eight_values() {
        let factors = [0, 1, 2, 3, 8, 9, 10, 11].map(|code| timer(Mode::OneShot, code).count_ns());
        assert_eq!(factors, [2, 4, 8, 16, 32, 64, 128, 1]);
    }

    #[test]
    fn a_one_shot_expires_once() {
        let mut timer = timer(Mode::OneShot, 3);
        timer.start(1000, NOW);
        let end = NOW + ns_to_ticks(16_000);
        assert_eq!((timer.due(), timer.current(NOW)), (Some(end), 1000));
        assert_eq!(timer.current(NOW + ns_to_ticks(8_000)), 500);
        assert!(!timer.expire(end - 1));
        assert!(timer.expire(end));
        assert!(!timer.expire(end + (1 << 40)));
        assert_eq!((timer.current(end), timer.initial()), (0, 1000));
    }

    #[test]
    fn a_period_does_not_drift_and_missed_ones_are_one() {
        let mut timer = timer(Mode::Periodic, 11);
        timer.start(1_000_000, NOW);
        let period = ns_to_ticks(1_000_000);
        for round in 1..=1000 {
            let late = NOW + round * period + round % 7;
            assert!(timer.expire(late) && !timer.expire(late));
        }
        assert!(timer.expire(NOW + 1500 * period));
        assert_eq!(timer.due(), Some(NOW + 1501 * period));
        timer.start(0, NOW + 1500 * period);
        assert_eq!(timer.due(), None);
    }

    #[test]
    fn a_timer_goes_on_from_what_it_showed() {
        let later = NOW + (1 << 40);
        for mode in [Mode::OneShot, Mode::Periodic] {
            let mut timer = timer(mode, 3);
            timer.start(1000, NOW);
            let at = NOW + ns_to_ticks(4_000);
            let shown = timer.current(at);
            let other = Timer::showing(mode, timer.divide(), timer.initial(), shown, timer.rests(), later);
            assert_eq!(
                (other.current(later), other.due()),
                (shown, Some(later + ns_to_ticks(12_000)))
            );
            assert!(timer.shows_as(at, &other, later) && !timer.shows_as(NOW, &other, later));
        }
        let mut timer = timer(Mode::OneShot, 3);
        timer.start(1000, NOW);
        let end = timer.due().unwrap();
        assert_eq!((timer.current(end - 1), timer.current(end)), (1, 0));
        // Not yet noticed, and noticed.
        assert_eq!(
            Timer::showing(Mode::OneShot, 3, 1000, 0, timer.rests(), later).due(),
            Some(later)
        );
        assert!(timer.expire(end));
        assert_eq!(
            Timer::showing(Mode::OneShot, 3, 1000, 0, timer.rests(), later).due(),
            None
        );
    }

    #[test]
    fn a_new_divider_keeps_the_count() {
        let mut timer = timer(Mode::OneShot, 11);
        timer.start(1000, NOW);
        let half = NOW + ns_to_ticks(500);
        timer.set_divide(0, half);
        assert_eq!(timer.current(half), 500);
        assert_eq!(timer.due(), Some(half + ns_to_ticks(1000)));
    }

    #[test]
    fn the_tsc_deadline_disarms_itself() {
        let mut timer = timer(Mode::Deadline, 0);
        timer.start(1000, NOW);
        assert_eq!(
            (timer.initial(), timer.due()),
            (0, None),
            "counts mean nothing in this mode"
        );
        timer.set_deadline(5_000, NOW + 1_000);
        assert_eq!((timer.due(), timer.current(NOW)), (Some(NOW + 1_000), 0));
        assert!(timer.expire(NOW + 1_000));
        assert_eq!((timer.deadline(), timer.due()), (0, None));
        timer.set_deadline(3_000, NOW);
        assert!(timer.expire(NOW), "a deadline in the past");
        timer.set_deadline(u64::MAX, u64::MAX);
        assert!(!timer.expire(u64::MAX - 1));
        timer.set_mode(Mode::OneShot);
        assert_eq!((timer.deadline(), timer.due()), (0, None));
        timer.set_deadline(9_000, NOW + 5_000);
        assert_eq!(timer.due(), None);
    }
}
