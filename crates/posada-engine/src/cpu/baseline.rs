//! Models that many hosts can offer, for VMs that are to move between them.

use super::Features;

/// A level of the x86-64 psABI with what kernels expect around it. None shows an invariant time stamp counter or tells
/// which vulnerabilities the processor lacks: both may differ on the next host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// x86-64-v2: up to SSE4.2 (servers since 2009).
    V2,
    /// x86-64-v3: up to AVX2 (servers since 2015).
    V3,
}

const V2: &[&str] = &[
    "fpu",
    "de",
    "pse",
    "tsc",
    "msr",
    "pae",
    "mce",
    "cx8",
    "apic",
    "sep",
    "mtrr",
    "pge",
    "mca",
    "cmov",
    "pat",
    "pse36",
    "clfsh",
    "mmx",
    "fxsr",
    "sse",
    "sse2",
    "sse3",
    "ssse3",
    "cmpxchg16b",
    "sse4_1",
    "sse4_2",
    "x2apic",
    "popcnt",
    "tsc_deadline",
    "hypervisor",
    "arat",
    "kvm_nop_io_delay",
    "kvm_clocksource",
    "kvm_steal_time",
    "kvm_pv_eoi",
    "kvm_clocksource_stable",
    "lahf",
    "syscall",
    "nx",
    "rdtscp",
    "lm",
];

/// What V3 has beyond V2.
const V3: &[&str] = &[
    "fma", "movbe", "xsave", "avx", "f16c", "rdrand", "fsgsbase", "bmi1", "avx2", "smep", "bmi2", "erms", "smap",
    "adx", "lzcnt", "page1gb",
];

impl Baseline {
    /// Exactly its features.
    pub fn features(self) -> Features {
        let beyond = match self {
            Baseline::V2 => &[][..],
            Baseline::V3 => V3,
        };
        Features::new(|bit| V2.contains(&bit.name) || beyond.contains(&bit.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::BITS;

    #[test]
    fn every_name_is_a_feature() {
        for name in V2.iter().chain(V3) {
            assert!(BITS.iter().any(|bit| bit.name == *name), "{name}");
        }
    }
}
