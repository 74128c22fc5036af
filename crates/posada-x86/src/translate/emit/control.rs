//! Branches: what they push and pop, and the ways from block to block.

use super::{Cold, Emitter, Hole, Leave, R10, R11, RSP, System, condition, frame};
use crate::translate::operation::{Kind, Memory, Operation};
use crate::translate::relocation::Holds;

impl Emitter {
    /// Before a jump through a jump cache: puts the flags into the Core too, as a slot may lead to code that destroys them
    /// before it finds that it is not meant. R11 is lost.
    pub(super) fn publish(&mut self, live: bool) {
        if live {
            self.store_flags();
        }
    }

    /// To known code that may be mapped anew, through its slot of a jump cache.
    pub(super) fn jump_far(&mut self, target: u64, jumps: usize) {
        let slot = frame::slot(target, self.jump_mask);
        self.assembler.place(R10, target, Holds::Linear);
        self.assembler.jump_through_slot(jumps + slot * 8);
    }

    pub(super) fn control(&mut self, operation: &Operation, live: bool) {
        let next = self.rip.wrapping_add(operation.length.into());
        match operation.kind {
            Kind::Jump(target) => {
                self.settle(live);
                let hole = self.assembler.jump();
                self.exit(hole, target, live);
            }
            Kind::Branch(code, target) => {
                self.settle(live);
                let hole = self.assembler.branch(code);
                self.exit(hole, target, live);
            }
            Kind::Count(opcode, target) => {
                self.settle(live);
                // Taken: over the jump that leads past the exit.
                self.assembler.bytes(&[opcode, 2, 0xeb, 5]);
                let hole = self.assembler.jump();
                self.exit(hole, target, live);
            }
            Kind::Call(target) => {
                let offset = self.stack_address(operation.kind);
                self.push_next(offset, next);
                self.settle(live);
                let hole = self.assembler.jump();
                self.exit(hole, target, live);
            }
            Kind::CallRegister(register) => {
                if self.exact {
                    let from = self.value(register);
                    self.assembler.copy(R10, from);
                    self.canonical(live);
                    self.held = None;
                }
                let offset = self.stack_address(operation.kind);
                if register == RSP {
                    self.assembler.store(frame::TEMPORARY, RSP);
                }
                self.push_next(offset, next);
                self.settle(live);
                if register == RSP {
                    self.assembler.load(R10, frame::TEMPORARY);
                } else {
                    let from = self.value(register);
                    self.assembler.copy(R10, from);
                }
                self.jump_r10(live);
            }
            Kind::CallMemory(memory) => {
                self.load_operand(&memory);
                self.canonical(live);
                let offset = self.stack_address(operation.kind);
                self.push_next(offset, next);
                self.settle(live);
                self.assembler.load(R10, frame::TEMPORARY);
                self.jump_r10(live);
            }
            Kind::JumpRegister(register) => {
                let from = self.value(register);
                self.assembler.copy(R10, from);
                self.canonical(live);
                self.settle(live);
                self.jump_r10(live);
            }
            Kind::JumpMemory(memory) => {
                self.access(&memory);
                self.assembler.load_at(R10, 0);
                self.canonical(live);
                self.settle(live);
                self.jump_r10(live);
            }
            Kind::System(System::SetAccess(on)) => self.set_access(on, next, live),
            Kind::Return(drop) => {
                let offset = self.stack_address(operation.kind);
                self.assembler.load_at(R10, offset);
                self.canonical(live);
                self.assembler.add(RSP, RSP, 8 + i32::from(drop));
                self.settle(live);
                self.jump_r10(live);
            }
            _ => unreachable!("{:?} is no branch", operation.kind),
        }
    }

    /// Eight bytes of memory into the frame.
    pub(super) fn load_operand(&mut self, memory: &Memory) {
        self.access(memory);
        self.assembler.load_at(R10, 0);
        self.assembler.store(frame::TEMPORARY, R10);
    }

    /// Stores a return address at `[R10 + offset]` and moves RSP.
    pub(super) fn push_next(&mut self, offset: i32, next: u64) {
        match i32::try_from(next as i64) {
            Ok(next) => self.assembler.store_linear_at(offset, next),
            Err(_) => {
                self.assembler.place(R11, next, Holds::Linear);
                self.assembler.store_at(offset, R11);
            }
        }
        self.assembler.add(RSP, RSP, -8);
    }

    /// A branch to R10 faults at the branch itself if the address is not canonical. Otherwise the fault comes at the target.
    pub(super) fn canonical(&mut self, live: bool) {
        if self.exact {
            self.save(live);
            let a = &mut self.assembler;
            a.copy(R11, R10);
            // shl r11, 16; sar r11, 16
            a.bytes(&[0x49, 0xc1, 0xe3, 16, 0x49, 0xc1, 0xfb, 16]);
            a.compare_scratch();
            self.leave_if(condition::NE, Leave::Interpret);
        }
    }

    /// To the guest's code at R10, through the jump cache.
    pub(super) fn jump_r10(&mut self, live: bool) {
        self.publish(live);
        self.assembler.jump_index(frame::JUMP_MASK);
        self.assembler.jump_indexed(self.jumps);
    }

    /// The way on to `target` from a jump: straight, if source and target are mapped together.
    pub(super) fn exit(&mut self, hole: Hole, target: u64, live: bool) {
        if target == self.start && !self.plain && !self.once {
            let (again, vectors) = self.again;
            let to = if self.vectors >= vectors { again } else { self.entry };
            self.assembler.fill(hole, to);
        } else if (target ^ self.start) >> self.shift == 0 {
            self.cold.push(Cold::Chain { hole, target });
        } else {
            self.cold.push(Cold::Far { hole, target, live });
        }
    }
}
