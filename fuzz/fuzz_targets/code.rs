//! Guest code: whatever the bytes are, the software CPU runs them without a fault or panic of its own.
//!
//! The first bytes choose the mode and the registers, the rest is code at 0x1000. There are no page tables and no
//! handlers: the first exception that nobody handles shuts the processor down.
#![no_main]

use libfuzzer_sys::fuzz_target;
use posada_engine::{CpuState, NoDevices};
use posada_memory::GuestRam;
use posada_x86::core::Core;
use std::sync::{Arc, OnceLock};

const CODE: u64 = 0x1000;

fuzz_target!(|input: &[u8]| {
    static RAM: OnceLock<Arc<GuestRam>> = OnceLock::new();
    let Some((&mode, rest)) = input.split_first() else {
        return;
    };
    let code = &rest[..rest.len().min(4096)];
    let ram = RAM.get_or_init(|| Arc::new(GuestRam::new(1 << 20).expect("address space for guest RAM")));
    let host = ram.host(0, 1 << 20).expect("all of RAM");
    // SAFETY: all of guest RAM, which nobody else uses now.
    unsafe {
        host.write_bytes(0, 1 << 20);
        host.add(CODE as usize).copy_from_nonoverlapping(code.as_ptr(), code.len());
    }
    ram.code().written(0, 1 << 20);

    let mut core = Core::new(ram.clone(), Arc::new(NoDevices), Arc::default());
    let mut state = CpuState::reset();
    state.rip = CODE;
    let bytes: [u8; 16] = std::array::from_fn(|at| code.get(at).copied().unwrap_or(0));
    state.gprs = bytes.map(|byte| u64::from(byte) << (byte & 15));
    let flat = |access| posada_engine::Segment { selector: 8, base: 0, limit: u32::MAX, access };
    match mode & 3 {
        0 => {
            state.segments[1].base = 0;
            state.segments[1].selector = 0;
        }
        1 => {
            state.cr0 = 0x11;
            state.segments = [flat(0xc093); 6];
            state.segments[1] = flat(0xc09b);
        }
        // 64-bit mode: one 1 GiB page at 0, tables at 0x8000.
        _ => {
            // SAFETY: aligned words inside guest RAM.
            unsafe {
                host.add(0x8000).cast::<u64>().write(0x9007);
                host.add(0x9000).cast::<u64>().write(0x87);
            }
            state.cr3 = 0x8000;
            state.cr4 = 0x4_0620;
            state.efer = 0xd01;
            state.cr0 = 0x8005_0033;
            let user = if mode & 3 == 3 { 0x60 } else { 0 };
            state.segments = [flat(0xc093 | user); 6];
            state.segments[1] = flat(0xa09b | user);
        }
    }
    core.set_state(&state);
    for _ in 0..200 {
        if core.step().is_err() {
            let raised = core.raised;
            core.deliver(raised);
        }
        if core.halted || core.shut_down {
            break;
        }
    }
});
