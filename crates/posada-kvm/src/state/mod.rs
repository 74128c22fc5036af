//! A processor's portable state, out of KVM and into it.
//!
//! KVM keeps some things that no other engine knows; they are told in terms of those that all know. A software interrupt or
//! break point in delivery is left out: RIP is still at its instruction, which runs again. An NMI in delivery is one that waits.

mod events;
mod msrs;
mod registers;

pub(crate) use msrs::put;

use crate::clock::{self, Rate};
use crate::error::{Asked, Error};
use crate::{host, ioctl};
use kvm_bindings::{kvm_debugregs, kvm_lapic_state, kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use msrs::Registers;
use posada_engine::cpu::CpuModel;
use posada_engine::{Activity, ApicPage, CpuState, Xsave, msr};

const TSC: u32 = 0x10;
/// What FXSAVE leaves to software (Intel SDM 1, 10.5.1).
const SOFTWARE: std::ops::Range<usize> = 464..512;
/// Offset of the task priority in a local APIC's page.
const TASK_PRIORITY: usize = 0x80;

/// What it takes to carry a vCPU's state.
pub(crate) struct Carrier {
    /// Bytes of an XSAVE area and the components it may hold.
    area: usize,
    components: u64,
    /// The processor has XCR0.
    xsave: bool,
    registers: Registers,
    rate: Rate,
    /// KVM tells and takes the TSC's offset as such.
    offset: bool,
}

impl Carrier {
    pub(crate) fn new(model: &CpuModel, rate: Rate, offset: bool) -> Self {
        Self {
            area: model.xsave_size(model.xcr0()) as usize,
            components: model.xcr0(),
            xsave: model.features.xsave,
            registers: Registers::of(&model.features),
            rate,
            offset,
        }
    }

    /// The state of a vCPU that has no port or memory access to finish.
    pub(crate) fn get(&self, vcpu: &VcpuFd) -> Result<CpuState, Error> {
        const WHAT: &str = "tell a processor's state";
        // First, as it makes KVM act on an INIT or SIPI that waits, which changes the rest.
        let activity = events::activity(vcpu.get_mp_state().to(WHAT)?)?;
        let events = events::to_portable(&vcpu.get_vcpu_events().to(WHAT)?)?;
        let debug = vcpu.get_debug_regs().to(WHAT)?;
        let [dr0, dr1, dr2, dr3] = debug.db;
        let mut state = CpuState {
            debug: [dr0, dr1, dr2, dr3, debug.dr6, debug.dr7],
            xcr0: if self.xsave {
                xcr0(&vcpu.get_xcrs().to(WHAT)?)
            } else {
                1
            },
            xsave: self.xsave_to_portable(&vcpu.get_xsave().to(WHAT)?),
            msrs: self.registers.get(vcpu)?,
            apic: Some(page(&vcpu.get_lapic().to(WHAT)?)),
            tsc_offset: Some(self.tsc_offset(vcpu).to(WHAT)?),
            activity,
            events,
            ..CpuState::reset()
        };
        registers::to_portable(&vcpu.get_regs().to(WHAT)?, &vcpu.get_sregs().to(WHAT)?, &mut state);
        Ok(state)
    }

    /// Makes `state` a vCPU's. The order is KVM's: the APIC's base before its registers, its timer's mode and the TSC before the
    /// deadline, and what waits for the processor last.
    pub(crate) fn set(&self, vcpu: &VcpuFd, state: &CpuState) -> Result<(), Error> {
        let priority = match &state.apic {
            Some(page) => u64::from(page.get(TASK_PRIORITY) >> 4 & 0xf),
            None => vcpu.get_sregs().to("tell a processor's state")?.cr8,
        };
        let system = registers::system_from_portable(state, priority);
        vcpu.set_sregs(&system).taking("control and segment registers")?;
        vcpu.set_regs(&registers::from_portable(state))
            .taking("general registers")?;
        if self.xsave {
            vcpu.set_xcrs(&xcrs(state.xcr0)).taking("XCR0")?;
        } else if state.xcr0 != 1 {
            return Err(Error::State("XCR0 is set, and the processor has no XSAVE".into()));
        }
        let area = self.xsave_from_portable(&state.xsave)?;
        // SAFETY: KVM reads more than the structure only for processes that asked for dynamic components, which we do not.
        unsafe { vcpu.set_xsave(&area) }.taking("XSAVE area")?;
        self.registers.set(vcpu, &state.msrs)?;
        if let Some(offset) = state.tsc_offset {
            self.set_tsc_offset(vcpu, offset).to("set the time stamp counter")?;
        }
        if let Some(page) = &state.apic {
            vcpu.set_lapic(&lapic(page)).taking("local APIC")?;
        }
        self.registers.set_deadline(vcpu, &state.msrs)?;
        let [dr0, dr1, dr2, dr3, dr6, dr7] = state.debug;
        let debug = kvm_debugregs {
            db: [dr0, dr1, dr2, dr3],
            dr6,
            dr7,
            ..Default::default()
        };
        vcpu.set_debug_regs(&debug).taking("debug registers")?;
        let events = events::from_portable(&state.events);
        vcpu.set_vcpu_events(&events).taking("pending events")?;
        let activity = match (state.activity, state.events.startup) {
            (Activity::WaitingForStartup, Some(_)) => events::startup(),
            (activity, _) => events::mp_state(activity),
        };
        vcpu.set_mp_state(activity).taking("activity")?;
        if state.tsc_offset.is_some() && state.msrs.get(&msr::KVM_SYSTEM_TIME).is_some_and(|at| at & 1 != 0) {
            // The VM has rested: the guest's watchdogs are told.
            let told = vcpu.kvmclock_ctrl();
            told.to("tell the guest that it was stopped")?;
        }
        Ok(())
    }

    fn xsave_to_portable(&self, area: &kvm_xsave) -> Xsave {
        let words = area.region.iter().flat_map(|word| word.to_le_bytes());
        let mut area = Xsave::new(words.take(self.area).collect());
        // KVM tells the host's components in a part of the legacy region that is left to software.
        area.legacy_mut()[SOFTWARE].fill(0);
        // KVM saves PKRU too where the host has it.
        area.set_xstate_bv(area.xstate_bv() & self.components);
        area
    }

    fn xsave_from_portable(&self, area: &Xsave) -> Result<kvm_xsave, Error> {
        if area.xstate_bv() & !self.components != 0 || area.bytes().len() > self.area {
            return Err(Error::State("the XSAVE area holds what the processor has not".into()));
        }
        let mut raw = kvm_xsave::default();
        for (word, bytes) in raw.region.iter_mut().zip(area.bytes().chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        }
        Ok(raw)
    }

    fn tsc_offset(&self, vcpu: &VcpuFd) -> Result<u64, kvm_ioctls::Error> {
        if self.offset {
            return ioctl::tsc_offset(vcpu);
        }
        let mut tsc = host::msrs(&[(TSC, 0)]);
        let before = clock::host_tsc();
        vcpu.get_msrs(&mut tsc)?;
        let between = before + (clock::host_tsc() - before) / 2;
        Ok(tsc.as_slice()[0].data.wrapping_sub(self.rate.ticks(between)))
    }

    fn set_tsc_offset(&self, vcpu: &VcpuFd, offset: u64) -> Result<(), kvm_ioctls::Error> {
        if self.offset {
            return ioctl::set_tsc_offset(vcpu, offset);
        }
        // KVM gives all vCPUs that are set to about the same the very same.
        let tsc = self.rate.ticks(clock::host_tsc()).wrapping_add(offset);
        vcpu.set_msrs(&host::msrs(&[(TSC, tsc)])).map(drop)
    }
}

fn xcr0(registers: &kvm_xcrs) -> u64 {
    let all = &registers.xcrs[..registers.nr_xcrs as usize];
    all.iter()
        .find(|register| register.xcr == 0)
        .map_or(1, |register| register.value)
}

fn xcrs(xcr0: u64) -> kvm_xcrs {
    let mut registers = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    registers.xcrs[0] = kvm_xcr {
        xcr: 0,
        value: xcr0,
        ..Default::default()
    };
    registers
}

fn page(state: &kvm_lapic_state) -> ApicPage {
    ApicPage::new(state.regs.iter().map(|byte| *byte as u8).collect())
}

fn lapic(page: &ApicPage) -> kvm_lapic_state {
    let mut state = kvm_lapic_state::default();
    for (to, from) in state.regs.iter_mut().zip(page.bytes()) {
        *to = *from as _;
    }
    state
}
