//! Runs cases on both sides and collects what differs.

use crate::compare;
use crate::forms::{self, Form};
use crate::generate::Generator;
use crate::guest::Guest;
use crate::native::{BATCH, Native};
use crate::state::{End, Outcome};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Mismatches of one form.
struct Mismatches {
    count: u64,
    /// All of them are #UD in the guest alone.
    unknown: bool,
    /// The first few, described.
    shown: Vec<String>,
}

pub struct Runner {
    pub forms: Vec<Form>,
    skipped: usize,
    generator: Generator,
    native: Native,
    guest: Guest,
    make: fn() -> Guest,
    outcome: Box<Outcome>,
    cases: u64,
    mismatches: BTreeMap<u32, Mismatches>,
    /// Mismatches to describe for each form.
    show: usize,
}

impl Runner {
    /// Against this software CPU, which `guest` makes.
    pub fn new(make: fn() -> Guest) -> Self {
        let (forms, skipped) = forms::all();
        let show = std::env::var("POSADA_SHOW").ok().and_then(|value| value.parse().ok());
        Self {
            generator: Generator::new(&forms),
            forms,
            skipped: skipped.len(),
            native: Native::new(),
            guest: make(),
            make,
            outcome: Box::new(Outcome::EMPTY),
            cases: 0,
            mismatches: BTreeMap::new(),
            show: show.unwrap_or(1),
        }
    }

    /// Runs `count` cases of the form at `index`, one for each seed from `seed` on.
    pub fn batch(&mut self, index: usize, seed: u64, count: usize) {
        assert!(count <= BATCH);
        let form = &self.forms[index];
        let cases = self.native.cases();
        for (case, seed) in cases[..count].iter_mut().zip(seed..) {
            assert!(
                self.generator.make(form, seed, case),
                "{} cannot be encoded",
                form.name()
            );
        }
        let (cases, outcomes) = self.native.run(count);
        for (case, native) in cases.iter().zip(outcomes) {
            let (guest, outcome) = (&mut self.guest, &mut self.outcome);
            if catch_unwind(AssertUnwindSafe(|| guest.run(case, outcome))).is_err() {
                self.outcome.end = End::Died;
                self.guest = (self.make)();
            }
            self.cases += 1;
            let differences = compare::differences(case, native, &self.outcome);
            if differences.is_empty() {
                continue;
            }
            let entry = self.mismatches.entry(form.number).or_insert(Mismatches {
                count: 0,
                unknown: true,
                shown: Vec::new(),
            });
            entry.count += 1;
            entry.unknown &= self.outcome.vector == 6 && native.vector != 6;
            if entry.shown.len() < self.show {
                entry
                    .shown
                    .push(compare::describe(case, native, &form.name(), &differences));
            }
        }
    }

    /// Prints a summary, and fails if anything differed.
    pub fn finish(self) {
        let (unknown, wrong): (Vec<_>, Vec<_>) = self.mismatches.values().partition(|mismatches| mismatches.unknown);
        for mismatches in &wrong {
            for text in &mismatches.shown {
                println!("{text}");
            }
            println!("    {} such cases", mismatches.count);
        }
        for mismatches in &unknown {
            let first = mismatches
                .shown
                .first()
                .map_or("", |text| text.lines().next().unwrap_or(""));
            println!("#UD only in posada, {} cases: {first}", mismatches.count);
        }
        println!(
            "{} forms, {} cases, {} forms skipped by table; {} forms differ, {} are unknown to posada",
            self.forms.len(),
            self.cases,
            self.skipped,
            wrong.len(),
            unknown.len()
        );
        assert!(self.mismatches.is_empty(), "the software CPU differs from the real one");
    }
}
