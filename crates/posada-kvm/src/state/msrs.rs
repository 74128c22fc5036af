//! Model-specific registers.

use crate::error::{Asked, Error};
use crate::host;
use kvm_ioctls::VcpuFd;
use posada_engine::cpu::Features;
use posada_engine::msr;
use std::collections::BTreeMap;

/// The portable registers that a processor has.
pub(crate) struct Registers(Vec<u32>);

impl Registers {
    /// Those of a processor with `features`, in the order in which they are set.
    pub(crate) fn of(features: &Features) -> Self {
        let there = |register: &u32| match *register {
            msr::TSC_ADJUST => features.tsc_adjust,
            msr::SPEC_CTRL => features.spec_ctrl,
            msr::XSS => features.xsaves,
            msr::TSC_AUX => features.rdtscp || features.rdpid,
            msr::KVM_WALL_CLOCK | msr::KVM_SYSTEM_TIME => features.kvm_clocksource,
            msr::KVM_STEAL_TIME => features.kvm_steal_time,
            msr::KVM_PV_EOI => features.kvm_pv_eoi,
            msr::TSC_DEADLINE => features.tsc_deadline,
            _ => true,
        };
        let listed = msr::PORTABLE.iter().map(|(register, _)| *register);
        let memory_types = msr::MTRR_FIXED.into_iter().chain(msr::MTRR_VARIABLE);
        Self(memory_types.chain(listed).filter(there).collect())
    }

    /// All values.
    pub(super) fn get(&self, vcpu: &VcpuFd) -> Result<BTreeMap<u32, u64>, Error> {
        let wanted: Vec<(u32, u64)> = self.0.iter().map(|register| (*register, 0)).collect();
        let mut values = host::msrs(&wanted);
        let got = vcpu.get_msrs(&mut values).to("tell a processor's registers")?;
        match self.0.get(got) {
            Some(missing) => Err(Error::State(format!(
                "KVM does not tell the register {}",
                msr::name(*missing)
            ))),
            None => Ok(values
                .as_slice()
                .iter()
                .map(|value| (value.index, value.data))
                .collect()),
        }
    }

    /// Sets all but the deadline; what is not in `values` gets its reset value.
    pub(super) fn set(&self, vcpu: &VcpuFd, values: &BTreeMap<u32, u64>) -> Result<(), Error> {
        let unknown = |&(register, value): &(&u32, &u64)| *value != 0 && !self.0.contains(register);
        if let Some((register, _)) = values.iter().find(unknown) {
            return Err(Error::State(format!(
                "the processor has no register {}",
                msr::name(*register)
            )));
        }
        let values: Vec<(u32, u64)> = self
            .0
            .iter()
            .filter(|register| **register != msr::TSC_DEADLINE)
            .map(|register| {
                (
                    *register,
                    values.get(register).copied().unwrap_or(msr::reset_value(*register)),
                )
            })
            .collect();
        put(vcpu, &values)
    }

    /// Sets the deadline. After the TSC and the local APIC.
    pub(super) fn set_deadline(&self, vcpu: &VcpuFd, values: &BTreeMap<u32, u64>) -> Result<(), Error> {
        match values.get(&msr::TSC_DEADLINE) {
            Some(deadline) if self.0.contains(&msr::TSC_DEADLINE) => put(vcpu, &[(msr::TSC_DEADLINE, *deadline)]),
            _ => Ok(()),
        }
    }
}

/// Sets these, in this order.
pub(crate) fn put(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), Error> {
    let set = vcpu.set_msrs(&host::msrs(values)).to("set a processor's registers")?;
    match values.get(set) {
        Some((register, value)) => Err(Error::State(format!(
            "KVM takes {value:#x} in the register {} for impossible on this processor",
            msr::name(*register)
        ))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_of_features_that_are_not_there_are_left_out() {
        let (none, all) = (
            Registers::of(&Features::default()),
            Registers::of(&Features::new(|_| true)),
        );
        assert_eq!(all.0.len(), msr::PORTABLE.len() + 11 + 16);
        assert!(none.0.contains(&msr::PAT) && !none.0.contains(&msr::KVM_STEAL_TIME));
        assert!(all.0.contains(&0x26f) && all.0.contains(&0x20f));
    }
}
