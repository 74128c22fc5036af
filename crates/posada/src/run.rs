//! `posada run`: one VM in this process.

use crate::accel::{self, Accelerator, Chosen, Kind};
use crate::{signals, size, summary};
use anyhow::{Context, anyhow};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, ValueEnum};
use posada_devices::virtio::vsock::is_guest_cid;
use posada_engine::cpu::{Baseline, CpuModel};
use posada_engine::{Engine, Error};
use posada_host::spec::{Boot, Disk, Spec};
use posada_memory::GuestRam;
use posada_vmm::console::ConsoleConfig;
use posada_vmm::control::{Control, Ending};
use posada_vmm::gdb::Address;
use posada_vmm::snapshot::Snapshot;
use posada_vmm::vm::{self, Config, DiskConfig, Report, VsockConfig};
use posada_x86::Translating;
use posada_x86::translate::PerfMap;
use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Instant;

/// Exit code when a vCPU has shut down. Even, so that no debug exit can give it.
const CRASHED: u8 = 2;
/// Exit code when a thread of ours has panicked.
const FAILED: u8 = 126;

pub const AFTER_HELP: &str = "\
Console on a terminal: Ctrl-A x ends the VM, Ctrl-A h lists commands, Ctrl-A Ctrl-A sends Ctrl-A.

Exit codes:
  0           the guest powered off, or reset with --no-reboot, or you left by Ctrl-A x,
              or the VM was saved with --stop
  2           the guest crashed (triple fault); its registers are on standard error
  (v << 1)|1  the guest wrote v to the debug-exit port
  125         bad arguments, or the VM cannot start
  126         an error in Posada itself or in the host's KVM
  128+n       ended by signal n

Example:
  posada run --kernel vmlinuz --initramfs initrd.img --disk debian.raw --cpus 2 --memory 512M \\
      --cmdline 'console=ttyS0 root=/dev/vda'";

/// Run a VM until it ends
#[derive(Args)]

pub struct Arguments {
    /// Kernel: Linux bzImage, ELF with a PVH note, or multiboot 1
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present = "restore",
        conflicts_with = "restore"
    )]
    kernel: Option<PathBuf>,

    /// Initial RAM file system; the first module of a multiboot kernel
    #[arg(long, value_name = "PATH", conflicts_with = "restore")]
    initramfs: Option<PathBuf>,

    /// Kernel command line [default: console=ttyS0, with --virtio-console console=hvc0 too]
    #[arg(long, value_name = "TEXT", conflicts_with = "restore")]
    cmdline: Option<String>,

    /// Raw disk image or block device, as /dev/vda, /dev/vdb and so on; ,ro behind the path forbids writes
    #[arg(long = "disk", value_name = "PATH[,ro]", value_parser = clap::value_parser!(std::ffi::OsString))]
    disks: Vec<std::ffi::OsString>,

    /// Number of virtual CPUs, 1 to 8 [default: 1]
    #[arg(long, value_name = "N")]
    cpus: Option<u32>,

    /// What the virtual CPUs can do: all that this host offers, or a level that other hosts offer too, for a VM that is to
    /// move [default: host]
    #[arg(long, value_enum, conflicts_with = "restore")]
    cpu_model: Option<Model>,

    /// Guest memory, as in 512M or 2GiB; the host gives it only as the guest touches it [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    memory: Option<u64>,

    /// What the guest's serial port COM1 is connected to: stdio, file:PATH or none
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    console: Console,

    /// Have a virtio console (hvc0) too; it prints to the same place and takes the input instead of COM1
    #[arg(long)]
    virtio_console: bool,

    /// Have sockets between host and guest: programs reach the guest's ports by the Unix socket PATH, and the guest reaches
    /// port P of the host at PATH_P. The guest's context id is 3, unless N says otherwise
    #[arg(long, value_name = "PATH[,cid=N]", value_parser = OsStringValueParser::new().try_map(|text| vsock(&text)))]
    vsock: Option<Vsock>,

    /// Have a socket here by which posada status, pause, resume and snapshot reach the VM
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Go on from a snapshot instead of booting; --disk then names copies of its disks, in their order
    #[arg(long, value_name = "DIR")]
    restore: Option<PathBuf>,

    /// Whether the VM runs at once or stays paused until posada resume [default: running; as it was saved, with --restore]
    #[arg(long, value_enum, value_name = "HOW")]
    start: Option<Start>,

    /// Let gdb attach here: PORT, HOST:PORT or a socket's path (with a slash)
    #[arg(long, value_name = "ADDRESS")]
    gdb: Option<Address>,

    /// How guest code runs; auto measures once what is faster, and posada doctor shows what it found
    #[arg(long, value_enum, default_value_t = Accelerator::Auto)]
    accel: Accelerator,

    /// Memory for translated code, where code is translated, but at least 2 MiB for each CPU; when it is full, the oldest
    /// makes room
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "64M")]
    translation_cache: u64,

    /// Name translated code in /tmp/perf-PID.map, for perf report
    #[arg(long)]
    perf_map: bool,

    /// Have translated code count its lookups in the soft TLB, for --summary; it runs slower then
    #[arg(long)]
    count_lookups: bool,

    /// Have the port 0xf4, through which a test kernel ends the VM with an exit code
    #[arg(long)]
    debug_exit: bool,

    /// End when the guest resets, instead of starting it again
    #[arg(long)]
    no_reboot: bool,

    /// At the end write what the run has cost to this file, as JSON
    #[arg(long, value_name = "PATH")]
    summary: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Start {
    /// It runs at once
    Running,
    /// Its CPUs stand still until posada resume
    Paused,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Model {
    /// All that this host offers
    Host,
    /// Up to SSE4.2
    #[value(name = "x86-64-v2")]
    V2,
    /// Up to AVX2
    #[value(name = "x86-64-v3")]
    V3,
}

impl Model {
    fn baseline(self) -> Option<Baseline> {
        match self {
            Model::Host => None,
            Model::V2 => Some(Baseline::V2),
            Model::V3 => Some(Baseline::V3),
        }
    }
}

#[derive(Clone)]
struct Console(ConsoleConfig);

impl FromStr for Console {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(match text.split_once(':') {
            None if text == "stdio" => ConsoleConfig::Stdio,
            None if text == "none" => ConsoleConfig::None,
            Some(("file", path)) if !path.is_empty() => ConsoleConfig::File(path.into()),
            _ => return Err("use stdio, file:PATH or none".into()),
        }))
    }
}

fn disk(text: &OsStr) -> DiskConfig {
    let bytes = text.as_bytes();
    let (path, read_only) = match bytes.strip_suffix(b",ro") {
        Some(path) => (path, true),
        None => (bytes, false),
    };
    DiskConfig {
        path: OsStr::from_bytes(path).into(),
        read_only,
    }
}

/// The socket of `--vsock`, and the context id if it is there.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Vsock {
    path: PathBuf,
    cid: Option<u32>,
}

/// Context id of a guest whose user does not say.
const CID: u32 = 3;

fn vsock(text: &OsStr) -> Result<Vsock, String> {
    let bytes = text.as_bytes();
    let (path, cid) = match bytes.windows(5).rposition(|word| word == b",cid=") {
        Some(at) => (&bytes[..at], Some(&bytes[at + 5..])),
        None => (bytes, None),
    };
    if path.is_empty() {
        return Err("give a path, as in --vsock vm.vsock".into());
    }
    let cid = cid.map(|digits| {
        let number = str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok());
        number
            .filter(|cid| is_guest_cid(*cid))
            .and_then(|cid| cid.try_into().ok())
            .ok_or("a guest's context id is 3 to 4294967294")
    });
    Ok(Vsock {
        path: OsStr::from_bytes(path).into(),
        cid: cid.transpose()?,
    })
}

impl Arguments {
    /// The VM that the host's daemon is to run, if it can run it as it is wanted.
    pub fn spec(&self) -> anyhow::Result<Spec> {
        let own = [
            (self.control.is_some(), "--control"),
            (self.vsock.is_some(), "--vsock"),
            (self.start.is_some(), "--start"),
            (self.gdb.is_some(), "--gdb"),
            (self.perf_map, "--perf-map"),
            (self.summary.is_some(), "--summary"),
            (self.translation_cache != TRANSLATION_CACHE, "--translation-cache"),
            (!matches!(self.console.0, ConsoleConfig::Stdio), "--console"),
        ];
        if let Some((_, option)) = own.iter().find(|(given, _)| *given) {
            return Err(anyhow!(
                "{option} is for posada run --foreground only: the daemon gives its VMs a console, a log and sockets itself"
            ));
        }
        let absolute = |path: &PathBuf| {
            let found = std::path::absolute(path);
            found.with_context(|| format!("cannot tell where {} is", path.display()))
        };
        let boot = match (&self.kernel, &self.restore) {
            (Some(kernel), _) => Boot::Kernel {
                kernel: absolute(kernel)?,
                initramfs: self.initramfs.as_ref().map(absolute).transpose()?,
                cmdline: self.cmdline.clone(),
            },
            (None, Some(place)) => Boot::Snapshot {
                place: absolute(place)?,
            },
            (None, None) => return Err(anyhow!("say what to run: give --kernel PATH or --restore DIR")),
        };
        let mut spec = Spec::new(boot);
        for DiskConfig { path, read_only } in self.disks.iter().map(|text| disk(text)) {
            let path = absolute(&path)?;
            spec.disks.push(Disk { path, read_only });
        }
        spec.cpus = self.cpus.unwrap_or(spec.cpus);
        spec.memory = self.memory.unwrap_or(spec.memory);
        spec.cpu_model = self.cpu_model.as_ref().and_then(word);
        spec.accel = Some(&self.accel)
            .filter(|accel| **accel != Accelerator::Auto)
            .and_then(word);
        spec.virtio_console = self.virtio_console;
        spec.debug_exit = self.debug_exit;
        spec.no_reboot = self.no_reboot;
        Ok(spec)
    }

    /// What a VM of the daemon runs, with its sockets in this folder.
    pub fn of_spec(spec: &Spec, sockets: &Path) -> anyhow::Result<Self> {
        let mut line: Vec<OsString> = vec!["run".into()];
        let mut give = |option: &str, value: &dyn AsRef<OsStr>| {
            // In one word, so that a value may begin with a dash.
            let mut word = OsString::from(option);
            word.push("=");
            word.push(value.as_ref());
            line.push(word);
        };
        match &spec.boot {
            Boot::Kernel {
                kernel,
                initramfs,
                cmdline,
            } => {
                give("--kernel", kernel);
                initramfs.iter().for_each(|path| give("--initramfs", path));
                cmdline.iter().for_each(|text| give("--cmdline", text));
                give("--cpus", &spec.cpus.to_string());
                give("--memory", &spec.memory.to_string());
                spec.cpu_model.iter().for_each(|model| give("--cpu-model", model));
            }
            // It says itself what machine it is.
            Boot::Snapshot { place } => give("--restore", place),
        }
        for Disk { path, read_only } in &spec.disks {
            let mut word = path.as_os_str().to_owned();
            if *read_only {
                word.push(",ro");
            } else if word.as_bytes().ends_with(b",ro") {
                return Err(anyhow!(
                    "{} has a name that means a read-only disk; rename it",
                    path.display()
                ));
            }
            give("--disk", &word);
        }
        spec.accel.iter().for_each(|accel| give("--accel", accel));
        give("--control", &sockets.join("control"));
        if spec.vsock {
            let mut word = sockets.join("vsock").into_os_string();
            if let Some(cid) = spec.cid {
                word.push(format!(",cid={cid}"));
            }
            give("--vsock", &word);
        }
        for (wanted, flag) in [
            (spec.virtio_console, "--virtio-console"),
            (spec.debug_exit, "--debug-exit"),
            (spec.no_reboot, "--no-reboot"),
        ] {
            if wanted {
                line.push(flag.into());
            }
        }
        Ok(Line::try_parse_from(line)?.arguments)
    }
}

/// [`Arguments`] as a command line of their own.
#[derive(clap::Parser)]
struct Line {
    #[command(flatten)]
    arguments: Arguments,
}

/// How a value is written.
fn word(value: &impl ValueEnum) -> Option<String> {
    Some(value.to_possible_value()?.get_name().to_string())
}

/// Memory for translated code where the user says nothing, in bytes.
const TRANSLATION_CACHE: u64 = 64 << 20;

/// Memory of a VM whose user does not say.
const MEMORY: u64 = 1 << 30;

/// What to run, and on what: the engine that `choose` gives, if it is not unfit for a snapshot.
fn prepare(arguments: &Arguments, choose: impl FnOnce() -> anyhow::Result<Chosen>) -> anyhow::Result<(Config, Chosen)> {
    let default_cmdline = if arguments.virtio_console {
        "console=ttyS0 console=hvc0"
    } else {
        "console=ttyS0"
    };
    let snapshot = arguments.restore.as_deref().map(Snapshot::open).transpose()?;
    if let Some(snapshot) = &snapshot {
        agree(arguments, snapshot)?;
    }
    let paused = paused(arguments, snapshot.as_ref())?;
    let mut chosen = choose()?;
    let model = match &snapshot {
        Some(snapshot) => {
            chosen = fitting(chosen, arguments.accel, snapshot)?;
            snapshot.model().clone()
        }
        None => {
            let level = arguments.cpu_model.unwrap_or(Model::Host);
            chosen.model(arguments.cpus.unwrap_or(1), level.baseline())?
        }
    };
    let saved_cid = snapshot.as_ref().and_then(Snapshot::vsock);
    let disks = arguments.disks.iter().map(|text| disk(text)).collect();
    let mut config = Config {
        kernel: arguments.kernel.clone().unwrap_or_default(),
        initramfs: arguments.initramfs.clone(),
        cmdline: arguments.cmdline.clone().unwrap_or_else(|| default_cmdline.into()),
        disks: Vec::new(),
        model,
        memory: arguments.memory.unwrap_or(MEMORY),
        console: arguments.console.0.clone(),
        virtio_console: arguments.virtio_console,
        vsock: arguments.vsock.clone().map(|vsock| VsockConfig {
            path: vsock.path,
            cid: vsock.cid.or(saved_cid).unwrap_or(CID),
        }),
        gdb: arguments.gdb.clone(),
        debug_exit: arguments.debug_exit,
        no_reboot: arguments.no_reboot,
        control: arguments.control.clone(),
        paused,
        restore: None,
    };
    match snapshot {
        Some(snapshot) => config = snapshot.into_config(disks, config)?,
        None => config.disks = disks,
    }
    Ok((config, chosen))
}

/// A snapshot says what machine its VM has: who says otherwise is told so.
fn agree(arguments: &Arguments, snapshot: &Snapshot) -> anyhow::Result<()> {
    let (cpus, memory) = (snapshot.model().cpus, snapshot.memory());
    let refuse = |why: String| Err(snapshot.unfit(why).into());
    match (arguments.cpus, arguments.memory) {
        (Some(wanted), _) if wanted != cpus => {
            refuse(format!("its VM has {cpus} CPUs, not {wanted}; leave out --cpus"))
        }
        (_, Some(wanted)) if wanted != memory => refuse(format!(
            "its VM has {} of memory, not {}; leave out --memory",
            size::of(memory),
            size::of(wanted)
        )),
        _ if arguments.virtio_console && !snapshot.virtio_console() => {
            refuse("its VM has no virtio console; leave out --virtio-console".into())
        }
        _ if arguments.vsock.is_some() != snapshot.vsock().is_some() => refuse(match &arguments.vsock {
            Some(_) => "its VM has no vsock; leave out --vsock".into(),
            None => "its VM has a vsock; give --vsock PATH".into(),
        }),
        _ if arguments.debug_exit && !snapshot.debug_exit() => {
            refuse("its VM has no debug-exit port; leave out --debug-exit".into())
        }
        _ => Ok(()),
    }
}

/// Whether the VM begins paused, as it was saved unless the user says otherwise.
fn paused(arguments: &Arguments, snapshot: Option<&Snapshot>) -> anyhow::Result<bool> {
    let saved = snapshot.filter(|snapshot| snapshot.paused());
    match (arguments.start, saved) {
        (Some(Start::Running), _) | (None, None) => Ok(false),
        _ if arguments.control.is_some() => Ok(true),
        (Some(Start::Paused), _) => Err(anyhow!(
            "--start paused needs --control PATH, so that posada resume PATH can let the VM run"
        )),
        (None, Some(saved)) => {
            let why = "its VM was paused, and without a control socket nobody could resume it; give --control PATH, or \
                       --start running";
            Err(saved.unfit(why).into())
        }
    }
}

/// The engine that was chosen, or if `auto` chose one that cannot go on with the VM, the software CPU where that can.
fn fitting(chosen: Chosen, wanted: Accelerator, snapshot: &Snapshot) -> anyhow::Result<Chosen> {
    let Err(why) = snapshot.model().fits(&chosen.offer) else {
        return Ok(chosen);
    };
    if wanted == Accelerator::Auto {
        let other = accel::choose(Accelerator::Emulate)?;
        if snapshot.model().fits(&other.offer).is_ok() {
            let notice = format!("the software CPU runs this VM, which needs {why}");
            return Ok(Chosen {
                notice: Some(notice),
                ..other
            });
        }
    }
    Err(snapshot.unfit(format!("its VM needs {why}")).into())
}

/// Makes an engine of a kind: [`Kind::make`].
type Make<'a> = &'a dyn Fn(Kind, Arc<GuestRam>, &CpuModel) -> Result<Arc<dyn Engine>, Error>;

/// How a VM ended.
pub struct Outcome {
    /// The process's exit code.
    pub code: u8,
    /// In a word.
    pub reason: &'static str,
    /// What the user must be told.
    pub message: Option<String>,
}

/// Runs a VM here and tells its user how it ended.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let outcome = run_to_end(arguments, &|| ())?;
    if let Some(message) = outcome.message {
        eprintln!("posada: {message}");
    }
    Ok(ExitCode::from(outcome.code))
}

/// Runs a VM; `up` is called when it has all that it needs to run, once for each life.
pub fn run_to_end(arguments: &Arguments, up: &dyn Fn()) -> anyhow::Result<Outcome> {
    let prepared = prepare(arguments, || accel::choose(arguments.accel))?;
    let control = Control::new();
    signals::end_on_signals(control.clone())?;
    let begin = Instant::now();
    let translating = Translating {
        cache: arguments.translation_cache,
        perf_map: arguments.perf_map.then(perf_map).transpose()?,
        count_lookups: arguments.count_lookups,
        ..accel::TRANSLATING
    };
    let make = |kind: Kind, ram, model: &CpuModel| {
        let made = kind.make(ram, model, &translating);
        if made.is_ok() {
            up();
        }
        made
    };
    let report = run_vm(arguments, prepared, &make, &control)?;
    let outcome = explain(&report.ending);
    if let Some(path) = &arguments.summary {
        summary::write(path, &report, outcome.reason, begin.elapsed())?;
    }
    Ok(outcome)
}

/// The map that names translated code.
fn perf_map() -> anyhow::Result<Arc<PerfMap>> {
    let path = PerfMap::path();
    let map = PerfMap::create().with_context(|| format!("cannot make {} for --perf-map", path.display()))?;
    Ok(Arc::new(map))
}

/// Runs the VM; on the software CPU, if `auto` has chosen KVM and that refuses to make its first life.
fn run_vm(
    arguments: &Arguments,
    (config, chosen): (Config, Chosen),
    make: Make<'_>,
    control: &Arc<Control>,
) -> anyhow::Result<Report> {
    let (notice, first, refused) = (Cell::new(chosen.notice), Cell::new(true), Cell::new(None));
    let make_engine = |ram, model: &CpuModel| {
        // Bad input has been told by now: the notice does not stand before an error.
        if let Some(notice) = notice.take() {
            eprintln!("posada: {notice}");
        }
        if first.get()
            && let (true, Some(socket)) = (config.paused, &config.control)
        {
            eprintln!(
                "posada: the VM is paused; posada resume {} lets it run",
                socket.display()
            );
        }
        let made = make(chosen.kind, ram, model);
        if first.replace(false)
            && let Err(Error::Host(why)) = &made
        {
            refused.set(Some(why.clone()));
        }
        made
    };
    let report = vm::run(&config, &make_engine, control);
    let replaceable = arguments.accel == Accelerator::Auto && chosen.kind == Kind::Kvm;
    let Some(why) = refused.take().filter(|_| replaceable) else {
        return Ok(report?);
    };
    match prepare(arguments, || Ok(accel::without_kvm(why))) {
        Ok(prepared) => run_vm(arguments, prepared, make, control),
        // A snapshot that only KVM can go on with.
        Err(_) => Ok(report?),
    }
}

fn explain(ending: &Ending) -> Outcome {
    let (code, reason, message) = match ending {
        Ending::PowerOff => (0, "power-off", None),
        Ending::Reset => (0, "reset", None),
        Ending::Quit => (0, "quit", None),
        Ending::Saved => (0, "saved", None),
        // Like every process's, the code keeps its low byte.
        Ending::DebugExit(code) => (*code as u8, "debug-exit", None),
        Ending::Crash { cpu, report } => {
            let what = "met a fault while it delivered a double fault and shut down";
            let message = format!("the guest crashed: vCPU {cpu} {what}\n{}", report.trim_end());
            (CRASHED, "crash", Some(message))
        }
        Ending::EngineFailed { cpu, reason } => {
            let message = format!("vCPU {cpu} cannot go on: {reason}");
            (FAILED, "failure", Some(message))
        }
        Ending::Failed => {
            let message = "a thread has failed; this is an error in Posada, please report it".into();
            (FAILED, "failure", Some(message))
        }
        Ending::Signal(signal) => (128 + *signal as u8, "signal", None),
    };
    Outcome { code, reason, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A multiboot kernel that writes 7 to the debug-exit port.
    const KERNEL: [u32; 12] = {
        const FLAGS: u32 = 1 << 16;
        const LOAD: u32 = 0x10_0000;
        const CODE: u32 = LOAD + 32;
        [
            0x1bad_b002,
            FLAGS,
            0u32.wrapping_sub(0x1bad_b002 + FLAGS),
            LOAD,
            LOAD,
            0,
            0,
            CODE,
            // mov al, 7; out 0xf4, al; hlt
            0xf4e6_07b0,
            0xf4,
            0,
            0,
        ]
    };

    /// Runs [`KERNEL`] where `auto` has chosen KVM, which then is gone; gives the kinds that were asked.
    fn run_without_kvm(accel: &str) -> (anyhow::Result<Report>, Vec<Kind>) {
        let folder = std::env::temp_dir().join(format!("posada-run-{}-{accel}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let (kernel, socket) = (folder.join("kernel"), folder.join("control"));
        std::fs::write(&kernel, KERNEL.map(u32::to_le_bytes).concat()).unwrap();
        let mut words: Vec<std::ffi::OsString> = vec!["run".into(), "--kernel".into(), kernel.into()];
        words.extend([
            "--control".into(),
            socket.clone().into(),
            "--accel".into(),
            accel.into(),
        ]);
        words.extend(["--memory", "8M", "--console", "none", "--debug-exit"].map(Into::into));
        let arguments = Line::parse_from(words).arguments;
        let chosen = Chosen {
            kind: Kind::Kvm,
            // A model that the software CPU cannot be.
            offer: posada_engine::cpu::Offer {
                features: posada_engine::cpu::Features::new(|_| true),
                ..posada_x86::Emulator::offer()
            },
            reason: "the test says so".into(),
            decision: None,
            notice: None,
        };
        let asked = std::cell::RefCell::new(Vec::new());
        let make = |kind: Kind, ram, model: &CpuModel| {
            asked.borrow_mut().push(kind);
            assert!(socket.exists(), "the second attempt has a socket too");
            match kind {
                Kind::Kvm => Err(Error::Host("the device is gone".into())),
                _ => kind.make(ram, model, &accel::TRANSLATING),
            }
        };
        let prepared = prepare(&arguments, || Ok(chosen)).unwrap();
        let report = run_vm(&arguments, prepared, &make, &Control::new());
        std::fs::remove_dir_all(&folder).unwrap();
        (report, asked.into_inner())
    }

    #[test]
    fn when_kvm_vanishes_after_the_choice_auto_goes_on_with_the_software_cpu() {
        let (report, asked) = run_without_kvm("auto");
        assert_eq!(report.unwrap().ending, Ending::DebugExit(15));
        assert_eq!(asked, [Kind::Kvm, Kind::Translator]);
        let (report, asked) = run_without_kvm("kvm");
        let error = report.unwrap_err().to_string();
        assert!(error.contains("the device is gone"), "{error}");
        assert_eq!(asked, [Kind::Kvm]);
    }

    #[test]
    fn a_vm_that_nobody_could_resume_is_not_paused() {
        let paused_with = |more: &[&str]| {
            let words = [&["run", "--kernel", "k"], more].concat();
            paused(&Line::parse_from(words).arguments, None)
        };
        assert!(!paused_with(&[]).unwrap());
        assert!(!paused_with(&["--start", "running", "--control", "s"]).unwrap());
        assert!(paused_with(&["--start", "paused", "--control", "s"]).unwrap());
        let error = paused_with(&["--start", "paused"]).unwrap_err().to_string();
        assert!(
            error.contains("--control") && error.contains("posada resume"),
            "{error}"
        );
    }

    #[test]
    fn a_disk_is_read_only_when_it_says_so() {
        let config = disk(OsStr::new("a,b.img,ro"));
        assert_eq!((config.path, config.read_only), ("a,b.img".into(), true));
        let config = disk(OsStr::new("a,rw"));
        assert_eq!((config.path, config.read_only), ("a,rw".into(), false));
    }

    #[test]
    fn a_vsock_has_a_path_and_may_have_a_context_id() {
        let made = |path: &str, cid| {
            let path = path.into();
            Ok(Vsock { path, cid })
        };
        for (text, expected) in [
            ("v", made("v", None)),
            ("a,b", made("a,b", None)),
            ("v,cid=3", made("v", Some(3))),
            ("v,cid=1,cid=4294967294", made("v,cid=1", Some(u32::MAX - 1))),
        ] {
            assert_eq!(vsock(OsStr::new(text)), expected);
        }
        for text in [
            "",
            ",cid=3",
            "v,cid=",
            "v,cid=2",
            "v,cid=4294967295",
            "v,cid=x",
            "v,cid=3 ",
        ] {
            assert!(vsock(OsStr::new(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn only_the_three_consoles_are_taken() {
        assert!(
            matches!("file:a:b".parse::<Console>(), Ok(Console(ConsoleConfig::File(path))) if path == "a:b".as_ref() as &std::path::Path)
        );
        for text in ["file:", "file", "stdio:", "pty", ""] {
            assert!(text.parse::<Console>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_crash_cannot_be_taken_for_a_debug_exit() {
        let crash = Ending::Crash {
            cpu: 0,
            report: String::new(),
        };
        assert_eq!(explain(&crash).code % 2, 0);
        assert_ne!(explain(&crash).code, 0);
        assert_eq!(explain(&Ending::DebugExit(0x203)).code, 3);
    }
}
