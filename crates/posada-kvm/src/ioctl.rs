//! Requests to KVM that kvm-ioctls does not have (Linux, Documentation/virt/kvm/api.rst).

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr, kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch,
    kvm_ioeventfd_flag_nr_deassign,
};
use kvm_ioctls::{Error, VcpuFd, VmFd};
use posada_engine::Doorbell;
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr};

/// A VM's TSC frequency can be set before its vCPUs are made.
pub(crate) const CAP_VM_TSC_CONTROL: u32 = 214;
/// Deviations from hardware of former times can be turned off.
pub(crate) const CAP_DISABLE_QUIRKS2: u32 = 213;

ioctl_io_nr!(KVM_SET_TSC_KHZ, KVMIO, 0xa2);
ioctl_io_nr!(KVM_GET_TSC_KHZ, KVMIO, 0xa3);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

fn check(returned: i32) -> Result<u32, Error> {
    u32::try_from(returned).map_err(|_| Error::last())
}

/// Frequency in kHz of the TSC of a vCPU, or of a VM's future vCPUs.
pub(crate) fn tsc_khz(fd: &impl AsRawFd) -> Result<u32, Error> {
    // SAFETY: the request takes no argument.
    check(unsafe { ioctl(fd, KVM_GET_TSC_KHZ()) })
}

/// Sets it.
pub(crate) fn set_tsc_khz(fd: &impl AsRawFd, khz: u32) -> Result<(), Error> {
    // SAFETY: the argument is a plain number.
    check(unsafe { ioctl_with_val(fd, KVM_SET_TSC_KHZ(), khz.into()) }).map(drop)
}

/// What a vCPU's TSC has over the host's scaled one, modulo 2^64.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, Error> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the kernel reads the structure and writes 8 bytes to the address in it, that of `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) })?;
    Ok(offset)
}

/// Sets it.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), Error> {
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the kernel reads the structure and the 8 bytes at the address in it, that of `offset`.
    check(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) }).map(drop)
}

fn tsc_offset_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: KVM_VCPU_TSC_OFFSET.into(),
        addr: value as u64,
        ..Default::default()
    }
}

/// Has a write signal an event, or no longer.
pub(crate) fn ioeventfd(vm: &VmFd, bell: &Doorbell, event: BorrowedFd<'_>, attach: bool) -> Result<(), Error> {
    let flag = |number: u32, on: bool| u32::from(on) << number;
    let request = kvm_ioeventfd {
        datamatch: bell.value.unwrap_or(0),
        addr: bell.gpa,
        len: bell.length,
        fd: event.as_raw_fd(),
        flags: flag(kvm_ioeventfd_flag_nr_datamatch, bell.value.is_some())
            | flag(kvm_ioeventfd_flag_nr_deassign, !attach),
        ..Default::default()
    };
    // SAFETY: the kernel only reads the structure.
    check(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) }).map(drop)
}
