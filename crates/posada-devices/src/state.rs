//! What is wrong with a saved state. States come from files, which may be damaged or forged: whoever restores one checks it
//! all, and a guest gets nothing by it that it could not do to its devices itself.

use std::fmt::{self, Display};

/// The first thing of a saved state that does not fit the device: "disk 1 has 8192 sectors, the snapshot's has 4096".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateError {
    /// Of what, the outermost first.
    subject: String,
    /// What is said of it: begins with a verb.
    reason: String,
}

impl StateError {
    /// An error of something that [`StateError::of`] names. `reason` begins with a verb.
    pub fn new(reason: impl Into<String>) -> Self {
        Self {
            subject: String::new(),
            reason: reason.into(),
        }
    }

    /// The device has `ours` of `what`, and the snapshot's had `theirs`.
    pub fn differs(what: &str, ours: impl Display, theirs: impl Display) -> Self {
        Self::new(format!("has {ours} {what}, the snapshot's has {theirs}"))
    }

    /// Says of what it is.
    #[must_use]
    pub fn of(mut self, subject: impl Display) -> Self {
        self.subject = if self.subject.is_empty() {
            subject.to_string()
        } else {
            format!("{subject}: {}", self.subject)
        };
        self
    }
}

impl Display for StateError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.subject, self.reason)
    }
}

impl std::error::Error for StateError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_a_sentence_about_the_innermost_thing() {
        let error = StateError::differs("sectors", 8192, 4096).of("disk 1");
        assert_eq!(error.to_string(), "disk 1 has 8192 sectors, the snapshot's has 4096");
        let error = StateError::new("lies outside RAM").of("queue 0").of("disk 1");
        assert_eq!(error.to_string(), "disk 1: queue 0 lies outside RAM");
    }
}
