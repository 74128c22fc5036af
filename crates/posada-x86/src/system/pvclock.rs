//! KVM's paravirtual clock, by which guests read the time without leaving user mode (Linux,
//! Documentation/virt/kvm/x86/msr.rst).

use crate::core::Core;

/// MSR_KVM_SYSTEM_TIME_NEW: the structure is in use.
const ENABLED: u64 = 1;
/// pvclock_vcpu_time_info: all vCPUs' clocks agree.
const TSC_STABLE: u8 = 1;
/// pvclock_vcpu_time_info: the VM was stopped; the guest's watchdogs clear it, and forgive the pause.
const STOPPED: u8 = 2;
/// Offset of the flags in pvclock_vcpu_time_info.
const FLAGS: u64 = 29;
/// Bytes of pvclock_vcpu_time_info.
const TIME_INFO: u64 = 32;
/// Bytes of pvclock_wall_clock.
const WALL_CLOCK: u64 = 12;
const SECOND: u64 = 1_000_000_000;

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

    /// Tells the guest again how its TSC and its clock hang together, after either has moved. The line goes through the same
    /// moment on every vCPU, so that they agree to the tick.
    pub(crate) fn update_pvclock(&mut self) {
        let vm = self.shared.vm();
        let settings = vm.clock_settings();
        let clock = vm.clock();
        let stopped = std::mem::replace(&mut self.clock_settings, settings) != settings;
        self.pvclock_stale = false;
        let at = self.msr.system_time;
        if at & ENABLED == 0 {
            return;
        }
        let at = at & !3;
        let mut flags = [0];
        if self.ram.contains(at, TIME_INFO) {
            self.physical_read(at + FLAGS, &mut flags);
        }
        let flags = flags[0] & STOPPED | if stopped { STOPPED } else { 0 } | TSC_STABLE;
        let tsc = clock.host_tsc.wrapping_add(self.msr.tsc_offset);
        let words = [
            0,
            tsc as u32,
            (tsc >> 32) as u32,
            clock.ns as u32,
            (clock.ns >> 32) as u32,
            clock.multiplier,
            u32::from(clock.shift as u8) | u32::from(flags) << 8,
        ];
        self.publish(at, TIME_INFO, &words);
    }

    /// Before guest code runs, perhaps after a rest: the VM's clock or the processor's state may have been set.
    pub(crate) fn catch_up(&mut self) {
        if self.pvclock_stale || self.clock_settings != self.shared.vm().clock_settings() {
            self.update_pvclock();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::mmu::tests::core;

    /// What a guest computes.
    fn nanoseconds(core: &mut Core, gpa: u64, tsc: u64) -> u64 {
        let mut bytes = [0; 32];
        core.physical_read(gpa, &mut bytes);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) & 1, 0);
        assert_eq!(bytes[29] & TSC_STABLE, TSC_STABLE);
        let delta = tsc.wrapping_sub(u64::from(word(8)) | u64::from(word(12)) << 32);
        let shift = bytes[28] as i8;
        let scaled = if shift < 0 { delta >> -shift } else { delta << shift };
        (u128::from(scaled) * u128::from(word(24)) >> 32) as u64 + (u64::from(word(16)) | u64::from(word(20)) << 32)
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

    fn flags(core: &mut Core) -> u8 {
        let mut flags = [0];
        core.physical_read(0x8100 + FLAGS, &mut flags);
        flags[0]
    }

    #[test]
    fn a_clock_that_was_set_says_once_that_the_vm_was_stopped() {
        let mut core = core();
        core.write_system_time(0x8100 | ENABLED);
        assert_eq!(flags(&mut core), TSC_STABLE);
        let host = clock::host_tsc();
        core.shared.vm().set_clock(77 * SECOND, host);
        core.catch_up();
        assert_eq!(flags(&mut core), TSC_STABLE | STOPPED);
        let tsc = host.wrapping_add(core.msr.tsc_offset);
        assert_eq!(nanoseconds(&mut core, 0x8100, tsc), 77 * SECOND);
        // It stays until the guest has seen it.
        core.update_pvclock();
        assert_eq!(flags(&mut core), TSC_STABLE | STOPPED);
        core.physical_write(0x8100 + FLAGS, &[TSC_STABLE]);
        core.update_pvclock();
        core.catch_up();
        assert_eq!(flags(&mut core), TSC_STABLE);
    }

    #[test]
    fn the_guest_computes_what_the_vm_does() {
        let mut core = core();
        core.write_system_time(0x8100 | ENABLED);
        let moment = core.shared.vm().moment();
        let tsc = moment.host_tsc.wrapping_add(core.msr.tsc_offset);
        assert_eq!(nanoseconds(&mut core, 0x8100, tsc), moment.vm_ns);
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
