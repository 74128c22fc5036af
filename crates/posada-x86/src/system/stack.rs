//! Stacks of transfers that may still fail: RSP moves only once all is done.

use super::descriptor::{Rights, code_of};
use crate::core::{Core, gpr, seg};
use crate::fault::{Exec, Raised, vector};
use posada_engine::Segment;

/// A stack in use.
pub(super) struct Stack {
    segment: Segment,
    /// Where it stands.
    pub rsp: u64,
    /// 64-bit: no base, no limit.
    flat: bool,
    /// With supervisor rights, whatever the current privilege level.
    supervisor: bool,
    /// Error code of its #SS.
    error: u32,
}

impl Stack {
    /// The current one.
    pub fn current(core: &Core) -> Self {
        Self {
            segment: core.segments[seg::SS],
            rsp: core.regs[gpr::RSP],
            flat: core.bits64(),
            supervisor: false,
            error: 0,
        }
    }

    /// That of an inner privilege level.
    pub fn inner(core: &Core, segment: Segment, rsp: u64) -> Self {
        Self {
            segment,
            rsp,
            flat: core.long_mode(),
            supervisor: true,
            error: code_of(segment.selector),
        }
    }

    /// The stack pointer moved by `by` bytes.
    fn moved(&self, by: u64) -> u64 {
        let moved = self.rsp.wrapping_add(by);
        match (self.flat, self.segment.big()) {
            (true, _) => moved,
            (false, true) => moved & 0xffff_ffff,
            (false, false) => self.rsp & !0xffff | moved & 0xffff,
        }
    }

    fn linear(&self, core: &mut Core, rsp: u64, bytes: u64) -> Exec<u64> {
        if self.flat {
            return Ok(rsp);
        }
        let (segment, top) = (&self.segment, if self.segment.big() { 0xffff_ffff } else { 0xffff });
        let offset = rsp & top;
        let (last, limit) = (offset + bytes - 1, u64::from(segment.limit));
        let inside = if segment.access & 4 != 0 {
            offset > limit && last <= top
        } else {
            last <= limit || limit == 0xffff_ffff
        };
        if inside && (core.paragraphs() || segment.present()) {
            Ok(segment.base.wrapping_add(offset) & 0xffff_ffff)
        } else {
            core.raise_code(vector::SS, self.error)
        }
    }

    /// What the access raised, as an access to the stack raises it.
    fn raised<T>(&self, core: &mut Core) -> Exec<T> {
        if core.raised.non_canonical {
            return core.raise_code(vector::SS, self.error);
        }
        Err(Raised)
    }

    /// Stores 2, 4 or 8 bytes.
    pub fn push(&mut self, core: &mut Core, bytes: u64, value: u64) -> Exec {
        let rsp = self.moved(bytes.wrapping_neg());
        let linear = self.linear(core, rsp, bytes)?;
        let stored = match (bytes, self.supervisor) {
            (2, false) => core.store(linear, value as u16),
            (4, false) => core.store(linear, value as u32),
            (_, false) => core.store(linear, value),
            (2, true) => core.store_system(linear, value as u16),
            (4, true) => core.store_system(linear, value as u32),
            (_, true) => core.store_system(linear, value),
        };
        if stored.is_err() {
            return self.raised(core);
        }
        self.rsp = rsp;
        Ok(())
    }

    /// Loads 2, 4 or 8 bytes.
    pub fn pop(&mut self, core: &mut Core, bytes: u64) -> Exec<u64> {
        let linear = self.linear(core, self.rsp, bytes)?;
        let loaded = match bytes {
            2 => core.load::<u16>(linear).map(u64::from),
            4 => core.load::<u32>(linear).map(u64::from),
            _ => core.load::<u64>(linear),
        };
        let Ok(value) = loaded else {
            return self.raised(core);
        };
        self.release(bytes);
        Ok(value)
    }

    /// Drops bytes.
    pub fn release(&mut self, bytes: u64) {
        self.rsp = self.moved(bytes);
    }
}
