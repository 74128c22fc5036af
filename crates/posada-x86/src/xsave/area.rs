//! The XSAVE area of the portable state.

use super::{MXCSR_MASK, SSE, X87, initial_fx, mxcsr_of};
use crate::core::Core;
use posada_engine::Xsave;
use posada_engine::cpu::CpuModel;

impl Core {
    /// All of it, whatever the mode, for the portable state: every component that the VM has.
    pub(crate) fn xsave_area(&self) -> Xsave {
        let model = self.shared.vm().model();
        let components = model.xcr0();
        let mut bytes = vec![0; model.xsave_size(components) as usize];
        self.put_x87(&mut bytes, true);
        self.put_mxcsr(&mut bytes);
        for (number, ymm) in self.vector.ymm.iter().enumerate() {
            bytes[160 + number * 16..][..16].copy_from_slice(&ymm[..16]);
        }
        for part in self.standard(components).into_iter().flatten() {
            self.put_component(part.component, &mut bytes[part.bytes()]);
        }
        let mut area = Xsave::new(bytes);
        area.set_xstate_bv(components);
        area
    }

    /// Takes all of an area that [`check`] found good.
    pub(crate) fn set_xsave_area(&mut self, area: &Xsave) {
        let (bytes, present) = (area.bytes(), area.xstate_bv());
        self.vector.fx = [0; 512];
        let initial = initial_fx();
        self.take_x87(if present & X87 != 0 { bytes } else { &initial }, true);
        // As XRSTOR: MXCSR is there whatever is present.
        self.vector.mxcsr = mxcsr_of(bytes);
        self.vector.ymm = [[0; 32]; 16];
        for (number, ymm) in self.vector.ymm.iter_mut().enumerate() {
            if present & SSE != 0 {
                ymm[..16].copy_from_slice(&bytes[160 + number * 16..][..16]);
            }
        }
        (self.vector.zmm_high, self.vector.zmm_high_used) = ([[0; 32]; 16], false);
        (self.vector.zmm, self.vector.opmask) = ([[0; 64]; 16], [0; 8]);
        for part in self.standard(present).into_iter().flatten() {
            self.take_component(part.component, &bytes[part.bytes()]);
        }
    }
}

/// Refuses an area that no processor of `model` could have saved in the standard format.
///
/// # Errors
/// Why not.
pub(crate) fn check(area: &Xsave, model: &CpuModel) -> Result<(), String> {
    let (bytes, present) = (area.bytes(), area.xstate_bv());
    if present & !model.xcr0() != 0 {
        return Err(format!(
            "the XSAVE area has components {present:#x}, of which the processor lacks some"
        ));
    }
    if bytes.len() < model.xsave_size(present) as usize {
        return Err("the XSAVE area is too short for its components".into());
    }
    if bytes[Xsave::LEGACY + 8..Xsave::HEADER_END]
        .iter()
        .any(|&byte| byte != 0)
    {
        return Err("the XSAVE area is not in the standard format".into());
    }
    if mxcsr_of(bytes) & !MXCSR_MASK != 0 {
        return Err("MXCSR has reserved bits set".into());
    }
    Ok(())
}
