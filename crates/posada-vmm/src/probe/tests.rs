use super::*;
use crate::testing::{FakeEngine, Step};
use posada_engine::cpu::CpuModel;
use posada_engine::{Engine, Error, Exit, Machine};
use posada_memory::GuestRam;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Long enough for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where the program begins.
const BEGIN: u64 = program::BASE as u64;

fn emulator(ram: Arc<GuestRam>) -> Result<Arc<dyn Engine>, Error> {
    let model = CpuModel::new(&posada_x86::Emulator::offer(), 1, None).unwrap();
    Ok(Arc::new(posada_x86::Emulator::new(ram, &model)?))
}

/// An engine whose processor does what `program` says, which is told how many instructions it has run.
fn fake(program: fn(u64, &dyn Machine) -> Step) -> impl Make {
    move |_: Arc<GuestRam>| {
        let program = Arc::new(move |_, rip: u64, machine: &dyn Machine| program(rip - BEGIN, machine));
        Ok(Arc::new(FakeEngine::new(program)) as Arc<dyn Engine>)
    }
}

fn out(machine: &dyn Machine, port: u16, value: u32) {
    machine.port_write(port, &value.to_le_bytes());
}

/// One instruction for each phase, with the right result, and then the end.
fn perfect(index: u64, machine: &dyn Machine) -> Step {
    match Phase::of(index as u32) {
        Some(phase) => {
            out(machine, program::MARK, index as u32);
            out(machine, program::RESULT, phase.expected());
            Step::Next
        }
        None => {
            out(machine, program::MARK, program::DONE);
            Step::Halt
        }
    }
}

#[test]
fn the_emulator_runs_the_program_to_its_end_with_the_right_results() {
    let outcome = run(emulator, PATIENCE);
    assert_eq!(outcome.end, End::Finished);
    let phases: Vec<Phase> = outcome.phases.iter().map(|(phase, _)| *phase).collect();
    assert_eq!(phases, Phase::ALL);
    assert!(outcome.phases.iter().all(|(_, seconds)| *seconds > 0.0));
    let wait = f64::from(Phase::Timer.wait() * Phase::Timer.repeats()) * 1e-9;
    assert!(outcome.phases[6].1 >= wait, "the timer is early: {outcome:?}");
}

#[test]
fn all_phases_with_their_results_and_the_mark_of_the_end_make_a_finished_run() {
    let outcome = run(fake(perfect), PATIENCE);
    assert_eq!((outcome.end, outcome.phases.len()), (End::Finished, Phase::ALL.len()));
}

#[test]
fn an_engine_that_computes_wrongly_is_found_out_in_that_phase() {
    let outcome = run(
        fake(|index, machine| match index {
            2 => {
                out(machine, program::MARK, 2);
                out(machine, program::RESULT, Phase::PageFaults.expected() ^ 1);
                Step::Next
            }
            _ => perfect(index, machine),
        }),
        PATIENCE,
    );
    assert_eq!((outcome.end, outcome.phases.len()), (End::Wrong(Phase::PageFaults), 2));
}

#[test]
fn a_run_that_leaves_phases_out_or_swaps_them_is_wrong() {
    let early = run(
        fake(|_, machine| {
            out(machine, program::MARK, program::DONE);
            Step::Halt
        }),
        PATIENCE,
    );
    assert_eq!(early.end, End::Wrong(Phase::Start));
    let swapped = run(fake(|index, machine| perfect(index ^ 1, machine)), PATIENCE);
    assert_eq!(swapped.end, End::Wrong(Phase::Start));
    let resultless = run(
        fake(|_, machine| {
            out(machine, program::RESULT, Phase::Start.expected());
            Step::Halt
        }),
        PATIENCE,
    );
    assert_eq!(resultless.end, End::Wrong(Phase::Start));
}

#[test]
fn an_engine_that_crawls_or_sleeps_is_stopped_at_the_limit() {
    // Long enough for three phases that do nothing, on a busy machine too.
    const LIMIT: Duration = Duration::from_secs(1);
    for program in [
        (|index, machine| {
            if index < 3 {
                perfect(index, machine)
            } else {
                Step::Jump(BEGIN + 3)
            }
        }) as fn(u64, &dyn Machine) -> Step,
        |index, machine| {
            if index < 3 { perfect(index, machine) } else { Step::Halt }
        },
    ] {
        let outcome = run(fake(program), LIMIT);
        assert_eq!(
            (outcome.end, outcome.phases.len()),
            (End::Late(Phase::SystemCalls, LIMIT.as_secs_f64()), 3)
        );
    }
}

#[test]
fn an_engine_that_does_not_even_stop_is_left_behind() {
    let begin = Instant::now();
    let outcome = run(
        fake(|_, _| {
            loop {
                std::thread::park();
            }
        }),
        Duration::from_millis(20),
    );
    assert_eq!(outcome.end, End::Stuck(Phase::Start));
    assert!(begin.elapsed() < PATIENCE);
}

#[test]
fn an_engine_that_gives_up_or_dies_or_cannot_be_made_says_why() {
    let failed = run(fake(|_, _| Step::Exit(Exit::Failed("internal error".into()))), PATIENCE);
    assert_eq!(failed.end, End::Failed(Phase::Start, "internal error".into()));
    let crashed = run(fake(|_, _| Step::Exit(Exit::TripleFault("dump".into()))), PATIENCE);
    assert!(matches!(crashed.end, End::Failed(Phase::Start, why) if why.contains("triple fault")));
    let died = run(
        fake(|_, _| panic!("the engine under test has died, as it should")),
        PATIENCE,
    );
    assert!(matches!(died.end, End::Failed(Phase::Start, why) if why.contains("died")));
    let refused = run(|_: Arc<GuestRam>| Err(Error::Host("no such thing".into())), PATIENCE);
    assert!(matches!(refused.end, End::Refused(why) if why.contains("no such thing")));
}

#[test]
fn of_several_runs_the_best_times_count_and_one_bad_run_spoils_all() {
    static RUNS: AtomicU32 = AtomicU32::new(0);
    // A second that is slow, and a third that is not.
    let uneven = fake(|index, machine| {
        if index == 0 && RUNS.fetch_add(1, Ordering::Relaxed) == 1 {
            out(machine, program::MARK, 0);
            std::thread::sleep(Duration::from_millis(50));
            out(machine, program::RESULT, Phase::Start.expected());
            return Step::Next;
        }
        perfect(index, machine)
    });
    let (one, other) = run::compare_while(PATIENCE, uneven, fake(perfect));
    assert_eq!((one.end, other.end), (End::Finished, End::Finished));
    assert!(RUNS.load(Ordering::Relaxed) > 2 && one.phases[0].1 < 0.05);

    static MORE_RUNS: AtomicU32 = AtomicU32::new(0);
    let (one, other) = run::compare_while(
        PATIENCE,
        fake(perfect),
        fake(|index, machine| {
            if index == 0 && MORE_RUNS.fetch_add(1, Ordering::Relaxed) == 1 {
                return Step::Exit(Exit::Failed("now and then".into()));
            }
            perfect(index, machine)
        }),
    );
    assert_eq!(one.end, End::Finished);
    assert_eq!(other.end, End::Failed(Phase::Start, "now and then".into()));
    assert_eq!(MORE_RUNS.load(Ordering::Relaxed), 2);
}
