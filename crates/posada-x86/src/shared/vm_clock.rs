//! A VM's clock in nanoseconds, as its guest computes it from a TSC (Linux, Documentation/virt/kvm/x86/msr.rst). The VM
//! computes it in the same way, to the last bit, so that a clock that is stopped and set again never goes back.

const SECOND: u64 = 1_000_000_000;

/// A line: so many nanoseconds at a moment of the host's TSC, and its slope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmClock {
    /// The host's TSC (at the guest's rate) at some moment.
    pub host_tsc: u64,
    /// The clock at that moment, in nanoseconds.
    pub ns: u64,
    /// Nanoseconds of ticks: `(ticks << shift) * multiplier >> 32`, with a negative shift to the right.
    pub multiplier: u32,
    /// See [`VmClock::multiplier`].
    pub shift: i8,
}

impl VmClock {
    /// A clock that was at `ns` when a counter of `khz` (not 0) was at `host_tsc`.
    pub fn new(khz: u64, ns: u64, host_tsc: u64) -> Self {
        let (multiplier, shift) = scale(khz);
        Self {
            host_tsc,
            ns,
            multiplier,
            shift,
        }
    }

    /// The clock at another moment; before the one that it knows, it stands still.
    pub fn ns(&self, host_tsc: u64) -> u64 {
        let ticks = host_tsc.wrapping_sub(self.host_tsc);
        let ticks = if ticks as i64 > 0 { ticks } else { 0 };
        let shifted = if self.shift < 0 {
            ticks >> -self.shift
        } else {
            ticks << self.shift
        };
        let passed = (u128::from(shifted) * u128::from(self.multiplier) >> 32) as u64;
        self.ns.saturating_add(passed)
    }
}

fn scale(khz: u64) -> (u32, i8) {
    let mut frequency = khz * 1000;
    let mut shift = 0;
    while frequency > SECOND * 2 {
        frequency >>= 1;
        shift -= 1;
    }
    while frequency <= SECOND {
        frequency <<= 1;
        shift += 1;
    }
    (((SECOND << 32) / frequency) as u32, shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_are_those_of_the_counter() {
        for khz in [
            100_000, 999_999, 1_000_000, 1_000_001, 2_000_000, 2_095_078, 4_000_000, 5_300_000,
        ] {
            let clock = VmClock::new(khz, 5, 1 << 60);
            let ns = clock.ns((1 << 60) + khz * 1_000_000) - 5;
            assert!(ns.abs_diff(1000 * SECOND) < 1000, "{khz} kHz: {ns} ns");
        }
    }

    #[test]
    fn the_clock_never_goes_back() {
        let clock = VmClock::new(2_000_000, 77, 5);
        assert_eq!((clock.ns(5), clock.ns(4), clock.ns(0u64.wrapping_sub(9))), (77, 77, 77));
        assert_eq!(VmClock::new(2_000_000, u64::MAX, 0).ns(1 << 40), u64::MAX);
    }
}
