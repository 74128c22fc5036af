//! A harness for tests that cross processes: start `posada`, wait for what the guest prints, type, look at how it ended.
//!
//! ```no_run
//! use posada_tests::Launch;
//!
//! let mut vm = Launch::run().kernel("vmlinuz").initramfs("initrd.img").cpus(2).start();
//! vm.expect("login:").send("root\n");
//! let mut shell = vm.shell();
//! shell.run("nproc").expect("2");
//! shell.send("poweroff\n");
//! shell.end().expect_code(0);
//! ```
//!
//! Everything has a deadline, and what fails says what the process has printed. A process never outlives its test.
//!
//! A [`TestHost`] is a machine with a real KVM in which the same command lines run.
//!
//! The tests need what `make e2e` builds. They are left out of `make unit`, and fail where something is missing: a test that
//! is skipped in silence holds nothing.

mod folder;
mod images;
mod launch;
mod nested;
mod place;
mod process;
mod session;
mod shell;
mod terminal;
mod transcript;

pub use folder::Folder;
pub use images::{PROMPT, debian, debian_in, heavy_disk, image, root_disk, script_disk, small_linux};
pub use launch::{Launch, agent_program, bare_program, posada, software_cpu};
pub use nested::TestHost;
pub use place::Place;
pub use process::{Ended, Process};
pub use shell::{Answer, Shell};
pub use terminal::Settings;
