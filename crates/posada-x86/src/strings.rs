//! MOVS, STOS, LODS, SCAS and CMPS (Intel SDM 1, 7.3.9). Repeated ones run the host's own string instruction over what lies
//! in one page on each side: element order, flags and counts are the host's. They stop now and then between two elements,
//! as interrupts may stop them, with the registers at the next element and RIP at the instruction.

use crate::core::{Core, flag, gpr, seg};
use crate::fault::Exec;
use crate::flags::{self, ZF};
use crate::insn::{Insn, REP, REPNE};
use crate::size::Size;
use std::arch::asm;

/// After how many bytes a repeated instruction lets the run loop look for events.
const BATCH: u64 = 16 << 10;
/// How many bytes an element counts for that goes alone: across pages, to a device.
const ALONE: u64 = 64;

/// Elements in one page on each side, to be done at once.
struct Run {
    /// First element in host memory, if the instruction has such an operand.
    source: *const u8,
    /// As `source`.
    destination: *mut u8,
    /// Elements, at least one.
    count: u64,
    /// DF: addresses go down.
    down: bool,
    /// REPNE: comparisons end when equal; with REPE, when not.
    until_equal: bool,
}

/// What is repeated.
trait Operation {
    /// Has an operand at the segment's SI.
    const SOURCE: bool;
    /// Has an operand at ES:DI.
    const DESTINATION: bool;
    /// That is written.
    const WRITES: bool;
    /// Ends by ZF.
    const COMPARES: bool;

    /// Does the element that SI and DI name, without moving them.
    fn one<T: Size>(core: &mut Core, insn: &Insn) -> Exec;

    /// Does the elements of a run; how many it did before a comparison ended it.
    ///
    /// # Safety
    /// The run's operands are `count` mapped elements, in the direction it goes.
    unsafe fn many<T: Size>(core: &mut Core, run: &Run) -> u64;
}

struct Movs;
struct Stos;
struct Lods;
struct Scas;
struct Cmps;

/// `$prefix $op`, upwards or downwards, in the operand size's form.
macro_rules! host {
    ($size:ty, $down:expr, $prefix:literal, $op:literal, $after:tt, $operands:tt) => {
        match (<$size>::BITS, $down) {
            (8, false) => host!(@ $after, $operands, "", concat!($prefix, $op, "b")),
            (16, false) => host!(@ $after, $operands, "", concat!($prefix, $op, "w")),
            (32, false) => host!(@ $after, $operands, "", concat!($prefix, $op, "d")),
            (_, false) => host!(@ $after, $operands, "", concat!($prefix, $op, "q")),
            (8, true) => host!(@ $after, $operands, "std", concat!($prefix, $op, "b"), "cld"),
            (16, true) => host!(@ $after, $operands, "std", concat!($prefix, $op, "w"), "cld"),
            (32, true) => host!(@ $after, $operands, "std", concat!($prefix, $op, "d"), "cld"),
            (_, true) => host!(@ $after, $operands, "std", concat!($prefix, $op, "q"), "cld"),
        }
    };
    (@ ($($after:literal),*), ($($operand:tt)*), $($code:expr),*) => {
        asm!($($code,)* $($after,)* $($operand)*, options(nostack))
    };
}

impl Operation for Movs {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const WRITES: bool = true;
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
        let value = source::<T>(core, insn)?;
        let to = destination_linear(core, insn, T::BYTES, true)?;
        core.store(to, value)
    }

    #[inline(always)]
    unsafe fn many<T: Size>(_: &mut Core, run: &Run) -> u64 {
        // SAFETY: the caller vouches for the elements.
        unsafe {
            host!(T, run.down, "rep ", "movs", (), (inout("rcx") run.count => _, inout("rsi") run.source => _, inout("rdi") run.destination => _));
        }
        run.count
    }
}

impl Operation for Stos {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const WRITES: bool = true;
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
        let to = destination_linear(core, insn, T::BYTES, true)?;
        core.store(to, core.read_reg::<T>(0))
    }

    #[inline(always)]
    unsafe fn many<T: Size>(core: &mut Core, run: &Run) -> u64 {
        let value = core.regs[gpr::RAX];
        // SAFETY: the caller vouches for the elements.
        unsafe {
            host!(T, run.down, "rep ", "stos", (), (inout("rcx") run.count => _, in("rax") value, inout("rdi") run.destination => _));
        }
        run.count
    }
}

impl Operation for Lods {
    const SOURCE: bool = true;
    const DESTINATION: bool = false;
    const WRITES: bool = false;
    const COMPARES: bool = false;

    #[inline(always)]
    fn one<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
        let value = source::<T>(core, insn)?;
        core.write_reg(0, value);
        Ok(())
    }

    #[inline(always)]
    unsafe fn many<T: Size>(core: &mut Core, run: &Run) -> u64 {
        // SAFETY: the caller vouches for the elements.
        unsafe {
            host!(T, run.down, "rep ", "lods", (), (inout("rcx") run.count => _, inout("rax") core.regs[gpr::RAX], inout("rsi") run.source => _));
        }
        run.count
    }
}

impl Operation for Scas {
    const SOURCE: bool = false;
    const DESTINATION: bool = true;
    const WRITES: bool = false;
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
        let at = destination_linear(core, insn, T::BYTES, false)?;
        let value = core.load::<T>(at)?;
        flags::cmp(core.read_reg::<T>(0), value, &mut core.arithmetic);
        Ok(())
    }

    #[inline(always)]
    unsafe fn many<T: Size>(core: &mut Core, run: &Run) -> u64 {
        let (mut left, mut rax) = (run.count, core.regs[gpr::RAX]);
        // SAFETY: the caller vouches for the elements.
        unsafe {
            if run.until_equal {
                host!(T, run.down, "repne ", "scas", ("lahf", "seto al"), (inout("rcx") left, inout("rax") rax, inout("rdi") run.destination => _));
            } else {
                host!(T, run.down, "repe ", "scas", ("lahf", "seto al"), (inout("rcx") left, inout("rax") rax, inout("rdi") run.destination => _));
            }
        }
        core.arithmetic = rax as u16;
        run.count - left
    }
}

impl Operation for Cmps {
    const SOURCE: bool = true;
    const DESTINATION: bool = true;
    const WRITES: bool = false;
    const COMPARES: bool = true;

    #[inline(always)]
    fn one<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
        let first = source::<T>(core, insn)?;
        let at = destination_linear(core, insn, T::BYTES, false)?;
        let second = core.load::<T>(at)?;
        flags::cmp(first, second, &mut core.arithmetic);
        Ok(())
    }

    #[inline(always)]
    unsafe fn many<T: Size>(core: &mut Core, run: &Run) -> u64 {
        let mut left = run.count;
        let flags: u64;
        // SAFETY: the caller vouches for the elements.
        unsafe {
            if run.until_equal {
                host!(T, run.down, "repne ", "cmps", ("lahf", "seto al"), (inout("rcx") left, out("rax") flags, inout("rsi") run.source => _, inout("rdi") run.destination => _));
            } else {
                host!(T, run.down, "repe ", "cmps", ("lahf", "seto al"), (inout("rcx") left, out("rax") flags, inout("rsi") run.source => _, inout("rdi") run.destination => _));
            }
        }
        core.arithmetic = flags as u16;
        run.count - left
    }
}

/// Linear address of an element.
#[inline(always)]
fn linear(core: &mut Core, segment: usize, offset: u64, bytes: u64, write: bool) -> Exec<u64> {
    if core.bits64() && segment < seg::FS {
        return Ok(offset);
    }
    core.segment_linear(segment, offset, bytes, write)
}

#[inline(always)]
fn source<T: Size>(core: &mut Core, insn: &Insn) -> Exec<T> {
    let offset = core.regs[gpr::RSI] & insn.address_mask();
    let at = linear(core, insn.segment.into(), offset, T::BYTES, false)?;
    core.load(at)
}

#[inline(always)]
fn destination_linear(core: &mut Core, insn: &Insn, bytes: u64, write: bool) -> Exec<u64> {
    let offset = core.regs[gpr::RDI] & insn.address_mask();
    linear(core, seg::ES, offset, bytes, write)
}

fn down(core: &Core) -> bool {
    core.system_flags & flag::DF != 0
}

/// Adds to a register in the address size.
#[inline(always)]
fn move_register(core: &mut Core, register: usize, mask: u64, distance: u64) {
    let old = core.regs[register];
    let new = old.wrapping_add(distance) & mask;
    core.regs[register] = if mask == 0xffff { old & !mask | new } else { new };
}

/// Moves SI and DI by `count` elements.
#[inline(always)]
fn advance<O: Operation, T: Size>(core: &mut Core, mask: u64, count: u64) {
    let bytes = count * T::BYTES;
    let distance = if down(core) { bytes.wrapping_neg() } else { bytes };
    if O::SOURCE {
        move_register(core, gpr::RSI, mask, distance);
    }
    if O::DESTINATION {
        move_register(core, gpr::RDI, mask, distance);
    }
}

/// One side of a run: its first element in host memory, and where in guest RAM if that may hold code.
struct Side {
    host: *mut u8,
    code: Option<u64>,
}

/// The side at `register`, which may lower `count` to what one page holds; `None` if elements must go alone. Raises what
/// the first element would.
fn side<T: Size>(
    core: &mut Core,
    (segment, register): (usize, usize),
    mask: u64,
    write: bool,
    count: &mut u64,
) -> Exec<Option<Side>> {
    let offset = core.regs[register] & mask;
    let at = linear(core, segment, offset, T::BYTES, write)?;
    let (in_page, down) = (at & 0xfff, down(core));
    if in_page + T::BYTES > 4096 {
        return Ok(None);
    }
    let (page, space) = if down {
        (in_page / T::BYTES + 1, (offset / T::BYTES).saturating_add(1))
    } else {
        (
            (4096 - in_page) / T::BYTES,
            ((mask - offset) / T::BYTES).saturating_add(1),
        )
    };
    *count = page.min(space).min(*count);
    if !core.bits64() {
        let low = if down { offset - (*count - 1) * T::BYTES } else { offset };
        if core.segment_linear(segment, low, *count * T::BYTES, write).is_err() {
            *count = 1;
        }
    }
    if let Some(host) = core.host_range(at, T::BYTES, write)? {
        return Ok(Some(Side { host, code: None }));
    }
    // RAM, but perhaps with code in it.
    let Some(gpa) = core.translate(at) else { return Ok(None) };
    let host = core.ram.host(gpa, T::BYTES);
    Ok(host.map(|host| Side { host, code: Some(gpa) }))
}

/// Does up to `count` elements, those of one page on each side; none if they must go alone.
fn run<O: Operation, T: Size>(core: &mut Core, insn: &Insn, count: u64) -> Exec<u64> {
    let mask = insn.address_mask();
    let mut run = Run {
        source: std::ptr::null(),
        destination: std::ptr::null_mut(),
        count,
        down: down(core),
        until_equal: insn.flags & REPNE != 0,
    };
    if O::SOURCE {
        let place = (insn.segment.into(), gpr::RSI);
        let Some(side) = side::<T>(core, place, mask, false, &mut run.count)? else {
            return Ok(0);
        };
        run.source = side.host;
    }
    let mut code = None;
    if O::DESTINATION {
        let place = (seg::ES, gpr::RDI);
        let Some(side) = side::<T>(core, place, mask, O::WRITES, &mut run.count)? else {
            return Ok(0);
        };
        run.destination = side.host;
        code = side.code.filter(|_| O::WRITES);
    }
    // SAFETY: each side's elements lie in one page of RAM, of which the page tables and segments give access.
    let done = unsafe { O::many::<T>(core, &run) };
    if let Some(first) = code {
        let bytes = done * T::BYTES;
        let low = if run.down { first + T::BYTES - bytes } else { first };
        if core.ram.code().written(low, bytes) {
            core.leave_block();
        }
    }
    Ok(done)
}

/// Repeats until CX is zero, a comparison ends it, or the batch is full; then RIP goes back to the instruction.
fn repeat<O: Operation, T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    let mask = insn.address_mask();
    // Single steps and data break points come after each element.
    let mut budget = if core.careful { 1 } else { BATCH };
    let mut left = core.regs[gpr::RCX] & mask;
    if left == 0 {
        // Upper halves go even so, as on the host.
        move_register(core, gpr::RCX, mask, 0);
        if O::WRITES {
            advance::<O, T>(core, mask, 0);
        }
        return Ok(());
    }
    while left != 0 {
        if budget == 0 {
            core.set_rip(core.rip().wrapping_sub(insn.length.into()));
            core.leave_block();
            break;
        }
        let mut done = run::<O, T>(core, insn, left.min(budget.div_ceil(T::BYTES)))?;
        let cost = if done == 0 { ALONE } else { done * T::BYTES };
        if done == 0 {
            O::one::<T>(core, insn)?;
            done = 1;
        }
        advance::<O, T>(core, mask, done);
        move_register(core, gpr::RCX, mask, done.wrapping_neg());
        if O::COMPARES && (core.arithmetic & ZF != 0) == (insn.flags & REPNE != 0) {
            break;
        }
        left -= done;
        budget = budget.saturating_sub(cost);
    }
    Ok(())
}

#[inline(always)]
fn string<O: Operation, T: Size>(core: &mut Core, insn: &Insn) -> Exec {
    if insn.flags & (REP | REPNE) == 0 {
        O::one::<T>(core, insn)?;
        advance::<O, T>(core, insn.address_mask(), 1);
        return Ok(());
    }
    let before = core.arithmetic;
    let result = repeat::<O, T>(core, insn);
    if O::COMPARES && result.is_err() {
        // The manual: a fault restores the flags, though not the other registers.
        core.arithmetic = before;
    }
    result
}

macro_rules! handlers {
    ($($(#[$doc:meta])* $name:ident, $operation:ty;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// What its loads and stores raise; with a repeat prefix, after the elements before.
        pub fn $name<T: Size>(core: &mut Core, insn: &Insn) -> Exec {
            string::<$operation, T>(core, insn)
        }
    )*};
}

handlers! {
    /// MOVS, from [`Insn::segment`].
    movs, Movs;
    /// STOS.
    stos, Stos;
    /// LODS, from [`Insn::segment`].
    lods, Lods;
    /// SCAS.
    scas, Scas;
    /// CMPS, with its first operand in [`Insn::segment`].
    cmps, Cmps;
}

#[cfg(test)]
mod tests;
