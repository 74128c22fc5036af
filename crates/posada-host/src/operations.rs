//! What takes a while: begun by a request, watched and cancelled by others.

use crate::name;
use crate::store;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::{Notify, watch};
use utoipa::ToSchema;

/// Operations that are remembered after their end.
const REMEMBERED: usize = 256;
/// Operations at a time.
const MOST: usize = 4096;

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// It goes on.
    Running,
    /// It was done.
    Done,
    /// It was not done.
    Failed,
    /// Somebody did not want it any more.
    Cancelled,
}

/// Something that takes a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its id.
    pub id: String,
    /// What: `start`, `stop`, `restart`.
    pub kind: String,
    /// The VM's id.
    pub vm: String,
    /// How far it is.
    pub stage: Stage,
    /// What it is waiting for, in words.
    pub progress: String,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When it was begun, in milliseconds since 1970.
    pub begun: u64,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended: Option<u64>,
}

/// An operation's end in the table.
pub struct Entry {
    key: Option<String>,
    state: watch::Sender<Operation>,
    cancel: Notify,
}

/// Tells of progress.
#[derive(Clone)]
pub struct Teller(Arc<Entry>);

impl Teller {
    /// It is at this now.
    pub fn progress(&self, words: impl Into<String>) {
        self.0.state.send_modify(|operation| operation.progress = words.into());
    }
}

/// All operations of a daemon.
#[derive(Default)]
pub struct Operations(Mutex<VecDeque<Arc<Entry>>>);

/// There are too many.
#[derive(Debug, thiserror::Error)]
#[error("{MOST} operations are under way; wait for some of them")]
pub struct TooMany;

impl Operations {
    fn table(&self) -> MutexGuard<'_, VecDeque<Arc<Entry>>> {
        self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Begins one, or finds the one that a request with the same key has begun. `work` does it; when it is cancelled, `work` is
    /// dropped where it waits and `undo` is done.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn begin<W, U>(
        &self,
        kind: &str,
        vm: &str,
        key: Option<String>,
        work: impl FnOnce(Teller) -> W,
        undo: U,
    ) -> Result<watch::Receiver<Operation>, TooMany>
    where
        W: Future<Output = Result<(), String>> + Send + 'static,
        U: Future<Output = ()> + Send + 'static,
    {
        let mut table = self.table();
        if let Some(entry) = table.iter().find(|entry| key.is_some() && entry.key == key) {
            return Ok(entry.state.subscribe());
        }
        while table.len() >= REMEMBERED {
            let Some(over) = table
                .iter()
                .position(|entry| entry.state.borrow().stage != Stage::Running)
            else {
                break;
            };
            table.remove(over);
        }
        if table.len() >= MOST {
            return Err(TooMany);
        }
        let entry = Arc::new(Entry {
            key,
            state: watch::Sender::new(Operation {
                id: name::new_id(),
                kind: kind.into(),
                vm: vm.into(),
                stage: Stage::Running,
                progress: String::new(),
                error: None,
                begun: store::now(),
                ended: None,
            }),
            cancel: Notify::new(),
        });
        table.push_back(entry.clone());
        let receiver = entry.state.subscribe();
        let work = work(Teller(entry.clone()));
        tokio::spawn(async move {
            let (stage, error) = tokio::select! {
                result = work => match result {
                    Ok(()) => (Stage::Done, None),
                    Err(error) => (Stage::Failed, Some(error)),
                },
                () = entry.cancel.notified() => {
                    undo.await;
                    (Stage::Cancelled, None)
                }
            };
            entry.state.send_modify(|operation| {
                operation.stage = stage;
                operation.error = error;
                operation.ended = Some(store::now());
            });
        });
        Ok(receiver)
    }

    /// All that are under way or remembered, the oldest first.
    pub fn list(&self) -> Vec<Operation> {
        self.table().iter().map(|entry| entry.state.borrow().clone()).collect()
    }

    /// How many are under way.
    pub fn running(&self) -> usize {
        let table = self.table();
        table
            .iter()
            .filter(|entry| entry.state.borrow().stage == Stage::Running)
            .count()
    }

    /// One of them.
    pub fn find(&self, id: &str) -> Option<watch::Receiver<Operation>> {
        let table = self.table();
        let entry = table.iter().find(|entry| entry.state.borrow().id == id)?;
        Some(entry.state.subscribe())
    }

    /// Cancels one; `None`: there is none with this id.
    pub fn cancel(&self, id: &str) -> Option<watch::Receiver<Operation>> {
        let table = self.table();
        let entry = table.iter().find(|entry| entry.state.borrow().id == id)?;
        entry.cancel.notify_one();
        Some(entry.state.subscribe())
    }
}

/// Waits for an operation's end, and gives how it is then.
pub async fn finished(mut operation: watch::Receiver<Operation>) -> Operation {
    let ended = operation.wait_for(|operation| operation.stage != Stage::Running).await;
    let ended = ended.map(|operation| operation.clone());
    ended.unwrap_or_else(|_| operation.borrow().clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn end(receiver: watch::Receiver<Operation>) -> (Stage, Option<String>) {
        let operation = finished(receiver).await;
        (operation.stage, operation.error)
    }

    #[tokio::test]
    async fn an_operation_is_done_fails_or_is_cancelled() {
        let table = Operations::default();
        let done = table.begin("start", "vm", None, async |_| Ok(()), async {}).unwrap();
        assert_eq!(end(done).await, (Stage::Done, None));
        let failed = table.begin("start", "vm", None, async |_| Err("no".into()), async {});
        assert_eq!(end(failed.unwrap()).await, (Stage::Failed, Some("no".into())));
        let undone = Arc::new(Notify::new());
        let undo = undone.clone();
        let work = async |_| std::future::pending().await;
        let never = table.begin("stop", "vm", None, work, async move { undo.notify_one() });
        let never = never.unwrap();
        assert_eq!(table.running(), 1);
        let id = never.borrow().id.clone();
        assert!(table.cancel(&id).is_some() && table.cancel("nothing").is_none());
        assert_eq!(end(never).await, (Stage::Cancelled, None));
        undone.notified().await;
        assert_eq!(table.list().len(), 3);
    }

    #[tokio::test]
    async fn a_request_that_is_sent_again_begins_nothing_new() {
        let table = Operations::default();
        let begin = |key: &str| {
            let work = async |_| std::future::pending().await;
            let begun = table.begin("stop", "vm", Some(key.into()), work, async {});
            begun.unwrap().borrow().id.clone()
        };
        let first = begin("a");
        assert_eq!(begin("a"), first);
        assert_ne!(begin("b"), first);
    }

    #[tokio::test]
    async fn memory_of_operations_is_bounded() {
        let table = Operations::default();
        for _ in 0..REMEMBERED * 2 {
            let done = table.begin("start", "vm", None, async |_| Ok(()), async {}).unwrap();
            finished(done).await;
        }
        assert_eq!(table.list().len(), REMEMBERED);
    }
}
