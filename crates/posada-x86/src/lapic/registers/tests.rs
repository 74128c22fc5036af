use super::*;
use crate::lapic::testing::{Ends, idle, lone, read, served, vcpu, write};
use crate::shared::Vm;
use posada_engine::{Msi, MsiSink};
use std::sync::Arc;

const SELF: u32 = 1 << 18;
const EVERYONE: u32 = 2 << 18;
const OTHERS: u32 = 3 << 18;

fn x2apic(core: &mut Core) {
    core.lapic_write_msr(IA32_APIC_BASE, 0xfee0_0c00).unwrap();
}

#[test]
fn the_page_shows_the_reset_values() {
    let mut core = Core::new(lone().ram.clone(), Arc::new(Ends::default()), Default::default());
    let expected = [
        (0x20, 0),
        (0x30, VERSION),
        (0x80, 0),
        (0xd0, 0),
        (0xe0, u32::MAX),
        (0xf0, 0xff),
        (0x280, 0),
        (0x320, MASKED),
        (0x370, MASKED),
        (0x380, 0),
        (0x3e0, 0),
    ];
    for (offset, value) in expected {
        assert_eq!(read(&mut core, offset), value, "{offset:#x}");
    }
    assert_eq!(core.lapic_read_msr(IA32_APIC_BASE), Ok(0xfee0_0900));
}

#[test]
fn accesses_that_are_not_of_a_register_are_harmless() {
    let mut core = lone();
    for length in [1, 2, 4, 8, 16, 64] {
        let mut data = vec![0xaa; length];
        core.physical_read(0xfee0_0030, &mut data);
        let expected: Vec<u8> = VERSION.to_le_bytes().into_iter().chain([0; 60]).take(length).collect();
        assert_eq!(data, expected);
    }
    core.physical_write(0xfee0_0080, &[0x55; 8]);
    core.physical_write(0xfee0_0084, &[0x55; 4]);
    core.physical_write(0xfee0_0080, &[0x55; 2]);
    assert_eq!(read(&mut core, 0x80), 0);
    for offset in 0..0x1000 {
        core.physical_write(0xfee0_0000 + offset, &[0x0f; 4]);
        core.physical_read(0xfee0_0000 + offset, &mut [0; 4]);
    }
}

#[test]
fn unknown_registers_are_an_error_that_interrupts() {
    let mut core = lone();
    write(&mut core, 0x370, 0xe0);
    assert_eq!(read(&mut core, 0x40), 0);
    assert_eq!((read(&mut core, 0x280), served(&mut core)), (0, Some(0xe0)));
    write(&mut core, 0x280, 0);
    assert_eq!(read(&mut core, 0x280), error::ILLEGAL_REGISTER);
    write(&mut core, 0xb0, 0);
    write(&mut core, 0x30, 5);
    write(&mut core, 0x280, 0);
    assert_eq!(read(&mut core, 0x280), 0, "a read-only register is no error");
}

#[test]
fn only_a_higher_class_interrupts_and_eoi_lets_the_next_come() {
    let mut core = lone();
    write(&mut core, 0x300, SELF | 0x51);
    assert_eq!(served(&mut core), Some(0x51));
    write(&mut core, 0x300, SELF | 0x5f);
    assert_eq!(served(&mut core), None, "the same class");
    write(&mut core, 0x300, SELF | 0x61);
    assert_eq!(served(&mut core), Some(0x61));
    assert_eq!(read(&mut core, 0xa0), 0x60);
    assert_eq!(
        (read(&mut core, 0x120), read(&mut core, 0x130), read(&mut core, 0x220)),
        (1 << 17, 1 << 1, 1 << 31)
    );
    write(&mut core, 0xb0, 0);
    assert_eq!(served(&mut core), None, "51h is still served");
    write(&mut core, 0xb0, 0);
    assert!(core.shared.pending(), "the end of an interrupt leads to the next");
    assert_eq!(served(&mut core), Some(0x5f));
    write(&mut core, 0xb0, 0);
    assert_eq!((read(&mut core, 0xa0), served(&mut core)), (0, None));
}

#[test]
fn the_task_priority_holds_interrupts_back() {
    let mut core = lone();
    core.set_cr8(5);
    assert_eq!((read(&mut core, 0x80), core.cr8()), (0x50, 5));
    write(&mut core, 0x300, SELF | 0x5f);
    assert_eq!(served(&mut core), None);
    core.set_cr8(4);
    assert!(core.shared.pending());
    assert_eq!(served(&mut core), Some(0x5f));
    write(&mut core, 0x80, 0x73);
    assert_eq!((read(&mut core, 0xa0), core.cr8()), (0x73, 7));
}

#[test]
fn only_the_end_of_a_level_reaches_the_machine() {
    let ends = Arc::new(Ends::default());
    let vm = Vm::with_cpus(1);
    let mut core = vcpu(&vm, 0, ends.clone());
    let signal = |data| {
        vm.signal_msi(Msi {
            address: 0xfee0_0000,
            data,
        });
    };
    for suppressed in [0, NO_EOI_BROADCAST] {
        write(&mut core, 0xf0, 0x1ff | suppressed);
        for data in [0x41, 0xc042, 0x42, 0xc041] {
            signal(data);
            assert_eq!(served(&mut core), Some(data as u8));
            assert_eq!(read(&mut core, 0x1a0) >> (data & 31) & 1, data >> 15);
            write(&mut core, 0xb0, 0);
        }
    }
    assert_eq!(*ends.0.lock().unwrap(), [0x42, 0x41]);
    write(&mut core, 0xb0, 0);
    assert_eq!(ends.0.lock().unwrap().len(), 2, "nothing was being served");
}

#[test]
fn switching_off_by_software_masks_and_drops_but_keeps_what_came_before() {
    let mut core = lone();
    write(&mut core, 0x350, 0x700);
    write(&mut core, 0x300, SELF | 0x41);
    write(&mut core, 0xf0, 0xff);
    assert_eq!(read(&mut core, 0x350), MASKED | 0x700);
    write(&mut core, 0x350, 0x700);
    assert_eq!(read(&mut core, 0x350), MASKED | 0x700, "the mask cannot be cleared");
    write(&mut core, 0x300, SELF | 0x43);
    assert_eq!(read(&mut core, 0x220), 1 << 1);
    assert_eq!(served(&mut core), Some(0x41));
    write(&mut core, 0xb0, 0);
    write(&mut core, 0xf0, 0x1ff);
    assert_eq!(served(&mut core), None);
}

#[test]
fn illegal_vectors_are_errors_of_the_sender_or_the_receiver() {
    let vm = Vm::with_cpus(1);
    let mut core = vcpu(&vm, 0, Arc::new(Ends::default()));
    write(&mut core, 0x300, SELF | 0xf);
    vm.signal_msi(Msi {
        address: 0xfee0_0000,
        data: 0,
    });
    assert_eq!(served(&mut core), None);
    write(&mut core, 0x280, 0);
    let both = error::SEND_ILLEGAL_VECTOR | error::RECEIVE_ILLEGAL_VECTOR;
    assert_eq!(read(&mut core, 0x280), both);
}

#[test]
fn interrupt_commands_reach_whom_they_name() {
    let vm = Vm::with_cpus(4);
    let mut cores: Vec<Box<Core>> = (0..4)
        .map(|index| vcpu(&vm, index, Arc::new(Ends::default())))
        .collect();
    for (index, core) in cores.iter_mut().enumerate() {
        write(core, 0xd0, 1 << (24 + index));
    }
    let mut check = |high: u32, low: u32, expected: u32| {
        write(&mut cores[1], 0x310, high);
        write(&mut cores[1], 0x300, low);
        let mut seen = 0;
        for (index, core) in cores.iter_mut().enumerate() {
            if let Some(vector) = served(core) {
                assert_eq!(vector, low as u8);
                write(core, 0xb0, 0);
                seen |= 1 << index;
            }
        }
        assert_eq!(seen, expected, "{high:#x} {low:#x}");
    };
    check(2 << 24, 0x40, 0b0100);
    check(0xff << 24, 0x41, 0b1111);
    check(9 << 24, 0x42, 0);
    check(0b1010 << 24, 1 << 11 | 0x43, 0b1010);
    check(0, SELF | 0x44, 0b0010);
    check(0, EVERYONE | 0x45, 0b1111);
    check(0, OTHERS | 0x46, 0b1101);
    check(2 << 24, 2 << 8 | 0x47, 0);
    check(2 << 24, 3 << 8 | 0x47, 0);
    check(2 << 24, 4 << 8 | 2, 0b0100);
}

#[test]
fn x2apic_has_msrs_and_no_page() {
    let mut core = vcpu(&Vm::with_cpus(4), 3, Arc::new(Ends::default()));
    assert!(core.lapic_read_msr(0x802).is_err(), "not in xAPIC mode");
    core.set_cr8(1);
    x2apic(&mut core);
    assert_eq!(read(&mut core, 0x30), u32::MAX);
    assert_eq!(core.lapic_read_msr(0x802), Ok(3));
    assert_eq!(core.lapic_read_msr(0x80d), Ok(8));
    assert_eq!(
        (core.lapic_read_msr(0x808), core.lapic_read_msr(0x80f)),
        (Ok(0x10), Ok(0x1ff)),
        "state is kept"
    );
    assert_eq!(core.lapic_write_msr(0x83f, 0x51), Ok(()));
    assert_eq!(served(&mut core), Some(0x51));
    assert_eq!(core.lapic_write_msr(0x80b, 0), Ok(()));
    assert_eq!(core.lapic_write_msr(0x830, 3 << 32 | 0x52), Ok(()));
    assert_eq!(core.lapic_read_msr(0x830), Ok(3 << 32 | 0x52));
    assert_eq!(served(&mut core), Some(0x52));
}

#[test]
fn x2apic_refuses_what_the_manual_reserves() {
    let mut core = lone();
    x2apic(&mut core);
    let readable = |msr: u32| matches!(msr, 2 | 3 | 8 | 0xa | 0xd | 0xf | 0x10..=0x28 | 0x30 | 0x32..=0x39 | 0x3e);
    let takes_zero = |msr: u32| matches!(msr, 8 | 0xb | 0xf | 0x28 | 0x30 | 0x32..=0x38 | 0x3e | 0x3f);
    for number in 0..0x100 {
        let msr = 0x800 + number;
        assert_eq!(core.lapic_read_msr(msr).is_ok(), readable(number), "read {msr:#x}");
        assert_eq!(
            core.lapic_write_msr(msr, 0).is_ok(),
            takes_zero(number),
            "write {msr:#x}"
        );
        let wide = core.lapic_write_msr(msr, 1 << 32);
        assert_eq!(wide.is_ok(), number == 0x30, "64 bits to {msr:#x}");
    }
    for (msr, value) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 1 << 13),
        (0x828, 1),
        (0x830, 1 << 20),
        (0x832, 1 << 8),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert!(core.lapic_write_msr(msr, value).is_err(), "{value:#x} to {msr:#x}");
    }
}

#[test]
fn the_mode_changes_only_along_the_manuals_arrows() {
    let (off, xapic, invalid, both) = (0, ENABLE, X2APIC, ENABLE | X2APIC);
    let allowed = [
        (off, off),
        (off, xapic),
        (xapic, xapic),
        (xapic, off),
        (xapic, both),
        (both, both),
        (both, off),
    ];
    for from in [off, xapic, both] {
        for to in [off, xapic, invalid, both] {
            let mut core = lone();
            if from != xapic {
                core.lapic_write_msr(IA32_APIC_BASE, 0xfee0_0000 | from).unwrap();
            }
            let result = core.lapic_write_msr(IA32_APIC_BASE, 0xfee0_0000 | to);
            assert_eq!(result.is_ok(), allowed.contains(&(from, to)), "{from:#x} to {to:#x}");
            let now = if result.is_ok() { to } else { from };
            assert_eq!(core.lapic_read_msr(IA32_APIC_BASE), Ok(0xfee0_0000 | BSP | now));
        }
    }
    let mut core = lone();
    assert!(core.lapic_write_msr(IA32_APIC_BASE, 0xfee0_0801).is_err());
    assert!(core.lapic_write_msr(IA32_APIC_BASE, 1 << 46 | 0x800).is_err());
}

#[test]
fn a_disabled_apic_forgets_its_state_and_a_moved_page_answers_there() {
    let mut core = lone();
    write(&mut core, 0x80, 0x20);
    core.lapic_write_msr(IA32_APIC_BASE, 0xfee0_0000).unwrap();
    assert_eq!(read(&mut core, 0x80), u32::MAX);
    core.lapic_write_msr(IA32_APIC_BASE, 0xfed0_0800).unwrap();
    assert_eq!(read(&mut core, 0x80), u32::MAX);
    let mut data = [0; 4];
    core.physical_read(0xfed0_00f0, &mut data);
    assert_eq!(data, [0xff, 0, 0, 0]);
}

#[test]
fn the_tsc_deadline_follows_the_guests_counter() {
    let mut core = lone();
    assert_eq!(core.lapic_write_msr(IA32_TSC_DEADLINE, 77), Ok(()));
    assert_eq!(core.lapic_read_msr(IA32_TSC_DEADLINE), Ok(0), "not in this mode");
    write(&mut core, 0x320, 2 << 17 | 0xec);
    let far = core.guest_tsc() + (1 << 50);
    core.lapic_write_msr(IA32_TSC_DEADLINE, far).unwrap();
    assert_eq!(
        (core.lapic_read_msr(IA32_TSC_DEADLINE), served(&mut core)),
        (Ok(far), None)
    );
    core.set_guest_tsc(far);
    assert_eq!(served(&mut core), Some(0xec), "the counter jumped to the deadline");
    assert_eq!(core.lapic_read_msr(IA32_TSC_DEADLINE), Ok(0));
    write(&mut core, 0xb0, 0);
    core.lapic_write_msr(IA32_TSC_DEADLINE, 1).unwrap();
    assert!(core.shared.pending(), "a deadline in the past");
    idle(&mut core);
    assert_eq!(served(&mut core), Some(0xec));
}

#[test]
fn a_masked_timer_counts_without_interrupting() {
    let mut core = lone();
    write(&mut core, 0x3e0, 0xb);
    write(&mut core, 0x320, MASKED | 0xec);
    write(&mut core, 0x380, 1);
    while read(&mut core, 0x390) != 0 {}
    write(&mut core, 0x320, 0xec);
    assert_eq!(served(&mut core), None);
    write(&mut core, 0x380, u32::MAX);
    assert_ne!(read(&mut core, 0x390), 0);
    assert_eq!((read(&mut core, 0x380), served(&mut core)), (u32::MAX, None));
}
