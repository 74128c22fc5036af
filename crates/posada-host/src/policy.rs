//! When a VM's process is started, asked to end, killed and started again: decisions, without clock and without I/O.
//!
//! ```text
//!              start              it runs               pause
//!    ┌──────┐ ───────► ┌──────────┐ ───► ┌─────────┐ ─────────► ┌────────┐
//!    │ down │          │ starting │      │ running │            │ paused │
//!    └──────┘ ◄─┐      └──────────┘      └─────────┘ ◄───────── └────────┘
//!        ▲      │ no        ▲    │ stop, kill │  resume             │
//!        │      │           │    ▼            ▼                     ▼
//!        │      │      ┌─────────┐ ◄─ it ended by itself    ┌──────────┐
//!        │      └───── │ waiting │      and is wanted       │ stopping │ asked, then terminated, then killed
//!        │             └─────────┘                          └──────────┘
//!        └──────────────────────────────────────────────────────┘ it ended
//! ```
//!
//! Who executes the decisions gives facts back ([`Input::Up`], [`Input::Ended`]). Laws, which the tests hold to: a process is
//! started only where there is none, signalled only where there is one; a VM that was stopped stays so until somebody starts
//! it; a removed VM does nothing any more; the wait between restarts is bounded.

use serde::{Deserialize, Serialize};
use std::time::Duration;
use utoipa::ToSchema;

/// The first wait before a restart; it doubles with each failure in a row.
pub const FIRST_WAIT: Duration = Duration::from_millis(100);
/// The longest wait before a restart.
pub const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// A VM that ran so long had started well: the next wait is the first again.
pub const STEADY: Duration = Duration::from_secs(10);
/// How long a VM that was told to end may take to do so before it is killed.
pub const TERMINATION: Duration = Duration::from_secs(5);

/// Whether a VM is started again when it ends by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartPolicy {
    /// Never.
    #[default]
    No,
    /// When it crashed or its process died.
    OnFailure,
    /// When it powered off, too.
    Always,
}

/// How a process came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The guest powered off, or ended with exit code 0.
    Done,
    /// It crashed, could not start, or was killed by somebody else.
    Failure,
    /// Somebody at the VM itself wanted it, for example by saving it to go on elsewhere: no policy starts it again.
    Wish,
}

/// What happens to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// A user wants it to run.
    Start,
    /// A user wants it to end: its guest is asked and has so long.
    Stop(Duration),
    /// The same, and then it is started.
    Restart(Duration),
    /// A user wants it to end at once.
    Kill,
    /// A user wants it to be forgotten; `force`: even if it runs.
    Remove {
        /// Kill it first.
        force: bool,
    },
    /// Its vCPUs stand still.
    Paused,
    /// They run again.
    Resumed,
    /// Its guest runs.
    Up,
    /// Nobody in its guest can be asked to end it.
    Deaf,
    /// Who waited for its end does not want it to be terminated or killed any more.
    Spare,
    /// Its process has ended, or could not be started.
    Ended(Cause),
    /// Time has passed.
    Tick,
}

/// What is to be done, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start its process.
    Spawn,
    /// Ask its guest to power off.
    Ask,
    /// Tell its process to end.
    Terminate,
    /// Kill its process.
    Kill,
    /// Give [`Input::Tick`] at this time.
    Wake(Duration),
    /// Forget it.
    Delete,
}

/// Why a wish is not fulfilled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// There is nothing to pause.
    #[error("it is not running; start it first")]
    NotRunning,
    /// It must not be removed.
    #[error("it is running; stop it first, or remove it by force")]
    Runs,
    /// It ends.
    #[error("it is being stopped; wait until it has ended")]
    Stopping,
}

/// What a VM does, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// It has never run.
    Created,
    /// Its process prepares it.
    Starting,
    /// Its guest runs.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// It was told to end.
    Stopping,
    /// It ended and is to be started again in a moment.
    Restarting,
    /// It has ended.
    Stopped,
    /// It has ended badly.
    Failed,
    /// What the store has of it cannot be read.
    Broken,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Created,
        Self::Starting,
        Self::Running,
        Self::Paused,
        Self::Stopping,
        Self::Restarting,
        Self::Stopped,
        Self::Failed,
        Self::Broken,
    ];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopping => "stopping",
            Self::Restarting => "restarting",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Broken => "broken",
        }
    }

    /// Whether it has ended and stays so until somebody does something.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed | Self::Broken)
    }

    /// Whether it has a process.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Starting | Self::Running | Self::Paused | Self::Stopping)
    }
}

/// What follows when a process that was told to end has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Then {
    Stay,
    Start,
    Delete,
}

/// How urgently it was told, and when that becomes more urgent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Urgency {
    Asked(Duration),
    Terminated(Duration),
    Killed,
    /// Told, but nothing more is done.
    Spared,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Down,
    Starting,
    Up { since: Duration, paused: bool },
    Ending { urgency: Urgency, then: Then },
    Waiting { until: Duration },
    Deleted,
}

/// Where a VM is in its life.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    policy: RestartPolicy,
    /// Forget the VM when it has ended.
    fleeting: bool,
    phase: Phase,
    wanted: bool,
    failures: u32,
}

/// What a daemon that starts finds of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// No process, and how the last one ended, if there was one.
    Nothing(Option<Cause>),
    /// A process that still starts.
    Starting,
    /// A guest that runs.
    Running,
    /// A guest whose vCPUs stand still.
    Paused,
}

impl Lifecycle {
    /// A new VM. `fleeting`: it is forgotten when it has ended.
    pub fn new(policy: RestartPolicy, fleeting: bool) -> Self {
        Self {
            policy,
            fleeting,
            phase: Phase::Down,
            wanted: false,
            failures: 0,
        }
    }

    /// A VM of which another daemon has known whether it is `wanted` to run and how often in a row it had failed to.
    pub fn recover(mut self, wanted: bool, failures: u32, found: Found, now: Duration) -> (Self, Vec<Action>) {
        self.wanted = wanted;
        self.failures = failures;
        self.phase = match found {
            Found::Nothing(last) if !wanted => {
                let actions = if self.fleeting && last.is_some() {
                    self.delete()
                } else {
                    Vec::new()
                };
                return (self, actions);
            }
            Found::Starting | Found::Nothing(_) => Phase::Starting,
            Found::Running => Phase::Up {
                since: now,
                paused: false,
            },
            Found::Paused => Phase::Up {
                since: now,
                paused: true,
            },
        };
        let actions = match found {
            // No word of it: it was killed, or its host was.
            Found::Nothing(last) => self.ended(last.unwrap_or(Cause::Failure), now),
            // Somebody wanted it to end.
            _ if !wanted => self.terminate(Then::Stay, now),
            _ => Vec::new(),
        };
        (self, actions)
    }

    /// Whether the user wants it to run.
    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// How often in a row it has ended soon after its start.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Whether it was told to end: that it does is no accident then.
    pub fn is_told(&self) -> bool {
        matches!(self.phase, Phase::Ending { .. })
    }

    /// Other rules from now on.
    pub fn set_policy(&mut self, policy: RestartPolicy) {
        self.policy = policy;
    }

    /// What it does. `last`: how it ended last, if it has ever run.
    pub fn state(&self, last: Option<Cause>) -> State {
        match self.phase {
            Phase::Down | Phase::Deleted => match last {
                None => State::Created,
                Some(Cause::Failure) => State::Failed,
                Some(_) => State::Stopped,
            },
            Phase::Starting => State::Starting,
            Phase::Up { paused: false, .. } => State::Running,
            Phase::Up { paused: true, .. } => State::Paused,
            Phase::Ending { then: Then::Start, .. } | Phase::Waiting { .. } => State::Restarting,
            Phase::Ending { .. } => State::Stopping,
        }
    }

    /// Whether its vCPUs can be stopped or let run.
    ///
    /// # Errors
    /// Why not.
    pub fn may_pause(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Up { .. } => Ok(()),
            Phase::Ending { .. } => Err(Refusal::Stopping),
            _ => Err(Refusal::NotRunning),
        }
    }

    /// Takes in what happened, at a time since any fixed moment; says what to do now.
    ///
    /// # Errors
    /// [`Refusal`] of a wish. Nothing has changed then.
    pub fn on(&mut self, input: Input, now: Duration) -> Result<Vec<Action>, Refusal> {
        Ok(match (input, self.phase) {
            (_, Phase::Deleted) => Vec::new(),
            (Input::Start, Phase::Down | Phase::Waiting { .. }) => {
                self.wanted = true;
                self.failures = 0;
                self.spawn()
            }
            (Input::Start, Phase::Ending { .. }) => return Err(Refusal::Stopping),
            (Input::Start, _) => Vec::new(),

            (Input::Stop(_), Phase::Down) => Vec::new(),
            (Input::Stop(_), Phase::Waiting { .. }) => self.lie_down(),
            (Input::Stop(patience), _) => self.stop(patience, Then::Stay, now),

            (Input::Restart(_), Phase::Down | Phase::Waiting { .. }) => return self.on(Input::Start, now),
            (Input::Restart(patience), _) => {
                let actions = self.stop(patience, Then::Start, now);
                self.wanted = true;
                actions
            }

            (Input::Kill, Phase::Down) => return Err(Refusal::NotRunning),
            (Input::Kill, Phase::Waiting { .. }) => self.lie_down(),
            (Input::Kill, _) => self.kill(Then::Stay),

            (Input::Remove { .. }, Phase::Down | Phase::Waiting { .. }) => self.delete(),
            (Input::Remove { force: true }, _) => self.kill(Then::Delete),
            (Input::Remove { force: false }, _) => return Err(Refusal::Runs),

            (Input::Paused, Phase::Up { since, .. }) => self.go(Phase::Up { since, paused: true }),
            (Input::Resumed, Phase::Up { since, .. }) => self.go(Phase::Up { since, paused: false }),
            (Input::Up, Phase::Starting) => self.go(Phase::Up {
                since: now,
                paused: false,
            }),

            (
                Input::Deaf,
                Phase::Ending {
                    urgency: Urgency::Asked(_),
                    then,
                },
            ) => self.terminate(then, now),
            (
                Input::Spare,
                Phase::Ending {
                    urgency: Urgency::Asked(_),
                    then,
                },
            ) => self.go(Phase::Ending {
                urgency: Urgency::Spared,
                then,
            }),

            (Input::Ended(_), Phase::Ending { then, .. }) => match then {
                Then::Stay if self.fleeting => self.delete(),
                Then::Stay => self.lie_down(),
                Then::Start => {
                    self.failures = 0;
                    self.spawn()
                }
                Then::Delete => self.delete(),
            },
            (Input::Ended(cause), Phase::Starting | Phase::Up { .. }) => self.ended(cause, now),

            (Input::Tick, Phase::Waiting { until }) if now >= until => self.spawn(),
            (
                Input::Tick,
                Phase::Ending {
                    urgency: Urgency::Asked(until),
                    then,
                },
            ) if now >= until => self.terminate(then, now),
            (
                Input::Tick,
                Phase::Ending {
                    urgency: Urgency::Terminated(until),
                    then,
                },
            ) if now >= until => self.kill(then),

            // Facts that came too late.
            (
                Input::Paused | Input::Resumed | Input::Up | Input::Deaf | Input::Spare | Input::Ended(_) | Input::Tick,
                _,
            ) => Vec::new(),
        })
    }

    fn go(&mut self, phase: Phase) -> Vec<Action> {
        self.phase = phase;
        Vec::new()
    }

    fn lie_down(&mut self) -> Vec<Action> {
        self.wanted = false;
        self.go(Phase::Down)
    }

    fn delete(&mut self) -> Vec<Action> {
        self.wanted = false;
        self.phase = Phase::Deleted;
        vec![Action::Delete]
    }

    fn spawn(&mut self) -> Vec<Action> {
        self.phase = Phase::Starting;
        vec![Action::Spawn]
    }

    /// There is a process: it gets the chance to end in order.
    fn stop(&mut self, patience: Duration, then: Then, now: Duration) -> Vec<Action> {
        self.wanted = false;
        match self.phase {
            // A guest that does not run yet, or stands still, hears nothing.
            Phase::Up { paused: false, .. } if !patience.is_zero() => {
                let until = now + patience;
                self.phase = Phase::Ending {
                    urgency: Urgency::Asked(until),
                    then,
                };
                vec![Action::Ask, Action::Wake(until)]
            }
            // A second wish changes what follows, and how long the guest has; who wants it removed gets that.
            Phase::Ending { urgency, then: before } => {
                let then = if before == Then::Delete { before } else { then };
                let urgency = match urgency {
                    Urgency::Asked(_) | Urgency::Spared if patience.is_zero() => return self.terminate(then, now),
                    Urgency::Asked(_) | Urgency::Spared => Urgency::Asked(now + patience),
                    other => other,
                };
                self.phase = Phase::Ending { urgency, then };
                match urgency {
                    Urgency::Asked(until) => vec![Action::Wake(until)],
                    _ => Vec::new(),
                }
            }
            _ => self.terminate(then, now),
        }
    }

    fn terminate(&mut self, then: Then, now: Duration) -> Vec<Action> {
        let until = now + TERMINATION;
        self.phase = Phase::Ending {
            urgency: Urgency::Terminated(until),
            then,
        };
        vec![Action::Terminate, Action::Wake(until)]
    }

    fn kill(&mut self, then: Then) -> Vec<Action> {
        let then = match self.phase {
            Phase::Ending { then: Then::Delete, .. } => Then::Delete,
            _ => then,
        };
        self.wanted = then == Then::Start;
        self.phase = Phase::Ending {
            urgency: Urgency::Killed,
            then,
        };
        vec![Action::Kill]
    }

    /// It ended though nobody had wanted that here.
    fn ended(&mut self, cause: Cause, now: Duration) -> Vec<Action> {
        let again = match self.policy {
            RestartPolicy::No => false,
            RestartPolicy::OnFailure => cause == Cause::Failure,
            RestartPolicy::Always => cause != Cause::Wish,
        };
        if !again {
            return if self.fleeting { self.delete() } else { self.lie_down() };
        }
        let steady = matches!(self.phase, Phase::Up { since, .. } if now.saturating_sub(since) >= STEADY);
        self.failures = if steady { 1 } else { self.failures.saturating_add(1) };
        let until = now + wait(self.failures);
        self.phase = Phase::Waiting { until };
        vec![Action::Wake(until)]
    }
}

/// How long is waited before a restart after so many failures in a row.
pub fn wait(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(20);
    (FIRST_WAIT * (1 << doublings)).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests;
