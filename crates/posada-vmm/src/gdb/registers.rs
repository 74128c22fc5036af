//! Between our CPU state and gdb's registers.

use gdbstub_arch::x86::reg::{X86_64CoreRegs, X86SegmentRegs, X87FpuInternalRegs};
use posada_engine::CpuState;

/// gdb's order of general registers (RAX RBX RCX RDX RSI RDI RBP RSP R8...) as indices of ours.
const GPRS: [usize; 16] = [0, 3, 1, 2, 6, 7, 5, 4, 8, 9, 10, 11, 12, 13, 14, 15];

/// Offsets in the FXSAVE64 image (Intel SDM 1, table 10-2).
mod fx {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
}

fn half(image: &[u8; 512], at: usize) -> u32 {
    u16::from_le_bytes([image[at], image[at + 1]]).into()
}

fn word(image: &[u8; 512], at: usize) -> u32 {
    half(image, at) | half(image, at + 2) << 16
}

/// The tag word of FSAVE, with two bits a register, from FXSAVE's with one (SDM 1, section 10.5.1.1).
fn full_tags(image: &[u8; 512]) -> u32 {
    let top = half(image, fx::FSW) as usize >> 11 & 7;
    (0..8).fold(0, |tags, stack| {
        let register = (top + stack) % 8;
        let at = fx::ST + 16 * stack;
        let exponent = half(image, at + 8) & 0x7fff;
        let (low, high) = (word(image, at), word(image, at + 4));
        let tag = match exponent {
            _ if image[fx::FTW] >> register & 1 == 0 => 3,
            0 if low | high == 0 => 1,
            0 | 0x7fff => 2,
            _ if high >> 31 == 0 => 2,
            _ => 0,
        };
        tags | tag << (2 * register)
    })
}

/// What gdb sees of `state`.
pub(super) fn to_gdb(state: &CpuState) -> X86_64CoreRegs {
    let image = state.xsave.legacy();
    let selector = |index: usize| state.segments[index].selector.into();
    X86_64CoreRegs {
        regs: GPRS.map(|index| state.gprs[index]),
        eflags: state.rflags as u32,
        rip: state.rip,
        segments: X86SegmentRegs {
            es: selector(0),
            cs: selector(1),
            ss: selector(2),
            ds: selector(3),
            fs: selector(4),
            gs: selector(5),
        },
        st: std::array::from_fn(|stack| std::array::from_fn(|byte| image[fx::ST + 16 * stack + byte])),
        fpu: X87FpuInternalRegs {
            fctrl: half(image, fx::FCW),
            fstat: half(image, fx::FSW),
            ftag: full_tags(image),
            fop: half(image, fx::FOP),
            fioff: word(image, fx::FIP),
            fiseg: word(image, fx::FIP + 4),
            fooff: word(image, fx::FDP),
            foseg: word(image, fx::FDP + 4),
        },
        xmm: std::array::from_fn(|register| {
            u128::from_le_bytes(std::array::from_fn(|byte| image[fx::XMM + 16 * register + byte]))
        }),
        mxcsr: word(image, fx::MXCSR),
    }
}

/// Takes over what gdb has changed. Segment registers stay: gdb knows their selectors only.
pub(super) fn from_gdb(state: &mut CpuState, regs: &X86_64CoreRegs) {
    for (index, value) in GPRS.into_iter().zip(regs.regs) {
        state.gprs[index] = value;
    }
    state.rip = regs.rip;
    // Bits 32 and up are reserved.
    state.rflags = regs.eflags.into();
    let image = state.xsave.legacy_mut();
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(fx::FCW, &(regs.fpu.fctrl as u16).to_le_bytes());
    put(fx::FSW, &(regs.fpu.fstat as u16).to_le_bytes());
    let tags = (0..8).fold(0, |tags, register| {
        tags | u8::from(regs.fpu.ftag >> (2 * register) & 3 != 3) << register
    });
    put(fx::FTW, &[tags]);
    put(fx::FOP, &(regs.fpu.fop as u16).to_le_bytes());
    put(fx::FIP, &regs.fpu.fioff.to_le_bytes());
    put(fx::FIP + 4, &regs.fpu.fiseg.to_le_bytes());
    put(fx::FDP, &regs.fpu.fooff.to_le_bytes());
    put(fx::FDP + 4, &regs.fpu.foseg.to_le_bytes());
    for (stack, value) in regs.st.iter().enumerate() {
        put(fx::ST + 16 * stack, value);
    }
    for (register, value) in regs.xmm.iter().enumerate() {
        put(fx::XMM + 16 * register, &value.to_le_bytes());
    }
    put(fx::MXCSR, &regs.mxcsr.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_gdb_reads_and_writes_back_changes_nothing() {
        let mut state = CpuState::reset();
        for (index, register) in state.gprs.iter_mut().enumerate() {
            *register = 0x1111_0000_0000_0000 + index as u64;
        }
        for (at, byte) in state.xsave.legacy_mut()[..416].iter_mut().enumerate() {
            *byte = (at * 7) as u8;
        }
        // Reserved: byte 5, the mask behind MXCSR, and what is above the 80 bits of each x87 register.
        let mut copy = state.clone();
        from_gdb(&mut copy, &to_gdb(&state));
        assert_eq!(copy, state);
        assert_eq!(to_gdb(&state).regs[1], state.gprs[3], "RBX is gdb's second register");
    }

    #[test]
    fn tags_tell_empty_zero_special_and_valid() {
        let mut state = CpuState::reset();
        let image = state.xsave.legacy_mut();
        // TOP = 6: ST0 is register 6.
        image[fx::FSW + 1] = 6 << 3;
        image[fx::FTW] = 0b1100_0001;
        // ST0 = 1.0, ST1 (register 7) = 0, ST2 (register 0) = infinity.
        image[fx::ST + 7..fx::ST + 10].copy_from_slice(&[0x80, 0xff, 0x3f]);
        image[fx::ST + 32 + 7..fx::ST + 32 + 10].copy_from_slice(&[0x80, 0xff, 0x7f]);
        assert_eq!(full_tags(image), 0b01_00_11_11_11_11_11_10);
    }
}
