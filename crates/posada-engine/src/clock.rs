//! A VM's clock, and how it goes on after a rest: in the past by a snapshot, on another host or another engine.
//!
//! A VM has one clock, in nanoseconds since its start (what KVM's paravirtual clock shows), and a TSC a vCPU at a fixed
//! frequency. While a VM rests, real time goes on, and both make up for it when it resumes, so that the time of day is right
//! without the guest's help. Neither ever goes back.

use serde::{Deserialize, Serialize};
use std::time::{SystemTime, UNIX_EPOCH};

/// Frequencies closer than this (parts per million) are one: no two measurements of a counter agree better, and no clock is
/// set right oftener. By KVM's default (`tsc_tolerance_ppm`), so that it and we scale a guest's TSC, or neither.
pub const TOLERANCE_PPM: u64 = 250;

/// Whether a guest's TSC of `guest_khz` is within `ppm` (parts per million, at most a million) of the host's `host_khz`.
/// Rounded as KVM does.
pub fn is_near(guest_khz: u64, host_khz: u64, ppm: u64) -> bool {
    let bound = |part| (u128::from(host_khz) * u128::from(part) / 1_000_000) as u64;
    (bound(1_000_000 - ppm)..=bound(1_000_000 + ppm)).contains(&guest_khz)
}

/// Nanoseconds since the Unix epoch, by the host's clock; 0 before it.
pub fn real_time_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_nanos() as u64)
}

/// One moment on all clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The VM's clock, in nanoseconds since its start.
    pub vm_ns: u64,
    /// Nanoseconds since the Unix epoch.
    pub real_ns: u64,
    /// The host's TSC, scaled to the guest's frequency.
    pub host_tsc: u64,
}

/// The clocks of a resting VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// When it was stopped.
    pub stopped: Moment,
    /// Frequency of the guest's TSC in kHz.
    pub tsc_khz: u64,
}

impl ClockState {
    /// How a VM goes on at a moment of real time `real_ns` (nanoseconds since the epoch) and host TSC `host_tsc` (scaled to
    /// the guest's frequency): the VM clock's value, and what to add to each vCPU's TSC offset (modulo 2^64). If the real
    /// clock has been set back meanwhile, no time has passed.
    pub fn resume(&self, real_ns: u64, host_tsc: u64) -> (Moment, u64) {
        let rested = real_ns.saturating_sub(self.stopped.real_ns);
        let ticks = (u128::from(rested) * u128::from(self.tsc_khz) / 1_000_000) as u64;
        let moment = Moment {
            vm_ns: self.stopped.vm_ns.saturating_add(rested),
            real_ns,
            host_tsc,
        };
        // guest = host + offset; it was stopped.host_tsc + offset, and is to be that plus the ticks of the rest.
        (moment, self.stopped.host_tsc.wrapping_add(ticks).wrapping_sub(host_tsc))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STOPPED: ClockState = ClockState {
        stopped: Moment {
            vm_ns: 5_000,
            real_ns: 1_000_000_000,
            host_tsc: 1 << 40,
        },
        tsc_khz: 2_000_000,
    };

    #[test]
    fn a_frequency_is_near_up_to_and_with_the_bound() {
        for (guest, near) in [
            (2_999_249, false),
            (2_999_250, true),
            (3_000_750, true),
            (3_000_751, false),
        ] {
            assert_eq!(is_near(guest, 3_000_000, TOLERANCE_PPM), near, "{guest}");
        }
        // Bounds between two integers are rounded down.
        assert!(is_near(1_999_499, 1_999_999, TOLERANCE_PPM) && !is_near(2_000_499, 1_999_999, TOLERANCE_PPM));
    }

    #[test]
    fn clock_and_tsc_make_up_for_the_rest() {
        let (moment, more) = STOPPED.resume(1_000_001_000, 77);
        assert_eq!(moment.vm_ns, 6_000);
        let offset = 123u64;
        let then = STOPPED.stopped.host_tsc.wrapping_add(offset);
        assert_eq!(77u64.wrapping_add(offset).wrapping_add(more), then + 2_000);
    }

    #[test]
    fn a_clock_that_was_set_back_stops_time_and_never_turns_it() {
        let (moment, more) = STOPPED.resume(5, 0);
        assert_eq!((moment.vm_ns, more), (5_000, 1 << 40));
    }
}
