//! A VM's clock, and how it goes on after a rest: in the past by a snapshot, on another host or another engine.
//!
//! A VM has one clock, in nanoseconds since its start (what KVM's paravirtual clock shows), and a TSC a vCPU at a fixed
//! frequency. While a VM rests, real time goes on, and both make up for it when it resumes, so that the time of day is right
//! without the guest's help. Neither ever goes back.

use serde::{Deserialize, Serialize};

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
