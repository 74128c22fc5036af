//! What CPUID shows: what this processor does, and nothing else (Intel SDM 2A, CPUID).
//!
//! Instructions that run on the host are shown only if the host has them. What is wholly our own work (paging, the local APIC,
//! system instructions) does not depend on the host. Vendor, family, model and caches are the host's, so that software picks
//! the code that suits it.

use crate::clock;
use crate::core::Core;
use crate::xsave;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// The last basic leaf.
const LAST_BASIC: u32 = 0xd;
/// The last extended leaf.
const LAST_EXTENDED: u32 = 0x8000_0008;
/// The last leaf of the hypervisor: KVM's, with the clocks' frequencies (of VMware's convention).
const LAST_HYPERVISOR: u32 = 0x4000_0010;
/// How KVM calls itself; its paravirtual clock is what guests look for behind this name.
const SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";
/// KVM's features: no I/O delays needed (1), the clock behind the new MSRs (3), and the same on all vCPUs (24).
const KVM_FEATURES: u32 = 1 << 1 | 1 << 3 | 1 << 24;
const BRAND: &[u8; 48] = b"Posada virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Bytes of a cache line that CLFLUSH flushes.
const LINE: u32 = 64;
/// Caches that leaf 4 may describe.
const CACHES: usize = 8;
/// Width of linear addresses.
const LINEAR_BITS: u32 = 48;

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// Who makes a feature work.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// The host's instructions: the host must have the feature.
    Host,
    /// This crate alone.
    Us,
}

/// One bit.
struct Bit {
    name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: usize,
    bit: u32,
    by: By,
}

macro_rules! features {
    ($($name:ident: $leaf:literal $subleaf:literal $register:ident $bit:literal $by:ident;)*) => {
        const BITS: &[Bit] = &[$(Bit {
            name: stringify!($name),
            leaf: $leaf,
            subleaf: $subleaf,
            register: $register,
            bit: $bit,
            by: By::$by,
        }),*];

        /// The features that guests see, by the manual's names. An instruction of any other raises #UD.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[allow(missing_docs, reason = "the manual's own names")]
        pub struct Features {
            /// The host's vendor is AMD, or one that follows it (Hygon).
            pub amd: bool,
            $(pub $name: bool,)*
        }

        impl Features {
            /// Those of a host whose CPUID `host` reads.
            fn of(amd: bool, host: impl Fn(u32, u32) -> [u32; 4]) -> Self {
                let mut shown = BITS.iter().map(|bit| {
                    bit.by == By::Us || host(bit.leaf, bit.subleaf)[bit.register] >> bit.bit & 1 != 0
                });
                Self {
                    amd,
                    // In the order of the table.
                    $($name: shown.next().unwrap_or_default(),)*
                }
            }

            /// Whether the feature of this name is shown.
            fn has(&self, name: &str) -> bool {
                match name {
                    $(stringify!($name) => self.$name,)*
                    _ => false,
                }
            }
        }
    };
}

// Leaf 1 EDX also has HTT, and ECX OSXSAVE: these follow the VM's shape and CR4. No monitor, no performance counters, no
// TSX, no CET, no protection keys, no AVX-512.
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
    xsaveopt: 0xd 1 EAX 0 Host;
    xsavec: 0xd 1 EAX 1 Host;
    xgetbv1: 0xd 1 EAX 2 Host;
    xsaves: 0xd 1 EAX 3 Host;
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

/// What is read from the host once; there, inside another VM, CPUID takes microseconds.
struct Policy {
    features: Features,
    vendor: [u32; 3],
    signature: u32,
    /// Leaf 4.
    caches: [[u32; 4]; CACHES],
    /// Leaves 8000_0005h and 8000_0006h.
    legacy_caches: [[u32; 4]; 2],
}

fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let first = leaf & 0xc000_0000;
    if leaf > __cpuid(first).eax {
        return [0; 4];
    }
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

fn policy() -> &'static Policy {
    static POLICY: OnceLock<Policy> = OnceLock::new();
    POLICY.get_or_init(|| {
        let [_, b, c, d] = host(0, 0);
        let name = [b, d, c].map(u32::to_le_bytes).concat();
        let amd = matches!(name.as_slice(), b"AuthenticAMD" | b"HygonGenuine");
        Policy {
            features: Features::of(amd, host),
            vendor: [b, c, d],
            signature: host(1, 0)[EAX],
            caches: std::array::from_fn(|at| host(4, at as u32)),
            legacy_caches: [host(0x8000_0005, 0), host(0x8000_0006, 0)],
        }
    })
}

/// The features that guests see.
#[inline]
pub fn features() -> &'static Features {
    &policy().features
}

/// The feature bits of a leaf.
fn feature_bits(leaf: u32, subleaf: u32) -> [u32; 4] {
    let features = features();
    let mut words = [0; 4];
    for bit in BITS.iter().filter(|bit| (bit.leaf, bit.subleaf) == (leaf, subleaf)) {
        words[bit.register] |= u32::from(features.has(bit.name)) << bit.bit;
    }
    words
}

/// Bits that number `count` things.
fn width(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// A quarter of a string of 16 bytes a leaf.
fn text(bytes: &[u8]) -> [u32; 4] {
    std::array::from_fn(|at| {
        let word = bytes.get(at * 4..at * 4 + 4).and_then(|word| word.try_into().ok());
        u32::from_le_bytes(word.unwrap_or_default())
    })
}

/// EAX, EBX, ECX and EDX of a leaf. Leaves that do not exist are zero.
pub fn cpuid(core: &Core, leaf: u32, subleaf: u32) -> [u32; 4] {
    let policy = policy();
    let (index, vcpus) = (core.shared.index(), core.shared.vcpus().len() as u32);
    match leaf {
        0 => [LAST_BASIC, policy.vendor[0], policy.vendor[1], policy.vendor[2]],
        1 => {
            let [_, _, mut c, mut d] = static_bits(1, 0);
            let identity = LINE / 8 << 8 | (vcpus & 0xff) << 16 | (index & 0xff) << 24;
            c |= u32::from(core.cr[4] & 1 << 18 != 0) << 27;
            d |= u32::from(vcpus > 1) << 28;
            if core.apic_disabled() {
                d &= !(1 << 9);
            }
            [policy.signature, identity, c, d]
        }
        // "Leaf 4 has the caches."
        2 if !policy.features.amd => [0xff01, 0, 0, 0],
        4 => cache(policy, subleaf, vcpus),
        6 => static_bits(6, 0),
        7 if subleaf == 0 => static_bits(7, 0),
        0xb => {
            // No hyper-threads, one package.
            let (shift, below, level) = match subleaf {
                0 => (0, 1, 1),
                1 => (width(vcpus), vcpus, 2),
                _ => (0, 0, 0),
            };
            [shift, below, level << 8 | subleaf & 0xff, index]
        }
        0xd if policy.features.xsave => xsave(core, subleaf),
        0x4000_0000 => {
            let [b, c, d, _] = text(SIGNATURE);
            [LAST_HYPERVISOR, b, c, d]
        }
        0x4000_0001 => [KVM_FEATURES, 0, 0, 0],
        0x4000_0010 => [clock::tsc_khz() as u32, clock::APIC_BUS_KHZ as u32, 0, 0],
        0x8000_0000 => [LAST_EXTENDED, 0, 0, 0],
        0x8000_0001 => {
            let [_, b, c, d] = static_bits(leaf, 0);
            [if policy.features.amd { policy.signature } else { 0 }, b, c, d]
        }
        0x8000_0002..=0x8000_0004 => text(&BRAND[(leaf as usize - 0x8000_0002) * 16..]),
        0x8000_0005 | 0x8000_0006 => policy.legacy_caches[leaf as usize - 0x8000_0005],
        0x8000_0007 => static_bits(leaf, 0),
        0x8000_0008 => {
            // AMD's way to tell the number of cores.
            let cores = if policy.features.amd {
                width(vcpus) << 12 | (vcpus - 1)
            } else {
                0
            };
            [crate::walk::PHYSICAL_BITS | LINEAR_BITS << 8, 0, cores, 0]
        }
        _ => [0; 4],
    }
}

/// [`feature_bits`], each leaf computed once.
fn static_bits(leaf: u32, subleaf: u32) -> [u32; 4] {
    const LEAVES: [(u32, u32); 6] = [(1, 0), (6, 0), (7, 0), (0xd, 1), (0x8000_0001, 0), (0x8000_0007, 0)];
    static ALL: OnceLock<[[u32; 4]; LEAVES.len()]> = OnceLock::new();
    let all = ALL.get_or_init(|| LEAVES.map(|(leaf, subleaf)| feature_bits(leaf, subleaf)));
    LEAVES
        .iter()
        .position(|&known| known == (leaf, subleaf))
        .map_or([0; 4], |at| all[at])
}

/// Leaf 4: the host's caches, of which the last level is shared by all vCPUs.
fn cache(policy: &Policy, subleaf: u32, vcpus: u32) -> [u32; 4] {
    let Some(&[a, b, c, d]) = policy.caches.get(subleaf as usize).filter(|cache| cache[EAX] & 31 != 0) else {
        return [0; 4];
    };
    let ids = (1 << width(vcpus)) - 1;
    let sharing = if a >> 5 & 7 >= 3 { ids } else { 0 };
    [a & 0x3fff | sharing << 14 | ids << 26, b, c, d]
}

/// Leaf 0Dh.
fn xsave(core: &Core, subleaf: u32) -> [u32; 4] {
    let all = xsave::supported();
    let size = |components: u64| xsave::size_of_components(components) as u32;
    match subleaf {
        0 => [all as u32, size(core.vector.xcr0), size(all), 0],
        1 => {
            let [a, ..] = static_bits(0xd, 1);
            // The compacted size is known only with the instructions that make it.
            let compacted = if a & 0b1010 != 0 { size(core.vector.xcr0) } else { 0 };
            [a, compacted, 0, 0]
        }
        2 if all & xsave::AVX != 0 => [xsave::AVX_SIZE as u32, xsave::AVX_OFFSET as u32, 0, 0],
        _ => [0; 4],
    }
}

impl Core {
    /// IA32_APIC_BASE switches the local APIC off.
    fn apic_disabled(&self) -> bool {
        self.apic_base() & 1 << 11 == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::tests::core;

    const LEAVES: [u32; 24] = [
        0,
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        0xa,
        0xb,
        0xc,
        0xd,
        0x4000_0000,
        0x4000_0001,
        0x4000_0010,
        0x8000_0000,
        0x8000_0001,
        0x8000_0002,
        0x8000_0005,
        0x8000_0006,
        0x8000_0007,
        0x8000_0008,
    ];

    /// Words of feature bits, with what is in them beside the table: OSXSAVE and HTT.
    const WORDS: [(u32, u32, usize, u32); 9] = [
        (1, 0, ECX, 1 << 27),
        (1, 0, EDX, 1 << 28),
        (6, 0, EAX, 0),
        (7, 0, EBX, 0),
        (7, 0, ECX, 0),
        (7, 0, EDX, 0),
        (0xd, 1, EAX, 0),
        (0x8000_0001, 0, ECX, 0),
        (0x8000_0001, 0, EDX, 0),
    ];

    #[test]
    fn nothing_unlisted_is_shown() {
        let mut core = core();
        core.cr[4] |= 1 << 18;
        for (leaf, subleaf, register, dynamic) in WORDS {
            let listed = BITS
                .iter()
                .filter(|bit| (bit.leaf, bit.subleaf, bit.register) == (leaf, subleaf, register))
                .fold(dynamic, |bits, bit| bits | 1 << bit.bit);
            let shown = cpuid(&core, leaf, subleaf)[register];
            assert_eq!(shown & !listed, 0, "leaf {leaf:#x}, register {register}");
        }
        // Subleaf 0 of leaf 7 says that there are no others.
        assert_eq!(cpuid(&core, 7, 0)[EAX], 0);
        assert_eq!(cpuid(&core, 7, 1), [0; 4]);
    }

    #[test]
    fn what_runs_on_the_host_needs_the_host() {
        let bare = Features::of(false, |_, _| [0; 4]);
        assert!(bare.fsgsbase && bare.lm && bare.x2apic && bare.nx);
        assert!(!bare.avx && !bare.sse4_2 && !bare.aes && !bare.xsave && !bare.rdrand);
        let full = Features::of(false, |_, _| [u32::MAX; 4]);
        assert!(BITS.iter().all(|bit| full.has(bit.name)));
        for bit in BITS.iter().filter(|bit| bit.by == By::Host) {
            let there = host(bit.leaf, bit.subleaf)[bit.register] >> bit.bit & 1 != 0;
            assert_eq!(features().has(bit.name), there, "{}", bit.name);
        }
    }

    #[test]
    fn the_decoder_of_vector_instructions_agrees() {
        use iced_x86::CpuidFeature as F;
        let shown = features();
        for (feature, bit) in [
            (F::SSE3, shown.sse3),
            (F::SSSE3, shown.ssse3),
            (F::SSE4_1, shown.sse4_1),
            (F::SSE4_2, shown.sse4_2),
            (F::AES, shown.aes),
            (F::PCLMULQDQ, shown.pclmulqdq),
            (F::SHA, shown.sha),
            (F::BMI2, shown.bmi2),
            (F::ADX, shown.adx),
            (F::AVX, shown.avx),
            (F::AVX2, shown.avx2),
            (F::F16C, shown.f16c),
            (F::FMA, shown.fma),
            (F::XSAVE, shown.xsave),
            (F::XSAVEOPT, shown.xsaveopt),
            (F::XSAVEC, shown.xsavec),
            (F::XSAVES, shown.xsaves),
            // What CPUID never shows.
            (F::AVX512F, false),
            (F::AMX_TILE, false),
            (F::GFNI, false),
            (F::VAES, false),
            (F::RTM, false),
        ] {
            assert_eq!(crate::native::shown(feature), bit, "{feature:?}");
        }
    }

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
    fn xsave_sizes_follow_xcr0() {
        let mut core = core();
        if !features().avx {
            return;
        }
        core.vector.xcr0 = 3;
        assert_eq!(cpuid(&core, 0xd, 0), [7, 576, 832, 0]);
        core.vector.xcr0 = 7;
        assert_eq!(cpuid(&core, 0xd, 0), [7, 832, 832, 0]);
        let [size, offset, ..] = cpuid(&core, 0xd, 2);
        assert_eq!(size + offset, cpuid(&core, 0xd, 0)[ECX]);
        // IA32_XSS has no component.
        assert_eq!(cpuid(&core, 0xd, 1)[ECX..], [0, 0]);
    }

    #[test]
    fn osxsave_mirrors_cr4() {
        let mut core = core();
        assert_eq!(cpuid(&core, 1, 0)[ECX] >> 27 & 1, 0);
        core.cr[4] |= 1 << 18;
        assert_eq!(cpuid(&core, 1, 0)[ECX] >> 27 & 1, 1);
    }

    #[test]
    fn leaves_beyond_the_last_are_zero() {
        let core = core();
        assert_eq!(cpuid(&core, LAST_BASIC + 1, 0), [0; 4]);
        assert_eq!(cpuid(&core, LAST_EXTENDED + 1, 0), [0; 4]);
        assert_eq!(cpuid(&core, LAST_HYPERVISOR + 1, 0), [0; 4]);
        for leaf in LEAVES {
            for subleaf in 0x40..0x44 {
                let _ = cpuid(&core, leaf, subleaf);
            }
        }
        assert_eq!(cpuid(&core, 0x8000_0008, 0)[EAX], 46 | 48 << 8);
        assert_eq!(&cpuid(&core, 0x4000_0000, 0)[EBX..], text(SIGNATURE).get(..3).unwrap());
    }

    #[test]
    fn widths_hold_their_counts() {
        assert_eq!([1, 2, 3, 4, 5, 8].map(width), [0, 1, 2, 2, 3, 3]);
    }
}
