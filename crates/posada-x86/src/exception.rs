//! Delivery of exceptions and interrupts through the IVT or IDT (Intel SDM 3A, chapter 6).

use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exception, Exec, vector};
use crate::system::descriptor::null_segment;
use posada_engine::Segment;

/// What is being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Exception,
    External,
    /// INT n, INT3, INTO: gates check their DPL.
    Software,
}

/// Exceptions that make a double fault out of one that follows (table 6-5).
fn contributory(vector: u8) -> bool {
    vector == vector::DE || (vector::TS..=vector::GP).contains(&vector)
}

impl Core {
    /// Delivers an exception, with RIP at the instruction to return to; faults on the way become #DF, then shutdown.
    pub fn deliver(&mut self, exception: Exception) {
        let mut exception = exception;
        loop {
            match exception.vector {
                vector::PF => self.cr[2] = exception.address,
                vector::DB => {
                    self.dr[6] |= exception.dr6;
                    self.dr[7] &= !(1 << 13);
                }
                _ => {}
            }
            if self.enter(exception.vector, exception.error, Source::Exception).is_ok() {
                return;
            }
            let (first, second) = (exception.vector, self.raised.vector);
            if first == vector::DF {
                self.shut_down = true;
                self.leave_block();
                return;
            }
            let double = contributory(first) && contributory(second)
                || first == vector::PF && (contributory(second) || second == vector::PF);
            exception = if double {
                Exception {
                    vector: vector::DF,
                    error: Some(0),
                    ..Exception::default()
                }
            } else {
                self.raised
            };
        }
    }

    /// Delivers an external interrupt or NMI.
    pub fn interrupt(&mut self, vector: u8) {
        self.halted = false;
        if self.enter(vector, None, Source::External).is_err() {
            let raised = self.raised;
            self.deliver(raised);
        }
    }

    /// INT n (once IOPL allows it in virtual-8086 mode), INT3, INTO: RIP is at the next instruction.
    ///
    /// # Errors
    /// What the gate or the handler's stack raises.
    pub fn software_interrupt(&mut self, vector: u8) -> Exec {
        self.enter(vector, None, Source::Software)
    }

    /// Changes nothing but the handler's stack if it fails.
    fn enter(&mut self, number: u8, error: Option<u32>, source: Source) -> Exec {
        let external = u32::from(source != Source::Software);
        if !self.protected() {
            return self.enter_real(number);
        }
        let gate_error = u32::from(number) << 3 | 2 | external;
        let long = self.long_mode();
        let size = if long { 16 } else { 8 };
        let at = u64::from(number) * size;
        if at + size - 1 > u64::from(self.idtr.limit) {
            return self.raise_code(vector::GP, gate_error);
        }
        let at = self.idtr.base.wrapping_add(at);
        let gate = self.load_system::<u64>(at)?;
        let kind = gate >> 40 & 0x1f;
        let valid = if long {
            matches!(kind, 14 | 15)
        } else {
            matches!(kind, 6 | 7 | 14 | 15)
        };
        if !valid || source == Source::Software && (gate >> 45 & 3) < u64::from(self.cpl) {
            return self.raise_code(vector::GP, gate_error);
        }
        if gate >> 47 & 1 == 0 {
            return self.raise_code(vector::NP, gate_error);
        }
        let mut target = gate & 0xffff | gate >> 32 & 0xffff_0000;
        if long {
            target |= u64::from(self.load_system::<u32>(at.wrapping_add(8))?) << 32;
        } else if kind < 8 {
            target &= 0xffff;
        }
        let selector = (gate >> 16) as u16;
        let mut code = self.descriptor_of(selector, vector::GP, external)?;
        let code_error = u32::from(selector & 0xfffc) | external;
        let dpl = (code.access >> 5 & 3) as u8;
        let sixty_four = code.access & 1 << 13 != 0;
        if code.access & 0x18 != 0x18 || dpl > self.cpl || long && (!sixty_four || code.access & 1 << 14 != 0) {
            return self.raise_code(vector::GP, code_error);
        }
        if code.access & 0x80 == 0 {
            return self.raise_code(vector::NP, code_error);
        }
        let inner = if code.access & 4 != 0 { self.cpl } else { dpl };
        let v86 = self.virtual_8086();
        if v86 && inner != 0 {
            return self.raise_code(vector::GP, code_error);
        }
        code.selector = selector & !3 | u16::from(inner);
        if long && (target as i64) << 16 >> 16 != target as i64 || !long && target > u64::from(code.limit) {
            return self.raise_code(vector::GP, external);
        }
        let (old_ss, old_rsp) = (self.segments[seg::SS], self.regs[gpr::RSP]);
        let switch = inner < self.cpl;
        let ist = if long { gate >> 32 & 7 } else { 0 };
        let (stack, mut rsp) = match (ist, switch) {
            (0, true) => self.inner_stack(inner, external)?,
            (0, false) => (old_ss, old_rsp),
            (_, _) => {
                let rsp = self.tss_word::<u64>(0x1c + ist * 8, external)?;
                (
                    if switch {
                        null_segment(inner.into(), inner)
                    } else {
                        old_ss
                    },
                    rsp,
                )
            }
        };
        if long {
            rsp &= !0xf;
        }
        let mut frame = [0; 10];
        let mut count = 0;
        let mut push = |value: u64| {
            frame[count] = value;
            count += 1;
        };
        if v86 {
            for register in [seg::GS, seg::FS, seg::DS, seg::ES] {
                push(self.segments[register].selector.into());
            }
        }
        if long || switch {
            push(old_ss.selector.into());
            push(old_rsp);
        }
        let fault = source == Source::Exception && !matches!(number, vector::DB | vector::BP | vector::OF);
        push(self.rflags() | if fault { flag::RF } else { 0 });
        push(self.segments[seg::CS].selector.into());
        push(self.rip());
        if let Some(error) = error {
            push(error.into());
        }
        let wide = stack.access & 1 << 14 != 0;
        for &value in &frame[..count] {
            let bytes = if long {
                8
            } else if kind < 8 {
                2
            } else {
                4
            };
            let moved = rsp.wrapping_sub(bytes);
            rsp = match (long, wide) {
                (true, _) => moved,
                (false, true) => moved & 0xffff_ffff,
                (false, false) => rsp & !0xffff | moved & 0xffff,
            };
            let offset = if long || wide { rsp } else { rsp & 0xffff };
            let linear = if long {
                offset
            } else {
                stack.base.wrapping_add(offset) & 0xffff_ffff
            };
            match (bytes, inner == 3) {
                (8, false) => self.store_system(linear, value)?,
                (8, true) => self.store(linear, value)?,
                (4, false) => self.store_system(linear, value as u32)?,
                (4, true) => self.store(linear, value as u32)?,
                (_, false) => self.store_system(linear, value as u16)?,
                (_, true) => self.store(linear, value as u16)?,
            }
        }
        self.regs[gpr::RSP] = rsp;
        self.segments[seg::CS] = code;
        self.segments[seg::SS] = stack;
        if v86 {
            for register in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.segments[register] = Segment::default();
            }
        }
        self.set_rip(target);
        self.system_flags &= !(flag::TF | flag::NT | flag::RF | flag::VM);
        if kind & 1 == 0 {
            self.system_flags &= !flag::IF;
        }
        self.interrupt_shadow = false;
        self.entered = true;
        self.update_mode();
        Ok(())
    }

    fn enter_real(&mut self, number: u8) -> Exec {
        let at = u64::from(number) * 4;
        if at + 3 > u64::from(self.idtr.limit) {
            return self.general_protection();
        }
        let entry = self.load_system::<u32>(self.idtr.base.wrapping_add(at))?;
        let frame = [self.rflags(), self.segments[seg::CS].selector.into(), self.rip()];
        let mut rsp = self.regs[gpr::RSP];
        for value in frame {
            rsp = rsp & !0xffff | rsp.wrapping_sub(2) & 0xffff;
            let linear = self.segments[seg::SS].base.wrapping_add(rsp & 0xffff);
            self.store_system(linear, value as u16)?;
        }
        self.regs[gpr::RSP] = rsp;
        let selector = (entry >> 16) as u16;
        self.segments[seg::CS].selector = selector;
        self.segments[seg::CS].base = u64::from(selector) << 4;
        self.set_rip(u64::from(entry as u16));
        self.system_flags &= !(flag::IF | flag::TF | flag::RF | flag::AC);
        self.interrupt_shadow = false;
        self.entered = true;
        self.update_mode();
        Ok(())
    }

    /// The stack that the task state segment gives for an inner privilege level.
    pub(crate) fn inner_stack(&mut self, inner: u8, external: u32) -> Exec<(Segment, u64)> {
        if self.long_mode() {
            let rsp = self.tss_word::<u64>(4 + u64::from(inner) * 8, external)?;
            return Ok((null_segment(inner.into(), inner), rsp));
        }
        let (rsp, selector) = if self.tr.access & 8 != 0 {
            let at = 4 + u64::from(inner) * 8;
            let rsp = self.tss_word::<u32>(at, external)?;
            (u64::from(rsp), self.tss_word::<u16>(at + 4, external)?)
        } else {
            let at = 2 + u64::from(inner) * 4;
            let rsp = self.tss_word::<u16>(at, external)?;
            (u64::from(rsp), self.tss_word::<u16>(at + 2, external)?)
        };
        let stack = self.descriptor_of(selector, vector::TS, external)?;
        let privileges = selector & 3 == u16::from(inner) && stack.access >> 5 & 3 == u16::from(inner);
        if !privileges || stack.access & 0x1a != 0x12 {
            return self.raise_code(vector::TS, u32::from(selector & 0xfffc) | external);
        }
        if stack.access & 0x80 == 0 {
            return self.raise_code(vector::SS, u32::from(selector & 0xfffc) | external);
        }
        Ok((stack, rsp))
    }

    /// A field of the task state segment.
    fn tss_word<T: crate::size::Size>(&mut self, at: u64, external: u32) -> Exec<T> {
        if at + T::BYTES - 1 > u64::from(self.tr.limit) {
            return self.raise_code(vector::TS, u32::from(self.tr.selector & 0xfffc) | external);
        }
        self.load_system(self.tr.base.wrapping_add(at))
    }

    /// Reads a segment's descriptor from the GDT or LDT; a null selector or one outside the table raises `fault`.
    pub(crate) fn descriptor_of(&mut self, selector: u16, fault: u8, external: u32) -> Exec<Segment> {
        let (base, limit) = if selector & 4 == 0 {
            (self.gdtr.base, u32::from(self.gdtr.limit))
        } else if self.ldtr.access & 0x80 != 0 {
            (self.ldtr.base, self.ldtr.limit)
        } else {
            (0, 0)
        };
        if selector & 0xfffc == 0 || u32::from(selector | 7) > limit {
            return self.raise_code(fault, u32::from(selector & 0xfffc) | external);
        }
        let raw = self.load_system::<u64>(base.wrapping_add(u64::from(selector & 0xfff8)))?;
        let access = (raw >> 40) as u16 & 0xf0ff;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        Ok(Segment {
            selector,
            base: raw >> 16 & 0xff_ffff | raw >> 32 & 0xff00_0000,
            limit: if access & 1 << 15 != 0 {
                limit << 12 | 0xfff
            } else {
                limit
            },
            access,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::tests::core;

    fn long_mode_core() -> Box<Core> {
        let mut core = core();
        // GDT at linear 0x100: 64-bit code at 8. IDT at linear 0x200: #PF through a gate at 14.
        core.gdtr.base = 0x100;
        core.gdtr.limit = 15;
        core.idtr.base = 0x200;
        core.idtr.limit = 0xfff;
        core.store(0x108u64, 0x00af_9b00_0000_ffffu64).unwrap();
        core.store(0x2e0u64, 0x0000_8e00_0008_4321u64).unwrap();
        core.store(0x2e8u64, 0u64).unwrap();
        core.regs[gpr::RSP] = 0xf08;
        core.set_rip(0x77);
        core
    }

    fn page_fault() -> Exception {
        Exception {
            vector: vector::PF,
            error: Some(2),
            address: 0x5555,
            ..Exception::default()
        }
    }

    #[test]
    fn a_page_fault_reaches_its_64_bit_handler() {
        let mut core = long_mode_core();
        core.system_flags |= flag::IF;
        core.deliver(page_fault());
        assert_eq!((core.rip(), core.cr[2], core.regs[gpr::RSP]), (0x4321, 0x5555, 0xed0));
        let frame = [0, 8, 16, 24, 32, 40].map(|at| core.load::<u64>(0xed0 + at).unwrap());
        assert_eq!(frame, [2, 0x77, 0xf000, 0x1_0202, 0xf08, 0]);
        assert_eq!((core.segments[seg::CS].selector, core.system_flags & flag::IF), (8, 0));
    }

    #[test]
    fn a_user_fault_takes_the_task_segments_stack() {
        let mut core = long_mode_core();
        core.tr.base = 0x800;
        core.store(0x804u64, 0xe00u64).unwrap();
        core.segments[seg::SS] = Segment {
            selector: 0x2b,
            access: 0xf3,
            ..Segment::default()
        };
        core.update_mode();
        core.deliver(page_fault());
        assert_eq!((core.cpl, core.regs[gpr::RSP], core.rip()), (0, 0xdd0, 0x4321));
        assert_eq!(core.load::<u64>(0xdf8), Ok(0x2b));
    }

    #[test]
    fn a_fault_without_any_handler_shuts_down() {
        let mut core = long_mode_core();
        core.idtr.limit = 0;
        core.deliver(page_fault());
        assert!(core.shut_down);
    }

    #[test]
    fn real_mode_goes_through_the_vector_table() {
        let mut core = core();
        core.msr.efer = 0;
        core.cr[0] = 0x10;
        core.segments = posada_engine::CpuState::reset().segments;
        core.update_mode();
        core.physical_write(8 * 4, &[0x34, 0x12, 0x00, 0x20]);
        core.set_rip(0x99);
        core.regs[gpr::RSP] = 0x700;
        core.idtr.base = 0;
        core.idtr.limit = 0x3ff;
        core.interrupt(8);
        assert_eq!(
            (core.rip(), core.segments[seg::CS].base, core.regs[gpr::RSP]),
            (0x1234, 0x2_0000, 0x6fa)
        );
        assert_eq!(core.load_system::<u16>(0x6fa), Ok(0x99));
    }
}
