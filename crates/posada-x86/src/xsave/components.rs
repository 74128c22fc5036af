//! The components beyond the legacy region: where the formats have them, and their registers.

use crate::core::Core;
use crate::fault::Exec;
use std::ops::Range;

/// Component bit of the upper halves of YMM registers.
pub const AVX: u64 = 1 << 2;
/// Component bit of the opmask registers.
pub const OPMASK: u64 = 1 << 5;
/// Component bit of the upper halves of ZMM0-15.
pub const ZMM_HIGH: u64 = 1 << 6;
/// Component bit of ZMM16-31.
pub const ZMM: u64 = 1 << 7;
/// The components of AVX-512: XCR0 has all of them or none.
pub const AVX512: u64 = OPMASK | ZMM_HIGH | ZMM;

/// All of them, in the order in which the compacted format has them.
const EXTENDED: [u64; 4] = [AVX, OPMASK, ZMM_HIGH, ZMM];
/// Bytes of legacy region and header.
pub const HEADER_END: usize = 576;

/// Where a component begins in an area.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub component: u64,
    pub offset: usize,
}

impl Part {
    /// The bytes of all of it.
    pub fn bytes(self) -> Range<usize> {
        self.offset..self.offset + size(self.component)
    }
}

/// Bytes of a component (Intel SDM 1, 13.5).
const fn size(component: u64) -> usize {
    match component {
        AVX => 16 * 16,
        OPMASK => 8 * 8,
        ZMM_HIGH => 16 * 32,
        _ => 16 * 64,
    }
}

/// Those of `components` in the compacted format. None of them is aligned.
pub(super) fn compacted(components: u64) -> impl Iterator<Item = Part> {
    let mut end = HEADER_END;
    let present = EXTENDED
        .into_iter()
        .filter(move |component| components & component != 0);
    present.map(move |component| {
        let part = Part { component, offset: end };
        end = part.bytes().end;
        part
    })
}

/// Bytes of a compacted area with these components.
pub(crate) fn compacted_size(components: u64) -> usize {
    compacted(components).last().map_or(HEADER_END, |part| part.bytes().end)
}

impl Core {
    /// Those of `components` in the standard format, as the VM's CPU model has them.
    pub(super) fn standard(&self, components: u64) -> [Option<Part>; 4] {
        let places = &self.shared.vm().model().components;
        EXTENDED.map(|component| {
            let place = places.iter().find(|place| 1 << place.bit == component)?;
            (components & component != 0).then_some(Part {
                component,
                offset: place.offset as usize,
            })
        })
    }

    /// Bytes of a standard-format area with these components.
    pub(super) fn standard_size(&self, components: u64) -> usize {
        self.shared.vm().model().xsave_size(components) as usize
    }

    /// Those of `components` that are not in their initial state.
    pub(super) fn extended_in_use(&self, components: u64) -> u64 {
        let (state, count) = (&self.vector, self.vector_registers());
        let used = |component| match component {
            AVX => state.ymm[..count].iter().any(|ymm| ymm[16..] != [0; 16]),
            OPMASK => state.opmask != [0; 8],
            ZMM_HIGH => state.zmm_high_used && state.zmm_high[..count].iter().any(|high| *high != [0; 32]),
            // Outside 64-bit mode it is always in its initial state.
            _ => self.bits64() && state.zmm.iter().any(|zmm| *zmm != [0; 64]),
        };
        let asked = EXTENDED.into_iter().filter(|component| components & component != 0);
        asked.filter(|&component| used(component)).sum()
    }

    /// The bytes of a component that the current mode has.
    pub(super) fn bytes_in_mode(&self, component: u64) -> usize {
        match component {
            OPMASK => size(OPMASK),
            ZMM if !self.bits64() => 0,
            ZMM => size(ZMM),
            _ => size(component) / 16 * self.vector_registers(),
        }
    }

    /// Puts a component at the start of `bytes`: as much as there is room for.
    pub(super) fn put_component(&self, component: u64, bytes: &mut [u8]) {
        let state = &self.vector;
        match component {
            AVX => {
                for (ymm, to) in state.ymm.iter().zip(bytes.chunks_exact_mut(16)) {
                    to.copy_from_slice(&ymm[16..]);
                }
            }
            OPMASK => {
                for (mask, to) in state.opmask.iter().zip(bytes.chunks_exact_mut(8)) {
                    to.copy_from_slice(&mask.to_le_bytes());
                }
            }
            ZMM_HIGH => bytes.copy_from_slice(&state.zmm_high.as_flattened()[..bytes.len()]),
            _ => bytes.copy_from_slice(&state.zmm.as_flattened()[..bytes.len()]),
        }
    }

    /// Takes a component from `bytes`: as much as there is.
    pub(super) fn take_component(&mut self, component: u64, bytes: &[u8]) {
        let state = &mut self.vector;
        match component {
            AVX => {
                for (ymm, from) in state.ymm.iter_mut().zip(bytes.chunks_exact(16)) {
                    ymm[16..].copy_from_slice(from);
                }
            }
            OPMASK => {
                for (mask, from) in state.opmask.iter_mut().zip(bytes.chunks_exact(8)) {
                    *mask = u64::from_le_bytes(from.try_into().expect("eight bytes"));
                }
            }
            ZMM_HIGH => {
                state.zmm_high.as_flattened_mut()[..bytes.len()].copy_from_slice(bytes);
                state.zmm_high_used = state.zmm_high.iter().any(|high| *high != [0; 32]);
            }
            _ => state.zmm.as_flattened_mut()[..bytes.len()].copy_from_slice(bytes),
        }
    }

    /// Puts a component into its initial state, as far as the current mode has it.
    pub(super) fn clear_component(&mut self, component: u64) {
        let length = self.bytes_in_mode(component);
        self.take_component(component, &[0; size(ZMM)][..length]);
    }

    /// Stores a component into an area whose rights were checked.
    pub(super) fn store_component(&mut self, linear: u64, part: Part) -> Exec {
        let mut bytes = [0; size(ZMM)];
        let bytes = &mut bytes[..self.bytes_in_mode(part.component)];
        self.put_component(part.component, bytes);
        self.put(linear.wrapping_add(part.offset as u64), bytes)
    }

    /// Loads a component from an area whose rights were checked.
    pub(super) fn load_component(&mut self, linear: u64, part: Part) -> Exec {
        let mut bytes = [0; size(ZMM)];
        let bytes = &mut bytes[..self.bytes_in_mode(part.component)];
        self.take(linear.wrapping_add(part.offset as u64), bytes)?;
        self.take_component(part.component, bytes);
        Ok(())
    }
}
