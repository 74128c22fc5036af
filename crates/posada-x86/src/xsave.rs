//! Saving and restoring vector and x87 state: XSAVE and its family, FXSAVE, XCR0 and MXCSR (Intel SDM 1, chapter 13 and
//! section 10.5). The components are x87, SSE, AVX and the three of AVX-512; IA32_XSS has none.

use crate::core::Core;
use crate::fault::{Exec, vector};
use crate::insn::{Insn, WIDE};
use crate::native::needs;
use std::arch::asm;

pub(crate) mod area;
mod components;

pub(crate) use components::{AVX, AVX512, compacted_size};
use components::{HEADER_END, Part};

/// Component bit of x87 state.
pub const X87: u64 = 1;
/// Component bit of XMM registers.
pub const SSE: u64 = 2;
/// Offset of the header.
const HEADER: u64 = 512;
/// MXCSR bits that exist.
pub const MXCSR_MASK: u32 = 0xffff;

const MXCSR_INITIAL: u32 = 0x1f80;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// Bytes of the legacy region that FXSAVE writes: up to the last XMM register.
const LEGACY: usize = 416;

/// True for a value that XCR0 may have, where there are these components.
pub(crate) fn xcr0_valid(value: u64, components: u64) -> bool {
    let avx512 = match value & AVX512 {
        0 => true,
        AVX512 => value & AVX != 0,
        _ => false,
    };
    value & X87 != 0 && value & (SSE | AVX) != AVX && avx512 && value & !components == 0
}

/// x87 state after FNINIT, in the first 160 bytes of the FXSAVE layout.
fn initial_fx() -> [u8; 160] {
    let mut fx = [0; 160];
    fx[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    fx
}

impl Core {
    /// Those of `components` that are not in their initial state (XINUSE).
    fn xinuse(&self, components: u64) -> u64 {
        let mut x87 = initial_fx();
        // MXCSR and its mask lie here, and are not x87 state.
        x87[24..32].copy_from_slice(&self.vector.fx[24..32]);
        let mut used = self.extended_in_use(components);
        if self.vector.fx[..160] != x87 {
            used |= X87;
        }
        let registers = &self.vector.ymm[..self.vector_registers()];
        if registers.iter().any(|ymm| ymm[..16] != [0; 16]) {
            used |= SSE;
        }
        used & components
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

    /// Bytes of XMM registers that the current mode has, in the legacy region.
    fn xmm_end(&self) -> usize {
        160 + self.vector_registers() * 16
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

    /// Raises what loading a component would.
    fn readable(&mut self, insn: &Insn, linear: u64, part: Part) -> Exec {
        let length = self.bytes_in_mode(part.component);
        self.linear(insn, (part.offset + length) as u64, false)?;
        self.host_range(linear.wrapping_add(part.offset as u64), length as u64, false)?;
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
    save_standard(core, insn, requested, core.xinuse(requested))
}

fn save_standard(core: &mut Core, insn: &Insn, requested: u64, written: u64) -> Exec {
    // All of a component must be possible, also where the mode has but half of it.
    let length = core.standard_size(requested);
    let linear = core.area(insn, length, 64, true)?;
    // Without components it is the header's alone.
    let first = if requested == 0 { HEADER } else { 0 };
    // The header is read too: both must be possible before anything is written.
    core.host_range(linear.wrapping_add(first), length as u64 - first, true)?;
    let mut old = [0; 8];
    core.take(linear.wrapping_add(HEADER), &mut old)?;
    let present = u64::from_le_bytes(old) & !requested | core.xinuse(requested);
    save_legacy(
        core,
        linear,
        written,
        requested & (SSE | AVX) != 0,
        insn.flags & WIDE != 0,
    )?;
    for part in core.standard(written).into_iter().flatten() {
        core.store_component(linear, part)?;
    }
    core.put(linear.wrapping_add(HEADER), &present.to_le_bytes())
}

/// Stores what of the components lies in the legacy region, and MXCSR; the rights were checked.
fn save_legacy(core: &mut Core, linear: u64, components: u64, mxcsr: bool, wide: bool) -> Exec {
    let mut area = [0; LEGACY];
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
    let mut present = core.xinuse(requested);
    // MXCSR belongs to SSE state here.
    if core.vector.mxcsr != MXCSR_INITIAL {
        present |= requested & SSE;
    }
    // All of a component must be possible, also where the mode has but half of it.
    let length = compacted_size(requested);
    let linear = core.area(insn, length, 64, true)?;
    let first = if requested & (X87 | SSE) == 0 { HEADER } else { 0 };
    core.host_range(linear.wrapping_add(first), length as u64 - first, true)?;
    save_legacy(core, linear, present, present & SSE != 0, insn.flags & WIDE != 0)?;
    for part in components::compacted(requested).filter(|part| part.component & present != 0) {
        core.store_component(linear, part)?;
    }
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
    let linear = core.area(insn, HEADER_END, 64, false)?;
    let mut area = [0; HEADER_END];
    core.take(linear, &mut area)?;
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
    let mut parts = [None; 4];
    if compacted {
        for (slot, part) in parts.iter_mut().zip(components::compacted(components)) {
            *slot = Some(part).filter(|part| part.component & load != 0);
        }
    } else {
        parts = core.standard(load);
    }
    for part in parts.iter().flatten() {
        core.readable(insn, linear, *part)?;
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
    if clear & X87 != 0 {
        core.take_x87(&initial_fx(), true);
    }
    if clear & SSE != 0 {
        core.take_xmm(&[0; LEGACY]);
    }
    for component in [AVX, components::OPMASK, components::ZMM_HIGH, components::ZMM] {
        if clear & component != 0 {
            core.clear_component(component);
        }
    }
    for part in parts.into_iter().flatten() {
        core.load_component(linear, part)?;
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
        1 if std::arch::is_x86_feature_detected!("xsavec") => core.xinuse(core.vector.xcr0),
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
mod tests;
