//! Guest code in 64-bit mode: the translator does what the interpreter does, block by block, whatever the bytes are.
//!
//! The first byte chooses the privilege level, the bytes after it are code at 0x1000 and registers too, most of which point
//! into RAM. There are no handlers: the first exception shuts the processor down.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_engine::{CpuState, Kick, NoDevices};
use posada_memory::GuestRam;
use posada_x86::core::Core;
use posada_x86::translate::check::Checker;
use posada_x86::translate::Translator;
use std::sync::{Arc, OnceLock};

const CODE: u64 = 0x1000;
const SIZE: usize = 1 << 20;

fuzz_target!(|input: &[u8]| {
    static RAM: OnceLock<Arc<GuestRam>> = OnceLock::new();
    let Some((&mode, rest)) = input.split_first() else {
        return;
    };
    let code = &rest[..rest.len().min(4096)];
    let ram = RAM.get_or_init(|| Arc::new(GuestRam::new(SIZE as u64).expect("address space for guest RAM")));
    let host = ram.host(0, SIZE).expect("all of RAM");
    // SAFETY: all of guest RAM, which nobody else uses now; the tables are aligned words of it.
    unsafe {
        host.write_bytes(0, SIZE);
        host.add(CODE as usize).copy_from_nonoverlapping(code.as_ptr(), code.len());
        // One 1 GiB page at 0.
        host.add(0x8000).cast::<u64>().write(0x9007);
        host.add(0x9000).cast::<u64>().write(0x87);
    }
    ram.code().written(0, SIZE as u64);

    let mut core = Core::new(ram.clone(), Arc::new(NoDevices), Arc::default());
    let mut state = CpuState::reset();
    state.rip = CODE;
    let byte = |at: usize| u64::from(code.get(at).copied().unwrap_or(0));
    state.gprs = std::array::from_fn(|at| 0x1_0000 + (byte(at) << (at & 7)));
    (state.cr3, state.cr4, state.efer, state.cr0) = (0x8000, 0x4_0620, 0xd01, 0x8005_0033);
    let user = if mode & 1 == 1 { 0x60 } else { 0 };
    let flat = |access| posada_engine::Segment { selector: 8, base: 0, limit: u32::MAX, access };
    state.segments = [flat(0xc093 | user); 6];
    state.segments[1] = flat(0xa09b | user);
    core.set_state(&state);
    core.translator = Some(Box::new(Translator::new(0).expect("memory for code").at_once().checked()));
    core.checker = Some(Box::new(Checker::new(&core)));
    core.turns = Some(Arc::default());
    for _ in 0..200 {
        // An event is always due, so that no loop of the guest's lasts.
        core.shared.mailbox().kick();
        core.activate_translator();
        core.step_translated();
        assert_eq!(core.failure, None);
        if core.halted || core.shut_down {
            break;
        }
    }
});
