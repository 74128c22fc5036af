//! General, segment and control registers.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use posada_engine::{CpuState, DescriptorTable, Segment};

/// P in the access rights.
const PRESENT: u16 = 1 << 7;

/// Fills in the registers.
pub(super) fn to_portable(regs: &kvm_regs, system: &kvm_sregs, state: &mut CpuState) {
    state.gprs = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9, regs.r10,
        regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    state.rip = regs.rip;
    state.rflags = regs.rflags;
    state.segments = [&system.es, &system.cs, &system.ss, &system.ds, &system.fs, &system.gs].map(segment);
    state.ldtr = segment(&system.ldt);
    state.tr = segment(&system.tr);
    state.gdtr = table(&system.gdt);
    state.idtr = table(&system.idt);
    state.cr0 = system.cr0;
    state.cr2 = system.cr2;
    state.cr3 = system.cr3;
    state.cr4 = system.cr4;
    state.efer = system.efer;
    state.apic_base = system.apic_base;
}

/// General registers for KVM.
pub(super) fn from_portable(state: &CpuState) -> kvm_regs {
    let [
        rax,
        rcx,
        rdx,
        rbx,
        rsp,
        rbp,
        rsi,
        rdi,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
    ] = state.gprs;
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: state.rip,
        rflags: state.rflags,
    }
}

/// The others for KVM, with the task priority that the local APIC has.
pub(super) fn system_from_portable(state: &CpuState, priority: u64) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(kvm);
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: kvm(&state.tr),
        ldt: kvm(&state.ldtr),
        gdt: kvm_table(state.gdtr),
        idt: kvm_table(state.idtr),
        cr0: state.cr0,
        cr2: state.cr2,
        cr3: state.cr3,
        cr4: state.cr4,
        cr8: priority,
        efer: state.efer,
        apic_base: state.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

fn segment(from: &kvm_segment) -> Segment {
    let flag = |value: u8, bit: u32| u16::from(value & 1) << bit;
    let access = u16::from(from.type_ & 0xf)
        | flag(from.s, 4)
        | u16::from(from.dpl & 3) << 5
        | flag(from.present, 7)
        | flag(from.avl, 12)
        | flag(from.l, 13)
        | flag(from.db, 14)
        | flag(from.g, 15);
    Segment {
        selector: from.selector,
        base: from.base,
        limit: from.limit,
        access: if from.unusable != 0 { access & !PRESENT } else { access },
    }
}

fn kvm(from: &Segment) -> kvm_segment {
    let flag = |bit: u32| (from.access >> bit & 1) as u8;
    kvm_segment {
        base: from.base,
        limit: from.limit,
        selector: from.selector,
        type_: (from.access & 0xf) as u8,
        present: flag(7),
        dpl: (from.access >> 5 & 3) as u8,
        db: flag(14),
        s: flag(4),
        l: flag(13),
        g: flag(15),
        avl: flag(12),
        unusable: flag(7) ^ 1,
        padding: 0,
    }
}

fn table(from: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: from.base,
        limit: from.limit,
    }
}

fn kvm_table(from: DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: from.base,
        limit: from.limit,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_come_back_as_they_went() {
        let mut state = CpuState::reset();
        state.gprs = std::array::from_fn(|index| index as u64 + 100);
        (state.cr2, state.cr3, state.cr4, state.efer) = (1, 2, 3, 4);
        for (number, segment) in state.segments.iter_mut().enumerate() {
            segment.selector = number as u16 * 8;
            segment.access = 0xf0f3 & !(1 << number) | (number as u16 & 3) << 5;
        }
        state.gdtr.base = 77;
        let (regs, system) = (from_portable(&state), system_from_portable(&state, 5));
        assert_eq!(
            (regs.rax, regs.rbx, regs.rsp, regs.r15, system.cr8),
            (100, 103, 104, 115, 5)
        );
        let mut back = CpuState::reset();
        to_portable(&regs, &system, &mut back);
        assert_eq!(back, state);
    }

    #[test]
    fn an_unusable_segment_is_not_present() {
        let unusable = kvm_segment {
            present: 1,
            unusable: 1,
            ..Default::default()
        };
        assert_eq!(segment(&unusable).access & PRESENT, 0);
        assert_eq!(kvm(&Segment::default()).unusable, 1);
    }
}
