//! Accesses of a block that one check serves: those off the same registers with the same values, as far as constants added
//! meanwhile tell, and near each other.
//!
//! The first of a group checks the whole range, and then R10 is the host's address of its start. The check must not do what
//! the accesses would not: where it fails for good (the range crosses a page, or may not be written to), the rest of the block
//! runs in a form without groups.

use super::operation::{Kind, Memory, Operation, System};

/// Bytes that a group covers at most: of a longer range, too many places would cross a page.
const RANGE: i64 = 512;
/// Groups of a block.
pub const GROUPS: usize = 16;

const RCX: u8 = 1;
const RSP: u8 = 4;
const RBP: u8 = 5;

/// An access that belongs to a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its group.
    pub group: u8,
    /// Distance from the start of the group's range.
    pub offset: i32,
    /// It is the first.
    pub first: bool,
}

/// A group.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// The range, as its first access finds it; written if one of them writes.
    pub memory: Memory,
    /// Bytes of the range.
    pub length: i32,
    /// The first access writes.
    pub writes_first: bool,
}

/// Values of registers that stay the same but for constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    base: Option<(u8, u32)>,
    index: Option<(u8, u32, i64)>,
    scale: u8,
    segment: Option<(u8, u32)>,
    relative: bool,
}

struct Open {
    key: Key,
    start: i64,
    end: i64,
    first: Access,
    offset: i64,
    write: bool,
    members: u32,
}

/// An access: of which instruction, by the stack or not.
#[derive(Clone, Copy)]
struct Access {
    at: usize,
    stack: bool,
    memory: Memory,
}

/// The groups of a block.
#[derive(Default)]
pub struct Groups {
    /// All of them.
    pub groups: Vec<Group>,
    /// For each instruction, its operand in memory.
    operands: Vec<Option<Member>>,
    /// For each instruction, what it pushes or pops.
    stack: Vec<Option<Member>>,
    open: Vec<Open>,
    found: Vec<(Access, usize, i64)>,
    /// Counts changes of registers; the last two of segment bases.
    versions: [u32; 17],
    /// What was added to them since.
    added: [i64; 16],
}

/// What a push or pop accesses.
pub fn stack_memory(kind: Kind) -> Option<Memory> {
    let (base, displacement, write) = match kind {
        Kind::Push(_) | Kind::PushImmediate(_) | Kind::PushMemory(_) => (RSP, -8, true),
        Kind::Call(_) | Kind::CallRegister(_) | Kind::CallMemory(_) => (RSP, -8, true),
        Kind::System(System::PushFlags) => (RSP, -8, true),
        Kind::Pop(_) | Kind::Return(_) => (RSP, 0, false),
        Kind::Leave => (RBP, 0, false),
        _ => return None,
    };
    Some(Memory {
        base: Some(base),
        index: None,
        scale: 0,
        displacement: displacement as u64,
        relative: false,
        segment: None,
        narrow: false,
        size: 8,
        write,
        locked: false,
    })
}

impl Groups {
    /// No groups.
    pub fn clear(&mut self, count: usize) {
        self.groups.clear();
        for members in [&mut self.operands, &mut self.stack] {
            members.clear();
            members.resize(count, None);
        }
    }

    /// Finds the groups of a block.
    pub fn find(&mut self, operations: &[(u64, Operation)]) {
        self.clear(operations.len());
        self.open.clear();
        self.found.clear();
        (self.versions, self.added) = ([0; 17], [0; 16]);
        for (at, (_, operation)) in operations.iter().enumerate() {
            if let Kind::Access(memory) = operation.kind
                && !memory.locked
                && !memory.narrow
            {
                let access = Access {
                    at,
                    stack: false,
                    memory,
                };
                self.access(access);
            }
            if let Some(memory) = stack_memory(operation.kind) {
                let access = Access {
                    at,
                    stack: true,
                    memory,
                };
                self.access(access);
            }
            self.change(operation);
        }
        self.settle();
    }

    fn access(&mut self, access: Access) {
        let Memory { base, index, .. } = access.memory;
        let version = |register: u8| (register, self.versions[usize::from(register)]);
        let added = |register: u8| self.added[usize::from(register)];
        let key = Key {
            base: base.map(version),
            index: index.map(|index| (index, version(index).1, added(index))),
            scale: if index.is_some() { access.memory.scale } else { 0 },
            segment: access.memory.segment.map(|segment| (segment, self.versions[16])),
            relative: access.memory.relative,
        };
        let start = (access.memory.displacement as i64).wrapping_add(base.map_or(0, added));
        let end = start.wrapping_add(access.memory.size.into());
        let fits = |open: &Open| {
            let (low, high) = (open.start.min(start), open.end.max(end));
            let lowest = (open.first.memory.displacement as i64).checked_add(low.wrapping_sub(open.offset));
            let encodable = base.is_none() || lowest.is_some_and(|lowest| i32::try_from(lowest).is_ok());
            open.key == key && low < high && high - low <= RANGE && encodable
        };
        let number = self.open.iter().rposition(fits).unwrap_or_else(|| {
            self.open.push(Open {
                key,
                start,
                end,
                first: access,
                offset: start,
                write: false,
                members: 0,
            });
            self.open.len() - 1
        });
        let open = &mut self.open[number];
        (open.start, open.end) = (open.start.min(start), open.end.max(end));
        open.write |= access.memory.write;
        open.members += 1;
        self.found.push((access, number, start));
    }

    /// What an instruction does to registers.
    fn change(&mut self, operation: &Operation) {
        match operation.kind {
            Kind::Push(_) | Kind::PushImmediate(_) | Kind::PushMemory(_) | Kind::System(System::PushFlags) => {
                self.added[usize::from(RSP)] -= 8;
            }
            Kind::Pop(register) => {
                self.added[usize::from(RSP)] += 8;
                self.renew(register);
            }
            Kind::Leave => {
                self.renew(RSP);
                self.renew(RBP);
            }
            Kind::Count(..) => self.renew(RCX),
            Kind::Interpret => {
                for register in 0..16 {
                    self.renew(register);
                }
                self.versions[16] += 1;
            }
            Kind::System(System::Swapgs) => self.versions[16] += 1,
            _ => {
                if let Some((register, value)) = operation.adds {
                    self.added[usize::from(register)] += i64::from(value);
                    return;
                }
                for register in 0..16 {
                    if operation.writes >> register & 1 != 0 {
                        self.renew(register);
                    }
                }
            }
        }
    }

    fn renew(&mut self, register: u8) {
        self.versions[usize::from(register)] += 1;
        self.added[usize::from(register)] = 0;
    }

    fn settle(&mut self) {
        let mut numbers = vec![None; self.open.len()];
        for &(access, number, start) in &self.found {
            let open = &self.open[number];
            if open.members < 2 || numbers[number].is_none() && self.groups.len() == GROUPS {
                continue;
            }
            let first = numbers[number].is_none();
            let group = *numbers[number].get_or_insert_with(|| {
                let before = open.start.wrapping_sub(open.offset);
                self.groups.push(Group {
                    memory: Memory {
                        displacement: open.first.memory.displacement.wrapping_add(before as u64),
                        write: open.write,
                        ..open.first.memory
                    },
                    length: (open.end - open.start) as i32,
                    writes_first: open.first.memory.write,
                });
                self.groups.len() as u8 - 1
            });
            let member = Member {
                group,
                offset: (start - open.start) as i32,
                first,
            };
            let members = if access.stack {
                &mut self.stack
            } else {
                &mut self.operands
            };
            members[access.at] = Some(member);
        }
    }

    /// The group that an instruction's operand is in.
    pub fn operand(&self, at: usize) -> Option<Member> {
        self.operands[at]
    }

    /// The group that what an instruction pushes or pops is in.
    pub fn stack(&self, at: usize) -> Option<Member> {
        self.stack[at]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::operation::Reader;

    fn groups(code: &[u8]) -> Groups {
        let (mut reader, mut operations, mut at) = (Reader::default(), Vec::new(), 0);
        while at < code.len() {
            let operation = reader.read(&code[at..], at as u64, 0).unwrap();
            operations.push((at as u64, operation));
            at += usize::from(operation.length);
        }
        let mut groups = Groups::default();
        groups.find(&operations);
        groups
    }

    fn member(group: u8, offset: i32, first: bool) -> Option<Member> {
        Some(Member { group, offset, first })
    }

    #[test]
    fn pushes_and_what_is_near_the_stack_pointer_are_one_group() {
        // push rbp; push rbx; sub rsp, 18h; mov [rsp + 8], rdi; mov eax, [rsp + 10h]
        let code = [
            0x55, 0x53, 0x48, 0x83, 0xec, 0x18, 0x48, 0x89, 0x7c, 0x24, 8, 0x8b, 0x44, 0x24, 0x10,
        ];
        let groups = groups(&code);
        assert_eq!(groups.groups.len(), 1);
        let group = groups.groups[0];
        assert_eq!((group.length, group.memory.displacement as i64), (32, -32));
        assert!(group.memory.write && group.writes_first);
        assert_eq!(
            (groups.stack(0), groups.stack(1)),
            (member(0, 24, true), member(0, 16, false))
        );
        assert_eq!(
            (groups.operand(3), groups.operand(4)),
            (member(0, 0, false), member(0, 8, false))
        );
    }

    #[test]
    fn a_register_with_a_new_value_begins_a_new_group() {
        // mov rax, [rbx]; mov rbx, [rbx + 8]; mov rcx, [rbx]; add rbx, rcx; mov rdx, [rbx]
        let code = [
            0x48, 0x8b, 0x03, 0x48, 0x8b, 0x5b, 8, 0x48, 0x8b, 0x0b, 0x48, 0x01, 0xcb, 0x48, 0x8b, 0x13,
        ];
        let groups = groups(&code);
        assert_eq!(groups.groups.len(), 1);
        assert_eq!(
            (groups.operand(0), groups.operand(1)),
            (member(0, 0, true), member(0, 8, false))
        );
        assert_eq!((groups.operand(2), groups.operand(4)), (None, None));
    }

    #[test]
    fn what_is_far_away_or_by_another_index_is_another_group() {
        // mov eax, [rbx]; mov eax, [rbx + 1000h]; mov eax, [rbx + rcx]; mov eax, [rbx + rcx * 2]
        let code = [
            0x8b, 0x03, 0x8b, 0x83, 0, 0x10, 0, 0, 0x8b, 0x04, 0x0b, 0x8b, 0x04, 0x4b,
        ];
        assert!(groups(&code).groups.is_empty());
    }
}
