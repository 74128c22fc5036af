//! What can go wrong between us and the host's KVM: each error says what was being done, why it failed and what helps.

use std::io;

/// Why KVM cannot be used, or not in this way.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no device.
    #[error("there is no {path}: {help}")]
    Missing {
        /// The device.
        path: String,
        /// What helps.
        help: String,
    },
    /// We may not open the device.
    #[error("no permission for {path}: {help}")]
    Permission {
        /// The device.
        path: String,
        /// What helps.
        help: String,
    },
    /// The device cannot be opened for another reason.
    #[error("cannot open {path}: {source}; {help}")]
    Open {
        /// The device.
        path: String,
        /// The host's reason.
        source: io::Error,
        /// What helps.
        help: &'static str,
    },
    /// The device does not speak KVM's interface.
    #[error(
        "{path} speaks version {version} of KVM's interface and not 12: it is not the KVM device, or not of this kernel"
    )]
    Version {
        /// The device.
        path: String,
        /// What it says.
        version: i32,
    },
    /// The kernel's KVM is too old.
    #[error("this kernel's KVM lacks {what}, which Linux has since {since}; use a newer kernel, or --accel emulate")]
    Capability {
        /// What is missing.
        what: &'static str,
        /// Version of Linux.
        since: &'static str,
    },
    /// Another number of processors than there can be.
    #[error("this host's KVM gives a VM 1 to {most} virtual processors, not {count}; change --cpus")]
    Count {
        /// Asked for.
        count: u32,
        /// The most.
        most: u32,
    },
    /// KVM refused a request.
    #[error("KVM refused to {what}: {source}; {}", advice(.source))]
    Refused {
        /// What was asked of it.
        what: &'static str,
        /// The host's reason.
        source: io::Error,
    },
    /// A model or a CPU state that cannot be.
    #[error("{0}")]
    State(String),
}

/// What helps against a refusal.
fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM | libc::ENOSPC) => "stop other VMs, or give this one less",
        Some(libc::EMFILE | libc::ENFILE) => "raise the limit of open files (ulimit -n)",
        Some(libc::EBUSY) => "another hypervisor may have taken the processor's virtualization; end it",
        Some(libc::EIO) => "KVM has given this VM up; the kernel's log may say why",
        _ => "the kernel's log may say more; --accel emulate does without KVM",
    }
}

impl From<Error> for posada_engine::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::State(text) => Self::State(text),
            other => Self::Host(other.to_string()),
        }
    }
}

/// Says what was being asked of KVM when it refused.
pub(crate) trait Asked<T> {
    /// "KVM refused to `what`".
    fn to(self, what: &'static str) -> Result<T, Error>;
    /// `what` has a value that KVM takes for impossible.
    fn taking(self, what: &'static str) -> Result<T, Error>;
}

impl<T> Asked<T> for Result<T, kvm_ioctls::Error> {
    fn to(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|error| Error::Refused {
            what,
            source: io::Error::from_raw_os_error(error.errno()),
        })
    }

    fn taking(self, what: &'static str) -> Result<T, Error> {
        match self {
            Err(error) if error.errno() == libc::EINVAL => Err(Error::State(format!(
                "KVM takes the {what} for impossible on this processor"
            ))),
            other => other.to("set a processor's state"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_request_the_cause_and_a_way_out() {
        let refused: Result<(), _> = Err(kvm_ioctls::Error::new(libc::ENOMEM));
        let text = refused.to("make a virtual processor").unwrap_err().to_string();
        for part in ["make a virtual processor", "Cannot allocate memory", "stop other VMs"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn an_impossible_state_is_told_from_a_host_without_means() {
        let refused = |errno| Err::<(), _>(kvm_ioctls::Error::new(errno)).taking("control registers");
        let error = posada_engine::Error::from(refused(libc::EINVAL).unwrap_err());
        assert!(matches!(&error, posada_engine::Error::State(text) if text.contains("control registers")));
        let error = posada_engine::Error::from(refused(libc::EIO).unwrap_err());
        assert!(matches!(&error, posada_engine::Error::Host(text) if text.contains("given this VM up")));
    }
}
