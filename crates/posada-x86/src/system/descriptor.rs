//! Segment descriptors in the GDT and LDT, and what their rights mean (Intel SDM 3A, sections 3.4.5 and 5).

use crate::core::Core;
use crate::fault::{Exec, vector};
use posada_engine::Segment;

/// The access rights of a segment, by name.
pub(crate) trait Rights {
    /// Descriptor privilege level.
    fn dpl(&self) -> u8;
    /// The segment is present.
    fn present(&self) -> bool;
    /// A code segment.
    fn code(&self) -> bool;
    /// A data segment.
    fn data(&self) -> bool;
    /// A code segment that runs at its caller's privilege level.
    fn conforming(&self) -> bool;
    /// Data, or code that may be read.
    fn readable(&self) -> bool;
    /// Data that may be written.
    fn writable(&self) -> bool;
    /// CS.L: 64-bit code, in long mode.
    fn long(&self) -> bool;
    /// CS.D or SS.B.
    fn big(&self) -> bool;
    /// Type of a system descriptor, `None` for code and data.
    fn system(&self) -> Option<u8>;
}

impl Rights for Segment {
    fn dpl(&self) -> u8 {
        (self.access >> 5 & 3) as u8
    }
    fn present(&self) -> bool {
        self.access & 0x80 != 0
    }
    fn code(&self) -> bool {
        self.access & 0x18 == 0x18
    }
    fn data(&self) -> bool {
        self.access & 0x18 == 0x10
    }
    fn conforming(&self) -> bool {
        self.access & 0x1c == 0x1c
    }
    fn readable(&self) -> bool {
        self.data() || self.access & 0x1a == 0x1a
    }
    fn writable(&self) -> bool {
        self.access & 0x1a == 0x12
    }
    fn long(&self) -> bool {
        self.access & 1 << 13 != 0
    }
    fn big(&self) -> bool {
        self.access & 1 << 14 != 0
    }
    fn system(&self) -> Option<u8> {
        (self.access & 0x10 == 0).then_some((self.access & 15) as u8)
    }
}

/// The error code that names a selector.
pub(crate) fn code_of(selector: u16) -> u32 {
    u32::from(selector & 0xfffc)
}

/// True for the null selector, with any RPL.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// Requested privilege level.
pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A null segment register, as SS may be in 64-bit mode at privilege level `dpl`.
pub(crate) fn null_segment(selector: u16, dpl: u8) -> Segment {
    Segment {
        selector,
        access: u16::from(dpl) << 5,
        ..Segment::default()
    }
}

/// A segment as real and virtual-8086 mode make it, with virtual-8086 mode's rights.
pub(crate) fn segment_8086(selector: u16) -> Segment {
    Segment {
        selector,
        base: u64::from(selector) << 4,
        limit: 0xffff,
        access: 0xf3,
    }
}

/// True for a linear address that 48-bit translation takes.
pub(crate) fn canonical(linear: u64) -> bool {
    (linear as i64) << 16 >> 16 == linear as i64
}

impl Core {
    /// Linear address of a descriptor that [`Core::descriptor_of`] found.
    pub(crate) fn descriptor_linear(&self, selector: u16) -> u64 {
        let base = if selector & 4 == 0 {
            self.gdtr.base
        } else {
            self.ldtr.base
        };
        base.wrapping_add(u64::from(selector & 0xfff8))
    }

    /// The LDT's or TSS's descriptor in the GDT, which has 16 bytes in long mode.
    pub(crate) fn system_descriptor(&mut self, selector: u16) -> Exec<Segment> {
        if selector & 4 != 0 {
            return self.raise_code(vector::GP, code_of(selector));
        }
        let mut segment = self.descriptor_of(selector, vector::GP, 0)?;
        if self.long_mode() {
            if u32::from(selector | 7) + 8 > u32::from(self.gdtr.limit) {
                return self.raise_code(vector::GP, code_of(selector));
            }
            let high = self.load_system::<u64>(self.descriptor_linear(selector).wrapping_add(8))?;
            segment.base |= high << 32;
            // The type field of the upper half must be zero.
            if high >> 40 & 0x1f != 0 || !canonical(segment.base) {
                return self.raise_code(vector::GP, code_of(selector));
            }
        }
        Ok(segment)
    }

    /// Sets the accessed bit of a code or data segment's descriptor.
    pub(crate) fn mark_accessed(&mut self, segment: &mut Segment) -> Exec {
        if segment.access & 1 == 0 {
            self.set_type_bit(segment.selector, 1)?;
            segment.access |= 1;
        }
        Ok(())
    }

    /// Sets a bit of a descriptor's type field, with a locked access as the processor's own.
    pub(crate) fn set_type_bit(&mut self, selector: u16, bit: u8) -> Exec {
        let rights = self.descriptor_linear(selector).wrapping_add(5);
        self.modify_system(rights, |old: u8| (old | bit, ()))
    }

    /// True where segment registers hold paragraphs: real and virtual-8086 mode.
    pub(crate) fn paragraphs(&self) -> bool {
        !self.protected() || self.virtual_8086()
    }
}
