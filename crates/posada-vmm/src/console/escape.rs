//! The console's commands: what keys mean.

const CTRL_A: u8 = 1;

/// What to do with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Give it to the guest.
    Pass(u8),
    /// Nothing: the beginning of a command, or one that there is not.
    Nothing,
    /// List the commands.
    Help,
    /// End the VM.
    Quit,
}

/// Whether Ctrl-A was the last key.
#[derive(Default)]
pub(super) struct Escape {
    begun: bool,
}

impl Escape {
    /// The next key.
    pub(super) fn key(&mut self, key: u8) -> Action {
        if !std::mem::take(&mut self.begun) {
            if key != CTRL_A {
                return Action::Pass(key);
            }
            self.begun = true;
            return Action::Nothing;
        }
        match key {
            CTRL_A => Action::Pass(CTRL_A),
            b'x' => Action::Quit,
            b'h' | b'?' => Action::Help,
            _ => Action::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_begin_with_ctrl_a_and_all_other_keys_pass() {
        let mut escape = Escape::default();
        let actions: Vec<_> = b"x\x03\x01\x01h\x01h\x01q\x01xx"
            .iter()
            .map(|key| escape.key(*key))
            .collect();
        use Action::*;
        let expected = [
            Pass(b'x'),
            Pass(3),
            Nothing,
            Pass(1),
            Pass(b'h'),
            Nothing,
            Help,
            Nothing,
            Nothing,
            Nothing,
            Quit,
            Pass(b'x'),
        ];
        assert_eq!(actions, expected);
    }
}
