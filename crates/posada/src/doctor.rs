//! `posada doctor`: what this host offers, and what each thing means for VMs.

use clap::Args;
use serde::Serialize;
use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

/// Say what this host offers and what that means
#[derive(Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// Usable.
    Yes,
    /// There, but not all of it.
    Partly,
    /// Not there or not usable.
    No,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    found: String,
    /// What that means.
    meaning: &'static str,
}

/// Runs the command. It never fails: a host without anything can still run VMs.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let checks = [
        kernel(),
        cpu(),
        kvm(),
        userfaultfd(),
        transparent_huge_pages(),
        huge_page_pool(),
        cgroups(),
        tun(),
    ];
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&checks)?);
        return Ok(ExitCode::SUCCESS);
    }
    for check in &checks {
        let status = match check.status {
            Status::Yes => "yes",
            Status::Partly => "partly",
            Status::No => "no",
        };
        println!("{:<24}{status:<8}{}", check.name, check.found);
        println!("{:<32}{}", "", check.meaning);
    }
    Ok(ExitCode::SUCCESS)
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_string())
}

fn kernel() -> Check {
    let release = read("/proc/sys/kernel/osrelease").unwrap_or_else(|| "unknown".into());
    let mut numbers = release.split(['.', '-']).map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (status, meaning) = if version >= (5, 10) {
        (Status::Yes, "New enough for everything Posada does.")
    } else {
        (
            Status::Partly,
            "Older than 5.10, which Posada is tested with; VMs run, some memory features may be missing.",
        )
    };
    Check {
        name: "Linux kernel",
        status,
        found: release,
        meaning,
    }
}

/// The software CPU lets the host's processor run the guest's vector instructions, so the guest sees at most these.
fn cpu() -> Check {
    let features = [
        ("sse4.2", is_x86_feature_detected!("sse4.2")),
        ("popcnt", is_x86_feature_detected!("popcnt")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("bmi1", is_x86_feature_detected!("bmi1")),
        ("bmi2", is_x86_feature_detected!("bmi2")),
        ("adx", is_x86_feature_detected!("adx")),
        ("aes", is_x86_feature_detected!("aes")),
        ("pclmulqdq", is_x86_feature_detected!("pclmulqdq")),
        ("sha", is_x86_feature_detected!("sha")),
        ("movbe", is_x86_feature_detected!("movbe")),
        ("rdrand", is_x86_feature_detected!("rdrand")),
        ("rdseed", is_x86_feature_detected!("rdseed")),
        ("xsave", is_x86_feature_detected!("xsave")),
        ("xsavec", is_x86_feature_detected!("xsavec")),
    ];
    let missing: Vec<&str> = features.iter().filter(|(_, has)| !has).map(|(name, _)| *name).collect();
    let (status, found, meaning) = if missing.is_empty() {
        let all: Vec<&str> = features.iter().map(|(name, _)| *name).collect();
        (
            Status::Yes,
            all.join(" "),
            "The software CPU can show guests every feature it knows.",
        )
    } else {
        let found = format!("without {}", missing.join(" "));
        (
            Status::Partly,
            found,
            "Guests run, and do not see the features that are missing here.",
        )
    };
    Check {
        name: "CPU features",
        status,
        found,
        meaning,
    }
}

/// What an open /dev/kvm says: version 12 and that it makes a VM.
fn try_kvm(device: &File) -> Result<(), String> {
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    const KVM_CREATE_VM: libc::c_ulong = 0xae01;
    // SAFETY: takes no pointer.
    let version = unsafe { libc::ioctl(device.as_raw_fd(), KVM_GET_API_VERSION as _, 0) };
    if version != 12 {
        return Err(format!("/dev/kvm speaks version {version}, not 12"));
    }
    // SAFETY: takes no pointer.
    let vm = unsafe { libc::ioctl(device.as_raw_fd(), KVM_CREATE_VM as _, 0) };
    if vm < 0 {
        return Err(format!("/dev/kvm makes no VM: {}", io::Error::last_os_error()));
    }
    // SAFETY: the descriptor is new and ours alone.
    drop(unsafe { OwnedFd::from_raw_fd(vm) });
    Ok(())
}

fn kvm() -> Check {
    let tried = match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(device) => try_kvm(&device),
        Err(error) => Err(format!("/dev/kvm: {error}")),
    };
    let (status, found, meaning) = match tried {
        Ok(()) => (
            Status::Yes,
            "/dev/kvm makes VMs".into(),
            "Hardware virtualisation is there; how fast it is inside another VM only a running guest shows.",
        ),
        Err(found) => (
            Status::No,
            found,
            "VMs run on the software CPU, which needs nothing of the host.",
        ),
    };
    Check {
        name: "KVM",
        status,
        found,
        meaning,
    }
}

fn userfaultfd() -> Check {
    const UFFD_USER_MODE_ONLY: libc::c_int = 1;
    let open = |flags: libc::c_int| {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) } as libc::c_int;
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and ours alone.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let (status, found, meaning) = match (open(0), open(UFFD_USER_MODE_ONLY)) {
        (Ok(_), _) => (
            Status::Yes,
            "all faults".into(),
            "Guest pages can be given, swapped and moved while the VM runs, also under system calls.",
        ),
        (Err(_), Ok(_)) => (
            Status::Partly,
            "user-mode faults only (vm.unprivileged_userfaultfd is 0)".into(),
            "Guest pages can be given as vCPUs touch them; the host's own system calls cannot wait for pages.",
        ),
        (Err(error), _) => (
            Status::No,
            error.to_string(),
            "VMs run; pages cannot be brought in from elsewhere while they do.",
        ),
    };
    Check {
        name: "userfaultfd",
        status,
        found,
        meaning,
    }
}

fn transparent_huge_pages() -> Check {
    let setting = read("/sys/kernel/mm/transparent_hugepage/enabled");
    let chosen = setting
        .as_deref()
        .and_then(|text| text.split_once('[')?.1.split_once(']'))
        .map(|(chosen, _)| chosen.to_string());
    let (status, meaning) = match chosen.as_deref() {
        Some("always") => (Status::Yes, "Guest RAM gets 2 MiB pages unasked: fast, but less thin."),
        Some("madvise") => (
            Status::Yes,
            "Guest RAM can have 2 MiB pages where a VM wants them, and stays thin elsewhere.",
        ),
        _ => (
            Status::No,
            "Guest RAM has 4 KiB pages: thin, with more address translation work.",
        ),
    };
    Check {
        name: "transparent huge pages",
        status,
        found: chosen.unwrap_or_else(|| "not in this kernel".into()),
        meaning,
    }
}

fn huge_page_pool() -> Check {
    let pages = read("/proc/sys/vm/nr_hugepages").and_then(|text| text.parse::<u64>().ok());
    let (status, meaning) = match pages {
        Some(1..) => (
            Status::Yes,
            "Huge pages are set aside for programs that ask; Posada does not need them.",
        ),
        _ => (Status::No, "No huge pages are set aside, and Posada does not need any."),
    };
    Check {
        name: "huge page pool",
        status,
        found: format!("{} pages", pages.unwrap_or(0)),
        meaning,
    }
}

fn writable(path: &Path) -> bool {
    use std::os::unix::ffi::OsStrExt;
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    let path: &CStr = &path;
    // SAFETY: a string with its zero.
    unsafe { libc::access(path.as_ptr(), libc::W_OK) == 0 }
}

fn cgroups() -> Check {
    const CONTROLLERS: [&str; 3] = ["cpu", "cpuset", "memory"];
    let own = read("/proc/self/cgroup").unwrap_or_default();
    if let Some(controllers) = read("/sys/fs/cgroup/cgroup.controllers") {
        let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
        let ours = Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/'));
        let all = CONTROLLERS
            .iter()
            .all(|wanted| controllers.split(' ').any(|has| has == *wanted));
        let (status, meaning) = if all && writable(&ours) {
            (
                Status::Yes,
                "The host's scheduler can share out CPU time and memory between VMs.",
            )
        } else {
            (
                Status::Partly,
                "VMs run; their shares of CPU and memory need controllers and a cgroup that we may write.",
            )
        };
        return Check {
            name: "cgroups",
            status,
            found: format!("version 2 with {controllers}"),
            meaning,
        };
    }
    let mounted: Vec<&str> = CONTROLLERS
        .into_iter()
        .filter(|name| writable(&Path::new("/sys/fs/cgroup").join(name)))
        .collect();
    let (status, found, meaning) = if mounted.len() == CONTROLLERS.len() {
        let meaning = "The host's scheduler can share out CPU time and memory between VMs.";
        (Status::Yes, format!("version 1 with {}", mounted.join(" ")), meaning)
    } else if own.is_empty() {
        (
            Status::No,
            "not in this kernel".into(),
            "VMs run, with threads of equal weight.",
        )
    } else {
        let found = match mounted.as_slice() {
            [] => "no controller that we may write".to_string(),
            some => format!("version 1 with {} only", some.join(" ")),
        };
        (
            Status::Partly,
            found,
            "VMs run; not every share of CPU and memory can be set.",
        )
    };
    Check {
        name: "cgroups",
        status,
        found,
        meaning,
    }
}

fn tun() -> Check {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let (status, found, meaning) = match opened {
        Ok(_) => (
            Status::Yes,
            "/dev/net/tun opens".into(),
            "VMs could be put on a bridge of the host; to make an interface needs CAP_NET_ADMIN too.",
        ),
        Err(error) => (
            Status::No,
            format!("/dev/net/tun: {error}"),
            "VMs cannot be put on a bridge of the host.",
        ),
    };
    Check {
        name: "TUN",
        status,
        found,
        meaning,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_kvm_is_not_usable() {
        let null = File::open("/dev/null").unwrap();
        assert!(try_kvm(&null).unwrap_err().contains("version -1"));
    }

    #[test]
    fn every_check_says_what_it_found_and_what_that_means() {
        for check in [
            kernel(),
            cpu(),
            kvm(),
            userfaultfd(),
            cgroups(),
            tun(),
            huge_page_pool(),
        ] {
            assert!(!check.found.is_empty() && check.meaning.ends_with('.'), "{check:?}");
        }
    }
}
