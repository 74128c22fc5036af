//! What a block is made of: the instructions from one entry on, past conditional branches, to the first that always leaves;
//! and which arithmetic flags are wanted where.
//!
//! Flags at returns, calls and indirect jumps are taken for dead, as compilers have it, unless the last instruction that
//! changed them does nothing else and nobody has read them: then they are a function's result.

use super::help::Helped;
use super::operation::{Kind, MAX_LENGTH, Operation, Reader, System, flags};
use crate::core::Core;
use crate::decode::{self, Decoded};

/// Instructions of a block at most.
const LONGEST: usize = 64;
/// Instructions that a look at a successor goes through.
const AHEAD: usize = 12;

/// How a block ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By its last instruction.
    Branch,
    /// With whatever is at this RIP.
    Next(u64),
}

/// A page of code as it was read.
pub struct Page<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// Linear address of the first.
    pub linear: u64,
    /// What follows it.
    pub next: Option<Next>,
    /// [`crate::core::Core::fpu_blocked`] and [`super::operation::limits`].
    pub blocked: u8,
}

/// The start of a page.
#[derive(Clone, Copy)]
pub struct Next {
    /// Its guest physical address.
    pub gpa: u64,
    /// Its host address.
    pub host: *const u8,
    /// What was there.
    pub bytes: [u8; MAX_LENGTH],
}

impl Page<'_> {
    fn from(&self, rip: u64) -> Option<&[u8]> {
        let offset = usize::try_from(rip.wrapping_sub(self.linear)).ok()?;
        self.bytes.get(offset..).filter(|bytes| !bytes.is_empty())
    }

    fn read(&self, reader: &mut Reader, rip: u64) -> Option<Operation> {
        let bytes = self.from(rip)?;
        reader.read(&bytes[..bytes.len().min(MAX_LENGTH)], rip, self.blocked)
    }
}

/// The instructions of a block.
#[derive(Default)]
pub struct Region {
    /// Instructions with their addresses.
    pub operations: Vec<(u64, Operation)>,
    /// Arithmetic flags wanted before each, and after the last.
    pub live: Vec<u8>,
    /// Those among them that the interpreter's handlers execute.
    pub helped: Vec<Helped>,
    /// Flags are taken for wanted wherever that is not known.
    pub exact: bool,
    /// The last instruction ends in the next page.
    pub crosses: bool,
    /// The instruction after the last ends in the next page, which was not given.
    pub incomplete: bool,
    end: Option<End>,
}

impl Region {
    /// How it ends.
    pub fn end(&self) -> End {
        self.end.expect("read")
    }

    /// RIPs of its instructions and of what follows them, with the arithmetic flags that are wanted before each.
    pub fn wanted(&self) -> Box<[(u64, u8)]> {
        let last = self.operations.len() - 1;
        let rips = self.operations.iter().map(|(rip, _)| *rip).chain([self.after(last)]);
        rips.zip(self.live.iter().copied()).collect()
    }

    /// Bytes of its instructions.
    pub fn length(&self) -> u64 {
        self.operations
            .iter()
            .map(|(_, operation)| u64::from(operation.length))
            .sum()
    }

    /// Reads a block, up to where another begins as `known` says. It is empty if its first instruction ends in the next page,
    /// and that was not given.
    pub fn read(&mut self, core: &mut Core, reader: &mut Reader, page: &Page, start: u64, known: impl Fn(u64) -> bool) {
        self.operations.clear();
        self.helped.clear();
        (self.crosses, self.incomplete) = (false, false);
        let mut rip = start;
        self.end = Some(loop {
            let whole = self.operations.len() == LONGEST || self.crosses || rip != start && known(rip);
            let Some(bytes) = page.from(rip).filter(|_| !whole) else {
                break End::Next(rip);
            };
            let mut both = [0; 2 * MAX_LENGTH];
            let here = bytes.len().min(MAX_LENGTH);
            both[..here].copy_from_slice(&bytes[..here]);
            let mut reach = here;
            if let Some(next) = page.next.filter(|_| here < MAX_LENGTH) {
                both[here..here + MAX_LENGTH].copy_from_slice(&next.bytes);
                reach = MAX_LENGTH;
            }
            let Some((operation, ends)) = self.one(core, reader, page, &both[..reach], rip) else {
                self.incomplete = true;
                break End::Next(rip);
            };
            self.crosses = usize::from(operation.length) > here;
            self.operations.push((rip, operation));
            rip = rip.wrapping_add(operation.length.into());
            if ends {
                break End::Branch;
            }
        });
        self.find_live(reader, page);
    }

    /// One instruction, and whether it ends the block; `None` if there are too few bytes.
    fn one(
        &mut self,
        core: &mut Core,
        reader: &mut Reader,
        page: &Page,
        bytes: &[u8],
        rip: u64,
    ) -> Option<(Operation, bool)> {
        let operation = reader.read(bytes, rip, page.blocked);
        if let Some(operation) = operation.filter(|operation| operation.kind != Kind::Interpret) {
            return Some((operation, leaves(operation.kind)));
        }
        let Decoded { insn, ends_block } = decode::decode(core, bytes).ok()?;
        let mut operation = operation
            .filter(|operation| !ends_block && operation.length == insn.length)
            .unwrap_or(Operation::UNKNOWN);
        operation.length = insn.length;
        self.helped.push(Helped {
            insn,
            next: rip.wrapping_add(insn.length.into()),
            ends: ends_block,
        });
        Some((operation, ends_block))
    }

    fn find_live(&mut self, reader: &mut Reader, page: &Page) {
        let mut live = match self.end() {
            End::Branch => flags::NONE,
            End::Next(rip) => self.ahead(reader, page, rip, AHEAD),
        };
        self.live.clear();
        self.live.resize(self.operations.len() + 1, 0);
        self.live[self.operations.len()] = live;
        for at in (0..self.operations.len()).rev() {
            let operation = &self.operations[at].1;
            match operation.kind {
                Kind::System(System::SetAccess(_)) => live = self.ahead(reader, page, self.after(at), AHEAD),
                Kind::Jump(target) => live = self.ahead(reader, page, target, AHEAD),
                Kind::Branch(_, target) | Kind::Count(_, target) => live |= self.ahead(reader, page, target, AHEAD),
                Kind::Call(target) if page.from(target).is_some() => live = self.ahead(reader, page, target, AHEAD),
                kind if anywhere(kind) => {
                    live = if self.returns_flags(at) {
                        flags::ALL
                    } else {
                        flags::NONE
                    }
                }
                _ => {}
            }
            live = live & !operation.replaces | operation.reads;
            if self.exact && (operation.traps || accesses(operation.kind)) {
                live = flags::ALL;
            }
            self.live[at] = live;
        }
    }

    /// RIP after instruction `at`.
    fn after(&self, at: usize) -> u64 {
        let (rip, operation) = &self.operations[at];
        rip.wrapping_add(operation.length.into())
    }

    /// True if flags seem to be meant for whoever comes after instruction `at`.
    fn returns_flags(&self, at: usize) -> bool {
        if self.exact {
            return true;
        }
        let table = by_table(self.operations[at].1.kind);
        for (_, operation) in self.operations[..at].iter().rev() {
            if operation.reads != 0 && (!table || bounds(operation.kind)) {
                return false;
            }
            if operation.changes != 0 {
                return operation.tells;
            }
        }
        table
    }

    /// Flags that the code at `rip` may read before it replaces them.
    fn ahead(&self, reader: &mut Reader, page: &Page, rip: u64, budget: usize) -> u8 {
        let (mut rip, mut live, mut unknown) = (rip, flags::NONE, flags::ALL);
        for left in (0..budget).rev() {
            let Some(operation) = page.read(reader, rip) else {
                return live | unknown;
            };
            live |= operation.reads & unknown;
            if self.exact && (operation.traps || accesses(operation.kind)) {
                return live | unknown;
            }
            unknown &= !operation.replaces;
            if unknown == 0 {
                return live;
            }
            rip = rip.wrapping_add(operation.length.into());
            match operation.kind {
                Kind::Interpret => return live | unknown,
                Kind::Jump(target) => rip = target,
                Kind::Call(target) if page.from(target).is_some() => rip = target,
                Kind::Branch(_, target) | Kind::Count(_, target) => {
                    live |= unknown & self.ahead(reader, page, target, left / 2);
                }
                kind if anywhere(kind) => {
                    return if self.exact || by_table(kind) {
                        live | unknown
                    } else {
                        live
                    };
                }
                _ => {}
            }
        }
        live | unknown
    }
}

/// True if the instruction may fault on memory.
fn accesses(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::Copy | Kind::Nothing | Kind::Address { .. } | Kind::Jump(_) | Kind::Branch(..) | Kind::Count(..)
    )
}

/// True if nothing of the block follows.
fn leaves(kind: Kind) -> bool {
    matches!(kind, Kind::Jump(_) | Kind::Call(_) | Kind::System(System::SetAccess(_))) || anywhere(kind)
}

/// True for a jump by a table: compilers let what comes after it use flags of a comparison before it.
fn by_table(kind: Kind) -> bool {
    matches!(kind, Kind::JumpMemory(memory) if memory.index.is_some())
}

/// True for a branch as it guards a table (JB, JAE, JBE, JA): nobody reads the flags of that comparison again.
fn bounds(kind: Kind) -> bool {
    matches!(kind, Kind::Branch(condition, _) if matches!(condition & 15, 2 | 3 | 6 | 7))
}

/// True if the successor's flags are not looked at.
fn anywhere(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::JumpRegister(_)
            | Kind::JumpMemory(_)
            | Kind::Call(_)
            | Kind::CallRegister(_)
            | Kind::CallMemory(_)
            | Kind::Return(_)
    )
}
