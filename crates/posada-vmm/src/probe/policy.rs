//! Which engine is better: outcomes in, decision out.
//!
//! An engine that does not run the program properly is out. Between two that do, the weights are those of a real boot: how
//! often Linux does on its way to a shell what each phase does, times what it cost in the probe, is about the processor time
//! that the boot will take.

use super::program::Phase;
use super::run::{End, Outcome};
use serde::{Deserialize, Serialize};

/// An engine that can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Choice {
    /// The host's KVM.
    Kvm,
    /// The software CPU.
    Emulation,
}

/// A choice with its reason.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// The better engine.
    pub choice: Choice,
    /// Why, in a sentence without its full stop.
    pub reason: String,
    /// How the program went on KVM.
    pub kvm: Outcome,
    /// How it went on the software CPU.
    pub emulator: Outcome,
}

/// What Debian 12 with one vCPU does from its start to a shell, counted in the guest (`/proc/vmstat`, `/proc/stat`,
/// `/proc/interrupts`), by the emulator (instructions) and by the machine (accesses); system calls are an estimate.
const BOOT: [(Phase, f64); 6] = [
    (Phase::Compute, 3.3e9),
    (Phase::PageFaults, 27_000.0),
    (Phase::SystemCalls, 200_000.0),
    (Phase::AddressSpaces, 12_000.0),
    (Phase::Devices, 5_000.0),
    (Phase::Timer, 4_000.0),
];

/// Decides.
pub fn decide(kvm: Outcome, emulator: Outcome) -> Decision {
    let (choice, reason) = match (&kvm.end, &emulator.end) {
        (End::Finished, End::Finished) => faster(&kvm, &emulator),
        (End::Finished, failed) => (
            Choice::Kvm,
            format!("KVM runs the probe program and the software CPU does not: {failed}"),
        ),
        (failed, _) => (
            Choice::Emulation,
            format!("KVM does not run the probe program: {failed}"),
        ),
    };
    Decision {
        choice,
        reason,
        kvm,
        emulator,
    }
}

/// Decides between two that have finished.
fn faster(kvm: &Outcome, emulator: &Outcome) -> (Choice, String) {
    let cost = |outcome, phase| unit_seconds(outcome, phase).unwrap_or(0.0);
    let boots = (boot_seconds(kvm), boot_seconds(emulator));
    let better = if boots.0 < boots.1 {
        Choice::Kvm
    } else {
        Choice::Emulation
    };
    // The phase that speaks loudest for the better one.
    let difference = |&(phase, count): &(Phase, f64)| {
        let difference = count * (cost(emulator, phase) - cost(kvm, phase));
        if better == Choice::Kvm { difference } else { -difference }
    };
    let (loudest, _) = BOOT
        .into_iter()
        .max_by(|one, other| difference(one).total_cmp(&difference(other)))
        .expect("a boot does something");
    let reason = format!(
        "by the probe program's times Linux starts with {} of processor time on KVM and {} on the software CPU; {} counts \
         most, {} against {}",
        time(boots.0),
        time(boots.1),
        loudest.one(),
        time(cost(kvm, loudest)),
        time(cost(emulator, loudest)),
    );
    (better, reason)
}

/// Seconds of processor time that a boot of Linux takes on an engine on which the program has finished like that.
pub fn boot_seconds(outcome: &Outcome) -> f64 {
    BOOT.into_iter()
        .filter_map(|(phase, count)| Some(count * unit_seconds(outcome, phase)?))
        .sum()
}

/// Seconds that one repetition of what `phase` does has cost, waiting excepted, if it was completed.
pub fn unit_seconds(outcome: &Outcome, phase: Phase) -> Option<f64> {
    let (_, seconds) = outcome.phases.iter().find(|(done, _)| *done == phase)?;
    Some((seconds / f64::from(phase.repeats()) - f64::from(phase.wait()) * 1e-9).max(0.0))
}

/// A time for people, with its unit and two digits.
pub fn time(seconds: f64) -> String {
    let (value, unit) = [(1.0, "s"), (1e-3, "ms"), (1e-6, "µs")]
        .into_iter()
        .find(|(unit, _)| seconds >= 0.995 * unit)
        .map_or((seconds * 1e9, "ns"), |(unit, name)| (seconds / unit, name));
    if value < 9.95 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All phases with `factor` times the emulator's usual cost.
    fn finished(factor: f64) -> Outcome {
        let cost = |phase: Phase| match phase {
            Phase::Compute => 2e-9,
            Phase::Timer => 30e-6,
            _ => 0.5e-6,
        };
        Outcome {
            phases: Phase::ALL
                .map(|phase| (phase, factor * cost(phase) * f64::from(phase.repeats())))
                .into(),
            end: End::Finished,
        }
    }

    fn ended(end: End) -> Outcome {
        Outcome {
            phases: Vec::new(),
            end,
        }
    }

    #[test]
    fn the_faster_engine_is_chosen_and_the_reason_has_both_figures() {
        for (factor, choice) in [(0.1, Choice::Kvm), (10.0, Choice::Emulation), (1.0, Choice::Emulation)] {
            let decision = decide(finished(factor), finished(1.0));
            assert_eq!(decision.choice, choice, "{}", decision.reason);
            for outcome in [&decision.kvm, &decision.emulator] {
                let figure = time(boot_seconds(outcome));
                assert!(decision.reason.contains(&figure), "{figure}: {}", decision.reason);
            }
        }
    }

    #[test]
    fn slow_exits_alone_do_not_outweigh_fast_computation() {
        // A KVM inside a good hypervisor: native code, 30 µs for an exit.
        let mut kvm = finished(0.2);
        for (phase, seconds) in &mut kvm.phases {
            if *phase == Phase::Devices {
                *seconds = 30e-6 * f64::from(phase.repeats());
            }
        }
        assert_eq!(decide(kvm, finished(1.0)).choice, Choice::Kvm);
    }

    #[test]
    fn fast_computation_alone_does_not_outweigh_slow_page_faults() {
        let mut kvm = finished(0.2);
        for (phase, seconds) in &mut kvm.phases {
            if *phase == Phase::PageFaults {
                *seconds = 2e-3 * f64::from(phase.repeats());
            }
        }
        let decision = decide(kvm, finished(1.0));
        assert_eq!(decision.choice, Choice::Emulation);
        assert!(
            decision.reason.contains("page fault") && decision.reason.contains("2.0 ms"),
            "{}",
            decision.reason
        );
    }

    #[test]
    fn an_engine_that_does_not_finish_is_out_however_fast() {
        let ends = [
            (End::Refused("no split irqchip".into()), "no split irqchip"),
            (End::Wrong(Phase::Compute), "computation"),
            (End::Late(Phase::PageFaults, 1.0), "page faults"),
            (End::Failed(Phase::Start, "internal error 1".into()), "internal error 1"),
            (End::Stuck(Phase::Timer), "timer"),
        ];
        for (end, word) in ends {
            let decision = decide(ended(end.clone()), finished(1.0));
            assert_eq!(decision.choice, Choice::Emulation);
            assert!(decision.reason.contains(word), "{}", decision.reason);
            let decision = decide(finished(100.0), ended(end.clone()));
            assert_eq!(decision.choice, Choice::Kvm);
            assert!(decision.reason.contains(word), "{}", decision.reason);
            assert_eq!(decide(ended(end.clone()), ended(end)).choice, Choice::Emulation);
        }
    }

    #[test]
    fn a_timer_s_own_delay_is_not_held_against_an_engine() {
        let wait = f64::from(Phase::Timer.wait()) * 1e-9;
        let unit = unit_seconds(&finished(1.0), Phase::Timer).unwrap();
        assert!((unit - (30e-6 - wait)).abs() < 1e-9, "{unit}");
    }

    #[test]
    fn times_have_a_fitting_unit() {
        let times = [
            (0.0, "0.0 ns"),
            (2.13e-9, "2.1 ns"),
            (999.6e-9, "1.0 µs"),
            (0.0123, "12 ms"),
            (61.7, "62 s"),
        ];
        for (seconds, text) in times {
            assert_eq!(time(seconds), text);
        }
    }
}
