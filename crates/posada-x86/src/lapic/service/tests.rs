use super::*;
use crate::interpret::Stop;
use crate::lapic::testing::{Ends, IDLE, idle, lone, served, vcpu, vcpu_on, write};
use crate::shared::{Mailbox, Vm};
use posada_engine::{DebugControl, Kick, Msi, MsiSink};
use posada_memory::GuestRam;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

/// A small generator (xorshift), for delays.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn sleeps(mailbox: &Mailbox) {
    while !mailbox.at_rest() {
        std::thread::yield_now();
    }
}

#[test]
fn ten_thousand_kicks_of_a_halted_vcpu_are_all_seen() {
    let mut core = lone();
    core.halted = true;
    let kick: Arc<dyn Kick> = core.shared.mailbox().clone();
    let seen = Arc::new(AtomicU32::new(0));
    let counter = Arc::clone(&seen);
    let thread = std::thread::spawn(move || {
        let mut state = 0x1234_5678_9abc;
        for round in 0..10_000 {
            for _ in 0..random(&mut state) % 2000 {
                std::hint::spin_loop();
            }
            kick.kick();
            // A kick is answered before the next, so that none may hide behind another.
            while counter.load(Ordering::Acquire) == round {
                std::thread::yield_now();
            }
        }
    });
    for round in 1..=10_000 {
        assert_eq!(core.service(), Some(Exit::Kicked));
        assert!(core.halted);
        seen.store(round, Ordering::Release);
    }
    thread.join().unwrap();
    assert!(!core.shared.pending());
}

#[test]
fn a_flood_of_posted_interrupts_loses_none() {
    const THREADS: usize = 4;
    const ROUNDS: u64 = 5_000;
    let vm = Vm::with_cpus(1);
    let mut core = vcpu(&vm, 0, Arc::new(Ends::default()));
    let counts: Arc<[AtomicU64; THREADS]> = Arc::default();
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let (vm, counts) = (Arc::clone(&vm), Arc::clone(&counts));
            std::thread::spawn(move || {
                for round in 0..ROUNDS {
                    let data = 0x41 + 0x30 * number as u32;
                    vm.signal_msi(Msi {
                        address: 0xfee0_0000,
                        data,
                    });
                    // The next may be sent once this one was served: before, they would be one.
                    while counts[number].load(Ordering::Acquire) == round {
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    for _ in 0..ROUNDS * THREADS as u64 {
        // As a guest that halts when it has nothing to do: a lost interrupt would hang it.
        core.halted = true;
        let vector = served(&mut core).expect("only an interrupt wakes it");
        write(&mut core, 0xb0, 0);
        counts[usize::from(vector - 0x41) / 0x30].fetch_add(1, Ordering::Release);
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == ROUNDS));
}

#[test]
fn the_shadow_holds_an_interrupt_back_for_another_look() {
    let mut core = lone();
    core.interrupt_shadow = true;
    write(&mut core, 0x300, 1 << 18 | 0x41);
    assert_eq!((core.service(), core.rip()), (None, IDLE));
    assert!(core.shared.pending());
    core.interrupt_shadow = false;
    assert_eq!(served(&mut core), Some(0x41));
}

/// Runs to the debugger's next stop; gives RIP and AX there.
fn debugged(core: &mut Core) -> (u64, u64) {
    loop {
        assert_eq!(core.service(), None);
        if core.execute() == Stop::Debug {
            return (core.rip(), core.regs[gpr::RAX]);
        }
    }
}

#[test]
fn a_break_point_in_the_shadow_of_sti_or_mov_ss_leaves_it_whole() {
    // sti, or mov ss, dx; inc ax; hlt
    for code in [&[0xfb, 0x40, 0xf4][..], &[0x8e, 0xd2, 0x40, 0xf4]] {
        for single_step in [false, true] {
            let mut core = lone();
            core.physical_write(IDLE, code);
            (core.segments[seg::CS].selector, core.segments[seg::CS].base) = (0, 0);
            if code[0] == 0xfb {
                core.system_flags &= !flag::IF;
            }
            let shadowed = IDLE + code.len() as u64 - 2;
            let mut debug = DebugControl {
                single_step: false,
                breakpoints: vec![shadowed, 0x41],
            };
            core.set_debug(&debug);
            assert_eq!(debugged(&mut core), (shadowed, 0));
            write(&mut core, 0x300, 1 << 18 | 0x41);
            debug.single_step = single_step;
            core.set_debug(&debug);
            if single_step {
                assert_eq!(debugged(&mut core), (shadowed + 1, 1));
            }
            assert_eq!(debugged(&mut core), (0x41, 1));
        }
    }
}

#[test]
fn interrupts_wait_for_the_flag_and_opening_it_calls_for_a_look() {
    let mut core = lone();
    core.system_flags &= !flag::IF;
    write(&mut core, 0x300, 1 << 18 | 0x41);
    assert_eq!((core.service(), core.rip()), (None, IDLE));
    assert!(!core.shared.pending());
    core.system_flags |= flag::IF;
    core.interrupts_may_be_due();
    assert!(core.shared.pending());
    assert_eq!(served(&mut core), Some(0x41));
}

#[test]
fn a_halted_vcpu_sleeps_until_its_own_timer_without_the_alarms_thread() {
    let mut core = lone();
    core.halted = true;
    write(&mut core, 0x3e0, 0xb);
    write(&mut core, 0x320, 0xec);
    let start = Instant::now();
    write(&mut core, 0x380, 20_000_000);
    assert_eq!(served(&mut core), Some(0xec));
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert!(!core.halted && !core.shared.pending());
}

#[test]
fn a_running_vcpu_is_told_of_its_timer_each_period() {
    let mut core = lone();
    write(&mut core, 0x3e0, 0xb);
    write(&mut core, 0x320, 1 << 17 | 0xec);
    let start = Instant::now();
    write(&mut core, 0x380, 2_000_000);
    for _ in 0..10 {
        while !core.shared.pending() {
            std::hint::spin_loop();
        }
        assert_eq!(served(&mut core), Some(0xec));
        write(&mut core, 0xb0, 0);
    }
    assert!(start.elapsed() >= Duration::from_millis(20));
    write(&mut core, 0x380, 0);
    assert_eq!(served(&mut core), None);
}

#[test]
fn a_period_of_a_nanosecond_neither_floods_nor_stops() {
    let mut core = lone();
    write(&mut core, 0x3e0, 0xb);
    write(&mut core, 0x320, 1 << 17 | 0xec);
    write(&mut core, 0x380, 1);
    for _ in 0..1000 {
        core.halted = true;
        assert_eq!(served(&mut core), Some(0xec));
        write(&mut core, 0xb0, 0);
    }
    core.set_cr8(15);
    let mailbox = Arc::clone(core.shared.mailbox());
    core.halted = true;
    let thread = std::thread::spawn(move || {
        // Held back by the task priority, the timer must let the processor sleep: until this kick, and without end.
        sleeps(&mailbox);
        mailbox.kick();
    });
    assert_eq!(core.service(), Some(Exit::Kicked));
    thread.join().unwrap();
    assert_eq!(core.lapic.next_interrupt(), None);
}

#[test]
fn with_interrupts_off_only_nmi_init_and_kick_end_a_halt() {
    let vm = Vm::with_cpus(1);
    let mut core = vcpu(&vm, 0, Arc::new(Ends::default()));
    let mailbox = Arc::clone(core.shared.mailbox());
    core.halted = true;
    core.system_flags &= !flag::IF;
    let thread = std::thread::spawn(move || {
        sleeps(&mailbox);
        mailbox.post_vector(0x41, false);
        // Two sleeps more prove that the vector did not end the halt; the kick may.
        sleeps(&mailbox);
        mailbox.kick();
    });
    assert_eq!(
        (core.service(), core.halted, core.rip()),
        (Some(Exit::Kicked), true, IDLE)
    );
    thread.join().unwrap();
    vm.signal_msi(Msi {
        address: 0xfee0_0000,
        data: 4 << 8,
    });
    assert_eq!((core.service(), core.halted, core.rip()), (None, false, 2));
}

#[test]
fn nmis_are_blocked_until_iret() {
    let mut core = lone();
    let mailbox = Arc::clone(core.shared.mailbox());
    mailbox.post(NMI);
    assert_eq!(served(&mut core), Some(2));
    mailbox.post(NMI);
    assert_eq!(served(&mut core), None);
    core.unblock_nmi();
    assert!(core.shared.pending());
    assert_eq!(served(&mut core), Some(2));
}

#[test]
fn init_and_sipi_start_another_processor_in_real_mode() {
    let vm = Vm::with_cpus(2);
    let mut boot = vcpu(&vm, 0, Arc::new(Ends::default()));
    let mut other = vcpu(&vm, 1, Arc::new(Ends::default()));
    other.wait_for_startup();
    other.regs[gpr::RBX] = 5;
    let thread = std::thread::spawn(move || {
        assert_eq!(other.service(), None);
        let code = other.segments[seg::CS];
        assert_eq!((code.selector, code.base, other.rip()), (0x9a00, 0x9a000, 0));
        assert_eq!((other.regs[gpr::RBX], other.cr[0] & 1), (0, 0));
        assert_ne!(other.regs[gpr::RDX], 0, "the processor's signature");
        other
    });
    sleeps(&vm.vcpus()[1]);
    write(&mut boot, 0x310, 1 << 24);
    write(&mut boot, 0x300, 0xc500);
    write(&mut boot, 0x300, 0x8500);
    write(&mut boot, 0x300, 0x69a);
    let mut other = thread.join().unwrap();
    write(&mut boot, 0x300, 0x610);
    idle(&mut other);
    assert_eq!(served(&mut other), None, "a second SIPI means nothing");
}

#[test]
fn a_vcpu_that_waits_for_sipi_hears_nothing_else() {
    let vm = Vm::with_cpus(2);
    let mut other = vcpu(&vm, 1, Arc::new(Ends::default()));
    other.wait_for_startup();
    let mailbox = Arc::clone(&vm.vcpus()[1]);
    let thread = std::thread::spawn(move || {
        mailbox.post(NMI);
        mailbox.post_vector(0x41, false);
        sleeps(&mailbox);
        mailbox.kick();
    });
    assert_eq!((other.service(), other.rip()), (Some(Exit::Kicked), IDLE));
    thread.join().unwrap();
}

#[test]
fn init_of_the_boot_processor_leads_to_the_reset_vector() {
    let mut core = lone();
    core.vector.ymm[3][20] = 7;
    core.vector.mxcsr = 0x1f00;
    core.cr[0] = 0x11;
    core.shut_down = true;
    (core.msr.system_time, core.msr.steal_time, core.msr.pv_eoi) = (0x9001, 0x9041, 0x9081);
    core.shared.mailbox().post_init();
    assert_eq!(core.service(), None);
    assert_eq!((core.msr.system_time, core.msr.steal_time, core.msr.pv_eoi), (0, 0, 0));
    assert_eq!((core.rip(), core.segments[seg::CS].base), (0xfff0, 0xffff_0000));
    assert_eq!(
        (core.cr[0], core.vector.ymm[3][20], core.vector.mxcsr),
        (0x10, 7, 0x1f00)
    );
    assert!(!core.shut_down);
}

#[test]
fn announced_code_is_forbidden_to_the_others_and_serialising_waits_for_them() {
    let vm = Vm::with_cpus(2);
    let mut first = vcpu(&vm, 0, Arc::new(Ends::default()));
    let mut second = vcpu_on(Arc::clone(&first.ram), &vm, 1, Arc::new(Ends::default()));
    second.store_system(0x5000, 1u32).unwrap();
    let ram = Arc::clone(&first.ram);
    let page = ram.code().page(0x5000);
    let version = page.version();
    assert!(page.mark(0, 4));
    first.shared.announce_code();
    assert!(second.shared.pending() && !first.shared.settled());
    let stop = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let mut second = second;
        while !told.load(Ordering::Acquire) {
            if second.shared.pending() {
                assert_eq!(second.service(), None);
            }
        }
        second
    });
    first.serialize();
    stop.store(true, Ordering::Release);
    let mut second = thread.join().unwrap();
    assert_ne!(page.version(), version, "what was decoded may have been written over");
    assert!(page.mark(0, 4));
    let version = page.version();
    second.store_system(0x5000, 2u32).unwrap();
    assert_ne!(page.version(), version, "its stores are seen now");
    second.shared.mailbox().leave();
    first.shared.announce_code();
    first.serialize();
}

#[test]
fn stores_to_code_are_seen_though_their_entry_goes_before_the_announcement_is_heard() {
    type Way = fn(&mut Core);
    const PAGE: u64 = 0x5000;
    let ways: [(&str, Way); 5] = [
        ("all go", |core| core.mmu.flush()),
        ("all but global ones go", |core| core.mmu.flush_non_global()),
        ("one goes", |core| core.mmu.flush_page(PAGE + 0x123)),
        ("another takes its place", |core| {
            core.load_system::<u32>(PAGE + 4096 * crate::tlb::ENTRIES as u64)
                .unwrap();
        }),
        ("a debugger sets the state", |core| {
            let state = core.state();
            core.set_state(&state);
        }),
    ];
    for (name, go) in ways {
        let (vm, ram) = (Vm::with_cpus(2), Arc::new(GuestRam::new(8 << 20).unwrap()));
        let [first, mut second] = [0, 1].map(|index| vcpu_on(ram.clone(), &vm, index, Arc::new(Ends::default())));
        second.store_system(PAGE, 1u32).unwrap();
        let page = ram.code().page(PAGE);
        // What decoding does.
        assert!(page.mark(0, 4));
        first.shared.announce_code();
        let version = page.version();
        second.store_system(PAGE, 2u32).unwrap();
        assert_eq!(
            page.version(),
            version,
            "{name}: the test needs a store that goes past the marks"
        );
        go(&mut second);
        assert_eq!(second.service(), None);
        assert_ne!(page.version(), version, "{name}");
    }
}

/// Three vCPUs of a VM with 1 MiB of RAM.
fn three() -> [Box<Core>; 3] {
    let (vm, ram) = (Vm::with_cpus(3), Arc::new(GuestRam::new(1 << 20).unwrap()));
    [0, 1, 2].map(|index| vcpu_on(ram.clone(), &vm, index, Arc::new(Ends::default())))
}

#[test]
fn serialising_waits_for_those_who_have_not_heard_of_code_that_another_announced() {
    let [mut first, mut second, mut third] = three();
    first.mark_code(0x5000, 4);
    assert_eq!(third.service(), None);
    assert!(third.shared.settled(), "it uses no code");
    third.mark_code(0x5000, 4);
    assert!(!third.shared.settled(), "the second may still store past the marks");
    assert_eq!(second.service(), None);
    assert!(third.shared.settled() && first.shared.settled());
    third.mark_code(0x5010, 4);
    assert!(third.shared.settled());
    // Two announcements that cross each other.
    first.mark_code(0x6000, 4);
    second.mark_code(0x7000, 4);
    assert!(!first.shared.settled() && !second.shared.settled());
    for core in [&mut first, &mut second, &mut third] {
        assert_eq!(core.service(), None);
    }
    assert!(first.shared.settled() && second.shared.settled());
}

#[test]
fn code_that_another_has_marked_and_not_yet_announced_is_announced_by_whoever_uses_it() {
    let [first, mut second, mut third] = three();
    second.store_system(0x5000, 1u32).unwrap();
    let page = first.ram.code().page(0x5000);
    // The first vCPU loses its processor here.
    assert!(page.mark(0, 4));
    let version = third.mark_code(0x5000, 4);
    assert!(second.shared.pending() && !third.shared.settled());
    second.store_system(0x5000, 2u32).unwrap();
    assert_eq!((second.service(), page.version() != version), (None, true));
}

#[test]
fn two_that_serialise_at_once_answer_each_other() {
    let vm = Vm::with_cpus(2);
    let threads = [0, 1].map(|index| {
        let mut core = vcpu(&vm, index, Arc::new(Ends::default()));
        std::thread::spawn(move || {
            for _ in 0..2_000 {
                core.shared.announce_code();
                core.serialize();
            }
            core.shared.mailbox().leave();
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
