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
        F::GFNI => host!("gfni"),
        F::VAES => host!("vaes"),
        F::VPCLMULQDQ => host!("vpclmulqdq"),
        // XCR0 decides besides.
        F::AVX512F => avx512(),
        F::AVX512CD => avx512(),
        F::AVX512BW => avx512(),
        F::AVX512DQ => avx512(),
        F::AVX512VL => avx512(),
        F::AVX512_IFMA => avx512() && host!("avx512ifma"),
        F::AVX512_VBMI => avx512() && host!("avx512vbmi"),
        F::AVX512_VBMI2 => avx512() && host!("avx512vbmi2"),
        F::AVX512_VNNI => avx512() && host!("avx512vnni"),
        F::AVX512_BITALG => avx512() && host!("avx512bitalg"),
        F::AVX512_VPOPCNTDQ => avx512() && host!("avx512vpopcntdq"),
        F::XSAVE => host!("xsave"),
        F::XSAVEOPT => host!("xsaveopt"),
        F::XSAVEC => host!("xsavec"),
        F::XSAVES => host!("xsaves"),
        _ => false,
    }
}

/// AVX-512 as all processors but the very first have it: those lack 128- and 256-bit forms, or opmasks of 64 bits.
fn avx512() -> bool {
    host!("avx512f") && host!("avx512cd") && host!("avx512bw") && host!("avx512dq") && host!("avx512vl")
}
