//! What a process prints, as it comes.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

#[derive(Default)]
struct State {
    text: String,
    /// Bytes of a character that is not whole yet.
    rest: Vec<u8>,
    closed: bool,
}

/// The text of one pipe so far; carriage returns are left out.
#[derive(Clone, Default)]
pub(crate) struct Transcript(Arc<(Mutex<State>, Condvar)>);

/// Why a text did not come.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The deadline passed.
    Late,
    /// The pipe was closed.
    Closed,
}

impl Transcript {
    /// Follows `pipe` on a thread of its own until it closes.
    pub(crate) fn follow(mut pipe: impl Read + Send + 'static) -> Self {
        let transcript = Self::default();
        let writer = transcript.clone();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A broken pipe and a closed one are the same to a test.
            while let Ok(length @ 1..) = pipe.read(&mut buffer) {
                writer.append(&buffer[..length]);
            }
            writer.state().closed = true;
            writer.0.1.notify_all();
        });
        transcript
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().expect("no reader panics with the lock held")
    }

    fn append(&self, bytes: &[u8]) {
        let mut state = self.state();
        let mut all = std::mem::take(&mut state.rest);
        all.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&all) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => all.len(),
        };
        state.rest = all.split_off(whole);
        let text = String::from_utf8_lossy(&all);
        state.text.extend(text.chars().filter(|letter| *letter != '\r'));
        self.0.1.notify_all();
    }

    /// All of it.
    pub(crate) fn text(&self) -> String {
        self.state().text.clone()
    }

    /// Waits until `wanted` stands at `from` (bytes) or behind, and gives where it begins.
    pub(crate) fn find(&self, wanted: &str, from: usize, deadline: Instant) -> Result<usize, Missing> {
        self.wait(deadline, |state| state.text[from..].find(wanted).map(|at| from + at))
    }

    /// Waits for the end of the pipe.
    pub(crate) fn closed(&self, deadline: Instant) -> Result<(), Missing> {
        self.wait(deadline, |state| state.closed.then_some(()))
    }

    fn wait<T>(&self, deadline: Instant, ready: impl Fn(&State) -> Option<T>) -> Result<T, Missing> {
        let mut state = self.state();
        loop {
            if let Some(found) = ready(&state) {
                return Ok(found);
            }
            if state.closed {
                return Err(Missing::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Missing::Late);
            }
            state = self
                .0
                .1
                .wait_timeout(state, left)
                .expect("no reader panics with the lock held")
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn text_is_found_across_reads_and_behind_a_place() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let transcript = Transcript::follow(reader);
        std::io::Write::write_all(&mut writer, b"one\r\ntw").unwrap();
        assert_eq!(transcript.find("one\n", 0, soon()), Ok(0));
        std::io::Write::write_all(&mut writer, b"o one").unwrap();
        assert_eq!(transcript.find("two", 0, soon()), Ok(4));
        assert_eq!(transcript.find("one", 1, soon()), Ok(8));
        assert_eq!(transcript.find("three", 0, Instant::now()), Err(Missing::Late));
        drop(writer);
        assert_eq!(transcript.find("three", 0, soon()), Err(Missing::Closed));
        assert_eq!(transcript.closed(soon()), Ok(()));
    }

    #[test]
    fn characters_are_whole() {
        let transcript = Transcript::default();
        transcript.append(&"ä".as_bytes()[..1]);
        transcript.append(&"ä".as_bytes()[1..]);
        transcript.append(b"\xff!");
        assert_eq!(transcript.text(), "ä\u{fffd}!");
    }
}
