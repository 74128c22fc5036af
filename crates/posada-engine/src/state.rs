//! The portable CPU state: what a VM's processor is between two instructions, whatever engine runs it.

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::RangeBounds;

/// A segment register with its hidden part (Intel SDM 3A, section 3.4.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// An XSAVE area in the standard format (Intel SDM 1, 13.4), with the components' places as the VM's CPU model has them:
/// legacy region (FXSAVE64 layout), header, components. 576 bytes at least.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Xsave(#[serde(serialize_with = "const_hex::serialize", deserialize_with = "area")] Vec<u8>);

impl Xsave {
    /// Bytes of the legacy region.
    pub const LEGACY: usize = 512;
    /// Bytes of legacy region and header.
    pub const HEADER_END: usize = 576;

    /// An area of these bytes; one that is too short is filled up with zeros.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().max(Self::HEADER_END), 0);
        Self(bytes)
    }

    /// After RESET: x87 and SSE as RESET leaves them (Intel SDM 3A, table 10-1), all else zero.
    fn reset() -> Self {
        let mut area = Self::new(Vec::new());
        area.0[..2].copy_from_slice(&0x0040u16.to_le_bytes());
        area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        area.set_xstate_bv(3);
        area
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// x87 and SSE state in the FXSAVE64 layout (Intel SDM 1, section 10.5.1).
    pub fn legacy(&self) -> &[u8; Self::LEGACY] {
        self.0.first_chunk().expect("the legacy region is there")
    }

    /// The same, to change.
    pub fn legacy_mut(&mut self) -> &mut [u8; Self::LEGACY] {
        self.0.first_chunk_mut().expect("the legacy region is there")
    }

    /// Components that the area holds; all others are in their initial state.
    pub fn xstate_bv(&self) -> u64 {
        u64::from_le_bytes(*self.0[Self::LEGACY..].first_chunk().expect("the header is there"))
    }

    /// Says which components the area holds.
    pub fn set_xstate_bv(&mut self, components: u64) {
        self.0[Self::LEGACY..][..8].copy_from_slice(&components.to_le_bytes());
    }
}

/// A local APIC's registers: the page of 1 KiB that the memory-mapped APIC shows (Intel SDM 3A, table 11-1), each register
/// in the first 4 of 16 bytes. In x2APIC mode the ID register holds all 32 bits, and ICR2 the upper half of the ICR. The
/// timer's current count is what was left of it at the moment of the state. Register 290h, which is reserved, has what one
/// engine wants to tell itself; others leave it alone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ApicPage(#[serde(serialize_with = "const_hex::serialize", deserialize_with = "page")] Vec<u8>);

impl ApicPage {
    /// Bytes.
    pub const SIZE: usize = 0x400;

    /// A page of these registers; shorter ones are filled up with zeros, longer ones cut.
    pub fn new(mut registers: Vec<u8>) -> Self {
        registers.resize(Self::SIZE, 0);
        Self(registers)
    }

    /// After RESET (Intel SDM 3A, 11.4.7.1), for the APIC with this id.
    pub fn reset(id: u32) -> Self {
        const MASKED: u32 = 1 << 16;
        let mut page = Self::new(Vec::new());
        page.set(0x20, id << 24);
        page.set(0x30, 0x0005_0014);
        page.set(0xe0, u32::MAX);
        page.set(0xf0, 0xff);
        for entry in (0x320..=0x370).step_by(16) {
            page.set(entry, MASKED);
        }
        page
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// The register at `offset` (a multiple of 16 below [`ApicPage::SIZE`]).
    pub fn get(&self, offset: usize) -> u32 {
        u32::from_le_bytes(*self.0[offset..].first_chunk().expect("the register is there"))
    }

    /// Sets the register at `offset`.
    pub fn set(&mut self, offset: usize, value: u32) {
        self.0[offset..][..4].copy_from_slice(&value.to_le_bytes());
    }
}

fn bytes<'de, D: Deserializer<'de>>(deserializer: D, lengths: impl RangeBounds<usize>) -> Result<Vec<u8>, D::Error> {
    let bytes: Vec<u8> = const_hex::deserialize(deserializer)?;
    if lengths.contains(&bytes.len()) {
        return Ok(bytes);
    }
    Err(D::Error::invalid_length(bytes.len(), &"as many bytes as a processor's"))
}

fn area<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    bytes(deserializer, Xsave::HEADER_END..)
}

fn page<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    bytes(deserializer, ApicPage::SIZE..=ApicPage::SIZE)
}

/// Whether a processor executes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activity {
    /// It does.
    #[default]
    Running,
    /// It has executed HLT and waits for an interrupt.
    Halted,
    /// It waits for INIT, or after INIT for SIPI: a processor other than the first, before its start.
    WaitingForStartup,
}

/// An exception that has been raised and not yet delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingException {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// What is pushed, if this exception pushes something.
    pub error: Option<u32>,
}

/// What has reached a processor and not yet happened (Intel SDM 3A, 6.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// An exception in delivery.
    pub exception: Option<PendingException>,
    /// An external interrupt in delivery: its vector, already in service in the local APIC.
    pub interrupt: Option<u8>,
    /// An NMI waits.
    pub nmi_pending: bool,
    /// NMIs are held until the next IRET.
    pub nmi_blocked: bool,
    /// STI was the last instruction: no interrupt before the next one has run.
    pub sti_shadow: bool,
    /// MOV SS or POP SS was the last instruction: no interrupt and no debug trap before the next one has run.
    pub mov_ss_shadow: bool,
    /// INIT waits, and then a SIPI if there is a vector.
    pub init_pending: bool,
    /// SIPI's vector, if one waits.
    pub startup: Option<u8>,
}

/// A processor between two instructions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// XCR0.
    pub xcr0: u64,
    /// x87 and vector registers.
    pub xsave: Xsave,
    /// Model-specific registers by their number: those of [`crate::msr::PORTABLE`] that the processor has. One that is not
    /// here has its reset value.
    pub msrs: BTreeMap<u32, u64>,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The local APIC. `None`: as RESET leaves it, or unchanged where the processor already runs.
    pub apic: Option<ApicPage>,
    /// Guest TSC minus host TSC scaled to the guest's frequency, modulo 2^64; `None`: unchanged. It means something on this
    /// host only: [`crate::clock::ClockState::resume`] carries it to another.
    pub tsc_offset: Option<u64>,
    /// Whether it executes.
    pub activity: Activity,
    /// What waits for it.
    pub events: Events,
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
            xcr0: 1,
            xsave: Xsave::reset(),
            msrs: BTreeMap::new(),
            apic_base: 0xfee0_0900,
            apic: None,
            tsc_offset: None,
            activity: Activity::Running,
            events: Events::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn areas_and_pages_survive_their_encoding_and_have_their_length() {
        let (area, page) = (Xsave::reset(), ApicPage::reset(3));
        let (as_text, page_text) = (
            serde_json::to_string(&area).unwrap(),
            serde_json::to_string(&page).unwrap(),
        );
        assert_eq!(serde_json::from_str::<Xsave>(&as_text).unwrap(), area);
        assert_eq!(serde_json::from_str::<ApicPage>(&page_text).unwrap(), page);
        assert!(serde_json::from_str::<Xsave>(r#""0x00ff""#).is_err());
        assert!(serde_json::from_str::<ApicPage>(&as_text).is_err());
    }
}
