//! One VM from its start to its end: builds lives, runs their vCPUs, begins anew after a reset.

use crate::boot::{self, Source};
use crate::console::{self, Console, ConsoleConfig, Sink};
use crate::control::{Control, Ending, Life};
use crate::machine::{self, Machine, Parts, VsockPart};
use crate::remote::{self, Server};
use crate::snapshot::{self, Restore, Subject};
use crate::socket::SocketFile;
use crate::{gdb, resident};
use posada_devices::virtio::blk::{BlkDisk, DiskError, open_disk};
use posada_engine::cpu::CpuModel;
use posada_engine::{Counters, CpuState, Engine, Exit, Vcpu};
use posada_memory::GuestRam;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

/// The most vCPUs.
pub const MAX_CPUS: u32 = 8;

/// Makes the processors of a life: RAM, what they are.
pub type MakeEngine<'a> = &'a dyn Fn(Arc<GuestRam>, &CpuModel) -> Result<Arc<dyn Engine>, posada_engine::Error>;

/// A disk as the user names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// Raw image or block device.
    pub path: PathBuf,
    /// The guest may not write.
    pub read_only: bool,
}

/// Sockets between host and guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The Unix socket at which programs of the host reach the guest.
    pub path: PathBuf,
    /// The guest's context id; restored guests learn it anew.
    pub cid: u32,
}

/// What VM to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initial RAM file system or first module.
    pub initramfs: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// The vCPUs, 1 to [`MAX_CPUS`].
    pub model: CpuModel,
    /// Bytes of RAM.
    pub memory: u64,
    /// The console.
    pub console: ConsoleConfig,
    /// Have a virtio console too, which then takes the input.
    pub virtio_console: bool,
    /// Have sockets between host and guest.
    pub vsock: Option<VsockConfig>,
    /// Where gdb can attach.
    pub gdb: Option<gdb::Address>,
    /// Have the debug-exit port.
    pub debug_exit: bool,
    /// End instead of beginning anew when the guest resets.
    pub no_reboot: bool,
    /// The socket at which commands reach the VM.
    pub control: Option<PathBuf>,
    /// Begin paused, until a command at that socket lets the VM run.
    pub paused: bool,
    /// Go on from this snapshot instead of a boot: [`crate::snapshot::Snapshot::into_config`].
    pub restore: Option<Arc<Restore>>,
}

/// How a VM went.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Why it ended.
    pub ending: Ending,
    /// What all vCPUs have done in all lives.
    pub counters: Counters,
    /// Resets.
    pub reboots: u64,
    /// Bytes of guest RAM that the host has really given, at the end.
    pub touched: u64,
}

/// Why a VM cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a possible number of vCPUs.
    #[error("a VM has 1 to {MAX_CPUS} CPUs, not {0}; change --cpus")]
    Cpus(u32),
    /// Not a possible size of memory.
    #[error("a VM cannot have {0} bytes of memory; give a multiple of 4 KiB as --memory, for example 512M")]
    MemorySize(u64),
    /// The host cannot give the memory.
    #[error(transparent)]
    Memory(#[from] posada_memory::Error),
    /// Kernel or initramfs.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The console.
    #[error(transparent)]
    Console(#[from] console::Error),
    /// A device.
    #[error(transparent)]
    Machine(#[from] machine::Error),
    /// The processors.
    #[error(transparent)]
    Engine(#[from] posada_engine::Error),
    /// gdb's address.
    #[error(transparent)]
    Gdb(#[from] gdb::Error),
    /// The control socket.
    #[error(transparent)]
    Control(#[from] remote::Error),
    /// The vsock's socket.
    #[error("cannot have a vsock at {}: {}; give another --vsock", path.display(), remote::bind_reason(source))]
    Vsock {
        /// Where.
        path: PathBuf,
        /// The host's reason.
        source: io::Error,
    },
    /// The snapshot.
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    /// The host gives no thread.
    #[error("the host gives no thread for a vCPU: {0}; stop other programs or use fewer --cpus")]
    Thread(io::Error),
}

/// Runs a VM to its end, which `control` can bring about at any time.
///
/// # Errors
/// [`Error`], each a sentence for the user. Nothing of the VM is left then.
pub fn run(config: &Config, make_engine: MakeEngine<'_>, control: &Arc<Control>) -> Result<Report, Error> {
    if !(1..=MAX_CPUS).contains(&config.model.cpus) {
        return Err(Error::Cpus(config.model.cpus));
    }
    if config.memory == 0 || !config.memory.is_multiple_of(posada_memory::PAGE_SIZE) {
        return Err(Error::MemorySize(config.memory));
    }
    let source = Source::open(&config.kernel, config.initramfs.as_deref(), &config.cmdline)?;
    let disks = config
        .disks
        .iter()
        .map(|disk| open_disk(&disk.path, disk.read_only))
        .collect::<Result<Vec<BlkDisk>, DiskError>>()?;
    let subject = Arc::new(Subject {
        config: config.clone(),
        source,
        disks,
    });
    // Everything that can be wrong with the kernel or the snapshot comes out before the console or a socket is touched.
    let mut first = Some(match &config.restore {
        Some(restore) => {
            restore.check_disks(&subject.disks)?;
            let ram = Arc::new(GuestRam::new(config.memory)?);
            restore.load(&ram)?;
            (ram, Start::Snapshot(restore))
        }
        None => boot(&subject)?,
    });
    let gdb = config.gdb.as_ref().map(gdb::Listener::bind).transpose()?;
    let remote = config.control.as_deref().map(remote::Listener::bind).transpose()?;
    let vsock = config.vsock.as_ref().map(Vsock::bind).transpose()?;
    let console = Console::open(&config.console, control)?;
    let _gdb = gdb.map(|listener| listener.serve(control.clone())).transpose()?;
    let _remote = remote
        .map(|listener| Server::start(listener, control.clone(), subject.clone()))
        .transpose()?;

    if config.paused {
        control.freeze();
    }
    let mut report = Report {
        ending: Ending::Reset,
        counters: Counters::default(),
        reboots: 0,
        touched: 0,
    };
    loop {
        let (ram, start) = match first.take() {
            Some(first) => first,
            None => boot(&subject)?,
        };
        let life = Life::new(&subject, &console, vsock.as_ref(), ram, start, make_engine, control)?;
        report.ending = live(&life, control)?;
        console.connect(None);
        report.counters += life.counters();
        report.touched = resident::of(&life.ram);
        if report.ending != Ending::Reset || config.no_reboot {
            return Ok(report);
        }
        report.reboots += 1;
        tracing::info!(reboots = report.reboots, "the guest reset itself");
    }
}

/// A vsock's socket, which stays through all lives.
struct Vsock<'a> {
    config: &'a VsockConfig,
    socket: SocketFile,
}

impl<'a> Vsock<'a> {
    fn bind(config: &'a VsockConfig) -> Result<Self, Error> {
        let socket = SocketFile::bind(&config.path).map_err(|source| Error::Vsock {
            path: config.path.clone(),
            source,
        })?;
        Ok(Self { config, socket })
    }

    fn part(&self) -> Result<VsockPart<'a>, machine::Error> {
        let what = "vsock";
        let listener = self.socket.listener();
        Ok(VsockPart {
            cid: self.config.cid,
            listener: listener.map_err(|source| machine::Error::Host { what, source })?,
            path: &self.config.path,
        })
    }
}

/// RAM as a boot finds it.
fn boot(subject: &Subject) -> Result<(Arc<GuestRam>, Start<'static>), Error> {
    let ram = Arc::new(GuestRam::new(subject.config.memory)?);
    let entry = subject.source.load(&ram)?;
    machine::put_firmware(&ram, subject.config.model.cpus)?;
    Ok((ram, Start::Boot(Box::new(entry))))
}

/// How a life begins, beside its RAM.
enum Start<'a> {
    /// vCPU 0 enters the kernel.
    Boot(Box<CpuState>),
    /// All goes on.
    Snapshot(&'a Restore),
}

impl Life {
    fn new(
        subject: &Subject,
        console: &Console,
        vsock: Option<&Vsock<'_>>,
        ram: Arc<GuestRam>,
        start: Start<'_>,
        make_engine: MakeEngine<'_>,
        control: &Arc<Control>,
    ) -> Result<Arc<Self>, Error> {
        let config = &subject.config;
        let engine = make_engine(ram.clone(), &config.model)?;
        let virtio_console = config.virtio_console.then(|| console.writer()).transpose();
        let parts = Parts {
            cpus: config.model.cpus,
            disks: &subject.disks,
            com1: console.writer().map_err(console::Error::Stdio)?,
            virtio_console: virtio_console.map_err(console::Error::Stdio)?.map(|(writer, _)| writer),
            vsock: vsock.map(Vsock::part).transpose()?,
            debug_exit: config.debug_exit,
        };
        let machine = Arc::new(Machine::new(parts, &ram, &engine, control)?);
        let mut cpus = Vec::new();
        for index in 0..config.model.cpus {
            cpus.push(engine.create_vcpu(index, machine.clone())?);
        }
        match start {
            Start::Boot(entry) => cpus[0].set_state(&entry)?,
            Start::Snapshot(restore) => restore_state(restore, &*engine, &mut cpus, &machine)?,
        }
        console.connect(Some(match &machine.console {
            Some(console) => Sink::Virtio(console.clone()),
            None => Sink::Com1(machine.com1.clone()),
        }));
        Ok(Arc::new(Self {
            ram,
            engine,
            machine,
            kicks: cpus.iter().map(|cpu| cpu.kicker()).collect(),
            cpus: cpus.into_iter().map(Mutex::new).collect(),
        }))
    }

    fn counters(&self) -> Counters {
        let mut sum = Counters::default();
        for cpu in &self.cpus {
            sum += match cpu.lock() {
                Ok(cpu) => cpu.counters(),
                Err(poisoned) => poisoned.into_inner().counters(),
            };
        }
        sum
    }
}

/// Has clock, processors and devices go on from where they were, at the time that it is now.
fn restore_state(
    restore: &Restore,
    engine: &dyn Engine,
    cpus: &mut [Box<dyn Vcpu>],
    machine: &Machine,
) -> Result<(), Error> {
    let state = restore.state();
    let now = engine.clock()?;
    let (moment, more) = state.clock.resume(now.real_ns, now.host_tsc);
    engine.set_clock(moment)?;
    for (index, (cpu, state)) in cpus.iter_mut().zip(&state.cpus).enumerate() {
        let mut state = state.clone();
        state.tsc_offset = state.tsc_offset.map(|offset| offset.wrapping_add(more));
        let set = cpu.set_state(&state);
        set.map_err(|error| restore.unfit(format!("vCPU {index}: {error}")))?;
    }
    // The devices' interrupts go to APICs that are as they were.
    machine
        .restore(&state.machine)
        .map_err(|error| restore.unfit(error.to_string()))?;
    machine.resume();
    Ok(())
}

/// Runs a life to its end.
fn live(life: &Arc<Life>, control: &Control) -> Result<Ending, Error> {
    control.begin(life.clone());
    let result = thread::scope(|scope| {
        for index in 0..life.cpus.len() {
            let spawned = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .spawn_scoped(scope, move || {
                    let _end = EndOnPanic(control);
                    run_cpu(life, index, control);
                });
            if let Err(error) = spawned {
                control.end(Ending::Failed);
                return Err(Error::Thread(error));
            }
        }
        Ok(control.wait())
    });
    control.finish();
    result
}

/// A vCPU that panics must not leave the others, and the user, waiting.
struct EndOnPanic<'a>(&'a Control);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Ending::Failed);
        }
    }
}

/// A vCPU's thread.
fn run_cpu(life: &Life, index: usize, control: &Control) {
    let mut set = posada_engine::DebugControl::default();
    while let Some(debug) = control.enter(index) {
        let exit = {
            let mut cpu = life.cpus[index]
                .lock()
                .expect("who locks a vCPU of a paused VM does not panic");
            if debug != set {
                cpu.set_debug(&debug);
                set = debug;
            }
            cpu.run()
        };
        control.leave(index, exit == Exit::Debug);
        let cpu = index as u32;
        match exit {
            Exit::TripleFault(report) => control.end(Ending::Crash { cpu, report }),
            Exit::Failed(reason) => control.end(Ending::EngineFailed { cpu, reason }),
            Exit::Kicked | Exit::Debug => {}
        }
    }
}

#[cfg(test)]
mod tests;
