//! Saving and restoring vector and x87 state: XSAVE and its family, FXSAVE, XCR0 and MXCSR (Intel SDM 1, chapter 13 and
//! section 10.5). The components are x87, SSE and AVX; IA32_XSS has none.

use crate::core::Core;
use crate::fault::{Exec, vector};
use crate::insn::{Insn, WIDE};
use crate::native::needs;
use std::arch::asm;

pub(crate) mod area;

/// Component bit of x87 state.
pub const X87: u64 = 1;
/// Component bit of XMM registers.
pub const SSE: u64 = 2;
/// Component bit of the upper halves of YMM registers.
pub const AVX: u64 = 4;
/// Offset of the header.
const HEADER: u64 = 512;
/// Bytes of the legacy region and the header.
pub const HEADER_END: usize = 576;
/// Offset of AVX state in bytes, in both formats.
pub const AVX_OFFSET: usize = 576;
/// Bytes of AVX state.
pub const AVX_SIZE: usize = 256;
/// Bytes of all components.
pub const SIZE: usize = AVX_OFFSET + AVX_SIZE;
/// MXCSR bits that exist.
pub const MXCSR_MASK: u32 = 0xffff;

const MXCSR_INITIAL: u32 = 0x1f80;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// Bytes of the legacy region that FXSAVE writes: up to the last XMM register.
const LEGACY: usize = 416;

/// True for a value that XCR0 may have, where there are these components.
pub(crate) fn xcr0_valid(value: u64, components: u64) -> bool {
    value & X87 != 0 && value & (SSE | AVX) != AVX && value & !components == 0
}

/// Bytes of a standard-format area with these components.
pub fn size_of_components(components: u64) -> usize {
    if components & AVX != 0 { SIZE } else { HEADER_END }
}

/// x87 state after FNINIT, in the first 160 bytes of the FXSAVE layout.
fn initial_fx() -> [u8; 160] {
    let mut fx = [0; 160];
    fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    fx
}

impl Core {
    /// Components that are not in their initial state (XINUSE).
    pub fn xinuse(&self) -> u64 {
        let registers = &self.vector.ymm[..self.vector_registers()];
        let used = |part: std::ops::Range<usize>| registers.iter().any(|ymm| ymm[part.clone()] != [0; 16]);
        let mut x87 = initial_fx();
        // MXCSR and its mask lie here, and are not x87 state.
        x87[24..32].copy_from_slice(&self.vector.fx[24..32]);
        let mut components = 0;
        if self.vector.fx[..160] != x87 {
            components |= X87;
        }
        if used(0..16) {
            components |= SSE;
        }
        if used(16..32) {
            components |= AVX;
        }
        components
    }

    /// Puts x87 state into a legacy region. Without `wide`, pointers have 32 bits, and selectors that are always zero.
    fn put_x87(&self, area: &mut [u8], wide: bool) {
        area[..24].copy_from_slice(&self.vector.fx[..24]);
        area[32..160].copy_from_slice(&self.vector.fx[32..160]);
        if !wide {
            area[12..16].fill(0);
            area[20..24].fill(0);
        }
    }

    fn take_x87(&mut self, area: &[u8], wide: bool) {
        self.vector.fx[..24].copy_from_slice(&area[..24]);
        self.vector.fx[32..160].copy_from_slice(&area[32..160]);
        if !wide {
            self.vector.fx[12..16].fill(0);
            self.vector.fx[20..24].fill(0);
        }
        normalize(&mut self.vector.fx);
    }

    fn put_mxcsr(&self, area: &mut [u8]) {
        area[24..28].copy_from_slice(&self.vector.mxcsr.to_le_bytes());
        area[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    }

    fn put_xmm(&self, area: &mut [u8]) {
        for (number, ymm) in self.vector.ymm[..self.vector_registers()].iter().enumerate() {
            area[160 + number * 16..][..16].copy_from_slice(&ymm[..16]);
        }
    }

    fn take_xmm(&mut self, area: &[u8]) {
        let count = self.vector_registers();
        for (number, ymm) in self.vector.ymm[..count].iter_mut().enumerate() {
            ymm[..16].copy_from_slice(&area[160 + number * 16..][..16]);
        }
    }

    fn put_upper(&self, area: &mut [u8]) {
        for (number, ymm) in self.vector.ymm[..self.vector_registers()].iter().enumerate() {
            area[number * 16..][..16].copy_from_slice(&ymm[16..]);
        }
    }

    fn take_upper(&mut self, area: &[u8]) {
        let count = self.vector_registers();
        for (number, ymm) in self.vector.ymm[..count].iter_mut().enumerate() {
            ymm[16..].copy_from_slice(&area[number * 16..][..16]);
        }
    }

    /// Bytes of XMM registers that the current mode has, in the legacy region.
    fn xmm_end(&self) -> usize {
        160 + self.vector_registers() * 16
    }

    fn upper_end(&self) -> usize {
        AVX_OFFSET + self.vector_registers() * 16
    }

    /// Address of an area of `bytes` bytes, all checked.
    fn area(&mut self, insn: &Insn, bytes: usize, align: u64, write: bool) -> Exec<u64> {
        let linear = self.linear(insn, bytes as u64, write)?;
        // A non-canonical address, which through SS is #SS, counts before a misaligned one.
        if self.bits64() && (linear as i64) << 16 >> 16 != linear as i64 {
            self.load::<u8>(linear)?;
        }
        if linear & (align - 1) != 0 {
            return self.general_protection();
        }
        Ok(linear)
    }

    /// Stores a part of an area whose rights were checked.
    fn put(&mut self, linear: u64, data: &[u8]) -> Exec {
        match self.host_range(linear, data.len() as u64, true)? {
            // SAFETY: the range is guest RAM, writable, without code.
            Some(place) => unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), place, data.len()) },
            None => self.store_bytes(linear, data)?,
        }
        Ok(())
    }

    /// Loads a part of an area.
    fn take(&mut self, linear: u64, data: &mut [u8]) -> Exec {
        match self.host_range(linear, data.len() as u64, false)? {
            // SAFETY: the range is guest RAM.
            Some(place) => unsafe { std::ptr::copy_nonoverlapping(place, data.as_mut_ptr(), data.len()) },
            None => self.load_bytes(linear, data)?,
        }
        Ok(())
    }

    /// Replaces MXCSR.
    fn set_mxcsr(&mut self, value: u32) -> Exec {
        if value & !MXCSR_MASK != 0 {
            return self.general_protection();
        }
        self.vector.mxcsr = value;
        Ok(())
    }

    /// The checks that XSAVE and its family share; RFBM.
    fn requested(&mut self) -> Exec<u64> {
        // CR4.OSXSAVE, CR0.TS.
        if self.cr[4] & 1 << 18 == 0 {
            return self.raise(vector::UD);
        }
        if self.cr[0] & 1 << 3 != 0 {
            return self.raise(vector::NM);
        }
        let mask = self.regs[0] & 0xffff_ffff | self.regs[2] << 32;
        Ok(mask & self.vector.xcr0)
    }
}

/// Lets the host's processor make of an x87 image what it would keep of it: reserved bits, summary bits.
pub(crate) fn normalize(fx: &mut [u8; 512]) {
    #[repr(align(16))]
    struct Image([u8; 512]);
    let mut image = Image(*fx);
    image.0[24..28].copy_from_slice(&MXCSR_INITIAL.to_le_bytes());
    // SAFETY: the image is aligned and its MXCSR the host's own; FNINIT leaves the x87 unit as Rust expects it.
    unsafe {
        asm!(
            "fxrstor64 [{image}]", "fxsave64 [{image}]", "fninit",
            image = in(reg) image.0.as_mut_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
            out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
            out("xmm13") _, out("xmm14") _, out("xmm15") _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
            out("st(6)") _, out("st(7)") _,
            options(nostack)
        );
    }
    fx[..24].copy_from_slice(&image.0[..24]);
    fx[32..160].copy_from_slice(&image.0[32..160]);
}

/// LDMXCSR and VLDMXCSR.
pub fn ldmxcsr<const VEX: bool>(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(if VEX { needs::AVX } else { needs::SSE }, false)?;
    let linear = core.linear(insn, 4, false)?;
    let value = core.load(linear)?;
    core.set_mxcsr(value)
}

/// STMXCSR and VSTMXCSR.
pub fn stmxcsr<const VEX: bool>(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(if VEX { needs::AVX } else { needs::SSE }, false)?;
    let linear = core.linear(insn, 4, true)?;
    core.store(linear, core.vector.mxcsr)
}

/// FXSAVE and FXSAVE64.
pub fn fxsave(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::X87, false)?;
    let linear = core.area(insn, 512, 16, true)?;
    core.host_range(linear, 512, true)?;
    let mut area = [0; LEGACY];
    core.put_x87(&mut area, insn.flags & WIDE != 0);
    core.put_mxcsr(&mut area);
    core.put_xmm(&mut area);
    core.put(linear, &area[..core.xmm_end()])
}

/// FXRSTOR and FXRSTOR64.
pub fn fxrstor(core: &mut Core, insn: &Insn) -> Exec {
    core.permit(needs::X87, false)?;
    let linear = core.area(insn, 512, 16, false)?;
    let mut area = [0; 512];
    core.take(linear, &mut area)?;
    core.set_mxcsr(mxcsr_of(&area))?;
    core.take_x87(&area, insn.flags & WIDE != 0);
    core.take_xmm(&area);
    Ok(())
}

fn mxcsr_of(area: &[u8]) -> u32 {
    u32::from_le_bytes(area[24..28].try_into().expect("four bytes"))
}

fn header(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(area[512 + at * 8..][..8].try_into().expect("eight bytes"))
}

/// XSAVE.
pub fn xsave(core: &mut Core, insn: &Insn) -> Exec {
    let requested = core.requested()?;
    save_standard(core, insn, requested, requested)
}

/// XSAVEOPT: leaves out what is in its initial state.
pub fn xsaveopt(core: &mut Core, insn: &Insn) -> Exec {
    let requested = core.requested()?;
    save_standard(core, insn, requested, requested & core.xinuse())
}

fn save_standard(core: &mut Core, insn: &Insn, requested: u64, written: u64) -> Exec {
    // All of AVX state must be possible, also where the mode has but half of it.
    let length = size_of_components(requested);
    let linear = core.area(insn, length, 64, true)?;
    // Without components it is the header's alone.
    let first = if requested == 0 { HEADER } else { 0 };
    // The header is read too: both must be possible before anything is written.
    core.host_range(linear.wrapping_add(first), length as u64 - first, true)?;
    let mut old = [0; 8];
    core.take(linear.wrapping_add(HEADER), &mut old)?;
    let present = u64::from_le_bytes(old) & !requested | core.xinuse() & requested;
    save(
        core,
        linear,
        written,
        requested & (SSE | AVX) != 0,
        insn.flags & WIDE != 0,
    )?;
    core.put(linear.wrapping_add(HEADER), &present.to_le_bytes())
}

/// Stores components, and MXCSR, at their places; the rights were checked.
fn save(core: &mut Core, linear: u64, components: u64, mxcsr: bool, wide: bool) -> Exec {
    let mut area = [0; SIZE];
    if components & X87 != 0 {
        core.put_x87(&mut area, wide);
        core.put(linear, &area[..24])?;
        core.put(linear.wrapping_add(32), &area[32..160])?;
    }
    if mxcsr {
        core.put_mxcsr(&mut area);
        core.put(linear.wrapping_add(24), &area[24..32])?;
    }
    if components & SSE != 0 {
        core.put_xmm(&mut area);
        core.put(linear.wrapping_add(160), &area[160..core.xmm_end()])?;
    }
    if components & AVX != 0 {
        core.put_upper(&mut area[AVX_OFFSET..]);
        core.put(
            linear.wrapping_add(AVX_OFFSET as u64),
            &area[AVX_OFFSET..core.upper_end()],
        )?;
    }
    Ok(())
}

/// XSAVEC.
pub fn xsavec(core: &mut Core, insn: &Insn) -> Exec {
    let requested = core.requested()?;
    save_compacted(core, insn, requested)
}

/// XSAVES.
pub fn xsaves(core: &mut Core, insn: &Insn) -> Exec {
    let requested = core.requested()?;
    if core.cpl != 0 {
        return core.general_protection();
    }
    save_compacted(core, insn, requested)
}

fn save_compacted(core: &mut Core, insn: &Insn, requested: u64) -> Exec {
    let mut present = requested & core.xinuse();
    // MXCSR belongs to SSE state here.
    if core.vector.mxcsr != MXCSR_INITIAL {
        present |= requested & SSE;
    }
    // All of AVX state must be possible, also where the mode has but half of it.
    let length = size_of_components(requested);
    let linear = core.area(insn, length, 64, true)?;
    let first = if requested & (X87 | SSE) == 0 { HEADER } else { 0 };
    core.host_range(linear.wrapping_add(first), length as u64 - first, true)?;
    save(core, linear, present, present & SSE != 0, insn.flags & WIDE != 0)?;
    core.put(linear.wrapping_add(HEADER), &present.to_le_bytes())?;
    core.put(linear.wrapping_add(HEADER + 8), &(requested | COMPACTED).to_le_bytes())
}

/// XRSTOR.
pub fn xrstor(core: &mut Core, insn: &Insn) -> Exec {
    let requested = core.requested()?;
    restore(core, insn, requested, false)
}

/// XRSTORS: only the compacted format.
pub fn xrstors(core: &mut Core, insn: &Insn) -> Exec {
    let requested = core.requested()?;
    if core.cpl != 0 {
        return core.general_protection();
    }
    restore(core, insn, requested, true)
}

fn restore(core: &mut Core, insn: &Insn, requested: u64, only_compacted: bool) -> Exec {
    let length = if requested & AVX != 0 {
        core.upper_end()
    } else {
        HEADER_END
    };
    let linear = core.area(insn, length, 64, false)?;
    let mut area = [0; SIZE];
    core.take(linear, &mut area[..HEADER_END])?;
    let (present, format) = (header(&area, 0), header(&area, 1));
    let compacted = format & COMPACTED != 0;
    let components = format & !COMPACTED;
    let reserved = (2..8).any(|at| header(&area, at) != 0 && (compacted || at == 2));
    let good = if compacted {
        components & !core.vector.xcr0 == 0 && present & !components == 0
    } else {
        !only_compacted && format == 0 && present & !core.vector.xcr0 == 0
    };
    if !good || reserved {
        return core.general_protection();
    }
    let (load, clear) = (requested & present, requested & !present);
    if load & AVX != 0 {
        let end = core.upper_end();
        core.take(linear.wrapping_add(AVX_OFFSET as u64), &mut area[AVX_OFFSET..end])?;
    }
    // MXCSR belongs to SSE state in the compacted format, and to SSE or AVX, whatever is present, in the other.
    let mxcsr = if compacted { load & SSE } else { requested & (SSE | AVX) };
    if mxcsr != 0 {
        core.set_mxcsr(mxcsr_of(&area))?;
    } else if compacted && clear & SSE != 0 {
        core.vector.mxcsr = MXCSR_INITIAL;
    }
    if load & X87 != 0 {
        core.take_x87(&area, insn.flags & WIDE != 0);
    }
    if load & SSE != 0 {
        core.take_xmm(&area);
    }
    if load & AVX != 0 {
        core.take_upper(&area[AVX_OFFSET..]);
    }
    if clear & X87 != 0 {
        core.take_x87(&initial_fx(), true);
    }
    if clear & SSE != 0 {
        core.take_xmm(&[0; LEGACY]);
    }
    if clear & AVX != 0 {
        core.take_upper(&[0; AVX_SIZE]);
    }
    Ok(())
}

/// XGETBV.
pub fn xgetbv(core: &mut Core, _: &Insn) -> Exec {
    if core.cr[4] & 1 << 18 == 0 {
        return core.raise(vector::UD);
    }
    let value = match core.regs[1] as u32 {
        0 => core.vector.xcr0,
        1 if std::arch::is_x86_feature_detected!("xsavec") => core.vector.xcr0 & core.xinuse(),
        _ => return core.general_protection(),
    };
    core.regs[0] = value & 0xffff_ffff;
    core.regs[2] = value >> 32;
    Ok(())
}

/// XSETBV.
pub fn xsetbv(core: &mut Core, _: &Insn) -> Exec {
    if core.cr[4] & 1 << 18 == 0 {
        return core.raise(vector::UD);
    }
    let value = core.regs[0] & 0xffff_ffff | core.regs[2] << 32;
    let valid = xcr0_valid(value, core.shared.vm().model().xcr0());
    if core.cpl != 0 || core.regs[1] as u32 != 0 || !valid {
        return core.general_protection();
    }
    core.vector.xcr0 = value;
    core.update_mode();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::Core;
    use crate::insn::{Handler, ZERO};
    use crate::mmu::tests::core as bare_core;

    fn supported(core: &Core) -> u64 {
        core.shared.vm().model().xcr0()
    }

    /// A core with XSAVE enabled and every component in use.
    fn core() -> Core {
        let mut core = bare_core();
        core.cr[4] |= 3 << 9 | 1 << 18;
        core.vector.xcr0 = supported(&core);
        core.update_mode();
        core.vector.fx[..5].copy_from_slice(&[0x7f, 3, 0, 0x38, 0x80]);
        core.vector.fx[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
        core.vector.ymm = std::array::from_fn(|register| std::array::from_fn(|at| (register * 32 + at) as u8));
        core.vector.mxcsr = 0x1fa0;
        core
    }

    /// Runs a handler on the area at `at`, with EDX:EAX as the mask.
    fn run(core: &mut Core, exec: Handler, at: u32, mask: u64) -> Exec {
        (core.regs[0], core.regs[2]) = (mask & 0xffff_ffff, mask >> 32);
        let insn = Insn {
            exec,
            imm: 0,
            disp: at as i32,
            length: 4,
            reg: 0,
            rm: 0,
            base: ZERO,
            index: ZERO,
            scale: 0,
            segment: 3,
            flags: WIDE,
            extra: 0,
        };
        exec(core, &insn)
    }

    fn fault(core: &mut Core, exec: Handler, at: u32, mask: u64) -> u8 {
        run(core, exec, at, mask).expect_err("a fault");
        core.raised.vector
    }

    fn clear(core: &mut Core) {
        let empty = bare_core();
        core.vector.fx = empty.vector.fx;
        (core.vector.ymm, core.vector.mxcsr) = ([[0; 32]; 16], 0x1f80);
    }

    #[test]
    fn every_format_brings_all_state_back() {
        let formats: [(Handler, Handler); 5] = [
            (xsave, xrstor),
            (xsaveopt, xrstor),
            (xsavec, xrstor),
            (xsaves, xrstors),
            (fxsave, fxrstor),
        ];
        for (number, (save, restore)) in formats.into_iter().enumerate() {
            let mut core = core();
            let before = core.vector.clone();
            // Over a page border.
            run(&mut core, save, 0xe00, !0).unwrap();
            clear(&mut core);
            run(&mut core, restore, 0xe00, !0).unwrap();
            assert_eq!(
                (core.vector.mxcsr, &core.vector.fx[..160]),
                (before.mxcsr, &before.fx[..160]),
                "{number}"
            );
            let kept = if number == 4 { 16 } else { 32 };
            for (ours, theirs) in core.vector.ymm.iter().zip(&before.ymm) {
                assert_eq!(ours[..kept], theirs[..kept], "{number}");
            }
        }
    }

    #[test]
    fn components_that_are_absent_become_initial() {
        let mut core = core();
        core.vector.ymm.iter_mut().for_each(|ymm| ymm[16..].fill(0));
        let in_use = core.xinuse();
        assert_eq!(in_use, X87 | SSE);
        run(&mut core, xsave, 0x400, !0).unwrap();
        assert_eq!((core.load(0x600), core.load(0x608)), (Ok(in_use), Ok(0u64)));
        run(&mut core, xsavec, 0x800, !0).unwrap();
        assert_eq!(
            (core.load(0xa00), core.load(0xa08)),
            (Ok(in_use), Ok(COMPACTED | supported(&core)))
        );
        // XSAVE keeps the bits of what it was not asked for.
        run(&mut core, xsave, 0x400, X87).unwrap();
        assert_eq!(core.load(0x600), Ok(in_use));
        // Nothing but x87 is there: the rest is initial, but MXCSR only if compacted.
        core.store(0x600, X87).unwrap();
        core.store(0xa00, X87).unwrap();
        core.vector.mxcsr = 0x1f81;
        run(&mut core, xrstor, 0x400, !0).unwrap();
        assert_eq!((core.vector.mxcsr, core.vector.ymm), (0x1fa0, [[0; 32]; 16]));
        core.vector.ymm[3][0] = 1;
        run(&mut core, xrstor, 0x800, AVX).unwrap();
        assert_eq!((core.vector.mxcsr, core.vector.ymm[3][0]), (0x1fa0, 1));
        run(&mut core, xrstor, 0x800, !0).unwrap();
        assert_eq!((core.vector.mxcsr, core.vector.ymm[3][0]), (0x1f80, 0));
        assert_eq!(core.xinuse(), X87);
        core.store(0x600, 0u64).unwrap();
        run(&mut core, xrstor, 0x400, X87).unwrap();
        assert_eq!(core.vector.fx[..24], initial_fx()[..24]);
        assert_eq!(core.xinuse(), 0);
    }

    #[test]
    fn without_components_only_the_header_is_written() {
        let mut core = core();
        // Linear page 0 is no more.
        core.physical_write(0x4000, &[0; 8]);
        core.mmu.flush();
        for (exec, mask) in [(xsave as Handler, 0), (xsavec, 0), (xsavec, AVX)] {
            run(&mut core, exec, 0xe00, mask).unwrap();
            assert_eq!(core.load::<u64>(0x1000), Ok(mask));
        }
        for (exec, mask) in [(xsave as Handler, X87), (xsave, AVX), (xsavec, SSE)] {
            assert_eq!(fault(&mut core, exec, 0xe00, mask), vector::PF);
            // Up to the last byte of all.
            assert_eq!(fault(&mut core, exec, 0u32.wrapping_sub(64), mask), vector::PF);
        }
    }

    #[test]
    fn bad_areas_change_nothing() {
        let mut core = core();
        let before = core.vector.clone();
        assert_eq!(fault(&mut core, xsave, 0x420, !0), vector::GP, "64 bytes");
        assert_eq!(fault(&mut core, fxsave, 0x408, !0), vector::GP, "16 bytes");
        assert_eq!(fault(&mut core, xsave, 0x1e00, !0), vector::PF);
        assert_eq!(core.load(0x1e00), Ok(0u64), "all or nothing");
        run(&mut core, xsave, 0x400, !0).unwrap();
        for (at, value) in [(0x600, 1u64 << 3), (0x608, 1), (0x610, 1), (0x608, COMPACTED | X87)] {
            let old: u64 = core.load(at).unwrap();
            core.store(at, value).unwrap();
            assert_eq!(fault(&mut core, xrstor, 0x400, !0), vector::GP, "{at:x}");
            core.store(at, old).unwrap();
        }
        assert_eq!(fault(&mut core, xrstors, 0x400, !0), vector::GP, "not compacted");
        core.store(0x418, 0x1_0000u32).unwrap();
        assert_eq!(fault(&mut core, xrstor, 0x400, !0), vector::GP, "MXCSR");
        assert_eq!(fault(&mut core, fxrstor, 0x400, !0), vector::GP, "MXCSR");
        assert_eq!(core.vector.ymm, before.ymm);
        core.cr[0] |= 8;
        core.update_mode();
        assert_eq!(fault(&mut core, xsave, 0x400, !0), vector::NM);
        core.cr[4] &= !(1 << 18);
        assert_eq!(fault(&mut core, xsave, 0x400, !0), vector::UD);
    }

    #[test]
    fn xcr0_takes_what_exists_and_belongs_together() {
        let mut core = core();
        core.regs[1] = 0;
        for bad in [0, SSE, X87 | AVX, X87 | 8, 1 << 63 | X87] {
            assert_eq!(fault(&mut core, xsetbv, 0, bad), vector::GP, "{bad:x}");
        }
        run(&mut core, xsetbv, 0, X87 | SSE).unwrap();
        run(&mut core, xgetbv, 0, 0).unwrap();
        assert_eq!((core.regs[0], core.regs[2], core.fpu_blocked & 2), (3, 0, 2));
        core.regs[1] = 1;
        core.vector.ymm = [[0; 32]; 16];
        run(&mut core, xgetbv, 0, 0).unwrap();
        assert_eq!(core.regs[0], X87);
        core.segments[crate::core::seg::SS].access = 0xf3;
        core.update_mode();
        core.regs[1] = 0;
        assert_eq!(fault(&mut core, xsetbv, 0, X87), vector::GP);
    }
}
