//! The software CPU as an engine.

use crate::core::Core;
use crate::interpret::Stop;
use crate::shared::Vm;
use crate::translate::check::{Checker, Turns};
use crate::translate::{PerfMap, Translator};
use posada_engine::clock::Moment;
use posada_engine::cpu::{CpuModel, Offer};
use posada_engine::{Counters, CpuState, DebugControl, Doorbell, Engine, Error, Exit, Kick, Machine, MsiSink, Vcpu};
use posada_memory::GuestRam;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The most vCPUs of a VM: xAPIC ids are one byte, and FFh means "all".
const MAX_VCPUS: u32 = 255;

/// Frequencies that a time stamp counter may have, in kHz.
const TSC_KHZ: std::ops::RangeInclusive<u64> = 100_000..=100_000_000;

/// The processors of one VM, in software.
pub struct Emulator {
    ram: Arc<GuestRam>,
    vm: Arc<Vm>,
    translation: Option<Translating>,
    turns: Arc<Turns>,
}

/// How a VM's code is translated.
#[derive(Clone, Debug)]
pub struct Translating {
    /// Bytes of host code that its processors keep, together.
    pub cache: u64,
    /// Where what they make is named.
    pub perf_map: Option<Arc<PerfMap>>,
    /// Lookups in soft TLBs are counted.
    pub count_lookups: bool,
    /// Blocks are compared with the interpreter, and the VM ends at the first difference.
    pub check: bool,
}

impl Emulator {
    /// What a VM on this engine can be shown on this host.
    pub fn offer() -> Offer {
        crate::cpuid::offer()
    }

    /// A VM with the processors (1 to 255) of `model` over `ram`. Its clock starts now.
    ///
    /// # Errors
    /// [`Error::Host`] for another number of processors, or when the host is out of threads or descriptors;
    /// [`Error::State`] for a model that this engine cannot be.
    pub fn new(ram: Arc<GuestRam>, model: &CpuModel) -> Result<Self, Error> {
        let vcpus = model.cpus;
        if !(1..=MAX_VCPUS).contains(&vcpus) {
            let text = format!("it has 1 to {MAX_VCPUS} virtual processors, not {vcpus}");
            return Err(Error::Host(text));
        }
        model
            .fits(&Self::offer())
            .map_err(|what| Error::State(format!("the VM needs {what}")))?;
        if !TSC_KHZ.contains(&model.tsc_khz) {
            let text = format!("no time stamp counter has {} kHz", model.tsc_khz);
            return Err(Error::State(text));
        }
        crate::native::prepare()
            .map_err(|error| Error::Host(format!("no memory for code that runs vector instructions: {error}")))?;
        let vm = Vm::new(model.clone());
        vm.start_alarms()
            .map_err(|error| Error::Host(format!("no timers for the virtual processors: {error}")))?;
        Ok(Self {
            ram,
            vm,
            translation: None,
            turns: Arc::default(),
        })
    }

    /// Lets its processors translate hot 64-bit code instead of interpreting it.
    pub fn translating(mut self, how: Translating) -> Self {
        self.vm.watch_code(&self.ram);
        self.translation = Some(how);
        self
    }
}

impl Engine for Emulator {
    fn create_vcpu(&self, index: u32, machine: Arc<dyn Machine>) -> Result<Box<dyn Vcpu>, Error> {
        let count = self.vm.vcpus().len();
        if index as usize >= count {
            return Err(Error::Host(format!("there is no virtual processor {index} of {count}")));
        }
        let shared = Arc::new(self.vm.shared(index));
        let mut core = Core::new(Arc::clone(&self.ram), machine, shared);
        core.msr.tsc_offset = self.vm.tsc_offset();
        if index != 0 {
            core.wait_for_startup();
        }
        if let Some(how) = &self.translation {
            let size = usize::try_from(how.cache / count as u64).unwrap_or(usize::MAX >> 1);
            let translator = Translator::new(size)
                .map_err(|error| Error::Host(format!("no memory for translated code: {error}")))?;
            let mut translator = translator.named_in(how.perf_map.clone());
            if how.count_lookups {
                translator = translator.counting();
            }
            core.translator = Some(Box::new(if how.check { translator.checked() } else { translator }));
            if how.check {
                core.checker = Some(Box::new(Checker::new(&core)));
                core.turns = Some(Arc::clone(&self.turns));
            }
        }
        Ok(Box::new(Processor { core }))
    }

    fn msi_sink(&self) -> Arc<dyn MsiSink> {
        Arc::clone(&self.vm) as Arc<dyn MsiSink>
    }

    fn attach_doorbell(&self, _: Doorbell, _: BorrowedFd<'_>) -> Result<bool, Error> {
        // The machine is a function call away.
        Ok(false)
    }

    fn detach_doorbell(&self, _: Doorbell, _: BorrowedFd<'_>) {}

    fn clock(&self) -> Result<Moment, Error> {
        Ok(self.vm.moment())
    }

    fn set_clock(&self, moment: Moment) -> Result<(), Error> {
        self.vm.set_clock(moment.vm_ns, moment.host_tsc);
        Ok(())
    }

    fn breakpoints(&self) -> usize {
        usize::MAX
    }
}

struct Processor {
    core: Box<Core>,
}

impl Processor {
    fn run_inside(&mut self) -> Exit {
        loop {
            self.core.leave_turn();
            if let Some(exit) = self.core.service() {
                return exit;
            }
            self.core.leave_turn();
            if let Some(report) = &self.core.failure {
                return Exit::Failed(report.clone());
            }
            if self.core.shut_down {
                return Exit::TripleFault(self.core.dump());
            }
            match self.core.execute() {
                Stop::Pending => {}
                Stop::Debug => return Exit::Debug,
            }
        }
    }
}

impl Vcpu for Processor {
    fn run(&mut self) -> Exit {
        sleep_exactly();
        self.core.shared.mailbox().enter();
        self.core.catch_up();
        let exit = self.run_inside();
        self.core.shared.mailbox().leave();
        exit
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        Arc::clone(self.core.shared.mailbox()) as Arc<dyn Kick>
    }

    fn state(&mut self) -> Result<CpuState, Error> {
        Ok(self.core.state())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), Error> {
        self.core.check(state).map_err(Error::State)?;
        self.core.set_state(state);
        Ok(())
    }

    fn set_debug(&mut self, debug: &DebugControl) {
        self.core.set_debug(debug);
    }

    fn translate(&self, gva: u64) -> Option<u64> {
        self.core.translate(gva)
    }

    fn counters(&self) -> Counters {
        let mut counters = Counters {
            instructions: self.core.instructions,
            exits: self.core.exits,
            translation: Default::default(),
        };
        let Some(translator) = &self.core.translator else {
            return counters;
        };
        let translation = &mut counters.translation;
        *translation = translator.counts();
        let generation = self.core.mmu.generation();
        translation.tlb_flushes = generation.all + generation.context;
        let mut frame = &self.core.frame;
        if let Some(checker) = &self.core.checker {
            (translation.judged, translation.not_judged) = checker.counts();
            frame = checker.frame();
        }
        (translation.tlb_fills, translation.tlb_lookups) = (frame.fills, frame.lookups);
        counters
    }
}

/// Takes away the 50 µs by which Linux lets the calling thread oversleep.
fn sleep_exactly() {
    // SAFETY: plain integers; concerns this thread only.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1) };
}

impl Core {
    /// The registers and the code at RIP, for people: the report of a triple fault.
    pub fn dump(&mut self) -> String {
        let raised = &self.raised;
        let error = raised
            .error
            .map_or(String::new(), |error| format!(", error code {error:#x}"));
        let note = format!(
            "last exception: vector {}{error}, address {:#x}",
            raised.vector, raised.address
        );
        let (index, state) = (self.shared.index(), self.state());
        let mut text = state.report(index, &note, |linear| self.peek(linear));
        let (count, seconds) = (self.instructions, self.shared.vm().moment().vm_ns / 1_000_000_000);
        text += &format!("{count} instructions, {seconds} s since the start\n");
        text
    }

    /// A byte of RAM at a linear address, without side effects.
    pub(crate) fn peek(&self, linear: u64) -> Option<u8> {
        let host = self.ram.host(self.translate(linear)?, 1)?;
        // SAFETY: one byte of guest RAM; guests may change it at any time, hence volatile.
        Some(unsafe { host.read_volatile() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use crate::core::{gpr, seg};
    use crate::lapic::testing::Ends;
    use posada_engine::Msi;

    const INIT: u32 = 0x4500;

    fn model(vcpus: u32) -> CpuModel {
        CpuModel::new(&Emulator::offer(), vcpus, None).unwrap()
    }

    fn emulator(vcpus: u32, code: &[u8]) -> (Emulator, Vec<Box<dyn Vcpu>>) {
        let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
        let host = ram.host(0x1000, code.len() as u64).unwrap();
        // SAFETY: RAM of the test's own.
        unsafe { host.copy_from(code.as_ptr(), code.len()) };
        let emulator = Emulator::new(ram, &model(vcpus)).unwrap();
        let machine = Arc::new(Ends::default());
        let vcpus = (0..vcpus)
            .map(|index| emulator.create_vcpu(index, machine.clone()).unwrap())
            .collect();
        (emulator, vcpus)
    }

    /// Real mode at 0:1000.
    fn entry() -> CpuState {
        let mut state = CpuState::reset();
        (state.segments[seg::CS].selector, state.segments[seg::CS].base) = (0, 0);
        state.rip = 0x1000;
        state.gprs[gpr::RSP] = 0x8000;
        state
    }

    /// Waits until the guest has written to 500h.
    fn wait_for_guest(emulator: &Emulator) {
        let host = emulator.ram.host(0x500, 1).unwrap();
        // SAFETY: a byte of guest RAM.
        while unsafe { host.read_volatile() } == 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_kick_stops_an_endless_loop_and_one_before_the_run_too() {
        // loop: mov byte [500h], 1; jmp loop
        let (emulator, mut vcpus) = emulator(1, &[0xc6, 0x06, 0x00, 0x05, 0x01, 0xeb, 0xf9]);
        vcpus[0].set_state(&entry()).unwrap();
        let kick = vcpus[0].kicker();
        kick.kick();
        assert_eq!((vcpus[0].run(), vcpus[0].counters().instructions), (Exit::Kicked, 0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_for_guest(&emulator);
                kick.kick();
            });
            assert_eq!(vcpus[0].run(), Exit::Kicked);
        });
        assert!([0x1000, 0x1005].contains(&vcpus[0].state().unwrap().rip));
        assert!(vcpus[0].counters().instructions > 0);
    }

    #[test]
    fn a_fault_that_nobody_handles_ends_in_a_report() {
        // ud2, with an empty vector table.
        let (_emulator, mut vcpus) = emulator(1, &[0x0f, 0x0b]);
        let mut state = entry();
        state.idtr.limit = 0;
        vcpus[0].set_state(&state).unwrap();
        let Exit::TripleFault(report) = vcpus[0].run() else {
            panic!("no triple fault")
        };
        for part in [
            "vCPU 0 in real mode",
            "rip 0000:0000000000001000",
            "rsp 0000000000008000",
            "code at rip: 0f 0b",
        ] {
            assert!(report.contains(part), "{part} is not in\n{report}");
        }
        assert!(matches!(vcpus[0].run(), Exit::TripleFault(_)), "it stays shut down");
        vcpus[0].set_state(&state).unwrap();
        assert!(matches!(vcpus[0].run(), Exit::TripleFault(_)));
    }

    #[test]
    fn another_processor_waits_for_its_start_and_then_runs() {
        // mov byte [500h], 1; hlt
        let (emulator, mut vcpus) = emulator(2, &[0xc6, 0x06, 0x00, 0x05, 0x01, 0xf4]);
        let mut second = vcpus.pop().unwrap();
        let kick = second.kicker();
        kick.kick();
        assert_eq!((second.run(), second.counters().instructions), (Exit::Kicked, 0));
        emulator.msi_sink().signal_msi(Msi {
            address: 0xfee0_1000,
            data: INIT,
        });
        emulator.vm.vcpus()[1].post_startup(1);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_for_guest(&emulator);
                while !emulator.vm.vcpus()[1].at_rest() {
                    std::thread::yield_now();
                }
                kick.kick();
            });
            assert_eq!(second.run(), Exit::Kicked);
        });
        assert_eq!((second.state().unwrap().rip, second.counters().instructions), (6, 2));
    }

    #[test]
    fn a_debugger_steps_one_instruction() {
        let (_emulator, mut vcpus) = emulator(1, &[0x40, 0x40, 0xf4]);
        vcpus[0].set_state(&entry()).unwrap();
        vcpus[0].set_debug(&DebugControl {
            single_step: true,
            breakpoints: Vec::new(),
        });
        assert_eq!((vcpus[0].run(), vcpus[0].state().unwrap().rip), (Exit::Debug, 0x1001));
        vcpus[0].set_debug(&DebugControl {
            single_step: false,
            breakpoints: vec![0x1002],
        });
        assert_eq!((vcpus[0].run(), vcpus[0].state().unwrap().rip), (Exit::Debug, 0x1002));
    }

    #[test]
    fn counters_of_all_vcpus_started_at_zero_together() {
        let vm = Vm::with_cpus(2);
        let moment = vm.moment();
        assert!(moment.vm_ns < 10_000_000_000);
        assert!(clock::ticks_to_ns(moment.host_tsc.wrapping_add(vm.tsc_offset())) < 10_000_000_000);
        let boot = vm.shared(1).boot_time_ns();
        assert!(moment.real_ns.abs_diff(boot) < 10_000_000_000);
    }

    #[test]
    fn impossible_numbers_and_states_are_refused() {
        let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
        assert!(Emulator::new(ram.clone(), &model(0)).is_err() && Emulator::new(ram.clone(), &model(256)).is_err());
        let mut other = model(1);
        other.physical_bits = 53;
        assert!(matches!(Emulator::new(ram.clone(), &other), Err(Error::State(text)) if text.contains("53 bits")));
        for khz in [0, 99_999, u64::MAX] {
            let mut other = model(1);
            other.tsc_khz = khz;
            assert!(matches!(Emulator::new(ram.clone(), &other), Err(Error::State(text)) if text.contains("kHz")));
        }
        let (emulator, mut vcpus) = emulator(1, &[]);
        assert!(emulator.create_vcpu(1, Arc::new(Ends::default())).is_err());
        let mut state = entry();
        state.cr0 = 1 << 31;
        assert!(matches!(vcpus[0].set_state(&state), Err(Error::State(_))));
        vcpus[0].set_state(&entry()).unwrap();
    }
}
