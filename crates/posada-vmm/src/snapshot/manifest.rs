//! What a snapshot says of itself: `manifest.json` and `state.json`. docs/snapshots.md describes the format.

use crate::machine::MachineState;
use posada_devices::virtio::blk::DiskIdentity;
use posada_engine::CpuState;
use posada_engine::clock::ClockState;
use posada_engine::cpu::CpuModel;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use std::path::PathBuf;
use xxhash_rust::xxh3::xxh3_64;

/// The format that this Posada writes, and the last that it reads.
pub const FORMAT: u32 = 1;

/// A number that people see as 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Checksum(pub(super) u64);

impl Checksum {
    /// XXH3-64.
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(xxh3_64(bytes))
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        format!("{:016x}", checksum.0)
    }
}

impl TryFrom<String> for Checksum {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        match u64::from_str_radix(&text, 16) {
            Ok(number) if text.len() == 16 => Ok(Self(number)),
            _ => Err("a checksum has 16 hexadecimal digits"),
        }
    }
}

/// A file of the snapshot, by which it is known to be whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Check {
    /// Bytes.
    pub(super) length: u64,
    /// Of all bytes; images have theirs in their index.
    pub(super) xxh3: Option<Checksum>,
}

/// Where a disk's content is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Kept {
    /// In the snapshot: `diskN.raw` and its index.
    Copy,
    /// Where it was, by what it is known to be unchanged.
    Reference(DiskIdentity),
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedDisk {
    /// Where it was, absolute. One that is no text cannot be found again by it.
    pub(super) path: PathBuf,
    /// Bytes.
    pub(super) size: u64,
    /// The guest may not write.
    pub(super) read_only: bool,
    /// Its content.
    pub(super) kept: Kept,
}

/// What the machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    /// Bytes of RAM.
    pub(super) memory: u64,
    /// The vCPUs.
    pub(super) model: CpuModel,
    /// For the next boot.
    pub(super) cmdline: String,
    /// For the next boot, the file `initramfs` is there.
    pub(super) initramfs: bool,
    pub(super) virtio_console: bool,
    /// The guest's context id, if it has a vsock. Not in the snapshots of the first Posadas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) vsock: Option<u32>,
    pub(super) debug_exit: bool,
    pub(super) disks: Vec<SavedDisk>,
}

/// `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// The Posada that wrote it.
    pub(super) posada: String,
    /// When, in seconds since the Unix epoch.
    pub(super) created: u64,
    /// The machine.
    pub(super) vm: Shape,
    /// All other files.
    pub(super) files: BTreeMap<String, Check>,
}

/// What surrounds a manifest: enough to tell a newer format and a flipped bit before all else.
#[derive(Serialize, Deserialize)]
struct Envelope {
    format: u32,
    checksum: Checksum,
    snapshot: Box<RawValue>,
}

/// Why a manifest cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// Its format.
    Newer(u32),
    /// What is wrong, as the end of the sentence "manifest.json …".
    Damaged(String),
}

impl Manifest {
    /// The file's bytes.
    pub(super) fn encode(&self) -> serde_json::Result<Vec<u8>> {
        let snapshot = RawValue::from_string(serde_json::to_string_pretty(self)?)?;
        let mut bytes = serde_json::to_vec_pretty(&Envelope {
            format: FORMAT,
            checksum: Checksum::of(snapshot.get().as_bytes()),
            snapshot,
        })?;
        bytes.push(b'\n');
        Ok(bytes)
    }

    /// Reads the file's bytes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Unreadable> {
        /// All that is known of the formats to come.
        #[derive(Deserialize)]
        struct Format {
            format: u32,
        }
        let damaged = |why: String| Unreadable::Damaged(why);
        let parsed = |error: serde_json::Error| damaged(format!("cannot be read: {error}"));
        let Format { format } = serde_json::from_slice(bytes).map_err(parsed)?;
        if format > FORMAT {
            return Err(Unreadable::Newer(format));
        }
        if format == 0 {
            return Err(damaged("has format 0, which never was".into()));
        }
        let envelope: Envelope = serde_json::from_slice(bytes).map_err(parsed)?;
        let text = envelope.snapshot.get();
        if Checksum::of(text.as_bytes()) != envelope.checksum {
            return Err(damaged("does not have the content that was saved".into()));
        }
        serde_json::from_str(text).map_err(parsed)
    }
}

/// `state.json`.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The vCPUs, in their order.
    pub cpus: Vec<CpuState>,
    /// When it was stopped.
    pub clock: ClockState,
    /// The devices.
    pub machine: MachineState,
    /// The user had paused it. Not in the snapshots of the first Posadas.
    #[serde(default)]
    pub paused: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Random, model};

    fn manifest() -> Manifest {
        Manifest {
            posada: "0.1.0".into(),
            created: 1_700_000_000,
            vm: Shape {
                memory: 64 << 20,
                model: model(2),
                cmdline: "console=ttyS0 \"quoted\"".into(),
                initramfs: true,
                virtio_console: false,
                vsock: Some(3),
                debug_exit: true,
                disks: vec![SavedDisk {
                    path: "/a disk".into(),
                    size: 512,
                    read_only: true,
                    kept: Kept::Reference(DiskIdentity {
                        device: 2,
                        inode: 7,
                        modified_seconds: -5,
                        modified_nanoseconds: 9,
                    }),
                }],
            },
            files: BTreeMap::from([(
                "memory".into(),
                Check {
                    length: 64 << 20,
                    xxh3: None,
                },
            )]),
        }
    }

    #[test]
    fn a_manifest_survives_its_encoding() {
        let manifest = manifest();
        assert_eq!(Manifest::decode(&manifest.encode().unwrap()).unwrap(), manifest);
    }

    #[test]
    fn a_newer_format_is_known_whatever_else_it_has() {
        let text = format!(r#"{{"format":{},"all":"new"}}"#, FORMAT + 1);
        assert_eq!(Manifest::decode(text.as_bytes()), Err(Unreadable::Newer(FORMAT + 1)));
        assert!(matches!(
            Manifest::decode(br#"{"format":0}"#),
            Err(Unreadable::Damaged(_))
        ));
        assert!(matches!(Manifest::decode(b""), Err(Unreadable::Damaged(_))));
    }

    #[test]
    fn any_flipped_bit_is_found_or_harmless() {
        let (manifest, mut random) = (manifest(), Random(9));
        let bytes = manifest.encode().unwrap();
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << random.below(8);
            match Manifest::decode(&flipped) {
                Ok(read) => assert_eq!(read, manifest, "byte {at}"),
                Err(Unreadable::Newer(_)) => assert!(at < 20),
                Err(Unreadable::Damaged(why)) => assert!(!why.is_empty()),
            }
        }
    }
}
