//! Time: the host's time stamp counter (TSC) is the clock of everything that a guest can measure.
//!
//! What nobody but this host sees (deadlines, alarms) is in host TSC ticks. A guest that began on a host of another frequency
//! keeps the frequency that it knows: [`Rate`] leads from one to the other.

use crate::core::Core;
use posada_engine::clock::{TOLERANCE_PPM, is_near};
use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use std::sync::OnceLock;
use std::time::Duration;

/// Frequency of the bus clock that drives the local APIC timer, in kHz: one count a nanosecond before the divider.
pub const APIC_BUS_KHZ: u64 = posada_engine::cpu::APIC_BUS_KHZ as u64;

/// The host's TSC.
#[inline(always)]
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has it, and Linux leaves it open to user mode.
    unsafe { _rdtsc() }
}

/// The frequency of the host's TSC in kHz.
pub fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| stated().unwrap_or_else(|| measured(Duration::from_millis(15))))
}

/// What CPUID states: the ratio to a known crystal (leaf 15h, Intel SDM 3B, 19.7.3), or the hypervisor's word (leaf
/// 40000010h of KVM and VMware). Leaf 16h is a marketing figure, too coarse for a clock.
fn stated() -> Option<u64> {
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000);
        }
    }
    if __cpuid(1).ecx >> 31 == 0 {
        return None;
    }
    let top = __cpuid(0x4000_0000);
    let mut name = [0; 12];
    for (part, word) in name.chunks_mut(4).zip([top.ebx, top.ecx, top.edx]) {
        part.copy_from_slice(&word.to_le_bytes());
    }
    let known = matches!(&name, b"KVMKVMKVM\0\0\0" | b"VMwareVMware");
    let khz = u64::from((known && top.eax >= 0x4000_0010).then(|| __cpuid(0x4000_0010).eax)?);
    (khz != 0).then_some(khz)
}

/// Nanoseconds of the raw monotonic clock, and the TSC of the same moment: the closest pair of several tries, so that
/// losing the processor between the two readings does no harm.
fn moment() -> (u64, u64) {
    let pair = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let before = host_tsc();
        // SAFETY: a valid clock and a timespec of our own.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC_RAW, &mut time) };
        let spread = host_tsc().wrapping_sub(before);
        (
            spread,
            time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64,
            before.wrapping_add(spread / 2),
        )
    };
    let (_, ns, ticks) = (0..8).map(|_| pair()).min().expect("eight pairs");
    (ns, ticks)
}

/// Measures the TSC against the raw monotonic clock for `span`.
fn measured(span: Duration) -> u64 {
    let start = moment();
    std::thread::sleep(span);
    let end = moment();
    (u128::from(end.1 - start.1) * 1_000_000 / u128::from(end.0 - start.0)) as u64
}

/// TSC ticks in nanoseconds, rounded down.
pub fn ticks_to_ns(ticks: u64) -> u64 {
    let ns = u128::from(ticks) * 1_000_000 / u128::from(tsc_khz());
    u64::try_from(ns).unwrap_or(u64::MAX)
}

/// Nanoseconds in TSC ticks, rounded up, so that a wait is never too short.
pub fn ns_to_ticks(ns: u64) -> u64 {
    let ticks = (u128::from(ns) * u128::from(tsc_khz())).div_ceil(1_000_000);
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// Bits after the point of [`Rate::ratio`].
const FRACTION: u32 = 48;

/// How fast the guest's TSC runs, beside the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Its true frequency in kHz.
    khz: u64,
    /// Guest ticks a host tick, with [`FRACTION`] bits after the point; 0 if both frequencies are the same.
    ratio: u64,
}

impl Rate {
    /// For a guest that was told of `khz`, at most 2^15 times the host's frequency and not 0.
    pub fn new(khz: u64) -> Self {
        Self::between(khz, tsc_khz())
    }

    fn between(khz: u64, host: u64) -> Self {
        if is_near(khz, host, TOLERANCE_PPM) {
            return Self { khz: host, ratio: 0 };
        }
        let ratio = (u128::from(khz) << FRACTION) / u128::from(host);
        Self {
            khz,
            ratio: u64::try_from(ratio).expect("frequencies of processors are not that far apart"),
        }
    }

    /// The guest counter's frequency in kHz, as it truly is.
    pub fn khz(self) -> u64 {
        self.khz
    }

    /// The host's TSC at the guest's rate.
    #[inline(always)]
    pub fn guest(self, host: u64) -> u64 {
        if self.ratio == 0 { host } else { self.scaled(host) }
    }

    fn scaled(self, host: u64) -> u64 {
        (u128::from(host) * u128::from(self.ratio) >> FRACTION) as u64
    }

    /// A span of guest ticks in host ticks, rounded up, so that a wait is never too short.
    pub fn host_span(self, guest: u64) -> u64 {
        if self.ratio == 0 {
            return guest;
        }
        let span = (u128::from(guest) << FRACTION).div_ceil(u128::from(self.ratio));
        u64::try_from(span).unwrap_or(u64::MAX)
    }
}

impl Core {
    /// The guest's TSC, now.
    #[inline]
    pub fn guest_tsc(&self) -> u64 {
        self.guest_tsc_at(host_tsc())
    }

    /// The guest's TSC when the host's was `host`.
    #[inline]
    pub(crate) fn guest_tsc_at(&self, host: u64) -> u64 {
        self.rate.guest(host).wrapping_add(self.msr.tsc_offset)
    }

    /// Writes IA32_TIME_STAMP_COUNTER: IA32_TSC_ADJUST moves by the same amount (Intel SDM 3B, 18.17.3).
    pub fn set_guest_tsc(&mut self, value: u64) {
        let change = value.wrapping_sub(self.guest_tsc());
        self.set_tsc_adjust(self.msr.tsc_adjust.wrapping_add(change));
    }

    /// Writes IA32_TSC_ADJUST: the TSC moves by the same amount.
    pub fn set_tsc_adjust(&mut self, value: u64) {
        let change = value.wrapping_sub(self.msr.tsc_adjust);
        self.msr.tsc_adjust = value;
        self.msr.tsc_offset = self.msr.tsc_offset.wrapping_add(change);
        self.guest_tsc_moved();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::tests::core;

    #[test]
    fn conversions_keep_long_times() {
        for ns in [0, 1, 999, 1_000_000_007, 86_400_000_000_000 * 365 * 50] {
            let back = ticks_to_ns(ns_to_ticks(ns));
            assert!((ns..=ns + 1).contains(&back), "{ns} became {back}");
        }
        assert_eq!(ns_to_ticks(u64::MAX) > 0, ticks_to_ns(u64::MAX) > 0);
    }

    #[test]
    fn the_measured_frequency_is_steady() {
        let (short, long) = (measured(Duration::from_millis(10)), measured(Duration::from_millis(30)));
        assert!(short.abs_diff(long) < long / 1000, "{short} kHz, then {long} kHz");
        assert!(
            tsc_khz().abs_diff(long) < long / 1000,
            "{} kHz, but {long} kHz",
            tsc_khz()
        );
    }

    #[test]
    fn counters_of_almost_one_frequency_are_one() {
        for khz in [2_000_000, 2_000_500, 1_999_500] {
            let rate = Rate::between(khz, 2_000_000);
            assert_eq!(
                (rate.guest(12345), rate.host_span(12345), rate.khz()),
                (12345, 12345, 2_000_000)
            );
        }
        assert_ne!(Rate::between(2_000_501, 2_000_000).ratio, 0);
    }

    #[test]
    fn another_frequency_holds_over_years() {
        for (guest, host) in [
            (3_000_000, 2_000_000),
            (1_000_000, 4_999_999),
            (2_400_001, 2_400_000_000),
        ] {
            let rate = Rate::between(guest, host);
            let second = host * 1000;
            for seconds in [1, 86_400, 86_400 * 365 * 10] {
                let Some(ticks) = second.checked_mul(seconds) else {
                    continue;
                };
                let expected = guest * 1000 * seconds;
                assert!(
                    rate.guest(ticks).abs_diff(expected) <= 1 + expected / 1_000_000_000,
                    "{guest} {seconds}"
                );
                assert!(rate.host_span(expected).abs_diff(ticks) <= host / guest + 1 + ticks / 1_000_000_000);
            }
            // Whoever waits for a tick of the guest's does not wake before it.
            for ticks in [1, 7, 1 << 20, 1 << 40] {
                assert!(rate.guest(rate.host_span(ticks)) >= ticks);
            }
        }
        assert_eq!(Rate::between(1_000, 2_000_000).host_span(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_counter_of_twice_the_frequency_counts_twice() {
        let mut core = core();
        core.rate = Rate::new(tsc_khz() * 2);
        let start = (host_tsc(), core.guest_tsc());
        std::thread::sleep(Duration::from_millis(2));
        let end = (core.guest_tsc(), host_tsc());
        let (guest, host) = (end.0 - start.1, end.1 - start.0);
        assert!(
            guest <= host * 2 && guest >= ns_to_ticks(2_000_000) * 2,
            "{guest} {host}"
        );
    }

    #[test]
    fn writing_the_counter_moves_the_adjustment() {
        let mut core = core();
        core.set_tsc_adjust(1 << 40);
        let before = core.guest_tsc();
        core.set_guest_tsc(before + (1 << 50));
        let moved = core.msr.tsc_adjust - (1 << 40);
        assert!(moved <= 1 << 50 && moved > (1 << 50) - ns_to_ticks(1_000_000_000));
        assert!(core.guest_tsc() >= before + (1 << 50));
    }
}
