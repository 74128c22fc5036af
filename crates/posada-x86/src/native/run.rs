//! Running forms: availability, pending exceptions, the memory operand, the stub, and what the x87 unit notes about it.

use super::arena::arena;
use super::form::{Form, needs};
use super::selected;
use crate::core::{CodeSize, Core};
use crate::fault::{Exec, vector};
use crate::insn::{Handler, Insn};
use crate::xsave;

/// The handler for instructions of a form: the simplest that does.
pub fn handler(form: &Form) -> Handler {
    match (form.x87(), form.bytes) {
        (true, _) => x87,
        (false, 0) => registers,
        (false, _) if form.masked.is_some() => masked_memory,
        (false, _) => memory,
    }
}

fn form(insn: &Insn) -> &'static Form {
    // SAFETY: `decode` pairs the handlers that come here with a form, which is never freed.
    unsafe { &*(insn.imm as *const Form) }
}

fn registers(core: &mut Core, insn: &Insn) -> Exec {
    let form = form(insn);
    core.permit(form.needs, form.mmx)?;
    call(core, form, std::ptr::null_mut())
}

fn memory(core: &mut Core, insn: &Insn) -> Exec {
    let form = form(insn);
    core.permit(form.needs, form.mmx)?;
    with_memory(core, insn, form)
}

fn masked_memory(core: &mut Core, insn: &Insn) -> Exec {
    let form = form(insn);
    core.permit(form.needs, form.mmx)?;
    selected::with_memory(core, insn, form)
}

fn x87(core: &mut Core, insn: &Insn) -> Exec {
    execute_x87(core, insn, form(insn))
}

/// Runs an instruction whose form the arena does not keep: `imm` is its key.
pub fn once(core: &mut Core, insn: &Insn) -> Exec {
    let run = |form: &Form| {
        if form.x87() {
            return execute_x87(core, insn, form);
        }
        core.permit(form.needs, form.mmx)?;
        match (form.bytes, form.masked) {
            (0, _) => call(core, form, std::ptr::null_mut()),
            (_, None) => with_memory(core, insn, form),
            (_, Some(_)) => selected::with_memory(core, insn, form),
        }
    };
    let arena = arena().expect("decoding needed it");
    arena.once(insn.imm, run).expect("decoding made this key")
}

#[inline(always)]
pub(super) fn call(core: &mut Core, form: &Form, memory: *mut u8) -> Exec {
    // SAFETY: the stub touches the core's registers and the form's bytes at `memory`, and keeps the ABI.
    if unsafe { form.stub()(core, memory) } == 0 {
        if core.vector.zmm_high_used {
            core.clear_high(form.clears);
        }
        core.vector.zmm_high_used |= form.widens;
        return Ok(());
    }
    // CR4.OSXMMEXCPT.
    let handled = core.cr[4] & 1 << 10 != 0;
    core.raise(if handled { vector::XM } else { vector::UD })
}

#[inline(always)]
pub(super) fn with_memory(core: &mut Core, insn: &Insn, form: &Form) -> Exec {
    let bytes = u64::from(form.bytes);
    let linear = core.linear(insn, bytes, form.write)?;
    if linear & u64::from(form.align) != 0 {
        return core.general_protection();
    }
    match core.host_range(linear, bytes, form.write)? {
        Some(pointer) => call(core, form, pointer),
        None => bounce(core, form, linear),
    }
}

#[repr(align(64))]
pub(super) struct Bounce(pub(super) [u8; 128]);

/// The operand crosses a page, is not RAM, or is to be written over code: goes through a buffer.
#[cold]
#[inline(never)]
fn bounce(core: &mut Core, form: &Form, linear: u64) -> Exec {
    let mut buffer = Bounce([0; 128]);
    let bytes = &mut buffer.0[..usize::from(form.bytes)];
    // A store of the x87 unit may not happen: an unmasked exception keeps what is there.
    let unmasked = form.x87() && core.vector.fx[0] & 0x3f != 0x3f;
    if form.read || unmasked {
        core.load_bytes(linear, bytes)?;
    }
    if !form.write {
        return call(core, form, bytes.as_mut_ptr());
    }
    let before = (core.regs, core.arithmetic, core.vector.clone());
    call(core, form, bytes.as_mut_ptr())?;
    // The rights were checked, but another processor may have changed them since.
    core.store_bytes(linear, bytes).inspect_err(|_| {
        (core.regs, core.arithmetic, core.vector) = before;
    })
}

fn execute_x87(core: &mut Core, insn: &Insn, form: &Form) -> Exec {
    core.permit(form.needs, form.mmx)?;
    if form.waits {
        core.wait_x87()?;
    }
    let (note, data) = (word(core, 6), field(core, 16));
    // Not what the host will note, so that a change is seen.
    if form.notes {
        set_word(core, 6, form.opcode ^ 1);
    }
    let result = if form.bytes == 0 {
        call(core, form, std::ptr::null_mut())
    } else {
        with_memory(core, insn, form)
    };
    match word(core, 6) {
        _ if !form.notes => {}
        noted if noted == form.opcode => set_word(core, 6, insn.extra as u16),
        noted if noted == form.opcode ^ 1 => set_word(core, 6, note),
        _ => {}
    }
    // The host noted where its own copy of the instruction and the operand are.
    if field(core, 8) == form.instruction() {
        let start = core.rip().wrapping_sub(insn.length.into());
        let start = match core.code_size {
            CodeSize::Bits64 => start,
            CodeSize::Bits32 => start & 0xffff_ffff,
            CodeSize::Bits16 => start & 0xffff,
        };
        set_field(core, 8, start);
        if form.bytes != 0 && field(core, 16) != data {
            set_field(core, 16, core.offset_of(insn));
        }
    }
    result
}

fn word(core: &Core, at: usize) -> u16 {
    u16::from_le_bytes([core.vector.fx[at], core.vector.fx[at + 1]])
}

fn set_word(core: &mut Core, at: usize, value: u16) {
    core.vector.fx[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn field(core: &Core, at: usize) -> u64 {
    u64::from_le_bytes(core.vector.fx[at..at + 8].try_into().expect("eight bytes"))
}

fn set_field(core: &mut Core, at: usize, value: u64) {
    core.vector.fx[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// FWAIT.
pub fn wait(core: &mut Core, _: &Insn) -> Exec {
    // CR0.MP and CR0.TS.
    if core.cr[0] & 0xa == 0xa {
        return core.raise(vector::NM);
    }
    core.wait_x87()
}

/// VZEROUPPER.
pub fn zero_upper(core: &mut Core, _: &Insn) -> Exec {
    core.permit(needs::AVX, false)?;
    let count = core.vector_registers();
    core.vector.ymm[..count]
        .iter_mut()
        .for_each(|register| register[16..].fill(0));
    core.vector.zmm_high[..count].fill([0; 32]);
    Ok(())
}

/// VZEROALL.
pub fn zero_all(core: &mut Core, _: &Insn) -> Exec {
    core.permit(needs::AVX, false)?;
    let count = core.vector_registers();
    core.vector.ymm[..count].fill([0; 32]);
    core.vector.zmm_high[..count].fill([0; 32]);
    Ok(())
}

/// LFENCE, SFENCE, MFENCE.
pub fn fence(_: &mut Core, _: &Insn) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// CLFLUSH and its like: caches are coherent, but the address must be good.
pub fn flush_line(core: &mut Core, insn: &Insn) -> Exec {
    let linear = core.linear(insn, 1, false)?;
    core.host_range(linear, 1, false).map(drop)
}

impl Core {
    /// Checks that an instruction with these [`needs`] can run in the current mode (Intel SDM 3A, table 2-2 and
    /// section 13.1).
    #[inline(always)]
    pub(crate) fn permit(&mut self, needs: u8, mmx: bool) -> Exec {
        if self.fpu_blocked & needs == 0 {
            return Ok(());
        }
        self.refuse(needs, mmx)
    }

    #[cold]
    fn refuse(&mut self, needs: u8, mmx: bool) -> Exec {
        let (emulate, switched) = (self.cr[0] & 1 << 2 != 0, self.cr[0] & 1 << 3 != 0);
        let wrong = match needs {
            _ if needs & needs::VEX != 0 => true,
            _ if needs & (needs::AVX | needs::AVX512) != 0 => {
                let wanted = if needs & needs::AVX512 != 0 {
                    6 | xsave::AVX512
                } else {
                    6
                };
                let enabled = self.cr[4] & 1 << 18 != 0 && self.vector.xcr0 & wanted == wanted;
                !enabled || !self.protected() || self.virtual_8086() || !switched
            }
            _ if needs & needs::SSE != 0 => emulate || self.cr[4] & 1 << 9 == 0,
            _ => emulate && mmx,
        };
        self.raise(if wrong { vector::UD } else { vector::NM })
    }

    /// Zeroes the bits above 255 of vector registers below 16, given as a set.
    #[cold]
    pub(super) fn clear_high(&mut self, registers: u16) {
        let high = self.vector.zmm_high.iter_mut().enumerate();
        high.filter(|(number, _)| registers >> number & 1 != 0)
            .for_each(|(_, high)| high.fill(0));
    }

    /// Raises #MF if an x87 exception is pending.
    #[inline]
    pub(crate) fn wait_x87(&mut self) -> Exec {
        // Exceptions in FSW that FCW does not mask.
        if self.vector.fx[2] & !self.vector.fx[0] & 0x3f == 0 {
            return Ok(());
        }
        self.raise(vector::MF)
    }

    /// Vector registers of the current mode.
    pub(crate) fn vector_registers(&self) -> usize {
        if self.bits64() { 16 } else { 8 }
    }
}
