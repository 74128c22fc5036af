//! A virtual processor: runs guest code until something else must answer, and lets the machine answer.
//!
//! KVM finishes a port or memory access when the processor is run again, so a processor is never left with one: before
//! [`Vcpu::run`] returns it runs once more with the flag set that lets KVM do that and nothing else.

use crate::clock::Rate;
use crate::error::{Asked, Error};
use crate::kick::{Inside, Kicker};
use crate::state::{self, Carrier};
use crate::{failure, host, ioctl};
use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_SET_GUEST_DEBUG2, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_EXIT_IO_IN,
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_cpuid_entry2,
    kvm_enable_cap, kvm_guest_debug,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use posada_engine::cpu::CpuModel;
use posada_engine::{Activity, ApicPage, Counters, CpuState, DebugControl, Exit, Kick, Machine, Vcpu};
use posada_memory::GuestRam;
use std::sync::Arc;

/// Break points that the processor's debug registers hold.
pub(crate) const BREAKPOINTS: usize = 4;

const ARCH_CAPABILITIES: u32 = 0x10a;
/// Where a processor begins after RESET.
const RESET_RIP: u64 = 0xfff0;
const RESET_CODE_BASE: u64 = 0xffff_0000;
const CS: usize = 1;
/// In IA32_APIC_BASE.
const BOOT_PROCESSOR: u64 = 1 << 8;

/// What the vCPUs of one VM have in common.
pub(crate) struct Wiring {
    model: CpuModel,
    /// KVM tells and takes the TSC's offset as such.
    offset: bool,
    /// A TSC's frequency must be set for each vCPU.
    scale: bool,
    /// Paravirtual registers that CPUID does not show can be made to be missing.
    enforce: bool,
    /// What KVM is asked for when a debugger steps.
    step: u32,
}

impl Wiring {
    pub(crate) fn new(kvm: &kvm_ioctls::Kvm, model: &CpuModel, scale: bool) -> Self {
        let ask = |capability: u32| u32::try_from(kvm.check_extension_raw(capability.into())).unwrap_or(0);
        Self {
            model: model.clone(),
            offset: host::has_tsc_offset(kvm),
            scale,
            enforce: ask(KVM_CAP_ENFORCE_PV_FEATURE_CPUID) != 0,
            // Without this, each step of a guest that has a timer ends in the timer's handler.
            step: KVM_GUESTDBG_SINGLESTEP | ask(KVM_CAP_SET_GUEST_DEBUG2) & KVM_GUESTDBG_BLOCKIRQ,
        }
    }

    fn cpuid(&self, index: u32) -> CpuId {
        let entry = |(leaf, subleaf, [eax, ebx, ecx, edx]): (u32, u32, [u32; 4])| kvm_cpuid_entry2 {
            function: leaf,
            index: subleaf,
            flags: match leaf {
                4 | 7 | 0xb | 0xd => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                _ => 0,
            },
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        };
        let entries: Vec<kvm_cpuid_entry2> = self.model.leaves(index).into_iter().map(entry).collect();
        CpuId::from_entries(&entries).expect("a model has fewer leaves than KVM takes")
    }
}

/// The state of a new vCPU.
fn at_first(index: u32) -> CpuState {
    let mut state = CpuState::reset();
    // KVM finds a local APIC by its id only once that has been set.
    state.apic = Some(ApicPage::reset(index));
    if index != 0 {
        state.activity = Activity::WaitingForStartup;
        state.apic_base &= !BOOT_PROCESSOR;
    }
    state
}

/// A vCPU.
pub(crate) struct Processor {
    fd: VcpuFd,
    index: u32,
    amd: bool,
    machine: Arc<dyn Machine>,
    // The kernel reaches into it as long as the vCPU is there.
    ram: Arc<GuestRam>,
    kicker: Arc<Kicker>,
    carrier: Carrier,
    /// The last exit was an access that KVM has still to finish.
    unfinished: bool,
    /// How it ended, if it has shut down or failed.
    ended: Option<Exit>,
    debug: kvm_guest_debug,
    step: u32,
    exits: u64,
}

impl Processor {
    /// vCPU `index`, in reset or, but for the first, waiting for its start.
    pub(crate) fn new(
        vm: &VmFd,
        ram: Arc<GuestRam>,
        machine: Arc<dyn Machine>,
        index: u32,
        wiring: &Wiring,
        rate: Rate,
    ) -> Result<Self, Error> {
        let model = &wiring.model;
        let fd = vm.create_vcpu(index.into()).to("make a virtual processor")?;
        if wiring.enforce {
            let enforce = kvm_enable_cap {
                cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
                args: [1, 0, 0, 0],
                ..Default::default()
            };
            fd.enable_cap(&enforce).to("hide what CPUID does not show")?;
        }
        fd.set_cpuid2(&wiring.cpuid(index)).taking("CPU model")?;
        if wiring.scale {
            let khz = u32::try_from(rate.guest_khz).map_err(|_| Error::State("a TSC of more than 4 THz".into()))?;
            ioctl::set_tsc_khz(&fd, khz).to("scale the time stamp counter")?;
        }
        if model.features.arch_capabilities {
            state::put(&fd, &[(ARCH_CAPABILITIES, model.arch_capabilities)])?;
        }
        let carrier = Carrier::new(model, rate, wiring.offset);
        // KVM's idea of a processor after RESET differs in details.
        carrier.set(&fd, &at_first(index))?;
        Ok(Self {
            fd,
            index,
            amd: model.amd(),
            machine,
            ram,
            kicker: Arc::default(),
            carrier,
            unfinished: false,
            ended: None,
            debug: kvm_guest_debug::default(),
            step: wiring.step,
            exits: 0,
        })
    }

    /// Runs the guest once. `Some`: the reason to stop.
    fn enter(&mut self, inside: &Inside) -> Option<Exit> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) => return self.not_run(&error, inside),
        };
        self.exits += 1;
        self.unfinished = false;
        match exit {
            VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => self.port(),
            VcpuExit::MmioRead(gpa, data) => {
                self.machine.mmio_read(gpa, data);
                self.unfinished = true;
            }
            VcpuExit::MmioWrite(gpa, data) => {
                self.machine.mmio_write(gpa, data);
                self.unfinished = true;
            }
            VcpuExit::IoapicEoi(vector) => self.machine.end_of_interrupt(vector),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::Debug(_) => return Some(Exit::Debug),
            VcpuExit::Shutdown => return Some(Exit::TripleFault(self.report())),
            VcpuExit::FailEntry(reason, _) => {
                let text = failure::entry(reason, self.rip());
                return Some(self.failed(text));
            }
            VcpuExit::InternalError => {
                let rip = self.rip();
                let text = failure::internal(self.fd.get_kvm_run(), rip);
                return Some(self.failed(text));
            }
            VcpuExit::MemoryFault { gpa, .. } => {
                return Some(Exit::Failed(format!(
                    "{} (guest physical address {gpa:#x})",
                    failure::refused(&kvm_ioctls::Error::new(libc::EFAULT))
                )));
            }
            _ => {
                let reason = self.fd.get_kvm_run().exit_reason;
                let text = failure::unknown(reason, self.rip());
                return Some(self.failed(text));
            }
        }
        None
    }

    /// KVM_RUN has failed, perhaps as it should.
    fn not_run(&mut self, error: &kvm_ioctls::Error, inside: &Inside) -> Option<Exit> {
        match error.errno() {
            // A kick or another signal. What was unfinished is done: KVM does that first.
            libc::EINTR => {
                self.unfinished = false;
                inside.returned();
                None
            }
            // A processor that waited for its start may have got it.
            libc::EAGAIN => None,
            _ => Some(Exit::Failed(failure::refused(error))),
        }
    }

    /// A port access, or many by a string instruction.
    fn port(&mut self) {
        let run: *mut kvm_bindings::kvm_run = self.fd.get_kvm_run();
        // SAFETY: the last exit was KVM_EXIT_IO, so this is the meaning of the bytes.
        let io = unsafe { (*run).__bindgen_anon_1.io };
        let (size, length) = (usize::from(io.size), usize::from(io.size) * io.count as usize);
        // SAFETY: KVM keeps the data in the pages that it shares with us, `length` bytes at this offset. Nobody else uses them
        // until the next KVM_RUN.
        let data = unsafe { std::slice::from_raw_parts_mut(run.cast::<u8>().add(io.data_offset as usize), length) };
        for item in data.chunks_exact_mut(size.max(1)) {
            if u32::from(io.direction) == KVM_EXIT_IO_IN {
                self.machine.port_read(io.port, item);
            } else {
                self.machine.port_write(io.port, item);
            }
        }
        self.unfinished = true;
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }

    /// A failure with the registers, if KVM still tells them.
    fn failed(&self, text: String) -> Exit {
        Exit::Failed(match self.carrier.get(&self.fd) {
            Ok(state) => format!("{text}\n{}", state.report(self.index, "", |linear| self.peek(linear))),
            Err(_) => text,
        })
    }

    /// The registers after a triple fault.
    fn report(&self) -> String {
        let state = match self.carrier.get(&self.fd) {
            Ok(state) => state,
            Err(error) => return format!("vCPU {}: its registers are not known: {error}\n", self.index),
        };
        let fresh = (state.rip, state.segments[CS].base) == (RESET_RIP, RESET_CODE_BASE);
        let note = if self.amd && fresh {
            "its registers are lost: an AMD processor does not keep them, and KVM has reset it; --accel emulate shows them"
        } else {
            ""
        };
        state.report(self.index, note, |linear| self.peek(linear))
    }

    /// A byte of RAM at a linear address, without side effects.
    fn peek(&self, linear: u64) -> Option<u8> {
        let host = self.ram.host(self.translate(linear)?, 1)?;
        // SAFETY: one byte of guest RAM; guests may change it at any time, hence volatile.
        Some(unsafe { host.read_volatile() })
    }

    fn apply_debug(&self) {
        if let Err(error) = self.fd.set_guest_debug(&self.debug) {
            tracing::warn!(vcpu = self.index, %error, "KVM refuses a debugger's break points or step");
        }
    }
}

impl Vcpu for Processor {
    fn run(&mut self) -> Exit {
        let flag = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the page that KVM shares with us lives as long as `self.fd`; of this byte we only ask for its address.
        let inside = unsafe { self.kicker.enter(flag) };
        loop {
            if !self.unfinished && inside.take() {
                return Exit::Kicked;
            }
            if let Some(exit) = &self.ended {
                return exit.clone();
            }
            if inside.kicked() {
                inside.finish_only();
            }
            if let Some(exit) = self.enter(&inside) {
                if matches!(exit, Exit::TripleFault(_) | Exit::Failed(_)) {
                    self.ended = Some(exit.clone());
                }
                return exit;
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.kicker) as Arc<dyn Kick>
    }

    fn state(&mut self) -> Result<CpuState, posada_engine::Error> {
        Ok(self.carrier.get(&self.fd)?)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), posada_engine::Error> {
        self.carrier.set(&self.fd, state)?;
        self.unfinished = false;
        self.ended = None;
        if self.debug.control != 0 {
            // KVM remembers where a step began.
            self.apply_debug();
        }
        Ok(())
    }

    fn set_debug(&mut self, debug: &DebugControl) {
        let mut request = kvm_guest_debug::default();
        if debug.single_step {
            request.control |= KVM_GUESTDBG_ENABLE | self.step;
        }
        for (number, address) in debug.breakpoints.iter().take(BREAKPOINTS).enumerate() {
            request.control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
            request.arch.debugreg[number] = *address;
            // Global, on execution of one byte (Intel SDM 3B, 18.2.4).
            request.arch.debugreg[7] |= 2 << (number * 2);
        }
        self.debug = request;
        self.apply_debug();
    }

    fn translate(&self, gva: u64) -> Option<u64> {
        let found = self.fd.translate_gva(gva).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    }

    fn counters(&self) -> Counters {
        Counters {
            exits: self.exits,
            ..Counters::default()
        }
    }
}
