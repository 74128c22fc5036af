//! A guest that moves between processors while it computes.

use super::*;
use crate::Emulator;
use posada_engine::cpu::CpuModel;
use posada_engine::{Engine, Exit, Vcpu};
use posada_memory::GuestRam;

const ROUNDS: u32 = 3_000_000;

/// mov ecx, ROUNDS; mov eax, 1;
/// round: mov edx, eax; shl edx, 5; xor eax, edx; add eax, ecx; mov [rbx], eax; add eax, [rbx]; movd xmm3, eax;
/// paddd xmm4, xmm3; dec ecx; jnz round; movd esi, xmm4; hlt
fn code() -> Vec<u8> {
    let mut code = vec![0xb9];
    code.extend(ROUNDS.to_le_bytes());
    code.extend([0xb8, 1, 0, 0, 0]);
    code.extend([
        0x89, 0xc2, 0xc1, 0xe2, 5, 0x31, 0xd0, 0x01, 0xc8, 0x89, 0x03, 0x03, 0x03,
    ]);
    code.extend([0x66, 0x0f, 0x6e, 0xd8, 0x66, 0x0f, 0xfe, 0xe3, 0xff, 0xc9, 0x75, 0xe7]);
    code.extend([0x66, 0x0f, 0x7e, 0xe6, 0xf4]);
    code
}

fn expected() -> (u32, u32) {
    let (mut value, mut sum) = (1u32, 0u32);
    for count in (1..=ROUNDS).rev() {
        value ^= value << 5;
        value = value.wrapping_add(count);
        value = value.wrapping_add(value);
        sum = sum.wrapping_add(value);
    }
    (value, sum)
}

fn processor_over(ram: &Arc<GuestRam>) -> Box<dyn Vcpu> {
    let model = CpuModel::new(&Emulator::offer(), 1, None).unwrap();
    let emulator = Emulator::new(Arc::clone(ram), &model).unwrap();
    emulator.create_vcpu(0, Arc::new(Ends::default())).unwrap()
}

#[test]
fn a_checksum_chain_survives_many_moves() {
    let mut first = crate::mmu::tests::core();
    first.physical_write(0x8000, &code());
    first.cr[4] |= 1 << 9;
    first.regs[gpr::RBX] = 0x1010;
    first.segments[seg::CS].limit = u32::MAX;
    let ram = Arc::clone(&first.ram);
    let mut state = first.state();
    (state.rip, state.tsc_offset) = (0, Some(0));
    let mut moves = 0;
    let mut tsc = 0;
    while state.activity == Activity::Running {
        let mut processor = processor_over(&ram);
        processor.set_state(&state).unwrap();
        let kick = processor.kicker();
        let delay = Duration::from_micros(500 + moves * 97 % 1500);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(delay);
                kick.kick();
            });
            assert_eq!(processor.run(), Exit::Kicked);
        });
        state = processor.state().unwrap();
        assert_eq!(state.tsc_offset, Some(0));
        let now = clock::host_tsc();
        assert!(now > tsc);
        tsc = now;
        moves += 1;
    }
    assert!(moves > 10, "{moves} moves");
    let (value, sum) = expected();
    assert_eq!((state.gprs[gpr::RAX], state.gprs[6]), (value.into(), sum.into()));
}
