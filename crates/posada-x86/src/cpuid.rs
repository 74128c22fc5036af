//! What CPUID shows: the VM's model, with the bits that follow this processor's registers (Intel SDM 2A, CPUID).
//!
//! Instructions that run on the host are offered only if the host has them. What is wholly our own work (paging, the local
//! APIC, system instructions) does not depend on the host.

use crate::clock;
use crate::core::Core;
use crate::native::shown;
use crate::xsave;
use iced_x86::CpuidFeature;
use posada_engine::cpu::{self, By, Features, Offer};
use std::sync::OnceLock;

const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// What this processor can do on this host: instructions of any other feature raise #UD. It is read once; inside another VM,
/// the host's CPUID takes microseconds.
#[inline]
pub fn features() -> &'static Features {
    static FEATURES: OnceLock<Features> = OnceLock::new();
    FEATURES.get_or_init(|| {
        let features = features_on(cpu::host);
        // A host's kernel may leave the registers off.
        if shown(CpuidFeature::AVX512F) {
            features
        } else {
            features.without_avx512()
        }
    })
}

/// The features on a host whose CPUID `host` reads.
fn features_on(host: impl Fn(u32, u32) -> [u32; 4]) -> Features {
    let features = Features::new(|bit| match bit.by {
        By::Us => true,
        By::Host => host(bit.leaf, bit.subleaf)[bit.register] >> bit.bit & 1 != 0,
    });
    features.with_whole_avx512()
}

/// What a VM on this engine can be shown.
pub fn offer() -> Offer {
    Offer {
        features: *features(),
        arch_capabilities: crate::msr::ARCH_CAPABILITIES_VALUE,
        physical_bits: crate::walk::PHYSICAL_BITS,
        tsc_khz: clock::tsc_khz(),
    }
}

/// EAX, EBX, ECX and EDX of a leaf. Leaves that do not exist are zero.
pub fn cpuid(core: &Core, leaf: u32, subleaf: u32) -> [u32; 4] {
    let model = core.shared.vm().model();
    let mut words = model.leaf(core.shared.index(), leaf, subleaf);
    match (leaf, subleaf) {
        (1, _) => {
            words[ECX] |= u32::from(core.cr[4] & 1 << 18 != 0) << 27;
            if core.apic_disabled() {
                words[EDX] &= !(1 << 9);
            }
        }
        (0xd, 0) if words[EBX] != 0 => words[EBX] = model.xsave_size(core.vector.xcr0),
        (0xd, 1) if words[EBX] != 0 => words[EBX] = xsave::compacted_size(core.vector.xcr0) as u32,
        _ => {}
    }
    words
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

    #[test]
    fn what_runs_on_the_host_needs_the_host() {
        let bare = features_on(|_, _| [0; 4]);
        assert!(bare.fsgsbase && bare.lm && bare.x2apic && bare.nx);
        assert!(!bare.avx && !bare.sse4_2 && !bare.aes && !bare.xsave && !bare.rdrand);
        let full = features_on(|_, _| [u32::MAX; 4]);
        assert!(full.avx2 && full.avx512f);
        // The first processors with AVX-512 had no vectors of 128 and 256 bits.
        let without_vl = features_on(|leaf, _| if leaf == 7 { [!0, !(1 << 31), !0, !0] } else { [!0; 4] });
        assert!(without_vl.avx2 && !without_vl.avx512f && !without_vl.avx512vbmi);
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
            (F::GFNI, shown.gfni),
            (F::VAES, shown.vaes),
            (F::VPCLMULQDQ, shown.vpclmulqdq),
            (F::AVX512F, shown.avx512f),
            (F::AVX512CD, shown.avx512cd),
            (F::AVX512BW, shown.avx512bw),
            (F::AVX512DQ, shown.avx512dq),
            (F::AVX512VL, shown.avx512vl),
            (F::AVX512_IFMA, shown.avx512ifma),
            (F::AVX512_VBMI, shown.avx512vbmi),
            (F::AVX512_VBMI2, shown.avx512vbmi2),
            (F::AVX512_VNNI, shown.avx512vnni),
            (F::AVX512_BITALG, shown.avx512bitalg),
            (F::AVX512_VPOPCNTDQ, shown.avx512vpopcntdq),
            // What CPUID never shows.
            (F::AVX512_FP16, false),
            (F::AVX512_BF16, false),
            (F::AMX_TILE, false),
            (F::RTM, false),
        ] {
            assert_eq!(crate::native::shown(feature), bit, "{feature:?}");
        }
    }

    #[test]
    fn xsave_sizes_follow_xcr0() {
        let mut core = core();
        if !features().avx {
            return;
        }
        let all = core.shared.vm().model().xcr0();
        let whole = core.shared.vm().model().xsave_size(all);
        core.vector.xcr0 = 3;
        assert_eq!(cpuid(&core, 0xd, 0), [all as u32, 576, whole, 0]);
        core.vector.xcr0 = 7;
        assert_eq!(cpuid(&core, 0xd, 0), [all as u32, 832, whole, 0]);
        let compacted = |core: &Core, size: u32| {
            let xsavec = cpuid(core, 0xd, 1)[0] & 2 != 0;
            assert!(!xsavec || cpuid(core, 0xd, 1)[EBX] == size);
        };
        compacted(&core, 832);
        core.vector.xcr0 = all;
        compacted(&core, if all > 7 { 2432 } else { 832 });
        let ends = (2..8)
            .map(|component| cpuid(&core, 0xd, component))
            .map(|[size, offset, ..]| size + offset);
        assert_eq!(ends.max(), Some(whole));
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
        for last in [cpu::LAST_BASIC, cpu::LAST_EXTENDED, cpu::LAST_HYPERVISOR] {
            assert_eq!(cpuid(&core, last + 1, 0), [0; 4]);
        }
        assert_eq!(cpuid(&core, 0x8000_0008, 0)[0], 46 | 48 << 8);
    }
}
