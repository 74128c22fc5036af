//! Which of the host's instructions guests are shown.

use iced_x86::CpuidFeature;
use std::arch::is_x86_feature_detected as host;

/// True if CPUID shows `feature` to guests: it is one that this processor implements, and the host has it.
pub fn shown(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::FPU | F::FPU287 | F::FPU387 | F::CMOV | F::MMX | F::FXSR | F::SSE | F::SSE2 | F::CLFSH => true,
        // Without them, the host runs BSF and BSR, as the guest's processor would.
        F::LZCNT | F::BMI1 => true,
        F::SSE3 => host!("sse3"),
        F::SSSE3 => host!("ssse3"),
        F::SSE4_1 => host!("sse4.1"),
        F::SSE4_2 => host!("sse4.2"),
        F::POPCNT => host!("popcnt"),
        F::AES => host!("aes"),
        F::PCLMULQDQ => host!("pclmulqdq"),
        F::SHA => host!("sha"),
        F::MOVBE => host!("movbe"),
        F::BMI2 => host!("bmi2"),
        F::ADX => host!("adx"),
        F::AVX => host!("avx"),
        F::AVX2 => host!("avx2"),
        F::F16C => host!("f16c"),
        F::FMA => host!("fma"),
        F::XSAVE => host!("xsave"),
        F::XSAVEOPT => host!("xsaveopt"),
        F::XSAVEC => host!("xsavec"),
        F::XSAVES => host!("xsaves"),
        _ => false,
    }
}
