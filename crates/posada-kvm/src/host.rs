//! The host's KVM: opening it, what it must be able to do, and what a VM on it can be shown.

use crate::error::{Asked, Error};
use crate::ioctl;
use kvm_bindings::{CpuId, KVM_CAP_VCPU_ATTRIBUTES, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_msrs};
use kvm_ioctls::{Cap, Kvm, VmFd};
use posada_engine::cpu::{self, Features, Offer};
use std::ffi::{CStr, CString};
use std::io;
use std::os::unix::fs::MetadataExt;

/// The device.
pub(crate) const DEVICE: &CStr = c"/dev/kvm";
/// The version of KVM's interface that every kernel since 2.6.22 has.
const VERSION: i32 = 12;
const ARCH_CAPABILITIES: u32 = 0x10a;

/// What we cannot do without, and since which Linux it is there.
const NEEDED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "memory of the process for the guest", "2.6.25"),
    (Cap::MpState, "a processor's activity", "2.6.26"),
    (Cap::IrqRouting, "interrupt routes", "2.6.30"),
    (Cap::Irqfd, "interrupts from event descriptors", "2.6.32"),
    (Cap::Ioeventfd, "doorbells on event descriptors", "2.6.32"),
    (Cap::SetGuestDebug, "break points", "2.6.30"),
    (Cap::AdjustClock, "a VM's clock", "2.6.33"),
    (Cap::VcpuEvents, "a processor's pending events", "2.6.33"),
    (Cap::Debugregs, "debug registers", "2.6.35"),
    (Cap::Xsave, "extended registers", "2.6.36"),
    (Cap::Xcrs, "extended control registers", "2.6.36"),
    (Cap::GetTscKhz, "the frequency of the time stamp counter", "2.6.39"),
    (Cap::SignalMsi, "interrupt messages", "3.5"),
    (Cap::SplitIrqchip, "local APICs without an I/O APIC", "4.4"),
    (Cap::X2ApicApi, "APIC ids of 32 bits", "4.7"),
    (Cap::ImmediateExit, "prompt exits", "4.12"),
];

/// Opens the host's KVM and looks whether it has all that we need.
pub(crate) fn open() -> Result<Kvm, Error> {
    open_at(DEVICE)
}

fn open_at(device: &CStr) -> Result<Kvm, Error> {
    let path = device.to_string_lossy().into_owned();
    let kvm = Kvm::new_with_path(device)
        .map_err(|error| cannot_open(path.clone(), io::Error::from_raw_os_error(error.errno())))?;
    let version = kvm.get_api_version();
    if version != VERSION {
        return Err(Error::Version { path, version });
    }
    match NEEDED.iter().find(|(cap, ..)| !kvm.check_extension(*cap)) {
        Some(&(_, what, since)) => Err(Error::Capability { what, since }),
        None => Ok(kvm),
    }
}

fn cannot_open(path: String, source: io::Error) -> Error {
    match source.raw_os_error() {
        Some(libc::ENOENT) => Error::Missing {
            help: how_to_get_it(),
            path,
        },
        Some(libc::EACCES | libc::EPERM) => Error::Permission {
            help: how_to_be_let_in(&path),
            path,
        },
        Some(libc::ENODEV | libc::ENXIO) => Error::Missing {
            help: format!(
                "the device file has no driver behind it ({source}); {}",
                how_to_get_it()
            ),
            path,
        },
        _ => Error::Open {
            path,
            source,
            help: "--accel emulate does without KVM",
        },
    }
}

/// The way to a KVM device on this processor.
fn how_to_get_it() -> String {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    const HYPERVISOR: u32 = 1 << 31;
    let [.., basic, _] = cpu::host(1, 0);
    let [.., extended, _] = cpu::host(0x8000_0001, 0);
    let module = if basic & VMX != 0 {
        "kvm_intel"
    } else if extended & SVM != 0 {
        "kvm_amd"
    } else if basic & HYPERVISOR != 0 {
        return "this host is itself a virtual machine whose processor shows no virtualization; turn on nested \
                virtualization where it runs, or use --accel emulate"
            .into();
    } else {
        return "this host's processor shows no virtualization; turn on VT-x or SVM in the firmware's setup, or use \
                --accel emulate"
            .into();
    };
    format!("load the kernel's module (modprobe {module}), or use --accel emulate")
}

/// The way to the right to open `path`.
fn how_to_be_let_in(path: &str) -> String {
    const GROUP_MAY: u32 = 0o060;
    let user = std::env::var("USER").unwrap_or_else(|_| "USER".into());
    match std::fs::metadata(path) {
        Ok(meta) if meta.mode() & GROUP_MAY == GROUP_MAY && meta.gid() != 0 => {
            let group = group_name(meta.gid()).unwrap_or_else(|| meta.gid().to_string());
            format!(
                "it belongs to the group {group}; have yourself added (sudo usermod -aG {group} {user}) and log in \
                 again, or use --accel emulate"
            )
        }
        Ok(meta) => format!(
            "only user {} may open it; give it to a group of yours (sudo chgrp kvm {path} && sudo chmod 660 {path}), or \
             use --accel emulate",
            meta.uid()
        ),
        Err(error) => format!("{error}; ask who runs this host for access, or use --accel emulate"),
    }
}

fn group_name(gid: u32) -> Option<String> {
    let mut group = std::mem::MaybeUninit::<libc::group>::uninit();
    let mut found = std::ptr::null_mut();
    let mut buffer = vec![0; 4096];
    // SAFETY: every pointer is to memory of the length that is given with it, or that the type has.
    let failed = unsafe { libc::getgrgid_r(gid, group.as_mut_ptr(), buffer.as_mut_ptr(), buffer.len(), &mut found) };
    if failed != 0 || found.is_null() {
        return None;
    }
    // SAFETY: the call succeeded, so `found` is `group`, and its name a string in `buffer`.
    let name = unsafe { CStr::from_ptr((*found).gr_name) };
    Some(CString::from(name).to_string_lossy().into_owned())
}

/// Makes an empty VM.
pub(crate) fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    loop {
        match kvm.create_vm() {
            // The kernel waits for a lock here and lets signals end the wait.
            Err(error) if error.errno() == libc::EINTR => {}
            other => return other.to("make a virtual machine"),
        }
    }
}

/// Frequency in kHz of the TSC that a VM has unasked.
pub(crate) fn tsc_khz(kvm: &Kvm, vm: &VmFd) -> Result<u64, Error> {
    const WHAT: &str = "tell the frequency of the time stamp counter";
    let khz = if kvm.check_extension_raw(ioctl::CAP_VM_TSC_CONTROL.into()) > 0 {
        ioctl::tsc_khz(vm).to(WHAT)?
    } else {
        let vcpu = create_vm(kvm)?.create_vcpu(0).to("make a virtual processor")?;
        ioctl::tsc_khz(&vcpu).to(WHAT)?
    };
    Ok(khz.into())
}

/// Whether a vCPU's TSC offset can be read and set as such.
pub(crate) fn has_tsc_offset(kvm: &Kvm) -> bool {
    kvm.check_extension_raw(KVM_CAP_VCPU_ATTRIBUTES.into()) > 0
}

/// What VMs on this host's KVM can be shown; `khz` is the frequency of their TSC.
pub(crate) fn offer(kvm: &Kvm, tsc_khz: u64) -> Result<Offer, Error> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .to("tell the features of virtual processors")?;
    let arch_capabilities = arch_capabilities(kvm);
    let features = Features::new(|bit| match bit.name {
        // Not in the list, as they take a local APIC in the kernel, which we have; and what every guest is told.
        "tsc_deadline" => kvm.check_extension(Cap::TscDeadlineTimer),
        "x2apic" | "hypervisor" => true,
        "arch_capabilities" => {
            arch_capabilities.is_some() && words(&supported, bit.leaf, bit.subleaf)[bit.register] >> bit.bit & 1 != 0
        }
        _ => words(&supported, bit.leaf, bit.subleaf)[bit.register] >> bit.bit & 1 != 0,
    });
    Ok(Offer {
        features,
        arch_capabilities: arch_capabilities.unwrap_or(0),
        physical_bits: words(&supported, 0x8000_0008, 0)[0] & 0xff,
        tsc_khz,
    })
}

/// EAX, EBX, ECX and EDX of a leaf of `supported`; zero where it has none.
fn words(supported: &CpuId, leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = supported
        .as_slice()
        .iter()
        .find(|entry| (entry.function, entry.index) == (leaf, subleaf));
    found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

/// What KVM knows of the host's vulnerabilities, if it tells.
fn arch_capabilities(kvm: &Kvm) -> Option<u64> {
    let mut wanted = msrs(&[(ARCH_CAPABILITIES, 0)]);
    let got = kvm.get_msrs(&mut wanted).ok()?;
    (got == 1).then(|| wanted.as_slice()[0].data)
}

/// Model-specific registers with these numbers and values.
///
/// # Panics
/// With more than KVM takes at once (256).
pub(crate) fn msrs(registers: &[(u32, u64)]) -> Msrs {
    let entries: Vec<kvm_msr_entry> = registers
        .iter()
        .map(|&(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        })
        .collect();
    debug_assert_eq!(kvm_msrs::default().nmsrs, 0);
    Msrs::from_entries(&entries).expect("there are few registers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_how_to_get_one() {
        let Err(error) = open_at(c"/nonexistent/kvm") else {
            panic!("it is there")
        };
        let text = error.to_string();
        assert!(text.starts_with("there is no /nonexistent/kvm: "), "{text}");
        assert!(text.contains("--accel emulate"), "{text}");
    }

    #[test]
    fn another_device_is_not_taken_for_kvm() {
        let Err(error) = open_at(c"/dev/null") else {
            panic!("it is KVM")
        };
        assert!(matches!(error, Error::Version { version: -1, .. }), "{error}");
    }

    #[test]
    fn without_permission_the_group_is_named() {
        let text = how_to_be_let_in("/dev/kvm");
        assert!(text.contains("--accel emulate"), "{text}");
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(u32::MAX - 7), None);
    }
}
