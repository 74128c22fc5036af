//! From a memory operand's linear address to the host's: lookups in the soft TLB, one by one or for a group.

use super::{
    Cold, Emitter, Group, Hole, Kind, Leave, Member, Memory, R10, R11, SCRATCH, Wanted, condition, frame, groups,
};

/// A comparison with a tag.
#[derive(Clone, Copy)]
pub(super) struct Tag {
    /// The branch that is taken if it fails.
    pub(super) hole: Hole,
    /// Offset of its begin.
    pub(super) retry: usize,
    /// Where the tag is.
    place: usize,
    /// It is that of the stack's entry; otherwise R11 is to be added.
    stack: bool,
}

impl Emitter {
    /// The linear address of an operand into R10.
    pub(super) fn address(&mut self, memory: &Memory) {
        self.held = None;
        let a = &mut self.assembler;
        if memory.base.is_none() && memory.index.is_none() {
            a.named(R10, memory);
        } else {
            let used = [memory.base, memory.index];
            for register in SCRATCH {
                if used.contains(&Some(register)) {
                    a.load(register, frame::reg(register));
                }
            }
            a.lea(R10, memory);
        }
        if let Some(segment) = memory.segment {
            a.load(R11, frame::segment_base(segment));
            // lea r10, [r10 + r11]
            a.bytes(&[0x4f, 0x8d, 0x14, 0x1a]);
        }
    }

    /// From the linear address in R10 to the host's, if the soft TLB knows it. The flags are lost.
    pub(super) fn check(&mut self, size: u8, write: bool, stack: bool) {
        let wanted = if write { Wanted::Write } else { Wanted::Read };
        let tag = self.compare_tag(size.into(), write, stack);
        self.cold.push(Cold::Miss { tag, wanted });
    }

    /// The comparison of a check; and R10 for the case that it succeeds.
    pub(super) fn compare_tag(&mut self, length: i32, write: bool, stack: bool) -> Tag {
        self.held = None;
        let table = if stack {
            frame::stack(self.mode)
        } else {
            frame::table(self.mode)
        };
        let place = if write { table.write } else { table.read };
        let a = &mut self.assembler;
        if self.counting {
            a.increment(frame::LOOKUPS);
        }
        let retry = a.here();
        if stack {
            a.xor_stack(place);
        } else {
            a.page_bits();
            a.mask_r11(frame::INDEX_MASK);
            a.xor_tag(place);
        }
        a.compare_r10(4096 - length);
        let hole = a.branch(condition::A);
        if stack {
            a.add_stack(table.host);
        } else {
            a.add_host(table.host);
        }
        Tag {
            hole,
            retry,
            place,
            stack,
        }
    }

    /// What a check does that failed, up to the stub that looks further.
    pub(super) fn miss(&mut self, tag: Tag, wanted: Wanted) {
        let a = &mut self.assembler;
        if tag.stack {
            a.xor_stack(tag.place);
        } else {
            a.xor_tag(tag.place);
        }
        let back = a.address_r11();
        a.fill(back, tag.retry);
        let stub = if tag.stack {
            self.stubs.stack[self.mode][wanted as usize]
        } else {
            self.stubs.miss[wanted as usize]
        };
        a.jump_to(stub);
    }

    /// Makes R10 the host address of a group's range; where in it the access is.
    pub(super) fn group(&mut self, member: Member) -> i32 {
        if member.first {
            let Group {
                memory,
                length,
                writes_first,
            } = self.groups.groups[usize::from(member.group)];
            let wanted = match (memory.write, writes_first) {
                (false, _) => Wanted::Read,
                (true, true) => Wanted::Write,
                (true, false) => Wanted::Writable,
            };
            self.address(&memory);
            let tag = self.compare_tag(length, memory.write, memory.is_stack());
            self.assembler.store(frame::range(member.group), R10);
            self.cold.push(Cold::MissGroup {
                tag,
                wanted,
                rip: self.rip,
                saved: self.saved,
            });
        } else if self.held != Some(member.group) {
            self.assembler.load(R10, frame::range(member.group));
        }
        self.held = Some(member.group);
        member.offset
    }

    /// Makes R10 an address on the host, and returns how far from there is what an instruction pushes or pops.
    pub(super) fn stack_address(&mut self, kind: Kind) -> i32 {
        if let Some(member) = self.groups.stack(self.at) {
            return self.group(member);
        }
        let memory = groups::stack_memory(kind).expect("it uses the stack");
        self.address(&memory);
        self.check(memory.size, memory.write, memory.is_stack());
        0
    }

    /// Host address of an operand into R10.
    pub(super) fn access(&mut self, memory: &Memory) {
        self.address(memory);
        self.check(memory.size, memory.write, memory.is_stack());
        self.locked(memory);
    }

    pub(super) fn locked(&mut self, memory: &Memory) {
        if memory.locked && memory.size > 1 {
            // What may cross a cache line is the interpreter's: the host may forbid it.
            self.assembler.test_r10(memory.size.next_power_of_two() - 1);
            self.leave_if(condition::NE, Leave::Interpret);
        }
    }

    /// Moves R10 by the words that a bit's number in `register` names. The flags are lost.
    pub(super) fn bit_string(&mut self, register: u8, forward: bool) {
        let from = self.value(register);
        let a = &mut self.assembler;
        a.copy(R11, from);
        // sar r11, 6
        a.bytes(&[0x49, 0xc1, 0xfb, 6]);
        if !forward {
            // neg r11
            a.bytes(&[0x49, 0xf7, 0xdb]);
        }
        // lea r10, [r10 + r11 * 8]
        a.bytes(&[0x4f, 0x8d, 0x14, 0xda]);
    }
}
