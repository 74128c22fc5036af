//! `bench/nested`: Posada beside QEMU's microvm, both on the KVM of a test host, with the same kernel, initramfs and
//! command line.

use posada_tests::{Folder, Launch, Process, TestHost, image};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(300);
const MEMORY_MIB: u64 = 256;
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 rdinit=/bench";
/// Of a run that few requests make, and of one that many do: their difference is free of what a run costs by itself.
const FEW: u64 = 64;
const MANY: u64 = FEW + 2048;
const DISK: &str = "/tmp/bench/disk.raw";
const INITRAMFS: &str = "/tmp/bench/initramfs.cpio";
const SUMMARY: &str = "/tmp/bench/summary.json";
const HEADING: &str = "## On KVM, in the test host";

/// What runs the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Monitor {
    Posada,
    /// Virtio devices by MMIO, microvm's own way.
    Microvm,
    /// Virtio devices by PCI, with MSI-X.
    MicrovmPci,
}

const MONITORS: [Monitor; 3] = [Monitor::Posada, Monitor::Microvm, Monitor::MicrovmPci];

/// What one run has shown.
#[derive(Clone, Copy)]
struct Figures {
    /// From the start of the process to the first line of process 1, in seconds.
    boot: f64,
    /// VM exits until then.
    boot_exits: f64,
    /// VM exits of a 4 KiB request.
    read_exits: f64,
    write_exits: f64,
    /// Microseconds of a 4 KiB request.
    read_time: f64,
    write_time: f64,
    /// VM exits a second of a guest that does nothing.
    idle: f64,
    /// Bytes that are resident beyond the RAM that the guest touched.
    extra: f64,
}

impl Monitor {
    fn name(self) -> &'static str {
        match self {
            Self::Posada => "Posada",
            Self::Microvm => "QEMU microvm",
            Self::MicrovmPci => "QEMU microvm, PCI",
        }
    }

    fn start(self, host: &TestHost, cpus: u32) -> Process {
        let (device, machine) = match self {
            Self::Posada => {
                let launch = Launch::run()
                    .accel("kvm")
                    .kernel(image("vmlinuz"))
                    .initramfs(INITRAMFS)
                    .cmdline(CMDLINE)
                    .disk(DISK)
                    .cpus(cpus)
                    .memory(&format!("{MEMORY_MIB}M"))
                    .arg("--summary")
                    .arg(SUMMARY);
                return host.start_command(&launch.as_command(), PATIENCE);
            }
            Self::Microvm => ("virtio-blk-device", "microvm"),
            Self::MicrovmPci => ("virtio-blk-pci", "microvm,pcie=on"),
        };
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-accel", "kvm", "-cpu", "host", "-machine", machine])
            .args([
                "-nodefaults",
                "-no-user-config",
                "-no-reboot",
                "-display",
                "none",
                "-serial",
                "stdio",
            ])
            .args(["-smp", &cpus.to_string(), "-m", &MEMORY_MIB.to_string()])
            .arg("-kernel")
            .arg(image("vmlinuz"))
            .args(["-initrd", INITRAMFS, "-append", CMDLINE])
            .args(["-drive", &format!("file={DISK},format=raw,if=none,id=disk")])
            .args(["-device", &format!("{device},drive=disk")]);
        host.start_command(&command, PATIENCE)
    }
}

/// VM exits of the only VM, by KVM's own count.
fn exits(host: &TestHost) -> f64 {
    let answer = host.run("cat /sys/kernel/debug/kvm/exits");
    answer.success().output.parse().expect("KVM counts")
}

/// Has the guest do something; gives exits and seconds.
fn work(host: &TestHost, vm: &mut Process, what: &str, count: u64) -> (f64, f64) {
    let (before, begin) = (exits(host), Instant::now());
    let said = vm
        .send(&format!("{what} {count}\n"))
        .until(&format!("bench did {what} {count}\n"));
    let time = begin.elapsed().as_secs_f64();
    assert!(!said.contains("failed"), "the guest cannot {what}: {said}");
    (exits(host) - before, time)
}

/// Exits and microseconds of one request.
fn request(host: &TestHost, vm: &mut Process, what: &str, idle: f64) -> (f64, f64) {
    let (few, few_time) = work(host, vm, what, FEW);
    let (many, many_time) = work(host, vm, what, MANY);
    let (requests, time) = ((MANY - FEW) as f64, many_time - few_time);
    ((many - few - idle * time) / requests, time / requests * 1e6)
}

/// Kilobytes of a line such as `Rss:   12 kB`, as bytes.
fn bytes(line: &str, name: &str) -> Option<f64> {
    let number = line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim();
    number.parse::<f64>().ok().map(|kilobytes| kilobytes * 1024.0)
}

/// What of a QEMU is resident beside the guest's RAM, which is one mapping.
fn qemu_extra(host: &TestHost) -> f64 {
    let maps = host
        .run("cat /proc/$(pidof qemu-system-x86_64)/smaps")
        .success()
        .output
        .clone();
    let (mut all, mut ram, mut size) = (0.0, None, 0.0);
    for line in maps.lines() {
        if let Some(found) = bytes(line, "Size:") {
            size = found;
        } else if let Some(resident) = bytes(line, "Rss:") {
            all += resident;
            if size == (MEMORY_MIB << 20) as f64 {
                assert!(
                    ram.replace(resident).is_none(),
                    "two mappings look like the guest's RAM"
                );
            }
        }
    }
    all - ram.expect("QEMU has the guest's RAM in one mapping")
}

/// The same of Posada at its largest, by its summary.
fn posada_extra(host: &TestHost) -> f64 {
    let summary = host.run(&format!("cat {SUMMARY}")).success().output.clone();
    let figure = |name: &str| -> f64 {
        let (_, rest) = summary.split_once(&format!("\"{name}\": ")).expect(name);
        rest.split([',', '\n'])
            .next()
            .and_then(|number| number.parse().ok())
            .expect(name)
    };
    figure("peak_resident_bytes") - figure("touched_guest_bytes")
}

fn measure(host: &TestHost, monitor: Monitor, cpus: u32) -> Figures {
    assert!(
        host.run("cat /sys/kernel/debug/kvm/exits").output == "0",
        "another VM runs"
    );
    let begin = Instant::now();
    let mut vm = monitor.start(host, cpus);
    vm.expect("bench ready\n");
    let (boot, boot_exits) = (begin.elapsed().as_secs_f64(), exits(host));
    vm.send("go\n").expect("bench disk\n");
    // What the kernel still has to do shall be over.
    thread::sleep(Duration::from_secs(2));
    let (before, begin) = (exits(host), Instant::now());
    thread::sleep(Duration::from_secs(2));
    let idle = (exits(host) - before) / begin.elapsed().as_secs_f64();
    let (read_exits, read_time) = request(host, &mut vm, "read", idle);
    let (write_exits, write_time) = request(host, &mut vm, "write", idle);
    let qemu = (monitor != Monitor::Posada).then(|| qemu_extra(host));
    vm.send("off\n");
    vm.end().expect_code(0);
    Figures {
        boot,
        boot_exits,
        read_exits,
        write_exits,
        read_time,
        write_time,
        idle,
        extra: qemu.unwrap_or_else(|| posada_extra(host)),
    }
}

/// The initramfs of `scripts/image`, and one more archive behind it with the guest's process 1.
fn initramfs(folder: &Folder) -> PathBuf {
    let tree = Folder::new();
    fs::create_dir(tree.path().join("lib")).expect("the folder is new");
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../bench/guest/nested");
    fs::copy(&program, tree.path().join("bench")).expect("bench/guest/nested is there");
    let made = Command::new("bash")
        .args([
            "-euc",
            "set -o pipefail; tar -xOf \"$1\" --wildcards '*/virtio_mmio.ko*' >lib/module
            xz -dc lib/module >lib/virtio_mmio.ko 2>/dev/null || cp lib/module lib/virtio_mmio.ko; rm lib/module
            printf '%s\\n' lib/virtio_mmio.ko bench | cpio --quiet -o -H newc -R 0:0 | cat \"$2\" - >\"$3\"",
            "-",
        ])
        .args([
            image("kernel.tar"),
            image("initramfs.cpio"),
            folder.path().join("initramfs.cpio"),
        ])
        .current_dir(tree.path())
        .status();
    assert!(
        made.is_ok_and(|status| status.success()),
        "cannot make the guest's initramfs"
    );
    folder.path().join("initramfs.cpio")
}

fn median(runs: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// A row of the table: what, how to show a figure, and what it shall not exceed beside QEMU's least.
struct Row {
    what: &'static str,
    of: fn(&Figures) -> f64,
    decimals: usize,
    limit: Limit,
}

enum Limit {
    Qemu,
    Fixed(f64, &'static str),
    None,
}

const ROWS: [Row; 8] = [
    Row {
        what: "first user-space line, s",
        of: |run| run.boot,
        decimals: 2,
        limit: Limit::Qemu,
    },
    Row {
        what: "VM exits until then",
        of: |run| run.boot_exits,
        decimals: 0,
        limit: Limit::Qemu,
    },
    Row {
        what: "VM exits of a 4 KiB read",
        of: |run| run.read_exits,
        decimals: 2,
        limit: Limit::Qemu,
    },
    Row {
        what: "VM exits of a 4 KiB write",
        of: |run| run.write_exits,
        decimals: 2,
        limit: Limit::Qemu,
    },
    Row {
        what: "a 4 KiB read, µs",
        of: |run| run.read_time,
        decimals: 0,
        limit: Limit::None,
    },
    Row {
        what: "a 4 KiB write, µs",
        of: |run| run.write_time,
        decimals: 0,
        limit: Limit::None,
    },
    Row {
        what: "VM exits a second, idle",
        of: |run| run.idle,
        decimals: 1,
        limit: Limit::None,
    },
    Row {
        what: "resident beyond the RAM that the guest touched, MiB",
        of: |run| run.extra / 1_048_576.0,
        decimals: 1,
        limit: Limit::Fixed(8.0, "≤ 8"),
    },
];

fn table(runs: &[Vec<Figures>; 3]) -> String {
    let names = MONITORS.map(Monitor::name).join(" | ");
    let mut text = format!("| | {names} | goal | met |\n|---|---|---|---|---|---|\n");
    for row in &ROWS {
        let [ours, mmio, pci] = [0, 1, 2].map(|number| median(&runs[number], row.of));
        let (goal, met) = match row.limit {
            Limit::Qemu => ("≤ QEMU's least", if ours <= mmio.min(pci) { "yes" } else { "**no**" }),
            Limit::Fixed(limit, text) => (text, if ours <= limit { "yes" } else { "**no**" }),
            Limit::None => ("", ""),
        };
        let [ours, mmio, pci] = [ours, mmio, pci].map(|figure| format!("{figure:.*}", row.decimals));
        text += &format!("| {} | {ours} | {mmio} | {pci} | {goal} | {met} |\n", row.what);
    }
    text
}

fn first_line(command: &mut Command) -> String {
    let output = command.output().map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output)
        .lines()
        .next()
        .unwrap_or("unknown")
        .to_string()
}

/// Puts the section at the end of `path`, in place of an older one.
fn write_section(path: &Path, section: &str) {
    let old = fs::read_to_string(path).unwrap_or_default();
    let others = old.split_once(HEADING).map_or(old.as_str(), |(before, _)| before);
    let text = format!("{}\n\n{section}", others.trim_end());
    fs::write(path, text.trim_start()).unwrap_or_else(|error| panic!("cannot write {}: {error}", path.display()));
}

fn arguments() -> (usize, PathBuf) {
    let (mut rounds, mut output) = (3, PathBuf::from("bench/results.md"));
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match (word.as_str(), words.next()) {
            ("--rounds", Some(value)) => rounds = value.parse().expect("--rounds takes a number"),
            ("--output", Some(value)) => output = value.into(),
            _ => panic!("usage: bench/nested [--rounds 3] [--output bench/results.md]"),
        }
    }
    assert!(rounds > 0, "--rounds begins at 1");
    (rounds, output)
}

fn main() {
    let (rounds, path) = arguments();
    let Some(host) = TestHost::start() else { return };
    let folder = Folder::new();
    host.run("mkdir /tmp/bench").expect("");
    host.put(&initramfs(&folder), "/tmp/bench");
    let disk = folder.path().join("disk.raw");
    File::create(&disk)
        .and_then(|file| file.set_len(MANY * 4096))
        .expect("the folder is there");
    host.put(&disk, "/tmp/bench");
    // Blocks that are there cost the same each time.
    host.run(&format!(
        "dd if=/dev/zero of={DISK} bs=1M count={} conv=notrunc status=none",
        (MANY * 4096) >> 20
    ))
    .expect("");

    let date = first_line(Command::new("date").arg("+%F"));
    let commit = first_line(Command::new("git").args(["describe", "--always", "--dirty"]));
    let qemu = first_line(Command::new("qemu-system-x86_64").arg("--version"));
    let mut section = format!(
        "{HEADING}\n\nWritten by `bench/nested` on {date}. [What the rows mean](../docs/benchmarks.md#on-kvm).\n\n\
         - Posada: commit {commit}, `--accel kvm`; {qemu}, `-accel kvm`; the same kernel, initramfs and command line\n\
         - The test host's CPUs are emulated: times compare with each other and with nothing else\n\
         - Medians of {rounds} interleaved rounds, {MEMORY_MIB} MiB\n"
    );
    for cpus in [1, 2] {
        let mut runs = [const { Vec::new() }; 3];
        // The first round fills the test host's page cache.
        for round in 0..=rounds {
            for (monitor, runs) in MONITORS.into_iter().zip(&mut runs) {
                eprintln!("{cpus} vCPUs, round {round} of {rounds}: {}", monitor.name());
                let figures = measure(&host, monitor, cpus);
                if round > 0 {
                    runs.push(figures);
                }
            }
        }
        section += &format!(
            "\n### {cpus} vCPU{}\n\n{}",
            if cpus == 1 { "" } else { "s" },
            table(&runs)
        );
    }
    write_section(&path, &section);
    print!("{section}");
}
