//! Commands that speak with the host's daemon. They know its API and nothing else.

mod archive;
mod connect;
mod exec;
mod list;
mod make;
mod manage;
mod text;
mod watch;

pub use archive::{CpArguments, cp};
pub use connect::{DaemonArguments, daemon};
pub use exec::{AttachArguments, ShellArguments, attach, guest, shell};
pub use list::{InspectArguments, LsArguments, inspect, ls};
pub use make::{CreateArguments, RunArguments, create, run};
pub use manage::{
    KillArguments, NamesArguments, RenameArguments, RestartArguments, RmArguments, SetArguments, StopArguments, kill,
    pause, rename, restart, resume, rm, set, start, stop,
};
pub use text::{CompletionsArguments, ManArguments, completions, man};
pub use watch::{
    EventsArguments, LogsArguments, StatsArguments, TopArguments, WaitArguments, events, logs, stats, top, wait,
};
