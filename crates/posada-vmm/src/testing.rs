//! What the tests share: directories that go away, random numbers with a fixed seed, and processors that do what a test
//! says.

use crate::boot::testing::{Segment, elf64};
use crate::console::ConsoleConfig;
use crate::control::Control;
use crate::vm::{self, Config, Report};
use posada_engine::clock::Moment;
use posada_engine::cpu::{CpuModel, Features, Offer};
use posada_engine::{
    Counters, CpuState, DebugControl, Doorbell, Engine, Error, Exit, Kick, Machine, Msi, MsiLine, MsiSink, PlainLine,
    Vcpu,
};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// A new directory, removed with the value.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "posada-test-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    /// A directory that is there already; what is in it goes with the value.
    pub fn at(path: &Path) -> Self {
        Self(path.into())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// A file with this content.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// The names of what is in it.
    pub fn names(&self) -> Vec<String> {
        let list = |path: &Path| std::fs::read_dir(path).unwrap();
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<String> = list(&self.0).map(name).collect();
        names.sort();
        names
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A VM in `dir` with a kernel that only fake vCPUs can run. They begin at [`ENTRY`].
pub fn config(dir: &TempDir) -> Config {
    let kernel = elf64(&[Segment(0x10_0000, b"kernel", 0x1000)], Some(ENTRY as u32));
    Config {
        kernel: dir.file("kernel", &kernel),
        initramfs: None,
        cmdline: String::new(),
        disks: Vec::new(),
        model: model(1),
        memory: 4 << 20,
        console: ConsoleConfig::None,
        virtio_console: false,
        vsock: None,
        gdb: None,
        debug_exit: true,
        no_reboot: false,
        control: None,
        paused: false,
        restore: None,
    }
}

/// Where vCPU 0 begins.
pub const ENTRY: u64 = 0x10_0040;

/// Runs a VM whose vCPUs do what `program` says.
pub fn run(
    config: &Config,
    control: &Arc<Control>,
    program: impl Fn(u32, u64, &dyn Machine) -> Step + Send + Sync + 'static,
) -> Result<Report, vm::Error> {
    let program: Program = Arc::new(program);
    vm::run(config, &|_, _| Ok(Arc::new(FakeEngine::new(program.clone()))), control)
}

/// xorshift64*.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % end
    }
}

/// What a fake vCPU does for its next instruction.
pub enum Step {
    /// RIP goes one on.
    Next,
    /// RIP goes here.
    Jump(u64),
    /// Sleeps until it is kicked.
    Halt,
    /// Leaves.
    Exit(Exit),
}

/// A vCPU's program: its index, its RIP, the machine.
pub type Program = Arc<dyn Fn(u32, u64, &dyn Machine) -> Step + Send + Sync>;

/// What `cpus` vCPUs of a fake engine are.
pub fn model(cpus: u32) -> CpuModel {
    let offer = Offer {
        features: Features::default(),
        arch_capabilities: 0,
        physical_bits: 46,
        tsc_khz: 1_000_000,
    };
    CpuModel::new(&offer, cpus, None).unwrap()
}

/// An engine whose vCPUs run a program of the test.
pub struct FakeEngine(Program, Mutex<Moment>);

impl FakeEngine {
    /// All vCPUs run `program`.
    pub fn new(program: Program) -> Self {
        let start = Moment {
            vm_ns: 0,
            real_ns: 0,
            host_tsc: 0,
        };
        Self(program, Mutex::new(start))
    }
}

struct NoInterrupts;

impl MsiSink for NoInterrupts {
    fn signal_msi(&self, _msi: Msi) {}

    fn connect(self: Arc<Self>) -> Box<dyn MsiLine> {
        Box::new(PlainLine::new(self))
    }

    fn route_pin(&self, _pin: u8, _msi: Option<Msi>) {}
}

impl Engine for FakeEngine {
    fn create_vcpu(&self, index: u32, machine: Arc<dyn Machine>) -> Result<Box<dyn Vcpu>, Error> {
        Ok(Box::new(FakeVcpu {
            index,
            machine,
            program: self.0.clone(),
            state: CpuState::reset(),
            debug: DebugControl::default(),
            instructions: 0,
            kicked: Arc::default(),
        }))
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::new(NoInterrupts)
    }

    fn attach_doorbell(&self, _: Doorbell, _: BorrowedFd<'_>) -> Result<bool, Error> {
        Ok(false)
    }

    fn detach_doorbell(&self, _: Doorbell, _: BorrowedFd<'_>) {}

    /// A clock that stands.
    fn clock(&self) -> Result<Moment, Error> {
        Ok(*self.1.lock().unwrap())
    }

    fn set_clock(&self, moment: Moment) -> Result<(), Error> {
        *self.1.lock().unwrap() = moment;
        Ok(())
    }

    fn breakpoints(&self) -> usize {
        4
    }
}

#[derive(Default)]
struct Kicked(Mutex<bool>, Condvar);

impl Kick for Kicked {
    fn kick(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

struct FakeVcpu {
    index: u32,
    machine: Arc<dyn Machine>,
    program: Program,
    state: CpuState,
    debug: DebugControl,
    instructions: u64,
    kicked: Arc<Kicked>,
}

impl Vcpu for FakeVcpu {
    fn run(&mut self) -> Exit {
        let start = self.state.rip;
        let mut first = true;
        loop {
            if std::mem::take(&mut *self.kicked.0.lock().unwrap()) {
                return Exit::Kicked;
            }
            let rip = self.state.rip;
            if self.debug.breakpoints.contains(&rip) && !(first && rip == start) {
                return Exit::Debug;
            }
            first = false;
            match (self.program)(self.index, rip, &*self.machine) {
                Step::Next => self.state.rip += 1,
                Step::Jump(to) => self.state.rip = to,
                Step::Halt => {
                    let mut kicked = self.kicked.0.lock().unwrap();
                    while !*kicked {
                        kicked = self.kicked.1.wait(kicked).unwrap();
                    }
                    continue;
                }
                Step::Exit(exit) => return exit,
            }
            self.instructions += 1;
            if self.debug.single_step {
                return Exit::Debug;
            }
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicked.clone()
    }

    fn state(&mut self) -> Result<CpuState, Error> {
        Ok(self.state.clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.state = state.clone();
        Ok(())
    }

    fn set_debug(&mut self, debug: &DebugControl) {
        self.debug = debug.clone();
    }

    /// The upper half of addresses is the lower half again; the page at 0x5000 is not mapped.
    fn translate(&self, gva: u64) -> Option<u64> {
        let physical = gva & 0x7fff_ffff_ffff_ffff;
        (physical >> 12 != 5).then_some(physical)
    }

    fn counters(&self) -> Counters {
        Counters {
            instructions: self.instructions,
            ..Counters::default()
        }
    }
}
