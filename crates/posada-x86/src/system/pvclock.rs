//! KVM's paravirtual clock, by which guests read the time without leaving user mode (Linux,
//! Documentation/virt/kvm/x86/msr.rst).

use crate::clock;
use crate::core::Core;

/// MSR_KVM_SYSTEM_TIME_NEW: the structure is in use.
const ENABLED: u64 = 1;
/// pvclock_vcpu_time_info: all vCPUs' clocks agree.
const TSC_STABLE: u32 = 1;
/// Bytes of pvclock_vcpu_time_info.
const TIME_INFO: u64 = 32;
/// Bytes of pvclock_wall_clock.
const WALL_CLOCK: u64 = 12;
const SECOND: u64 = 1_000_000_000;

/// How guests make nanoseconds of TSC ticks: `(ticks << shift) * multiplier >> 32`, with a negative shift to the right.
fn scale(tsc_khz: u64) -> (u32, i8) {
    let mut frequency = tsc_khz * 1000;
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

impl Core {
    /// Writes words behind a version that is odd meanwhile; nothing if they are not wholly in RAM.
    fn publish(&mut self, gpa: u64, bytes: u64, words: &[u32]) {
        if !self.ram.contains(gpa, bytes) {
            return;
        }
        let mut version = [0; 4];
        self.physical_read(gpa, &mut version);
        let odd = u32::from_le_bytes(version) | 1;
        self.physical_write(gpa, &odd.to_le_bytes());
        for (gpa, word) in (gpa + 4..).step_by(4).zip(words) {
            self.physical_write(gpa, &word.to_le_bytes());
        }
        self.physical_write(gpa, &odd.wrapping_add(1).to_le_bytes());
    }

    /// WRMSR of MSR_KVM_WALL_CLOCK_NEW: tells the time of day at which the paravirtual clock was zero.
    pub(crate) fn write_wall_clock(&mut self, gpa: u64) {
        self.msr.wall_clock = gpa;
        let time = self.shared.boot_time_ns();
        let words = [(time / SECOND) as u32, (time % SECOND) as u32];
        self.publish(gpa & !3, WALL_CLOCK, &words);
    }

    /// WRMSR of MSR_KVM_SYSTEM_TIME_NEW.
    pub(crate) fn write_system_time(&mut self, value: u64) {
        self.msr.system_time = value;
        self.update_pvclock();
    }

    /// Tells the guest again how its TSC and its clock hang together, after either has moved. The line goes through the VM's
    /// start on every vCPU, so that they agree to the tick for as long as the VM lives.
    pub(crate) fn update_pvclock(&mut self) {
        let at = self.msr.system_time;
        if at & ENABLED == 0 {
            return;
        }
        let start = self.msr.tsc_offset.wrapping_sub(self.shared.vm().tsc_offset());
        let (multiplier, shift) = scale(clock::tsc_khz());
        let flags = u32::from(shift as u8) | TSC_STABLE << 8;
        let words = [0, start as u32, (start >> 32) as u32, 0, 0, multiplier, flags];
        self.publish(at & !3, TIME_INFO, &words);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::tests::core;

    /// What a guest computes.
    fn nanoseconds(core: &mut Core, gpa: u64, tsc: u64) -> u64 {
        let mut bytes = [0; 32];
        core.physical_read(gpa, &mut bytes);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) & 1, 0);
        assert_eq!(bytes[29], 1);
        let delta = tsc.wrapping_sub(u64::from(word(8)) | u64::from(word(12)) << 32);
        let shift = bytes[28] as i8;
        let scaled = if shift < 0 { delta >> -shift } else { delta << shift };
        (u128::from(scaled) * u128::from(word(24)) >> 32) as u64 + (u64::from(word(16)) | u64::from(word(20)) << 32)
    }

    #[test]
    fn the_scale_is_that_of_the_counter() {
        for khz in [
            100_000, 999_999, 1_000_000, 1_000_001, 2_000_000, 2_095_078, 4_000_000, 5_300_000,
        ] {
            let (multiplier, shift) = scale(khz);
            let ticks = khz * 1_000_000;
            let scaled = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = u128::from(scaled) * u128::from(multiplier) >> 32;
            assert!(ns.abs_diff(1000 * u128::from(SECOND)) < 1000, "{khz} kHz: {ns} ns");
        }
    }

    #[test]
    fn the_clock_counts_nanoseconds_from_the_vms_start() {
        let mut core = core();
        core.msr.tsc_offset = core.shared.vm().tsc_offset();
        core.write_system_time(0x8100 | ENABLED);
        let second = clock::tsc_khz() * 1000;
        assert!(nanoseconds(&mut core, 0x8100, second).abs_diff(SECOND) < 10);
        core.msr.tsc_offset = core.msr.tsc_offset.wrapping_add(12345);
        core.update_pvclock();
        assert!(nanoseconds(&mut core, 0x8100, second + 12345).abs_diff(SECOND) < 10);
        let mut version = [0; 4];
        core.physical_read(0x8100, &mut version);
        assert_eq!(u32::from_le_bytes(version), 4);
    }

    #[test]
    fn nothing_is_written_outside_ram_or_when_off() {
        let mut core = core();
        core.write_system_time((1 << 20) - 16 | ENABLED);
        core.write_system_time(0x8100);
        let mut bytes = [0; 32];
        core.physical_read(0x8100, &mut bytes);
        assert_eq!(bytes, [0; 32]);
    }
}
