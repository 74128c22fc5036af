//! The processor features that a guest may see: one table for all engines.

use serde::de::{Deserializer, Error};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

pub(super) const EAX: usize = 0;
pub(super) const EBX: usize = 1;
pub(super) const ECX: usize = 2;
pub(super) const EDX: usize = 3;

/// Who makes a feature work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// Instructions that the host's processor executes for every engine: it must have the feature.
    Host,
    /// The engine. One in software always has it; with KVM the host decides.
    Us,
}

/// A bit of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bit {
    /// The feature's name, as in the manual.
    pub name: &'static str,
    /// EAX of CPUID.
    pub leaf: u32,
    /// ECX of CPUID.
    pub subleaf: u32,
    /// 0 to 3: EAX, EBX, ECX, EDX.
    pub register: usize,
    /// 0 to 31.
    pub bit: u32,
    /// Who makes it work.
    pub by: By,
}

macro_rules! features {
    ($($(#[$about:meta])* $name:ident: $leaf:literal $subleaf:literal $register:ident $bit:literal $by:ident;)*) => {
        /// All features.
        pub const BITS: &[Bit] = &[$(Bit {
            name: stringify!($name),
            leaf: $leaf,
            subleaf: $subleaf,
            register: $register,
            bit: $bit,
            by: By::$by,
        }),*];

        /// A set of features, by the manual's names.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the manual's own names")]
        pub struct Features {
            $(pub $name: bool,)*
        }

        impl Features {
            /// The features for which `has` is true.
            pub fn new(mut has: impl FnMut(&Bit) -> bool) -> Self {
                // In the order of the table.
                let mut shown = BITS.iter().map(&mut has);
                Self {
                    $($name: shown.next().unwrap_or_default(),)*
                }
            }

            /// Whether the feature of this name is in the set.
            pub fn has(&self, name: &str) -> bool {
                match name {
                    $(stringify!($name) => self.$name,)*
                    _ => false,
                }
            }

            /// Each feature, and whether it is in the set; in the order of the table.
            fn bits(&self) -> impl Iterator<Item = (&'static Bit, bool)> {
                BITS.iter().zip([$(self.$name),*])
            }

            /// What is in both sets.
            pub fn and(&self, other: &Self) -> Self {
                Self {
                    $($name: self.$name && other.$name,)*
                }
            }
        }
    };
}

// Leaf 1 EDX also has HTT, and ECX OSXSAVE: these follow the VM's shape and CR4. No monitor, no performance counters, no
// TSX, no CET, no protection keys.
features! {
    fpu: 1 0 EDX 0 Us;
    de: 1 0 EDX 2 Us;
    pse: 1 0 EDX 3 Us;
    tsc: 1 0 EDX 4 Us;
    msr: 1 0 EDX 5 Us;
    pae: 1 0 EDX 6 Us;
    mce: 1 0 EDX 7 Us;
    cx8: 1 0 EDX 8 Us;
    apic: 1 0 EDX 9 Us;
    sep: 1 0 EDX 11 Us;
    mtrr: 1 0 EDX 12 Us;
    pge: 1 0 EDX 13 Us;
    mca: 1 0 EDX 14 Us;
    cmov: 1 0 EDX 15 Us;
    pat: 1 0 EDX 16 Us;
    pse36: 1 0 EDX 17 Us;
    clfsh: 1 0 EDX 19 Us;
    mmx: 1 0 EDX 23 Host;
    fxsr: 1 0 EDX 24 Us;
    sse: 1 0 EDX 25 Host;
    sse2: 1 0 EDX 26 Host;
    sse3: 1 0 ECX 0 Host;
    pclmulqdq: 1 0 ECX 1 Host;
    ssse3: 1 0 ECX 9 Host;
    fma: 1 0 ECX 12 Host;
    cmpxchg16b: 1 0 ECX 13 Host;
    pcid: 1 0 ECX 17 Us;
    sse4_1: 1 0 ECX 19 Host;
    sse4_2: 1 0 ECX 20 Host;
    x2apic: 1 0 ECX 21 Us;
    movbe: 1 0 ECX 22 Host;
    popcnt: 1 0 ECX 23 Host;
    tsc_deadline: 1 0 ECX 24 Us;
    aes: 1 0 ECX 25 Host;
    xsave: 1 0 ECX 26 Host;
    avx: 1 0 ECX 28 Host;
    f16c: 1 0 ECX 29 Host;
    rdrand: 1 0 ECX 30 Host;
    hypervisor: 1 0 ECX 31 Us;
    arat: 6 0 EAX 2 Us;
    fsgsbase: 7 0 EBX 0 Us;
    tsc_adjust: 7 0 EBX 1 Us;
    bmi1: 7 0 EBX 3 Host;
    avx2: 7 0 EBX 5 Host;
    // x87's data pointer moves only on exceptions, and its selectors are gone: as the host's x87 has it.
    fdp_excptn_only: 7 0 EBX 6 Host;
    smep: 7 0 EBX 7 Us;
    bmi2: 7 0 EBX 8 Host;
    erms: 7 0 EBX 9 Us;
    invpcid: 7 0 EBX 10 Us;
    zero_fcs_fds: 7 0 EBX 13 Host;
    rdseed: 7 0 EBX 18 Host;
    adx: 7 0 EBX 19 Host;
    smap: 7 0 EBX 20 Us;
    clflushopt: 7 0 EBX 23 Us;
    clwb: 7 0 EBX 24 Us;
    sha: 7 0 EBX 29 Host;
    umip: 7 0 ECX 2 Us;
    rdpid: 7 0 ECX 22 Us;
    fsrm: 7 0 EDX 4 Us;
    serialize: 7 0 EDX 14 Us;
    spec_ctrl: 7 0 EDX 26 Us;
    arch_capabilities: 7 0 EDX 29 Us;
    avx512f: 7 0 EBX 16 Host;
    avx512dq: 7 0 EBX 17 Host;
    avx512ifma: 7 0 EBX 21 Host;
    avx512cd: 7 0 EBX 28 Host;
    avx512bw: 7 0 EBX 30 Host;
    avx512vl: 7 0 EBX 31 Host;
    avx512vbmi: 7 0 ECX 1 Host;
    avx512vbmi2: 7 0 ECX 6 Host;
    gfni: 7 0 ECX 8 Host;
    vaes: 7 0 ECX 9 Host;
    vpclmulqdq: 7 0 ECX 10 Host;
    avx512vnni: 7 0 ECX 11 Host;
    avx512bitalg: 7 0 ECX 12 Host;
    avx512vpopcntdq: 7 0 ECX 14 Host;
    xsaveopt: 0xd 1 EAX 0 Host;
    xsavec: 0xd 1 EAX 1 Host;
    xgetbv1: 0xd 1 EAX 2 Host;
    xsaves: 0xd 1 EAX 3 Host;
    // No I/O delays needed; the clock behind the new MSRs; steal time; the end of an interrupt without an exit; the same
    // clock on all vCPUs.
    kvm_nop_io_delay: 0x4000_0001 0 EAX 1 Us;
    kvm_clocksource: 0x4000_0001 0 EAX 3 Us;
    kvm_steal_time: 0x4000_0001 0 EAX 5 Us;
    kvm_pv_eoi: 0x4000_0001 0 EAX 6 Us;
    kvm_clocksource_stable: 0x4000_0001 0 EAX 24 Us;
    lahf: 0x8000_0001 0 ECX 0 Us;
    lzcnt: 0x8000_0001 0 ECX 5 Host;
    prefetchw: 0x8000_0001 0 ECX 8 Us;
    syscall: 0x8000_0001 0 EDX 11 Us;
    nx: 0x8000_0001 0 EDX 20 Us;
    page1gb: 0x8000_0001 0 EDX 26 Us;
    rdtscp: 0x8000_0001 0 EDX 27 Us;
    lm: 0x8000_0001 0 EDX 29 Us;
    invariant_tsc: 0x8000_0007 0 EDX 8 Host;
}

impl Features {
    /// The same without AVX-512, unless all of what processors have had together since the second that had any of it is
    /// there: opmasks of 64 bits, vectors of 128 and 256.
    pub fn with_whole_avx512(self) -> Self {
        let whole = self.avx512f && self.avx512cd && self.avx512bw && self.avx512dq && self.avx512vl;
        if whole { self } else { self.without_avx512() }
    }

    /// The same without AVX-512.
    pub fn without_avx512(self) -> Self {
        Self::new(|bit| self.has(bit.name) && !bit.name.starts_with("avx512"))
    }

    /// Those of the set in the order of the table.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.bits().filter(|(_, has)| *has).map(|(bit, _)| bit.name)
    }

    /// The first feature of this set that `available` lacks.
    pub fn first_beyond(&self, available: &Self) -> Option<&'static str> {
        self.names().find(|name| !available.has(name))
    }

    /// The bits of a leaf: EAX, EBX, ECX, EDX.
    pub fn words(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut words = [0; 4];
        for (bit, has) in self.bits() {
            if (bit.leaf, bit.subleaf) == (leaf, subleaf) {
                words[bit.register] |= u32::from(has) << bit.bit;
            }
        }
        words
    }
}

/// A list of names, so that a snapshot can be read.
impl Serialize for Features {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.names())
    }
}

impl<'de> Deserialize<'de> for Features {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(deserializer)?;
        let known = |name: &String| BITS.iter().any(|bit| bit.name == name);
        if let Some(unknown) = names.iter().find(|name| !known(name)) {
            return Err(D::Error::custom(format!("unknown processor feature {unknown}")));
        }
        Ok(Self::new(|bit| names.iter().any(|name| name == bit.name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_features_share_a_bit() {
        for (at, bit) in BITS.iter().enumerate() {
            let same = |other: &Bit| {
                (other.leaf, other.subleaf, other.register, other.bit) == (bit.leaf, bit.subleaf, bit.register, bit.bit)
                    || other.name == bit.name
            };
            assert!(!BITS[..at].iter().any(same), "{}", bit.name);
        }
    }

    #[test]
    fn a_set_survives_its_list_of_names() {
        let set = Features::new(|bit| bit.bit % 3 == 0);
        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(serde_json::from_str::<Features>(&text).unwrap(), set);
        let unknown = serde_json::from_str::<Features>(r#"["sse2", "sse5"]"#).unwrap_err();
        assert!(
            unknown.to_string().contains("unknown processor feature sse5"),
            "{unknown}"
        );
    }

    #[test]
    fn each_feature_alone_is_its_bit_of_its_leaf_and_its_name() {
        for bit in BITS {
            let one = Features::new(|other| other == bit);
            assert_eq!(one.names().collect::<Vec<_>>(), [bit.name]);
            assert!(one.has(bit.name));
            let mut expected = [0; 4];
            expected[bit.register] = 1 << bit.bit;
            assert_eq!(one.words(bit.leaf, bit.subleaf), expected, "{}", bit.name);
            assert_eq!(one.words(bit.leaf, bit.subleaf + 1), [0; 4], "{}", bit.name);
        }
    }

    #[test]
    fn avx512_comes_whole() {
        let all = Features::new(|_| true);
        assert_eq!(all.with_whole_avx512(), all);
        let some = Features::new(|bit| bit.name != "avx512vl").with_whole_avx512();
        assert_eq!(some, Features::new(|bit| !bit.name.starts_with("avx512")));
        assert!(some.gfni && some.avx2);
    }

    #[test]
    fn the_first_feature_beyond_a_set_is_named() {
        let all = Features::new(|_| true);
        let fewer = Features::new(|bit| bit.name != "avx2");
        assert_eq!(
            (all.first_beyond(&fewer), fewer.first_beyond(&all)),
            (Some("avx2"), None)
        );
        assert_eq!(all.and(&fewer), fewer);
    }
}
