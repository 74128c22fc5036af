//! One VM on the host's KVM.

use crate::clock::{self, Rate};
use crate::error::{Asked, Error};
use crate::interrupts::{Interrupts, PINS};
use crate::vcpu::{Processor, Wiring};
use crate::{host, ioctl, kick};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use posada_engine::clock::Moment;
use posada_engine::cpu::{CpuModel, Offer};
use posada_engine::{Doorbell, Engine, Machine, MsiSink, Vcpu};
use posada_memory::{GuestRam, HOLE_END, HOLE_START};
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// Where KVM keeps what an Intel processor needs to run real mode, unseen by the guest: a page table, and three pages of a
/// task's state. A place in the MMIO hole where nothing of ours is.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TASK_STATE: usize = 0xfeff_d000;

/// Deviations from hardware that KVM keeps for old users: a local APIC that is wired to a PIC, MWAIT for processors without.
const QUIRKS: u64 = 1 << 0 | 1 << 6;

/// The processors of one VM, on the host's by way of KVM.
pub struct Kvm {
    vm: Arc<VmFd>,
    interrupts: Arc<Interrupts>,
    rate: Rate,
    wiring: Wiring,
    // The kernel reaches into it as long as the VM is there.
    ram: Arc<GuestRam>,
}

impl Kvm {
    /// What a VM on this engine can be shown on this host.
    ///
    /// # Errors
    /// [`Error`] when there is no KVM that can be used.
    pub fn offer() -> Result<Offer, Error> {
        let kvm = host::open()?;
        let vm = host::create_vm(&kvm)?;
        let tsc_khz = host::tsc_khz(&kvm, &vm)?;
        host::offer(&kvm, tsc_khz)
    }

    /// A VM with the processors of `model` over `ram`. Its clock starts now.
    ///
    /// # Errors
    /// [`posada_engine::Error::Host`] when KVM cannot be used or refuses something; [`posada_engine::Error::State`] for a model
    /// that KVM on this host cannot be.
    pub fn new(ram: Arc<GuestRam>, model: &CpuModel) -> Result<Self, posada_engine::Error> {
        Ok(Self::make(ram, model)?)
    }

    fn make(ram: Arc<GuestRam>, model: &CpuModel) -> Result<Self, Error> {
        let kvm = host::open()?;
        let most = kvm.get_max_vcpus() as u32;
        if !(1..=most).contains(&model.cpus) {
            return Err(Error::Count {
                count: model.cpus,
                most,
            });
        }
        kick::prepare().map_err(|source| Error::Refused {
            what: "have a signal for kicks",
            source,
        })?;
        let vm = host::create_vm(&kvm)?;
        let host_khz = host::tsc_khz(&kvm, &vm)?;
        let fits = model.fits(&host::offer(&kvm, host_khz)?);
        fits.map_err(|what| Error::State(format!("the VM needs {what}")))?;

        let scaling = kvm.check_extension(Cap::TscControl);
        // Bits behind the point (Linux, `tsc_scaling_ratio_frac_bits`): AMD's MSR has 32, Intel's VMCS 48.
        let fraction = scaling.then_some(if model.amd() { 32 } else { 48 });
        let rate = Rate::new(model.tsc_khz, host_khz, fraction, model.features.invariant_tsc)?;
        let whole_vm = kvm.check_extension_raw(ioctl::CAP_VM_TSC_CONTROL.into()) > 0;
        if rate.scaled() && whole_vm {
            let khz = u32::try_from(rate.guest_khz).map_err(|_| Error::State("a TSC of more than 4 THz".into()))?;
            ioctl::set_tsc_khz(&vm, khz).to("scale the time stamp counter")?;
        }

        enable(&vm, KVM_CAP_SPLIT_IRQCHIP, PINS.into()).to("make local APICs")?;
        let ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
        enable(&vm, KVM_CAP_X2APIC_API, ids.into()).to("give local APICs ids of 32 bits")?;
        let known = kvm.check_extension_raw(ioctl::CAP_DISABLE_QUIRKS2.into());
        let quirks = QUIRKS & u64::try_from(known).unwrap_or(0);
        if quirks != 0 {
            enable(&vm, ioctl::CAP_DISABLE_QUIRKS2, quirks).to("leave out old deviations")?;
        }
        vm.set_identity_map_address(IDENTITY_MAP)
            .to("place a page table for real mode")?;
        vm.set_tss_address(TASK_STATE)
            .to("place a task's state for real mode")?;
        map(&vm, &ram)?;

        let vm = Arc::new(vm);
        Ok(Self {
            interrupts: Interrupts::new(Arc::clone(&vm)),
            vm,
            rate,
            wiring: Wiring::new(&kvm, model, rate.scaled() && !whole_vm),
            ram,
        })
    }
}

fn enable(vm: &VmFd, capability: u32, argument: u64) -> Result<(), kvm_ioctls::Error> {
    vm.enable_cap(&kvm_enable_cap {
        cap: capability,
        args: [argument, 0, 0, 0],
        ..Default::default()
    })
}

/// Gives the VM its memory: one slot below the MMIO hole, one above.
fn map(vm: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    let below = ram.size().min(HOLE_START);
    for (slot, start, length) in [(0, 0, below), (1, HOLE_END, ram.size() - below)] {
        let Some(host) = ram.host(start, length).filter(|_| length != 0) else {
            continue;
        };
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: start,
            memory_size: length,
            userspace_addr: host as u64,
        };
        // SAFETY: the range is the guest's RAM, which outlives the VM: the engine and every vCPU hold it.
        unsafe { vm.set_user_memory_region(region) }.to("take the guest's memory")?;
    }
    Ok(())
}

impl Engine for Kvm {
    fn create_vcpu(&self, index: u32, machine: Arc<dyn Machine>) -> Result<Box<dyn Vcpu>, posada_engine::Error> {
        let processor = Processor::new(&self.vm, Arc::clone(&self.ram), machine, index, &self.wiring, self.rate)?;
        Ok(Box::new(processor))
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::clone(&self.interrupts) as Arc<dyn MsiSink>
    }

    fn attach_doorbell(&self, bell: Doorbell, event: BorrowedFd<'_>) -> Result<bool, posada_engine::Error> {
        ioctl::ioeventfd(&self.vm, &bell, event, true).to("watch a device's doorbell")?;
        Ok(true)
    }

    fn detach_doorbell(&self, bell: Doorbell, event: BorrowedFd<'_>) {
        // Fails only for a doorbell that is not there.
        let _ = ioctl::ioeventfd(&self.vm, &bell, event, false);
    }

    fn clock(&self) -> Result<Moment, posada_engine::Error> {
        Ok(clock::now(&self.vm, &self.rate)?)
    }

    fn set_clock(&self, moment: Moment) -> Result<(), posada_engine::Error> {
        Ok(clock::set(&self.vm, &self.rate, &moment)?)
    }

    fn breakpoints(&self) -> usize {
        crate::vcpu::BREAKPOINTS
    }
}
