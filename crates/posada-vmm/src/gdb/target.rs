//! The VM as gdb sees it.

use super::registers;
use crate::control::{Control, Life};
use crate::notify::Notify;
use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, SwBreakpoint, SwBreakpointOps,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use posada_engine::Vcpu;
use posada_memory::PAGE_SIZE;
use std::io::Write;
use std::sync::{Arc, MutexGuard};
use vm_memory::{Bytes, GuestAddress};

/// The VM has gone while gdb was attached.
#[derive(Debug, thiserror::Error)]
#[error("the VM has ended")]
pub(super) struct Error;

/// A paused VM, until it is resumed.
pub(super) struct Target {
    control: Arc<Control>,
    life: Arc<Life>,
    /// Signalled when a vCPU has stopped or the VM has gone.
    pub(super) stopped: Arc<Notify>,
    software: Vec<u64>,
    hardware: Vec<u64>,
    step: Option<usize>,
    /// The vCPU of the last resume action.
    acting: Option<usize>,
    only_acting: bool,
}

fn index(tid: Tid) -> usize {
    tid.get() - 1
}

fn tid(index: usize) -> Tid {
    Tid::new(index + 1).expect("not zero")
}

impl Target {
    /// The VM of `control`, which is paused; `None` if it has gone.
    pub(super) fn new(control: Arc<Control>, stopped: Arc<Notify>) -> Option<Self> {
        let life = control.life()?;
        Some(Self {
            control,
            life,
            stopped,
            software: Vec::new(),
            hardware: Vec::new(),
            step: None,
            acting: None,
            only_acting: false,
        })
    }

    fn cpu(&self, tid: Tid) -> TargetResult<MutexGuard<'_, Box<dyn Vcpu>>, Self> {
        let cpu = self.life.cpus.get(index(tid)).ok_or(TargetError::NonFatal)?;
        cpu.lock().map_err(|_| TargetError::NonFatal)
    }

    /// Stops all vCPUs.
    pub(super) fn pause(&mut self) {
        self.control.pause();
        // There may have been a reset since.
        if let Some(life) = self.control.life() {
            self.life = life;
        }
    }

    /// Whether the engine can take one more break point. gdb sets them when the guest goes on, and then tells the user.
    fn has_room(&self) -> bool {
        self.software.len() + self.hardware.len() < self.life.engine.breakpoints()
    }

    /// Why the VM stands, if it does.
    pub(super) fn stop_reason(&mut self) -> Option<MultiThreadStopReason<u64>> {
        if self.control.closed() {
            return Some(MultiThreadStopReason::Exited(0));
        }
        let stopped = self.control.debug_stop()?;
        self.pause();
        let tid = tid(stopped);
        if self.step == Some(stopped) {
            return Some(MultiThreadStopReason::SignalWithThread {
                tid,
                signal: Signal::SIGTRAP,
            });
        }
        let state = self.cpu(tid).ok().and_then(|mut cpu| cpu.state().ok());
        let rip = state.map_or(0, |state| state.rip);
        Some(if self.hardware.contains(&rip) {
            MultiThreadStopReason::HwBreak(tid)
        } else {
            MultiThreadStopReason::SwBreak(tid)
        })
    }

    /// Calls `access` with guest physical address and place of each piece of `length` bytes at virtual `start`; returns
    /// how far it came.
    fn pieces(
        &self,
        start: u64,
        length: usize,
        tid: Tid,
        mut access: impl FnMut(u64, std::ops::Range<usize>) -> bool,
    ) -> TargetResult<usize, Self> {
        let cpu = self.cpu(tid)?;
        let mut done = 0;
        while done < length {
            let address = start.wrapping_add(done as u64);
            let piece = (length - done).min((PAGE_SIZE - address % PAGE_SIZE) as usize);
            let reached = cpu
                .translate(address)
                .is_some_and(|physical| access(physical, done..done + piece));
            if !reached {
                break;
            }
            done += piece;
        }
        if done == 0 && length > 0 {
            return Err(TargetError::NonFatal);
        }
        Ok(done)
    }
}

impl gdbstub::target::Target for Target {
    type Arch = X86_64_SSE;
    type Error = Error;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        *regs = registers::to_gdb(&self.cpu(tid)?.state().map_err(|_| TargetError::NonFatal)?);
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let mut cpu = self.cpu(tid)?;
        let mut state = cpu.state().map_err(|_| TargetError::NonFatal)?;
        registers::from_gdb(&mut state, regs);
        cpu.set_state(&state).map_err(|_| TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let memory = self.life.ram.memory();
        self.pieces(start, data.len(), tid, |physical, piece| {
            memory.read_slice(&mut data[piece], GuestAddress(physical)).is_ok()
        })
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let memory = self.life.ram.memory();
        let written = self.pieces(start, data.len(), tid, |physical, piece| {
            memory.write_slice(&data[piece], GuestAddress(physical)).is_ok()
        })?;
        if written < data.len() {
            return Err(TargetError::NonFatal);
        }
        Ok(())
    }

    fn list_active_threads(&mut self, active: &mut dyn FnMut(Tid)) -> Result<(), Error> {
        (0..self.life.cpus.len()).for_each(|index| active(tid(index)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Target {
    fn thread_extra_info(&self, tid: Tid, mut buffer: &mut [u8]) -> Result<usize, Error> {
        let room = buffer.len();
        // A buffer that is too small takes what fits.
        let _ = write!(buffer, "vCPU {}", index(tid));
        Ok(room - buffer.len())
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), Error> {
        let breakpoints: Vec<u64> = self.software.iter().chain(&self.hardware).copied().collect();
        let only = self.acting.filter(|_| self.only_acting);
        self.control.resume(&breakpoints, self.step, only);
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Error> {
        self.step = None;
        self.acting = None;
        self.only_acting = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Error> {
        self.acting.get_or_insert(index(tid));
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Error> {
        self.step = Some(index(tid));
        self.acting = self.step;
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Error> {
        self.only_acting = true;
        Ok(())
    }
}

impl Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

/// Removes one address; false if there is none.
fn remove(addresses: &mut Vec<u64>, address: u64) -> bool {
    let at = addresses.iter().position(|known| *known == address);
    at.map(|at| addresses.swap_remove(at)).is_some()
}

/// Guest memory stays as it is: the engine knows where to stop.
impl SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let room = self.has_room();
        if room {
            self.software.push(address);
        }
        Ok(room)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(remove(&mut self.software, address))
    }
}

impl HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        let room = self.has_room();
        if room {
            self.hardware.push(address);
        }
        Ok(room)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(remove(&mut self.hardware, address))
    }
}
