//! Which engine runs a VM's processors: what `--accel` means on this host.
//!
//! `auto` looks whether there is a KVM that makes VMs, and if so runs the probe program on both engines
//! ([`posada_vmm::probe`]). The decision is kept ([`cache`]) until something that it depends on changes.

mod cache;

use anyhow::anyhow;
use cache::{Cache, Key};
use clap::ValueEnum;
use posada_engine::cpu::{Baseline, CpuModel, Offer};
use posada_engine::{Engine, Error};
use posada_memory::GuestRam;
use posada_vmm::probe::{self, Choice, Decision, End, Make};
use posada_x86::Translating;
use std::fmt;
use std::sync::Arc;

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Accelerator {
    /// KVM where it really works and is faster, else the software CPU
    Auto,
    /// The host's processor, by /dev/kvm
    Kvm,
    /// The software CPU, which translates hot code into host code
    Emulate,
    /// The same
    #[value(name = "emulate=translate")]
    Translate,
    /// The software CPU, which interprets each instruction: slow
    #[value(name = "emulate=interpret")]
    Interpret,
    /// The software CPU, which translates and compares each block with the interpreter; a difference ends the VM
    #[value(name = "emulate=check")]
    Check,
}

/// What the VM gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The host's processor.
    Kvm,
    /// The software CPU.
    Translator,
    /// The software CPU without its translator.
    Interpreter,
    /// The software CPU in check mode.
    Checker,
}

impl fmt::Display for Kind {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Kvm => "KVM",
            Self::Translator => "the software CPU",
            Self::Interpreter => "the software CPU without its translator",
            Self::Checker => "the software CPU, which checks its translator",
        })
    }
}

impl Kind {
    /// What its processors can be.
    ///
    /// # Errors
    /// Why there is no KVM that can be used, and the way out.
    fn offer(self) -> Result<Offer, Error> {
        match self {
            Self::Kvm => Ok(posada_kvm::Kvm::offer()?),
            Self::Translator | Self::Interpreter | Self::Checker => Ok(posada_x86::Emulator::offer()),
        }
    }

    /// The processors of a VM on `ram`, with translation like this if this kind translates.
    ///
    /// # Errors
    /// [`Error::Host`] when the host lacks something.
    pub fn make(self, ram: Arc<GuestRam>, model: &CpuModel, how: &Translating) -> Result<Arc<dyn Engine>, Error> {
        Ok(match self {
            Self::Kvm => Arc::new(posada_kvm::Kvm::new(ram, model)?),
            Self::Interpreter => Arc::new(posada_x86::Emulator::new(ram, model)?),
            Self::Translator | Self::Checker => {
                let how = Translating {
                    check: self == Self::Checker,
                    ..how.clone()
                };
                Arc::new(posada_x86::Emulator::new(ram, model)?.translating(how))
            }
        })
    }

    /// Makes it for the probe program.
    fn for_probe(self) -> impl Make {
        move |ram| {
            let model = CpuModel::new(&self.offer()?, 1, None)
                .map_err(|feature| Error::Host(format!("its processor lacks {feature}")))?;
            self.make(ram, &model, &TRANSLATING)
        }
    }
}

/// How code is translated unless somebody says otherwise.
pub const TRANSLATING: Translating = Translating {
    cache: 64 << 20,
    perf_map: None,
    count_lookups: false,
    check: false,
};

/// An engine and why it is that one.
#[derive(Clone, Debug, PartialEq)]
pub struct Chosen {
    /// The engine.
    pub kind: Kind,
    /// What its processors can be.
    pub offer: Offer,
    /// Why, in a sentence without its full stop.
    pub reason: String,
    /// The decision with its figures, if one was made, and whether it was made before.
    pub decision: Option<(Decision, bool)>,
    /// What to tell a user who starts a VM.
    pub notice: Option<String>,
}

impl Chosen {
    /// What the processors of a VM are.
    ///
    /// # Errors
    /// When the host lacks what `baseline` asks for.
    pub fn model(&self, cpus: u32, baseline: Option<Baseline>) -> anyhow::Result<CpuModel> {
        CpuModel::new(&self.offer, cpus, baseline).map_err(|feature| {
            anyhow!("this host lacks {feature}, a part of the chosen --cpu-model; use --cpu-model host")
        })
    }
}

/// Chooses the engine for a VM.
///
/// # Errors
/// When KVM is wanted and cannot be used.
pub fn choose(wanted: Accelerator) -> anyhow::Result<Chosen> {
    let asked = |kind: Kind| {
        Ok::<_, Error>(Chosen {
            kind,
            offer: kind.offer()?,
            reason: "--accel says so".into(),
            decision: None,
            notice: None,
        })
    };
    let chosen = match wanted {
        Accelerator::Auto => auto(false),
        Accelerator::Kvm => asked(Kind::Kvm)?,
        Accelerator::Emulate | Accelerator::Translate => asked(Kind::Translator)?,
        Accelerator::Interpret => asked(Kind::Interpreter)?,
        Accelerator::Check => asked(Kind::Checker)?,
    };
    let cached = chosen.decision.as_ref().is_some_and(|(_, cached)| *cached);
    tracing::info!(engine = %chosen.kind, reason = chosen.reason, cached, "engine chosen");
    Ok(chosen)
}

/// What runs a VM for which `auto` has chosen KVM, when KVM then refuses to make it: a device can vanish at any time, or be
/// taken by another hypervisor.
pub fn without_kvm(why: String) -> Chosen {
    let chosen = software_cpu(why);
    tracing::warn!(engine = %chosen.kind, reason = chosen.reason, "engine chosen anew");
    chosen
}

/// The software CPU, where KVM cannot be used.
fn software_cpu(why: String) -> Chosen {
    Chosen {
        kind: Kind::Translator,
        offer: posada_x86::Emulator::offer(),
        notice: Some(format!(
            "the software CPU runs this VM, since KVM cannot be used: {why}"
        )),
        reason: format!("KVM cannot be used: {why}"),
        decision: None,
    }
}

/// What `auto` chooses on this host; with `anew` by a new run of the probe program.
pub fn auto(anew: bool) -> Chosen {
    let probe = || {
        let (kvm, emulator) = probe::compare(Kind::Kvm.for_probe(), Kind::Translator.for_probe());
        probe::decide(kvm, emulator)
    };
    let kvm = posada_kvm::Kvm::offer().map_err(|error| error.to_string());
    choose_by(kvm, &Cache::of_user(), anew, probe)
}

/// What `auto` chooses where KVM offers this, or cannot be used for this reason.
fn choose_by(kvm: Result<Offer, String>, cache: &Cache, anew: bool, probe: impl FnOnce() -> Decision) -> Chosen {
    let kvm = match kvm {
        Ok(offer) => offer,
        Err(why) => return software_cpu(why),
    };
    let key = Key::of_host();
    let known = if anew { None } else { cache.load(&key) };
    let cached = known.is_some();
    let decision = known.unwrap_or_else(|| {
        let decision = probe();
        // What refuses at once may have been short of something for a moment, and is asked again at no cost.
        if !matches!(decision.kvm.end, End::Refused(_)) {
            cache.store(&key, &decision);
        }
        decision
    });
    let (kind, offer, notice) = match decision.choice {
        Choice::Kvm => (Kind::Kvm, kvm, None),
        Choice::Emulation => {
            let notice = format!(
                "the software CPU runs this VM: {}; --accel kvm takes KVM all the same, posada doctor --probe measures \
                 again, --accel emulate does without this notice",
                decision.reason
            );
            (Kind::Translator, posada_x86::Emulator::offer(), Some(notice))
        }
    };
    Chosen {
        kind,
        offer,
        reason: decision.reason.clone(),
        decision: Some((decision, cached)),
        notice,
    }
}

#[cfg(test)]
mod tests {
    use super::cache::testing::OwnCache;
    use super::*;
    use posada_vmm::probe::{Outcome, Phase};
    use std::cell::Cell;

    pub fn decision(choice: Choice) -> Decision {
        let outcome = |end| Outcome {
            phases: vec![(Phase::Start, 0.25), (Phase::Timer, 1.0 / 3.0)],
            end,
        };
        let kvm = match choice {
            Choice::Kvm => End::Finished,
            Choice::Emulation => End::Late(Phase::PageFaults, 1.0),
        };
        Decision {
            choice,
            reason: "it is so".into(),
            kvm: outcome(kvm),
            emulator: outcome(End::Finished),
        }
    }

    /// What a KVM may offer, told from what the software CPU does.
    fn offer() -> Offer {
        Offer {
            tsc_khz: 12_345,
            ..posada_x86::Emulator::offer()
        }
    }

    #[test]
    fn without_a_device_nothing_is_probed_and_the_notice_says_why() {
        let cache = OwnCache::new();
        let chosen = choose_by(
            Err("there is no such thing; use --accel emulate".into()),
            &cache.0,
            false,
            || panic!("there is nothing to probe"),
        );
        assert_eq!((chosen.kind, chosen.decision), (Kind::Translator, None));
        let notice = chosen.notice.unwrap();
        assert!(
            notice.contains("no such thing") && notice.contains("--accel emulate"),
            "{notice}"
        );
        assert!(!cache.file().exists());
    }

    #[test]
    fn a_device_is_probed_once_and_again_when_asked() {
        let cache = OwnCache::new();
        let probes = Cell::new(0);
        let choose = |anew, choice| {
            let probe = || {
                probes.set(probes.get() + 1);
                decision(choice)
            };
            choose_by(Ok(offer()), &cache.0, anew, probe)
        };
        let first = choose(false, Choice::Kvm);
        assert_eq!((first.kind, first.offer, first.notice), (Kind::Kvm, offer(), None));
        assert_eq!(first.decision, Some((decision(Choice::Kvm), false)));
        let second = choose(false, Choice::Emulation);
        assert_eq!(second.decision, Some((decision(Choice::Kvm), true)));
        assert_eq!(probes.get(), 1);
        assert_eq!(choose(true, Choice::Emulation).kind, Kind::Translator);
        let last = choose(false, Choice::Kvm);
        assert_eq!((last.kind, probes.get()), (Kind::Translator, 2));
        assert_ne!(last.offer, offer());
        let notice = last.notice.unwrap();
        assert!(
            notice.contains("it is so") && notice.contains("--accel kvm"),
            "{notice}"
        );
    }

    #[test]
    fn a_kvm_that_refuses_is_asked_again() {
        let cache = OwnCache::new();
        let mut refused = decision(Choice::Emulation);
        refused.kvm.end = End::Refused("out of memory".into());
        assert_eq!(
            choose_by(Ok(offer()), &cache.0, false, || refused).kind,
            Kind::Translator
        );
        let again = choose_by(Ok(offer()), &cache.0, false, || decision(Choice::Kvm));
        assert_eq!(again.kind, Kind::Kvm);
    }
}
