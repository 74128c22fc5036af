//! A VM's TSC against the host's, and its paravirtual clock.

use crate::error::{Asked, Error};
use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_clock_data};
use kvm_ioctls::VmFd;
use posada_engine::clock::{Moment, TOLERANCE_PPM, is_near, real_time_ns};

/// By how much the host's frequency may differ, in millionths, when the guest keeps time by the paravirtual clock and not by
/// its TSC.
const ENDURABLE_PPM: u64 = 10_000;

/// How a guest's TSC runs against the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rate {
    /// Frequency of the guest's TSC in kHz, as its CPU model shows it.
    pub guest_khz: u64,
    /// The processor multiplies, by this number over 2 to the power of the next.
    scale: Option<(u64, u32)>,
}

impl Rate {
    /// For a guest with `guest_khz` on a host with `host_khz`. `fraction`: bits behind the point of the factor by which the
    /// processor can scale, if it can. `invariant`: the guest may take its TSC for a clock.
    ///
    /// # Errors
    /// When the guest would see its TSC run at a wrong pace.
    pub(crate) fn new(guest_khz: u64, host_khz: u64, fraction: Option<u32>, invariant: bool) -> Result<Self, Error> {
        let same = Self { guest_khz, scale: None };
        if is_near(guest_khz, host_khz, TOLERANCE_PPM) {
            return Ok(same);
        }
        if let Some(fraction) = fraction {
            let factor = (u128::from(guest_khz) << fraction) / u128::from(host_khz);
            return match u64::try_from(factor) {
                Ok(factor) if factor != 0 => Ok(Self {
                    guest_khz,
                    scale: Some((factor, fraction)),
                }),
                _ => Err(cannot(guest_khz, host_khz)),
            };
        }
        if invariant || !is_near(guest_khz, host_khz, ENDURABLE_PPM) {
            return Err(cannot(guest_khz, host_khz));
        }
        tracing::warn!(
            guest_khz,
            host_khz,
            "the guest's time stamp counter runs at this host's frequency, which is not quite the guest's"
        );
        Ok(same)
    }

    /// True if KVM must be asked for it.
    pub(crate) fn scaled(&self) -> bool {
        self.scale.is_some()
    }

    /// The host's TSC at the guest's rate.
    pub(crate) fn ticks(&self, host_tsc: u64) -> u64 {
        match self.scale {
            Some((factor, fraction)) => (u128::from(host_tsc) * u128::from(factor) >> fraction) as u64,
            None => host_tsc,
        }
    }
}

fn cannot(guest_khz: u64, host_khz: u64) -> Error {
    Error::State(format!(
        "the guest's time stamp counter runs at {guest_khz} kHz and this host's at {host_khz} kHz, and its processor cannot \
         scale one to the other; run the VM on a host of the same frequency, or with --accel emulate"
    ))
}

/// The host's TSC.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: reads a counter that every x86-64 processor has.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// This moment.
pub(crate) fn now(vm: &VmFd, rate: &Rate) -> Result<Moment, Error> {
    const BOTH: u32 = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
    let data = vm.get_clock().to("tell the virtual machine's clock")?;
    // Older kernels tell the VM's clock only.
    let (real_ns, host) = if data.flags & BOTH == BOTH {
        (data.realtime, data.host_tsc)
    } else {
        (real_time_ns(), host_tsc())
    };
    Ok(Moment {
        vm_ns: data.clock,
        real_ns,
        host_tsc: rate.ticks(host),
    })
}

/// Sets the VM's clock to what it was at `moment` and the time since then.
pub(crate) fn set(vm: &VmFd, rate: &Rate, moment: &Moment) -> Result<(), Error> {
    let ticks = rate.ticks(host_tsc()).wrapping_sub(moment.host_tsc);
    // A moment to come, by a rounding, is now.
    let ticks = if ticks >> 63 == 0 { ticks } else { 0 };
    let since = u128::from(ticks) * 1_000_000 / u128::from(rate.guest_khz);
    let data = kvm_clock_data {
        clock: moment.vm_ns.saturating_add(since as u64),
        ..Default::default()
    };
    vm.set_clock(&data).to("set the virtual machine's clock")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_that_is_near_is_taken_as_it_is() {
        for guest in [2_999_250, 3_000_000, 3_000_750] {
            for fraction in [None, Some(32)] {
                let rate = Rate::new(guest, 3_000_000, fraction, true).unwrap();
                assert!(!rate.scaled());
                assert_eq!(rate.ticks(u64::MAX), u64::MAX);
            }
        }
    }

    #[test]
    fn a_processor_that_can_scale_does() {
        for fraction in [32, 48] {
            let rate = Rate::new(1_500_000, 3_000_000, Some(fraction), true).unwrap();
            assert!(rate.scaled());
            assert_eq!(rate.ticks(1 << 63), 1 << 62);
        }
        // 48 bits behind the point leave 16 before it.
        let error = Rate::new(70_000_000_000, 1_000, Some(48), false).unwrap_err();
        assert!(error.to_string().contains("70000000000 kHz"), "{error}");
    }

    #[test]
    fn without_scaling_both_rates_are_told_unless_the_difference_can_be_endured() {
        let rate = |guest, invariant| Rate::new(guest, 3_000_000, None, invariant);
        assert!(rate(3_020_000, false).is_ok());
        for (guest, invariant) in [(3_020_000, true), (3_040_000, false), (2_960_000, false)] {
            let text = rate(guest, invariant).unwrap_err().to_string();
            assert!(
                text.contains(&format!("{guest} kHz")) && text.contains("3000000 kHz"),
                "{text}"
            );
        }
    }
}
