//! States with anything in them: refused, or taken without harm.

use super::*;
use posada_engine::{Exit, Kick};
use serde_json::Value;
use std::sync::atomic::{AtomicBool, Ordering};

/// A small generator (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, count: usize) -> usize {
        (self.next() >> 11) as usize % count
    }
}

/// The leaves of an encoded state.
fn leaves<'a>(value: &'a mut Value, found: &mut Vec<&'a mut Value>) {
    match value {
        Value::Array(values) => values.iter_mut().for_each(|value| leaves(value, found)),
        Value::Object(fields) => fields.values_mut().for_each(|value| leaves(value, found)),
        leaf => found.push(leaf),
    }
}

/// Another value of the same kind.
fn damage(leaf: &mut Value, random: &mut Random) {
    match leaf {
        Value::Bool(on) => *on = !*on,
        Value::Number(number) => {
            let old = number.as_u64().unwrap();
            let new = match random.below(4) {
                0 => random.next(),
                1 => old ^ 1 << random.below(64),
                2 => old ^ 1 << random.below(16),
                _ => old ^ 1 << random.below(32),
            };
            *leaf = new.into();
        }
        Value::String(text) if text.starts_with("0x") => {
            for _ in 0..=random.below(8) {
                let at = 2 + random.below(text.len() - 2);
                let digit = char::from_digit(random.below(16) as u32, 16).unwrap();
                text.replace_range(at..=at, &digit.to_string());
            }
        }
        Value::String(text) => {
            *text = ["running", "halted", "waiting-for-startup"][random.below(3)].into();
        }
        _ => {}
    }
}

fn starts() -> Vec<CpuState> {
    let real = processor().state();
    let mut long = crate::mmu::tests::core();
    long.segments[seg::CS].limit = u32::MAX;
    let protected = {
        let mut state = real.clone();
        state.cr0 |= 1;
        state.segments[seg::SS].access = 0x93;
        state
    };
    let mut busy = changed().state();
    busy.events.init_pending = false;
    busy.events.startup = None;
    let mut states = vec![real, protected, long.state(), busy.clone()];
    busy.events.exception = None;
    busy.activity = Activity::Running;
    states.push(busy);
    // The id of vCPU 1.
    for state in &mut states {
        let x2apic = state.apic_base & 1 << 10 != 0;
        state.apic.as_mut().unwrap().set(0x20, if x2apic { 1 } else { 1 << 24 });
    }
    states
}

#[test]
fn a_hostile_state_is_refused_or_does_what_a_guest_could() {
    let vm = Vm::with_cpus(2);
    let mut core = vcpu(&vm, 1, Arc::new(Ends::default()));
    // The tables of `mmu::tests::core`, and code that is more than zeros.
    for (at, entry) in [
        (0x1000, 0x2007u64),
        (0x2000, 0x3007),
        (0x3000, 0x4007),
        (0x4000, 0x8007),
        (0x4008, 0x9007),
    ] {
        core.physical_write(at, &entry.to_le_bytes());
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for at in (0x5000..0x1_0000).step_by(8) {
        core.physical_write(at, &random.next().to_le_bytes());
    }
    let starts: Vec<Value> = starts()
        .iter()
        .inspect(|state| assert_eq!(core.check(state), Ok(())))
        .map(|state| serde_json::to_value(state).unwrap())
        .collect();
    let stop = Arc::new(AtomicBool::new(false));
    let kicker = std::thread::spawn({
        let (stop, mailbox) = (Arc::clone(&stop), Arc::clone(core.shared.mailbox()));
        move || {
            while !stop.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_micros(300));
                mailbox.kick();
            }
        }
    });
    let (mut taken, mut refused) = (0, 0);
    for round in 0..6_000 {
        let mut encoded = starts[round % starts.len()].clone();
        let mut found = Vec::new();
        leaves(&mut encoded, &mut found);
        for _ in 0..=random.below(3) {
            let at = random.below(found.len());
            damage(found[at], &mut random);
        }
        // Numbers too large for their field end here.
        let Ok(state) = serde_json::from_value::<CpuState>(encoded) else {
            continue;
        };
        if core.check(&state).is_err() {
            refused += 1;
            continue;
        }
        taken += 1;
        core.set_state(&state);
        let back = core.state();
        assert_eq!(core.check(&back), Ok(()), "what was taken can be given");
        core.catch_up();
        while core.service() != Some(Exit::Kicked) && !core.shut_down {
            core.execute();
        }
        let after = core.state();
        assert_eq!(core.check(&after), Ok(()), "what a guest can do can be carried on");
    }
    stop.store(true, Ordering::Relaxed);
    kicker.join().unwrap();
    assert!(taken > 1000 && refused > 500, "{taken} taken, {refused} refused");
}
