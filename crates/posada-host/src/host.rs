//! All VMs of a user: which there are, what they are called, and what is done with them.

use crate::events::Events;
use crate::name::{self, NameError};
use crate::operations::{Operation, Operations, TooMany};
use crate::policy::{Input, State};
use crate::spec::Spec;
use crate::store::{self, Kept, Places, Progress, Store, StoreError};
use crate::vm::{View, Vm, VmError, blocking};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No such VM, or no such name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// Another VM has it.
    #[error("the VM {id} has the name {name:?} already; take another one, or rename or remove that one")]
    Taken {
        /// The name.
        name: String,
        /// The VM that has it.
        id: String,
    },
    /// A request with this key is being answered.
    #[error("a request with the same key is under way; ask again in a moment")]
    UnderWay,
    /// It cannot be.
    #[error("{0}")]
    Bad(String),
    /// What is on disk of it cannot be read.
    #[error("the VM {id} cannot be used: {why}; repair that file or remove the VM by posada rm {id}")]
    Broken {
        /// The VM.
        id: String,
        /// What is wrong.
        why: String,
    },
    /// There is no operation with this id.
    #[error("there is no operation {0:?}; only the last ones are remembered")]
    NoOperation(String),
    /// Its life does not allow it, its process does not do it, or it cannot be written down.
    #[error("cannot {doing} {name}: {source}")]
    Vm {
        /// What was wanted.
        doing: &'static str,
        /// Of which VM.
        name: String,
        /// Why not.
        source: VmError,
    },
    /// It cannot be written down.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// More than the host can remember.
    #[error(transparent)]
    TooMany(#[from] TooMany),
}

enum Entry {
    Vm(Arc<Vm>),
    Broken(String),
}

#[derive(Default)]
struct Registry {
    vms: BTreeMap<String, Entry>,
    /// From names to ids, of VMs that are being made, too.
    names: HashMap<String, String>,
    /// Keys of requests that make VMs now, and of those that have.
    making: HashSet<String>,
    keys: HashMap<String, String>,
    /// The last VMs that were removed, as they were then: who waits for one that is quick may come too late.
    gone: VecDeque<View>,
}

/// Removed VMs that are remembered.
const REMEMBERED: usize = 64;

/// What all VMs of a daemon share.
pub(crate) struct Shared {
    pub(crate) store: Store,
    pub(crate) events: Events,
    /// The program whose `vm` command runs a VM.
    pub(crate) program: PathBuf,
    pub(crate) host_cpus: u32,
    started: Instant,
    registry: Mutex<Registry>,
}

impl Shared {
    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Time since the daemon's start.
    pub(crate) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// A VM is no more.
    pub(crate) fn forget(&self, id: &str) {
        let mut registry = self.registry();
        if let Some(Entry::Vm(vm)) = registry.vms.remove(id) {
            registry.gone.truncate(REMEMBERED - 1);
            registry.gone.push_front(vm.view());
        }
        registry.names.retain(|_, owner| owner != id);
        registry.keys.retain(|_, made| made != id);
    }
}

/// The VMs of a user. Clones are the same host.
#[derive(Clone)]
pub struct Host {
    shared: Arc<Shared>,
    operations: Arc<Operations>,
    /// Requests that were answered.
    pub requests: Arc<AtomicU64>,
}

impl Host {
    /// Opens the store and adopts what runs. `program`: the `posada` whose `vm` command runs a VM.
    ///
    /// # Errors
    /// [`StoreError`].
    pub async fn open(places: Places, program: PathBuf) -> Result<Self, StoreError> {
        places.make_run()?;
        let store = Store::open(places)?;
        let found = store.vms()?;
        let shared = Arc::new(Shared {
            store,
            events: Events::default(),
            program,
            host_cpus: std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u32),
            started: Instant::now(),
            registry: Mutex::default(),
        });
        let mut recovered = Vec::new();
        for (id, folder) in found {
            let read = folder.spec().map(|kept| (kept, folder.state()));
            let entry = match read {
                Ok((kept, progress)) => {
                    let progress = progress.unwrap_or_else(|error| {
                        tracing::error!(id, %error, "a VM's state is taken for that of a new one");
                        Progress::default()
                    });
                    let mut registry = shared.registry();
                    registry.names.insert(kept.name.clone(), id.clone());
                    if let Some(key) = &kept.key {
                        registry.keys.insert(key.clone(), id.clone());
                    }
                    let vm = Vm::new(shared.clone(), id.clone(), kept, progress);
                    recovered.push(vm.clone());
                    Entry::Vm(vm)
                }
                Err(error) => {
                    tracing::error!(id, %error, "a VM cannot be used");
                    Entry::Broken(error.to_string())
                }
            };
            shared.registry().vms.insert(id, entry);
        }
        for vm in recovered {
            vm.recover().await;
        }
        Ok(Self {
            shared,
            operations: Arc::default(),
            requests: Arc::default(),
        })
    }

    /// Where its VMs are.
    pub fn places(&self) -> &Places {
        self.shared.store.places()
    }

    /// What happens.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// What takes a while.
    pub fn operations(&self) -> &Operations {
        &self.operations
    }

    /// Time since its start.
    pub fn uptime(&self) -> Duration {
        self.shared.now()
    }

    /// All VMs, by their names.
    pub fn list(&self) -> Vec<View> {
        let registry = self.shared.registry();
        let mut views: Vec<View> = registry
            .vms
            .iter()
            .map(|(id, entry)| match entry {
                Entry::Vm(vm) => vm.view(),
                Entry::Broken(why) => broken(id, why),
            })
            .collect();
        drop(registry);
        views.sort_by(|one, other| one.name.cmp(&other.name));
        views
    }

    /// The id that a word means.
    fn resolve(&self, registry: &Registry, word: &str) -> Result<String, NameError> {
        if let Some(id) = registry.names.get(word) {
            return Ok(id.clone());
        }
        let mut names: HashMap<&str, &str> = registry.vms.keys().map(|id| (id.as_str(), id.as_str())).collect();
        names.extend(registry.names.iter().map(|(name, id)| (id.as_str(), name.as_str())));
        let known = names.iter().filter(|(id, _)| registry.vms.contains_key(**id));
        name::resolve(word, known.map(|(id, name)| (*id, *name))).map(Into::into)
    }

    /// The VM that a word means: its name, its id, or the beginning of its id.
    ///
    /// # Errors
    /// [`HostError::Name`], [`HostError::Broken`].
    pub fn find(&self, word: &str) -> Result<Arc<Vm>, HostError> {
        let registry = self.shared.registry();
        let id = self.resolve(&registry, word)?;
        match registry.vms.get(&id) {
            Some(Entry::Vm(vm)) => Ok(vm.clone()),
            Some(Entry::Broken(why)) => Err(HostError::Broken { id, why: why.clone() }),
            // It is being made.
            None => Err(HostError::UnderWay),
        }
    }

    /// How a VM is, even one that cannot be used.
    ///
    /// # Errors
    /// [`HostError::Name`].
    pub fn inspect(&self, word: &str) -> Result<View, HostError> {
        match self.find(word) {
            Ok(vm) => Ok(vm.view()),
            Err(HostError::Broken { id, why }) => Ok(broken(&id, &why)),
            Err(error) => Err(error),
        }
    }

    /// How a VM was when it was removed, by its whole id.
    pub fn removed(&self, id: &str) -> Option<View> {
        self.shared.registry().gone.iter().find(|view| view.id == id).cloned()
    }

    /// Makes a VM; `key`: a request with the same key has the same answer.
    ///
    /// # Errors
    /// [`HostError`]; nothing is left then.
    pub async fn create(&self, name: Option<String>, spec: Spec, key: Option<String>) -> Result<View, HostError> {
        spec.check(self.shared.host_cpus).map_err(HostError::Bad)?;
        if let Some(name) = &name {
            name::check(name)?;
        }
        let id = name::new_id();
        let name = name.unwrap_or_else(|| name::default_name(&id));
        {
            let mut registry = self.shared.registry();
            if let Some(key) = &key {
                if let Some(Entry::Vm(vm)) = registry.keys.get(key).and_then(|id| registry.vms.get(id)) {
                    return Ok(vm.view());
                }
                if !registry.making.insert(key.clone()) {
                    return Err(HostError::UnderWay);
                }
            }
            if let Some(id) = registry.names.get(&name).cloned() {
                key.iter().for_each(|key| {
                    registry.making.remove(key);
                });
                return Err(HostError::Taken { name, id });
            }
            registry.names.insert(name.clone(), id.clone());
        }
        // Beside the request: if its client goes, the VM is made, or not, all the same.
        let host = self.clone();
        let made = tokio::spawn(async move { host.make(id, name, spec, key).await });
        match made.await {
            Ok(made) => made,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    async fn make(&self, id: String, name: String, spec: Spec, key: Option<String>) -> Result<View, HostError> {
        let kept = Kept {
            name: name.clone(),
            created: store::now(),
            key: key.clone(),
            spec,
        };
        let (shared, place, copy) = (self.shared.clone(), id.clone(), kept.clone());
        let made = blocking(move || shared.store.create(&place, &copy)).await;
        let mut registry = self.shared.registry();
        if let Some(key) = &key {
            registry.making.remove(key);
        }
        if let Err(error) = made {
            registry.names.remove(&name);
            return Err(error.into());
        }
        let vm = Vm::new(self.shared.clone(), id.clone(), kept, Progress::default());
        let view = vm.view();
        registry.vms.insert(id.clone(), Entry::Vm(vm));
        if let Some(key) = key {
            registry.keys.insert(key, id.clone());
        }
        drop(registry);
        self.events().tell("created", &id, &name, None);
        Ok(view)
    }

    /// Gives a VM another name.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn rename(&self, word: &str, to: String) -> Result<View, HostError> {
        name::check(&to)?;
        let vm = self.find(word)?;
        let from = vm.view().name;
        {
            let mut registry = self.shared.registry();
            match registry.names.get(&to) {
                Some(id) if id == vm.id() => return Ok(vm.view()),
                Some(id) => {
                    let id = id.clone();
                    return Err(HostError::Taken { name: to, id });
                }
                None => registry.names.insert(to.clone(), vm.id().into()),
            };
        }
        let renamed = vm.rename(to.clone()).await;
        let other = if renamed.is_ok() { &from } else { &to };
        self.shared.registry().names.remove(other);
        renamed.map_err(|source| failed("rename", from, source))?;
        Ok(vm.view())
    }

    /// Forgets a VM; `force`: kills it first.
    ///
    /// # Errors
    /// [`HostError`].
    pub async fn remove(&self, word: &str, force: bool) -> Result<(), HostError> {
        let vm = match self.find(word) {
            Ok(vm) => vm,
            Err(HostError::Broken { id, .. }) => return self.remove_broken(id).await,
            Err(error) => return Err(error),
        };
        let mut watch = vm.watch();
        let name = vm.view().name;
        let wanted = vm.apply(Input::Remove { force }).await;
        wanted.map_err(|source| failed("remove", name, source))?;
        let _ = watch.wait_for(|view| view.removed).await;
        Ok(())
    }

    async fn remove_broken(&self, id: String) -> Result<(), HostError> {
        let shared = self.shared.clone();
        blocking(move || {
            if let store::Lock::Theirs(holder) = shared.store.folder(&id).lock()? {
                let which = holder.map_or("a process".into(), |holder| format!("process {}", holder.pid));
                return Err(HostError::Bad(format!("{which} still runs the VM {id}; end it first")));
            }
            shared.store.remove(&id)?;
            shared.forget(&id);
            shared.events.tell("removed", &id, &id, None);
            Ok(())
        })
        .await
    }

    /// Begins to start a VM; the operation ends when its guest runs.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn start(&self, word: &str, key: Option<String>) -> Result<watch::Receiver<Operation>, HostError> {
        let vm = self.find(word)?;
        let (wanted, undone) = (vm.clone(), vm.clone());
        let begun = self.operations.begin(
            "start",
            vm.id(),
            key,
            async move |teller| {
                wanted.apply(Input::Start).await.map_err(|error| error.to_string())?;
                teller.progress("waiting until the guest runs");
                runs(&wanted).await
            },
            async move {
                let _ = undone.apply(Input::Kill).await;
            },
        );
        Ok(begun?)
    }

    /// Begins to stop a VM, whose guest has so long; the operation ends when it has ended.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn stop(
        &self,
        word: &str,
        patience: Duration,
        key: Option<String>,
    ) -> Result<watch::Receiver<Operation>, HostError> {
        self.end(word, "stop", Input::Stop(patience), key)
    }

    /// Begins to stop and start a VM; the operation ends when its guest runs again.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn restart(
        &self,
        word: &str,
        patience: Duration,
        key: Option<String>,
    ) -> Result<watch::Receiver<Operation>, HostError> {
        self.end(word, "restart", Input::Restart(patience), key)
    }

    fn end(
        &self,
        word: &str,
        kind: &'static str,
        input: Input,
        key: Option<String>,
    ) -> Result<watch::Receiver<Operation>, HostError> {
        let vm = self.find(word)?;
        let (wanted, undone) = (vm.clone(), vm.clone());
        let begun = self.operations.begin(
            kind,
            vm.id(),
            key,
            async move |teller| {
                let mut watch = wanted.watch();
                wanted.apply(input).await.map_err(|error| error.to_string())?;
                teller.progress("waiting until the guest has powered off");
                let gone = |view: &View| view.removed || view.pid.is_none();
                if matches!(input, Input::Stop(_)) {
                    let _ = watch.wait_for(gone).await;
                    return Ok(());
                }
                let _ = watch
                    .wait_for(|view| view.removed || view.state != State::Restarting)
                    .await;
                teller.progress("waiting until the guest runs");
                runs(&wanted).await
            },
            async move {
                let _ = undone.apply(Input::Spare).await;
            },
        );
        Ok(begun?)
    }
}

/// Waits until a VM runs, or says why it does not.
async fn runs(vm: &Vm) -> Result<(), String> {
    let mut watch = vm.watch();
    let settled = watch.wait_for(|view| view.removed || !matches!(view.state, State::Starting | State::Created));
    let view = match settled.await {
        Ok(view) => view.clone(),
        Err(_) => return Err("it was removed".into()),
    };
    let why = view.message.unwrap_or_else(|| match &view.exit {
        Some(exit) => format!("it ended at once ({}, exit code {})", exit.reason, exit.code),
        None => "it does not run".into(),
    });
    match view.state {
        State::Running | State::Paused => Ok(()),
        // It was quick: that is what it was for.
        State::Stopped => Ok(()),
        State::Restarting => Err(format!("{why}; it is started again in a moment, as its policy says")),
        _ => Err(why),
    }
}

pub(crate) fn failed(doing: &'static str, name: String, source: VmError) -> HostError {
    HostError::Vm { doing, name, source }
}

fn broken(id: &str, why: &str) -> View {
    View {
        id: id.into(),
        name: id.into(),
        state: State::Broken,
        message: Some(why.into()),
        exit: None,
        pid: None,
        created: 0,
        started: None,
        restarts: 0,
        sockets: None,
        spec: None,
        removed: false,
    }
}
