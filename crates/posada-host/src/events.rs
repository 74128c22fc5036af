//! What has happened, for who watches.

use crate::store;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use tokio::sync::broadcast;
use utoipa::ToSchema;

/// Events that are remembered.
const REMEMBERED: usize = 1024;

/// Something that has happened to a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Counts from the daemon's start: no two have the same.
    pub number: u64,
    /// When, in milliseconds since 1970.
    pub time: u64,
    /// What: `created`, `starting`, `running`, `paused`, `stopping`, `restarting`, `stopped`, `failed`, `removed`, `renamed`,
    /// `changed`, `adopted`; or `lost`: so many events were missed that are not remembered any more.
    pub event: String,
    /// The VM's id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// More about it, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

struct Past {
    next: u64,
    events: VecDeque<Event>,
}

/// All events of a daemon.
pub struct Events {
    past: Mutex<Past>,
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            past: Mutex::new(Past {
                next: 1,
                events: VecDeque::new(),
            }),
            sender: broadcast::Sender::new(REMEMBERED),
        }
    }
}

impl Events {
    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Something has happened.
    pub fn tell(&self, event: &str, id: &str, name: &str, message: Option<String>) {
        tracing::info!(event, id, name, message, "VM");
        let mut past = self.past();
        let event = Event {
            number: past.next,
            time: store::now(),
            event: event.into(),
            id: id.into(),
            name: name.into(),
            message,
        };
        past.next += 1;
        if past.events.len() == REMEMBERED {
            past.events.pop_front();
        }
        past.events.push_back(event.clone());
        // Nobody may listen.
        let _ = self.sender.send(event);
    }

    /// Remembered events behind number `since`, and those that follow.
    pub fn watch(&self, since: Option<u64>) -> (Vec<Event>, broadcast::Receiver<Event>) {
        let past = self.past();
        // Under the lock: none is missed or told twice.
        let receiver = self.sender.subscribe();
        let since = since.unwrap_or(past.next);
        let mut events: Vec<Event> = past
            .events
            .iter()
            .filter(|event| event.number > since)
            .cloned()
            .collect();
        let first = past.events.front().map_or(past.next, |event| event.number);
        if since + 1 < first {
            events.insert(0, missed(first - since - 1));
        }
        (events, receiver)
    }
}

/// So many events cannot be told any more.
pub fn missed(count: u64) -> Event {
    Event {
        number: 0,
        time: store::now(),
        event: "lost".into(),
        id: String::new(),
        name: String::new(),
        message: Some(format!("{count} events were missed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_event_is_missed_or_told_twice() {
        let events = Events::default();
        for _ in 0..3 {
            events.tell("running", "id", "name", None);
        }
        let (past, mut later) = events.watch(Some(1));
        assert_eq!(past.iter().map(|event| event.number).collect::<Vec<_>>(), [2, 3]);
        events.tell("stopped", "id", "name", None);
        assert_eq!(later.try_recv().unwrap().number, 4);
        assert!(later.try_recv().is_err());
        assert!(events.watch(None).0.is_empty());
    }

    #[test]
    fn memory_of_the_past_is_bounded_and_says_so() {
        let events = Events::default();
        for _ in 0..REMEMBERED + 10 {
            events.tell("running", "id", "name", None);
        }
        let (past, _) = events.watch(Some(0));
        assert_eq!(past.len(), REMEMBERED + 1);
        assert_eq!(past[0].message.as_deref(), Some("10 events were missed"));
    }
}
