//! The portable state: what is set is there, and what one VM had the next one goes on with.

mod guest;

use guest::{CODE, Guest, entry, model, whole};
use posada_engine::clock::Moment;
use posada_engine::{Activity, CpuState, Engine, Error, Exit, PendingException, Segment, msr};
use posada_kvm::Kvm;
use posada_memory::GuestRam;
use std::sync::Arc;

/// 64-bit mode in the middle of things.
fn busy(guest: &mut Guest) -> CpuState {
    let mut state = CpuState::reset();
    state.gprs = std::array::from_fn(|index| 0x0101_0101_0101_0101 * index as u64);
    (state.rip, state.rflags) = (0xffff_8000_0000_1234, 0x246);
    let data = |selector, access| Segment {
        selector,
        base: 0,
        limit: u32::MAX,
        access,
    };
    state.segments = [0xc093, 0xa09b, 0xc093, 0xc093, 0xc093, 0xc093].map(|access| data(0x10, access));
    state.segments[1].selector = 8;
    (state.segments[4].base, state.segments[5].base) = (0x7fff_0000_0000, 0xffff_8880_0000_0000);
    state.ldtr = Segment::default();
    state.tr = Segment {
        selector: 0x40,
        base: 0xffff_fe00_0000_3000,
        limit: 0x206f,
        access: 0x8b,
    };
    (state.gdtr.base, state.gdtr.limit) = (0xffff_fe00_0000_1000, 0x7f);
    (state.idtr.base, state.idtr.limit) = (0xffff_fe00_0000_0000, 0xfff);
    (state.cr0, state.cr2, state.cr3, state.cr4) = (0x8005_0033, 0x7fff_1234_5678, 0x3000, 0x6a0);
    state.efer = 0xd01;
    state.debug = [1, 2, 3, 4, 0xffff_0ff1, 0x755];
    for (at, byte) in state.xsave.legacy_mut()[32..416].iter_mut().enumerate() {
        // x87 registers have 10 bytes.
        *byte = if at >= 128 || at % 16 < 10 { at as u8 } else { 0 };
    }
    state.msrs = [
        (msr::STAR, 0x0023_0010_0000_0000),
        (msr::LSTAR, 0xffff_ffff_8100_0000),
        (msr::CSTAR, 0xffff_ffff_8100_1000),
        (msr::FMASK, 0x4_7700),
        (msr::KERNEL_GS_BASE, 0x7f00_1234_5000),
        (msr::SYSENTER_CS, 0x10),
        // AMD's have 32 bits.
        (msr::SYSENTER_ESP, 0x2000),
        (msr::SYSENTER_EIP, 0x8100_2000),
        (msr::PAT, 0x0407_0506_0007_0106),
        (msr::MTRR_DEF_TYPE, 0xc06),
        (msr::TSC_AUX, 3),
        (msr::KVM_SYSTEM_TIME, 0x5001),
        (msr::MTRR_FIXED[0], 0x0606_0606_0606_0606),
        (*msr::MTRR_VARIABLE.start(), 0x8000_0006),
    ]
    .into();
    // Not every processor has all of them.
    let there = guest.vcpus[0].state().unwrap().msrs;
    state.msrs.retain(|register, _| there.contains_key(register));
    state.apic_base = 0xfee0_0d00;
    let mut page = guest.vcpus[0].state().unwrap().apic.unwrap();
    page.set(0x20, 0);
    page.set(0x80, 0x20);
    page.set(0xf0, 0x1ff);
    // A timer of TSC deadlines, a vector in service and one that waits.
    page.set(0x320, 0x400ec);
    page.set(0x110, 1 << 3);
    page.set(0x210, 1 << 9);
    state.apic = Some(page);
    if there.contains_key(&msr::TSC_DEADLINE) {
        state.msrs.insert(msr::TSC_DEADLINE, u64::MAX >> 1);
    }
    state.tsc_offset = Some(0u64.wrapping_sub(1 << 40));
    state.activity = Activity::Halted;
    state.events.nmi_blocked = true;
    state
}

/// Brings what is a matter of taste between `found` and `expected` to one form.
fn alike(mut found: CpuState, expected: &CpuState) -> CpuState {
    // More registers are told than were set; those have their reset values.
    let reset = |register: &u32, value: u64| {
        let same = expected.msrs.get(register).is_some_and(|set| *set == value);
        assert!(
            same || value == msr::reset_value(*register),
            "{}: {value:#x}",
            msr::name(*register)
        );
        expected.msrs.contains_key(register)
    };
    found.msrs.retain(|register, value| reset(register, *value));
    // The mask of MXCSR is a constant, and the area may be longer than it must be.
    found.xsave.legacy_mut()[28..32].fill(0);
    let (mut area, long) = (found.xsave.bytes().to_vec(), expected.xsave.bytes().len());
    assert!(area[long..].iter().all(|byte| *byte == 0));
    area.truncate(long);
    found.xsave = posada_engine::Xsave::new(area);
    found
}

#[test]
fn what_is_set_is_there() {
    if !whole() {
        return;
    }
    let mut guest = Guest::new(1, &[0xf4]).unwrap();
    let mut state = busy(&mut guest);
    guest.vcpus[0].set_state(&state).unwrap();
    let found = guest.vcpus[0].state().unwrap();
    let page = found.apic.clone().unwrap();
    for register in [0x20, 0x80, 0xf0, 0x320, 0x110, 0x210] {
        assert_eq!(
            page.get(register),
            state.apic.as_ref().unwrap().get(register),
            "{register:#x}"
        );
    }
    // A processor without RDTSCP has no TSC_AUX, and so on: none of this model's.
    state.apic = Some(page);
    assert_eq!(alike(found, &state), state);
}

#[test]
fn a_state_moves_to_another_vm_whole() {
    let Some(mut first) = Guest::new(1, &[0xf4]) else {
        return;
    };
    let state = busy(&mut first);
    first.vcpus[0].set_state(&state).unwrap();
    let state = first.vcpus[0].state().unwrap();
    let mut second = Guest::new(1, &[0xf4]).unwrap();
    second.vcpus[0].set_state(&state).unwrap();
    assert_eq!(second.vcpus[0].state().unwrap(), state);
    // And one that was busy becomes one after RESET.
    let fresh = Guest::new(1, &[0xf4]).unwrap().vcpus[0].state().unwrap();
    let mut reset = CpuState::reset();
    (reset.apic, reset.tsc_offset) = (fresh.apic.clone(), fresh.tsc_offset);
    second.vcpus[0].set_state(&reset).unwrap();
    let found = second.vcpus[0].state().unwrap();
    assert_eq!(found.msrs, fresh.msrs);
    assert_eq!(alike(found, &reset), reset);
}

#[test]
fn a_new_processor_is_as_after_reset() {
    let Some(mut guest) = Guest::new(2, &[0xf4]) else {
        return;
    };
    let found = guest.vcpus[0].state().unwrap();
    let mut reset = CpuState::reset();
    (reset.apic, reset.tsc_offset) = (found.apic.clone(), found.tsc_offset);
    let page = found.apic.clone().unwrap();
    assert_eq!((page.get(0xf0), page.get(0x350), page.get(0x20)), (0xff, 1 << 16, 0));
    assert_eq!(alike(found, &reset), reset);
    let second = guest.vcpus[1].state().unwrap();
    assert_eq!(
        (second.activity, second.apic_base),
        (Activity::WaitingForStartup, 0xfee0_0800)
    );
    assert_eq!(second.apic.unwrap().get(0x20), 1 << 24);
    assert_eq!(second.tsc_offset, guest.vcpus[0].state().unwrap().tsc_offset);
}

#[test]
fn events_that_wait_happen() {
    // At 1000h: hlt. Handlers at 2000h: of NMI, inc byte [500h]; of #GP, of vector 40h.
    let Some(mut guest) = Guest::new(1, &[0xf4]) else {
        return;
    };
    for (vector, at) in [(2u64, 0x2000u16), (13, 0x2010), (0x40, 0x2020)] {
        let [low, high] = at.to_le_bytes();
        guest.write(vector * 4, &[low, high, 0, 0]);
        // inc byte [500h + vector]; iret
        guest.write(at.into(), &[0xfe, 0x06, vector as u8, 0x05, 0xcf]);
    }
    let counts = |guest: &Guest| [2, 13, 0x40].map(|vector| guest.byte(0x500 + vector));
    let run = |guest: &mut Guest, change: &dyn Fn(&mut CpuState)| {
        let mut state = entry();
        change(&mut state);
        guest.vcpus[0].set_state(&state).unwrap();
        guest.run_until_halted();
        counts(guest)
    };
    assert_eq!(run(&mut guest, &|state| state.events.nmi_pending = true), [1, 0, 0]);
    let exception = PendingException {
        vector: 13,
        error: None,
    };
    assert_eq!(
        run(&mut guest, &|state| state.events.exception = Some(exception)),
        [1, 1, 0]
    );
    assert_eq!(run(&mut guest, &|state| state.events.interrupt = Some(0x40)), [1, 1, 1]);
    let blocked = |state: &mut CpuState| (state.events.nmi_pending, state.events.nmi_blocked) = (true, true);
    assert_eq!(
        run(&mut guest, &|state| blocked(state)),
        [1, 1, 1],
        "it waits for an IRET"
    );
}

#[test]
fn a_processor_that_has_its_sipi_starts() {
    // inc byte [500h]; hlt
    let Some(mut guest) = Guest::new(1, &[0xfe, 0x06, 0x00, 0x05, 0xf4]) else {
        return;
    };
    let mut state = entry();
    state.activity = Activity::WaitingForStartup;
    state.events.startup = Some(1);
    guest.vcpus[0].set_state(&state).unwrap();
    let state = guest.run_until_halted();
    assert_eq!(
        (state.segments[1].selector, state.rip, guest.byte(0x500)),
        (0x100, 5, 1)
    );
}

#[test]
fn impossible_states_are_refused_with_the_reason() {
    if !whole() {
        return;
    }
    let mut guest = Guest::new(1, &[0xf4]).unwrap();
    let mut refuse = |change: &dyn Fn(&mut CpuState), part: &str| {
        let mut state = entry();
        change(&mut state);
        match guest.vcpus[0].set_state(&state) {
            Err(Error::State(text)) => assert!(text.contains(part), "{text}"),
            other => panic!("{part}: {other:?}"),
        }
    };
    refuse(&|state| state.cr0 = 0x8000_0010, "control and segment registers");
    refuse(&|state| state.xcr0 = 1 << 40, "XCR0");
    refuse(&|state| state.xsave.set_xstate_bv(1 << 40), "XSAVE area");
    refuse(&|state| _ = state.msrs.insert(msr::PAT, 2), "0x2 in the register PAT");
    refuse(&|state| _ = state.msrs.insert(0x1234, 1), "no register MSR 0x1234");
    guest.vcpus[0].set_state(&entry()).unwrap();
    assert_eq!(guest.run_until_halted().rip, CODE + 1);
}

#[test]
fn the_clock_goes_on_from_where_it_is_set() {
    let Some(guest) = Guest::new(1, &[0xf4]) else { return };
    let first = guest.kvm.clock().unwrap();
    let second = guest.kvm.clock().unwrap();
    assert!(second.vm_ns > first.vm_ns && second.host_tsc > first.host_tsc && second.real_ns >= first.real_ns);
    // What has passed since the moment counts.
    let hour = 3_600_000_000_000;
    let then = Moment {
        vm_ns: second.vm_ns + hour,
        ..second
    };
    guest.kvm.set_clock(then).unwrap();
    let third = guest.kvm.clock().unwrap();
    let (clock, host) = (third.vm_ns - then.vm_ns, third.real_ns - second.real_ns);
    assert!(
        clock < 1_000_000_000 && host.abs_diff(clock) < 10_000_000,
        "{clock} ns, {host} ns"
    );
}

#[test]
fn a_model_that_kvm_cannot_be_is_refused() {
    let Some(mut model) = model(1) else { return };
    let make = |model: &posada_engine::cpu::CpuModel| match Kvm::new(Arc::new(GuestRam::new(1 << 20).unwrap()), model) {
        Err(error) => error,
        Ok(_) => panic!("it was taken"),
    };
    model.cpus = 100_000;
    let error = make(&model);
    assert!(
        matches!(&error, Error::Host(text) if text.contains("--cpus")),
        "{error}"
    );
    model.cpus = 1;
    model.physical_bits = 52;
    let error = make(&model);
    assert!(
        matches!(&error, Error::State(text) if text.contains("bits of physical address")),
        "{error}"
    );
}

#[test]
fn a_kick_of_a_vcpu_that_is_gone_does_nothing() {
    let Some(mut guest) = Guest::new(1, &[0xeb, 0xfe]) else {
        return;
    };
    guest.vcpus[0].set_state(&entry()).unwrap();
    let kick = guest.vcpus[0].kicker();
    kick.kick();
    assert_eq!(guest.vcpus[0].run(), Exit::Kicked);
    drop(guest);
    kick.kick();
}
