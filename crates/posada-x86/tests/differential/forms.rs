//! Which instruction forms are tested: all that user mode has in 64-bit and compatibility mode with the features that the software CPU offers,
//! less a table of exceptions with their reasons.

use crate::state::area;
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

/// The features that the software CPU offers and that user-mode instructions belong to.
const FEATURES: &[CpuidFeature] = {
    use CpuidFeature::*;
    &[
        INTEL8086,
        INTEL186,
        INTEL286,
        INTEL386,
        INTEL486,
        X64,
        CMOV,
        CX8,
        CMPXCHG16B,
        FPU,
        FPU287,
        FPU387,
        FXSR,
        MMX,
        SSE,
        SSE2,
        SSE3,
        SSSE3,
        SSE4_1,
        SSE4_2,
        AVX,
        AVX2,
        FMA,
        F16C,
        BMI1,
        BMI2,
        ADX,
        AES,
        PCLMULQDQ,
        SHA,
        MOVBE,
        POPCNT,
        LZCNT,
        RDRAND,
        RDSEED,
        FSGSBASE,
        XSAVE,
        XSAVEC,
        XSAVEOPT,
        XSAVES,
        PREFETCHW,
        GFNI,
        VAES,
        VPCLMULQDQ,
        CLFSH,
        CLFLUSHOPT,
        CLWB,
        MULTIBYTENOP,
        PAUSE,
        SYSCALL,
        RDTSCP,
        RDPID,
        TSC,
        MSR,
        RDPMC,
        SEP,
        CPUID,
        INVPCID,
        SMAP,
    ]
};

/// Those beside, if the software CPU shows AVX-512.
const AVX512: &[CpuidFeature] = {
    use CpuidFeature::*;
    &[
        AVX512F,
        AVX512CD,
        AVX512BW,
        AVX512DQ,
        AVX512VL,
        AVX512_IFMA,
        AVX512_VBMI,
        AVX512_VBMI2,
        AVX512_VNNI,
        AVX512_BITALG,
        AVX512_VPOPCNTDQ,
    ]
};

/// Why a form of these mnemonics is not compared.
#[rustfmt::skip]
const SKIPPED: &[(&str, &[Mnemonic])] = {
    use Mnemonic::*;
    &[
        ("enters the kernel of the host", &[Syscall, Sysenter, Sysexit, Sysexitq, Sysret, Sysretq, Int, Int1, Int3, Into]),
        ("its value is the host's own", &[Rdtsc, Rdtscp, Rdpmc, Cpuid, Rdpid, Xgetbv, Rdrand, Rdseed]),
        ("reads the host's descriptor tables", &[Sgdt, Sidt, Sldt, Str, Smsw, Lar, Lsl, Verr, Verw]),
        ("loads descriptors: the bare programs test it", &[Iret, Iretd, Iretq, Retf]),
        ("is no instruction of Intel's processors today", &[Loadall, Umov]),
        ("privileged: the bare programs test it", &[Invpcid, Xsaves, Xsaves64, Xrstors, Xrstors64, Rsm, Xsetbv, Swapgs]),
    ]
};

/// One instruction form.
pub struct Form {
    pub code: Code,
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    pub number: u32,
}

impl Form {
    /// What it is called in reports.
    pub fn name(&self) -> String {
        format!("{:?}{}", self.code, if self.bits == 32 { "@32" } else { "" })
    }
}

/// The forms to test and, with their reasons, those that a table leaves out.
pub fn all() -> (Vec<Form>, Vec<(Code, &'static str)>) {
    let avx512 = if area::avx512() {
        AVX512
    } else {
        println!("forms of AVX-512 are left out: the host's processor has none of it");
        &[]
    };
    let mut skipped = Vec::new();
    let mut forms = Vec::new();
    for (bits, code) in [64, 32]
        .into_iter()
        .flat_map(|bits| Code::values().map(move |code| (bits, code)))
    {
        let info = code.op_code();
        let there = match bits {
            32 => info.mode32() && info.intel_decoder32(),
            _ => info.mode64() && info.intel_decoder64(),
        };
        let user = info.is_instruction()
            && there
            && info.decoder_option() == 0
            && matches!(
                info.encoding(),
                EncodingKind::Legacy | EncodingKind::VEX | EncodingKind::EVEX
            )
            && code
                .cpuid_features()
                .iter()
                .all(|feature| FEATURES.contains(feature) || avx512.contains(feature));
        if !user {
            continue;
        }
        let far = info
            .op_kinds()
            .iter()
            .any(|kind| matches!(kind, OpCodeOperandKind::farbr2_2 | OpCodeOperandKind::farbr4_2));
        let reason = SKIPPED
            .iter()
            .find(|(_, mnemonics)| mnemonics.contains(&code.mnemonic()))
            .map(|(reason, _)| *reason)
            .or((far || code.is_jmp_far_indirect() || code.is_call_far_indirect())
                .then_some("loads descriptors: the bare programs test it"))
            .or(info
                .fwait()
                .then_some("is two instructions: FWAIT and one that is tested by itself"));
        match reason {
            Some(reason) => skipped.push((code, reason)),
            None => forms.push(Form {
                code,
                bits,
                number: code as u32 | (bits & 32) << 11,
            }),
        }
    }
    (forms, skipped)
}
