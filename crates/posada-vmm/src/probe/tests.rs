use super::*;
use posada_engine::cpu::CpuModel;
use posada_engine::{Engine, Error};
use posada_memory::GuestRam;
use std::sync::Arc;
use std::time::Duration;

fn emulator(ram: Arc<GuestRam>) -> Result<Arc<dyn Engine>, Error> {
    let model = CpuModel::new(&posada_x86::Emulator::offer(), 1, None).unwrap();
    Ok(Arc::new(posada_x86::Emulator::new(ram, &model)?))
}

#[test]
fn the_emulator_runs_the_program_to_its_end_with_the_right_results() {
    let outcome = run(emulator, Duration::from_secs(60));
    println!("{outcome:?} {}", outcome.total());
    assert_eq!(outcome.end, End::Finished);
    let phases: Vec<Phase> = outcome.phases.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ALL);
    assert!(outcome.phases.iter().all(|(_, seconds)| *seconds > 0.0));
}
