//! Where VMs run, and on which engine.

use crate::folder::Folder;
use crate::launch::Launch;
use crate::nested::TestHost;
use crate::process::Process;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A place for VMs: the same test may be done in each.
pub enum Place {
    /// This machine, and the software CPU.
    Here,
    /// A test host, and its KVM.
    Kvm(TestHost),
}

impl Place {
    /// A test host of its own, unless QEMU is not installed.
    ///
    /// # Panics
    /// When it does not start.
    pub fn kvm() -> Option<Self> {
        TestHost::start().map(Self::Kvm)
    }

    /// Starts a VM.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(&self, launch: &Launch) -> Process {
        match self {
            Self::Here => launch.start(),
            Self::Kvm(host) => launch.clone().accel("kvm").start_in(host),
        }
    }

    /// Whether a break point that is set from outside the guest is hit. QEMU's CPU, below the KVM of a test host, loads the
    /// debug registers with a guest's state but does not arm them.
    pub fn has_breakpoints(&self) -> bool {
        matches!(self, Self::Here)
    }

    /// Starts another command beside it.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start_command(&self, command: &mut Command, patience: Duration) -> Process {
        match self {
            Self::Here => Process::start(command, patience),
            Self::Kvm(host) => host.start_command(command, patience),
        }
    }

    /// A new, empty folder there, with the same path here.
    ///
    /// # Panics
    /// When there is none to be had.
    pub fn folder(&self) -> Folder {
        let folder = Folder::new();
        if let Self::Kvm(host) = self {
            host.run(&format!("mkdir {}", folder.path().display())).expect("");
        }
        folder
    }

    /// The names in a folder there, each in a line.
    ///
    /// # Panics
    /// When it cannot be read.
    pub fn names(&self, folder: &Path) -> String {
        let mut list = Command::new("ls");
        list.arg("-A").arg(folder);
        let ended = self.start_command(&mut list, Duration::from_secs(60)).end();
        ended.expect_code(0);
        ended.output
    }
}
