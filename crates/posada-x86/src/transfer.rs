//! Moves: MOV and its extensions, LEA, XCHG of registers, CMOV, SETcc, the stack, flags as data.

use crate::core::{Core, flag, gpr, seg};
use crate::fault::{Exec, Raised, vector};
use crate::flags::holds;
use crate::insn::{Insn, OPERAND16, WIDE};
use crate::operand::{Place, Source};
use crate::size::Size;

impl Core {
    /// Bytes of the stack pointer: 8 in 64-bit mode, else as SS.B says.
    fn stack_mask(&self) -> u64 {
        if self.bits64() {
            u64::MAX
        } else if self.segments[seg::SS].access & 1 << 14 != 0 {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// RSP moved by `by` bytes, wrapped as SS.B says.
    pub fn stack_moved(&self, by: i64) -> u64 {
        let (rsp, mask) = (self.regs[gpr::RSP], self.stack_mask());
        let moved = rsp.wrapping_add(by as u64) & mask;
        // A 32-bit stack pointer clears the upper half; a 16-bit one keeps the rest.
        if mask == 0xffff { rsp & !0xffff | moved } else { moved }
    }

    /// Linear address of `bytes` bytes at stack pointer `rsp`.
    ///
    /// # Errors
    /// #SS(0) beyond the segment.
    #[inline]
    pub fn stack_linear(&mut self, rsp: u64, bytes: u64, write: bool) -> Exec<u64> {
        if self.bits64() {
            return Ok(rsp);
        }
        let offset = rsp & self.stack_mask();
        self.segment_linear(seg::SS, offset, bytes, write)
    }

    /// What an access to the stack raised, as such accesses raise it: #SS(0) for a non-canonical address.
    #[cold]
    fn stack_fault<T>(&mut self) -> Exec<T> {
        if self.raised.non_canonical {
            return self.raise_code(vector::SS, 0);
        }
        Err(Raised)
    }

    fn load_stack(&mut self, linear: u64, bytes: u64) -> Exec<u64> {
        match bytes {
            2 => self.load::<u16>(linear).map(u64::from),
            4 => self.load::<u32>(linear).map(u64::from),
            _ => self.load::<u64>(linear),
        }
        .or_else(|_| self.stack_fault())
    }

    /// Stores 2, 4 or 8 bytes below the stack pointer and moves it.
    ///
    /// # Errors
    /// What the store raises; RSP is unchanged then.
    #[inline]
    pub fn push_size(&mut self, bytes: u64, value: u64) -> Exec {
        let rsp = self.stack_moved(-(bytes as i64));
        let linear = self.stack_linear(rsp, bytes, true)?;
        match bytes {
            2 => self.store(linear, value as u16),
            4 => self.store(linear, value as u32),
            _ => self.store(linear, value),
        }
        .or_else(|_| self.stack_fault())?;
        self.regs[gpr::RSP] = rsp;
        Ok(())
    }

    /// Loads 2, 4 or 8 bytes at the stack pointer, `skip` bytes up, without moving it.
    ///
    /// # Errors
    /// What the load raises.
    #[inline]
    pub fn peek_size(&mut self, bytes: u64, skip: u64) -> Exec<u64> {
        let at = self.stack_moved(skip as i64);
        let linear = self.stack_linear(at, bytes, false)?;
        self.load_stack(linear, bytes)
    }

    /// Loads 2, 4 or 8 bytes at the stack pointer and moves it.
    ///
    /// # Errors
    /// What the load raises; RSP is unchanged then.
    #[inline]
    pub fn pop_size(&mut self, bytes: u64) -> Exec<u64> {
        let value = self.peek_size(bytes, 0)?;
        self.regs[gpr::RSP] = self.stack_moved(bytes as i64);
        Ok(value)
    }
}

/// MOV.
pub fn mov<T: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let value = S::read::<T>(core, insn)?;
    D::write(core, insn, value)
}

/// MOV of rAX from an absolute offset, which is `imm`.
pub fn mov_from_offset<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.segment_linear(insn.segment.into(), insn.imm, T::BYTES, false)?;
    let value = core.load::<T>(linear)?;
    core.write_reg(0, value);
    Ok(())
}

/// MOV of rAX to an absolute offset.
pub fn mov_to_offset<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.segment_linear(insn.segment.into(), insn.imm, T::BYTES, true)?;
    core.store(linear, core.read_reg::<T>(0))
}

/// MOVZX, and MOV between sizes: zero-extends `F` to `T`.
pub fn movzx<T: Size, F: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let value = S::read::<F>(core, insn)?;
    D::write(core, insn, T::from_u64(value.to_u64()))
}

/// MOVSX and MOVSXD.
pub fn movsx<T: Size, F: Size, D: Place, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let value = S::read::<F>(core, insn)?;
    D::write(core, insn, T::from_u64(value.to_i64() as u64))
}

/// LEA.
pub fn lea<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let offset = core.offset_of(insn);
    core.write_reg(insn.reg, T::from_u64(offset));
    Ok(())
}

/// XCHG of two registers.
pub fn xchg<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let (reg, rm) = (core.read_reg::<T>(insn.reg), core.read_reg::<T>(insn.rm));
    core.write_reg(insn.reg, rm);
    core.write_reg(insn.rm, reg);
    Ok(())
}

/// CMOVcc: the source is read, and a 32-bit destination's upper half cleared, whatever the condition.
pub fn cmov<T: Size, S: Source, const CC: u8>(core: &mut Core, insn: &Insn) -> Exec {
    let value = S::read::<T>(core, insn)?;
    let value = if holds::<CC>(core.arithmetic) {
        value
    } else {
        core.read_reg(insn.reg)
    };
    core.write_reg(insn.reg, value);
    Ok(())
}

/// SETcc.
pub fn setcc<D: Place, const CC: u8>(core: &mut Core, insn: &Insn) -> Exec {
    D::write(core, insn, u8::from(holds::<CC>(core.arithmetic)))
}

/// CBW, CWDE, CDQE.
pub fn cbw(core: &mut Core, insn: &Insn) -> Exec {
    let rax = core.regs[gpr::RAX];
    if insn.flags & WIDE != 0 {
        core.write_reg(0, rax as i32 as i64 as u64);
    } else if insn.flags & OPERAND16 != 0 {
        core.write_reg(0, rax as i8 as i16 as u16);
    } else {
        core.write_reg(0, rax as i16 as i32 as u32);
    }
    Ok(())
}

/// CWD, CDQ, CQO.
pub fn cwd(core: &mut Core, insn: &Insn) -> Exec {
    let (rax, rdx) = (core.regs[gpr::RAX], gpr::RDX as u8 * 8);
    if insn.flags & WIDE != 0 {
        core.write_reg(rdx, ((rax as i64) >> 63) as u64);
    } else if insn.flags & OPERAND16 != 0 {
        core.write_reg(rdx, ((rax as i16) >> 15) as u16);
    } else {
        core.write_reg(rdx, ((rax as i32) >> 31) as u32);
    }
    Ok(())
}

/// XLAT: the memory operand is `[rBX]`.
pub fn xlat(core: &mut Core, insn: &Insn) -> Exec {
    let mut insn = *insn;
    insn.disp = i32::from(core.regs[gpr::RAX] as u8);
    let linear = core.linear(&insn, 1, false)?;
    let value = core.load::<u8>(linear)?;
    core.write_reg(0, value);
    Ok(())
}

/// PUSH in 64-bit mode.
pub fn push64<S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let value = S::read::<u64>(core, insn)?;
    let rsp = core.regs[gpr::RSP].wrapping_sub(8);
    core.store(rsp, value).or_else(|_| core.stack_fault())?;
    core.regs[gpr::RSP] = rsp;
    Ok(())
}

/// POP of a register in 64-bit mode.
pub fn pop64(core: &mut Core, insn: &Insn) -> Exec {
    let rsp = core.regs[gpr::RSP];
    let value = core.load::<u64>(rsp).or_else(|_| core.stack_fault())?;
    core.regs[gpr::RSP] = rsp.wrapping_add(8);
    core.write_reg(insn.reg, value);
    Ok(())
}

/// PUSH of 2 or 4 bytes.
pub fn push<T: Size, S: Source>(core: &mut Core, insn: &Insn) -> Exec {
    let value = S::read::<T>(core, insn)?;
    core.push_size(T::BYTES, value.to_u64())
}

/// POP, whose memory operand is addressed with RSP already moved.
pub fn pop<T: Size, D: Place>(core: &mut Core, insn: &Insn) -> Exec {
    let value = core.peek_size(T::BYTES, 0)?;
    let before = core.regs[gpr::RSP];
    core.regs[gpr::RSP] = core.stack_moved(T::BYTES as i64);
    D::write(core, insn, T::from_u64(value)).inspect_err(|_| core.regs[gpr::RSP] = before)
}

/// PUSHA and PUSHAD.
pub fn pusha(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = if insn.flags & OPERAND16 != 0 { 2 } else { 4 };
    let before = core.regs[gpr::RSP];
    for register in 0..8 {
        let value = if register == gpr::RSP {
            before
        } else {
            core.regs[register]
        };
        core.push_size(bytes, value)
            .inspect_err(|_| core.regs[gpr::RSP] = before)?;
    }
    Ok(())
}

/// POPA and POPAD: the image of RSP is skipped.
pub fn popa(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = if insn.flags & OPERAND16 != 0 { 2 } else { 4 };
    let mut values = [0; 8];
    for (at, value) in values.iter_mut().enumerate() {
        *value = core.peek_size(bytes, bytes * at as u64)?;
    }
    core.regs[gpr::RSP] = core.stack_moved(bytes as i64 * 8);
    for (register, value) in (0..8u8).rev().zip(values) {
        match (usize::from(register), bytes) {
            (gpr::RSP, _) => {}
            (_, 2) => core.write_reg(register * 8, value as u16),
            _ => core.write_reg(register * 8, value as u32),
        }
    }
    Ok(())
}

fn word_of(core: &Core, insn: &Insn) -> u64 {
    match (insn.flags & OPERAND16 != 0, core.bits64()) {
        (true, _) => 2,
        (false, true) => 8,
        (false, false) => 4,
    }
}

fn write_word(core: &mut Core, at: u8, bytes: u64, value: u64) {
    match bytes {
        2 => core.write_reg(at, value as u16),
        4 => core.write_reg(at, value as u32),
        _ => core.write_reg(at, value),
    }
}

/// ENTER: `imm` is the frame's size, with the nesting level in bits 16-20.
pub fn enter(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = word_of(core, insn);
    let (frame, level) = (insn.imm & 0xffff, insn.imm >> 16 & 0x1f);
    let (rsp, rbp) = (core.regs[gpr::RSP], core.regs[gpr::RBP]);
    let mut steps = || -> Exec<u64> {
        core.push_size(bytes, rbp)?;
        let top = core.regs[gpr::RSP];
        for step in 1..level {
            let mask = core.stack_mask();
            let at = rbp.wrapping_sub(bytes * step) & mask;
            let linear = core.stack_linear(at, bytes, false)?;
            let saved = core.load_stack(linear, bytes)?;
            core.push_size(bytes, saved)?;
        }
        if level > 0 {
            core.push_size(bytes, top)?;
        }
        // The new top must be writable, though nothing is stored there.
        let new = core.stack_moved(-(frame as i64));
        let linear = core.stack_linear(new, bytes, true)?;
        core.host_range(linear, bytes, true).or_else(|_| core.stack_fault())?;
        core.regs[gpr::RSP] = new;
        Ok(top)
    };
    match steps() {
        Ok(top) => {
            write_word(core, gpr::RBP as u8 * 8, bytes, top);
            Ok(())
        }
        Err(raised) => {
            core.regs[gpr::RSP] = rsp;
            Err(raised)
        }
    }
}

/// LEAVE.
pub fn leave(core: &mut Core, insn: &Insn) -> Exec {
    let bytes = word_of(core, insn);
    let (rsp, rbp) = (core.regs[gpr::RSP], core.regs[gpr::RBP]);
    let mask = core.stack_mask();
    core.regs[gpr::RSP] = if mask == 0xffff {
        rsp & !0xffff | rbp & 0xffff
    } else {
        rbp & mask
    };
    match core.pop_size(bytes) {
        Ok(value) => {
            write_word(core, gpr::RBP as u8 * 8, bytes, value);
            Ok(())
        }
        Err(raised) => {
            core.regs[gpr::RSP] = rsp;
            Err(raised)
        }
    }
}

/// PUSHF: RF and VM read as zero.
pub fn pushf(core: &mut Core, insn: &Insn) -> Exec {
    if core.virtual_8086() && core.system_flags & flag::IOPL != flag::IOPL {
        return core.general_protection();
    }
    let bytes = word_of(core, insn);
    core.push_size(bytes, core.rflags() & !(flag::RF | flag::VM))
}

/// POPF: what may change depends on CPL, IOPL and the operand size.
pub fn popf(core: &mut Core, insn: &Insn) -> Exec {
    let iopl = (core.system_flags >> 12 & 3) as u8;
    if core.virtual_8086() && iopl < 3 {
        return core.general_protection();
    }
    let bytes = word_of(core, insn);
    let value = core.pop_size(bytes)?;
    let mut may = flag::ARITHMETIC | flag::TF | flag::DF | flag::NT | flag::AC | flag::ID;
    if core.cpl <= iopl {
        may |= flag::IF;
    }
    if core.cpl == 0 {
        may |= flag::IOPL;
    }
    if bytes == 2 {
        may &= 0xffff;
    }
    let old = core.rflags() & !flag::RF;
    let new = old & !may | value & may;
    core.set_rflags(new);
    if (old ^ new) & !(flag::ARITHMETIC | flag::DF | flag::ID) != 0 {
        core.update_mode();
        core.interrupts_may_be_due();
    }
    Ok(())
}

/// LAHF.
pub fn lahf(core: &mut Core, _: &Insn) -> Exec {
    core.write_reg(1, (core.arithmetic >> 8) as u8);
    Ok(())
}

/// SAHF.
pub fn sahf(core: &mut Core, _: &Insn) -> Exec {
    let flags = u64::from(core.read_reg::<u8>(1)) | core.rflags() & flag::OF;
    core.set_arithmetic(flags);
    Ok(())
}

/// CLC, STC and CMC: `imm` 0, 1 or 2.
pub fn carry(core: &mut Core, insn: &Insn) -> Exec {
    const CF: u16 = 1 << 8;
    match insn.imm {
        0 => core.arithmetic &= !CF,
        1 => core.arithmetic |= CF,
        _ => core.arithmetic ^= CF,
    }
    Ok(())
}

/// CLD and STD: `imm` is the new DF.
pub fn direction(core: &mut Core, insn: &Insn) -> Exec {
    core.system_flags = core.system_flags & !flag::DF | insn.imm << 10;
    Ok(())
}

/// NOP, hints, fences the interpreter has no use for: it runs in program order on a host with the same rules.
pub fn nop(_: &mut Core, _: &Insn) -> Exec {
    Ok(())
}

/// MFENCE and LFENCE, SFENCE with it: orders what this vCPU did before against what follows.
pub fn fence(_: &mut Core, _: &Insn) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// PAUSE: a spinning vCPU lets others have the host's CPU now and then.
pub fn pause(core: &mut Core, _: &Insn) -> Exec {
    core.pauses = core.pauses.wrapping_add(1);
    if core.pauses.is_multiple_of(64) {
        std::thread::yield_now();
    }
    Ok(())
}

/// What is no instruction, or not here: #UD.
pub fn undefined(core: &mut Core, _: &Insn) -> Exec {
    core.raise(vector::UD)
}

/// An instruction of more than 15 bytes: #GP(0).
pub fn too_long(core: &mut Core, _: &Insn) -> Exec {
    core.general_protection()
}

#[cfg(test)]
mod tests;
