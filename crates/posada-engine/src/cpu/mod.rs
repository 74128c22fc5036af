//! What CPUID shows (Intel SDM 2A, CPUID): one policy for all engines, so that a VM can move between them.
//!
//! A [`CpuModel`] is made once, with its VM, out of what an engine offers on this host, and stays with the VM wherever it
//! goes. It holds no state: bits that follow registers (OSXSAVE, the enabled components' size, the APIC's switch) are the
//! engine's.

mod baseline;
mod features;

pub use baseline::Baseline;
pub use features::{BITS, Bit, By, Features};

use features::EAX;
use serde::{Deserialize, Serialize};
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// The last basic leaf.
pub const LAST_BASIC: u32 = 0xd;
/// The last extended leaf.
pub const LAST_EXTENDED: u32 = 0x8000_0008;
/// The last leaf of the hypervisor: KVM's, with the clocks' frequencies (of VMware's convention).
pub const LAST_HYPERVISOR: u32 = 0x4000_0010;
/// Width of linear addresses in bits.
pub const LINEAR_BITS: u32 = 48;
/// Frequency of the bus clock that drives the local APIC timer, in kHz: one count a nanosecond before the divider.
pub const APIC_BUS_KHZ: u32 = 1_000_000;

/// What the hosts of a baseline have at least.
const BASELINE_PHYSICAL_BITS: u32 = 39;

/// How KVM calls itself; its paravirtual clock is what guests look for behind this name.
const SIGNATURE: &[u8; 12] = b"KVMKVMKVM\0\0\0";
const BRAND: &[u8; 48] = b"Posada virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// Bytes of a cache line that CLFLUSH flushes.
const LINE: u32 = 64;
/// Caches that leaf 4 may describe.
const CACHES: u32 = 8;
/// Bytes of an XSAVE area's legacy region and header.
const XSAVE_HEADER_END: u32 = 576;

/// A part of an XSAVE area in the standard format (Intel SDM 1, 13.4.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    /// Its bit in XCR0, 2 or more: x87 and SSE lie in the legacy region.
    pub bit: u8,
    /// Bytes.
    pub size: u32,
    /// Offset in bytes.
    pub offset: u32,
}

/// What CPUID shows to the processors of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuModel {
    /// EBX, ECX and EDX of leaf 0.
    pub vendor: [u32; 3],
    /// EAX of leaf 1: family, model, stepping.
    pub signature: u32,
    /// The features.
    pub features: Features,
    /// IA32_ARCH_CAPABILITIES, if the features have it.
    pub arch_capabilities: u64,
    /// Leaf 4, one entry a subleaf.
    pub caches: Vec<[u32; 4]>,
    /// Leaves 8000_0005h and 8000_0006h.
    pub legacy_caches: [[u32; 4]; 2],
    /// The parts of an XSAVE area beyond x87 and SSE.
    pub components: Vec<Component>,
    /// Width of guest physical addresses in bits.
    pub physical_bits: u32,
    /// Frequency of the time stamp counter in kHz.
    pub tsc_khz: u64,
    /// Number of vCPUs.
    pub cpus: u32,
}

/// What an engine offers on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Features.
    pub features: Features,
    /// IA32_ARCH_CAPABILITIES.
    pub arch_capabilities: u64,
    /// Width of guest physical addresses in bits.
    pub physical_bits: u32,
    /// Frequency of the time stamp counter in kHz.
    pub tsc_khz: u64,
}

/// EAX, EBX, ECX and EDX of the host's CPUID; zero for a leaf that it lacks.
pub fn host(leaf: u32, subleaf: u32) -> [u32; 4] {
    let first = leaf & 0xc000_0000;
    if leaf > __cpuid(first).eax {
        return [0; 4];
    }
    let found = __cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// True for AMD, and for Hygon, which follows it.
fn is_amd([b, c, d]: [u32; 3]) -> bool {
    let name = [b, d, c].map(u32::to_le_bytes).concat();
    matches!(name.as_slice(), b"AuthenticAMD" | b"HygonGenuine")
}

/// The host's layout of the components that come with `features`.
fn components(features: &Features) -> Vec<Component> {
    let wanted = |bit| match bit {
        2 => features.avx,
        5..=7 => features.avx512f,
        _ => false,
    };
    let component = |bit: u8| {
        let [size, offset, ..] = host(0xd, bit.into());
        Component { bit, size, offset }
    };
    (2..8).filter(|&bit| wanted(bit)).map(component).collect()
}

/// Processors as [`CpuModel::signature`] that have AVX2 and nothing newer that compilers take for granted: Intel's Broadwell
/// (06_47H), AMD's Zen 3 (19H, 21H).
const BROADWELL: u32 = 0x0004_0671;
const ZEN_3: u32 = 0x00a2_0f10;
/// The same with AVX-512: Skylake-X (06_55H), Ice Lake-X (06_6AH).
const SKYLAKE_X: u32 = 0x0005_0654;
const ICE_LAKE_X: u32 = 0x0006_06a6;

/// What the host's processor has of that by which compilers tell models apart.
#[derive(Clone, Copy, Default)]
struct Generation {
    avx512: bool,
    /// BF16, FP16, AMX or AVX-VNNI, which no guest is shown.
    newer: bool,
}

impl Generation {
    fn of_host() -> Self {
        let [_, b, _, d] = host(7, 0);
        let [a, ..] = host(7, 1);
        Self {
            avx512: b >> 16 & 1 != 0,
            newer: a & 3 << 4 != 0 || d & 7 << 22 != 0,
        }
    }
}

/// The signature to show, for a host's own. Code made for several processors may be chosen by model alone (GCC's
/// `target_clones` with `arch=`): a guest must not look like a model that always has what it is not shown.
fn signature(own: u32, amd: bool, host: Generation, features: &Features) -> u32 {
    let ice_lake = features.avx512vbmi2
        && features.avx512ifma
        && features.avx512vnni
        && features.avx512bitalg
        && features.avx512vpopcntdq
        && features.gfni
        && features.vaes
        && features.vpclmulqdq;
    match (features.avx512f, amd) {
        _ if !host.avx512 => own,
        (true, _) if !host.newer => own,
        // Zen 4 has BF16.
        (_, true) => ZEN_3,
        (true, false) if ice_lake => ICE_LAKE_X,
        (true, false) => SKYLAKE_X,
        (false, false) => BROADWELL,
    }
}

impl CpuModel {
    /// The most that a VM of `cpus` processors can have, or no more than `baseline`, out of what an engine offers. Vendor,
    /// family, model and caches are the host's, so that software picks the code that suits it; family and model are those of
    /// an older processor where the host's AVX-512 is left out, or what came after it.
    ///
    /// # Errors
    /// The name of a feature of the baseline that is missing.
    pub fn new(offer: &Offer, cpus: u32, baseline: Option<Baseline>) -> Result<Self, &'static str> {
        let (mut features, mut physical_bits) = (offer.features, offer.physical_bits);
        if let Some(baseline) = baseline {
            features = baseline.features();
            if let Some(missing) = features.first_beyond(&offer.features) {
                return Err(missing);
            }
            physical_bits = physical_bits.min(BASELINE_PHYSICAL_BITS);
        }
        let [_, b, c, d] = host(0, 0);
        let caches = (0..CACHES)
            .map(|at| host(4, at))
            .take_while(|cache| cache[EAX] & 31 != 0);
        Ok(Self {
            vendor: [b, c, d],
            signature: signature(host(1, 0)[EAX], is_amd([b, c, d]), Generation::of_host(), &features),
            features,
            arch_capabilities: if features.arch_capabilities {
                offer.arch_capabilities
            } else {
                0
            },
            caches: caches.collect(),
            legacy_caches: [host(0x8000_0005, 0), host(0x8000_0006, 0)],
            components: components(&features),
            physical_bits,
            tsc_khz: offer.tsc_khz,
            cpus,
        })
    }

    /// Whether an engine with this offer can go on with a VM of this model; else the first thing that does not fit, as the
    /// end of the sentence "the VM needs …". The frequency is the engine's to judge: some can scale.
    ///
    /// # Errors
    /// The text.
    pub fn fits(&self, offer: &Offer) -> Result<(), String> {
        if let Some(missing) = self.features.first_beyond(&offer.features) {
            return Err(format!(
                "the processor feature {missing}, which this host's engine does not offer"
            ));
        }
        let immunities = self.arch_capabilities & !offer.arch_capabilities;
        if immunities != 0 {
            return Err(format!(
                "a processor without vulnerabilities that this host's has (IA32_ARCH_CAPABILITIES bits {immunities:#x})"
            ));
        }
        if self.physical_bits > offer.physical_bits {
            return Err(format!(
                "{} bits of physical address, of which this host's processor has {}",
                self.physical_bits, offer.physical_bits
            ));
        }
        if self.components != components(&self.features) {
            return Err("another layout of XSAVE areas than this host's processor has".into());
        }
        Ok(())
    }

    /// True if the vendor is AMD, or one that follows it (Hygon).
    pub fn amd(&self) -> bool {
        is_amd(self.vendor)
    }

    /// Bits that XCR0 may have.
    pub fn xcr0(&self) -> u64 {
        self.components
            .iter()
            .fold(3, |bits, component| bits | 1 << component.bit)
    }

    /// Bytes of a standard-format XSAVE area with these components.
    pub fn xsave_size(&self, components: u64) -> u32 {
        let with = |component: &&Component| components >> component.bit & 1 != 0;
        let ends = self
            .components
            .iter()
            .filter(with)
            .map(|component| component.offset + component.size);
        ends.max().unwrap_or(XSAVE_HEADER_END)
    }

    /// EAX, EBX, ECX and EDX of a leaf for vCPU `index`, with CR4.OSXSAVE clear, XCR0 at its reset value and the local APIC
    /// on. Leaves that do not exist are zero.
    pub fn leaf(&self, index: u32, leaf: u32, subleaf: u32) -> [u32; 4] {
        let features = &self.features;
        let cpus = self.cpus;
        match leaf {
            0 => [LAST_BASIC, self.vendor[0], self.vendor[1], self.vendor[2]],
            1 => {
                let [_, _, c, mut d] = features.words(1, 0);
                let identity = LINE / 8 << 8 | (cpus & 0xff) << 16 | (index & 0xff) << 24;
                d |= u32::from(cpus > 1) << 28;
                [self.signature, identity, c, d]
            }
            // "Leaf 4 has the caches."
            2 if !self.amd() => [0xff01, 0, 0, 0],
            4 => self.cache(subleaf),
            6 => features.words(6, 0),
            7 if subleaf == 0 => features.words(7, 0),
            0xb => {
                // No hyper-threads, one package.
                let (shift, below, level) = match subleaf {
                    0 => (0, 1, 1),
                    1 => (width(cpus), cpus, 2),
                    _ => (0, 0, 0),
                };
                [shift, below, level << 8 | subleaf & 0xff, index]
            }
            0xd if features.xsave => self.xsave(subleaf),
            0x4000_0000 => {
                let [b, c, d, _] = text(SIGNATURE);
                [LAST_HYPERVISOR, b, c, d]
            }
            0x4000_0001 => features.words(leaf, 0),
            0x4000_0010 => [self.tsc_khz as u32, APIC_BUS_KHZ, 0, 0],
            0x8000_0000 => [LAST_EXTENDED, 0, 0, 0],
            0x8000_0001 => {
                let [_, b, c, d] = features.words(leaf, 0);
                [if self.amd() { self.signature } else { 0 }, b, c, d]
            }
            0x8000_0002..=0x8000_0004 => text(&BRAND[(leaf as usize - 0x8000_0002) * 16..]),
            0x8000_0005 | 0x8000_0006 => self.legacy_caches[leaf as usize - 0x8000_0005],
            0x8000_0007 => features.words(leaf, 0),
            0x8000_0008 => {
                // AMD's way to tell the number of cores.
                let cores = if self.amd() { width(cpus) << 12 | (cpus - 1) } else { 0 };
                [self.physical_bits | LINEAR_BITS << 8, 0, cores, 0]
            }
            _ => [0; 4],
        }
    }

    /// All leaves that are not zero, for vCPU `index`: leaf, subleaf, registers.
    pub fn leaves(&self, index: u32) -> Vec<(u32, u32, [u32; 4])> {
        let leaves = (0..=LAST_BASIC)
            .chain([0x4000_0000, 0x4000_0001, LAST_HYPERVISOR])
            .chain(0x8000_0000..=LAST_EXTENDED);
        let subleaves = |leaf| match leaf {
            4 => self.caches.len() as u32 + 1,
            0xb => 3,
            0xd => 64,
            _ => 1,
        };
        leaves
            .flat_map(|leaf| (0..subleaves(leaf)).map(move |subleaf| (leaf, subleaf)))
            .map(|(leaf, subleaf)| (leaf, subleaf, self.leaf(index, leaf, subleaf)))
            .filter(|(leaf, subleaf, words)| *words != [0; 4] || subleaf == &0 && *leaf == 0xb)
            .collect()
    }

    /// Leaf 4: the host's caches, of which the last level is shared by all vCPUs.
    fn cache(&self, subleaf: u32) -> [u32; 4] {
        let Some(&[a, b, c, d]) = self.caches.get(subleaf as usize) else {
            return [0; 4];
        };
        let ids = (1 << width(self.cpus)) - 1;
        let sharing = if a >> 5 & 7 >= 3 { ids } else { 0 };
        [a & 0x3fff | sharing << 14 | ids << 26, b, c, d]
    }

    /// Leaf 0Dh after RESET, when XCR0 has x87 only.
    fn xsave(&self, subleaf: u32) -> [u32; 4] {
        let all = self.xcr0();
        match subleaf {
            0 => [all as u32, XSAVE_HEADER_END, self.xsave_size(all), 0],
            1 => {
                let [a, ..] = self.features.words(0xd, 1);
                // The compacted size is known only with the instructions that make it.
                [a, if a & 0b1010 != 0 { XSAVE_HEADER_END } else { 0 }, 0, 0]
            }
            _ => {
                let component = self
                    .components
                    .iter()
                    .find(|component| u32::from(component.bit) == subleaf);
                component.map_or([0; 4], |component| [component.size, component.offset, 0, 0])
            }
        }
    }
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

#[cfg(test)]
mod tests {
    use super::features::{EBX, ECX, EDX};
    use super::*;

    fn offer() -> Offer {
        Offer {
            features: Features::new(|bit| {
                bit.by == By::Us || bit.by == By::Host && host(bit.leaf, bit.subleaf)[bit.register] >> bit.bit & 1 != 0
            }),
            arch_capabilities: 0x2b,
            physical_bits: 46,
            tsc_khz: 2_000_000,
        }
    }

    fn model(cpus: u32) -> CpuModel {
        CpuModel::new(&offer(), cpus, None).unwrap()
    }

    #[test]
    fn a_guest_looks_like_no_model_that_has_more_than_it_is_shown() {
        const ROCKET_LAKE: u32 = 0x000a_0671;
        const SAPPHIRE_RAPIDS: u32 = 0x0008_06f8;
        const ZEN_4: u32 = 0x00a6_0f12;
        let without = Features::default();
        let whole = Features::new(|bit| bit.name.starts_with("avx512") || bit.leaf == 7);
        let first = Features {
            avx512f: true,
            ..Features::default()
        };
        let host = |avx512, newer| Generation { avx512, newer };
        for (own, amd, host, features, expected) in [
            (ROCKET_LAKE, false, host(true, false), &whole, ROCKET_LAKE),
            (ROCKET_LAKE, false, host(true, false), &without, BROADWELL),
            (SAPPHIRE_RAPIDS, false, host(true, true), &whole, ICE_LAKE_X),
            (SAPPHIRE_RAPIDS, false, host(true, true), &first, SKYLAKE_X),
            (SAPPHIRE_RAPIDS, false, host(true, true), &without, BROADWELL),
            (ZEN_4, true, host(true, true), &whole, ZEN_3),
            (ZEN_4, true, host(true, true), &without, ZEN_3),
            // A host without AVX-512 keeps what it is.
            (0x000b_06f2, false, host(false, true), &without, 0x000b_06f2),
        ] {
            assert_eq!(signature(own, amd, host, features), expected, "{own:x}");
        }
    }

    #[test]
    fn nothing_unlisted_is_shown() {
        let model = model(2);
        for (leaf, subleaf, register) in [(1, 0, ECX), (1, 0, EDX), (7, 0, EBX), (7, 0, ECX), (7, 0, EDX)] {
            let dynamic = if (leaf, register) == (1, EDX) { 1 << 28 } else { 0 };
            let listed = BITS
                .iter()
                .filter(|bit| (bit.leaf, bit.subleaf, bit.register) == (leaf, subleaf, register))
                .fold(dynamic, |bits, bit| bits | 1 << bit.bit);
            assert_eq!(model.leaf(0, leaf, subleaf)[register] & !listed, 0, "leaf {leaf:#x}");
        }
        // Subleaf 0 of leaf 7 says that there are no others.
        assert_eq!(model.leaf(0, 7, 0)[EAX], 0);
        assert_eq!(model.leaf(0, 7, 1), [0; 4]);
    }

    #[test]
    fn a_baseline_has_no_more_than_its_own_and_names_what_is_missing() {
        let mut offer = offer();
        offer.features = Features::new(|_| true);
        let v2 = CpuModel::new(&offer, 1, Some(Baseline::V2)).unwrap();
        assert!(v2.features.sse4_2 && !v2.features.avx && v2.components.is_empty());
        offer.features.popcnt = false;
        assert_eq!(CpuModel::new(&offer, 1, Some(Baseline::V2)), Err("popcnt"));
    }

    #[test]
    fn a_model_fits_where_nothing_is_missing() {
        let (model, mut offer) = (model(1), offer());
        assert_eq!(model.fits(&offer), Ok(()));
        let mut wide = model.clone();
        wide.features.avx512f = true;
        let older = Offer {
            features: offer.features.without_avx512(),
            ..offer.clone()
        };
        assert!(wide.fits(&older).unwrap_err().contains("avx512f"));
        offer.arch_capabilities = 3;
        assert!(model.fits(&offer).unwrap_err().contains("0x28"));
        offer.features.nx = false;
        assert!(model.fits(&offer).unwrap_err().contains("nx"));
    }

    #[test]
    fn a_model_survives_its_encoding() {
        let model = model(3);
        let text = serde_json::to_string(&model).unwrap();
        assert_eq!(serde_json::from_str::<CpuModel>(&text).unwrap(), model);
    }

    #[test]
    fn the_list_of_leaves_has_each_that_is_not_zero() {
        let model = model(2);
        let list = model.leaves(1);
        for (leaf, subleaf, words) in &list {
            assert_eq!(model.leaf(1, *leaf, *subleaf), *words);
        }
        for needed in [0, 1, 7, 0xb, 0x4000_0000, 0x4000_0010, 0x8000_0001, 0x8000_0008] {
            assert!(list.iter().any(|(leaf, ..)| *leaf == needed), "{needed:#x}");
        }
        assert_eq!(&model.leaf(0, 0x4000_0000, 0)[EBX..], &text(SIGNATURE)[..3]);
    }

    #[test]
    fn widths_hold_their_counts() {
        assert_eq!([1, 2, 3, 4, 5, 8].map(width), [0, 1, 2, 2, 3, 3]);
    }
}
