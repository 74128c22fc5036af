//! Instructions of the kernel that are too frequent to leave translated code for. All but RDTSC and PUSHF run at privilege
//! level 0 only.

use super::{Emitter, Leave, R10, R11, RSP, condition, frame};
use crate::core::flag;
use crate::translate::operation::{Kind, System};

const RAX: u8 = 0;
const RCX: u8 = 1;
const RDX: u8 = 2;

impl Emitter {
    /// An instruction that does not end its block.
    pub(super) fn system(&mut self, system: System, live: bool) {
        match system {
            System::Cli => {
                self.save(live);
                self.assembler.and_dword(frame::SYSTEM_FLAGS, !(flag::IF as u32));
            }
            System::Sti => self.sti(live),
            System::Swapgs => {
                self.held = None;
                let a = &mut self.assembler;
                a.load(R10, frame::segment_base(5));
                a.load(R11, frame::KERNEL_GS_BASE);
                a.store(frame::KERNEL_GS_BASE, R10);
                a.store(frame::segment_base(5), R11);
            }
            System::PushFlags => self.push_flags(system),
            System::ReadTsc(with_processor) => {
                let a = &mut self.assembler;
                if with_processor {
                    // rdtscp: waits for earlier loads.
                    a.bytes(&[0x0f, 0x01, 0xf9]);
                    a.load(RCX, frame::TSC_AUX);
                } else {
                    a.bytes(&[0x0f, 0x31]);
                }
                // rorx rdx, rdx, 32; lea rax, [rax + rdx]
                a.bytes(&[0xc4, 0xe3, 0xfb, 0xf0, 0xd2, 32, 0x48, 0x8d, 0x04, 0x10]);
                a.load(R11, frame::TSC_OFFSET);
                // lea rax, [rax + r11]; rorx rdx, rax, 32; mov edx, edx; mov eax, eax
                a.bytes(&[
                    0x4a, 0x8d, 0x04, 0x18, 0xc4, 0xe3, 0xfb, 0xf0, 0xd0, 32, 0x89, 0xd2, 0x89, 0xc0,
                ]);
                debug_assert!((RAX, RDX) == (0, 2));
            }
            System::SetAccess(_) => unreachable!("ends its block"),
        }
    }

    /// Sets IF. If an interrupt waits for that, the interpreter does it, with all that follows.
    fn sti(&mut self, live: bool) {
        self.save(live);
        let a = &mut self.assembler;
        a.test_dword(frame::SYSTEM_FLAGS, flag::IF as u32);
        let done = a.branch(condition::NE);
        a.compare_byte_zero(frame::INTERRUPT_DUE);
        self.leave_if(condition::NE, Leave::Interpret);
        let a = &mut self.assembler;
        a.or_dword(frame::SYSTEM_FLAGS, flag::IF as u32);
        a.land(done);
    }

    /// PUSHFQ. The flags are in the Core, saved before.
    fn push_flags(&mut self, system: System) {
        self.save(true);
        let offset = self.stack_address(Kind::System(system));
        let a = &mut self.assembler;
        a.load_word(R11, frame::ARITHMETIC);
        // rorx r11d, r11d, 8: the flags of AH in their places, OF in bit 24.
        a.bytes(&[0xc4, 0x43, 0x7b, 0xf0, 0xdb, 8]);
        a.gather_r11(frame::FLAGS_FROM);
        a.scatter_r11(frame::FLAGS_TO);
        a.or_from(R11, frame::SYSTEM_FLAGS);
        a.store_at(offset, R11);
        a.add(RSP, RSP, -8);
    }

    /// STAC and CLAC: the next instruction runs in another mode.
    pub(super) fn set_access(&mut self, on: bool, next: u64, live: bool) {
        self.save(live);
        let mode = if on { 2 } else { 1 };
        let a = &mut self.assembler;
        if on {
            a.or_dword(frame::SYSTEM_FLAGS, flag::AC as u32);
        } else {
            a.and_dword(frame::SYSTEM_FLAGS, !(flag::AC as u32));
        }
        a.store_constant(frame::ACTIVE, frame::active(mode) as i32);
        self.settle(live);
        self.publish(live);
        self.jump_far(next, frame::jumps(mode));
    }
}
