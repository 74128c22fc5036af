//! Makes the code of a block.
//!
//! Registers are the guest's, but for R10 and R11; so are the flags, unless they were saved to the Core because a check was
//! about to destroy them ([`Emitter::saved`]); they return before the next instruction that wants them. Between two
//! instructions the guest's state is therefore complete, and within one it changes in its last step only.

mod cold;
mod control;
mod memory;
mod redirect;
mod system;
mod vectors;

use self::cold::Cold;
use super::assembler::{Assembler, Hole, R10, R11, condition};
use super::frame;
use super::groups::{self, Group, Groups, Member};
use super::help::Helped;
use super::operation::{Kind, Memory, Operation, SCRATCH, System};
use super::region::{End, Region};
use super::relocation::{Holds, Shape};
use super::stubs::{Leave, Stubs, Wanted};
use super::vectors::live;
use crate::shared::mailbox;

const RAX: u8 = 0;
const RCX: u8 = 1;
const RSP: u8 = 4;
const RBP: u8 = 5;

/// From here on in the code, the instruction at this offset from the block's start runs.
#[derive(Clone, Copy, Debug)]
pub struct Mark {
    /// Offset in the code.
    pub code: u16,
    /// Offset from the block's RIP.
    pub guest: u16,
    /// The Core has the flags.
    pub saved: bool,
}

/// A direct branch that may be led straight to its target.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Offset of its exit, where it leads now.
    pub exit: u16,
    /// Offset of its rel32.
    pub site: u16,
    /// Where it leads to, from the block's RIP on.
    pub target: i32,
    /// It leads to a block without groups.
    pub plain: bool,
}

/// A check for several accesses.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Offset of the check.
    pub start: u16,
    /// Offset of the rel32 of a jump that it leads to when it fails.
    pub site: u16,
    /// Offset of where that jump must lead when the check cannot succeed: to a block without groups.
    pub plain: u16,
}

/// Turns regions into code.
#[derive(Default)]
pub struct Emitter {
    /// The code.
    pub assembler: Assembler,
    /// The side table.
    pub marks: Vec<Mark>,
    /// Direct branches.
    pub links: Vec<Link>,
    /// Checks for several accesses.
    pub checks: Vec<Check>,
    /// Offset of the code behind the comparison of RIP.
    pub entry: usize,
    /// Offset of the code behind that which brings vector registers in, where a loop needs it once; and what it brings in.
    again: (usize, u8),
    cold: Vec<Cold>,
    groups: Groups,
    /// The instruction's number in its block.
    at: usize,
    /// R10 is the host address of this group's range.
    held: Option<u8>,
    /// A branch to the start of its own block leaves it like any other, for who must see each run of a block.
    pub once: bool,
    /// Lookups in the soft TLB are counted.
    pub counting: bool,
    /// No groups.
    plain: bool,
    stubs: Stubs,
    mode: usize,
    jumps: usize,
    jump_mask: u32,
    /// RIP of the block, and log2 of the size of the page it lies in.
    start: u64,
    shift: u8,
    rip: u64,
    /// The flags are in the Core, not in the processor.
    saved: bool,
    /// What of the vector registers is there for sure.
    vectors: u8,
    exact: bool,
    /// Address of the next [`Helped`] of the block.
    helped: u64,
}

/// What a block is made for.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// RIP.
    pub rip: u64,
    /// Mode, as [`frame::mode`] numbers it.
    pub mode: usize,
    /// log2 of the size of the page it lies in.
    pub shift: u8,
    /// The page after that, if its last instruction ends there.
    pub next: Option<NextPage>,
    /// The block is to have no groups.
    pub plain: bool,
}

/// A page of code as the soft TLB holds it.
#[derive(Clone, Copy, Debug)]
pub struct NextPage {
    /// Linear address.
    pub linear: u64,
    /// [`Entry::gpa`](crate::tlb::Entry::gpa).
    pub gpa: u64,
}

impl Emitter {
    /// An emitter of code that uses these stubs.
    pub fn new(stubs: Stubs, bmi2: bool, jump_mask: u32) -> Self {
        let mut emitter = Self {
            stubs,
            jump_mask,
            ..Self::default()
        };
        emitter.assembler.bmi2 = bmi2;
        emitter
    }

    /// Makes the code of a region, to run at `address`.
    pub fn emit(&mut self, region: &Region, place: Place, address: u64, helped: &[Helped]) {
        self.assembler.begin(address);
        self.helped = helped.as_ptr() as u64;
        self.marks.clear();
        self.links.clear();
        self.checks.clear();
        self.cold.clear();
        (self.held, self.plain) = (None, place.plain);
        if self.plain {
            self.groups.clear(region.operations.len());
        } else {
            self.groups.find(&region.operations);
        }
        self.mode = place.mode;
        self.jumps = frame::jumps(place.mode);
        (self.start, self.rip, self.shift) = (place.rip, place.rip, place.shift);
        (self.saved, self.vectors, self.exact) = (false, live::NONE, region.exact);
        self.compare_rip(region.live[0] != 0);
        self.entry = self.assembler.here();
        if region.live[0] == 0 && self.loops(region) {
            self.mark();
            self.want_vectors(false, &region.operations);
        }
        self.again = (self.assembler.here(), self.vectors);
        let poll = self.poll_at(region);
        for (at, &(rip, operation)) in region.operations.iter().enumerate() {
            (self.at, self.rip) = (at, rip);
            self.mark();
            if poll == Some(at) {
                self.poll(region.live[at] != 0);
            }
            if at + 1 == region.operations.len()
                && let Some(next) = place.next
            {
                self.expect_page(&next, region.live[at] != 0);
            }
            if operation.vectors > self.vectors {
                self.want_vectors(region.live[at] != 0, &region.operations[at..]);
            }
            self.operation(&operation, region.live[at], region.live[at + 1]);
        }
        if let End::Next(rip) = region.end() {
            let live = region.live[region.operations.len()] != 0;
            self.rip = rip;
            self.settle(live);
            self.mark();
            let hole = self.assembler.jump();
            self.exit(hole, rip, live);
        }
        self.finish();
        debug_assert!(self.assembler.here() < 1 << 16, "offsets have 16 bits");
    }

    /// What the code just made is like.
    pub fn shape(&self) -> Shape {
        Shape {
            size: self.assembler.here() as u32,
            entry: self.entry as u32,
            marks: self.marks.as_slice().into(),
            links: self.links.as_slice().into(),
            checks: self.checks.as_slice().into(),
            relocations: self.assembler.relocations.as_slice().into(),
        }
    }

    /// True if the block leads back to its start.
    fn loops(&self, region: &Region) -> bool {
        let back =
            |kind: Kind| matches!(kind, Kind::Jump(to) | Kind::Branch(_, to) | Kind::Count(_, to) if to == self.start);
        region.operations.iter().any(|(_, operation)| back(operation.kind))
    }

    /// Where to look at events: a place where flags are dead, in blocks that may be part of a loop.
    fn poll_at(&self, region: &Region) -> Option<usize> {
        let loops = region.operations.iter().any(|&(rip, operation)| match operation.kind {
            Kind::Jump(target) | Kind::Branch(_, target) | Kind::Count(_, target) | Kind::Call(target) => target <= rip,
            Kind::CallRegister(_) | Kind::CallMemory(_) | Kind::Return(_) => true,
            Kind::JumpRegister(_) | Kind::JumpMemory(_) => true,
            _ => false,
        });
        let after_sti = |at: usize| at > 0 && region.operations[at - 1].1.kind == Kind::System(System::Sti);
        let dead = |at: &usize| region.live[*at] == 0 && !after_sti(*at);
        loops.then(|| (0..region.operations.len()).find(dead).unwrap_or(0))
    }

    fn mark(&mut self) {
        self.marks.push(Mark {
            code: self.assembler.here() as u16,
            guest: self.rip.wrapping_sub(self.start) as u16,
            saved: self.saved,
        });
    }

    /// Code that goes on only if R10 is the block's RIP.
    fn compare_rip(&mut self, live: bool) {
        let a = &mut self.assembler;
        let unknown = self.stubs.mistaken[self.mode];
        if live {
            a.copy(R11, RCX);
            a.place(RCX, self.start.wrapping_neg(), Holds::Negated);
            // lea rcx, [rcx + r10]; jrcxz over the next two
            a.bytes(&[0x4a, 0x8d, 0x0c, 0x11, 0xe3, 8]);
            a.copy(RCX, R11);
            a.jump_to(unknown);
            a.copy(RCX, R11);
            return;
        }
        match i32::try_from(self.start as i64) {
            Ok(start) => a.compare_linear(start),
            Err(_) => {
                a.place(R11, self.start, Holds::Linear);
                a.compare_scratch();
            }
        }
        let hole = a.branch(condition::NE);
        a.aim(hole, unknown);
    }

    /// Before the flags are destroyed: puts them into the Core if somebody wants them.
    fn save(&mut self, live: bool) {
        if live && !self.saved {
            self.store_flags();
            self.saved = true;
            self.mark();
        }
    }

    /// Gives the processor the guest's flags back. R11 is lost.
    fn restore(&mut self) {
        if self.saved {
            self.load_flags();
            self.saved = false;
            self.mark();
        }
    }

    /// Before a branch: gives the flags back if somebody wants them.
    fn settle(&mut self, live: bool) {
        if live {
            self.restore();
        }
        self.saved = false;
    }

    fn store_flags(&mut self) {
        self.assembler.store_flags();
    }

    fn load_flags(&mut self) {
        let a = &mut self.assembler;
        a.copy(R11, RAX);
        a.load_ax(frame::ARITHMETIC);
        a.flags_from_ax();
        a.copy(RAX, R11);
    }

    fn poll(&mut self, live: bool) {
        self.save(live);
        let a = &mut self.assembler;
        a.load(R11, frame::EVENTS);
        a.test_at_r11(mailbox::WORK);
        self.leave_if(condition::NE, Leave::Poll);
    }

    /// Goes on only if the soft TLB still has this page of code.
    fn expect_page(&mut self, page: &NextPage, live: bool) {
        self.save(live);
        self.held = None;
        let entry = frame::fetch_entry(self.mode, page.linear);
        for (value, place) in [(page.linear, entry.read), (page.gpa, entry.gpa)] {
            self.assembler.constant(R10, value);
            self.assembler.compare_with(R10, place);
            self.leave_if(condition::NE, Leave::Interpret);
        }
    }

    /// Leaves before this instruction if the condition holds.
    fn leave_if(&mut self, condition: u8, reason: Leave) {
        let hole = self.assembler.branch(condition);
        self.cold.push(Cold::Leave {
            hole,
            rip: self.rip,
            reason,
            saved: self.saved,
        });
    }

    /// Leaves for `rip`, here.
    fn leave(&mut self, rip: u64, reason: Leave) {
        self.assembler.place(R10, rip, Holds::Linear);
        self.assembler.jump_to(self.stubs.leave[reason as usize]);
    }

    /// True if the instruction's flags must be saved for a check.
    fn checks(&self, kind: Kind) -> bool {
        let none = matches!(
            kind,
            Kind::Copy
                | Kind::Nothing
                | Kind::Address { .. }
                | Kind::Jump(_)
                | Kind::JumpRegister(_)
                | Kind::Branch(..)
                | Kind::Count(..)
                | Kind::System(_)
        );
        let checked = |member: Option<Member>| member.is_some_and(|member| !member.first);
        let stack_only = !matches!(kind, Kind::Access(_) | Kind::PushMemory(_) | Kind::CallMemory(_));
        let covered = checked(self.groups.operand(self.at)) || stack_only && checked(self.groups.stack(self.at));
        !none && !covered
    }

    fn operation(&mut self, operation: &Operation, before: u8, after: u8) {
        if self.checks(operation.kind) {
            self.save(before != 0);
        }
        // What is kept of the flags must be in the processor when the rest changes.
        let merges = operation.changes != 0 && after & !operation.replaces != 0;
        let wants = operation.reads != 0 || merges;
        match operation.kind {
            Kind::Copy => {
                if wants {
                    self.restore();
                }
                self.with_scratch(operation);
            }
            Kind::Access(memory) => {
                let offset = match self.groups.operand(self.at) {
                    Some(member) => self.group(member),
                    None => {
                        self.access(&memory);
                        0
                    }
                };
                if wants {
                    self.restore();
                }
                self.accessing(operation, offset);
            }
            Kind::BitString(register, memory) => {
                self.address(&memory);
                self.bit_string(register, true);
                self.check(memory.size, memory.write, false);
                self.locked(&memory);
                // The instruction will add it again.
                self.bit_string(register, false);
                if wants {
                    self.restore();
                }
                self.accessing(operation, 0);
            }
            Kind::Address { register, size, memory } => self.compute(register, size, &memory),
            Kind::System(System::SetAccess(_)) => self.control(operation, before != 0),
            Kind::System(system) => self.system(system, before != 0),
            Kind::Nothing => {}
            Kind::Interpret => self.help(before != 0, after != 0),
            Kind::Push(register) => {
                let offset = self.stack_address(operation.kind);
                let from = self.value(register);
                self.assembler.store_at(offset, from);
                self.assembler.add(RSP, RSP, -8);
            }
            Kind::PushImmediate(value) => {
                let offset = self.stack_address(operation.kind);
                self.assembler.store_constant_at(offset, value);
                self.assembler.add(RSP, RSP, -8);
            }
            Kind::PushMemory(memory) => {
                self.load_operand(&memory);
                let offset = self.stack_address(operation.kind);
                self.assembler.load(R11, frame::TEMPORARY);
                self.assembler.store_at(offset, R11);
                self.assembler.add(RSP, RSP, -8);
            }
            Kind::Pop(register) => {
                let offset = self.stack_address(operation.kind);
                if SCRATCH.contains(&register) {
                    self.assembler.load_at(R11, offset);
                    self.assembler.store(frame::reg(register), R11);
                } else {
                    self.assembler.load_at(register, offset);
                }
                if register != RSP {
                    self.assembler.add(RSP, RSP, 8);
                }
            }
            Kind::Leave => {
                let offset = self.stack_address(operation.kind);
                self.assembler.add(RSP, RBP, 8);
                self.assembler.load_at(RBP, offset);
            }
            _ => self.control(operation, before != 0),
        }
        if operation.changes != 0 && !matches!(operation.kind, Kind::Interpret) && self.saved {
            // They were dead but for what changed now.
            self.saved = false;
            self.mark();
        }
    }

    /// Lets the interpreter's handler execute the instruction. Vector registers are in the Core then, and so are the flags.
    fn help(&mut self, before: bool, after: bool) {
        self.save(before);
        let a = &mut self.assembler;
        let back = a.address_r11();
        a.place(R10, self.helped, Holds::Helped);
        a.jump_to(self.stubs.help);
        a.land(back);
        self.helped += size_of::<Helped>() as u64;
        (self.saved, self.vectors, self.held) = (after, live::NONE, None);
        self.mark();
    }

    /// A register's value in a register: R11 for what the Core holds.
    fn value(&mut self, register: u8) -> u8 {
        if SCRATCH.contains(&register) {
            self.assembler.load(R11, frame::reg(register));
            return R11;
        }
        register
    }

    fn with_scratch(&mut self, operation: &Operation) {
        if operation.scratch & 1 != 0 {
            self.held = None;
        }
        for (bit, register) in SCRATCH.into_iter().enumerate() {
            if operation.scratch >> bit & 1 != 0 {
                self.assembler.load(register, frame::reg(register));
            }
        }
        self.assembler.bytes(&operation.bytes[..usize::from(operation.length)]);
        self.store_scratch(operation);
    }

    fn store_scratch(&mut self, operation: &Operation) {
        for (bit, register) in SCRATCH.into_iter().enumerate() {
            if operation.scratch >> bit & 4 != 0 {
                self.assembler.store(frame::reg(register), register);
            }
        }
    }

    /// The guest's instruction with its operand at `[R10 + offset]`.
    fn accessing(&mut self, operation: &Operation, offset: i32) {
        let mut base = R10;
        match operation.scratch & 3 {
            1 => {
                self.assembler.copy(R11, R10);
                self.assembler.load(R10, frame::reg(R10));
                self.held = None;
                base = R11;
            }
            2 => self.assembler.load(R11, frame::reg(R11)),
            _ => {}
        }
        redirect::redirect(&mut self.assembler, operation, base, offset);
        self.store_scratch(operation);
    }

    fn compute(&mut self, register: u8, size: u8, memory: &Memory) {
        if memory.relative && size == 8 && !SCRATCH.contains(&register) {
            self.assembler.named(register, memory);
            return;
        }
        self.address(memory);
        if size == 4 {
            // mov r10d, r10d
            self.assembler.bytes(&[0x45, 0x89, 0xd2]);
        }
        if SCRATCH.contains(&register) {
            self.assembler.store(frame::reg(register), R10);
        } else {
            self.assembler.copy(register, R10);
        }
    }
}
