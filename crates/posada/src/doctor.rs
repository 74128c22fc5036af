//! `posada doctor`: what this host offers, and what each thing means for VMs.

use crate::accel::{self, Chosen, Kind};
use clap::Args;
use posada_vmm::probe::{self, Decision, End, Outcome, Phase};
use serde::Serialize;
use std::ffi::CStr;
use std::fs::{self, OpenOptions};
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

/// Say what this host offers and what that means
#[derive(Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,

    /// Run the probe program anew, by which --accel auto decides between KVM and the software CPU
    #[arg(long)]
    probe: bool,
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
    /// Figures behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    figures: Option<Figures>,
}

/// What the probe program has measured.
#[derive(Debug, PartialEq, Serialize)]
struct Figures {
    /// Not in this run.
    cached: bool,
    /// Nanoseconds of processor time that something costs on both engines; nothing where the program did not get that far.
    costs: Vec<Cost>,
    /// Seconds of processor time for a boot of Linux, by those; only of an engine on which the program has finished.
    boot_seconds: Pair,
}

#[derive(Debug, PartialEq, Serialize)]
struct Cost {
    of: &'static str,
    #[serde(flatten)]
    nanoseconds: Pair,
}

#[derive(Debug, PartialEq, Serialize)]
struct Pair {
    kvm: Option<f64>,
    emulator: Option<f64>,
}

impl Figures {
    fn new(decision: &Decision, cached: bool) -> Self {
        let pair = |figure: &dyn Fn(&Outcome) -> Option<f64>| Pair {
            kvm: figure(&decision.kvm),
            emulator: figure(&decision.emulator),
        };
        let cost = |phase: Phase| Cost {
            of: phase.one(),
            nanoseconds: pair(&|outcome| Some(probe::unit_seconds(outcome, phase)? * 1e9)),
        };
        Self {
            cached,
            // The start runs once, unmeasurably short.
            costs: Phase::ALL.into_iter().skip(1).map(cost).collect(),
            boot_seconds: pair(&|outcome| (outcome.end == End::Finished).then(|| probe::boot_seconds(outcome))),
        }
    }

    /// Lines for people.
    fn print(&self) {
        let text = |seconds: Option<f64>| seconds.map_or("-".into(), probe::time);
        let line = |what: &str, pair: &Pair, unit: f64| {
            let [kvm, emulator] = [pair.kvm, pair.emulator].map(|value| text(value.map(|value| value * unit)));
            println!("{:<32}{what:<28}{kvm:>10}{emulator:>14}", "");
        };
        println!("{:<60}{:>10}{:>14}", "", "KVM", "software CPU");
        for cost in &self.costs {
            line(cost.of, &cost.nanoseconds, 1e-9);
        }
        line("a boot of Linux, by these", &self.boot_seconds, 1.0);
    }
}

/// Runs the command. It never fails: a host without anything can still run VMs.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let checks = [
        kernel(),
        cpu(),
        kvm(),
        engine(&accel::auto(arguments.probe)),
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
        if let Some(figures) = &check.figures {
            figures.print();
        }
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
        figures: None,
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
            if is_x86_feature_detected!("avx512vl") {
                "The software CPU can show guests these, and AVX-512."
            } else {
                "The software CPU can show guests these. There is no AVX-512, which few programs need."
            },
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
        figures: None,
    }
}

fn kvm() -> Check {
    let (status, found, meaning) = match posada_kvm::Kvm::offer() {
        Ok(_) => (
            Status::Yes,
            "/dev/kvm makes VMs".into(),
            "There is a KVM; whether it runs guests properly and fast is measured: see the next line.",
        ),
        Err(error) => (
            Status::No,
            error.to_string(),
            "VMs run on the software CPU, which needs nothing of the host.",
        ),
    };
    Check {
        name: "KVM",
        status,
        found,
        meaning,
        figures: None,
    }
}

/// What `posada run --accel auto` takes.
fn engine(chosen: &Chosen) -> Check {
    let (status, meaning) = match chosen.kind {
        Kind::Kvm => (
            Status::Yes,
            "VMs run on the host's processor, unless --accel emulate says otherwise.",
        ),
        Kind::Translator | Kind::Interpreter | Kind::Checker => (
            Status::Partly,
            "VMs run on the software CPU, unless --accel kvm says otherwise.",
        ),
    };
    let made = match &chosen.decision {
        Some((_, true)) => " (measured before, in this boot)",
        Some((_, false)) => " (measured now)",
        None => "",
    };
    Check {
        name: "engine",
        status,
        found: format!("{}, since {}{made}", chosen.kind, chosen.reason),
        meaning,
        figures: chosen
            .decision
            .as_ref()
            .map(|(decision, cached)| Figures::new(decision, *cached)),
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
        figures: None,
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
        figures: None,
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
        figures: None,
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
            figures: None,
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
        figures: None,
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
        figures: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engine_s_line_has_the_reason_and_the_figures_that_there_are() {
        let outcome = |phases: &[Phase], end| Outcome {
            phases: phases
                .iter()
                .map(|phase| (*phase, 1e-6 * f64::from(phase.repeats())))
                .collect(),
            end,
        };
        let decision = probe::decide(
            outcome(&Phase::ALL[..3], End::Late(Phase::SystemCalls, 1.0)),
            outcome(&Phase::ALL, End::Finished),
        );
        let check = engine(&Chosen {
            kind: Kind::Translator,
            offer: posada_x86::Emulator::offer(),
            reason: decision.reason.clone(),
            decision: Some((decision, true)),
            notice: None,
        });
        assert!(check.found.starts_with("the software CPU, since KVM"), "{check:?}");
        assert!(
            check.found.contains("system calls") && check.found.contains("before"),
            "{check:?}"
        );
        let json = serde_json::to_value(&check).unwrap();
        let figures = &json["figures"];
        assert_eq!(figures["cached"], true);
        assert_eq!(figures["costs"][1]["of"], "a page fault");
        assert!((figures["costs"][1]["kvm"].as_f64().unwrap() - 1000.0).abs() < 1.0);
        assert!(figures["costs"][2]["kvm"].is_null() && figures["costs"][2]["emulator"].is_number());
        assert!(figures["boot_seconds"]["kvm"].is_null() && figures["boot_seconds"]["emulator"].is_number());
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
