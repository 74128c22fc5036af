//! The vCPU seam: what every engine (interpreter, translator and KVM) offers to a VM, and what it asks of the
//! machine around it. Nothing of one engine shows through here.
#![forbid(unsafe_code)]

pub mod clock;
mod counters;
pub mod cpu;
mod interrupt;
pub mod msr;
mod report;
mod state;

pub use counters::{Counters, Leaves, Translation};
pub use interrupt::{Msi, MsiLine, MsiSink, PlainLine};
pub use state::{Activity, ApicPage, CpuState, DescriptorTable, Events, PendingException, Segment, Xsave};

use clock::Moment;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The machine around the processors: answers what is not RAM. Called from vCPU threads, several at once.
pub trait Machine: Send + Sync {
    /// IN of `data.len()` (1, 2 or 4) bytes. Ports without a device answer all ones.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// OUT of 1, 2 or 4 bytes.
    fn port_write(&self, port: u16, data: &[u8]);
    /// Load of 1 to 64 bytes from a guest physical address (bytes) that is not RAM. Holes answer all ones.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// Store of 1 to 64 bytes.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
    /// A local APIC saw the end of the level-triggered interrupt `vector` (the IOAPIC's remote IRR, Intel SDM 3A 11.8.5).
    fn end_of_interrupt(&self, vector: u8);
}

/// A machine without devices: holes everywhere. What processors have around them in tests.
pub struct NoDevices;

impl Machine for NoDevices {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
}

/// Wakes or stops a vCPU from another thread.
pub trait Kick: Send + Sync {
    /// Makes the vCPU's current or next [`Vcpu::run`] return [`Exit::Kicked`] soon. Never lost, may be repeated.
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Another thread asked for it.
    Kicked,
    /// A fault while a double fault was delivered: the processor shut down. The text is a register dump for people.
    TripleFault(String),
    /// A debugger's single step or break point was reached; RIP is at the instruction to run next.
    Debug,
    /// The engine cannot go on: what happened and what to do about it, in a sentence or more. The state is lost.
    Failed(String),
}

/// What a debugger asks of a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DebugControl {
    /// Stop after one instruction.
    pub single_step: bool,
    /// Guest virtual addresses before whose instruction to stop.
    pub breakpoints: Vec<u64>,
}

/// What went wrong in an engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The host lacks something the engine needs.
    #[error("this host cannot run the engine: {0}")]
    Host(String),
    /// A CPU state that the engine cannot take.
    #[error("the CPU state does not fit this engine: {0}")]
    State(String),
}

/// A write by which a guest's driver tells a device that there is work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Doorbell {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes of the write: 1, 2, 4 or 8.
    pub length: u32,
    /// The value written, or any.
    pub value: Option<u64>,
}

/// A virtual processor. Owned by one thread at a time.
///
/// Life: created in reset (vCPU 0) or waiting for INIT-SIPI (all others) → `set_state` for vCPU 0's boot entry, or for all
/// vCPUs to restore a VM → `run` repeatedly; `state` and `set_state` between runs.
pub trait Vcpu: Send {
    /// Runs guest code until there is a reason to stop. A halted vCPU, or one that waits for SIPI, sleeps inside.
    fn run(&mut self) -> Exit;
    /// A handle that stops [`Vcpu::run`].
    fn kicker(&self) -> Arc<dyn Kick>;
    /// The architectural state between two instructions, whole: every field is there.
    ///
    /// # Errors
    /// [`Error::Host`] when the host's KVM does not give it.
    fn state(&mut self) -> Result<CpuState, Error>;
    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`Error::State`] when a register holds what the processor could not.
    fn set_state(&mut self, state: &CpuState) -> Result<(), Error>;
    /// Sets single step and break points for the next runs.
    fn set_debug(&mut self, debug: &DebugControl);
    /// Guest physical address of a guest virtual one under the current page tables, without side effects.
    fn translate(&self, gva: u64) -> Option<u64>;
    /// What was executed so far.
    fn counters(&self) -> Counters;
}

/// The processors of one VM.
pub trait Engine: Send + Sync {
    /// Makes vCPU `index` (its APIC id), to be called once for each index from 0 on.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses a resource.
    fn create_vcpu(&self, index: u32, machine: Arc<dyn Machine>) -> Result<Box<dyn Vcpu>, Error>;
    /// The local APICs, for devices. Usable before the vCPUs exist.
    fn msi_sink(&self) -> Arc<dyn MsiSink>;
    /// Has the write signal `event` (an eventfd) instead of reaching [`Machine::mmio_write`]. False: this engine has no way
    /// to do so, and the write reaches the machine as ever.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses, for example because there are too many.
    fn attach_doorbell(&self, bell: Doorbell, event: BorrowedFd<'_>) -> Result<bool, Error>;
    /// Undoes [`Engine::attach_doorbell`].
    fn detach_doorbell(&self, bell: Doorbell, event: BorrowedFd<'_>);
    /// This moment on the VM's clock and the host's.
    ///
    /// # Errors
    /// [`Error::Host`] when the host's KVM does not tell.
    fn clock(&self) -> Result<Moment, Error>;
    /// Sets the VM's clock to `vm_ns` at the moment when the host's TSC was `host_tsc`. For a VM that does not run, before its
    /// vCPUs' state is set.
    ///
    /// # Errors
    /// [`Error::Host`] when the host's KVM refuses.
    fn set_clock(&self, moment: Moment) -> Result<(), Error>;
    /// How many break points a debugger can have.
    fn breakpoints(&self) -> usize;
}
