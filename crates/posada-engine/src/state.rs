//! The portable CPU state: what a VM's processor is between two instructions, whatever engine runs it.

/// A segment register with its hidden part (Intel SDM 3A, section 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Access rights as in bits 40-55 of a descriptor, shifted to bit 0: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13,
    /// D/B 14, G 15 (bits 8-11 are zero). A null (unusable) segment has P = 0.
    pub access: u16,
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// General registers, segments, control and debug registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8-R15: the encoding's order.
    pub gprs: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES CS SS DS FS GS: the encoding's order.
    pub segments: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: DescriptorTable,
    /// Interrupt descriptor table register.
    pub idtr: DescriptorTable,
    /// CR0.
    pub cr0: u64,
    /// CR2: the last page fault's linear address.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// DR0-DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// x87 and SSE state in the FXSAVE64 layout (Intel SDM 1, section 10.5.1).
    pub fxsave: [u8; 512],
}

impl CpuState {
    /// The state after RESET (Intel SDM 3A, table 10-1): real mode at F000:FFF0.
    pub fn reset() -> Self {
        let data = Segment {
            selector: 0,
            base: 0,
            limit: 0xffff,
            access: 0x93,
        };
        let mut segments = [data; 6];
        segments[1] = Segment {
            selector: 0xf000,
            base: 0xffff_0000,
            limit: 0xffff,
            access: 0x9b,
        };
        let mut fxsave = [0; 512];
        fxsave[..2].copy_from_slice(&0x0040u16.to_le_bytes());
        fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        Self {
            gprs: [0; 16],
            rip: 0xfff0,
            rflags: 2,
            segments,
            ldtr: Segment {
                access: 0x82,
                limit: 0xffff,
                ..Segment::default()
            },
            tr: Segment {
                access: 0x8b,
                limit: 0xffff,
                ..Segment::default()
            },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            fxsave,
        }
    }
}
