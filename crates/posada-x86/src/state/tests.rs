use super::*;
use crate::core::{Msrs, VectorState, gpr, seg};
use crate::lapic::testing::{Ends, IDLE, pieces as lapic_pieces, served, vcpu, write};
use crate::shared::Vm;
use crate::shared::mailbox::NMI;
use posada_engine::msr::{MTRR_FIXED, MTRR_VARIABLE, PORTABLE};
use posada_engine::{ApicPage, DescriptorTable, Segment, Xsave};
use std::sync::Arc;
use std::time::{Duration, Instant};

mod hostile;
mod moving;

/// All that a guest can change of a processor, by name.
fn pieces(core: &Core) -> Vec<(String, String)> {
    // Whole, so that no field is forgotten: one that the state need not carry is named without use, in the second group.
    let Core {
        regs,
        arithmetic,
        interrupt_shadow,
        code_size,
        cpl,
        fpu_blocked,
        system_flags,
        segments,
        ldtr,
        tr,
        gdtr,
        idtr,
        cr,
        dr,
        msr,
        vector,
        lapic,
        careful,
        pdptes,
        halted,
        undelivered,
        shared,

        stop_at: _,
        mmu: _,
        native: _,
        raised: _,
        watch_hits: _,
        entered: _,
        instructions: _,
        exits: _,
        frame: _,
        translator: _,
        checker: _,
        turns: _,
        copies: _,
        failure: _,
        shut_down: _,
        debug: _,
        debug_passed: _,
        cache: _,
        pauses: _,
        steal: _,
        clock_settings: _,
        pvclock_stale: _,
        ram: _,
        machine: _,
        rate: _,
    } = core;
    let VectorState {
        ymm,
        zmm_high,
        zmm,
        opmask,
        zmm_high_used,
        fx,
        mxcsr,
        xcr0,
    } = vector;
    let mut pieces: Vec<(String, String)> = [
        ("shadow", interrupt_shadow.to_string()),
        ("code size", format!("{code_size:?}")),
        ("privilege", cpl.to_string()),
        ("blocked units", fpu_blocked.to_string()),
        ("flags", format!("{system_flags:x}")),
        ("arithmetic flags", format!("{arithmetic:x}")),
        ("GDTR", format!("{gdtr:x?}")),
        ("IDTR", format!("{idtr:x?}")),
        ("x87", format!("{fx:x?}")),
        ("MXCSR", format!("{mxcsr:x}")),
        ("XCR0", format!("{xcr0:x}")),
        ("careful", careful.to_string()),
        ("PDPTEs", format!("{pdptes:x?}")),
        ("halted", halted.to_string()),
        ("interrupt in delivery", format!("{:?}", undelivered.interrupt)),
        ("exception in delivery", format!("{:?}", undelivered.exception)),
        ("starts", format!("{:?}", shared.mailbox().starts())),
    ]
    .map(|(name, value)| (name.into(), value))
    .into();
    let mut list = |name: &str, values: Vec<String>| {
        pieces.extend(
            values
                .into_iter()
                .enumerate()
                .map(|(at, value)| (format!("{name} {at}"), value)),
        );
    };
    let hex = |values: &[u64]| values.iter().map(|value| format!("{value:x}")).collect::<Vec<_>>();
    list("register", hex(regs));
    list("CR", hex(cr));
    list("DR", hex(dr));
    list("YMM", ymm.iter().map(|ymm| format!("{ymm:x?}")).collect());
    if shared.vm().model().xcr0() & crate::xsave::AVX512 != 0 {
        list("ZMM high", zmm_high.iter().map(|zmm| format!("{zmm:x?}")).collect());
        list("ZMM", zmm.iter().map(|zmm| format!("{zmm:x?}")).collect());
        list("opmask", hex(opmask));
        list("upper halves in use", vec![zmm_high_used.to_string()]);
    }
    list(
        "segment",
        segments
            .iter()
            .chain([ldtr, tr])
            .map(|segment| format!("{segment:x?}"))
            .collect(),
    );
    // One line a value.
    list("MSR line", format!("{msr:#?}").lines().map(String::from).collect());
    pieces.extend(
        lapic_pieces(lapic)
            .into_iter()
            .map(|(name, value)| (name.into(), value)),
    );
    pieces
}

fn different(one: &Core, other: &Core) -> Vec<String> {
    let (one, other) = (pieces(one), pieces(other));
    assert_eq!(one.len(), other.len());
    let pairs = one.into_iter().zip(other);
    pairs
        .filter(|(one, other)| one != other)
        .map(|((name, _), _)| name)
        .collect()
}

fn processor() -> Box<Core> {
    vcpu(&Vm::with_cpus(2), 1, Arc::new(Ends::default()))
}

/// Everything is other than after RESET.
fn changed() -> Box<Core> {
    let mut core = processor();
    core.regs[..16].copy_from_slice(&std::array::from_fn::<u64, 16, _>(|at| 0x1111 * (at as u64 + 1)));
    core.set_rip(0x7abc);
    core.cr = [
        0x8001_0031,
        0,
        0x1234_5678,
        0x9000,
        0x30_0668 & crate::system::control::cr4_bits(crate::cpuid::features()),
    ];
    core.dr = [0x10, 0x20, 0x30, 0x40, 0, 0, 0xffff_4ff1, 0x0000_0455];
    let flat = |selector, access| Segment {
        selector,
        base: 0x100 * u64::from(selector),
        limit: 0x8_ffff,
        access,
    };
    core.segments = [0x93, 0xfb, 0xf3, 0xf3, 0x93, 0xf3].map(|access| flat(access & 0xff, access));
    core.segments[seg::CS].access |= 1 << 14;
    (core.ldtr, core.tr) = (flat(0x50, 0x82), flat(0x60, 0x83));
    core.gdtr = DescriptorTable {
        base: 0x1000,
        limit: 0x77,
    };
    core.idtr = DescriptorTable {
        base: 0x2000,
        limit: 0x7ff,
    };
    core.set_rflags(flag::IF | flag::TF | flag::AC | flag::ARITHMETIC | flag::IOPL | 2);
    // What PAE paging has loaded.
    for number in 0..4u64 {
        core.physical_write(0x9000 + number * 8, &(0xa001 + number * 0x1000).to_le_bytes());
    }
    core.pdptes = core.read_pdptes(core.cr[3]);
    core.vector.ymm = std::array::from_fn(|register| [register as u8 + 1; 32]);
    core.vector.fx[..2].copy_from_slice(&0x27fu16.to_le_bytes());
    core.vector.mxcsr = 0x1f00;
    core.vector.xcr0 = core.shared.vm().model().xcr0();
    if core.vector.xcr0 & crate::xsave::AVX512 != 0 {
        core.vector.zmm_high = std::array::from_fn(|register| [register as u8 + 0x21; 32]);
        core.vector.zmm_high_used = true;
        core.vector.zmm = std::array::from_fn(|register| [register as u8 + 0x41; 64]);
        core.vector.opmask = std::array::from_fn(|register| register as u64 + 1);
    }
    change_msrs(&mut core);
    change_lapic(&mut core);
    core.undelivered = Undelivered {
        interrupt: Some(0x71),
        exception: Some(PendingException {
            vector: 14,
            error: Some(7),
        }),
    };
    (core.interrupt_shadow, core.halted) = (true, true);
    core.update_mode();
    core
}

/// Each portable register gets another value than after RESET, but those that can have no other.
fn change_msrs(core: &mut Core) {
    for msr in PORTABLE
        .iter()
        .map(|(msr, _)| *msr)
        .chain(MTRR_FIXED)
        .chain(MTRR_VARIABLE)
    {
        let before = core.portable_msrs();
        for value in [1, 0x9000, 0x0606_0606_0606_0606, 0x0007_0106_0007_0106, 0x1800] {
            let mut values = before.clone();
            values.insert(msr, value);
            if before.get(&msr).is_some_and(|old| *old != value) && crate::msr::portable::check(&values).is_ok() {
                core.set_portable_msrs(&values);
                break;
            }
        }
    }
    core.msr.efer = 0x801;
    core.msr.tsc_offset = 1 << 50;
}

fn change_lapic(core: &mut Core) {
    core.lapic_write_msr(0x1b, 0xfee1_0800).unwrap();
    let mut put = |offset: u64, value: u32| core.physical_write(0xfee1_0000 + offset, &value.to_le_bytes());
    for entry in (0x330..0x380).step_by(16) {
        put(entry, 0x41 + entry as u32 / 16);
    }
    for (offset, value) in [
        (0xf0, 0x11ef),
        (0x80, 0x20),
        (0xd0, 3 << 24),
        (0xe0, 0),
        // An illegal vector, told, and then an illegal register.
        (0x310, 2 << 24),
        (0x300, 0x4005),
        (0x280, 0),
        (0x40, 0),
        (0x320, 1 << 17 | 0xec),
        (0x3e0, 9),
        (0x380, 1 << 30),
    ] {
        put(offset, value);
    }
    let mailbox = Arc::clone(core.shared.mailbox());
    mailbox.post_vector(0xb1, true);
    core.settle_lapic(0);
    core.lapic.acknowledge_for_tests();
    mailbox.post_vector(0xd1, false);
    mailbox.post_vector(0xc1, true);
    mailbox.post(NMI);
    mailbox.post_init();
    mailbox.post_startup(0x9a);
    core.lapic.nmi_blocked = true;
}

#[test]
fn whatever_a_guest_can_change_is_in_the_state() {
    let mut core = changed();
    let state = core.state();
    assert_eq!(core.check(&state), Ok(()));
    let mut other = processor();
    other.ram = Arc::clone(&core.ram);
    let untouched: Vec<String> = {
        let same = different(&core, &other);
        let all = pieces(&core);
        all.into_iter()
            .map(|(name, _)| name)
            .filter(|name| !same.contains(name))
            .collect()
    };
    // Constants; what belongs to the states that the test below has; names of MSR lines that only begin a list.
    let lines: Vec<String> = format!("{:#?}", core.msr).lines().map(String::from).collect();
    let constant = |name: &String| match name.strip_prefix("MSR line ") {
        Some(at) => {
            let line = lines[at.parse::<usize>().unwrap()].trim();
            line.ends_with(['{', '[', '}']) || line.ends_with("],") || line.starts_with("xss")
        }
        None => [
            "register 16",
            "CR 1",
            "DR 4",
            "DR 5",
            "timer mode",
            "deadline",
            "waiting for startup",
        ]
        .contains(&name.as_str()),
    };
    let forgotten: Vec<&String> = untouched.iter().filter(|name| !constant(name)).collect();
    assert_eq!(forgotten, ["timer mode"; 0], "the test must change them");
    other.set_state(&state);
    assert_eq!(different(&core, &other), [""; 0]);
    let mut again = other.state();
    // The timer runs.
    let count = |state: &CpuState| state.apic.as_ref().unwrap().get(0x390);
    assert!(count(&again) <= count(&state) && count(&again) > count(&state) / 2);
    let page = again.apic.as_mut().unwrap();
    page.set(0x390, count(&state));
    assert!(again == state);
}

#[test]
fn what_the_largest_state_excludes_is_kept_too() {
    let deadline = |core: &mut Core| {
        write(core, 0x320, 2 << 17 | 0xec);
        core.lapic_write_msr(0x6e0, u64::MAX >> 2).unwrap();
    };
    let x2apic = |core: &mut Core| {
        write(core, 0xd0, 5 << 24);
        core.lapic_write_msr(0x1b, 0xfee0_0c00).unwrap();
        core.lapic_write_msr(0x830, 0xdead_beef_0000_4cf1).unwrap();
        core.lapic_write_msr(0x80b, 0).unwrap();
    };
    let off = |core: &mut Core| core.lapic_write_msr(0x1b, 0xfee0_0000).unwrap();
    let waits = |core: &mut Core| core.wait_for_startup();
    let waits_and_is_told = |core: &mut Core| {
        core.wait_for_startup();
        core.shared.mailbox().post_startup(7);
    };
    let software_off = |core: &mut Core| write(core, 0xf0, 0xff);
    let shadow = |core: &mut Core| {
        core.system_flags &= !flag::IF;
        core.interrupt_shadow = true;
    };
    let changes: [fn(&mut Core); 7] = [deadline, x2apic, off, waits, waits_and_is_told, software_off, shadow];
    for (number, change) in changes.into_iter().enumerate() {
        let mut core = processor();
        change(&mut core);
        let state = core.state();
        assert_eq!(core.check(&state), Ok(()), "{number}");
        let mut other = processor();
        other.ram = Arc::clone(&core.ram);
        other.set_state(&state);
        assert_eq!(different(&core, &other), [""; 0], "{number}");
        assert!(other.state() == state, "{number}");
    }
}

#[test]
fn what_was_in_delivery_is_delivered_once_and_first() {
    let mut core = processor();
    let mut state = core.state();
    state.events.interrupt = Some(0x71);
    state.events.exception = Some(PendingException { vector: 6, error: None });
    state.rflags &= !flag::IF;
    core.set_state(&state);
    core.regs[gpr::RSP] = 0x8000;
    assert_eq!((core.service(), core.rip()), (None, 6));
    // The exception's frame leads to the interrupt's handler, and that one's to the guest.
    assert_eq!(core.load_system::<u16>(0x7ffa), Ok(0x7000));
    assert_eq!(core.load_system::<u16>(0x7ff4), Ok(0x71));
    assert_eq!((core.service(), core.rip()), (None, 6));
    assert_eq!(core.state().events, Events::default());
}

#[test]
fn a_kick_before_a_delivery_leaves_it_for_later() {
    use posada_engine::{Exit, Kick};
    let mut core = processor();
    let mut state = core.state();
    state.events.interrupt = Some(0x71);
    state.activity = Activity::Halted;
    core.set_state(&state);
    core.shared.mailbox().kick();
    assert_eq!(core.service(), Some(Exit::Kicked));
    assert_eq!(core.state().events.interrupt, Some(0x71));
    assert_eq!(served(&mut core), Some(0x71));
}

#[test]
fn the_vm_that_goes_on_hears_of_its_clock_when_it_runs_and_not_before() {
    let mut core = processor();
    let mut state = core.state();
    state.msrs.insert(posada_engine::msr::KVM_SYSTEM_TIME, 0x9001);
    core.shared.vm().set_clock(5, 0);
    core.set_state(&state);
    let mut info = [0; 32];
    core.physical_read(0x9000, &mut info);
    assert_eq!(info, [0; 32], "the guest's RAM may be still to come");
    core.catch_up();
    core.physical_read(0x9000, &mut info);
    assert_eq!((info[0], info[29]), (2, 3));
    core.set_state(&state);
    core.catch_up();
    core.physical_read(0x9000, &mut info);
    assert_eq!(info[0], 4);
}

#[test]
fn impossible_states_are_refused_by_name() {
    let mut core = crate::mmu::tests::core();
    core.segments[seg::SS].access = 0xc093;
    core.segments[seg::SS].limit = u32::MAX;
    core.segments[seg::CS].limit = u32::MAX;
    core.update_mode();
    let good = core.state();
    assert_eq!(core.check(&good), Ok(()));
    let no_area = |state: &mut CpuState| {
        let mut bytes = state.xsave.bytes().to_vec();
        bytes[520] = 1;
        state.xsave = Xsave::new(bytes);
    };
    type Change = fn(&mut CpuState);
    let cases: [(&str, Change); 37] = [
        ("CR0", |state| state.cr0 |= 1 << 32),
        ("CR0", |state| state.cr0 |= 1 << 6),
        ("CR0.PE", |state| state.cr0 &= !1),
        ("CR0.CD", |state| state.cr0 |= 1 << 29),
        ("CR3", |state| state.cr3 = 1 << 60),
        ("CR4", |state| state.cr4 |= 1 << 13),
        ("CR4.PAE", |state| state.cr4 = 0),
        ("EFER.LMA", |state| state.efer = 0x100),
        ("EFER", |state| state.efer |= 2),
        ("PCIDE", |state| (state.cr0, state.efer, state.cr4) = (0x11, 0, 1 << 17)),
        ("RFLAGS", |state| state.rflags |= 1 << 22),
        ("virtual-8086", |state| state.rflags |= 1 << 17),
        ("RIP", |state| state.rip = 1 << 47),
        ("RIP", |state| {
            (state.cr0, state.efer, state.rip) = (0x11, 0, 1 << 32);
        }),
        ("CS.L", |state| state.segments[seg::CS].access |= 1 << 14),
        ("CS is not present", |state| state.segments[seg::CS].access &= !0x80),
        ("CS is not a code", |state| state.segments[seg::CS].access = 0xa091),
        ("CS and SS", |state| state.segments[seg::SS].access |= 0x60),
        ("DS has a base", |state| {
            state.segments[seg::DS].access |= 0x80;
            state.segments[seg::DS].base = 1 << 40;
        }),
        ("GS has a base", |state| state.segments[seg::GS].base = 1 << 50),
        ("FS has reserved", |state| state.segments[seg::FS].access |= 0x100),
        ("CS has a limit", |state| state.segments[seg::CS].limit = 0xffff_f000),
        ("ES is not a segment", |state| state.segments[seg::ES].access = 0x82),
        ("TR", |state| state.tr.access = 0x89),
        ("TR", |state| state.tr.access = 0x83),
        ("LDTR", |state| state.ldtr.access = 0x8b),
        ("IDTR", |state| state.idtr.base = 1 << 47),
        ("DR6", |state| state.debug[4] |= 1 << 32),
        ("XCR0", |state| state.xcr0 = 2),
        ("standard format", no_area),
        ("components", |state| state.xsave.set_xstate_bv(1 << 62)),
        ("MXCSR", |state| state.xsave.legacy_mut()[26] = 1),
        ("APIC_BASE", |state| state.apic_base = 0xfee0_0400),
        ("ID register", |state| state.apic = Some(ApicPage::reset(9))),
        ("LSTAR", |state| state.msrs.extend([(0xc000_0082, 1 << 47)])),
        ("TSC_DEADLINE", |state| state.msrs.extend([(TSC_DEADLINE, 1)])),
        ("below 16", |state| state.events.interrupt = Some(15)),
    ];
    for (number, (part, change)) in cases.into_iter().enumerate() {
        let mut state = good.clone();
        change(&mut state);
        let text = core.check(&state).expect_err(&format!("case {number}: {part}"));
        assert!(text.contains(part), "case {number}: {part} is not in {text}");
    }
    for exception in [(2, None), (32, None), (6, Some(0))] {
        let (vector, error) = exception;
        let mut state = good.clone();
        state.events.exception = Some(PendingException { vector, error });
        assert!(core.check(&state).unwrap_err().contains("exception"));
    }
}

#[test]
fn a_baseline_has_no_room_for_what_it_lacks() {
    use posada_engine::cpu::{Baseline, CpuModel};
    let Ok(model) = CpuModel::new(&crate::Emulator::offer(), 1, Some(Baseline::V2)) else {
        return;
    };
    let core = vcpu(&Vm::new(model), 0, Arc::new(Ends::default()));
    let mut full = vcpu(&Vm::with_cpus(1), 0, Arc::new(Ends::default()));
    let mut state = full.state();
    if state.xsave.bytes().len() > Xsave::HEADER_END {
        assert!(core.check(&state).unwrap_err().contains("components"));
        state.xsave.set_xstate_bv(3);
        assert_eq!(core.check(&state), Ok(()));
    }
    state.cr4 = 1 << 20;
    assert!(core.check(&state).unwrap_err().contains("CR4"));
}

#[test]
fn a_halted_processor_wakes_elsewhere_when_its_timer_says() {
    let timers: [fn(&mut Core); 3] = [
        |core| {
            write(core, 0x320, 0xec);
            write(core, 0x380, 30_000_000);
        },
        |core| {
            write(core, 0x320, 1 << 17 | 0xec);
            write(core, 0x380, 30_000_000);
        },
        |core| {
            write(core, 0x320, 2 << 17 | 0xec);
            let deadline = core.guest_tsc() + clock::ns_to_ticks(30_000_000);
            core.lapic_write_msr(0x6e0, deadline).unwrap();
        },
    ];
    for start_timer in timers {
        let (mut core, mut other) = (processor(), processor());
        write(&mut core, 0x3e0, 0xb);
        let start = Instant::now();
        start_timer(&mut core);
        core.halted = true;
        std::thread::sleep(Duration::from_millis(3));
        other.set_state(&core.state());
        assert_eq!(other.rip(), IDLE);
        assert_eq!(served(&mut other), Some(0xec));
        let took = start.elapsed();
        assert!(
            took >= Duration::from_millis(30) && took < Duration::from_secs(10),
            "{took:?}"
        );
    }
}

#[test]
fn registers_at_reset_are_those_of_a_new_processor() {
    let ram = Arc::new(posada_memory::GuestRam::new(1 << 20).unwrap());
    let mut core = Core::new(ram.clone(), Arc::new(Ends::default()), Default::default());
    let fresh = Core::new(ram, Arc::new(Ends::default()), Default::default());
    core.set_state(&CpuState::reset());
    assert_eq!(different(&core, &fresh), [""; 0]);
    assert_eq!(format!("{:?}", core.msr), format!("{:?}", Msrs::default()));
}
