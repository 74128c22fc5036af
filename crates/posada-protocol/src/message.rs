//! The messages. New requests and new optional fields need no new version: who does not know a request refuses it, and unknown
//! fields are skipped. The version goes up when an agent or a host of before could misunderstand.

use crate::statistics::Statistics;
use serde::{Deserialize, Serialize};

/// The newest version that this code speaks.
pub const NEWEST: u32 = 1;
/// The oldest.
pub const OLDEST: u32 = 1;

/// The first message in each direction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The sender's version of Posada.
    pub posada: String,
    /// The newest version that it speaks.
    pub newest: u32,
    /// The oldest.
    pub oldest: u32,
}

impl Hello {
    /// Ours.
    pub fn ours() -> Self {
        Self {
            posada: env!("CARGO_PKG_VERSION").into(),
            newest: NEWEST,
            oldest: OLDEST,
        }
    }

    /// The version that both speak, if there is one.
    pub fn agree(&self, other: &Self) -> Option<u32> {
        let version = self.newest.min(other.newest);
        (version >= self.oldest && version >= other.oldest).then_some(version)
    }
}

/// Columns and rows of a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments. One without a slash is looked for in `PATH`.
    pub command: Vec<String>,
    /// Set in its environment, which else has `PATH`, `HOME`, `USER`, `LOGNAME` and `SHELL` as at a login.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// Where it begins instead of the user's home.
    #[serde(default)]
    pub directory: Option<String>,
    /// By name or number, root if it is not there.
    #[serde(default)]
    pub user: Option<String>,
    /// Give it a terminal of that size instead of pipes; its standard error is then part of its output.
    #[serde(default)]
    pub terminal: Option<Size>,
    /// Input will come. Without, its standard input is empty.
    #[serde(default)]
    pub input: bool,
}

/// What a client wants, once in a connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// Run a program. Answers: [`Answer::Started`], then data and [`Answer::Taken`], at last [`Answer::Ended`]. If the
    /// connection ends before, the program gets a SIGHUP.
    Exec(Exec),
    /// End the guest as its administrator would. [`Answer::Done`] when it has begun to.
    Shutdown {
        /// What comes after.
        how: Ending,
    },
    /// Set the clock, of Unix time. [`Answer::Done`].
    SetTime {
        /// Nanoseconds since 1970.
        nanoseconds: u64,
    },
    /// Set the host name, for now and the next boots. [`Answer::Done`].
    SetHostname {
        /// Letters, digits, dashes and dots.
        name: String,
    },
    /// Let the owners of these keys log in by ssh. Keys that can already stay. [`Answer::Done`].
    AuthorizeKeys {
        /// As whom, by name or number.
        user: String,
        /// Lines of `authorized_keys`.
        keys: Vec<String>,
    },
    /// Send a file or folder as a tar archive: data, then [`Answer::Done`].
    Get {
        /// Absolute.
        path: String,
    },
    /// Unpack the tar archive that comes as input, up to the end of that: [`Answer::Done`].
    Put {
        /// Absolute, and there.
        directory: String,
    },
    /// Tell how the guest is: [`Answer::Statistics`].
    Statistics {
        /// How many processes to tell of: those that have used most CPU time, and those that have most memory.
        processes: u32,
    },
    /// Write all that file systems on disks hold back, and stop writes to them: [`Answer::Done`]. They go on with
    /// [`Order::Thaw`] ([`Answer::Done`] once more), when the connection ends, or when the time is over.
    Freeze {
        /// The most seconds, 1 to 600.
        seconds: u32,
    },
    /// Have so many CPUs online, the first ones. [`Answer::Cpus`].
    SetCpus {
        /// 1 to the CPUs that there are.
        online: u32,
    },
}

/// How a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// It powers off.
    PowerOff,
    /// It starts again.
    Reboot,
    /// It stops, and the VM stays.
    Halt,
}

/// What a client says of work that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case")]
pub enum Order {
    /// A program's terminal has another size.
    Resize(Size),
    /// Let frozen file systems go on.
    Thaw,
    /// Send a program's process group a signal of this number.
    Signal {
        /// Linux's number for x86-64.
        number: i32,
    },
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// By itself, with this code.
    Exited(i32),
    /// By a signal of this number.
    Killed(i32),
}

impl Status {
    /// What a shell makes of it: the code, or 128 + the signal.
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => 128 + signal,
        }
    }
}

/// Why a request was not done, as far as programs tell cases apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// There is no such program or file.
    NotFound,
    /// It is there, and may not be run, read or written.
    NotPermitted,
    /// The request makes no sense.
    Invalid,
    /// Anything else.
    Other,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// The program runs.
    Started {
        /// Its process id in the guest.
        pid: u32,
    },
    /// The program has taken so many bytes of input; as many more may be sent.
    Taken {
        /// Bytes.
        bytes: u32,
    },
    /// The program has ended, and all of its output has been sent.
    Ended {
        /// How.
        status: Status,
    },
    /// It was done.
    Done,
    /// How the guest is.
    Statistics(Box<Statistics>),
    /// The guest's CPUs now.
    Cpus {
        /// Numbers of those that are there.
        present: Vec<u32>,
        /// Numbers of those that work.
        online: Vec<u32>,
    },
    /// It was not done.
    Failed {
        /// For programs.
        why: Failure,
        /// For people: a sentence.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_that_both_speak_is_taken() {
        let speaks = |oldest, newest| Hello {
            posada: String::new(),
            newest,
            oldest,
        };
        assert_eq!(speaks(1, 3).agree(&speaks(2, 5)), Some(3));
        assert_eq!(speaks(2, 5).agree(&speaks(1, 3)), Some(3));
        assert_eq!(speaks(1, 1).agree(&speaks(1, 1)), Some(1));
        assert_eq!(speaks(1, 2).agree(&speaks(3, 4)), None);
        assert_eq!(speaks(3, 4).agree(&speaks(1, 2)), None);
        assert_eq!(Hello::ours().agree(&Hello::ours()), Some(NEWEST));
    }

    #[test]
    fn messages_of_later_versions_are_read_as_far_as_they_are_known() {
        let text = r#"{"request":"exec","command":["ls"],"priority":7}"#;
        let request: Request = serde_json::from_str(text).unwrap();
        let command = vec!["ls".into()];
        assert_eq!(
            request,
            Request::Exec(Exec {
                command,
                ..Exec::default()
            })
        );
        assert!(serde_json::from_str::<Request>(r#"{"request":"fly"}"#).is_err());
        let text = serde_json::to_string(&Answer::Ended {
            status: Status::Killed(9),
        })
        .unwrap();
        assert_eq!(text, r#"{"answer":"ended","status":{"killed":9}}"#);
    }
}
