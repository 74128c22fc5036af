//! Small guests in real mode, which every KVM can run, and a machine that writes down what they do.
#![allow(dead_code, reason = "not every test needs all of it")]

use posada_engine::cpu::CpuModel;
use posada_engine::{CpuState, Engine, Exit, Kick, Machine, Vcpu};
use posada_kvm::Kvm;
use posada_memory::GuestRam;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// Where the guests' code is.
pub const CODE: u64 = 0x1000;
/// Bytes of RAM: what is above answers as a device.
pub const RAM: u64 = 0x10000;
/// Index of RSP, CS and so on in the state.
pub const RSP: usize = 4;
pub const CS: usize = 1;

/// What a guest did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    In(u16, usize),
    Out(u16, Vec<u8>),
    Read(u64, usize),
    Write(u64, Vec<u8>),
    End(u8),
}

/// A machine that writes events down. Reads give 1, 2, 3 and so on, a byte each.
#[derive(Default)]
pub struct Recorder {
    events: Mutex<Vec<Event>>,
    next: Mutex<u8>,
    /// Kicked in the middle of every access.
    pub kick: OnceLock<Arc<dyn Kick>>,
}

impl Recorder {
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    fn add(&self, event: Event) {
        self.events.lock().unwrap().push(event);
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    fn fill(&self, data: &mut [u8]) {
        let mut next = self.next.lock().unwrap();
        for byte in data {
            *next = next.wrapping_add(1);
            *byte = *next;
        }
    }
}

impl Machine for Recorder {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        self.fill(data);
        self.add(Event::In(port, data.len()));
    }
    fn port_write(&self, port: u16, data: &[u8]) {
        self.add(Event::Out(port, data.into()));
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.fill(data);
        self.add(Event::Read(gpa, data.len()));
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.add(Event::Write(gpa, data.into()));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.add(Event::End(vector));
    }
}

/// A VM.
pub struct Guest {
    pub kvm: Kvm,
    pub ram: Arc<GuestRam>,
    pub machine: Arc<Recorder>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
}

/// The model of a VM with all that KVM offers; `None`, with the reason printed, where it cannot be used.
pub fn model(cpus: u32) -> Option<CpuModel> {
    match Kvm::offer() {
        Ok(offer) => Some(CpuModel::new(&offer, cpus, None).unwrap()),
        Err(error) => {
            assert!(std::env::var_os("POSADA_WHOLE_KVM").is_none(), "{error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

/// Whether the host's KVM is Linux's own on a processor with virtualization, and no lookalike that leaves out what few guests
/// need; prints so where it is not. Where the environment has `POSADA_WHOLE_KVM` it must be.
pub fn whole() -> bool {
    let Some(mut guest) = Guest::new(1, &[]) else {
        return false;
    };
    let mut state = entry();
    // A memory type that does not exist.
    state.msrs.insert(posada_engine::msr::PAT, 2);
    let whole = guest.vcpus[0].set_state(&state).is_err();
    if !whole {
        assert!(std::env::var_os("POSADA_WHOLE_KVM").is_none(), "this KVM is not whole");
        eprintln!("skipped: this host's KVM does not do all that Linux's own does");
    }
    whole
}

impl Guest {
    /// `code` at [`CODE`]; `None` where there is no KVM.
    pub fn new(cpus: u32, code: &[u8]) -> Option<Self> {
        Some(Self::with(&model(cpus)?, code))
    }

    pub fn with(model: &CpuModel, code: &[u8]) -> Self {
        let ram = Arc::new(GuestRam::new(RAM).unwrap());
        let machine = Arc::new(Recorder::default());
        let kvm = Kvm::new(ram.clone(), model).unwrap();
        let vcpus = (0..model.cpus).map(|index| kvm.create_vcpu(index, machine.clone()).unwrap());
        let guest = Self {
            vcpus: vcpus.collect(),
            kvm,
            ram,
            machine,
        };
        guest.write(CODE, code);
        guest
    }

    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        let host = self.ram.host(gpa, bytes.len() as u64).unwrap();
        // SAFETY: RAM of the test's own.
        unsafe { host.copy_from(bytes.as_ptr(), bytes.len()) };
    }

    pub fn byte(&self, gpa: u64) -> u8 {
        let host = self.ram.host(gpa, 1).unwrap();
        // SAFETY: a byte of guest RAM, which the guest may write at any time.
        unsafe { host.read_volatile() }
    }

    /// Runs vCPU 0 until its guest has halted, which it sees by kicking it now and then.
    pub fn run_until_halted(&mut self) -> CpuState {
        let kick = self.vcpus[0].kicker();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(5));
                    kick.kick();
                }
            });
            let state = loop {
                assert_eq!(self.vcpus[0].run(), Exit::Kicked);
                let state = self.vcpus[0].state().unwrap();
                if state.activity == posada_engine::Activity::Halted {
                    break state;
                }
            };
            done.store(true, Ordering::Relaxed);
            state
        })
    }
}

/// Real mode at 0:1000, with a stack below 64 KiB.
pub fn entry() -> CpuState {
    let mut state = CpuState::reset();
    (state.segments[CS].selector, state.segments[CS].base) = (0, 0);
    state.rip = CODE;
    state.gprs[RSP] = 0x8000;
    state
}
