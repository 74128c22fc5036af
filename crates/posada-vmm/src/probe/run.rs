//! Runs the program and takes times.

use super::program::{self, Phase};
use posada_engine::{Engine, Error, Exit, Kick, Machine, Vcpu};
use posada_memory::GuestRam;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long an engine has for coming back once it was told to stop.
const GRACE: Duration = Duration::from_millis(500);
/// How long the engine that is known to work may take: milliseconds, unless the host is very busy.
const REFERENCE_LIMIT: Duration = Duration::from_secs(5);
/// How many times longer than that engine another may take, between two limits.
const TIMES: u32 = 20;
const LEAST_LIMIT: Duration = Duration::from_secs(1);
const MOST_LIMIT: Duration = Duration::from_secs(10);
/// How often the program runs on both...
const RUNS: u32 = 5;
/// ...unless this has passed before.
const QUICK: Duration = Duration::from_millis(300);

/// How the program went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// The phases that it completed with the right result, and the seconds that each took.
    pub phases: Vec<(Phase, f64)>,
    /// Its end.
    pub end: End,
}

/// How the program ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// As it should.
    Finished,
    /// The engine could not be made.
    Refused(String),
    /// It computed something else than it must in this phase.
    Wrong(Phase),
    /// It was still in this phase at its limit, in seconds.
    Late(Phase, f64),
    /// The engine gave it up in this phase.
    Failed(Phase, String),
    /// The engine did not come back when it was told to stop in this phase.
    Stuck(Phase),
}

impl fmt::Display for End {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => write!(out, "it has finished"),
            Self::Refused(why) => write!(out, "{why}"),
            Self::Wrong(phase) => write!(out, "it went wrong in the phase \"{phase}\""),
            Self::Late(phase, limit) => write!(out, "after {limit:.1} s it was still in the phase \"{phase}\""),
            Self::Failed(phase, why) => write!(out, "in the phase \"{phase}\": {why}"),
            Self::Stuck(phase) => write!(out, "it could not be stopped in the phase \"{phase}\""),
        }
    }
}

/// Makes the engine that the program shall run on.
pub trait Make: Fn(Arc<GuestRam>) -> Result<Arc<dyn Engine>, Error> + Clone + Send + 'static {}

impl<F: Fn(Arc<GuestRam>) -> Result<Arc<dyn Engine>, Error> + Clone + Send + 'static> Make for F {}

/// Runs the program on an engine and on one that is known to work, by turns, up to [`RUNS`] times while that is quick. Gives
/// the best time of each phase on both, since other programs can only make it longer; a run that does not finish speaks for
/// all of its engine.
pub fn compare(candidate: impl Make, reference: impl Make) -> (Outcome, Outcome) {
    compare_while(QUICK, candidate, reference)
}

/// The same, with what counts as quick.
pub(super) fn compare_while(quick: Duration, candidate: impl Make, reference: impl Make) -> (Outcome, Outcome) {
    let begin = Instant::now();
    let mut known = run(reference.clone(), REFERENCE_LIMIT);
    // A host that is busy, or itself emulated, is so for both.
    let limit = (begin.elapsed() * TIMES).clamp(LEAST_LIMIT, MOST_LIMIT);
    let mut tried = run(candidate.clone(), limit);
    for _ in 1..RUNS {
        if begin.elapsed() > quick || tried.end != End::Finished || known.end != End::Finished {
            break;
        }
        known.improve(run(reference.clone(), REFERENCE_LIMIT));
        tried.improve(run(candidate.clone(), limit));
    }
    (tried, known)
}

impl Outcome {
    /// Takes the better times of `again`, or all of it if it did not finish.
    fn improve(&mut self, again: Self) {
        if again.end != End::Finished {
            *self = again;
            return;
        }
        for ((_, best), (_, again)) in self.phases.iter_mut().zip(&again.phases) {
            *best = best.min(*again);
        }
    }
}

/// Runs the program on the engine that `make` gives, for `limit` at the most and a little more.
///
/// An engine may be so broken that it does not even stop; its thread is left behind then.
pub fn run(make: impl Make, limit: Duration) -> Outcome {
    let host = Arc::new(Host::new());
    let (sender, ended) = channel();
    let theirs = host.clone();
    let spawned = thread::Builder::new()
        .name("probe".into())
        .spawn(move || sender.send(run_cpu(&theirs, make)));
    let end = match spawned {
        Err(error) => End::Refused(format!("the host gives no thread: {error}")),
        Ok(_) => match ended.recv_timeout(limit) {
            Ok(end) => end,
            Err(RecvTimeoutError::Disconnected) => died(&host),
            Err(RecvTimeoutError::Timeout) => {
                host.stop();
                match ended.recv_timeout(GRACE) {
                    Ok(End::Late(phase, _)) => End::Late(phase, limit.as_secs_f64()),
                    Ok(end) => end,
                    Err(RecvTimeoutError::Disconnected) => died(&host),
                    Err(RecvTimeoutError::Timeout) => End::Stuck(host.phase()),
                }
            }
        },
    };
    Outcome {
        phases: host.log().done.clone(),
        end,
    }
}

fn died(host: &Host) -> End {
    End::Failed(host.phase(), "its thread has died; please report it".into())
}

/// The vCPU's thread.
fn run_cpu(host: &Arc<Host>, make: impl Make) -> End {
    let mut cpu = match make_cpu(host, make) {
        Ok(cpu) => cpu,
        Err(why) => return End::Refused(why),
    };
    loop {
        // A stop either finds the kick set, or is seen here.
        if let Some(end) = host.end() {
            return end;
        }
        match cpu.run() {
            Exit::Kicked => {}
            Exit::TripleFault(report) => {
                tracing::debug!(report, "the probe program crashed");
                return End::Failed(host.phase(), "its processor met a triple fault".into());
            }
            Exit::Failed(why) => return End::Failed(host.phase(), why),
            Exit::Debug => return End::Failed(host.phase(), "it stopped for a debugger that there is not".into()),
        }
    }
}

fn make_cpu(host: &Arc<Host>, make: impl Make) -> Result<Box<dyn Vcpu>, String> {
    let ram = Arc::new(GuestRam::new(program::RAM).map_err(|error| error.to_string())?);
    let entry = program::load(&ram);
    // The reader knows which engine it is about.
    let why = |(Error::Host(why) | Error::State(why))| why;
    let mut cpu = make(ram)
        .and_then(|engine| engine.create_vcpu(0, host.clone()))
        .map_err(why)?;
    cpu.set_state(&entry).map_err(why)?;
    host.log().kick = Some(cpu.kicker());
    Ok(cpu)
}

/// The machine around the program.
struct Host(Mutex<Log>);

struct Log {
    kick: Option<Arc<dyn Kick>>,
    /// The phase that has begun, and when.
    begun: Option<(Phase, Instant)>,
    done: Vec<(Phase, f64)>,
    /// How often [`program::MARK`] was read.
    reads: u32,
    end: Option<End>,
}

impl Host {
    fn new() -> Self {
        Self(Mutex::new(Log {
            kick: None,
            begun: None,
            done: Vec::new(),
            reads: 0,
            end: None,
        }))
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn phase(&self) -> Phase {
        self.log().phase()
    }

    fn end(&self) -> Option<End> {
        self.log().end.clone()
    }

    fn stop(&self) {
        let mut log = self.log();
        let phase = log.phase();
        log.finish(End::Late(phase, 0.0));
    }
}

impl Log {
    /// The phase that has begun or is to come.
    fn phase(&self) -> Phase {
        Phase::ALL[self.done.len().min(Phase::ALL.len() - 1)]
    }

    /// The first end is the one that counts.
    fn finish(&mut self, end: End) {
        self.end.get_or_insert(end);
        if let Some(kick) = &self.kick {
            kick.kick();
        }
    }

    fn mark(&mut self, value: u32) {
        let complete = self.done.len() == Phase::ALL.len();
        match Phase::of(value) {
            Some(phase) if !complete && phase == self.phase() => self.begun = Some((phase, Instant::now())),
            None if complete && value == program::DONE => self.finish(End::Finished),
            _ => self.finish(End::Wrong(self.phase())),
        }
    }

    fn result(&mut self, value: u32) {
        let now = Instant::now();
        match self.begun.take() {
            Some((phase, begin)) if value == phase.expected() => {
                self.done.push((phase, now.duration_since(begin).as_secs_f64()));
            }
            _ => self.finish(End::Wrong(self.phase())),
        }
    }
}

impl Machine for Host {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (program::MARK, Ok(word)) = (port, <&mut [u8; 4]>::try_from(data)) {
            let mut log = self.log();
            *word = program::device_word(log.reads).to_le_bytes();
            log.reads = log.reads.wrapping_add(1);
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        match (port, value) {
            (program::MARK, Ok(value)) => self.log().mark(value),
            (program::RESULT, Ok(value)) => self.log().result(value),
            _ => {}
        }
    }

    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
}
