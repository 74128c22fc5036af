//! The registers that are part of the portable state.

use super::{DEBUGCTL, MCG_STATUS, TSC_DEADLINE, valid};
use crate::core::{Core, Msrs};
use posada_engine::msr::{MTRR_FIXED, MTRR_VARIABLE, PORTABLE, name};
use std::collections::BTreeMap;

/// Those of the list that are always zero here.
const ZERO: [u32; 2] = [MCG_STATUS, DEBUGCTL];

impl Core {
    /// All that the processor has, but the TSC deadline: that is the local APIC's.
    pub(crate) fn portable_msrs(&self) -> BTreeMap<u32, u64> {
        let mut msrs = self.msr.clone();
        let listed = PORTABLE.iter().map(|(msr, _)| *msr);
        let mut values: BTreeMap<u32, u64> = listed
            .chain(MTRR_FIXED)
            .chain(MTRR_VARIABLE)
            .filter_map(|msr| Some((msr, *msrs.place(msr)?)))
            .collect();
        values.extend(ZERO.map(|msr| (msr, 0)));
        values
    }

    /// Sets those that [`check`] found good; what is not among them gets its reset value. The TSC stays, and EFER too.
    pub(crate) fn set_portable_msrs(&mut self, values: &BTreeMap<u32, u64>) {
        self.msr = Msrs {
            efer: self.msr.efer,
            tsc_offset: self.msr.tsc_offset,
            ..Msrs::default()
        };
        for (&msr, &value) in values {
            if let Some(place) = self.msr.place(msr) {
                *place = value;
            }
        }
    }
}

/// Refuses values that the processor could not hold.
///
/// # Errors
/// The first of them, by name.
pub(crate) fn check(values: &BTreeMap<u32, u64>) -> Result<(), String> {
    let mut reset = Msrs::default();
    let bad = |&(msr, value): &(u32, u64)| match msr {
        TSC_DEADLINE => false,
        _ if ZERO.contains(&msr) || reset.place(msr).is_some() => !valid(msr, value),
        _ => value != 0,
    };
    match values.iter().map(|(&msr, &value)| (msr, value)).find(bad) {
        Some((msr, value)) => Err(format!("{} cannot be {value:#x}", name(msr))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::tests::core;

    #[test]
    fn the_list_is_that_of_the_seam() {
        let core = core();
        let values = core.portable_msrs();
        let mut listed: Vec<u32> = PORTABLE.iter().map(|(msr, _)| *msr).collect();
        listed.extend(MTRR_FIXED.into_iter().chain(MTRR_VARIABLE));
        listed
            .retain(|&msr| msr != TSC_DEADLINE && (msr != posada_engine::msr::XSS || crate::cpuid::features().xsaves));
        listed.sort();
        assert_eq!(values.keys().copied().collect::<Vec<_>>(), listed);
        assert_eq!(check(&values), Ok(()));
    }

    #[test]
    fn what_the_processor_lacks_must_be_zero_and_is_named() {
        let one = |msr, value| check(&[(msr, value)].into());
        assert_eq!(one(0x1234, 0), Ok(()));
        assert_eq!(one(0x1234, 7), Err("MSR 0x1234 cannot be 0x7".into()));
        assert_eq!(one(DEBUGCTL, 1), Err("DEBUGCTL cannot be 0x1".into()));
        assert_eq!(one(0xc000_0082, 1 << 47), Err("LSTAR cannot be 0x800000000000".into()));
        assert!(
            one(0xc000_0080, 0x500).is_err() && one(0x10, 5).is_err(),
            "these have fields"
        );
        assert!(one(0x250, 7).is_err() && one(0x200, 0x100).is_err() && one(0x277, 2).is_err());
    }
}
