//! Running: what the machine is asked, kicks, debugging, and the end.

mod guest;

use guest::{CODE, CS, Event, Guest, RSP, entry, whole};
use posada_engine::{DebugControl, Doorbell, Engine, Exit, Msi};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A reproducible sequence (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % bound
    }
}

#[test]
fn ports_are_read_and_written_in_all_sizes() {
    // in al, 10h; in ax, dx; in eax, dx; out 10h, al; out dx, ax; out dx, eax; hlt
    let code = [0xe4, 0x10, 0xed, 0x66, 0xed, 0xe6, 0x10, 0xef, 0x66, 0xef, 0xf4];
    let Some(mut guest) = Guest::new(1, &code) else { return };
    let mut state = entry();
    state.gprs[2] = 0x1234;
    guest.vcpus[0].set_state(&state).unwrap();
    let state = guest.run_until_halted();
    assert_eq!(state.gprs[0], 0x0706_0504);
    assert_eq!(
        guest.machine.take(),
        [
            Event::In(0x10, 1),
            Event::In(0x1234, 2),
            Event::In(0x1234, 4),
            Event::Out(0x10, vec![4]),
            Event::Out(0x1234, vec![4, 5]),
            Event::Out(0x1234, vec![4, 5, 6, 7]),
        ]
    );
    assert!(guest.vcpus[0].counters().exits >= 6);
}

#[test]
fn string_instructions_reach_the_machine_item_by_item() {
    // cld; rep outsw; mov cl, 5; rep insb; hlt
    let code = [0xfc, 0xf3, 0x6f, 0xb1, 0x05, 0xf3, 0x6c, 0xf4];
    let Some(mut guest) = Guest::new(1, &code) else { return };
    guest.write(0x2000, &[1, 2, 3, 4, 5, 6]);
    let mut state = entry();
    (state.gprs[1], state.gprs[2], state.gprs[6], state.gprs[7]) = (3, 0x77, 0x2000, 0x3000);
    guest.vcpus[0].set_state(&state).unwrap();
    let state = guest.run_until_halted();
    assert_eq!((state.gprs[1], state.gprs[6], state.gprs[7]), (0, 0x2006, 0x3005));
    let mut expected: Vec<Event> = [[1, 2], [3, 4], [5, 6]]
        .map(|item| Event::Out(0x77, item.into()))
        .into();
    expected.extend([(); 5].map(|()| Event::In(0x77, 1)));
    assert_eq!(guest.machine.take(), expected);
    let read: Vec<u8> = (0..5).map(|at| guest.byte(0x3000 + at)).collect();
    assert_eq!(read, [1, 2, 3, 4, 5]);
}

#[test]
fn addresses_that_are_not_ram_reach_the_machine() {
    // mov ax, 2000h; mov ds, ax; mov eax, [10h]; mov [20h], ax; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0x66, 0xa1, 0x10, 0x00, 0xa3, 0x20, 0x00, 0xf4,
    ];
    let Some(mut guest) = Guest::new(1, &code) else { return };
    guest.vcpus[0].set_state(&entry()).unwrap();
    let state = guest.run_until_halted();
    assert_eq!(state.gprs[0], 0x0403_0201);
    let events = [Event::Read(0x20010, 4), Event::Write(0x20020, vec![1, 2])];
    assert_eq!(guest.machine.take(), events);
}

fn fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the event owns the descriptor for as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[test]
fn a_doorbell_signals_its_event_and_leaves_the_machine_alone() {
    // mov ax, 2000h; mov ds, ax; mov word [10h], 7; mov word [10h], 8; hlt
    let code = [
        0xb8, 0x00, 0x20, 0x8e, 0xd8, 0xc7, 0x06, 0x10, 0x00, 7, 0, 0xc7, 0x06, 0x10, 0x00, 8, 0, 0xf4,
    ];
    let Some(mut guest) = Guest::new(1, &code) else { return };
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let bell = |value| Doorbell {
        gpa: 0x20010,
        length: 2,
        value,
    };
    assert!(guest.kvm.attach_doorbell(bell(Some(7)), fd(&event)).unwrap());
    assert!(
        guest.kvm.attach_doorbell(bell(Some(7)), fd(&event)).is_err(),
        "it is there already"
    );
    guest.vcpus[0].set_state(&entry()).unwrap();
    guest.run_until_halted();
    assert_eq!(event.read().unwrap(), 1);
    assert_eq!(guest.machine.take(), [Event::Write(0x20010, vec![8, 0])]);

    guest.kvm.detach_doorbell(bell(Some(7)), fd(&event));
    assert!(guest.kvm.attach_doorbell(bell(None), fd(&event)).unwrap());
    guest.vcpus[0].set_state(&entry()).unwrap();
    guest.run_until_halted();
    assert_eq!(event.read().unwrap(), 2);
    assert_eq!(guest.machine.take(), []);
}

#[test]
fn an_access_is_finished_before_a_kick_stops_the_processor() {
    // in eax, dx; mov [ds:10h], ax; jmp back: a kick in each access.
    let code = [0x66, 0xed, 0xa3, 0x10, 0x00, 0xeb, 0xf9];
    let Some(mut guest) = Guest::new(1, &code) else { return };
    guest.machine.kick.set(guest.vcpus[0].kicker()).ok().unwrap();
    let mut state = entry();
    (state.segments[3].selector, state.segments[3].base) = (0x2000, 0x20000);
    guest.vcpus[0].set_state(&state).unwrap();
    for round in 0..20u8 {
        assert_eq!(guest.vcpus[0].run(), Exit::Kicked);
        let state = guest.vcpus[0].state().unwrap();
        let first = round * 4 + 1;
        let value = u32::from_le_bytes([first, first + 1, first + 2, first + 3]);
        assert_eq!((state.rip, state.gprs[0]), (CODE + 2, value.into()));
        assert_eq!(guest.machine.take(), [Event::In(0, 4)]);
        assert_eq!(guest.vcpus[0].run(), Exit::Kicked);
        assert_eq!(guest.vcpus[0].state().unwrap().rip, CODE + 5);
        assert_eq!(guest.machine.take(), [Event::Write(0x20010, vec![first, first + 1])]);
    }
}

/// Ten thousand kicks of a guest with `code`, each after a delay of its own; fewer where a kick takes milliseconds.
fn kick_often(code: &[u8]) {
    let Some(mut guest) = Guest::new(1, code) else { return };
    let kicks: u64 = if whole() { 10_000 } else { 500 };
    guest.vcpus[0].set_state(&entry()).unwrap();
    let mut vcpu = guest.vcpus.remove(0);
    let kick = vcpu.kicker();
    let returns = AtomicU64::new(0);
    let returns = &returns;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for _ in 0..kicks {
                assert_eq!(vcpu.run(), Exit::Kicked);
                returns.fetch_add(1, Ordering::Release);
            }
        });
        let mut random = Random(1);
        let mut slowest = Duration::ZERO;
        for number in 1..=kicks {
            // From "the processor is not even in the guest yet" to "it has long been there".
            let most = 1 << random.below(18);
            let delay = Duration::from_nanos(random.below(most));
            let begin = Instant::now();
            while begin.elapsed() < delay {
                std::hint::spin_loop();
            }
            let begin = Instant::now();
            kick.kick();
            while returns.load(Ordering::Acquire) < number {
                assert!(begin.elapsed() < Duration::from_secs(20), "kick {number} is lost");
                std::thread::yield_now();
            }
            slowest = slowest.max(begin.elapsed());
        }
        eprintln!("slowest of {kicks} kicks: {slowest:?}");
    });
}

#[test]
fn no_kick_of_a_busy_guest_is_lost() {
    // jmp $
    kick_often(&[0xeb, 0xfe]);
}

#[test]
fn no_kick_of_a_halted_guest_is_lost() {
    // cli; hlt
    kick_often(&[0xfa, 0xf4]);
}

#[test]
fn no_kick_of_a_guest_that_uses_ports_is_lost() {
    // out 80h, al; jmp back
    kick_often(&[0xe6, 0x80, 0xeb, 0xfc]);
}

#[test]
fn a_kick_before_the_run_stops_it() {
    let Some(mut guest) = Guest::new(2, &[0xeb, 0xfe]) else {
        return;
    };
    guest.vcpus[0].set_state(&entry()).unwrap();
    // The second waits for its start.
    for vcpu in &mut guest.vcpus {
        vcpu.kicker().kick();
        vcpu.kicker().kick();
        assert_eq!(vcpu.run(), Exit::Kicked);
    }
    assert_eq!(guest.vcpus[0].state().unwrap().rip, CODE);
}

#[test]
fn a_fault_that_nobody_handles_ends_in_a_report() {
    if !whole() {
        return;
    }
    // ud2, with an empty vector table.
    let mut guest = Guest::new(1, &[0x0f, 0x0b]).unwrap();
    let mut state = entry();
    state.idtr.limit = 0;
    guest.vcpus[0].set_state(&state).unwrap();
    let exit = guest.vcpus[0].run();
    let Exit::TripleFault(report) = &exit else {
        panic!("{exit:?}")
    };
    assert!(report.starts_with("vCPU 0 in real mode"), "{report}");
    let lost = report.contains("registers are lost");
    assert!(lost || report.contains("code at rip: 0f 0b"), "{report}");
    assert_eq!(guest.vcpus[0].run(), exit, "it stays shut down");
}

/// inc ax, six times; hlt
const COUNT_TO_SIX: [u8; 7] = [0x40, 0x40, 0x40, 0x40, 0x40, 0x40, 0xf4];

#[test]
fn a_debugger_steps_one_instruction() {
    let Some(mut guest) = Guest::new(1, &COUNT_TO_SIX) else {
        return;
    };
    guest.vcpus[0].set_state(&entry()).unwrap();
    guest.vcpus[0].set_debug(&DebugControl {
        single_step: true,
        ..DebugControl::default()
    });
    for step in 1..=3 {
        assert_eq!(guest.vcpus[0].run(), Exit::Debug);
        let state = guest.vcpus[0].state().unwrap();
        assert_eq!((state.rip, state.gprs[0]), (CODE + step, step));
        assert_eq!(state.rflags & 0x100, 0, "the step's TF is not the guest's");
        if step == 2 {
            // What a debugger writes back does not end the step.
            guest.vcpus[0].set_state(&state).unwrap();
        }
    }
    guest.vcpus[0].set_debug(&DebugControl::default());
    assert_eq!(guest.run_until_halted().gprs[0], 6);
    assert_eq!(guest.vcpus[0].translate(0x1234), Some(0x1234));
}

// Not in the test host: QEMU's CPU does not arm the debug registers that it loads with a guest's state.
#[test]
fn a_debugger_has_four_break_points() {
    let Some(mut guest) = Guest::new(1, &COUNT_TO_SIX) else {
        return;
    };
    guest.vcpus[0].set_state(&entry()).unwrap();
    assert_eq!(guest.kvm.breakpoints(), 4);
    let breakpoints: Vec<u64> = (2..6).map(|at| CODE + at).collect();
    for (number, at) in breakpoints.iter().enumerate() {
        guest.vcpus[0].set_debug(&DebugControl {
            single_step: false,
            breakpoints: breakpoints[number..].to_vec(),
        });
        assert_eq!(guest.vcpus[0].run(), Exit::Debug);
        assert_eq!(guest.vcpus[0].state().unwrap().rip, *at);
    }
    guest.vcpus[0].set_debug(&DebugControl::default());
    assert_eq!(guest.run_until_halted().gprs[0], 6);
}

/// A guest that waits for interrupts: the handler of vectors 40h and 41h counts at 500h and, in x2APIC mode, ends the
/// interrupt.
fn waiting(cpus: u32) -> Option<Guest> {
    // sti; hlt; jmp back
    let guest = Guest::new(cpus, &[0xfb, 0xf4, 0xeb, 0xfd])?;
    // inc byte [500h]; mov ecx, 80bh; xor eax, eax; xor edx, edx; wrmsr; iret
    let handler = [
        0xfe, 0x06, 0x00, 0x05, 0x66, 0xb9, 0x0b, 0x08, 0, 0, 0x66, 0x31, 0xc0, 0x66, 0x31, 0xd2, 0x0f, 0x30, 0xcf,
    ];
    guest.write(0x2000, &handler);
    guest.write(0x40 * 4, &[0x00, 0x20, 0, 0, 0x00, 0x20, 0, 0]);
    Some(guest)
}

/// [`entry`] with the local APIC on and in x2APIC mode.
fn with_apic(guest: &mut Guest) -> posada_engine::CpuState {
    let mut state = entry();
    state.apic_base = 0xfee0_0d00;
    let mut page = guest.vcpus[0].state().unwrap().apic.unwrap();
    page.set(0xf0, 0x1ff);
    page.set(0x20, 0);
    state.apic = Some(page);
    state
}

/// Runs vCPU 0 until the guest has counted to `count`.
fn run_to(guest: &mut Guest, count: u8) {
    let kick = guest.vcpus[0].kicker();
    let mut vcpu = guest.vcpus.remove(0);
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            assert_eq!(vcpu.run(), Exit::Kicked);
            vcpu
        });
        let begin = Instant::now();
        while guest.byte(0x500) < count && begin.elapsed() < Duration::from_secs(20) {
            std::thread::yield_now();
        }
        // Time for the end of the interrupt.
        std::thread::sleep(Duration::from_millis(20));
        kick.kick();
        guest.vcpus.insert(0, running.join().unwrap());
    });
    assert_eq!(guest.byte(0x500), count, "{:?}", guest.vcpus[0].state());
}

#[test]
fn messages_and_lines_interrupt_the_guest() {
    let Some(mut guest) = waiting(1) else { return };
    let state = with_apic(&mut guest);
    guest.vcpus[0].set_state(&state).unwrap();
    let msi = Msi {
        address: 0xfee0_0000,
        data: 0x40,
    };
    guest.kvm.msi_sink().signal_msi(msi);
    run_to(&mut guest, 1);
    let lines = [(); 3].map(|()| guest.kvm.msi_sink().connect());
    for (number, line) in lines.iter().enumerate() {
        line.signal();
        line.set(msi);
        line.signal();
        run_to(&mut guest, 2 + number as u8);
    }
    drop(lines);
    let line = guest.kvm.msi_sink().connect();
    line.set(Msi {
        address: 0xfee0_1000,
        data: 0x41,
    });
    line.set(msi);
    line.signal();
    run_to(&mut guest, 5);
}

#[test]
fn the_machine_hears_of_the_ends_of_its_level_triggered_interrupts() {
    if !whole() {
        return;
    }
    let mut guest = waiting(1).unwrap();
    let state = with_apic(&mut guest);
    guest.vcpus[0].set_state(&state).unwrap();
    let level = Msi {
        address: 0xfee0_0000,
        data: 0xc040,
    };
    let sink = guest.kvm.msi_sink();
    sink.route_pin(9, Some(level));
    sink.signal_msi(level);
    // Masked while in service: its end still counts.
    sink.route_pin(9, None);
    run_to(&mut guest, 1);
    assert_eq!(guest.machine.take(), [Event::End(0x40)]);
    // Not of an edge that is no pin's.
    sink.signal_msi(Msi { data: 0x4041, ..level });
    run_to(&mut guest, 2);
    assert_eq!(guest.machine.take(), []);
}

#[test]
fn another_processor_starts_by_init_and_sipi() {
    // inc byte [500h]; hlt
    let Some(mut guest) = Guest::new(2, &[0xfe, 0x06, 0x00, 0x05, 0xf4]) else {
        return;
    };
    let second = &mut guest.vcpus[1];
    assert_eq!(
        second.state().unwrap().activity,
        posada_engine::Activity::WaitingForStartup
    );
    let sink = guest.kvm.msi_sink();
    for data in [0x4500, 0x4601] {
        sink.signal_msi(Msi {
            address: 0xfee0_1000,
            data,
        });
    }
    guest.vcpus.swap(0, 1);
    run_to(&mut guest, 1);
    let state = guest.vcpus[0].state().unwrap();
    assert_eq!((state.segments[CS].selector, state.rip), (0x100, 5));
    assert_eq!(state.gprs[RSP], 0);
}
