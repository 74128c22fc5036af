//! Processors in real mode whose interrupt handlers lie at 0:vector, for the tests here.

use super::Lapic;
use crate::core::{Core, flag, gpr};
use crate::shared::Vm;
use posada_engine::Machine;
use posada_memory::GuestRam;
use std::sync::{Arc, Mutex};

/// A machine that remembers the ends of interrupts.
#[derive(Default)]
pub(crate) struct Ends(pub Mutex<Vec<u8>>);

impl Machine for Ends {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, vector: u8) {
        self.0.lock().unwrap().push(vector);
    }
}

/// RIP while no handler runs.
pub(crate) const IDLE: u64 = 0x7000;

/// vCPU `index` of `vm`, inside `run`, with interrupts and the local APIC switched on.
pub(crate) fn vcpu(vm: &Arc<Vm>, index: u32, machine: Arc<dyn Machine>) -> Box<Core> {
    vcpu_on(Arc::new(GuestRam::new(1 << 20).unwrap()), vm, index, machine)
}

/// The same with this RAM.
pub(crate) fn vcpu_on(ram: Arc<GuestRam>, vm: &Arc<Vm>, index: u32, machine: Arc<dyn Machine>) -> Box<Core> {
    let mut core = Core::new(ram, machine, Arc::new(vm.shared(index)));
    for vector in 0..=255u8 {
        core.physical_write(u64::from(vector) * 4, &[vector, 0, 0, 0]);
    }
    core.idtr.limit = 0x3ff;
    core.shared.mailbox().enter();
    core.regs[gpr::RSP] = 0x8000;
    idle(&mut core);
    write(&mut core, 0xf0, 0x1ff);
    core
}

/// The only vCPU of a VM.
pub(crate) fn lone() -> Box<Core> {
    vcpu(&Vm::with_cpus(1), 0, Arc::new(Ends::default()))
}

/// Back to where interrupts are open and no handler runs.
pub(crate) fn idle(core: &mut Core) {
    core.set_rip(IDLE);
    core.regs[gpr::RSP] = 0x8000;
    core.system_flags |= flag::IF;
}

/// The vector whose handler `service` went to, if any.
pub(crate) fn served(core: &mut Core) -> Option<u8> {
    assert_eq!(core.service(), None);
    let rip = core.rip();
    idle(core);
    (rip != IDLE).then_some(rip as u8)
}

/// A load from the xAPIC page.
pub(crate) fn read(core: &mut Core, offset: u64) -> u32 {
    let mut data = [0; 4];
    core.physical_read(0xfee0_0000 + offset, &mut data);
    u32::from_le_bytes(data)
}

/// A store to the xAPIC page.
pub(crate) fn write(core: &mut Core, offset: u64, value: u32) {
    core.physical_write(0xfee0_0000 + offset, &value.to_le_bytes());
}

/// All that a guest can change of a local APIC, by name, as of its last portable state.
pub(crate) fn pieces(lapic: &Lapic) -> Vec<(&'static str, String)> {
    // Whole, so that no field is forgotten.
    let Lapic {
        base,
        tpr,
        svr,
        ldr,
        dfr,
        esr,
        errors,
        icr,
        lvt,
        irr,
        isr,
        tmr,
        timer,
        due,
        alarm: _,
        shown,
        nmi_pending,
        nmi_blocked,
        waiting_for_startup,
    } = lapic;
    let mut pieces = vec![
        ("base", format!("{base:x}")),
        ("TPR", format!("{tpr:x}")),
        ("SVR", format!("{svr:x}")),
        ("LDR", format!("{ldr:x}")),
        ("DFR", format!("{dfr:x}")),
        ("ESR", format!("{esr:x}")),
        ("errors", format!("{errors:x}")),
        ("ICR", format!("{icr:x}")),
        ("IRR", format!("{irr:x?}")),
        ("ISR", format!("{isr:x?}")),
        ("TMR", format!("{tmr:x?}")),
        ("due", due.to_string()),
        ("NMI pending", nmi_pending.to_string()),
        ("NMI blocked", nmi_blocked.to_string()),
        ("waiting for startup", waiting_for_startup.to_string()),
    ];
    let names = [
        "LVT timer",
        "LVT thermal",
        "LVT performance",
        "LVT LINT0",
        "LVT LINT1",
        "LVT error",
    ];
    pieces.extend(names.into_iter().zip(lvt.map(|entry| format!("{entry:x}"))));
    pieces.extend(timer.pieces(*shown));
    pieces
}

impl Lapic {
    /// Brings the highest vector of the IRR into service.
    pub(crate) fn acknowledge_for_tests(&mut self) {
        self.acknowledge();
    }
}
