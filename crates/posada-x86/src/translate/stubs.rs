//! The code that every cache begins with: the ways in and out, and what translated code calls.
//!
//! In translated code RSP is the guest's, so nothing here touches the stack before it is exchanged for the host's.

use super::assembler::{Assembler, R10, R11, condition};
use super::frame::{self, LOG, MODES};
use super::help::help;
use super::jumps;
use super::vectors::{Host, Vectors, live};
use crate::core::Core;
use crate::tlb::NOWHERE;

const RAX: u8 = 0;
const RDX: u8 = 2;
const RSP: u8 = 4;
const RSI: u8 = 6;
const RDI: u8 = 7;

/// Why translated code was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Leave {
    /// A direct branch that does not lead to its target yet: [`super::frame::Frame::site`] is its exit.
    Chain,
    /// The jump cache does not know RIP.
    Unknown,
    /// The instruction at RIP is the interpreter's.
    Interpret,
    /// Events are pending.
    Poll,
    /// An access must be done by the interpreter: the site is in its check.
    Refused,
    /// The host's processor raised an exception.
    Trap,
    /// A handler of the interpreter's did something that asks for a look at everything.
    Helped,
}

impl Leave {
    /// From what the entry returns.
    pub fn from_number(number: u32) -> Self {
        match number {
            0 => Self::Chain,
            1 => Self::Unknown,
            2 => Self::Interpret,
            3 => Self::Poll,
            4 => Self::Refused,
            5 => Self::Trap,
            _ => Self::Helped,
        }
    }
}

/// The way in: Core, code, and RIP for code that compares it. Returns a [`Leave`].
pub type Enter = unsafe extern "sysv64" fn(*mut Core, u64, u64) -> u32;

/// Addresses of the stubs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// [`Enter`].
    pub enter: u64,
    /// Ways out, by [`Leave`]: R10 is RIP (not for [`Leave::Chain`]), R11 the site; flags are the guest's, but with [`Leave::Unknown`] in the Core. For
    /// the first four only.
    pub leave: [u64; 4],
    /// By mode, from a slot that knows no block for R10: through a [`Way`](super::jumps::Way), or out.
    pub unknown: [u64; MODES],
    /// The same for code that R10 does not lead to: flags are in the Core.
    pub mistaken: [u64; MODES],
    /// An exception on the host: all registers are the guest's.
    pub trap: u64,
    /// A check failed, by [`Wanted`]: R10 is the linear address, R11 where to try again, with R10 as it was.
    pub miss: [u64; 3],
    /// The same for a check of the stack, by mode and [`Wanted`]: looks in the soft TLB first.
    pub stack: [[u64; 3]; MODES],
    /// Calls [`super::help::help`]: R10 names the instruction, R11 is where to go on; flags are in the Core.
    pub help: u64,
    /// Loads vector registers, by [`live`] less one; back to R11. Flags are lost.
    pub load_vectors: [u64; 3],
}

/// What a check looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Wanted {
    /// The page may be read.
    Read,
    /// It is about to be written.
    Write,
    /// It is about to be read, and might be written without anything being noted.
    Writable,
}

/// What a failed check calls: true if it would succeed now.
pub type Miss = extern "sysv64" fn(&mut Core, u64, Wanted) -> bool;

fn guest_registers() -> impl Iterator<Item = u8> {
    (0..16).filter(|&number| number != R10 && number != R11)
}

struct Maker<'a> {
    a: &'a mut Assembler,
    vectors: &'a Vectors,
}

impl Maker<'_> {
    fn address(&self) -> u64 {
        self.a.start + self.a.here() as u64
    }

    fn align(&mut self) {
        while !self.a.here().is_multiple_of(16) {
            self.a.bytes(&[0xcc]);
        }
    }

    fn save_registers(&mut self) {
        for number in guest_registers() {
            self.a.store(frame::reg(number), number);
        }
    }

    fn load_registers(&mut self) {
        for number in guest_registers() {
            self.a.load(number, frame::reg(number));
        }
    }

    fn enter(&mut self) {
        // push rbx, rbp, r12-r15; sub rsp, 8
        self.a.bytes(&[
            0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, 0x48, 0x83, 0xec, 8,
        ]);
        self.a.store(frame::HOST_RSP, RSP);
        self.a.store(frame::CORE, RDI);
        self.a.store(frame::TARGET, RSI);
        self.a.copy(R10, RDX);
        self.a.load_ax(frame::ARITHMETIC);
        self.a.flags_from_ax();
        self.load_registers();
        self.a.jump_through(frame::TARGET);
    }

    /// Back to Rust with what is in EAX.
    fn back(&mut self) {
        self.a.store_byte(frame::VECTORS_LIVE, 0);
        // add rsp, 8; pop r15-r12, rbp, rbx; ret
        self.a.bytes(&[
            0x48, 0x83, 0xc4, 8, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3,
        ]);
    }

    fn leave(&mut self, reason: Leave, flags: bool) {
        self.save_registers();
        // What traps says nothing, and a branch that is not linked says where it is.
        if !matches!(reason, Leave::Trap | Leave::Chain) {
            self.a.store(frame::RIP, R10);
        }
        if reason != Leave::Trap {
            self.a.store(frame::SITE, R11);
        }
        if flags {
            self.a.flags_to_ax();
            self.a.store_ax(frame::ARITHMETIC);
        }
        self.a.load(RSP, frame::HOST_RSP);
        self.vectors.save(self.a);
        self.a.constant(RAX, reason as u64);
        self.back();
    }

    /// To the code for R10 by its way, or out. Flags are in the Core.
    fn find(&mut self, mode: usize, out: u64) {
        let (ways, page) = (frame::ways(), frame::fetch_entry(mode, 0));
        let a = &mut *self.a;
        a.store(frame::TEMPORARY, RAX);
        a.page_bits();
        a.mask_r11(frame::INDEX_MASK);
        a.copy(RAX, R10);
        // and rax, -1000h
        a.bytes(&[0x48, 0x25, 0, 0xf0, 0xff, 0xff]);
        a.compare_rax_indexed(page.read);
        let elsewhere = a.branch(condition::NE);
        a.load_rax_indexed(page.gpa);
        a.way_index();
        a.compare_indexed(ways.rip);
        let other = a.branch(condition::NE);
        // or rax, mode
        a.bytes(&[0x48, 0x0d]);
        a.bytes(&(mode as u32).wrapping_shl(jumps::MODE_SHIFT).to_le_bytes());
        a.compare_rax_indexed(ways.mapping);
        let others = a.branch(condition::NE);
        a.global_bit();
        a.store(frame::SITE, RAX);
        a.load_rax_indexed(ways.start);
        a.store(frame::TARGET, RAX);
        a.compare_dword(frame::LOGGED, LOG as u32);
        let full = a.branch(condition::AE);
        a.jump_index(frame::JUMP_MASK);
        a.store_rax_at_slot(frame::jumps(mode));
        a.log_slot((mode * frame::JUMPS) as u32);
        a.land(full);
        a.load_ax(frame::ARITHMETIC);
        a.flags_from_ax();
        a.load(RAX, frame::TEMPORARY);
        a.jump_through(frame::TARGET);
        for hole in [elsewhere, other, others] {
            a.land(hole);
        }
        a.load(RAX, frame::TEMPORARY);
        a.jump_to(out);
    }

    fn miss(&mut self, wanted: Wanted, helper: u64) {
        self.save_registers();
        self.a.store(frame::SITE, R11);
        self.a.store(frame::TARGET, R10);
        self.a.load(RSP, frame::HOST_RSP);
        self.vectors.save(self.a);
        self.a.load(RDI, frame::CORE);
        self.a.copy(RSI, R10);
        self.a.constant(RDX, wanted as u64);
        self.a.constant(RAX, helper);
        // call rax; test al, al
        self.a.bytes(&[0xff, 0xd0, 0x84, 0xc0]);
        let refused = self.a.branch(condition::E);
        self.vectors.reload(self.a);
        self.load_registers();
        self.a.load(R10, frame::TARGET);
        self.a.jump_through(frame::SITE);
        self.a.land(refused);
        self.a.constant(RAX, Leave::Refused as u64);
        self.back();
    }

    /// A check did not find the page in the copy of the stack's entry: copies another, if there is one.
    fn stack(&mut self, mode: usize, wanted: Wanted, miss: u64) {
        let (table, stack) = (frame::table(mode), frame::stack(mode));
        let tag = |table: frame::Table| {
            if wanted == Wanted::Read {
                table.read
            } else {
                table.write
            }
        };
        let a = &mut *self.a;
        a.store(frame::SPILLED, RAX);
        a.store(frame::SITE, R11);
        a.page_index_rax(frame::INDEX_MASK);
        a.xor_by_rax(tag(table));
        a.compare_r10(4096);
        let absent = a.branch(condition::AE);
        a.xor_by_rax(tag(table));
        a.load_by_rax(tag(table));
        // The access crosses the page's end.
        a.compare_with(R11, tag(stack));
        let crosses = a.branch(condition::E);
        for (from, to) in [(table.read, stack.read), (table.host, stack.host)] {
            a.load_by_rax(from);
            a.store(to, R11);
        }
        a.load_by_rax(table.write);
        a.compare_r11_by_rax(table.read);
        let writable = a.branch(condition::E);
        // In the table that is another slot's page.
        a.constant(R11, NOWHERE);
        a.land(writable);
        a.store(stack.write, R11);
        a.load(RAX, frame::SPILLED);
        a.load(R11, frame::SITE);
        a.jump_r11();
        a.land(absent);
        a.xor_by_rax(tag(table));
        a.land(crosses);
        a.load(RAX, frame::SPILLED);
        a.load(R11, frame::SITE);
        a.jump_to(miss);
    }

    fn help(&mut self) {
        self.save_registers();
        self.a.store(frame::SITE, R11);
        self.a.load(RSP, frame::HOST_RSP);
        self.vectors.save(self.a);
        self.a.store_byte(frame::VECTORS_LIVE, 0);
        self.a.load(RDI, frame::CORE);
        self.a.copy(RSI, R10);
        self.a.constant(RAX, help as *const () as u64);
        // call rax; test al, al
        self.a.bytes(&[0xff, 0xd0, 0x84, 0xc0]);
        let over = self.a.branch(condition::E);
        self.a.load_ax(frame::ARITHMETIC);
        self.a.flags_from_ax();
        self.load_registers();
        self.a.load(R10, frame::RIP);
        self.a.jump_through(frame::TARGET);
        self.a.land(over);
        self.a.constant(RAX, Leave::Helped as u64);
        self.back();
    }
}

/// Makes the stubs at the assembler's start.
pub fn make(a: &mut Assembler, miss: Miss) -> Stubs {
    let vectors = Vectors::make(a, Host::detect());
    let mut maker = Maker { a, vectors: &vectors };
    maker.align();
    let mut stubs = Stubs {
        enter: maker.address(),
        ..Stubs::default()
    };
    maker.enter();
    for reason in [Leave::Chain, Leave::Unknown, Leave::Interpret, Leave::Poll] {
        maker.align();
        stubs.leave[reason as usize] = maker.address();
        maker.leave(reason, reason != Leave::Unknown);
    }
    for mode in 0..MODES {
        maker.align();
        stubs.unknown[mode] = maker.address();
        maker.a.store_flags();
        stubs.mistaken[mode] = maker.address();
        maker.find(mode, stubs.leave[Leave::Unknown as usize]);
    }
    maker.align();
    stubs.trap = maker.address();
    maker.leave(Leave::Trap, false);
    for wanted in [Wanted::Read, Wanted::Write, Wanted::Writable] {
        maker.align();
        stubs.miss[wanted as usize] = maker.address();
        maker.miss(wanted, miss as *const () as u64);
    }
    for mode in 0..MODES {
        for wanted in [Wanted::Read, Wanted::Write, Wanted::Writable] {
            maker.align();
            stubs.stack[mode][wanted as usize] = maker.address();
            maker.stack(mode, wanted, stubs.miss[wanted as usize]);
        }
    }
    maker.align();
    stubs.help = maker.address();
    maker.help();
    for level in [live::YMM, live::UPPER, live::ALL] {
        maker.align();
        stubs.load_vectors[usize::from(level) - 1] = maker.address();
        maker.vectors.load(maker.a, level);
    }
    stubs
}
