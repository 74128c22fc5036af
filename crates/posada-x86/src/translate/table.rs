//! For each instruction form, how the translator treats it: a table made once from the names and features of the forms.

use crate::native::{needs, shown};
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};
use std::sync::OnceLock;

/// How a form is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Treatment {
    /// Left to the interpreter.
    Interpret,
    /// General registers, flags, memory.
    Integer,
    /// Vector registers, or a VEX encoding: what it needs of [`crate::core::Core::fpu_blocked`].
    Vector(u8),
    /// PUSH, POP, LEAVE.
    Stack,
    /// Near jumps, calls, returns.
    Control,
    /// The kernel's own.
    System,
    /// No effect.
    Nothing,
}

/// What needs the registers of AVX-512.
const AVX512: [CpuidFeature; 11] = [
    CpuidFeature::AVX512F,
    CpuidFeature::AVX512CD,
    CpuidFeature::AVX512BW,
    CpuidFeature::AVX512DQ,
    CpuidFeature::AVX512VL,
    CpuidFeature::AVX512_IFMA,
    CpuidFeature::AVX512_VBMI,
    CpuidFeature::AVX512_VBMI2,
    CpuidFeature::AVX512_VNNI,
    CpuidFeature::AVX512_BITALG,
    CpuidFeature::AVX512_VPOPCNTDQ,
];

/// The treatment of a form.
pub fn treatment(code: Code) -> Treatment {
    static TABLE: OnceLock<Vec<Treatment>> = OnceLock::new();
    TABLE.get_or_init(|| Code::values().map(classify).collect())[code as usize]
}

fn classify(code: Code) -> Treatment {
    use Mnemonic as M;
    let mnemonic = code.mnemonic();
    let base = |feature: &CpuidFeature| {
        use CpuidFeature as F;
        matches!(
            feature,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CX8
                | F::CMOV
                | F::TSC
                | F::RDTSCP
                | F::SMAP
                | F::MULTIBYTENOP
                | F::CET_IBT
                | F::PREFETCHW
                | F::CMPXCHG16B
        )
    };
    let available = |feature: &CpuidFeature| base(feature) || shown(*feature);
    if !code.cpuid_features().iter().all(available) {
        return Treatment::Interpret;
    }
    let vex = match code.encoding() {
        EncodingKind::Legacy => false,
        EncodingKind::VEX | EncodingKind::EVEX => true,
        _ => return Treatment::Interpret,
    };
    match mnemonic {
        M::Nop
        | M::Endbr64
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Reservednop => return Treatment::Nothing,
        M::Cli | M::Sti | M::Swapgs | M::Stac | M::Clac => return Treatment::System,
        M::Pushfq | M::Rdtsc | M::Rdtscp if shown(CpuidFeature::BMI2) => return Treatment::System,
        M::Push | M::Pop | M::Leave => return Treatment::Stack,
        M::Jmp | M::Call | M::Ret | M::Loop | M::Loope | M::Loopne | M::Jrcxz => return Treatment::Control,
        _ if code.is_jcc_short_or_near() => return Treatment::Control,
        _ if system(code) => return Treatment::Interpret,
        _ if integer(mnemonic) => return Treatment::Integer,
        _ if vex && bits(mnemonic) => return Treatment::Vector(needs::VEX),
        _ => {}
    }
    if vector(code) {
        // VEX encodings too have to do with opmasks.
        let avx512 = code.cpuid_features().iter().any(|feature| AVX512.contains(feature));
        let needed = match vex {
            _ if avx512 => needs::AVX512,
            true => needs::AVX,
            false => needs::SSE,
        };
        return Treatment::Vector(needed);
    }
    Treatment::Interpret
}

/// Forms of integer mnemonics that touch more than registers and memory.
fn system(code: Code) -> bool {
    matches!(
        code,
        Code::Mov_rm16_Sreg
            | Code::Mov_r32m16_Sreg
            | Code::Mov_r64m16_Sreg
            | Code::Mov_Sreg_rm16
            | Code::Mov_Sreg_r32m16
            | Code::Mov_Sreg_r64m16
            | Code::Mov_r32_cr
            | Code::Mov_r64_cr
            | Code::Mov_r32_dr
            | Code::Mov_r64_dr
            | Code::Mov_cr_r32
            | Code::Mov_cr_r64
            | Code::Mov_dr_r32
            | Code::Mov_dr_r64
            | Code::Mov_r32_tr
            | Code::Mov_tr_r32
    )
}

#[rustfmt::skip]
fn integer(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Add | M::Or | M::Adc | M::Sbb | M::And | M::Sub | M::Xor | M::Cmp | M::Test | M::Mov | M::Movzx | M::Movsx
        | M::Movsxd | M::Lea | M::Inc | M::Dec | M::Neg | M::Not | M::Imul | M::Mul | M::Div | M::Idiv | M::Shl | M::Sal
        | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd | M::Bt | M::Bts | M::Btr | M::Btc
        | M::Bsf | M::Bsr | M::Bswap | M::Cbw | M::Cwde | M::Cdqe | M::Cwd | M::Cdq | M::Cqo | M::Cmovo | M::Cmovno
        | M::Cmovb | M::Cmovae | M::Cmove | M::Cmovne | M::Cmovbe | M::Cmova | M::Cmovs | M::Cmovns | M::Cmovp
        | M::Cmovnp | M::Cmovl | M::Cmovge | M::Cmovle | M::Cmovg | M::Seto | M::Setno | M::Setb | M::Setae | M::Sete
        | M::Setne | M::Setbe | M::Seta | M::Sets | M::Setns | M::Setp | M::Setnp | M::Setl | M::Setge | M::Setle
        | M::Setg | M::Xchg | M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b | M::Xadd | M::Lahf | M::Sahf | M::Clc | M::Stc
        | M::Cmc | M::Popcnt | M::Lzcnt | M::Tzcnt | M::Adcx | M::Adox | M::Movbe | M::Crc32 | M::Movnti | M::Lfence
        | M::Mfence | M::Sfence
    )
}

/// Integer instructions in VEX encodings.
fn bits(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
    )
}

/// Vector instructions that touch all of their memory operand and nothing beside their operands.
fn vector(code: Code) -> bool {
    use CpuidFeature as F;
    use Mnemonic as M;
    let odd = matches!(
        code.mnemonic(),
        M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Maskmovq
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Vgatherdps
            | M::Vgatherdpd
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpgatherdd
            | M::Vpgatherdq
            | M::Vpgatherqd
            | M::Vpgatherqq
            | M::Emms
            | M::Fisttp
            | M::Monitor
            | M::Mwait
            | M::Clflush
            | M::Pause
    );
    let features = code.cpuid_features();
    let unit = [
        F::SSE,
        F::SSE2,
        F::SSE3,
        F::SSSE3,
        F::SSE4_1,
        F::SSE4_2,
        F::AVX,
        F::AVX2,
        F::FMA,
        F::F16C,
        F::AES,
        F::PCLMULQDQ,
        F::SHA,
        F::GFNI,
        F::VAES,
        F::VPCLMULQDQ,
    ];
    let known = |feature: &CpuidFeature| unit.contains(feature) || AVX512.contains(feature);
    !odd && features.iter().all(known)
}
