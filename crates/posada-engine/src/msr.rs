//! Model-specific registers that are part of a processor's state (Intel SDM 4; AMD APM 2, appendix A; Linux,
//! Documentation/virt/kvm/x86/msr.rst). Not among them: what [`crate::CpuState`] has a field for, constants, commands, and the
//! TSC itself, which [`crate::clock`] carries.

macro_rules! registers {
    ($($(#[$about:meta])* $name:ident = $number:expr;)*) => {
        $($(#[$about])* pub const $name: u32 = $number;)*

        /// The registers in the order in which they can be set, with their names.
        pub const PORTABLE: &[(u32, &str)] = &[$(($number, stringify!($name)),)*];
    };
}

registers! {
    /// Offset that software gave the TSC. Set before the TSC, which it moves.
    TSC_ADJUST = 0x3b;
    /// Speculation control.
    SPEC_CTRL = 0x48;
    /// SYSENTER's code segment.
    SYSENTER_CS = 0x174;
    /// SYSENTER's stack pointer.
    SYSENTER_ESP = 0x175;
    /// SYSENTER's target.
    SYSENTER_EIP = 0x176;
    /// Machine check: global status.
    MCG_STATUS = 0x17a;
    /// Fast strings and other switches.
    MISC_ENABLE = 0x1a0;
    /// Branch and single-step control.
    DEBUGCTL = 0x1d9;
    /// Memory types of pages.
    PAT = 0x277;
    /// Default memory type.
    MTRR_DEF_TYPE = 0x2ff;
    /// Enabled supervisor components of XSAVES.
    XSS = 0xda0;
    /// SYSCALL's selectors.
    STAR = 0xc000_0081;
    /// SYSCALL's target in 64-bit mode.
    LSTAR = 0xc000_0082;
    /// SYSCALL's target in compatibility mode (AMD).
    CSTAR = 0xc000_0083;
    /// Flags that SYSCALL clears.
    FMASK = 0xc000_0084;
    /// What SWAPGS swaps with GS.base.
    KERNEL_GS_BASE = 0xc000_0102;
    /// What RDTSCP and RDPID give.
    TSC_AUX = 0xc000_0103;
    /// Where KVM's wall clock lies.
    KVM_WALL_CLOCK = 0x4b56_4d00;
    /// Where KVM's clock lies.
    KVM_SYSTEM_TIME = 0x4b56_4d01;
    /// Where the stolen time lies.
    KVM_STEAL_TIME = 0x4b56_4d03;
    /// Where the paravirtual end of interrupt lies.
    KVM_PV_EOI = 0x4b56_4d04;
    /// When the local APIC's timer goes off, in TSC ticks. Set after the local APIC and the TSC.
    TSC_DEADLINE = 0x6e0;
}

/// Fixed-range MTRRs.
pub const MTRR_FIXED: [u32; 11] = [
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f,
];

/// Variable-range MTRRs: base and mask take turns.
pub const MTRR_VARIABLE: std::ops::RangeInclusive<u32> = 0x200..=0x20f;

/// What a register holds after RESET: zero for most. All memory is write-back in the MTRRs, as there is no firmware that would
/// say so later.
pub const fn reset_value(register: u32) -> u64 {
    match register {
        // Fast strings; no branch trace or event sampling.
        MISC_ENABLE => 1 | 1 << 11 | 1 << 12,
        PAT => 0x0007_0406_0007_0406,
        // Enabled, write-back.
        MTRR_DEF_TYPE => 1 << 11 | 6,
        _ => 0,
    }
}

/// The name of a portable register, for people.
pub fn name(register: u32) -> String {
    match PORTABLE.iter().find(|(number, _)| *number == register) {
        Some((_, name)) => (*name).into(),
        None => format!("MSR {register:#x}"),
    }
}
