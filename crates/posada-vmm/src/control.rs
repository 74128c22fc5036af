//! Who may run: the one place where vCPU threads, the VM's main thread, the debugger and the outside world meet.
//!
//! ```text
//!              pause, break point                 power-off, reset, crash, stop
//!   ┌─────────┐ ─────────────► ┌────────┐        ┌───────┐
//!   │ running │                │ paused │ ─────► │ ended │ ──► the next life, after a reset
//!   └─────────┘ ◄───────────── └────────┘        └───────┘
//!        │          resume                           ▲
//!        └───────────────────────────────────────────┘
//! ```
//!
//! A *life* is what lies between two resets. A stop from outside outlasts them.

use crate::machine::Machine;
use crate::notify::Notify;
use posada_engine::{DebugControl, Engine, Kick, Vcpu};
use posada_memory::GuestRam;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Why a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest asked for this exit code through the debug-exit port.
    DebugExit(u32),
    /// A vCPU shut down after a triple fault.
    Crash {
        /// Which vCPU.
        cpu: u32,
        /// Its registers, for people.
        report: String,
    },
    /// A vCPU's engine could not go on.
    EngineFailed {
        /// Which vCPU.
        cpu: u32,
        /// What happened and what to do, for people.
        reason: String,
    },
    /// A thread of ours panicked.
    Failed,
    /// The user left the console by its escape.
    Quit,
    /// This signal ended it.
    Signal(i32),
    /// It was saved to go on later.
    Saved,
}

impl Ending {
    /// True if it comes from outside the guest and a reset must not swallow it.
    fn is_stop(&self) -> bool {
        matches!(self, Ending::Quit | Ending::Signal(_) | Ending::Failed | Ending::Saved)
    }
}

/// The processors, devices and memory of one life.
pub struct Life {
    /// Guest RAM.
    pub ram: Arc<GuestRam>,
    /// What made the vCPUs, and has the VM's clock.
    pub engine: Arc<dyn Engine>,
    /// The devices.
    pub machine: Arc<Machine>,
    /// The vCPUs. Each is locked by its thread while it runs; who has paused the VM may lock them all.
    pub cpus: Vec<Mutex<Box<dyn Vcpu>>>,
    /// Their kickers.
    pub kicks: Vec<Arc<dyn Kick>>,
}

#[derive(Default)]
struct State {
    life: Option<Arc<Life>>,
    ending: Option<Ending>,
    stop: Option<Ending>,
    closed: bool,
    /// The debugger has stopped the VM.
    paused: bool,
    /// The user has: it stays so through resets.
    frozen: bool,
    /// Others who want it to stand still.
    holds: usize,
    /// vCPUs inside the engine.
    inside: usize,
    debugger: Option<Debugger>,
}

/// What an attached debugger wants, and where it is told.
struct Debugger {
    breakpoints: Vec<u64>,
    step: Option<usize>,
    /// Only this vCPU may run.
    only: Option<usize>,
    /// vCPUs that stopped at a break point or after a step.
    stops: VecDeque<usize>,
    notify: Arc<Notify>,
}

impl State {
    fn ended(&self) -> bool {
        self.ending.is_some() || self.stop.is_some()
    }

    fn kick(&self) {
        if let Some(life) = &self.life {
            life.kicks.iter().for_each(|kick| kick.kick());
        }
    }
}

/// How a VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Condition {
    /// It boots or resets.
    Starting,
    /// Its vCPUs run, or sleep as the guest wants.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// They stand still for gdb.
    Debugged,
    /// It ends.
    Ending,
}

/// A life whose vCPUs stand still: [`Control::hold`].
pub(crate) struct Hold {
    control: Arc<Control>,
    life: Arc<Life>,
}

impl Hold {
    pub(crate) fn life(&self) -> &Life {
        &self.life
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.control.lock().holds -= 1;
        self.control.changed.notify_all();
    }
}

/// Shared by all threads of a VM. Make one before the VM, so that it can be stopped at any time.
#[derive(Default)]
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    /// Nothing runs yet.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between any two statements, so a panic elsewhere does not spoil it.
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ends the VM, or with [`Ending::Reset`] this life. The first of a life's endings counts.
    pub fn end(&self, ending: Ending) {
        let mut state = self.lock();
        let place = if ending.is_stop() {
            &mut state.stop
        } else {
            &mut state.ending
        };
        place.get_or_insert(ending);
        state.kick();
        self.changed.notify_all();
    }

    /// Begins a life.
    pub(crate) fn begin(&self, life: Arc<Life>) {
        let mut state = self.lock();
        state.life = Some(life);
        self.changed.notify_all();
    }

    /// Waits for the life's end.
    pub(crate) fn wait(&self) -> Ending {
        let mut state = self.lock();
        loop {
            if let Some(ending) = state.stop.as_ref().or(state.ending.as_ref()) {
                return ending.clone();
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }

    /// Forgets the life that has ended. Its vCPU threads have left.
    pub(crate) fn finish(&self) {
        let mut state = self.lock();
        state.life = None;
        state.ending = None;
        self.changed.notify_all();
    }

    /// vCPU `cpu` wants to run: waits until it may, and says under which debug control; `None`: its life has ended.
    pub(crate) fn enter(&self, cpu: usize) -> Option<DebugControl> {
        let mut state = self.lock();
        loop {
            if state.ended() {
                return None;
            }
            let held = state
                .debugger
                .as_ref()
                .and_then(|debugger| debugger.only)
                .is_some_and(|only| only != cpu);
            if !state.paused && !state.frozen && state.holds == 0 && !held {
                break;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state.inside += 1;
        Some(match &state.debugger {
            Some(debugger) => DebugControl {
                single_step: debugger.step == Some(cpu),
                breakpoints: debugger.breakpoints.clone(),
            },
            None => DebugControl::default(),
        })
    }

    /// vCPU `cpu` has left the engine; `debug`: at a break point or after a step.
    pub(crate) fn leave(&self, cpu: usize, debug: bool) {
        let mut state = self.lock();
        state.inside -= 1;
        if debug && let Some(debugger) = &mut state.debugger {
            debugger.stops.push_back(cpu);
            debugger.notify.signal();
            state.paused = true;
            state.kick();
        }
        self.changed.notify_all();
    }

    /// A debugger attaches: the VM pauses. It is told of stops and of the end by `notify`.
    pub(crate) fn attach(&self, notify: Arc<Notify>) {
        self.lock().debugger = Some(Debugger {
            breakpoints: Vec::new(),
            step: None,
            only: None,
            stops: VecDeque::new(),
            notify,
        });
        self.pause();
    }

    /// The debugger has gone: the VM runs on.
    pub(crate) fn detach(&self) {
        let mut state = self.lock();
        state.debugger = None;
        state.paused = false;
        // Running vCPUs come out to lose their break points.
        state.kick();
        self.changed.notify_all();
    }

    /// Stops all vCPUs and waits until they stand still.
    pub(crate) fn pause(&self) {
        let mut state = self.lock();
        state.paused = true;
        drop(self.stand_still(state));
    }

    /// Stops all vCPUs for the user, until [`Control::thaw`] and whatever a debugger does, and waits until they stand still.
    pub(crate) fn freeze(&self) {
        let mut state = self.lock();
        state.frozen = true;
        drop(self.stand_still(state));
    }

    /// Lets the VM run on that the user has stopped.
    pub(crate) fn thaw(&self) {
        self.lock().frozen = false;
        self.changed.notify_all();
    }

    /// True if the user has stopped the VM.
    pub(crate) fn frozen(&self) -> bool {
        self.lock().frozen
    }

    fn stand_still<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.kick();
        while state.inside > 0 {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        state
    }

    /// Has all vCPUs stand still, whatever a debugger does, until the value is dropped. If the VM is being reset, waits for
    /// its next life; `None` once the VM has gone.
    pub(crate) fn hold(self: &Arc<Self>) -> Option<Hold> {
        loop {
            let hold = Hold {
                life: self.life()?,
                control: self.clone(),
            };
            let mut state = self.lock();
            state.holds += 1;
            let state = self.stand_still(state);
            let same = state.life.as_ref().is_some_and(|life| Arc::ptr_eq(life, &hold.life));
            if same && !state.ended() {
                return Some(hold);
            }
        }
    }

    /// The life now, if there is one.
    pub(crate) fn now(&self) -> Option<Arc<Life>> {
        self.lock().life.clone()
    }

    /// How the VM is.
    pub(crate) fn condition(&self) -> Condition {
        let state = self.lock();
        match &state.life {
            _ if state.stop.is_some() || state.closed => Condition::Ending,
            Some(_) if state.ending.is_none() => match (&state.debugger, state.holds) {
                (Some(_), _) if state.paused => Condition::Debugged,
                (_, 0) if !state.frozen => Condition::Running,
                _ => Condition::Paused,
            },
            _ => Condition::Starting,
        }
    }

    /// Lets the VM run on under a debugger: with these break points, one vCPU stepping, or all but one held.
    pub(crate) fn resume(&self, breakpoints: &[u64], step: Option<usize>, only: Option<usize>) {
        let mut state = self.lock();
        if let Some(debugger) = &mut state.debugger {
            debugger.breakpoints = breakpoints.to_vec();
            debugger.step = step;
            debugger.only = only;
            debugger.stops.clear();
        }
        state.paused = false;
        self.changed.notify_all();
    }

    /// The first vCPU that stopped for the debugger since it resumed.
    pub(crate) fn debug_stop(&self) -> Option<usize> {
        let mut state = self.lock();
        state.debugger.as_mut().and_then(|debugger| debugger.stops.pop_front())
    }

    /// The VM has gone: who debugs it is told.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        if let Some(debugger) = &state.debugger {
            debugger.notify.signal();
        }
        self.changed.notify_all();
    }

    /// True once the VM has gone.
    pub(crate) fn closed(&self) -> bool {
        self.lock().closed
    }

    /// The life now, waiting for one while the VM is being reset; `None` once the VM has gone.
    pub(crate) fn life(&self) -> Option<Arc<Life>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let (Some(life), false) = (&state.life, state.ended()) {
                return Some(life.clone());
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(|poisoned| poisoned.into_inner());
        }
    }
}
