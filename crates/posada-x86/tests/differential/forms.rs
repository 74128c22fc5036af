//! Which instruction forms are tested: all that 64-bit user mode has with the features that the software CPU offers,
//! less a table of exceptions with their reasons.

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

/// Why a form of these mnemonics is not compared.
#[rustfmt::skip]
const SKIPPED: &[(&str, &[Mnemonic])] = {
    use Mnemonic::*;
    &[
        ("enters the kernel of the host", &[Syscall, Sysenter, Sysexit, Sysexitq, Sysret, Sysretq, Int, Int1, Int3, Into]),
        ("its value is the host's own", &[Rdtsc, Rdtscp, Rdpmc, Cpuid, Rdpid, Xgetbv, Rdrand, Rdseed]),
        ("reads the host's descriptor tables", &[Sgdt, Sidt, Sldt, Str, Smsw, Lar, Lsl, Verr, Verw]),
        ("loads descriptors: the bare programs test it", &[Lds, Les, Lfs, Lgs, Lss, Iret, Iretd, Iretq, Retf]),
        ("is no instruction of 64-bit mode on Intel's processors", &[Loadall, Umov]),
        ("privileged: the bare programs test it", &[Invpcid, Xsaves, Xsaves64, Xrstors, Xrstors64, Rsm, Xsetbv, Swapgs]),
    ]
};

/// One instruction form.
pub struct Form {
    pub code: Code,
    pub number: u32,
}

/// The forms to test and, with their reasons, those that a table leaves out.
pub fn all() -> (Vec<Form>, Vec<(Code, &'static str)>) {
    let mut skipped = Vec::new();
    let mut forms = Vec::new();
    for code in Code::values() {
        let info = code.op_code();
        let user = info.is_instruction()
            && info.mode64()
            && info.intel_decoder64()
            && info.decoder_option() == 0
            && matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
            && code.cpuid_features().iter().all(|feature| FEATURES.contains(feature));
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
                number: code as u32,
            }),
        }
    }
    (forms, skipped)
}
