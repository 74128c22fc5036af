//! The probe program and what it must answer.

use posada_engine::CpuState;
use posada_memory::GuestRam;
use serde::{Deserialize, Serialize};
use std::arch::global_asm;
use std::fmt;
use vm_memory::{Bytes, GuestAddress};

/// Where the program lies in guest RAM and begins. A multiple of 64 KiB.
pub const BASE: u32 = 0x1_0000;
/// Bytes of RAM that it needs.
pub const RAM: u64 = 4 << 20;

/// The port that begins a phase, and that the phase "devices" reads.
pub const MARK: u16 = 0xe0;
/// The port that takes a phase's checksum.
pub const RESULT: u16 = 0xe4;
/// What the program writes to [`MARK`] at its end.
pub const DONE: u32 = 0xff;

/// FNV-1a's numbers for 64 bits.
const SEED: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x100_0000_01b3;

const COMPUTE: u32 = 100_000;
const ROUNDS: u32 = 8;
const PAGES: u32 = 128;
const CALLS: u32 = 4_000;
const SWITCHES: u32 = 1_000;
const READS: u32 = 400;
const TICKS: u32 = 20;
/// Ticks of the timer's 1 GHz.
const TIMER_COUNT: u32 = 20_000;

global_asm!(
    include_str!("program.s"),
    BASE = const BASE,
    MARK = const MARK,
    RESULT = const RESULT,
    DONE = const DONE,
    SEED = const SEED,
    PRIME = const PRIME,
    COMPUTE = const COMPUTE,
    ROUNDS = const ROUNDS,
    PAGES = const PAGES,
    CALLS = const CALLS,
    SWITCHES = const SWITCHES,
    READS = const READS,
    TICKS = const TICKS,
    TIMER_COUNT = const TIMER_COUNT,
    options(att_syntax)
);

unsafe extern "C" {
    static posada_probe_start: u8;
    static posada_probe_end: u8;
}

/// The bytes of the program.
fn image() -> &'static [u8] {
    let (start, end) = (&raw const posada_probe_start, &raw const posada_probe_end);
    // SAFETY: both symbols stand in one piece of read-only data, the second behind the first.
    unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// Puts the program into zeroed `ram` of [`RAM`] bytes; gives the state in which it begins.
pub fn load(ram: &GuestRam) -> CpuState {
    ram.memory()
        .write_slice(image(), GuestAddress(BASE.into()))
        .expect("the program is smaller than RAM");
    crate::boot::protected(BASE, 0)
}

/// What the program does, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Builds page tables in 32-bit protected mode, and enters long mode.
    Start,
    /// Arithmetic, memory and branches.
    Compute,
    /// User mode touches pages that are not there yet, and they are taken away again.
    PageFaults,
    /// User mode calls the kernel.
    SystemCalls,
    /// Page tables are exchanged.
    AddressSpaces,
    /// A device's register is read.
    Devices,
    /// The processor halts until its timer's interrupt.
    Timer,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Start,
        Self::Compute,
        Self::PageFaults,
        Self::SystemCalls,
        Self::AddressSpaces,
        Self::Devices,
        Self::Timer,
    ];

    /// The phase that the program calls `number`.
    pub fn of(number: u32) -> Option<Self> {
        Self::ALL.get(number as usize).copied()
    }

    /// How often it does what it is about; [`Phase::Start`] and [`Phase::Compute`] in instructions, about.
    pub fn repeats(self) -> u32 {
        match self {
            Self::Start => 512 * 13,
            Self::Compute => COMPUTE * 67 / 4,
            Self::PageFaults => ROUNDS * PAGES,
            Self::SystemCalls => CALLS,
            Self::AddressSpaces => SWITCHES * 2,
            Self::Devices => READS,
            Self::Timer => TICKS,
        }
    }

    /// Nanoseconds that one repetition waits for by design.
    pub fn wait(self) -> u32 {
        if self == Self::Timer { TIMER_COUNT } else { 0 }
    }

    /// The checksum at its end.
    pub fn expected(self) -> u32 {
        let mut sum = Checksum(SEED);
        match self {
            Self::Start => sum.take(page_table_words()),
            Self::Compute => compute(&mut sum),
            Self::PageFaults => page_faults(&mut sum),
            Self::SystemCalls => (1..=CALLS).for_each(|call| {
                sum.take((call * 3).into());
                sum.take(KERNEL_CODE);
            }),
            Self::AddressSpaces => address_spaces(&mut sum),
            Self::Devices => (0..READS).for_each(|index| sum.take(device_word(index).into())),
            Self::Timer => (1..=TICKS).rev().for_each(|left| {
                sum.take(left.into());
                sum.take(0);
            }),
        }
        (sum.0 >> 32 ^ sum.0) as u32
    }
}

impl Phase {
    /// What it repeats, in the singular.
    pub fn one(self) -> &'static str {
        match self {
            Self::Start | Self::Compute => "an instruction",
            Self::PageFaults => "a page fault",
            Self::SystemCalls => "a system call",
            Self::AddressSpaces => "a change of address space",
            Self::Devices => "a device access",
            Self::Timer => "a timer interrupt",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Start => "start",
            Self::Compute => "computation",
            Self::PageFaults => "page faults",
            Self::SystemCalls => "system calls",
            Self::AddressSpaces => "changes of address space",
            Self::Devices => "device accesses",
            Self::Timer => "timer",
        })
    }
}

/// What the port [`MARK`] answers when it is read for the `index`th time.
pub fn device_word(index: u32) -> u32 {
    (index + 1).wrapping_mul(0x9e37_79b9)
}

const KERNEL_CODE: u64 = 8;

/// The program's `fold`.
struct Checksum(u64);

impl Checksum {
    fn take(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(PRIME);
    }
}

fn page_table_words() -> u64 {
    let mix = |sum: u32, page: u32| sum.rotate_left(5) ^ (page << 12 | 7);
    (0..512).fold(0, mix).into()
}

fn compute(sum: &mut Checksum) {
    let (mut random, mut table) = (SEED, [0u64; 512]);
    for _ in 0..COMPUTE {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let word = &mut table[random as usize % 512];
        *word = word.wrapping_add(random);
        if random.is_multiple_of(4) {
            sum.take(*word);
        }
    }
}

fn page_faults(sum: &mut Checksum) {
    /// Error code: user mode, write.
    const USER_WRITE: u64 = 4 | 2;
    const FAULTS: u64 = 0x20_0000;
    const FAULT_RAM: u64 = 0x30_0000;
    /// Page table entry: dirty, accessed, user, writable, present.
    const USED: u64 = 0x67;
    let mut word = 0;
    for left in (1..=u64::from(ROUNDS)).rev() {
        for page in 0..u64::from(PAGES) {
            sum.take(USER_WRITE);
            sum.take(FAULTS + (page << 12) + 8);
        }
        word += left;
        sum.take(word * u64::from(PAGES));
        for page in 0..u64::from(PAGES) {
            sum.take(FAULT_RAM + (page << 12) | USED);
        }
    }
}

fn address_spaces(sum: &mut Checksum) {
    let mut upper = 0;
    for round in 1..=u64::from(SWITCHES) {
        upper += u64::from(SWITCHES) + 1 - round;
        sum.take(upper);
        sum.take(round);
    }
}
