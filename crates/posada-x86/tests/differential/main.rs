//! Differential instruction test: every user-mode instruction form of 64-bit and compatibility mode, with random operands, registers, flags and memory, on
//! the real CPU ([`native`]) and on the software CPU ([`guest`]); then everything that an instruction can change is
//! compared ([`compare`]).
//!
//! A case is a function of its form and seed ([`generate`]); a mismatch prints both, and the quick run replays it (forms of
//! compatibility mode end in `@32`):
//! `POSADA_FORM=Add_rm32_r32 POSADA_SEED=7 cargo test -p posada-x86 differential -- --nocapture`.
//! `POSADA_SHOW=N` describes more than one mismatch of a form; a form without a seed runs many of its cases.

mod compare;
mod forms;
mod generate;
mod guest;
mod layout;
mod native;
mod operands;
mod rng;
mod run;
mod state;
mod trampoline;
mod undefined;
mod values;

use guest::Guest;
use run::Runner;
use std::time::{Duration, Instant};

/// Cases of each form in the quick run.
const QUICK: usize = 48;

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(
        value
            .parse()
            .unwrap_or_else(|_| panic!("{name} is not a number: {value}")),
    )
}

#[test]
fn differential_quick() {
    quick(Guest::new);
}

#[test]
fn translated_quick() {
    quick(Guest::translating);
}

fn quick(make: fn() -> Guest) {
    let mut runner = Runner::new(make);
    let wanted = std::env::var("POSADA_FORM").ok();
    let seed = variable("POSADA_SEED");
    for index in 0..runner.forms.len() {
        match &wanted {
            None => runner.batch(index, seed.unwrap_or(0), QUICK),
            Some(name) if *name == runner.forms[index].name() => {
                let count = if seed.is_some() { 1 } else { native::BATCH };
                runner.batch(index, seed.unwrap_or(0), count);
            }
            Some(_) => {}
        }
    }
    runner.finish();
}

#[test]
#[ignore = "long: make soak"]
fn differential_soak() {
    let limit = Duration::from_secs(variable("POSADA_SOAK_SECONDS").unwrap_or(600));
    let start = Instant::now();
    let clock = std::time::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_secs());
    let mut seed = variable("POSADA_SEED").unwrap_or(clock << 24);
    println!("soak for {} s from seed {seed}", limit.as_secs());
    let mut runner = Runner::new(Guest::new);
    while start.elapsed() < limit {
        for index in 0..runner.forms.len() {
            runner.batch(index, seed, 64);
        }
        seed += 64;
    }
    runner.finish();
}

/// What an instruction does on the real CPU depends on the case alone: else a comparison would say nothing.
#[test]
fn the_cpu_repeats_itself() {
    let (forms, _) = forms::all();
    let mut generator = generate::Generator::new(&forms);
    let mut native = native::Native::new();
    let mut retired = 0;
    for form in &forms {
        for (case, seed) in native.cases()[..64].iter_mut().zip(0..) {
            assert!(generator.make(form, seed, case), "{} cannot be encoded", form.name());
        }
        let first = native.run(64).1.to_vec();
        let (cases, second) = native.run(64);
        for ((case, first), second) in cases.iter().zip(&first).zip(second) {
            assert_ne!(
                first.end,
                state::End::Died,
                "{} kills the child, seed {}",
                form.name(),
                case.seed
            );
            let differences = compare::differences(case, first, second);
            assert!(
                differences.is_empty(),
                "{}, seed {}: {differences:?}",
                form.name(),
                case.seed
            );
            retired += u32::from(first.end == state::End::Retired);
        }
    }
    assert!(
        retired as usize > forms.len() * 48,
        "most cases must not fault: {retired} of {}",
        forms.len() * 64
    );
}
