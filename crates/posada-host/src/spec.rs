//! What a VM is to be: what its user says when it is made.

use crate::policy::RestartPolicy;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use utoipa::ToSchema;

/// Memory of a VM whose user does not say, in bytes. The host gives it only as the guest touches it.
const MEMORY: u64 = 1 << 30;
/// The least memory that makes sense, in bytes.
const LEAST_MEMORY: u64 = 1 << 20;
/// The most bytes of labels, environment and command line together.
const MOST_TEXT: usize = 64 << 10;
/// As many disks as `/dev/vda` to `/dev/vdz` can name.
const MOST_DISKS: usize = 26;

/// What a VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "from", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Boot {
    /// A kernel that its user has as a file.
    Kernel {
        /// Linux bzImage, ELF with a PVH note, or multiboot 1.
        #[schema(value_type = String)]
        kernel: PathBuf,
        /// Initial RAM file system; the first module of a multiboot kernel.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        #[schema(value_type = Option<String>)]
        initramfs: Option<PathBuf>,
        /// The kernel's command line instead of `console=ttyS0`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        cmdline: Option<String>,
    },
    /// A snapshot, from which each start goes on.
    Snapshot {
        /// Its folder.
        #[schema(value_type = String)]
        place: PathBuf,
    },
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Raw image or block device.
    #[schema(value_type = String)]
    pub path: PathBuf,
    /// The guest may not write.
    #[serde(default)]
    pub read_only: bool,
}

/// What a VM is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// What it runs.
    pub boot: Boot,
    /// vCPUs, at most as many as the host has CPUs.
    #[serde(default = "one")]
    pub cpus: u32,
    /// Guest memory in bytes, a multiple of 4096.
    #[serde(default = "memory")]
    pub memory: u64,
    /// `/dev/vda`, `/dev/vdb` and so on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// What its vCPUs can do: `host`, `x86-64-v2` or `x86-64-v3`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// How guest code runs: `auto`, `kvm`, `emulate` and so on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<String>,
    /// Have a virtio console, too.
    #[serde(default)]
    pub virtio_console: bool,
    /// Have sockets between host and guest, by which the guest's agent is reached.
    #[serde(default = "yes")]
    pub vsock: bool,
    /// The guest's context id at them, instead of 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cid: Option<u32>,
    /// Have the debug-exit port.
    #[serde(default)]
    pub debug_exit: bool,
    /// End instead of starting anew when the guest resets.
    #[serde(default)]
    pub no_reboot: bool,
    /// Whether it is started again when it ends by itself.
    #[serde(default)]
    pub restart: RestartPolicy,
    /// Forget it when it has ended.
    #[serde(default)]
    pub remove: bool,
    /// Environment of programs that are run in it, as `NAME=value`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    /// Where programs that are run in it begin.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// Whatever its user wants to remember, and to find it by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

fn one() -> u32 {
    1
}

fn memory() -> u64 {
    MEMORY
}

fn yes() -> bool {
    true
}

impl Spec {
    /// One vCPU and 1 GiB.
    pub fn new(boot: Boot) -> Self {
        Self {
            boot,
            cpus: one(),
            memory: memory(),
            disks: Vec::new(),
            cpu_model: None,
            accel: None,
            virtio_console: false,
            vsock: true,
            cid: None,
            debug_exit: false,
            no_reboot: false,
            restart: RestartPolicy::No,
            remove: false,
            environment: Vec::new(),
            directory: None,
            labels: BTreeMap::new(),
        }
    }

    /// Whether a host with so many CPUs can have it. Files are not looked at: they may come later.
    ///
    /// # Errors
    /// A sentence that says what is wrong and what to do.
    pub fn check(&self, host_cpus: u32) -> Result<(), String> {
        if self.cpus == 0 {
            return Err("a VM has at least one CPU".into());
        }
        if self.cpus > host_cpus {
            return Err(format!(
                "this host has {host_cpus} CPUs, so a VM cannot have {}: its vCPUs would only wait for each other; \
                 give --cpus {host_cpus} or fewer",
                self.cpus
            ));
        }
        if self.memory < LEAST_MEMORY || !self.memory.is_multiple_of(4096) {
            return Err(format!(
                "a VM cannot have {} bytes of memory; give a multiple of 4 KiB from 1 MiB on, for example 512M",
                self.memory
            ));
        }
        if self.disks.len() > MOST_DISKS {
            return Err(format!("a VM has at most {MOST_DISKS} disks"));
        }
        if self.remove && self.restart != RestartPolicy::No {
            return Err("a VM that is removed when it ends cannot be restarted then; leave out one of both".into());
        }
        let (boot, cmdline): (Vec<&Path>, _) = match &self.boot {
            Boot::Kernel {
                kernel,
                initramfs,
                cmdline,
            } => (
                [Some(kernel.as_path()), initramfs.as_deref()]
                    .into_iter()
                    .flatten()
                    .collect(),
                cmdline.as_deref().unwrap_or_default(),
            ),
            Boot::Snapshot { place } => (vec![place], ""),
        };
        let disks = self.disks.iter().map(|disk| disk.path.as_path());
        for path in boot.into_iter().chain(disks) {
            if !path.is_absolute() {
                let path = path.display();
                return Err(format!(
                    "{path} is no absolute path, and the host works in another folder than you"
                ));
            }
        }
        if let Some(bad) = self
            .environment
            .iter()
            .find(|entry| entry.find('=').is_none_or(|at| at == 0))
        {
            return Err(format!("{bad:?} sets no variable; write NAME=value"));
        }
        let labels = self.labels.iter().map(|(key, value)| key.len() + value.len());
        let text = cmdline.len() + self.environment.iter().map(String::len).chain(labels).sum::<usize>();
        if text > MOST_TEXT {
            return Err(format!(
                "labels, environment and command line have {text} bytes; {MOST_TEXT} are the most"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> Spec {
        Spec::new(Boot::Kernel {
            kernel: "/k".into(),
            initramfs: None,
            cmdline: None,
        })
    }

    #[test]
    fn little_must_be_said() {
        let text = r#"{"boot":{"from":"kernel","kernel":"/k"}}"#;
        let read: Spec = serde_json::from_str(text).unwrap();
        assert_eq!(read, spec());
        assert_eq!((read.cpus, read.memory), (1, 1 << 30));
        assert_eq!(read.check(1), Ok(()));
    }

    #[test]
    fn unknown_fields_are_named() {
        let text = r#"{"boot":{"from":"kernel","kernel":"/k"},"cpu":2}"#;
        let error = serde_json::from_str::<Spec>(text).unwrap_err().to_string();
        assert!(error.contains("`cpu`"), "{error}");
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_reason() {
        type Change = fn(&mut Spec);
        let cases: [(Change, &str); 9] = [
            (|spec| spec.cpus = 3, "this host has 2 CPUs"),
            (|spec| spec.cpus = 0, "at least one"),
            (|spec| spec.memory = 12345678, "4 KiB"),
            (|spec| spec.memory = 4096, "1 MiB"),
            (
                |spec| {
                    spec.remove = true;
                    spec.restart = RestartPolicy::Always;
                },
                "leave out one",
            ),
            (
                |spec| {
                    spec.disks.push(Disk {
                        path: "disk".into(),
                        read_only: false,
                    })
                },
                "disk is no absolute path",
            ),
            (
                |spec| spec.boot = Boot::Snapshot { place: "s".into() },
                "s is no absolute",
            ),
            (|spec| spec.environment.push("=x".into()), "NAME=value"),
            (
                |spec| spec.environment.push(format!("A={}", "x".repeat(1 << 20))),
                "the most",
            ),
        ];
        for (change, words) in cases {
            let mut spec = spec();
            change(&mut spec);
            let error = spec.check(2).unwrap_err();
            assert!(error.contains(words), "{error}");
        }
    }
}
