//! A case (what goes in) and its outcome (what comes out), plain bytes that both processes share.

/// Offsets in a standard-format XSAVE area (Intel SDM 1, 13.4).
pub mod area {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    /// Opcode, instruction pointer and data pointer of the last x87 instruction.
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const HEADER: usize = 512;
    pub const YMM_HIGH: usize = 576;
    /// The most bytes that any processor's has with the components here.
    pub const SIZE: usize = 2688;

    use std::arch::x86_64::__cpuid_count;
    use std::sync::OnceLock;

    /// The software CPU shows AVX-512, and so the host has it.
    pub fn avx512() -> bool {
        posada_x86::cpuid::features().avx512f
    }

    /// Components that cases fill and compare.
    pub fn components() -> u8 {
        if avx512() { 0xe7 } else { 7 }
    }

    /// Where the host's processor has the opmasks, the upper halves of ZMM0-15, and ZMM16-31.
    pub fn places() -> [usize; 3] {
        static PLACES: OnceLock<[usize; 3]> = OnceLock::new();
        *PLACES.get_or_init(|| [5, 6, 7].map(|component| __cpuid_count(0xd, component).ebx as usize))
    }

    /// Bytes in use.
    pub fn used() -> usize {
        if avx512() { places()[2] + 1024 } else { 832 }
    }
}

/// Segment registers in [`State::selectors`].
pub const SELECTORS: [&str; 4] = ["es", "ds", "fs", "gs"];

/// What user mode can see of a processor.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct State {
    /// x87, SSE and AVX state.
    pub area: [u8; area::SIZE],
    /// RAX-R15, the encoding's order.
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub selectors: [u16; 4],
}

impl State {
    pub const ZERO: Self = Self {
        area: [0; area::SIZE],
        gpr: [0; 16],
        rip: 0,
        rflags: 0,
        fs_base: 0,
        gs_base: 0,
        selectors: [0; 4],
    };

    pub fn ymm(&self, number: usize) -> [u8; 32] {
        let mut value = [0; 32];
        value[..16].copy_from_slice(&self.area[area::XMM + 16 * number..][..16]);
        value[16..].copy_from_slice(&self.area[area::YMM_HIGH + 16 * number..][..16]);
        value
    }

    pub fn set_ymm(&mut self, number: usize, value: &[u8; 32]) {
        self.area[area::XMM + 16 * number..][..16].copy_from_slice(&value[..16]);
        self.area[area::YMM_HIGH + 16 * number..][..16].copy_from_slice(&value[16..]);
    }

    /// All of a vector register, 0 to 31; as far as the processor has it.
    pub fn vector(&self, number: usize) -> [u8; 64] {
        let mut value = [0; 64];
        if number < 16 {
            value[..32].copy_from_slice(&self.ymm(number));
        }
        if area::avx512() {
            let (at, part) = self.upper(number);
            value[64 - part..].copy_from_slice(&self.area[at..at + part]);
        }
        value
    }

    pub fn set_vector(&mut self, number: usize, value: &[u8; 64]) {
        if number < 16 {
            self.set_ymm(number, value[..32].try_into().unwrap());
        }
        if area::avx512() {
            let (at, part) = self.upper(number);
            self.area[at..at + part].copy_from_slice(&value[64 - part..]);
        }
    }

    /// Offset and bytes of what a register has beyond XMM and YMM.
    fn upper(&self, number: usize) -> (usize, usize) {
        let [_, high, upper] = area::places();
        match number {
            0..16 => (high + 32 * number, 32),
            _ => (upper + 64 * (number - 16), 64),
        }
    }

    pub fn opmask(&self, number: usize) -> u64 {
        let at = area::places()[0] + 8 * number;
        u64::from_le_bytes(self.area[at..at + 8].try_into().unwrap())
    }

    pub fn set_opmask(&mut self, number: usize, value: u64) {
        let at = area::places()[0] + 8 * number;
        self.area[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.area[area::MXCSR..][..4].try_into().unwrap())
    }
}

/// Bytes of the data window that a case sets.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Patch {
    pub address: u32,
    pub length: u16,
}

/// One instruction and everything that it can read.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Case {
    pub state: State,
    /// Number of the form, and the seed: together they make this case again.
    pub form: u32,
    pub seed: u64,
    /// 64, or 32 for compatibility mode.
    pub bits: u32,
    pub code: [u8; 15],
    pub length: u8,
    /// Where a branch should land, if the instruction is one.
    pub taken: u64,
    pub patch_count: u8,
    pub patches: [Patch; 12],
    pub patch_bytes: [u8; 4096],
}

impl Case {
    pub const EMPTY: Self = Self {
        state: State::ZERO,
        form: 0,
        seed: 0,
        bits: 64,
        code: [0; 15],
        length: 0,
        taken: 0,
        patch_count: 0,
        patches: [Patch { address: 0, length: 0 }; 12],
        patch_bytes: [0; 4096],
    };

    /// The addresses after the instruction and where it branches to.
    pub fn exits(&self) -> impl Iterator<Item = u64> + Clone + use<> {
        let next = self.state.rip + u64::from(self.length);
        std::iter::once(next).chain((self.taken != 0).then_some(self.taken))
    }

    /// The bits that a general register has.
    pub fn register_mask(&self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    /// Adds bytes to the data window; without room for them, does nothing.
    pub fn patch(&mut self, address: u64, bytes: &[u8]) {
        let count = usize::from(self.patch_count);
        let used: usize = self.patches[..count]
            .iter()
            .map(|patch| usize::from(patch.length))
            .sum();
        let (Ok(address), true) = (u32::try_from(address), count < self.patches.len()) else {
            return;
        };
        if let Some(room) = self.patch_bytes.get_mut(used..used + bytes.len()) {
            room.copy_from_slice(bytes);
            self.patches[count] = Patch {
                address,
                length: bytes.len() as u16,
            };
            self.patch_count += 1;
        }
    }
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum End {
    /// RIP reached an exit.
    Retired,
    /// An exception: vector, error code, and CR2 for #PF.
    Raised,
    /// The child process or the software CPU died of this case, or went on without end.
    Died,
}

/// A 64-byte line of the data window that is not what it was before all cases.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Line {
    pub address: u32,
    pub bytes: [u8; 64],
}

/// What an instruction did.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Outcome {
    pub state: State,
    pub end: End,
    pub vector: u32,
    pub error: u32,
    pub address: u64,
    /// How many lines changed; the first of them follow.
    pub lines_changed: u16,
    pub lines: [Line; 48],
}

impl Outcome {
    pub const EMPTY: Self = Self {
        state: State::ZERO,
        end: End::Died,
        vector: 0,
        error: 0,
        address: 0,
        lines_changed: 0,
        lines: [Line {
            address: 0,
            bytes: [0; 64],
        }; 48],
    };

    pub fn lines(&self) -> &[Line] {
        &self.lines[..usize::from(self.lines_changed).min(self.lines.len())]
    }
}
