//! One VM of the daemon: does what its [`Lifecycle`] decides, and gives back what happened.

use crate::control::{self, ControlError};
use crate::host::Shared;
use crate::policy::{Action, Found, Input, Lifecycle, Refusal, RestartPolicy, State};
use crate::process::{self, Process, ProcessError};
use crate::spec::Spec;
use crate::store::{self, Exit, Folder, Kept, Progress, StoreError};
use posada_protocol::{Client, Ending};
use posada_vmm::remote::Request;
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, watch};
use tokio::task::spawn_blocking;
use utoipa::ToSchema;

/// How long a guest's agent may take to hear that it is to power off.
const HEARING: Duration = Duration::from_secs(2);
/// How often an adopted process that still starts is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// A VM as users see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct View {
    /// Its id: 12 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it does.
    pub state: State,
    /// Why it is so, where there is something to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// How its last process ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// Its process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// When it was made, in milliseconds since 1970.
    pub created: u64,
    /// When it was started last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started: Option<u64>,
    /// How often it was started again, by its policy or by a restart.
    pub restarts: u64,
    /// The folder of its sockets: control, console and vsock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub sockets: Option<PathBuf>,
    /// What it is to be, unless that cannot be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spec: Option<Spec>,
    /// It was removed.
    #[serde(skip)]
    pub removed: bool,
}

/// Why something was not done with a VM.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// Its life does not allow it.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It could not be written down.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Its process does not do it.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// It cannot be so.
    #[error("{0}")]
    Bad(String),
}

/// What can be changed of a VM that is there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Whether it is started again when it ends by itself: at once.
    #[serde(default)]
    pub restart: Option<RestartPolicy>,
    /// vCPUs: from its next start on.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Guest memory in bytes: from its next start on.
    #[serde(default)]
    pub memory: Option<u64>,
    /// Labels to set.
    #[serde(default)]
    pub labels: std::collections::BTreeMap<String, String>,
}

/// What happens while another step is made, and begins one of its own.
type Later = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Inner {
    kept: Kept,
    life: Lifecycle,
    progress: Progress,
    process: Option<Arc<Process>>,
}

/// A VM.
pub struct Vm {
    id: String,
    folder: Folder,
    shared: Arc<Shared>,
    inner: Mutex<Inner>,
    view: watch::Sender<View>,
}

impl Vm {
    /// A VM that is on disk and has no process.
    pub(crate) fn new(shared: Arc<Shared>, id: String, kept: Kept, progress: Progress) -> Arc<Self> {
        let life = Lifecycle::new(kept.spec.restart, kept.spec.remove);
        let inner = Inner {
            kept,
            life,
            progress,
            process: None,
        };
        let folder = shared.store.folder(&id);
        let view = watch::Sender::new(view(&id, &inner));
        Arc::new(Self {
            id,
            folder,
            shared,
            inner: Mutex::new(inner),
            view,
        })
    }

    /// Finds out how it is while no daemon has looked, and goes on from there.
    pub(crate) async fn recover(self: &Arc<Self>) {
        let mut inner = self.inner.lock().await;
        let found = self.find(&mut inner).await;
        let progress = &inner.progress;
        let life = inner.life.clone();
        let (life, actions) = life.recover(progress.wanted, progress.failures, found, self.shared.now());
        inner.life = life;
        if inner.process.is_some() {
            self.shared.events.tell("adopted", &self.id, &inner.kept.name, None);
        }
        if let Err(error) = self.keep(&mut inner).await {
            tracing::warn!(id = self.id, %error, "a VM's state cannot be written down");
        }
        self.execute(&mut inner, actions).await;
        self.publish(&inner);
    }

    async fn find(self: &Arc<Self>, inner: &mut Inner) -> Found {
        let mut attempts = 0;
        let found = loop {
            match Process::find(&self.folder) {
                // It has the lock from its first moment, and says who it is in the next.
                Err(ProcessError::Nameless(_)) if attempts < 20 => {
                    attempts += 1;
                    tokio::time::sleep(LOOK / 4).await;
                }
                other => break other,
            }
        };
        match found {
            Ok(Some((process, up))) => {
                let process = Arc::new(process);
                inner.process = Some(process.clone());
                tokio::spawn(self.clone().see_end(process.clone()));
                if !up {
                    tokio::spawn(self.clone().see_adopted(process));
                    return Found::Starting;
                }
                match control::is_paused(process.sockets()).await {
                    Ok(true) => Found::Paused,
                    _ => Found::Running,
                }
            }
            Ok(None) => {
                // A word that is newer than what is known, or the end that nobody has seen.
                let ran = inner.progress.started.is_some();
                if inner.progress.last.is_none() && ran {
                    let mut exit = self.folder.exit().unwrap_or_else(|| process::lost(None, &self.folder));
                    exit.told = !inner.progress.wanted;
                    inner.progress.last = Some(exit);
                }
                Found::Nothing(inner.progress.last.as_ref().map(Exit::cause))
            }
            Err(error) => {
                tracing::error!(id = self.id, %error, "a VM's process cannot be adopted");
                Found::Nothing(None)
            }
        }
    }

    /// How it is now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its folder.
    pub fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Tells of each change.
    pub fn watch(&self) -> watch::Receiver<View> {
        self.view.subscribe()
    }

    /// Something has happened to it, or somebody wants something.
    ///
    /// # Errors
    /// [`VmError`]; nothing has changed then.
    pub async fn apply(self: &Arc<Self>, input: Input) -> Result<(), VmError> {
        let mut inner = self.inner.lock().await;
        self.step(&mut inner, input).await
    }

    /// The same, if `process` is still its process.
    fn apply_of(self: &Arc<Self>, process: &Arc<Process>, input: Input) -> Later {
        let (vm, process) = (self.clone(), process.clone());
        Box::pin(async move {
            let mut inner = vm.inner.lock().await;
            if inner.process.as_ref().is_some_and(|now| Arc::ptr_eq(now, &process)) {
                let _ = vm.step(&mut inner, input).await;
            }
        })
    }

    /// Time has passed.
    fn tick(self: &Arc<Self>) -> Later {
        let vm = self.clone();
        Box::pin(async move {
            let _ = vm.apply(Input::Tick).await;
        })
    }

    /// Its process has ended, in this way.
    fn over(self: &Arc<Self>, mut exit: Exit) -> Later {
        let vm = self.clone();
        Box::pin(async move {
            let mut inner = vm.inner.lock().await;
            exit.told = inner.life.is_told();
            let cause = exit.cause();
            inner.process = None;
            inner.progress.last = Some(exit);
            let progress = inner.progress.clone();
            if let Err(error) = vm.write(&mut inner, progress).await {
                tracing::warn!(id = vm.id, %error, "a VM's end cannot be written down");
            }
            let _ = vm.step(&mut inner, Input::Ended(cause)).await;
        })
    }

    async fn step(self: &Arc<Self>, inner: &mut Inner, input: Input) -> Result<(), VmError> {
        let before = inner.life.clone();
        let actions = inner.life.on(input, self.shared.now())?;
        if let Err(error) = self.keep(inner).await {
            // What is not on disk must not begin; what ends does so even if nobody will know.
            if matches!(input, Input::Start | Input::Restart(_)) {
                inner.life = before;
                return Err(error.into());
            }
            tracing::warn!(id = self.id, %error, "a VM's state cannot be written down");
        }
        self.execute(inner, actions).await;
        self.publish(inner);
        Ok(())
    }

    /// Writes down what a later daemon must know, if that has changed.
    async fn keep(&self, inner: &mut Inner) -> Result<(), StoreError> {
        let progress = Progress {
            wanted: inner.life.wanted(),
            failures: inner.life.failures(),
            ..inner.progress.clone()
        };
        if progress == inner.progress {
            return Ok(());
        }
        self.write(inner, progress).await
    }

    async fn write(&self, inner: &mut Inner, progress: Progress) -> Result<(), StoreError> {
        let (folder, copy) = (self.folder.clone(), progress.clone());
        blocking(move || folder.write_state(&copy)).await?;
        inner.progress = progress;
        Ok(())
    }

    async fn execute(self: &Arc<Self>, inner: &mut Inner, actions: Vec<Action>) {
        let mut left = std::collections::VecDeque::from(actions);
        while let Some(action) = left.pop_front() {
            match action {
                Action::Spawn => {
                    let restarted =
                        inner.view_state() == State::Starting && self.view.borrow().state == State::Restarting;
                    if let Err(error) = self.spawn(inner, restarted).await {
                        let exit = Exit {
                            code: 125,
                            reason: "error".into(),
                            message: Some(error.to_string()),
                            time: store::now(),
                            told: false,
                        };
                        let cause = exit.cause();
                        inner.progress.last = Some(exit);
                        left.extend(
                            inner
                                .life
                                .on(Input::Ended(cause), self.shared.now())
                                .unwrap_or_default(),
                        );
                        let progress = inner.progress.clone();
                        if let Err(error) = self.write(inner, progress).await {
                            tracing::warn!(id = self.id, %error, "a VM's state cannot be written down");
                        }
                    }
                }
                Action::Ask => {
                    if let Some(process) = &inner.process {
                        tokio::spawn(self.clone().ask(process.clone(), inner.kept.spec.vsock));
                    }
                }
                Action::Terminate | Action::Kill => {
                    if let Some(process) = &inner.process {
                        process.signal(match action {
                            Action::Kill => Signal::KILL,
                            _ => Signal::TERM,
                        });
                    }
                }
                Action::Wake(at) => {
                    let vm = self.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(at.saturating_sub(vm.shared.now())).await;
                        vm.tick().await;
                    });
                }
                Action::Delete => {
                    self.publish(inner);
                    self.delete(inner).await;
                }
            }
        }
    }

    async fn delete(self: &Arc<Self>, inner: &Inner) {
        let (shared, id) = (self.shared.clone(), self.id.clone());
        if let Err(error) = blocking(move || shared.store.remove(&id)).await {
            tracing::error!(id = self.id, %error, "a removed VM is still on disk");
        }
        self.shared.forget(&self.id);
        self.view.send_modify(|view| view.removed = true);
        self.shared.events.tell("removed", &self.id, &inner.kept.name, None);
    }

    async fn spawn(self: &Arc<Self>, inner: &mut Inner, restarted: bool) -> Result<(), SpawnError> {
        let progress = Progress {
            wanted: true,
            started: Some(store::now()),
            last: None,
            restarts: inner.progress.restarts + u64::from(restarted),
            ..inner.progress.clone()
        };
        self.write(inner, progress).await?;
        let (shared, folder, name) = (self.shared.clone(), self.folder.clone(), inner.kept.name.clone());
        let sockets = self.shared.store.places().sockets(&self.id);
        let process = blocking(move || Process::start(&shared.program, &name, &folder, sockets)).await?;
        let process = Arc::new(process);
        inner.process = Some(process.clone());
        tokio::spawn(self.clone().see_end(process.clone()));
        if let Some(pipe) = process.take_up() {
            let vm = self.clone();
            tokio::spawn(async move {
                if process::comes_up(pipe).await {
                    vm.apply_of(&process, Input::Up).await;
                }
            });
        }
        Ok(())
    }

    /// Sees the end of its process.
    async fn see_end(self: Arc<Self>, process: Arc<Process>) {
        process.ended().await;
        let folder = self.folder.clone();
        let exit = blocking(move || process.exit(&folder)).await;
        self.over(exit).await;
    }

    /// Sees an adopted process, whose pipe has gone with the daemon of before, come up.
    async fn see_adopted(self: Arc<Self>, process: Arc<Process>) {
        loop {
            let look = async {
                tokio::time::sleep(LOOK).await;
                matches!(Process::find(&self.folder), Ok(Some((_, true))))
            };
            tokio::select! {
                () = process.ended() => return,
                up = look => if up {
                    return self.apply_of(&process, Input::Up).await;
                },
            }
        }
    }

    /// Asks the guest to power off.
    async fn ask(self: Arc<Self>, process: Arc<Process>, vsock: bool) {
        let socket = process.sockets().join("vsock");
        let asked = blocking(move || {
            let client = Client::connect(&socket, HEARING)?;
            client.shut_down(Ending::PowerOff)
        });
        let heard = vsock
            && asked
                .await
                .inspect_err(|error| tracing::debug!(id = self.id, %error, "the guest cannot be asked to power off"))
                .is_ok();
        if !heard {
            self.apply_of(&process, Input::Deaf).await;
        }
    }

    /// Has its vCPUs stand still, or run on.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn set_paused(self: &Arc<Self>, paused: bool) -> Result<(), VmError> {
        let mut inner = self.inner.lock().await;
        inner.life.may_pause()?;
        let Some(process) = inner.process.clone() else {
            return Err(Refusal::NotRunning.into());
        };
        let (request, fact) = match paused {
            true => (Request::Pause, Input::Paused),
            false => (Request::Resume, Input::Resumed),
        };
        control::ask(process.sockets(), &request).await?;
        self.step(&mut inner, fact).await
    }

    /// Ends its process at once.
    ///
    /// # Errors
    /// [`VmError`].
    pub async fn kill(self: &Arc<Self>) -> Result<(), VmError> {
        self.apply(Input::Kill).await
    }

    /// Gives it another name. That nobody else has it is the caller's business.
    pub(crate) async fn rename(self: &Arc<Self>, name: String) -> Result<(), VmError> {
        let mut inner = self.inner.lock().await;
        let kept = Kept {
            name,
            ..inner.kept.clone()
        };
        self.write_spec(&mut inner, kept).await?;
        self.shared.events.tell("renamed", &self.id, &inner.kept.name, None);
        self.publish(&inner);
        Ok(())
    }

    /// Changes what it is to be.
    ///
    /// # Errors
    /// [`VmError`]; nothing has changed then.
    pub async fn change(self: &Arc<Self>, change: Change) -> Result<(), VmError> {
        let mut inner = self.inner.lock().await;
        let mut kept = inner.kept.clone();
        kept.spec.restart = change.restart.unwrap_or(kept.spec.restart);
        kept.spec.cpus = change.cpus.unwrap_or(kept.spec.cpus);
        kept.spec.memory = change.memory.unwrap_or(kept.spec.memory);
        kept.spec.labels.extend(change.labels);
        kept.spec.check(self.shared.host_cpus).map_err(VmError::Bad)?;
        self.write_spec(&mut inner, kept).await?;
        let policy = inner.kept.spec.restart;
        inner.life.set_policy(policy);
        self.shared.events.tell("changed", &self.id, &inner.kept.name, None);
        self.publish(&inner);
        Ok(())
    }

    async fn write_spec(&self, inner: &mut Inner, kept: Kept) -> Result<(), StoreError> {
        let (folder, copy) = (self.folder.clone(), kept.clone());
        blocking(move || folder.write_spec(&copy)).await?;
        inner.kept = kept;
        Ok(())
    }

    fn publish(&self, inner: &Inner) {
        let removed = self.view.borrow().removed;
        let new = View {
            removed,
            ..view(&self.id, inner)
        };
        let before = self.view.send_replace(new.clone());
        if before.state != new.state {
            self.shared
                .events
                .tell(new.state.name(), &self.id, &new.name, new.message);
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum SpawnError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Process(#[from] ProcessError),
}

impl Inner {
    fn view_state(&self) -> State {
        self.life.state(self.progress.last.as_ref().map(Exit::cause))
    }
}

fn view(id: &str, inner: &Inner) -> View {
    let state = inner.view_state();
    let exit = inner.progress.last.clone().filter(|_| !state.is_live());
    let message = exit
        .as_ref()
        .filter(|exit| !exit.told)
        .and_then(|exit| exit.message.clone());
    View {
        id: id.into(),
        name: inner.kept.name.clone(),
        state,
        message,
        exit,
        pid: inner.process.as_ref().map(|process| process.pid()),
        created: inner.kept.created,
        started: inner.progress.started,
        restarts: inner.progress.restarts,
        sockets: inner.process.as_ref().map(|process| process.sockets().into()),
        spec: Some(inner.kept.spec.clone()),
        removed: false,
    }
}

/// Does what may wait for a disk or for another process beside the daemon's one thread.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
