//! /dev/kvm: whether it makes a VM, and if not, why and what to do.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

const PATH: &str = "/dev/kvm";

/// Opens the device, which makes VMs then unless another hypervisor is in its way.
///
/// # Errors
/// Why it does not open and what to do about it: a sentence without its full stop.
pub fn open() -> Result<File, String> {
    let opened = OpenOptions::new().read(true).write(true).open(PATH);
    opened.map_err(|error| unopened(&error, &Facts::gather()))
}

/// Opens the device and has it make a VM.
///
/// # Errors
/// As [`open`].
pub fn check() -> Result<(), String> {
    try_device(&open()?)
}

/// What an open device says: version 12 and that it makes a VM.
fn try_device(device: &File) -> Result<(), String> {
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    // SAFETY: takes no pointer.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION as _, 0) };
    if version != 12 {
        return Err(format!("{PATH} speaks version {version} and not 12, so it is no KVM"));
    }
    // SAFETY: takes no pointer.
    let vm = unsafe { libc::ioctl(device.as_raw_fd(), KVM_CREATE_VM as _, 0) };
    if vm < 0 {
        return Err(no_vm(&io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and ours alone.
    drop(unsafe { OwnedFd::from_raw_fd(vm) });
    Ok(())
}

fn no_vm(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EBUSY) => format!("{PATH} makes no VM while another hypervisor has the processor; end that one"),
        _ => format!("{PATH} makes no VM: {error}"),
    }
}

/// What explains that the device does not open.
#[derive(Debug, Default)]
struct Facts {
    /// The device's mode and the group that owns it by its name, or by its number if it has no name.
    node: Option<(u32, String)>,
    /// The module for the processor's kind of virtualisation, if it shows one.
    module: Option<&'static str>,
}

impl Facts {
    fn gather() -> Self {
        let group = |node: &Metadata| {
            let groups = fs::read_to_string("/etc/group").unwrap_or_default();
            group_name(&groups, node.gid()).unwrap_or_else(|| node.gid().to_string())
        };
        let processors = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            node: fs::metadata(PATH).ok().map(|node| (node.mode(), group(&node))),
            module: module(&processors),
        }
    }
}

/// The name of the group `id` in the text of /etc/group.
fn group_name(groups: &str, id: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_string())
    })
}

/// The module for the kind of virtualisation that the text of /proc/cpuinfo shows.
fn module(processors: &str) -> Option<&'static str> {
    let flags = processors.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some("kvm_intel"),
        "svm" => Some("kvm_amd"),
        _ => None,
    })
}

fn unopened(error: &io::Error, facts: &Facts) -> String {
    const GROUP_MAY: u32 = 0o060;
    match (error.raw_os_error(), &facts.node) {
        (Some(libc::ENOENT | libc::ENODEV | libc::ENXIO), node) => {
            let what = match node {
                None => format!("there is no {PATH}"),
                Some(_) => format!("{PATH} has no driver behind it"),
            };
            match facts.module {
                Some(module) => format!("{what}; load the module: sudo modprobe {module}"),
                None => format!(
                    "{what}, and the processor shows no virtualisation; switch on VT-x or AMD-V in the firmware's setup, \
                     or nested virtualisation in the hypervisor around this machine"
                ),
            }
        }
        (Some(libc::EACCES), Some((mode, group))) if mode & GROUP_MAY == GROUP_MAY && group != "root" => format!(
            "you may not open {PATH}, which belongs to the group {group}; join it by sudo usermod -aG {group} $USER, and \
             log in again"
        ),
        (Some(libc::EACCES), _) => format!(
            "only root may open {PATH}; be root, or give it to a group of yours: sudo chgrp GROUP {PATH}; sudo chmod 660 \
             {PATH}"
        ),
        (Some(libc::EPERM), _) => {
            format!("the rules of this container or service forbid {PATH}; allow it the device")
        }
        _ => format!("{PATH} does not open: {error}"),
    }
}

/// What tells one KVM from another, for the cache: the device's node and its modules' parameters, sorted.
pub fn identity() -> Vec<String> {
    let mut facts = Vec::new();
    if let Ok(node) = fs::metadata(PATH) {
        facts.push(format!("{PATH} {:x} {} {}", node.rdev(), node.ino(), node.ctime()));
    }
    let modules = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    for module in modules.filter(|module| module.file_name().to_string_lossy().starts_with("kvm")) {
        facts.push(module.path().display().to_string());
        for parameter in fs::read_dir(module.path().join("parameters"))
            .into_iter()
            .flatten()
            .flatten()
        {
            let value = fs::read_to_string(parameter.path()).unwrap_or_default();
            facts.push(format!("{} {}", parameter.path().display(), value.trim()));
        }
    }
    facts.sort();
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(error: i32, facts: &Facts) -> String {
        unopened(&io::Error::from_raw_os_error(error), facts)
    }

    fn node(mode: u32, group: &str) -> Facts {
        Facts {
            node: Some((0o020_000 | mode, group.into())),
            module: Some("kvm_intel"),
        }
    }

    #[test]
    fn a_file_that_is_not_kvm_is_not_usable() {
        let null = File::open("/dev/null").unwrap();
        assert!(try_device(&null).unwrap_err().contains("version -1"));
    }

    #[test]
    fn without_permission_the_group_and_the_way_into_it_are_named() {
        let text = said(libc::EACCES, &node(0o660, "kvm"));
        assert!(
            text.contains("the group kvm") && text.contains("usermod -aG kvm"),
            "{text}"
        );
        for facts in [node(0o600, "kvm"), node(0o660, "root"), node(0o640, "kvm")] {
            let text = said(libc::EACCES, &facts);
            assert!(text.contains("only root") && text.contains("chmod 660"), "{text}");
        }
        assert!(said(libc::EPERM, &node(0o666, "kvm")).contains("container"));
    }

    #[test]
    fn without_a_device_the_module_to_load_or_the_switch_is_named() {
        let mut facts = Facts {
            node: None,
            module: Some("kvm_amd"),
        };
        assert!(said(libc::ENOENT, &facts).ends_with("modprobe kvm_amd"));
        facts.module = None;
        assert!(said(libc::ENOENT, &facts).contains("AMD-V"));
        for error in [libc::ENODEV, libc::ENXIO] {
            let text = said(error, &node(0o660, "kvm"));
            assert!(
                text.contains("no driver") && text.ends_with("modprobe kvm_intel"),
                "{text}"
            );
        }
    }

    #[test]
    fn other_errors_are_told_as_they_are() {
        assert!(said(libc::EMFILE, &Facts::default()).contains("Too many open files"));
        assert!(no_vm(&io::Error::from_raw_os_error(libc::EBUSY)).contains("another hypervisor"));
        assert!(no_vm(&io::Error::from_raw_os_error(libc::ENOMEM)).contains("memory"));
    }

    #[test]
    fn groups_and_modules_are_found_by_whole_fields() {
        let groups = "root:x:0:\nkvmx:x:1080:\nkvm:x:108:me\nbroken\n";
        assert_eq!(group_name(groups, 108).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 10), None);
        assert_eq!(module("flags\t\t: fpu svm_lock vmx\n"), Some("kvm_intel"));
        assert_eq!(module("flags\t\t: fpu svm sse\n"), Some("kvm_amd"));
        assert_eq!(module("vmx flags : vmx\nflags\t: fpu vmxx\n"), None);
    }
}
